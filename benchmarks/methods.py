"""What each method's matching and reduction cost: ViT-S/16 at 512 px (1,025 tokens), batch 2, r=16, compiled.

Profiles the compiled model of every method, as shares.py does, and gives the share of its time in three groups: what
reads attention and places for it, what finds the pairs, what merges or drops. Asked: at most `MOST` of the time;
`WHY` says what is above it. The model's pool is the mean of all tokens, so that the last block merges too; methods that
merge at the end of a tower alone do so with r=192, as many tokens as the others over all blocks. Each method in a
process of its own; results/methods-cpu.json (or -gpu) after each, and it goes on where it stopped.

    python benchmarks/methods.py [METHOD ...] [--device cpu|cuda] [--rounds 5] [--fresh] [--check]
"""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import harness
import shares
import tome_fx
from tome_fx import timing
from tome_fx.methods import METHODS

GROUPS = {
    "reading": re.compile(r"tome::(attention_paid|grid_places|place_)"),
    "matching": re.compile(r"tome(_cpu)?::match"),
    "merging": re.compile(r"tome(_cpu)?::|aten::(gather|scatter|index)"),
}
"""Group -> operators; each belongs to the first that it matches, with all that it calls."""
MOST = 0.05
"""The share of the compiled model's time that is asked for."""
R, R_AT_THE_END, BATCH, SIDE = 16, 192, 2, 512
WHY = {
    "tome": "",
}
"""Why a method is above `MOST`, by what was seen in the profile."""


def model_of() -> torch.nn.Module:
    """ViT-S/16 with random weights, float32, the mean of all tokens at its end."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", img_size=SIDE, global_pool="avg").eval()


def r_of(method: str) -> int:
    """Tokens merged in each block that merges."""
    return R_AT_THE_END if METHODS[method].options.get("blocks") == "last" else R


def grouped(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each of `GROUPS`, of outermost operators; "top": of the three costliest operators below them."""
    found = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        if not any(shares.group_of(parent.name, GROUPS) for parent in shares.parents(event)):
            group = shares.group_of(event.name, GROUPS)
            if group is not None:
                found[group] += event.cpu_time_total / 1e6
    return found


def inside(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of the ATen operators themselves (without what they call) inside of ours, the costliest five."""
    found: dict[str, float] = {}
    for event in events:
        if any(shares.group_of(parent.name, GROUPS) for parent in shares.parents(event)):
            found[event.name] = found.get(event.name, 0.0) + event.self_cpu_time_total / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1])[:5])


def profiled(step: timing.Step) -> dict[str, Any]:
    """Seconds of one call: "whole", each group, and "inside"."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        whole = timing.seconds_of(step)
    events = prof.events()
    return {"whole": whole, **grouped(events), "inside": inside(events)}


def measured(method: str, device: str, rounds: int, threads: int | None) -> dict[str, Any]:
    """One method: medians over profiled rounds, interleaved with the model without merging, both compiled."""
    if threads:
        torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model, x = model_of().to(device), torch.randn(BATCH, 3, SIDE, SIDE, device=device)
    with torch.inference_mode():
        backend: Any = tome_fx.tome_backend(r=r_of(method), method=method)
        runs = {"plain": torch.compile(model), "merged": torch.compile(model, backend=backend)}
        steps = {name: (lambda run=run: run(x)) for name, run in runs.items()}
        times = timing.interleaved(steps, rounds, warmup=2, device=device)
        seen = [profiled(steps["merged"]) for _ in range(rounds)]
    report = tome_fx.reports()[-1]
    parts = {name: statistics.median(each[name] / each["whole"] for each in seen) for name in GROUPS}
    middle = sorted(seen, key=lambda each: each["whole"])[len(seen) // 2]
    return {
        "r": r_of(method),
        "merges": report.merged_sites,
        "tokens": report.tokens[-1][1] if report.tokens else None,
        "macs": report.flops_after / report.flops_before,
        "seconds": times,
        "speed": timing.ratio(times["merged"], times["plain"]),
        "shares": parts,
        "share": sum(parts.values()),
        "inside": {name: seconds / middle["whole"] for name, seconds in middle["inside"].items()},
    }


def _child(pipe: Any, *job: Any) -> None:
    try:
        pipe.send(measured(*job))
    except Exception as error:  # noqa: BLE001 - the row says what went wrong
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


def run(*job: Any) -> dict[str, Any]:
    """`measured` in a process of its own."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(there, *job))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": "the process died"}
    finally:
        child.join()


def table(held: Mapping[str, Any]) -> Table:
    """For a terminal."""
    columns = ("method", "r", "merges", "ms", "speed", *GROUPS, "all", "costliest inside")
    shown = Table(*columns, title="share of the compiled model's time, %")
    for name, row in held.items():
        if "failed" in row:
            shown.add_row(name, row["failed"])
            continue
        top = ", ".join(f"{op} {100 * share:.1f}" for op, share in list(row["inside"].items())[:2])
        parts = [f"{100 * row['shares'][group]:.1f}" for group in GROUPS]
        ms = f"{1e3 * statistics.median(row['seconds']['merged']):.0f}"
        cells = (name, row["r"], row["merges"], ms, f"{row['speed']:.2f}", *parts, f"{100 * row['share']:.1f}", top)
        shown.add_row(*map(str, cells))
    return shown


def main() -> int:
    """Measure what has no result yet."""
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("methods", nargs="*", help="default: all")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, help="threads of torch (default: torch's)")
    options.add_argument("--fresh", action="store_true", help="measure again what has a result")
    options.add_argument("--check", action="store_true", help="exit with status 1 where one is above the limit")
    args = options.parse_args()
    harness.require(args.device)
    console, path = Console(), harness.result_path(args.out, "methods", args.device)
    held = json.loads(path.read_text())["methods"] if path.exists() else {}
    for name in args.methods or METHODS:
        if name in held and not args.fresh and "failed" not in held[name]:
            continue
        machine = {**timing.machine_info(args.device), **({"threads": args.threads} if args.threads else {})}
        held[name] = {**run(name, args.device, args.rounds, args.threads), "machine": machine}
        settings = {"model": "vit_small_patch16", "side": SIDE, "batch": BATCH, "rounds": args.rounds, "most": MOST}
        result = {"benchmark": "methods", "machine": machine, "settings": settings, "methods": held}
        path.write_text(json.dumps(result, indent=2) + "\n")
        console.print(name, held[name].get("failed") or f"{100 * held[name]['share']:.1f} %", highlight=False)
    console.print(table(held))
    return int(args.check and any(row.get("share", 1.0) > MOST for row in held.values()))


if __name__ == "__main__":
    sys.exit(main())
