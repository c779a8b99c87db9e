"""chosen: scores where a mask is, a low number elsewhere, that are spelled as products with the mask as 0 and 1.

    s * m + ~m * -1e9          ->    masked_fill(s, ~m, -1e9)
    s * m - (1 - m) * 1e9      ->    the same

What a value is where a bool is False and where it is True is found by doing to these two what the graph does to the
bool.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from tome_fx.ops import LEFT_OUT

from ..building.emit import Emit
from ..rules import Call, find
from ..rules.base import draws
from ..rules.pointwise import POINTWISE, MaskRule, scalar
from ..rules.views import ExpandRule, PermuteRule, ViewRule
from .tiles import equal

aten = torch.ops.aten
_DEEP = 16
"""Ops in a row that are looked through: a mask has half a dozen."""
Levels = tuple[fx.Node, Tensor]
"""A bool, and what a value is where it is False and where it is True."""


def chosen(call: Call, emit: Emit) -> fx.Node | None:
    """A sum of what is multiplied by a mask, and of what is low where the mask is not."""
    alpha = call.args["alpha"]
    if len(call.nodes) != 2 or not isinstance(alpha, (int, float)):
        return None
    times = alpha if call.target is aten.add.Tensor else -alpha
    for kept, filled in permutations(call.nodes):
        own, other = (1.0, times) if kept is call.nodes[0] else (times, 1.0)
        for x, by in permutations(Call(kept).nodes, 2) if own == 1 and kept.target is aten.mul.Tensor else ():
            val = x.meta["val"]
            found = _found(by, filled, emit) if val.shape == call.out.shape and val.dtype == call.out.dtype else None
            if found is not None and (low := found[1] * other) <= LEFT_OUT:
                return emit(aten.masked_fill.Scalar, x, found[0], low)
    return None


def _found(by: fx.Node, filled: fx.Node, emit: Emit) -> tuple[fx.Node, float] | None:
    """Where a factor is 0 and elsewhere 1, and what a term is there and elsewhere 0."""
    known: dict[fx.Node, Levels | None] = {}
    factor = _levels(by, emit, known, _DEEP)
    term = _levels(filled, emit, known, _DEEP) if factor is not None else None
    if factor is None or term is None or not equal(factor[0], term[0]):
        return None
    (mask, ones), own = factor, [float(n) for n in term[1]]
    if [float(n) for n in ones] == [0, 1]:
        return (emit(aten.logical_not.default, mask), own[0]) if own[1] == 0 else None
    return (mask, own[1]) if [float(n) for n in ones] == [1, 0] and own[0] == 0 else None


def _levels(node: fx.Node, emit: Emit, known: dict[fx.Node, Levels | None], deep: int) -> Levels | None:
    if node not in known:
        known[node] = _done(Call(node), emit, known, deep - 1) if node.op == "call_function" and deep else None
        if known[node] is None and node.meta["val"].dtype is torch.bool:
            known[node] = node, torch.tensor([False, True])
    return known[node]


def _done(call: Call, emit: Emit, known: dict[fx.Node, Levels | None], deep: int) -> Levels | None:
    placed = isinstance(find(call), (ViewRule, PermuteRule, ExpandRule))
    alike = (find(call) is POINTWISE or isinstance(find(call), MaskRule)) and not draws(call.target)
    if not call.nodes or len(call.results) != 1 or not (placed or alike):
        return None
    numbers = {n: scalar(n) for n in call.nodes}
    found: dict[fx.Node, Any] = {
        n: _levels(n, emit, known, deep) if number is None else (None, torch.tensor(number))
        for n, number in numbers.items()
    }
    masks = [held[0] for held in found.values() if held is not None and held[0] is not None]
    if None in found.values() or not masks or not all(equal(mask, masks[0]) for mask in masks):
        return None
    if placed:
        args, kwargs = fx.map_arg((call.node.args, call.node.kwargs), lambda n: masks[0])
        return emit(call.target, *args, **kwargs), found[call.nodes[0]][1]
    args, kwargs = fx.map_arg((call.node.args, call.node.kwargs), lambda n: found[n][1])
    with _disable_current_modes(), torch.no_grad():
        return masks[0], call.target(*args, **kwargs)


__all__ = ["chosen"]
