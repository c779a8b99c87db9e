"""sums: attention without a softmax, as sites of their own.

What sums values over the tokens, weighted by what queries and keys make of each other, is attention whatever the
weights are (sigmoid, relu / n, exp over its sum). The sum may also come first (linear attention):

    w = f(q k^T) ; o = w v                     scores of every pair
    s = f(k)^T v ; o = f(q) s                  no scores: keys and values are summed over the tokens, then read

No more is needed to merge: every sum over tokens becomes one weighted by size, op by op. Both sums are contractions of
two activations over an axis of tokens; what tells scores from keys is whether the axis that is kept holds tokens or
features. Attention over channels has a softmax between the two products and is none of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from ..algebra.axes import Dim, leaves
from ..algebra.axes import expr as size_expr
from ..rules import Call, find
from ..rules.base import Role, Signature, sources
from ..rules.contraction import Contraction
from ..rules.facts import Facts
from ..rules.pointwise import POINTWISE
from ..rules.reduce import Softmax
from ..rules.views import PermuteRule
from .pairs import elementwise
from .reach import nearest
from .sites import AttentionSite, Operand, place


def find_sums(facts: Facts, taken: set[fx.Node]) -> Iterator[AttentionSite]:
    """Every such attention, but those that end in `taken`."""
    finder = _Finder(facts)
    for node, call in facts.calls.items():
        product = finder.product(call)
        if product is not None and node not in taken:
            found = finder.of_pairs(product) or finder.linear(product)
            if found is not None and found.out not in taken:
                yield found


@dataclass
class _Product:
    """A product of two activations that sums over one axis. own: of each operand, the dims that the other has not."""

    call: Call
    sig: Signature
    axis: Dim
    at: tuple[int, int]
    own: tuple[list[int], list[int]]

    def node(self, i: int) -> fx.Node:
        return self.call.nodes[-2:][i]


def place_in(product: fx.Node, node: fx.Node, d: int, facts: Facts) -> int | None:
    """The dim of a product that is dim d of a value made of it; None unless all between keeps the dims from there on,
    or their order alone."""
    while node is not product:
        call, behind = facts.calls[node], len(node.meta["val"].shape) - d
        if isinstance(rule := find(call), PermuteRule):
            node, d = call.nodes[0], rule.order(call)[d]
            continue
        sizes = {n: list(map(size_expr, n.meta["val"].shape)) for n in (node, *call.nodes)}
        above = (n for n in call.nodes if facts.leads(product, n) and sizes[n][-behind:] == sizes[node][-behind:])
        if (found := next(above, None)) is None:
            return None
        node, d = found, len(sizes[found]) - behind
    return d


def _site(q: Operand, k: Operand, v: Operand, out: fx.Node) -> AttentionSite:
    return AttentionSite(name=place(out), q=q, k=k, v=v, out=out, softmax=False)


class _Finder:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def product(self, call: Call) -> _Product | None:
        rule = find(call)
        if not isinstance(rule, Contraction) or len(call.nodes) < 2 or self.facts.constant & set(call.nodes[-2:]):
            return None
        sig = rule.signature(call, self.facts)
        ins = sig.ins[-2:]
        summed = [x for x in ins[0] if x is not None and x in ins[1] and sig.role(x) is Role.SUM]
        if len(summed) != 1:
            return None
        at = (ins[0].index(summed[0]), ins[1].index(summed[0]))
        own = tuple(
            [d for d, x in enumerate(letters) if x in sig.outs[0] and x not in other and self._axis(node, d)]
            for letters, other, node in zip(ins, reversed(ins), call.nodes[-2:], strict=True)
        )
        return _Product(call, sig, self._axis(call.nodes[-2], at[0]), at, own)  # type: ignore[arg-type]

    def _axis(self, node: fx.Node, d: int) -> Dim:
        return leaves(self.facts.dims(node)[d])

    def _of_tokens(self, axis: Dim) -> bool:
        return bool(axis) and not self.facts.features & set(axis)

    def _queries(self, product: _Product, i: int) -> list[int]:
        """The dims of an operand that have tokens which the other has not; heads may be folded into them."""
        axes = [(d, set(self._axis(product.node(i), d))) for d in product.own[i]]
        return [d for d, axis in axes if axis - self.facts.features]

    def of_pairs(self, product: _Product) -> AttentionSite | None:
        """Where one operand has a weight for every query and key."""
        if not self._of_tokens(product.axis):
            return None
        for i in (0, 1):
            queries = self._queries(product, i)
            values = product.own[1 - i]
            if len(queries) != 1 or not values:
                continue
            query = self._axis(product.node(i), queries[0])
            above = self._scores(product.node(i), query, product.axis)
            if above is None or any(self._of_tokens(self._axis(product.node(1 - i), d)) for d in values):
                continue
            key = place_in(above.call.node, product.node(i), product.at[i], self.facts)
            for j in (j for j in (0, 1) if key is None or above.sig.outs[0][key] not in above.sig.ins[-2:][j]):
                q, k = self._operand(above, j, query), self._operand(above, 1 - j, product.axis)
                if q is not None and k is not None:
                    v = Operand(product.node(1 - i), product.at[1 - i], tuple(values))
                    return _site(q, k, v, product.call.node)
        return None

    def _operand(self, product: _Product, i: int, axis: Dim) -> Operand | None:
        """An operand of the scores whose tokens are an axis."""
        node = product.node(i)
        spots = [d for d in product.own[i] if self._axis(node, d) == axis]
        return Operand(node, spots[0], (product.at[i],)) if len(spots) == 1 else None

    def _scores(self, node: fx.Node, query: Dim, key: Dim) -> _Product | None:
        """The product of queries and keys that weights are made of, value by value."""
        held = {*query, *key}

        def onward(call: Call) -> list[fx.Node]:
            operands = sources(call.node, call.nodes) if elementwise(find(call)) else ()
            return [n for n in operands if held <= self.facts.leaves_of(n)]

        products = map(self.product, nearest([node], onward, self.facts))
        return next((found for found in products if found is not None and not self._of_tokens(found.axis)), None)

    def linear(self, product: _Product) -> AttentionSite | None:
        """Where keys and values are summed over the tokens first."""
        own = [[self._axis(product.node(i), d) for d in product.own[i]] for i in (0, 1)]
        if not self._of_tokens(product.axis) or any(self._of_tokens(x) for axes in own for x in axes):
            return None
        def onward(call: Call) -> Iterable[fx.Node]:
            return call.node.users if self.product(call) is None and elementwise(find(call)) else ()

        for reader in map(self.product, nearest(product.call.node.users, onward, self.facts)):
            if reader is None:
                continue
            for i in (0, 1):
                # The queries are the operand that has tokens of its own and shares the features of the keys.
                spots = self._queries(reader, i)
                keys = [j for j in (0, 1) if reader.axis in own[j]]
                if len(spots) == 1 and keys and self._only_mapped(product.call.node, reader.node(1 - i)):
                    (j, *_) = keys
                    key, value = (Operand(product.node(n), product.at[n], tuple(product.own[n])) for n in (j, 1 - j))
                    query = Operand(reader.node(i), spots[0], (reader.at[i],))
                    return _site(query, self._raw(key), value, reader.call.node)
        return None

    def _only_mapped(self, product: fx.Node, node: fx.Node) -> bool:
        """Whether a value is a product mapped entry by entry, and nothing else of it: no running sum of chunks."""
        way = self.facts.reach.between(product, node)
        return bool(way) and all(n in self.facts.calls and elementwise(find(self.facts.calls[n])) for n in way[1:])

    def _raw(self, operand: Operand) -> Operand:
        """Keys before their feature map."""
        node, tokens, features = operand.node, operand.tokens, operand.features
        while (call := self.facts.calls.get(node)) is not None:
            rule, above = find(call), [n for n in call.nodes if n not in self.facts.constant]
            if isinstance(rule, PermuteRule):
                order = rule.order(call)
                tokens, features = order[tokens], tuple(order[d] for d in features)
            elif not (rule is POINTWISE or isinstance(rule, Softmax)) or len(above) != 1:
                break
            elif self.facts.axes[above[0]] != self.facts.axes[node]:
                break
            node = above[0]
        return Operand(node, tokens, features)


__all__ = ["find_sums", "place_in"]
