"""ToMe the usual way, by replacing a library's modules: what the published implementations do to a timm ViT, and to
encoders of timm's blocks for video and audio.

Written from the paper (arXiv 2210.09461, sections 3 and appendix D), not from its code, and with its costs: attention
is spelled out, because the sizes enter between the product and the softmax, and matching is argsort, gather and
scatter. It is the baseline that users have today, and an independent reference for the merged values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models import Encoder
from oracle import tokens_removed


def match(metric: torch.Tensor, r: int, protected: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: even positions are sources, odd ones destinations, the prefix is neither.

    metric [B, N, D] -> (kept [B, S - r], merged [B, r], into [B, r]): indices of the sources that stay, in position
    order, of those that merge, and of the destination of each of those. Matching carries no gradient.
    """
    with torch.no_grad():
        metric = F.normalize(metric, dim=-1)
        source, destination = split(metric, protected)
        best, partner = (source @ destination.transpose(-1, -2)).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        merged, kept = order[:, :r], order[:, r:].sort(dim=-1).values
        return kept, merged, partner.gather(-1, merged)


def split(x: torch.Tensor, protected: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N, C] -> its even and its odd positions from `protected` on."""
    odd = protected % 2
    return x[:, protected + odd :: 2], x[:, protected + 1 - odd :: 2]


def merge_sum(x: torch.Tensor, plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor], protected: int) -> torch.Tensor:
    """[B, N, C] -> [B, N - r, C], the sum over each group: prefix, kept sources, destinations."""
    kept, merged, into = (index.unsqueeze(-1).expand(-1, -1, x.shape[-1]) for index in plan)
    source, destination = split(x, protected)
    destination = destination.scatter_add(1, into, source.gather(1, merged))
    return torch.cat([x[:, :protected], source.gather(1, kept), destination], dim=1)


class PatchedBlock(nn.Module):
    """A timm ViT block with merging between attention and MLP; the size of each token goes in and out."""

    def __init__(self, block: Any, r: int, protected: int) -> None:
        super().__init__()
        self.block: Any = block
        self.r, self.protected = r, protected

    def forward(self, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, N, C], size [B, N, 1] -> both with N - r_eff tokens."""
        block = self.block
        attended, metric = self.attention(block.norm1(x), size)
        x = x + block.drop_path1(block.ls1(attended))
        r = tokens_removed(self.r, x.shape[1], self.protected)
        if r > 0:
            plan = match(metric, r, self.protected)
            total = merge_sum(size, plan, self.protected)
            x, size = merge_sum(x * size, plan, self.protected) / total, total
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size

    def attention(self, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Proportional attention. x [B, N, C], size [B, N, 1] -> (output [B, N, C], keys, mean of heads [B, N, D])."""
        attn = self.block.attn
        batch, tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        scores = (q * attn.scale) @ k.transpose(-2, -1) + size.log()[:, None, None, :, 0]
        out = attn.attn_drop(scores.softmax(dim=-1)) @ v
        out = out.transpose(1, 2).reshape(batch, tokens, attn.attn_dim)
        return attn.proj_drop(attn.proj(attn.norm(out))), k.mean(1)


class PatchedBlocks(nn.Module):
    """The blocks of a timm ViT with the sizes carried from each to the next."""

    def __init__(self, blocks: nn.Sequential, r: int, protected: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PatchedBlock(block, r, protected) for block in blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N', C]."""
        return self.merged(x)[0]

    def merged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, C] -> [B, N', C] and how many tokens each stands for, [B, N', 1]."""
        size = torch.ones_like(x[..., :1])
        for block in self.blocks:
            x, size = block(x, size)
        return x, size


class PatchedEncoder(nn.Module):
    """An `Encoder` whose mean over tokens weighs each by its size."""

    def __init__(self, model: Encoder, r: int) -> None:
        super().__init__()
        self.model = model
        self.blocks = PatchedBlocks(model.blocks, r, model.num_prefix_tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the encoder takes and gives."""
        return self.model.read(*self.blocks.merged(self.model.embed(x)))


def tome_patch(model: Any, r: int) -> nn.Module:
    """Turn a timm VisionTransformer that reads its class token, or an `Encoder`, into a ToMe model, in place.

    Returns the model to call. Raises ValueError for a timm model that pools over patches (a plain mean over merged
    tokens would be wrong, and the published patch does not handle one either) and for a model that reads a grid or
    conditions its blocks: this patch merges for good.
    """
    if type(model) is Encoder:
        return PatchedEncoder(model, r)
    if getattr(model, "global_pool", "") != "token":
        raise ValueError("the patch handles models that read their class token, and encoders")
    model.blocks = PatchedBlocks(model.blocks, r, model.num_prefix_tokens)
    return model
