"""A traced tensor with its axes: what a value of the new graph is, dim by dim, and how to bring its tokens together.

The factors of a dim are its leaves, each run of merged leaves as one. Every shape of the new graph follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..algebra.axes import Atom, Dim, Dims, leaves, size_of
from ..algebra.layout import DimLayout, Layout, Run, plain
from ..building.trace import Builder, Traced

Factor = tuple[int, Any]
"""The dim that it stands in, and a leaf, a Run, or None for a dim of size 1."""


@dataclass(frozen=True, eq=False)
class Laid:
    """A tensor, the axes of its dims, and the layout that they are in."""

    x: Traced
    dims: Dims
    layout: Layout

    def with_run(self, d: int, key: tuple[int, int], run: Run | None) -> Layout:
        """Its layout with another run in the place of that of dim d."""
        runs = tuple(r for r in self.layout[d] if r.key != key) + ((run,) if run else ())
        return (*self.layout[:d], runs, *self.layout[d + 1 :])

    def factored(self) -> tuple[Traced, list[Factor]]:
        """One axis per factor; a dim of size 1 keeps its axis."""
        x, factors = self.x, list[Factor]()
        shape: list[Any] = []
        for d, (dim, runs) in enumerate(zip(self.dims, self.layout, strict=True)):
            own = _factors(dim, runs) or [None]
            factors += [(d, f) for f in own]
            shape += [x.shape[d]] if len(own) == 1 else [_length(x.builder, f) for f in own]
        return (x.reshape(shape) if len(shape) != x.dim() else x), factors

    def canonical(
        self, d: int, key: tuple[int, int], sample: Sequence[Atom]
    ) -> tuple[Traced, Callable[[Traced, Layout], Laid]]:
        """x as [*sample, tokens, *rest] and the way back, given the layout afterwards. The tokens are the run `key` of
        dim d."""
        y, factors = self.factored()
        spots = [spot(factors, leaf) for leaf in sample]
        token = token_spots(factors, d, key)
        rest = [i for i in range(len(factors)) if i not in spots and i not in token]
        order = [*spots, *token, *rest]
        y = y.permute(order) if order != sorted(order) else y
        lead = len(spots)
        if len(token) > 1:
            y = y.flatten(lead, lead + len(token) - 1)
        # After the op the tokens are one axis, wherever they stood.
        joined = [i for i in range(len(factors)) if i not in token[1:]]
        slot = {i: k for k, i in enumerate([*spots, token[0], *rest])}
        inverse = [slot[i] for i in joined]

        def back(z: Traced, after: Layout) -> Laid:
            z = z.permute(inverse) if inverse != sorted(inverse) else z
            if [factors[i][0] for i in joined] != list(range(len(self.dims))):
                sizes = [dim_size(z.builder, dim, runs) for dim, runs in zip(self.dims, after, strict=True)]
                z = z.reshape(sizes)
            return Laid(z, self.dims, after)

        return y, back

    def widened(self, want: Layout, frame: Dims) -> tuple[Laid, Layout]:
        """With the rank of the frame, the dims it broadcasts against, and full size along those of them that hold
        sample axes of `want` which it lacks."""
        x, lead = self.x, len(frame) - len(self.dims)
        dims, have, want = (*([()] * lead), *self.dims), (*plain(lead), *self.layout), (*plain(lead), *want)
        x = x.reshape([*([1] * lead), *x.shape]) if lead else x
        sample = {leaf for runs in want for run in runs for leaf in leaves(run.step.sample)}
        missing = sample - {leaf for dim in dims for leaf in leaves(dim)}
        grow = [d for d in range(len(dims)) if not leaves(dims[d]) and missing & set(leaves(frame[d]))]
        if grow:
            x = x.expand([dim_size(x.builder, frame[d], ()) if d in grow else -1 for d in range(len(dims))])
            dims = tuple(frame[d] if d in grow else dims[d] for d in range(len(dims)))
        return replace(self, x=x, dims=dims, layout=have), want


def spread(size: Traced, dims: Dims, layout: Layout, d: int, run: Run) -> Traced:
    """[*sample, n] of a run in dim d, shaped to broadcast against a value with axes `dims`: 1 wherever it does not
    vary."""
    sample = list(leaves(run.step.sample))
    held: dict[Any, int] = {leaf: i for i, leaf in enumerate(sample)}
    order: list[int] = []
    grown: list[Any] = []
    final: list[Any] = []
    expand: list[Any] = []
    for e, (dim, runs) in enumerate(zip(dims, layout, strict=True)):
        own = _factors(dim, runs)
        mine = [f for f in own if f in held or (e == d and isinstance(f, Run) and f.key == run.key)]
        for f in own if mine else []:
            source = len(sample) if isinstance(f, Run) and f in mine else held.get(f, -1)
            length = _length(size.builder, f)
            if source >= 0:
                order.append(source)
            grown.append(length if source >= 0 else 1)
            expand.append(length)
        if not mine:
            grown.append(1)
            expand.append(1)
        final.append(dim_size(size.builder, dim, runs) if mine else 1)
    size = size.permute(order) if order != sorted(order) else size
    size = size.reshape(grown)
    return size if len(grown) == len(final) else size.expand(expand).reshape(final)


def dim_size(builder: Builder, dim: Dim, runs: DimLayout) -> Any:
    """The size of a dim in a layout."""
    total: Any = 1
    for factor in _factors(dim, runs):
        total = total * _length(builder, factor)
    return total


def _length(builder: Builder, factor: Any) -> Any:
    return factor.step.after if isinstance(factor, Run) else builder.size(size_of([factor]))


def _factors(dim: Dim, runs: DimLayout) -> list[Any]:
    """The leaves of a dim with each run in place of the leaves it merged."""
    atoms, starts = leaves(dim), {run.start: run for run in runs}
    out: list[Any] = []
    at = 0
    while at < len(atoms):
        out.append(starts.get(at, atoms[at]))
        at += starts[at].count if at in starts else 1
    return out


def spot(factors: list[Factor], leaf: Atom) -> int:
    """The axis of a leaf."""
    return next(i for i, (_, f) in enumerate(factors) if f is leaf)


def token_spots(factors: list[Factor], d: int, key: tuple[int, int]) -> list[int]:
    """The axes of the run `key` of dim d: one when merged, one per leaf when not."""
    start, count = key
    spots, position = [], 0
    for i, (dim, f) in enumerate(factors):
        if dim != d:
            continue
        width = f.count if isinstance(f, Run) else 1
        if position >= start and position + width <= start + count:
            spots.append(i)
        position += width
    return spots


__all__ = ["Laid", "dim_size", "spot", "spread", "token_spots"]
