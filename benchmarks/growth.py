"""How the overhead of tome_fx over the slice oracle grows: with the tokens at a fixed batch, and with the batch.

Four blocks of a ViT-S, of which each merges an eighth of the tokens. Overhead is the time of tome_fx over the oracle's,
less one. Writes results/growth-cpu.json (or -gpu) and a plot; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import cases
import harness

SIZES = (224, 320, 512, 768, 1024)
"""Pixels: 197 to 4097 tokens of 16 x 16 pixels and a class token."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CASE, DEPTH, PATCH = "vit_small_512", 4, 16
VARIANTS = ("inductor", "tome_fx", "oracle")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, claims=False)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels, at batch 1")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images, at the first size")
    parser.add_argument("--fresh", action="store_true", help="even where there is a result")
    return parser.parse_args()


def points(sizes: Sequence[int], batches: Sequence[int]) -> list[tuple[int, int]]:
    """(pixels, batch) of the two curves, each once: all sizes at batch 1, all batches at the first size."""
    return list(dict.fromkeys([*((size, 1) for size in sizes), *((sizes[0], batch) for batch in batches)]))


def point(size: int, batch: int, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure one point: its "settings" and "variants"."""
    tokens = (size // PATCH) ** 2 + 1
    setting, r = cases.Setting(CASE, batch, args.device, args.dtype), tokens // 8
    console.rule(f"{tokens} tokens, batch {batch}")
    options = {"img_size": size, "depth": DEPTH}
    variants = {
        name: harness.Variant(cases.label(name), cases.job(setting, name, r, options), compiled=False)
        for name in VARIANTS
    }
    measured, failed = harness.measure(variants, args.rounds, args.device, console)
    settings = {**dataclasses.asdict(setting), "tokens": tokens, "r": r, "rounds": args.rounds}
    return {"settings": settings, "variants": harness.rows(measured, "inductor", batch), "left_out": failed}


def overhead(point: dict[str, Any]) -> float:
    """Time of tome_fx over the oracle's, less one, as the median over rounds."""
    return 1 / harness.ratios(point["variants"])["oracle"] - 1


def plot(found: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Overhead over the oracle against tokens and against batch."""
    from matplotlib.figure import Figure  # late: as in harness

    figure = Figure(figsize=(10, 4), layout="constrained")
    first = found[0]["settings"]["tokens"]
    curves = {
        "tokens": ("batch 1", [p for p in found if p["settings"]["batch"] == 1]),
        "batch": (f"{first} tokens", [p for p in found if p["settings"]["tokens"] == first]),
    }
    for axes, (name, (fixed, chosen)) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        chosen = sorted(chosen, key=lambda p: p["settings"][name])
        values = [p["settings"][name] for p in chosen]
        axes.plot(values, [100 * overhead(p) for p in chosen], "o-", color="#2a6f97")
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel=f"{name}, at {fixed}", ylabel="time over the slice oracle's, %")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure every point and write the curves."""
    args, console = arguments(), Console()
    path = harness.pending(args, "growth", console)
    if path is None:
        return 0
    info = harness.machine(args.device, args.dtype, console)
    found = [point(size, batch, args, console) for size, batch in points(args.sizes, args.batches)]
    harness.save({"benchmark": "growth", "machine": info, "baseline": "inductor", "points": found}, path, console)
    title = f"{DEPTH} blocks of ViT-S, {info['device']}, {args.dtype}, torch {info['torch']}"
    plot(found, title, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
