"""What branches compare: the mean of the keys over heads, made before the keys are, however a model spells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tome_fx
from tests.laws import MATCHES
from tests.models import redraw

N, D, H, R = 48, 32, 4, 10
Heads = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]


def by_block(m: Any, y: Tensor) -> Any:
    return m.qkv(y).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def by_head(m: Any, y: Tensor) -> Any:
    return m.qkv(y).unflatten(-1, (H, -1)).transpose(1, 2).chunk(3, -1)


def heads_inside(m: Any, y: Tensor) -> Any:
    return (x.unflatten(-1, (-1, H)).movedim(-1, 1) for x in m.qkv(y).chunk(3, -1))


def apart(m: Any, y: Tensor) -> Any:
    return (F.linear(y, w, b).unflatten(-1, (H, -1)).transpose(1, 2)
            for w, b in zip(m.qkv.weight.chunk(3), m.qkv.bias.chunk(3), strict=True))  # fmt: skip


def unbiased(m: Any, y: Tensor) -> Any:
    return (y @ m.qkv.weight.T).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)


def added(m: Any, y: Tensor) -> Any:
    z = torch.addmm(m.qkv.bias, y.flatten(0, 1), m.qkv.weight.T).view(*y.shape[:2], 3, H, -1)
    return z.permute(2, 0, 3, 1, 4)


def summed(m: Any, y: Tensor) -> Any:
    return torch.einsum("bnc,thdc->tbhnd", y, m.qkv.weight.unflatten(0, (3, H, -1)))


def one_key(m: Any, y: Tensor) -> Any:
    q, k, v = m.qkv(y).split([D, D // H, D // H], -1)
    return q.unflatten(-1, (H, -1)).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)


def repeated(m: Any, y: Tensor) -> Any:
    """Two heads of keys, each for two of the queries."""
    q, k, v = m.qkv(y).split([D, D // 2, 3 * D // 2], -1)
    heads = (x.unflatten(-1, (-1, D // H)).transpose(1, 2) for x in (q, k, v[..., : D // 2]))
    return (x.repeat_interleave(n, 1) for x, n in zip(heads, (1, 2, 2), strict=True))


def scaled(m: Any, y: Tensor) -> Any:
    q, k, v = by_block(m, y)
    return q, k * 0.5, v


def normed(name: str) -> Heads:
    def heads(m: Any, y: Tensor) -> Any:
        q, k, v = by_block(m, y)
        return q, NORMED[name](k, m.scale), v

    return heads


NORMED: dict[str, Callable[[Tensor, Any], Tensor]] = {  # a norm of each head; what it norms, and a row of its features
    "layer_norm": lambda k, w: F.layer_norm(k, (D // H,), w),
    "root mean square": lambda k, w: k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "normalize": lambda k, w: F.normalize(k, dim=-1),
    "over its length": lambda k, w: w * (k / k.norm(dim=-1, keepdim=True)),
    "by mean and variance": lambda k, w: (lambda v, u: (k - u) / (v + 1e-6).sqrt() * w)(
        *torch.var_mean(k, -1, unbiased=False, keepdim=True)
    ),
    "no dim kept": lambda k, w: k * torch.rsqrt(torch.einsum("...d,...d->...", k, k) / (D // H) + 1e-6)[..., None] * w,
}


def matrices(a: Tensor) -> Tensor:
    return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1).unflatten(-1, (2, 2))


ROTATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # by angles [N, D // H // 2]
    "and added": lambda x, a: (lambda c, s, y: x * c + y * s)(
        *(torch.cat([t, t], -1) for t in (a.cos(), a.sin())),
        torch.cat([-x[..., D // H // 2 :], x[..., : D // H // 2]], -1),
    ),
    "halves, joined": lambda x, a: (lambda u, v: torch.cat([u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()], -1))(
        *x.chunk(2, -1)
    ),
    "complex": lambda x, a: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(a), a)
    ).flatten(-2),
    "complex, halves": lambda x, a: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (2, -1)).mT.contiguous()) * torch.polar(torch.ones_like(a), a)
    ).transpose(-1, -2).flatten(-2),
    "matrices": lambda x, a: torch.einsum("npij,bhnpj->bhnpi", matrices(a), x.unflatten(-1, (-1, 2))).flatten(-2),
    "matrices, matmul": lambda x, a: (matrices(a) @ x.unflatten(-1, (-1, 2)).unsqueeze(-1)).flatten(-3),
}  # fmt: skip


def rotated(name: str) -> Heads:
    def heads(m: Any, y: Tensor) -> Any:
        q, k, v = by_block(m, y)
        angle = torch.arange(y.shape[1])[:, None] * torch.linspace(0.1, 1, D // H // 2)
        return *(ROTATED[name](x, angle) for x in (q, k)), v

    return heads


class Block(nn.Module):
    """A pre-norm attention on [B, N, D], a grid read behind it: it merges as a branch."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.proj = heads, nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.scale, self.drop = nn.Parameter(torch.rand(D // H) + 0.5), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self, self.drop(self.norm(x)))
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return x + self.proj(y.transpose(1, 2).flatten(2))

    def keys(self, x: Tensor) -> Tensor:
        return list(self.heads(self, self.norm(x)))[1]


