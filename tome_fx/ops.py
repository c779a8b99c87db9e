"""The `tome` operators: match, merge and unmerge along a token axis.

All three share one index form. For a token axis of N tokens that a merge shortens to N' = N - r:

- `assign` int64 `[*sample, N]`, values in [0, N'): the new position of every old token,
- `keep` int64 `[*sample, N']`: the old position of each new token's representative,
- `moved` int64 `[*sample, r]`: the old positions of the tokens that were merged away, most similar first.

`keep` and `moved` follow from `assign`, but carrying them lets a merge touch r rows instead of N.
`*sample` are the leading axes along which each entry is merged on its own (batch, frame, window).

Which form is fastest depends on the device, and the pass `lower` chooses. `match`, `merge`, `merge_size` and `log_size`
are opaque to the compiler: on a CPU each length of the token axis would give Inductor another five kernels per layer to
compile. `*_aten` are the same functions spelled out, for devices where fusing pays; `unmerge` and `merge_bias` are
always spelled out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIB = torch.library.Library("tome", "DEF")


@torch.library.custom_op("tome::match", mutates_args=())
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
    """
    with torch.autocast(metric.device.type, enabled=False):
        return _match(metric.mean(-2) if heads else metric, r, prefix, suffix)


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
def _(
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


# -- merge -------------------------------------------------------------------------------------------------------------


def merge_aten(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`merge`, spelled out."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = _segment_sum(wide if size is None else wide * _column(size, x), assign, keep, moved)
    return (total / _column(size_out, x)).to(x.dtype)


@torch.library.custom_op("tome::merge", mutates_args=())
def merge(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Size-weighted mean of each group: sum(x * size) / sum(size) (ToMe section 3, "Tracking Token Size").

    Rows whose group gains nothing are copied as they are; only the r rows that move are computed with.

    Args:
        x: `[*sample, N, *rest]`, floating.
        size: float32 `[*sample, N]`, original tokens behind each token; None when all are 1.
        size_out: float32 `[*sample, N']` from `merge_size`.

    Returns: `[*sample, N', *rest]`, the dtype of `x`, contiguous; the sums run in float32.
    """
    n, fewer, r = assign.shape[-1], keep.shape[-1], moved.shape[-1]
    flat = x.reshape(-1, *x.shape[assign.dim() :])
    flat = flat.reshape(flat.shape[0], -1)
    batch = torch.arange(flat.shape[0] // n, device=x.device)[:, None]
    kept = (keep.reshape(-1, fewer) + batch * n).flatten()
    gone = (moved.reshape(-1, r) + batch * n).flatten()
    slot = (assign.gather(-1, moved).reshape(-1, r) + batch * fewer).flatten()
    wide = torch.promote_types(x.dtype, torch.float32)
    share = size_out.reshape(-1).to(wide).reciprocal().index_select(0, slot)
    own, given = share, share
    if size is not None:
        weight = size.reshape(-1).to(wide)
        own = share * weight.index_select(0, kept.index_select(0, slot))
        given = share * weight.index_select(0, gone)
    out = flat.index_select(0, kept).to(wide)
    # A slot that gains several tokens is written several times with the same value, then added to.
    out.index_copy_(0, slot, out.index_select(0, slot) * own[:, None])
    out.index_add_(0, slot, flat.index_select(0, gone).to(wide) * given[:, None])
    return out.to(x.dtype).reshape(*keep.shape, *x.shape[assign.dim() :])


@merge.register_fake
def _(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    return x.new_empty((*keep.shape, *x.shape[assign.dim() :]))


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d sum(x * size) / size_out: each old token gets its share of its group's gradient."""
    size, size_out, assign = ctx.saved_tensors
    back = unmerge(grad / _column(size_out, grad).to(grad.dtype), assign)
    return (back if size is None else back * _column(size, back).to(back.dtype)), None, None, None, None, None


def _merge_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, size, size_out, assign, _, _ = inputs
    ctx.save_for_backward(size, size_out, assign)


merge.register_autograd(_merge_backward, setup_context=_merge_setup)


def merge_size_aten(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`merge_size`, spelled out."""
    ones = torch.ones(assign.shape, dtype=torch.float32, device=assign.device)
    return _segment_sum(ones if size is None else size, assign, keep, moved)


@torch.library.custom_op("tome::merge_size", mutates_args=())
def merge_size(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Original tokens behind each new token: float32 `[*sample, N']`. size: as in `merge`. No gradient."""
    return merge_size_aten(size, assign, keep, moved)


@merge_size.register_fake
def _(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    return keep.new_empty(keep.shape, dtype=torch.float32)


@torch.library.custom_op("tome::log_size", mutates_args=())
def log_size(size: Tensor) -> Tensor:
    """log(size), the term of proportional attention (ToMe equation 1): float32, the shape of `size`. No gradient."""
    return size.log()


@log_size.register_fake
def _(size: Tensor) -> Tensor:
    return torch.empty_like(size)


def merge_bias(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor) -> Tensor:
    """Size-weighted log-mean-exp of an additive score term over each group; exact when the group's scores are equal.

    Each group is taken relative to its own maximum. A group that is masked out whole gets the lowest float32 value
    rather than -inf, so that its gradient is zero and not undefined.

    Args: `x` `[*sample, N, *rest]`, floating, may hold -inf. Returns `[*sample, N', *rest]`, the dtype of `x`.
    """
    dim = assign.dim() - 1
    wide, index = x.float(), _index(assign, x)
    shape = (*size_out.shape, *x.shape[dim + 1 :])
    lowest = torch.finfo(torch.float32).min
    top = wide.detach().new_full(shape, lowest).scatter_reduce(dim, index, wide.detach(), "amax")
    weight = (wide - top.gather(dim, index)).exp()
    if size is not None:
        weight = weight * _column(size, x)
    total = weight.new_zeros(shape).scatter_add(dim, index, weight)
    mean = (total / _column(size_out, x)).clamp(min=torch.finfo(torch.float32).tiny)
    return (mean.log() + top).clamp(min=lowest).to(x.dtype)


def unmerge(x: Tensor, index: Tensor) -> Tensor:
    """Give every original token the value of its group: x `[*sample, N', *rest]`, index `[*sample, N]` -> N rows."""
    return x.gather(index.dim() - 1, _index(index, x))



def _spelled_out(schema: str, form: Callable[..., Tensor]) -> None:
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(schema.partition("(")[0], form, "CompositeImplicitAutograd")


_INDEX = "Tensor assign, Tensor keep, Tensor moved"
_spelled_out(f"merge_aten(Tensor x, Tensor? size, Tensor size_out, {_INDEX}) -> Tensor", merge_aten)
_spelled_out(f"merge_size_aten(Tensor? size, {_INDEX}) -> Tensor", merge_size_aten)
_spelled_out("merge_bias(Tensor x, Tensor? size, Tensor size_out, Tensor assign) -> Tensor", merge_bias)
_spelled_out("unmerge(Tensor x, Tensor index) -> Tensor", unmerge)
