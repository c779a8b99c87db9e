"""Taking apart: slice, select, split, unbind, and writing into a slice.

Along any other dim these map. Along a merged axis, cutting at a protected boundary keeps the merge: the class token
may be sliced off, rotated around and put back, and the pieces share one merge state (`Step.shift`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..algebra.axes import Dim, Dims, Size, at_most, fresh, from_front, leaves, same, sized, unify
from ..algebra.axes import expr as size_expr
from ..algebra.layout import DimLayout, Layout, Part, Run, Step, covering, with_runs
from .base import Call, Decision, Emitter, Letter, Role, Rule, Signature, register
from .facts import Facts
from .signature import SignatureRule

aten = torch.ops.aten
WHOLE_SAMPLE = "takes apart the samples it was merged within"


def _drop(layout: Layout, d: int) -> Layout:
    return (*layout[:d], *layout[d + 1 :])


def _without_samples_in(dims: Dims, layout: Layout, touched: int) -> Layout:
    """The layout less the runs whose samples live in the dim that an op takes apart."""
    held = set(leaves(dims[touched]))
    return tuple(tuple(run for run in runs if not held & set(leaves(run.step.sample))) for runs in layout)


@dataclass(frozen=True)
class Span:
    """`[start:stop:step]` of dim d, which has some size; ints or expressions, counted from the front. whole_size: the
    size as torch has it. length: its own as torch has it, where it is known."""

    d: int
    start: Any
    stop: Any
    whole_size: Size
    step: int = 1
    length: Size = 0

    @classmethod
    def of(cls, call: Call) -> Span:
        """What a slice or slice_scatter reads or writes."""
        a = call.args
        d = call.axis(a.get("dim", 0))
        size = call.vals[0].shape[d]
        bounds = _bounds(a.get("start"), a.get("end"), size_expr(size))
        return cls(d, *bounds, size, a.get("step") or 1, call.out.shape[d])

    @property
    def size(self) -> Any:
        return size_expr(self.whole_size)

    @property
    def whole(self) -> bool:
        return same(self.start, 0) and same(self.stop, self.size) and self.step == 1

    @property
    def behind(self) -> Any:
        return self.size - self.stop

    def axis(self, facts: Facts, dim: Dim) -> Dim:
        """The axis that it is of an axis: the same object for the same slice of the same axis."""
        if self.whole:
            return dim
        key = (leaves(dim), str(self.start), str(self.stop), self.step)
        if key not in facts.slices:
            length = self.stop - self.start if self.step == 1 else -(-(self.stop - self.start) // self.step)
            new = fresh(length)
            facts.slices[key] = new
            if self.step == 1 and new:
                facts.slices["origin", leaves(new)] = (dim, self.start, self.stop)
                facts.origins.append((new, dim, self.start, self.stop))
        return facts.slices[key]

    def note(self, facts: Facts, node: fx.Node | None, dim: Dim) -> None:
        """Remember that this part of an axis of a value is read on its own, or (None) written."""
        if dim and not (same(self.start, 0) and same(self.stop, self.size)):
            facts.cuts.append((node, dim, self.start, self.stop))

    def part(self, step: Step) -> Part | None:
        """What it is of an axis that a step has merged; None where it ends among tokens that merge."""
        return step.within(self.sized(self.start), self.sized(self.behind)) if self.step == 1 else None

    def runs(self, dims: Dims, layout: Layout) -> DimLayout | None:
        """The layout of the dim after it, None where the cut falls inside the merged part."""
        if self.whole:
            return layout[self.d]
        run = covering(dims, layout, self.d)
        part = self.part(run.step) if run is not None else None
        if run is None or part is None:
            return None
        return (Run(0, 1, part.step, run.extensive),) if part.step is not None else ()

    def sized(self, size: Any) -> Size:
        symbolic = (x for x in (self.whole_size, self.length) if isinstance(x, torch.SymInt))
        return sized(size, next((x.node for x in symbolic), None))


def _bounds(start: Any, stop: Any, size: Any) -> tuple[Any, Any]:
    """Slice bounds as offsets from the front, as Python counts them."""

    def clip(value: Any, default: Any) -> Any:
        if value is None:
            return default
        value = value.meta["val"] if hasattr(value, "meta") else value
        value = from_front(value, size)
        if isinstance(value, int) and isinstance(size, int):
            return min(max(value, 0), size)
        return size if isinstance(value, int) and value >= 2**62 else value

    lo = clip(start, 0)
    hi = clip(stop, size)
    return (lo, lo) if isinstance(lo, int) and isinstance(hi, int) and hi < lo else (lo, hi)


class SliceRule(Rule):
    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        span, dims = Span.of(call), facts.dims(call.nodes[0])
        span.note(facts, call.nodes[0], dims[span.d])
        return (with_dim(dims, span.d, span.axis(facts, dims[span.d])),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        span, dims, layout = Span.of(call), facts.dims(call.nodes[0]), ins[0]
        if span.whole:
            return Decision((layout,), (layout,))
        d, first = span.d, _without_samples_in(dims, layout, span.d)
        why = ((0, WHOLE_SAMPLE),) if first != layout else ()
        if not first[d]:
            return Decision((first,), (first,), why)
        runs = span.runs(dims, first)
        if runs is None:
            bare = with_runs(first, d, ())
            return Decision((bare,), (bare,), (*why, (0, "reads a part of the token axis")))
        runs = tuple(Run(0, len(leaves(facts.dims(call.node)[d])), r.step, r.extensive) for r in runs)
        return Decision((first,), (with_runs(first, d, runs),), why)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        span = Span.of(call)
        d, runs = span.d, decision.ins[0][span.d]
        if not runs:
            return env.run(call, [x])
        if span.whole:
            return x
        part = span.part(runs[0].step)
        assert part is not None
        return x.narrow(d, part.start, part.length)


def with_dim(dims: Dims, d: int, dim: Dim) -> Dims:
    return (*dims[:d], dim, *dims[d + 1 :])


class SelectRule(Rule):
    def _spec(self, call: Call) -> tuple[int, Any, Any]:
        d = call.axis(call.args["dim"])
        size = call.vals[0].shape[d]
        return d, self.place(call, size), size

    @staticmethod
    def place(call: Call, size: Size) -> Any:
        """Which entry of a dim of this size is meant, counted from the front."""
        index = call.args["index"]
        index = index.meta["val"] if hasattr(index, "meta") else index
        return from_front(index, size_expr(size))

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d, index, size = self._spec(call)
        dims = facts.dims(call.nodes[0])
        Span(d, index, index + 1, size).note(facts, call.nodes[0], dims[d])
        return ((*dims[:d], *dims[d + 1 :]),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, index, size = self._spec(call)
        dims = facts.dims(call.nodes[0])
        first = _without_samples_in(dims, ins[0], d)
        why = ((0, WHOLE_SAMPLE),) if first != ins[0] else ()
        if first[d]:
            run = covering(dims, first, d)
            fixed = run is not None and not run.extensive and self._fixed(run, index, size)
            if not fixed:
                first, why = with_runs(first, d, ()), (*why, (0, "reads a token that is not protected"))
        return Decision((first,), (_drop(first, d),), why)

    @staticmethod
    def _fixed(run: Run, index: Any, size: Size) -> bool:
        step = run.step
        return at_most(index + 1, step.fixed_prefix()) or at_most(size_expr(size) - index, step.fixed_suffix())

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        d, index, size = self._spec(call)
        if not decision.ins[0][d]:
            return env.run(call, [x])
        front = at_most(index + 1, decision.ins[0][d][0].step.fixed_prefix())
        return x.select(d, sized(index if front else index - size_expr(size), getattr(size, "node", None)))


class SplitRule(Rule):
    """split, unbind: along a merged axis it needs it whole; otherwise a slice for each piece."""

    def __init__(self, *, keeps_dim: bool) -> None:
        self.keeps_dim = keeps_dim

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d, dims = call.axis(call.args.get("dim", 0)), facts.dims(call.nodes[0])
        if not self.keeps_dim:
            return tuple((*dims[:d], *dims[d + 1 :]) for _ in call.results)
        out = []
        for span in self._spans(call, d):
            span.note(facts, call.nodes[0], dims[d])
            out.append(with_dim(dims, d, span.axis(facts, dims[d])))
        return tuple(out)

    @staticmethod
    def _spans(call: Call, d: int) -> Iterator[Span]:
        size, at = call.vals[0].shape[d], 0
        for i, piece in enumerate(call.results, 1):
            stop = size_expr(size) if i == len(call.results) else at + size_expr(piece.shape[d])
            yield Span(d, at, stop, size, length=piece.shape[d])
            at = stop

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, dims = call.axis(call.args.get("dim", 0)), facts.dims(call.nodes[0])
        first = _without_samples_in(dims, ins[0], d)
        why = ((0, WHOLE_SAMPLE),) if first != ins[0] else ()
        if not first[d]:
            out = first if self.keeps_dim else _drop(first, d)
            return Decision((first,), (out,) * len(call.results), why)
        pieces = self._cuts(call, facts, first, d) if self.keeps_dim else None
        if pieces is None:
            first = with_runs(first, d, ())
            out = first if self.keeps_dim else _drop(first, d)
            return Decision((first,), (out,) * len(call.results), (*why, (0, "splits the token axis")))
        return Decision((first,), pieces, why)

    def _cuts(self, call: Call, facts: Facts, layout: Layout, d: int) -> tuple[Layout, ...] | None:
        dims, out = facts.dims(call.nodes[0]), []
        for k, span in enumerate(self._spans(call, d)):
            runs = span.runs(dims, layout)
            if runs is None:
                return None
            count = len(leaves(facts.dims(call.node, k)[d]))
            out.append(with_runs(layout, d, tuple(Run(0, count, r.step, r.extensive) for r in runs)))
        return tuple(out)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        d = call.axis(call.args.get("dim", 0))
        if not decision.ins[0][d]:
            return env.run(call, [x])
        pieces = zip(call.results, decision.outs, strict=True)
        return x.split_with_sizes([out[d][0].step.after if out[d] else val.shape[d] for val, out in pieces], d)


def _scatter_slice(call: Call, facts: Facts) -> Signature:
    """slice_scatter, select_scatter: the written dim mixes (a write is no merge boundary), the others map."""
    d, rank = call.axis(call.args.get("dim", 0)), call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    removed = call.vals[1].dim() < rank
    src = tuple(k for k in letters if k != d) if removed else tuple(None if k == d else k for k in letters)
    return Signature((letters, src), (letters,), {d: Role.MIX}, frozenset({0, 1}), additive=True)


class ScatterSlice(SignatureRule):
    """Writing into a slice leaves the axis what it was: it keeps its atoms.

    Where the slice ends at protected tokens and the written value is merged alike, the write is to the merged rows.
    """

    @staticmethod
    def _span(call: Call) -> Span:
        """What is written: a slice, or (select_scatter) one entry."""
        if "start" in call.args:
            return Span.of(call)
        d, size = call.axis(call.args["dim"]), call.vals[0].shape[call.axis(call.args["dim"])]
        index = SelectRule.place(call, size)
        return Span(d, index, index + 1, size, length=1)

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        super().axes(call, facts)
        dims, span = facts.dims(call.nodes[0]), self._span(call)
        dim = dims[span.d]
        if span.step == 1 and not self._one(call):
            unify(span.axis(facts, dim), facts.dims(call.nodes[1])[span.d])
        if span.step == 1:
            span.note(facts, None, dim)
        return (dims,)

    @staticmethod
    def _one(call: Call) -> bool:
        """Whether what is written lacks the dim."""
        return call.vals[1].dim() < call.vals[0].dim()

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        whole, span = super().plan(call, ins, facts), self._span(call)
        d, one = span.d, self._one(call)
        runs = span.runs(facts.dims(call.nodes[0]), ins[0]) if ins[0][d] else None
        source = () if one else ins[1][d]
        if runs is None or [run.step for run in runs] != [run.step for run in source]:
            return whole
        if any(run.extensive for run in (*ins[0][d], *source)):
            return whole
        base, src = (layout if x is None else with_runs(layout, d, x)
                     for layout, x in zip(whole.ins, (ins[0][d], None if one else source), strict=True))  # fmt: skip
        reasons = tuple(r for r in whole.reasons if r[0] > 1)
        return Decision((base, src), (with_runs(whole.outs[0], d, ins[0][d]),), reasons)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        base, src = (env.fetch(n, layout) for n, layout in zip(call.nodes, decision.ins, strict=True))
        span = self._span(call)
        d = span.d
        if not decision.ins[0][d]:
            return env.run(call, [base, src])
        part = span.part(decision.ins[0][d][0].step)
        assert part is not None
        src = src.unsqueeze(d) if self._one(call) else src
        return base.slice_scatter(src, d, part.start, part.start + part.length)


register(SliceRule(), aten.slice.Tensor)
register(SelectRule(), aten.select.int)
register(SplitRule(keeps_dim=True), aten.split.Tensor, aten.split_with_sizes)
register(SplitRule(keeps_dim=False), aten.unbind.int)
register(ScatterSlice(_scatter_slice), aten.slice_scatter, aten.select_scatter)
