"""Outputs that stay merged: how many rows there are, in which order, and what each stands for."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
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
    sizes, source = found.sizes, found.source
    assert sizes.shape == found.place.shape == (batch, left) and source.shape == (batch, N)
    assert torch.equal(source.gather(1, found.place), torch.arange(left).expand(batch, -1))
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
    assert torch.equal(found.place, places)
    found, _ = merged(model, x)
    assert torch.allclose(found.output[..., -1], found.mean(torch.arange(float(N))), atol=1e-4)
    assert torch.equal(found.take(torch.arange(N)), found.place)
    assert torch.equal(found.take(placed(x))[..., -1].long(), found.place)
    pairs = torch.arange(2.0 * N).reshape(N, 2)
    assert torch.allclose(found.mean(pairs)[..., 1], 2 * found.mean(torch.arange(float(N))) + 1)
    with pytest.raises(ValueError, match="must begin with"):
        found.take(torch.arange(N - 1))


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
            assert all(torch.equal(*pair) for pair in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Stack(read=lambda x: x.mean(1)), {}, "pooled"),
        (Stack(read=lambda x: x.reshape(2, N // 4, 4 * D)), {}, r"aten\.reshape, which splits or regroups"),
        (Stack(read=lambda x: [*x]), {}, "takes apart the samples"),
        (Stack(), {"placement": "branch"}, "given back"),
        (Stack(), {"r": 0}, "nothing merged"),
        (Stack(), {"keep": "half"}, "full or merged"),
    ],
)
def test_what_cannot_be_kept_is_said(model: nn.Module, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        tome_fx.rewrite(model, (torch.randn(2, N, D),), **{"r": R, "placement": "stream", "keep": "merged", **options})


def test_a_cast_that_is_exported_gives_no_tokens_back() -> None:
    """torch.export asserts the dtype of what is cast, which reads no value."""
    x = torch.randn(2, N, D)
    gm = tome_fx.rewrite(Stack(read=lambda x: x.to(torch.float64)), (x,), r=R, placement="stream", keep="merged")
    assert gm(x).output.dtype is torch.float64 and gm.meta["tome_report"].unmerges == []


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


class Wide(Hidden):
    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:  # type: ignore[override]
        return torch.cat(super().forward(x)[1:], -1)


def test_hidden_states_beside_each_other_are_those_of_the_last_merge() -> None:
    found, _ = merged(Wide(), torch.randn(2, N, D))
    assert found.output.shape == (2, N - 3 * R, 2 * D)


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


def prompt(count: int, image: int = 63) -> Tensor:
    """int64 [1, count + 4]: an image between two tokens of text in front and two behind."""
    return torch.tensor([[1, 2, *[image] * count, 3, 4]])


def test_a_language_model_sees_fewer_image_tokens() -> None:
    """The prompt is sized first, the cache shrinks by what merged; unmerged it is what the model does by itself."""
    model, pixels = llava(), torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        features = tome_fx.rewrite(Features(model), (pixels,), r=R, placement="stream", keep="merged")
        for count, rows in ((tome_fx.kept_tokens(features), features(pixels).output), (36, Features(model)(pixels))):
            assert rows.shape == (1, count, 48)
            ids = prompt(count)
            embeds = model.get_input_embeddings()(ids)
            embeds[ids == 63] = rows.flatten(0, 1)
            out = model.model.language_model(inputs_embeds=embeds, use_cache=True)
            assert out.past_key_values.get_seq_length() == count + 4
            told = model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert told.shape == (1, 3)
        assert count == 36 and tome_fx.kept_tokens(features) == 36 - 3 * R
        own = model.generate(prompt(36), pixel_values=pixels, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert torch.equal(own[:, -3:], told)


class Own(nn.Module):
    """A model's own way to its image features; read: what is taken of them."""

    def __init__(self, model: Any, read: Any = lambda rows: rows, **named: Any) -> None:
        super().__init__()
        self.model, self.read, self.named = model.model, read, named

    def forward(self, pixels: Tensor) -> Any:
        return self.read(self.model.get_image_features(pixels, **self.named).pooler_output)


