"""The size-weighted mean of a group, its sizes, and the terms of its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tome_fx.kernels import cpu
from tome_fx.ops.index import check_shapes, column, index_for
from tome_fx.ops.library import LIB, native, opaque, spelled_out
from tome_fx.ops.unmerging import unmerge_aten, unmerge_fake


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
    return out.scatter_add(dim, index_for(slot, x), joining * column(share, x)).to(x.dtype)


def merge_fake(
    x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    return x.new_empty((*keep.shape, *x.shape[assign.dim() :]))


@opaque("merge" + cpu.SCHEMAS["merge"], merge_fake)
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
    if (kernels := native(x)) is not None:
        return kernels.merge(x, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, x=x)
    return merge_aten(x, size, size_out, assign, keep, moved)


def merge_backward_aten(
    grad: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`merge_backward`, spelled out."""
    back = unmerge_aten(grad / column(size_out, grad).to(grad.dtype), assign)
    return back if size is None else back * column(size, back).to(back.dtype)


def _merge_backward_fake(
    grad: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    return unmerge_fake(grad, assign)


@opaque("merge_backward" + cpu.SCHEMAS["merge_backward"], _merge_backward_fake)
def merge_backward(
    grad: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """d sum(x * size) / size_out: each old token gets its share of its group's gradient. The adjoint of `merge`.

    grad: `[*sample, N', *rest]`, floating; the others as in `merge`. Returns `[*sample, N, *rest]` in the same dtype.
    """
    if (kernels := native(grad)) is not None:
        return kernels.merge_backward(grad, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, grad=grad)
    return merge_backward_aten(grad, size, size_out, assign, keep, moved)


def merge_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    form = torch.ops.tome.merge_backward if grad.device.type == "cpu" else merge_backward_aten
    return form(grad, *ctx.saved_tensors), None, None, None, None, None


def merge_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _merge_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tome.merge(grad, *ctx.saved_tensors), None, None, None, None, None


torch.library.register_autograd("tome::merge_backward", _merge_backward_backward, setup_context=merge_setup, lib=LIB)
torch.library.register_autograd("tome::merge", merge_gradient, setup_context=merge_setup, lib=LIB)


def _merge_add_fake(
    x: Tensor, y: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    return merge_fake(x, size, size_out, assign, keep, moved)


@opaque("merge_add" + cpu.SCHEMAS["merge_add"], _merge_add_fake)
def merge_add(
    x: Tensor, y: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`merge(x + y, ...)` for x and y of one shape and dtype, without writing the sum."""
    kernels = native(x)
    if kernels is not None:
        return kernels.merge_add(x, y, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, x=x, y=y)
    return merge_aten(x + y, size, size_out, assign, keep, moved)


def _merge_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back, *rest = merge_gradient(ctx, grad)
    return back, back, *rest


def _merge_add_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    merge_setup(ctx, inputs[1:], output)


torch.library.register_autograd("tome::merge_add", _merge_add_backward, setup_context=_merge_add_setup, lib=LIB)


def merge_size_aten(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`merge_size`, spelled out."""
    size = torch.ones(assign.shape, dtype=torch.float32, device=assign.device) if size is None else size
    return size.gather(-1, keep).scatter_add(-1, assign.gather(-1, moved), size.gather(-1, moved))


def _merge_size_fake(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    return keep.new_empty(keep.shape, dtype=torch.float32)


@opaque("merge_size" + cpu.SCHEMAS["merge_size"], _merge_size_fake)
def merge_size(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Original tokens behind each new token: float32 `[*sample, N']`. size: as in `merge`. No gradient."""
    if (kernels := native(assign, torch.float32)) is not None:
        return kernels.merge_size(size, assign, keep, moved)
    check_shapes(size, None, assign, keep, moved)
    return merge_size_aten(size, assign, keep, moved)


@opaque("log_size(Tensor size) -> Tensor", torch.empty_like)
def log_size(size: Tensor) -> Tensor:
    """log(size), the term of proportional attention (ToMe equation 1): float32, the shape of `size`. No gradient."""
    return size.log()


def merge_bias_aten(
    x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`merge_bias`, spelled out."""
    dim = assign.dim() - 1
    wide, index = x.to(torch.promote_types(x.dtype, torch.float32)), index_for(assign, x)
    shape = (*size_out.shape, *x.shape[dim + 1 :])
    lowest = torch.finfo(torch.float32).min
    top = wide.detach().new_full(shape, lowest).scatter_reduce(dim, index, wide.detach(), "amax")
    weight = (wide - top.gather(dim, index)).exp()
    if size is not None:
        weight = weight * column(size, x)
    total = weight.new_zeros(shape).scatter_add(dim, index, weight)
    seen = total > 0
    mean = torch.where(seen, total / column(size_out, x), 1.0)  # log(0) would have no gradient
    found = (mean.log() + top).clamp(min=lowest)
    return torch.where(seen, found, -torch.inf).to(x.dtype)


@opaque("merge_bias" + cpu.SCHEMAS["merge_bias"], merge_fake)
def merge_bias(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """Size-weighted log-mean-exp of an additive score term over each group; exact when the group's scores are equal.

    Each group is taken relative to its own maximum. A group that is masked out whole stays so: -inf, with a gradient of
    zero.

    Args: as in `merge`; `x` `[*sample, N, *rest]`, floating, may hold -inf.
    Returns: `[*sample, N', *rest]`, the dtype of `x`; computed in float32 at least.
    """
    if (kernels := native(x)) is not None:
        return kernels.merge_bias(x, size, size_out, assign, keep, moved)
    check_shapes(size, size_out, assign, keep, moved, x=x)
    return merge_bias_aten(x, size, size_out, assign, keep, moved)


def _merge_bias_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d log(sum(size * exp(x)) / size_out): each old term gets its share of its group's sum."""
    x, out, size, size_out, assign = ctx.saved_tensors
    whole = unmerge_aten(out.float(), assign).clamp(min=torch.finfo(torch.float32).min)  # -inf less -inf is no number
    share = (x.float() - whole).exp() / column(unmerge_aten(size_out, assign), x)
    share = share if size is None else share * column(size, x)
    return (unmerge_aten(grad, assign) * share).to(x.dtype), None, None, None, None, None


def _merge_bias_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, size, size_out, assign, _, _ = inputs
    ctx.save_for_backward(x, output, size, size_out, assign)


torch.library.register_autograd("tome::merge_bias", _merge_bias_backward, setup_context=_merge_bias_setup, lib=LIB)
spelled_out("merge_aten" + cpu.SCHEMAS["merge"], merge_aten)
spelled_out("merge_size_aten" + cpu.SCHEMAS["merge_size"], merge_size_aten)
spelled_out("merge_bias_aten" + cpu.SCHEMAS["merge_bias"], merge_bias_aten)
