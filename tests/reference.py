"""ToMe in plain eager PyTorch, written from DESIGN section 3 alone: the oracle for the rewritten graph.

Slow and literal on purpose: each sample is matched on its own with Python loops, groups are lists of positions. Nothing
here imports tome_fx. Runs timm's VisionTransformer (class, distillation and register tokens, every pooling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = list[list[int]]
"""New token -> the positions (in the sequence before this merge) that it stands for."""


def schedule(r: int | tuple[int, float] | list[int], layers: int) -> list[int]:
    """Tokens to remove in each layer. (r, inflection) goes linearly from r*(1-inflection) to r*(1+inflection)."""
    if isinstance(r, list):
        return r + [0] * (layers - len(r))
    if isinstance(r, int):
        return [r] * layers
    count, inflection = r
    low, high = count * (1 - inflection), count * (1 + inflection)
    return [int(low + (high - low) * i / (layers - 1)) for i in range(layers)]


def match(keys: Tensor, r: int, protected: int) -> Groups:
    """Groups of one sample. keys: [N, d]."""
    n = keys.shape[0]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    sources = [i for i in range(protected, n) if i % 2 == 0]
    destinations = [i for i in range(protected, n) if i % 2 == 1]
    r = max(0, min(r, (n - protected) // 2))
    if r == 0:
        return [[i] for i in range(n)]
    scored = []
    for i in sources:
        cosine = [(unit[i] @ unit[j]).item() for j in destinations]
        best = max(range(len(destinations)), key=cosine.__getitem__)
        scored.append((cosine[best], i, destinations[best]))
    merged = {i: j for _, i, j in sorted(scored, reverse=True)[:r]}
    groups: Groups = [[i] for i in range(protected)]
    groups += [[i] for i in sources if i not in merged]
    groups += [[*(i for i in sources if merged.get(i) == j), j] for j in destinations]
    return groups


def merge(x: Tensor, size: Tensor, groups: list[Groups]) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of each group. x: [B, N, D], size: [B, N]."""
    rows, sizes = [], []
    for b, sample in enumerate(groups):
        total = torch.stack([size[b, g].sum() for g in sample])
        rows.append(torch.stack([(x[b, g] * size[b, g, None]).sum(0) for g in sample]) / total[:, None])
        sizes.append(total)
    return torch.stack(rows), torch.stack(sizes)


def attention(attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Attention with log(size) added to every key's scores: (output, keys averaged over the heads)."""
    b, n, c = x.shape
    q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + size.log()[:, None, None, :]
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
    return attn.proj(out), k.mean(dim=1)


def tome_vit(
    model: Any, image: Tensor, r: int | tuple[int, float] | list[int], trace: Callable[[int, int], None] | None = None
) -> Tensor:
    """timm VisionTransformer in eval mode with ToMe. `trace` hears (tokens before, after) of each layer."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    size, protected, full = torch.ones(x.shape[:2]), model.num_prefix_tokens, x.shape[1]
    for block, count in zip(model.blocks, schedule(r, len(model.blocks)), strict=True):
        out, keys = attention(block.attn, block.norm1(x), size)
        x = x + block.ls1(out)
        groups = [match(sample, count, protected) for sample in keys]
        before = x.shape[1]
        x, size = merge(x, size, groups)
        if trace:
            trace(before, x.shape[1])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return head(model, model.norm(x), size, full)


def head(model: Any, x: Tensor, size: Tensor, full: int) -> Tensor:
    """The read-out: means weighted by size over the original count, attention pooling with log(size)."""
    p = model.num_prefix_tokens
    if model.global_pool == "map":
        x = model.attn_pool(x, attn_mask=size.log()[:, None, None, :])
    elif model.global_pool == "token" and type(model).__name__ == "VisionTransformerDistilled":
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    elif model.global_pool == "token":
        x = x[:, 0]
    elif model.global_pool == "avg":
        x = (x[:, p:] * size[:, p:, None]).sum(1) / (full - p)
    elif model.global_pool == "max":
        x = x[:, p:].amax(1)
    elif model.global_pool == "avgmax":
        x = 0.5 * (x[:, p:].amax(1) + (x[:, p:] * size[:, p:, None]).sum(1) / (full - p))
    else:
        raise NotImplementedError(model.global_pool)
    return model.head(model.fc_norm(x))


def self_test() -> None:
    """r = 0 must be the model itself, tokens must be conserved, and the schedule of DESIGN section 3 must come out."""
    assert schedule((16, -1), 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    keys = F.normalize(torch.randn(21, 8), dim=-1)
    groups = match(keys, 6, 1)
    assert len(groups) == 15
    assert sorted(i for g in groups for i in g) == list(range(21))
    assert all(a[-1] < b[-1] for a, b in pairwise(groups[-10:]))
