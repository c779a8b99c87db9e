"""counts: how many of the pairs that were found merge, where the data say it, sample by sample.

A graph has one length for each block. So of the r pairs that a block finds, those that are not accepted change nothing,
`least` rows go whatever the data say, and what is left over of the others are rows of size 0, which stand for nothing:
no attention sees them, no mean counts them, no matching pairs them, and the next rows that must go are these first.

    12 tokens, least = 2, of a sample 5 pairs accepted:   7 tokens, 3 rows of size 0
                          of another 1:                  10 tokens (2 must go)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .matcher import votes as close_ones
from .tokens import Sides, Tokens, piece, taken

if TYPE_CHECKING:
    from .how import How


@piece("counts", "votes")
def votes(tokens: Tokens, sides: Sides, alike: Tensor) -> Tensor:
    """Sources with at least `votes` partners that are at least `tau` like them (SAINT, arXiv 2503.11549, ViT mode,
    whose count is the mean over the batch: here each sample has its own)."""
    _, count = close_ones(alike, tokens.numbers["tau"])
    return count >= tokens.numbers["votes"]


@piece("counts", "threshold")
def threshold(tokens: Tokens, sides: Sides, alike: Tensor) -> Tensor:
    """Sources whose best partner is at least `tau` like them (ALGM, CVPR 2024; LTMP's, which are learned)."""
    return alike.amax(-1) >= tokens.numbers["tau"]


def wanted(how: How, tokens: Tokens, sides: Sides, alike: Tensor) -> Tensor:
    """int64 `[batch]`: how many tokens of each sample the rule lets go; none that a mask of keys leaves out, or that
    take no part."""
    goes: Tensor = how.pieces["counts"].run(tokens, sides, alike)
    for part in (tokens.seen, tokens.live):
        if part is not None:
            goes = goes & taken(part, sides.sources)
    return goes.sum(-1)


def accepted(tokens: Tokens, pairs: tuple[Tensor, Tensor], count: Tensor, must: Tensor) -> Tensor:
    """bool `[batch, r]`: which of the pairs (source, destination), the best first, merge: the first `count`, at least
    `must`, and of padding that goes first all."""
    valid = torch.ones_like(pairs[0], dtype=torch.bool)
    if tokens.live is not None:
        valid = taken(tokens.live, pairs[0]) & taken(tokens.live, pairs[1])
    if tokens.seen is not None and tokens.padding_first:
        own, other = (taken(tokens.seen, side) for side in pairs)
        count = count + (valid & ~(own | other)).sum(-1)
    rank = torch.arange(valid.shape[-1], device=valid.device)
    return valid & (rank < torch.maximum(count, must)[:, None])


def padded_form(
    pairs: tuple[Tensor, Tensor], goes: Tensor, stands: Tensor, order: Tensor, ends: tuple[int, int], least: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`assign`, `keep` and `moved` (see `tome_fx.ops`) where some pairs merge, and `least` rows go.

    pairs: int64 `[batch, r]` each, positions in the whole sequence. goes: bool `[batch, r]`. stands: bool `[batch, n]`,
    False for rows of size 0. order: int64 `[n]`, all positions in their new order. ends: protected tokens at either
    end.

    The new order: `order` without what went, then, before the protected tokens behind, rows of size 0. Of pairs that do
    not merge `moved` has a token that stays where it is, so that it joins itself. By sums, counts and products alone,
    as runtimes behind torch.export know them.
    """
    (source, destination), (prefix, suffix), (batch, n) = pairs, ends, stands.shape
    order, left = order.expand(batch, n), n - least
    gone = torch.zeros_like(order).scatter_add(1, source, goes.to(torch.int64))
    stays = (stands.to(torch.int64) * (1 - gone)).gather(1, order)
    head = stays.narrow(1, 0, n - suffix).to(torch.float32)  # runtimes count in floats alone
    first, more = head.cumsum(1), (1 - head).cumsum(1)
    slot = torch.where(head > 0, first, head.sum(1, keepdim=True) + more).to(torch.int64) - 1
    slot = torch.where(slot < left - suffix, slot, left)  # what goes is written behind the end
    behind = torch.arange(suffix, device=order.device) + (left - suffix)
    slot = torch.cat([slot, behind.expand(batch, suffix)], 1)
    keep = torch.zeros_like(order).narrow(1, 0, 1).expand(batch, left + 1)
    keep = keep.scatter_add(1, slot, order).narrow(1, 0, left)
    assign = torch.zeros_like(order).scatter_add(1, order, torch.where(slot < left, slot, prefix))
    joined = torch.where(goes, assign.gather(1, destination), assign.gather(1, source))
    return assign.scatter(1, source, joined), keep, torch.where(goes, source, keep.narrow(1, prefix, 1))


__all__ = ["accepted", "padded_form", "wanted"]
