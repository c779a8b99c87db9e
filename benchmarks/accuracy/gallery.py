"""The pictures of docs/gallery.md: `python benchmarks/accuracy/gallery.py`. Minutes; trains the network of `video.py`
if it is not in the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import clips
import tome_fx
import video
from tome_fx import assets, show
from tome_fx.visualize import sheet, visualize, write_gif

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
LIMIT = 300_000
"""Bytes of a picture in the repository, at most."""
WIDTH = 1600
PHOTO_SIZE, PHOTO_R = 518, 96
CLIP, CLIP_R, CLIP_SHAPE, CLIP_START = "bigbuckbunny", 160, (16, 96), 60
DRAWN = 128
"""Pixels of each frame in the GIF."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("photos", "clip"), help="leave the others as they are")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    try:
        if args.only != "clip":
            photos(args.out, console)
        if args.only != "photos":
            clip(args.out, console)
    except assets.AssetError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def photos(out: Path, console: Console) -> None:
    """A page for each of scikit-learn's photos, trained DINOv2."""
    model = assets.dinov2_vit_small(PHOTO_SIZE, console)
    for name, photo in zip(assets.SAMPLE_PHOTOS, assets.photos(), strict=True):
        page = show.page(assets.crop(photo, PHOTO_SIZE), model, PHOTO_R, console)
        page = page.resize((WIDTH, round(page.height * WIDTH / page.width)), Image.Resampling.LANCZOS)
        path = out / f"groups-{Path(name).stem}.jpg"
        page.save(path, quality=80, optimize=True)
        checked(path, console)


def clip(out: Path, console: Console) -> None:
    """A real clip beside its groups, which keep their colours over the frames, by the network of `video.py`."""
    model = video.trained(console)
    count, size = CLIP_SHAPE
    source = assets.video_frames(clips.real_clips()[CLIP], count, step=1, start=CLIP_START)
    frames = [assets.crop(frame, size) for frame in source]
    x = (torch.from_numpy(np.stack([np.asarray(f, np.float32) for f in frames])) / 255 - 0.5) / 0.25
    trace = tome_fx.trace_tokens(model, (x.permute(3, 0, 1, 2)[None],), r=CLIP_R)
    console.print(trace.report.summary(), highlight=False)
    step = trace.merges[-1]
    large = [assets.crop(frame, DRAWN) for frame in source]
    grid = tuple(n // cell for n, cell in zip((count, size, size), model.TUBELET, strict=True))
    drawn = visualize(large, step.groups[0], prefix=step.protected, grid=grid)
    titles = [[f"{trace.merges[0].tokens_before} tokens of the clip", f"merged: {step.tokens_after}"]]
    pages = [sheet([list(pair)], titles, gap=6, text=12) for pair in zip(large, drawn, strict=True)]
    write_gif(pages, out / "groups-clip.gif", fps=6)
    checked(out / "groups-clip.gif", console)


def checked(path: Path, console: Console) -> None:
    """Say how large it is; raises ValueError above `LIMIT`."""
    size = path.stat().st_size
    if size > LIMIT:
        raise ValueError(f"{path.name} has {size} bytes, at most {LIMIT} belong into the repository")
    console.print(f"{path}: {size / 1000:.0f} kB", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
