"""Where a value is merged: runs of atoms, the merge steps behind them, and the intensive/extensive bit.

A *run* is a stretch of adjacent leaves inside one dim (usually all of it: the token axis) that has been merged by a
chain of *steps*. A layout says this for every dim of a value; `()` everywhere is an ordinary value. Layouts are
abstract: `plan` moves them through the graph without touching a tensor, `rewrite` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from .axes import Dim, Dims, Expr, Size, at_most, leaves
from .axes import expr as size_expr

# A token axis with fewer to merge (a window, frames, the last stage of a pyramid) keeps half of them, whatever r is.
SHORT_AXIS = 32


@dataclass(eq=False)
class Step:
    """One merge: `before` tokens become `after`. Steps form a chain through `prev`; identity is object identity.

    `branch`: the merge is undone where it meets a value of full length that depends on the model's input.

    `shift(lo, hi)` is the same merge on an axis with `lo` more tokens in front and `hi` more behind, `within(lo, hi)`
    on one that lacks so many. A slice that drops the class token and a `cat` that puts it back cancel exactly, so that
    queries, keys and values that took different ways hold the *same* step object. What is shifted by may be symbolic:
    text of any length before an image. offset: by how much, counted in tokens `before` this merge. ends: the tokens of
    full length before and behind those that may merge; prefix and suffix are what other merges left of them.
    """

    site: int
    prev: Step | None
    sample: Dim
    before: Size
    after: Size
    prefix: Size
    suffix: Size
    ends: tuple[Size, Size]
    branch: bool = False
    base: Step | None = None
    offset: tuple[Size, Size] = (0, 0)
    variants: dict[tuple[Expr, Expr, Step | None], Step] = field(default_factory=dict, repr=False)
    _chain: tuple[Step, ...] = field(default=(), repr=False)

    def shift(self, lo: Size, hi: Size) -> Step:
        return self._moved((lo, hi), (lo, hi), self.prev.shift(lo, hi) if self.prev else None)

    def _moved(self, ends: tuple[Size, Size], full: tuple[Size, Size], prev: Step | None) -> Step:
        """The same merge with more tokens at its ends, so many before this merge and at full length, after others."""
        (lo, hi), base = ends, self.base or self
        offset = (self.offset[0] + lo, self.offset[1] + hi)
        key = (size_expr(offset[0]), size_expr(offset[1]), prev)
        if key == (0, 0, base.prev):
            return base
        if key not in base.variants:
            base.variants[key] = replace(
                base,
                prev=prev,
                before=base.before + sum(offset),
                after=base.after + sum(offset),
                prefix=base.prefix + offset[0],
                suffix=base.suffix + offset[1],
                ends=(self.ends[0] + full[0], self.ends[1] + full[1]),
                base=base,
                offset=offset,
                variants={},
                _chain=(),
            )
        return base.variants[key]

    def within(self, lo: Size, hi: Size) -> Part | None:
        """What this merge and those before it are to a part of the axis, all but `lo` tokens of full length in front
        and `hi` behind; None where its ends are among tokens that merge."""
        if {size_expr(lo), size_expr(hi)} == {0}:
            return Part(self, 0, self.after)
        kept: Step | None = None
        front, back, full = lo, hi, self.full
        for step in self.chain():
            before, behind = step.ends
            if _fits(lo, before) and _fits(hi, behind):
                kept = step._moved((-front, -back), (-lo, -hi), kept)
            elif _fits(full - behind, lo):
                front = front - (step.before - step.after)
            elif _fits(full - before, hi):
                back = back - (step.before - step.after)
            else:
                return None
        return Part(kept, front, self.after - front - back)

    def chain(self) -> tuple[Step, ...]:
        if not self._chain:
            self._chain = (*(self.prev.chain() if self.prev else ()), self)
        return self._chain

    @property
    def full(self) -> Size:
        """The length of the axis before any merge."""
        return self.chain()[0].before

    def fixed_prefix(self) -> Expr:
        return _least([step.prefix for step in self.chain()])

    def fixed_suffix(self) -> Expr:
        return _least([step.suffix for step in self.chain()])


@dataclass(frozen=True)
class Part:
    """A part of a merged axis. step: of the merges those among its own tokens. start, length: where it stands."""

    step: Step | None
    start: Size
    length: Size


def _fits(some: Size, among: Size) -> bool:
    return at_most(size_expr(some), size_expr(among))


def rejoined(parts: Sequence[tuple[Size, Step | None]]) -> Step | None:
    """The merges of an axis that was cut into parts, (length before any merge, merges) each; None where these are not
    all of them."""
    ends = [*accumulate(length for length, _ in parts)]
    for whole in dict.fromkeys(step.base for _, step in parts if step is not None and step.base is not None):
        behind = [*(whole.full - end for end in ends[:-1]), 0]
        found = [whole.within(lo, hi) for lo, hi in zip([0, *ends], behind, strict=False)]
        if all(part is not None and part.step is step for part, (_, step) in zip(found, parts, strict=True)):
            return whole
    return None


def _least(sizes: Sequence[Size]) -> Expr:
    """The one that is at most any other, whatever the symbols are; 0 where none is known to be."""
    found = dict.fromkeys(size_expr(size) for size in sizes)
    return next((one for one in found if all(at_most(one, other) for other in found)), 0)


def meet(steps: Sequence[Step | None]) -> Step | None:
    """The state to which values merged by different chains are brought: the longest chain that all others lead to.

    Where two chains fork, the last step they share (None: unmerged).
    """
    chains = [step.chain() if step else () for step in steps]
    longest = max(chains, key=len)
    if all(longest[: len(chain)] == chain for chain in chains):
        return longest[-1] if longest else None
    common: Step | None = None
    for column in zip(*chains, strict=False):
        if any(step is not column[0] for step in column):
            break
        common = column[0]
    return common


@dataclass(frozen=True)
class Run:
    """Leaves `start .. start + count` of a dim, merged by `step` and its predecessors.

    `extensive`: the value is already multiplied by the group's size (a softmax over the axis is); otherwise it is one
    value per group.
    """

    start: int
    count: int
    step: Step
    extensive: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.start, self.count

    def overlaps(self, other: Run) -> bool:
        return self.start < other.start + other.count and other.start < self.start + self.count

    def at(self, start: int) -> Run:
        return replace(self, start=start)

    def intensive(self) -> Run:
        return replace(self, extensive=False)


DimLayout = tuple[Run, ...]
Layout = tuple[DimLayout, ...]


def plain(rank: int) -> Layout:
    return ((),) * rank


def is_plain(layout: Layout) -> bool:
    return not any(layout)


def with_runs(layout: Layout, d: int, runs: DimLayout) -> Layout:
    """A layout with other runs in dim d."""
    return (*layout[:d], runs, *layout[d + 1 :])


def covering(dims: Dims, layout: Layout, d: int) -> Run | None:
    """The run that is all of dim d, if there is one."""
    runs = layout[d]
    whole = len(runs) == 1 and runs[0].key == (0, len(leaves(dims[d])))
    return runs[0] if whole else None
