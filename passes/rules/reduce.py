"""Reductions, softmax and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from ..algebra.layout import Layout
from ..building.trace import Traced
from .base import Call, Decision, Emitter, Fill, Letter, Role, Rule, Signature, register
from .facts import Facts
from .signature import SignatureRule

aten = torch.ops.aten


def reduced_dims(call: Call) -> tuple[int, ...]:
    """The dims an op reduces, non-negative; none given means all."""
    rank = call.vals[0].dim()
    dims = call.args.get("dim")
    if dims is None or dims == []:
        return tuple(range(rank))
    return tuple(call.axis(d) for d in ([dims] if isinstance(dims, int) else dims))


def _reduction(role: Role, linear: bool = False) -> Any:
    def signature(call: Call, facts: Facts) -> Signature:
        dims, rank = reduced_dims(call), call.vals[0].dim()
        letters: tuple[Letter, ...] = tuple(range(rank))
        kept = tuple(None if d in dims else d for d in letters)
        if not call.args.get("keepdim"):
            kept = tuple(d for d in letters if d not in dims)
        return Signature(
            (letters, *(() for _ in call.vals[1:])),
            tuple(kept for _ in call.results),
            {d: role for d in dims},
            frozenset({0}) if linear else frozenset(),
        )

    return signature


class WeightedReduce(SignatureRule):
    """sum and mean over tokens: weighted by size; the mean divides by the original count (measure principle)."""

    def __init__(self) -> None:
        super().__init__(_reduction(Role.SUM, linear=True))

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        dims, layout = reduced_dims(call), decision.ins[0]
        (x,) = self.operands(call, env, decision)
        if not any(layout[d] for d in dims) or not env.config.sized:
            return env.run(call, [x])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for d in dims:
            for run in layout[d]:
                if not run.extensive:
                    x = x * env.weight(call.nodes[0], layout, d, run)
        total = x.sum(dims, keepdim=bool(call.args.get("keepdim")))
        if call.target.overloadpacket is aten.mean:
            total = total / self._count(call, env, layout, dims)
        return total.to(call.out.dtype)


    def _count(self, call: Call, env: Emitter, layout: Layout, dims: Sequence[int]) -> Any:
        """What a mean divides by: all tokens, or, where some were dropped, what sizes count of them."""
        (node,), count = call.nodes, prod(env.full_size(call.nodes[0], d) for d in dims)
        if not env.config.drops:
            return count
        for d in dims:
            for run in layout[d]:
                left = env.weight(node, layout, d, run).sum(dims, keepdim=bool(call.args.get("keepdim")))
                count = left * (count // env.full_size(node, d)) if isinstance(count, int) else count * left
        return count


class Norm2(SignatureRule):
    """Euclidean norm: sqrt(sum(size * x^2)) over a merged axis."""

    def __init__(self) -> None:
        super().__init__(self._signature)

    @staticmethod
    def _signature(call: Call, facts: Facts) -> Signature:
        order = call.args.get("ord", call.args.get("p"))
        two = order is None or order == 2
        return _reduction(Role.NORM2 if two else Role.MIX)(call, facts)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        (x,) = self.operands(call, env, decision)
        layout = decision.ins[0]
        for d in reduced_dims(call):
            for run in layout[d] if env.config.sized else ():
                x = x * env.weight(call.nodes[0], layout, d, run).to(x.dtype).sqrt()
        return env.run(call, [x])


class Softmax(SignatureRule):
    """softmax, log_softmax and logsumexp over a merged axis: log(size) joins the scores (proportional attention).

    The probabilities are extensive, one sum per group; log-probabilities are those of one token of the group.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(self._signature)

    def _signature(self, call: Call, facts: Facts) -> Signature:
        if self.kind == "logsumexp":
            return _reduction(Role.NORM2)(call, facts)
        letters: tuple[Letter, ...] = tuple(range(call.vals[0].dim()))
        role = Role.SOFTMAX if self.kind == "softmax" else Role.MIX if facts.config.padded else Role.NORM2
        return Signature((letters,), (letters,), {call.axis(call.args["dim"]): role} if letters else {})

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        (x,) = self.operands(call, env, decision)
        layout, terms = decision.ins[0], []
        if env.config.proportional:
            node = call.nodes[0]
            terms = [env.log_weight(node, layout, d, run).to(x.dtype) for d in reduced_dims(call) for run in layout[d]]
        if terms and self.kind != "logsumexp" and env.facts.pairs is not None and env.facts.pairs.masked(call.nodes[0]):
            x = _from_the_top(x, reduced_dims(call))
        for term in terms:
            x = x + term
        out = env.run(call, [x])
        for term in terms if self.kind == "log_softmax" else []:
            out = out - term.to(out.dtype)
        return out


