"""Random small transformers: no crash, no changed shape, r=0 the identity, through any schedule and placement.

Models are drawn by hypothesis from tests/strategies.py: spellings of attention, layouts, masks, norms, readouts,
branches, dead code, reused modules. `--seed` draws others. Writes benchmarks/results/fuzz.json: for each seed how many
ran, and every failure; a seed that is there already is replaced.

    python benchmarks/fuzz.py --graphs 2000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
PLACEMENTS = ("auto", "stream", "branch")


def check(spec: Any, r: int, placement: str) -> dict[str, Any]:
    """One model: {"merged": sites, "problem": "" or what is wrong}."""
    from tests import models, palette

    model, given_args = models.build(spec)

    def args() -> tuple[Any, ...]:  # some models write to their input
        return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in given_args)

    with torch.no_grad():
        want = model(*args())
    got, report = palette.run(model, args(), None, r, placement=placement)
    problem = "" if report.merged_sites or report.skipped else "silent: nothing merged and no reason"
    if any(s.kind == "internal error" for s in report.skipped):
        problem = str(report.skipped[0])
    for a, b in zip(palette.leaves(got), palette.leaves(want), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype) or bool(b.isfinite().all() and not a.isfinite().all()):
            problem = f"{a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}, or not finite"
    zero, _ = palette.run(model, args(), None, 0, placement=placement)
    with torch.no_grad():
        plain = torch.compile(model, backend="eager")(*args())
    pairs = list(zip(palette.leaves(zero), palette.leaves(plain), strict=True))
    same = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)  # NaN: torch's own, there too
    return {"merged": report.merged_sites, "problem": problem if same else f"r=0 is not the identity; {problem}"}


def main() -> int:
    """Run, store, and 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=2000, help="models to draw (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    from tests import strategies
    from tome_fx import timing

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * args.minutes
    with Progress(console=Console()) as bar:
        task = bar.add_task("graphs", total=args.graphs)

        @seed(args.seed)
        @settings(max_examples=args.graphs, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(strategies.specs(), st.integers(1, 12), st.sampled_from(PLACEMENTS))
        def draw(spec: Any, r: int, placement: str) -> None:
            if time.monotonic() > end:
                return
            try:
                row = check(spec, r, placement)
            except Exception as error:  # noqa: BLE001 - a crash is what is looked for
                row = {"merged": 0, "problem": f"{type(error).__name__}: {str(error)[:300]}"}
            rows.append({"spec": str(spec), "r": r, "placement": placement, **row})
            bar.advance(task)

        draw()
    failures = [row for row in rows if row["problem"]]
    merged = sum(row["merged"] > 0 for row in rows)
    machine = timing.machine_info("cpu")
    run = {"machine": machine, "graphs": len(rows), "merged": merged, "seed": args.seed, "failures": failures}
    held = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    runs = [*(other for other in held if other["seed"] != args.seed), run]
    args.out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    print(f"{len(rows)} graphs, {merged} of them merged, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
