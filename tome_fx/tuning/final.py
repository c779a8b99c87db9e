"""The end of a search: what was found is compiled, timed against the unmerged model, and judged on data held out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tome_fx import timing
from tome_fx.backend import tome_backend

from .costs import walk
from .judge import Batch, Judge, Metric
from .result import Tried, Tuned, TunedBlock
from .search import Point, Search, runner
from .targets import Loss, Speed, spelled

ROUNDS, MOST_ROUNDS, SECONDS = 9, 300, 3.0
"""Timed rounds of the compiled models: so many at least, and as many as take some seconds."""
BUSY = 1.5
"""Load for each core from which on times are said to be rough; a search alone makes 1."""
SHORT = 0.98
"""Share of a speed asked for from which on it counts as reached: timing has its noise."""


@dataclass(kw_only=True)
class Final:
    """From a search to its result."""

    model: torch.nn.Module
    search: Search
    held_out: Sequence[Batch]
    metric: Metric | None
    inner: str
    told: Any

    def report(self, notes: Sequence[str], seconds: float) -> Tuned:
        search, target = self.search, self.search.task.target
        chosen, family, reached = self._chosen()
        figures: dict[str, dict[str, Any]] = {}
        notes = [*notes, *_busy()]
        try:
            figures = self._measured(chosen, family)
            measured = figures[_id(chosen)]["speed"]
            if isinstance(target, Speed) and reached and measured < SHORT * target.least:
                self.told("compiled code is slower than predicted: searching again")
                search.aim(chosen.speed / measured)
                chosen, family, reached = self._chosen()
                figures = self._measured(chosen, family)
            if family is not None and self._slower(figures, chosen, family):
                notes += [f"what was proposed ({chosen.name}) was no faster than {family.name} when measured"]
                chosen = family
            self.told("the samples held out")
            self._hold_out(figures)
        except KeyboardInterrupt:
            notes += ["the report was stopped by hand: what it lacks is not measured"]
        own = figures.get(_id(chosen), {})
        speed = own.get("speed")
        if speed is not None and speed < 1:
            notes += ["merging makes this model slower here: it is best left as it is"]
        reached = reached and not (isinstance(target, Speed) and speed is not None and speed < SHORT * target.least)
        return Tuned(
            options={"r": list(chosen.r), **chosen.options},
            target=spelled(target),
            reached=reached,
            unit="1 - cosine" if self.metric is None else "points",
            tuned_loss=chosen.loss,
            loss=own.get("loss"),
            low=own.get("low"),
            high=own.get("high"),
            distance=own.get("distance"),
            speed=speed,
            predicted=chosen.speed,
            flops=chosen.flops,
            family=None if family is None else self._family(family, figures),
            blocks=self._blocks(chosen),
            front=[self._tried(point) for point in search.front()],
            tried=[self._tried(point) for point in search.points.values()],
            samples=(self._samples(search.task.judge.batches), self._samples(self.held_out)),
            seconds=seconds,
            notes=[*notes, *search.notes],
            model=type(self.model).__name__,
            machine=timing.machine_info(next((x.device for x in self.held_out[0].tensors), "cpu")),
        )

    def _chosen(self) -> tuple[Point, Point | None, bool]:
        """What was found, the best of the families, and whether the target is reached by what was predicted."""
        chosen = self.search.finalists()
        return chosen or self.search.nearest(), self.search.family(), chosen is not None

    @staticmethod
    def _samples(batches: Sequence[Batch]) -> int:
        return sum(batch.samples for batch in batches)

    def _slower(self, figures: Mapping[str, Mapping[str, Any]], chosen: Point, family: Point) -> bool:
        """Whether what was proposed for its speed has none over the best of the families."""
        if not isinstance(self.search.task.target, Loss) or chosen == family:
            return False
        return bool(figures[_id(chosen)]["speed"] < figures[_id(family)]["speed"])

    def _measured(self, chosen: Point, family: Point | None) -> dict[str, dict[str, Any]]:
        """Throughput of each compiled candidate over the compiled model's, from interleaved rounds."""
        points = [chosen] if family is None or _id(family) == _id(chosen) else [chosen, family]
        self.told(f"compiling {len(points) + 1} models to time them")
        batch = self.held_out[0]
        backends = {"": self.inner} | {_id(p): tome_backend(r=list(p.r), inner=self.inner, **p.options) for p in points}
        with torch._dynamo.config.patch(recompile_limit=10_000):
            compiled = {name: torch.compile(self.model, backend=backend, dynamic=False)
                        for name, backend in backends.items()}  # fmt: skip
            steps = {name: partial(runner(run), batch) for name, run in compiled.items()}
            device = next((x.device for x in batch.tensors), None)
            first = timing.interleaved(steps, 1, warmup=1, device=device)
            rounds = min(max(int(SECONDS / sum(map(sum, first.values()))), ROUNDS), MOST_ROUNDS)
            times = timing.interleaved(steps, rounds, warmup=1, device=device)
        return {_id(p): {"speed": timing.ratio(times[_id(p)], times[""]), "point": p} for p in points}

    def _hold_out(self, figures: dict[str, dict[str, Any]]) -> None:
        """Losses on the batches held out, with their intervals."""
        judge = Judge(runner(self.model), self.held_out, self.metric)
        for own in figures.values():
            point: Point = own["point"]
            gm, _ = self.search.task.source.rewritten({**point.options, "r": list(point.r)})
            judged = judge.judge(runner(gm))
            low, high = judge.interval(judged, self.search.task.seed)
            own.update(loss=judge.loss(judged), low=low, high=high, distance=judged.distance)

    def _family(self, point: Point, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        own = figures.get(_id(point), {})
        measured = {name: own.get(name) for name in ("speed", "loss", "low", "high", "distance")}
        return {"name": point.name, "r": list(point.r), "tuned_loss": point.loss, "predicted": point.speed, **measured}

    def _tried(self, point: Point) -> Tried:
        samples = self._samples(self.search.task.judge.batches[: point.batches])
        return Tried(point.name, list(point.r), dict(point.options), point.speed, point.flops, point.distance,
                     point.loss, samples)  # fmt: skip

    def _blocks(self, chosen: Point) -> list[TunedBlock]:
        costs, surrogate = self.search.costs, self.search.surrogate
        r = np.array([chosen.r])
        (before,), (after,) = walk(costs.sites, r)
        lost: dict[int, float] = {}
        if surrogate is not None:
            terms = surrogate.terms(r)[0] * surrogate.weights[surrogate.turns]
            lost = dict(zip(surrogate.turns, terms.tolist(), strict=True))
        rows = []
        for s, site in enumerate(costs.sites):
            without = r * (np.arange(r.shape[1]) != site.turn)
            seconds = costs.of(np.concatenate([without, r]))[0]
            saves = float((seconds[0] - seconds[1]) / costs.plain)
            rows.append(TunedBlock(site.name, int(before[s] - after[s]), int(before[s]), int(after[s]),
                                   lost.get(site.turn), saves))  # fmt: skip
        return rows


def _busy() -> list[str]:
    """A note where others use the machine: what is timed then is rough."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    return [f"the machine was busy (load {load:.1f} on {cores} cores): times are rough"] if load > BUSY * cores else []


def _id(point: Point) -> str:
    return json.dumps([list(point.r), sorted(point.options.items())], default=str)


