"""similarity: how alike tokens are, float32 `[batch, n, m]` of those at positions i `[1 or batch, n]` and j."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_fx import matching

from .tokens import Tokens, piece, taken


@piece("similarity", "cosine")
def cosine(tokens: Tokens, i: Tensor, j: Tensor) -> Tensor:
    """Cosine of the angle (ToMe, arXiv 2210.09461, table 1); 1 between zeros."""
    return matching.cosine(taken(tokens.metric, i), taken(tokens.metric, j))


@piece("similarity", "dot")
def dot(tokens: Tokens, i: Tensor, j: Tensor) -> Tensor:
    """Dot product (table 1)."""
    return matching.dot(taken(tokens.metric, i), taken(tokens.metric, j))


@piece("similarity", "joined", scored=True)
def joined(tokens: Tokens, i: Tensor, j: Tensor) -> Tensor:
    """MCTF's edge (arXiv 2403.10030, equation 6): similarity (cos + 1) / 2, times little information and small size of
    both ends. Information is the importance, and it and size count as their least in the sample over their own: between
    0 and 1. The exponents are the numbers `similarity_weight`, `information_weight` and `size_weight`. How the two ends
    are joined was not verified: here their product."""
    alike = ((cosine(tokens, i, j) + 1) / 2) ** tokens.numbers["similarity_weight"]
    light = torch.ones_like(tokens.size)
    for value, name in ((tokens.scores(), "information_weight"), (tokens.size, "size_weight")):
        value = value.clamp_min(1e-12)
        value = value if tokens.live is None else value.masked_fill(~tokens.live, torch.inf)
        light = light * (value.amin(-1, keepdim=True) / value) ** tokens.numbers[name]
    return alike * taken(light, i)[:, :, None] * taken(light, j)[:, None]


def place_code(place: Tensor, frequencies: int = 16) -> Tensor:
    """Sine and cosine of each coordinate at frequencies 10000^(-i / 16): `[..., axes]` -> float32 `[..., axes * 32]`
    (ToSA, arXiv 2506.20066, section 3.2, which does not say how many; the usual code of transformers)."""
    steps = torch.arange(frequencies, device=place.device, dtype=torch.float32)
    angles = place.to(torch.float32)[..., None] * 10000 ** (-steps / frequencies)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def blend(metric: Tensor, code: Tensor, alpha: float) -> Tensor:
    """What has the cosine alpha * cos(metric) + (1 - alpha) * cos(code) (ToSA, equation 3): unit vectors side by side,
    by the roots of their weights. `[..., d]`, `[..., c]` -> float32 `[..., d + c]`."""
    units = (x / x.norm(dim=-1, keepdim=True).clamp_min(matching.SMALLEST_NORM) for x in (metric, code))
    weights = (alpha**0.5, (1 - alpha) ** 0.5)
    return torch.cat([unit.to(torch.float32) * weight for unit, weight in zip(units, weights, strict=True)], -1)
