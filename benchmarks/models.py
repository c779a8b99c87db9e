"""The models that the benchmarks time, random weights: timm ViTs, and plain encoders that no library has to provide.

`BUILDERS` names them. All have `blocks`, of timm Blocks or `DiTBlock`s, and `num_prefix_tokens`: the oracle and the
patch need to know no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
"""By the number of dims of the grid of tokens."""


class Encoder(nn.Module):
    """Patches or tubelets, `prefix` learned tokens before them, positions, timm blocks, a class score.

    Read at the mean of the prefix tokens, or of all tokens where there is no prefix. `input_shape` is [channels,
    *size]; `kernel` and `stride` have a number for each dim of `size`, and patches overlap where the stride is less.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        prefix: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 400,
    ) -> None:
        super().__init__()
        stride = stride or kernel
        size = input_shape[1:]
        self.input_shape = tuple(input_shape)
        self.grid = tuple((n - k) // s + 1 for n, k, s in zip(size, kernel, stride, strict=True))
        self.num_prefix_tokens = prefix
        self.patches = CONVOLUTIONS[len(size)](input_shape[0], embed_dim, tuple(kernel), tuple(stride))
        self.prefix = nn.Parameter(torch.randn(1, prefix, embed_dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, prefix + math.prod(self.grid), embed_dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *input_shape] -> [B, prefix + patches, C]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1) + self.positions

    def read(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """[B, N, C] and, for merged tokens, how many each stands for [B, N, 1] -> [B, classes]."""
        x = self.norm(x)
        if self.num_prefix_tokens:
            x = sum(x[:, i] for i in range(self.num_prefix_tokens)) / self.num_prefix_tokens
        else:
            x = x.mean(1) if size is None else (x * size).sum(1) / math.prod(self.grid)
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *input_shape] -> [B, classes]."""
        return self.read(self.blocks(self.embed(x)))


class InFrames(nn.Module):
    """A block over the tokens of each of `frames` frames alone."""

    def __init__(self, block: nn.Module, frames: int) -> None:
        super().__init__()
        self.block, self.frames = block, frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, frames * n, C] -> [B, frames * m, C], of a block [B, n, C] -> [B, m, C]."""
        own = self.block(x.unflatten(1, (self.frames, -1)).flatten(0, 1))
        return own.unflatten(0, (-1, self.frames)).flatten(1, 2)


class Alternating(Encoder):
    """VGGT-like: blocks over each frame alone and over all frames in turn, [frames, height, width] in `grid`."""

    def __init__(self, embed_dim: int = 768, depth: int = 4, num_heads: int = 12, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, depth=depth, num_heads=num_heads, **options)
        for i in range(0, depth, 2):
            self.blocks[i] = InFrames(self.blocks[i], self.grid[0])


class Dense(Encoder):
    """SAM-like: global attention over a grid of patches, read as a feature map by a convolution."""

    def __init__(self, neck: int = 256, **options: Any) -> None:
        super().__init__(**options, num_classes=neck)
        self.neck = nn.Conv2d(neck, neck, 3, padding=1)

    def read(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """[B, N, C] -> [B, neck, *grid]. Raises ValueError for merged tokens: they have no grid."""
        if size is not None:
            raise ValueError("a feature map needs all of its tokens")
        return self.neck(self.head(self.norm(x)).transpose(1, 2).unflatten(2, self.grid))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [B, N, C], shift and scale [B, C] -> [B, N, C]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A DiT block: adaLN-Zero, whose shift, scale and gate of both branches come from the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attend(self, x: torch.Tensor, condition: Sequence[torch.Tensor]) -> torch.Tensor:
        """The attention branch. x [B, N, C], condition 6 x [B, C] -> what it adds to x, [B, N, C]."""
        shift, scale, gate = condition[:3]
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return gate.unsqueeze(1) * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed(self, x: torch.Tensor, condition: Sequence[torch.Tensor]) -> torch.Tensor:
        """The MLP branch. x [B, N, C], condition 6 x [B, C] -> what it adds to x, [B, N, C]."""
        shift, scale, gate = condition[3:]
        return gate.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift, scale))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x [B, N, C], c [B, C] -> [B, N, C]."""
        condition = self.modulation(c).chunk(6, dim=-1)
        x = x + self.attend(x, condition)
        return x + self.feed(x, condition)


class DiT(nn.Module):
    """A diffusion transformer: a noised latent and its time step -> the noise. `input_shape` is [channels, *size]."""

    num_prefix_tokens = 0

    def __init__(
        self,
        input_shape: Sequence[int],
        patch: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        channels, height, width = self.input_shape = tuple(input_shape)
        self.patch, self.grid = patch, (height // patch, width // patch)
        self.patches = nn.Conv2d(channels, embed_dim, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, math.prod(self.grid), embed_dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.blocks = nn.ModuleList(DiTBlock(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * embed_dim))
        self.head = nn.Linear(embed_dim, patch * patch * channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x [B, *input_shape], time [B] -> [B, *input_shape]."""
        waves = torch.exp(torch.arange(128, device=x.device) * (-math.log(10000) / 128)) * time.float()[:, None]
        c = self.time(torch.cat([waves.cos(), waves.sin()], dim=1).to(x.dtype))
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        x = self.head(modulate(self.norm(x), *self.modulation(c).chunk(2, dim=-1)))
        x = x.unflatten(1, self.grid).unflatten(3, (self.patch, self.patch, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def vit(model: str, **options: Any) -> nn.Module:
    """A timm VisionTransformer without trained weights."""
    return timm.create_model(model, **options)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit, "encoder": Encoder, "alternating": Alternating, "dense": Dense, "dit": DiT,
}  # fmt: skip


def inputs(net: nn.Module, batch: int) -> tuple[torch.Tensor, ...]:
    """Random inputs of a model of this module: float32 on the CPU, `batch` samples."""
    shape = net.input_shape if hasattr(net, "input_shape") else (3, *net.patch_embed.img_size)
    x = torch.randn(batch, *shape)
    return (x, torch.rand(batch) * 1000) if isinstance(net, DiT) else (x,)
