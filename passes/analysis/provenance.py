"""provenance: which entries of a value come from the input, which from weights, and which from numbers alone.

Tokens that come from weights are special, however they were put among the others: joined, written, stacked, padded and
added, or brought into another order. So what places entries is done to their origins instead, and what computes with
them takes the largest origin that it meets. Followed up to the first attention, where all tokens meet.

    cls [1, 1, D]: WEIGHT    x [B, N, D]: INPUT    cat([cls, x], 1) + pos: WEIGHT at the first token, else INPUT
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..rules import Call, find, tensors_of
from ..rules.base import Role
from ..rules.contraction import Attention
from ..rules.facts import Facts
from ..rules.joins import CatRule, StackRule
from ..rules.pointwise import POINTWISE, MaskRule
from ..rules.reduce import Softmax
from ..rules.signature import SignatureRule
from ..rules.slices import ScatterSlice, SelectRule, SliceRule, SplitRule
from ..rules.views import ExpandRule, PermuteRule, ViewRule
from .values import Values, size_hint

aten = torch.ops.aten
NUMBER, WEIGHT, INPUT = 0, 1, 2
LARGEST = 2**30
"""Elements of a value whose entries are told apart."""

_PLACING = (ViewRule, PermuteRule, ExpandRule, CatRule, StackRule, SliceRule, SelectRule, SplitRule,
            ScatterSlice)  # fmt: skip
_PLACES = {aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.index_put.default,
           aten.index_copy.default, aten.scatter.src, aten.constant_pad_nd.default, aten.pad.default, aten.flip.default,
           aten.roll.default, aten.where.self, aten.take_along_dim.default, aten.diagonal_scatter.default,
           aten.as_strided_scatter.default, aten.masked_scatter.default}  # fmt: skip
_PADS = {aten.constant_pad_nd.default, aten.pad.default}

def _added_at(x: Tensor, dim: int, index: Tensor, source: Tensor, **_: Any) -> Tensor:
    """Entries have the largest origin of what is added."""
    if index.dim() < source.dim():  # index_add: one index for each row
        index = index.reshape([-1 if d == dim % source.dim() else 1 for d in range(source.dim())]).expand_as(source)
    return x.scatter_reduce(dim, index, source, "amax")


_ADDS_AT = {aten.index_add.default, aten.scatter_add.default}

State = int | Tensor
"""One origin for all entries, or uint8 of the value's shape."""


def origins(facts: Facts, values: Values) -> dict[fx.Node, Tensor]:
    """The values with entries of several origins: uint8 NUMBER, WEIGHT or INPUT, of their shape as it was traced."""
    found = _Origins(facts, values)
    with _disable_current_modes(), torch.no_grad():
        for node in facts.graph.nodes:
            found.states[node] = found.state(node)
    return {node: state for node, state in found.states.items() if isinstance(state, Tensor)}


