"""Random small transformers, judged by laws: no crash, no silence, r=0 the identity (a fifth), equal tokens lose
nothing.

Half are drawn from `tests.models` (one ViT in every spelling of attention, layout, norm, read-out), half from
`tests.mixtures` (masks of pairs, padded and empty samples, special tokens put in, frames, zero-padded windows, shared
and relative keys, inputs in any order, two calls in one graph). Of the latter also: no sample moves with its batch,
no output with tokens that a mask keeps from it, no special token shares a group.

Graph i of a seed is always the same. A run goes on where it stopped; what failed before is kept. Writes
benchmarks/results/fuzz.json: for each seed how many ran, merged, were void (unequal tokens had to merge, so that the
lossless law says nothing), and every failure with what replays it.

    python benchmarks/fuzz.py --count 10000 --jobs 2
    python benchmarks/fuzz.py --replay 0:217
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CHUNK = 25
"""Graphs that one task runs, and after which results are stored."""
PER_PROCESS = 12
"""Tasks after which a process is replaced: compiled code is never freed."""
EMPTY: dict[str, Any] = {"graphs": 0, "merged": 0, "void": 0, "failures": [], "done": []}


def check_spec(rng: random.Random) -> tuple[str, Any]:
    """A model of tests.models: (what it is, a call that judges it)."""
    from tests import strategies
    from tests.laws import PLACEMENTS

    spec = strategies.random_spec(rng)
    config = {"r": rng.randint(1, 12), "placement": rng.choice(PLACEMENTS)}
    return f"{spec!r}, {config}", lambda: judge_spec(spec, config)


def judge_spec(spec: Any, config: dict[str, Any]) -> tuple[bool, bool, list[str]]:
    """(merged, void, problems). Of every second the positions are taken out, so that the lossless law speaks."""
    import torch

    import tome_fx
    from tests import laws, models, palette

    model, given = models.build(spec)
    equal = spec.seed % 2 == 1
    if equal:
        palette.equalize(model)

    def called(name: str, args: tuple[Any, ...]) -> list[Any]:  # some models write to their input
        return palette.leaves(made(name, *(a.clone() if isinstance(a, torch.Tensor) else a for a in args)))

    configs = {"merged": config, **({"zero": {"r": 0}} if spec.seed % 5 == 0 else {})}
    made = laws.Traced(model, configs)
    got, plain = called("merged", given), called("", given)
    report, problems = made.reports["merged"], []
    if not report.merged_sites and not report.skipped:
        problems.append("silent: nothing merged and no reason")
    problems += [str(s) for s in report.skipped if s.kind == "internal error"]
    for a, b in zip(got, plain, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype) or bool(b.isfinite().all() and not a.isfinite().all()):
            problems.append(f"{a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}, or not finite")
    if "zero" in configs:  # NaN: torch's own, there too
        pairs = zip(called("zero", given), plain, strict=True)
        if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
            problems.append("r=0 is not the identity")
    if not equal or problems:
        return report.merged_sites > 0, False, problems
    tokens = palette.palette_input(spec, k=3, seed=spec.seed)
    want, got = called("", tokens), called("merged", tokens)
    if not all(bool(b.isfinite().all()) for b in want):
        return report.merged_sites > 0, True, problems
    lowest, error = made.lowest, palette.distance(got, want)
    void = error > laws.LAW and lowest < 1 - 1e-4
    if error > laws.LAW and not void and not palette.is_rounding(error, want, model, tokens, None, **config):
        # A table that joins between merges tells equal tokens apart: then the tied law speaks, and names it.
        torch._dynamo.reset()
        found = tome_fx.check(model, tokens, **config)
        void = bool(found.approximations) and found.holds
    if error > laws.LAW and not void:
        problems.append(f"law: equal tokens (cosine {lowest:.6f}) moved the output by {error:.0e}")
    return report.merged_sites > 0, void, problems


def check_mixture(rng: random.Random) -> tuple[str, Any]:
    """A model of tests.mixtures."""
    from tests import mixtures

    mix = mixtures.draw(rng)

    def judge() -> tuple[bool, bool, list[str]]:
        judged = mixtures.Judge(mix).judge()
        return judged.merged > 0, judged.void, judged.problems

    return repr(mix), judge


def check(seed: int, index: int) -> dict[str, Any]:
    """One graph: {"index", "model", "merged", "void", "problem": "" or what is wrong}."""
    rng = random.Random(f"{seed}:{index}")
    model, judge = (check_spec, check_mixture)[index % 2](rng)
    try:
        merged, void, problems = judge()
    except Exception as error:  # noqa: BLE001 - a crash is what is looked for
        merged, void, problems = False, False, [f"{type(error).__name__}: {str(error)[:300]}"]
        if "--replay" in sys.argv:
            traceback.print_exc()
    return {"index": index, "model": model, "merged": merged, "void": void, "problem": "; ".join(problems)}


def quiet() -> None:
    """For a process that runs checks."""
    import torch

    sys.path[:0] = [str(ROOT)]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def run_chunk(task: tuple[int, int]) -> tuple[int, list[dict[str, Any]]]:
    seed, chunk = task
    return chunk, [check(seed, i) for i in range(chunk * CHUNK, (chunk + 1) * CHUNK)]


def add(run: dict[str, Any], chunk: int, rows: list[dict[str, Any]]) -> None:
    """A chunk's rows to the record of its seed."""
    run["graphs"] += len(rows)
    run["merged"] += sum(row["merged"] for row in rows)
    run["void"] += sum(row["void"] for row in rows)
    for row in rows:
        if row["problem"]:
            replay = f"python benchmarks/fuzz.py --replay {run['seed']}:{row['index']}"
            run["failures"].append({"replay": replay, "model": row["model"], "problem": row["problem"]})
            print(f"{replay}\n    {row['model']}\n    {row['problem']}", flush=True)
    run["done"].append(chunk)


