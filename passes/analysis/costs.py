"""costs: what a plan computes, what its merges save of that, and what they cost themselves.

Everything is in FLOPs that a large matrix product does in the same time, per site: what is merged twice pays twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, fx

from ..algebra.axes import Atom, Size, count_of, leaves
from ..algebra.layout import Layout, Step
from ..rules import UNKNOWN, Call, Decision
from ..rules.base import Fill, Rule
from ..rules.contraction import Attention
from ..rules.facts import Facts
from ..rules.signature import SignatureRule, fill_of
from ..rules.slices import SelectRule, SliceRule, SplitRule
from ..rules.views import ExpandRule, PermuteRule, ViewRule
from .blocks import Block
from .sites import no_rule
from .streams import lost
from .values import size_hint

# Rules of ops that compute nothing.
FREE = ViewRule, PermuteRule, ExpandRule, SliceRule, SelectRule, SplitRule


@dataclass(frozen=True)
class Costs:
    """What work on one element costs on a device, in FLOPs that a large matrix product does in the same time.

    match: of the metric, to compare tokens by. merge: of a value, to be averaged. gather: of a value, to be given back
    at full length, or to follow by its representative. bias: of a term of the scores, to be averaged. touch: of the
    result of any op that is no product. masked: the share of an attention's FLOPs that it costs to add log(size).
    """

    match: float
    merge: float
    gather: float
    bias: float
    touch: float
    masked: float


# "cpu": what benchmarks/costs.py measures depends on what the caches hold; these lie between its figures (about half of
# those of a quiet machine, most nearly for "bias") and were held against the time of a windowed model and one with
# tables. "", every other device: from the ratio of a GPU's arithmetic to its memory, not measured.
COSTS = {
    "cpu": Costs(match=100.0, merge=50.0, gather=40.0, bias=400.0, touch=25.0, masked=0.05),
    "": Costs(match=1500.0, merge=800.0, gather=400.0, bias=1600.0, touch=400.0, masked=0.25),
}
# Models with fewer channels are bound by calls, which no figure here counts: what is asked for is done where it saves
# more FLOPs than it costs.
NARROW = 64
# FLOPs an element that sums, norms and pointwise ops take at most: a product of any width takes more.
NO_PRODUCT = 32
BY_FLOPS = Costs(match=0.0, merge=4.0, gather=4.0, bias=4.0, touch=0.0, masked=0.0)

PARTS = {
    "match": "comparing tokens",
    "merge": "averaging them",
    "gather": "giving them back at full length",
    "bias": "averaging the terms of the attention scores",
    "masked": "adding log(size) to the scores",
}
"""What a merge spends its cost on, in words."""


class Bill:
    """The account of one plan. before, after: FLOPs of the graph. at: of the ops that a site's merge is the last to
    reach, before and after. saved, spent: by site, the second by what it is spent on. compared: what a site saves at
    least where it is on the stream. sites: the attentions, of heads that are some of their own the first. stopped: the
    first op without a rule, before which its tokens are given back."""

    def __init__(self, facts: Facts, blocks: Sequence[Block]) -> None:
        device = blocks[0].merge.meta["val"].device.type if blocks else ""
        wide = COSTS.get(device, COSTS[""])
        self.facts, beside = facts, {own.site for block in blocks for own in block.beside}
        self.sites = [site for site in facts.sites if site not in beside]
        self.costs = [wide if width(block, facts) >= NARROW else BY_FLOPS for block in blocks]
        self.before = self.after = 0.0
        self.at: dict[int, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self.saved: dict[int, float] = defaultdict(float)
        self.spent: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.compared: dict[int, float] = {}
        self.stopped: dict[int, Call] = {}

    def total(self, site: int) -> float:
        """All that a site spends."""
        return sum(self.spent[site].values())

    def spends(self, site: int) -> str:
        """What makes up most of what a site spends, in words."""
        part, cost = max(self.spent[site].items(), key=lambda item: item[1])
        return f"{cost / max(self.total(site), 1e-30):.0%} of it for {PARTS[part]}"

    def until(self, block: Block, site: int) -> str:
        """How far the tokens of a block stay merged, where an op without a rule ends that, in words."""
        why = lost(block.site, self.facts) if block.branch else ""
        return f", as {why}" if why else f" up to {no_rule([self.stopped[site]])}" if site in self.stopped else ""

    def op(self, call: Call, rule: Rule, decision: Decision) -> None:
        """The FLOPs of an op before and after, and what each merge saves of its cost."""
        if isinstance(rule, FREE):
            return
        sites = _sites((*decision.ins, *decision.outs[:1]))
        # The states of the op: unmerged, and with all merges up to each site.
        shapes = _shapes(call, decision, sites)
        flops = rule.flops(call, shapes)
        full, now = flops[0], flops[-1]
        if not full and not decision.outs:
            return
        elements = [float(prod(held[-1])) for held in shapes]
        for i, site in enumerate(sites):
            touch = self.costs[site].touch
            self.saved[site] += (flops[i] + touch * elements[i]) - (flops[i + 1] + touch * elements[i + 1])
        self.before += full
        self.after += now
        if sites:
            before, after = self.at[sites[-1]]
            self.at[sites[-1]] = before + full, after + now
        if isinstance(rule, Attention) and len(call.nodes) < 4:
            keys = _sites([decision.ins[1]])
            for site in keys:  # the one term is there for all of them
                self.spent[site]["masked"] += self.costs[site].masked * now / len(keys)

    def moves(self, call: Call, rule: Rule, ins: Sequence[Layout], decision: Decision) -> None:
        """Operands that are merged to meet the others, or given back at full length."""
        if all(have == want for have, want in zip(ins, decision.ins, strict=True)):
            return
        for site in _sites(ins) if rule is UNKNOWN else ():
            self.stopped.setdefault(site, call)
        sig = rule.signature(call, self.facts) if isinstance(rule, SignatureRule) else None
        for i, (have, want) in enumerate(zip(ins, decision.ins, strict=True)):
            if have == want:
                continue
            fill = fill_of(sig, call, self.facts, i) if sig is not None else Fill.MEAN
            each = {Fill.BIAS: "bias", Fill.ROW: "gather"}.get(fill, "merge")
            self.move(call.vals[i], have, want, each, self.facts.leaves_of(call.nodes[i]))

    def move(self, val: Tensor, have: Layout, want: Layout, each: str = "gather", own: Collection[Atom] = ()) -> None:
        """A value brought from one layout to another. each: which of `Costs` an element that is merged has. own: its
        leaves; what lacks a sample axis of a merge is first repeated along it."""
        elements = float(prod(size_hint(size) for size in val.shape))
        for before, after in zip(have, want, strict=True):
            for key in dict.fromkeys(run.key for run in (*before, *after)):
                start, goal = (
                    next((run.step.chain() for run in runs if run.key == key), ()) for runs in (before, after)
                )
                shared = sum(1 for a, b in zip(start, goal, strict=False) if a is b)
                # One call carries a value through all steps: each of them has its share of it.
                for step in start[shared:]:
                    cost = self.costs[step.site].gather * elements / len(start[shared:])
                    self.spent[step.site]["gather"] += cost
                for step in goal[shared:]:
                    grown = prod(count_of(leaf) for leaf in leaves(step.sample) if own and leaf not in own)
                    share = size_hint(goal[shared].before) / max(size_hint(step.full), 1) / len(goal[shared:])
                    self.spent[step.site][each] += getattr(self.costs[step.site], each) * elements * grown * share

    def merge(self, block: Block, step: Step, length: Size, *, compared: float) -> None:
        """Matching compares half of the tokens with the other half, in a branch once the mean of the keys is made;
        merging reads every element once. length: of the tokens that it sees. compared: how many pairs of each
        sample; 0 where the groups are another step's."""
        costs = self.costs[step.site]
        before, full = size_hint(length), max(size_hint(step.full), 1)
        wide = width(block, self.facts)
        count = elements_of(block.stream if block.mlp else block.merge)
        tokens = max(count // wide * before // full, 1)
        samples = max(tokens // max(before, 1), 1)
        if block.operands and not block.mlp:  # queries, keys and values
            count = sum(elements_of(self.facts.calls[block.merge].nodes[i]) for i, _ in block.operands)
        elements = count * before // full
        made, make = [own.projected for own in block.heads if own.projected is not None], 0.0
        if not compared:
            inner = heads = 0
        elif made:
            inner = heads = made[0].width[0]
            make = sum((2.0 * tokens + costs.touch * own.heads[0]) * inner * own.reads for own in made)
        elif block.branch and (block.mlp or not block.operands):
            inner = heads = wide
        else:
            keys = [own.site.k for own in block.heads]
            inner = prod(size_hint(keys[0].node.meta["val"].shape[d]) for d in keys[0].features)
            heads = sum(elements_of(k.node) for k in keys) * before // max(size_hint(block.length), 1) // tokens
        compare = 2.0 * compared * samples * inner + make
        self.spent[step.site]["match"] += compare + costs.match * tokens * heads
        self.spent[step.site]["merge"] += costs.merge * elements
        self.compared[step.site] = compare + BY_FLOPS.merge * elements * (1 + step.branch)


def elements_of(node: fx.Node) -> int:
    return prod(size_hint(size) for size in node.meta["val"].shape)


def width(block: Block, facts: Facts) -> int:
    """Channels of what a block merges: its elements for each token."""
    value = block.stream if block.mlp else block.merge
    apart = {*leaves(block.sample), *leaves(block.tokens)}
    return prod(count_of(leaf) for dim in facts.dims(value) for leaf in leaves(dim) if leaf not in apart)


def _sites(layouts: Sequence[Layout]) -> list[int]:
    """The sites whose merges these layouts carry, in order."""
    last = {run.step for layout in layouts for runs in layout for run in runs}
    return sorted({step.site for end in last for step in end.chain()})


def _shapes(call: Call, decision: Decision, sites: list[int]) -> list[list[list[int]]]:
    """The shapes of all operands and, last, of the first result: unmerged, and with all merges up to each site."""
    whole = [list(map(size_hint, val.shape)) for val in (*call.vals, *call.results[:1])]
    found = [[list(shape) for shape in whole] for _ in (-1, *sites)]
    for i, layout in enumerate((*decision.ins, *decision.outs[:1])):
        for d, runs in enumerate(layout):
            for run in runs:
                chain, before = run.step.chain(), size_hint(run.step.full)
                at, last = {step.site: j for j, step in enumerate(chain)}, -1
                for state, site in enumerate(sites if before else (), 1):
                    last = max(last, at.get(site, -1))
                    if last >= 0:
                        found[state][i][d] = found[state][i][d] // before * size_hint(chain[last].after)
    return found


__all__ = ["COSTS", "NO_PRODUCT", "Bill", "Costs", "elements_of"]
