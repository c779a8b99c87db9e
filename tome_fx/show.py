"""``python -m tome_fx show``: which tokens of a picture or a video a model merges, and how its graph was rewritten.

Of a photo one PNG: the merged groups after several layers, the token counts, and the rewritten graph around one block.
Of a video a GIF: the frames beside their merged groups.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import tome_fx
from tome_fx import assets, diagram
from tome_fx.visualize import sheet, visualize, write_gif

if TYPE_CHECKING:
    from PIL import Image

    from tome_fx.explain import MergeStep

__all__ = ["Subject", "is_video", "page", "run"]

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
PICTURES = 4
"""How many merges are drawn at most."""
FRAMES = 16
"""Frames of a video that an image model sees, each alone."""
INCHES = 13.0
"""Width that the page is taken to have, for the size of the letters."""


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on the CPU, the shape of its input, and what to say of its weights.

    ``shape``: [1, 3, S, S], or for clips [1, 3, T, S, S] or [1, T, 3, S, S]. ``grid``: (steps, rows, columns) of the
    tubelets of a clip; None: from the stride of its first Conv3d.
    """

    model: nn.Module
    shape: tuple[int, ...]
    title: str
    grid: tuple[int, ...] | None = None


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def run(
    photo: str | os.PathLike[str],
    subject: Subject,
    r: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Draw what ``subject`` merges in ``photo``, a picture or a video; returns the path of the drawing.

    Args:
        r: tokens merged in each layer, as `tome_backend` takes it.
        out: a .png, of a video a .gif; default ``tome_show.png`` or ``tome_show.gif``.
        console: default: one on stdout.

    Raises:
        AssetError: the file can not be read, or a package is missing.
        ValueError: an argument does not fit, or the model merges nothing that can be drawn.
    """
    assets.require("PIL", "matplotlib")
    console = console or Console()
    video = is_video(photo)
    path = Path(out if out is not None else f"tome_show.{'gif' if video else 'png'}")
    if path.suffix.lower() != (".gif" if video else ".png") or not path.parent.is_dir():
        raise ValueError(f"out must be a {'.gif' if video else '.png'} in a folder that exists, got {path}")
    size = _checked_size(subject.shape)
    console.print(f"{Path(photo).name} at {size} px, r={r}: {subject.title}", markup=False, highlight=False)
    if video:
        write_gif(_moving(photo, subject, r, size, console), path)
    elif len(subject.shape) == 5:
        raise ValueError("this model takes clips: give a video, not a picture")
    else:
        (image,) = assets.photos(photo)
        page(assets.crop(image, size), subject.model, r, console).save(path)
    console.print(f"Picture: [bold]{path}[/] (same inside and same border colour: one token)")
    return path


def _checked_size(shape: Sequence[int]) -> int:
    """Side of the input in pixels."""
    channels = shape[1:3] if len(shape) == 5 else shape[1:2]
    if len(shape) not in (4, 5) or 3 not in channels or shape[0] != 1 or shape[-1] != shape[-2]:
        raise ValueError(f"need an input of one square RGB picture or clip, not {list(shape)}")
    return shape[-1]


# ------------------------------------------------------------------------------------------------------- a photo


def page(picture: Image.Image, model: nn.Module, r: Any, console: Console | None = None) -> Image.Image:
    """The sheet for one square RGB picture of the size that ``model`` takes: groups, token counts, a block.

    Raises:
        ValueError: nothing merged, or not over the whole picture.
    """
    from PIL import Image as pil

    x = assets.preprocess(picture, picture.width)
    trace = tome_fx.trace_tokens(model, (x,), r=r)
    if console is not None:
        console.print(trace.report.summary(), markup=False, highlight=False)
    steps = _whole(trace)
    shown = [steps[i] for i in sorted({len(steps) * n // PICTURES - 1 for n in range(1, PICTURES + 1)} - {-1})]
    drawn = [visualize(picture, step.groups[0], prefix=step.protected) for step in shown]
    titles = [f"original: {steps[0].tokens_before} tokens", *(f"{s.name}: {s.tokens_after} tokens" for s in shown)]
    top = sheet([[picture, *drawn]], [titles], text=max(12, picture.width // 22))
    block = steps[min(1, len(steps) - 1)].name
    graph = diagram.block_graph(tome_fx.rewrite(model, (x,), r=r, plain=False).graph, block)
    bottom = _panels(steps, graph, block, top.width)
    whole = pil.new("RGB", (top.width, top.height + bottom.height), "white")
    whole.paste(top, (0, 0))
    whole.paste(bottom, (0, top.height))
    return whole


def _whole(trace: tome_fx.TokenTrace) -> list[MergeStep]:
    """The merges, all of them over the whole picture."""
    if not trace.merges:
        raise ValueError(f"no tokens were merged: {trace.report.summary()}")
    first = trace.merges[0].groups.shape
    if any(step.groups.shape != first for step in trace.merges) or first[:-1].numel() != 1:
        raise ValueError("this model merges inside windows or at several resolutions: there is no one picture of it")
    return trace.merges


def _panels(steps: Sequence[MergeStep], graph: Any, block: str, width: int) -> Image.Image:
    """Token counts and a block of the graph, one below the other, `width` pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot no display is looked for
    from PIL import Image as pil

    figure = Figure(figsize=(INCHES, 5.2), dpi=width / INCHES, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    tokens, rewritten = figure.subplots(2, 1, height_ratios=(1, 2))
    diagram.draw_tokens(tokens, steps)
    tokens.set_title("tokens after each merge", fontsize=9, loc="left")
    diagram.draw_block(rewritten, graph)
    rewritten.set_title(f"the rewritten graph around the merge {block} (views are left out)", fontsize=9, loc="left")
    canvas.draw()
    return pil.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# ------------------------------------------------------------------------------------------------------- a video


def _moving(video: str | os.PathLike[str], subject: Subject, r: Any, size: int, console: Console) -> list[Image.Image]:
    """Each frame beside its groups."""
    clips = len(subject.shape) == 5
    layout = subject.shape.index(3, 1) if clips else 1
    count = subject.shape[3 - layout] if clips else FRAMES
    frames = [assets.crop(frame, size) for frame in assets.video_frames(video, count)]
    xs = torch.cat([assets.preprocess(frame, size) for frame in frames])
    if clips:
        x = xs.transpose(0, 1)[None] if layout == 1 else xs[None]
        steps = _whole(tome_fx.trace_tokens(subject.model, (x,), r=r))
        grid = subject.grid or _tubelets(subject.model, (count, size, size))
        drawn = visualize(frames, steps[-1].groups[0], prefix=steps[-1].protected, grid=grid)
    else:
        console.print("This model sees pictures: each frame is merged alone, colours do not follow a group.")
        drawn = []
        for frame, x in zip(frames, xs, strict=True):
            steps = _whole(tome_fx.trace_tokens(subject.model, (x[None],), r=r))
            drawn.append(visualize(frame, steps[-1].groups[0], prefix=steps[-1].protected))
    titles = [f"{steps[0].tokens_before} tokens", f"merged: {steps[-1].tokens_after}"]
    text = max(10, size // 22)
    return [sheet([list(pair)], [titles], text=text) for pair in zip(frames, drawn, strict=True)]


def _tubelets(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """(steps, rows, columns) by the stride of the first Conv3d."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            return tuple(n // stride for n, stride in zip(shape, module.stride, strict=True))
    raise ValueError("how the clip is cut into tubelets can not be told from the model: give --grid STEPS,ROWS,COLUMNS")
