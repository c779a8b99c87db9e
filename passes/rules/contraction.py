"""Matrix products, convolutions and scaled dot-product attention.

A contraction over a merged axis is a sum over tokens: one operand is weighted by size, unless one of them is
extensive already (attention probabilities are). That line alone makes attention by matmul, bmm, baddbmm or einsum,
linear attention and attention pooling right.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from ..algebra.axes import expr as size_expr
from ..algebra.layout import Layout
from ..building.trace import Traced
from .base import (
    Call,
    Decision,
    Emitter,
    Fill,
    Letter,
    Role,
    Signature,
    register,
)
from .facts import Facts
from .signature import SignatureRule, fill_of, frame_dims

aten = torch.ops.aten
LOW = -1e3
"""Beside numbers of this size half precision keeps no fractions."""


class Contraction(SignatureRule):
    def __init__(self, signature: Callable[[Call, Facts], Signature]) -> None:
        super().__init__(signature, contraction=True)

    def outer(self, call: Call, facts: Facts) -> bool:
        """Whether a product sums over nothing, or over dims of size 1."""
        sig = self.signature(call, facts)
        dims = (pair for own, val in zip(sig.ins, call.vals, strict=True) for pair in zip(own, val.shape, strict=True))
        return all(sig.role(x) is not Role.SUM or size_expr(size) == 1 for x, size in dims)

    def operand(self, call: Call, env: Emitter, decision: Decision, sig: Signature, i: int) -> Traced:
        """What tokens are summed with (a mask, weights) keeps its share of each group, of all that sizes count if these
        weigh the sum."""
        node, want = call.nodes[i], decision.ins[i]
        summed = [
            [d for d, x in enumerate(letters) if x is not None and sig.role(x) is Role.SUM] for letters in sig.ins
        ]
        if fill_of(sig, call, env.facts, i) is not Fill.MEAN or all(env.layout(node)[d] == want[d] for d in summed[i]):
            return super().operand(call, env, decision, sig, i)
        runs = [run for layout, dims in zip(decision.ins, summed, strict=True) for d in dims for run in layout[d]]
        fill = Fill.SHARE if any(run.extensive for run in runs) else Fill.COUNT
        return env.fetch(node, want, fill, frame_dims(sig, call, env.facts) if sig.frame is not None else None)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        sig = self.signature(call, env.facts)
        operands = self.operands(call, env, decision)
        for letter, role in sig.roles.items():
            if role is not Role.SUM or not env.config.sized:
                continue
            places = [(i, d) for i, letters in enumerate(sig.ins) for d, name in enumerate(letters) if name == letter]
            for key in {run.key for i, d in places for run in decision.ins[i][d]}:
                holders = [(i, d, run) for i, d in places for run in decision.ins[i][d] if run.key == key]
                if any(run.extensive for *_, run in holders):
                    continue
                i, d, run = min(holders, key=lambda h: operands[h[0]].dim())
                weight = env.weight(call.nodes[i], decision.ins[i], d, run)
                operands[i] = operands[i] * weight.to(operands[i].dtype)
        return env.run(call, operands)


def _batch(rank: int) -> tuple[Letter, ...]:
    return tuple(("b", k - rank) for k in range(rank))


def _linear(call: Call, facts: Facts) -> Signature:
    lead = _batch(call.vals[0].dim() - 1)
    ins: list[tuple[Letter | None, ...]] = [(*lead, "i"), ("o", "i") if call.vals[1].dim() == 2 else ("i",)]
    if len(call.vals) == 3:
        ins.append(("o",) if call.vals[2].dim() else ())
    out = (*lead, "o") if call.vals[1].dim() == 2 else lead
    return Signature(tuple(ins), (out,), {"i": Role.SUM}, frozenset({0}) if len(ins) == 2 else frozenset())


def _matmul(call: Call, facts: Facts) -> Signature:
    a, b = call.vals[0].dim(), call.vals[1].dim()
    left: tuple[Letter, ...] = ("k",) if a == 1 else (*_batch(a - 2), "m", "k")
    right: tuple[Letter, ...] = ("k",) if b == 1 else (*_batch(b - 2), "k", "n")
    lead = _batch(max(a, b, 2) - 2)
    out = (*lead, *(("m",) if a > 1 else ()), *(("n",) if b > 1 else ()))
    return Signature((left, right), (out,), {"k": Role.SUM}, frozenset({0, 1}))


def _added(call: Call, facts: Facts) -> Signature:
    """addmm, baddbmm: a third operand broadcasts over the product."""
    batch = _batch(call.vals[1].dim() - 2)
    frame: tuple[Letter, ...] = (*batch, "m", "n")
    ins = (frame[len(frame) - call.vals[0].dim() :], (*batch, "m", "k"), (*batch, "k", "n"))
    fill = Fill.BIAS if call.node in facts.scores else Fill.MEAN
    return Signature(ins, (frame,), {"k": Role.SUM}, frame=frame, fills={0: fill})


class Unweighted(Contraction):
    """What pairs rows by more than a sum of products, or by codes, whose terms no size could weigh: tokens are given
    back before they are summed over."""

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        sig = self.signature(call, facts)
        whole = replace(sig, roles=dict.fromkeys(sig.roles, Role.MIX))
        return SignatureRule(lambda *_: whole).plan(call, ins, facts)


def _distances(call: Call, facts: Facts) -> Signature:
    """cdist: how far each row of one operand is from each of the other."""
    batch = [_batch(val.dim() - 2) for val in call.vals]
    lead = max(batch, key=len)
    return Signature(((*batch[0], "m", "k"), (*batch[1], "n", "k")), ((*lead, "m", "n"),), {"k": Role.SUM})


class CodedProduct(Unweighted):
    """Rows times weights, both or the weights coded: integers, 8-bit floats, packed. weight: the letters of these."""

    def __init__(self, *weight: Letter | None) -> None:
        super().__init__(_coded(weight))


def _coded(weight: tuple[Letter | None, ...]) -> Callable[[Call, Facts], Signature]:
    def signature(call: Call, facts: Facts) -> Signature:
        by_row = call.index("scale_a")
        rest = (("m", None) if i == by_row and v.dim() == 2 else (None,) * v.dim() for i, v in enumerate(call.vals))
        return Signature((("m", "k"), weight, *list(rest)[2:]), (("m", "n"),), {"k": Role.SUM})

    return signature


def _outer(call: Call, facts: Facts) -> Signature:
    return Signature((("m",), ("n",)), (("m", "n"),), linear=frozenset({0, 1}))


def parse_einsum(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result; an ellipsis becomes capitals from the end of the alphabet."""
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    free = [c for c in reversed(string.ascii_uppercase) if c not in equation]
    widest = max(
        [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t], default=0
    )
    dots = "".join(reversed(free[:widest]))
    full = []
    for term, rank in zip(terms, ranks, strict=True):
        width = rank - len(term.replace("...", ""))
        full.append(term.replace("...", dots[len(dots) - width :] if width else ""))
    if not arrow:
        letters = "".join(terms).replace(".", "")
        out = "..." * bool(dots) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return full, out.replace("...", dots)


