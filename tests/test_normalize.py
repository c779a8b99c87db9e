"""normalize: spelling in, normal form out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from passes.capture import capture

ADD, MUL, DIV = "aten.add.Tensor", "aten.mul.Tensor", "aten.div.Tensor"
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    # of x and y, [2, 3, 4]: (spelling, the ops of its form)
    "addcmul": (lambda x, y: torch.addcmul(x, x, y), [MUL, ADD]),
    "addcmul, a value": (lambda x, y: torch.addcmul(x, x, y, value=0.5), [MUL, ADD]),
    "addcdiv": (lambda x, y: torch.addcdiv(x, x, y, value=2), [DIV, ADD]),
    "sum of a stack": (lambda x, y: torch.stack([x, y]).sum(0), [ADD]),
    "sum of a stack, last": (lambda x, y: torch.stack([x, y, x], -1).sum(-1), [ADD, ADD]),
    "sum of a stack, kept": (
        lambda x, y: torch.stack([x, y], 1).sum(1, keepdim=True),
        ["aten.unsqueeze.default", "aten.unsqueeze.default", ADD],
    ),
    "mean of a stack": (lambda x, y: torch.stack([x, y]).mean(0), [ADD, DIV]),
    "sum of a cat": (
        lambda x, y: torch.cat([x[:, None], y[:, None]], 1).sum(1),
        ["aten.unsqueeze.default"] * 2 + ["aten.squeeze.dim"] * 2 + [ADD],
    ),
    "sum over another dim": (
        lambda x, y: torch.stack([x, y]).sum(1),
        ["aten.stack.default", "aten.sum.dim_IntList"],
    ),
    "a cat of longer pieces": (lambda x, y: torch.cat([x, y]).sum(0), ["aten.cat.default", "aten.sum.dim_IntList"]),
    "pad": (lambda x, y: F.pad(x, (2, 0), value=3.0), ["aten.full.default", "aten.cat.default"]),
    "pad, both sides": (
        lambda x, y: F.pad(x > 0, (0, 0, 1, 2), value=True),
        ["aten.gt.Scalar", "aten.full.default", "aten.full.default", "aten.cat.default"],
    ),
    "pad, two dims": (lambda x, y: F.pad(x, (0, 1, 0, 1)), ["aten.pad.default"]),
    "pad, cut": (lambda x, y: F.pad(x, (-1, 0)), ["aten.pad.default"]),
    "new_zeros": (lambda x, y: x.new_zeros(2, 3, 1), ["aten.full.default"]),
    "plus zeros": (lambda x, y: x + torch.zeros(2, 3, 4) + y, [ADD]),
    "times ones": (lambda x, y: x * y.new_ones(4), []),
    "two kinds": (lambda x, y: torch.addcmul(x, x, y.double()), ["aten.to.dtype", "aten.addcmul.default"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_spelling(name: str) -> None:
    spelling, form = FORMS[name]
    x, y = torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 1
    gm = capture(make_fx(spelling, pre_dispatch=True)(x, y), [x, y]).gm
    ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert ops == form
    torch.testing.assert_close(gm(x, y), spelling(x, y))
