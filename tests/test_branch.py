"""Branch placement: merging around one attention, on plain transformers by request and on windows, grids and frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx
from tests import strategies
from tests.laws import MATCHES
from tests.models import ATTENTION, LAYOUT, MASK, Spec, build, redraw
from tests.palette import LossyMatch, assert_lossless, equalize, palette_grid, palette_input, palette_tokens, run

R = 4
SPELLINGS = [
    spec
    for attention in ATTENTION
    for layout in LAYOUT
    if (spec := strategies.legal(Spec(readout="mean"), attention=attention, layout=layout))
]
OTHERS = [
    *(Spec(mask=mask, readout="mean") for mask in MASK[1:]),
    Spec(prefix="cls_reg", readout="tokens"),
    Spec(norm="post", readout="tokens"),
    Spec(parallel=True, readout="mean"),
    Spec(qk_norm=True, rms=True, mlp="swiglu"),
    Spec(attention="matmul", talking=True, readout="mean"),
    Spec(batch=1, readout="mean"),
]


@pytest.mark.parametrize("spec", strategies.thinned([*SPELLINGS, *OTHERS], 2))
def test_plain_transformers(spec: Spec) -> None:
    """On request, every block merges around its attention, and the stream keeps its length."""
    model, _ = build(spec)
    report = assert_lossless(equalize(model), palette_input(spec), R, placement="branch", sites=spec.depth)
    assert {site.placement for site in report.sites} == {"branch"}
    assert len(set(report.tokens)) == 1, report.tokens


def test_the_law_can_fail() -> None:
    spec = Spec(readout="mean")
    model, _ = build(spec)
    assert_lossless(equalize(model, seed=1), palette_input(spec), R, placement="branch", control=True)


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@settings(max_examples=10)
@given(st.data())
def test_random_transformers(data: st.DataObject) -> None:
    spec = data.draw(strategies.specs())
    r = data.draw(st.integers(1, 4))
    note(f"{spec} r={r}")
    model, _ = build(spec)
    if spec.mask == "float" and spec.attention in ("encoder", "encoder_layer"):
        reject()  # torch's fused eval path takes a float key mask for a bool one
    try:
        assert_lossless(equalize(model), palette_input(spec), r, placement="branch")
    except LossyMatch:
        reject()
    except AssertionError as error:
        if not str(error).startswith("nothing was merged"):
            raise
        reject()


# -- windows, grids, frames --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """[..., N, D] with an optional score term [heads, N, N] or [windows, 1, N, N]."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x: Tensor, term: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=term).transpose(1, 2).reshape(b, n, d))


