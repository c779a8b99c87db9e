"""how: the pieces of one merge, by name, and carrying them out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tome_fx import matching

from . import importance, matcher, partition, similarity
from .tokens import KINDS, Found, Piece, Tokens, named, ranked

_ = (importance, matcher, partition, similarity)

PAPERS = ("none", "all", "alternating", "cosine", "bipartite")
"""The pieces of the paper, in the order of `KINDS`."""


@dataclass(frozen=True)
class How:
    """How one place merges: a piece of each kind, what becomes of a group, and numbers.

    pruned: the share (or an int, the number) of the r tokens, the least important, that is dropped instead of merged.
    alpha: the weight of the metric beside the place codes; None: no place codes. numbers: (name, value), as they are at
    this depth.
    """

    importance: str = "none"
    candidates: str = "all"
    partition: str = "alternating"
    similarity: str = "cosine"
    matcher: str = "bipartite"
    merging: str = "mean"
    pruned: int | float = 0.0
    alpha: float | None = None
    numbers: tuple[tuple[str, float], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(getattr(self, kind) for kind in KINDS)

    @property
    def papers(self) -> bool:
        """Whether pairs are the paper's."""
        return self.names == PAPERS and not self.pruned

    @property
    def sided(self) -> bool:
        """Whether sources and destinations stand at alternating positions and any two of them may pair."""
        return (self.candidates, self.partition, self.matcher) == ("all", "alternating", "bipartite")

    @property
    def classic(self) -> bool:
        """Whether matcher, partition and similarity alone say which tokens merge (`tome::match_by`)."""
        return self.importance == "none" and self.candidates == "all" and not self.pruned and (
            self.partition in matching.PARTITIONS and self.similarity in matching.SIMILARITIES
            and self.matcher in matching.matchers()
        )  # fmt: skip

    @functools.cached_property
    def pieces(self) -> dict[str, Piece]:
        return {kind: _piece(kind, name)[0] for kind, name in zip(KINDS, self.names, strict=True) if name != "none"}

    @property
    def scored(self) -> bool:
        """Whether any piece reads the importance."""
        return bool(self.pruned) or self.merging == "weighted" or any(p.scored for p in self.pieces.values())

    @property
    def strange(self) -> str:
        """The names of pieces that are not ours, whose pairs are checked; empty where there are none."""
        own = {kind: getattr(p.run, "__module__", "") for kind, p in self.pieces.items()}
        return ", ".join(getattr(self, kind) for kind, m in own.items() if m and not m.startswith("tome_fx."))

    @property
    def reader(self) -> str:
        """The option that goes by importance."""
        kinds = [kind for kind, p in self.pieces.items() if p.scored]
        return f"{kinds[0]}={getattr(self, kinds[0])!r}" if kinds else "prune" if self.pruned else "merging='weighted'"

    @property
    def needs(self) -> frozenset[str]:
        """What of the graph is read: "attention", "received", "place"."""
        place = [] if self.alpha is None else ["place"]
        return frozenset([*(need for p in self.pieces.values() for need in p.needs), *place])

    @property
    def compares(self) -> int:
        """How many pairs are compared, in those of one half of the tokens with the other."""
        return 1 + 4 * sum(p.all_pairs for p in self.pieces.values())

    def most(self, free: int, whole: int, grid: Sequence[Any]) -> int:
        """How many of `free` tokens may go at most; there were `whole` before any merge, on this grid."""
        limits = []
        for kind in ("candidates", "partition", "matcher"):
            found, number = _piece(kind, getattr(self, kind))
            limits += [found.most(free, whole, grid, number)] if found.most else []
        return min(limits, default=free // 2)

    @property
    def key(self) -> str:
        """What stands in the graph."""
        return json.dumps([self.names, self.pruned, dict(self.numbers)])


@functools.lru_cache(maxsize=512)
def from_key(key: str) -> How:
    names, pruned, numbers = json.loads(key)
    return How(**dict(zip(KINDS, names, strict=True)), pruned=pruned, numbers=tuple(numbers.items()))


def _piece(kind: str, name: str) -> tuple[Piece, int]:
    if kind == "matcher" and name not in matching.BUILT_IN and name in matching.matchers():
        return Piece(functools.partial(_registered, name)), 0
    return named(kind, name)


def _registered(name: str, tokens: Tokens, sides: Any, r: int, compare: Callable[[], Tensor]) -> Found:
    """A matcher of `register_matcher`, which knows sides that are the same in all samples."""
    if sides.wanted is not None or sides.sources.shape[0] != 1:
        raise ValueError(f'the matcher "{name}" takes fixed sides, as "alternating" has: use another partition')
    return matching.checked(name, tokens.metric, r, sides.sources[0], sides.destinations[0], matching.cosine)


def scores(how: How, tokens: Tokens) -> Tensor | None:
    return how.pieces["importance"].run(tokens) if how.scored else None


def pick(how: How, tokens: Tokens, r: int, pruned: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which r tokens go: source, destination int64 `[batch, r]`, score float32 `[batch, r]`, the best first, and behind
    them the `pruned` least important; int64 `[N]`, positions in their new order.

    Raises ValueError where a registered matcher returns what it must not.
    """
    tokens = replace(tokens, importance=scores(how, tokens))
    order = how.pieces["candidates"].run(tokens, r)
    (part, number), batch = named("partition", how.partition), tokens.metric.shape[0]
    sides = part.run(tokens, order, r, number) if number else part.run(tokens, order, r)

    def compare() -> Tensor:
        alike = how.pieces["similarity"].run(tokens, sides.sources, sides.destinations)
        if sides.wanted is None:
            return alike
        most, least = (f(alike, (1, 2), keepdim=True) for f in (torch.amax, torch.amin))
        return torch.where(sides.wanted, alike, alike - (most - least + 1))

    source, destination, score = _piece("matcher", how.matcher)[0].run(tokens, sides, r, compare)
    source, destination = source.expand(batch, -1), destination.expand(batch, -1)
    if type(tokens.metric) is Tensor and (strange := how.strange):  # not while it is traced
        matching.check_pairs(f"pieces {strange}", (source, destination, score), batch, tokens.count, r)
    score = score.to(torch.float32)
    turn = score
    if pruned:
        turn = score.scatter(1, ranked(tokens.scores().gather(1, source), pruned, least=True), -torch.inf)
    turn = ranked(turn, r)
    both = torch.cat(sides[:2], -1) if sides.sources.shape[0] == sides.destinations.shape[0] == 1 else None
    body = both[0] if both is not None and both.shape[1] == tokens.count else tokens.positions
    return source.gather(1, turn), destination.gather(1, turn), score.gather(1, turn), body
