"""A server whose batches change: how resident memory grows over 600 calls, of tome_fx and of plain Inductor.

`torch.compile(..., dynamic=True)`, each arm in a process of its own, both called in turn with the same random number
of samples. Growth is counted from the second call, after `malloc_trim`: at the end as the system sees it, and once more
after `malloc_trim` gave back what is free. Writes results/soak-cpu.json and a plot after each case, and goes on where
it stopped.

    python benchmarks/soak.py [CASE ...] [--calls 600] [--threads 1] [--fresh] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import harness
from tome_fx import timing

CASES: dict[str, tuple[str, int, int, str]] = {
    "vit_tiny_6, bfloat16": ("vit_tiny_patch16_224", 6, 12, "bfloat16"),
    "vit_tiny_6, float32": ("vit_tiny_patch16_224", 6, 12, "float32"),
    "vit_base, bfloat16": ("vit_base_patch16_224", 12, 24, "bfloat16"),
}
"""Name -> timm model, blocks, samples at most (2 at least), dtype."""
R = 16
MOST = 1.1
"""The growth that is asked for, over Inductor's."""
EVERY = 20
"""Calls between two points of the curve."""
ARMS = {"inductor": "Inductor", "tome_fx": "tome_fx"}
WORKER = """
import ctypes, gc, json, sys
import timm, torch
from tome_fx import timing, tome_backend
net, depth, dtype, arm, r, threads = json.loads(sys.argv[1])
torch.manual_seed(0)
if threads:
    torch.set_num_threads(threads)
model = timm.create_model(net, depth=depth).eval().to(getattr(torch, dtype))
run = torch.compile(model, backend=tome_backend(r=r) if arm == "tome_fx" else "inductor", dynamic=True)

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

for line in sys.stdin:
    if line.strip() == "trim":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        seconds = 0.0
    else:
        x = torch.randn(int(line), *model.default_cfg["input_size"], dtype=getattr(torch, dtype))
        with torch.no_grad():
            seconds = timing.seconds_of(lambda: run(x))
        del x
    print("found", seconds, resident(), flush=True)
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, claims=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--calls", type=int, default=600, help="calls of each arm (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: its own choice")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a result")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where more grows than asked")
    return parser.parse_args()


@contextmanager
def worker(setting: str) -> Iterator[Any]:
    """A process that is called with so many samples, or "trim", and says the seconds and the bytes it then holds."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-W", "ignore", "-c", WORKER, setting]
    with harness.asked(command, paths, f"the process of {setting}") as ask:

        def found(what: object) -> tuple[float, int]:
            seconds, held = ask(what)
            return float(seconds), int(held)

        yield found


def measured(name: str, calls: int, threads: int) -> dict[str, Any]:
    """Both arms of a case: seconds of each call, the curve of bytes, and the growth."""
    net, depth, most, dtype = CASES[name]
    draw = random.Random(0)
    samples = [draw.randint(2, most) for _ in range(calls)]
    arms: dict[str, dict[str, Any]] = {arm: {"seconds": [], "curve": []} for arm in ARMS}
    with ExitStack() as stack:
        ask = {arm: stack.enter_context(worker(json.dumps([net, depth, dtype, arm, R, threads]))) for arm in ARMS}
        for arm, held in arms.items():
            held["first"] = ask[arm](2)[0]
            ask[arm](3)
            held["start"] = ask[arm]("trim")[1]
        for at, count in enumerate(samples, 1):
            for arm, held in arms.items():
                seconds, now = ask[arm](count)
                held["seconds"].append(seconds)
                if at % EVERY == 0 or at == calls:
                    held["curve"].append([at, now - held["start"]])
        for arm, held in arms.items():
            held["trimmed"] = ask[arm]("trim")[1] - held["start"]
    return {"settings": {"calls": calls, "samples": [2, most], "r": R, "threads": threads}, "arms": arms, **over(arms)}


def over(arms: Mapping[str, Any]) -> dict[str, float]:
    """tome_fx over Inductor: growth as it is, after trimming, and speed."""
    mine, plain = arms["tome_fx"], arms["inductor"]
    return {
        "growth": round(mine["curve"][-1][1] / max(plain["curve"][-1][1], 1), 3),
        "trimmed": round(mine["trimmed"] / max(plain["trimmed"], 1), 3),
        "speed": round(timing.ratio(mine["seconds"], plain["seconds"]), 3),
    }


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """A case as a row of a table."""
    mib = {arm: (held["curve"][-1][1] / 2**20, held["trimmed"] / 2**20) for arm, held in row["arms"].items()}
    held = [f"{mib[arm][0]:+.0f} ({mib[arm][1]:+.0f})" for arm in ARMS]
    low, high = row["settings"]["samples"]
    return [name, f"{low} to {high}", str(row["settings"]["calls"]), *held,
            f"{row['growth']:.2f} ({row['trimmed']:.2f})", f"{row['speed']:.2f}"]  # fmt: skip


TITLES = ("case", "samples", "calls", *(f"{label}, MiB (trimmed)" for label in ARMS.values()), "over", "speed")


def plot(held: Mapping[str, Any], title: str, path: Path) -> None:
    """Growth against calls, a panel for each case."""
    from matplotlib.figure import Figure  # late: as in harness

    figure = Figure(figsize=(4 * len(held), 3.6), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(1, len(held), squeeze=False)[0], held.items(), strict=True):
        for arm, label in ARMS.items():
            axes.plot(*zip(*((at, grown / 2**20) for at, grown in row["arms"][arm]["curve"]), strict=True), label=label)
        axes.set(title=name, xlabel="calls", ylabel="MiB above the start")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure what has no result yet, and write the curves."""
    args, console = arguments(), Console()
    harness.require(args.device)
    path = harness.result_path(args.out, "soak", args.device)
    held = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in args.cases or CASES:
        if name not in held or args.fresh:
            info = harness.machine(args.device, "float32", console)
            held[name] = measured(name, args.calls, args.threads)
            held = {case: held[case] for case in CASES if case in held}
            harness.save({"benchmark": "soak", "machine": info, "asked": MOST, "cases": held}, path, console)
            title = f"changing batches, r={R}, {info['device']}, torch {info['torch']}"
            plot(held, title, path.with_suffix(".png"))
    table = Table(*TITLES, title="growth of resident memory")
    for name, row in held.items():
        table.add_row(*cells(name, row))
    console.print(table)
    return int(args.check and any(row["growth"] > MOST for row in held.values()))


if __name__ == "__main__":
    sys.exit(main())
