"""Outputs that stay merged: how many rows there are, in which order, and what each stands for."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_fx
from tests.palette import distance
from tests.strategies import thinned
from tests.test_explain import D, N, Stack, tokens

R = 6


class Classed(Stack):
    """A class token in front, read beside all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, D))

    def forward(self, x: Tensor, *more: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        x = super().forward(torch.cat([self.cls.expand(len(x), -1, -1), x], 1))
        return {"pooled": x[:, 0], "last": x}


def merged(model: nn.Module, x: Tensor, **options: Any) -> tuple[tome_fx.MergedTokens, Any]:
    with torch.no_grad():
        gm = tome_fx.rewrite(model, (x,), keep="merged", **{"r": R, "placement": "stream", **options})
        found = gm(x)
    assert isinstance(found, tome_fx.MergedTokens)
    return found, gm.meta["tome_report"]


WAYS = product(["mean", "keep", "prune"], [1, 3], [True, False])


@pytest.mark.parametrize(("merging", "batch", "plain"), thinned(WAYS, 5))
def test_what_rows_stand_for(batch: int, merging: str, plain: bool) -> None:
    """Given back at full length the rows are what the merged model gives; sizes count, and the order is the tokens'."""
    model, x = Stack(), torch.randn(batch, N, D)
    found, report = merged(model, x, merging=merging, plain=plain)
    left = N - 3 * R
    assert found.output.shape == (batch, left, D) and report.tokens[-1][1] == left
    sizes, source = found.sizes.reshape(batch, left), found.source.reshape(batch, N)
    with torch.no_grad():
        full = tome_fx.rewrite(model, (x,), r=R, placement="stream", merging=merging)(x)
    assert distance(found.output.gather(1, source[..., None].expand(-1, -1, D)), full) < 1e-5
    counted = torch.zeros(batch, left).scatter_add(1, source, torch.ones(batch, N))
    assert (counted > 0).all()
    assert torch.equal(sizes, torch.ones_like(sizes) if merging == "prune" else counted)
    trace = tome_fx.trace_tokens(model, (x,), r=R, placement="stream", merging=merging, drop_unread=False)
    for ours, theirs in zip(source, trace.groups.reshape(batch, N), strict=True):  # the same groups, by other names
        assert len({*zip(ours.tolist(), theirs.tolist(), strict=True)}) == left


def placed(x: Tensor) -> Tensor:
    """Each token, and where it stands."""
    return torch.cat([x, torch.arange(float(x.shape[1]))[None, :, None].expand(len(x), -1, -1)], -1)


def test_rows_stand_in_the_order_of_the_tokens() -> None:
    """Each where its own token stood; a mean of places is that of the row's tokens."""
    model, x = Stack(read=placed), torch.randn(2, N, D)
    found, _ = merged(model, x, merging="prune")
    places = found.output[..., -1].long()
    assert (places.diff() > 0).all()
    assert torch.equal(found.source.gather(1, places), torch.arange(places.shape[1]).expand_as(places))
    found, _ = merged(model, x)
    mean = torch.zeros_like(found.sizes).scatter_add(1, found.source, torch.arange(float(N)).expand(2, -1))
    assert torch.allclose(found.output[..., -1], mean / found.sizes, atol=1e-4)


def test_other_outputs_stay_what_they_are() -> None:
    model, x = Classed(), tokens(2, N)
    found, _ = merged(model, x)
    with torch.no_grad():
        want = model(x)
    assert set(found.output) == {"pooled", "last"}
    assert distance(found.output["pooled"], want["pooled"]) < 2e-5
    assert distance(found.output["last"][:, 0], want["last"][:, 0]) < 2e-5
    assert found.sizes[:, 0].eq(1).all() and found.source[:, 0].eq(0).all()  # the class token is a row of its own
    rows = found.output["last"].gather(1, found.source[..., None].expand(-1, -1, D))
    assert distance(rows, want["last"]) < 2e-5  # equal tokens lose nothing


def test_any_batch_and_a_process_without_us(tmp_path: Path) -> None:
    """The module is plain ATen: it can be exported anew."""
    model, shapes = Classed(), ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        gm = tome_fx.rewrite(model, (tokens(3, N),), r=R, placement="stream", keep="merged", dynamic_shapes=shapes)
        program = torch.export.export(gm, (tokens(3, N),), dynamic_shapes=shapes, strict=False)
        for batch in (3, 5):
            x = tokens(batch, N)
            got, want = program.module()(x), gm(x)
            assert distance(got[0]["last"], want.output["last"]) < 1e-6
            assert torch.equal(got[1], want.sizes) and torch.equal(got[2], want.source)


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Stack(read=lambda x: x.mean(1)), {}, "pooled"),
        (Stack(), {"placement": "branch"}, "given back"),
        (Stack(), {"r": 0}, "nothing merged"),
        (Stack(), {"keep": "half"}, "full or merged"),
    ],
)
def test_what_cannot_be_kept_is_said(model: nn.Module, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        tome_fx.rewrite(model, (torch.randn(2, N, D),), **{"r": R, "placement": "stream", "keep": "merged", **options})


class Hidden(Stack):
    def forward(self, x: Tensor, *more: Any, **named: Any) -> list[Tensor]:  # type: ignore[override]
        return [x := block(x) for block in self.blocks]


def test_hidden_states_of_several_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="different merges"):
        tome_fx.rewrite(Hidden(), (torch.randn(2, N, D),), r=R, placement="stream", keep="merged")


def test_how_many_is_known_before_a_call() -> None:
    x = torch.randn(2, N, D)
    gm = tome_fx.rewrite(Classed(), (x,), r=R, placement="stream", keep="merged")
    assert tome_fx.kept_tokens(gm) == N + 1 - 3 * R == gm(x).output["last"].shape[1]
    with pytest.raises(ValueError, match="keep="):
        tome_fx.kept_tokens(tome_fx.rewrite(Classed(), (x,), r=R, placement="stream"))


class Features(nn.Module):
    """What a LLaVA feeds its language model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        return self.projector(hidden[:, 1:])


def llava() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                           num_attention_heads=2, image_size=48, patch_size=8)  # fmt: skip
    text = transformers.LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, vocab_size=64)  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=63, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_language_model_sees_fewer_image_tokens() -> None:
    """An image of equal patches but for their places: the prompt is sized first, the cache shrinks by what merged."""
    model, pixels = llava(), torch.randn(1, 3, 48, 48)
    lengths = []
    with torch.no_grad():
        for r in (R, 0):
            if r:
                features = tome_fx.rewrite(Features(model), (pixels,), r=r, placement="stream", keep="merged")
                count, rows = tome_fx.kept_tokens(features), features(pixels).output
            else:
                rows = Features(model)(pixels)
                count = rows.shape[1]
            assert rows.shape == (1, count, 48)
            ids = torch.tensor([[1, 2, *[63] * count, 3, 4]])
            embeds = model.get_input_embeddings()(ids)
            embeds[ids == 63] = rows.flatten(0, 1)
            out = model.model.language_model(inputs_embeds=embeds, use_cache=True)
            lengths.append(out.past_key_values.get_seq_length())
            assert out.last_hidden_state.isfinite().all()
    assert lengths == [36 - 3 * R + 4, 36 + 4]
