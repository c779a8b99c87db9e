"""The contract of a method's pieces: what they may read of tokens (`Tokens`), what they return, where they are listed.

A method names one piece of each kind. For the tokens that may merge at one place (protected ones are cut off before)
they run in this order:

    importance(tokens)                          -> float32 [batch, N], the larger the more important
    candidates(tokens, r)                       -> Order, the tokens that may take part, in some order
    partition(tokens, order, r)                 -> Sides, sources and destinations, and which pairs are wanted
    similarity(tokens, i, j)                    -> float32 [batch, n, m], the more alike the larger
    matcher(tokens, sides, r, compare)          -> source, destination int64 [batch, r], score floating [batch, r]
    counts(tokens, sides, alike)                -> bool [batch, S], the sources that a rule lets go

compare() is the similarity of all sources with all destinations; pairs that the partition does not want come after all
others, and after these pairs of a token that a mask of keys leaves out with one that it does not; alike is what it
returns. Of the pairs of a sample as many merge, the best first, as the rule lets sources go; without one all do. All
pieces are plain functions of tensors, run outside autograd and autocast, and hold for any batch: a sample does not
depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tome_fx.matching import cosine


@dataclass(frozen=True)
class Tokens:
    """The N tokens that may merge at one place, as a piece sees them.

    metric: float32 `[batch, N, d]`, what they are compared by (the option `metric`). first: the position of the first
    of them in the whole sequence. size: float32 `[batch, N]`, original tokens behind each. attention: float32
    `[batch, N]`, the attention that a piece asked for by `needs`, else None. place: float32 `[batch, N, axes]`, where
    on the grid of patches the token that stands for a group is (frame, row, column; one axis where no grid is known),
    for pieces that ask for it. seen: bool `[batch, N]`, False where a mask of keys leaves out all that is behind a
    token; None without a mask. padding_first: whether such tokens go before all others (their metric is zeros then).
    importance: what the importance piece found. live: bool `[batch, N]`, False for rows that take no part, since they
    stand for nothing (see `counts`) or never merge; None: all do. change: float32 `[batch, N]`, how much the block
    changed each, for pieces that ask for it. numbers: the method's numbers by name, those that change with depth as
    they are here.
    """

    metric: Tensor
    first: int
    size: Tensor
    attention: Tensor | None = None
    place: Tensor | None = None
    seen: Tensor | None = None
    padding_first: bool = False
    importance: Tensor | None = None
    live: Tensor | None = None
    change: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.metric.shape[1]

    @property
    def positions(self) -> Tensor:
        """int64 `[N]`"""
        return torch.arange(self.count, device=self.metric.device)

    def scores(self) -> Tensor:
        """The importance, which a piece cannot do without."""
        assert self.importance is not None
        return self.importance

    def places(self) -> Tensor:
        assert self.place is not None
        return self.place


class Order(NamedTuple):
    """positions: int64 `[1 or batch, C]`, the tokens that may take part. first: whether the first of them is in turn
    to be a source (0) or a destination (1). everyone: whether they are all tokens in position order."""

    positions: Tensor
    first: int = 0
    everyone: bool = False


class Sides(NamedTuple):
    """sources, destinations: int64 `[1 or batch, S]` and `[1 or batch, D]`, positions among the tokens.

    Which pairs come before all others, where not all are alike: wanted, bool `[1 or batch, S, D]`; or, so that no
    matrix of all pairs need be made, label, int64 `[batch, N]`, the same for both of them, or reach, how many positions
    they are apart at most, of sources and destinations that take turns.
    """

    sources: Tensor
    destinations: Tensor
    wanted: Tensor | None = None
    label: Tensor | None = None
    reach: int | None = None

    @property
    def near(self) -> bool:
        """Whether a label or the reach says which pairs are wanted."""
        return self.label is not None or self.reach is not None

    def pairs(self) -> Tensor | None:
        """`wanted`, whatever says it."""
        if self.label is not None:
            own, other = (self.label.gather(1, side.expand(len(self.label), -1)) for side in self[:2])
            return own[:, :, None] == other[:, None]
        if self.reach is not None:
            return (self.sources[..., :, None] - self.destinations[..., None, :]).abs() <= self.reach
        return self.wanted


Found = tuple[Tensor, Tensor, Tensor]
"""source, destination: int64 `[batch, r]`; score: floating `[batch, r]`, the best first or in any order."""
Compare = Callable[[], Tensor]

KINDS = ("importance", "candidates", "partition", "similarity", "matcher", "counts")
PIECES: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


@dataclass(frozen=True)
class Piece:
    """A function with what it asks for: needs, of "attention" (of the class token), "received" (attention received),
    "change" and "place"; scored, whether it reads the importance; all_pairs, whether it compares all tokens with all;
    most, (free tokens now, at first, grid, number) -> how many may go at most, None: half of them; fixed, of candidates
    and partitions, whether they are the same in all samples; overlaps, of a partition, whether tokens stand on both
    sides, and `wanted` alone says which of them go; apart, of a matcher, whether its two sides must not overlap; alone,
    of a matcher, whether candidates and partition do not matter to it; counted, of these three, whether any part of the
    pairs can merge alone, and rows that are not `Tokens.live` come last: all pairs of one go after all others, and its
    importance is the greatest; near, of a partition whose wanted pairs are near ones, (number) -> how many destinations
    are near a source at most."""

    run: Callable[..., Any]
    needs: tuple[str, ...] = ()
    scored: bool = False
    all_pairs: bool = False
    most: Callable[..., int] | None = None
    fixed: bool = False
    overlaps: bool = False
    apart: bool = False
    alone: bool = False
    counted: bool = False
    near: Callable[[int], int] | None = None


def piece(kind: str, name: str, **asks: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lists a function under a name."""

    def listed(run: Callable[..., Any]) -> Callable[..., Any]:
        PIECES[kind][name] = Piece(run, **asks)
        return run

    return listed


