"""Pointwise ops: every dim maps, operands broadcast. Most are found by `torch.Tag.pointwise`, none is listed twice.

Two finer points: which ops let an extensive value pass (homogeneous ones), and how masks merge. A mask of the
attention scores becomes an additive term and merges by log-mean-exp; a mask that zeroes values becomes the share of
the group that is kept, which makes masked pools exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tome_fx.ops import LEFT_OUT

from ..algebra.axes import expr as size_expr
from ..algebra.axes import leaves, same
from ..algebra.layout import Layout
from ..building.trace import Traced
from .base import Call, Decision, Emitter, Fill, Letter, Role, Signature, register
from .facts import Facts
from .signature import SignatureRule, frame_dims

aten = torch.ops.aten

# Homogeneous of degree one in their first operand: f(size * x) = size * f(x) for size > 0.
_HOMOGENEOUS = (
    aten.neg, aten.abs, aten.relu, aten.leaky_relu, aten.clone, aten.contiguous, aten.detach, aten.alias,
    aten.lift_fresh, aten.lift_fresh_copy, aten._to_copy, aten.dropout, aten.native_dropout, aten.feature_dropout,
    aten.alpha_dropout, aten.real, aten.imag, aten.zeros_like, aten.empty_like,
)  # fmt: skip
# Pointwise in effect though not by tag, or by tag only in some releases of torch.
_LIKE = (
    "ones_like", "full_like", "rand_like", "randn_like", "bernoulli", "gelu", "silu", "mish", "softplus", "hardtanh",
    "hardswish", "elu", "celu", "logit", "nan_to_num", "clamp", "isnan", "isinf", "isneginf", "bitwise_not",
    "logical_not", "fill", "copy", "rrelu", "log_sigmoid", "rsub", "masked_fill",
)  # fmt: skip
_ADD = (aten.add, aten.sub, aten.rsub)
_MULTIPLY = (aten.mul,)
_DIVIDE = (aten.div,)


def _packet(call: Call) -> Any:
    return call.target.overloadpacket


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def pointwise(call: Call, facts: Facts) -> Signature:
    """Operands broadcast against each other, aligned at the right."""
    rank = call.out.dim() if call.results else 0
    frame: tuple[Letter, ...] = tuple(("f", k - rank) for k in range(rank))
    ins = tuple(frame[rank - v.dim() :] for v in call.vals)
    packet, count = _packet(call), len(call.vals)
    linear: frozenset[int] = frozenset()
    additive = packet in _ADD and count == 2
    if packet in _HOMOGENEOUS:
        linear = frozenset({0})
    elif packet in _MULTIPLY or additive:
        linear = frozenset(range(count))
    elif packet in _DIVIDE and isinstance(call.args.get("self"), fx.Node) and call.args.get("rounding_mode") is None:
        linear = frozenset({0})
    fills = {i: _fill(call, facts, i, additive) for i in range(count)}
    return Signature(
        ins, tuple(frame for _ in call.results), linear=linear, additive=additive, frame=frame, fills=fills
    )


def _fill(call: Call, facts: Facts, i: int, additive: bool) -> Fill:
    floating = call.vals[i].dtype.is_floating_point
    if additive and floating:
        if call.node not in facts.scores:
            return Fill.MEAN
        return Fill.NONE if _pairs(call.nodes[i], facts) else Fill.BIAS
    # The mean of two rotations is none: a group turns as its representative does.
    if call.nodes[i] in facts.constant or call.nodes[i] in facts.angles:
        return Fill.ROW
    return (Fill.MEAN if additive else Fill.SHARE) if floating else Fill.NONE


def _pairs(node: fx.Node, facts: Facts) -> bool:
    """Whether a term of the scores holds one axis of tokens twice, or queries and keys, and no merge keeps what it
    says."""
    dims = [leaves(dim) for dim in facts.dims(node)]
    both = [(a, b) for a in range(len(dims)) for b in range(len(dims)) if dims[a] and a != b
            and ((a < b and dims[a] == dims[b]) or (dims[a], dims[b]) in facts.attends)]  # fmt: skip
    return any(facts.per_pair(node, a, b) for a, b in both)


def _zeroing(value: Any) -> bool:
    return _number(value) and value == 0


class MaskRule(SignatureRule):
    """`masked_fill(x, mask, value)` and `where(mask, x, value)` with a scalar value."""

    def __init__(self) -> None:
        super().__init__(self._signature)

    @staticmethod
    def parts(call: Call) -> tuple[int, int, Any, bool] | None:
        """(operand index of x, of the mask, the value, whether the mask's True means fill), or None for other forms."""
        a = call.args
        if "mask" in a:
            return _operand(call, "self"), _operand(call, "mask"), filling(a["value"]), True
        if isinstance(a["self"], fx.Node) and (value := filling(a["other"])) is not None:
            return _operand(call, "self"), _operand(call, "condition"), value, False
        if isinstance(a["other"], fx.Node) and (value := filling(a["self"])) is not None:
            return _operand(call, "other"), _operand(call, "condition"), value, True
        return None

    def _signature(self, call: Call, facts: Facts) -> Signature:
        sig = pointwise(call, facts)
        fills = dict(sig.fills)
        parts = self.parts(call)
        linear: frozenset[int] = frozenset()
        if parts is None:  # where(mask, x, y): a blend of two values
            linear = frozenset({1, 2}) if len(call.vals) == 3 else frozenset()
            return Signature(sig.ins, sig.outs, linear=linear, additive=True, frame=sig.frame, fills=fills)
        x, mask, value, _ = parts
        if call.node in facts.scores:
            # A score that is replaced by a number the mask does not leave out by is no score with a term added.
            leaves_out = value is not None and value <= LEFT_OUT
            fills[mask] = Fill.BIAS if leaves_out and not _pairs(call.nodes[mask], facts) else Fill.NONE
        elif _zeroing(value):
            fills[mask] = Fill.SHARE
            linear = frozenset({x})
        return Signature(sig.ins, sig.outs, linear=linear, frame=sig.frame, fills=fills)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        parts = self.parts(call)
        if parts is None or env.layout(call.nodes[parts[1]]) == decision.ins[parts[1]]:
            return super().emit(call, env, decision)
        x_at, mask_at, value, fills = parts
        sig = self.signature(call, env.facts)
        x = self.operand(call, env, decision, sig, x_at)
        node, frame = call.nodes[mask_at], frame_dims(sig, call, env.facts)
        mask = env.tensor(node)
        drop = mask if fills else mask.logical_not()
        want = decision.ins[mask_at]
        if sig.fills[mask_at] is Fill.BIAS:
            term = drop.choose(value, 0.0)
            return x + env.fetch_as(term, node, want, Fill.BIAS, frame).to(x.dtype)
        if sig.fills[mask_at] is Fill.SHARE:
            kept = drop.choose(0.0, 1.0)
            return x * env.fetch_as(kept, node, want, _share(call, env, decision), frame).to(x.dtype)
        return super().emit(call, env, decision)


def _share(call: Call, env: Emitter, decision: Decision) -> Fill:
    """What is only summed over tokens later, by sizes, is averaged over all tokens that they count."""
    (out,) = decision.outs
    extensive = any(run.extensive for runs in out for run in runs)
    return Fill.COUNT if not extensive and env.summed(call.node, out) else Fill.SHARE


def _operand(call: Call, name: str) -> int:
    index = call.index(name)
    assert index is not None
    return index


def filling(value: Any) -> float | None:
    """What a mask fills in, as a number. A buffer that leaves out counts: any other that does would say the same."""
    number = scalar(value)
    held = value.meta.get("held") if number is None and isinstance(value, fx.Node) else None
    return float(held) if held is not None and held <= LEFT_OUT else number


def scalar(value: Any) -> float | None:
    """A number, or a constant zero-dim tensor that the graph makes from one; None for anything else."""
    if _number(value):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "placeholder":
        held = value.meta.get("constant")
        return float(held) if held is not None and held.numel() == 1 else None
    if value.op != "call_function":
        return None
    if value.target in (aten.scalar_tensor.default, aten.full.default):
        number = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return float(number) if _number(number) else None  # type: ignore[arg-type]
    if value.target in (aten.full_like.default, aten.new_full.default):
        number = value.args[-1]
        return float(number) if _number(number) else None  # type: ignore[arg-type]
    if value.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten._to_copy.default,
                        aten.detach.default, aten.clone.default, aten.expand.default):  # fmt: skip
        return scalar(value.args[0])
    return None


