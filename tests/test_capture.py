"""capture: in-place writes become values, whatever view they go through; fused inference ops are spelled out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from tome_fx.passes.capture import CaptureError, capture

Fn = Callable[[Tensor], Tensor]


def view_then_write(x: Tensor) -> Tensor:
    """A view taken before a write sees it; so does the base."""
    y = x * 1
    head, rest = y[:, :1], y[:, 1:]
    rest.add_(head)
    return torch.cat([y, rest * 2, head], 1)


def nested_views(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:][:, :2].mul_(3)
    y.transpose(1, 2)[0].zero_()
    return y


def two_writes(x: Tensor) -> Tensor:
    y = x + 1
    z = y.view(-1)
    z += 1
    y.relu_()
    z[:3] = 7
    return y + z.view_as(y)


def chained(x: Tensor) -> Tensor:
    return (x + 1).mul_(2).add_(x).permute(0, 2, 1)[:, 1:].neg_() * 2


def select_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = y[:, 1]
    y[1].fill_(2.0)
    return y


def masked(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:].masked_fill_(x[:, 1:] > 0, -1.0)
    return y


def writes_its_input(x: Tensor) -> Tensor:
    x[:, 1:].add_(1)
    return x * 2


# A write through each of them is a write to y, float [2, 4, 6].
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda y: y.chunk(2, -1)[1],
    "one chunk": lambda y: y.chunk(1, 1)[0],
    "chunk, uneven": lambda y: y.chunk(3, 1)[-1],
    "split": lambda y: y.split(4, 2)[1],
    "split into sizes": lambda y: torch.split(y, [1, 2, 3], dim=-1)[1],
    "split_with_sizes": lambda y: y.split_with_sizes((1, 3), 1)[1],
    "tensor_split": lambda y: y.tensor_split(3, -1)[2],
    "tensor_split at": lambda y: torch.tensor_split(y, (1, 4), dim=2)[1],
    "unbind": lambda y: y.unbind(1)[2],
    "unbind, first dim": lambda y: torch.unbind(y)[1],
    "unpacked": lambda y: (lambda a, b: b)(*y),
    "hsplit": lambda y: y.hsplit(2)[1],
    "vsplit": lambda y: torch.vsplit(y, 2)[0],
    "dsplit": lambda y: y.dsplit([2, 3])[1],
    "unsafe_chunk": lambda y: y.unsafe_chunk(2, 1)[1],
    "unsafe_split": lambda y: torch.unsafe_split(y, 3, 2)[0],
    "a chunk of a split": lambda y: y.split(2, 1)[1].chunk(3, -1)[2],
    "a chunk of a transpose": lambda y: y.transpose(1, 2).chunk(2, 1)[0],
    "transpose of a chunk": lambda y: y.chunk(2, 1)[0].mT[:, 1:],
    "chunk of unflatten": lambda y: y.unflatten(-1, (2, 3)).unbind(2)[0],
    "narrow": lambda y: y.narrow(1, 1, 2),
    "narrow from behind": lambda y: torch.narrow(y, -1, -3, 2),
    "diagonal": lambda y: y.diagonal(0, 1, 2),
    "diagonal of": lambda y: torch.diagonal(y, offset=1, dim1=0, dim2=2),
    "movedim": lambda y: y.movedim(0, -1)[1:],
    "moveaxis": lambda y: torch.moveaxis(y, (0, 1), (1, 2))[0],
    "unflatten": lambda y: y.unflatten(2, (2, -1))[..., 0],
    "T": lambda y: y[0].T[1:],
    "mT": lambda y: y.mT[:, 2],
    "adjoint": lambda y: y.adjoint()[:, 2],
    "swapaxes": lambda y: y.swapaxes(0, 2)[3],
    "swapdims": lambda y: torch.swapdims(y, 1, 2)[0],
    "steps": lambda y: y[:, ::2, 1::3],
    "ellipsis and None": lambda y: y[..., None, 2:],
    "expand that changes nothing": lambda y: y.expand(2, 4, 6)[:, 0],
    "expand_as": lambda y: y.expand_as(y)[1],
    "view_as": lambda y: y.view_as(torch.empty(8, 6))[3],
    "reshape_as": lambda y: y.reshape_as(torch.empty(4, 12))[3],
    "ravel": lambda y: y.ravel()[5:9],
    "flatten": lambda y: y.flatten(1)[:, 3],
    "squeeze": lambda y: y.unsqueeze(1).squeeze(1)[1],
    "squeeze of many": lambda y: y[:, None, :, None].squeeze((1, 3))[0],
    "unfold": lambda y: y.unfold(2, 2, 2)[..., 1],
    "as_strided": lambda y: y.as_strided((2, 3), (24, 5), 1),
    "as_strided of a view": lambda y: y.mT[1].as_strided((3, 2), (2, 7), 4),
    "to the same device": lambda y: y.to(y.device),
    "to the same dtype": lambda y: y.to(torch.float32)[:, 1:],
    "to as keywords": lambda y: y.to(device="cpu", dtype=torch.float32),
    "to another": lambda y: y.to(torch.empty(1)),
    "type_as": lambda y: y.type_as(torch.ones(1))[:, 0],
    "float": lambda y: y.float(),
    "cpu": lambda y: y.cpu()[1],
    "contiguous": lambda y: y.contiguous()[:, 0],
    "detach": lambda y: y.detach()[:, 0],
    "data": lambda y: y.data[:, 0],
    "dropout in eval": lambda y: nn.functional.dropout(y, 0.5, training=False)[0],
    "identity": lambda y: nn.Identity()(y)[0],
    "positive": lambda y: y.positive()[0],
    "atleast_3d": lambda y: torch.atleast_3d(y)[0],
    "select of select": lambda y: y.select(0, 1).select(1, -1),
    "unsqueeze_": lambda y: y[1].unsqueeze_(0),
    "squeeze_, t_, transpose_": lambda y: y[:1].transpose_(1, 2).squeeze_(0).t_(),
    "swapaxes_": lambda y: y[:, :2].swapaxes_(0, 1)[0],
}
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "mul_": lambda v: v.mul_(2.5),
    "+=": lambda v: v.__iadd__(v.flatten()[0].clone()),
    "copy_": lambda v: v.copy_(torch.arange(v.numel(), dtype=torch.float64).view(v.shape)),
    "[...] =": lambda v: v.__setitem__(Ellipsis, -1.0) or v,
    "masked_fill_": lambda v: v.masked_fill_(v > 0, 3.0),
}


def through(view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor], owner: str) -> Fn:
    """A write to a tensor that is the graph's own, an input, or lies in another order than it is read in. A view from
    before the write, a second write to the base, and the view's own value are read afterwards."""

    def f(x: Tensor) -> Tensor:
        y = x if owner == "input" else x.transpose(0, 2).clone().transpose(0, 2) if owner == "dense" else x * 1
        before, held = y[:, 1], view(y)
        write(held)
        y[0] += 0.5
        return torch.cat([t.flatten() for t in (y, before, held, view(y))])

    return f


