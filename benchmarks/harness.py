"""What every benchmark shares: run the variants, judge the claims, write the table, the JSON and the plot.

JSON: {"benchmark", "machine": `timing.machine_info`, "settings", "baseline",
       "variants": {name: {"label", "seconds": [per round], "min", "median", "images_per_second", "ratio",
                           "warm_compile", "cold": `timing.ColdCompile` or null}},
       "claims": [{"text", "value", "limit", "at_least", "holds"}],
       "left_out": {name: why}}
Times in seconds, memory in bytes, `ratio` in times the baseline's speed, any kind of sample counts as an image.
`settings` has "r", "batch" and "rounds"; results of speed.py also the fields of `cases.Setting`, "group", "tokens" and
"placement". Results with several settings (growth.py) have "points": [{"settings", "variants"}] in the place of
"variants", those of shares.py "cases": {name: {"settings", "seconds": {variant: {group: seconds}}}}.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
RATIOS = {
    "inductor": "speed of tome_fx over Inductor's",
    "oracle": "speed of tome_fx over the slice oracle's",
    "patch": "speed of tome_fx over the compiled patch's",
    "cold": "cold compile of tome_fx over Inductor's",
    "memory": "peak memory of tome_fx over Inductor's",
    "passes": "tome_fx passes over Inductor's cold compile",
    "limit": "speed of the slice oracle over Inductor's",
}
"""What `ratios` can find in a result."""


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
class Limit:
    """A claim to come: one of `RATIOS` is at least, or at most, `limit`, in settings that agree with what is given."""

    ratio: str
    limit: float
    at_least: bool = True
    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    train: bool | None = False

    def applies(self, setting: object) -> bool:
        """Whether the claim is about this `cases.Setting`."""
        named = ("device", "dtype", "batch", "train")
        return all(getattr(self, name) in (None, getattr(setting, name)) for name in named)


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


def parser(description: str, claims: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark takes; those of one that makes claims about variants too."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    if claims:
        options.add_argument("--only", nargs="+", metavar="VARIANT", help="leave the other variants out")
        options.add_argument("--check", action="store_true", help="exit with status 1 when a claim does not hold")
    return options


def require(device: str) -> None:
    """Leave with a sentence and status 2 where this process has no such device."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none here.", file=sys.stderr)
        raise SystemExit(2)


def alone(job: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a job finds in a process of its own; {"failed": why} where it finds nothing."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_sent, args=(there, job, *args))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": "the process died"}
    finally:
        child.join()


def _sent(pipe: Any, job: Callable[..., dict[str, Any]], *args: Any) -> None:
    try:
        pipe.send(job(*args))
    except Exception as error:  # noqa: BLE001 - the row says what went wrong
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


