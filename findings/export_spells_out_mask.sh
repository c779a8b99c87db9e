#!/usr/bin/env bash
# transformers 5.24.0, torch 2.14.1 (CPU, Python 3.10 or later): ViTModel, DeiTModel and Dinov2Model with sdpa (the default), no padding.
#
# Expected from memory: torch.export and torch.compile trace the same forward, so a model that is called without a mask
#   has the same attention call in both graphs, attn_mask=None, as it has when it runs eagerly.
# Seen: eager and torch.compile attend without a mask. torch.export, strict or not, attends with a bool mask [B, 1, N, N]
#   that the graph makes from aranges and that is True throughout. The outputs are the same.
# Why: `_ignore_bidirectional_mask_sdpa` (transformers/masking_utils.py) never skips the mask under export, also where
#   there is no padding mask whose contents it could not look at.
# Output:
#   ViTModel: eager None, compile None, export all True [2, 1, 17, 17], strict export all True [2, 1, 17, 17]
#   DeiTModel: eager None, compile None, export all True [2, 1, 18, 18], strict export all True [2, 1, 18, 18]
#   Dinov2Model: eager None, compile None, export all True [2, 1, 17, 17], strict export all True [2, 1, 17, 17]
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
from torch.overrides import TorchFunctionMode
from transformers import DeiTConfig, DeiTModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}


def seen(call, args):
    if "scaled_dot_product_attention" in str(call):
        mask = args[3] if len(args) > 3 else None
        masks.append("None" if mask is None else f"{'all' if mask.all() else 'not all'} True {list(mask.shape)}")


class Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        seen(func, args if kwargs.get("attn_mask") is None else (*args, kwargs["attn_mask"]))
        return func(*args, **kwargs)


class Run(torch.fx.Interpreter):
    def call_function(self, target, args, kwargs):
        seen(target, args if kwargs.get("attn_mask") is None else (*args, kwargs["attn_mask"]))
        return super().call_function(target, args, kwargs)


def backend(graph, _):
    return lambda *args: Run(graph).run(*args)


torch.manual_seed(0)
same = True
for config, cls in ((ViTConfig, ViTModel), (DeiTConfig, DeiTModel), (Dinov2Config, Dinov2Model)):
    model, images, masks = cls(config(**SIZES)).eval(), torch.randn(2, 3, 32, 32), []
    with torch.no_grad():
        with Watch():
            outputs = [model(images)]
        outputs.append(torch.compile(model, backend=backend, fullgraph=True)(images))
        for strict in (False, True):
            graph = torch.export.export(model, (images,), strict=strict).module()
            outputs.append(Run(graph).run(images))
    print("{}: eager {}, compile {}, export {}, strict export {}".format(cls.__name__, *masks))
    full = f"all True {[2, 1, *[outputs[0][0].shape[1]] * 2]}"
    same &= masks == ["None", "None", full, full]
    for output in outputs[1:]:
        value = output if isinstance(output, torch.Tensor) else output["last_hidden_state"]
        torch.testing.assert_close(value, outputs[0]["last_hidden_state"])
sys.exit(not same)
PYTHON
