"""Views: one algebra for reshape, view, flatten, squeeze, permute, transpose, expand, repeat.

A merged run rides along as long as it stays inside one dim. The new sizes are computed from what the dims are made
of, never patched. A view that would cut a merged axis (N -> H x W) needs it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..algebra.axes import Dims, fresh, fresh_dims, leaves, regroup, size_of
from ..algebra.axes import expr as size_expr
from ..algebra.layout import Layout, Run, plain
from .base import Call, Decision, Emitter, Rule, register
from .facts import Facts

aten = torch.ops.aten


def _place(dims: Dims, run: Run) -> tuple[int, Run] | None:
    """The dim that holds a flat run whole, and the run counted from that dim's start."""
    base = 0
    for d, dim in enumerate(dims):
        width = len(leaves(dim))
        if base <= run.start and run.start + run.count <= base + width:
            return d, run.at(run.start - base)
        base += width
    return None


class ViewRule(Rule):
    """Row-major regrouping: the leaves in order are the same before and after."""

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        dims = facts.dims(call.nodes[0])
        # One length may be two expressions, of which only a guard says that they are equal.
        own = {size_expr(s): size_of(leaves(dim)) for s, dim in zip(call.vals[0].shape, dims, strict=True)}
        shape = [own.get(size_expr(s), size_expr(s)) for s in call.out.shape]
        return (regroup(dims, shape) or fresh_dims(call.out.shape),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        have, want = facts.dims(call.nodes[0]), facts.dims(call.node)
        rest = tuple(plain(v.dim()) for v in call.vals[1:])
        aligned = [x for d in have for x in leaves(d)] == [x for d in want for x in leaves(d)]
        placed: list[tuple[int, Run]] = []
        kept: list[list[Run]] = [[] for _ in have]
        base = 0
        for d, (dim, runs) in enumerate(zip(have, ins[0], strict=True)):
            for run in runs:
                at = _place(want, run.at(base + run.start)) if aligned else None
                if at is not None:
                    placed.append(at)
                    kept[d].append(run)
            base += len(leaves(dim))
        first = tuple(tuple(runs) for runs in kept)
        out = tuple(tuple(run for d, run in placed if d == k) for k in range(len(want)))
        why = ((0, "splits or regroups the token axis"),) if first != ins[0] else ()
        return Decision((first, *rest), (out,), why)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        if not any(decision.ins[0]):
            return env.run(call, [x, *(env.fetch(n, plain(n.meta["val"].dim())) for n in call.nodes[1:])])
        return x.reshape(env.shape(call.node, decision.outs[0]))


class PermuteRule(Rule):
    @staticmethod
    def order(call: Call) -> list[int]:
        rank, a = call.vals[0].dim(), call.args
        if "dims" in a:
            return [call.axis(d) for d in a["dims"]]
        i, j = (call.axis(a["dim0"]), call.axis(a["dim1"])) if "dim0" in a else (rank - 2, rank - 1)  # t
        order = list(range(rank))
        if rank > 1:
            order[i], order[j] = order[j], order[i]
        return order

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        dims = facts.dims(call.nodes[0])
        return (tuple(dims[d] for d in self.order(call)),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        return Decision((ins[0],), (tuple(ins[0][d] for d in self.order(call)),))


class ExpandRule(Rule):
    """expand: a size-1 dim that grows is a new axis of its own until it meets another value."""

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        dims, lead = facts.dims(call.nodes[0]), call.out.dim() - call.vals[0].dim()
        old = (*([()] * lead), *dims)
        return (
            tuple(
                fresh(size_expr(size)) if size_expr(size) != _size(call, d - lead) else old[d]
                for d, size in enumerate(call.out.shape)
            ),
        )

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        lead = call.out.dim() - call.vals[0].dim()
        return Decision((ins[0],), ((*plain(lead), *ins[0]),))

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        if not any(decision.ins[0]):
            return env.run(call, [x])
        lead = call.out.dim() - x.dim()
        sizes = [
            -1 if d >= lead and size_expr(size) == _size(call, d - lead) else env.full_size(call.node, d)
            for d, size in enumerate(call.out.shape)
        ]
        return x.expand(sizes)


def _size(call: Call, d: int) -> Any:
    return size_expr(call.vals[0].shape[d]) if d >= 0 else 1


class ComplexRule(Rule):
    """view_as_complex / view_as_real: the trailing pair of numbers is one, everything else maps."""

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        dims, out = facts.dims(call.nodes[0]), call.out.dim()
        return ((*dims[:out], *fresh_dims(call.out.shape[len(dims[:out]) :])),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        out = call.out.dim()
        return Decision((ins[0],), ((*ins[0][:out], *plain(out - len(ins[0][:out]))),))


register(ViewRule(), aten.view.default, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze,
         aten.unsqueeze, aten.view_copy.default, aten._reshape_copy, aten._reshape_alias)  # fmt: skip
register(PermuteRule(), aten.permute, aten.transpose.int, aten.t)
register(ExpandRule(), aten.expand)
register(ComplexRule(), aten.view_as_complex, aten.view_as_real)
