"""The `tome` operators: match, merge and unmerge along a token axis.

All three share one index form. For a token axis of N tokens that a merge shortens to N' = N - r:

- `assign` int64 `[*sample, N]`, values in [0, N'): the new position of every old token,
- `keep` int64 `[*sample, N']`: the old position of each new token's representative,
- `moved` int64 `[*sample, r]`: the old positions of the tokens that were merged away, most similar first.

`keep` and `moved` follow from `assign`, but carrying them lets a merge touch r rows instead of N.
`*sample` are the leading axes along which each entry is merged on its own (batch, frame, window).

`match` is opaque to the compiler: fusing gains nothing inside a matrix product followed by a top-r, and its own
kernels for every length would cost compile time. `merge` and `unmerge` decompose into ATen, so Inductor fuses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIB = torch.library.Library("tome", "DEF")
_LIB.define(
    "merge(Tensor x, Tensor? size, Tensor size_out, Tensor assign, Tensor keep, Tensor moved) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "merge_bias(Tensor x, Tensor? size, Tensor size_out, Tensor assign) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIB.define("merge_size(Tensor? size, Tensor assign, Tensor keep, Tensor moved) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("unmerge(Tensor x, Tensor index) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.custom_op("tome::match", mutates_args=())
def match(metric: Tensor, r: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3 and appendix D).

    Tokens at even positions are sources, at odd positions destinations; the first `prefix` and last `suffix`
    tokens are neither. Each source picks the destination of highest cosine similarity, and the `r` most similar
    sources are merged. New order: prefix, surviving sources, destinations, suffix, each in position order.

    Args:
        metric: `[*sample, N, d]`, any floating dtype; compared in float32.
        r: number of tokens to merge away, at most (N - prefix - suffix) // 2.
        prefix, suffix: protected tokens at either end.

    Returns:
        `(assign, keep, moved, similarity)`, see the module docstring; `similarity` is float32 `[*sample, r]`,
        the cosine of each merged pair. None of them carries a gradient.
    """
    with torch.autocast(metric.device.type, enabled=False):
        return _match(metric, r, prefix, suffix)


def _match(metric: Tensor, r: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *sample, n, d = metric.shape
    unit = torch.nn.functional.normalize(metric.reshape(-1, n, d).float(), dim=-1)
    body = slice(prefix, n - suffix)
    positions = torch.arange(n, device=metric.device)
    src_pos = positions[body][prefix % 2 :: 2]
    dst_pos = positions[body][1 - prefix % 2 :: 2]
    src, dst = unit[:, body][:, prefix % 2 :: 2], unit[:, body][:, 1 - prefix % 2 :: 2]
    best, partner = (src @ dst.transpose(1, 2)).max(-1)
    similarity, moved_src = best.topk(r, dim=-1)
    batch, sources, dests = len(unit), len(src_pos), len(dst_pos)

    # Merged sources sort behind all others, so the first entries are the survivors in position order.
    rank = torch.arange(sources, device=metric.device).expand(batch, -1).scatter(1, moved_src, sources)
    survivors = rank.sort(-1).values[:, : sources - r]

    head = positions[:prefix].expand(batch, -1)
    tail = positions[n - suffix :].expand(batch, -1)
    keep = torch.cat([head, src_pos[survivors], dst_pos.expand(batch, -1), tail], 1)
    moved = src_pos[moved_src]
    slots = torch.arange(n - r, device=metric.device).expand(batch, -1)
    assign = torch.empty(batch, n, dtype=torch.int64, device=metric.device).scatter_(1, keep, slots)
    assign.scatter_(1, moved, prefix + (sources - r) + partner.gather(1, moved_src))
    assert dests > 0 or r == 0
    return (
        assign.reshape(*sample, n),
        keep.reshape(*sample, n - r),
        moved.reshape(*sample, r),
        similarity.reshape(*sample, r),
    )


@match.register_fake
def _(metric: Tensor, r: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *sample, n, _ = metric.shape
    index = metric.new_empty((*sample, n), dtype=torch.int64)
    return (
        index,
        index.new_empty((*sample, n - r)),
        index.new_empty((*sample, r)),
        metric.new_empty((*sample, r), dtype=torch.float32),
    )


def _index(index: Tensor, like: Tensor) -> Tensor:
    """`[*sample, n]` -> `[*sample, n, *rest]`, the form `gather` wants for `like` `[*sample, N, *rest]`."""
    rest = like.shape[index.dim() :]
    return index.reshape(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)


def _column(size: Tensor, like: Tensor) -> Tensor:
    return size.reshape(*size.shape, *(1 for _ in range(like.dim() - size.dim())))


def _segment_sum(x: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Sum over each group: the representative's row plus the rows that were moved to it."""
    dim = assign.dim() - 1
    out = x.gather(dim, _index(keep, x))
    slot = assign.gather(dim, moved)
    return out.scatter_add(dim, _index(slot, x), x.gather(dim, _index(moved, x)))


def merge(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Size-weighted mean of each group: sum(x * size) / sum(size) (ToMe section 3, "Tracking Token Size").

    Args:
        x: `[*sample, N, *rest]`, floating.
        size: float32 `[*sample, N]`, original tokens behind each token; None when all are 1.
        size_out: float32 `[*sample, N']` from `merge_size`.

    Returns: `[*sample, N', *rest]`, the dtype of `x`; the sums run in float32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = _segment_sum(wide if size is None else wide * _column(size, x), assign, keep, moved)
    return (total / _column(size_out, x)).to(x.dtype)


def merge_size(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Original tokens behind each new token: float32 `[*sample, N']`."""
    ones = torch.ones(assign.shape, dtype=torch.float32, device=assign.device)
    return _segment_sum(ones if size is None else size, assign, keep, moved)


def merge_bias(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor) -> Tensor:
    """Size-weighted log-mean-exp of an additive score term over each group; exact when the group's scores are equal.

    Args: `x` `[*sample, N, *rest]`, floating, may hold -inf. Returns `[*sample, N', *rest]`, the dtype of `x`.
    """
    dim = assign.dim() - 1
    wide = x.float()
    top = wide.amax(dim, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weight = (wide - top).exp()
    if size is not None:
        weight = weight * _column(size, x)
    zeros = weight.new_zeros((*size_out.shape, *x.shape[dim + 1 :]))
    total = zeros.scatter_add(dim, _index(assign, x), weight)
    return ((total / _column(size_out, x)).log() + top).to(x.dtype)


def unmerge(x: Tensor, index: Tensor) -> Tensor:
    """Give every original token the value of its group: x `[*sample, N', *rest]`, index `[*sample, N]` -> N rows."""
    return x.gather(index.dim() - 1, _index(index, x))


_LIB.impl("merge", merge, "CompositeImplicitAutograd")
_LIB.impl("merge_size", merge_size, "CompositeImplicitAutograd")
_LIB.impl("merge_bias", merge_bias, "CompositeImplicitAutograd")
_LIB.impl("unmerge", unmerge, "CompositeImplicitAutograd")

ATEN_FORM = {"merge": merge, "merge_size": merge_size, "merge_bias": merge_bias, "unmerge": unmerge}
