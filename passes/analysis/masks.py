"""What the masks of an attention say about merging its tokens.

A mask of keys gives the tokens that it leaves out no weight: in a merge they count for nothing, and a group of both
kinds is a group of the valid ones (`key_masks`). Where the attention is fused, it is a summand of the SDPA's mask;
where the softmax stands open, the way back from it to the product q k^T tells what each term does to the scores:

    scores.masked_fill(mask, -inf)   where(mask, scores, -inf)   scores + m   scores * m - 1e4 * (1 - m)

A mask that the way mixes (by a product over heads, by an op that nobody knows), or that joins after columns that are no
keys (attention sinks), says nothing that can be kept: such a site is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from tome_fx.ops import LEFT_OUT

from ..algebra.axes import Dim, leaves
from ..rules import Call, find
from ..rules.base import UNKNOWN, op_name, sources
from ..rules.contraction import Contraction
from ..rules.facts import Facts
from ..rules.joins import CatRule
from ..rules.pointwise import MaskRule, scalar
from ..rules.reduce import Softmax, reduced_dims
from ..rules.views import ExpandRule, PermuteRule, ViewRule
from .reach import nearest
from .sites import AttentionSite

aten = torch.ops.aten
VIEWS = ViewRule, PermuteRule, ExpandRule
_PASS = (aten._to_copy, aten.clone, aten.detach, aten.alias, aten.dropout)


@dataclass(frozen=True)
class KeyMask:
    """A mask of keys: a bool node (True: seen; left out where `scale` is negative), or a number for each key of which
    `scale` times as much joins the scores."""

    node: fx.Node
    scale: float = 1.0


def score_terms(site: AttentionSite, facts: Facts) -> list[fx.Node]:
    """What is added to, multiplies or masks the scores of a site, or, of an open one, its probabilities.

    Of an open site only what the model does not compute from activations, and says something of single tokens.
    """
    if site.fused:
        return list(facts.calls[site.out].nodes[3:]) if site.masked else []
    fixed = facts.constant | facts.given
    ways = _ways(site, facts)
    tokens = {*site.q.axis(facts), *site.k.axis(facts)}
    tokens |= _columns(site, ways, facts)
    terms = [n for way, _ in ways for *_, n in _aside(way, facts)]
    return [n for n in dict.fromkeys(terms) if (n in fixed or facts.told(n)) and varies_with(n, facts) & tokens]


def leaves_all_in(site: AttentionSite, facts: Facts, part: Dim) -> bool:
    """Whether a mask of joined keys says nothing of one of the streams: its part of the mask is numbers that leave all
    tokens in."""
    terms, queries = score_terms(site, facts), {*site.q.axis(facts)} - {*part}
    if not site.fused or len(terms) != 1 or varies_with(terms[0], facts) & queries - {*site.k.axis(facts)}:
        return False
    alone = len(token_dims(terms[0], facts, site.k.axis(facts))) == 1  # no row for each query
    said = _said_of(terms[0], facts, part) if alone else None
    return said is not None and said.item() == (1 if said.dtype is torch.bool else 0)


def _said_of(node: fx.Node, facts: Facts, part: Dim) -> Tensor | None:
    """The one number that a value made of a cat has at all places of one of its parts; None where it is not known."""
    call = facts.calls.get(node)
    value = facts.value(node)
    if value is None and call is not None and isinstance(find(call), CatRule):
        d = CatRule.dim(call)
        value = next((facts.value(n) for n in call.nodes if leaves(facts.dims(n)[d]) == part), None)
    if value is not None:
        first = value.flatten()[:1]
        return first if bool((value == first).all()) else None
    if call is None or not (isinstance(find(call), VIEWS) or torch.Tag.pointwise in call.target.tags
                            or _packet(call) is aten._to_copy):  # fmt: skip
        return None
    values: dict[fx.Node, Tensor] = {}
    for n in call.nodes:
        if (one := _said_of(n, facts, part)) is None:
            return None
        values[n] = one
    if isinstance(find(call), VIEWS):
        return values[call.nodes[0]]
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    with _disable_current_modes(), torch.no_grad():
        return call.target(*args, **kwargs)


def _columns(
    site: AttentionSite, ways: list[tuple[list[fx.Node], bool]], facts: Facts
) -> set[Any]:
    """The leaves of softmax axes in which the keys stand beside columns that are none."""
    keys = site.k.axis(facts)
    ends = [facts.calls[way[-1]] for way, after in ways if not after]
    axes = [leaves(facts.dims(end.nodes[0])[d]) for end in ends for d in reduced_dims(end)]
    return {leaf for axis in axes if any(keys in parts for parts in facts.joined(axis)) for leaf in axis}


def _said(node: fx.Node) -> str:
    """A value in the user's words."""
    return "a tensor that goes into the graph" if node.op == "placeholder" else f"the result of {op_name(node)}"


