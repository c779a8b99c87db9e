"""What counts that depend on the data cost: a compiled ViT-S/16 at 224 px (197 tokens), batch 8, in one graph.

Against the list of r that goes whatever the data say (8 tokens at each block), which is the fastest that `counts` can
be: at most 16 pairs a block by the rules, 8 rows of which go; and at most 8 of which none need go, so that every row
stays. Which pairs are accepted changes no shape, so weights and inputs are random. Variants are interleaved, ratios
taken within a round; seconds are processor time on one thread, which other work on the machine moves little. Writes
results/counts-cpu.json, from which docs/methods.md has its table.

    python benchmarks/counts.py [--rounds 7]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

import harness
import tome_fx
from tome_fx import timing

SIDE, BATCH, R, BLOCKS = 224, 8, 8, 12
VARIANTS: dict[str, dict[str, Any] | None] = {
    "unmerged": None,
    "a list, r=8": {"r": R},
    'counts="threshold", r=16, 8 go': {"r": 2 * R, "counts": "threshold", "tau": 0.3, "least": [R] * BLOCKS},
    'counts="votes", r=16, 8 go': {"r": 2 * R, "counts": "votes", "tau": 0.3, "least": [R] * BLOCKS},
    'counts="threshold", r=8, none need go': {"r": R, "counts": "threshold", "tau": 0.3, "placement": "stream"},
}
"""Name -> options of tome_backend; None: compiled as it is. The second is what the others are held against."""


def spent(run: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compiled(model: torch.nn.Module, x: torch.Tensor, options: dict[str, Any] | None) -> Callable[[], object]:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="inductor" if options is None else tome_fx.tome_backend(**options))
    fast(x)
    return lambda: fast(x)


def measured(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds by round; the first round is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            seconds = spent(call)
            found[name] += [seconds] if turn else []
    return found


def table(result: dict[str, Any]) -> list[str]:
    """The rows of docs/methods.md."""
    rows: dict[str, list[float]] = result["seconds"]
    base, against = (rows[name] for name in list(rows)[:2])
    lines = ["| | processor time | times as fast as unmerged | time of the list |", "| --- | --: | --: | --: |"]
    for name, own in rows.items():
        times = timing.summary(own).median, timing.ratio(own, base), 1 / timing.ratio(own, against)
        lines.append(f"| {name} | {times[0]:.2f} s | {times[1]:.2f} | {times[2]:.2f} |")
    return lines


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("--rounds", type=int, default=7)
    args = options.parse_args()
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", global_pool="avg").eval()
    x, console = torch.randn(BATCH, 3, SIDE, SIDE), Console()
    with torch.no_grad():
        calls = {}
        for name, own in VARIANTS.items():
            calls[name] = compiled(model, x, own)
            console.print(f"{name}: compiled")
        seconds = measured(calls, args.rounds)
    result = {"benchmark": "counts", "machine": timing.machine_info(), "seconds": seconds}
    harness.result_path(args.out, "counts", "cpu").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
