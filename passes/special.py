"""special: which tokens never merge.

Class, distillation, camera and register tokens are those that come from weights alone and are joined to others, and
those that are read at a fixed place. Where the axis is a product (frames of tokens), what is special in one frame is
so in all.

    cat([cls, x])    cat([x[:, :1], registers, x[:, 1:]])    x.view(B, frames, n, C)[:, :, 0]    x[:, 0] = cls
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .axes import Dim, leaves, size_of
from .axes import expr as size_expr
from .rules import Facts

MOST = 64
"""Tokens at either end of an axis of unknown length that may be special."""

Pieces = list[tuple[Any, bool]]
"""The pieces of an axis in order: size, and whether it is special."""


@dataclass(frozen=True)
class Special:
    """prefix, suffix: tokens at the two ends that never merge. inner: the positions of others between them."""

    prefix: int = 0
    suffix: int = 0
    inner: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return self.prefix + self.suffix + len(self.inner)

    def free(self, length: int) -> Tensor:
        """bool [length]: the tokens that may merge."""
        free = torch.ones(length, dtype=torch.bool)
        free[: self.prefix] = free[length - self.suffix :] = False
        free[list(self.inner)] = False
        return free


def special(facts: Facts, tokens: Dim) -> Special:
    """The special tokens of an axis: those that the config names, or those that the graph shows.

    A read of more than a quarter of an axis is no special token: it unmerges instead.
    """
    length, protect = size_of(tokens), facts.protect
    if isinstance(protect, int):
        return Special(protect)
    if protect != "auto":
        return _of_flags(_named(protect, length)) if isinstance(length, int) else Special(_leading(protect))
    if isinstance(length, int):
        return _of_flags(_flags(facts, leaves(tokens), length))
    return _at_the_ends(facts, leaves(tokens))


def _named(protect: Any, length: int) -> list[bool]:
    """Positions, or (count, period): the first `count` of every `period` tokens."""
    if isinstance(protect, tuple):
        count, period = protect
        return [i % period < count for i in range(length)]
    named = {p % length for p in protect if -length <= p < length}
    return [i in named for i in range(length)]


def _leading(protect: Any) -> int:
    if isinstance(protect, tuple):
        return protect[0]
    return next(i for i in range(len(protect) + 1) if i not in protect)


def _of_flags(flags: Sequence[bool]) -> Special:
    n = len(flags)
    if all(flags):
        return Special(n)
    prefix, behind = flags.index(False), flags[::-1].index(False)
    return Special(prefix, behind, tuple(i for i in range(prefix, n - behind) if flags[i]))


def _flags(facts: Facts, axis: Dim, length: int) -> list[bool]:
    """Which tokens of an axis of known length are special."""
    marked = {*_joined(facts, axis), *_read(facts, axis, length), *_in_parts(facts, axis, length)}
    return [i in marked for i in range(length)]


def _joined(facts: Facts, axis: Dim) -> Iterator[int]:
    """Tokens that were joined to others."""
    for pieces in _pieces(facts, axis):
        at = 0
        for size, is_special in pieces:
            if not isinstance(size, int):
                break
            yield from range(at, at + size) if is_special else ()
            at += size


def _read(facts: Facts, axis: Dim, length: int) -> Iterator[int]:
    """Tokens that are read, or not read, on their own."""
    most = max(length // 4, 1)
    for start, stop in _reads(facts, axis):
        if not isinstance(start, int) or not isinstance(stop, int):
            continue
        if stop <= most or length - start <= most:
            yield from range(start, stop)
        elif start <= most and length - stop <= most:
            yield from (*range(start), *range(stop, length))


def _in_parts(facts: Facts, axis: Dim, length: int) -> Iterator[int]:
    """Tokens that are special in a slice of the axis, or in each frame of it."""
    for new, source, start, stop in facts.origins:
        known = isinstance(start, int) and isinstance(stop, int)
        if leaves(source) == axis and known and size_of(leaves(new)) != length:
            inner = _flags(facts, leaves(new), stop - start)
            yield from (start + i for i, flag in enumerate(inner) if flag)
    for cut in range(1, len(axis)):
        size = size_of(axis[cut:])
        inner = _flags(facts, axis[cut:], size) if isinstance(size, int) else []
        for i, flag in enumerate(inner):
            yield from range(i, length, size) if flag else ()


def _at_the_ends(facts: Facts, axis: Dim) -> Special:
    """The special tokens at either end of an axis of unknown length."""
    front = back = 0
    for pieces in _pieces(facts, axis):
        front, back = max(front, _run(pieces)), max(back, _run(pieces[::-1]))
    for start, stop in _reads(facts, axis):
        leads, tails = (start, stop), (size_of(axis) - stop, size_of(axis) - start)
        front, back = max(front, _largest(leads)), max(back, _largest(tails))
    for new, source, start, stop in facts.origins:
        if leaves(source) == axis and leaves(new) != axis:
            behind, inner = size_of(axis) - stop, _at_the_ends(facts, leaves(new))
            front = max(front, start + inner.prefix) if isinstance(start, int) and inner.prefix else front
            back = max(back, behind + inner.suffix) if isinstance(behind, int) and inner.suffix else back
    return Special(front, back)


def _largest(counts: Sequence[Any]) -> int:
    """The largest of some counts of tokens at one end that may be special."""
    return max((n for n in counts if isinstance(n, int) and n <= MOST), default=0)


def _run(pieces: Pieces) -> int:
    total = 0
    for size, is_special in pieces:
        if not is_special or not isinstance(size, int):
            break
        total += size
    return total


def _reads(facts: Facts, axis: Dim) -> Iterator[tuple[Any, Any]]:
    """Writes to a part of an axis, and reads of values that hold features beside the tokens: of a mask they say
    nothing."""
    for node, dim, start, stop in facts.cuts:
        if leaves(dim) == axis and (node is None or _has_features(facts, node, axis)):
            yield start, stop


def _has_features(facts: Facts, node: fx.Node, axis: Dim) -> bool:
    features = {leaf for dim in facts.channels for leaf in leaves(dim)}
    own = {leaf for dim in facts.dims(node) for leaf in leaves(dim)}
    return not features or bool(own & features - set(axis))


def _pieces(facts: Facts, axis: Dim, above: tuple[Dim, ...] = ()) -> Iterator[Pieces]:
    """What an axis was put together from, for each place where it was; a table made of weights alone says nothing.

    above: axes that are asked about already: a stream that is joined to another and cut out again is a piece of itself.
    """
    for node, whole, parts in facts.segments:
        if leaves(whole) != axis or axis in above or not _has_features(facts, node, axis):
            continue
        found: Pieces = []
        for dim, size, constant in parts:
            found += [(size, True)] if constant else _nested(facts, leaves(dim), size, (*above, axis))
        if not all(is_special for _, is_special in found):
            yield found


def _nested(facts: Facts, axis: Dim, size: Any, above: tuple[Dim, ...]) -> Pieces:
    """The pieces of a piece: itself put together, or cut out of an axis that was."""
    inner = next(_pieces(facts, axis, above), None)
    if inner is not None:
        return inner
    for new, source, start, stop in facts.origins:
        if leaves(new) != axis or leaves(source) == axis or not isinstance(start, int):
            continue
        whole = next(_pieces(facts, leaves(source), above), None)
        if whole is not None:
            return _cut(whole, start, stop) or [(size, False)]
    return [(size, False)]


def _cut(pieces: Pieces, start: int, stop: Any) -> Pieces:
    """The pieces between two positions; a piece of unknown size reaches to the end."""
    found: Pieces = []
    at: Any = 0
    for size, is_special in pieces:
        end = at + size
        lo = start if isinstance(at, int) and at < start else at
        hi = stop if not isinstance(end, int) or (isinstance(stop, int) and stop < end) else end
        left = size_expr(hi - lo) if isinstance(hi - lo, int) else hi - lo
        if not isinstance(left, int) or left > 0:
            found.append((left, is_special))
        at = end
    return found


__all__ = ["Special", "special"]
