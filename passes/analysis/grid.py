"""grid: how the tokens of an axis stand in space and time, from the patch embedding that flattened them.

    [B, D, 14, 14] -> flatten -> [B, 196, D]: the axis is the leaves (14, 14)     cat([cls, x]): one before them
    cat([x[:, :1], registers, x[:, 1:]]): five before them, since x[:, 1:] has the whole grid of x
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..algebra.axes import Dim, Expr, at_most, expr, leaves, same, size_of
from ..rules.facts import Facts
from .blocks import Block


@dataclass(frozen=True)
class Grid:
    """sizes: of frames, rows and columns, as many as there are; one where no grid is known. before, behind: tokens in
    front of and behind those that stand on it, for each entry of the first `frames` axes (of every frame)."""

    sizes: tuple[Expr, ...]
    before: Expr = 0
    behind: Expr = 0
    frames: int = 0


def grid_of(facts: Facts, tokens: Dim) -> Grid:
    """The grid of an axis of tokens: its leaves, or that of the one part which has one of those that it joins, or that
    of what it is a slice of, if nothing of the grid is cut off."""
    own = leaves(tokens)
    if own not in facts.grids:
        facts.grids[own] = Grid((size_of(own),))  # what is rolled is joined of parts of itself
        facts.grids[own] = _grid(facts, own)
    return facts.grids[own]


def _grid(facts: Facts, own: Dim) -> Grid:
    if len(own) > 1:
        lead, inner = own[:-1], grid_of(facts, own[-1:])
        return Grid((*(leaf.size for leaf in lead), *inner.sizes), inner.before, inner.behind,
                    len(lead) if inner.before or inner.behind else 0)  # fmt: skip
    for parts in facts.joined(own):
        sizes, grids = [size_of(part) for part in parts], [_of_part(facts, part) for part in parts]
        on_grid = [i for i, grid in enumerate(grids) if len(grid.sizes) > 1]
        if len(on_grid) == 1:
            (at,) = on_grid
            found = grids[at]
            return Grid(found.sizes, sum(sizes[:at]) + found.before, found.behind + sum(sizes[at + 1 :]))
    for source, start, stop in facts.cut_from(own):
        found = _of_part(facts, source)
        before, behind = found.before - start, found.behind - (size_of(source) - stop)
        if len(found.sizes) > 1 and at_most(0, before) and at_most(0, behind):
            return Grid(found.sizes, before, behind)
    return Grid((size_of(own),))


def _of_part(facts: Facts, part: Dim) -> Grid:
    """The grid of a part of an axis: tokens before it are not those of each of its frames."""
    found = grid_of(facts, part)
    return Grid(tuple(leaf.size for leaf in leaves(part))) if found.frames else found


def side_fits(facts: Facts, block: Block) -> bool:
    """Whether the caller's side information has a number for each token of the grid of each sample."""
    assert facts.side is not None
    batch, *rest = facts.side.meta["val"].shape
    grid = grid_of(facts, block.tokens)
    samples = size_of(leaves(block.sample))
    return block.alone and same(expr(batch), samples) and same(prod(map(expr, rest)), prod(grid.sizes))


__all__ = ["Grid", "grid_of", "side_fits"]
