"""What every benchmark shares: run the variants, judge the claims, write the table, the JSON and the plot.

JSON: {"benchmark", "machine": `timing.machine_info`, "settings", "baseline",
       "variants": {name: {"label", "seconds": [per round], "min", "median", "images_per_second", "ratio",
                           "warm_compile", "cold": `timing.ColdCompile` or null}},
       "claims": [{"text", "value", "limit", "at_least", "holds"}]}
Times in seconds, memory in bytes, `ratio` in times the baseline's speed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tome_fx import timing

RESULTS = Path(__file__).parent / "results"
BUSY = 0.4
"""Load average for each core from which a machine counts as busy."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table. `compiled`: measure its cold compile too."""

    label: str
    case: timing.Case
    compiled: bool = True


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of one variant: per round, of its first call with caches that its cold compile filled, and cold."""

    label: str
    seconds: list[float]
    warm_compile: float
    cold: timing.ColdCompile | None


@dataclasses.dataclass(frozen=True)
class Claim:
    """`value` must be at least, or at most, `limit`."""

    text: str
    value: float
    limit: float
    at_least: bool

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def arguments(description: str, r: int, batch: int) -> argparse.Namespace:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--r", type=int, default=r, help="tokens merged in each block (default %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="images (default %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="leave the other variants out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a claim does not hold")
    return parser.parse_args()


def measure(variants: Mapping[str, Variant], rounds: int, device: str, console: Console) -> dict[str, Measured]:
    """Cold compiles one after another, each in its own process; then all variants interleaved in this one."""
    with tempfile.TemporaryDirectory(prefix="tome_fx_bench_") as root, Progress(console=console) as bar:
        caches = {name: Path(root) / name for name in variants}
        cold = _cold_compiles(variants, caches, device, bar)
        steps, warm = _first_calls(variants, caches, device, bar)
        task = bar.add_task("rounds, interleaved", total=len(steps) * (rounds + 1))
        seconds = timing.interleaved(steps, rounds, progress=lambda *_: bar.advance(task), device=device)
    return {name: Measured(v.label, seconds[name], warm[name], cold[name]) for name, v in variants.items()}


def _cold_compiles(
    variants: Mapping[str, Variant], caches: Mapping[str, Path], device: str, bar: Progress
) -> dict[str, timing.ColdCompile | None]:
    """The cold compile of each compiled variant; its caches stay in the variant's directory."""
    task = bar.add_task("cold compiles", total=len(variants))
    cold: dict[str, timing.ColdCompile | None] = {}
    for name, variant in variants.items():
        bar.update(task, description=f"cold compile: {variant.label}")
        cold[name] = timing.cold_compile(variant.case, device, caches[name]) if variant.compiled else None
        bar.advance(task)
    return cold


def _first_calls(
    variants: Mapping[str, Variant], caches: Mapping[str, Path], device: str, bar: Progress
) -> tuple[dict[str, timing.Step], dict[str, float]]:
    """Build every variant in this process and call it once, with the caches of its cold compile."""
    task = bar.add_task("first calls", total=len(variants))
    steps: dict[str, timing.Step] = {}
    warm: dict[str, float] = {}
    for name, variant in variants.items():
        bar.update(task, description=f"first call: {variant.label}")
        with _inductor_cache(caches[name]):
            steps[name] = timing.load_object(variant.case.target)(**variant.case.kwargs)
            warm[name] = timing.seconds_of(steps[name], device)
        bar.advance(task)
    return steps, warm