def store(out: Path, run: dict[str, Any]) -> None:
    held = json.loads(out.read_text())["runs"] if out.exists() else []
    runs = [*(other for other in held if other["seed"] != run["seed"]), run]
    out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def resumed(out: Path, seed: int, machine: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The record of a seed to go on with, or an empty one: after a run of another version, or on request."""
    held = json.loads(out.read_text())["runs"] if out.exists() else []
    for run in held:
        if run["seed"] == seed and "done" in run and not fresh and run["machine"]["torch"] == machine["torch"]:
            return {**run, "machine": machine}
    return {"machine": machine, "seed": seed, "seconds": 0.0, **json.loads(json.dumps(EMPTY))}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help=f"graphs, in {CHUNK}s (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that many")
    parser.add_argument("--fresh", action="store_true", help="forget what this seed has run")
    parser.add_argument("--replay", metavar="SEED:INDEX", help="one graph alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.count = -(-args.count // CHUNK) * CHUNK
    return args


def main() -> int:
    """Run, store, and 1 when something failed."""
    args = parsed()
    quiet()
    if args.replay:
        row = check(*map(int, args.replay.split(":")))
        print(json.dumps(row, indent=1))
        return int(bool(row["problem"]))
    from rich.console import Console
    from rich.progress import Progress

    from tome_fx import timing

    run = resumed(args.out, args.seed, timing.machine_info("cpu"), args.fresh)
    left = [(args.seed, c) for c in range(args.count // CHUNK) if c not in run["done"]]
    start, before = time.monotonic(), run["seconds"]
    context = multiprocessing.get_context("spawn")
    pool = context.Pool(args.jobs, initializer=quiet, maxtasksperchild=PER_PROCESS)
    with pool, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("graphs", total=len(left) * CHUNK)
        for chunk, rows in pool.imap_unordered(run_chunk, left):
            add(run, chunk, rows)
            run["seconds"] = round(before + time.monotonic() - start, 1)
            store(args.out, run)
            bar.advance(task, len(rows))
            if time.monotonic() - start > 60 * args.minutes:
                break
    merged, void, failures = run["merged"], run["void"], len(run["failures"])
    print(f"{run['graphs']} graphs, {merged} of them merged, {void} void, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