class Compared(TorchDispatchMode):
    """Keeps what every match compares."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATCHES:
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


def compared(model: nn.Module, x: Tensor, **config: Any) -> tuple[Tensor, Any]:
    """What the first branch of a model compares, and the report of its site."""
    report = tome_fx.explain(model, (x,), r=R, placement="branch", **config)
    graph = tome_fx.rewrite(model, (x,), r=R, placement="branch", plain=False, **config)
    with Compared() as mode, torch.no_grad():
        graph(x)
    return mode.found[0], report.sites[0]


def block(heads: Heads) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return redraw(Block(heads)).eval(), torch.randn(2, N, D)


@pytest.mark.parametrize(
    "heads",
    [by_block, by_head, heads_inside, apart, unbiased, added, summed, repeated, scaled],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_it_is_the_mean_of_the_keys_over_heads(heads: Heads) -> None:
    model, x = block(heads)
    metric, site = compared(model, x)
    want = model.keys(x).mean(1) * (2 if heads is scaled else 1)  # a number changes no cosine
    assert metric.shape == want.shape and torch.allclose(metric, want, rtol=1e-5, atol=1e-5)
    assert site.merged and site.compared == ""


@torch.no_grad()
def test_queries_and_values_too() -> None:
    model, x = block(by_block)
    for name, at in (("query", 0), ("value", 2)):
        metric, _ = compared(model, x, metric=name)
        assert torch.allclose(metric, list(by_block(model, model.norm(x)))[at].mean(1), rtol=1e-5, atol=1e-5)
    for name in ("input", "token"):
        metric, site = compared(model, x, metric=name)
        assert torch.allclose(metric, model.norm(x), atol=1e-6) and site.compared == ""


@torch.no_grad()
def test_a_key_of_all_heads_is_itself() -> None:
    model, x = block(by_block)
    model.heads, model.qkv = one_key, nn.Linear(D, D + 2 * (D // H))
    metric, _ = compared(model, x)
    assert torch.allclose(metric, model.keys(x)[:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_stands_between_is_said() -> None:
    """A norm of each head is done to the mean; what turns keys by place comes after what is compared."""
    plain, x = block(by_block)
    mean = plain.keys(x).mean(1)
    for name, norm in NORMED.items():
        model, x = block(normed(name))
        metric, site = compared(model, x)
        assert torch.allclose(metric, norm(mean, model.scale), rtol=1e-4, atol=1e-4), name
        assert site.compared == "the mean of its keys over heads, normed after", name
    for name in ROTATED:
        model, x = block(rotated(name))
        metric, site = compared(model, x)
        assert torch.allclose(metric, mean, rtol=1e-5, atol=1e-5), name
        assert site.compared == "its keys as they are projected", name
    assert site.compared in str(tome_fx.explain(model, (x,), r=R, placement="branch"))


@torch.no_grad()
def test_one_wide_head_is_compared_by_what_merges() -> None:
    """It would cost a product to make, and be no narrower."""
    model, x = block(lambda m, y: (z.unsqueeze(1) for z in m.qkv(y).chunk(3, -1)))
    metric, site = compared(model, x)
    assert torch.allclose(metric, model.norm(x), atol=1e-6)
    assert site.compared == "all channels of what merges"


@pytest.mark.parametrize("tokens", [N, 60])
@torch.no_grad()
def test_any_batch_and_length(tokens: int) -> None:
    """Sizes are symbols in one graph for all."""
    model, x = block(by_head)
    batch, n = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("n", min=32, max=512)
    graph = tome_fx.rewrite(model, (x,), r=R, placement="branch", plain=False, dynamic_shapes=({0: batch, 1: n},))
    other = torch.randn(5, tokens, D)
    with Compared() as mode:
        graph(other)
    assert torch.allclose(mode.found[0], model.keys(other).mean(1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_stands_before_the_product_is_done_once_more() -> None:
    """Where tokens merge before a half is taken and made longer, both are done at full length too."""

    def halves(m: Any, y: Tensor) -> Any:
        first, second = y.chunk(2, -1)
        return by_block(m, torch.cat([second * 2, first], -1).view(y.shape))

    model, x = block(halves)
    metric, site = compared(model, x)
    assert torch.allclose(metric, model.keys(x).mean(1), rtol=1e-5, atol=1e-5) and site.compared == ""


def test_random_numbers_are_drawn_once() -> None:
    """Dropout between the norm and the projection is not done again for the matching."""
    model, x = block(by_block)
    model.train().drop.p = 0.5
    graph = tome_fx.rewrite(model, (x,), r=R, placement="branch", plain=False)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.dropout.default) == 1 and set(targets) & set(MATCHES)


def test_no_gradient_flows_through_what_is_compared() -> None:
    """The metric's product leaves no gradient: that of the weights is the merged graph's alone."""
    model, x = block(by_block)
    graph = tome_fx.rewrite(model, (x,), r=R, placement="branch", plain=False)
    with Compared() as mode:
        graph(x).sum().backward()
    assert not mode.found[0].requires_grad and model.qkv.weight.grad is not None
