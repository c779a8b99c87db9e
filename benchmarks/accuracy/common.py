"""What the accuracy benchmarks share: one schema of results, confidence intervals, throughput ratios.

JSON, one file for each claim, `benchmarks/results/accuracy/NAME.json`:
{"title", "measure": what the values are ("top-1 accuracy", "word error rate", ...), "unit": "%" or "",
 "better": "higher" or "lower", "data": one honest sentence (which data, how many, what is artificial),
 "machine": `timing.machine_info`, "settings": {...}, "baseline": {"value", "low", "high", "n"} of the unmerged model,
 "curves": [{"label", "points": [{"r", "tokens": tokens after the last merge or null, "value", "low", "high", "n",
                                  "speed": throughput over plain Inductor's or null, "macs": ratio or null}]}],
 "found": [{"text": what was asked, "value": text of the answer, "holds": true, false or null}],
 "notes": [sentence], "pictures", where there are any: {caption: path from the result's folder}}
`low` and `high` bound 95 % confidence intervals. `report.py` makes docs/accuracy.md and the plots of these files alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tome_fx import assets, timing

RESULTS = Path(__file__).parent.parent / "results" / "accuracy"
PHOTOS = assets.PinnedWheel(
    project="mvtb-data",
    version="1.6.1",
    filename="mvtb_data-1.6.1-py3-none-any.whl",
    sha256="0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf",
)
"""121 photos, MIT."""
Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def binomial(right: int, n: int) -> dict[str, float | int]:
    """Share of `right` among `n` in percent with its Wilson 95 % interval: {"value", "low", "high", "n"}."""
    share, spread = right / n, Z * Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z * float(np.sqrt(share * (1 - share) / n + spread / (4 * n))) / (1 + spread)
    return {"value": 100 * share, "low": 100 * (centre - half), "high": 100 * (centre + half), "n": n}


def bootstrap(
    samples: Sequence[Any], statistic: Callable[[np.ndarray], float], draws: int = 2000, seed: int = 0
) -> dict[str, float | int]:
    """`statistic` of all samples (rows of an array) with the percentile bootstrap's 95 % interval."""
    rows = np.asarray(samples)
    picks = np.random.default_rng(seed).integers(0, len(rows), (draws, len(rows)))
    low, high = np.percentile([statistic(rows[pick]) for pick in picks], (2.5, 97.5))
    return {"value": statistic(rows), "low": float(low), "high": float(high), "n": len(rows)}


def speeds(steps: Mapping[str, timing.Step], baseline: str, rounds: int = 5) -> dict[str, float]:
    """Throughput of each step over that of `baseline`, from interleaved rounds after a warm-up call each."""
    times = timing.interleaved(steps, rounds)
    return {name: timing.ratio(times[name], times[baseline]) for name in steps}


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script here takes."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--small", action="store_true", help="little data and no training to speak of: does it run?")
    options.add_argument("--fresh", action="store_true", help="even where there is a result")
    options.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    return options


def pending(args: argparse.Namespace, name: str, console: Console) -> bool:
    """Whether NAME.json is to be made; else a line says that it is there."""
    path = args.out / f"{name}.json"
    if path.exists() and not args.fresh:
        console.print(f"{path.name} is there; --fresh measures again")
        return False
    return True


def room_for(graphs: int) -> Any:
    """A context in which one function may be compiled that often: past its limit Dynamo would run the rest eagerly."""
    return torch._dynamo.config.patch(recompile_limit=8 * graphs, fail_on_recompile_limit_hit=True)


def save(name: str, result: Mapping[str, Any], console: Console, out: Path = RESULTS) -> Path:
    """Write `NAME.json`, its folder too."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {path}")
    return path