def masked_by_place(site: AttentionSite, facts: Facts) -> bool:
    """Whether a part of an open site's scores or probabilities is replaced by what rules out: a mask of pairs that is
    no operand. A triangle that is cut out; a corner that is filled, written, padded or joined with low numbers, or with
    any once they are probabilities."""
    for way, after in _ways(site, facts) if not site.fused else ():
        on_it = set(way)
        for node in way:
            if _packet(node) in (aten.tril, aten.triu):
                return True
            if node in facts.calls and _packet(node) in _PLACED:
                operands = facts.calls[node].nodes
                low = any(_low(n, facts, after) for n in operands if n not in on_it) or _has_low(node, after)
                if _packet(node) in _BESIDE:  # columns beside whole scores (a sink) leave no key out
                    low &= any(_is_cut(n, on_it, facts) for n in operands)
                if low or any(_cut_low(n, on_it, facts, after) for n in operands):
                    return True
        if any(_placed_in(n, site, facts) for *_, n in _aside(way, facts)):
            return True
    return False


def _placed_in(root: fx.Node, site: AttentionSite, facts: Facts) -> bool:
    """Whether a factor or term of the scores that the model computes for each pair has a triangle cut out of it, or
    zeros written to it."""
    tokens = {*site.q.axis(facts), *site.k.axis(facts)}

    def onward(call: Call) -> list[fx.Node]:
        return [] if isinstance(find(call), Contraction) else [n for n in call.nodes if n not in facts.constant]

    for call in nearest([] if root in facts.constant else [root], onward, facts):
        if sum(bool(tokens & set(leaves(dim))) for dim in facts.dims(call.node)) < 2:
            continue
        if _packet(call) in (aten.tril, aten.triu):
            return True
        filled = (n for n in call.nodes if n in facts.constant)
        if _packet(call) in _PLACED and (_has_low(call.node, True) or any(_low(n, facts, True) for n in filled)):
            return True
    return False


_PLACED = {aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter, aten.as_strided_scatter, aten.index_put,
           aten.index_fill, aten.index_copy, aten.index_add, aten.scatter, aten.scatter_add, aten.masked_scatter,
           aten.constant_pad_nd, aten.pad, aten.cat}  # fmt: skip
_CUTS = {aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind,
         aten.as_strided}  # fmt: skip


_BESIDE = {aten.constant_pad_nd, aten.pad, aten.cat}


def _low(node: fx.Node, facts: Facts, after: bool) -> bool:
    """Whether a value that takes the place of scores rules them out; of probabilities zeros do."""
    value = facts.value(node)
    if value is None or not value.is_floating_point():
        return facts.told(node) and node.meta["val"].is_floating_point()
    return bool((value == 0).any()) if after else bool((value <= LEFT_OUT).any())


def _has_low(node: fx.Node, after: bool) -> bool:
    """Whether an op has a number among its arguments that rules out."""
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    pads = _packet(node) in (aten.pad, aten.constant_pad_nd)
    return (after and pads) or any(abs(a) >= -LEFT_OUT or (after and a == 0) for a in numbers)


