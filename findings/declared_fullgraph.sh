#!/usr/bin/env bash
# transformers 5.24.0, torch 2.14.1 (CPU, Python 3.10 or later): Qwen2VisionTransformerPretrainedModel with sdpa (the default).
#
# Expected from memory: a class with `_can_compile_fullgraph = True` ("Whether the model can `torch.compile` fullgraph
#   without graph breaks", transformers/utils/auto_docstring.py) compiles with fullgraph=True, at most with
#   `torch._dynamo.config.capture_scalar_outputs = True`, as the sizes of the images are the values of a tensor.
# Seen: GuardOnDataDependentSymNode with that option too, for one image or two. Without fullgraph it runs, as several
#   graphs.
# Why: unless attention is a flash implementation, each block splits its tokens by image with
#   `torch.split(tensor, lengths.tolist(), dim=2)` (modeling_qwen2_vl.py), whose sizes have no value while Dynamo traces.
# Output:
#   declared: True
#   1 image(s): fullgraph GuardOnDataDependentSymNode at torch.split: True, else more than one graph: True
#   2 image(s): fullgraph GuardOnDataDependentSymNode at torch.split: True, else more than one graph: True
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
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

torch._dynamo.config.capture_scalar_outputs = True
model = Tower(Tower.config_class(depth=2, embed_dim=64, hidden_size=48, num_heads=2)).eval()
assert model.config._attn_implementation == "sdpa"
print("declared:", Tower._can_compile_fullgraph)
same = Tower._can_compile_fullgraph
for images in (1, 2):
    patches, grids = torch.randn(144 * images, 1176), torch.tensor([[1, 12, 12]] * images)
    error, counter = None, CompileCounter()
    with torch.no_grad():
        torch._dynamo.reset()
        try:
            torch.compile(model, backend="eager", fullgraph=True)(patches, grids)
        except Exception as raised:
            error = raised
        torch._dynamo.reset()
        torch.compile(model, backend=counter)(patches, grids)
    at_split, several = "torch.split(tensor, lengths.tolist()" in str(error), counter.frame_count > 1
    print(f"{images} image(s): fullgraph {type(error).__name__} at torch.split: {at_split},",
          f"else more than one graph: {several}")
    same &= type(error).__name__ == "GuardOnDataDependentSymNode" and at_split and several
sys.exit(not same)
PYTHON
