"""What `every=k`, `multiple=m` and a falling schedule give: ViT-S/16 at 512 px, batch 2, 64 tokens a block on average.

Merging k times as many at every k-th block needs fewer matches and leaves more tokens in between; token counts that are
multiples of 8, 16 or 32 fit the tiles of matrix products. Each schedule is timed against Inductor and against r=64 at
every block, with its tokens and FLOPs: schedules that save as many FLOPs can be told apart by their overhead alone.
Writes results/schedules-cpu.json (or -gpu) and a plot; about ten minutes on two cores, half of them cold compiles.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import cases
import harness
import models
import tome_fx
from tome_fx import timing

CASE, BATCH = "vit_small_512", 2
BASE = "r=64"
SCHEDULES: dict[str, dict[str, Any]] = {
    BASE: {},
    "every=2": {"every": 2},
    "every=3": {"every": 3},
    "every=4": {"every": 4},
    "multiple=8": {"multiple": 8},
    "multiple=16": {"multiple": 16},
    "multiple=32": {"multiple": 32},
    "every=2, multiple=32": {"every": 2, "multiple": 32},
    "r=(64, -1)": {"r": (64, -1)},
}
"""What the tables call a schedule -> the arguments of `tome_backend` beside those of the case."""


def row(name: str, measured: Mapping[str, harness.Measured], report: tome_fx.ToMeReport) -> dict[str, Any]:
    """A schedule as JSON: tokens and FLOPs from the report, then speed and cold compile over Inductor's and BASE's."""
    mine, plain, base = (measured[n] for n in (name, "inductor", BASE))
    found = {
        "name": name,
        "options": SCHEDULES[name],
        "tokens": [report.tokens[0][0], *(after for _, after in report.tokens)],
        "flops": report.flops_after / report.flops_before,
        "inductor": timing.ratio(mine.seconds, plain.seconds),
        "base": timing.ratio(mine.seconds, base.seconds),
        "seconds": mine.seconds,
    }
    if mine.cold and plain.cold:
        found["cold"] = mine.cold.seconds / plain.cold.seconds
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    shown = Table(caption="over: speed over; cold: cold compile over Inductor's")
    for column in ("schedule", "merges", "last tokens", "FLOPs", "over Inductor", f"over {BASE}", "cold"):
        shown.add_column(column, justify="left" if column == "schedule" else "right")
    for each in rows:
        shown.add_row(*cells(each))
    return shown


def cells(each: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    tokens = each["tokens"]
    ratios = [f"{each[name]:.2f}" for name in ("flops", "inductor", "base")]
    return [
        each["name"],
        str(len(tokens) - 1),
        str(tokens[-1]),
        *ratios,
        f"{each['cold']:.2f}" if "cold" in each else "-",
    ]


def plot(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Speed over Inductor against the share of FLOPs that is left, a point for each schedule."""
    from matplotlib.figure import Figure  # late: as in harness

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for each in rows:
        axes.plot(each["flops"], each["inductor"], "o", color="#2a6f97")
        axes.annotate(each["name"], (each["flops"], each["inductor"]), xytext=(5, 4), textcoords="offset points")
    axes.set(xlabel="FLOPs over the model's", ylabel="speed over Inductor's")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure every schedule."""
    parser = harness.parser(__doc__, claims=False)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default %(default)s)")
    parser.add_argument("--no-cold", action="store_true", help="no cold compile times")
    parser.add_argument("--fresh", action="store_true", help="even where there is a result")
    args, console = parser.parse_args(), Console()
    path = harness.pending(args, "schedules", console)
    if path is None:
        return 0
    info = harness.machine(args.device, args.dtype, console)
    setting, case = cases.Setting(CASE, BATCH, args.device, args.dtype), cases.CASES[CASE]
    variants = {"inductor": harness.Variant("Inductor", cases.job(setting, "inductor"), not args.no_cold)}
    for name, options in SCHEDULES.items():
        job = cases.job(setting, "tome_fx", backend=options)
        variants[name] = harness.Variant(name, job, not args.no_cold)
    measured, failed = harness.measure(variants, args.rounds, args.device, console)
    net = models.BUILDERS[case.builder](**case.options).eval()
    reports = {
        name: tome_fx.explain(net, models.inputs(net, BATCH), **{"r": case.r, **options})
        for name, options in SCHEDULES.items()
    }
    rows = [row(name, measured, reports[name]) for name in SCHEDULES if name in measured]
    settings = {**dataclasses.asdict(setting), "rounds": args.rounds}
    result = {"benchmark": "schedules", "machine": info, "settings": settings, "schedules": rows, "left_out": failed}
    harness.save(result, path, console)
    console.print(table(rows))
    plot(
        rows,
        f"ViT-S@512, batch {BATCH}, {info['device']}, {args.dtype}, torch {info['torch']}",
        path.with_suffix(".png"),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
