"""MLPs of blocks whose stream cannot merge: each merges on its own, over the stream's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.models import Spec, build, redraw
from tests.palette import assert_lossless, equalize, palette_grid, palette_input, palette_tokens, run
from tests.recording import record
from tests.test_branch import Attention, unwindow, windows

R = 8


class Block(nn.Module):
    """A block on [B, H * W, C] whose attention sees windows; `form` is how its MLP is spelled."""

    def __init__(self, form: str, h: int = 12, w: int = 4, dim: int = 32) -> None:
        super().__init__()
        self.form, self.h, self.w = form, h, w
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim)
        self.fc1, self.fc2, self.gate = nn.Linear(dim, 64), nn.Linear(64, dim), nn.Linear(dim, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1, groups=64)
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def mlp(self, x: Tensor) -> Tensor:
        if self.form == "swiglu":
            return self.fc2(F.silu(self.gate(x)) * self.fc1(x))
        if self.form == "conv1x1":
            w1, w2 = self.fc1.weight[:, :, None], self.fc2.weight[:, :, None]
            return F.conv1d(F.gelu(F.conv1d(x.mT, w1)), w2).mT
        if self.form == "depthwise":
            return self.fc2(F.gelu(self.conv(self.fc1(x).mT)).mT)
        return self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = windows(self.norm1(x).view(b, self.h, self.h, c), self.w)
        x = x + unwindow(self.attn(y), self.w, b, self.h).reshape(b, n, c)
        if self.form == "post":
            return self.norm2(x + self.mlp(x))
        if self.form == "res_post":
            return x + self.norm2(self.mlp(x))
        if self.form == "scaled":
            return x + self.scale * self.mlp(self.norm2(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 32, 4, 4), nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.embed(x).flatten(2).mT)


class Modulated(nn.Module):
    """A block of DiT (arXiv 2212.09748): shift, scale and gate of both branches come from a condition."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm, self.attn, self.condition = nn.LayerNorm(dim), Attention(dim), nn.Linear(dim, 6 * dim)
        self.fc1, self.fc2 = nn.Linear(dim, 64), nn.Linear(64, dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, N, C], [B, C]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c))[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.fc2(F.gelu(self.fc1(self.norm(x) * (1 + scale2) + shift2)))


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Modulated(), Modulated()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.second(self.first(x, c), c)


def test_condition_joins_the_mlp() -> None:
    """A gate that comes from elsewhere is no second way from the stream into the MLP: it merges as any other.

    Before, the condition kept every value of the MLP from dominating its result, and DiT's MLPs stayed whole."""
    torch.manual_seed(0)
    model = equalize(redraw(Conditioned()).eval())
    args = (palette_tokens(2, 36, 32, k=4), torch.randn(2, 32))
    report = assert_lossless(model, args, 6, sites=2, placement="branch", control=True)
    assert [site.mlp for site in report.sites] == [(36, 30)] * 2


FORMS = ("pre", "post", "res_post", "scaled", "swiglu", "conv1x1")


@pytest.mark.parametrize("form", FORMS)
def test_windowed_blocks(form: str) -> None:
    """The MLP merges over rows of the stream that hold no fewer tokens than a window, and the law holds."""
    torch.manual_seed(0)
    model = equalize(redraw(Net(Block(form), Block(form))).eval())
    image = palette_grid(2, (12, 12), (4, 4), k=2)
    report = assert_lossless(model, (image,), 3, sites=2, placement="branch", control=True)
    assert report.tokens == [(16, 13)] * 2
    assert [site.mlp for site in report.sites] == [(48, 45)] * 2
    assert "MLP: 48" in str(report)


def test_a_convolution_inside_ends_the_merge() -> None:
    """Tokens that see their neighbours are whole again before they do."""
    torch.manual_seed(0)
    model = Net(Block("depthwise"), Block("depthwise")).eval()
    image = torch.randn(2, 3, 48, 48)
    out, report = run(model, (image,), None, 3, placement="branch")
    assert any("conv" in u.op for u in report.unmerges)
    assert out.shape == model(image).shape


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
def test_what_does_not_pay_is_left_out() -> None:
    """Matching that costs more than the MLP saves: listed, with the place and both numbers."""
    torch.manual_seed(0)
    blocks = (Block("pre", h=32, w=8) for _ in range(2))
    _, report = run(Net(*blocks).eval(), (torch.randn(1, 3, 128, 128),), None, 1)
    assert {s.kind for s in report.skipped} == {"does not pay", "MLP does not pay"}
    assert "blocks.0.attn (MLP)" in {s.where for s in report.skipped}
    assert all(site.mlp is None for site in report.sites)


def test_queries_of_pooled_keys() -> None:
    """Keys pooled from the tokens and scores of their own: only the MLP merges, and the report says so."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.q, self.kv, self.proj = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)
            self.pool = nn.Conv2d(32, 32, 2, 2)
            self.mlp = nn.Sequential(nn.Linear(32, 512), nn.GELU(), nn.Linear(512, 32))

        def forward(self, x: Tensor) -> Tensor:
            b, _, c = x.shape
            y = self.norm1(x)
            k, v = self.kv(self.pool(y.mT.reshape(b, c, 8, 8)).flatten(2).mT).chunk(2, -1)
            scores = self.q(y) @ k.mT * 0.2
            shares = scores.softmax(-1)
            x = x + self.proj(shares @ v + 0.0 * shares.sum(-1, keepdim=True))
            return x + self.mlp(self.norm2(x))

    torch.manual_seed(0)
    x = palette_tokens(2, 64, 32, k=3)
    report = assert_lossless(redraw(nn.Sequential(Pooled(), Pooled())).eval(), (x,), R, sites=2)
    assert {site.placement for site in report.sites} <= {"mlp", "branch"}
    assert all(site.mlp == (64, 56) for site in report.sites)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_plain_transformers(norm: str) -> None:
    """On request every residual branch of a plain transformer is one: attention and MLP."""
    spec = Spec(prefix="cls", norm=norm, grid=(6, 7), readout="tokens")
    model, _ = build(spec)
    report = assert_lossless(equalize(model), palette_input(spec), R, placement="branch", sites=spec.depth)
    assert {site.mlp for site in report.sites} == {(43, 35)}
    stream = assert_lossless(equalize(model), palette_input(spec), R, placement="stream")
    assert {site.mlp for site in stream.sites} == {None}


def test_masks_reach_the_mlp() -> None:
    """Where the attention's mask is one of keys, its padding weighs nothing in the MLP either."""
    spec = Spec(stem="tokens", mask="bool", grid=(6, 7), readout="tokens")
    model, (x, mask) = build(spec)
    other = torch.where(mask[..., None], x, 5 * torch.randn_like(x))
    a, report = run(model, (x, mask), None, R, placement="branch", padding_first=True)
    b, _ = run(model, (other, mask), None, R, placement="branch", padding_first=True)
    assert all(site.mlp for site in report.sites)
    assert not torch.equal(x, other)
    assert torch.equal(a[:, -mask.shape[1] :][mask], b[:, -mask.shape[1] :][mask])


def test_causal_attention_keeps_its_mlp_whole() -> None:
    """A group of a decoder's tokens would show the past what comes after."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.qkv = nn.LayerNorm(32), nn.LayerNorm(32), nn.Linear(32, 96)
            self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.mlp(self.norm2(x))

    with pytest.warns(tome_fx.ToMeWarning, match="causal"):
        report = run(nn.Sequential(Causal(), Causal()).eval(), (torch.randn(2, 64, 32),), None, R, placement="branch")[
            1
        ]
    assert report.merged_sites == 0


def test_schedules_count_sites() -> None:
    """A list has one count for each site, whose MLP merges as many."""
    torch.manual_seed(0)
    model: Any = Net(Block("pre"), Block("pre"), Block("pre")).eval()
    report = run(model, (torch.randn(2, 3, 48, 48),), None, [2, 0, 4], placement="branch")[1]
    assert report.tokens == [(16, 14), (16, 12)]
    assert [site.mlp for site in report.sites] == [(48, 46), None, (48, 44)]


def test_traces_name_the_mlp() -> None:
    torch.manual_seed(0)
    model = Net(Block("pre")).eval()
    trace = tome_fx.trace_tokens(model, (torch.randn(2, 3, 48, 48),), r=3, placement="branch")
    assert [(m.name, m.tokens_before) for m in trace.merges] == [("blocks.0.attn", 16), ("blocks.0.attn (MLP)", 48)]


@pytest.mark.parametrize("masked", [False, True])
def test_an_mlp_takes_the_groups_of_its_attention(masked: bool) -> None:
    """One matching for each block where both merge the same tokens; a window's MLP, on other tokens, has its own."""
    spec = Spec(stem="tokens", mask="bool" if masked else "none", grid=(6, 7), readout="tokens")
    model, args = build(spec)
    _, seen = record(model, args, r=R, placement="branch")
    ops = seen.ops()
    assert all(site.mlp == site.tokens for site in seen.reports[0].sites)
    assert ops["tome.match_size"] + ops["tome.match"] == spec.depth
    assert ops["tome.merge"] == 2 * spec.depth

    torch.manual_seed(0)
    windowed: Any = Net(Block("pre"), Block("pre")).eval()
    _, seen = record(windowed, (torch.randn(2, 3, 48, 48),), r=3, placement="branch")
    ops = seen.ops()
    assert ops["tome.match_size"] + ops["tome.match"] == 4
