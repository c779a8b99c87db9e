"""The slice oracle: the limit that any token merging can reach with a schedule.

Each block drops its last r tokens where ToMe would merge them, between the attention's residual add and the MLP. No
matching, no merging, no sizes: attention stays fused and all that is left is the smaller matrices. The answers
are worthless; the time is the least that r tokens a block can cost.

Where the stream keeps its length (`branch_oracle`), attention and MLP each leave out the last r tokens and repeat their
last result in those places: the cheapest thing that keeps shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models import DiTBlock, InFrames


def tokens_removed(r: int, tokens: int, protected: int) -> int:
    """How many of `tokens` a block with `protected` prefix tokens may remove: at most half of the free ones."""
    return min(r, (tokens - protected) // 2)


class SliceBlock(nn.Module):
    """A timm ViT block (pre-norm, residual) that drops its last `r` tokens after the attention."""

    def __init__(self, block: Any, r: int, protected: int) -> None:
        super().__init__()
        self.block: Any = block
        self.r, self.protected = r, protected

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N - r_eff, C]."""
        block = self.block
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = x[:, : x.shape[1] - tokens_removed(self.r, x.shape[1], self.protected)]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def slice_oracle(model: Any, r: int) -> nn.Module:
    """Turn a timm VisionTransformer, or an `Encoder`, into its slice oracle, in place, and return it.

    Where some blocks see frames alone (`InFrames`), tokens merge in these, and the others see what is left.
    """
    in_frames = any(isinstance(block, InFrames) for block in model.blocks)
    for i, block in enumerate(model.blocks):
        if isinstance(block, InFrames):
            block.block = SliceBlock(block.block, r, 0)
        elif not in_frames:
            model.blocks[i] = SliceBlock(block, r, model.num_prefix_tokens)
    return model


class SliceBranches(nn.Module):
    """A timm ViT block or a `DiTBlock` whose two branches see all but the last `r` tokens."""

    def __init__(self, block: Any, r: int, protected: int) -> None:
        super().__init__()
        self.block: Any = block
        self.r, self.protected = r, protected

    def forward(self, x: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, N, C], c [B, C] for a `DiTBlock` -> [B, N, C]."""
        block = self.block
        if isinstance(block, DiTBlock):
            condition = block.modulation(c).chunk(6, dim=-1)
            x = x + self.on_slice(lambda x: block.attend(x, condition), x)
            return x + self.on_slice(lambda x: block.feed(x, condition), x)
        x = x + self.on_slice(lambda x: block.drop_path1(block.ls1(block.attn(block.norm1(x)))), x)
        return x + self.on_slice(lambda x: block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), x)

    def on_slice(self, branch: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`branch` of the first N - r_eff tokens of [B, N, C], its last row repeated to N rows."""
        r = tokens_removed(self.r, x.shape[1], self.protected)
        y = branch(x[:, : x.shape[1] - r])
        return torch.cat([y, y[:, -1:].expand(-1, r, -1)], dim=1)


def branch_oracle(model: Any, r: int) -> nn.Module:
    """Turn a model of `models` into the oracle of branch placement, in place, and return it."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = SliceBranches(block, r, model.num_prefix_tokens)
    return model
