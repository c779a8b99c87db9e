"""What a schedule costs: seconds and FLOPs of each block by its token count, measured once on the device.

A few rewritten graphs are run node by node. From one matching to the next is a site's stretch, and its seconds are kept
with the tokens that it had. All the merging of a probe is at the first blocks, so that every block is seen with many
tokens and with few. Seconds are a line over the block's FLOPs, one for all blocks that compute alike: a curve over its
tokens, as attention is in the FLOPs. A schedule is then a walk over these curves.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from tome_fx import timing
from tome_fx.config import ToMeConfig
from tome_fx.explain import Source, flat_inputs
from tome_fx.passes import Result, no_collector
from tome_fx.passes.analysis.values import size_hint
from tome_fx.passes.plan import Merge

from .judge import Batch

ROUNDS, MOST_ROUNDS = 5, 30
"""Of the probes: so many, more as long as they take no second, fewer where they are slow."""
PATIENCE = 25.0
"""Seconds after which no further round of probes is begun."""

DRAWN = 0.1
"""Share of its tokens that each block merges to see which do: one that does not pay with a token may with some."""
ALIKE = 0.05
"""How far apart the FLOPs of two blocks may be, relative, that share a curve."""


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
    """Seconds of each node of a run."""

    def __init__(self, gm: fx.GraphModule, device: torch.device) -> None:
        super().__init__(gm)
        self.device, self.seconds = device, list[float]()

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        timing.synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        return value


def clocked(gm: fx.GraphModule, batch: Batch) -> list[float]:
    """Seconds of each node in one run of a graph."""
    clock = _Clock(gm, next((x.device for x in batch.tensors), torch.device("cpu")))
    with torch.no_grad():
        clock.run(*flat_inputs(gm, batch.args, batch.kwargs), enable_io_processing=False)
    return clock.seconds


@no_collector()
def timed(graphs: Sequence[fx.GraphModule], batch: Batch) -> list[list[list[float]]]:
    """Seconds of each node of each graph in interleaved rounds."""
    rounds: list[list[list[float]]] = []
    begun = time.perf_counter()
    while len(rounds) < MOST_ROUNDS:
        rounds.append([clocked(gm, batch) for gm in graphs])
        took = time.perf_counter() - begun
        if (len(rounds) > ROUNDS and took > 1) or (len(rounds) > 2 and took > PATIENCE):
            break
    return rounds


def slower(graphs: Sequence[fx.GraphModule], batch: Batch) -> float:
    """How many times the seconds of the first of two graphs the second takes."""
    return float(np.median([sum(second) / sum(first) for first, second in timed(graphs, batch)]))


def by_site(graphs: Sequence[fx.GraphModule], rounds: list[list[list[float]]]) -> list[dict[int | None, list[float]]]:
    """Of each graph the seconds by the site whose matching came last (None before the first): [the model's ops,
    merging's]. Of each node the least over the rounds: other processes only ever add to it."""
    return [_by_site(gm, np.min([held[i] for held in rounds], axis=0)) for i, gm in enumerate(graphs)]


def _by_site(gm: fx.GraphModule, seconds: np.ndarray) -> dict[int | None, list[float]]:
    found: dict[int | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    site = None
    for node, took in zip(gm.graph.nodes, seconds.tolist(), strict=True):
        site = node.meta.get("tome_step", site)
        ours = node.op == "call_function" and getattr(node.target, "namespace", "").startswith("tome")
        found[site][ours] += took
    return found


class Costs:
    """The curves of a model under one set of options.

    plain: seconds of the unmerged model on a batch. sites: where it merges. Raises ValueError where nothing merges.
    """

    def __init__(self, source: Source, options: Mapping[str, Any], config: ToMeConfig, batch: Batch) -> None:
        probe = source.rewritten({**options, "r": DRAWN})[1]
        if not probe.plan.every:
            raise ValueError(f"nothing to tune: {probe.report.summary()}")
        self.sites = sites_of(probe, config)
        self.length = length_of(self.sites)
        made = [source.rewritten({**options, "r": r}) for r in self._probes()]
        graphs, results = [gm for gm, _ in made], [result for _, result in made]
        rounds = timed([*graphs, source.module], batch)
        took = by_site(graphs, rounds)
        whole = [i for i, result in enumerate(results) if len(sites_of(result, config)) == len(self.sites)]
        if whole:  # where a site does not merge, what it computes is counted to the one before
            took, results = [took[i] for i in whole], [results[i] for i in whole]
        self.base = float(np.median([sum(of.get(None, [0.0])) for of in took]))
        self.flops_plain = probe.plan.bill.before
        self.flops_base = float(np.median([_rest(result) for result in results]))
        seen = {site: self._seen(site, took, results) for site in self.sites}
        self.flops = [_table(seen[site], site.tokens) for site in self.sites]
        alike = self._alike({merge.step.site for merge in probe.plan.unread})
        pooled = [np.concatenate([seen[self.sites[s]] for s in group]) for group in alike]
        self.seconds = [_line(of[:, 4], of[:, 2])(table) for of, table in zip(pooled, self.flops, strict=True)]
        self.merging = [_line(of[:, 0], of[:, 3])(np.arange(site.tokens + 1))
                        for of, site in zip(pooled, self.sites, strict=True)]  # fmt: skip
        self.plain = 1.0  # so that `of` gives seconds; by round, as the machine is not as fast in each
        guessed = sum(self.of(np.array(self._probes()))[0])
        self.plain = float(np.median([guessed * sum(plain) / sum(map(sum, held)) for *held, plain in rounds]))

    def _probes(self) -> list[list[int]]:
        """Lists that merge little everywhere, but at the first blocks more."""
        free = max(site.tokens - site.kept for site in self.sites)
        little = max(int(free * DRAWN / 2), 2)
        rest = [little] * (self.length - 1)
        first = [[n, *rest] for n in dict.fromkeys((little, free // 4, free // 2))]
        return first + [[free // 2, free // 4, *rest[1:]]] * (self.length > 2)

    def _seen(
        self, site: Site, took: Sequence[Mapping[int | None, list[float]]], results: Sequence[Result]
    ) -> np.ndarray:
        """A row for each probe in which a site merges: tokens before and after, seconds of the model's ops and of
        merging, FLOPs."""
        rows = []
        for of, result in zip(took, results, strict=True):
            for merge in (m for m in (*result.plan.every, *result.plan.unread) if m.step.site == site.index):
                length, flops = size_hint(merge.length), result.plan.bill.at[site.index][1]
                rows.append([length, length - size_hint(merge.r), *of.get(site.index, [0.0, 0.0]), flops])
        return np.array(rows, dtype=np.float64).reshape(-1, 5)

    def _alike(self, unread: set[int]) -> list[list[int]]:
        """For each site those that compute as much as it does: what is timed of one holds for all, with less noise.
        What follows a merge that nobody reads is counted to the site before."""
        last = [any(site.index in unread for site in self.sites[s + 1 :][:1]) for s in range(len(self.sites))]
        kinds = [(end, site.index in unread, site.tokens) for end, site in zip(last, self.sites, strict=True)]
        return [[s for s, of in enumerate(self.flops) if kinds[s] == kind and np.allclose(of, own, rtol=ALIKE)]
                for kind, own in zip(kinds, self.flops, strict=True)]  # fmt: skip

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


def _table(seen: np.ndarray, most: int) -> np.ndarray:
    """FLOPs at every count of tokens up to `most`, through those that were seen, straight on below the least: float64
    [most + 1]."""
    if not len(seen):
        return np.zeros(most + 1)
    tokens, first = np.unique(seen[:, 1], return_index=True)
    flops, counts = seen[first, 4], np.arange(most + 1)
    found = np.interp(counts, tokens, flops)
    if len(tokens) > 1:
        ends = [(counts < tokens[0], 0, 1), (counts > tokens[-1], -1, -2)]
        for beyond, at, next_to in ends:
            slope = (flops[next_to] - flops[at]) / (tokens[next_to] - tokens[at])
            found[beyond] = np.maximum(flops[at] + slope * (counts[beyond] - tokens[at]), 0.0)
    return found


def _line(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """y = a + b * x with neither below 0, by least squares: all blocks of a kind against the noise of each."""
    if not len(x) or not x.any():
        return lambda at: np.full(len(at), float(y.mean()) if len(y) else 0.0)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
    start = float(y.mean() - slope * x.mean())
    if slope <= 0 or start < 0:
        slope, start = float((x * y).sum() / (x * x).sum()), 0.0
    return lambda at: start + slope * at
