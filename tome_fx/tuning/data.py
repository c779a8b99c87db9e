"""What the command line tunes on: a folder of photos, and metrics by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tome_fx import assets

from .judge import Metric

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class DataError(ValueError):
    """A folder or a metric that does not fit; the message says what to do."""


@dataclass(frozen=True)
class Look:
    """How a model sees photos: [B, 3, H, W] of `shape`, in `dtype` on `device`, less `mean` over `std`."""

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    mean: Sequence[float] = assets.IMAGENET_MEAN
    std: Sequence[float] = assets.IMAGENET_STD


def folder(path: Path, look: Look, count: int, seed: int, classes: int | None) -> list[Any]:
    """Batches of `count` photos of a folder, drawn by a seed; with `classes`, pairs with labels int64 [B] that follow
    from the folders that they stand in. Raises DataError, and AssetError for a photo that cannot be read."""
    assets.require("PIL")
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(look.shape) != 4 or look.shape[1] != 3:
        raise DataError(f"photos are [B, 3, H, W] and the model takes {list(look.shape)}: give --data module:function")
    size = look.shape[0]
    if len(files) < 2 * size:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise DataError(f"{path} holds {len(files)} photos ({kinds}), and two batches of {size} are needed at least")
    order = np.random.default_rng(seed).permutation(len(files))[: min(count, len(files)) // size * size]
    chosen = [files[i] for i in order]
    labels = None if classes is None else labels_of(path, files, classes)
    batches: list[Any] = []
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        x = torch.cat([_seen(file, look) for file in part]).to(look.device, look.dtype)
        batches.append(x if labels is None else (x, torch.tensor([labels[file] for file in part], device=look.device)))
    return batches


def _seen(path: Path, look: Look) -> Tensor:
    from PIL import ImageOps

    (photo,) = assets.photos(path)
    height, width = look.shape[2:]
    pixels = np.asarray(ImageOps.fit(photo, (width, height), method=3), dtype=np.float32) / 255  # 3: bicubic
    normal = (torch.from_numpy(pixels) - torch.tensor(look.mean)) / torch.tensor(look.std)
    return normal.permute(2, 0, 1)[None]


def labels_of(path: Path, files: Sequence[Path], classes: int) -> Mapping[Path, int]:
    """The class of each photo: ImageNet's by WordNet ids, else the folders in order. Raises DataError."""
    names = {file: file.relative_to(path).parts[0] for file in files}
    folders = sorted(set(names.values()))
    if any(file.parent == path for file in files):
        raise DataError(f"top1 needs a folder for each class, and photos stand in {path} itself")
    numbers = _wordnet() if classes == 1000 else {}
    if not all(name in numbers for name in folders):
        if len(folders) != classes:
            raise DataError(f"{path} has {len(folders)} folders and the model {classes} classes: name the folders by "
                            "WordNet ids, or leave --metric out")  # fmt: skip
        numbers = {name: i for i, name in enumerate(folders)}
    return {file: numbers[name] for file, name in names.items()}


def _wordnet() -> dict[str, int]:
    if importlib.util.find_spec("timm") is None:
        return {}
    from timm.data import ImageNetInfo

    return {name: i for i, name in enumerate(ImageNetInfo().label_names())}


def top1(outputs: Any, targets: Tensor) -> Tensor:
    """Whether the largest of the scores [B, classes] is the target's [B]: float32 [B]."""
    (scores, *_) = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    return (scores.argmax(-1) == targets).float()


def words(model: nn.Module) -> Metric:
    """Words heard right, of those said: 1 - word error rate. The model's `decode(outputs)` gives the text of each
    sample, targets are the texts that were said. Raises DataError where it has none, or jiwer is missing."""
    decode: Callable[[Any], Sequence[str]] | None = getattr(model, "decode", None)
    if decode is None:
        raise DataError("wer needs a model with a method decode(outputs) that gives the text of each sample")
    if importlib.util.find_spec("jiwer") is None:
        raise DataError("wer needs jiwer: pip install jiwer")

    def wer(outputs: Any, targets: Sequence[str]) -> Tensor:
        import jiwer

        rows = []
        for said, heard in zip(targets, decode(outputs), strict=True):
            found = jiwer.process_words(said, heard)
            wrong = found.substitutions + found.deletions + found.insertions
            rows.append((len(said.split()) - wrong, len(said.split())))
        return torch.tensor(rows, dtype=torch.float64)

    return wer


NAMES = ("feature", "top1", "wer")
"""Metrics by name; feature is none: the distance of outputs."""