def _from_the_top(x: Traced, dims: Sequence[int]) -> Traced:
    """Scores less their largest: where a mask of low numbers leaves all keys out, it would absorb the sizes."""
    top = x.builder.call(aten.amax.default, x.detach(), list(dims), True)
    return x - x.builder.call(aten.clamp.default, top, torch.finfo(x.dtype).min)


def _normalise_last(call: Call, facts: Facts) -> Signature:
    """layer_norm, rms_norm: the trailing `normalized_shape` dims need each other; all others map."""
    count = len(call.args["normalized_shape"])
    rank = call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    tail = letters[rank - count :]
    affine = tuple(tail for _ in call.vals[1:])
    # The trailing dims keep their meaning through the norm although every index reads all others.
    return Signature((letters, *affine), tuple(letters for _ in call.results), {d: Role.MIX for d in tail})


class NormRule(SignatureRule):
    """Normalisation keeps the axes it mixes: the channel dim after a norm is the channel dim before it."""

    def axes(self, call: Call, facts: Facts) -> tuple:
        return tuple(facts.dims(call.nodes[0]) for _ in call.results)


def _group_norm(call: Call, facts: Facts) -> Signature:
    letters: tuple[Letter, ...] = tuple(range(call.vals[0].dim()))
    rest = tuple((None,) * v.dim() for v in call.vals[1:])
    return Signature((letters, *rest), tuple(letters for _ in call.results), {d: Role.MIX for d in letters[1:]})


def _batch_norm(call: Call, facts: Facts) -> Signature:
    """With running statistics an affine map per channel; with batch statistics it mixes all but channels."""
    letters: tuple[Letter, ...] = tuple(range(call.vals[0].dim()))
    rest = tuple((1,) * v.dim() for v in call.vals[1:])
    mixed = {d: Role.MIX for d in letters if d != 1} if call.args.get("training") else {}
    return Signature((letters, *rest), tuple(letters for _ in call.results), mixed)


def _prelu(call: Call, facts: Facts) -> Signature:
    """A slope for each index of dim 1, or one for all."""
    letters: tuple[Letter, ...] = tuple(range(call.vals[0].dim()))
    return Signature((letters, (1,) * call.vals[1].dim()), (letters,), fills={1: Fill.NONE})


def _mixing(names: Sequence[str]) -> Any:
    """Ops that need a whole dim but keep the others apart: sort, cumsum, roll, flip, ..."""

    def signature(call: Call, facts: Facts) -> Signature:
        rank = call.vals[0].dim()
        letters: tuple[Letter, ...] = tuple(range(rank))
        dims: list[int] = []
        for name in names:
            value = call.args.get(name)
            if value is not None:
                dims += [value] if isinstance(value, int) else list(value)
        mixed = {call.axis(d) for d in dims} if dims else set(range(rank))
        outs = []
        for val in call.results:
            if val.dim() == rank:
                outs.append(letters)
            else:
                outs.append(tuple(d for d in letters if d not in mixed))
        return Signature(
            (letters, *((None,) * v.dim() for v in call.vals[1:])), tuple(outs), {d: Role.MIX for d in mixed}
        )

    return signature


register(WeightedReduce(), aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
register(SignatureRule(_reduction(Role.MAX)), aten.amax, aten.amin)
register(SignatureRule(_reduction(Role.MIX)), aten.var, aten.std, aten.prod.dim_int, aten.any,
         aten.all, aten.argmax, aten.argmin, aten.max.dim, aten.min.dim, aten.max.default, aten.min.default,
         aten.var_mean, aten.std_mean, aten.median)  # fmt: skip
register(Norm2(), aten.linalg_vector_norm, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype)
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
"""Ops that normalise along one dim, their second argument."""
register(Softmax("softmax"), *SOFTMAX)
register(Softmax("log_softmax"), aten.log_softmax.int, aten._log_softmax)
register(Softmax("logsumexp"), aten.logsumexp.default)
register(NormRule(_normalise_last), aten.layer_norm, aten.rms_norm)
register(NormRule(_group_norm), aten.group_norm, aten.instance_norm)
register(NormRule(_batch_norm), aten.batch_norm)
register(SignatureRule(_prelu), aten.prelu)
register(SignatureRule(_mixing(["dim", "dims"])), aten.cumsum, aten.cumprod, aten.sort, aten.argsort, aten.topk,
         aten.roll, aten.flip, aten.glu, aten.tril, aten.triu)  # fmt: skip

__all__ = ["Rule", "reduced_dims"]