def windows(x: Tensor, w: int) -> Tensor:
    """[B, H, W, C] -> [B * windows, w * w, C]."""
    b, h, _, c = x.shape
    return x.view(b, h // w, w, h // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)


def unwindow(x: Tensor, w: int, b: int, h: int) -> Tensor:
    c = x.shape[-1]
    return x.view(b, h // w, h // w, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, h, c)


class Block(nn.Module):
    """One pre-norm block on a grid [B, H, W, C]; `attend` is what differs."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Windowed(Block):
    """Swin's unshifted block, with a relative position table."""

    def __init__(self, w: int = 6) -> None:
        super().__init__()
        self.w, self.rel_pos = w, nn.Parameter(torch.randn(2, w * w, w * w))

    def attend(self, x: Tensor) -> Tensor:
        return unwindow(self.attn(windows(x, self.w), self.rel_pos[None]), self.w, x.shape[0], x.shape[1])


class Shifted(Windowed):
    """Swin's shifted block: a mask keeps the parts of a rolled window apart."""

    mask: Tensor

    def __init__(self, w: int = 6, h: int = 12) -> None:
        super().__init__(w)
        region = (torch.arange(h) >= h - w).int() + (torch.arange(h) >= h - w // 2).int()
        region = windows((3 * region[:, None] + region)[None, ..., None].float(), w)[..., 0]
        self.register_buffer("mask", (region[:, :, None] != region[:, None]).float() * -100.0)

    def attend(self, x: Tensor) -> Tensor:
        b, h = x.shape[:2]
        shifted = windows(x.roll((-3, -3), (1, 2)), self.w)
        term = self.rel_pos + self.mask[:, None]
        out = self.attn(shifted, term.repeat(b, 1, 1, 1))
        return unwindow(out, self.w, b, h).roll((3, 3), (1, 2))


class Flattened(Block):
    """Global attention on a grid that stays a grid (ViTDet)."""

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2)).view(x.shape)


class Channels(Block):
    """Channels first, 1x1 convolutions for projections (Visformer)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__(dim)
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def attend(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, 2, c // 2, h * w).permute(1, 0, 2, 4, 3).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return self.proj(out).permute(0, 2, 3, 1)


class Rows(Block):
    """Attention along each row of the grid (axial, or per frame)."""

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(0, 1)).view(x.shape)


class Net(nn.Module):
    """A patch embedding to a grid, blocks, and every position as output."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 32, 4, 4), nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.embed(x).permute(0, 2, 3, 1))


GRIDS: dict[str, tuple[Any, int]] = {
    "windows": (lambda: Net(Windowed(), Windowed()), 2),
    "flattened": (lambda: Net(Flattened(), Flattened()), 2),
    "channels": (lambda: Net(Channels(), Channels()), 2),
    "rows": (lambda: Net(Rows(), Rows()), 2),
    "mixed": (lambda: Net(Windowed(), Flattened(), Rows()), 3),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str) -> None:
    """Each window, row or grid merges inside itself; without proportional attention the result would be off."""
    make, sites = GRIDS[name]
    torch.manual_seed(0)
    model = equalize(redraw(make()).eval())
    image = palette_grid(2, (12, 12), (4, 4), k=2 if name in ("rows", "mixed") else 3)
    report = assert_lossless(model, (image,), 3, sites=sites, placement="branch", control=True)
    assert f"{sites} of them around the attention alone" in report.summary()
    assert {site.placement for site in report.sites} == {"branch"}


class Bare(nn.Module):
    """Separate projections of the stream itself: no other value has both queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        return x + F.scaled_dot_product_attention(*(t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v))).sum(1)


class SplitConvolution(Channels):
    """Queries, keys and values leave one convolution as maps, and become tokens one by one (BoTNet)."""

    def attend(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b * 2, c // 2, h * w).mT for t in self.qkv(x).split(c, 1))
        out = (q @ k.mT * 0.25).softmax(-1) @ v
        return self.proj(out.mT.reshape(b, c, h, w)).permute(0, 2, 3, 1)


def test_operands_merge_where_no_value_before_can() -> None:
    torch.manual_seed(0)
    image = palette_grid(2, (12, 12), (4, 4), k=3)
    model = equalize(redraw(Net(SplitConvolution(), SplitConvolution())).eval())
    assert_lossless(model, (image,), 5, sites=2, placement="branch", control=True)


def test_cross_attention_merges_its_queries() -> None:
    """The keys are other tokens and stay: the result is that of full attention where queries are equal."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.bare = nn.LayerNorm(32), Bare()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q = self.norm(x)
            attend = nn.functional.scaled_dot_product_attention
            return x + attend(self.bare.q(q), self.bare.k(y), self.bare.v(y))

    x, y = palette_tokens(2, 40, 32, k=3), torch.randn(2, 30, 32)
    report = assert_lossless(redraw(Cross()).eval(), (x, y), 6, sites=1, placement="branch")
    assert report.tokens == [(40, 34)]


def test_a_decoder_never_merges() -> None:
    """Its tokens see each other in causal order; merged queries would show the past the future."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.layer(
                x, memory, tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(20)
            )

    args = torch.randn(2, 20, 32), torch.randn(2, 30, 32)
    with pytest.warns(match="causal"):
        report = run(Decoder().eval(), args, None, 4)[1]
    assert report.merged_sites == 0
    assert {s.kind for s in report.skipped} == {"causal or windowed mask"}


def test_features_are_no_tokens() -> None:
    """Attention over channels (DaViT, EdgeNeXt): merging its "tokens" would merge features."""

    class Transposed(Block):
        def attend(self, x: Tensor) -> Tensor:
            x = x.flatten(1, 2)
            q, k, v = self.attn.qkv(x).chunk(3, -1)
            return self.attn.proj(F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT).view(-1, 12, 12, 32)

    with pytest.warns(match="features"):
        report = run(Net(Transposed()).eval(), (torch.randn(2, 3, 48, 48),), None, 4)[1]
    assert [s.kind for s in report.skipped] == ["attention over channels", "MLP does not pay"]
    assert report.merged_sites == 0


def test_gradients_flow_through_a_branch() -> None:
    model = Net(Windowed(), Windowed()).train()
    image = torch.randn(2, 3, 48, 48)
    out, report = run(model, (image,), None, 4, grad=True, placement="branch")
    out.square().mean().backward()
    assert report.merged_sites == 2
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


JOINS: dict[str, Any] = {
    "add": torch.add,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "maximum": torch.maximum,
    "hypot": torch.hypot,
    "index_add": lambda x, y: x.index_add(1, torch.arange(x.shape[1]), y),
    "sample by sample": lambda x, y: torch.stack([a + b for a, b in zip(x, y, strict=True)]),
}


class Joined(nn.Module):
    """A block whose residual is joined in some other way than by an add."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.join, self.embed, self.qkv, self.out = join, nn.Linear(32, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.join(x, self.out(y))
        return self.join(x, self.mlp(x))


@pytest.mark.parametrize("name", JOINS)
def test_a_branch_ends_where_its_output_meets_the_stream(name: str) -> None:
    """However they are joined: no token loses its own residual. Before, all but adds merged the stream from the block's
    input on."""
    torch.manual_seed(0)
    model, x = redraw(Joined(JOINS[name])).eval(), torch.randn(2, 96, 32)
    with torch.no_grad():
        out = tome_fx.rewrite(model, (x,), r=8, placement="branch")(x)
    assert tome_fx.check(model, (x,), r=8, placement="branch").error < 1e-9
    apart = torch.cdist(out[0], out[0]).fill_diagonal_(1.0)
    assert apart.min() > 1e-6


# -- groups of a block before ------------------------------------------------------------------------------------------


def matches(model: nn.Module, x: Tensor, **config: Any) -> int:
    """How many times a graph matches."""
    graph = tome_fx.rewrite(model, (x,), r=R, placement="branch", plain=False, **config)
    return sum(node.target in MATCHES for node in graph.graph.nodes)


@pytest.fixture(scope="module")
def deep() -> tuple[nn.Module, Tensor]:
    spec = Spec(depth=5, readout="tokens")
    model, args = build(spec)
    return model.eval(), args[0]


@pytest.mark.parametrize(("k", "found"), [(0, 5), (1, 3), (2, 2), (9, 1)])
def test_groups_serve_the_next_blocks(deep: tuple[nn.Module, Tensor], k: int, found: int) -> None:
    """Each branch has groups of its own, or those of one at most k blocks before; MLPs have their attention's."""
    model, x = deep
    assert matches(model, x, reuse=k) == found
    own = tome_fx.check(model, (x,), r=R, placement="branch", reuse=k)
    assert own.holds, own
    sites = own.report.sites
    assert [site.compared for site in sites] == [
        f"what {sites[i - i % (k + 1)].name} was" if i % (k + 1) else "" for i in range(5)
    ]


def test_groups_serve_as_many_tokens_alone(deep: tuple[nn.Module, Tensor]) -> None:
    """Other counts are other groups, and nobody is told that they were shared."""
    model, x = deep
    report = tome_fx.explain(model, (x,), r=[6, 5, 4, 3, 2], placement="branch", reuse=4)
    assert [s.kind for s in report.skipped] == ["reuse"]
    with pytest.raises(ValueError, match="reuse is of branches"):
        tome_fx.tome_backend(r=R, reuse=1, placement="stream")
    with pytest.raises(ValueError, match="reuse must be an int of 0 or more"):
        tome_fx.tome_backend(r=R, reuse=-1)
