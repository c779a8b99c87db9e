"""What the accuracy benchmarks share: one schema of results, confidence intervals, throughput ratios.

JSON, one file for each claim, `benchmarks/results/accuracy/NAME.json`:
{"title", "measure": what the values are ("top-1 accuracy", "word error rate", ...), "unit": "%" or "",
 "better": "higher" or "lower", "data": one honest sentence (which data, how many, what is artificial),
 "machine": `timing.machine_info`, "settings": {...}, "baseline": {"value", "low", "high", "n"} of the unmerged model,
 "curves": [{"label", "points": [{"r", "tokens": tokens after the last merge or null, "value", "low", "high", "n",
                                  "speed": throughput over plain Inductor's or null, "macs": ratio or null}]}],
 "found": [{"text": what was asked, "value": text of the answer, "holds": true, false or null}],
 "notes": [sentence]}
`low` and `high` bound 95 % confidence intervals. `report.py` makes docs/accuracy.md and the plots of these files alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tome_fx import timing

RESULTS = Path(__file__).parent.parent / "results" / "accuracy"
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


def save(name: str, result: Mapping[str, Any], console: Console, out: Path = RESULTS) -> Path:
    """Write `NAME.json`, its folder too."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {path}")
    return path
