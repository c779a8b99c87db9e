"""`bench`: a model with and without merging, timed side by side."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from tome_fx import timing
from tome_fx.cli.subjects import DTYPES, backend_of, check_runs, config_of, load, refusals, write_numbers

PLAIN, MERGED = "plain", "tome_fx"
"""The two candidates of `bench`: the inner compiler alone, and tome_fx before it."""


def steps_of(args: argparse.Namespace, model: nn.Module, x: torch.Tensor) -> dict[str, timing.Step]:
    """Both candidates, compiled when first called; the same module, weights and input."""
    compiled = {
        PLAIN: torch.compile(model, backend=args.inner, dynamic=False),
        MERGED: torch.compile(model, backend=backend_of(args), dynamic=False),
    }
    return {name: _step(run, x) for name, run in compiled.items()}


def _step(run: Any, x: torch.Tensor) -> timing.Step:
    """A forward pass without gradients."""

    def step() -> object:
        with torch.no_grad():
            return run(x)

    return step


def bench(args: argparse.Namespace, words: Sequence[str], console: Console) -> None:
    """Time both candidates and print the table."""
    backend_of(args)
    model, x = load(args)
    check_runs(model, x)
    steps = steps_of(args, model, x)
    with Progress(console=console, transient=True) as bar, refusals():
        task = bar.add_task("compile and time", total=len(steps) * (args.rounds + 2))
        seconds = timing.interleaved(
            steps, args.rounds, warmup=2, progress=lambda *_: bar.advance(task), device=args.device
        )
        cold = {} if args.no_cold else _cold(words, args.device, bar)
    numbers = _numbers(args, x, seconds, cold)
    console.print(_table(numbers))
    write_numbers(args.json, numbers)


def _cold(words: Sequence[str], device: torch.device, bar: Progress) -> dict[str, timing.ColdCompile]:
    """The cold compile of each candidate, one after another."""
    task = bar.add_task("cold compiles", total=2)
    found = {}
    for name in (PLAIN, MERGED):
        case = timing.Case("tome_fx.cli:bench_step", {"argv": list(words), "candidate": name})
        found[name] = timing.cold_compile(case, device)
        bar.advance(task)
    return found


def _numbers(
    args: argparse.Namespace,
    x: torch.Tensor,
    seconds: dict[str, list[float]],
    cold: dict[str, timing.ColdCompile],
) -> dict[str, Any]:
    """The measurement as JSON: seconds, bytes, images a second."""
    rows = {
        name: {
            "seconds": times,
            **dataclasses.asdict(timing.summary(times)),
            "images_per_second": len(x) / timing.summary(times).median,
            "ratio": timing.ratio(times, seconds[PLAIN]),
            "cold": dataclasses.asdict(cold[name]) if name in cold else None,
        }
        for name, times in seconds.items()
    }
    return {
        "model": args.model,
        "input": list(x.shape),
        "config": config_of(args),
        "machine": timing.machine_info(args.device, DTYPES[args.dtype]),
        "candidates": rows,
    }


def _table(numbers: dict[str, Any]) -> Table:
    """The measurement for a terminal."""
    machine, inner = numbers["machine"], numbers["config"]["inner"]
    title = f"{numbers['model']}, input {numbers['input']} {machine['dtype']}, {machine['device']}"
    table = Table(title=title, caption="median and (best) of the rounds; cold: compile time and peak memory")
    for column in ("", "images/s", "ms", "speed", "cold s", "passes s", "MiB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in numbers["candidates"].items():
        cold, after = row["cold"], ("-", "-", "-")
        if cold:
            passes = f"{sum(cold['passes'].values()):.2f}" if cold["passes"] else "-"
            after = (f"{cold['seconds']:.1f}", passes, f"{cold['peak_bytes'] / 2**20:.0f}")
        milliseconds = f"{row['median'] * 1e3:.1f} ({row['min'] * 1e3:.1f})"
        label = inner if name == PLAIN else f"{MERGED} + {inner}"
        table.add_row(label, f"{row['images_per_second']:.1f}", milliseconds, f"{row['ratio']:.2f}x", *after)
    return table
