"""spread: what is the same along a dim is read with size 1 there, whatever spread it out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from passes.capture import capture
from tests.models import redraw
from tests.palette import run
from tests.strategies import thinned

B, H, N, E = 2, 3, 24, 8
aten = torch.ops.aten


def low(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, -math.inf)


ROW: dict[str, Callable[[Tensor], Tensor]] = {
    # of keep, bool [B, N]: a mask that every query and head reads alike
    "row": lambda m: m[:, None, None],
    "expand": lambda m: m[:, None, None].expand(B, 1, N, N),
    "expand heads": lambda m: m[:, None, None].expand(-1, H, N, -1),
    "expand, clone": lambda m: m[:, None, None].expand(-1, H, N, -1).clone(),
    "expand, contiguous": lambda m: m[:, None, None].expand(-1, H, N, -1).contiguous(),
    "expand_as": lambda m: m[:, None, None].expand_as(torch.empty(B, H, N, N)),
    "broadcast_to": lambda m: torch.broadcast_to(m[:, None, None], (B, H, N, N)),
    "repeat": lambda m: m[:, None, None].repeat(1, H, N, 1),
    "tile": lambda m: torch.tile(m[:, None, None], (1, H, N, 1)),
    "repeat_interleave": lambda m: m[:, None].repeat_interleave(H, 0).view(B, H, 1, N),
    "repeat_interleave of rows": lambda m: m.repeat_interleave(N, 0).view(B, N, N)[:, None],
    "filled, then repeat_interleave": lambda m: (
        low(m[:, None].expand(-1, N, -1)).repeat_interleave(H, 0).view(-1, H, N, N)
    ),
    "stack": lambda m: torch.stack([m] * H, 1)[:, :, None],
    "cat": lambda m: torch.cat([m[:, None]] * N, 1)[:, None],
    "an outer product with ones": lambda m: torch.ones(1, 1, N, 1, dtype=torch.bool) & m[:, None, None],
    "a comparison that always holds": lambda m: (torch.arange(N)[:, None] >= 0) & m[:, None, None],
    "times ones": lambda m: low(m)[:, None, None] * torch.ones(N, 1),
    "filled": lambda m: low(m[:, None].expand(-1, N, -1))[:, None],
    "where": lambda m: torch.where(m[:, None, None].expand(B, 1, N, N), 0.0, -1e9),
    "one minus": lambda m: (1.0 - m[:, None, None].expand(-1, -1, N, -1).float()) * -1e9,
    "index": lambda m: m[torch.arange(B)[:, None, None, None], torch.arange(N)[None, None, None].expand(1, 1, N, N)],
    "gather": lambda m: m[:, None].expand(B, N, N).gather(2, torch.arange(N).expand(B, N, N))[:, None],
    "transposed": lambda m: m[:, None, :, None].expand(B, 1, N, N).transpose(-1, -2),
    "flattened": lambda m: m[:, None].expand(B, H * N, N).reshape(B, H, N, N),
    "cut out": lambda m: m[:, None, None].expand(B, 1, 2 * N, N)[:, :, N:],
}  # fmt: skip


def added(scores: Tensor, mask: Tensor) -> Tensor:
    eye = torch.eye(N).expand(B * H, N, N)
    return torch.baddbmm(mask.reshape(B * H, N, N), scores, eye).view(B, H, N, N)


READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # of scores and a mask
    "add": lambda s, m: s + (m if m.is_floating_point() else low(m)),
    "masked_fill": lambda s, m: s.masked_fill(~m if m.dtype is torch.bool else m < -1, -math.inf),
    "where": lambda s, m: torch.where(m if m.dtype is torch.bool else m > -1, s, -math.inf),
    "baddbmm": lambda s, m: added(s.flatten(0, 1), (m if m.is_floating_point() else low(m)).expand(B, H, N, N)),
}  # fmt: skip


class Net(nn.Module):
    """Two blocks under a mask of keys, made by `make` from keep, bool [B, N]."""

    def __init__(self, make: Callable[[Tensor], Tensor], read: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.make, self.read = make, read
        self.norms = nn.ModuleList(nn.LayerNorm(H * E) for _ in range(2))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(H * E, k * H * E) for _ in range(2)) for k in (3, 1))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4).unbind(0)
            mask = self.make(keep)
            if self.read is None:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                y = self.read(q @ k.mT * E**-0.5, mask).softmax(-1) @ v
            x = x + out(y.transpose(1, 2).flatten(2))
        return x


def keeps() -> Tensor:
    return torch.arange(N) < torch.tensor([[N], [17]])


@pytest.mark.parametrize("name", thinned(ROW, 3))
def test_a_mask_of_keys_is_one_however_it_is_spread(name: str) -> None:
    """The same merges, FLOPs and costs as the row."""
    torch.manual_seed(0)
    x = torch.randn(B, N, H * E)
    plain, model = (redraw(Net(ROW[n], None)).eval() for n in ("row", name))
    model.load_state_dict(plain.state_dict())
    want, base = run(plain, (x, keeps()), None, 6, placement="stream")
    got, report = run(model, (x, keeps()), None, 6, placement="stream")
    torch.testing.assert_close(got, want)
    assert report.tokens == base.tokens == [(N, N - 6), (N - 6, N - 12)]
    assert report.flops_after == base.flops_after


SPREAD = ("expand", "repeat_interleave", "filled", "a comparison that always holds", "flattened")


@pytest.mark.parametrize(("name", "read"), thinned(product(SPREAD, READ), 3))
def test_scores_read_what_was_spread(name: str, read: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, N, H * E)
    plain, model = (redraw(Net(ROW[n], READ[read])).eval() for n in ("row", name))
    model.load_state_dict(plain.state_dict())
    want, base = run(plain, (x, keeps()), None, 6, placement="stream")
    got, report = run(model, (x, keeps()), None, 6, placement="stream")
    torch.testing.assert_close(got, want)
    assert report.tokens == base.tokens == [(N, N - 6), (N - 6, N - 12)]
    assert report.flops_after == base.flops_after


def captured(f: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    return capture(make_fx(f, pre_dispatch=True)(*args), list(args)).gm


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze": lambda x: x.unsqueeze(1),
    "last": lambda x: x.unsqueeze(-1),
    "expand": lambda x: x.expand(*[3 if n == 1 else n for n in x.shape]),
    "add a dim": lambda x: x.expand(2, *x.shape),
    "repeat": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
    "tile": lambda x: x.repeat(*[1] * (x.dim() - 1), 2),
    "interleave": lambda x: x.repeat_interleave(2, 0),
    "interleave last": lambda x: x.repeat_interleave(3, -1),
    "stack": lambda x: torch.stack([x, x], -1),
    "cat": lambda x: torch.cat([x, x], -1),
    "flatten": lambda x: x.flatten(),
    "halve": lambda x: x.unflatten(0, (2, -1)) if x.shape[0] % 2 == 0 else x,
    "halve last": lambda x: x.unflatten(-1, (-1, 2)) if x.shape[-1] % 2 == 0 else x,
    "transpose": lambda x: x.transpose(0, -1),
    "slice": lambda x: x[: max(1, x.shape[0] - 1)],
    "slice last": lambda x: x[..., 1:] if x.shape[-1] > 1 else x,
    "double": lambda x: x * 2,
    "plus ones": lambda x: x + torch.ones(2, *x.shape),
    "plus itself": lambda x: x + x.clone(),
    "running sum": lambda x: x.cumsum(0),
    "flip": lambda x: x.flip(-1),
    "gather": lambda x: x.gather(-1, torch.zeros(x.shape, dtype=torch.int64)),
    "outer product": lambda x: torch.einsum("a...,b->ab...", x, torch.ones(2, dtype=x.dtype)),
    "largest": lambda x: x.amax(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.double(),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7), st.data())
def test_any_way_to_spread_keeps_the_value(names: list[str], data: st.DataObject) -> None:
    """Read by an op that has the size, and by itself."""
    x = torch.arange(4.0)

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for name in names:
            x = STEPS[name](x)
        return x, x * y + 1

    shape = f(x, torch.ones(()))[0].shape
    if shape.numel() > 20000:
        return
    y = torch.rand(shape, dtype=torch.float64)
    gm = capture(make_fx(f, pre_dispatch=True)(x, y), [x, y]).gm
    for got, want in zip(gm(x, y), f(x, y), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def test_what_is_read_is_the_row() -> None:
    def f(scores: Tensor, keep: Tensor) -> Tensor:
        return scores + low(keep[:, None].expand(-1, N, -1)).repeat_interleave(H, 0).view(-1, H, N, N)

    gm = captured(f, torch.randn(B, H, N, N), keeps())
    sizes = [n.meta["val"].numel() for n in gm.graph.nodes if n.op == "call_function"]
    assert sorted(sizes)[-2] <= B * N, gm.graph


def test_what_has_nothing_else_of_its_size_stays_spread() -> None:
    def f(x: Tensor) -> Tensor:
        return (x[:, None].expand(-1, 5, -1) + 1).sum(1)

    x = torch.randn(B, N)
    torch.testing.assert_close(captured(f, x)(x), f(x))


def test_a_product_of_any_length_keeps_its_value() -> None:
    """Where it would have to be written out to a size that is a symbol, it stays spread."""

    def f(x: Tensor, keep: Tensor) -> Tensor:
        return x + torch.einsum("bi,bj->bij", torch.ones(len(keep), N), keep.float()).cumsum(0)

    def inner(gm: fx.GraphModule, args: list[Tensor]) -> Callable[..., Any]:
        return capture(gm, args).gm

    x = torch.randn(B, N, N)
    torch.testing.assert_close(torch.compile(f, backend=inner, dynamic=True)(x, keeps()), f(x, keeps()))


@pytest.mark.parametrize("cut", [lambda n: n // 2, lambda n: n - 2, lambda n: -2], ids=["half", "all but two", "two"])
def test_parts_of_any_length_keep_their_order(cut: Callable[[int], int]) -> None:
    """From a place that is a symbol, or counted from an end that is one, joined as they stood and the last first."""

    def f(x: Tensor) -> Tensor:
        at = cut(x.shape[1])
        return torch.cat([x[:, :at], x[:, at:], x[:, at:], x[:, :at]], 1)

    def inner(gm: fx.GraphModule, args: list[Tensor]) -> Callable[..., Any]:
        return capture(gm, args).gm

    x = torch.randn(B, N, N)
    assert torch.equal(torch.compile(f, backend=inner, dynamic=True)(x), f(x))
