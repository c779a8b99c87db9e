"""What a schedule costs: seconds and FLOPs of each block by its token count, measured once on the device.

A few rewritten graphs are run node by node. From one matching to the next is a site's stretch, and its seconds are kept
by the tokens that it had: a curve for each block, whatever the block is. All the merging of a probe is at the first
blocks, so that every block is seen with many tokens and with few. A schedule is then a walk over these curves.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from tome_fx import timing
from tome_fx.config import ToMeConfig
from tome_fx.explain import Source, flat_inputs
from tome_fx.passes import Result
from tome_fx.passes.analysis.values import size_hint
from tome_fx.passes.plan import Merge

from .judge import Batch, rising

ROUNDS = 3
"""Of the probes, of which the fastest counts; fewer where they are slow."""
PATIENCE = 30.0
"""Seconds after which no further round of probes is begun."""


@dataclass(frozen=True)
class Site:
    """A place that merges. index: its step's. name: its module. turn: its entry in a list of r. chain: the first site
    of its stream. tokens, kept: how many there are without merging, and how many of them never merge."""

    index: int
    name: str
    turn: int
    chain: int
    tokens: int
    kept: int


def sites_of(result: Result, config: ToMeConfig) -> list[Site]:
    """The places that a plan merges, in graph order, those that nobody reads among them."""
    merges = sorted([*result.plan.every, *result.plan.unread], key=lambda merge: merge.block.site.out)
    return [_site(merge, config.chosen(merge.block.turn[1])) for merge in merges]


def _site(merge: Merge, chosen: list[int]) -> Site:
    block, chain = merge.block, merge.step.chain()
    kept = size_hint(block.special.count)
    turn = chosen.index(block.turn[0])
    return Site(merge.step.site, block.name, turn, chain[0].site, size_hint(block.length), kept)


def length_of(sites: Sequence[Site]) -> int:
    """How many entries a list of r has."""
    return max(site.turn for site in sites) + 1


def walk(sites: Sequence[Site], r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens before and after each site under each of some lists: int64 [lists, blocks] -> [lists, sites] twice."""
    before = np.empty((len(r), len(sites)), np.int64)
    after, held = before.copy(), dict[int, np.ndarray]()
    for s, site in enumerate(sites):
        before[:, s] = held.get(site.chain, np.int64(site.tokens))
        free = np.maximum(before[:, s] - site.kept, 0)
        after[:, s] = before[:, s] - np.minimum(r[:, site.turn], free // 2)
        held[site.chain] = after[:, s]
    return before, after


class _Clock(fx.Interpreter):
    """Seconds of a run, by the site whose matching came last (None before the first): [the model's ops, merging's]."""

    def __init__(self, gm: fx.GraphModule, device: torch.device) -> None:
        super().__init__(gm)
        self.device, self.site = device, None
        self.spent: dict[int | None, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        timing.synchronize(self.device)
        self.site = n.meta.get("tome_step", self.site)
        ours = n.op == "call_function" and getattr(n.target, "namespace", "").startswith("tome")
        self.spent[self.site][ours] += time.perf_counter() - start
        return value


def clocked(gm: fx.GraphModule, batch: Batch) -> dict[int | None, list[float]]:
    """Seconds of one run of a graph by site."""
    clock = _Clock(gm, next((x.device for x in batch.tensors), torch.device("cpu")))
    with torch.no_grad():
        clock.run(*flat_inputs(gm, batch.args, batch.kwargs), enable_io_processing=False)
    return clock.spent


def fastest(graphs: Sequence[fx.GraphModule], batch: Batch) -> list[dict[int | None, list[float]]]:
    """Of each graph the least seconds at each site over interleaved rounds."""
    found: list[dict[int | None, list[float]]] = [{} for _ in graphs]
    begun = time.perf_counter()
    for turn in range(ROUNDS + 1):
        for best, gm in zip(found, graphs, strict=True):
            for site, spent in clocked(gm, batch).items():
                held = best.get(site, spent)
                best[site] = [min(a, b) for a, b in zip(held, spent, strict=True)]
        if turn and time.perf_counter() - begun > PATIENCE:
            break
    return found


class Costs:
    """The curves of a model under one set of options.

    plain: seconds of the unmerged model on a batch. sites: where it merges. Raises ValueError where nothing merges.
    """

    def __init__(self, source: Source, options: Mapping[str, Any], config: ToMeConfig, batch: Batch) -> None:
        probe = source.rewritten({**options, "r": 1})[1]
        if not probe.plan.every:
            raise ValueError(f"nothing to tune: {probe.report.summary()}")
        self.sites = sites_of(probe, config)
        self.length = length_of(self.sites)
        made = [source.rewritten({**options, "r": r}) for r in self._probes()]
        *spent, plain = fastest([*(gm for gm, _ in made), source.module], batch)
        self.plain = sum(sum(pair) for pair in plain.values())
        self.base = min(sum(of.get(None, [0.0])) for of in spent)
        results = [result for _, result in made]
        self.flops_plain = probe.plan.bill.before
        self.flops_base = float(np.median([_rest(result) for result in results]))
        tables = [self._tables(site, spent, results) for site in self.sites]
        self.seconds, self.merging, self.flops = zip(*tables, strict=True)

    def _probes(self) -> list[list[int]]:
        """Lists that merge one token everywhere, but at the first blocks more."""
        free = max(site.tokens - site.kept for site in self.sites)
        ones = [1] * self.length
        first = [[n, *ones[1:]] for n in dict.fromkeys((1, free // 4, free // 2))]
        return first + [[free // 2, free // 4, *ones[2:]]] * (self.length > 2)

    def _tables(self, site: Site, spent: Sequence[Mapping[int | None, list[float]]], results: Sequence[Result]) -> Any:
        """Seconds by tokens after, of merging by tokens before, and FLOPs by tokens after: one entry for each count."""
        after, before, flops, own, ours = [], [], [], [], []
        for of, result in zip(spent, results, strict=True):
            merges = [*result.plan.every, *result.plan.unread]
            merge = next((m for m in merges if m.step.site == site.index), None)
            if merge is not None:
                length = size_hint(merge.length)
                before.append(length)
                after.append(length - size_hint(merge.r))
                flops.append(result.plan.bill.at[site.index][1])
                mine = of.get(site.index, [0.0, 0.0])
                own.append(mine[0])
                ours.append(mine[1])
        return tuple(_table(x, y, site.tokens) for x, y in ((after, own), (before, ours), (after, flops)))

    def of(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and share of FLOPs of some lists [lists, blocks]: float64 [lists] each."""
        before, after = walk(self.sites, r)
        seconds, flops = np.full(len(r), self.base), np.full(len(r), self.flops_base)
        for s in range(len(self.sites)):
            merges = before[:, s] > after[:, s]
            seconds += self.seconds[s][after[:, s]] + self.merging[s][before[:, s]] * merges
            flops += self.flops[s][after[:, s]]
        nothing = (before == after).all(1)
        return np.where(nothing, self.plain, seconds), np.where(nothing, 1.0, flops / self.flops_plain)

    def merged(self, r: Sequence[int]) -> list[int]:
        """What each block of a list really merges, where it has no more to give."""
        before, after = walk(self.sites, np.array([r]))
        merged = [0] * len(r)
        for site, count in zip(self.sites, (before - after)[0].tolist(), strict=True):
            merged[site.turn] = max(merged[site.turn], count)
        return merged

    def speed(self, r: Sequence[int]) -> float:
        """Predicted throughput over the unmerged model's."""
        return float(self.plain / self.of(np.array([r]))[0][0])


def _rest(result: Result) -> float:
    """FLOPs that no merge reaches."""
    return result.plan.bill.after - sum(after for _, after in result.plan.bill.at.values())


def _table(tokens: Sequence[int], values: Sequence[float], most: int) -> np.ndarray:
    """A rising curve through some points at every count up to `most`, straight on below the least: float64 [most + 1].
    """
    if not tokens:
        return np.zeros(most + 1)
    xs, ys = rising(tokens, values)
    kept = np.append(np.flatnonzero(np.diff(xs)), len(xs) - 1)
    xs, ys = xs[kept], ys[kept]
    counts = np.arange(most + 1)
    found = np.interp(counts, xs, ys)
    if len(xs) > 1:
        slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
        below = counts < xs[0]
        found[below] = np.maximum(ys[0] - slope * (xs[0] - counts[below]), 0.0)
    return found
