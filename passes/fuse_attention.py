"""fuse_attention: every spelling of softmax attention, as one op.

It follows the dataflow back from each softmax to the product q k^T and forward to the product with v, and puts one
`scaled_dot_product_attention` in their place. Handled on the way: matmul, bmm, einsum; scale on q, k or the
scores, as a number or a tensor that is constant over both token axes; additive terms; bool masks by masked_fill or
where; a softmax in wider precision; dropout; heads folded into the batch. Nothing is fused whose intermediate values
somebody else reads.

    s = bmm(q, kT) * c + bias ; m = masked_fill(s, mask, -inf) ; p = softmax(m, -1) ; o = bmm(dropout(p), v)
    ->  o = scaled_dot_product_attention(q, k, v, attn_mask=bias + where(mask, -inf, 0), dropout_p, scale=c)

Correctness does not depend on it: what is not fused follows the measure principle op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .algebra.axes import expr as size_expr
from .building.emit import Emit, drop_dead
from .building.trace import single
from .normal.functional import is_impure
from .rules import Call, find
from .rules.base import Role, Signature
from .rules.contraction import Contraction
from .rules.facts import NO_FACTS
from .rules.pointwise import MaskRule, scalar
from .rules.reduce import SOFTMAX
from .rules.views import PermuteRule

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default

_PASS = {aten._to_copy.default, aten.clone.default, aten.alias.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
          aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int}  # fmt: skip
# A mask value this low leaves a key out; a milder one is an ordinary score and stays as it is written.
_MASKED_OUT = -1e4
_ABSORBS = -1e18  # in float64 too

Order = list[int | None]


@dataclass
class _Match:
    """What was found between a softmax and its two products, in the order from the scores to the softmax. regrouped:
    the queries stand in other dims in between."""

    product: fx.Node
    scale: float = 1.0
    query_factors: list[tuple[Any, fx.Node, tuple]] = field(default_factory=list)  # op, factor, batch it stands in
    terms: list[Callable[[], fx.Node]] = field(default_factory=list)
    shape: tuple | None = None
    regrouped: bool = False


class _NoMatch(Exception):
    pass


def fuse_attention(gm: fx.GraphModule, mode: FakeTensorMode) -> int:
    """Replace unfused softmax attention in place; returns how many sites were fused."""
    count = 0
    autocast = any(n.target is torch.amp.autocast_mode._enter_autocast for n in gm.graph.nodes)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in SOFTMAX:
            try:
                _Fuser(gm.graph, mode, node, autocast).run()
            except _NoMatch:
                continue
            count += 1
    if count:
        drop_dead(gm.graph, is_impure)
        gm.graph.lint()
    return count


def _shape(node: fx.Node) -> tuple:
    return tuple(size_expr(s) for s in node.meta["val"].shape)


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise _NoMatch
    return next(iter(node.users))


def _same(node: fx.Node) -> fx.Node:
    return node


def _swaps_last(node: fx.Node) -> bool:
    call = Call(node)
    rule, rank = find(call), call.out.dim() if call.results else 0
    return isinstance(rule, PermuteRule) and rule.order(call) == [*range(rank - 2), rank - 1, rank - 2]


class _Fuser:
    def __init__(self, graph: fx.Graph, mode: FakeTensorMode, softmax: fx.Node, autocast: bool) -> None:
        self.graph, self.softmax, self.autocast = graph, softmax, autocast
        self._emit = Emit(graph, mode, softmax)
        self.swapped = False  # v @ p^T: the probabilities are transposed on their way

    def run(self) -> None:
        scores = self.softmax.args[0]
        assert isinstance(scores, fx.Node)
        rank = scores.meta["val"].dim()
        if rank < 2 or self.softmax.args[1] not in (-1, rank - 1):
            raise _NoMatch
        match = self._back(scores)
        product, dropout = self._forward(match)
        if match.regrouped:
            whole = _shape(match.product)
            if _shape(self.probabilities) != whole or _shape(self.softmax)[-1] != whole[-1]:
                raise _NoMatch
            match.shape = whole[:-2]
        q, k = self._queries_and_keys(match.product)
        with self.graph.inserting_before(product):
            self._replace(match, q, k, product, dropout)

    # Back from the softmax to the product of queries and keys.

    def _back(self, node: fx.Node) -> _Match:
        if len(node.users) != 1 or node.op != "call_function":
            raise _NoMatch
        target = node.target
        if target in _PASS:
            return self._back(self._first(node))
        if target in _VIEWS:
            return self._through_view(node)
        if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return self._through_factor(node, divide=target in (aten.div.Tensor, aten.div.Scalar))
        if target is aten.add.Tensor and not node.kwargs:
            return self._through_term(node)
        if isinstance(find(Call(node)), MaskRule):
            return self._through_mask(node)
        if type(find(Call(node))) is Contraction and target is not aten.linear.default:
            return self._at_product(node)
        raise _NoMatch

    @staticmethod
    def _first(node: fx.Node) -> fx.Node:
        if not isinstance(node.args[0], fx.Node):
            raise _NoMatch
        return node.args[0]

    def _through_view(self, node: fx.Node) -> _Match:
        source = self._first(node)
        match = self._back(source)
        match.regrouped |= _shape(source)[-2:] != _shape(node)[-2:]
        # Terms met on either side of a view have different batch shapes; one shape must do for all of them.
        if match.terms and match.shape != _shape(match.product if match.regrouped else node)[:-2]:
            raise _NoMatch
        return match

    def _through_factor(self, node: fx.Node, *, divide: bool) -> _Match:
        a, b = cast(Any, node.args[:2])
        for scores, factor in ((a, b), (b, a)) if not divide else ((a, b),):
            if not isinstance(scores, fx.Node) or _shape(scores) != _shape(node):
                continue
            number = scalar(factor)
            if number is None and not (isinstance(factor, fx.Node) and self._constant_over_tokens(factor)):
                continue
            match = self._back(scores)
            if match.terms or (match.regrouped and number is None):  # the factor would scale the terms as well
                raise _NoMatch
            if number is not None:
                match.scale = match.scale / number if divide else match.scale * number
            else:
                op = aten.div.Tensor if divide else aten.mul.Tensor
                match.query_factors.append((op, factor, _shape(node)[:-2]))
            return match
        raise _NoMatch

    @staticmethod
    def _constant_over_tokens(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and all(s == 1 for s in _shape(node)[-2:])

    def _through_term(self, node: fx.Node) -> _Match:
        a, b = node.args[:2]
        for scores, term in ((a, b), (b, a)):
            if not isinstance(scores, fx.Node) or not isinstance(term, fx.Node) or _shape(scores) != _shape(node):
                continue
            try:
                match = self._back(scores)
            except _NoMatch:
                continue
            self._add_term(match, node, partial(_same, term))
            return match
        raise _NoMatch

    def _through_mask(self, node: fx.Node) -> _Match:
        call = Call(node)
        parts = MaskRule.parts(call)
        if parts is None:
            raise _NoMatch
        x, mask, value, fills = parts
        if (not isinstance(value, float) and not isinstance(value, int)) or not value <= _MASKED_OUT:
            raise _NoMatch
        match = self._back(call.nodes[x])
        picked = call.nodes[mask]
        # Where all keys are filled their scores are gone: a number that absorbs them does the same in a sum.
        low = max(min(value, _ABSORBS), torch.finfo(call.out.dtype).min) if value > -torch.inf else value

        def term() -> fx.Node:
            pair = (single(low), 0.0) if fills else (0.0, single(low))
            return self._emit(aten.where.Scalar, picked, *pair)

        self._add_term(match, node, term)
        return match

    @staticmethod
    def _add_term(match: _Match, node: fx.Node, term: Callable[[], fx.Node]) -> None:
        shape = _shape(node)[:-2]
        if match.shape not in (None, shape) or match.regrouped:
            raise _NoMatch
        match.shape = shape
        match.terms.append(term)

    def _at_product(self, node: fx.Node) -> _Match:
        return _Match(node)

    # Forward from the softmax to the product with the values.

    def _forward(self, match: _Match) -> tuple[fx.Node, float]:
        node, dropout = self.softmax, 0.0
        while True:
            user = _only_user(node)
            if user.target in _PASS:
                pass
            elif user.target is aten.dropout.default:
                dropout = float(user.args[1]) if user.args[2] else 0.0  # type: ignore[arg-type]
            elif user.target in _VIEWS and (not self.swapped or _shape(user)[-2:] == _shape(node)[-2:]):
                match.regrouped |= _shape(user)[-2:] != _shape(node)[-2:]
            elif not self.swapped and user.op == "call_function" and _swaps_last(user):
                self.swapped = True
            elif user.op == "call_function" and type(find(Call(user))) is Contraction:
                self.probabilities = node
                return user, dropout
            else:
                raise _NoMatch
            node = user

    # The letters of the two products.

    @staticmethod
    def _letters(node: fx.Node) -> tuple[Call, Signature]:
        call = Call(node)
        rule = find(call)
        assert isinstance(rule, Contraction)
        return call, rule.signature(call, NO_FACTS)

    def _queries_and_keys(self, node: fx.Node) -> tuple[tuple[fx.Node, Order], tuple[fx.Node, Order]]:
        """Nodes of queries and keys with the order of dims that makes them [*batch, l, e] and [*batch, s, e]."""
        call, sig = self._letters(node)
        out, nodes, ins = sig.outs[0], call.nodes, sig.ins
        inner = [letter for letter, role in sig.roles.items() if role is Role.SUM]
        if len(nodes) != 2 or len(out) < 2 or len(inner) != 1:
            raise _NoMatch
        *batch, query, key = out
        shared = any(x not in letters for x in batch for letters in ins)
        if shared and _shape(node)[-1] != _shape(node)[-2]:  # heads may stand where queries are looked for
            raise _NoMatch
        found = {}
        for name, other in ((query, key), (key, query)):
            at = next((i for i in (0, 1) if name in ins[i] and other not in ins[i]), None)
            if at is None:
                raise _NoMatch
            found[name] = (nodes[at], self._order(ins[at], batch, name, inner[0]))
        return found[query], found[key]

    @staticmethod
    def _order(letters: Any, batch: Sequence[Any], *last: Any) -> Order:
        """Where each of [*batch, *last] stands among the letters of an operand; None where it has no such dim, being
        the same for all (keys that heads share)."""
        if not set(last) <= set(letters) <= {*batch, *last} or len(set(letters)) < len(letters):
            raise _NoMatch
        return [letters.index(x) if x in letters else None for x in (*batch, *last)]

    def _values(self, product: fx.Node) -> tuple[fx.Node, Order, Order]:
        """The values, the order of dims that makes them [*batch, s, f], and that of the result from [*batch, l, f]."""
        call, sig = self._letters(product)
        if len(call.nodes) != 2 or self.probabilities not in call.nodes:
            raise _NoMatch
        at = call.nodes.index(self.probabilities)
        *batch, query, key = sig.ins[at]
        if self.swapped:
            query, key = key, query
        other = sig.ins[1 - at]
        free = [x for x in other if x not in batch and x != key]
        if sig.role(key) is not Role.SUM or len(free) != 1:
            raise _NoMatch
        result = [*batch, query, free[0]]
        if sorted(map(str, sig.outs[0])) != sorted(map(str, result)) or list(sig.roles) != [key]:
            raise _NoMatch
        return (
            call.nodes[1 - at],
            self._order(other, batch, key, free[0]),
            [result.index(x) for x in sig.outs[0]],
        )

    # The replacement.

    def _replace(self, match: _Match, q: Any, k: Any, product: fx.Node, dropout: float) -> None:
        values, value_order, out_order = self._values(product)
        if any(free_unbacked_symbols(n.meta["val"]) for n in (q[0], k[0], values)):
            raise _NoMatch  # torch's SDPA asks whether a size is 0, which only values would tell
        batch = match.shape if match.shape is not None else _shape(self.softmax)[:-2]
        after = _shape(self.probabilities)[:-2]
        query = self._permuted(*q)
        for op, factor, around in match.query_factors:
            query = self._emit(op, self._batched(query, around), factor)
        operands = [query, self._permuted(*k), self._permuted(values, value_order)]
        operands = [self._batched(x, batch) for x in operands]
        dtype = torch.float32
        for x in operands:
            dtype = torch.promote_types(dtype, x.meta["val"].dtype) if x is not operands[0] else x.meta["val"].dtype
        if not self.autocast:
            operands = [self._cast(x, dtype) for x in operands]
        terms = [self._cast(term(), dtype) for term in match.terms]
        mask = terms[0] if terms else None
        for term in terms[1:]:
            mask = self._emit(aten.add.Tensor, mask, term)
        single = len(batch) == 1  # fused kernels want [B, H, N, e]
        if single:
            operands = [self._emit(aten.unsqueeze.default, x, 1) for x in operands]
            if mask is not None and mask.meta["val"].dim() >= 3:
                mask = self._emit(aten.unsqueeze.default, mask, -3)
        while mask is not None and mask.meta["val"].dim() < 2:  # one row for all queries, which SDPA wants to see
            mask = self._emit(aten.unsqueeze.default, mask, 0)
        masked = {} if mask is None else {"attn_mask": mask}
        out = self._emit(sdpa, *operands, **masked, dropout_p=dropout, scale=match.scale)
        out.meta.update({k: v for k, v in product.meta.items() if k != "val"})
        if single:
            out = self._emit(aten.squeeze.dim, out, 1)
        out = self._permuted(self._batched(out, after), out_order)
        if not self.autocast:
            out = self._cast(out, product.meta["val"].dtype)
        if _shape(out) != _shape(product):
            raise _NoMatch
        out.meta["val"] = product.meta["val"]
        product.replace_all_uses_with(out)

    def _permuted(self, node: fx.Node, order: Order) -> fx.Node:
        held = [d for d in order if d is not None]
        node = node if held == sorted(held) else self._emit(aten.permute.default, node, held)
        for d in (d for d, at in enumerate(order) if at is None):
            node = self._emit(aten.unsqueeze.default, node, d)
        return node

    def _batched(self, node: fx.Node, batch: tuple) -> fx.Node:
        shape = _shape(node)
        if shape[:-2] == tuple(batch):
            return node
        if len(shape) - 2 == len(batch) and all(a in (1, b) for a, b in zip(shape, batch, strict=False)):
            sizes = [-1 if a == b else b for a, b in zip(shape, batch, strict=False)]
            if all(isinstance(size, int) for size in sizes):
                return self._emit(aten.expand.default, node, [*sizes, -1, -1])
        if not all(isinstance(s, int) for s in (*shape, *batch)):
            raise _NoMatch
        return self._emit(aten.reshape.default, node, [*batch, *shape[-2:]])

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self._emit(aten._to_copy.default, node, dtype=dtype)


__all__ = ["fuse_attention", "sdpa"]
