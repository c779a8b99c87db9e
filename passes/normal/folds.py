"""folds: what is done to each row of all samples, folded into one dim and unfolded again, is done to the samples.

    linear(x.view(-1, C), w).view(B, N, -1)    ->    linear(x, w)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..algebra.axes import expr
from ..building.emit import Emit
from ..rules import Call, find
from ..rules.base import draws
from ..rules.pointwise import POINTWISE

aten = torch.ops.aten
_FOLDS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}
_OF_ROWS = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}
_PRODUCTS = {aten.mm.default, aten.matmul.default}
_ALONG = {aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.softmax.int}
_DEEP = 64
"""Ops in a row that are looked through: an MLP has half a dozen."""
Known = dict[fx.Node, "fx.Node | None"]


def unfolded(call: Call, emit: Emit) -> fx.Node | None:
    """A view that takes rows apart into samples and tokens, of what was done to each row since these were folded."""
    (rows,), out = call.nodes, call.out
    if call.vals[0].dim() != 2 or out.dim() < 3 or rows.target in _FOLDS:
        return None
    known: Known = {}
    found = _apart(rows, out.shape[:2], emit, known, _DEEP)
    others = (user for n in known for user in n.users if n.target not in _FOLDS)
    if found is None or any(user is not call.node and user not in known for user in others):
        return None
    same = [*map(expr, found.meta["val"].shape)] == [*map(expr, out.shape)]
    return found if same else emit(aten.reshape.default, found, list(out.shape))


def _apart(node: fx.Node, lead: Sequence[Any], emit: Emit, known: Known, deep: int) -> fx.Node | None:
    if node not in known:
        inside = node.op == "call_function" and deep > 0
        known[node] = _found(Call(node), lead, emit, known, deep - 1) if inside else None
    return known[node]


def _found(call: Call, lead: Sequence[Any], emit: Emit, known: Known, deep: int) -> fx.Node | None:
    if not call.nodes or len(call.results) != 1 or not isinstance(call.node.target, torch._ops.OpOverload):
        return None
    first, args = call.nodes[0], list[Any](call.node.args)
    if call.target in _FOLDS:
        held = [*map(expr, first.meta["val"].shape)]
        return first if held == [*map(expr, (*lead, *call.out.shape[1:]))] else None
    if call.target is aten.addmm.default:
        return _biased(call, lead, emit, known, deep)
    if find(call) is POINTWISE and not draws(call.target):
        rows = [n for n in call.nodes if not _one_row(n.meta["val"], call.out.dim())]
    elif call.target in _OF_ROWS or (call.target in _PRODUCTS and call.vals[1].dim() == 2):
        rows = [first] if first.meta["val"].dim() == 2 and first not in call.nodes[1:] else []
    elif call.target in _ALONG and (at := call.axis(args[1], max(call.out.dim(), call.vals[0].dim()))) > 0:
        rows, args[1] = [first], at + 1
    else:
        return None
    new = {n: _apart(n, lead, emit, known, deep) for n in rows}
    if not new or None in new.values():
        return None
    args, kwargs = fx.map_arg((args, call.node.kwargs), lambda n: new.get(n, n))
    return emit(aten.matmul.default if call.target in _PRODUCTS else call.target, *args, **kwargs)


def _biased(call: Call, lead: Sequence[Any], emit: Emit, known: Known, deep: int) -> fx.Node | None:
    """A product of rows, with a row for all of them."""
    bias, rows, weights = call.nodes
    if call.args["beta"] != 1 or call.args["alpha"] != 1 or bias.meta["val"].dim() != 1 or rows in (bias, weights):
        return None
    own = _apart(rows, lead, emit, known, deep)
    return None if own is None else emit(aten.linear.default, own, emit(aten.permute.default, weights, [1, 0]), bias)


def _one_row(val: Tensor, rank: int) -> bool:
    """Whether a value is the same for all rows."""
    return val.dim() < rank or expr(val.shape[0]) == 1


__all__ = ["unfolded"]
