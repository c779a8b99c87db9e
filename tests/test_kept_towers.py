"""What towers of transformers keep merged, and which of their layers takes it back: the table of docs/language.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_fx

transformers = pytest.importorskip("transformers")

R, SIDE = 8, 12
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 8 * SIDE, "patch_size": 8}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 80}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
PATCHES = {"depth": 4, "num_heads": 2, "patch_size": 8}
ALL_ROWS = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


class Way(nn.Module):
    """A way of a model to what its language model reads."""

    def __init__(self, model: nn.Module, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.way = model, way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.model, x)


def made(name: str, vision: Any, text: Any = None, **named: Any) -> Any:
    """The model of an image-text class, small, with random weights."""
    torch.manual_seed(0)
    text = text if text is not None else transformers.LlamaConfig(**TEXT)
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, image_token_id=63, **named)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().model


def features(model: Any, x: Tensor) -> Any:
    return model.get_image_features(x).pooler_output


def one(model: Any, x: Tensor) -> Any:
    return features(model, x)[0]


def clip(**named: Any) -> Any:
    return transformers.CLIPVisionConfig(**VISION, **named)


def siglip() -> Any:
    return transformers.SiglipVisionConfig(**VISION)


def pixtral() -> Any:
    return transformers.PixtralVisionConfig(**VISION)


def tiles(model: Any, x: Tensor) -> Tensor:
    """LLaVA-Next's tower and projector over the tiles of an image, before they are laid side by side."""
    return model.multi_modal_projector(model.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:])


def video(name: str, **named: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**named)).eval()


def queried() -> Any:
    """A BLIP-2: eight queries read its tower."""
    queries = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
               "encoder_hidden_size": 64, "vocab_size": 80}  # fmt: skip
    text = {"model_type": "opt", "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 80, "word_embed_proj_dim": 48}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=queries, text_config=text, num_query_tokens=8
    )
    return transformers.Blip2ForConditionalGeneration(config).eval()


IMAGES, CLIP = (2, 3, 8 * SIDE, 8 * SIDE), (1, 8, 3, 64, 64)
NEXT = {"image_grid_pinpoints": [[96, 192], [192, 96]]}
VJEPA = {"patch_size": 8, "crop_size": 64, "frames_per_clip": 8, "hidden_size": 64, "num_attention_heads": 2,
         "num_hidden_layers": 4, "mlp_ratio": 2, "pred_hidden_size": 48, "pred_num_attention_heads": 2,
         "pred_num_hidden_layers": 2}  # fmt: skip

KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any], tuple[int, ...], int]] = {
    "LLaVA, one image": (lambda: made("Llava", clip()), one, (1, *IMAGES[1:]), 3 * R),
    "LLaVA, Pixtral": (lambda: made("Llava", pixtral(), **ALL_ROWS),
                       lambda m, x: m.get_image_features(x, image_sizes=[(96, 96)]).pooler_output[0],
                       (1, *IMAGES[1:]), 4 * R),
    "VipLLaVA": (lambda: made("VipLlava", clip(), vision_feature_layers=[-2, -3]), features, IMAGES, 3 * R),
    "PaliGemma": (lambda: made("PaliGemma", siglip(), transformers.GemmaConfig(**TEXT, head_dim=12),
                               projection_dim=48), features, IMAGES, 4 * R),
    "LLaVA-Next, tiles": (lambda: made("LlavaNext", clip(), **NEXT), tiles, (5, *IMAGES[1:]), 3 * R),
    "VideoMAE": (lambda: video("VideoMAE", **SIZES, image_size=64, patch_size=8, num_frames=8),
                 lambda m, x: m(x).last_hidden_state, CLIP, 4 * R),
    "V-JEPA 2": (lambda: video("VJEPA2", **VJEPA), lambda m, x: m(x, skip_predictor=True).last_hidden_state,
                 CLIP, 4 * R),
    "ViViT": (lambda: video("Vivit", **SIZES, image_size=64, num_frames=8, tubelet_size=[2, 8, 8]),
              lambda m, x: m(x).last_hidden_state, CLIP, 4 * R),
}  # fmt: skip
"""The model, what is read of it, the shape of its input, and the tokens that merge away."""

