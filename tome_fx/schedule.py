"""Schedules: how many tokens each block merges away (ToMe section 3 and section 4.1, "merging schedule")."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any


class ScheduleError(ValueError):
    """A schedule that does not fit the model. blocks: how many of its blocks can merge."""

    def __init__(self, message: str, blocks: int = 0) -> None:
        super().__init__(message)
        self.blocks = blocks


Schedule = int | float | tuple[int, float] | tuple[int, ...] | list[int]


def tokens_per_block(r: Schedule, blocks: int) -> list[int | float]:
    """The schedule spelled out for a model of `blocks` mergeable blocks: a count, or a share below 1, for each.

    - `r` int: the same count everywhere; a float below 1: that share of the block's mergeable tokens.
    - `(r, inflection)`: from r * (1 - inflection) at the first block to r * (1 + inflection) at the last, truncated to
      whole tokens: (16, -1) over 12 blocks is 32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0.
    - a list: one count per block; blocks beyond its end merge nothing.

    Raises ScheduleError if a list is longer than the number of blocks.
    """
    if isinstance(r, (int, float)):
        return [r] * blocks
    if isinstance(r, tuple):
        count, inflection = r
        first, last = count * (1 - inflection), count * (1 + inflection)
        step = (last - first) / max(blocks - 1, 1)
        return [int(first + step * i) for i in range(blocks)]
    if len(r) > blocks:
        raise ScheduleError(f"r lists {len(r)} blocks, but the model has {blocks} that can merge", blocks)
    return [*r, *[0] * (blocks - len(r))]


def gathered(wanted: list[int | float], every: int) -> list[int | float]:
    """A schedule in which every k-th block, and the last, merges for all since the one before it; shares compound.

    [8, 8, 8, 8, 8] by 2 is [0, 16, 0, 16, 8].
    """
    if every == 1:
        return wanted
    out: list[int | float] = [0] * len(wanted)
    for start in range(0, len(wanted), every):
        part = wanted[start : start + every]
        kept = prod(1 - share for share in part if isinstance(share, float))
        counts = sum(count for count in part if not isinstance(count, float))
        out[start + len(part) - 1] = counts if kept == 1 else 1 - kept
    return out


def to_multiple(r: int, tokens: int, multiple: int) -> int:
    """At most r tokens, so that a multiple of a number is left of `tokens`; 0 where r is too few for one."""
    left = -(-(tokens - r) // multiple) * multiple
    return max(tokens - left, 0)


def share_of(count: Any, share: float) -> Any:
    """So much of a count, rounded down: in whole numbers, since a float of a symbol would be the number it was traced
    with."""
    whole = Fraction(share).limit_denominator(10**6)
    return count * whole.numerator // whole.denominator


def merged_away(want: int | float, tokens: int, protected: int, most: int | None = None) -> int:
    """Tokens that a block really merges: at most `most` (None: half) of the `tokens - protected` that may take part."""
    free = max(tokens - protected, 0)
    count = share_of(free, want) if isinstance(want, float) else want
    return max(min(count, free // 2 if most is None else most), 0)
