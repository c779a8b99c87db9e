"""The models of the zoo: which, how to build them small, and a palette input for each.

timm is listed by looking: of every module in timm.models the variant whose name says it is smallest. The other
libraries have no such list, so theirs is written here. All weights are random.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.palette import palette_grid, palette_rows, palette_tokens

BATCH = 2


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A model in eval mode with one small batch: `args` random; each of `palettes` in its place, of few patches."""

    model: nn.Module
    args: tuple[Any, ...]
    palettes: tuple[tuple[Any, ...], ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _images(size: int, patch: int = 16, channels: int = 3) -> tuple[Tensor, tuple[tuple[Tensor], ...]]:
    """Random images [BATCH, channels, size, size], and palettes: of patches; of plain cells of 32 pixels, whose tokens
    are equal at every level of a pyramid; of rows, each of them one token and its equals; of few rows; of one."""
    patch = patch if size % patch == 0 else 16
    cells = math.ceil(size / patch)
    fine = palette_grid(BATCH, (cells, cells), (patch, patch), channels, k=4)
    coarse = palette_grid(BATCH, (math.ceil(size / 32),) * 2, (1, 1), channels, k=4)
    coarse = coarse.repeat_interleave(32, -1).repeat_interleave(32, -2)
    rows = [palette_rows(BATCH, (size, size), channels, run) for run in (1, 64, size)]
    palettes = tuple((image[..., :size, :size].contiguous(),) for image in (fine, coarse, *rows))
    return torch.randn(BATCH, channels, size, size), palettes


class NotOffered(Exception):
    """The library has no such combination, or none small enough."""


# -- timm --------------------------------------------------------------------------------------------------------------

_SMALL_WORDS = ("atto", "femto", "pico", "nano", "xxtiny", "xxsmall", "xxs", "xtiny", "xsmall", "xs", "extra_small",
                "tiny", "t", "n", "mini", "micro", "tn", "s0", "small", "s", "lite", "light")  # fmt: skip
_LARGE_WORDS = (
    "base",
    "b",
    "m",
    "medium",
    "l",
    "large",
    "xl",
    "xlarge",
    "h",
    "huge",
    "g",
    "giant",
    "so400m",
    "enormous",
)
LARGEST = 1.5e9
"""Weights of the largest model that is built whole."""
_ATTENTION = re.compile(r"softmax|scaled_dot_product_attention|Attention|Attn|import .*Block|vision_transformer")


def _smallness(name: str) -> tuple[Any, ...]:
    """Sorts the names of variants: size word first, then input size, then the numbers in the name, then length."""
    words = name.split("_")
    small = min((_SMALL_WORDS.index(w) for w in words if w in _SMALL_WORDS), default=len(_SMALL_WORDS))
    large = max((_LARGE_WORDS.index(w) + 1 for w in words if w in _LARGE_WORDS), default=0)
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    size = timm.get_pretrained_cfg(name).input_size[-1]
    return small + large, size > 256, sum(numbers), len(name), name


def timm_modules() -> dict[str, list[str]]:
    """Module of timm.models whose source speaks of attention -> the smallest variant of each family of names in it.

    Whether there is attention in a variant is for the graph to say: rows without any are left out of the table.
    """
    found: dict[str, list[str]] = {}
    for module in timm.list_modules():
        source = inspect.getsource(importlib.import_module(f"timm.models.{module}"))
        if not _ATTENTION.search(source):
            continue
        families: dict[str, list[str]] = {}
        for name in timm.list_models(module=module):
            families.setdefault(re.split(r"[_\d]", name)[0], []).append(name)
        found[module] = [min(names, key=_smallness) for names in families.values()]
    return found


def module_of(name: str) -> str:
    """The module of timm.models that a model comes from; of other libraries, nothing."""
    library, _, model = name.partition("/")
    return timm.models.model_entrypoint(model).__module__.rpartition(".")[2] if library == "timm" else ""


def _timm(name: str, largest: int = 256) -> ZooModel:
    """Four blocks of a timm model at its own input size, or at about `largest` pixels where that is less and the model
    can be built for it."""
    channels, height, width = timm.get_pretrained_cfg(name).input_size
    model = _created(name, depth=4)
    known = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch = int(known[0] if isinstance(known, tuple) else known or 16)
    takes = inspect.signature(type(model).__init__).parameters
    if known and (height > largest or height != width) and "img_size" in takes:
        height = width = largest // patch * patch
        model = _created(name, depth=4, img_size=height)
    assert height == width, name
    random, palettes = _images(height, patch, channels)
    return ZooModel(model.eval(), (random,), palettes)


def _created(name: str, **settings: Any) -> nn.Module:
    """The model with random weights, without `depth` where it takes none or one for each stage.

    Raises NotOffered where it is then too large for a small machine.
    """
    try:
        return timm.create_model(name, pretrained=False, **settings)
    except (TypeError, ValueError, AssertionError):
        del settings["depth"]
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name, pretrained=False, **settings).parameters())
        if count > LARGEST:
            raise NotOffered(f"{count / 1e9:.1f} billion weights, and no fewer blocks can be asked for") from None
        return timm.create_model(name, pretrained=False, **settings)


