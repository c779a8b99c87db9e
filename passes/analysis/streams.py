"""streams: where the output of an attention meets the residual stream, and where a branch around it may begin.

A residual add is what adds the attention's output to a value that the attention was computed from, whatever stands on
the way: casts, views, factors (`origin`). A branch begins at the highest value that queries and keys come from and the
residual stream does not.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import fx

from tome_fx.report import SkipReason

from ..algebra.axes import Atom, Dim, count_of, leaves, locate, size_of
from ..rules import Call, find
from ..rules.base import sources
from ..rules.contraction import Attention, Contraction, Convolution
from ..rules.facts import Facts
from ..rules.joins import CatRule
from ..rules.pointwise import POINTWISE
from ..rules.slices import SelectRule, SliceRule, SplitRule
from ..rules.views import PermuteRule, ViewRule
from .pairs import elementwise
from .sites import AttentionSite, no_rule
from .values import size_hint

aten = torch.ops.aten
ADDS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor}


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A place to merge: the node whose value is merged, and the stream that tells the tokens apart; for a branch they
    are one node. operands: where operands of `merge` are merged and not its value, (operand, dim) of each."""

    merge: fx.Node
    stream: fx.Node
    branch: bool = False
    operands: tuple[tuple[int, int], ...] = ()


def holds(facts: Facts, node: fx.Node, tokens: Dim) -> bool:
    """Whether a value holds the tokens in one dim, once."""
    return len(locate(tokens, facts.dims(node))) == 1


def length_of(node: fx.Node, facts: Facts, tokens: Dim) -> Any:
    """How many tokens a value holds: an int or a SymInt."""
    (dim, _), *_ = locate(tokens, facts.dims(node))
    alone = leaves(facts.dims(node)[dim]) == tokens
    return node.meta["val"].shape[dim] if alone else size_of(tokens)


def _adds_after(site: AttentionSite, facts: Facts) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """The sums that an attention's output goes into, part by part or as a whole, and their operands that are not
    computed from it; of parts, what they are parts of."""
    for node in facts.reach.nodes[facts.reach.index[site.out] + 1 :]:
        terms = _by_part(node, facts)
        if not any(terms.values()) or not facts.leads(site.out, node):
            continue
        operands = [_gated(a, site, facts) for n, held in terms.items() for a in held or [n]]
        others = [a for a in operands if not facts.leads(site.out, a)]
        if node.target is aten.cat.default:
            wholes = dict.fromkeys(_whole(a, facts, site.k.node) for a in others)
            others = [a for a in wholes if _content(a, facts) == _content(node, facts)]
        yield node, others


