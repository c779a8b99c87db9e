"""What each method's matching and reduction cost: ViT-S/16 at 512 px (1,025 tokens), batch 2, r=16.

The rewritten graph runs op by op, and ours are timed apart from the rest in three groups: what reads attention and
places for the method, what finds the pairs, what merges or drops. Their share is that of a compiled model: ours, beside
the time that Inductor's ToMe takes for all else, in proportion to FLOPs. Times are processor seconds of one thread,
which other programs do not disturb; the products gain more by many threads than matching does, so that its share grows
with them. Asked: at most `MOST`; `WHY` says what is above it. The model's pool is the mean of all tokens, so that the
last block merges too; methods that merge at the end of a tower alone do so with r=192, as many tokens as the others
over all blocks. Writes results/methods-cpu.json after each method and goes on where it stopped.

    python benchmarks/methods.py [METHOD ...] [--rounds 5] [--fresh] [--check]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

import harness
import tome_fx
from tome_fx import timing
from tome_fx.methods import METHODS

GROUPS = {
    "reading": re.compile(r"tome::(attention_paid|grid_places|place_)"),
    "matching": re.compile(r"tome::match"),
    "merging": re.compile(r"tome::"),
}
"""Group -> operators; each belongs to the first that it matches."""
MOST = 0.05
"""The share of the compiled model's time that is asked for."""
R, R_AT_THE_END, BATCH, SIDE = 16, 192, 2, 512
WHY = {
    "mctf": "the attention that each token receives is computed again, for all queries: fused attention keeps it",
    "grid": "cells and similarities of all pairs of tokens, at each attention and MLP",
}
"""Why a method is above `MOST`, from a profile of it."""


def model_of() -> torch.nn.Module:
    """ViT-S/16 with random weights, float32, the mean of all tokens at its end."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", img_size=SIDE, global_pool="avg").eval()


def r_of(method: str) -> int:
    """Tokens merged in each block that merges."""
    return R_AT_THE_END if METHODS[method].options.get("blocks") == "last" else R


class Timed(fx.Interpreter):
    """Runs a graph op by op and adds the processor seconds of each of `GROUPS` to `seconds`."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seconds = dict.fromkeys(GROUPS, 0.0)

    def run_node(self, n: fx.Node) -> Any:
        group = group_of(n)
        start = time.thread_time()
        result = super().run_node(n)
        if group is not None:
            self.seconds[group] += time.thread_time() - start
        return result


def group_of(node: fx.Node) -> str | None:
    """The group of an operator of ours, None for others."""
    name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
    return next((group for group, pattern in GROUPS.items() if pattern.match(name)), None)


def processor_seconds(step: timing.Step, rounds: int) -> float:
    """Of one call on one thread: the median."""
    step()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def rest_of_compiled(x: Tensor, rounds: int) -> dict[str, float]:
    """Inductor's ToMe: "seconds" of a call, and "per_flop", seconds of all but ours over its FLOPs."""
    backend: Any = tome_fx.tome_backend(r=R)
    tome_fx.clear_reports()
    run = torch.compile(model_of(), backend=backend)
    whole = processor_seconds(lambda: run(x), rounds)
    flops = tome_fx.reports()[0].flops_after
    ours = sum(measured("tome", x, rounds)["seconds"].values())
    return {"seconds": whole, "per_flop": (whole - ours) / flops}


def measured(method: str, x: Tensor, rounds: int) -> dict[str, Any]:
    """Processor seconds of each of `GROUPS` in a call of one method: medians, after a call that warms up."""
    gm = tome_fx.rewrite(model_of(), (x,), r=r_of(method), method=method, plain=False)
    seen = []
    for _ in range(rounds + 1):
        timed = Timed(gm)
        timed.run(x)
        seen.append(timed.seconds)
    report = gm.meta["tome_report"]
    return {
        "r": r_of(method),
        "merges": report.merged_sites,
        "tokens": report.tokens[-1][1] if report.tokens else None,
        "flops": report.flops_after,
        "macs": report.flops_after / report.flops_before,
        "seconds": {name: statistics.median(each[name] for each in seen[1:]) for name in GROUPS},
    }


def judged(row: Mapping[str, Any], compiled: Mapping[str, float]) -> dict[str, Any]:
    """The row with "shares" of each group, and their sum, of a compiled model's time."""
    whole = sum(row["seconds"].values()) + compiled["per_flop"] * row["flops"]
    shares = {name: seconds / whole for name, seconds in row["seconds"].items()}
    return {**row, "shares": shares, "share": sum(shares.values())}


def table(held: Mapping[str, Any]) -> Table:
    """For a terminal."""
    shown = Table("method", "r", "merges", *GROUPS, "all", title="share of the compiled model's time, %")
    for name, row in held.items():
        parts = [f"{100 * row['shares'][group]:.1f}" for group in GROUPS]
        shown.add_row(name, str(row["r"]), str(row["merges"]), *parts, f"{100 * row['share']:.1f}")
    return shown


def main() -> int:
    """Measure what has no result yet."""
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("methods", nargs="*", help="default: all")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--fresh", action="store_true", help="measure again what has a result")
    options.add_argument("--check", action="store_true", help="exit with status 1 where one is above the limit")
    args, console = options.parse_args(), Console()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = harness.result_path(args.out, "methods", "cpu")
    result = json.loads(path.read_text()) if path.exists() and not args.fresh else {}
    with torch.inference_mode():
        x = torch.randn(BATCH, 3, SIDE, SIDE)
        if not result:
            settings = {"model": "vit_small_patch16", "side": SIDE, "batch": BATCH, "rounds": args.rounds, "most": MOST}
            result = {"benchmark": "methods", "machine": timing.machine_info(), "settings": settings,
                      "compiled": rest_of_compiled(x, args.rounds), "methods": {}}  # fmt: skip
        held = result["methods"]
        for name in [name for name in args.methods or METHODS if name not in held]:
            held[name] = judged(measured(name, x, args.rounds), result["compiled"])
            path.write_text(json.dumps(result, indent=2) + "\n")
            console.print(name, f"{100 * held[name]['share']:.1f} %", highlight=False)
    console.print(table(held))
    return int(args.check and any(row["share"] > MOST for row in held.values()))


if __name__ == "__main__":
    sys.exit(main())