GIVEN_BACK: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any], tuple[int, ...], str]] = {
    "LLaVA, several images": (lambda: made("Llava", clip()), features, IMAGES, "aten.unbind, which takes apart"),
    "SmolVLM": (lambda: made("SmolVLM", VISION, {"model_type": "llama", **TEXT, "pad_token_id": 0}, scale_factor=2),
                one, (1, 2, *IMAGES[1:]), "aten.view in model.connector, which splits or regroups"),
    "InternVL": (lambda: made("InternVL", {**SIZES, "image_size": [96, 96], "patch_size": [8, 8]}),
                 lambda m, x: m.get_image_features(x, vision_feature_layer=-1,
                                                   vision_feature_select_strategy="default").pooler_output,
                 IMAGES, "aten.reshape, which splits or regroups"),
    "Gemma 3": (lambda: made("Gemma3", VISION, {**TEXT, "head_dim": 12}, mm_tokens_per_image=36), features, IMAGES,
                "in model.multi_modal_projector"),
    "Mistral 3": (lambda: made("Mistral3", pixtral(), transformers.MistralConfig(**TEXT), vision_feature_layer=-1),
                  lambda m, x: m.get_image_features(x, image_sizes=[(96, 96)]).pooler_output[0], (1, *IMAGES[1:]),
                  "in model.multi_modal_projector.patch_merger"),
    "Idefics3": (lambda: made("Idefics3", VISION, {"model_type": "llama", **TEXT, "pad_token_id": 0}, scale_factor=2),
                 one, (1, 2, *IMAGES[1:]), "aten.view in model.connector, which splits or regroups"),
    "BLIP-2": (lambda: queried(), features, IMAGES, "they are pooled"),
    "TimeSformer": (lambda: video("Timesformer", **SIZES, image_size=64, patch_size=8, num_frames=4),
                    lambda m, x: m(x).last_hidden_state, (1, 4, 3, 64, 64), "short axis"),
}  # fmt: skip
"""The model, what is read of it, the shape of its input, and what the refusal says."""


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_towers_whose_tokens_stay_merged(name: str) -> None:
    make, way, shape, gone = KEPT[name]
    model, x = Way(make(), way), torch.randn(shape)
    with torch.no_grad():
        whole = model(x)
        found = tome_fx.rewrite(model, (x,), r=R, placement="stream", keep="merged")(x)
    assert found.output.shape[-2] == found.place.shape[-1] == whole.shape[-2] - gone
    assert found.sizes.sum(-1).eq(whole.shape[-2]).all() and found.source.shape == whole.shape[:-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")  # what it says is the refusal
@pytest.mark.parametrize("name", GIVEN_BACK)
def test_towers_that_give_their_tokens_back_say_where(name: str) -> None:
    make, way, shape, why = GIVEN_BACK[name]
    with torch.no_grad(), pytest.raises(ValueError, match="merged") as told:
        tome_fx.rewrite(Way(make(), way), (torch.randn(shape),), r=R, placement="stream", keep="merged")
    assert why in str(told.value)


PACKS = {
    "Qwen2VL": {**PATCHES, "embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2},
    "Qwen2_5_VL": {**PATCHES, "hidden_size": 64, "out_hidden_size": 48, "intermediate_size": 128, "window_size": 32,
                   "fullatt_block_indexes": [1, 3]},
    "Qwen3VL": {**PATCHES, "hidden_size": 64, "out_hidden_size": 48, "intermediate_size": 128,
                "deepstack_visual_indexes": [1], "num_position_embeddings": 144},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("merge", [0, 50])
def test_a_pack_merges_behind_its_tower(name: str, merge: int) -> None:
    """Two images in one prompt, each with positions of its own; 0: the columns of the whole prompt."""
    model, grid = made(name, PACKS[name], {**TEXT, **MROPE}, video_token_id=62), torch.tensor([[1, 12, 12], [1, 8, 8]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 8 * 8)
    with torch.no_grad():
        images = model.get_image_features(patches, grid).pooler_output
        assert [len(rows) for rows in images] == [36, 16]
        found = tome_fx.MergedTokens.joined([tome_fx.merge_tokens(x, merge * len(x) // 100) for x in images])
    ids = torch.tensor([[1, *[63] * 36, 2, *[63] * 16, 3]])
    whole, _ = model.get_rope_index(ids, (ids == 63).int(), grid)
    stay = found.columns(ids == 63)
    assert stay.shape == (1, 55 - merge * 52 // 100) and found.sizes.sum() == 52
    positions = whole.gather(2, stay.expand(3, -1, -1))[:, ids.gather(1, stay) == 63]  # [3, rows]
    sides = torch.cat([torch.cartesian_prod(torch.arange(side), torch.arange(side)) for side in (6, 4)])  # [52, 2]
    start = torch.tensor([1] * 36 + [8] * 16)  # the second image begins behind the longer side of the first, and a word
    assert torch.equal(positions[1:], found.take(sides + start[:, None]).T)
    assert torch.equal(positions[0], found.take(start))


@pytest.mark.slow
def test_sizes_that_stand_in_a_tensor_are_not_traced() -> None:
    """Grids of packs and image sizes: torch.export says so."""
    grid = torch.tensor([[1, 12, 12]])
    pack = made("Qwen2VL", PACKS["Qwen2VL"], {**TEXT, **MROPE}, video_token_id=62)
    packed = Way(pack, lambda m, x: m.get_image_features(x, grid).pooler_output[0]), torch.randn(144, 384)
    sizes = torch.tensor([[96, 192]])
    tiled = Way(made("LlavaNext", clip(), **NEXT), lambda m, x: m.get_image_features(x, sizes).pooler_output)
    for model, x in (packed, (tiled, torch.randn(1, 3, *IMAGES[1:]))):
        with torch.no_grad():
            model(x)
            with pytest.raises(Exception, match="data-dependent"):
                tome_fx.rewrite(model, (x,), r=R, placement="stream", keep="merged")
