"""A matrix product that compiled code calls as one loop, see `passes/lower.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_fx.kernels import cpu
from tome_fx.ops.library import opaque


def _product_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@opaque("product" + cpu.SCHEMAS["product"], _product_fake)
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight + bias`: x `[m, k]`, weight `[k, n]`, bias `[n]` or None, of one dtype. It carries no gradient."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
