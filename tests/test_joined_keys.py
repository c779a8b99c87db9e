"""Keys that are the tokens of the queries and others: learned keys, sinks, latents that read a context."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, palette_tokens, run

D, H, N, R = 32, 4, 48, 6
TOKENS = [(48, 42), (42, 36), (36, 30)]
FORMS = ["front", "behind", "sink", "sink_first", "sink_split", "module", "module_zeros"]


class Block(nn.Module):
    """`form`: where the keys that are no tokens stand, or how a sink is spelled."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))
        self.memory = nn.Parameter(torch.randn(2, H, 5, D // H))
        self.sink = nn.Parameter(torch.randn(H))
        self.table = nn.Parameter(torch.randn(H, N, N))
        self.module = nn.MultiheadAttention(
            D, H, batch_first=True, add_bias_kv=form == "module", add_zero_attn=form == "module_zeros"
        )

    def probabilities(self, scores: Tensor, pad: Tensor | None) -> Tensor:
        """With a sink, a column of scores that no key made."""
        if self.form.endswith("table"):
            scores = scores + self.table
        if self.form == "table":
            return scores.softmax(-1)
        if self.form == "sink_masked":
            scores = scores.masked_fill(pad[:, None, None], float("-inf"))
        sink = self.sink.view(1, H, 1, 1).expand(*scores.shape[:3], 1)
        if self.form == "sink_first":
            return torch.cat([sink, scores], -1).softmax(-1)[..., 1:]
        scores = torch.cat([scores, sink], -1)
        if self.form == "sink_masked_late":
            scores = scores.masked_fill(F.pad(pad, (0, 1))[:, None, None], float("-inf"))
        if self.form == "sink_split":
            return scores.softmax(-1).split([scores.shape[-1] - 1, 1], -1)[0]
        return scores.softmax(-1)[..., :-1]

    def attention(self, x: Tensor, pad: Tensor | None) -> Tensor:
        if self.form.startswith("module"):
            return self.module(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form.startswith("sink") or self.form == "table":
            out = self.probabilities(q @ k.mT * (D // H) ** -0.5, pad) @ v
        elif self.form == "none":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            own = self.memory[:, None].expand(-1, x.shape[0], -1, -1, -1)
            k, v = (torch.cat([t, m] if self.form == "behind" else [m, t], 2) for m, t in zip(own, (k, v), strict=True))
            mask = torch.arange(k.shape[2])[None].remainder(4) > 0 if self.form == "masked" else None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), pad)
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, form: str, depth: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(form) for _ in range(depth)), nn.Linear(D, 7)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, pad)
        return self.head(x.mean(1) if pad is None else x.masked_fill(pad[..., None], 0.0).sum(1))


class Latents(nn.Module):
    """Latents that read a context and themselves, as the resampler of Flamingo (arXiv 2204.14198) does."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, N, D))
        self.q, self.kv, self.proj = (nn.ModuleList(nn.Linear(D, n * D) for _ in range(3)) for n in (1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.latents.expand(x.shape[0], -1, -1)
        for q, kv, proj in zip(self.q, self.kv, self.proj, strict=True):
            k, v = kv(torch.cat([x, y], 1)).unflatten(-1, (2, H, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q(y).unflatten(-1, (H, -1)).transpose(1, 2), k, v)
            y = y + proj(out.transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize("form", FORMS)
def test_the_stream_merges_for_good(form: str) -> None:
    torch.manual_seed(0)
    model = redraw(Net(form)).eval()
    report = assert_lossless(model, (palette_tokens(2, N, D),), R, tokens=TOKENS, control=True)
    assert {site.placement for site in report.sites} == {"stream"}
    assert not report.unmerges, report


def test_latents_that_read_a_context() -> None:
    torch.manual_seed(0)
    model = redraw(Latents()).eval()
    model.latents.data = palette_tokens(1, N, D, k=3)
    assert_lossless(model, (torch.randn(2, 20, D),), R, tokens=TOKENS, placement="stream", control=True)


@pytest.mark.parametrize("metric", ["key", "query", "value"])
@pytest.mark.parametrize("form", ["front", "behind"])
def test_tokens_are_compared_by_their_own_keys(form: str, metric: str) -> None:
    """So the groups of the first block are those that it would have without the other keys."""
    torch.manual_seed(0)
    model, x = redraw(Net("none", depth=1)).eval(), torch.randn(2, N, D)
    alone = tome_fx.trace_tokens(model, (x,), r=R, metric=metric).groups
    model.blocks[0].form = form
    assert torch.equal(tome_fx.trace_tokens(model, (x,), r=R, metric=metric).groups, alone)
    assert not torch.equal(tome_fx.trace_tokens(model, (x,), r=R, metric="input").groups, alone)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_to_merge_is_the_identity(form: str) -> None:
    torch.manual_seed(0)
    model, x = redraw(Net(form)).eval(), torch.randn(2, N, D)
    with torch.no_grad():
        assert torch.equal(run(model, (x,), None, 0)[0], model(x))


@pytest.mark.parametrize("form", ["front", "sink"])
def test_gradients(form: str) -> None:
    torch.manual_seed(0)
    model = redraw(Net(form))
    out, report = run(model, (torch.randn(2, N, D),), None, R, grad=True)
    out.square().mean().backward()
    assert report.merged_sites == 3
    used = {"front": "memory", "sink": "sink"}[form]
    assert all(bool(block.get_parameter(used).grad.isfinite().all()) for block in model.blocks)


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
def test_under_a_mask_nothing_merges() -> None:
    """It says of keys and memory together which count: cut to the queries it would have to weigh these."""
    torch.manual_seed(0)
    _, report = run(redraw(Net("masked")).eval(), (palette_tokens(2, N, D),), None, R)
    assert report.merged_sites == 0 and {reason.kind for reason in report.skipped} == {"unclear mask"}, str(report)


def test_terms_of_the_scores_beside_a_sink() -> None:
    """A sink that takes nothing changes nothing: tables merge as they do without it."""
    torch.manual_seed(0)
    model, x = redraw(Net("table")).eval(), torch.randn(2, N, D)
    want, report = run(model, (x,), None, R)
    assert report.merged_sites == 3
    for block in model.blocks:
        block.form, block.sink.data = "sink_table", torch.full((H,), -1e4)
    got, report = run(model, (x,), None, R)
    assert report.merged_sites == 3
    torch.testing.assert_close(got, want)


def padded() -> tuple[Tensor, Tensor]:
    pad = torch.arange(N).expand(2, -1) >= torch.tensor([[40], [30]])
    return torch.randn(2, N, D), pad


def test_padding_beside_a_sink_has_no_weight() -> None:
    torch.manual_seed(0)
    model, (x, pad) = redraw(Net("sink_masked")).eval(), padded()
    assert_lossless(model, (palette_tokens(2, N, D), pad), R, tokens=TOKENS, control=True)
    want, _ = run(model, (x, pad), None, R, padding_first=True)
    got, _ = run(model, (x.masked_fill(pad[..., None], 3.0), pad), None, R, padding_first=True)
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
def test_a_mask_of_the_joined_columns_is_left_alone() -> None:
    torch.manual_seed(0)
    _, report = run(redraw(Net("sink_masked_late")).eval(), padded(), None, R)
    assert report.merged_sites == 0
    assert all(skip.kind == "unclear mask" for skip in report.skipped), report