def _einsum(call: Call, facts: Facts) -> Signature:
    terms, out = parse_einsum(call.args["equation"], [v.dim() for v in call.vals])
    # A letter twice in one term is a diagonal: neither a map nor a sum.
    roles: dict[Letter, Role] = {c: Role.SUM for c in "".join(terms) if c not in out}
    roles |= {c: Role.MIX for term in terms for c in term if term.count(c) > 1}
    return Signature(tuple(tuple(t) for t in terms), (tuple(out),), roles, frozenset(range(len(terms))))


def _convolution(spatial: int) -> Callable[[Call, Facts], Signature]:
    def signature(call: Call, facts: Facts) -> Signature:
        x = call.vals[0]
        lead: tuple[Letter, ...] = ("b",) if x.dim() == spatial + 2 else ()
        space: tuple[Letter, ...] = tuple(("s", k) for k in range(spatial))
        ins: list[tuple[Letter | None, ...]] = [(*lead, "i", *space), (None,) * call.vals[1].dim()]
        ins += [(None,)] * (len(call.vals) - 2)
        roles: dict[Letter, Role] = {"i": Role.MIX}
        if not _is_linear(call):
            roles |= {s: Role.MIX for s in space}
        return Signature(tuple(ins), ((*lead, None, *space),), roles)

    return signature