def overloads_of_other_names(x: Tensor) -> Tensor:
    """In-place ops whose form without a write is another overload, by its name: pow_.Scalar is pow.Tensor_Scalar."""
    two = torch.tensor(2)
    y = x.clone().pow_(2).floor_divide_(two).ldexp_(two)
    return y.pow_(two) + x.double().float_power_(2)


FUNCTIONS: list[Fn] = [
    view_then_write, nested_views, two_writes, chained, select_write, masked, writes_its_input,
    overloads_of_other_names,
]  # fmt: skip


def captured(f: Callable[..., Tensor], *args: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """The IR of f and its real inputs in order, lifted constants first."""
    found: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        ir = capture(gm, inputs)
        found.append((ir.gm, [*ir.attributes.values(), *inputs]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True)(*args)
    return found[0]


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_writes_become_values(f: Fn) -> None:
    """Same result, same effect on the input, and nothing mutates but a last copy into an input."""
    x = torch.randn(2, 4, 3)
    ir, inputs = captured(f, x.clone())
    mine, theirs = x.clone(), x.clone()
    (got,) = ir(*inputs[:-1], mine)
    assert torch.equal(got, f(theirs))
    assert torch.equal(mine, theirs)
    for node in ir.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            assert node.target is torch.ops.aten.copy_.default
            assert node.args[0].op == "placeholder"


OWNERS = ("own", "input", "dense")


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_writes_through_views(view: str) -> None:
    """Through any view, to any owner: what eager gives, in the result and in the input. `dense` needs a layout that all
    these views can be taken of."""
    first = list(VIEWS).index(view)
    for i, owner in enumerate(OWNERS):
        name = list(WRITES)[(first + i) % len(WRITES)]
        f = through(VIEWS[view], WRITES[name], owner)
        x = torch.randn(2, 4, 6)
        try:
            f(x.clone())
        except RuntimeError:  # .view() of a tensor that lies in another order
            assert owner == "dense"
            continue
        with torch.no_grad():
            ir, inputs = captured(f, given := x.clone())
        mine, theirs = x.clone(), x.clone()
        got = ir(*[mine if t is given else t for t in inputs])[0]
        assert torch.equal(got, f(theirs)), (view, name, owner)
        assert torch.equal(mine, theirs), (view, name, owner)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_fused_encoder_layer_is_spelled_out(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, activation=activation).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        ir, inputs = captured(lambda x, p: layer(x, src_key_padding_mask=p), x, padding)
        assert not any("_fwd" in str(n.target) or "native_multi" in str(n.target) for n in ir.graph.nodes)
        torch.testing.assert_close(ir(*inputs)[0], layer(x, src_key_padding_mask=padding))


def test_other_higher_order_ops_are_refused_with_a_reason() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    with pytest.raises(Exception, match=f"{CaptureError.__name__}|higher-order op cond"):
        captured(f, torch.randn(3))


def vmapped(x: Tensor) -> Tensor:
    """A map within a map, a table of positions, a write, and an operand that is not mapped over."""
    weight = x[0, 0]

    def row(r: Tensor) -> Tensor:
        y = r.new_zeros(3)
        y[1:] = r[1:] * weight[1:]
        return y.cumsum(0) + torch.arange(3)

    return torch.vmap(torch.vmap(row))(x) + torch.vmap(torch.sum)(x)[:, None, None]


def nested_region(x: Tensor) -> Tensor:
    for _ in range(2):
        x = _region(x, x + 1)
    return x


@torch.compiler.nested_compile_region
def _region(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(x) @ y.transpose(1, 2) @ x


@pytest.mark.parametrize("f", [vmapped, nested_region], ids=lambda f: f.__name__)
def test_maps_and_regions_become_plain_ops(f: Fn) -> None:
    """What stands inside is computed from the graph's inputs, in value and in gradient: nothing becomes a constant."""
    x = torch.randn(2, 4, 3, requires_grad=True)
    ir, inputs = captured(f, x)
    assert not ir.graph.find_nodes(op="get_attr")
    assert all(n.op != "call_function" or isinstance(n.target, torch._ops.OpOverload) for n in ir.graph.nodes)
    other = torch.randn(2, 4, 3, requires_grad=True)
    got, want = ir(*[other if i is x else i for i in inputs])[0], f(other)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), other)[0] for out in (got, want)]
    torch.testing.assert_close(*grads)


