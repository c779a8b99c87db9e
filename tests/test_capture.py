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


FUNCTIONS: list[Fn] = [view_then_write, nested_views, two_writes, chained, select_write, masked, writes_its_input]


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

    with pytest.raises(Exception, match=r"outside of the graph's ops \(by torch\.func"):
        captured(f, torch.randn(3))