def with_all(tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """The cosine of all tokens with all, float32 `[batch, N, N]`; bool, the pairs that a mask of keys does not
    part, of a token with one that takes part."""
    seen, live = tokens.seen, tokens.live
    kin = None if seen is None else seen[:, :, None] == seen[:, None]
    if live is not None:
        kin = live[:, None].expand(-1, tokens.count, -1) if kin is None else kin & live[:, None]
    return cosine(tokens.metric, tokens.metric), kin


def mean_of(x: Tensor, kin: Tensor | None) -> Tensor:
    """`[batch, N, N]` -> `[batch, N]`: the mean over the tokens that count for each."""
    return x.mean(-1) if kin is None else (x * kin).sum(-1) / kin.sum(-1).clamp_min(1)


def any_number(free: int, *_: object) -> int:
    """`Piece.most` of what limits nothing itself."""
    return free


def named(kind: str, name: str) -> tuple[Piece, int]:
    """The piece of a name, which may end in a number: "window:8". Raises ValueError where there is none."""
    base, colon, number = name.partition(":")
    known = PIECES[kind]
    whole = f"{base}:k" if colon else base
    if whole not in known or (colon and not (number.isdigit() and int(number) > 0)):
        raise ValueError(f"no {kind} {name!r}; there are {', '.join(sorted(known))}")
    return known[whole], int(number) if colon else 0


def ranked(scores: Tensor, count: int, *, least: bool = False) -> Tensor:
    """int64 `[batch, count]`: the positions of the highest (or lowest) scores, in order. No sort: runtimes behind
    torch.export know the best k."""
    return scores.topk(count, dim=-1, largest=not least).indices


def in_place(chosen: Tensor, count: int) -> Tensor:
    """int64 `[batch, count]`: the positions of a mask with `count` of them in each sample, ascending."""
    n = chosen.shape[-1]
    place = torch.arange(n, device=chosen.device)
    return ranked(torch.where(chosen, place, place + n), count, least=True)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `[batch, N, ...]` by `[1 or batch, n]`."""
    index = index.expand(x.shape[0], -1)
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def take(order: Tensor, rank: Tensor) -> Tensor:
    """`order` `[1 or batch, C]` at ranks `[n]` or `[1 or batch, n]`."""
    rank = rank if rank.dim() == 2 else rank[None]
    batch = max(order.shape[0], rank.shape[0])
    return order.expand(batch, -1).gather(1, rank.expand(batch, -1))
