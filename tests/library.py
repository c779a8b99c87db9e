"""Real models of timm, torchvision and transformers, tiny and with random weights: image, video and audio.

`CASES[name]()` returns a `Case`: the model (positions out, weights redrawn), palette inputs on which every merge finds
an equal partner, and the token counts that make the expected merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.layers import set_fused_attn
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.palette import equalize, palette_grid, palette_image, palette_tokens

DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Case:
    model: nn.Module
    args: tuple[Any, ...]
    tokens: int
    """Length of the sequence that enters the first block."""
    prefix: int
    random: tuple[Any, ...] | None = None
    """Inputs that are no palettes, where `args` cannot be redrawn by torch.randn_like."""

    @property
    def random_args(self) -> tuple[Any, ...]:
        return self.random or tuple(torch.randn_like(a) for a in self.args)


def timm_case(name: str, prefix: int, patch: int = 16, fused: bool = True, **kwargs: Any) -> Case:
    """36 patches, 3 blocks, 48 channels, 3 heads."""
    kwargs = {"depth": DEPTH, "embed_dim": 48, "num_heads": 3, "img_size": 6 * patch, "num_classes": 10, **kwargs}
    set_fused_attn(fused)
    try:
        model = timm.create_model(name, **kwargs)
    finally:
        set_fused_attn(True)
    image = palette_image(2, 6 * patch, patch, k=3)
    return Case(equalize(model, seed=1), (image,), 36 + prefix, prefix)


def torchvision_case() -> Case:
    model = torchvision.models.VisionTransformer(96, 16, DEPTH, 3, 48, 96, num_classes=10)
    return Case(equalize(model, seed=1), (palette_image(2, 96, 16, k=3),), 37, 1)


def hugging(kind: str, attention: str, prefix: int, **kwargs: Any) -> Case:
    """transformers' `<kind>Config` and its bare or classifying model."""
    sizes = {"hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96}
    config_name, _, model_name = kind.partition(":")
    config = getattr(transformers, config_name)(**{**sizes, "image_size": 96, "patch_size": 16, **kwargs})
    config._attn_implementation = attention
    model = getattr(transformers, model_name)(config)
    return Case(equalize(model, seed=1), (palette_image(2, 96, 16, k=3),), 36 + prefix, prefix)


def videomae(attention: str, classify: bool) -> Case:
    """8 frames in tubelets of 2, 4 x 4 patches: 64 tokens."""
    config = transformers.VideoMAEConfig(
        hidden_size=48, num_hidden_layers=DEPTH, num_attention_heads=3, intermediate_size=96,
        image_size=64, patch_size=16, num_frames=8, tubelet_size=2,
    )  # fmt: skip
    config._attn_implementation = attention
    make = transformers.VideoMAEForVideoClassification if classify else transformers.VideoMAEModel
    video = palette_grid(2, (4, 4, 4), (2, 16, 16), 3, k=4)
    return Case(equalize(make(config), seed=1), (video.transpose(1, 2).contiguous(),), 64, 0)


def ast(attention: str, classify: bool) -> Case:
    """A spectrogram of 64 frames x 64 bins in patches that do not overlap: 16 + class + distillation tokens."""
    config = transformers.ASTConfig(
        hidden_size=48, num_hidden_layers=DEPTH, num_attention_heads=3, intermediate_size=96,
        patch_size=8, frequency_stride=8, time_stride=8, max_length=64, num_mel_bins=64,
    )  # fmt: skip
    config._attn_implementation = attention
    make = transformers.ASTForAudioClassification if classify else transformers.ASTModel
    sound = palette_grid(2, (8, 8), (8, 8), 1, k=4)[:, 0].transpose(1, 2).contiguous()
    return Case(equalize(make(config), seed=1), (sound,), 66, 2)


def whisper(attention: str) -> Case:
    """64 tokens behind two overlapping convolutions: long runs of equal frames, so that most tokens have equals."""
    config = transformers.WhisperConfig(
        d_model=48, encoder_layers=DEPTH, encoder_attention_heads=3, encoder_ffn_dim=96, max_source_positions=64,
        num_mel_bins=16, dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = attention
    mel = palette_tokens(2, 128, 16, k=2, run=32).transpose(1, 2).contiguous()
    return Case(equalize(WhisperEncoder(config), seed=1), (mel,), 64, 0)


TIMM: dict[str, Callable[[], Case]] = {
    "vit": partial(timm_case, "vit_tiny_patch16_224", 1),
    "vit_eager": partial(timm_case, "vit_tiny_patch16_224", 1, fused=False),
    "deit": partial(timm_case, "deit_tiny_patch16_224", 1),
    "deit_distilled": partial(timm_case, "deit_tiny_distilled_patch16_224", 2),
    "deit3": partial(timm_case, "deit3_small_patch16_224", 1),
    "clip": partial(timm_case, "vit_base_patch16_clip_quickgelu_224", 1),
    "siglip": partial(timm_case, "vit_base_patch16_siglip_224", 0),
    "siglip_eager": partial(timm_case, "vit_base_patch16_siglip_224", 0, fused=False),
    "siglip_gap": partial(timm_case, "vit_base_patch16_siglip_gap_224", 0),
    "dinov2": partial(timm_case, "vit_small_patch14_dinov2", 1, patch=14),
    "dinov2_reg": partial(timm_case, "vit_small_patch14_reg4_dinov2", 5, patch=14),
    "dinov2_swiglu": partial(timm_case, "vit_giant_patch14_dinov2", 1, patch=14),
    "mae": partial(timm_case, "vit_base_patch16_224.mae", 1),
    "gap": partial(timm_case, "vit_medium_patch16_gap_256", 0),
    "gap_cls": partial(timm_case, "vit_tiny_patch16_224", 1, global_pool="avg"),
    "qk_norm": partial(timm_case, "vit_tiny_patch16_224", 1, qk_norm=True, init_values=1e-5),
    "features": partial(timm_case, "vit_tiny_patch16_224", 1, global_pool="", num_classes=0),
    "parallel_things": partial(timm_case, "vit_small_patch16_18x2_224", 1),
}
HUGGING: dict[str, Callable[[str], Case]] = {
    "vit": lambda a: hugging("ViTConfig:ViTModel", a, 1),
    "vit_classify": lambda a: hugging("ViTConfig:ViTForImageClassification", a, 1),
    "deit": lambda a: hugging("DeiTConfig:DeiTForImageClassificationWithTeacher", a, 2),
    "clip": lambda a: hugging("CLIPVisionConfig:CLIPVisionModel", a, 1),
    "siglip": lambda a: hugging("SiglipVisionConfig:SiglipVisionModel", a, 0),
    "dinov2": lambda a: hugging("Dinov2Config:Dinov2Model", a, 1),
    "dinov2_reg": lambda a: hugging("Dinov2WithRegistersConfig:Dinov2WithRegistersModel", a, 5),
    "videomae": lambda a: videomae(a, classify=False),
    "videomae_classify": lambda a: videomae(a, classify=True),
    "ast": lambda a: ast(a, classify=False),
    "ast_classify": lambda a: ast(a, classify=True),
    "whisper": whisper,
}
CASES: dict[str, Callable[[], Case]] = {
    **{f"timm-{name}": make for name, make in TIMM.items()},
    "torchvision-vit": torchvision_case,
    **{f"transformers-{name}-{a}": partial(make, a) for name, make in HUGGING.items() for a in ("sdpa", "eager")},
}
