#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.10 or later): nn.TransformerEncoder in eval mode with a float mask (a bias by distance). No compiler.
#
# Expected from memory: a float mask is added to the scores, as the documentation says, with gradients on or off.
# Seen: under no_grad the mask is read as bool(mask): every pair whose bias is not 0 is masked out, with no warning.
#   The outputs are those of the bool mask `mask != 0`; a bias without a 0 gives NaN.
# Why: without gradients the layers run `_transformer_encoder_layer_fwd`, whose softmax takes bool masks and casts others
#   (pytorch issue 118628, open). nn.MultiheadAttention leaves its fast path for float masks since pull request 107641.
# Output:
#   by distance: with gradients as added True, no_grad as added False, no_grad as mask != 0 True
#   without a 0: with gradients NaN False, no_grad NaN True
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn

torch.manual_seed(0)
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
layer, tokens, place = encoder.layers[0], torch.randn(2, 5, 16), torch.arange(5.0)
bias = -(place[:, None] - place).abs()
attended, _ = layer.self_attn(tokens, tokens, tokens, attn_mask=bias)
hidden = layer.norm1(tokens + attended)
added = layer.norm2(hidden + layer.linear2(layer.linear1(hidden).relu()))
grad, grad_one = encoder(tokens, mask=bias), encoder(tokens, mask=bias - 1)
with torch.no_grad():
    fast, as_bool, fast_one = encoder(tokens, mask=bias), encoder(tokens, mask=bias != 0), encoder(tokens, mask=bias - 1)
facts = [torch.allclose(grad, added, atol=1e-5), torch.allclose(fast, added, atol=1e-2), torch.equal(fast, as_bool)]
nans = [bool(grad_one.isnan().any()), bool(fast_one.isnan().any())]
print("by distance: with gradients as added {}, no_grad as added {}, no_grad as mask != 0 {}".format(*facts))
print("without a 0: with gradients NaN {}, no_grad NaN {}".format(*nans))
sys.exit(not (facts == [True, False, True] and nans == [False, True]))
PYTHON
