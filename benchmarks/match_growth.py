"""How time and memory of matching alone grow with the tokens: one sample of 64 channels, of which a quarter merges.

The paper's matching as C++ and as ATen, halves, and the local ones. Memory is the most that a call holds above what was
there before. Writes results/match_growth-cpu.json (or -gpu) and a plot; two minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import harness
from tome_fx import ops, timing
from tome_fx.methods.how import How

SIDES = (32, 64, 128, 256)
"""Of the square grid of tokens: 1,024 to 65,536 of them."""
CHANNELS = 64


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, claims=False)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="tokens along a side of the grid")
    parser.add_argument("--fresh", action="store_true", help="even where there is a result")
    return parser.parse_args()


def forms(side: int, device: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by name, on a grid of side x side tokens."""
    n = side * side
    x = torch.randn(1, n, CHANNELS, generator=torch.Generator().manual_seed(0)).to(device)
    place = ops.grid_places([side, side], 0, 0, device=torch.device(device))[None]

    def pieces(partition: str) -> Callable[[], Any]:
        key = How(partition=partition).key
        return lambda: ops.match_pieces(x, None, None, place, None, n // 4, 0, 0, 0, False, False, key)

    return {
        "match": lambda: ops.match(x, n // 4, 0, 0),
        "match, ATen": lambda: ops.match_aten(x.unsqueeze(2), n // 4, 0, 0),
        "sequential": lambda: ops.match_by(x, n // 4, 0, 0, False, "bipartite", "sequential", "cosine"),
        **{name: pieces(name) for name in ("window:8", "window:2", "band:8")},
    }


def point(side: int, rounds: int, device: str) -> dict[str, Any]:
    """One number of tokens: seconds and bytes of each form."""
    held = forms(side, device)
    with torch.no_grad():
        times = timing.interleaved(held, rounds, device=device)
        memory = {name: timing.extra_memory(fn, device) for name, fn in held.items()}
    found = {name: {"seconds": statistics.median(times[name]), "bytes": memory[name]} for name in held}
    return {"tokens": side * side, "forms": found}


def plot(points: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Time and memory against tokens, both logarithmic."""
    from matplotlib.figure import Figure  # late: as in harness

    figure = Figure(figsize=(10, 4), layout="constrained")
    tokens = [point["tokens"] for point in points]
    shown = (("seconds", 1e3, "ms a call"), ("bytes", 2.0**-20, "MiB above what was there"))
    for axes, (what, scale, label) in zip(figure.subplots(1, 2), shown, strict=True):
        for name in points[0]["forms"]:
            axes.plot(tokens, [max(p["forms"][name][what] * scale, 0.01) for p in points], "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.set(xlabel="tokens", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure every number of tokens and write the curves."""
    args, console = arguments(), Console()
    path = harness.pending(args, "match_growth", console)
    if path is None:
        return 0
    info = harness.machine(args.device, "float32", console)
    points = list(map(functools.partial(point, rounds=args.rounds, device=args.device), args.sides))
    harness.save({"benchmark": "match_growth", "machine": info, "points": points}, path, console)
    title = f"matching alone, {CHANNELS} channels, {info['device']}, torch {info['torch']}"
    plot(points, title, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
