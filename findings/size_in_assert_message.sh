#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1 (CPU, Python 3.11 or later): torch.compile(dynamic=True) of a ViT for images of any size.
#
# Expected from memory: dynamic_img_size=True is the option for images of many sizes, and dynamic=True compiles one
#   graph for all of them, as sizes are only compared (H % 16 == 0) and used in shapes.
# Seen: every size is a compilation, in silence, and mark_dynamic on height and width raises ConstraintViolationError,
#   "your code specialized it to be a constant". With dynamic_img_pad=True too it is one graph.
# Why: the patch embedding gives torch._assert a message that names the size, an f-string. Dynamo makes the string when
#   it traces, whether the assertion holds or not, and so the size becomes a number. With padding there is no assertion.
# Output:
#   dynamic_img_size: 4 graphs for 4 sizes; mark_dynamic: ConstraintViolationError
#   dynamic_img_size and dynamic_img_pad: 1 graphs for 4 sizes; mark_dynamic: compiled
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0 torchvision==0.29.1 timm==1.0.31
cd "$dir"
cat > sizes.py <<'PYTHON'
import logging
import sys

import timm
import torch

logging.disable(logging.CRITICAL)


def graphs(model):
    """How many graphs four sizes take."""
    made = []

    def backend(gm, inputs):
        made.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for side in (224, 256, 288, 320):
        compiled(torch.randn(2, 3, side, side - 32))
    return len(made)


def marked(model):
    torch._dynamo.reset()
    x = torch.randn(2, 3, 224, 192)
    torch._dynamo.mark_dynamic(x, (2, 3))
    try:
        torch.compile(model, backend="eager")(x)
    except Exception as error:
        return type(error).__name__
    return "compiled"


found = {}
with torch.no_grad():
    for names in (("dynamic_img_size",), ("dynamic_img_size", "dynamic_img_pad")):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, **dict.fromkeys(names, True)).eval()
        found[names] = graphs(model), marked(model)
        print(f"{' and '.join(names)}: {found[names][0]} graphs for 4 sizes; mark_dynamic: {found[names][1]}")
sys.exit([*found.values()] != [(4, "ConstraintViolationError"), (1, "compiled")])
PYTHON
"$dir/venv/bin/python" sizes.py