def _shape_only(call: Call, facts: Facts) -> Signature:
    """`new_zeros(x, size)` and the like read no value of x: its layout does not matter, the result is full-length."""
    return Signature(tuple(tuple(("seen", i, d) for d in range(v.dim())) for i, v in enumerate(call.vals)),
                     tuple(tuple(None for _ in range(v.dim())) for v in call.results))  # fmt: skip


class PointwiseRule(SignatureRule):
    def __init__(self) -> None:
        super().__init__(pointwise)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        if not any(any(layout) for layout in ins):  # the common case, made cheap
            return Decision(tuple(ins), tuple(((),) * v.dim() for v in call.results))
        return super().plan(call, ins, facts)

    def operand(self, call: Call, env: Emitter, decision: Decision, sig: Signature, i: int) -> Traced:
        """A term of the scores merges as what it adds to them: one that is subtracted, negated."""
        factor = _added_times(call, i) if sig.additive and sig.fills[i] is Fill.BIAS else 1
        node = call.nodes[i]
        want = decision.ins[i]
        if env.layout(node) == want:
            return env.tensor(node)
        frame = frame_dims(sig, call, env.facts)
        if sig.fills[i] is Fill.SHARE and i in sig.linear and len(decision.outs) == 1:
            return env.fetch(node, want, _share(call, env, decision), frame)
        if factor in (0, 1):
            return super().operand(call, env, decision, sig, i)
        term = env.fetch_as(env.tensor(node) / (1 / factor), node, want, Fill.BIAS, frame)
        return term / factor


