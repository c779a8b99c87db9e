"""The rewritten graph with marks on what is read off, and the joins at which it brings values to other groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tome_fx.config import ToMeConfig
from tome_fx.passes import Result
from tome_fx.passes.algebra.axes import Dims
from tome_fx.passes.algebra.layout import Layout, Step
from tome_fx.passes.building.trace import Traced
from tome_fx.passes.drop_unread import drop_unread
from tome_fx.passes.normal.functional import is_impure
from tome_fx.passes.plan import Merge
from tome_fx.passes.rewrite import Emitter
from tome_fx.passes.rules.base import Fill
from tome_fx.passes.verify import verify
from tome_fx.tied.runs import is_random


@dataclass(frozen=True)
class Join:
    """An operand that is brought to other groups on its way into an op: `source`, from `have` to `want`, where `node`
    reads it. frame: the dims it broadcasts against."""

    node: fx.Node
    source: fx.Node
    fill: Fill
    have: Layout
    want: Layout
    frame: Dims | None = None


class _Noting(Emitter):
    """The rewriter, which also notes where it brings a value to other groups."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.joins: list[Join] = []
        self._now: fx.Node | None = None

    def _value(self, n: fx.Node) -> Any:
        outer, self._now = self._now, n
        try:
            return super()._value(n)
        finally:
            self._now = outer

    def fetch(self, node: fx.Node, want: Layout, fill: Fill = Fill.MEAN, frame: Dims | None = None) -> Traced:
        self._note(node, want, fill, frame)
        return super().fetch(node, want, fill, frame)

    def fetch_as(self, x: Traced, node: fx.Node, want: Layout, fill: Fill, frame: Dims) -> Traced:
        self._note(node, want, fill, frame)
        return super().fetch_as(x, node, want, fill, frame)

    def _note(self, source: fx.Node, want: Layout, fill: Fill, frame: Dims | None) -> None:
        have = self.layout(source)
        if self._now is None:  # an output, or what a matching compares
            if any(run.extensive for runs in have for run in runs):
                (output,) = self.facts.graph.find_nodes(op="output")
                self.joins.append(Join(output, source, fill, have, want, frame))
        elif steps_between(have, want):
            self.joins.append(Join(self._now, source, fill, have, want, frame))


def steps_between(have: Layout, want: Layout) -> list[tuple[int, tuple[int, int], tuple[Step, ...], bool]]:
    """(dim, run, merges to go through, whether a sum over each group is shared out instead) on the way from one layout
    to the other."""
    found = []
    for d, (before, after) in enumerate(zip(have, want, strict=True)):
        for key in dict.fromkeys(run.key for run in (*before, *after)):
            old, new = (next((run for run in runs if run.key == key), None) for runs in (before, after))
            start, goal = (run.step.chain() if run else () for run in (old, new))
            shared = sum(1 for a, b in zip(start, goal, strict=False) if a is b)
            if goal[shared:]:
                found.append((d, key, goal[shared:], False))
            elif old is not None and old.extensive and not (new is not None and new.extensive):
                found.append((d, key, start, True))
    return found


class Marked:
    """The rewritten graph, not lowered to kernels, with marks on what is read off: the groups of each merge, values
    after merges, and random numbers."""

    def __init__(self, result: Result, config: ToMeConfig) -> None:
        captured = result.captured
        assert captured is not None
        # Decisions are of all merges; those that nobody reads fall out again.
        merges: dict[fx.Node, list[Merge]] = {}
        for merge in sorted([*result.plan.every, *result.plan.unread], key=lambda merge: merge.step.site):
            merges.setdefault(merge.block.merge, []).append(merge)
        plan = replace(result.plan, merges=merges)
        emitter = _Noting(captured, result.facts, plan)
        graph = emitter.run_graph()
        for step, held in emitter.steps.held.items():
            if step.base is None:
                for name in ("assign", "keep"):
                    _mark(getattr(held, name).node, "tome_groups", (step.site, name))
                _mark(_match_of(held.assign.node), "tome_pairs", step.site)
        for node, value in emitter.env.items():
            if isinstance(value, Traced) and (node in result.plan.merges or is_random(node)):
                _mark(value.node, "tome_value", node.name)
        graph.eliminate_dead_code(is_impure_node=is_impure)
        self.gm = fx.GraphModule(torch.nn.Module(), graph)
        if config.drop_unread:
            drop_unread(self.gm)
        verify(captured.gm, self.gm)
        self.joins = list(dict.fromkeys(emitter.joins))


def _match_of(assign: fx.Node) -> fx.Node:
    """The matching that an index comes from, which may have seen a part of the tokens."""
    left = [assign]
    while "tome_step" not in left[0].meta:
        left += left.pop(0).all_input_nodes
    return left[0]


def _mark(node: fx.Node, name: str, value: Any) -> None:
    node.meta[name] = (*node.meta.get(name, ()), value)


__all__ = ["Join", "Marked", "steps_between"]
