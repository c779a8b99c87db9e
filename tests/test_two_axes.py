"""Attention within frames and over all frames in turn: what merges within a frame stays merged where frames mix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx

B, FRAMES, N, D, H = 2, 3, 40, 32, 2
Whole = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, F, n, H, d] -> [B, F, n, H, d], every token attending to those of all frames."""


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (FRAMES, -1))


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (q, k, v))
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).matmul(v).unflatten(2, (FRAMES, -1)).permute(0, 2, 3, 1, 4)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bfnhd,bgmhd->bhfngm", q, k) * q.shape[-1] ** -0.5
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
    return torch.einsum("bhfngm,bgmhd->bfnhd", weights, v)


def keys_in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    weights = (torch.einsum("bfnhd,bmhd->bhfnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhfnm,bmhd->bfnhd", weights, v)


def queries_in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.flatten(1, 2) * q.shape[-1] ** -0.5
    weights = torch.einsum("b n h d, b g m h d -> b h n g m", q, k).flatten(3).softmax(3).unflatten(3, (FRAMES, -1))
    return torch.einsum("bhngm,bgmhd->bnhd", weights, v).unflatten(1, (FRAMES, -1))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bfnhd,bgmhd->bfnhgm", q, k) * q.shape[-1] ** -0.5
    weights = scores.exp()
    return torch.einsum("bfnhgm,bgmhd->bfnhd", weights, v) / weights.sum((-2, -1))[..., None]


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bfnhd,bfnhe->bhde", k, v)
    return torch.einsum("bfnhd,bhde->bfnhe", q, state) / torch.einsum("bfnhd,bhd->bfnh", q, k.sum((1, 2)))[..., None]


WHOLE: dict[str, Whole] = {
    "sdpa": by_sdpa, "matmul": by_matmul, "linear": linear, "einsum": by_einsum, "by hand": by_hand,
    "keys in one": keys_in_one, "queries in one": queries_in_one,
}  # fmt: skip
PAIRS = ("by hand",)
"""Where frames stand beside frames, nothing says within which of them tokens merged: they get their places back."""
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((1, 2)),
    "mean of rows": lambda x: x.flatten(1, 2).mean(1),
    "sum of means": lambda x: x.mean(2).sum(1),
    "largest": lambda x: x.amax((1, 2)),
    "norm": lambda x: x.flatten(1, 2).norm(dim=1),
    "pooled": lambda x: (x.flatten(1, 2)[..., :1].softmax(1) * x.flatten(1, 2)).sum(1),
    "logsumexp": lambda x: x.flatten(1, 2).logsumexp(1),
}


class Turns(nn.Module):
    """A block within each frame, and one over all frames, for [B, F, n, D]."""

    def __init__(self, whole: str, read: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole, self.read = WHOLE[whole], READ[read]
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(D, width * D) for _ in range(2)) for width in (3, 1))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv[0](self.norms[0](x)).unflatten(-1, (3, H, -1)).flatten(0, 1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out[0](y.unflatten(0, (-1, FRAMES)))
        x = x + self.mlps[0](self.norms[1](x))
        q, k, v = self.qkv[1](self.norms[2](x)).unflatten(-1, (3, H, -1)).unbind(-3)
        x = x + self.out[1](self.whole(q, k, v).flatten(-2))
        x = x + self.mlps[1](self.norms[3](x))
        return self.read(x)


def assert_kept(whole: str, read: str, r: int, batch: int = B) -> None:
    """The tied law holds, and nothing gets its tokens back that need not."""
    torch.manual_seed(1)
    model, x = Turns(whole, read).double().eval(), torch.randn(batch, FRAMES, N, D, dtype=torch.float64)
    found = tome_fx.check(model, (x,), r=[r], placement="stream")
    assert found.holds and found.merges, found.summary()
    assert bool(found.report.unmerges) == (whole in PAIRS), found.report.unmerges
    assert found.report.tokens == [(N, N - r)]


@pytest.mark.parametrize("whole", WHOLE)
def test_attention_over_all_frames(whole: str) -> None:
    assert_kept(whole, "mean", 12)


@pytest.mark.parametrize("read", READ)
def test_reading_all_frames(read: str) -> None:
    assert_kept("sdpa", read, 9)


@settings(max_examples=5)
@given(st.data())
def test_any(data: st.DataObject) -> None:
    draw = (st.sampled_from(list(WHOLE)), st.sampled_from(list(READ)), st.integers(1, 20), st.integers(1, 3))
    assert_kept(*(data.draw(each) for each in draw))


def test_samples_against_each_other() -> None:
    """Where tokens of one frame meet those of another one by one, they get their places back."""
    model = Turns("sdpa", "mean").double().eval()
    model.whole = lambda q, k, v: by_sdpa(q, k.roll(1, 1), v)
    x = torch.randn(B, FRAMES, N, D, dtype=torch.float64)
    found = tome_fx.check(model, (x,), r=[9], placement="stream")
    assert found.holds and found.merges and found.report.unmerges, found.summary()
