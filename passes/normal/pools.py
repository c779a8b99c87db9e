"""pools: what is the largest or the mean of all there is along some dims is spelled as that reduction.

    x.max(1).values                  ->    amax(x, [1])
    x.min()                          ->    amin(x, [0, 1, 2])
    x.topk(1, 1).values              ->    amax(x, [1], keepdim=True)
    adaptive_avg_pool1d(x, 1)        ->    mean(x, [-1], keepdim=True)
    max_pool1d(x, N)                 ->    amax(x, [-1], keepdim=True)
    full((1, N), 1 / N) @ x          ->    mean(x, [-2], keepdim=True)
"""

from __future__ import annotations

from itertools import permutations
from math import prod

import torch
from torch import fx

from ..algebra.axes import expr
from ..building.emit import Emit
from ..rules import Call
from ..rules.base import Role
from ..rules.pointwise import scalar
from .beside import product_of_two
from .letters import placed

aten = torch.ops.aten
_ROUNDING = 1e-6


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


def windowed(call: Call, emit: Emit) -> fx.Node | None:
    """A pool whose one window is all there is."""
    a, x = call.args, call.vals[0]
    rank = int(str(call.target).split("_pool")[1][0])
    dims = [*range(-rank, 0)]
    window = [*a["kernel_size"]] * (rank if len(a["kernel_size"]) == 1 else 1)
    whole = [expr(x.shape[d]) for d in dims] == [*map(expr, window)]
    plain = not any(a["padding"]) and all(n == 1 for n in a.get("dilation", ())) and a.get("divisor_override") is None
    op = aten.amax.default if "max" in str(call.target) else aten.mean.dim
    return emit(op, call.nodes[0], dims, True) if whole and plain else None


def topmost(call: Call, emit: Emit) -> fx.Node | None:
    """The one largest or least along a dim, whose place nobody reads."""
    op = aten.amax.default if call.args["largest"] else aten.amin.default
    return emit(op, call.nodes[0], [call.axis(call.args["dim"])], True) if call.args["k"] == 1 else None


def by_one_number(call: Call, emit: Emit) -> fx.Node | None:
    """A product with what is one number everywhere: a sum, or a mean."""
    sig = product_of_two(call)
    if sig is None:
        return None
    summed = [x for x, role in sig.roles.items() if role is Role.SUM]
    for (by, weights), (own, x) in permutations(zip(sig.ins, call.nodes, strict=True)):
        number = _number(weights, emit)
        new = {d for d, letter in enumerate(sig.outs[0]) if letter not in own}
        one = all(expr(call.out.shape[d]) == 1 for d in new) and {*summed} <= {*own} & {*by} and summed
        kept = [letter for letter in own if letter not in summed]
        if number is None or not one or len(sig.roles) != len(summed) or len({*own}) < len(own):
            continue
        dims = [d for d, letter in enumerate(own) if letter in summed]
        count = prod(expr(x.meta["val"].shape[d]) for d in dims)
        op, times = (aten.mean.dim, number * count) if isinstance(count, int) else (aten.sum.dim_IntList, number)
        found = placed(emit(op, x, dims), kept, sig.outs[0], emit)
        found = found if abs(times - 1) < _ROUNDING else emit(aten.mul.Tensor, found, times)
        return found if [*map(expr, found.meta["val"].shape)] == [*map(expr, call.out.shape)] else None
    return None


def _number(node: fx.Node, emit: Emit) -> float | None:
    """The one number that a value made of numbers is everywhere."""
    value, number = emit.known.get(node), scalar(node)
    if number is not None or value is None or not value.numel() or not value.is_floating_point():
        return number
    first = value.flatten()[:1]
    return float(first) if bool((value == first).all()) else None


__all__ = ["by_one_number", "extreme", "pooled", "topmost", "windowed"]
