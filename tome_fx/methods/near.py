"""near: the best partner of each source among those near it, in time and memory linear in the tokens.

Tokens of one label (a window, a frame), or at most so many positions apart (a band), are brought side by side in tiles,
and only tiles are compared. The same pairs as comparing all and leaving out those that are not near.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tome_fx.matching import AT_ONCE, Similarity, best_of

from .tokens import Found, Sides, Tokens, ranked, take, taken

NOWHERE = 2**40
"""A position that is near no other."""


def bipartite(tokens: Tokens, sides: Sides, r: int, similarity: Similarity) -> Found:
    """The pairs of `matcher.bipartite` without a matrix of all of them. A source that nothing is near has the best of
    all destinations, and comes after all others."""
    if sides.near:
        best, partner = nearest(tokens.metric, sides, similarity)
        if r > best.shape[1] - int((best == -torch.inf).sum(-1).max()):
            best, partner = _others(tokens.metric, sides, similarity, (best, partner))
    else:
        rows = [taken(tokens.metric, side) for side in sides[:2]]
        best, partner = best_of(rows[0], rows[1], similarity)
    best, chosen = best.topk(r)
    return take(sides.sources, chosen), take(sides.destinations, partner.gather(1, chosen)), best


def _others(
    metric: Tensor, sides: Sides, similarity: Similarity, found: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """What `nearest` found, with partners for the sources that have none, behind all others."""
    best, partner = found
    alone = best == -torch.inf
    lone = ranked(alone.to(torch.float32), int(alone.sum(-1).max()))
    rows = taken(metric, take(sides.sources, lone))
    far, rank = best_of(rows, taken(metric, sides.destinations), similarity)
    own = alone.gather(1, lone)  # another sample may have more
    most = far.masked_fill(~own, -torch.inf).amax(-1, keepdim=True)
    least = best.masked_fill(alone, torch.inf).amin(-1, keepdim=True).clamp_max(1.0)
    behind = far - (most - least).clamp_min(0) - 1
    best = best.scatter(1, lone, torch.where(own, behind, best.gather(1, lone)))
    return best, partner.scatter(1, lone, torch.where(own, rank, partner.gather(1, lone)))


def nearest(metric: Tensor, sides: Sides, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """float32 and int64 `[batch, S]`: how like each source its best partner among those near it is, -inf where there is
    none, and the rank of that partner among the destinations. metric: float32 `[batch, N, d]`."""
    rows = [taken(metric, side) for side in sides[:2]]
    if sides.label is not None:
        own, other = (sides.label.gather(1, side.expand(len(metric), -1)) for side in sides[:2])
        return _of_one_label(rows, (own, other), similarity)
    return _in_reach(rows, sides, similarity)


def _of_one_label(rows: list[Tensor], labels: tuple[Tensor, Tensor], similarity: Similarity) -> tuple[Tensor, Tensor]:
    batch, count = labels[0].shape
    _, tile = torch.unique(torch.cat(labels, 1), return_inverse=True)
    tiles = int(tile.max()) + 1
    tile = tile + torch.arange(batch, device=tile.device)[:, None] * tiles
    parts = tile.split([count, tile.shape[1] - count], 1)
    sources, destinations = (_tiled(part.flatten(), batch * tiles) for part in parts)
    best = rows[0].new_full((batch * count + 1,), -torch.inf)
    partner = destinations.new_zeros(batch * count + 1)
    flat = [torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[-1])]) for x in rows]  # what stands for no token
    step = max(AT_ONCE // max(sources.shape[1] * destinations.shape[1], 1), 1)
    for some, others in zip(sources.split(step), destinations.split(step), strict=True):
        alike = similarity(flat[0][some], flat[1][others])
        found, at = alike.masked_fill((others == len(flat[1]) - 1)[:, None], -torch.inf).max(-1)
        best[some], partner[some] = found, others.gather(1, at)
    best, partner = (x[:-1].view(batch, count) for x in (best, partner))
    return best, partner % max(rows[1].shape[1], 1)


def _tiled(tile: Tensor, tiles: int) -> Tensor:
    """int64 `[tiles, most]`: the places `[n]` of each tile in order, and n where it has no more. tile: int64 `[n]`."""
    count = torch.bincount(tile, minlength=tiles)
    order = tile.argsort(stable=True)
    rank = torch.arange(len(tile), device=tile.device) - (count.cumsum(0) - count).repeat_interleave(count)
    found = tile.new_full((tiles, max(int(count.max()), 1)), len(tile))
    found[tile[order], rank] = order
    return found


def _in_reach(rows: list[Tensor], sides: Sides, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Sources and destinations take turns, so that near ones have near ranks: blocks of sources, each with the
    destinations of its ranks and some on either side."""
    assert sides.reach is not None
    (batch, count, _), others, far = rows[0].shape, rows[1].shape[1], sides.reach // 2 + 1
    wide = max(far, 32)
    blocks = -(-count // wide)
    front, ends = (0, blocks * wide - count), (far, blocks * wide + far - others)
    own = pad(rows[0], (0, 0, *front)).view(batch, blocks, wide, -1)
    near = pad(rows[1], (0, 0, *ends)).unfold(1, wide + 2 * far, wide).transpose(-1, -2)
    place = pad(sides.sources, front).view(-1, blocks, wide, 1)
    beside = pad(sides.destinations, ends, value=NOWHERE).unfold(1, wide + 2 * far, wide)[:, :, None]
    best, rank = similarity(own, near).masked_fill((place - beside).abs() > sides.reach, -torch.inf).max(-1)
    partner = rank + torch.arange(blocks, device=rank.device)[:, None] * wide - far
    best, partner = (x.flatten(1)[:, :count] for x in (best, partner))
    return best, partner.clamp(0, others - 1)
