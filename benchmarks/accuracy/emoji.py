"""Emoji at native resolution with their Unicode subgroups ("animal-bird", "clothing"), out of two packages of npm.

The pictures are Fluent Emoji (MIT), 256 px; the subgroup of each is the folder in which OpenMoji has it (CC-BY-SA 4.0:
nothing of it is in this repository). Harder than CIFAR's ten classes, and no picture is made larger.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from rich.console import Console

import packages
from tome_fx.assets import AssetError

PICTURES = packages.Package(
    "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "Fluent Emoji, 16 MB",
)  # fmt: skip
GROUPS = packages.Package(
    "openmoji@17.0.0", "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68", "the groups of OpenMoji, 4 MB",
)  # fmt: skip
LEFT_OUT = "country-flag", "flag"
TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
FEWEST = 5
"""Pictures of a subgroup that counts."""


def load(px: int, console: Console | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 [n, px, px, 3], on white; the subgroup of each, int64 [n]; names of these. In the order of code points.

    Raises:
        AssetError: as `packages.Package.path`, or a package does not hold what it should.
    """
    try:
        with tarfile.open(GROUPS.path(console)) as opened:
            of = groups(opened.getnames())
        with tarfile.open(PICTURES.path(console)) as opened:
            found = {code(m.name): opened.extractfile(m).read() for m in opened if m.name.endswith(".webp")}
    except (tarfile.TarError, OSError) as error:
        raise AssetError(f"can not read the emoji of {PICTURES.name} and {GROUPS.name}: {error}") from error
    names = [of[one] for one in found if one in of]
    kept = sorted({name for name in names if names.count(name) >= FEWEST})
    chosen = sorted(one for one in found if of.get(one) in kept)
    if not chosen:
        raise AssetError(f"{PICTURES.name} holds no emoji that {GROUPS.name} names")
    pixels = np.stack([picture(found[one], px) for one in chosen])
    return pixels, np.array([kept.index(of[one]) for one in chosen]), kept


def groups(names: list[str]) -> dict[str, str]:
    """Code points -> subgroup, of the files package/src/GROUP/SUBGROUP/CODE.svg; without flags and skin tones."""
    paths = [PurePosixPath(name) for name in names]
    drawn = [path for path in paths if path.match("package/src/*/*/*.svg")]
    own = {code(path.name): path.parent.name for path in drawn}
    return {one: name for one, name in own.items() if name not in LEFT_OUT and not TONES & set(one.split("-"))}


def code(name: str) -> str:
    """The code points of a file's name, without the mark that asks for a picture."""
    return "-".join(part for part in PurePosixPath(name).stem.lower().split("-") if part != "fe0f")


def picture(data: bytes, px: int) -> np.ndarray:
    """uint8 [px, px, 3], on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB").resize((px, px), Image.Resampling.BICUBIC))
