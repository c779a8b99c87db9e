"""infer_axes: name the axes of an unnamed graph.

Each dim of each value becomes a product of atoms (`axes.py`); the op rules say which dims are indexed alike. On the
way it notes what depends on no model input, which tensors are terms of attention scores, and which positions of an
axis are read on their own. It only annotates.

    linear(x: [b][n][d], w) -> [b][n][o]      view(.., [B, N, H, e]) -> [b][n][h][e]     q @ k^T -> [b][h][n][n]
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .algebra.axes import Dim, fresh_dims, leaves, same, size_of, unify
from .algebra.axes import expr as size_expr
from .analysis.pairs import Pairs, elementwise
from .analysis.provenance import origins
from .analysis.reach import Reach
from .analysis.values import Values
from .rules import Call, find, tensors_of
from .rules.base import UNKNOWN, Role, Rule, result_read, sources
from .rules.contraction import Attention, Contraction, Convolution
from .rules.facts import Facts
from .rules.joins import CatRule
from .rules.reduce import Softmax
from .rules.signature import SignatureRule
from .rules.slices import SliceRule, SplitRule
from .rules.views import PermuteRule, ViewRule

aten = torch.ops.aten


def infer_axes(graph: fx.Graph, model_input: Sequence[bool], held: Mapping[fx.Node, Tensor]) -> Facts:
    """Facts about every value.

    model_input: for each placeholder, whether it varies from call to call. held: the values of some that do not.
    """
    facts = Facts(graph, buffers={n for n, value in held.items() if not isinstance(value, torch.nn.Parameter)})
    angles, made = _Angles(facts), list[tuple[Dim, Dim]]()
    varies = iter(model_input)
    values = Values(held, facts.constant)
    for node in graph.nodes:
        if node.op == "placeholder":
            (facts.given if next(varies) else facts.constant).add(node)
        elif node.op == "get_attr" or (
            node.op == "call_function" and all(n in facts.constant for n in sources(node, node.all_input_nodes))
        ):
            facts.constant.add(node)
        if node.op == "call_function" and node.target is operator.getitem:
            at = result_read(node)
            facts.axes[node] = () if at is None else (facts.axes[node.args[0]][at],)
            if node.args[0] in facts.angles:
                facts.angles.add(node)
            continue
        results = tensors_of(node.meta.get("val"))
        if node.op != "call_function" or not results:
            facts.axes[node] = tuple(fresh_dims(v.shape) for v in results)
            continue
        call = facts.calls[node] = Call(node)
        rule = find(call)
        facts.axes[node] = rule.axes(call, facts)
        if isinstance(rule, (Contraction, Convolution)) and any(n in facts.constant for n in call.nodes):
            made += _note_channels(call, rule, facts)
        elif isinstance(rule, (SliceRule, SplitRule, CatRule)) or call.target in _PADS:
            _note_made_channels(call, facts, made)
        _note_reads(call, facts, values)
        if any(v.dtype is torch.bool for v in results) or (
            elementwise(rule) and any(n in facts.decided for n in sources(node, call.nodes))
        ):
            facts.decided.add(node)
        angles.note(call, rule)
        if rule is UNKNOWN and call.operands:
            facts.unknown.append(call)
    _match_pieces(facts)
    _note_given(facts)
    facts.scores = _scores(facts)
    facts.pairs = Pairs(facts, values)
    facts.mixed = origins(facts, values)
    facts.reach = Reach(facts)
    return facts


def _match_pieces(facts: Facts) -> None:
    """Pieces at the same places of two axes that are indexed alike are so, too: keys and their mask, each joined."""
    for i, (parts, whole) in enumerate(facts.joins):
        for others, axis in facts.joins[:i]:
            if len(parts) == len(others) and leaves(axis) == leaves(whole):
                pairs = list(zip(parts, others, strict=True))
                if all(same(size_of(a), size_of(b)) for a, b in pairs):
                    for a, b in pairs:
                        unify(a, b)


def _note_given(facts: Facts) -> None:
    """What says of single positions what an input says, once it is known which axes are features, and what products by
    weights sum over of it."""
    for node, call in facts.calls.items():
        rule = find(call)
        if _given(call, rule, facts):
            facts.given.add(node)
        held = [any(n in known for n in call.nodes) for known in (facts.constant, facts.given)]
        facts.entering |= rule.summed(call, facts) if isinstance(rule, Contraction) and all(held) else set()


def _given(call: Call, rule: Rule, facts: Facts) -> bool:
    """Whether a value still says of single positions what an input of the model said: no product came between, and no
    sum over features (what a norm divides by)."""
    read = sources(call.node, call.nodes)
    summing = rule if isinstance(rule, SignatureRule) and not elementwise(rule) else None
    if summing is not None and summing.summed(call, facts, (Role.SUM, Role.NORM2)) & facts.features:
        return False
    given = [n for n in read if n in facts.given]
    if isinstance(rule, Contraction) and rule.outer(call, facts):
        return bool(given) and len(given) == len(read)
    if not given or isinstance(rule, (Contraction, Convolution, Attention)):
        return False
    if not elementwise(rule) or all(n in facts.given or n in facts.constant for n in read):
        return True
    return any(n.meta["val"].dim() > 1 and facts.varies(n, -1) and facts.varies(n, -2) for n in given)


class _Angles:
    """Rotary tables: sines and cosines of positions that the caller gives, and what is put together from them.

    `plain` holds what is made of inputs, buffers and numbers alone: positions times frequencies, but no features.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.plain: set[fx.Node] = set(facts.buffers)

    def note(self, call: Call, rule: Rule) -> None:
        facts, node = self.facts, call.node
        if isinstance(rule, (Convolution, Attention)):
            return
        read = sources(node, call.nodes)
        if all(n in self.plain or (n.op == "placeholder" and n in facts.given) for n in read):
            self.plain.add(node)
            if call.target in _ANGULAR and node not in facts.constant:
                facts.angles.add(node)
        turned = any(n in facts.angles for n in read) and not isinstance(rule, Contraction)
        if turned and all(n in facts.angles or n in facts.constant for n in read):
            facts.angles.add(node)