def terms_of(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """What a value is the sum of; of one part by part, what these are parts of, scaled perhaps."""
    terms = [*_by_part(node, facts).values()]
    if node.target is not aten.cat.default:
        return terms[0]
    wholes = [_whole(_unscaled(a, facts), facts) for held in terms for a in held]
    return list(dict.fromkeys(wholes)) if all(len(held) == 2 for held in terms) else []


def _by_part(node: fx.Node, facts: Facts) -> dict[fx.Node, list[fx.Node]]:
    """A value, or each part that a cat joins to it, and what it is the sum of."""
    parts = facts.calls[node].nodes if node.target is aten.cat.default else [node]
    return {n: _terms(n, facts) for n in parts}


def _unscaled(node: fx.Node, facts: Facts) -> fx.Node:
    while node.target is aten.mul.Tensor:
        above = [n for n in node.all_input_nodes if n not in facts.constant]
        if len(above) != 1:
            break
        node = above[0]
    return node


def _terms(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """What a value is the sum of, one by one or with weights: a product with weights combines what stands side by side
    among the features."""
    call = facts.calls.get(node)
    if call is None or node.target in ADDS:
        return call.nodes if call is not None else []
    rule, read = find(call), [n for n in call.nodes if n not in facts.constant]
    if not isinstance(rule, Contraction) or len(read) != 1:
        return []
    beside = read[0]
    while beside in facts.calls and isinstance(find(facts.calls[beside]), (ViewRule, PermuteRule)):
        beside = facts.calls[beside].nodes[0]
    if beside.target not in (aten.cat.default, aten.stack.default):
        return []
    join = facts.calls[beside]
    axis = leaves(facts.dims(beside)[join.axis(join.args["dim"], join.out.dim())])
    return join.nodes if axis and set(axis) <= rule.summed(call, facts) else []


def _gated(node: fx.Node, site: AttentionSite, facts: Facts) -> fx.Node:
    """Of a product, entry by entry, with what the attention says, the other factor."""
    if facts.leads(site.out, node) and node.target is aten.mul.Tensor:
        factors = [n for n in facts.calls[node].nodes if not facts.leads(site.out, n) and n not in facts.constant]
        return factors[0] if len(factors) == 1 else node
    return node


def residuals(site: AttentionSite, facts: Facts, tokens: Dim, mixed: bool = False) -> Iterator[Spot | None]:
    """The adds of the output to what the attention was computed from, in graph order, with the tokens in one dim; None
    where they do not stand in one. mixed: to what was made of it token by token, by weights or sums."""
    for node, others in _adds_after(site, facts):
        for other in others:
            stream = (_mixed_from if mixed else origin)(other, site.k.node, facts)
            held = holds(facts, node, tokens) and holds(facts, stream, tokens)
            if facts.leads(stream, site.k.node) and held and not _strangers(site, node, facts, tokens):
                yield Spot(merge=node, stream=stream)
            elif facts.leads(other, site.k.node):
                yield None


def origin(node: fx.Node, goal: fx.Node, facts: Facts) -> fx.Node:
    """What a value is one by one the same as, or a multiple of, up to the first that `goal` is computed from."""
    while not facts.leads(node, goal) and node.op == "call_function":
        above = [n for n in sources(node, node.all_input_nodes) if n not in facts.constant]
        rule = find(Call(node))
        above = list(dict.fromkeys(_whole(n, facts, goal) for n in above)) if isinstance(rule, CatRule) else above
        if len(above) != 1 or not (rule is POINTWISE or isinstance(rule, (PermuteRule, ViewRule, CatRule))):
            break
        if _content(above[0], facts) != _content(node, facts):
            break
        node = above[0]
    return node


def _mixed_from(node: fx.Node, goal: fx.Node, facts: Facts) -> fx.Node:
    """The first value that `goal` is computed from on the way up through products with weights, sums and what keeps
    each entry."""

    def onward(call: Call) -> list[fx.Node]:
        rule, above = find(call), [n for n in sources(call.node, call.nodes) if n not in facts.constant]
        maps = isinstance(rule, (Contraction, Convolution)) and len(above) == 1
        return above if maps or call.target in ADDS or elementwise(rule) else []

    todo = [node]
    while todo:
        at = todo.pop(0)
        if facts.leads(at, goal):
            return at
        todo += onward(facts.calls[at]) if at in facts.calls else []
    return node


def _content(node: fx.Node, facts: Facts) -> Counter[Atom]:
    """What axes a value has, in whatever order."""
    return Counter(leaf for dims in facts.axes.get(node, ()) for dim in dims for leaf in leaves(dim))


def merge_point(site: AttentionSite, facts: Facts, tokens: Dim) -> Spot | SkipReason:
    """The first residual add, or the one behind it of a parallel branch."""
    for spot in chain(residuals(site, facts, tokens), residuals(site, facts, tokens, mixed=True)):
        if spot is None:
            why = "where its output is added its tokens do not stand in one dim of the residual stream"
            why += ", or beside samples that it does not see"
            return SkipReason("no residual add", site.name, why)
        return _past_parallel_branch(_past_difference(spot, facts, tokens), facts, tokens)
    return SkipReason("no residual add", site.name, "its output is never added to a value that it was computed from")


def _past_difference(spot: Spot, facts: Facts, tokens: Dim) -> Spot:
    """x + gate * (attention(x) - x) merges once the stream is whole again."""
    node = spot.merge
    while len(node.users) == 1:
        (node,) = node.users
        call = facts.calls.get(node)
        if call is None or find(call) is not POINTWISE:
            break
        if node.target in ADDS and any(origin(n, spot.stream, facts) is spot.stream for n in call.nodes):
            return Spot(merge=node, stream=spot.stream) if holds(facts, node, tokens) else spot
    return spot


def _past_parallel_branch(spot: Spot, facts: Facts, tokens: Dim) -> Spot:
    """attention and MLP side by side: x + attention(x) + mlp(x) merges after both."""
    users = list(spot.merge.users)
    if len(users) != 1 or users[0].target not in ADDS:
        return spot
    later = users[0]
    other = [a for a in later.args[:2] if a is not spot.merge]
    if len(other) != 1 or not isinstance(other[0], fx.Node) or other[0] in facts.constant:
        return spot
    beside = facts.leads(spot.stream, other[0]) and not facts.leads(spot.merge, other[0])
    return Spot(merge=later, stream=spot.stream) if beside and holds(facts, later, tokens) else spot


def stream_beside(site: AttentionSite, facts: Facts) -> fx.Node | None:
    """What the queries come from that the output of a site meets first, whatever joins them but a product; else what
    that was made of token by token."""
    after = facts.reach.nodes[facts.reach.index[site.out] + 1 :]
    calls = [facts.calls[n] for n in after if n in facts.calls and facts.leads(site.out, n)]
    joins = [call for call in calls if len(call.nodes) > 1 and not _multiplies(call)]
    met = [_whole(n, facts) for call in joins for n in call.nodes if not facts.leads(site.out, n)]
    found = (above(n, site.q.node, facts) for above in (origin, _mixed_from) for n in met)
    return next((stream for stream in found if facts.leads(stream, site.q.node)), None)


def lost(site: AttentionSite, facts: Facts) -> str:
    """The op without a rule after which nothing tells the tokens of a site from others, between the stream and the
    attention, in words."""
    stream, tokens = stream_beside(site, facts), {*site.q.axis(facts), *site.k.axis(facts)}
    if stream is None or not facts.leads(stream, site.k.node):
        return ""
    for call in facts.unknown:
        made = {leaf for dims in facts.axes[call.node] for dim in dims for leaf in leaves(dim)}
        new = made.difference(*map(facts.leaves_of, call.nodes))
        if new & tokens and facts.leads(stream, call.node):
            return f"its tokens come out of {no_rule([call])}"
    return ""


def _whole(node: fx.Node, facts: Facts, goal: fx.Node | None = None) -> fx.Node:
    """What a value is a part of. goal: scaled perhaps, up to the first value that this is computed from."""
    while goal is None or not facts.leads(node, goal):
        call = facts.calls.get(node.all_input_nodes[0] if node.target is operator.getitem else node)
        above = [n for n in call.nodes if n not in facts.constant] if call is not None else []
        rule = find(call) if call is not None else None
        scaled = goal is not None and (rule is POINTWISE or isinstance(rule, ViewRule))
        if len(above) != 1 or not (scaled or isinstance(rule, (SelectRule, SliceRule, SplitRule))):
            break
        node = above[0]
    return node


def _multiplies(call: Call) -> bool:
    packet = getattr(call.target, "overloadpacket", None)
    return packet in (aten.mul, aten.div) or isinstance(find(call), (Contraction, Convolution, Attention))


def pooled(site: AttentionSite, facts: Facts, tokens: Dim) -> bool:
    """Whether the queries are fewer than the tokens of the stream that they were made from: landmarks, agents."""
    stream = stream_beside(site, facts)
    if stream is None or holds(facts, stream, tokens) or facts.cut_from(tokens):
        return False
    return tokens_in(site.q.node, facts) < tokens_in(stream, facts)


def tokens_in(node: fx.Node, facts: Facts) -> float:
    """How many entries a value has, features apart. A dim that holds both counts for the tokens in it."""
    found = 1.0
    for size, dim in zip(node.meta["val"].shape, facts.dims(node), strict=True):
        features = [leaf for leaf in leaves(dim) if leaf in facts.features]
        found *= size_hint(size) / prod(map(count_of, features)) if len(features) < len(leaves(dim)) else 1
    return found


def branch_point(site: AttentionSite, facts: Facts, tokens: Dim) -> Spot | SkipReason:
    """The highest value to merge around one attention. In cross attention only the queries merge: the keys must not be
    computed from it."""
    above = facts.reach.dominators(site.q.node)
    if site.k.axis(facts) != tokens:
        shared = [n for n in above if not facts.leads(n, site.k.node)]
    else:
        keys = set(facts.reach.dominators(site.k.node))
        shared = [n for n in above if n in keys]
    stream = stream_beside(site, facts)
    others = [other.out for other in facts.sites if other is not site and facts.leads(other.out, site.q.node)]
    best = None
    for node in shared:
        if (stream is not None and facts.leads(node, stream)) or any(facts.leads(node, out) for out in others):
            break
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if not holds(facts, node, tokens) or _strangers(site, node, facts, tokens):
            break
        best = node
    # Without a projection on the way there is nothing to save before the attention, and keys are the better metric.
    projected = best is not None and any(
        isinstance(find(call), Contraction) and facts.leads(best, node) and facts.leads(node, site.out)
        for node, call in facts.calls.items()
        if node is not site.out
    )
    if best is None or not projected:
        why = "no value outside the residual stream gives its queries and keys and holds their tokens in one dim"
        return SkipReason("no branch point", site.name, why)
    return Spot(merge=best, stream=best, branch=True)


def _strangers(site: AttentionSite, node: fx.Node, facts: Facts, tokens: Dim) -> bool:
    """Whether a value has samples of which the attention sees one: they would all merge as that one."""
    seen = facts.leaves_of(site.q.node) | facts.leaves_of(site.k.node)
    unseen = facts.leaves_of(node) - seen - facts.features - set(tokens)
    return bool(unseen) and not unseen <= _combined(site, facts)


def _combined(site: AttentionSite, facts: Facts) -> set[Atom]:
    """The leaves that products on the way to the keys sum over: features, though weights that are inputs made them."""
    found: set[Atom] = set()
    for node in facts.reach.nodes[: facts.reach.index[site.k.node] + 1]:
        call = facts.calls.get(node)
        if call is not None and isinstance(rule := find(call), Contraction) and facts.leads(node, site.k.node):
            found |= rule.summed(call, facts)
    return found


__all__ = ["ADDS", "Spot", "branch_point", "holds", "length_of", "lost", "merge_point", "origin", "pooled",
           "residuals", "stream_beside", "terms_of", "tokens_in"]  # fmt: skip
