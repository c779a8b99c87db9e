"""pairs: which terms of attention scores are masks of pairs.

Such a term lets one query see a key that another does not (causal, windowed, packed): one group could hold tokens that
it keeps apart, so no merge can keep what it says. What is known while compiling is judged by its value (`values.py`),
whatever it was made with; a sum by its summands. Where a value is not known, bools, what the caller gives and what is
made of either are masks of pairs as soon as they vary with both tokens; what the model computes by a product, and
finite tables, are scores like others. Tokens that never merge may be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..algebra.axes import Dim, leaves
from ..rules import Call, find
from ..rules.base import Rule, sources
from ..rules.contraction import Contraction
from ..rules.facts import Facts
from ..rules.joins import CatRule, StackRule
from ..rules.pointwise import POINTWISE, MaskRule
from ..rules.views import ExpandRule, PermuteRule, ViewRule
from .special import special
from .values import GAP, LEFT_OUT, Values, ruled_out, rules_none_out, tells_apart

aten = torch.ops.aten
_PLACED = ViewRule, PermuteRule, ExpandRule
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor}
_NOTS = {aten.bitwise_not.default, aten.logical_not.default}
_COPIES = {aten._to_copy.default, aten.clone.default, *_NOTS}
_ALL_OF = (aten.mul, aten.bitwise_and, aten.logical_and, aten.minimum)
_ANY_OF = (aten.bitwise_or, aten.logical_or, aten.add, aten.maximum)
_OUTER = {**dict.fromkeys(_ALL_OF, 1), **dict.fromkeys(_ANY_OF, -1)}
_LOGS = {aten.log.default, aten.log2.default, aten.log1p.default, aten.log10.default}


def elementwise(rule: Rule) -> bool:
    return rule is POINTWISE or isinstance(rule, (MaskRule, *_PLACED))


class Pairs:
    """Answers for one graph; see `PairMasks`."""

    def __init__(self, facts: Facts, values: Values) -> None:
        self.facts, self.values = facts, values
        self._told: dict[tuple[fx.Node, Dim, Dim], bool] = {}
        self._marks: dict[fx.Node, bool] = {}
        self._masked: dict[fx.Node, bool] = {}

    def tell(self, node: fx.Node, query: Dim, key: Dim) -> bool:
        at = (node, query, key)
        if at not in self._told:
            self._told[at] = self._spots(node, query, key) is not None and self._tell(node, query, key)
        return self._told[at]

    def marks(self, node: fx.Node) -> bool:
        if node not in self._marks:
            value = self.values.of(node) if self._fits(node) else None
            if value is not None:
                said = value.dim() > 0 and (value.is_floating_point() or value.dtype is torch.bool)
                whole = value.dtype is torch.bool and bool(value.all())
                found = said and not whole and any(bool(out.any()) for out in self._outs(node, value))
            else:
                found = any(self.marks(n) for n in self._inner(node))
            self._marks[node] = found
        return self._marks[node]

    def masked(self, scores: fx.Node) -> bool:
        if scores not in self._masked:
            inner = [n for n in self._inner(scores) if n in self.facts.scores]
            self._masked[scores] = any(map(self.facts.told, (scores, *self._inner(scores)))) or any(
                map(self.masked, inner)
            )
        return self._masked[scores]

    def value(self, node: fx.Node) -> Tensor | None:
        """The value of a node, if it is known while compiling."""
        return self.values.of(node) if self._fits(node) else None

    def _fits(self, node: fx.Node) -> bool:
        return node in self.facts.constant and isinstance(node.meta.get("val"), Tensor)

    def _inner(self, node: fx.Node) -> Sequence[fx.Node]:
        """The operands that an op keeps entry by entry."""
        call = self.facts.calls.get(node)
        if call is None or not (elementwise(find(call)) or isinstance(find(call), (CatRule, StackRule))):
            return []
        return self._kept(call) or sources(node, call.nodes)

    @staticmethod
    def _kept(call: Call) -> list[fx.Node]:
        """Of an op that fills in a number which rules nothing out: what it fills it into."""
        parts = MaskRule.parts(call) if isinstance(find(call), MaskRule) else None
        mild = parts is not None and parts[2] is not None and abs(parts[2]) < GAP
        return [call.nodes[parts[0]]] if parts is not None and mild else []

    def _spots(self, node: fx.Node, query: Dim, key: Dim) -> tuple[int, int] | None:
        """The dims in which a value varies with the queries and with the keys."""
        if not isinstance(node.meta.get("val"), Tensor) or not query or not key:
            return None
        dims = [leaves(dim) if self.facts.varies(node, d) else () for d, dim in enumerate(self.facts.dims(node))]
        keys = [d for d, dim in enumerate(dims) if dim == key]
        queries = [d for d, dim in enumerate(dims) if dim == query and (query != key or d != keys[-1])] if keys else []
        return (queries[-1], keys[-1]) if queries else None

    def _tell(self, node: fx.Node, query: Dim, key: Dim) -> bool:
        inner = [n for n in self._inner(node) if self._spots(n, query, key) is not None]
        value = self.value(node)
        if value is not None:
            summands = inner if node.target in _SUMS and len(inner) > 1 else []
            return self._by_value(node, value, query, key) or any(self.tell(n, query, key) for n in summands)
        call = self.facts.calls.get(node)
        if call is not None and (self._kept(call) or self.outer(node)):
            return any(self.tell(n, query, key) for n in inner)
        if call is not None and inner:
            return any(self.tell(n, query, key) for n in inner) or (
                node.meta["val"].dtype is torch.bool and node.target not in _COPIES
                and all(n.meta["val"].dtype is not torch.bool for n in inner)
            )
        told = node in self.facts.given or node in self.facts.decided or node.meta["val"].dtype is torch.bool
        return told or (node in self.facts.constant and self._may_rule_out(node))

    def sign(self, call: Call) -> int:
        """Of an op that joins masks: 1 where both must hold, -1 where one of them must, else 0."""
        rule = find(call)
        product = isinstance(rule, Contraction) and rule.outer(call, self.facts)
        return 1 if product else _OUTER.get(call.target.overloadpacket, 0)

    def outer(self, node: fx.Node) -> bool:
        """Whether a value joins a mask of single tokens, as queries, with itself, as keys: tokens of one kind see, and
        are seen, alike."""
        call = self.facts.calls.get(node)
        operator = call is not None and isinstance(call.target, torch._ops.OpOverload)
        if call is None or not operator or len(call.nodes) != 2 or not self.sign(call):
            return False
        apart = call.nodes[0] is not call.nodes[1] or isinstance(find(call), Contraction)
        return len({self.placed(n) for n in call.nodes}) == 1 and apart

    def placed(self, node: fx.Node) -> tuple[fx.Node, bool]:
        """What a value is a view of, or a copy in another dtype; and whether it says the contrary."""
        contrary = False
        while (call := self.facts.calls.get(node)) and (isinstance(find(call), _PLACED) or call.target in _COPIES):
            contrary ^= call.target in _NOTS
            node = call.nodes[0]
        return node, contrary

    def _by_value(self, node: fx.Node, value: Tensor, query: Dim, key: Dim) -> bool:
        spots = self._spots(node, query, key)
        assert spots is not None
        value = value.movedim(spots, (-2, -1))
        free = [self._free(axis, n).to(value.device) for axis, n in zip((query, key), value.shape[-2:], strict=True)]
        return any(tells_apart(out, (free[0], free[1])) for out in self._outs(node, value))

    def _outs(self, node: fx.Node, value: Tensor) -> list[Tensor]:
        """The entries of a value [..., keys] that rule out: those of a term, and those of a factor where it is one."""
        zeros = value.is_floating_point() and self._factor(node)
        return ([] if rules_none_out(value) else [ruled_out(value)]) + [value == 0] * zeros

    def _factor(self, node: fx.Node) -> bool:
        """Whether a value is multiplied by something that is computed: then zeros rule out."""
        users = [n for n in node.users if n in self.facts.calls]
        packets = {getattr(n.target, "overloadpacket", None) for n in users}
        computed = any(other not in self.facts.constant for n in users for other in self.facts.calls[n].nodes)
        return computed and aten.mul in packets

    def _free(self, axis: Dim, length: int) -> Tensor:
        """bool [length]: the tokens of an axis that may merge."""
        return special(self.facts, axis).free(length)

    def _may_rule_out(self, root: fx.Node) -> bool:
        """Of a constant whose value is not known: whether a bool, a logarithm or a very low number went into it."""
        todo, seen = [root], set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
            held = node.meta.get("val")
            boolean = isinstance(held, Tensor) and held.dtype is torch.bool
            if boolean or node.target in _LOGS or any(a <= LEFT_OUT for a in numbers if not isinstance(a, bool)):
                return True
            todo += node.all_input_nodes
        return False


__all__ = ["Pairs", "elementwise"]