def _is_linear(call: Call) -> bool:
    """A 1x1 convolution without stride or padding maps every position on its own."""
    weight = call.vals[1]

    def all_are(value: Any, want: int) -> bool:
        return all(v == want for v in (value if isinstance(value, (list, tuple)) else [value]))

    return (
        all(size_expr(s) == 1 for s in weight.shape[2:])
        and all_are(call.args.get("stride", 1), 1)
        and all_are(call.args.get("padding", 0), 0)
    )


class Convolution(SignatureRule):
    def __init__(self, spatial: int) -> None:
        super().__init__(_convolution(spatial), contraction=True)

    def flops(self, call: Call, states: Sequence[Sequence[list[int]]]) -> list[float]:
        return [2.0 * prod(weight[1:]) * prod(out) for _, weight, *_, out in states]


def _attention(call: Call, facts: Facts) -> Signature:
    """q [batch, l, e], k [batch, s, e], v [batch, s, f], mask [batch, l, s] -> [batch, l, f]."""
    lead = _batch(call.vals[0].dim() - 2)
    shared: tuple[Letter, ...] = lead
    if call.args.get("enable_gqa") and lead:
        shared = (*lead[:-1], "kv_head")
    frame: tuple[Letter, ...] = (*lead, "l", "s")
    ins: list[tuple[Letter | None, ...]] = [(*lead, "l", "e"), (*shared, "s", "e"), (*shared, "s", "f")]
    fills = {}
    if len(call.vals) == 4:
        ins.append(frame[len(frame) - call.vals[3].dim() :])
        fills[3] = Fill.NONE if facts.per_pair(call.nodes[3], -2, -1) else Fill.BIAS
    # The softmax and the sum over keys are one: the result is intensive along the queries.
    roles: dict[Letter, Role] = {"e": Role.SUM, "s": Role.SUM}
    if call.args.get("is_causal"):
        roles |= {"l": Role.MIX, "s": Role.MIX}
    return Signature(tuple(ins), ((*lead, "l", "f"),), roles, frame=frame, fills=fills)


class Attention(SignatureRule):
    """Fused attention stays fused: log(size) of the keys joins the mask, which broadcasts over heads and queries."""

    def __init__(self) -> None:
        super().__init__(_attention, contraction=True)

    def flops(self, call: Call, states: Sequence[Sequence[list[int]]]) -> list[float]:
        return [2.0 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) for q, k, v, *_ in states]

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        sig = self.signature(call, env.facts)
        operands = [self.operand(call, env, decision, sig, i) for i in range(3)]
        key, layout, d = call.nodes[1], decision.ins[1], call.vals[1].dim() - 2
        mask = self._mask(call, env, decision, sig) if len(call.vals) == 4 else None
        if mask is not None and layout[d] and env.config.proportional and _may_leave_all_out(call, env):
            unseen, top = _all_left_out(mask)
            mask, operands[0] = (mask - top).masked_fill(unseen, 0.0), operands[0].masked_fill(unseen, 0.0)
        dtype = operands[0].dtype
        if env.config.proportional:
            for run in layout[d]:
                # [*batch, s, 1] -> [*batch, 1, s]
                bias = env.log_weight(key, layout, d, run).transpose(-1, -2).to(dtype)
                if call.args.get("enable_gqa") and size_expr(bias.shape[-3]) != 1:
                    bias = bias.narrow(-3, 0, 1)
                mask = bias if mask is None else _with_bias(mask, bias)
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.to(dtype)
        return env.run(call, operands, attn_mask=mask)

    def _mask(self, call: Call, env: Emitter, decision: Decision, sig: Signature) -> Traced:
        node = call.nodes[3]
        mask, want = env.tensor(node), decision.ins[3]
        if env.layout(node) == want:
            return mask
        if mask.dtype is torch.bool:
            mask = mask.choose(0.0, float("-inf"))
        return env.fetch_as(mask, node, want, Fill.BIAS, frame_dims(sig, call, env.facts))


