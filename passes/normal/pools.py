"""pools: what is the largest or the mean of all there is along some dims is spelled as that reduction.

    x.max(1).values                  ->    amax(x, [1])
    x.min()                          ->    amin(x, [0, 1, 2])
    adaptive_avg_pool1d(x, 1)        ->    mean(x, [-1], keepdim=True)
"""

from __future__ import annotations

import torch
from torch import fx

from ..building.emit import Emit
from ..rules import Call

aten = torch.ops.aten


def extreme(call: Call, emit: Emit) -> fx.Node:
    """The largest or least along a dim, or of all there is, whose place nobody reads."""
    op = aten.amax.default if "max" in str(call.target) else aten.amin.default
    dims = [call.axis(call.args["dim"])] if "dim" in call.args else [*range(call.vals[0].dim())]
    return emit(op, call.nodes[0], dims, bool(call.args.get("keepdim", False)))


def pooled(call: Call, emit: Emit) -> fx.Node | None:
    """A pool to one place."""
    size = call.args["output_size"]
    if any(not isinstance(n, int) or n != 1 for n in size):
        return None
    op = aten.amax.default if "max" in str(call.target) else aten.mean.dim
    return emit(op, call.nodes[0], [*range(-len(size), 0)], True)


__all__ = ["extreme", "pooled"]