def _added_times(call: Call, i: int) -> float:
    """How often operand i is in the result of an add, sub or rsub of two tensors."""
    alpha, packet = call.args.get("alpha", 1), _packet(call)
    subtracted = "self" if packet is aten.rsub else "other"
    if i != call.index(subtracted) or not _number(alpha):
        return 1
    return alpha if packet is aten.add else -alpha


POINTWISE = PointwiseRule()


def is_pointwise(target: Any) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and not target._schema.is_mutable
    )


def covers(call: Call) -> bool:
    """Whether the results have the broadcast shape of the operands, as a pointwise op's must."""
    if not call.results or not call.vals:
        return False
    rank = max(v.dim() for v in call.vals)
    want = []
    for k in range(1, rank + 1):
        sizes = [size_expr(v.shape[-k]) for v in call.vals if v.dim() >= k]
        want.append(next((size for size in sizes if size != 1), 1))
    shape = list(reversed(want))
    return all(
        len(shape) == v.dim() and all(same(a, size_expr(b)) for a, b in zip(shape, v.shape, strict=True))
        for v in call.results
    )


def _present(names: Sequence[str]) -> list[Any]:
    """The packets that this release of torch has."""
    return [getattr(aten, name) for name in names if hasattr(aten, name)]


class Beside(SignatureRule):
    """`tome::with_side` is its first operand; the other is read where tokens merge."""

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        return env.fetch(call.nodes[0], decision.ins[0])


def _beside(call: Call, facts: Facts) -> Signature:
    own = tuple(range(call.vals[0].dim()))
    return Signature((own, (None,) * call.vals[1].dim()), (own,), {})


register(Beside(_beside), torch.ops.tome.with_side.default)
register(
    MaskRule(), aten.masked_fill, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar
)
register(POINTWISE, *_HOMOGENEOUS, *_present(_LIKE))
register(POINTWISE, aten.zero, aten.floor_divide)
register(SignatureRule(_shape_only), aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full)

__all__ = ["POINTWISE", "MaskRule", "Role", "is_pointwise", "pointwise", "scalar"]