def _may_leave_all_out(call: Call, env: Emitter) -> bool:
    return call.vals[3].dtype.is_floating_point and env.facts.told(call.nodes[3])


def _all_left_out(mask: Traced) -> tuple[Traced, Traced]:
    """The queries that a mask of very low numbers leaves no key (bool), and what the mask of those with low ones is to
    be taken from. Low numbers would absorb the sizes; very low ones absorb the scores too (in the precision in which
    the graph runs, and of half precision in float32), which makes all keys alike. (A mask of -inf gives no result: that
    needs no help.)"""
    call = mask.builder.call
    top = call(aten.amax.default, mask.detach(), [-1], True)
    some = call(aten.gt.Scalar, top, float("-inf"))
    wide = top.to(torch.promote_types(top.dtype, torch.float32))
    unseen = call(aten.logical_and.default, call(aten.eq.Tensor, wide + 1.0, wide), some)
    low = call(aten.logical_and.default, call(aten.le.Scalar, top, LOW), some)
    return unseen, top.masked_fill(low.logical_not(), 0.0)


def _with_bias(mask: Traced, bias: Traced) -> Traced:
    if mask.dtype is torch.bool:
        return bias.masked_fill(mask.logical_not(), float("-inf"))
    return mask + bias


def _embedding(call: Call, facts: Facts) -> Signature:
    lead = _batch(call.vals[1].dim())
    return Signature(((None, "e"), lead), ((*lead, "e"),))


def _pool(spatial: int) -> Callable[[Call, Facts], Signature]:
    """Pooling and resizing: the last dims mix, all before map."""

    def signature(call: Call, facts: Facts) -> Signature:
        rank = call.vals[0].dim()
        letters: tuple[Letter, ...] = tuple(range(rank))
        tail = letters[rank - spatial :]
        rest = tuple((None,) * v.dim() for v in call.vals[1:])
        return Signature((letters, *rest), tuple(letters for _ in call.results), {d: Role.MIX for d in tail})

    return signature


def _sampled(call: Call, facts: Facts) -> Signature:
    """grid_sampler: every place of the grid reads the picture on its own (deformable attention: one for each query)."""
    places = tuple(("at", d) for d in range(call.vals[1].dim() - 2))
    picture = ("n", "c", *((None,) * (call.vals[0].dim() - 2)))
    return Signature((picture, ("n", *places, None)), (("n", "c", *places),))


register(Contraction(_linear), aten.linear)
register(Contraction(_matmul), aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
register(Contraction(_added), aten.addmm, aten.baddbmm)
register(Contraction(_einsum), aten.einsum)
register(Unweighted(_distances), aten.cdist, aten._euclidean_dist, aten._cdist_forward)
register(CodedProduct("k", "n"), aten._int_mm.default, aten._scaled_mm.default)
register(CodedProduct("n", "k"), aten._weight_int8pack_mm)
register(CodedProduct("n", None), aten._weight_int4pack_mm_for_cpu)
register(SignatureRule(_outer), aten.outer.default, aten.ger.default)
register(Convolution(1), aten.conv1d)
register(Convolution(2), aten.conv2d)
register(Convolution(3), aten.conv3d)
register(Attention(), aten.scaled_dot_product_attention)
register(SignatureRule(_embedding), aten.embedding)
register(SignatureRule(_sampled), aten.grid_sampler_2d, aten.grid_sampler_3d, aten.cudnn_grid_sampler)
register(SignatureRule(_pool(1)), aten.adaptive_avg_pool1d, aten.avg_pool1d, aten.max_pool1d, aten.upsample_nearest1d,
         aten.upsample_linear1d)  # fmt: skip
register(SignatureRule(_pool(2)), aten.adaptive_avg_pool2d, aten.avg_pool2d, aten.max_pool2d, aten.upsample_bilinear2d,
         aten.upsample_bicubic2d, aten.upsample_nearest2d, aten.pixel_shuffle, aten.pixel_unshuffle)  # fmt: skip
register(SignatureRule(_pool(3)), aten.adaptive_avg_pool3d, aten.avg_pool3d, aten.max_pool3d)

__all__ = ["parse_einsum"]
