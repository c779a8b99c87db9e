"""special: which tokens never merge.

Class, distillation, camera and register tokens are those that come from weights (`provenance.py`) and stand among
others that do not, and those that are read at a fixed place. Where the axis is a product (frames of tokens), what is
special in one frame is so in all.

    cat([cls, x])    cat([x[:, :1], registers, x[:, 1:]])    x.view(B, frames, n, C)[:, :, 0]    x[:, 0] = cls
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..algebra.axes import Dim, at_most, leaves, same, size_of
from ..rules.base import tensors_of
from ..rules.facts import Facts
from .provenance import WEIGHT

MOST = 64
"""Tokens at either end of an axis of unknown length that may be special."""

@dataclass(frozen=True)
class Special:
    """prefix, suffix: tokens at the two ends that never merge. inner: the positions of others between them. lost:
    whether there are such whose positions an unknown length does not tell."""

    prefix: int = 0
    suffix: int = 0
    inner: tuple[int, ...] = ()
    lost: bool = False

    @property
    def count(self) -> int:
        return self.prefix + self.suffix + len(self.inner)

    def free(self, length: int) -> Tensor:
        """bool [length]: the tokens that may merge."""
        free = torch.ones(length, dtype=torch.bool)
        free[: self.prefix] = free[length - self.suffix :] = False
        free[list(self.inner)] = False
        return free


@dataclass(frozen=True)
class Before:
    """What graphs before this one know of tokens that enter it. alone: positions of those that never merge. blocks: how
    many blocks of the schedule they went through; None where several axes are as long, and it is not known which."""

    alone: frozenset[int] = frozenset()
    blocks: int | None = 0


def entering(facts: Facts, axis: Dim) -> bool:
    """Whether tokens, or some of them, are in an input of the graph as they are, so that it may not show which of them
    are special."""
    return _comes_in(facts, leaves(axis), ())[0]


def before(facts: Facts, axis: Dim) -> Before | None:
    """What is known of the tokens of an axis from graphs before; None where that is nothing. Tokens are told by their
    number: to leave more of them alone than needed is not wrong."""
    return _comes_in(facts, leaves(axis), ())[1] if facts.before else None


def _comes_in(facts: Facts, axis: Dim, above: tuple[Dim, ...]) -> tuple[bool, Before | None]:
    """Whether tokens of an axis enter the graph, and what is known of them: as an input, a slice of what entered, or
    joined with others."""
    inputs = (n for n in facts.graph.find_nodes(op="placeholder") if n not in facts.constant)
    floats = (n for n in inputs if any(val.is_floating_point() for val in tensors_of(n.meta.get("val"))))
    length = size_of(axis)
    if any(set(axis) & facts.leaves_of(n) for n in floats):
        return True, facts.before.get(length) if isinstance(length, int) else None
    if axis in above or not facts.before:  # what a first graph joins to its inputs it shows
        return False, None
    above = (*above, axis)
    for source, start, stop in facts.cut_from(axis):
        enters, known = _comes_in(facts, source, above)
        if enters:
            if known is None or not (isinstance(start, int) and isinstance(stop, int)):
                return True, None
            return True, Before(frozenset(p - start for p in known.alone if start <= p < stop), known.blocks)
    for parts in facts.joined(axis):
        found = [_comes_in(facts, part, above) for part in parts]
        if any(enters for enters, _ in found):
            return True, _joined(parts, found)
    return False, None


def _joined(parts: Sequence[Dim], found: Sequence[tuple[bool, Before | None]]) -> Before | None:
    """What is known of joined tokens: all of what is known of each part, unless nothing is of one that enters."""
    alone, blocks, at = set[int](), list[int | None](), 0
    for part, (enters, known) in zip(parts, found, strict=True):
        size = size_of(part)
        if not isinstance(size, int) or (enters and known is None):
            return None
        if known is not None:
            alone |= {at + p for p in known.alone}
            blocks.append(known.blocks)
        at += size
    return Before(frozenset(alone), None if None in blocks else max(b for b in blocks if b is not None))


def special(facts: Facts, tokens: Dim) -> Special:
    """The special tokens of an axis: those that the config names, or those that the graph shows.

    A read of more than a quarter of an axis is no special token: it unmerges instead.
    """
    axis = leaves(tokens)
    if axis not in facts.special:
        facts.special[axis] = _special(facts, axis)
    return facts.special[axis]


def _special(facts: Facts, axis: Dim) -> Special:
    length, protect = size_of(axis), facts.config.protect
    if isinstance(protect, int):
        return Special(protect)
    if protect != "auto":
        return _of_flags(_named(protect, length)) if isinstance(length, int) else _leading(protect)
    if not isinstance(length, int):
        return _at_the_ends(facts, axis)
    known = before(facts, axis) or Before()
    return _of_flags([flag or i in known.alone for i, flag in enumerate(_flags(facts, axis, length))])


def _named(protect: Any, length: int) -> list[bool]:
    """Positions, or (count, period): the first `count` of every `period` tokens."""
    if isinstance(protect, tuple):
        count, period = protect
        return [i % period < count for i in range(length)]
    named = {p % length for p in protect if -length <= p < length}
    return [i in named for i in range(length)]


def _leading(protect: Any) -> Special:
    if isinstance(protect, tuple):
        return Special(protect[0], lost=protect[0] > 0)
    leading = next(i for i in range(len(protect) + 1) if i not in protect)
    return Special(leading, lost=leading < len(protect))


def _of_flags(flags: Sequence[bool]) -> Special:
    n = len(flags)
    if all(flags):
        return Special(n)
    prefix, behind = flags.index(False), flags[::-1].index(False)
    return Special(prefix, behind, tuple(i for i in range(prefix, n - behind) if flags[i]))


def _flags(facts: Facts, axis: Dim, length: int, above: tuple[Dim, ...] = ()) -> list[bool]:
    """Which tokens of an axis are special. above: axes that are asked about already: a stream that is joined to another
    and cut out again is a piece of itself."""
    before, behind = _single(facts, axis)
    found = [range(before), range(length - behind, length), _made(facts, axis), _read(facts, axis, length)]
    found += [] if axis in above else [_in_pieces(facts, axis, (*above, axis)), _in_parts(facts, axis, length, above)]
    marked = {i for tokens in found for i in tokens}
    return [i in marked for i in range(length)]


def _made(facts: Facts, axis: Dim) -> Iterator[int]:
    """Tokens that come from weights, beside others that do not."""
    for node, origins in facts.mixed.items():
        for d, dim in enumerate(facts.dims(node)):
            if leaves(dim) == axis and _has_features(facts, node, axis):
                rows = origins.movedim(d, 0).flatten(1).amax(1)
                yield from (rows == WEIGHT).nonzero().flatten().tolist()


def _in_pieces(facts: Facts, axis: Dim, above: tuple[Dim, ...]) -> Iterator[int]:
    """Tokens that are special in an axis that was cut, and whose pieces were joined anew."""
    for parts, whole in facts.joins:
        at = 0
        for part in parts if leaves(whole) == axis else ():
            size = size_of(part)
            if not isinstance(size, int):
                break
            for source, start, stop in facts.cut_from(leaves(part)):
                if isinstance(start, int) and isinstance(stop, int):
                    flags = _flags(facts, source, _length(source, stop), above)[start:stop]
                    yield from (at + i for i, flag in enumerate(flags) if flag)
            at += size


def _single(facts: Facts, axis: Dim) -> tuple[int, int]:
    """How many tokens were put before and behind all others one by one: of a time, of a mean."""
    front = back = 0
    for parts in facts.joined(axis):
        sizes = [size_of(part) for part in parts]
        if all(same(size, 1) for size in sizes):
            continue
        before = next(i for i, size in enumerate(sizes) if not same(size, 1))
        behind = next(i for i, size in enumerate(reversed(sizes)) if not same(size, 1))
        front = max(front, before + _single(facts, parts[before])[0])
        back = max(back, behind + _single(facts, parts[-1 - behind])[1])
    return front, back


def _length(axis: Dim, least: int) -> int:
    size = size_of(axis)
    return size if isinstance(size, int) else least


def _read(facts: Facts, axis: Dim, length: int) -> set[int]:
    """Tokens that are read, or left over, on their own: all such if they are few, else those at the ends."""
    most = max(length // 4, 1)
    found, ends = set[int](), set[int]()
    for start, stop in _reads(facts, axis):
        if not isinstance(start, int) or not isinstance(stop, int):
            continue
        if stop - start <= most:
            found |= set(range(start, stop))
            ends |= set(range(start, stop)) if stop <= most or length - start <= most else set()
        elif start <= most and length - stop <= most:
            ends |= {*range(start), *range(stop, length)}
    return found | ends if len(found) <= most else ends


def _in_parts(facts: Facts, axis: Dim, length: int, above: tuple[Dim, ...]) -> Iterator[int]:
    """Tokens that are special in a slice of the axis, or in each frame of it."""
    for new, source, start, stop in facts.origins:
        known = isinstance(start, int) and isinstance(stop, int)
        if leaves(source) == axis and known and size_of(leaves(new)) != length:
            inner = _flags(facts, leaves(new), stop - start, (*above, axis))
            yield from (start + i for i, flag in enumerate(inner) if flag)
    for cut in range(1, len(axis)):
        size = size_of(axis[cut:])
        inner = _flags(facts, axis[cut:], size, above) if isinstance(size, int) else []
        for i, flag in enumerate(inner):
            yield from range(i, length, size) if flag else ()


def _at_the_ends(facts: Facts, axis: Dim) -> Special:
    """The special tokens at either end of an axis of unknown length."""
    made = [_of_flags([i in marked for i in range(length)]) for marked, length in _traced(facts, axis)]
    front, back = (max((getattr(found, end) for found in made), default=0) for end in ("prefix", "suffix"))
    for start, stop in _reads(facts, axis):
        leads, tails = (start, stop), (size_of(axis) - stop, size_of(axis) - start)
        front, back = max(front, _largest(leads)), max(back, _largest(tails))
    for new, source, start, stop in facts.origins:
        if leaves(source) == axis and leaves(new) != axis:
            behind, inner = size_of(axis) - stop, _at_the_ends(facts, leaves(new))
            front = max(front, start + inner.prefix) if isinstance(start, int) and inner.prefix else front
            back = max(back, behind + inner.suffix) if isinstance(behind, int) and inner.suffix else back
    before, behind = _single(facts, axis)
    front, back = max(front, before), max(back, behind)
    parts = [axis[cut:] for cut in range(1, len(axis))]
    framed = any(special(facts, part).count for part in parts)
    return Special(front, back, lost=framed or any(found.inner for found in made))


def _traced(facts: Facts, axis: Dim) -> Iterator[tuple[set[int], int]]:
    """The tokens of an axis that come from weights, and its length as it was traced."""
    lengths = {origins.shape[d] for node, origins in facts.mixed.items()
               for d, dim in enumerate(facts.dims(node)) if leaves(dim) == axis}  # fmt: skip
    marked = set(_made(facts, axis))
    yield from ((marked, length) for length in lengths)


def _largest(counts: Sequence[Any]) -> int:
    """The largest of some counts of tokens at one end that may be special."""
    return max((n for n in counts if isinstance(n, int) and n <= MOST), default=0)


def _reads(facts: Facts, axis: Dim, above: tuple[Dim, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Writes to a part of an axis, and reads of values that hold features beside the tokens: of a mask they say
    nothing, nor do those that attend each to itself. What is read of the axis that it is a slice of is read of it too.
    """
    for node, dim, start, stop in facts.cuts:
        held = leaves(dim) == axis and (axis, start, stop) not in facts.parts
        if held and (node is None or _has_features(facts, node, axis)):
            yield start, stop
    above = (*above, axis)
    for source, lo, hi in facts.cut_from(axis):
        if source not in above:
            inside = (read for read in _reads(facts, source, above) if not same(hi - lo, read[1] - read[0]))
            yield from ((a - lo, b - lo) for a, b in inside if at_most(lo, a) and at_most(b, hi))


def _has_features(facts: Facts, node: fx.Node, axis: Dim) -> bool:
    return not facts.features or bool(facts.leaves_of(node) & facts.features - set(axis))


__all__ = ["Before", "Special", "before", "entering", "special"]
