"""drop_unread: compute only the rows that somebody reads.

A classifier reads one row of the last block, its class token. All other rows of that block's MLP, projection and
queries, and the merge between them, are computed for nobody; a compiler cannot know, since a product has either all of
its rows or none. Backwards from every slice and select, each value gets the hull of what is read of it along one dim,
as far as the ops on the way keep the rows apart: a letter of the role MAP in their signature. Then those ops get
narrower operands.

    mlp(norm(merge(x)))[:, 0]    ->    mlp(norm(x[:, 0:1]))[:, 0]

A protected row of a merge is the same row before it, so the last match is dropped with everything else that nobody
reads. Keys and values keep all rows: a sum over tokens needs them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .algebra.axes import expr, same
from .analysis.values import size_hint
from .building.emit import drop_dead
from .building.trace import fake_like
from .normal.functional import is_impure
from .rules import Call, find
from .rules.base import Role, rule_for, tensors_of
from .rules.facts import NO_FACTS
from .rules.joins import CatRule
from .rules.signature import SignatureRule
from .rules.slices import SelectRule, SliceRule, SplitRule
from .rules.views import ExpandRule, PermuteRule

aten = torch.ops.aten
tome = torch.ops.tome
MATCHES = tuple(getattr(tome, name).default for name in ("match", "match_by", "match_parts", "match_pieces",
                                                   "match_some"))  # fmt: skip

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_REGROUPS = (*_RESHAPES, aten.flatten.using_ints, aten.unsqueeze.default)


@dataclass(frozen=True)
class Cut:
    """The rows from `lo` to `hi` along a dim."""

    dim: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Reads:
    """What a node reads of its operands. Of those that are not named it reads everything, or, with `only`, nothing."""

    parts: Mapping[fx.Node, Cut] = field(default_factory=dict)
    only: bool = False


def drop_unread(gm: fx.GraphModule) -> int:
    """Rewrite in place; returns how many ops compute fewer rows. None do unless a product is among them."""
    cuts, reads = _demand(gm.graph)
    if not any(_is_product(node) for node in cuts):
        return 0
    _narrow(gm.graph, cuts, reads)
    drop_dead(gm.graph, is_impure)
    gm.recompile()
    return len(cuts)


# -- analysis ----------------------------------------------------------------------------------------------------------


def _demand(graph: fx.Graph) -> tuple[dict[fx.Node, Cut], dict[fx.Node, Reads]]:
    """For each node that can be computed in part: the part that is read; and what each node reads of its operands."""
    cuts: dict[fx.Node, Cut] = {}
    reads: dict[fx.Node, Reads] = {}
    for node in reversed(graph.nodes):
        found = [reads[user] for user in node.users]
        wanted = [read.parts.get(node) for read in found if node in read.parts or not read.only]
        if not wanted and not is_impure(node):
            reads[node] = Reads(only=True)
            continue
        cut = _hull(node, wanted)
        read = _reads(node, cut)
        if cut is not None and read is not None:
            cuts[node] = cut
        elif cut is not None:
            read = _reads(node, None)
        if node not in cuts:  # a part of a tuple is a part of all its results
            for user in (u for u in node.users if u.target is operator.getitem):
                cuts.pop(user, None)
                reads[user] = Reads()
        reads[node] = read or Reads()
    return cuts, reads


def _hull(node: fx.Node, wanted: Sequence[Cut | None]) -> Cut | None:
    """What users read together; None where that is everything, or more than half."""
    cuts = [cut for cut in wanted if cut is not None]
    if not cuts or len(cuts) < len(wanted) or len({cut.dim for cut in cuts}) > 1:
        return None
    cut = Cut(cuts[0].dim, min(c.lo for c in cuts), max(c.hi for c in cuts))
    return cut if 2 * (cut.hi - cut.lo) <= size_hint(tensors_of(node.meta["val"])[0].shape[cut.dim]) else None


def _reads(node: fx.Node, wanted: Cut | None) -> Reads | None:
    """What a node reads of its operands when `wanted` (None: all) is read of it; None where it cannot give a part."""
    if node.op != "call_function" or not tensors_of(node.meta.get("val")):
        return None
    if isinstance(rule_for(node.target), (SliceRule, SelectRule)):
        return _read_by_cut(Call(node), wanted)
    if wanted is None:
        return Reads()
    call = Call(node)
    rule = find(call)
    if node.target is tome.merge.default:
        return _read_by_merge(node, wanted)
    if node.target is operator.getitem:
        return Reads({node.args[0]: wanted})  # type: ignore[dict-item]
    if _joins(call, rule, wanted.dim):
        return _read_by_cat(call, wanted)
    dims = _same_dim(call, rule, wanted.dim)
    if dims is None or ("size" in call.args and not _has_sizes(node, rule)):
        return None
    places = dict(zip(call.nodes, dims, strict=True))
    if any(places[n] != d for n, d in zip(call.nodes, dims, strict=True)):  # x @ x.T: two parts of one
        return None
    return Reads({n: Cut(d, wanted.lo, wanted.hi) for n, d in places.items() if d is not None})


def _read_by_cut(call: Call, wanted: Cut | None) -> Reads | None:
    """Of a slice or select: its own rows, or those of them that are wanted."""
    d = call.axis(call.args["dim"])
    length, keeps = expr(call.vals[0].shape[d]), call.target is not aten.select.int
    if wanted is not None and (wanted.dim != d or not keeps):  # rows of what is cut across them
        return Reads({call.nodes[0]: replace(wanted, dim=wanted.dim + (not keeps and wanted.dim >= d))})
    start = (call.args["start"] or 0) if keeps else call.args["index"]
    count = expr(call.out.shape[d]) if keeps else 1
    known = all(isinstance(n, int) for n in (start, count)) and (isinstance(length, int) or start >= 0)
    if not known or call.args.get("step", 1) != 1:
        return Reads() if wanted is None else None
    start = max(start + length, 0) if start < 0 else start
    if wanted is None:
        return Reads({call.nodes[0]: Cut(d, start, start + count)})
    return Reads({call.nodes[0]: Cut(d, start + wanted.lo, start + wanted.hi)})


def _read_by_merge(node: fx.Node, wanted: Cut) -> Reads | None:
    """Rows of the protected prefix are where they were."""
    x, _, _, assign = node.args[:4]
    assert isinstance(x, fx.Node) and isinstance(assign, fx.Node)
    if wanted.dim != assign.meta["val"].dim() - 1 or assign.target is not operator.getitem:
        return None
    match, index = assign.args
    if not isinstance(match, fx.Node) or match.target not in MATCHES or index != 0:
        return None
    return Reads({x: wanted}, only=True) if wanted.hi <= Call(match).args["prefix"] else None


def _read_by_cat(call: Call, wanted: Cut) -> Reads | None:
    """One piece, if the rows are all in one."""
    at = 0
    for node, val in zip(call.nodes, call.vals, strict=True):
        size = expr(val.shape[wanted.dim]) if val.dim() == call.out.dim() else 0
        if not isinstance(size, int):
            return None
        if at <= wanted.lo and wanted.hi <= at + size:
            return Reads({node: Cut(wanted.dim, wanted.lo - at, wanted.hi - at)}, only=True)
        at += size
    return None


def _same_dim(call: Call, rule: Any, d: int) -> list[int | None] | None:
    """Where dim `d` of the result stands in each operand (None: nowhere); None where the op mixes its rows."""
    if isinstance(rule, SplitRule):
        at = call.axis(call.args.get("dim", 0))
        return [d + (d >= at)] if not rule.keeps_dim else [d] if d != at else None
    if isinstance(rule, PermuteRule):
        return [rule.order(call)[d]]
    if call.node.target in _REGROUPS:
        before, after = ([expr(s) for s in v.shape] for v in (call.vals[0], call.out))
        found = [
            e
            for e, size in enumerate(before)
            if same(size, after[d]) and same(prod(before[:e], start=1), prod(after[:d], start=1))
        ]
        return [found[0]] if found else None
    if isinstance(rule, ExpandRule):
        e = d - call.out.dim() + call.vals[0].dim()
        return [e if e >= 0 and same(expr(call.vals[0].shape[e]), expr(call.out.shape[d])) else None]
    if isinstance(rule, CatRule):
        return [d if v.dim() == call.out.dim() else None for v in call.vals]
    if not isinstance(rule, SignatureRule) or not isinstance(call.node.meta["val"], Tensor):
        return None
    sig = rule.signature(call, NO_FACTS)
    letter = sig.outs[0][d]
    if letter is None or sig.role(letter) is not Role.MAP:
        return None
    places: list[int | None] = []
    for letters, val in zip(sig.ins, call.vals, strict=True):
        held = [e for e, name in enumerate(letters) if name == letter and expr(val.shape[e]) != 1]
        if len(held) > 1 or not all(same(expr(val.shape[e]), expr(call.out.shape[d])) for e in held):
            return None
        places.append(held[0] if held else None)
    return places if any(e is not None for e in places) else None


def _joins(call: Call, rule: Any, d: int) -> bool:
    return isinstance(rule, CatRule) and rule.dim(call) == d


def _is_product(node: fx.Node) -> bool:
    rule = find(Call(node))
    return isinstance(rule, SignatureRule) and rule.contraction


# -- rewriting ---------------------------------------------------------------------------------------------------------


def _narrow(graph: fx.Graph, cuts: Mapping[fx.Node, Cut], reads: Mapping[fx.Node, Reads]) -> None:
    """Give every node in `cuts` operands with the rows that it reads, and every reader of such a node its place."""
    values: dict[fx.Node, fx.Node] = {}  # a node that is one row of another: the value in its place
    for node in list(graph.nodes):
        cut, read = cuts.get(node), reads[node].parts
        if cut is None and not any(n in cuts for n in read):
            continue
        call = Call(node)
        rule = find(call)
        moved = isinstance(rule, (SliceRule, SelectRule)) and all(
            want.dim == call.axis(call.args["dim"]) for want in read.values()
        )
        held = {n: values.get(n, n) for n in read}
        new = held if moved else {n: _part(node, held[n], cuts.get(n), want) for n, want in read.items()}
        if reads[node].only:
            (values[node],) = new.values()
            continue
        for n, value in new.items():
            node.replace_input_with(n, value)
        if moved:
            (source, want), *_ = read.items()
            _set_start(node, want, cuts.get(source))
        elif cut is not None:
            _set_sizes(node, call, rule, cut)
        if cut is not None:
            node.meta = {**node.meta, "val": _all_narrowed(node.meta["val"], cut)}


def _part(user: fx.Node, value: fx.Node, have: Cut | None, want: Cut) -> fx.Node:
    """The rows `want` for a user of a value that holds the rows `have` (None: all)."""
    if want == have:
        return value
    base = have.lo if have is not None else 0
    with user.graph.inserting_before(user):
        part = user.graph.call_function(aten.slice.Tensor, (value, want.dim, want.lo - base, want.hi - base))
    part.meta = {**value.meta, "val": _narrowed(value.meta["val"], want)}
    return part


def _has_sizes(node: fx.Node, rule: Any) -> bool:
    """Whether the second argument says the shape of the result."""
    return node.target in _RESHAPES or isinstance(rule, ExpandRule)


def _set_start(node: fx.Node, want: Cut, have: Cut | None) -> None:
    """Let a slice or select start where its rows are now."""
    start = want.lo - (have.lo if have is not None else 0)
    source = node.args[0]
    if node.target is aten.select.int:
        node.args = (source, want.dim, start)
    else:
        node.target, node.kwargs = aten.slice.Tensor, {}
        node.args = (source, want.dim, start, start + want.hi - want.lo)


def _set_sizes(node: fx.Node, call: Call, rule: Any, cut: Cut) -> None:
    """Put the number of rows into the sizes of a view."""
    if not _has_sizes(node, rule):
        return
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[cut.dim] = cut.hi - cut.lo
    node.args = (node.args[0], sizes, *node.args[2:])
    if node.target in _RESHAPES:
        node.target = aten.reshape.default


def _all_narrowed(val: Any, cut: Cut) -> Any:
    return map_aggregate(val, lambda v: _narrowed(v, cut))


def _narrowed(val: Any, cut: Cut) -> Any:
    """A fake tensor with the rows of a cut."""
    return fake_like(val, (*val.shape[: cut.dim], cut.hi - cut.lo, *val.shape[cut.dim + 1 :]))


__all__ = ["drop_unread"]
