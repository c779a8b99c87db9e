"""This build beside another one, a checkout of another commit: speed of a case in both, interleaved.

    python benchmarks/against.py --other PATH sam_base_4096 [dit_base_4096 ...] [--dtype bfloat16] [--rounds 5]
    python benchmarks/against.py --commit COMMIT --all      # what `make bench-all AGAINST=COMMIT` runs

A commit is checked out into the cache folder and gets an environment of its own there. Each build runs in a process of
its own, which calls when it is asked to, so that no two are busy at once. Beside the medians over rounds stand ratios
of the least times, which say more where others use the machine, and of the time that the processor spent. Writes
results/against-CASE-DTYPE-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

import cases
import harness
from tome_fx import assets, timing

HERE = Path(__file__).parent
Times = tuple[float, float]
"""Seconds of a call, and those that the processor spent on it."""
ROWS = {"inductor": "this", "tome_fx": "this", "oracle": "this", "other": "other"}
"""Variant -> the build that runs it; "other" is tome_fx of the other build."""
WORKER = """
import json, sys, time
import cases
from tome_fx import timing
setting = json.loads(sys.argv[1])
held = {}
for line in sys.stdin:
    name = line.strip()
    if name not in held:
        held[name] = cases.build(name, **setting)
        held[name]()
    spent = time.process_time()
    seconds = timing.seconds_of(held[name], setting["device"])
    print("found", seconds, time.process_time() - spent, flush=True)
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, claims=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="as speed.py --list prints")
    parser.add_argument("--all", action="store_true", help="every case that the other build has; not what is there")
    build = parser.add_mutually_exclusive_group(required=True)
    build.add_argument("--other", type=Path, help="the other checkout, run by this interpreter")
    build.add_argument("--commit", help="checked out beside, with an environment of its own")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--depth", type=int, help="blocks; default: the case's")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.cases) - cases.CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(cases.CASES)}")
    if args.all == bool(args.cases):
        parser.error("name cases, or give --all")
    return args


def checked_out(commit: str, console: Console) -> tuple[Path, str]:
    """A checkout of a commit in the cache folder, and the interpreter of its own environment.

    Raises CalledProcessError where there is no such commit, or it cannot be installed.
    """
    git = ["git", "-C", str(HERE.parent)]
    done = subprocess.run([*git, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, check=True)
    folder = assets.cache_dir() / f"build-{done.stdout.decode().strip()[:12]}"
    if not folder.exists():
        subprocess.run([*git, "worktree", "prune"], check=True)
        subprocess.run([*git, "worktree", "add", "--detach", str(folder), commit], check=True)
    with console.status(f"installing {commit} in {folder}"):
        subprocess.run(["make", "-C", str(folder), ".venv/.stamp-bench"], check=True, stdout=subprocess.DEVNULL)
    return folder, str(folder / ".venv" / "bin" / "python")


def known(root: Path, python: str) -> list[str]:
    """The cases of a build."""
    path = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "benchmarks")])}
    done = subprocess.run([python, "-c", "import cases; print(*cases.CASES)"], env=os.environ | path,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.split()


@contextmanager
def worker(root: Path, setting: str, python: str = sys.executable) -> Iterator[Any]:
    """A process of a build that runs a variant whenever it gets its name, and says how many seconds it took."""
    paths = [str(root), str(root / "benchmarks")]
    with harness.asked([python, "-c", WORKER, setting], paths, f"the build in {root}") as ask:
        yield lambda name: tuple(map(float, ask(name)))


def times(case: str, args: argparse.Namespace, other_build: tuple[Path, str]) -> dict[str, list[Times]]:
    """Seconds of each row, a call a round. other_build: its checkout and its interpreter."""
    options = {"depth": args.depth} if args.depth else {}
    setting = json.dumps({"case": case, "batch": 1, "device": args.device, "dtype": args.dtype, "options": options})
    with worker(HERE.parent, setting) as this, worker(other_build[0], setting, other_build[1]) as other:
        calls = {name: (this, name) if of == "this" else (other, "tome_fx") for name, of in ROWS.items()}
        for run, name in calls.values():
            run(name)  # compiles
        return rounds(calls, args.rounds)


def rounds(calls: Mapping[str, tuple[Callable[[str], Times], str]], count: int) -> dict[str, list[Times]]:
    """Seconds of each row in each round."""
    found: dict[str, list[Times]] = {row: [] for row in calls}
    for _ in range(count):
        for row, (run, name) in calls.items():
            found[row].append(run(name))
    return found


def main() -> int:
    """Measure every case and write what it gave."""
    args, console = arguments(), Console()
    harness.require(args.device)
    build = (args.other, sys.executable) if args.other else checked_out(args.commit, console)
    commit = subprocess.run(["git", "-C", build[0], "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    for case in [name for name in known(*build) if name in cases.CASES] if args.all else args.cases:
        path = harness.result_path(args.out, f"against-{case}-{args.dtype}", args.device)
        if args.all and path.exists() and json.loads(path.read_text())["other"] == commit.stdout.strip():
            continue
        info = harness.machine(args.device, args.dtype, console)
        held = times(case, args, build)
        wall, spent = ({row: [each[i] for each in of] for row, of in held.items()} for i in (0, 1))
        rivals = [name for name in ROWS if name != "tome_fx"]
        ratios = {f"over {name}": {
            "median": round(timing.ratio(wall["tome_fx"], wall[name]), 3),
            "least": round(min(wall[name]) / min(wall["tome_fx"]), 3),
            "processor": round(min(spent[name]) / min(spent["tome_fx"]), 3),
        } for name in rivals}  # fmt: skip
        result = {"benchmark": "against", "machine": info, "case": case, "other": commit.stdout.strip(),
                  "depth": args.depth, "ratios": ratios, "seconds": wall, "processor": spent}  # fmt: skip
        path.write_text(json.dumps(result, indent=2) + "\n")
        console.print(case, args.dtype, ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
