"""how: the pieces of one merge, by name, and carrying them out."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tome_fx import matching

from . import counts, importance, matcher, near, partition, similarity
from .partition import everyone
from .tokens import KINDS, Compare, Found, Piece, Sides, Tokens, named, ranked, taken

_ = (importance, matcher, partition, similarity)

PAPERS = ("none", "all", "alternating", "cosine", "bipartite", "none")
"""The pieces of the paper, in the order of `KINDS`."""
SIDES = ("candidates", "partition", "matcher")
"""The kinds that say which tokens may go."""
PAID = frozenset(("attention", "received"))
"""What of an attention pieces may read."""


@dataclass(frozen=True)
class How:
    """How one place merges: a piece of each kind, what becomes of a group, and numbers.

    pruned: the share (or an int, the number) of the r tokens, the least important, that is dropped instead of merged.
    least: the share (or an int, the number) of the r tokens that go where `counts` says how many merge.
    alpha: the weight of the metric beside the place codes; None: no place codes. numbers: (name, value), as they are at
    this depth.
    """

    importance: str = "none"
    candidates: str = "all"
    partition: str = "alternating"
    similarity: str = "cosine"
    matcher: str = "bipartite"
    counts: str = "none"
    merging: str = "mean"
    pruned: int | float = 0.0
    least: int | float = 0.0
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
    def classic(self) -> bool:
        """Whether matcher, partition and similarity alone say which tokens merge (`tome::match_by`)."""
        return (self.importance, self.candidates, self.counts) == ("none", "all", "none") and not self.pruned and (
            self.partition in matching.PARTITIONS and self.similarity in matching.SIMILARITIES
            and self.matcher in matching.matchers()
        )  # fmt: skip

    @property
    def padded(self) -> bool:
        """Whether pairs are as many as the data say, so that rows are left that stand for nothing."""
        return self.counts != "none" and not (isinstance(self.least, float) and self.least == 1)

    @property
    def counted(self) -> bool:
        """Whether all pieces hold where rows take no part."""
        return all(self.pieces[kind].counted for kind in SIDES)

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
    def of_process(self) -> str:
        """The choice that this process alone can make; empty where there is none."""
        if self.matcher == "random" or _is_registered(self.matcher):
            return f"matcher={self.matcher!r}"
        return "partition='random'" if self.partition == "random" else ""

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

    def compares(self, tokens: int) -> float:
        """How many pairs of so many tokens are compared: one half with the other, or with those near it."""
        part, number = _piece("partition", self.partition)
        least = self.matcher == "bipartite" and part.near is not None
        each = min(tokens / 2, part.near(number)) if least and part.near else tokens / 2
        return tokens / 2 * each + tokens**2 * sum(p.all_pairs for p in self.pieces.values())

    def most(self, free: int, whole: int, grid: Sequence[Any]) -> int:
        """How many of `free` tokens may go at most; there were `whole` before any merge, on this grid."""
        alone = _piece("matcher", self.matcher)[0].alone
        found = [_piece(kind, getattr(self, kind)) for kind in (("matcher",) if alone else SIDES)]
        half = [free // 2] if any(one.most is None for one, _ in found) else []
        limits = [*half, *(one.most(free, whole, grid, number) for one, number in found if one.most)]
        symbolic = [x for x in limits if not isinstance(x, int)]  # the first is the least: to compare is to guard
        return min([*(x for x in limits if isinstance(x, int)), *symbolic[:1]])

    @property
    def fixed(self) -> bool:
        """Whether sources and destinations are the same in all samples."""
        return all(_piece(kind, getattr(self, kind))[0].fixed for kind in SIDES[:2])

    @property
    def clash(self) -> str:
        """Why these pieces do not go together; empty where they do."""
        ours, partition = self.pieces["matcher"], self.pieces["partition"]
        own = f'matcher="{self.matcher}"'
        if ours.apart and partition.overlaps:
            return f'{own} needs two sides, and in partition="{self.partition}" tokens stand on both'
        if _is_registered(self.matcher):
            if not self.fixed or self.partition not in matching.PARTITIONS:
                return f'{own} takes the sides of {", ".join(matching.PARTITIONS)}, candidates="all"'
            if self.similarity not in matching.SIMILARITIES:
                return f'{own} takes the similarity {" or ".join(matching.SIMILARITIES)}'
        if self.padded and not self.counted:
            names = " or ".join(f"{kind}={getattr(self, kind)!r}" for kind in SIDES if not self.pieces[kind].counted)
            return f"counts={self.counts!r} leaves rows that stand for nothing, and {names} would take them for tokens"
        if self.padded and self.pruned:
            return f"counts={self.counts!r} says how many merge, and prune how many of r are dropped: give one of them"
        if self.merging == "weighted" and not any(need in self.needs for need in PAID):
            return 'merging="weighted" weighs by attention: say importance="attention" or "received"'
        return ""

    @property
    def key(self) -> str:
        """What stands in the graph."""
        return json.dumps([self.names, self.pruned, dict(self.numbers)])


@functools.lru_cache(maxsize=512)
def from_key(key: str) -> How:
    names, pruned, numbers = json.loads(key)
    return How(**dict(zip(KINDS, names, strict=True)), pruned=pruned, numbers=tuple(numbers.items()))


def _piece(kind: str, name: str) -> tuple[Piece, int]:
    if kind == "matcher" and _is_registered(name):
        return Piece(_registered, fixed=True), 0
    return named(kind, name)


def _is_registered(matcher: str) -> bool:
    return matcher not in matching.BUILT_IN and matcher in matching.matchers()


def _registered(how: How, tokens: Tokens, sides: Sides, r: int, _: object) -> Found:
    """A matcher of `register_matcher`, which knows sides that are the same in all samples."""
    similarity = matching.SIMILARITIES[how.similarity]
    return matching.checked(how.matcher, tokens.metric, r, sides.sources[0], sides.destinations[0], similarity)


def _in_blocks(how: How, tokens: Tokens, sides: Sides) -> bool:
    """Whether pairs are found without a matrix of all: what reads it whole, or is traced, has one."""
    plain = how.matcher == "bipartite" and how.similarity in matching.SIMILARITIES
    return plain and not how.padded and tokens.seen is None and sides.wanted is None and type(tokens.metric) is Tensor


def scores(how: How, tokens: Tokens) -> Tensor | None:
    if not how.scored:
        return None
    found: Tensor = how.pieces["importance"].run(tokens)
    if tokens.seen is not None and tokens.padding_first:
        found = torch.where(tokens.seen, found, found.amin(-1, keepdim=True) - 1)
    return found if tokens.live is None else found.masked_fill(~tokens.live, torch.finfo(found.dtype).max)


def pick(how: How, tokens: Tokens, r: int, pruned: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which r tokens go: source, destination int64 `[batch, r]`, score float32 `[batch, r]`, the best first, and behind
    them the `pruned` least important; int64 `[N]`, positions in their new order.

    Raises ValueError where a registered matcher returns what it must not.
    """
    tokens, sides, (source, destination, score), _ = _found(how, tokens, r)
    turn = score
    if pruned:
        turn = score.scatter(1, ranked(tokens.scores().gather(1, source), pruned, least=True), -torch.inf)
    turn = ranked(turn, r)
    body = torch.cat(sides[:2], -1)[0] if how.fixed else tokens.positions
    return source.gather(1, turn), destination.gather(1, turn), score.gather(1, turn), body


