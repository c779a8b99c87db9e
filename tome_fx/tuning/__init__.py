"""tune: a schedule found for a model, its data and a target, without training.

`search.py` finds it, by `costs.py` (what a schedule costs on this device), `surrogate.py` (what it would lose) and
`judge.py` (what it loses). Nothing is compiled by Inductor until what was found is timed against the unmerged model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tome_fx.config import config_from
from tome_fx.explain import Source, check_call

from .final import Final
from .judge import Batch, Judge, Metric, MetricError, batches_of, parted
from .result import Tried, Tuned, TunedBlock, TuneFileError
from .search import SEARCHED, Point, Search, Task, runner
from .targets import KINDS, Flops, Loss, Speed, Target, parse

HELD_OUT = 0.5
"""Share of the batches that is reported on."""


def tune(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    target: Target | str,
    metric: Metric | None = None,
    search: Sequence[str] = ("schedule",),
    budget: float = 300.0,
    seed: int = 0,
    resume: str | Path | None = None,
    console: Console | None = None,
    **config: Any,
) -> Tuned:
    """Find how many tokens each block of a model may merge away: `torch.compile(model, backend=found.backend())`.

    Args:
        model: in eval mode; traced whole by torch.export for the shapes of the first batch.
        batches: what the model will see, two batches or more of one shape, half of them held out for the report. Each
            is a tensor, a tuple of arguments or a dict of keyword arguments; with a metric a pair (inputs, targets).
        target: `Loss(0.5)`, `Speed(1.5)`, `Flops(0.6)`, or as text "loss=0.5".
        metric: f(outputs, targets), higher is better: a number, one for each sample [B], or [B, 2], (part, whole) of
            each, for shares of a sum such as words. `Loss` is then in points, 100 times what it falls by. Without one a
            loss is the mean distance, 1 - cosine, of outputs to the unmerged model's.
        search: "schedule" and what else may change: "method", "metric" (what tokens are compared by), "similarity",
            "prop_attn". Without "schedule" only constant r, (r, -1) and (r, 1) are tried.
        budget: seconds for the search; the report (held-out batches, three compilations, timing) comes after it.
        seed: of which batches are held out, and of what is proposed.
        resume: a file that keeps what was evaluated; an unfinished search goes on from it.
        console: where the progress bar goes; by default stderr, where that is a terminal.
        config: options of `tome_backend` that hold throughout; `inner` compiles what is timed in the end.

    Ctrl-C ends the search, a second one the report; what was found so far is returned.

    Raises ValueError for a target, option or batches that do not fit, a model in training mode or one in which nothing
    merges; MetricError (a ValueError) where the metric raises; and what torch.export raises where it cannot trace.
    """
    started = time.perf_counter()
    wanted = parse(target) if isinstance(target, str) else target
    _check(model, wanted, search, config, budget)
    inner, base = config.get("inner", "inductor"), {name: v for name, v in config.items() if name != "inner"}
    held, notes = batches_of(model, batches, metric is not None)
    tuned_on, held_out = parted(held, HELD_OUT, seed)
    source = _source(model, tuned_on[0])
    with _bar(console) as told:
        told("the unmerged model")
        judge = Judge(runner(model), tuned_on, metric)
        told("what a schedule costs")
        seconds = max(budget - (time.perf_counter() - started), 0.0)
        task = Task(source=source, judge=judge, target=wanted, base=base, searched=tuple(search), seconds=seconds,
                    seed=seed, told=told)  # fmt: skip
        kept = _Kept(resume, _fingerprint(model, tuned_on[0], metric, seed))
        found = Search(task, kept.points())

        def keep(line: str) -> None:
            told(line)
            kept.write({**found.known, **found.points})

        task.told = keep
        found.run()
        told("judging the finalists")
        final = Final(model=model, search=found, held_out=held_out, metric=metric, inner=inner, told=told)
        return final.report(notes, time.perf_counter() - started)


def _check(model: Any, target: Any, search: Any, config: Mapping[str, Any], budget: Any) -> None:
    check_call(model, ())
    if not isinstance(model, torch.nn.Module):
        raise TypeError("tune takes an nn.Module, got a function: torch.export traces modules")
    if model.training:
        raise ValueError("the model is in training mode, where its outputs are random: call model.eval() first")
    if not isinstance(target, tuple(KINDS.values())):
        raise ValueError(f"target must be Loss, Speed or Flops, or text as loss=0.5, got {target!r}")
    if isinstance(search, str) or not search or any(name not in SEARCHED for name in search):
        raise ValueError(f"search must be a tuple of names out of {', '.join(SEARCHED)}, got {search!r}")
    if not isinstance(budget, (int, float)) or budget <= 0:
        raise ValueError(f"budget must be a number of seconds above 0, got {budget!r}")
    if given := [name for name in ("r", "flops") if config.get(name) is not None]:
        raise ValueError(f"{given[0]} is what tune looks for: leave it out")
    config_from({**config, "r": 1})


def _source(model: torch.nn.Module, batch: Batch) -> Source:
    with torch.no_grad():
        return Source(model, batch.args, batch.kwargs)


@contextmanager
def _bar(console: Console | None) -> Iterator[Any]:
    """A line that says what is going on."""
    console = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tune", total=None)
        yield lambda line: progress.update(task, description=line)


# -- what is kept between searches -------------------------------------------------------------------------------------


def _fingerprint(model: torch.nn.Module, batch: Batch, metric: Any, seed: int) -> str:
    """Of the model, the data and how they are parted: points of another search are no use."""
    digest = hashlib.sha256(f"{type(model).__name__} {seed} {getattr(metric, '__name__', metric is not None)}".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.numel():
            digest.update(str(value.detach().reshape(-1)[:: max(value.numel() // 8, 1)].double().tolist()).encode())
    for x in batch.tensors:
        digest.update(x.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


class _Kept:
    """The file of an unfinished search."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = None if path is None else Path(path), fingerprint

    def points(self) -> dict[str, Point]:
        """What is in the file, by key. Raises TuneFileError for a file of something else."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            held = json.loads(self.path.read_text())
            same, points = held["fingerprint"] == self.fingerprint, held["points"]
            found = {key: Point(**{**point, "r": tuple(point["r"])}) for key, point in points.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TuneFileError(f"{self.path} keeps no search of tune: give resume another path") from error
        if not same:
            raise TuneFileError(f"{self.path} keeps a search of another model, data, metric or seed: give another")
        return found

    def write(self, points: Mapping[str, Point]) -> None:
        if self.path is not None:
            scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            held = {"fingerprint": self.fingerprint, "points": {key: asdict(point) for key, point in points.items()}}
            scratch.write_text(json.dumps(held))
            os.replace(scratch, self.path)


__all__ = [
    "SEARCHED", "Flops", "Loss", "MetricError", "Speed", "Target", "Tried", "TuneFileError", "Tuned", "TunedBlock",
    "parse", "tune",
]  # fmt: skip