def test_derivatives_inside_are_refused_with_a_reason() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (y * y).sum())(x)

    with pytest.raises(Exception, match="takes derivatives inside"):
        captured(f, torch.randn(3))


def test_as_strided_reads_memory_as_it_lay() -> None:
    """Whatever strides its operand has in another graph; an input that is a part of something larger is refused."""

    def f(x: Tensor) -> Tensor:
        return (x.transpose(0, 2) + 1).as_strided((3, 4), (1, 2), 3) * x.sum()

    x = torch.randn(2, 4, 3)
    with torch.no_grad():
        ir, inputs = captured(f, x)
        (node,) = ir.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
        assert node.args[0].target is torch.ops.aten.contiguous.default
        assert torch.equal(ir(*inputs)[0], f(x))
        with pytest.raises(Exception, match="memory that its operand does not hold"):
            captured(lambda x: x.as_strided((2,), (1,), 0) * 1, torch.randn(4, 6)[1:, 1:])


@pytest.mark.parametrize("way", ["no_grad", "detach", "data"])
def test_writes_that_autograd_does_not_see(way: str) -> None:
    """Gradients go past them; as values they would not. Where no gradient is asked for they are writes as any other."""

    def f(x: Tensor) -> Tensor:
        y = x * 1
        if way == "no_grad":
            with torch.no_grad():
                y[:, :2] *= 3
        else:
            (y.detach() if way == "detach" else y.data)[:, :2].mul_(3)
        return y * 2

    with pytest.raises(Exception, match="a write past gradients"):
        captured(f, torch.randn(2, 4, requires_grad=True))
    torch._dynamo.reset()
    ir, inputs = captured(f, x := torch.randn(2, 4))
    assert torch.equal(ir(*inputs)[0], f(x))
