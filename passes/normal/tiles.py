"""tiles: what the same is done to piece by piece, joined again, is done to the whole.

    cat([x[:, :1] + y[:, :1], x[:, 1:] + y[:, 1:]], 1)               ->    x + y
    cat([(a @ k).softmax(-1) @ v for a in q.chunk(4, 1)], 1)         ->    (q @ k).softmax(-1) @ v
    cat([c, x[:, :4], x[:, 4:]], 1)                                  ->    cat([c, x], 1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..algebra.axes import expr
from ..building.emit import Emit
from ..rules import Call, find
from ..rules.base import Role, draws
from ..rules.facts import NO_FACTS
from ..rules.pointwise import POINTWISE
from ..rules.signature import SignatureRule
from ..rules.views import PermuteRule

aten = torch.ops.aten
_CUTS = {aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default}
_DEEP = 32
"""Ops in a row that are looked through: an attention has a dozen, and whole towers stay as they are."""
Known = dict[tuple[Any, ...], Any]
"""What was found of these pieces along this dim, or of two arguments: a residual stream is met on many ways."""


def tiled(join: Call, d: int, emit: Emit) -> fx.Node | None:
    """The value of which these are the pieces along dim d, in order; None where they are not, or where what made a
    piece would have to stay for others who read it."""
    known: Known = {}
    whole = _tiled(join.nodes, d, emit, known, _DEEP)
    if whole is None:
        return None
    inside = {n for key, value in known.items() if value is not None and isinstance(key[-1], int) for n in key[:-1]}
    stays = (n for n in inside if not {*n.users} <= {*inside, join.node})
    return None if any(_costs(n) for n in stays) else whole


def neighbours(join: Call, d: int, emit: Emit) -> fx.Node | None:
    """A cat in which pieces of a value that stand one behind the other are one piece; None where there are none."""
    runs: list[list[Any]] = []
    for node in join.nodes:
        base, start = _cut(node, d) if node.op == "call_function" else (None, None)
        end = None if base is None else start + expr(node.meta["val"].shape[d])
        if base is not None and runs and runs[-1][0] is base and runs[-1][2] == start:
            runs[-1][2:] = [end, None]
        else:
            runs.append([base, start, end, node])
    new = [node or (base if start == 0 and end == expr(base.meta["val"].shape[d]) else
                    emit(aten.slice.Tensor, base, d, start, end) if isinstance(end, int) else None)
           for base, start, end, node in runs]  # fmt: skip
    return None if len(new) == len(join.nodes) or None in new else emit(aten.cat.default, new, d)


def _costs(node: fx.Node) -> bool:
    """Whether to compute a value once more is more than to pass over it."""
    rule = find(Call(node))
    return isinstance(rule, SignatureRule) and rule is not POINTWISE


def _tiled(nodes: Sequence[Any], d: int, emit: Emit, known: Known, deep: int) -> fx.Node | None:
    key = (*nodes, d)
    if key not in known:
        known[key] = _found(nodes, d, emit, known, deep - 1) if deep else None
    return known[key]


def _found(nodes: Sequence[Any], d: int, emit: Emit, known: Known, deep: int) -> fx.Node | None:
    calls = [Call(n) for n in nodes if isinstance(n, fx.Node) and n.op == "call_function"]
    if len(nodes) < 2 or len(calls) < len(nodes) or any(c.target is not calls[0].target for c in calls):
        return None
    first = calls[0]
    if first.target in (aten.slice.Tensor, operator.getitem):
        return _pieced(nodes, d)
    places = _places(first, d)
    if places is None or not _alike(calls):
        return None
    new: dict[fx.Node, fx.Node] = {}
    for i, k in enumerate(places):
        column = [c.nodes[i] for c in calls]
        same = all(_equal(n, column[0], known, deep) for n in column)
        whole = column[0] if same and (k is None or first.vals[i].shape[k] == 1) else None
        whole = _tiled(column, k, emit, known, deep) if whole is None and k is not None else whole
        if whole is None or new.get(column[0], whole) is not whole:
            return None
        new[column[0]] = whole
    args, kwargs = fx.map_arg((first.node.args, first.node.kwargs), lambda n: new.get(n, n))
    return emit(first.target, *args, **kwargs)


def _places(call: Call, d: int) -> list[int | None] | None:
    """The dims of the operands that an op maps to dim d of its result, None for an operand that has none; None where it
    does not map it."""
    rule = find(call)
    if isinstance(rule, PermuteRule):
        return [rule.order(call)[d]]
    if not isinstance(rule, SignatureRule) or len(call.results) != 1 or call.args.get("enable_gqa"):
        return None
    sig = rule.signature(call, NO_FACTS)
    letter = sig.outs[0][d]
    if letter is None or sig.role(letter) is not Role.MAP:
        return None
    found = [letters.index(letter) if letter in letters else None for letters in sig.ins]
    spread = call.out.shape[d] != 1
    return [None if k is not None and spread and val.shape[k] == 1 else k
            for k, val in zip(found, call.vals, strict=True)]  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    """Whether two arguments are one, or made alike of the same."""
    return _equal(a, b, {}, _DEEP)


def _equal(a: Any, b: Any, known: Known, deep: int) -> bool:
    if a is b or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return a is b or (type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b))
    if (a, b) not in known:
        alike = a.op == b.op == "call_function" and a.target is b.target and a.kwargs == b.kwargs
        alike = alike and len(a.args) == len(b.args) and deep > 0 and not draws(a.target)
        known[a, b] = alike and all(_equal(x, y, known, deep - 1) for x, y in zip(a.args, b.args, strict=True))
    return known[a, b]


def _alike(calls: Sequence[Call]) -> bool:
    """Whether all is the same of some calls but for their tensors, and nothing is random."""
    said = {str(fx.map_arg((c.node.args, c.node.kwargs), lambda _: None)) for c in calls}
    return len(said) == 1 and not (draws(calls[0].target) and calls[0].args.get("dropout_p", 1.0))


def _pieced(nodes: Sequence[Any], d: int) -> fx.Node | None:
    """What slices are all of, one behind the other."""
    cuts, at = [_cut(n, d) for n in nodes], 0
    whole = cuts[0][0]
    for node, (base, start) in zip(nodes, cuts, strict=True):
        length = node.meta["val"].shape[d]
        if base is not whole or start != at or not isinstance(length, int):
            return None
        at += length
    return whole if whole is not None and at == whole.meta["val"].shape[d] else None


def _cut(node: fx.Node, d: int) -> tuple[fx.Node | None, Any]:
    """Of what a slice along dim d is one, or a piece of a split, and from where on."""
    of: Any = node.args[0] if node.target is operator.getitem else node
    if of.target not in _CUTS or (call := Call(of)).axis(call.args["dim"]) != d or call.args.get("step", 1) != 1:
        return None, None
    at: Any = 0 if of is node else node.args[1]
    lengths, start = [val.shape[d] for val in call.results[:at]], call.args.get("start") or 0
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    if isinstance(start, int) and start < 0:  # counted from the end
        whole = call.vals[0].shape[d]
        if not isinstance(whole, int):
            return None, None
        start = max(start + whole, 0)
    return call.nodes[0], sum(map(expr, lengths), expr(start))


__all__ = ["equal", "neighbours", "tiled"]
