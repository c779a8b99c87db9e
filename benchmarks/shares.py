"""Where the time of a compiled model goes, by torch.profiler: matching, merging, attention, matrix products, the rest.

Profiles tome_fx and the slice oracle of each case: what the oracle's bar lacks is the price of merging. Writes
results/shares-cpu.json (or -gpu) and a plot.

    python benchmarks/shares.py [CASE[:BATCH] ...] [--device cpu|cuda] [--dtype float32|bfloat16] [--fresh]
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import cases
import harness
from tome_fx import timing

OPS = {
    "matching": re.compile(r"tome(_cpu)?::match|aten::(topk|sort|argsort)"),
    "merging": re.compile(r"tome(_cpu)?::|aten::(gather|scatter|index)"),
    "attention": re.compile(r"_scaled_dot_product|_flash_attention|_efficient_attention"),
    "matrix products": re.compile(r"aten::(addmm|mm|bmm|baddbmm|linear|matmul|.*convolution)|mkldnn::|mkl::|onednn::"),
}
"""Group -> operators on a CPU. An operator belongs to the first group that matches, with all that it calls."""
KERNELS = {
    "attention": re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE),
    "matching": re.compile(r"topk|sort|radix|bitonic", re.IGNORECASE),
    "matrix products": re.compile(r"gemm|gemv|cutlass|xmma|nvjet|conv|triton.*_mm", re.IGNORECASE),
    "merging": re.compile(r"gather|scatter|index", re.IGNORECASE),
}
"""Group -> kernels on CUDA, where matching is plain ATen: its similarities are counted with the matrix products."""
REST = "everything else"
GROUPS = (*OPS, REST)
COLORS = ("#c9733b", "#e0b03f", "#2a6f97", "#8fb8cc", "#bbbbbb")
DEFAULT = (
    "vit_small_512:2", "vit_base_r16:8", "vit_large_512:1", "video_large:1",
    "audio_base_512:8", "ast_base_1212:1", "sam_base_4096:1", "dit_base_1024:1", "dit_base_4096:1",
)  # fmt: skip
VARIANTS = ("tome_fx", "oracle")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, claims=False)
    parser.add_argument("cases", nargs="*", default=DEFAULT, metavar="CASE[:BATCH]", help="default: one of each kind")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5, help="profiled rounds (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="even where there is a result")
    return parser.parse_args()


def group_of(name: str, table: Mapping[str, re.Pattern[str]]) -> str | None:
    """The first group of `OPS` or `KERNELS` that an operator or kernel belongs to."""
    return next((group for group, pattern in table.items() if pattern.search(name)), None)


def grouped(events: Iterable[Any], cuda: bool) -> dict[str, float]:
    """Seconds of each group: of outermost operators on a CPU, of kernels on CUDA."""
    found = dict.fromkeys(OPS, 0.0)
    for event in events:
        if cuda and event.device_type == DeviceType.CUDA:
            group, microseconds = group_of(event.name, KERNELS), event.device_time_total
        elif not cuda and not any(group_of(parent.name, OPS) for parent in parents(event)):
            group, microseconds = group_of(event.name, OPS), event.cpu_time_total
        else:
            continue
        if group is not None:
            found[group] += microseconds / 1e6
    return found


def parents(event: Any) -> Iterable[Any]:
    """The events that an event is part of, innermost first."""
    while (event := event.cpu_parent) is not None:
        yield event


def profiled(step: timing.Step, device: str) -> dict[str, float]:
    """Seconds of each of `GROUPS` in one call; their sum is its wall-clock time."""
    cuda = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as prof:
        wall = timing.seconds_of(step, device)
    found = grouped(prof.events(), cuda)
    return {**found, REST: max(wall - sum(found.values()), 0.0)}


def shares(steps: Mapping[str, timing.Step], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each of `GROUPS` in a call of each step: medians over interleaved rounds, after two calls each."""
    for step in (*steps.values(), *steps.values()):
        step()
    seen = [{name: profiled(step, device) for name, step in steps.items()} for _ in range(rounds)]
    return {name: {group: statistics.median(each[name][group] for each in seen) for group in GROUPS} for name in steps}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Profile the variants of CASE[:BATCH]: its "settings" and, for each variant, seconds of each group."""
    case, _, batch = name.partition(":")
    setting = cases.Setting(case, int(batch or 1), torch.device(args.device).type, args.dtype)
    torch._dynamo.reset()
    steps = {variant: timing.load_object(job.target)(**job.kwargs) for variant, job in jobs(setting).items()}
    return {"settings": dataclasses.asdict(setting), "seconds": shares(steps, args.device, args.rounds)}


def jobs(setting: cases.Setting) -> dict[str, timing.Case]:
    """How to build each of `VARIANTS`."""
    return {variant: cases.job(setting, variant) for variant in VARIANTS}


def table(found: Mapping[str, Any]) -> Table:
    """Shares for a terminal."""
    shown = Table(title="share of time, %")
    for column in ("case", "", "ms", *GROUPS):
        shown.add_column(column, justify="left" if column in ("case", "") else "right")
    for name, case in found.items():
        for variant, seconds in case["seconds"].items():
            whole = sum(seconds.values())
            parts = (f"{100 * seconds[group] / whole:.1f}" for group in GROUPS)
            shown.add_row(name, cases.label(variant), f"{whole * 1e3:.0f}", *parts)
    return shown


def plot(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Stacked bars, in parts of the oracle's time."""
    from matplotlib.figure import Figure  # late: as in harness

    bars = [(name, variant) for name, case in found.items() for variant in case["seconds"]][::-1]
    labels = [f"{name}, {cases.label(variant)}" for name, variant in bars]
    whole = [sum(found[name]["seconds"]["oracle"].values()) for name, _ in bars]
    left = [0.0] * len(bars)
    figure = Figure(figsize=(10, 0.35 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    for group, color in zip(GROUPS, COLORS, strict=True):
        widths = [found[n]["seconds"][v][group] / of for (n, v), of in zip(bars, whole, strict=True)]
        axes.barh(labels, widths, left=left, color=color, label=group)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time, in times the slice oracle's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(GROUPS), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Profile every case and write the shares."""
    args, console = arguments(), Console()
    path = harness.pending(args, "shares", console)
    if path is None:
        return 0
    info = harness.machine(args.device, args.dtype, console)
    found = {name: measure(name, args) for name in track(args.cases, "profiling", console=console)}
    harness.save({"benchmark": "shares", "machine": info, "cases": found}, path, console)
    console.print(table(found))
    plot(found, f"{info['device']}, {args.dtype}, torch {info['torch']}", path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
