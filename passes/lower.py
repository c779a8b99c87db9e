"""lower: replace the tome ops by the form that is fastest on the device. It changes no value.

On a CPU `merge`, `merge_size` and `log_size` stay opaque calls: every layer has another token count, and Inductor
would compile five more C++ kernels for each of them. Elsewhere they are spelled out in ATen, so that they fuse.

    cuda:  tome.merge(x, size, ...)  ->  tome.merge_aten(x, size, ...)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tome_fx import ops  # noqa: F401 - defines the operators

tome = torch.ops.tome

# device type -> op -> the op that takes its place; "" is every device not listed.
FORMS: dict[str, dict] = {
    "cpu": {},
    "": {
        tome.merge.default: tome.merge_aten.default,
        tome.merge_size.default: tome.merge_size_aten.default,
        tome.log_size.default: torch.ops.aten.log.default,
    },
}


def lower(gm: fx.GraphModule) -> int:
    """Rewrite in place; returns how many ops were replaced."""
    count = 0
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            forms = FORMS.get(value.device.type, FORMS[""])
            if node.target in forms:
                node.target = forms[node.target]
                count += 1
    if count:
        gm.recompile()
    return count
