"""Joining: cat and stack, and what reads or writes along a dim by an index: gather, index, pad.

Along any other dim these map. Pieces that were sliced off a merged axis and are put back share its merge state
(`Step.shift`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..algebra.axes import Dims, fresh, leaves, same, size_of, unify
from ..algebra.axes import expr as size_expr
from ..algebra.layout import Layout, Run, Step, covering, plain, rejoined, with_runs
from .base import Call, Decision, Emitter, Fill, Letter, Role, Rule, Signature, register
from .facts import Facts
from .signature import SignatureRule

aten = torch.ops.aten


class CatRule(Rule):
    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d = self.dim(call)
        pieces = self.pieces(call)
        dims: list[Any] = []
        for k in range(call.out.dim()):
            if k == d:
                dims.append(self._joined(call, facts, d, pieces))
                continue
            known = [facts.dims(call.nodes[i])[k] for i in pieces]
            for other in known[1:]:
                unify(known[0], other)
            dims.append(known[0] if known else fresh(size_expr(call.out.shape[k])))
        return (tuple(dims),)

    @staticmethod
    def dim(call: Call) -> int:
        return call.axis(call.args["dim"], call.out.dim())

    def pieces(self, call: Call) -> list[int]:
        """The operands that hold anything: `x[:, :0]` is left out, and so is the legacy empty 1-d tensor."""
        d, rank = self.dim(call), call.out.dim()
        return [i for i, v in enumerate(call.vals) if v.dim() == rank and size_expr(v.shape[d]) != 0]

    def _joined(self, call: Call, facts: Facts, d: int, pieces: list[int]) -> Any:
        if len(pieces) == 1:
            return facts.dims(call.nodes[pieces[0]])[d]
        dims = [facts.dims(call.nodes[i])[d] for i in pieces]
        origins = [facts.slices.get(("origin", leaves(dim))) for dim in dims]
        total = size_expr(call.out.shape[d])
        whole = next((o for o in origins if o is not None), None)
        if whole is not None and (_adjacent(origins) or self._restores(call, facts, d, pieces, whole)):
            facts.rejoins.append((dims, whole[0]))
            return whole[0]
        # The same axes in the same order make the same axis: joined queries and joined keys are the same tokens.
        found = [leaves(dim) for dim in dims]
        known = next((axis for parts, axis in facts.joins if [leaves(part) for part in parts] == found), None)
        joined = fresh(total) if known is None else known
        if known is None:
            facts.joins.append((dims, joined))
        return joined

    def _restores(self, call: Call, facts: Facts, d: int, pieces: list[int], whole: Any) -> bool:
        """Whether the pieces, in order, have the extents of one axis of which one is a slice."""
        source, lo, _ = whole
        total = size_expr(call.out.shape[d])
        at: Any = 0
        if not same(total, size_of(source)):
            return False
        for i in pieces:
            dim = leaves(facts.dims(call.nodes[i])[d])
            if facts.slices.get(("origin", dim)) == whole:
                return same(at, lo)
            at = at + size_expr(call.vals[i].shape[d])
        return False

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, pieces = self.dim(call), self.pieces(call)
        if not any(any(layout) for layout in ins):
            return Decision(tuple(ins), (plain(call.out.dim()),))
        sig = self._signature(call, d, facts)
        inner = SignatureRule(lambda *_: sig)
        bare = [with_runs(layout, d, ()) if len(layout) > d else layout for layout in ins]
        base = inner.plan(call, bare, facts)
        step, why = self._along(call, ins, facts, d, pieces)
        if step is None:
            return Decision(base.ins, base.outs, (*base.reasons, *((i, why) for i in pieces if ins[i][d] and why)))
        outs = with_runs(base.outs[0], d, (Run(0, len(leaves(facts.dims(call.node)[d])), step),))
        kept = [tuple(run.intensive() for run in layout[d]) if i in pieces else () for i, layout in enumerate(ins)]
        return Decision(
            tuple(with_runs(layout, d, kept[i]) if kept[i] else layout for i, layout in enumerate(base.ins)),
            (outs,),
            base.reasons,
        )

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        fills = self._fills(call, env.facts)
        operands = [
            env.fetch(n, layout, fills.get(i, Fill.MEAN))
            for i, (n, layout) in enumerate(zip(call.nodes, decision.ins, strict=True))
        ]
        return env.run(call, operands)

    @staticmethod
    def _fills(call: Call, facts: Facts) -> dict[int, Fill]:
        """Columns of scores merge as what is added to scores does."""
        floats = [i for i, v in enumerate(call.vals) if v.dtype.is_floating_point]
        return dict.fromkeys(floats, Fill.BIAS) if call.node in facts.scores else {}

    def _signature(self, call: Call, d: int, facts: Facts) -> Signature:
        rank = call.out.dim()
        letters: tuple[Letter, ...] = tuple(("cat" if k == d else k) for k in range(rank))
        own = [
            tuple(("piece", i) if name == "cat" else name for name in letters[: v.dim()])
            for i, v in enumerate(call.vals)
        ]
        linear = frozenset(range(len(call.vals)))
        return Signature(tuple(own), (letters,), linear=linear, additive=True, fills=self._fills(call, facts))

    def _along(
        self, call: Call, ins: Sequence[Layout], facts: Facts, d: int, pieces: list[int]
    ) -> tuple[Step | None, str]:
        """What the joined axis is merged by, or why it is whole."""
        merged = [i for i in pieces if ins[i][d]]
        runs = [covering(facts.dims(call.nodes[i]), ins[i], d) for i in merged]
        if not merged:
            return None, ""
        if None in runs:
            return None, "joins a part of the token axis"
        steps = {i: run.step for i, run in zip(merged, runs, strict=True) if run is not None}
        samples = facts.leaves_of(call.node)
        if not all(set(leaves(step.sample)) <= samples for step in steps.values()):
            return None, "loses the samples it was merged within"
        lengths = [call.vals[i].shape[d] for i in pieces]
        if len(merged) == 1:
            at = pieces.index(merged[0])
            return steps[merged[0]].shift(sum(lengths[:at]), sum(lengths[at + 1 :])), ""
        whole = rejoined([(length, steps.get(i)) for length, i in zip(lengths, pieces, strict=True)])
        return whole, "" if whole is not None else "joins two merged axes"


def _adjacent(origins: Sequence[Any]) -> bool:
    """Whether parts of an axis, (axis, start, stop) each, stand one behind the other and are all of it: so they are
    where only the call knows that their lengths make up its length."""
    if None in origins or len({leaves(source) for source, *_ in origins}) > 1:
        return False
    starts, stops = ([origin[at] for origin in origins] for at in (1, 2))
    return all(map(same, [0, *stops], [*starts, size_of(origins[0][0])]))


class StackRule(Rule):
    """stack: a new dim; every other dim maps."""

    def _dim(self, call: Call) -> int:
        return call.axis(call.args["dim"], call.out.dim())

    def _signature(self, call: Call) -> Signature:
        letters: tuple[Letter, ...] = tuple(range(call.out.dim()))
        own = tuple(k for k in letters if k != self._dim(call))
        count = len(call.vals)
        return Signature((own,) * count, (letters,), linear=frozenset(range(count)), additive=True)

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        return SignatureRule(lambda *_: self._signature(call)).axes(call, facts)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        return SignatureRule(lambda *_: self._signature(call)).plan(call, ins, facts)


def _gather(call: Call, facts: Facts) -> Signature:
    """gather, scatter: the dim mixes, the others are indexed alike where they have equal size."""
    d = call.axis(call.args["dim"] if call.args["dim"] is not None else 0)
    shape = call.vals[0].shape

    def alike(k: int, size: Any) -> bool:
        return k != d and same(size_expr(size), size_expr(shape[k]))

    ins: list[tuple[Letter | None, ...]] = [
        tuple(k if alike(k, size) else ("at", i, k) for k, size in enumerate(v.shape)) for i, v in enumerate(call.vals)
    ]
    roles: dict[Letter, Role] = {letter: Role.MIX for own in ins for letter in own if isinstance(letter, tuple)}
    roles[d] = Role.MIX
    out = tuple(k if alike(k, size) else None for k, size in enumerate(call.out.shape))
    return Signature(tuple(ins), (out,), roles)


def _index_write(call: Call, facts: Facts) -> Signature:
    """index_add, index_copy: the indexed dim mixes, the others are indexed alike."""
    d, rank = call.axis(call.args["dim"]), call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    source = tuple(None if k == d else k for k in letters)
    rest = tuple(source if v.dim() == rank else (None,) * v.dim() for v in call.vals[1:])
    return Signature((letters, *rest), (letters,), {d: Role.MIX})


def _index_select(call: Call, facts: Facts) -> Signature:
    d, rank = call.axis(call.args["dim"]), call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    return Signature(
        (letters, *((None,) * v.dim() for v in call.vals[1:])),
        (tuple(None if k == d else k for k in letters),),
        {d: Role.MIX},
    )


def _index(call: Call, facts: Facts) -> Signature:
    """x[..., idx, ...] with one index tensor: that dim mixes, the others map. Several: everything mixes."""
    spots = [k for k, item in enumerate(call.args["indices"]) if item is not None]
    rank = call.vals[0].dim()
    rest = tuple((None,) * v.dim() for v in call.vals[1:])
    boolean = any(v.dtype is torch.bool for v in call.vals[1:])
    if len(spots) != 1 or boolean:
        return Signature(((None,) * rank, *rest), ((None,) * call.out.dim(),))
    d = spots[0]
    letters: tuple[Letter, ...] = tuple(range(rank))
    out = (*letters[:d], *((None,) * call.vals[1].dim()), *letters[d + 1 :])
    return Signature((letters, *rest), (out,), {d: Role.MIX})


def _diagonal(call: Call, facts: Facts) -> Signature:
    """Two dims become a last one of its own, the others map."""
    two = {call.axis(call.args[name]) for name in ("dim1", "dim2")}
    letters = tuple(None if d in two else d for d in range(call.vals[0].dim()))
    kept = tuple(d for d in letters if d is not None)
    return Signature((letters,), ((*kept, None),), linear=frozenset({0}))


def _pad(call: Call, facts: Facts) -> Signature:
    rank, pads = call.vals[0].dim(), call.args["pad"]
    padded = {rank - 1 - k // 2 for k, amount in enumerate(pads) if not (isinstance(amount, int) and amount == 0)}
    letters: tuple[Letter, ...] = tuple(range(rank))
    out = tuple(None if k in padded else k for k in letters)
    return Signature((letters,), (out,), {d: Role.MIX for d in padded}, frozenset({0}))


register(CatRule(), aten.cat.default)
register(StackRule(), aten.stack)
register(SignatureRule(_gather), aten.gather, aten.scatter, aten.scatter_add)
register(SignatureRule(_index_write), aten.index_add, aten.index_copy)
# A write to an input of the graph, at its end: the caller's tensor has full length.
register(Rule(), aten.copy_)
register(SignatureRule(_index_select), aten.index_select)
register(SignatureRule(_index), aten.index.Tensor)
register(SignatureRule(_diagonal), aten.diagonal.default)
register(SignatureRule(_pad), aten.constant_pad_nd, aten.pad)
