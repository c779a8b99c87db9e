"""steps: what the merge steps of a plan are at run time, and how a value goes from one layout to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tome_fx import ops  # noqa: F401 - defines the operators
from tome_fx.config import ToMeConfig

from ..algebra.axes import Dims, Size, at_most, expr, leaves
from ..algebra.layout import Layout, Run, Step, is_plain
from ..building.trace import Builder, Traced, cat
from ..rules.base import Fill
from .laid import Laid, spread

aten = torch.ops.aten
tome = torch.ops.tome
SMALLEST = 1e-30
"""What a row counts at least where it divides, and what a token weighs that no query looks at."""


@dataclass(frozen=True)
class StepTensors:
    """What a merge step is at run time: see `tome_fx.ops` for the index form.

    size: float32 [*sample, N'], None where tokens are pruned. before, after: where a mask gives some tokens no weight,
    or importance gives them another, the weights to average by, float32 [*sample, N] and [*sample, N']. own: where some
    tokens are dropped, the sizes of the others, float32 [*sample, N]. merging: what becomes of a group. padded: whether
    rows of size 0 are left, which stand for nothing: assign may have no token for them, and of pairs that do not merge
    moved has a token that joins itself.
    """

    assign: Traced
    keep: Traced
    moved: Traced
    size: Traced | None
    before: Traced | None = None
    after: Traced | None = None
    own: Traced | None = None
    merging: str = "mean"
    padded: bool = False


class Steps:
    """The steps that have been matched so far (`held`), and what was computed of them."""

    def __init__(self, builder: Builder, config: ToMeConfig) -> None:
        self.builder, self.config = builder, config
        self.held: dict[Step, StepTensors] = {}
        self._log_sizes: dict[Step, Traced] = {}
        self._index: dict[Any, Traced] = {}
        self._composed: dict[tuple[Step, Step], StepTensors] = {}
        self._met: dict[Step, tuple[Traced | None, Traced]] = {}

    def of(self, step: Step) -> StepTensors:
        if step not in self.held:
            assert step.base is not None, "a step is read before its merge"
            more, less = (_ends(step.offset, grow=grow) for grow in (True, False))
            self.held[step] = _trimmed(grown(self.of(step.base), more), less)
        return self.held[step]

    def size(self, step: Step) -> Traced:
        """float32 [*sample, N']; 0 for rows that stand for nothing."""
        size = self.of(step).size
        assert size is not None, "pruned tokens have no size"
        return size

    def divisor(self, step: Step) -> Traced:
        """The size to divide by: sums over a row that stands for nothing are 0, and so are their gradients."""
        size = self.size(step)
        return self._some(size) if self.of(step).padded else size

    def _some(self, size: Traced) -> Traced:
        return self.builder.call(aten.clamp_min.default, size, SMALLEST)

    def summed(self, held: StepTensors, x: Traced | None) -> Traced:
        """float32 [*sample, N']: what each group has of a number for each row, [*sample, N], 0 where that stands for
        nothing."""
        call = self.builder.call
        if not held.padded:
            return call(tome.merge_size.default, x, held.assign, held.keep, held.moved)
        none = call(aten.new_zeros.default, held.keep, held.keep.shape, dtype=torch.float32)
        return call(aten.scatter_add.default, none, held.assign.dim() - 1, held.assign, x)

    def log_size(self, step: Step, dtype: torch.dtype) -> Traced:
        size = self.size(step)
        if not self.config.prop_attn:  # all rows alike, but for those that stand for nothing
            size = self.builder.call(aten.gt.Scalar, size, 0.0).to(torch.float32)
        if dtype is torch.float64:  # sizes are whole numbers in float32, their logarithms are rounded
            return self.builder.call(aten.log.default, size.to(torch.float64))
        if step not in self._log_sizes:
            self._log_sizes[step] = self.builder.call(tome.log_size.default, size)
        return self._log_sizes[step]

    def index(self, step: Step, down_to: Step | None) -> Traced:
        """int64 [*sample, N]: where each token of the state `down_to` (None: unmerged) went, through all steps."""
        key = (step, down_to)
        if key not in self._index:
            own = self.of(step).assign
            if step.prev is not down_to:
                assert step.prev is not None
                own = own.gather(own.dim() - 1, self.index(step.prev, down_to))
            self._index[key] = own
        return self._index[key]

    def stretches(self, steps: Sequence[Step], fill: Fill) -> list[Sequence[Step]]:
        """The steps that a value goes through in one call each: all of them. Means of means are the same means, if
        sizes weigh them."""
        held = [self.of(step) for step in steps]
        kinds = {one.merging for one in held}
        alike = kinds <= {"mean", "mlerp"}
        alike = alike or (len(kinds) == 1 and (bool(kinds & {"keep", "prune"}) or fill is not Fill.MEAN))
        if not alike or any(one.own is not None for one in held if one.merging != "prune"):
            return [[step] for step in steps]
        return [steps] if steps else []

    def through(self, steps: Sequence[Step]) -> StepTensors:
        """Consecutive steps as one: a value of full length goes through all of them in one call."""
        first, last = self.of(steps[0]), self.of(steps[-1])
        if len(steps) == 1:
            return first
        key = (steps[0], steps[-1])
        if key not in self._composed:
            before, dim = self.through(steps[:-1]), last.assign.dim() - 1
            moved = cat([before.moved, before.keep.gather(dim, last.moved)], -1)
            assign = self.index(steps[-1], steps[0].prev)
            keep = before.keep.gather(dim, last.keep)
            self._composed[key] = StepTensors(assign, keep, moved, last.size, first.before, last.after,
                                              merging=last.merging)  # fmt: skip
        return self._composed[key]

    def _rows_met(self, step: Step) -> tuple[Traced | None, Traced]:
        """What each row weighs in a plain mean, and the sums: 1, but nothing where a mask leaves it out."""
        if step not in self._met:
            held, call = self.of(step), self.builder.call
            rows = None
            if held.before is not None:
                rows = call(tome.key_weight.default, call(aten.gt.Scalar, held.before, 0.5))
            if held.padded:
                live = call(aten.gt.Scalar, held.own, 0.0).to(torch.float32)
                rows = live if rows is None else rows * live
                self._met[step] = rows, self._some(self.summed(held, rows))
                return self._met[step]
            first = rows is None and step.prev is None and held.size is not None
            total = held.size if first else call(tome.merge_size.default, rows, held.assign, held.keep, held.moved)
            assert total is not None
            self._met[step] = rows, total
        return self._met[step]

    # -- conversions -----------------------------------------------------------------------------------------------

    def convert(self, value: Laid, want: Layout, fill: Fill = Fill.MEAN, frame: Dims | None = None) -> Traced:
        """Bring a value to another layout.

        Runs come or go one after the other. A tensor that lacks a sample axis of a run it must get is first expanded
        along `frame`, the dims it broadcasts against.
        """
        if value.layout == want:
            return value.x
        if frame is not None and not is_plain(want):
            value, want = value.widened(want, frame)
        for d in range(len(value.dims)):
            for key in dict.fromkeys(run.key for run in (*value.layout[d], *want[d])):
                old, new = (next((run for run in runs[d] if run.key == key), None) for runs in (value.layout, want))
                if old == new:
                    continue
                if old is not None and old.extensive and not (new is not None and new.extensive) and self.config.sized:
                    size = spread(self.divisor(old.step), value.dims, value.layout, d, old)
                    value = Laid(value.x / size.to(value.x.dtype), value.dims, value.layout)
                value = self._move(value, d, old, new, fill)
        return value.x

    def _move(self, value: Laid, d: int, old: Run | None, new: Run | None, fill: Fill) -> Laid:
        """Carry one run from the state of `old` to that of `new`: forth by merges, back by one gather."""
        some = old or new
        assert some is not None
        key = some.key
        start = old.step.chain() if old else ()
        goal = new.step.chain() if new else ()
        shared = 0
        while shared < min(len(start), len(goal)) and start[shared] is goal[shared]:
            shared += 1
        if len(start) > shared:
            index = self.index(start[-1], start[shared - 1] if shared else None)
            x, back = value.canonical(d, key, leaves(start[-1].sample))
            after = value.with_run(d, key, Run(*key, start[shared - 1]) if shared else None)
            value = back(self.builder.call(tome.unmerge.default, x, index), after)
        for steps in self.stretches(goal[shared:], fill):
            x, back = value.canonical(d, key, leaves(steps[-1].sample))
            value = back(self.merged(x, steps, fill), value.with_run(d, key, Run(*key, steps[-1])))
        return Laid(value.x, value.dims, value.with_run(d, key, new))

    def merged(self, x: Traced, steps: Sequence[Step], fill: Fill = Fill.MEAN) -> Traced:
        """[*sample, N, *rest] through some steps in one call."""
        step, base, held = steps[-1], steps[0].prev, self.through(steps)
        size = held.own if held.own is not None else self.of(base).size if base else None
        form, merging = (held.assign, held.keep, held.moved), held.merging
        if fill is Fill.ROW or merging == "prune" or (fill in (Fill.MEAN, Fill.TOKENS) and merging == "keep"):
            return self.builder.call(tome.unmerge.default, x, held.keep)
        if held.padded and fill is Fill.BIAS:
            return self._padded_bias(x, held)
        if fill is Fill.BIAS:
            return self.builder.call(tome.merge_bias.default, x, size, held.size, *form)
        counted = held.after is None or fill is Fill.COUNT
        weighed = (size, held.size) if counted else (held.before, held.after)
        if held.padded:
            weighed = (weighed[0], self._some(weighed[1]))  # type: ignore[arg-type]
        if fill in (Fill.MEAN, Fill.TOKENS) and merging == "plain":
            weighed = self._rows_met(step)
        found = self.builder.call(tome.merge.default, x, *weighed, *form)
        return self._as_long(found, x, held) if fill is Fill.TOKENS and merging == "mlerp" else found

    def _padded_bias(self, x: Traced, held: StepTensors) -> Traced:
        """A score term of merged tokens; 0 for rows that stand for nothing, whose sizes leave them out as keys: a query
        must see some key."""
        assert held.size is not None
        call = self.builder.call
        form = (held.assign, held.keep, held.moved)
        found = call(tome.merge_bias_aten.default, x, held.own, self._some(held.size), *form)
        none = call(aten.le.Scalar, held.size, 0.0)
        return found.masked_fill(none.reshape([*none.shape, *[1] * (found.dim() - none.dim())]), 0.0)

    def _as_long(self, found: Traced, x: Traced, held: StepTensors) -> Traced:
        """Each row as long as the longest of its group (MLERP: ToFu, arXiv 2312.01026, section 3.3)."""
        call, dim = self.builder.call, held.assign.dim() - 1
        rest = [*range(dim + 1, x.dim())]
        if not rest:
            return found
        wide = torch.promote_types(x.dtype, torch.float32)
        long, own = (call(aten.linalg_vector_norm.default, y, 2, rest, dtype=wide) for y in (x, found))
        slot = held.assign.gather(dim, held.moved)
        joining = long.gather(dim, held.moved)
        most = call(aten.scatter_reduce.two, long.gather(dim, held.keep), dim, slot, joining, "amax")
        scale = most / call(aten.clamp_min.default, own, torch.finfo(wide).tiny)
        return (found * scale.reshape([*scale.shape, *[1] * len(rest)])).to(found.dtype)


def _ends(offset: tuple[Size, Size], *, grow: bool) -> tuple[Size, Size]:
    """What a shift adds (or takes away) in front and behind: parts of an axis may have any length, so that what is not
    known to add takes away."""
    lo, hi = (size if at_most(0, expr(size)) is grow else 0 for size in offset)
    return (lo, hi) if grow else (-lo, -hi)


def _trimmed(held: StepTensors, ends: tuple[Size, Size]) -> StepTensors:
    """The same merge on an axis that lacks some protected tokens at its ends."""
    front, back = ends
    if {expr(size) for size in ends} == {0}:
        return held

    def cut(x: Traced | None) -> Any:
        return x if x is None else x.narrow(-1, front, x.shape[-1] - front - back)

    index = (cut(held.assign) - front, cut(held.keep) - front, held.moved - front)
    return StepTensors(*index, cut(held.size), cut(held.before), cut(held.after), cut(held.own), held.merging,
                       held.padded)  # fmt: skip


def grown(held: StepTensors, ends: tuple[Size, Size]) -> StepTensors:
    """The same merge on an axis with more protected tokens at its ends."""
    front, back = ends
    if {expr(size) for size in ends} == {0}:
        return held

    def more(x: Traced | None) -> Any:
        return x if x is None else x.pad(ends, 1.0)

    assign = _padded(held.assign, front, back, held.keep.shape[-1])
    keep = _padded(held.keep, front, back, held.assign.shape[-1])
    moved = held.moved + front
    return StepTensors(assign, keep, moved, more(held.size), more(held.before), more(held.after), more(held.own),
                       held.merging, held.padded)  # fmt: skip


def _padded(index: Traced, front: Size, back: Size, length: Size) -> Traced:
    """An index into `length` places, with places that map to themselves put before and behind."""
    call, lead = index.builder.call, index.shape[:-1]
    front_part = call(aten.arange.default, front, device=index.device).expand([*lead, front])
    back_part = call(aten.arange.default, back, device=index.device).expand([*lead, back]) + (length + front)
    return cat([front_part, index + front, back_part], -1)


__all__ = ["StepTensors", "Steps", "grown"]
