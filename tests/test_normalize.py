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
SPREAD = ["aten.reshape.default", "aten.expand.default", "aten.clone.default", "aten.reshape.default"]
SOFTMAX = "aten.softmax.int"


def by_sum(e: Tensor) -> Tensor:
    return e / e.sum(-1).unsqueeze(-1)


def product_first(x: Tensor, y: Tensor) -> Tensor:
    e = x.exp()
    return e @ y.mT / e.sum(-1, keepdim=True)


def written_in_parts(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:] += y[:, 1:]
    x[:, :1] += y[:, :1]
    return x


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    # of x and y, [2, 3, 4]: (spelling, the ops of its form)
    "addcmul": (lambda x, y: torch.addcmul(x, x, y), [MUL, ADD]),
    "addcmul, a value": (lambda x, y: torch.addcmul(x, x, y, value=0.5), [MUL, MUL, ADD]),
    "addcdiv": (lambda x, y: torch.addcdiv(x, x, y, value=2), [DIV, MUL, ADD]),
    "sum of a stack": (lambda x, y: torch.stack([x, y]).sum(0), [ADD]),
    "sum of a stack of two dtypes": (
        lambda x, y: torch.stack([x, y.bfloat16()]).sum(0), ["aten._to_copy.default", "aten._to_copy.default", ADD]
    ),
    "sum of a stack, last": (lambda x, y: torch.stack([x, y, x], -1).sum(-1), [ADD, ADD]),
    "sum of a stack, kept": (
        lambda x, y: torch.stack([x, y], 1).sum(1, keepdim=True),
        [ADD, "aten.unsqueeze.default"],
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
    "pad by nothing": (lambda x, y: F.pad(x + y, (0, 0)), [ADD]),
    "pad, cut": (lambda x, y: F.pad(x, (-1, 0)), ["aten.pad.default"]),
    "numbers that are nowhere": (
        lambda x, y: torch.zeros(3, device="meta").exp(), ["aten.zeros.default", "aten.exp.default"]
    ),
    "new_zeros": (lambda x, y: x.new_zeros(2, 3, 1), ["aten.full.default"]),
    "plus zeros": (lambda x, y: x + torch.zeros(2, 3, 4) + y, [ADD]),
    "times ones": (lambda x, y: x * y.new_ones(4), ["aten.clone.default"]),  # an output of its own
    "two kinds": (lambda x, y: torch.addcmul(x, x, y.double()), ["aten._to_copy.default", "aten.addcmul.default"]),
    "sum through a permute": (lambda x, y: torch.einsum("s...->...", torch.stack([x, y])), [ADD]),
    "sum of parts": (lambda x, y: torch.cat([x, y], -1).unflatten(-1, (2, 4)).sum(-2), [ADD]),
    "sum of rows": (
        lambda x, y: torch.hstack([x[:, None], y[:, None]]).sum(1),
        ["aten.unsqueeze.default"] * 2 + ["aten.squeeze.dim"] * 2 + [ADD],
    ),
    "one row, or piece": (
        lambda x, y: x.unbind(1)[2] + y.split([1, 2], 1)[0].squeeze(1),
        ["aten.select.int", "aten.slice.Tensor", "aten.squeeze.dim", ADD],
    ),
    "stack, unbound": (lambda x, y: sum(torch.stack([x, y], 1).unbind(1)), [ADD]),
    "cat, cut again": (lambda x, y: torch.cat([x, y], 1)[:, 3:] + torch.cat([y, x], -1).chunk(2, -1)[1], [ADD]),
    "cat, cut elsewhere": (lambda x, y: torch.cat([x, y], 1)[:, 2:5], ["aten.cat.default", "aten.slice.Tensor"]),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), ["aten.sub.Tensor", MUL, ADD]),
    "baddbmm": (
        lambda x, y: torch.baddbmm(x, torch.ones(2, 3, 3), y, beta=0.5, alpha=2.0),
        ["aten.ones.default", "aten.bmm.default", MUL, MUL, ADD],
    ),
    "baddbmm of nothing": (
        lambda x, y: torch.baddbmm(torch.empty(2, 3, 3), x, y.mT, beta=0, alpha=2.0),
        ["aten.transpose.int", "aten.bmm.default", MUL],
    ),
    "addmm": (
        lambda x, y: torch.addmm(x.flatten(0, 1), y.flatten(0, 1), torch.ones(4, 4)),
        ["aten.flatten.using_ints", "aten.flatten.using_ints", "aten.ones.default", "aten.mm.default", ADD],
    ),
    "a bias": (
        lambda x, y: torch.addmm(torch.ones(4), x.flatten(0, 1), torch.ones(4, 4)),
        ["aten.ones.default", "aten.flatten.using_ints", "aten.ones.default", "aten.addmm.default"],
    ),
    "broadcast": (lambda x, y: torch.add(*torch.broadcast_tensors(x, y)), [ADD]),
    "lists": (lambda x, y: torch._foreach_add([x], [y])[0], [ADD]),
    "out": (lambda x, y: torch.add(x, y, out=torch.empty_like(x)), [ADD]),
    "subtract": (lambda x, y: torch.subtract(x, y, alpha=-1), [MUL, "aten.sub.Tensor"]),
    "so many times a bool": (
        lambda x, y: torch.add(x, y > 1.5, alpha=-3.0), ["aten.gt.Scalar", "aten._to_copy.default", MUL, ADD]
    ),
    "true_divide": (lambda x, y: torch.true_divide(x, y), [DIV]),
    "multiply": (lambda x, y: torch.multiply(x, y), [MUL]),
    "at least": (lambda x, y: torch.atleast_3d(x) + y, [ADD]),
    "to itself": (lambda x, y: x.to(y).type_as(y).contiguous() + y, [ADD]),
    "dropout in eval": (lambda x, y: F.dropout(x, 0.5, training=False) + y, [ADD]),
    "swapaxes": (lambda x, y: x.swapaxes(0, 1), ["aten.transpose.int"]),
    "mT": (lambda x, y: x.mT, ["aten.transpose.int"]),
    "movedim": (lambda x, y: x.movedim(0, -1), ["aten.permute.default"]),
    "narrow": (lambda x, y: x.narrow(1, 1, 2), ["aten.slice.Tensor"]),
    "tensor_split": (lambda x, y: x.tensor_split(2, -1)[1], ["aten.slice.Tensor"]),
    "concatenate": (lambda x, y: torch.concatenate([x, y]), ["aten.cat.default"]),
    "tile": (lambda x, y: x.tile(2, 1, 1), SPREAD),
    "repeat": (lambda x, y: x.repeat(1, 3, 1), SPREAD),
    "repeat_interleave": (
        lambda x, y: x.repeat_interleave(3, 1),
        ["aten.unsqueeze.default", "aten.expand.default", "aten.clone.default", "aten.flatten.using_ints"],
    ),
    "beside itself": (lambda x, y: torch.cat([x, x], 1), ["aten.unsqueeze.default", *SPREAD[1:]]),
    "below autograd": (
        lambda x, y: torch.ops.aten.native_layer_norm(x, [4], None, None, 1e-5)[0],
        ["aten.layer_norm.default"],
    ),
    "below autograd, attention": (
        lambda x, y: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x[None], y[None], x[None])[0],
        ["aten.unsqueeze.default"] * 3 + ["aten.scaled_dot_product_attention.default"],
    ),
    "joined with nothing": (lambda x, y: torch.cat([torch.cat([x]), y[:, :0]], 1) + y, [ADD]),
    "times one": (lambda x, y: x * 1.0 + 0 + y / 1, [ADD]),
    "view of its shape": (lambda x, y: x.view(2, 3, 4) + y.expand(2, 3, 4), [ADD]),
    "all of a dim": (lambda x, y: torch.ops.aten.slice(x, 1, 0, 3) + y, [ADD]),
    "written over": (lambda x, y: torch.slice_scatter(x, y, 1) + x, [ADD]),
    "einsum with a row": (
        lambda x, y: torch.einsum("s,sabc->abc", y[0, 0, :2], torch.stack([x, y])),
        ["aten.select.int"] * 2 + ["aten.slice.Tensor", "aten.select.int", MUL, "aten.select.int", MUL, ADD],
    ),
    "linear of a stack": (
        lambda x, y: F.linear(torch.stack([x, y], -1), y[0, :1, :2]).squeeze(-1),
        ["aten.select.int", *["aten.slice.Tensor"] * 2, "aten.select.int",
         *["aten.select.int", MUL] * 2, ADD, "aten.unsqueeze.default", "aten.squeeze.dim"],
    ),
    "einsum, a sum of its own": (lambda x, y: torch.einsum("abc,s->abc", x, y[0, 0]),
        ["aten.select.int"] * 2 + ["aten.einsum.default"]),
    "linear of a stack, two results": (
        lambda x, y: F.linear(torch.stack([x, y], -1), torch.ones(2, 2)),
        ["aten.stack.default", "aten.ones.default", "aten.linear.default"],
    ),
    "stack times a column": (
        lambda x, y: (torch.stack([x, y]) * torch.arange(2.0)[:, None, None, None]).sum(0),
        ["aten.arange.default", "aten.unsqueeze.default", "aten.unsqueeze.default", "aten.unsqueeze.default",
         "aten.select.int", MUL, ADD],  # times 1
    ),
    "parts, joined": (lambda x, y: torch.cat([x[:, :1] + y[:, :1], x[:, 1:] + y[:, 1:]], 1), [ADD]),
    "parts that stand one behind the other": (
        lambda x, y: torch.cat([y[:, :1], x[:, :1], x[:, 1:], y[:, 2:]], 1),
        ["aten.slice.Tensor", "aten.slice.Tensor", "aten.cat.default"],
    ),
    "the last parts first": (
        lambda x, y: torch.cat([x[:, -1:], x[:, :-1], y[:, -2:-1], y[:, -1:]], 1),
        ["aten.slice.Tensor", "aten.slice.Tensor", "aten.slice.Tensor", "aten.cat.default"],
    ),
    "parts of a split, joined": (
        lambda x, y: torch.cat([a * b for a, b in zip(x.split([1, 2], 1), y.split([1, 2], 1), strict=True)], 1), [MUL]
    ),
    "products of parts, joined": (
        lambda x, y: torch.cat([(a @ y.mT).softmax(-1) @ y for a in x.split([1, 2], 1)], 1),
        ["aten.transpose.int", "aten.matmul.default", SOFTMAX, "aten.matmul.default"],
    ),
    "products of parts that are read twice, joined": (
        lambda x, y: torch.cat([(lambda s: s * torch.erf(s))(a @ y.mT) for a in x.split([1, 2], 1)], 1),
        ["aten.transpose.int", "aten.matmul.default", "aten.erf.default", MUL],
    ),
    "products of parts that others read, joined": (
        lambda x, y: (lambda parts: torch.cat([s.exp() for s in parts], 1) + parts[0])(
            [a @ y[:, :1].mT for a in x.split([1, 2], 1)]
        ),
        ["aten.split_with_sizes.default", *["<built-in function getitem>"] * 2,
         *["aten.slice.Tensor", "aten.transpose.int", "aten.matmul.default"] * 2, *["aten.exp.default"] * 2,
         "aten.cat.default", ADD],
    ),
    "softmax of parts, joined": (
        lambda x, y: torch.cat([(x @ y[:, :1].mT).softmax(-1), (x @ y[:, 1:].mT).softmax(-1)], -1),
        ["aten.slice.Tensor", "aten.transpose.int", "aten.matmul.default", SOFTMAX] * 2 + ["aten.cat.default"],
    ),
    "unsafe view": (lambda x, y: torch.ops.aten._unsafe_view(x, [6, 4]), ["aten.view.default"]),
    "parts written": (written_in_parts, ["aten.clone.default", ADD]),
    "log_softmax": (lambda x, y: x.log_softmax(-1).exp(), [SOFTMAX]),
    "logsumexp": (lambda x, y: (x - x.logsumexp(1, keepdim=True)).exp(), [SOFTMAX]),
    "over their sum": (lambda x, y: by_sum(x.exp()), [SOFTMAX]),
    "times one over their sum": (lambda x, y: (lambda e: (1 / e.sum(-1, True)) * e)(x.exp()), [SOFTMAX]),
    "times their sum to the minus one": (lambda x, y: (lambda e: e * e.sum(1, True) ** -1)(x.exp()), [SOFTMAX]),
    "product first, times one over the sum": (
        lambda x, y: (lambda e: e @ y.mT * e.sum(-1, keepdim=True).reciprocal())(x.exp()),
        ["aten.transpose.int", SOFTMAX, "aten.matmul.default"],
    ),
    "products of pairs, summed": (
        lambda x, y: (x[:, :, None] * y[:, None]).sum(-1, keepdim=True),
        ["aten.unsqueeze.default"] * 2 + ["aten.squeeze.dims"] * 2 + ["aten.einsum.default", "aten.unsqueeze.default"],
    ),
    "products with a table, summed": (
        lambda x, y: (x[:, :, None] * y[:1, None]).sum(-1),
        ["aten.unsqueeze.default", "aten.slice.Tensor", "aten.unsqueeze.default", MUL, "aten.sum.dim_IntList"],
    ),
    "a matrix of each token": (
        lambda x, y: torch.einsum("nij,bnj->bni", y[0, :, :2, None].expand(3, 2, 2), x[..., :2]),
        ["aten.select.int", "aten.slice.Tensor", "aten.unsqueeze.default", "aten.slice.Tensor",
         "aten.unsqueeze.default", "aten.unsqueeze.default", MUL, "aten.sum.dim_IntList"],
    ),
    "rows folded, and apart again": (
        lambda x, y: (lambda r: (r.exp() + y[0, 0]) * F.linear(r[:, :2].softmax(1), y[0, :, :2])[:, 1:2])(
            x.reshape(6, 4)
        ).view(2, 3, 2, 2),
        ["aten.select.int"] * 2 + ["aten.select.int", "aten.slice.Tensor", "aten.exp.default", ADD,
         "aten.slice.Tensor", SOFTMAX, "aten.linear.default", "aten.slice.Tensor", MUL, "aten.reshape.default"],
    ),
    "products of folded rows, with a bias": (
        lambda x, y: torch.addmm(y[0, 0], x.flatten(0, 1) @ y[0, :1].mT, y[0, :1]).unflatten(0, (2, 3)),
        [*["aten.select.int"] * 3, "aten.slice.Tensor", "aten.transpose.int", "aten.select.int", "aten.slice.Tensor",
         "aten.matmul.default", "aten.permute.default", "aten.linear.default"],
    ),
    "rows folded, read by others too": (
        lambda x, y: (lambda r: r.view(2, 3, 3) + r.sum())(F.linear(x.reshape(6, 4), y[0])),
        ["aten.reshape.default", "aten.select.int", "aten.linear.default", "aten.view.default", "aten.sum.default",
         ADD],
    ),
    "rows apart in other samples": (
        lambda x, y: x.reshape(6, 4).exp().view(3, 2, 4),
        ["aten.reshape.default", "aten.exp.default", "aten.view.default"],
    ),
    "powers of two": (lambda x, y: by_sum(torch.exp2(x - y[:1, :1, :1])), [MUL, SOFTMAX]),
    "powers, masked": (
        lambda x, y: by_sum(3 ** (x + y).masked_fill(x > y, -torch.inf)),
        ["aten.gt.Tensor", MUL, MUL, ADD, "aten.masked_fill.Scalar", SOFTMAX],
    ),
    "less the largest": (lambda x, y: by_sum((x - x.amax(-1, keepdim=True)).exp()), [SOFTMAX]),
    "softmax, less the largest": (lambda x, y: (x - x.amax(1, keepdim=True)).softmax(1), [SOFTMAX]),
    "times a mask, over their sum": (
        lambda x, y: by_sum(x.softmax(-1) * (y > 1.2)),
        ["aten.gt.Scalar", "aten.logical_not.default", "aten.masked_fill.Scalar", SOFTMAX],
    ),
    "softmax, less the largest with its place": (
        lambda x, y: by_sum((x - x.max(-1, keepdim=True).values).exp()), [SOFTMAX]
    ),
    "largest": (lambda x, y: x.max(1)[0] - x.min(), ["aten.amax.default", "aten.amin.default", "aten.sub.Tensor"]),
    "largest and its place": (
        lambda x, y: torch.add(*x.max(1)), ["aten.max.dim", *["<built-in function getitem>"] * 2, ADD]
    ),
    "adaptive max pool": (
        lambda x, y: F.adaptive_max_pool1d(x.mT, 1),
        ["aten.transpose.int", "aten.unsqueeze.default", "aten.amax.default", "aten.squeeze.dim"],
    ),
    "adaptive mean pool": (lambda x, y: F.adaptive_avg_pool1d(x.mT, 1), ["aten.transpose.int", "aten.mean.dim"]),
    "pool of one window": (
        lambda x, y: F.max_pool1d(x.mT, 3) - F.avg_pool1d(x, x.shape[2]).mT,
        ["aten.transpose.int", "aten.amax.default", "aten.mean.dim", "aten.transpose.int", "aten.sub.Tensor"],
    ),
    "pool of two windows": (lambda x, y: F.avg_pool1d(x, 2), ["aten.avg_pool1d.default"]),
    "the topmost": (lambda x, y: x.topk(1, 1).values, ["aten.amax.default"]),
    "the two topmost": (lambda x, y: x.topk(2, 1).values, ["aten.topk.default", "<built-in function getitem>"]),
    "a product with one over the count": (
        lambda x, y: torch.full((1, 3), 1 / 3) @ x + torch.einsum("bnd,n->bd", y, torch.ones(3)),
        ["aten.mean.dim", "aten.unsqueeze.default", "aten.mean.dim", MUL, ADD],
    ),
    "a product of integers": (
        lambda x, y: (torch.full((1, 3), 2) @ (x > 0).long()).float(),
        ["aten.full.default", "aten.gt.Scalar", "aten._to_copy.default", "aten.matmul.default",
         "aten._to_copy.default"],
    ),
    "product first": (
        product_first,
        ["aten.transpose.int", SOFTMAX, "aten.matmul.default"],
    ),
    "kept by a mask, and low elsewhere": (
        lambda x, y: (lambda m: x * m.unsqueeze(1).to(x.dtype) - (1 - m[:, None].long()) * 1e9)(y[:, 0] > 1.5),
        ["aten.select.int", "aten.gt.Scalar", "aten.unsqueeze.default", "aten.logical_not.default",
         "aten.masked_fill.Scalar"],
    ),
    "low elsewhere, but not zero": (
        lambda x, y: x * (y > 1.5) + torch.where(y > 1.5, 1.0, -1e9),
        ["aten.gt.Scalar", MUL, "aten.gt.Scalar", "aten.where.Scalar", ADD],
    ),
    "is zero": (
        lambda x, y: (x == 0) | (y != 0),
        ["aten.logical_not.default", "aten._to_copy.default", "aten.bitwise_or.Tensor"],
    ),
    "index_add": (lambda x, y: x.index_add(-2, torch.arange(3), y, alpha=2), [MUL, ADD]),
    "index_add, backwards": (
        lambda x, y: x.index_add(1, torch.arange(3).flip(0), y),
        ["aten.arange.default", "aten.flip.default", "aten.index_add.default"],
    ),
    "scatter_add": (
        lambda x, y: x.scatter_add(1, torch.arange(3)[:, None].expand(2, 3, 4), y), [ADD]
    ),
    "index_put": (
        lambda x, y: x.index_put((torch.arange(2)[:, None], torch.arange(3)), y, accumulate=True), [ADD]
    ),
    "index_put by a mask": (
        lambda x, y: x.index_put((y[..., 0] > 1.5,), torch.zeros(())),
        ["aten.select.int", "aten.gt.Scalar", "aten.unsqueeze.default", "aten.masked_fill.Scalar"],
    ),
    "index_put of a row by a mask": (
        lambda x, y: x.index_put((y[..., 0] > 1.5,), y[0, 0]),
        ["aten.select.int", "aten.gt.Scalar", "aten.select.int", "aten.select.int", "aten.unsqueeze.default",
         "aten.where.self"],
    ),
    "rows written by an index": (
        lambda x, y: x.mT.index_put((torch.arange(1, 2),), y.mT[:1]).index_copy(1, torch.arange(2, 4), y.mT[:, :2]),
        ["aten.transpose.int", "aten.transpose.int", "aten.slice.Tensor", "aten.slice_scatter.default",
         "aten.transpose.int", "aten.slice.Tensor", "aten.slice_scatter.default"],
    ),
    "a row written for all": (
        lambda x, y: x.index_put((torch.arange(1, 2),), y[0, 0]),
        ["aten.select.int", "aten.select.int", "aten.expand.default", "aten.slice_scatter.default"],
    ),
    "rows by an index": (
        lambda x, y: x[:, torch.arange(1, 3)] + y.index_select(1, torch.arange(1, 3)),
        ["aten.slice.Tensor", "aten.slice.Tensor", ADD],
    ),
    "rows by an index, apart": (
        lambda x, y: x[:, torch.arange(0, 3, 2)], ["aten.arange.start_step", "aten.index.Tensor"],
    ),
    "index_put of the diagonal": (
        lambda x, y: x.mT.index_put((torch.arange(2), torch.arange(2)), y[:, 0, :3], accumulate=True),
        ["aten.transpose.int", "aten.arange.default", "aten.arange.default", "aten.select.int", "aten.slice.Tensor",
         "aten.index_put.default"],
    ),
    "a recurrent cell": (
        lambda x, y: torch.rnn_relu_cell(x[0], y[0], torch.ones(4, 4), torch.ones(4, 4)),
        ["aten.select.int"] * 2 + ["aten.ones.default"] * 2 + ["aten.linear.default"] * 2 + [ADD, "aten.relu.default"],
    ),
    "tensordot": (lambda x, y: torch.tensordot(torch.ones(2), torch.stack([x, y], 1), ([0], [1])), [ADD]),
    "square": (lambda x, y: x.square(), ["aten.pow.Tensor_Scalar"]),
    "less_equal": (lambda x, y: torch.less_equal(x, y), ["aten.le.Tensor"]),
    "clip": (lambda x, y: torch.clip(x, 0, 1), ["aten.clamp.default"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_spelling(name: str) -> None:
    spelling, form = FORMS[name]
    x, y = torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 1
    gm = capture(make_fx(spelling, pre_dispatch=True)(x, y), [x, y]).gm
    ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert ops == form
    torch.testing.assert_close(gm(x, y), spelling(x, y))


def test_a_tower_on_pieces_is_gone_through_once() -> None:
    """Each add doubles the ways down, so that to follow every one of them would not end."""

    def towers(x: Tensor) -> Tensor:
        pieces = x.chunk(2)
        for _ in range(40):
            pieces = tuple(p + p.sin() * p for p in pieces)
        return torch.cat(pieces)

    x = torch.randn(2, 3, 4)
    gm = capture(make_fx(towers, pre_dispatch=True)(x), [x]).gm
    assert len(gm.graph.nodes) < 260
    torch.testing.assert_close(gm(x), towers(x))


def test_a_long_way_to_a_fold_ends() -> None:
    """It was followed op by op until Python's stack was full."""

    def long(x: Tensor) -> Tensor:
        for _ in range(400):
            x = x.sin() * 1.1
        return x.view(2, 3, 4)

    x = torch.randn(2, 12)
    assert len(capture(make_fx(long, pre_dispatch=True)(x), [x]).gm.graph.nodes) == 803


def written(x: Tensor) -> tuple[Tensor, Tensor]:
    before = x * 1.0
    return x.add_(1.0) * 2, before


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.exp()
    return y, y + 0


OWN: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "plus nothing": lambda x: (x * 2, x + 0),
    "times ones": lambda x: (x * 2, x * torch.ones(4)),
    "one of a stack": lambda x: (x * 2, torch.stack([x, x * 3]).unbind()[0]),
    "a view": lambda x: (x * 2, (x + 0).mT),
    "written later": written,
    "given twice": twice,
}


@pytest.mark.parametrize("name", OWN)
def test_outputs_keep_memory_of_their_own(name: str) -> None:
    """What the caller or the graph writes to one tensor reaches no other, though in normal form both are one value."""
    x = torch.randn(2, 3, 4)
    gm = capture(make_fx(OWN[name], pre_dispatch=True)(x.clone()), [x.clone()]).gm
    mine, theirs = x.clone(), x.clone()
    got, want = gm(mine), OWN[name](theirs)
    for a, b in zip((mine, *got), (theirs, *want), strict=True):
        torch.testing.assert_close(a, b)
    held = mine.clone(), got[0].clone()
    got[1].add_(100.0)
    assert torch.equal(mine, held[0]) and torch.equal(got[0], held[1])
