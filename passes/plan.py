"""plan: from a schedule to merge points, and how far each merge travels.

One abstract walk over the graph carries layouts (which dims are merged, by which step) through the op rules. It
settles for every node the layout each operand must be brought to, so it knows every unmerge and the FLOPs of the
rewritten graph before anything is rewritten. Sites that save less than their matching and gathers cost are dropped and
the walk is done again. It only annotates.

    add_1: [b][n][d]  merged -> [b][n: 197 -> 181][d]      linear, norm, view, ...: follow
    view to [b][h][w][d]: needs n whole -> unmerge on that edge
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tome_fx.config import ToMeConfig
from tome_fx.report import SiteReport, SkipReason, Unmerge
from tome_fx.schedule import gathered, merged_away, to_multiple, tokens_per_block

from .axes import Atom, Dim, count_of, leaves, locate
from .find_attention import AttentionSite, place
from .find_blocks import Block
from .layout import SHORT_AXIS, Layout, Run, Step, plain
from .masks import Room
from .rules import Call, Decision, Facts, find, op_name, tensors_of
from .rules.base import Fill, SignatureRule, fill_of, result_read
from .rules.contraction import Attention
from .rules.joins import SelectRule, SliceRule, SplitRule
from .rules.views import ExpandRule, PermuteRule, ViewRule
from .values import size_hint

aten = torch.ops.aten
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


@dataclass(frozen=True)
class Merge:
    """A merge to carry out right after its node: the dim and run of leaves, the step, and how many tokens go.

    groups: the step whose groups it takes, where it has no matching of its own. even: whether the parts of a window
    give the same number each, else the same share.
    """

    block: Block
    dim: int
    key: tuple[int, int]
    step: Step
    r: int
    groups: Step | None = None
    even: bool = True


@dataclass
class Plan:
    decisions: dict[fx.Node, Decision] = field(default_factory=dict)
    layouts: dict[fx.Node, tuple[Layout, ...]] = field(default_factory=dict)
    merges: dict[fx.Node, Merge] = field(default_factory=dict)
    unread: dict[fx.Node, Merge] = field(default_factory=dict)
    """Merges that were taken out again, as the model reads none of their tokens; decisions still have them."""
    unmerges: list[Unmerge] = field(default_factory=list)
    skipped: list[SkipReason] = field(default_factory=list)
    saved: dict[int, float] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)
    compared: dict[int, float] = field(default_factory=dict)
    site_flops: dict[int, list[float]] = field(default_factory=dict)
    flops_before: float = 0.0
    flops_after: float = 0.0
    r: Any = None
    asked: dict[int, int] = field(default_factory=dict)
    """What the schedule asked of a site, where that is more than it can merge."""

    def losing(self) -> list[int]:
        """The sites that cost more than they save.

        A branch stands for itself. On the stream the schedule is the user's: its merges must pay together, and each of
        them save more FLOPs than comparing its tokens takes.
        """
        chains: dict[int, list[int]] = {}
        for merge in self.merges.values():
            chains.setdefault(merge.step.chain()[0].site, []).append(merge.step.site)
        lost = []
        for sites in chains.values():
            saved, spent = (sum(held.get(site, 0.0) for site in sites) for held in (self.saved, self.spent))
            lost += [site for site in sites if saved <= spent or self.saved.get(site, 0.0) <= self.compared[site]]
        return lost

    @property
    def share(self) -> float:
        return self.flops_after / self.flops_before if self.flops_before else 1.0


def make_plan(
    gm: fx.GraphModule, facts: Facts, calls: dict[fx.Node, Call], blocks: list[Block], config: ToMeConfig
) -> Plan:
    """The plan for a config. Raises ScheduleError where a list of r is longer than the model has blocks."""
    if config.flops is not None:
        r = _r_for(config.flops, lambda r: _profitable(gm, facts, calls, blocks, r, config).share, blocks)
        plan = _profitable(gm, facts, calls, blocks, r, config)
        plan.r, plan.asked = r, {}  # nobody asked for this r
        if plan.share > config.flops:
            plan.skipped.append(
                SkipReason("flops target", "", f"{config.flops} is out of reach; r={r} gives {plan.share:.2f}")
            )
        return plan
    plan = _profitable(gm, facts, calls, blocks, config.schedule, config)
    plan.r = config.schedule
    return plan


def _wanted(schedule: Any, blocks: list[Block], every: int) -> list[int | float]:
    """What a schedule asks of each block, by its turn along its chain; an MLP has the share of its attention."""
    lengths = {block.turn[1] for block in blocks}
    most = max(lengths, default=0)
    if blocks and isinstance(schedule, list):
        tokens_per_block(schedule, most)  # raises where even the longest chain is too short
    by_length = {
        n: gathered(tokens_per_block(schedule[:n] if isinstance(schedule, list) else schedule, n), every)
        for n in lengths
    }
    return [by_length[block.turn[1]][block.turn[0]] for block in blocks]


def _r_for(target: float, share: Any, blocks: list[Block]) -> int:
    """The smallest constant r whose share of FLOPs is at most the target: FLOPs fall as r grows."""
    if not blocks:
        return 0
    low, high = 0, max(size_hint(block.length) // 2 for block in blocks)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= target else (middle + 1, high)
    return low


def _profitable(
    gm: fx.GraphModule,
    facts: Facts,
    calls: dict[fx.Node, Call],
    blocks: list[Block],
    schedule: Any,
    config: ToMeConfig,
) -> Plan:
    """Plan all blocks, drop those that do not pay, and plan again until all pay (placement "auto" only)."""
    active = list(range(len(blocks)))
    wanted = _wanted(schedule, blocks, config.every)
    dropped: list[SkipReason] = []
    device = blocks[0].merge.meta["val"].device.type if blocks else ""
    costs = COSTS.get(device, COSTS[""])
    while True:
        plan = _Walk(gm, facts, calls, blocks, active, wanted, costs, config.multiple).run()
        losing = plan.losing()
        if config.placement != "auto" or not losing:
            plan.skipped = dropped + plan.skipped
            return plan
        # Branches do not depend on each other. Of merges on the stream the worst first: the others may pay without it.
        branches = [site for site in losing if blocks[site].branch]
        for site in branches or [min(losing, key=lambda s: plan.saved.get(s, 0.0) - plan.spent[s])]:
            kind = "MLP does not pay" if blocks[site].mlp else "does not pay"
            spent, saved = plan.spent[site], plan.saved.get(site, 0.0)
            anyway = "branch" if blocks[site].branch else "stream"
            why = f"merging costs as much as {spent:.2g} FLOPs and saves {saved:.2g}"
            why += f'; a larger r may pay, and placement="{anyway}" merges all the same'
            left = plan.site_flops.get(site, [0.0])[0]
            if not blocks[site].branch and left < NO_PRODUCT * _elements_of(blocks[site].merge):
                kind, why = "nothing to save", "no product is computed on its tokens after it"
            dropped.append(SkipReason(kind, blocks[site].name, why))
            active.remove(site)


class _Walk:
    def __init__(
        self,
        gm: fx.GraphModule,
        facts: Facts,
        calls: dict[fx.Node, Call],
        blocks: list[Block],
        active: list[int],
        wanted: list[int | float],
        costs: Costs,
        multiple: int,
    ) -> None:
        self.gm, self.facts, self.calls, self.blocks = gm, facts, calls, blocks
        self.at = {blocks[i].merge: i for i in active if not blocks[i].operands}
        self.inside = {blocks[i].merge: i for i in active if blocks[i].operands}
        self.wanted = wanted
        self.multiple = multiple
        self.owed: dict[int, int] = {}
        self.plan = Plan()
        self.costs = [costs if _width(block, facts) >= NARROW else BY_FLOPS for block in blocks]

    def run(self) -> Plan:
        for node in self.gm.graph.nodes:
            self._visit(node)
            if node in self.at:
                self._merge(node, self.at[node])
        return self.plan

    def _visit(self, node: fx.Node) -> None:
        plan, facts = self.plan, self.facts
        if node.op == "output":
            for source in node.all_input_nodes:
                self._whole(node, source, "is an output of the graph")
            return
        if node.op == "call_function" and node.target is operator.getitem and node.args[0] in plan.layouts:
            at = result_read(node)
            plan.layouts[node] = () if at is None else (plan.layouts[node.args[0]][at],)  # type: ignore[index]
            return
        call = self.calls.get(node)
        if call is None:
            plan.layouts[node] = tuple(plain(len(dims)) for dims in facts.axes[node])
            if node.op == "call_function" and node.target is not aten.sym_size.int:
                for source in node.all_input_nodes:
                    self._whole(node, source, "reads its values")
            return
        ins = [plan.layouts[n][0] for n in call.nodes]
        if node in self.inside:
            ins = self._merge_operands(node, call, ins, self.inside[node])
        rule = find(call)
        if any(any(layout) for layout in ins):
            decision = rule.plan(call, ins, facts)
            self._note_unmerges(node, call, ins, decision)
        else:
            decision = Decision(tuple(ins), tuple(plain(v.dim()) for v in call.results))
        plan.decisions[node] = decision
        plan.layouts[node] = decision.outs
        self._count(call, rule, decision)
        self._count_moves(call, rule, ins, decision)

    def _whole(self, node: fx.Node, source: fx.Node, why: str) -> None:
        for val, layout in zip(tensors_of(source.meta.get("val")), self.plan.layouts.get(source, ()), strict=False):
            if any(layout):
                op = op_name(node) if node.op != "output" else "output"
                self.plan.unmerges.append(Unmerge(op, node.name, place(source), why))
                self._count_move(val, layout, plain(len(layout)), "gather", ())

    def _note_unmerges(self, node: fx.Node, call: Call, ins: list[Layout], decision: Decision) -> None:
        reasons = dict(decision.reasons)
        for i, (have, want) in enumerate(zip(ins, decision.ins, strict=True)):
            kept = [{run.key: run.step.chain() for run in runs} for runs in want]
            if any(run.step not in kept[d].get(run.key, ()) for d, runs in enumerate(have) for run in runs):
                why = reasons.get(i, "its operands were merged apart from each other")
                self.plan.unmerges.append(Unmerge(call.op, node.name, place(node), why))

    # FLOPs.

    def _count(self, call: Call, rule: Any, decision: Decision) -> None:
        """The FLOPs of an op before and after, and what each merge saves of its cost."""
        sites = _sites((*decision.ins, *decision.outs[:1]))
        # The states of the op: unmerged, and with all merges up to each site.
        shapes = self._shapes(call, decision, sites)
        flops = [rule.flops(call, lambda i, d, held=held: held[i][d]) for held in shapes]
        plan, full = self.plan, flops[0]
        if not full and (isinstance(rule, FREE) or not decision.outs):
            return
        elements = [float(prod(held[-1])) for held in shapes]
        for i, site in enumerate(sites):
            touch = self.costs[site].touch
            saved = (flops[i] + touch * elements[i]) - (flops[i + 1] + touch * elements[i + 1])
            plan.saved[site] = plan.saved.get(site, 0.0) + saved
        if not full:
            return
        now = flops[-1]
        plan.flops_before += full
        plan.flops_after += now
        if sites:
            held = plan.site_flops.setdefault(sites[-1], [0.0, 0.0])
            held[0] += full
            held[1] += now
        if isinstance(rule, Attention) and len(call.nodes) < 4:
            keys = _sites([decision.ins[1]])
            for site in keys:  # the one term is there for all of them
                self._spend(site, self.costs[site].masked * now / len(keys))

    @staticmethod
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

    def _spend(self, site: int, cost: float) -> None:
        self.plan.spent[site] = self.plan.spent.get(site, 0.0) + cost

    # What the merges themselves cost.

    def _count_moves(self, call: Call, rule: Any, ins: list[Layout], decision: Decision) -> None:
        """Operands that are merged to meet the others, or given back at full length."""
        if all(have == want for have, want in zip(ins, decision.ins, strict=True)):
            return
        sig = rule.signature(call, self.facts) if isinstance(rule, SignatureRule) else None
        for i, (have, want) in enumerate(zip(ins, decision.ins, strict=True)):
            if have == want:
                continue
            fill = fill_of(sig, call, self.facts, i) if sig is not None else Fill.MEAN
            each = {Fill.BIAS: "bias", Fill.ROW: "gather"}.get(fill, "merge")
            own = {leaf for dim in self.facts.dims(call.nodes[i]) for leaf in leaves(dim)}
            self._count_move(call.vals[i], have, want, each, own)

    def _count_move(self, val: Tensor, have: Layout, want: Layout, each: str, own: Collection[Atom]) -> None:
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
                    self._spend(step.site, self.costs[step.site].gather * elements / len(start[shared:]))
                for step in goal[shared:]:
                    grown = prod(count_of(leaf) for leaf in leaves(step.sample) if own and leaf not in own)
                    share = size_hint(goal[shared].before) / max(size_hint(step.full), 1) / len(goal[shared:])
                    self._spend(step.site, getattr(self.costs[step.site], each) * elements * grown * share)

    # Merging.

    def _merge(self, node: fx.Node, index: int) -> None:
        block = self.blocks[index]
        layout = self.plan.layouts[node][0]
        if block.mlp and any(layout):
            return
        (dim, start), *_ = locate(block.tokens, self.facts.dims(node))
        key = (start, len(block.tokens))
        runs = layout[dim]
        step, r = self._step(block, index, key, runs, self._merged(node, layout))
        if step is None:
            return
        run = Run(*key, step)
        merged = (*(x for x in runs if x.key != key), run)
        self.plan.layouts[node] = ((*layout[:dim], merged, *layout[dim + 1 :]),)
        self.plan.merges[node] = self._made(block, dim, key, step, r)
        self._cost(self.plan.merges[node])

    def _merge_operands(self, node: fx.Node, call: Call, ins: list[Layout], index: int) -> list[Layout]:
        """The operands of one op (queries, keys and values of an attention) as they are once merged."""
        block, dims = self.blocks[index], dict(self.blocks[index].operands)
        if block.mlp and any(any(layout) for layout in ins):
            return ins
        first = next(iter(dims))
        (start, *_) = [at for d, at in locate(block.tokens, self.facts.dims(call.nodes[first])) if d == dims[first]]
        key = (start, len(block.tokens))
        held = [ins[i][d] for i, d in dims.items()]
        if any(runs != held[0] for runs in held):
            self._skip(block, "apart", "its queries, keys and values were merged apart from each other")
            return ins
        around = [found for n, layout in zip(call.nodes, ins, strict=True) for found in self._merged(n, layout)]
        step, r = self._step(block, index, key, held[0], around)
        if step is None:
            return ins
        run = Run(*key, step)
        self.plan.merges[node] = self._made(block, next(iter(dims.values())), key, step, r)
        self._cost(self.plan.merges[node])
        return [
            (*layout[: dims[i]], (run,), *layout[dims[i] + 1 :]) if i in dims else layout
            for i, layout in enumerate(ins)
        ]

    def _merged(self, node: fx.Node, layout: Layout) -> list[tuple[Dim, Step]]:
        """The leaves of a value that are merged, by which step."""
        dims = self.facts.dims(node)
        return [(leaves(dim)[run.start : run.start + run.count], run.step)
                for dim, runs in zip(dims, layout, strict=True) for run in runs]  # fmt: skip

    @staticmethod
    def _clash(block: Block, held: Run | None, around: Sequence[tuple[Dim, Step]]) -> str | None:
        """Why a block's tokens cannot merge where others have merged already."""
        sample, tokens = set(leaves(block.sample)), set(leaves(block.tokens))
        if any(sample & set(merged) or tokens & set(leaves(step.sample)) for merged, step in around):
            return "its tokens, or the samples they would merge within, are merged along another axis"
        if held is None and any(tokens & set(merged) for merged, _ in around):
            return "its token axis is merged together with another"
        if held is not None and leaves(held.step.sample) != leaves(block.sample):
            return "its tokens merged before in samples of another kind (one for all, or in another order)"
        if held is not None and block.parts is not None:
            return "its mask parts tokens that have merged before"
        if held is not None and held.extensive:
            return "the residual stream is a sum over tokens"
        return None

    def _step(
        self, block: Block, index: int, key: tuple[int, int], runs: Sequence[Run], around: Sequence[tuple[Dim, Step]]
    ) -> tuple[Step | None, int]:
        """The step of a block and how many tokens it takes; None, and a reason noted, where there is none.

        around: what is merged of the value that would merge.
        """
        held = next((run for run in runs if run.key == key), None)
        if clash := self._clash(block, held, around):
            self._skip(block, "merged otherwise", clash)
            return None, 0
        before: Any = held.step.after if held is not None else block.length
        prefix, suffix, kept = block.special.prefix, block.special.suffix, block.special.count
        r = self._in_parts(block.room, self.wanted[index]) if block.room else None
        r = merged_away(self.wanted[index], before, kept) if r is None else r
        free = block.length - kept
        most = [min(map(sum, block.room))] if block.room else []
        if isinstance(free, int) and free < SHORT_AXIS:
            most.append(max(before - kept - free // 2, 0))
        if block.special.inner:  # all of them may stand where sources do
            most.append(max((before - prefix - suffix) // 2 - len(block.special.inner), 0))
        if self.multiple > 1 and isinstance(before, int):
            most.append((before - prefix - suffix) // 2)
            r = self._rounded(r, before, min(most), held.step.chain()[0].site if held else index)
        r = min([r, *most])
        if r == 0:
            why = f"{before} tokens left of {block.length}, {kept} protected"
            why += f", counts in multiples of {self.multiple}" * (self.multiple > 1)
            if block.room and most[0] == 0:
                why = "its mask leaves some token no partner"
            self._skip(block, "nothing to merge", why if self.wanted[index] else "its share of the schedule is 0")
            return None, 0
        asked = self.wanted[index]
        asked = int((size_hint(before) - prefix - suffix) * asked) if isinstance(asked, float) else asked
        if self.multiple == 1 and size_hint(r) < asked:
            self.plan.asked[index] = asked
        prev = held.step if held is not None else None
        return Step(index, prev, block.sample, before, before - r, prefix, suffix, block.branch), r

    @staticmethod
    def _in_parts(room: Room, want: int | float) -> int | None:
        """What the parts of every window can give, as each is a sample of its own; None where they share a fraction."""
        if isinstance(want, float):
            return None
        return min(sum(min(want, most) for most in window) for window in room)

    def _made(self, block: Block, dim: int, key: tuple[int, int], step: Step, r: int) -> Merge:
        even = not isinstance(self.wanted[step.site], float)
        return Merge(block, dim, key, step, r, self._groups(block, step, r), even)

    def _groups(self, block: Block, step: Step, r: int) -> Step | None:
        """The step of an MLP's attention, where it merges the same tokens in the same samples, and as many."""
        if not block.alike:
            return None
        tokens = _tokens(block, step, r)
        for merge in self.plan.merges.values():
            own = merge.block.site is block.site and not merge.block.mlp
            if own and _tokens(merge.block, merge.step, merge.r) == tokens:
                return merge.step
        return None

    def _rounded(self, r: int, before: int, most: int, chain: int) -> int:
        """r and what earlier merges of the chain left over, so that a multiple of `multiple` tokens is left."""
        due = r + self.owed.get(chain, 0)
        r = to_multiple(min(due, most), before, self.multiple)
        self.owed[chain] = due - r
        return r

    def _skip(self, block: Block, kind: str, detail: str) -> None:
        self.plan.skipped.append(SkipReason(kind, block.name, detail))

    def _cost(self, merge: Merge) -> None:
        """Matching compares half of the tokens with the other half; merging reads every element once."""
        block, step = merge.block, merge.step
        costs = self.costs[step.site]
        before, full = size_hint(step.before), max(size_hint(step.full), 1)
        value, k = block.stream if block.mlp else block.merge, block.site.k.meta["val"]
        count, width = _elements_of(value), _width(block, self.facts)
        tokens = max(count // width * before // full, 1)
        samples = max(tokens // max(before, 1), 1)
        if block.operands and not block.mlp:  # queries, keys and values
            count = sum(_elements_of(self.calls[block.merge].nodes[i]) for i, _ in block.operands)
        elements = count * before // full
        if merge.groups is not None:
            inner = heads = 0
        elif block.branch and (block.mlp or not block.operands):
            inner = heads = width
        else:
            inner = prod(size_hint(k.shape[d]) for d in block.site.inner_dims)
            heads = _elements_of(block.site.k) * before // full // tokens
        compare = 2.0 * samples * (before / 2) ** 2 * inner
        self._spend(step.site, compare + costs.match * tokens * heads + costs.merge * elements)
        self.plan.compared[step.site] = compare + BY_FLOPS.merge * elements * (1 + step.branch)


def _tokens(block: Block, step: Step, r: int) -> tuple[Any, ...]:
    """What two merges have in common that can have the same groups."""
    return (block.tokens, block.masks, block.parts, block.special, step.prev, step.sample, step.before, r)


def _elements_of(node: fx.Node) -> int:
    return prod(size_hint(size) for size in node.meta["val"].shape)


def _width(block: Block, facts: Facts) -> int:
    """Channels of what a block merges: its elements for each token."""
    value = block.stream if block.mlp else block.merge
    apart = {*leaves(block.sample), *leaves(block.tokens)}
    return prod(count_of(leaf) for dim in facts.dims(value) for leaf in leaves(dim) if leaf not in apart)


def _sites(layouts: Sequence[Layout]) -> list[int]:
    """The sites whose merges these layouts carry, in order."""
    last = {run.step for layout in layouts for runs in layout for run in runs}
    return sorted({step.site for end in last for step in end.chain()})


def _pair(step: Step) -> tuple[int, int]:
    return size_hint(step.before), size_hint(step.after)


def site_reports(
    plan: Plan, blocks: list[Block], sites: list[AttentionSite], skipped: list[SkipReason]
) -> list[SiteReport]:
    """One row per attention site, merged or not."""
    by_site = {m.block.site: m for m in plan.merges.values() if not m.block.mlp}
    mlps = {m.block.site: m for m in plan.merges.values() if m.block.mlp}
    why = {s.where: f"{s.kind}: {s.detail}" for s in (*skipped, *plan.skipped)}
    rows = []
    for site in sites:
        tokens = size_hint(site.q.meta["val"].shape[site.query_dim])
        merge, mlp = by_site.get(site), mlps.get(site)
        flops = [plan.site_flops.get(m.step.site, [0.0, 0.0]) for m in (merge, mlp) if m is not None]
        total = (sum(f[0] for f in flops), sum(f[1] for f in flops))
        pair = _pair(mlp.step) if mlp is not None else None
        if merge is None:
            placement = "mlp" if mlp is not None else "stream"
            rows.append(SiteReport(site.name, (tokens, tokens), 0, mlp is not None, total, why.get(site.name, ""),
                                   placement, pair))  # fmt: skip
            continue
        step = merge.step
        kept, placement = merge.block.special.count, "branch" if step.branch else "stream"
        asked = plan.asked.get(step.site)
        rows.append(SiteReport(site.name, _pair(step), kept, True, total, placement=placement, mlp=pair, asked=asked))
    return rows


__all__ = ["Merge", "Plan", "make_plan", "site_reports"]