# -- torchvision -------------------------------------------------------------------------------------------------------


def _torchvision(name: str) -> ZooModel:
    import torchvision

    module = torchvision.models.video if name in ("swin3d_t", "mvit_v2_s", "mvit_v1_b") else torchvision.models
    model = getattr(module, name)(weights=None).eval()
    if module is torchvision.models:
        random, palettes = _images(224, 4 if "swin" in name else 16)
        return ZooModel(model, (random,), palettes)
    frames = 16
    clip = palette_grid(BATCH, (frames // 2, 14, 14), (2, 16, 16), 3, k=4)
    rows = palette_rows(BATCH, clip.shape[2:])
    return ZooModel(model, (torch.randn_like(clip),), ((clip,), (rows,)))


TORCHVISION = ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t", "mvit_v2_s", "swin3d_t", "mvit_v1_b")

# -- transformers ------------------------------------------------------------------------------------------------------

_SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
_VISION = {**_SMALL, "image_size": 96, "patch_size": 16}


def _hugging(model: str, attention: str, kind: str, config: str | None = None, **settings: Any) -> ZooModel:
    import transformers

    name = config or re.sub(r"(Model|For\w+|VisionModel)$", "", model) + "Config"
    held = getattr(transformers, name)(**settings)
    held._attn_implementation = attention
    net = getattr(transformers, model)(held).eval()
    args, palettes, kwargs = _INPUTS[kind](settings)
    return ZooModel(net, args, palettes, kwargs)


def _image_input(settings: Any) -> Any:
    size = settings.get("image_size", 96)
    random, palettes = _images(size if isinstance(size, int) else size[0], settings.get("patch_size", 4))
    return (random,), palettes, {}


def _video_input(settings: Any) -> Any:
    size, frames = settings.get("image_size", settings.get("crop_size", 64)), settings.get("num_frames", 8)
    frames = settings.get("frames_per_clip", frames)
    clip = palette_grid(BATCH, (frames // 2, size // 16, size // 16), (2, 16, 16), 3, k=4).transpose(1, 2).contiguous()
    rows = palette_rows(BATCH, (frames, size, size)).transpose(1, 2).contiguous()
    return (torch.randn_like(clip),), ((clip,), (rows,)), {}


def _spectrogram(settings: Any) -> Any:
    sound = palette_grid(BATCH, (8, 8), (8, 8), 1, k=4)[:, 0].transpose(1, 2).contiguous()
    return (torch.randn_like(sound),), ((sound,),), {}


def _wave(settings: Any) -> Any:
    wave = palette_tokens(BATCH, 16000, 1, k=4, run=2000)[..., 0]
    hum = torch.randn(BATCH, 80).repeat(1, 200)  # every token alike: the stem's strides make 80
    return (torch.randn_like(wave),), ((wave,), (hum,)), {}


def _mel(settings: Any) -> Any:
    mel = palette_tokens(BATCH, 128, 16, k=2, run=32).transpose(1, 2).contiguous()
    return (torch.randn_like(mel),), ((mel,),), {}


def _mel_and_text(settings: Any) -> Any:
    (random,), palettes, _ = _mel(settings)
    return (random,), palettes, {"decoder_input_ids": torch.randint(3, 60, (BATCH, 7))}


def _text(settings: Any) -> Any:
    runs = torch.arange(4).add(5).repeat_interleave(8).repeat(2).expand(BATCH, -1)
    return (torch.randint(3, 90, (BATCH, 64)),), ((runs,),), {}


def _siglip2(settings: Any) -> Any:
    pixels = palette_tokens(BATCH, 36, 3 * 16 * 16, k=4)
    extra = {"pixel_attention_mask": torch.ones(BATCH, 36, dtype=torch.long),
             "spatial_shapes": torch.tensor([[6, 6]] * BATCH)}  # fmt: skip
    return (torch.randn_like(pixels),), ((pixels,),), extra


_INPUTS: dict[str, Callable[[Any], Any]] = {
    "image": _image_input, "video": _video_input, "spectrogram": _spectrogram, "wave": _wave, "mel": _mel,
    "mel_text": _mel_and_text, "text": _text, "siglip2": _siglip2,
}  # fmt: skip

_SPEECH = {**_SMALL, "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4),
           "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
           "apply_spec_augment": False, "vocab_size": 32}  # fmt: skip
_WHISPER = {"d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 3,
            "decoder_attention_heads": 3, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 64,
            "num_mel_bins": 16, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1}  # fmt: skip
# name -> (class, kind of input, settings[, config class])
HUGGING: dict[str, tuple[Any, ...]] = {
    "vit": ("ViTModel", "image", _VISION),
    "deit": ("DeiTModel", "image", _VISION),
    "beit": ("BeitModel", "image", {**_VISION, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2Model", "image", _VISION),
    "dinov2_registers": ("Dinov2WithRegistersModel", "image", _VISION),
    "dinov3_vit": ("DINOv3ViTModel", "image", {**_VISION, "num_register_tokens": 4}),
    "clip_vision": ("CLIPVisionModel", "image", _VISION),
    "siglip_vision": ("SiglipVisionModel", "image", _VISION),
    "siglip2_vision": ("Siglip2VisionModel", "siglip2", {**_SMALL, "patch_size": 16, "num_patches": 36}),
    "mae": ("ViTMAEModel", "image", {**_VISION, "mask_ratio": 0.0}),
    "dpt": (
        "DPTForDepthEstimation",
        "image",
        {
            **_VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 16, 16],
            "fusion_hidden_size": 16,
            "reassemble_factors": [4, 2, 1, 0.5],
        },
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "image",
        {
            "image_size": 128,
            "hidden_sizes": [16, 32, 64, 96],
            "decoder_hidden_size": 32,
            "num_attention_heads": [1, 2, 2, 3],
        },
    ),
    "swin": ("SwinModel", "image", {"image_size": 224, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [1, 2, 4]}),
    "swinv2": (
        "Swinv2Model",
        "image",
        {"image_size": 256, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 8},
    ),
    "pvt_v2": ("PvtV2Model", "image", {"image_size": 128, "hidden_sizes": [16, 32, 80, 96]}),
    "sam_vision": (
        "SamVisionModel",
        "image",
        {
            **_SMALL,
            "image_size": 224,
            "patch_size": 16,
            "window_size": 7,
            "global_attn_indexes": [1],
            "mlp_dim": 96,
            "output_channels": 32,
        },
    ),
    "hiera": ("HieraModel", "image", {"image_size": [224, 224], "embed_dim": 24, "depths": [1, 2, 2, 1]}),
    "videomae": ("VideoMAEModel", "video", {**_VISION, "image_size": 64, "num_frames": 8, "tubelet_size": 2}),
    "timesformer": ("TimesformerModel", "video", {**_VISION, "num_frames": 8}),
    "vjepa2": (
        "VJEPA2Model",
        "video",
        {
            **_SMALL,
            "crop_size": 64,
            "frames_per_clip": 8,
            "patch_size": 16,
            "pred_hidden_size": 48,
            "pred_num_attention_heads": 3,
            "pred_num_hidden_layers": 2,
        },
    ),
    "ast": (
        "ASTModel",
        "spectrogram",
        {**_SMALL, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 64, "num_mel_bins": 64},
    ),
    "wav2vec2": ("Wav2Vec2Model", "wave", _SPEECH),
    "hubert": ("HubertModel", "wave", _SPEECH),
    "wavlm": ("WavLMModel", "wave", _SPEECH),
    "sew": ("SEWModel", "wave", {**_SPEECH, "squeeze_factor": 2}),
    "wav2vec2_conformer": ("Wav2Vec2ConformerModel", "wave", {**_SPEECH, "position_embeddings_type": "relative"}),
    "wav2vec2_conformer_rope": ("Wav2Vec2ConformerModel", "wave", {**_SPEECH, "position_embeddings_type": "rotary"}),
    "whisper": ("WhisperModel", "mel_text", _WHISPER),
    "bert": ("BertModel", "text", {**_SMALL, "vocab_size": 100}),
}
_CONFIGS = {"CLIPVisionModel": "CLIPVisionConfig", "SiglipVisionModel": "SiglipVisionConfig",
            "Siglip2VisionModel": "Siglip2VisionConfig", "SamVisionModel": "SamVisionConfig"}  # fmt: skip
ATTENTION = ("sdpa", "eager", "flex_attention")

# -- diffusers ---------------------------------------------------------------------------------------------------------


def _dit() -> ZooModel:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4,
                                  num_layers=3, sample_size=16, patch_size=2, num_embeds_ada_norm=10)  # fmt: skip
    latent = palette_grid(BATCH, (8, 8), (2, 2), 4, k=4)
    rest = {"timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([1, 1]), "return_dict": False}
    return ZooModel(model.eval(), (torch.randn_like(latent),), ((latent,),), rest)


def _unet() -> ZooModel:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=32, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
                                 attention_head_dim=4)  # fmt: skip
    latents = palette_grid(BATCH, (8, 8), (4, 4), 4, k=4), palette_rows(BATCH, (32, 32), 4)
    text = torch.randn(BATCH, 9, 24)
    palettes = tuple((latent, 3, text) for latent in latents)
    return ZooModel(model.eval(), (torch.randn_like(latents[0]), 3, text), palettes, {"return_dict": False})


def _mmdit() -> ZooModel:
    """Image and text in streams of their own, joined in each attention (Stable Diffusion 3)."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=64,
                                  num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=256,
                                  pooled_projection_dim=24, out_channels=4, pos_embed_max_size=32)  # fmt: skip
    latent = palette_grid(BATCH, (8, 8), (2, 2), 4, k=4)
    rest = torch.randn(BATCH, 20, 32), torch.randn(BATCH, 24), torch.tensor([3, 3])
    return ZooModel(model.eval(), (torch.randn_like(latent), *rest), ((latent, *rest),), {"return_dict": False})


def _flux() -> ZooModel:
    """Joined attention, then blocks on the joined tokens, with rotary positions given from outside (FLUX.1)."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
                                   attention_head_dim=64, num_attention_heads=4, joint_attention_dim=32,
                                   pooled_projection_dim=24, axes_dims_rope=(16, 24, 24))  # fmt: skip
    rest = torch.randn(BATCH, 20, 32), torch.randn(BATCH, 24), torch.tensor([0.5, 0.5])
    places = torch.stack([torch.zeros(256), torch.arange(256) // 16, torch.arange(256) % 16], -1)
    image, text = palette_tokens(BATCH, 256, 16, k=4), torch.zeros(20, 3)
    palette = (image, *rest, torch.zeros(256, 3), text)
    return ZooModel(model.eval(), (torch.randn_like(image), *rest, places, text), (palette,), {"return_dict": False})


DIFFUSERS = {"dit": _dit, "unet": _unet, "sd3": _mmdit, "flux": _flux}

# -- all ---------------------------------------------------------------------------------------------------------------

SWEEP = ("vision_transformer", "deit", "eva", "beit")
"""timm modules of which `--sweep` takes every variant."""
SWEEP_SIZE = 144


def names(sweep: bool = False) -> list[str]:
    """`library/model[:attention]` of every model, or with `sweep` of every variant of the modules in SWEEP."""
    if sweep:
        return [f"timm/{name}" for module in SWEEP for name in timm.list_models(module=module)]
    found = [f"timm/{name}" for names in timm_modules().values() for name in names]
    found += [f"torchvision/{name}" for name in TORCHVISION]
    found += [f"transformers/{name}:{attention}" for name in HUGGING for attention in ATTENTION]
    found += [f"diffusers/{name}" for name in DIFFUSERS]
    # Imported here: both of them build what this module defines.
    import zoo_outside
    import zoo_packed

    return [*found, *(f"packed/{name}" for name in zoo_packed.names()), *zoo_outside.names()]


def build(name: str, sweep: bool = False) -> ZooModel:
    """The model of a name; in a sweep, on small images.

    Raises NotOffered where the library says that an attention implementation is missing.
    """
    torch.manual_seed(0)
    library, _, rest = name.partition("/")
    if library == "timm":
        return _timm(rest, SWEEP_SIZE if sweep else 256)
    if library == "torchvision":
        return _torchvision(rest)
    if library == "diffusers":
        return DIFFUSERS[rest]()
    if library != "transformers":
        import zoo_outside
        import zoo_packed

        return zoo_packed.build(rest) if library == "packed" else zoo_outside.build(name)
    key, _, attention = rest.partition(":")
    model, kind, settings = HUGGING[key]
    make = partial(_hugging, model, attention, kind, _CONFIGS.get(model), **settings)
    try:
        return make()
    except ValueError as error:
        if "attn_implementation" in str(error) or "attention implementation" in str(error):
            raise NotOffered(str(error)) from error
        raise