def pick_some(how: How, tokens: Tokens, r: int, must: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """The r pairs of `pick` (source, destination), their score, and bool `[batch, r]`, which of them merge: as many as
    `how.counts` says of the sample, at least `must`, int64 `[batch]`. Then the order, as `pick` has it."""
    tokens, sides, (source, destination, score), compare = _found(how, tokens, r)
    turn = score
    if tokens.live is not None:
        turn = turn.masked_fill(~(taken(tokens.live, source) & taken(tokens.live, destination)), -torch.inf)
    turn = ranked(turn, r)
    source, destination, score = (x.gather(1, turn) for x in (source, destination, score))
    count = counts.wanted(how, tokens, sides, compare())
    if tokens.live is not None and any(how.pieces[kind].most is None for kind in SIDES):  # as `How.most` has it
        own = tokens.live if tokens.seen is None else tokens.live & tokens.seen
        count = torch.minimum(count, own.sum(-1) // 2)
    goes = counts.accepted(tokens, (source, destination), count, must)
    return (source, destination), score, goes, torch.cat(sides[:2], -1)[0] if how.fixed else tokens.positions


def would_go(how: How, tokens: Tokens) -> Tensor:
    """int64 `[batch]`: how many tokens of each sample `how.counts` lets go, at most half of those that may merge."""
    half = tokens.count // 2
    tokens, sides, compare = _sided(how, tokens, half)
    return counts.wanted(how, tokens, sides, compare()).clamp(max=half)  # of an odd number one side has one more


def _found(how: How, tokens: Tokens, r: int) -> tuple[Tokens, Sides, Found, Compare]:
    """What the pieces find: the r pairs in any order, score float32, with what they were found by."""
    tokens, sides, compare = _sided(how, tokens, r)
    batch = tokens.metric.shape[0]
    if _in_blocks(how, tokens, sides):
        source, destination, score = near.bipartite(tokens, sides, r, matching.SIMILARITIES[how.similarity])
    else:
        run = functools.partial(_registered, how) if _is_registered(how.matcher) else how.pieces["matcher"].run
        source, destination, score = run(tokens, sides, r, compare)
    source, destination = source.expand(batch, -1), destination.expand(batch, -1)
    if type(tokens.metric) is Tensor and (strange := how.strange):  # not while it is traced
        matching.check_pairs(f"pieces {strange}", (source, destination, score), batch, tokens.count, r)
    return tokens, sides, (source, destination, score.to(torch.float32)), compare


def _sided(how: How, tokens: Tokens, r: int) -> tuple[Tokens, Sides, Compare]:
    """The tokens with their importance, the two sides, and how alike those are."""
    tokens = replace(tokens, importance=scores(how, tokens))
    alone = _piece("matcher", how.matcher)[0].alone
    order = everyone(tokens, r) if alone else how.pieces["candidates"].run(tokens, r)
    part, number = named("partition", how.partition)
    sides = part.run(tokens, order, r, number) if number else part.run(tokens, order, r)

    @functools.cache
    def compare() -> Tensor:
        alike: Tensor = how.pieces["similarity"].run(tokens, sides.sources, sides.destinations)
        wanted = [] if (pairs := sides.pairs()) is None else [(pairs, False)]
        kinds = _kinds(how, tokens, sides)
        for chosen, more in kinds + wanted if part.overlaps else wanted + kinds:
            most, least = (f(alike, (1, 2), keepdim=True) for f in (torch.amax, torch.amin))
            step = most - least + 1
            alike = torch.where(chosen, alike + step, alike) if more else torch.where(chosen, alike, alike - step)
        if tokens.live is not None:
            own, other = taken(tokens.live, sides.sources)[:, :, None], taken(tokens.live, sides.destinations)[:, None]
            alike = alike.masked_fill(~(own & other), torch.finfo(alike.dtype).min)
        return alike

    return tokens, sides, compare


def _kinds(how: How, tokens: Tokens, sides: Sides) -> list[tuple[Tensor, bool]]:
    """Pairs of one kind by what a mask of keys leaves in come before others, or, True, before all. Where the data say
    how many merge, pairs of what it leaves out say nothing."""
    if tokens.seen is None:
        return []
    own, other = taken(tokens.seen, sides.sources)[:, :, None], taken(tokens.seen, sides.destinations)[:, None]
    first = [(~(own | other), True)] if tokens.padding_first else [(own & other, False)] if how.padded else []
    return [(own == other, False), *first]
