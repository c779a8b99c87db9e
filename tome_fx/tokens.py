"""Merged tokens outside of a merged model: what their rows stand for, and merging where no attention follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tome_fx.ops import unmerge_aten as rows_at

tome = torch.ops.tome


class MergedTokens(NamedTuple):
    """What a model gives back whose tokens stay merged.

    output: as the model gives it, but for its tokens: [*batch, N', *rest] in the place of [*batch, N, *rest], each row
    where the token stood that represents its group, in the order of these. sizes: float32 [*batch, N'], how many
    tokens each row stands for; 0 for rows that stand for nothing, which `counts` leaves: mask them. Their sum is N, but
    for tokens that a method drops ("prune"). source: int64 [*batch, N], the row that each token went into, or, if it
    was dropped, that of its destination. place: int64 [*batch, N'], the token that represents each row; it
    rises along the rows. N counts the tokens as the output has them: without a class token that it leaves out. *batch:
    the dims before the tokens, if these are the samples; where tokens stand in front of them ([N, B, D]), the samples
    alone, and nothing for a batch of one.
    """

    output: Any
    sizes: Tensor
    source: Tensor
    place: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Of what each token has, that of each row's representative: positions, timestamps, boxes.

        x: [N, *rest], the same for all samples, or [*batch, N, *rest]; any dtype. Returns [*batch, N', *rest].
        """
        return rows_at(self._each(x), self.place)

    def mean(self, x: Tensor) -> Tensor:
        """Of what each token has, the mean over all tokens of each row; 0 for rows that stand for nothing.

        x: [N, *rest], the same for all samples, or [*batch, N, *rest], floating. Returns [*batch, N', *rest].
        """
        x, dim = self._each(x), self.source.dim() - 1
        rest = (1,) * (x.dim() - self.source.dim())
        shape = (*self.place.shape, *x.shape[self.source.dim() :])
        total = x.new_zeros(shape).scatter_add(dim, self.source.reshape(*self.source.shape, *rest).expand_as(x), x)
        ones = torch.ones_like(self.source, dtype=x.dtype)
        count = torch.zeros_like(self.place, dtype=x.dtype).scatter_add(dim, self.source, ones)
        return total / count.clamp_min(1).reshape(*count.shape, *rest)

    def columns(self, image: Tensor) -> Tensor:
        """Which columns of a prompt stay when its image tokens merge: all others, and those of the representatives.

        image: bool [P, S], the image tokens of P prompts of full length, which are in reading order all tokens of all
        samples. Returns int64 [P, S'], rising: what is given for each column (ids, positions, masks) is gathered by it.
        Raises ValueError where the number of image tokens is another, or prompts keep different numbers.
        """
        if int(image.sum()) != self.source.numel():
            raise ValueError(f"the prompts have {int(image.sum())} image tokens, the images {self.source.numel()}")
        stands = torch.zeros_like(self.source, dtype=torch.bool).scatter(-1, self.place, self.sizes > 0)
        stays = (~image).masked_scatter(image, stands)
        if len(set(stays.sum(1).tolist())) > 1:
            raise ValueError("the prompts keep different numbers of columns: take them one by one")
        return stays.nonzero()[:, 1].reshape(len(image), -1)

    @classmethod
    def joined(cls, parts: Sequence[MergedTokens]) -> MergedTokens:
        """Images one after another as one, for a prompt that holds them all: tokens and rows are counted on.

        Each part's output is a tensor [*batch, N', D], of one *batch; their numbers of tokens and rows may differ.
        """
        tokens = [0, *accumulate(part.source.shape[-1] for part in parts)]
        rows = [0, *accumulate(part.place.shape[-1] for part in parts)]
        return cls(
            torch.cat([part.output for part in parts], -2),
            torch.cat([part.sizes for part in parts], -1),
            torch.cat([part.source + at for part, at in zip(parts, rows, strict=False)], -1),
            torch.cat([part.place + at for part, at in zip(parts, tokens, strict=False)], -1),
        )

    def _each(self, x: Tensor) -> Tensor:
        """x for each sample: [*batch, N, *rest]."""
        *batch, n = self.source.shape
        if x.shape[: self.source.dim()] == self.source.shape:
            return x
        if x.shape[:1] != (n,):
            raise ValueError(f"x must begin with the tokens [{n}] or the samples and tokens "
                             f"{list(self.source.shape)}, and is {list(x.shape)}")  # fmt: skip
        return x.expand(*batch, *x.shape)


PORTION = 4
"""Of the tokens one in so many merges in one matching, so that sources without a like one are left alone."""


def merge_tokens(x: Tensor, r: int, sizes: Tensor | None = None) -> MergedTokens:
    """Merge r tokens of features: where no attention follows that a pass could merge at, as behind the layer that makes
    one token of 2 x 2 patches.

    Bipartite soft matching (ToMe, arXiv 2210.09461, section 3) by the cosine of the tokens themselves, in as many
    steps as r takes; rows are means, weighted by size, through which gradients flow.

    x: [*batch, N, D], floating. sizes: float32 [*batch, N], of tokens that stand for several; None where each is one.
    Raises ValueError unless 0 <= r < N.
    """
    if x.dim() < 2 or not 0 <= r < max(x.shape[-2], 1):
        raise ValueError(f"x must be [*batch, N, D] and r from 0 to N - 1, got {list(x.shape)} and r={r}")
    source = place = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
    while r:
        step = min(r, max(x.shape[-2] // PORTION, 1))
        assign, keep, moved, _ = tome.match(x, step, 0, 0)
        merged = tome.merge_size(sizes, assign, keep, moved)
        x = tome.merge(x, sizes, merged, assign, keep, moved)
        place, order = place.gather(-1, keep).sort(-1)
        x, sizes = rows_at(x, order), merged.gather(-1, order)
        source = order.argsort(-1).gather(-1, assign.gather(-1, source))
        r -= step
    sizes = torch.ones(x.shape[:-1], device=x.device) if sizes is None else sizes
    return MergedTokens(x, sizes, source, place)


__all__ = ["MergedTokens", "merge_tokens"]
