"""The slice oracle: the limit that any token merging can reach with a schedule.

Each block drops its last r tokens where ToMe would merge them, between the attention's residual add and the MLP. No
matching, no merging, no sizes: attention stays fused and all that is left is the smaller matrices. The answers
are worthless; the time is the least that r tokens a block can cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
    """Turn a timm VisionTransformer into its slice oracle, in place, and return it."""
    blocks = (SliceBlock(block, r, model.num_prefix_tokens) for block in model.blocks)
    model.blocks = nn.Sequential(*blocks)
    return model
