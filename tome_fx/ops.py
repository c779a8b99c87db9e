"""The `tome` operators: match, merge and unmerge along a token axis.

All three share one index form. For a token axis of N tokens that a merge shortens to N' = N - r:

- `assign` int64 `[*sample, N]`, values in [0, N'): the new position of every old token,
- `keep` int64 `[*sample, N']`: the old position of each new token's representative,
- `moved` int64 `[*sample, r]`: the old positions of the tokens that were merged away, most similar first.

`keep` and `moved` follow from `assign`, but carrying them lets a merge touch r rows instead of N.
`*sample` are the leading axes along which each entry is merged on its own (batch, frame, window).

Which form is fastest depends on the device, and the pass `lower` chooses. `match`, `merge`, `merge_bias`, `merge_size`,
`log_size` and `unmerge` are opaque to the compiler: on a CPU each length of the token axis would give Inductor another
five kernels per layer to compile, and a training step gathers rows faster by itself than in the loops of norms and of
their gradients. `*_aten` are the same functions spelled out, for where fusing pays.

`match_by` is `match` with the choices that are not the paper's: their functions are in `tome_fx.matching`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from tome_fx import matching
from tome_fx.kernels import cpu
from tome_fx.methods.counts import padded_form
from tome_fx.methods.how import from_key as how_from
from tome_fx.methods.how import pick, pick_some
from tome_fx.methods.similarity import blend
from tome_fx.methods.similarity import place_code as code_of
from tome_fx.methods.tokens import Tokens

_LIB = torch.library.Library("tome", "DEF")
_CPU = cpu.define(cpu.NAMESPACE)


def _opaque(
    schema: str, fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator that the compiler calls and does not look into.

    A plain registration: `torch.library.custom_op` would add its own checks to each call, a tenth of a millisecond.
    """

    def wrap(kernel: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIB.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tome::{name}", fake, lib=_LIB)
        if name in cpu.SCHEMAS:  # compiled code out of a cache may meet no kernels
            _CPU.impl(name, kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{cpu.NAMESPACE}::{name}", fake, lib=_CPU)
        return kernel

    return wrap


# -- match -------------------------------------------------------------------------------------------------------------


def _match_fake(
    metric: Tensor, r: int, prefix: int, suffix: int, heads: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *sample, n, _ = metric.shape[:-1] if heads else metric.shape
    index = metric.new_empty((*sample, n), dtype=torch.int64)
    return (
        index,
        index.new_empty((*sample, n - r)),
        index.new_empty((*sample, r)),
        metric.new_empty((*sample, r), dtype=torch.float32),
    )


@_opaque(
    "match(Tensor metric, SymInt r, int prefix, int suffix, bool heads=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _match_fake,
)
def match(
    metric: Tensor, r: int, prefix: int, suffix: int, heads: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3 and appendix D).

    Tokens at even positions are sources, at odd positions destinations; the first `prefix` and last `suffix`
    tokens are neither. Each source picks the destination of highest cosine similarity, and the `r` most similar
    sources are merged. New order: prefix, surviving sources, destinations, suffix, each in position order.

    Args:
        metric: `[*sample, N, d]`, any floating dtype; compared in float32. With `heads`, `[*sample, N, h, d]`, of which
            the mean over h is taken first (section 3, "Token Similarity").
        r: number of tokens to merge away, at most (N - prefix - suffix) // 2.
        prefix, suffix: protected tokens at either end.

    Returns:
        `(assign, keep, moved, similarity)`, see the module docstring; `similarity` is float32 `[*sample, r]`,
        the cosine of each merged pair. None of them carries a gradient.

    Raises: ValueError where r, prefix or suffix is out of range, or (all operators here) where shapes do not fit.
    """
    if torch.is_autocast_enabled(metric.device.type):
        with torch.autocast(metric.device.type, enabled=False):
            return match(metric, r, prefix, suffix, heads)
    with torch.no_grad():
        return _match(metric, None, r, prefix, suffix, heads)[:4]  # type: ignore[return-value]


def _native(x: Tensor, dtype: torch.dtype | None = None) -> Any | None:
    """The compiled kernels, where they can work on the device of `x` and in a dtype (that of `x`)."""
    return cpu.library() if x.device.type == "cpu" and (dtype or x.dtype) in cpu.DTYPES else None


def _match(metric: Tensor, size: Tensor | None, r: int, prefix: int, suffix: int, heads: bool) -> tuple[Tensor, ...]:
    """`match_size`; from the ATen form the first four results only."""
    if (kernels := _native(metric)) is not None:
        return kernels.match_size(metric, size, r, prefix, suffix, heads)
    sample = metric.shape[: -3 if heads else -2]
    metric = metric if heads else metric.unsqueeze(-2)
    if not (r >= 0 and prefix >= 0 and suffix >= 0 and 2 * r <= metric.shape[-3] - prefix - suffix):
        raise ValueError("r must be 0 to (N - prefix - suffix) // 2")
    if size is not None:
        _must_begin("size", size, (*sample, metric.shape[-3]), size.dim())
    found = match_aten(metric.reshape(-1, *metric.shape[-3:]), r, prefix, suffix)
    return tuple(x.reshape(*sample, x.shape[-1]) for x in found)


def directions(metric: Tensor, prefix: int, suffix: int) -> Tensor:
    """`[batch, N, h, d]` -> float32 `[batch, N - prefix - suffix, d]`: the unit vectors that `match` compares."""
    # A sum has the direction of the mean.
    body = metric[:, prefix : metric.shape[1] - suffix].sum(-2, dtype=torch.float32)
    return body / body.norm(dim=-1, keepdim=True).clamp_min(matching.SMALLEST_NORM)


def best_partner_aten(unit: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Cosine and rank of each source's best destination; sources are the rows `first`, `first` + 2, ... of `unit`."""
    return matching.best_of(unit[:, first::2], unit[:, 1 - first :: 2], _product)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`matching.dot` as one bmm, which torch.export guards on least."""
    return torch.bmm(a, b.transpose(1, 2))


def pair_nulls(unit: Tensor, first: int, best: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """What `best_partner_aten` gives, with the zeros among the sources given to a zero: they have no direction, but are
    as alike as tokens can be."""
    null = (unit == 0).all(-1)
    sources, destinations = null[:, first::2], null[:, 1 - first :: 2]
    pairs = sources & destinations.any(-1, keepdim=True)
    place = destinations.to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(pairs, 1.0, best), torch.where(pairs, place, partner)


def match_aten(metric: Tensor, r: int, prefix: int, suffix: int) -> tuple[Tensor, ...]:
    """`match` on `[batch, N, h, d]`, spelled out."""
    n = metric.shape[1]
    unit, first = directions(metric, prefix, suffix), prefix % 2
    best, partner = pair_nulls(unit, first, *best_partner_aten(unit, first))
    similarity, moved_src = best.topk(r, dim=-1)
    return *_alternating_form(moved_src, partner, n, prefix, suffix), similarity


def _alternating_form(moved_src: Tensor, partner: Tensor, n: int, prefix: int, suffix: int) -> tuple[Tensor, ...]:
    """assign, keep and moved of N tokens whose even ones are sources. moved_src: `[batch, r]`, ranks of the sources
    that merge. partner: `[batch, sources]`, the rank of the destination of each."""
    (batch, r), device = moved_src.shape, moved_src.device
    places = torch.arange(n, device=device)
    src_pos, dst_pos = (places[prefix : n - suffix][odd::2] for odd in (prefix % 2, 1 - prefix % 2))
    # Merged sources sort behind all others, so the first entries are the survivors in position order.
    survivors = len(src_pos) - r
    ranks = torch.arange(len(src_pos), device=device).expand(batch, -1)
    order = ranks.scatter(1, moved_src, len(src_pos)).sort(-1).values[:, :survivors]
    head, rest = places[:prefix].expand(batch, -1), torch.cat([dst_pos, places[n - suffix :]]).expand(batch, -1)
    keep = torch.cat([head, src_pos[order], rest], 1)
    moved = src_pos[moved_src]
    assign = torch.empty((batch, n), dtype=torch.int64, device=device)
    assign.scatter_(1, keep, places[: n - r].expand(batch, -1))
    assign.scatter_(1, moved, partner.gather(1, moved_src) + (prefix + survivors))
    return assign, keep, moved


def _match_parts_fake(
    metric: Tensor, parts: Tensor, r: int, prefix: int, suffix: int, heads: bool, even: bool, similarity: str = "cosine"
) -> tuple[Tensor, ...]:
    return _match_fake(metric, r, prefix, suffix, heads)


@_opaque(
    "match_parts(Tensor metric, Tensor parts, SymInt r, int prefix, int suffix, bool heads, bool even, "
    "str similarity='cosine')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _match_parts_fake,
)
def match_parts(
    metric: Tensor, parts: Tensor, r: int, prefix: int, suffix: int, heads: bool, even: bool, similarity: str = "cosine"
) -> tuple[Tensor, ...]:
    """`match` where only tokens of one part merge, and each part has a count of its own.

    How many of the r a part gives follows from how many of its sources have a partner in it, and never from what its
    tokens or another part's are: a part is a sample of its own.

    parts: int64 `[*sample, N]`, the same number for all tokens of a part. even: all parts give as many, as far as they
    have them; else the same share. The others, and what it returns, as `match`; r is at most the number of sources with
    a partner.
    """
    with torch.autocast(metric.device.type, enabled=False), torch.no_grad():
        sample, n = metric.shape[: -3 if heads else -2], parts.shape[-1]
        x = metric.to(torch.float32)
        x = x.mean(-2) if heads else x
        x = x.reshape(-1, *x.shape[-2:])[:, prefix : n - suffix]
        label = parts.reshape(-1, n)[:, prefix : n - suffix]
        first = prefix % 2
        alike = matching.SIMILARITIES[similarity](x[:, first::2], x[:, 1 - first :: 2])
        own = label[:, first::2]
        best, partner = alike.masked_fill(own[:, :, None] != label[:, None, 1 - first :: 2], -torch.inf).max(-1)
        chosen = shared_out(best, own, r, even)
        moved_src = chosen.gather(1, best.gather(1, chosen).sort(stable=True, dim=-1, descending=True).indices)
        found = (*_alternating_form(moved_src, partner, n, prefix, suffix), best.gather(1, moved_src))
        return tuple(t.reshape(*sample, t.shape[-1]) for t in found)


def shared_out(best: Tensor, own: Tensor, r: int, even: bool) -> Tensor:
    """`[batch, r]`: the sources that merge: of each part the best, as many as its share. best, own: `[batch, S]`, -inf
    where a source has no partner, and its part."""
    place = torch.arange(best.shape[1], device=best.device)
    paired = best > -torch.inf
    same = (own[:, :, None] == own[:, None]) & paired[:, None]
    before = (best[:, None] > best[:, :, None]) | ((best[:, None] == best[:, :, None]) & (place < place[:, None]))
    rank, count = (same & before).sum(-1), same.sum(-1).clamp_min(1)
    # Parts of one size meet at the same share: their numbers settle it, nothing that stands in them.
    share = rank.double() if even else (rank + 0.5) / count.double()
    turn = share + own.double() * (1e-12 / max(best.shape[1], 1))
    return turn.masked_fill(~paired, torch.inf).topk(r, largest=False).indices


# -- other matchings ---------------------------------------------------------------------------------------------------


def _match_by_fake(
    metric: Tensor,
    r: int,
    prefix: int,
    suffix: int,
    heads: bool,
    matcher: str,
    partition: str,
    similarity: str,
) -> tuple[Tensor, ...]:
    return _match_fake(metric, r, prefix, suffix, heads)


@_opaque(
    "match_by(Tensor metric, SymInt r, int prefix, int suffix, bool heads, str matcher, str partition, str similarity)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _match_by_fake,
    (torch.Tag.cudagraph_unsafe,),  # a registered matcher may do anything, and what it returns is read to be checked
)
def match_by(
    metric: Tensor, r: int, prefix: int, suffix: int, heads: bool, matcher: str, partition: str, similarity: str
) -> tuple[Tensor, ...]:
    """`match` by a matcher, partition and similarity of `tome_fx.matching`, looked up by name in each call.

    New order: prefix, what is left of the partition's sources, its destinations, suffix, each in position order. So
    ("bipartite", "alternating", "cosine") is `match` itself.

    Args, returns: as in `match`; the similarity is the matcher's. Raises ValueError as `matching.pairs`.
    """
    with torch.autocast(metric.device.type, enabled=False), torch.no_grad():
        sample = metric.shape[: -3 if heads else -2]
        x = metric.to(torch.float32)
        x = x.mean(-2) if heads else x
        x = x.reshape(-1, *x.shape[-2:])[:, prefix : x.shape[-2] - suffix]
        source, destination, best, sides = matching.pairs(x, r, prefix, matcher, partition, similarity)
        found = (*_index_form(source + prefix, destination + prefix, sides + prefix, prefix, suffix), best)
        return tuple(t.reshape(*sample, t.shape[-1]) for t in found)


def _index_form(
    source: Tensor, destination: Tensor, body: Tensor, prefix: int, suffix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """assign, keep and moved of pairs `[batch, r]`. body: the positions that may merge, in their new order."""
    batch, r = source.shape
    n = prefix + len(body) + suffix
    places = torch.arange(n, device=body.device)
    order = torch.cat([places[:prefix], body, places[n - suffix :]]).expand(batch, -1)
    stays = torch.ones((batch, n), dtype=torch.bool, device=body.device).scatter_(1, source, False).gather(1, order)
    slot = stays.cumsum(1) - 1
    # What goes is written behind the end.
    spot = torch.where(stays, slot, n - r)
    keep = order.new_empty((batch, n - r + 1)).scatter_(1, spot, order)[:, : n - r].contiguous()
    assign = order.new_empty((batch, n)).scatter_(1, order, slot)
    return assign.scatter_(1, source, assign.gather(1, destination)), keep, source


# -- matchings made of pieces ------------------------------------------------------------------------------------------


def _match_pieces_fake(
    metric: Tensor, size: Tensor | None, attention: Tensor | None, place: Tensor | None, seen: Tensor | None, r: int,
    pruned: int, prefix: int, suffix: int, heads: bool, first: bool, how: str, still: Tensor | None = None,
    change: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _match_fake(metric, r, prefix, suffix, heads)


@_opaque(
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
        form = _index_form(source, destination, body, prefix, suffix)
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
    assign, _, moved, best = _match_fake(metric, r, prefix, suffix, heads)
    return assign, assign.new_empty((*assign.shape[:-1], assign.shape[-1] - least)), moved, best


@_opaque(
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


@_opaque("attention_paid(Tensor q, Tensor k, Tensor? mask, float? scale, int at) -> Tensor", _attention_fake)
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
        rows = range(0, q.shape[-2], 512) if at < 0 else [at]
        for start in rows:
            stop = start + 512 if at < 0 else at + 1
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


@_opaque(
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


@_opaque(
    "place_metric(Tensor metric, Tensor code, float alpha, bool heads) -> Tensor",
    lambda metric, code, alpha, heads: code.new_empty((*code.shape[:-1], metric.shape[-1] + code.shape[-1])),
)
def place_metric(metric: Tensor, code: Tensor, alpha: float, heads: bool) -> Tensor:
    """What has the cosine alpha * cos(metric) + (1 - alpha) * cos(code), see `methods.similarity.blend`. metric: as in
    `match`; code: float32 `[*sample, N, c]`. Returns float32 `[*sample, N, d + c]`."""
    with torch.autocast(metric.device.type, enabled=False), torch.no_grad():
        x = metric.to(torch.float32)
        return blend(x.mean(-2) if heads else x, code, alpha)


@_opaque(
    "place_code(Tensor place) -> Tensor", lambda place: place.new_empty((*place.shape[:-1], place.shape[-1] * 32))
)
def place_code(place: Tensor) -> Tensor:
    """`methods.similarity.place_code`: `[..., axes]` -> float32 `[..., axes * 32]`."""
    return code_of(place)


@_opaque(
    "side_code(Tensor side, float levels) -> Tensor",
    lambda side, levels: side.new_empty((*side.shape, 32), dtype=torch.float32),
)
def side_code(side: Tensor, levels: float) -> Tensor:
    """The code of a number that the caller gives for each token, in whole levels as ToSA (arXiv 2506.20066) has depth:
    `[batch, n]` between 0 and 1 -> float32 `[batch, n, 32]`."""
    level = (side.to(torch.float32) * levels).floor().clamp(0, levels - 1)
    return code_of(level.unsqueeze(-1))


@_opaque("with_side(Tensor x, Tensor side) -> Tensor", lambda x, side: torch.empty_like(x))
def with_side(x: Tensor, side: Tensor) -> Tensor:
    """x itself, a copy; says that `side` belongs to the tokens that are made of it. See `tome_fx.WithSide`."""
    return x.clone()


def _with_side_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None


torch.library.register_autograd("tome::with_side", _with_side_backward, lib=_LIB)


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


# -- index forms -------------------------------------------------------------------------------------------------------


def _index(index: Tensor, like: Tensor) -> Tensor:
    """`[*sample, n]` -> `[*sample, n, *rest]`, the form `gather` wants for `like` `[*sample, N, *rest]`."""
    rest = like.shape[index.dim() :]
    return index.reshape(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)


def _column(size: Tensor, like: Tensor) -> Tensor:
    return size.reshape(*size.shape, *(1 for _ in range(like.dim() - size.dim())))


def check_shapes(
    size: Tensor | None, size_out: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor, **rows: Tensor
) -> None:
    """Raise ValueError unless all fit one matching, as the C++ kernels do; for the forms that have no such check.

    rows: by name, x and y `[*sample, N, *rest]` or grad `[*sample, N', *rest]`.
    """
    lead, n, r = assign.shape[:-1], assign.shape[-1], moved.shape[-1]
    after = min(max(keep.shape[-1], n - r), n)
    _must_begin("moved", moved, (*lead, r), moved.dim())
    _must_begin("keep", keep, (*lead, after), keep.dim())
    for name, x, length in (("size", size, n), ("size_out", size_out, after)):
        if x is not None:
            _must_begin(name, x, (*lead, length), x.dim())
    for name, x in rows.items():
        _must_begin(name, x, (*lead, after if name == "grad" else n), assign.dim())


def _must_begin(name: str, x: Tensor, shape: tuple[int, ...], dims: int) -> None:
    if x.shape[:dims] != shape:
        raise ValueError(f"{name} must be {list(shape)} to fit the sample axes and tokens of the others, "
                         f"and is {list(x.shape)}")  # fmt: skip


# -- merge -------------------------------------------------------------------------------------------------------------


def merge_aten(
    x: Tensor,
    size: Tensor | None,
    size_out: Tensor,
    assign: Tensor,
    keep: Tensor,
    moved: Tensor,
    rows: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """`merge`, spelled out. rows: how rows of x are read by an index."""
    rows = rows or unmerge_aten
    dim = assign.dim() - 1
    slot = assign.gather(dim, moved)
    wide = torch.promote_types(x.dtype, torch.float32)
    share = size_out.gather(dim, slot).to(wide)
    share = share.reciprocal() if size is None else size.gather(dim, moved).to(wide) / share
    out = rows(x, keep).to(wide)
    joining = rows(x, moved).to(wide) - rows(out, slot)
    return out.scatter_add(dim, _index(slot, x), joining * _column(share, x)).to(x.dtype)


def _merge_fake(
    x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    return x.new_empty((*keep.shape, *x.shape[assign.dim() :]))


@_opaque("merge" + cpu.SCHEMAS["merge"], _merge_fake)
def merge(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Size-weighted mean of each group: sum(x * size) / sum(size) (ToMe section 3, "Tracking Token Size").

    Computed as x_k + sum((x_i - x_k) * size_i) / sum(size) over the tokens i that join a representative k: rows that
    nothing joins are copied as they are, and equal tokens merge without rounding.

    Args:
        x: `[*sample, N, *rest]`, floating.
        size: float32 `[*sample, N]`, original tokens behind each token; None when all are 1.
        size_out: float32 `[*sample, N']` from `merge_size`.

    Returns: `[*sample, N', *rest]`, the dtype of `x`, contiguous; the sums run in float32 at least.
    """
    if (kernels := _native(x)) is not None:
        return kernels.merge(x, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, x=x)
    return merge_aten(x, size, size_out, assign, keep, moved)


def merge_backward_aten(
    grad: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`merge_backward`, spelled out."""
    back = unmerge_aten(grad / _column(size_out, grad).to(grad.dtype), assign)
    return back if size is None else back * _column(size, back).to(back.dtype)


def _merge_backward_fake(
    grad: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    return _unmerge_fake(grad, assign)


@_opaque("merge_backward" + cpu.SCHEMAS["merge_backward"], _merge_backward_fake)
def merge_backward(
    grad: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """d sum(x * size) / size_out: each old token gets its share of its group's gradient. The adjoint of `merge`.

    grad: `[*sample, N', *rest]`, floating; the others as in `merge`. Returns `[*sample, N, *rest]` in the same dtype.
    """
    if (kernels := _native(grad)) is not None:
        return kernels.merge_backward(grad, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, grad=grad)
    return merge_backward_aten(grad, size, size_out, assign, keep, moved)


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    form = torch.ops.tome.merge_backward if grad.device.type == "cpu" else merge_backward_aten
    return form(grad, *ctx.saved_tensors), None, None, None, None, None


def _merge_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _merge_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tome.merge(grad, *ctx.saved_tensors), None, None, None, None, None


torch.library.register_autograd("tome::merge_backward", _merge_backward_backward, setup_context=_merge_setup, lib=_LIB)
torch.library.register_autograd("tome::merge", _merge_backward, setup_context=_merge_setup, lib=_LIB)


def merge_size_aten(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`merge_size`, spelled out."""
    size = torch.ones(assign.shape, dtype=torch.float32, device=assign.device) if size is None else size
    return size.gather(-1, keep).scatter_add(-1, assign.gather(-1, moved), size.gather(-1, moved))


def _merge_size_fake(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    return keep.new_empty(keep.shape, dtype=torch.float32)


@_opaque("merge_size" + cpu.SCHEMAS["merge_size"], _merge_size_fake)
def merge_size(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Original tokens behind each new token: float32 `[*sample, N']`. size: as in `merge`. No gradient."""
    if (kernels := _native(assign, torch.float32)) is not None:
        return kernels.merge_size(size, assign, keep, moved)
    check_shapes(size, None, assign, keep, moved)
    return merge_size_aten(size, assign, keep, moved)


@_opaque("log_size(Tensor size) -> Tensor", torch.empty_like)
def log_size(size: Tensor) -> Tensor:
    """log(size), the term of proportional attention (ToMe equation 1): float32, the shape of `size`. No gradient."""
    return size.log()


# -- merge_bias --------------------------------------------------------------------------------------------------------


def merge_bias_aten(
    x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`merge_bias`, spelled out."""
    dim = assign.dim() - 1
    wide, index = x.to(torch.promote_types(x.dtype, torch.float32)), _index(assign, x)
    shape = (*size_out.shape, *x.shape[dim + 1 :])
    lowest = torch.finfo(torch.float32).min
    top = wide.detach().new_full(shape, lowest).scatter_reduce(dim, index, wide.detach(), "amax")
    weight = (wide - top.gather(dim, index)).exp()
    if size is not None:
        weight = weight * _column(size, x)
    total = weight.new_zeros(shape).scatter_add(dim, index, weight)
    seen = total > 0
    mean = torch.where(seen, total / _column(size_out, x), 1.0)  # log(0) would have no gradient
    found = (mean.log() + top).clamp(min=lowest)
    return torch.where(seen, found, -torch.inf).to(x.dtype)


@_opaque("merge_bias" + cpu.SCHEMAS["merge_bias"], _merge_fake)
def merge_bias(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Size-weighted log-mean-exp of an additive score term over each group; exact when the group's scores are equal.

    Each group is taken relative to its own maximum. A group that is masked out whole stays so: -inf, with a gradient of
    zero.

    Args: as in `merge`; `x` `[*sample, N, *rest]`, floating, may hold -inf.
    Returns: `[*sample, N', *rest]`, the dtype of `x`; computed in float32 at least.
    """
    if (kernels := _native(x)) is not None:
        return kernels.merge_bias(x, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, x=x)
    return merge_bias_aten(x, size, size_out, assign, keep, moved)


def _merge_bias_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d log(sum(size * exp(x)) / size_out): each old term gets its share of its group's sum."""
    x, out, size, size_out, assign = ctx.saved_tensors
    whole = unmerge_aten(out.float(), assign).clamp(min=torch.finfo(torch.float32).min)  # -inf less -inf is no number
    share = (x.float() - whole).exp() / _column(unmerge_aten(size_out, assign), x)
    share = share if size is None else share * _column(size, x)
    return (unmerge_aten(grad, assign) * share).to(x.dtype), None, None, None, None, None


def _merge_bias_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, size, size_out, assign, _, _ = inputs
    ctx.save_for_backward(x, output, size, size_out, assign)


torch.library.register_autograd("tome::merge_bias", _merge_bias_backward, setup_context=_merge_bias_setup, lib=_LIB)


# -- unmerge -----------------------------------------------------------------------------------------------------------


def unmerge_aten(x: Tensor, index: Tensor) -> Tensor:
    """`unmerge`, spelled out."""
    return x.gather(index.dim() - 1, _index(index, x))


def _unmerge_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, *x.shape[index.dim() :]))


@_opaque("unmerge" + cpu.SCHEMAS["unmerge"], _unmerge_fake)
def unmerge(x: Tensor, index: Tensor) -> Tensor:
    """Give every original token the value of its group.

    x: `[*sample, N', *rest]`, any dtype. index: int64 `[*sample, N]`, values in [0, N'). Returns `[*sample, N, *rest]`.
    Raises IndexError or, from the ATen form, RuntimeError for other values.
    """
    if x.device.type == "cpu" and (kernels := cpu.library()) is not None:
        return kernels.unmerge(x, index)
    _must_begin("x", x, tuple(index.shape[:-1]), index.dim() - 1)
    return unmerge_aten(x, index)


def unmerge_backward_aten(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    """`unmerge_backward`, spelled out."""
    dim = index.dim() - 1
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    out = wide.new_zeros((*index.shape[:dim], groups, *grad.shape[dim + 1 :]))
    return out.scatter_add(dim, _index(index, grad), wide).to(grad.dtype)


def _unmerge_backward_fake(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    return grad.new_empty((*index.shape[:-1], groups, *grad.shape[index.dim() :]))


@_opaque("unmerge_backward" + cpu.SCHEMAS["unmerge_backward"], _unmerge_backward_fake)
def unmerge_backward(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    """The sum of each group, in float32 at least: the adjoint of `unmerge`.

    grad: `[*sample, N, *rest]`, floating. index: as in `unmerge`. groups: N'. Returns `[*sample, N', *rest]`.
    """
    if (kernels := _native(grad)) is not None:
        return kernels.unmerge_backward(grad, index, groups)
    _must_begin("grad", grad, tuple(index.shape), index.dim())
    return unmerge_backward_aten(grad, index, groups)


def _unmerge_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.groups = x.shape[index.dim() - 1]


def _unmerge_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return torch.ops.tome.unmerge_backward(grad, index, ctx.groups), None


def _unmerge_backward_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _unmerge_backward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tome.unmerge(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("tome::unmerge", _unmerge_gradient, setup_context=_unmerge_setup, lib=_LIB)
torch.library.register_autograd(
    "tome::unmerge_backward", _unmerge_backward_gradient, setup_context=_unmerge_backward_setup, lib=_LIB
)

# -- fused forms -------------------------------------------------------------------------------------------------------
#
# Where calls are opaque, each costs its dispatch and a pass over memory: `lower` puts these in the place of several.


def _match_size_fake(
    metric: Tensor, size: Tensor | None, r: int, prefix: int, suffix: int, heads: bool = False
) -> tuple[Tensor, ...]:
    found = _match_fake(metric, r, prefix, suffix, heads)
    sizes = [found[1].new_empty(found[1].shape, dtype=torch.float32) for _ in range(2)]
    return (*found, *sizes)


@_opaque("match_size" + cpu.SCHEMAS["match_size"], _match_size_fake)
def match_size(
    metric: Tensor, size: Tensor | None, r: int, prefix: int, suffix: int, heads: bool = False
) -> tuple[Tensor, ...]:
    """`match`, `merge_size` and `log_size` in one call: what `match` returns, then the two others' results."""
    if torch.is_autocast_enabled(metric.device.type):
        with torch.autocast(metric.device.type, enabled=False):
            return match_size(metric, size, r, prefix, suffix, heads)
    with torch.no_grad():
        found = _match(metric, size, r, prefix, suffix, heads)
        if len(found) == 4:
            size_out = merge_size(size, *found[:3])
            return (*found, size_out, size_out.log())
        return found


def _merge_add_fake(
    x: Tensor, y: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    return _merge_fake(x, size, size_out, assign, keep, moved)


@_opaque("merge_add" + cpu.SCHEMAS["merge_add"], _merge_add_fake)
def merge_add(
    x: Tensor, y: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`merge(x + y, ...)` for x and y of one shape and dtype, without writing the sum."""
    kernels = _native(x)
    if kernels is not None:
        return kernels.merge_add(x, y, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, x=x, y=y)
    return merge_aten(x + y, size, size_out, assign, keep, moved)


def _merge_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back, *rest = _merge_backward(ctx, grad)
    return back, back, *rest


def _merge_add_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _merge_setup(ctx, inputs[1:], output)


torch.library.register_autograd("tome::merge_add", _merge_add_backward, setup_context=_merge_add_setup, lib=_LIB)


def _product_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@_opaque("product" + cpu.SCHEMAS["product"], _product_fake)
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight + bias`: x `[m, k]`, weight `[k, n]`, bias `[n]` or None, of one dtype. It carries no gradient."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


# -- spelled out on every device ---------------------------------------------------------------------------------------


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


@_opaque(
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


def spelled_out(schema: str, form: Callable[..., Any]) -> None:
    """Register a function as an operator that is replaced by what it is made of before anything is compiled."""
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(schema.partition("(")[0], form, "CompositeImplicitAutograd")


spelled_out("merge_aten" + cpu.SCHEMAS["merge"], merge_aten)
spelled_out("merge_size_aten" + cpu.SCHEMAS["merge_size"], merge_size_aten)
spelled_out("merge_bias_aten" + cpu.SCHEMAS["merge_bias"], merge_bias_aten)
spelled_out("unmerge_aten" + cpu.SCHEMAS["unmerge"], unmerge_aten)
spelled_out("key_weight(Tensor mask) -> Tensor", key_weight)
spelled_out("key_kinds(Tensor weight) -> Tensor", key_kinds)
spelled_out("place_kinds(Tensor special) -> Tensor", place_kinds)
spelled_out("part_labels(Tensor mask) -> Tensor", part_labels)
spelled_out('apart(Tensor metric, Tensor kinds, bool heads, bool first, str similarity="cosine") -> Tensor', apart)
spelled_out(f"seen_first(Tensor weight, {cpu.INDEX}) -> (Tensor, Tensor)", seen_first)