def _is_cut(node: fx.Node, on_it: set[fx.Node], facts: Facts) -> bool:
    """Whether a value is a part of the scores."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if _packet(node) in _CUTS and node in on_it:
            return True
        if node in on_it and node in facts.calls and node not in seen:
            todo += facts.calls[node].nodes
        seen.add(node)
    return False


def _cut_low(node: fx.Node, on_it: set[fx.Node], facts: Facts, after: bool) -> bool:
    """Whether a value is a part of the scores that something low joined."""
    low = False
    while node in on_it and node in facts.calls:
        if _packet(node) in _CUTS:
            return low
        operands = facts.calls[node].nodes
        low |= _has_low(node, after) or any(_low(n, facts, after) for n in operands if n not in on_it)
        if not operands:
            break
        node = next((n for n in operands if n in on_it), operands[0])
    return False


def _ways(site: AttentionSite, facts: Facts) -> list[tuple[list[fx.Node], bool]]:
    """Of an open site: the nodes from its product to each softmax, and those from there to its output (True), without
    what only has the shape of one of them."""

    def product_before(end: fx.Node) -> fx.Node | None:
        way = (facts.calls[n] for n in facts.reach.between(site.k.node, end) if n in facts.calls)
        products = (call for call in way if isinstance(find(call), Contraction))
        return next((call.node for call in products if {site.q.node, site.k.node} <= set(call.nodes)), None)

    if not site.softmax:
        product = product_before(site.out)
        return [] if product is None else [(_by_value(facts.reach.between(product, site.out), facts), True)]
    ways = []
    for softmax in facts.reach.between(site.k.node, site.out):
        if softmax not in facts.calls or not isinstance(find(facts.calls[softmax]), Softmax):
            continue
        product = product_before(softmax)
        if product is not None:
            ways += [(_by_value(facts.reach.between(product, softmax), facts), False),
                     (_by_value(facts.reach.between(softmax, site.out), facts), True)]  # fmt: skip
    return ways


def _by_value(way: list[fx.Node], facts: Facts) -> list[fx.Node]:
    kept = {way[0]}
    for node in way[1:]:
        if kept & set(sources(node, facts.calls[node].nodes if node in facts.calls else node.all_input_nodes)):
            kept.add(node)
    return [node for node in way if node in kept]


def _aside(way: list[fx.Node], facts: Facts) -> Iterator[tuple[Call, int, fx.Node]]:
    """Every operand that joins a way between its ends and is not computed on it: (call, position, node)."""
    on_it, begin = set(way), facts.calls[way[0]].nodes[-2:]
    for node in way[:-1]:
        for i, n in enumerate(facts.calls[node].nodes if node in facts.calls else ()):
            if n in on_it or (node is way[0] and n in begin):
                continue
            yield facts.calls[node], i, n


def key_masks(
    site: AttentionSite, facts: Facts, tokens: Dim, sample: Dim
) -> tuple[KeyMask, ...] | str:
    """The masks of keys among the terms of a site's scores, or why they cannot be told from the graph.

    Each holds the tokens in one dim along which it varies, and is the same for all queries and heads.
    """
    reader = _Reader(facts, tokens, sample)
    if site.fused:
        for term in score_terms(site, facts):
            reader.term(term, -LEFT_OUT if term.meta["val"].dtype is torch.bool else 1.0)
    else:
        ways = _ways(site, facts)
        for way, after in ways:
            (reader.probabilities if after else reader.scores)(way)
        columns = _columns(site, ways, facts)
        late = (
            [n for n in score_terms(site, facts) if varies_with(n, facts) & columns] if columns else []
        )
        if late:
            return "a mask joins scores that have columns beside the keys"
    unread = reader.unread()
    if unread is not None:
        return f"{_said(unread)} masks keys in a way that is not understood"
    return tuple(KeyMask(*found) for found in reader.masks.items())


class _Reader:
    """Reads terms of the scores. masks: those that are masks of keys, with their factor."""

    def __init__(self, facts: Facts, tokens: Dim, sample: Dim) -> None:
        self.facts, self.calls, self.tokens, self.sample = facts, facts.calls, tokens, sample
        # What the keys are beside others holds them, too.
        joined = [leaves(whole) for parts, whole in facts.joins if any(leaves(part) == tokens for part in parts)]
        self.around = {*tokens, *(leaf for axis in joined for leaf in axis)}
        self.masks: dict[fx.Node, float] = {}
        self._factors: dict[fx.Node, None] = {}
        self._others: dict[fx.Node, None] = {}

    def unread(self) -> fx.Node | None:
        """A term that may leave keys out and was not understood."""
        known = {source for mask in self.masks for source in self._sources(mask)}
        loose = [n for n in self._factors if not self._sources(n) <= known]
        return next((n for n in (*self._others, *loose) if n not in self.masks), None)

    def scores(self, way: list[fx.Node]) -> None:
        """Read what joins the scores on the way from the product to the softmax."""
        aside: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
        for call, i, node in _aside(way, self.facts):
            aside.setdefault(call.node, []).append((i, node))
        on_it, seen = set(way[:-1]), set()
        todo: list[tuple[fx.Node, float | None]] = [(self.calls[way[-1]].nodes[0], 1.0)]
        while todo:
            at = node, scale = todo.pop()
            if at in seen or node not in on_it or node not in self.calls:
                continue
            seen.add(at)
            call = self.calls[node]
            # What is scaled after it has joined would have to be merged as it is scaled.
            scale = scale if scale == 1 else None
            shares = _shares(call, scale)
            for i, term in aside.get(node, ()):
                self._joins(call, i, term, scale)
            todo += zip(call.nodes, shares, strict=True)

    def _joins(self, call: Call, i: int, term: fx.Node, scale: float | None) -> None:
        """A term joins the scores as operand i of a call, whose result they hold `scale` times."""
        parts = _mask_parts(call)
        if find(call) is UNKNOWN:
            self._unknown(term)
        elif parts is not None and i == parts[1]:
            low = scale is not None and parts[2] is not None and parts[2] * scale <= LEFT_OUT
            if not low and self._is_mask(term):  # what it fills may be left out all the same
                self._factors[term] = None
            else:
                self.term(term, (LEFT_OUT if parts[3] else -LEFT_OUT) if low else None)
        elif _packet(call) is aten.mul and self._is_mask(term):
            self._factors[term] = None
        else:
            self.term(term, _shares(call, scale)[i])

    def probabilities(self, way: list[fx.Node]) -> None:
        """Read what joins the probabilities: zeros leave keys out; a factor may, of a mask that the scores have too."""
        for call, i, term in _aside(way, self.facts):
            parts = _mask_parts(call)
            zeroes = parts is not None and i == parts[1] and parts[2] == 0
            times = _packet(call) is aten.mul
            if zeroes and self.facts.pairs is not None and self.facts.pairs.outer(self.facts.pairs.placed(term)[0]):
                self._factors[term] = None
            elif (zeroes or times) and self._is_mask(term):
                ones = all(n.meta["val"].dtype is torch.bool for n in self._sources(term))
                if ones and not self.masks:
                    self.term(term, LEFT_OUT if parts is not None and parts[3] else -LEFT_OUT)
                else:
                    self._factors[term] = None
            elif find(call) is UNKNOWN:
                self._unknown(term)
            else:
                self.term(term, None)

    def _unknown(self, term: fx.Node) -> None:
        """A term of an op without a rule, which leaves its axes unknown."""
        if self.facts.told(term) and term.meta["val"].dim():
            self._others[term] = None

    def term(self, root: fx.Node, scale: float | None) -> None:
        """Read a term of which `scale` times as much joins the scores; None: what it does to them is not known."""
        todo = [(root, scale)]
        while todo:
            node, scale = todo.pop()
            if not varies_with(node, self.facts) & self.around:
                continue
            if scale is not None and self._is_mask(node):
                if node.meta["val"].dtype is not torch.bool or abs(scale) >= -LEFT_OUT:
                    self.masks.setdefault(node, scale)
                continue
            summands = self._summands(node, scale)
            todo += summands
            if not summands and self.facts.told(node) and not self._of_pairs(node):
                self._others[node] = None

    def _of_pairs(self, node: fx.Node) -> bool:
        """Whether a term varies with queries and keys, and it is known what that does to their merges."""
        both = len(token_dims(node, self.facts, self.tokens)) > 1
        known = self.facts.pairs is not None and self.facts.pairs.value(node) is not None
        return both and (known or self.facts.per_pair(node, -2, -1))

    def _summands(self, node: fx.Node, scale: float | None) -> list[tuple[fx.Node, float | None]]:
        """The values whose sum a term is, with their factors; empty where it is none."""
        if scale is None or node not in self.calls:
            return []
        call = self.calls[node]
        if node.target is aten.where.Scalar:
            seen = (float(call.args["self"]) - float(call.args["other"])) * scale
            return [(call.nodes[0], -LEFT_OUT if seen > 0 else LEFT_OUT)] if abs(seen) >= -LEFT_OUT else []
        parts = _mask_parts(call)
        if parts is not None:  # what it fills in is a mask, too
            low = parts[2] is not None and parts[2] * scale <= LEFT_OUT
            if not low:
                return []
            return [(call.nodes[parts[0]], scale), (call.nodes[parts[1]], LEFT_OUT if parts[3] else -LEFT_OUT)]
        pairs = self.facts.pairs
        if pairs is not None and pairs.outer(node) and pairs.sign(call) * scale >= -LEFT_OUT:
            return [(n, scale) for n in call.nodes]
        found = list(zip(call.nodes, _shares(call, scale), strict=True))
        lost = [n for n, share in found if share is None and varies_with(n, self.facts) & self.around]
        return [] if lost else [(n, share) for n, share in found if share is not None]

    def _is_mask(self, node: fx.Node) -> bool:
        one = len(token_dims(node, self.facts, self.tokens)) == 1
        return one and self.facts.told(node) and varies_with(node, self.facts) <= {*self.tokens, *self.sample}

    def _sources(self, root: fx.Node) -> set[fx.Node]:
        """What a mask was made of: the told values that no told value went into."""
        todo, seen, found = [root], set(), set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            above = [n for n in self.calls[node].nodes if self.facts.told(n)] if node in self.calls else []
            todo += above
            found |= set() if above else {node}
        return found


def _packet(call: Call | fx.Node) -> Any:
    return getattr(call.target, "overloadpacket", None)


def _mask_parts(call: Call) -> tuple[int, int, Any, bool] | None:
    return MaskRule.parts(call) if isinstance(find(call), MaskRule) else None


def _shares(call: Call, scale: float | None) -> list[float | None]:
    """For each operand how often it is in the result of a call, times `scale`; None where that is no number."""
    shares: list[float | None] = [None for _ in call.nodes]
    if scale is None:
        return shares
    parts = _mask_parts(call)
    if parts is not None:
        shares[parts[0]] = scale
    elif _packet(call) in _PASS or isinstance(find(call), VIEWS):
        shares[0] = scale
    elif isinstance(find(call), CatRule):
        shares = [scale] * len(shares)
    else:
        for name, factor in _named_factors(call).items():
            at = call.index(name)
            if at is not None:
                shares[at] = scale * factor
    return shares


def _named_factors(call: Call) -> dict[str, float]:
    a, packet = call.args, _packet(call)
    alpha = a.get("alpha", 1)
    if packet is aten.add:
        return {"self": 1.0, "other": alpha}
    if packet is aten.sub:
        return {"self": 1.0, "other": -alpha}
    if packet is aten.rsub:
        return {"self": -alpha, "other": 1.0}
    if packet is aten.neg or (packet in (aten.logical_not, aten.bitwise_not) and call.out.dtype is torch.bool):
        return {"self": -1.0}
    if packet in (aten.baddbmm, aten.addmm):
        return {"self": a["beta"]}
    if packet is aten.mul:
        numbers = {own: scalar(a[other]) for own, other in (("self", "other"), ("other", "self"))}
        return {own: number for own, number in numbers.items() if number is not None}
    number = scalar(a["other"]) if packet is aten.div else None
    return {"self": 1 / number} if number else {}


def token_dims(node: fx.Node, facts: Facts, tokens: Dim) -> list[int]:
    """The dims of a value that are the token axis and along which it varies."""
    return [d for d, dim in enumerate(facts.dims(node)) if leaves(dim) == tokens and facts.varies(node, d)]


def varies_with(node: fx.Node, facts: Facts) -> set[Any]:
    return {leaf for d, dim in enumerate(facts.dims(node)) if facts.varies(node, d) for leaf in leaves(dim)}


__all__ = ["VIEWS", "KeyMask", "key_masks", "leaves_all_in", "masked_by_place", "score_terms", "token_dims",
           "varies_with"]  # fmt: skip