def test_features_by_the_model_itself() -> None:
    """A list of images is one of samples that are taken apart, unless there is one."""
    model, pixels = llava(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        gm = tome_fx.rewrite(Own(model), (pixels[:1],), r=R, placement="stream", keep="merged")
        found = gm(pixels[:1])
        (rows,) = found.output
        assert rows.shape == (36 - 3 * R, 48) and found.place.shape == (36 - 3 * R,)
        with pytest.raises(ValueError, match="takes apart the samples"):
            tome_fx.rewrite(Own(model), (pixels,), r=R, placement="stream", keep="merged")


def test_columns_of_a_prompt() -> None:
    """Text stays, of the image tokens those of the representatives; samples may be tiles of one prompt."""
    place = torch.tensor([[0, 3], [1, 2]])
    found = tome_fx.MergedTokens(None, torch.full((2, 2), 2.0), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), place)
    image = torch.zeros(2, 7, dtype=torch.bool)
    image[0, 1:5] = image[1, 3:] = True
    assert found.columns(image).tolist() == [[0, 1, 4, 5, 6], [0, 1, 2, 4, 5]]
    tiles = torch.tensor([[False, *[True] * 8, False]])
    assert found.columns(tiles).tolist() == [[0, 1, 4, 6, 7, 9]]
    with pytest.raises(ValueError, match="9 image tokens, the images 8"):
        found.columns(torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="different numbers"):
        found.columns(torch.tensor([[True] * 8, [False] * 8]))


def test_rows_keep_the_positions_of_their_representatives() -> None:
    """The columns of the whole prompt that stay; a mask keeps gaps from being taken for the ends of sequences."""
    model, pixels = llava(), torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        found = tome_fx.rewrite(Features(model), (pixels,), r=R, placement="stream", keep="merged")(pixels)
        ids = prompt(36)
        stay = found.columns(ids == 63)
        assert stay.tolist() == [[0, 1, *(found.place[0] + 2).tolist(), 38, 39]]
        ids = ids.gather(1, stay)
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == 63] = found.output.flatten(0, -2)
        call = {"inputs_embeds": embeds, "position_ids": stay}
        cached = model.model.language_model(**call, use_cache=True)
        assert cached.past_key_values.get_seq_length() == stay.shape[1]
        masked = model.model.language_model(**call, use_cache=False, attention_mask=torch.ones_like(ids))
        assert distance(masked.last_hidden_state, cached.last_hidden_state) < 1e-5


# -- towers with positions of more than one dim ------------------------------------------------------------------------

SIDE = 12


def qwen() -> Any:
    """A Qwen2-VL: patches of an image stand 2 x 2 beside each other, and become one token after the last block."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"depth": 3, "embed_dim": 64, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}  # fmt: skip
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=63, video_token_id=62)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


class Packed(nn.Module):
    """A tower over patches of images in one sequence, [N, D]. numpy's lengths are numbers to torch.export."""

    def __init__(self, tower: nn.Module, grid: Tensor, read: str) -> None:
        super().__init__()
        vision = pytest.importorskip("transformers.vision_utils")
        self.tower, self.read = tower, read
        self.ends = np.array([0, *grid.prod(1).cumsum(0).tolist()])
        self.register_buffer("grid", grid)
        self.register_buffer("positions", vision.get_vision_position_ids(grid, 2))

    def forward(self, patches: Tensor) -> Tensor:
        out = self.tower(patches, self.grid, cu_seqlens=self.ends, position_ids=self.positions)
        return getattr(out, self.read)


def test_positions_of_three_dims_after_a_layer_that_joins_patches() -> None:
    """M-RoPE: a row has the position (t, h, w) of its representative, text and tokens to come have their own."""
    model, grid = qwen(), torch.tensor([[1, SIDE, SIDE]])
    tower, patches = Packed(model.model.visual, grid, "pooler_output").eval(), torch.randn(SIDE * SIDE, 96)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"aten\.view in tower\.merger"):
            tome_fx.rewrite(tower, (patches,), r=R, placement="stream", keep="merged")
        found = tome_fx.merge_tokens(tower(patches), 16)
        assert found.output.shape == (20, 48)
        ids = prompt(36)
        image = ids == 63
        whole, _ = model.model.get_rope_index(ids, image.int(), grid)  # [3, 1, 40]
        stay = found.columns(image)
        ids, positions = ids.gather(1, stay), whole.gather(2, stay.expand(3, -1, -1))
        t, h, w = positions[:, 0, 2:-2] - 2
        assert (t == 0).all() and torch.equal(h * (SIDE // 2) + w, found.place)
        assert positions[:, 0, -1].unique() == 2 + SIDE // 2 + 1  # behind the image: its longer side later
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == 63] = found.output
        out = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=True)
        assert out.past_key_values.get_seq_length() == 24
        out = model.model.language_model(ids[:, :1], position_ids=positions[..., -1:] + 1, cache=out.past_key_values)
        assert out.last_hidden_state.isfinite().all()


