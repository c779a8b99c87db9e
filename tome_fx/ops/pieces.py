"""Matchings made of the pieces of a method, and what pieces read: attention, places, side information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from tome_fx.methods.counts import padded_form
from tome_fx.methods.how import from_key as how_from
from tome_fx.methods.how import pick, pick_some
from tome_fx.methods.similarity import blend
from tome_fx.methods.similarity import place_code as code_of
from tome_fx.methods.tokens import Tokens
from tome_fx.ops.index import index_form
from tome_fx.ops.kinds import LEFT_OUT
from tome_fx.ops.library import LIB, opaque
from tome_fx.ops.matchings import match_fake


def _match_pieces_fake(
    metric: Tensor, size: Tensor | None, attention: Tensor | None, place: Tensor | None, seen: Tensor | None, r: int,
    pruned: int, prefix: int, suffix: int, heads: bool, first: bool, how: str, still: Tensor | None = None,
    change: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return match_fake(metric, r, prefix, suffix, heads)


@opaque(
    "match_pieces(Tensor metric, Tensor? size, Tensor? attention, Tensor? place, Tensor? seen, SymInt r, "
    "SymInt pruned, int prefix, int suffix, bool heads, bool first, str how, Tensor? still=None, Tensor? change=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _match_pieces_fake,
    (torch.Tag.cudagraph_unsafe,),  # as `match_by`
)
def match_pieces(
    metric: Tensor, size: Tensor | None, attention: Tensor | None, place: Tensor | None, seen: Tensor | None, r: int,
    pruned: int, prefix: int, suffix: int, heads: bool, first: bool, how: str, still: Tensor | None = None,
    change: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`match` by the pieces of a method (`tome_fx.methods`).

    Args: metric, prefix, suffix, heads as in `match`; size, attention, change float32 `[*sample, N]`, place float32
        `[*sample, N, axes]`, where the pieces read them; seen: bool `[*sample, N]`, False where a mask of keys leaves a
        token out; first: whether these go before all others; still: bool `[*sample, N]`, True for tokens that never
        merge; r: tokens that go, `pruned` of them, the last of `moved`, the least important; how: `How.key`.

    Returns as `match`; the similarity is the matcher's score. New order: prefix, the partition's sources that stay, its
    destinations, where these are the same in all samples, else what stays in position order; suffix.
    """
    with torch.autocast(metric.device.type, enabled=False), torch.no_grad():
        sample = metric.shape[: -3 if heads else -2]
        given = (size, attention, place, seen, still, change)
        source, destination, body, best = picked(metric, given, (r, pruned), (prefix, suffix), (heads, first), how)
        form = index_form(source, destination, body, prefix, suffix)
        return tuple(t.reshape(*sample, t.shape[-1]) for t in (*form, best))