class _Origins:

    def __init__(self, facts: Facts, values: Values) -> None:
        self.facts, self.values = facts, values
        self.states: dict[fx.Node, Any] = {}

    def state(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return WEIGHT if node in self.facts.constant else INPUT
        if node.op == "call_function" and node.target is operator.getitem:
            held = self.states.get(node.args[0])  # type: ignore[arg-type]
            return held[node.args[1]] if isinstance(held, (tuple, list)) else held  # type: ignore[index]
        call = self.facts.calls.get(node)
        if call is None or not call.nodes:
            return NUMBER if node in self.facts.constant else INPUT
        held = [self.states[n] for n in call.nodes]
        if not all(isinstance(state, (int, Tensor)) for state in held):
            return INPUT
        rule = find(call)
        if isinstance(rule, (Attention, Softmax)) and node not in self.facts.constant:
            return INPUT
        if isinstance(rule, _PLACING) or node.target in _PLACES or node.target in _ADDS_AT:
            return self._placed(node, call)
        if all(isinstance(state, int) for state in held):
            return max(held)
        if rule is POINTWISE or isinstance(rule, MaskRule):
            return self._met(node, call.nodes)
        return self._mapped(node, call, rule) if isinstance(rule, SignatureRule) else INPUT

    def _met(self, node: fx.Node, operands: Sequence[fx.Node]) -> State:
        """Entry by entry the largest origin."""
        found = torch.full([1] * node.meta["val"].dim(), NUMBER, dtype=torch.uint8)
        for state in (self.states[n] for n in operands):
            found = torch.maximum(found, state if isinstance(state, Tensor) else torch.tensor(state, dtype=torch.uint8))
        return _plain(found, _shape(node.meta["val"]))

    def _placed(self, node: fx.Node, call: Call) -> Any:
        """What the op does to entries, done to their origins."""
        floats = [n for n in call.nodes if not self._is_place(n)]
        states = {self.states[n] for n in floats if isinstance(self.states[n], int)}
        fills = node.target in _PADS
        if not any(isinstance(self.states[n], Tensor) for n in floats) and len(states) <= 1 and not fills:
            return max(states, default=INPUT)
        known = {n: self.values.of(n) for n in call.nodes if self._is_place(n)}
        vals = [*tensors_of(node.meta["val"]), *call.vals]
        if any(value is None for value in known.values()) or any(_count(val) > LARGEST for val in vals):
            return INPUT
        if node.target is aten.pad.default and call.args.get("mode") not in (None, "constant"):
            return INPUT

        def operand(n: fx.Node) -> Any:
            if n in known:
                return known[n]
            val = n.meta.get("val")
            return self._spread(n) if isinstance(val, Tensor) else size_hint(val)

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        try:
            place: Any = _added_at if node.target in _ADDS_AT else node.target
            found = place(*args[:2]) if fills else place(*args, **kwargs)
        except RuntimeError:  # an op that has no kernel for bytes
            return INPUT
        if isinstance(found, (tuple, list)):
            return [_plain(f, f.shape) for f in found]
        return _plain(found, found.shape)

    def _is_place(self, node: fx.Node) -> bool:
        """Whether an operand says where entries go: indices and masks."""
        dtype = node.meta["val"].dtype
        return not (dtype.is_floating_point or dtype.is_complex)

    def _spread(self, node: fx.Node) -> Tensor:
        state, shape = self.states[node], _shape(node.meta["val"])
        return state if isinstance(state, Tensor) else torch.tensor(state, dtype=torch.uint8).expand(shape)

    def _mapped(self, node: fx.Node, call: Call, rule: SignatureRule) -> State:
        """An op that computes: along what it maps the entries stay apart."""
        if not isinstance(node.meta["val"], Tensor):
            return INPUT
        sig, shape = rule.signature(call, self.facts), _shape(node.meta["val"])
        found = torch.full([1] * len(shape), NUMBER, dtype=torch.uint8)
        for n, letters in zip(call.nodes, sig.ins, strict=True):
            state = self.states[n]
            if not isinstance(state, Tensor):  # weights that a token meets do not make it one of theirs
                found = found.clamp_min(state) if state == INPUT else found
                continue
            kept = [d for d, x in enumerate(letters) if x is not None and x in sig.outs[0] and sig.role(x) is Role.MAP]
            gone = [d for d in range(len(letters)) if d not in kept]
            state = state.amax(gone) if gone else state
            order = sorted(range(len(kept)), key=lambda i: sig.outs[0].index(letters[kept[i]]))
            at = {sig.outs[0].index(letters[kept[i]]): state.shape[i] for i in order}
            found = torch.maximum(found, state.permute(order).reshape([at.get(d, 1) for d in range(len(shape))]))
        return _plain(found, shape)


def _plain(found: Tensor, shape: Sequence[int]) -> State:
    """One origin where all entries have it; dims along which it is the same take no memory."""
    if not found.numel():
        return INPUT
    for d in range(found.dim()):
        first = found.narrow(d, 0, 1)
        if found.shape[d] > 1 and bool((found == first).all()):
            found = first
    return int(found) if found.numel() == 1 else found.expand(list(shape))


def _shape(val: Tensor) -> list[int]:
    return [size_hint(size) for size in val.shape]


def _count(val: Tensor) -> int:
    count = 1
    for size in _shape(val):
        count *= size
    return count


__all__ = ["INPUT", "NUMBER", "WEIGHT", "origins"]
