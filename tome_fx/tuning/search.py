"""The search: families of schedules, option values, one merge alone at each block, then proposals until time is up.

All candidates are rewritten from one capture and run eagerly. Most are judged on a few of the batches; finalists on all
that are there to tune on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from tome_fx.config import METRICS, config_from
from tome_fx.explain import Source
from tome_fx.methods import METHODS
from tome_fx.passes import Result
from tome_fx.passes.analysis.values import size_hint
from tome_fx.schedule import tokens_per_block

from .costs import Costs, sites_of, slower
from .judge import Batch, Judge, level
from .surrogate import Goal, Surrogate
from .targets import Flops, Loss, Speed, Target

FAMILIES: dict[str, float | None] = {"r": None, "(r, -1)": -1.0, "(r, 1)": 1.0}
"""Schedules that the paper has, and their inflection."""
VALUES: dict[str, Callable[[], Sequence[Any]]] = {
    "method": lambda: tuple(METHODS),
    "metric": lambda: METRICS,
    "similarity": lambda: ("cosine", "dot"),
    "prop_attn": lambda: (True, False),
}
"""Options that may be searched beside the schedule, and what is tried."""
SEARCHED = ("schedule", *VALUES)
FEW = 32
"""Samples that most candidates are judged on, if there are so many; a quarter of those to tune on at least."""
STALE = 8
"""Proposals in a row that were evaluated before, after which there is nothing left to propose."""
NOISE = 0.3
"""Spread of the factors on the weights from which a proposal is made: what is not known of them."""
SETTLE = 8
"""Proposals after which the best so far is judged on all batches, so that the others are held to what that says."""
FINALISTS = 8
AGAIN = 0.2
"""Share of the time of the search for another, where compiled code was slower than predicted."""


@dataclass(frozen=True)
class Point:
    """A candidate as it was evaluated. r: what each block merges. name: where it came from. batches: how many it was
    judged on. loss: as the target means it. distance: 1 - cosine. speed, flops: predicted, over the unmerged model's.
    """

    options: Mapping[str, Any]
    r: tuple[int, ...]
    name: str
    batches: int
    loss: float
    distance: float
    speed: float
    flops: float


class Enough(Exception):
    """The time of the search is up."""


@dataclass(kw_only=True)
class Task:
    """What is searched, and for what. base: options that hold throughout. searched: names of `SEARCHED`. told: called
    with a line after each evaluation."""

    source: Source
    judge: Judge
    target: Target
    base: Mapping[str, Any]
    searched: Sequence[str]
    seconds: float
    seed: int
    told: Callable[[str], None] = lambda line: None


class Search:
    """known: points of an earlier search, by key. notes: what the user should hear."""

    def __init__(self, task: Task, known: Mapping[str, Point] | None = None) -> None:
        self.task, self.known = task, dict(known or {})
        self.deadline = time.perf_counter() + task.seconds
        self.points: dict[str, Point] = {}
        self.notes: list[str] = []
        self.options = dict(task.base)
        self.random = np.random.default_rng(task.seed)
        self.whole = len(task.judge.batches)
        size = task.judge.batches[0].samples
        self.few = min(max(math.ceil(FEW / size), self.whole // 4, 1), self.whole)
        self.costs = self._costs()
        self.level, self.ratio, self.slip = 0.0, 1.0, 1.0
        self.alone: dict[int, float] = {}
        self.surrogate: Surrogate | None = None

    def run(self) -> None:
        """Search until nothing is left to try, the time is up, or Ctrl-C."""
        try:
            self._families()
            if self.slip == 1:
                self._options()
            if "schedule" in self.task.searched:
                self._alone()
                self._propose()
        except Enough:
            self.notes += ["the budget ended the search: a larger one may find more"] * (self.slip == 1)
        except KeyboardInterrupt:
            self.notes.append("the search was stopped by hand")

    def aim(self, slip: float) -> None:
        """Search again, for `slip` times the speed that was asked for: compiled, it is that much slower."""
        self.slip = slip
        self.deadline = time.perf_counter() + AGAIN * self.task.seconds
        self.run()

    def _costs(self) -> Costs:
        config = config_from({"inner": "eager", **self.options, "r": 1})
        return Costs(self.task.source, self.options, config, self.task.judge.batches[0])

    # -- evaluating ------------------------------------------------------------------------------------------------

    def evaluate(self, r: Sequence[int], name: str, batches: int, *, late: bool = False) -> Point:
        """A candidate under the options that hold now. late: even when the time is up. Raises Enough."""
        key = _key(self.options, r, batches)
        if key in self.points:
            return self.points[key]
        point = self.known.get(key)
        if point is None:
            if not late and time.perf_counter() > self.deadline:
                raise Enough
            gm, result = self.task.source.rewritten({**self.options, "r": list(r)})
            judged = self.task.judge.judge(runner(gm), batches)
            loss, merged = self.task.judge.loss(judged), self._merged(result)
            point = Point({}, merged, name, batches, loss, judged.distance, 1.0, result.plan.share)
        self.points[key] = replace(point, options=dict(self.options), speed=self.costs.speed(point.r))
        self.task.told(self.told())
        return self.points[key]

    def _merged(self, result: Result) -> tuple[int, ...]:
        """What a plan merges at each block: nothing where that does not pay."""
        merged = [0] * self.costs.length
        for site in sites_of(result, result.facts.config):
            most = max(size_hint(m.r) for m in (*result.plan.every, *result.plan.unread) if m.step.site == site.index)
            merged[site.turn] = max(merged[site.turn], most)
        return tuple(merged)

    def told(self) -> str:
        """A line for the progress bar."""
        best = self.best(self.few)
        head = f"{len(self.points)} tried"
        if best is None:
            return f"{head}, none reaches the target yet"
        return f"{head}, best {best.speed:.2f}x, loss {best.loss:.3g} ({best.name})"

    # -- judging ---------------------------------------------------------------------------------------------------

    def reaches(self, point: Point) -> bool:
        """Whether a point keeps the target: of one judged on few batches, by the distance that goes with it there."""
        target = self.task.target
        if isinstance(target, Speed):
            return point.speed >= target.least * self.slip
        if isinstance(target, Flops):
            return point.flops <= target.share
        if point.batches < self.whole:
            return point.distance <= self.level * self.ratio
        near = point.distance <= self.level or self.task.judge.metric is None
        return point.loss <= target.most and near

    def worth(self, point: Point) -> float:
        """What is wanted of points that reach the target: speed, or as little distance as may be."""
        return point.speed if isinstance(self.task.target, Loss) else -point.distance

    def best(self, batches: int, *, family: bool = False) -> Point | None:
        """The best that reaches the target of those judged on so many batches; of the families alone, with the options
        that were given, or all."""
        held = [p for p in self.points.values() if p.batches == batches and any(p.r) and self.reaches(p)]
        if family:
            held = [p for p in held if p.name.startswith("r=") and p.options == dict(self.task.base)]
        return max(held, key=self.worth, default=None)

    def front(self) -> list[Point]:
        """Of all that was evaluated on as many batches as any, those that no other beats in speed and distance."""
        held = sorted((p for p in self.points.values() if p.batches == self.few), key=lambda p: (-p.speed, p.distance))
        front: list[Point] = []
        for point in held:
            if not front or point.distance < front[-1].distance:
                front.append(point)
        return front

    # -- families --------------------------------------------------------------------------------------------------

    def _families(self) -> None:
        """The r at which each family just keeps the target."""
        if self._wants_loss and self.task.judge.metric is not None:
            self._first_level()
        elif isinstance(self.task.target, Loss):
            self.level = self.task.target.most
        for family in FAMILIES:
            self._bisected(family)
        best = self.best(self.few)
        if best is not None and self._wants_loss:
            self._settle(best)
            for family in FAMILIES:
                self._bisected(family)

    def _first_level(self) -> None:
        """The constant r by bisection on all batches, from which the level of distance follows that candidates are then
        held to."""
        found = self._largest("r", self.whole)
        self._learn()
        for point in [p for p in self.points.values() if p.batches == self.whole]:
            few = self.evaluate(point.r, point.name, self.few)
            if point is found:
                self._compare(few, point)

    @property
    def _wants_loss(self) -> bool:
        return isinstance(self.task.target, Loss)

    def _learn(self) -> None:
        """The level of distance, with a metric from all that was judged on all batches."""
        target = self.task.target
        if isinstance(target, Loss) and self.task.judge.metric is not None:
            held = [p for p in self.points.values() if p.batches == self.whole]
            self.level = level([p.distance for p in held], [p.loss for p in held], target.most)

    def _settle(self, few: Point) -> None:
        """How the distance on few batches compares with that on all."""
        whole = self.evaluate(few.r, few.name, self.whole)
        self._learn()
        self._compare(few, whole)

    def _compare(self, few: Point, whole: Point) -> None:
        """What a distance on few batches is on all: as for the last that was judged on both, which others are like."""
        if few.batches == self.few and few.distance > 0 and whole.distance > 0:
            self.ratio = few.distance / whole.distance

    def list_of(self, family: str, r: int) -> list[int]:
        """A member of a family as a list."""
        inflection = FAMILIES[family]
        spelled = tokens_per_block(r if inflection is None else (r, inflection), self.costs.length)
        return self.costs.merged([int(each) for each in spelled])

    def _bisected(self, family: str) -> None:
        """The member of a family that just keeps the target, and the members on the way."""
        if self._wants_loss:
            self._largest(family, self.few)
            return
        low, high = 0, self._most()
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._kept(self.list_of(family, middle)) else (middle + 1, high)
        for r in (low, low + 1):
            self.evaluate(self.list_of(family, r), named(family, r), self.few)

    def _largest(self, family: str, batches: int) -> Point | None:
        """The last member of a family that keeps a target of loss. From a small r up: a large one tells little."""
        low, high, best = 0, self._most(), None
        while low < high:
            middle = min((low + high + 1) // 2, max(2 * low, 4))
            point = self.evaluate(self.list_of(family, middle), named(family, middle), batches)
            kept = self.reaches(point)
            if batches == self.whole and isinstance(self.task.target, Loss):
                kept = point.loss <= self.task.target.most  # no level of distance is known yet
            low, high, best = (middle, high, point) if kept else (low, middle - 1, best)
        return best

    def _most(self) -> int:
        return max(max(site.tokens - site.kept for site in self.costs.sites) // 2, 1)

    def _kept(self, r: Sequence[int]) -> bool:
        """Whether a schedule keeps a target of speed or FLOPs, as predicted."""
        target = self.task.target
        if isinstance(target, Speed):
            return self.costs.speed(r) >= target.least * self.slip
        assert isinstance(target, Flops)
        return bool(self.costs.of(np.array([r]))[1][0] <= target.share)

    # -- options ---------------------------------------------------------------------------------------------------

    def _options(self) -> None:
        """Values of other options at the best schedule so far, each option in turn."""
        start = self.best(self.few) or max(self.points.values(), key=lambda p: p.distance, default=None)
        names = [name for name in VALUES if name in self.task.searched]
        if start is None or not names:
            return
        before = dict(self.options)
        for name in names:
            self._option(name, start.r)
        if self.options != before:
            self.costs = self._costs()
            self._bisected("r")

    def _option(self, name: str, r: Sequence[int]) -> None:
        """Keep the value of an option that gains most: less distance is worth the speed that a larger r would bring."""
        held = self.evaluate(r, "options", self.few)
        slope = self._slope()
        own = dict(self.options)
        current = getattr(config_from({"inner": "eager", **own, "r": 1}), name)
        best = (0.01, own)
        for value in VALUES[name]():
            if value == current:
                continue
            self.options = {**own, name: value, **({"blocks": own.get("blocks", "all")} if name == "method" else {})}
            try:
                best = max(best, (self._gain(held, own, slope), self.options), key=lambda pair: pair[0])
            except (ValueError, NotImplementedError) as error:
                self.notes.append(f"{name}={value!r} was left out: {shorten(str(error), 160, placeholder=' ...')}")
            finally:
                self.options = own
        self.options = best[1]

    def _gain(self, held: Point, own: Mapping[str, Any], slope: float) -> float:
        """Logarithm of speed that options gain over `own` at the schedule of `held`."""
        merged, result = self.task.source.rewritten({**self.options, "r": list(held.r)})
        if not result.plan.every:
            raise ValueError(result.report.summary())
        point = self.evaluate(held.r, "options", self.few)
        closer = slope * math.log(max(held.distance, 1e-12) / max(point.distance, 1e-12))
        if closer <= 0:
            return closer
        before, _ = self.task.source.rewritten({**own, "r": list(held.r)})
        factor = slower([before, merged], self.task.judge.batches[0])
        self.points[_key(self.options, held.r, self.few)] = replace(point, speed=held.speed / factor)
        return closer - math.log(factor)

    def _slope(self) -> float:
        """How the logarithm of speed rises with that of distance along constant r."""
        held = [p for p in self.points.values() if _is_constant(p) and p.batches == self.few and p.distance > 0]
        if len({p.distance for p in held}) < 2:
            return 0.1
        x, y = (np.log([getattr(p, of) for p in held]) for of in ("distance", "speed"))
        return float(np.clip(np.polyfit(x, y, 1)[0], 0.01, 0.5))

    # -- the schedule ----------------------------------------------------------------------------------------------

    def _alone(self) -> None:
        """What each block loses when it alone merges an eighth of its tokens: where to begin."""
        free = max(site.tokens - site.kept for site in self.costs.sites)
        count = max(free // 8, 1)
        batches = max(self.few // 2, 1)
        turns = sorted({site.turn for site in self.costs.sites})
        power = self._power()
        for turn in turns:
            r = [count * (i == turn) for i in range(self.costs.length)]
            self.alone[turn] = self.evaluate(r, f"block {turn} alone", batches).distance
        share = np.zeros(self.costs.length)
        share[turns] = [self.alone[turn] for turn in turns]
        self.surrogate = Surrogate(self.costs, share / (count / free) ** power, power)

    def _power(self) -> float:
        """How distance rises with r along constant r."""
        held = [p for p in self._own() if _is_constant(p) and p.r[0] > 0 and p.distance > 0]
        if len({p.r for p in held}) < 2:
            return 1.5
        x, y = np.log([p.r[0] for p in held]), np.log([p.distance for p in held])
        return float(np.clip(np.polyfit(x, y, 1)[0], 1.0, 3.0))

    def _own(self) -> list[Point]:
        """What was evaluated on few batches under the options that hold now."""
        return [p for p in self.points.values() if p.batches == self.few and p.options == self.options]

    def goal(self) -> Goal:
        target = self.task.target
        if isinstance(target, Speed):
            return Goal("seconds", 1 / (target.least * self.slip), True)
        if isinstance(target, Flops):
            return Goal("flops", target.share, True)
        return Goal("seconds", self.level * self.ratio, False)

    def _propose(self) -> None:
        """Evaluate what the surrogate says is best, fit it, and again with its weights shaken."""
        assert self.surrogate is not None
        stale = turn = 0
        while stale < STALE:
            best = self.best(self.few) or max(self._own(), key=lambda p: p.speed)
            if turn % SETTLE == 1 and self._wants_loss and self.reaches(best):
                self._settle(best)
                best = self.best(self.few) or best
            held, goal = self._own(), self.goal()
            near = goal.most if not goal.cost else best.distance
            self.surrogate.fit([p.r for p in held], [p.distance for p in held], near)
            guess = self.surrogate.shaken(NOISE * self.random.standard_normal(self.costs.length) * (turn > 0))
            r = guess.best(goal, best.r)
            turn += 1
            if not any(r) or _key(self.options, r, self.few) in self.points:
                stale += 1
                continue
            stale = 0
            self.evaluate(r, f"proposal {turn}", self.few)

    # -- the end ---------------------------------------------------------------------------------------------------

    def finalists(self) -> Point | None:
        """The best on all batches: the most promising are judged there, one after another, until one keeps the target
        and no other could beat it."""
        self._learn()  # the time may have been up before
        for _ in range(FINALISTS):
            best = self.best(self.whole)
            rest = [p for p in self.points.values() if p.batches == self.few and self.reaches(p)]
            rest = [p for p in rest if _key(p.options, p.r, self.whole) not in self.points and any(p.r)]
            rest = [p for p in rest if best is None or self.worth(p) > self.worth(best)]
            if not rest:
                break
            self._judge_whole(max(rest, key=self.worth))
        return self.best(self.whole)

    def _judge_whole(self, point: Point) -> Point:
        own, self.options = self.options, dict(point.options)
        try:
            self.evaluate(point.r, point.name, self.whole, late=True)
            key = _key(point.options, point.r, self.whole)
            self.points[key] = replace(self.points[key], speed=point.speed)
        finally:
            self.options = own
        self._learn()
        self._compare(point, self.points[key])
        return self.points[key]

    def family(self) -> Point | None:
        """The best of the families under the options that were given, on all batches."""
        few = self.best(self.few, family=True)
        if few is not None:
            self._judge_whole(few)
        return self.best(self.whole, family=True)

    def nearest(self) -> Point:
        """Where nothing reaches the target: what comes nearest, on all batches."""
        target, held = self.task.target, [p for p in self.points.values() if any(p.r) and p.batches >= self.few]
        if not held:
            held = [self.evaluate(self.list_of("r", 1), named("r", 1), self.whole, late=True)]
        if isinstance(target, Loss):
            return self._judge_whole(min(held, key=lambda p: p.distance))
        return self._judge_whole(max(held, key=lambda p: p.speed if isinstance(target, Speed) else -p.flops))


def runner(gm: Callable[..., Any]) -> Callable[[Batch], Any]:
    """A model's call without gradients."""

    def run(batch: Batch) -> Any:
        with torch.no_grad():
            return gm(*batch.args, **batch.kwargs)

    return run


def named(family: str, r: int) -> str:
    """What a search calls a member of a family."""
    return f"r={r}" if family == "r" else f"r={family.replace('r', str(r))}"


def _is_constant(point: Point) -> bool:
    return point.name.startswith("r=") and not point.name.startswith("r=(")


def _key(options: Mapping[str, Any], r: Sequence[int], batches: int) -> str:
    return json.dumps([sorted(options.items()), list(r), batches], default=str)


__all__ = ["SEARCHED", "Point", "Search", "Task", "named", "runner"]
