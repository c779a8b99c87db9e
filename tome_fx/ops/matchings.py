"""Which tokens merge: ToMe's bipartite soft matching, and it by parts, by other matchers, and with the sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_fx import matching
from tome_fx.kernels import cpu
from tome_fx.ops.index import alternating_form, index_form, must_begin
from tome_fx.ops.library import native, opaque
from tome_fx.ops.merging import merge_size


def match_fake(
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


@opaque(
    "match(Tensor metric, SymInt r, int prefix, int suffix, bool heads=False) -> (Tensor, Tensor, Tensor, Tensor)",
    match_fake,
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


def _match(metric: Tensor, size: Tensor | None, r: int, prefix: int, suffix: int, heads: bool) -> tuple[Tensor, ...]:
    """`match_size`; from the ATen form the first four results only."""
    if (kernels := native(metric)) is not None:
        return kernels.match_size(metric, size, r, prefix, suffix, heads)
    sample = metric.shape[: -3 if heads else -2]
    metric = metric if heads else metric.unsqueeze(-2)
    if not (r >= 0 and prefix >= 0 and suffix >= 0 and 2 * r <= metric.shape[-3] - prefix - suffix):
        raise ValueError("r must be 0 to (N - prefix - suffix) // 2")
    if size is not None:
        must_begin("size", size, (*sample, metric.shape[-3]), size.dim())
    found = match_aten(metric.reshape(-1, *metric.shape[-3:]), r, prefix, suffix)
    return tuple(x.reshape(*sample, x.shape[-1]) for x in found)


def _match_size_fake(
    metric: Tensor, size: Tensor | None, r: int, prefix: int, suffix: int, heads: bool = False
) -> tuple[Tensor, ...]:
    found = match_fake(metric, r, prefix, suffix, heads)
    sizes = [found[1].new_empty(found[1].shape, dtype=torch.float32) for _ in range(2)]
    return (*found, *sizes)


@opaque("match_size" + cpu.SCHEMAS["match_size"], _match_size_fake)
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
    return *alternating_form(moved_src, partner, n, prefix, suffix), similarity


def _match_parts_fake(
    metric: Tensor, parts: Tensor, r: int, prefix: int, suffix: int, heads: bool, even: bool, similarity: str = "cosine"
) -> tuple[Tensor, ...]:
    return match_fake(metric, r, prefix, suffix, heads)


@opaque(
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
        found = (*alternating_form(moved_src, partner, n, prefix, suffix), best.gather(1, moved_src))
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
    return match_fake(metric, r, prefix, suffix, heads)


@opaque(
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
        found = (*index_form(source + prefix, destination + prefix, sides + prefix, prefix, suffix), best)
        return tuple(t.reshape(*sample, t.shape[-1]) for t in found)
