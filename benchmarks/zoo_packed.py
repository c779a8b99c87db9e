"""Packed towers of transformers: patches of images of any size stand in one sequence without a batch axis, and
`cu_seqlens` says where each image ends.

Listed by looking: of every model file that speaks of cu_seqlens the vision tower. Here each takes one image per sample
and packs them itself, so that samples have an axis for the laws of the zoo.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.palette import palette_grid, palette_tokens
from zoo_models import BATCH, NotOffered, ZooModel

GRID = 12
"""Patches on each side of an image: not a whole number of the windows that some towers attend in."""
_TOWER = re.compile(r"^class (\w*Vision\w*)\(\w+PreTrainedModel\):", re.MULTILINE)
_STEM = re.compile(r"patch_emb|patch_conv|embeddings\.proj")
_SETTINGS: dict[str, Any] = {
    "depth": 3, "num_hidden_layers": 3, "hidden_size": 64, "embed_dim": 64, "intermediate_size": 96, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "image_size": 224, "max_image_size": 256,
    "num_position_embeddings": 256, "out_hidden_size": 48, "text_hidden_size": 48, "projection_intermediate_size": 96,
    "projection_hidden_dim": 96, "adapter_in_dim": 64, "adapter_out_dim": 48, "moe_intermediate_size": 48,
    "deepstack_visual_indexes": [1], "fullatt_block_indexes": [1], "insert_layer_id": 1,
    "mlp_layer_types": ["dense", "dense", "sparse"], "num_local_experts": 4, "per_layer_config": {},
}  # fmt: skip
"""Small values of every field by which these configs say the same things."""


class Packed(nn.Module):
    """A tower that takes one image per sample: patches [BATCH, n, d] and sizes [BATCH, 3], packed by `pack`."""

    def __init__(self, tower: nn.Module, pack: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> None:
        super().__init__()
        self.tower, self.pack = tower, pack

    def forward(self, patches: Tensor, grid: Tensor) -> Any:
        return self.tower(*self.pack(patches, grid))


def _flat(patches: Tensor, grid: Tensor) -> tuple[Any, ...]:
    return patches.flatten(0, 1), grid


def _squares(patches: Tensor) -> Tensor:
    """[BATCH * n, 3, patch, patch]."""
    side = round((patches.shape[-1] / 3) ** 0.5)
    return patches.reshape(-1, 3, side, side)


def _row(patches: Tensor, grid: Tensor) -> tuple[Any, ...]:
    """One image [1, 3, patch, BATCH * n * patch], as MiniCPM-V packs them."""
    squares = _squares(patches)
    return squares.permute(1, 2, 0, 3).reshape(1, 3, squares.shape[-1], -1), grid[:, 1:]


def _image_tokens(patches: Tensor, grid: Tensor) -> tuple[Any, ...]:
    """Squares of 2 x 2 patches with channels last, and sizes counted in them."""
    side = round((patches.shape[-1] / 3) ** 0.5)
    squares = patches.reshape(-1, 2, 2, side, side, 3).transpose(2, 3)
    return squares.reshape(-1, 2 * side, 2 * side, 3), grid // torch.tensor([1, 2, 2])


def _images(patches: Tensor, grid: Tensor) -> tuple[Any, ...]:
    """Images [BATCH, 3, height, width] and their sizes in pixels; every patch is a square of its own."""
    batch, squares = patches.shape[0], _squares(patches)
    side = squares.shape[-1]
    tiles = squares.reshape(batch, GRID, GRID, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(batch, 3, GRID * side, GRID * side), [(GRID * side, GRID * side)] * batch


_PACK: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    "inkling2": _image_tokens,
    "kimi_k25": lambda patches, grid: (_squares(patches), grid),
    "minicpm_ocr": _row,
    "minicpmv4_6": _row,
    "minicpmv4_7": _row,
    "paddleocr_vl": lambda patches, grid: (_squares(patches)[None], grid),
    "pixtral": _images,
    "video_llama_3": lambda patches, grid: (*_flat(patches, grid), torch.ones_like(grid[:, 0])),
}
"""How towers that do not take rows of pixels pack them."""


@cache
def towers() -> dict[str, tuple[str, str]]:
    """Model of transformers -> the module and class of its packed vision tower."""
    import transformers

    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        classes = _TOWER.findall(source) if "cu_seqlens" in source else []
        if classes:  # the last, where one of them wraps another
            found[path.parent.name] = (f"transformers.models.{path.parent.name}.{path.stem}", classes[-1])
    return found


def names() -> list[str]:
    """Every packed tower, then those that pad."""
    return [*towers(), *_PADDED, *_SPEECH]


def build(name: str) -> ZooModel:
    """The tower of a name. Raises NotOffered where this version of transformers has none."""
    try:
        if name in _PADDED:
            return _padded(*_PADDED[name])
        return _speech(name) if name in _SPEECH else _packed(name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise NotOffered(f"transformers has no tower {name} ({error})") from error


def _packed(name: str) -> ZooModel:
    """A tower of three small blocks, and two images of GRID x GRID patches."""
    if name not in towers():
        raise NotOffered(f"transformers has no packed tower {name}")
    module, kind = towers()[name]
    tower = getattr(importlib.import_module(module), kind)
    fields = tower.config_class().to_dict()
    settings = {field: value for field, value in _SETTINGS.items() if field in fields}
    if "embed_dim" in fields:  # hidden_size is then the width of the language model
        settings["hidden_size"] = 48
    if "layer_types" in fields:  # of a period of several kinds, with both in it
        settings["layer_types"] = fields["layer_types"][1:4]
    model = tower(tower.config_class(**settings)).eval()
    stem = next(p for path, p in model.named_parameters() if _STEM.search(path) and p.dim() > 1)
    # Four neighbours stand together in every order of windows, so that short windows find equal tokens too.
    palettes = tuple(palette_tokens(BATCH, GRID * GRID, stem[0].numel(), k=4, run=run) for run in (1, 4))
    grid = torch.tensor([[1, GRID, GRID]] * BATCH)
    args = torch.randn_like(palettes[0]), grid
    return ZooModel(Packed(model, _PACK.get(name, _flat)).eval(), args, tuple((patches, grid) for patches in palettes))


# -- towers that pad (NaViT) and towers of speech ----------------------------------------------------------------------

_PADDED = {
    "idefics2": ("idefics2", "Idefics2VisionTransformer"),
    "idefics3": ("idefics3", "Idefics3VisionTransformer"),
    "smolvlm": ("smolvlm", "SmolVLMVisionTransformer"),
}
"""Towers that take images of any size in one batch, padded, and a mask of their patches."""


class _Speech(nn.Module):
    """An encoder of packed speech that takes frames [BATCH, bins, frames], all of them valid."""

    def __init__(self, encoder: nn.Module, masked: bool) -> None:
        super().__init__()
        self.encoder, self.masked = encoder, masked

    def forward(self, mel: Tensor, lengths: Tensor) -> Any:
        if self.masked:
            return self.encoder(mel, torch.ones_like(mel[:, 0], dtype=torch.long))
        return self.encoder(mel.transpose(0, 1).flatten(1), feature_lens=lengths)


_SPEECH = {
    "qwen2_5_omni_audio": ("qwen2_5_omni", "Qwen2_5OmniAudioEncoder", False),
    "qwen3_omni_audio": ("qwen3_omni_moe", "Qwen3OmniMoeAudioEncoder", False),
    "qwen3_asr": ("qwen3_asr", "Qwen3ASREncoder", True),
}
"""Encoders of packed speech: module, class, and whether it takes a mask of frames rather than their number."""


def _found(model: str, kind: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), kind)


def _padded(model: str, kind: str) -> ZooModel:
    """Two images of 8 x 8 patches, of which the second is only six high."""
    tower = _found(model, kind)
    settings = {field: _SETTINGS[field] for field in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = tower.config_class(**settings, intermediate_size=96, image_size=128, patch_size=16)
    mask = torch.ones(BATCH, 8, 8, dtype=torch.bool)
    mask[1, 6:] = False
    image = palette_grid(BATCH, (8, 8), (16, 16), k=4)
    return ZooModel(tower(config).eval(), (torch.randn_like(image), mask), ((image, mask),))


def _speech(name: str) -> ZooModel:
    model, kind, masked = _SPEECH[name]
    encoder = _found(model, kind)
    config = encoder.config_class(d_model=64, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=96,
                                  num_mel_bins=16, output_dim=48, n_window=50)  # fmt: skip
    mel = palette_tokens(BATCH, 400, 16, k=2, run=100).transpose(1, 2).contiguous()
    lengths = torch.tensor([400] * BATCH)
    return ZooModel(_Speech(encoder(config), masked).eval(), (torch.randn_like(mel), lengths), ((mel, lengths),))