def test_images_of_a_pack_merge_apart() -> None:
    """Before the patches are joined their tower's tokens are kept as any other's: r in each image and block."""
    model, grid = qwen(), torch.tensor([[1, SIDE, SIDE], [1, 8, 8]])
    tower, patches = Packed(model.model.visual, grid, "last_hidden_state").eval(), torch.randn(SIDE * SIDE + 64, 96)
    with torch.no_grad():
        gm = tome_fx.rewrite(tower, (patches,), r=R, placement="stream", keep="merged")
        found = gm(patches)
    first = int((found.place < SIDE * SIDE).sum())
    assert (first, len(found.place)) == (SIDE * SIDE - 3 * R, SIDE * SIDE + 64 - 6 * R)
    assert (found.source[: SIDE * SIDE] < first).all() and (found.source[SIDE * SIDE :] >= first).all()
    assert gm.meta["tome_report"].unmerges == []


class Clip(nn.Module):
    """All tokens of a video at once: [B, frames / 2 * 4 * 4, D]."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.VideoMAEConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, image_size=32, patch_size=8, num_frames=8, tubelet_size=2)  # fmt: skip
        self.model = transformers.VideoMAEModel(config).eval()

    def forward(self, clip: Tensor) -> Tensor:
        return self.model(clip).last_hidden_state


def test_a_video_keeps_time_and_place() -> None:
    """Tokens merge across frames; each row has the frame, row and column of its representative, or means of them."""
    clip = torch.randn(1, 8, 3, 32, 32)
    with torch.no_grad():
        found = tome_fx.rewrite(Clip(), (clip,), r=R, placement="stream", keep="merged")(clip)
    assert found.output.shape == (1, 64 - 3 * R, 32)
    thw = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))  # [64, 3]
    taken, mean = found.take(thw), found.mean(thw.float())
    assert torch.equal(taken @ torch.tensor([16, 4, 1]), found.place)
    alone = found.sizes == 1
    assert torch.equal(taken[alone].float(), mean[alone]) and not torch.equal(taken.float(), mean)


# -- merging where no attention follows --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, D), (2, N, D), (2, 3, N, D)], ids=str)
def test_features_merge_by_themselves(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    found = tome_fx.merge_tokens(x, 40)
    assert found.output.shape == (*shape[:-2], N - 40, D) and found.sizes.sum(-1).eq(N).all()
    assert distance(found.output, found.mean(x)) < 1e-6
    assert (found.place.diff() > 0).all()
    assert torch.equal(found.take(torch.arange(N)), found.place)
    found.output.sum().backward()
    assert distance(x.grad, (1 / found.sizes).gather(-1, found.source)[..., None].expand_as(x)) < 1e-6


def test_images_one_after_another_are_one() -> None:
    x = torch.randn(2, N + 20, D)
    parts = [tome_fx.merge_tokens(x[:, :N], 30), tome_fx.merge_tokens(x[:, N:], 5)]
    found = tome_fx.MergedTokens.joined(parts)
    assert found.output.shape == (2, N + 20 - 35, D) and (found.place.diff() > 0).all()
    assert torch.equal(found.take(torch.arange(N + 20)), found.place)
    assert distance(found.output, found.mean(x)) < 1e-6


def test_equal_features_lose_nothing() -> None:
    x = tokens(3, N)
    found = tome_fx.merge_tokens(x, N // 2)
    assert distance(found.output.gather(1, found.source[..., None].expand(-1, -1, D)), x) < 1e-6
    again = tome_fx.merge_tokens(found.output, 8, found.sizes)
    assert again.sizes.sum(1).eq(N).all()
    assert torch.equal(tome_fx.merge_tokens(x, 0).output, x)


@pytest.mark.parametrize(("shape", "r"), [((N, D), N), ((N, D), -1), ((D,), 1)], ids=str)
def test_no_more_than_all_tokens_merge(shape: tuple[int, ...], r: int) -> None:
    with pytest.raises(ValueError, match="N - 1"):
        tome_fx.merge_tokens(torch.randn(shape), r)
