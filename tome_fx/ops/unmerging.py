"""Every original token gets the value of its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tome_fx.kernels import cpu
from tome_fx.ops.index import index_for, must_begin
from tome_fx.ops.library import LIB, native, opaque, spelled_out


def unmerge_aten(x: Tensor, index: Tensor) -> Tensor:
    """`unmerge`, spelled out."""
    return x.gather(index.dim() - 1, index_for(index, x))


def unmerge_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, *x.shape[index.dim() :]))


@opaque("unmerge" + cpu.SCHEMAS["unmerge"], unmerge_fake)
def unmerge(x: Tensor, index: Tensor) -> Tensor:
    """Give every original token the value of its group.

    x: `[*sample, N', *rest]`, any dtype. index: int64 `[*sample, N]`, values in [0, N'). Returns `[*sample, N, *rest]`.
    Raises IndexError or, from the ATen form, RuntimeError for other values.
    """
    if x.device.type == "cpu" and (kernels := cpu.library()) is not None:
        return kernels.unmerge(x, index)
    must_begin("x", x, tuple(index.shape[:-1]), index.dim() - 1)
    return unmerge_aten(x, index)


def unmerge_backward_aten(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    """`unmerge_backward`, spelled out."""
    dim = index.dim() - 1
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    out = wide.new_zeros((*index.shape[:dim], groups, *grad.shape[dim + 1 :]))
    return out.scatter_add(dim, index_for(index, grad), wide).to(grad.dtype)


def _unmerge_backward_fake(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    return grad.new_empty((*index.shape[:-1], groups, *grad.shape[index.dim() :]))


@opaque("unmerge_backward" + cpu.SCHEMAS["unmerge_backward"], _unmerge_backward_fake)
def unmerge_backward(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    """The sum of each group, in float32 at least: the adjoint of `unmerge`.

    grad: `[*sample, N, *rest]`, floating. index: as in `unmerge`. groups: N'. Returns `[*sample, N', *rest]`.
    """
    if (kernels := native(grad)) is not None:
        return kernels.unmerge_backward(grad, index, groups)
    must_begin("grad", grad, tuple(index.shape), index.dim())
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


torch.library.register_autograd("tome::unmerge", _unmerge_gradient, setup_context=_unmerge_setup, lib=LIB)
torch.library.register_autograd(
    "tome::unmerge_backward", _unmerge_backward_gradient, setup_context=_unmerge_backward_setup, lib=LIB
)
spelled_out("unmerge_aten" + cpu.SCHEMAS["unmerge"], unmerge_aten)
