"""Tokens of kinds that do not mix: what a mask leaves out, special places, parts; and who leads a group."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_fx import matching
from tome_fx.kernels import cpu
from tome_fx.ops.library import opaque, spelled_out

_APART = 2.0
LEFT_OUT = -50.0
"""A float mask this low leaves a token out: exp(-50) is nothing beside 1."""
# A masked token weighs this much: nothing beside any other, and a group of masked tokens still has a mean.
_NOTHING = 2.0**-40


def key_weight(mask: Tensor) -> Tensor:
    """A token's weight in a merge, 1 or 2^-40, by a mask of keys: bool (True: seen), or float (0 or below -50)."""
    seen = mask if mask.dtype is torch.bool else mask > LEFT_OUT
    return torch.where(seen, 1.0, _NOTHING).to(torch.float32)


def key_kinds(weight: Tensor) -> Tensor:
    """`[*sample, N]` -> `[*sample, N, 2]`: (1, 0) where a token, or any in its group, is seen, else (0, 1)."""
    seen = weight > 0.5
    return torch.stack([seen, seen.logical_not()], -1).to(torch.float32)


@opaque(
    "places(int[] positions, SymInt length, *, Device device) -> Tensor",
    lambda positions, length, device: torch.empty(length, dtype=torch.bool, device=device),
)
def places(positions: list[int], length: int, device: torch.device) -> Tensor:
    """bool `[length]`: True at these positions."""
    marked = torch.zeros(length, dtype=torch.bool)
    marked[list(positions)] = True
    return marked.to(device)


def place_kinds(special: Tensor) -> Tensor:
    """bool `[*sample, N]` -> `[*sample, N, 3]`: (1, 0, 0) where a token may merge; unlike these and unlike each other
    the special ones at even places, where sources stand, and at odd ones, where destinations do."""
    even = torch.arange(special.shape[-1], device=special.device) % 2 == 0
    return torch.stack([special.logical_not(), special & even, special & even.logical_not()], -1).to(torch.float32)


def part_labels(mask: Tensor) -> Tensor:
    """A mask of pairs `[*sample, N, N]` that parts the tokens -> int64 `[*sample, N]`: the first token of the part."""
    seen = mask if mask.dtype is torch.bool else mask > LEFT_OUT
    return seen.to(torch.uint8).argmax(-1)


def apart(metric: Tensor, kinds: Tensor, heads: bool, first: bool, similarity: str = "cosine") -> Tensor:
    """A metric by which tokens of one kind are always more similar than tokens of two, and else as before.

    metric: as in `match`. kinds: `[*sample, N, k]`, equal unit vectors within a kind, orthogonal ones between kinds.
    first: tokens whose first entry of `kinds` is 0 are all alike, and more alike than any others. similarity: what the
    result is compared by. Returns float32 `[*sample, N, d + 1 + k]`.
    """
    x = metric.to(torch.float32)
    x = x.sum(-2) if heads else x
    norm = x.norm(dim=-1, keepdim=True)
    if similarity == "dot":  # one factor for all of a sample keeps the order of its products
        norm = norm.amax(-2, keepdim=True)
        kinds = kinds * (2 - kinds[..., :1]) if first else kinds
    # Zeros have no direction, but are as alike as tokens can be.
    x = torch.cat([x / norm.clamp_min(matching.SMALLEST_NORM), (norm == 0).expand_as(x[..., :1]).to(x.dtype)], -1)
    x = x * kinds[..., :1] if first else x
    return torch.cat([x, _APART * kinds], -1)


def seen_first(weight: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """`keep` and `moved` with the first seen token of a group in the place of a representative that a mask leaves out.

    weight: float32 `[*sample, N]` as `key_weight` and `merge_size` give it. Groups without a seen one stay as they are.
    """
    dim = assign.dim() - 1
    slot = assign.gather(dim, moved)
    rank = torch.arange(moved.shape[-1], device=moved.device).expand_as(moved)
    hidden = weight.gather(dim, keep) <= 0.5
    r, places = moved.shape[-1], keep.shape[-1]
    offered = torch.where((weight.gather(dim, moved) > 0.5) & hidden.gather(dim, slot), r - rank, 0)
    # By the greatest, as `merge_bias_aten` does: a runtime must know one reduction.
    chosen = r - torch.zeros_like(keep).scatter_reduce(dim, slot, offered, "amax")
    own = torch.arange(places, device=keep.device) + r
    lead = torch.cat([moved, keep], dim).gather(dim, torch.where(chosen < r, chosen, own))
    return lead, torch.where(chosen.gather(dim, slot) == rank, keep.gather(dim, slot), moved)


spelled_out("key_weight(Tensor mask) -> Tensor", key_weight)
spelled_out("key_kinds(Tensor weight) -> Tensor", key_kinds)
spelled_out("place_kinds(Tensor special) -> Tensor", place_kinds)
spelled_out("part_labels(Tensor mask) -> Tensor", part_labels)
spelled_out('apart(Tensor metric, Tensor kinds, bool heads, bool first, str similarity="cosine") -> Tensor', apart)
spelled_out(f"seen_first(Tensor weight, {cpu.INDEX}) -> (Tensor, Tensor)", seen_first)