@contextlib.contextmanager
def _inductor_cache(cache: Path) -> Iterator[None]:
    """Point both compiler caches at `cache`."""
    names = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def machine(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """`timing.machine_info`, to be taken before anything is measured; says so when the machine is busy."""
    info = timing.machine_info(args.device, getattr(torch, args.dtype))
    if (info["load"] or 0.0) > BUSY * info["cores"]:
        console.print(f"[yellow]The machine is busy (load {info['load']}): the compile times will be too long.")
    return info


def record(
    name: str,
    info: Mapping[str, Any],
    measured: Mapping[str, Measured],
    baseline: str,
    claims: Sequence[Claim],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The JSON of a benchmark (see the module's docstring); `info` is what `machine` said at the start."""
    base = measured[baseline].seconds
    return {
        "benchmark": name,
        "machine": info,
        "settings": {"r": args.r, "batch": args.batch, "rounds": args.rounds},
        "baseline": baseline,
        "variants": {key: _row(m, base, args.batch) for key, m in measured.items()},
        "claims": [{**dataclasses.asdict(claim), "holds": claim.holds} for claim in claims],
    }


def _row(measured: Measured, base: Sequence[float], batch: int) -> dict[str, Any]:
    """One variant as JSON."""
    times = timing.summary(measured.seconds)
    return {
        "label": measured.label,
        "seconds": measured.seconds,
        "min": times.min,
        "median": times.median,
        "images_per_second": batch / times.median,
        "ratio": timing.ratio(measured.seconds, base),
        "warm_compile": measured.warm_compile,
        "cold": dataclasses.asdict(measured.cold) if measured.cold else None,
    }


def publish(result: Mapping[str, Any], out: Path, console: Console) -> None:
    """Print the table and the claims; write NAME-DEVICE.json and .png into `out`."""
    console.print(_table(result))
    for claim in result["claims"]:
        sign = "\N{GREATER-THAN OR EQUAL TO}" if claim["at_least"] else "\N{LESS-THAN OR EQUAL TO}"
        verdict = "[green]holds" if claim["holds"] else "[red]does not hold"
        console.print(f"{claim['text']}: {claim['value']:.3f} {sign} {claim['limit']:g} {verdict}")
    out.mkdir(parents=True, exist_ok=True)
    kind = "cpu" if result["machine"]["device"] == "cpu" else "gpu"
    path = out / f"{result['benchmark']}-{kind}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    _plot(result, path.with_suffix(".png"))
    console.print(f"written: {path.name} and {path.with_suffix('.png').name}")


def _table(result: Mapping[str, Any]) -> Table:
    """The result for a terminal."""
    table = Table(
        title=f"{result['benchmark']}: {result['machine']['cpu']}, torch {result['machine']['torch']}",
        caption="ms: median; cold, warm: compile with empty, full caches; MiB: peak of a call",
    )
    for column in ("", "ms", "img/s", "speed", "cold s", "warm s", "pass s", "MiB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in result["variants"].values():
        cold = row["cold"]
        after = ("-", "-", "-", "-")
        if cold:
            passes = f"{sum(cold['passes'].values()):.2f}" if cold["passes"] else "-"
            warm = max(row["warm_compile"] - row["median"], 0.0)
            after = (f"{cold['seconds']:.1f}", f"{warm:.1f}", passes, f"{cold['peak_bytes'] / 2**20:.0f}")
        times = (f"{row['median'] * 1e3:.0f}", f"{row['images_per_second']:.2f}")
        table.add_row(row["label"], *times, f"{row['ratio']:.2f}", *after)
    return table


def _plot(result: Mapping[str, Any], path: Path) -> None:
    """Speed against the baseline, and cold compile seconds, as two bar charts."""
    from matplotlib.figure import Figure  # late: half a second, and without pyplot no display is looked for

    rows = list(result["variants"].values())[::-1]
    labels = [row["label"] for row in rows]
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.4), layout="constrained")
    speed, cold = figure.subplots(1, 2, sharey=True)
    speed.bar_label(speed.barh(labels, [row["ratio"] for row in rows], color="#2a6f97"), fmt="%.2f", padding=3)
    speed.axvline(1.0, color="black", linewidth=0.8)
    speed.set_xlabel("speed against Inductor (higher is better)")
    seconds = [row["cold"]["seconds"] if row["cold"] else 0.0 for row in rows]
    cold.bar_label(cold.barh(labels, seconds, color="#c9733b"), fmt="%.0f", padding=3)
    cold.set_xlabel("cold compile, seconds (lower is better)")
    for axes in (speed, cold):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    figure.suptitle(f"{result['benchmark']}, {result['machine']['device']}, torch {result['machine']['torch']}")
    figure.savefig(path, dpi=150)
