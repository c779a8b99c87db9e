"""matcher: which r tokens go, and which each of them joins."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from tome_fx.matching import cosine, random_pairs

from .partition import _all_but_one
from .tokens import Compare, Found, Sides, Tokens, any_number, piece, ranked, take, taken, with_all


@piece("matcher", "bipartite", most=any_number, counted=True)
def bipartite(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """The r sources whose best destination is most like them (ToMe, arXiv 2210.09461, section 3)."""
    best, partner = compare().max(-1)
    best, chosen = best.topk(r)
    return take(sides.sources, chosen), take(sides.destinations, partner.gather(1, chosen)), best


@piece("matcher", "random", alone=True)
def random(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """r random pairs of all tokens, for one number of tokens always the same: the baseline."""
    return random_pairs(tokens.metric, r, tokens.positions, tokens.positions, cosine)


def votes(alike: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """SAINT's M, bool `[batch, S, D]`, and n, how many destinations are at least `tau` like each source."""
    close = alike >= tau
    return close, close.sum(-1)


@piece("matcher", "votes", most=any_number, counted=True)
def saint(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """SAINT (arXiv 2503.11549, ViT mode): of sources with n > 0 partners of at least `tau`, n * exp(gamma * (their mean
    similarity - tau)), of others the mean similarity to all; the r highest go, each to its best destination. Its r, the
    mean over the batch of how many have n >= `votes`, makes a sample depend on its batch: `calibrate` gives a list, and
    counts="votes" the number of each sample."""
    alike, (tau, gamma) = compare(), (tokens.numbers[name] for name in ("tau", "gamma"))
    close, count = votes(alike, tau)
    among = torch.where(close, alike, 0.0).sum(-1) / count.clamp_min(1)
    others = alike.mean(-1) if tokens.live is None else _mean_of_live(tokens, sides, alike)
    score = torch.where(count > 0, count * (gamma * (among - tau)).exp(), others)
    if (wanted := sides.pairs()) is not None:  # a source that no wanted pair has comes last
        score = score.masked_fill(~wanted.any(-1), torch.finfo(score.dtype).min)
    score, chosen = score.topk(r)
    return take(sides.sources, chosen), take(sides.destinations, alike.argmax(-1).gather(1, chosen)), score


def _mean_of_live(tokens: Tokens, sides: Sides, alike: Tensor) -> Tensor:
    """The mean similarity of each source to the destinations that take part; of one that does not, the least number."""
    own, other = (taken(tokens.live, side) for side in sides[:2])  # type: ignore[arg-type]
    mean = torch.where(other[:, None], alike, 0.0).sum(-1) / other.sum(-1, keepdim=True).clamp_min(1)
    return mean.masked_fill(~own, torch.finfo(mean.dtype).min)


@piece("matcher", "both", apart=True)
def both(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """In both directions (MCTF, arXiv 2403.10030, section 3.3): half of the r, rounded up, from sources to
    destinations, the other half from destinations that nothing joined to sources that stay."""
    edges = compare()
    batch, _, count = edges.shape
    first = ceil(r / 2)
    best, partner = edges.max(-1)
    score, gone = best.topk(first)
    joined = partner.gather(1, gone)
    stays = torch.ones_like(best, dtype=torch.bool).scatter(1, gone, False)
    idle = torch.ones((batch, count), dtype=torch.bool, device=edges.device).scatter(1, joined, False)
    back, other = edges.masked_fill(~stays[:, :, None], -torch.inf).max(1)
    more, chosen = back.masked_fill(~idle, -torch.inf).topk(r - first)
    source = torch.cat([take(sides.sources, gone), take(sides.destinations, chosen)], 1)
    destination = torch.cat([take(sides.destinations, joined), take(sides.sources, other.gather(1, chosen))], 1)
    return source, destination, torch.cat([score, more], 1)


@piece("matcher", "fuse", scored=True, most=any_number, apart=True)
def fuse(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """All sources join the least important destination: one fused token (EViT, arXiv 2202.07800, section 3.2)."""
    scores = tokens.scores()
    batch = scores.shape[0]
    held, ends = (side.expand(batch, -1) for side in sides[:2])
    target = ends.gather(1, scores.gather(1, ends).argmin(-1, keepdim=True))
    source = take(held, ranked(scores.gather(1, held), r, least=True))
    return source, target.expand(-1, r), scores.gather(1, source)


@piece("matcher", "greedy", all_pairs=True, most=_all_but_one, alone=True)
def greedy(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """One after the other, the token that is most like all that are left (SAINT for language models, arXiv 2503.11549);
    each joins, at the end, the one left that is most like it. Partitions do not matter."""
    alike, kin = with_all(tokens)
    if kin is not None:
        alike = torch.where(kin, alike, -2.0)
        if tokens.padding_first:
            alike = alike + tokens.count * ~(tokens.seen[:, :, None] | tokens.seen[:, None])  # type: ignore[index]
    left = torch.ones(alike.shape[:2], dtype=torch.bool, device=alike.device)
    total, gone, score = alike.sum(-1), [], []
    for _ in range(r):
        most, at = total.masked_fill(~left, -torch.inf).max(-1, keepdim=True)
        left = left.scatter(1, at, False)
        total = total - taken(alike, at)[:, 0]
        gone.append(at)
        score.append(most)
    source = torch.cat(gone, 1) if gone else left.new_empty((left.shape[0], 0), dtype=torch.int64)
    partner = taken(alike, source).masked_fill(~left[:, None], -torch.inf).argmax(-1)
    return source, partner, torch.cat(score, 1) if score else alike.new_empty((left.shape[0], 0))


def _after_first_frame(free: int, whole: int, grid: tuple[int, ...], k: int) -> int:
    if len(grid) < 3 or not all(isinstance(n, int) for n in grid):
        return 0
    return max(free - whole // grid[0], 0)


@piece("matcher", "previous", needs=("place",), all_pairs=True, most=_after_first_frame, alone=True)
def previous(tokens: Tokens, sides: Sides, r: int, compare: Compare) -> Found:
    """The r tokens most like the one at the same place of the frame before (EVS, arXiv 2510.14624; of the last frame
    before in which it is left), through chains to the last one that stays. Needs a grid with frames."""
    place = tokens.places()
    frame, spot = place[..., 0], place[..., 1:]
    before = (spot[:, :, None] == spot[:, None]).all(-1) & (frame[:, None] < frame[:, :, None])
    last, parent = torch.where(before, frame[:, None], -1.0).max(-1)
    alike = cosine(tokens.metric, tokens.metric).gather(-1, parent[..., None])[..., 0]
    score, source = alike.masked_fill(last < 0, torch.finfo(alike.dtype).min).topk(r)
    goes = torch.zeros_like(alike, dtype=torch.bool).scatter(1, source, True)
    root = torch.where(goes, parent, tokens.positions)
    for _ in range(max(tokens.count.bit_length(), 1)):
        root = root.gather(1, root)
    return source, root.gather(1, source), score
