"""candidates and partition: which tokens take part in a matching, and which of them may join which."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor

from tome_fx.matching import random_halves

from .tokens import Order, Sides, Tokens, any_number, in_place, piece, ranked, take

LONGEST = 2**20
"""More than any axis of a grid has."""

# -- candidates --------------------------------------------------------------------------------------------------------


@piece("candidates", "all", most=any_number, fixed=True, counted=True)
def everyone(tokens: Tokens, r: int) -> Order:
    """All, in position order."""
    return Order(tokens.positions[None], tokens.first % 2, everyone=True)


@piece("candidates", "least", scored=True, counted=True)
def least(tokens: Tokens, r: int) -> Order:
    """The 2r least important, the least first; all others stay as they are (PiToMe, arXiv 2405.16148, section 3.2)."""
    return Order(ranked(tokens.scores(), 2 * r, least=True))


# -- partition ---------------------------------------------------------------------------------------------------------


@piece("partition", "alternating", fixed=True, counted=True)
def alternating(tokens: Tokens, order: Order, r: int) -> Sides:
    """In turn a source and a destination (ToMe, arXiv 2210.09461, table 1)."""
    return Sides(order.positions[:, order.first :: 2], order.positions[:, 1 - order.first :: 2])


@piece("partition", "sequential", fixed=True)
def sequential(tokens: Tokens, order: Order, r: int) -> Sides:
    """The first half are sources (table 1)."""
    half = (order.positions.shape[1] + 1) // 2
    return Sides(order.positions[:, :half], order.positions[:, half:])


@piece("partition", "random", fixed=True)
def random(tokens: Tokens, order: Order, r: int) -> Sides:
    """A random half are sources, for one number of tokens always the same (table 1)."""
    halves = random_halves(order.positions.shape[1], order.first, tokens.metric.device)
    sources, destinations = (take(order.positions, half) for half in halves)
    return Sides(sources, destinations)


def _all_but_one(free: int, *_: object) -> int:
    return free - 1


@piece("partition", "importance", scored=True, most=_all_but_one, counted=True)
def importance(tokens: Tokens, order: Order, r: int) -> Sides:
    """The r least important of the candidates are sources, the others destinations, in position order (DiffRate, arXiv
    2305.17997; MSTM, arXiv 2306.04897, of which the abstract was read: its crucial tokens are the destinations)."""
    scores = tokens.scores() if tokens.live is None else _one_stays(tokens.scores(), tokens.live)
    held = order.positions.expand(scores.shape[0], -1)
    goes = torch.zeros_like(held, dtype=torch.bool)
    goes = goes.scatter(1, ranked(scores.gather(1, held), r, least=True), True)
    return Sides(take(held, in_place(goes, r)), take(held, in_place(~goes, held.shape[1] - r)))


def _one_stays(scores: Tensor, live: Tensor) -> Tensor:
    """The importance with that of the most important row that takes part beyond all others, so that it is no source."""
    most = scores.masked_fill(~live, -torch.inf).argmax(-1, keepdim=True)
    return scores.scatter(1, most, torch.inf)


@piece("partition", "band:k", fixed=True, counted=True, near=lambda k: k + 1)
def band(tokens: Tokens, order: Order, r: int, k: int) -> Sides:
    """Alternating; tokens at most k apart first (local merging, arXiv 2405.17951, equation 1)."""
    sides = alternating(tokens, order, r)._replace(reach=k)
    return sides if order.everyone else sides._replace(wanted=sides.pairs(), reach=None)


@piece("partition", "window:k", needs=("place",), fixed=True, counted=True, near=lambda k: k * k)
def window(tokens: Tokens, order: Order, r: int, k: int) -> Sides:
    """Alternating; tokens of one k x k window of the grid, in one frame, first (ALGM, CVPR 2024: k = 2)."""
    return alternating(tokens, order, r)._replace(label=_cells(tokens, k))


@piece("partition", "window3d:k", needs=("place",), fixed=True, counted=True, near=lambda k: k**3)
def window3d(tokens: Tokens, order: Order, r: int, k: int) -> Sides:
    """Alternating; tokens of one window of k frames, k rows and k columns first (the windows of Video Swin, arXiv
    2106.13230, section 3.2, of one size for all three)."""
    return alternating(tokens, order, r)._replace(label=_cells(tokens, k, frames=k))


@piece("partition", "frame", needs=("place",), fixed=True, counted=True)
def frame(tokens: Tokens, order: Order, r: int) -> Sides:
    """Alternating; tokens of one frame first (of one row, where there are no frames)."""
    return alternating(tokens, order, r)._replace(label=tokens.places()[..., 0].to(torch.int64))


def _after_cells(free: int, whole: int, grid: Sequence[int], k: int, frames: int = 1) -> int:
    """All but one token of each cell that the grid has; none on a grid of unknown size."""
    if not all(isinstance(n, int) for n in grid):
        return 0
    sides = [*(ceil(n / frames) for n in grid[:-2]), *(ceil(n / k) for n in grid[-2:])]
    return max(free - prod(sides), 0)


def _after_cubes(free: int, whole: int, grid: Sequence[int], k: int) -> int:
    return _after_cells(free, whole, grid, k, frames=k)


@piece("partition", "grid:k", needs=("place",), all_pairs=True, most=_after_cells, overlaps=True)
def grid(tokens: Tokens, order: Order, r: int, k: int) -> Sides:
    """Destinations are the first token of each k x k cell of the grid, all others sources (Token Merging for Stable
    Diffusion, arXiv 2303.17604, section 3.2, whose cells of 2 x 2 have a random one)."""
    return _by_cell(tokens, _cells(tokens, k), tokens.positions[None])


@piece("partition", "grid3d:k", needs=("place",), all_pairs=True, most=_after_cubes, overlaps=True)
def grid3d(tokens: Tokens, order: Order, r: int, k: int) -> Sides:
    """Destinations are the first token of each cell of k frames, k rows and k columns, all others sources: "grid:k"
    (arXiv 2303.17604, section 3.2) in time too."""
    return _by_cell(tokens, _cells(tokens, k, frames=k), tokens.positions[None])


@piece("partition", "grid_random:k", needs=("place",), all_pairs=True, most=_after_cells, overlaps=True)
def grid_random(tokens: Tokens, order: Order, r: int, k: int) -> Sides:
    """Destinations are a random token of each k x k cell of the grid, all others sources (Token Merging for Stable
    Diffusion, arXiv 2303.17604, section 3.2, which draws anew in each call: here one draw, by the places alone)."""
    return _by_cell(tokens, _cells(tokens, k), _shuffled(tokens.places()) * LONGEST + tokens.positions)


PRIME = 2**31 - 1
"""Products of two numbers below it are whole numbers of 64 bits."""


def _shuffled(place: Tensor) -> Tensor:
    """int64 `[batch, N]`, below `PRIME`: a number that says nothing of the place `[batch, N, axes]` it is made of, the
    same in every process and runtime."""
    found = torch.full_like(place[..., 0], 1, dtype=torch.int64)
    for at in place.to(torch.int64).unbind(-1):
        found = (found * 48271 + at * 69621 + 1) % PRIME
        found = found * found % PRIME  # no longer linear in the place
    return found


def _by_cell(tokens: Tokens, cells: Tensor, turn: Tensor) -> Sides:
    """The token of each of `cells` whose `turn` is least is a destination; both int64 `[1 or batch, N]`."""
    same = cells[:, :, None] == cells[:, None]
    first = ~(same & (turn[:, None] < turn[:, :, None])).any(-1)
    everyone = tokens.positions[None]
    return Sides(everyone, everyone, ~first[:, :, None] & first[:, None])


def _cells(tokens: Tokens, k: int, frames: int = 1) -> Tensor:
    """int64 `[batch, N]`: the cell that each token stands in, of so many frames and of k x k of the last two axes."""
    place = tokens.places().to(torch.int64)
    *before, row, column = [torch.zeros_like(place[..., 0]), *place.unbind(-1)]
    cell = row // k * LONGEST + column // k
    return sum((at // frames * LONGEST**2 for at in before), cell)