@contextlib.contextmanager
def asked(command: Sequence[str], paths: Sequence[str], what: str) -> Iterator[Callable[[object], list[str]]]:
    """A process that gets a line whenever it is asked, and answers with a line of words that begins with "found".

    paths: its PYTHONPATH. what: the process in words, for timing.ChildError where it ends instead.
    """
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def ask(line: object) -> list[str]:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        for said in process.stdout:
            if said.startswith("found "):
                return said.split()[1:]
        raise timing.ChildError(f"{what} ended when it was asked for {line}")

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def measure(
    variants: Mapping[str, Variant], rounds: int, device: str, console: Console
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Cold compiles one after another, each in its own process; then all variants interleaved in this one.

    Returns what was measured, and why the other variants were not: they failed in their own process, or the device's
    memory did not suffice.
    """
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tome_fx_bench_") as root, Progress(console=console) as bar:
        caches = {name: Path(root) / str(i) for i, name in enumerate(variants)}  # a compiler minds blanks and commas
        cold = _cold_compiles(variants, caches, device, bar, failed)
        steps, warm = _first_calls({name: variants[name] for name in cold}, caches, device, bar, failed)
        task = bar.add_task("rounds, interleaved", total=len(steps) * (rounds + 1))
        seconds = timing.interleaved(steps, rounds, progress=lambda *_: bar.advance(task), device=device)
    return {n: Measured(variants[n].label, seconds[n], warm[n], cold[n]) for n in steps}, failed


def _cold_compiles(
    variants: Mapping[str, Variant], caches: Mapping[str, Path], device: str, bar: Progress, failed: dict[str, str]
) -> dict[str, timing.ColdCompile | None]:
    """The cold compile of each compiled variant; its caches stay in the variant's directory. Fills `failed`."""
    task = bar.add_task("cold compiles", total=len(variants))
    cold: dict[str, timing.ColdCompile | None] = {}
    for name, variant in variants.items():
        bar.update(task, description=f"cold compile: {variant.label}")
        try:
            cold[name] = timing.cold_compile(variant.case, device, caches[name]) if variant.compiled else None
        except timing.ChildError as error:
            failed[name] = str(error)
            bar.console.print(f"[red]{variant.label} is left out:[/] {error}")
        bar.advance(task)
    return cold


def _first_calls(
    variants: Mapping[str, Variant], caches: Mapping[str, Path], device: str, bar: Progress, failed: dict[str, str]
) -> tuple[dict[str, timing.Step], dict[str, float]]:
    """Build every variant in this process and call it once, with the caches of its cold compile. Fills `failed`."""
    task = bar.add_task("first calls", total=len(variants))
    steps: dict[str, timing.Step] = {}
    warm: dict[str, float] = {}
    torch._dynamo.reset()
    # variants share a code object: without room for all of them Dynamo would run the last ones eagerly
    room = {"recompile_limit": 8 * len(variants), "fail_on_recompile_limit_hit": True}
    for name, variant in variants.items():
        bar.update(task, description=f"first call: {variant.label}")
        try:
            with _inductor_cache(caches[name]), torch._dynamo.config.patch(room):
                step = timing.load_object(variant.case.target)(**variant.case.kwargs)
                warm[name] = timing.seconds_of(step, device)
        except torch.OutOfMemoryError as error:
            failed[name] = str(error)
            bar.console.print(f"[red]{variant.label} is left out:[/] {error}")
        else:
            steps[name] = step
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


def machine(device: str, dtype: str, console: Console) -> dict[str, Any]:
    """`timing.machine_info`, to be taken before anything is measured; says so when the machine is busy."""
    info = timing.machine_info(device, getattr(torch, dtype))
    if (info["load"] or 0.0) > BUSY * info["cores"]:
        console.print(f"[yellow]The machine is busy (load {info['load']}): the compile times will be too long.")
    return info


def record(
    name: str,
    info: Mapping[str, Any],
    measured: Mapping[str, Measured],
    baseline: str,
    limits: Iterable[Limit],
    settings: Mapping[str, Any],
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON of a benchmark (see the module's docstring); `info` is what `machine` said at the start.

    Of `limits` those are judged for which the variants were measured.
    """
    variants = rows(measured, baseline, settings["batch"])
    found = ratios(variants)
    claims = [Claim(RATIOS[x.ratio], found[x.ratio], x.limit, x.at_least) for x in limits if x.ratio in found]
    return {
        "benchmark": name,
        "machine": info,
        "settings": dict(settings),
        "baseline": baseline,
        "variants": variants,
        "claims": [{**dataclasses.asdict(claim), "holds": claim.holds} for claim in claims],
        "left_out": dict(left_out or {}),
    }


def rows(measured: Mapping[str, Measured], baseline: str, batch: int) -> dict[str, Any]:
    """The "variants" of a result."""
    return {name: _row(m, measured[baseline].seconds, batch) for name, m in measured.items()}


def ratios(variants: Mapping[str, Any]) -> dict[str, float]:
    """Those of `RATIOS` that the "variants" of a result can decide."""
    pairs = {
        "inductor": ("tome_fx", "inductor"),
        "oracle": ("tome_fx", "oracle"),
        "patch": ("tome_fx", "patch_compiled"),
        "limit": ("oracle", "inductor"),
    }
    found = {
        name: timing.ratio(variants[mine]["seconds"], variants[other]["seconds"])
        for name, (mine, other) in pairs.items()
        if mine in variants and other in variants
    }
    mine, plain = (variants.get(name, {}).get("cold") for name in ("tome_fx", "inductor"))
    if mine and plain:
        found["cold"] = mine["seconds"] / plain["seconds"]
        found["memory"] = mine["peak_bytes"] / plain["peak_bytes"]
        found["passes"] = sum(mine["passes"].values()) / plain["seconds"]
    return found


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
    path = result_path(out, result["benchmark"], result["machine"]["device"])
    save(result, path, console)
    _plot(result, path.with_suffix(".png"))


def result_path(out: Path, benchmark: str, device: str) -> Path:
    """Where the JSON of a benchmark goes; the plot beside it has the suffix .png. `device`: a type or a GPU's name."""
    return out / f"{benchmark}-{'cpu' if device == 'cpu' else 'gpu'}.json"


def pending(args: argparse.Namespace, benchmark: str, console: Console) -> Path | None:
    """Where the JSON of a benchmark is to go; None, and a line, where it is there and not `args.fresh`.

    Leaves as `require` does where there is no such device.
    """
    require(args.device)
    path = result_path(args.out, benchmark, args.device)
    if path.exists() and not args.fresh:
        console.print(f"{path.name} is there; --fresh measures again")
        return None
    return path


def save(result: Mapping[str, Any], path: Path, console: Console) -> None:
    """Write the JSON, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
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
