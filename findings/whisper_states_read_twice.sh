#!/usr/bin/env bash
# transformers 5.24.0, torch 2.14.1 (CPU, Python 3.11 or later): Whisper's generate(encoder_outputs=...) with time
# stamps, of one window of 30 s.
#
# Expected from memory: the states of an encoder that ran before (compiled, merged, on another machine) are decoded as
#   the features are from which they were made: one window, read once.
# Seen: where the text ends with a time stamp before the end of the window, its tokens are there twice or more. Of a
#   batch whose samples end apart a TypeError is raised, "'NoneType' object is not subscriptable".
# Why: with time stamps generate goes on behind the last one: it cuts the rest out of the features. Here there are no
#   features, so that the same states are read again, from the start, and there is nothing to cut the batch of.
# What to do: force_unique_generate_call=True reads states once; or give the features too and let it encode.
# Output (random weights: the tokens mean nothing, that they are repeated does):
#   once: 19 tokens 50405, 43150, 51152 ... 51844, 51844
#   as it is: 38 tokens, the last 19 are those before: True
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0 transformers==5.24.0
cd "$dir"
cat > states.py <<'PYTHON'
import sys

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, logging
from transformers.modeling_outputs import BaseModelOutput

logging.set_verbosity_error()
torch.manual_seed(0)
torch.set_num_threads(1)
config = WhisperConfig(
    vocab_size=51864, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_target_positions=64, pad_token_id=50256,
    bos_token_id=50257, eos_token_id=50256, decoder_start_token_id=50257, suppress_tokens=None,
    begin_suppress_tokens=None,
)
model = WhisperForConditionalGeneration(config).eval()
model.generation_config.no_timestamps_token_id = 50362
model.generation_config.max_initial_timestamp_index = 50
model.generation_config.is_multilingual = False
with torch.no_grad():
    states = model.model.encoder(torch.randn(1, 80, 3000)).last_hidden_state


def read(**options):
    found = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states), max_new_tokens=20, return_timestamps=True, **options
    )
    return found[0].tolist()


once = read(force_unique_generate_call=True)[1:]
once = once[: max(i for i, token in enumerate(once) if token > 50362) + 1]
found = read()
half = len(found) // 2
twice = found[:half] == found[half:]
print(f"once: {len(once)} tokens", ", ".join(map(str, once[:3])), "...", ", ".join(map(str, once[-2:])))
print(f"as it is: {len(found)} tokens, the last {half} are those before: {twice}")
sys.exit(not (twice and found[: len(once)] == once))
PYTHON
"$dir/venv/bin/python" states.py