def picked(
    metric: Tensor, given: Sequence[Tensor | None], count: tuple[int, int], ends: tuple[int, int],
    flags: tuple[bool, bool], how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the pieces choose: source and destination int64 `[batch, r]`, the order int64 `[n]` of the tokens that may
    merge, as positions in the whole sequence, and the score. Arguments as `match_pieces`; flags: heads, first."""
    own = how_from(how)
    tokens = tokens_of(metric, given, ends, flags, dict(own.numbers))
    source, destination, best, order = pick(own, tokens, *count)
    prefix = ends[0]
    return source + prefix, destination + prefix, order + prefix, best


def _match_some_fake(
    metric: Tensor, size: Tensor, attention: Tensor | None, place: Tensor | None, seen: Tensor | None, r: int,
    least: int, prefix: int, suffix: int, heads: bool, first: bool, how: str, still: Tensor | None = None,
    change: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assign, _, moved, best = match_fake(metric, r, prefix, suffix, heads)
    return assign, assign.new_empty((*assign.shape[:-1], assign.shape[-1] - least)), moved, best


@opaque(
    "match_some(Tensor metric, Tensor size, Tensor? attention, Tensor? place, Tensor? seen, SymInt r, SymInt least, "
    "int prefix, int suffix, bool heads, bool first, str how, Tensor? still=None, Tensor? change=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _match_some_fake,
    (torch.Tag.cudagraph_unsafe,),  # as `match_by`
)
def match_some(
    metric: Tensor, size: Tensor, attention: Tensor | None, place: Tensor | None, seen: Tensor | None, r: int,
    least: int, prefix: int, suffix: int, heads: bool, first: bool, how: str, still: Tensor | None = None,
    change: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`match_pieces` where of the r pairs found as many merge as the data say, sample by sample (`methods.counts`).

    Args: as `match_pieces`; size: 0 for rows that stand for nothing; least: rows that go in any case, at most r.

    Returns assign, int64 `[*sample, N]`; keep, int64 `[*sample, N - least]`; moved, int64 `[*sample, r]`, of pairs that
    do not merge a token that stays; the score, float32 `[*sample, r]`, inf for such pairs. New order: as
    `match_pieces`, and before the suffix the rows that stand for nothing.
    """
    with torch.autocast(metric.device.type, enabled=False), torch.no_grad():
        sample = metric.shape[: -3 if heads else -2]
        given = (size, attention, place, seen, still, change)
        found = some_picked(metric, given, (r, least), (prefix, suffix), (heads, first), how)
        return tuple(t.reshape(*sample, t.shape[-1]).contiguous() for t in found)


def some_picked(
    metric: Tensor, given: Sequence[Tensor | None], count: tuple[int, int], ends: tuple[int, int],
    flags: tuple[bool, bool], how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `match_some` returns, without sample axes. Arguments as there; flags: heads, first."""
    own, (prefix, suffix), (r, least) = how_from(how), ends, count
    tokens = tokens_of(metric, given, ends, flags, dict(own.numbers))
    live, batch = tokens.size > 0, tokens.metric.shape[0]
    tokens = replace(tokens, live=live if tokens.live is None else live & tokens.live)
    must = least - live.logical_not().sum(-1)
    pairs, score, goes, body = pick_some(own, tokens, r, must)
    n = tokens.count + prefix + suffix
    place = torch.arange(n, device=metric.device)
    order = torch.cat([place.narrow(0, 0, prefix), body + prefix, place.narrow(0, n - suffix, suffix)])
    ones = live.new_ones((batch, 1))
    stands = torch.cat([ones.expand(batch, prefix), live, ones.expand(batch, suffix)], 1)
    form = padded_form((pairs[0] + prefix, pairs[1] + prefix), goes, stands, order, ends, least)
    return *form, score.masked_fill(~goes, torch.inf)


def tokens_of(
    metric: Tensor, given: Sequence[Tensor | None], ends: tuple[int, int], flags: tuple[bool, bool],
    numbers: dict[str, float],
) -> Tokens:  # fmt: skip
    """The tokens that may merge, as pieces read them. given: size, attention, place, what is seen, what never merges
    and how much each changed, where they are known. flags: heads, and whether what is not seen goes first: it is all
    alike then."""
    (heads, first), (prefix, suffix) = flags, ends
    lead = metric.dim() - (3 if heads else 2)
    x = metric.to(torch.float32)
    x = x.mean(-2) if heads else x

    def free(held: Tensor | None) -> Any:
        held = None if held is None else held.reshape(-1, *held.shape[lead:])
        return None if held is None else held.narrow(1, prefix, held.shape[1] - prefix - suffix)

    body, (size, attention, place, seen, still, change) = free(x), map(free, given)
    size = body.new_ones(body.shape[:2]) if size is None else size
    body = body.masked_fill(~seen[..., None], 0.0) if first and seen is not None else body
    live = None if still is None else ~still
    return Tokens(body, prefix, size, attention, place, seen, first, live=live, change=change, numbers=numbers)


def _attention_fake(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, at: int) -> Tensor:
    return q.new_empty((*q.shape[:-2], k.shape[-2]), dtype=torch.float32)


@opaque("attention_paid(Tensor q, Tensor k, Tensor? mask, float? scale, int at) -> Tensor", _attention_fake)
def attention_paid(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, at: int) -> Tensor:
    """What an attention gives to each key: of query `at`, or, at -1, on average over all queries.

    q `[..., h, n, e]`, k `[..., h', m, e]`, h a multiple of h'; mask as SDPA takes it; scale: None is e^-1/2. Returns
    float32 `[..., h, m]`. No gradient.
    """
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if k.dim() > 2 and k.shape[-3] != q.shape[-3]:
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        keys = k.to(torch.float32).transpose(-1, -2)
        total, asks = torch.zeros((), device=q.device), None
        if at < 0 and mask is not None and q.shape[-2] == k.shape[-2]:  # a token that is no key asks for nothing
            own = mask[..., 0, :] if mask.dim() > 1 else mask
            asks = own if own.dtype is torch.bool else own - own.amax(-1, keepdim=True) > LEFT_OUT
            asks = asks.to(torch.float32)
        count = q.shape[-2]
        most = 512 if isinstance(count, int) else count  # a free length is one block: it has no number of them
        for start in (range(0, count, 512) if isinstance(count, int) else [0]) if at < 0 else [at]:
            stop = start + most if at < 0 else at + 1
            scores = (q[..., start:stop, :].to(torch.float32) * scale) @ keys
            if mask is not None:
                own = mask[..., start:stop, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
                scores = scores.masked_fill(~own, -torch.inf) if own.dtype is torch.bool else scores + own.float()
            paid = scores.softmax(-1)
            paid = paid if mask is None else paid.nan_to_num(0.0)  # a query without any key pays nothing
            total = total + (paid if asks is None else paid * asks[..., start:stop, None]).sum(-2)
        if asks is not None:
            return total / asks.sum(-1, keepdim=True).clamp_min(1)
        return total / (q.shape[-2] if at < 0 else 1)


def _grid_fake(
    grid: list[int], before: int, behind: int, frames: int = 0, device: torch.device | None = None
) -> Tensor:
    tokens = prod(grid[:frames]) * (prod(grid[frames:]) + before + behind)
    return torch.empty((tokens, len(grid)), dtype=torch.float32, device=device)


@opaque(
    "grid_places(SymInt[] grid, SymInt before, SymInt behind, int frames=0, *, Device? device=None) -> Tensor",
    _grid_fake,
)
def grid_places(
    grid: list[int], before: int, behind: int, frames: int = 0, device: torch.device | None = None
) -> Tensor:
    """Where tokens that were flattened from a grid stand on it: float32 `[before + prod(grid) + behind, axes]`; zeros
    for the others. frames: how many of the first axes hold tokens before and behind each of their entries."""
    axes = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid), indexing="ij")
    inner = torch.stack(axes, -1).flatten(frames, -2)
    return torch.nn.functional.pad(inner, (0, 0, before, behind)).flatten(0, -2)


@opaque(
    "place_metric(Tensor metric, Tensor code, float alpha, bool heads) -> Tensor",
    lambda metric, code, alpha, heads: code.new_empty((*code.shape[:-1], metric.shape[-1] + code.shape[-1])),
)
def place_metric(metric: Tensor, code: Tensor, alpha: float, heads: bool) -> Tensor:
    """What has the cosine alpha * cos(metric) + (1 - alpha) * cos(code), see `methods.similarity.blend`. metric: as in
    `match`; code: float32 `[*sample, N, c]`. Returns float32 `[*sample, N, d + c]`."""
    with torch.autocast(metric.device.type, enabled=False), torch.no_grad():
        x = metric.to(torch.float32)
        return blend(x.mean(-2) if heads else x, code, alpha)


@opaque(
    "place_code(Tensor place) -> Tensor", lambda place: place.new_empty((*place.shape[:-1], place.shape[-1] * 32))
)
def place_code(place: Tensor) -> Tensor:
    """`methods.similarity.place_code`: `[..., axes]` -> float32 `[..., axes * 32]`."""
    return code_of(place)


@opaque(
    "side_code(Tensor side, float levels) -> Tensor",
    lambda side, levels: side.new_empty((*side.shape, 32), dtype=torch.float32),
)
def side_code(side: Tensor, levels: float) -> Tensor:
    """The code of a number that the caller gives for each token, in whole levels as ToSA (arXiv 2506.20066) has depth:
    `[batch, n]` between 0 and 1 -> float32 `[batch, n, 32]`."""
    level = (side.to(torch.float32) * levels).floor().clamp(0, levels - 1)
    return code_of(level.unsqueeze(-1))


@opaque("with_side(Tensor x, Tensor side) -> Tensor", lambda x, side: torch.empty_like(x))
def with_side(x: Tensor, side: Tensor) -> Tensor:
    """x itself, a copy; says that `side` belongs to the tokens that are made of it. See `tome_fx.WithSide`."""
    return x.clone()


def _with_side_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None


torch.library.register_autograd("tome::with_side", _with_side_backward, lib=LIB)