def _note_channels(call: Call, rule: SignatureRule, facts: Facts) -> list[tuple[Dim, Dim]]:
    """Note the axes that a weight brings into a product: they are features, never tokens. Returns them, each with what
    stands beside it."""
    sig = rule.signature(call, facts)
    weights: set[Any] = set()
    others: set[Any] = set()
    for node, letters in zip(call.nodes, sig.ins, strict=True):
        if node not in facts.constant:
            others.update(letters)
        elif _is_weight(node):
            weights.update(letters)
    if call.node in facts.constant:
        return []
    dims = list(zip(sig.outs[0], facts.dims(call.node), strict=True))
    found = [dim for letter, dim in dims if letter in weights - others]
    facts.channels += found
    return [(dim, tuple(x for letter, own in dims if letter not in weights for x in own)) for dim in found]


def _is_weight(node: fx.Node) -> bool:
    """A constant input of the graph, seen through views: a table of positions is looked up or computed on the way."""
    while node.op == "call_function" and isinstance(find(Call(node)), (ViewRule, PermuteRule)):
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")


def _note_reads(call: Call, facts: Facts, values: Values) -> None:
    """Positions of an axis that are read by an index which is known, or by one of the pieces that it falls into."""
    read = _positions(call, values)
    if read is None:
        return
    d, places = read
    node, size = call.nodes[0], size_expr(call.vals[0].shape[d])
    if isinstance(size, int) and len(places) <= size // 4:
        facts.cuts += [(node, facts.dims(node)[d], p % size, p % size + 1) for p in places]


def _positions(call: Call, values: Values) -> tuple[int, list[int]] | None:
    """The dim that an op reads at known positions, and these."""
    a, packet = call.args, getattr(call.target, "overloadpacket", None)
    if packet is aten.unbind:
        used = {u.args[1] for u in call.node.users if u.users}
        return call.axis(a["dim"]), [int(i) for i in used]  # type: ignore[arg-type]
    if packet is aten.slice and a["step"] not in (None, 1):
        d = call.axis(a["dim"])
        if not isinstance(call.vals[0].shape[d], int):
            return None
        bounds = (x if x is None or isinstance(x, int) else None for x in (a["start"], a["end"], a["step"]))
        return d, list(range(call.vals[0].shape[d])[slice(*bounds)])
    if call.target is aten.index.Tensor:
        spots = [d for d, item in enumerate(a["indices"]) if item is not None]
        index, d = (a["indices"][spots[0]], spots[0]) if len(spots) == 1 else (None, 0)
    elif packet in (aten.index_select, aten.gather):
        index, d = a["index"], call.axis(a["dim"])
    else:
        return None
    value = values.of(index) if isinstance(index, fx.Node) else None
    if value is None or not value.numel():
        return None
    found = value.nonzero() if value.dtype is torch.bool else value
    return d, found.flatten().unique()[:LISTED].tolist()


LISTED = 1024
"""Positions of an index that are looked at."""


_PADS = {aten.pad.default, aten.constant_pad_nd.default}


def _note_made_channels(call: Call, facts: Facts, made: Sequence[tuple[Dim, Dim]]) -> None:
    """A piece of a feature axis is one too, and so is one that was padded or joined with others. Not so of what a
    weight gives to each head, unless it is joined with its like: a table of relative positions is cut to the number of
    the tokens.

    made: axes that weights brought into products, and what stands beside each."""
    features = {leaf for dim in facts.channels for leaf in leaves(dim)}
    before = facts.dims(call.nodes[0])
    own = features - {leaf for dim, beside in made if features & set(leaves(beside)) for leaf in leaves(dim)}
    if isinstance(find(call), CatRule):  # tokens that come out of one row are joined with others that do not
        d = CatRule.dim(call)
        if not facts.constant & set(call.nodes):
            own = features
        if not all(n in facts.constant or _made_of(own, facts.dims(n)[d]) for n in call.nodes):
            return
    for after in facts.axes[call.node]:
        if len(after) == len(before):
            facts.channels += [
                new for old, new in zip(before, after, strict=True) if new is not old and _made_of(own, old)
            ]


def _made_of(features: set[Any], dim: Dim) -> bool:
    """Whether a dim holds features alone: samples may stand in one with heads."""
    return bool(dim) and features.issuperset(leaves(dim))


_ANGULAR = {aten.sin.default, aten.cos.default, aten.polar.default}
_EXP = {aten.exp.default, aten.exp2.default, aten.pow.Scalar}


def _scores(facts: Facts) -> set[fx.Node]:
    """Nodes whose value reaches a softmax, an exp or the mask of an attention through pointwise ops, views and cat:
    terms of attention scores."""
    calls = facts.calls.values()
    todo = [c.nodes[0] for c in calls if c.nodes and (isinstance(find(c), Softmax) or c.target in _EXP)]
    todo += [c.args["attn_mask"] for c in calls if isinstance(c.args.get("attn_mask"), fx.Node)]
    found: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in found or node not in facts.calls:
            continue
        call = facts.calls[node]
        rule = find(call)
        if isinstance(rule, Contraction):
            found.add(node)
        elif isinstance(rule, CatRule) or elementwise(rule):
            found.add(node)
            todo += sources(node, call.nodes)
    return found


__all__ = ["infer_axes"]
