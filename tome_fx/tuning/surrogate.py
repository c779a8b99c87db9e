"""What a schedule would lose, guessed from all that was evaluated, and the schedule that is best by the guess.

Loss is taken as a sum over blocks of weight * share ** power: the share of its tokens that a block merges away. The
weights come from one merge alone at each block and are fitted again to every schedule that was really evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .costs import Costs, walk

PRIOR = 0.3
"""How much a weight holds to what its block lost alone, in schedules evaluated."""
FLOOR = 0.02
"""Least weight of a block, of their mean: what loses nothing alone may lose something with others."""
GRID = 24
"""Counts tried at a block."""
SWEEPS, HALVINGS = 4, 14


@dataclass(frozen=True)
class Goal:
    """by: "seconds" or "flops" that a schedule costs. most: of the loss or, where `cost` is set, of the cost."""

    by: str
    most: float
    cost: bool


class Surrogate:
    """weights: float64 [blocks]. power: how loss rises with the share that merges."""

    def __init__(self, costs: Costs, alone: np.ndarray, power: float) -> None:
        """alone: what merging `shares` at each block alone loses, over the share to the power."""
        self.costs, self.power = costs, power
        self.prior = np.maximum(alone, FLOOR * max(float(alone.mean()), 1e-12))
        self.weights = self.prior.copy()
        first = {site.turn: s for s, site in reversed([*enumerate(costs.sites)])}
        self.first = [first[turn] for turn in sorted(first)]
        self.turns = sorted(first)

    def terms(self, r: np.ndarray) -> np.ndarray:
        """share ** power of each block: float64 [lists, blocks]."""
        before, after = walk(self.costs.sites, r)
        kept = np.array([site.kept for site in self.costs.sites])
        share = (before - after) / np.maximum(before - kept, 1)
        return share[:, self.first] ** self.power

    def loss(self, r: np.ndarray) -> np.ndarray:
        """float64 [lists]."""
        return self.terms(r) @ self.weights[self.turns]

    def fit(self, lists: Sequence[Sequence[int]], losses: Sequence[float], near: float) -> None:
        """Take in what was evaluated, schedules that lose about `near` most."""
        kept = [(r, loss) for r, loss in zip(lists, losses, strict=True) if loss > 0 and any(r)]
        if not kept:
            return
        found = np.array([loss for _, loss in kept])
        parts = self.terms(np.array([r for r, _ in kept])) * self.prior[self.turns]
        nearness = np.exp(-np.abs(np.log(found / max(near, 1e-12))))
        scale = np.exp(np.average(np.log(found / np.maximum(parts.sum(1), 1e-300)), weights=nearness))
        features = parts * scale / found[:, None] * np.sqrt(nearness)[:, None]
        held = PRIOR * np.eye(len(self.turns))
        factors = np.linalg.solve(features.T @ features + held, features.T @ np.sqrt(nearness) + PRIOR)
        self.weights[self.turns] = self.prior[self.turns] * scale * np.clip(factors, 0.1, 10.0)

    def shaken(self, factors: np.ndarray) -> Surrogate:
        """The same with other weights: times exp(factors)."""
        other = copy.copy(self)
        other.weights = self.weights * np.exp(factors)
        return other

    # -- the best schedule -----------------------------------------------------------------------------------------

    def best(self, goal: Goal, start: Sequence[int]) -> list[int]:
        """The schedule that is best by the guess; `start` is where one of two descents begins."""
        found = [self._allocate(goal, np.array(begin)) for begin in ([0] * len(start), start)]
        return self.costs.merged(min(found, key=lambda r: self._rank(goal, r)).tolist())

    def _cost(self, goal: Goal, r: np.ndarray) -> np.ndarray:
        seconds, flops = self.costs.of(r)
        return flops if goal.by == "flops" else seconds / self.costs.plain

    def _rank(self, goal: Goal, r: np.ndarray) -> tuple[bool, float]:
        cost, loss = float(self._cost(goal, r[None])[0]), float(self.loss(r[None])[0])
        kept, other = (cost, loss) if goal.cost else (loss, cost)
        return kept > goal.most, other

    def _allocate(self, goal: Goal, start: np.ndarray) -> np.ndarray:
        """The price of loss at which the goal is just kept, by bisection, each time descending along the blocks."""
        low, high, best = -9.0, 9.0, start
        unit = max(float(self.weights.mean()), 1e-12)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            r = self._descend(goal, 10**middle / unit, best.copy())
            late, _ = self._rank(goal, r)
            low, high = (low, middle) if late == goal.cost else (middle, high)
            if not late:
                best = min(best, r, key=lambda each: self._rank(goal, each)) if not self._rank(goal, best)[0] else r
        return self._filled(goal, best)

    def _descend(self, goal: Goal, price: float, r: np.ndarray) -> np.ndarray:
        for _ in range(SWEEPS):
            before = r.copy()
            for turn, site in zip(self.turns, self.first, strict=True):
                free = self.costs.sites[site].tokens - self.costs.sites[site].kept
                tried = np.unique(np.append(np.linspace(0, free // 2, GRID).astype(int), r[turn] + np.arange(-2, 3)))
                lists = np.repeat(r[None], len(tried), 0)
                lists[:, turn] = np.maximum(tried, 0)
                r = lists[np.argmin(self._cost(goal, lists) + price * self.loss(lists))]
            if (r == before).all():
                break
        return r

    def _filled(self, goal: Goal, r: np.ndarray) -> np.ndarray:
        """Single tokens more (of a goal of cost: fewer) as long as it is kept."""
        step = -1 if goal.cost else 1
        while (now := self._rank(goal, r)) and not now[0]:
            lists = np.maximum(r + step * np.eye(len(r), dtype=int), 0)
            cost, loss = self._cost(goal, lists), self.loss(lists)
            kept, other = (cost, loss) if goal.cost else (loss, cost)
            other = np.where(kept <= goal.most, other, np.inf)
            if other.min() >= now[1]:
                break
            r = lists[np.argmin(other)]
        return r
