#!/usr/bin/env bash
# transformers 5.24.0, torch 2.14.1 (CPU, Python 3.11 or later): ViTModel with output_hidden_states=True under torch.compile.
#
# Expected from memory: the class declares `_can_compile_fullgraph = True`, so fullgraph=True either works with
#   output_hidden_states=True or does not, whatever was called before.
# Seen: it raises Unsupported on a model that has never given hidden states. After one call without a compiler that asks
#   for them it works: one graph. Without fullgraph the first compiled call runs as pieces.
# Why: the hooks that collect outputs are put on the modules by the first call that asks for them, under a
#   `threading.Lock` (`maybe_install_capturing_hooks`, transformers/utils/output_capturing.py), and Dynamo cannot enter a
#   lock nor register a hook.
# Output:
#   declared: True
#   a new model: fullgraph Unsupported: Dynamo does not know how to enter a `lock` context manager.
#   after one call without a compiler: fullgraph runs, 1 graph
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 transformers==5.24.0 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig, ViTModel

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
model, x = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).eval(), torch.randn(1, 3, 32, 32)
print("declared:", ViTModel._can_compile_fullgraph)
said, counter = "", CompileCounter()
with torch.no_grad():
    try:
        torch.compile(model, backend="eager", fullgraph=True)(x, output_hidden_states=True)
    except torch._dynamo.exc.Unsupported as error:
        said = next(line.split("Explanation: ")[1] for line in str(error).splitlines() if "Explanation: " in line)
    print("a new model: fullgraph Unsupported:", said)
    want = model(x, output_hidden_states=True).hidden_states
    torch._dynamo.reset()
    got = torch.compile(model, backend=counter, fullgraph=True)(x, output_hidden_states=True).hidden_states
torch.testing.assert_close(got, want)
print(f"after one call without a compiler: fullgraph runs, {counter.frame_count} graph")
sys.exit(not (ViTModel._can_compile_fullgraph and "`lock`" in said and counter.frame_count == 1))
PYTHON
