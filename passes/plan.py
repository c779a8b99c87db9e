"""plan: from a schedule to merge points, and how far each merge travels.

One abstract walk over the graph carries layouts (which dims are merged, by which step) through the op rules. It
settles for every node the layout each operand must be brought to, so it knows every unmerge and the FLOPs of the
rewritten graph before anything is rewritten. Sites that save less than their matching and gathers cost
(`analysis/costs.py`) are dropped and the walk is done again. It only annotates.

    add_1: [b][n][d]  merged -> [b][n: 197 -> 181][d]      linear, norm, view, ...: follow
    view to [b][h][w][d]: needs n whole -> unmerge on that edge
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tome_fx.config import ToMeConfig
from tome_fx.methods import How
from tome_fx.report import SkipReason, Unmerge
from tome_fx.schedule import gathered, merged_away, share_of, to_multiple, tokens_per_block

from .algebra.axes import Dim, Size, leaves, locate
from .algebra.layout import SHORT_AXIS, Layout, Part, Run, Step, plain
from .analysis.blocks import Block
from .analysis.costs import NO_PRODUCT, Bill, elements_of
from .analysis.grid import grid_of
from .analysis.partition import Room
from .analysis.sites import place
from .analysis.values import size_hint
from .find_blocks import branch_instead
from .rules import Call, Decision, find, op_name, tensors_of
from .rules.base import result_read
from .rules.facts import Facts

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge to carry out right after its node: the dim and run of leaves, the step, and how many tokens go.

    length: the tokens that it sees, r of which go. pairs: how many are found, more than r where the data say how many
    merge (`How.padded`). groups: the step whose groups it takes, where it has no matching of its own. even: whether the
    parts of a window give the same number each, else the same share. how: its pieces.
    """

    block: Block
    dim: int
    key: tuple[int, int]
    step: Step
    length: Size
    r: int
    pairs: int
    groups: Step | None = None
    even: bool = True
    how: How = field(default_factory=How)

    @property
    def pruned(self) -> Any:
        """How many of the r are dropped, not merged."""
        return _share(self.how.pruned, self.r)


def _share(share: int | float, r: Any) -> Any:
    """So many of r, or such a share of it; r may be symbolic."""
    return min(share, r) if isinstance(share, int) else share_of(r, share)


@dataclass
class Plan:
    """What is settled for every node, and what it costs.

    unread: merges that were taken out again, as the model reads none of their tokens; decisions still have them.
    asked: what the schedule asked of a site, where that is more than it can merge.
    """

    decisions: dict[fx.Node, Decision] = field(default_factory=dict)
    layouts: dict[fx.Node, tuple[Layout, ...]] = field(default_factory=dict)
    merges: dict[fx.Node, list[Merge]] = field(default_factory=dict)
    unread: list[Merge] = field(default_factory=list)
    unmerges: list[Unmerge] = field(default_factory=list)
    skipped: list[SkipReason] = field(default_factory=list)
    bill: Bill = field(default_factory=lambda: Bill(Facts(), ()))
    r: Any = None
    asked: dict[int, int] = field(default_factory=dict)

    @property
    def every(self) -> list[Merge]:
        return [merge for merges in self.merges.values() for merge in merges]

    def chains(self) -> list[list[int]]:
        """The sites whose merges follow each other on one stream."""
        chains: dict[int, list[int]] = {}
        for merge in self.every:
            chains.setdefault(merge.step.chain()[0].site, []).append(merge.step.site)
        return list(chains.values())

    def losing(self) -> list[int]:
        """The sites that cost more than they save.

        A branch stands for itself. On the stream the schedule is the user's: its merges must pay together, and each of
        them save more FLOPs than comparing its tokens takes.
        """
        bill, lost = self.bill, []
        for sites in self.chains():
            pays = sum(bill.saved[site] for site in sites) > sum(map(bill.total, sites))
            lost += [site for site in sites if not pays or bill.saved[site] <= bill.compared[site]]
        return lost

    @property
    def share(self) -> float:
        return self.bill.after / self.bill.before if self.bill.before else 1.0


def make_plan(facts: Facts, blocks: list[Block]) -> Plan:
    """The plan for a config. Raises ScheduleError where a list of r is longer than the model has blocks."""
    config = facts.config
    if config.flops is None:
        plan = _profitable(facts, blocks, config.schedule)
        plan.r = config.schedule
        return plan
    r = _r_for(config.flops, lambda r: _profitable(facts, blocks, r).share, facts, blocks)
    plan = _profitable(facts, blocks, r)
    plan.r, plan.asked = r, {}  # nobody asked for this r
    if plan.share > config.flops:
        why = f"{config.flops} is out of reach; r={r} gives {plan.share:.2f}"
        plan.skipped.append(SkipReason("flops target", "", why))
    return plan


def _wanted(schedule: Any, blocks: list[Block], config: ToMeConfig) -> list[int | float]:
    """What a schedule asks of each block, by its turn along its chain, those that merge at all; an MLP has the share of
    its attention."""
    chosen = {n: config.chosen(n) for n in {block.turn[1] for block in blocks}}
    if blocks and isinstance(schedule, list):
        tokens_per_block(schedule, max(map(len, chosen.values())))  # raises where even the longest chain is too short
    by_length = {}
    for n, merging in chosen.items():
        own = schedule[: len(merging)] if isinstance(schedule, list) else schedule
        asked = gathered(tokens_per_block(own, len(merging)), config.every)
        by_length[n] = dict(zip(merging, asked, strict=True))
    return [by_length[block.turn[1]].get(block.turn[0], 0) for block in blocks]


def _hows(blocks: list[Block], config: ToMeConfig) -> list[How]:
    """The pieces of each block."""
    found = []
    for block in blocks:
        at, n = block.turn
        chosen = config.chosen(n)
        found.append(config.how(chosen.index(at) if at in chosen else 0, len(chosen), (at, n)))
    return found


def _most(facts: Facts, block: Block, how: How, free: Any) -> Any:
    """How many of the `free` tokens that are left of a block may go by its pieces."""
    return how.most(free, block.length - block.special.count, grid_of(facts, block.tokens).sizes)


def _r_for(target: float, share: Callable[[int], float], facts: Facts, blocks: list[Block]) -> int:
    """The smallest constant r whose share of FLOPs is at most the target: FLOPs fall as r grows."""
    if not blocks:
        return 0
    free = [block.length - block.special.count for block in blocks]
    most = [_most(facts, *each) for each in zip(blocks, _hows(blocks, facts.config), free, strict=True)]
    low, high = 0, max(map(size_hint, most))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= target else (middle + 1, high)
    return low


def _profitable(facts: Facts, blocks: list[Block], schedule: Any) -> Plan:
    """Plan all blocks, drop those that do not pay, and plan again until all pay (placement "auto" only). Where the
    stream has nothing to save, a branch may."""
    active, blocks, streams = list(range(len(blocks))), list(blocks), dict[int, SkipReason]()
    wanted, hows = _wanted(schedule, blocks, facts.config), _hows(blocks, facts.config)
    dropped: list[SkipReason] = []
    while True:
        plan = _Walk(facts, blocks, active, wanted, hows).run()
        losing = plan.losing()
        if facts.config.placement != "auto" or not losing:
            unused = facts.config.reuse and not any(m.groups is not None and not m.block.mlp for m in plan.every)
            plan.skipped = dropped + plan.skipped + ([UNUSED] if unused else [])
            return plan
        # Branches do not depend on each other. Of merges on the stream the worst first: the others may pay without it.
        branches = [site for site in losing if blocks[site].branch]
        for site in branches or [min(losing, key=lambda s: plan.bill.saved[s] - plan.bill.total(s))]:
            why = _unpaid(blocks[site], site, plan)
            branch = branch_instead(blocks[site], facts) if why.kind == IDLE else None
            if branch is not None:
                blocks[site], streams[site] = branch, why
            else:
                dropped.append(streams.get(site, why))
                active.remove(site)


def _unpaid(block: Block, site: int, plan: Plan) -> SkipReason:
    """Why a block does not merge that costs more than it saves, itself or with the others of its chain."""
    bill, until = plan.bill, plan.bill.until(block, site)
    if not block.branch and bill.at[site][0] < NO_PRODUCT * elements_of(block.merge):
        return SkipReason(IDLE, block.name, f"no product is computed on its tokens after it{until}")
    anyway = "branch" if block.branch else "stream"
    chain = next(sites for sites in plan.chains() if site in sites)
    alone = bill.saved[site] <= bill.total(site) or len(chain) == 1
    whose = "merging" if alone else f"merging here and at {len(chain) - 1} other places on the same stream"
    spent, saved = (sum(map(of, [site] if alone else chain)) for of in (bill.total, bill.saved.__getitem__))
    why = f"{whose} costs as much as {spent:.2g} FLOPs, {bill.spends(site)}, and saves {saved:.2g}{until}"
    more = "least" if any(merge.how.padded for merge in plan.every) else "r"
    why += f'; a larger {more} may pay, and placement="{anyway}" merges all the same'
    return SkipReason("MLP does not pay" if block.mlp else "does not pay", block.name, why)


class _Walk:
    """One walk over the graph. active: the indices of the blocks that merge. wanted: what is asked of each block. hows:
    its pieces."""

    def __init__(
        self, facts: Facts, blocks: list[Block], active: list[int], wanted: list[int | float], hows: list[How]
    ) -> None:
        self.facts, self.blocks, self.wanted, self.hows = facts, blocks, wanted, hows
        self.at: dict[fx.Node, list[int]] = {}
        for i in active:
            if not blocks[i].operands:
                self.at.setdefault(blocks[i].merge, []).append(i)
        self.inside = {blocks[i].merge: i for i in active if blocks[i].operands}
        self.multiple = facts.config.multiple
        self.owed: dict[int, int] = {}
        self.plan = Plan(bill=Bill(facts, blocks))

    def run(self) -> Plan:
        for node in self.facts.graph.nodes:
            self._visit(node)
            for index in self.at.get(node, ()):
                self._merge(node, index)
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
        call = facts.calls.get(node)
        if call is None:
            plan.layouts[node] = tuple(plain(len(dims)) for dims in facts.axes[node])
            if node.op == "call_function" and node.target is not aten.sym_size.int:
                for source in node.all_input_nodes:
                    self._whole(node, source, "reads its values")
            return
        ins = [plan.layouts[n][0] for n in call.nodes]
        if node in self.inside:
            ins = self._merge_operands(call, ins, self.inside[node])
        rule = find(call)
        if any(any(layout) for layout in ins):
            decision = rule.plan(call, ins, facts)
            self._note_unmerges(call, ins, decision)
        else:
            decision = Decision(tuple(ins), tuple(plain(v.dim()) for v in call.results))
        plan.decisions[node] = decision
        plan.layouts[node] = decision.outs
        plan.bill.op(call, rule, decision)
        plan.bill.moves(call, rule, ins, decision)

    def _whole(self, node: fx.Node, source: fx.Node, why: str) -> None:
        for val, layout in zip(tensors_of(source.meta.get("val")), self.plan.layouts.get(source, ()), strict=False):
            if any(layout):
                op = op_name(node) if node.op != "output" else "output"
                self.plan.unmerges.append(Unmerge(op, node.name, place(source), why))
                self.plan.bill.move(val, layout, plain(len(layout)))

    def _note_unmerges(self, call: Call, ins: list[Layout], decision: Decision) -> None:
        reasons = dict(decision.reasons)
        for i, (have, want) in enumerate(zip(ins, decision.ins, strict=True)):
            kept = [{run.key: run.step.chain() for run in runs} for runs in want]
            if any(run.step not in kept[d].get(run.key, ()) for d, runs in enumerate(have) for run in runs):
                why = reasons.get(i, "its operands were merged apart from each other")
                self.plan.unmerges.append(Unmerge(call.op, call.node.name, place(call.node), why))

    # -- merging -------------------------------------------------------------------------------------------------------

    def _merge(self, node: fx.Node, index: int) -> None:
        block = self.blocks[index]
        layout = self.plan.layouts[node][0]
        if block.mlp and any(layout):
            return
        (dim, start), *_ = locate(block.tokens, self.facts.dims(node))
        key = (start, len(block.tokens))
        runs = layout[dim]
        merge = self._made(index, dim, next((run for run in runs if run.key == key), key), self._merged(node, layout))
        if merge is not None:
            merged = (*(x for x in runs if x.key != key), Run(*key, merge.step))
            self.plan.layouts[node] = ((*layout[:dim], merged, *layout[dim + 1 :]),)
            self._take(node, merge)

    def _merge_operands(self, call: Call, ins: list[Layout], index: int) -> list[Layout]:
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
        merge = self._made(index, dims[first], next((run for run in held[0] if run.key == key), key), around)
        if merge is None:
            return ins
        self._take(call.node, merge)
        run = Run(*key, merge.step)
        return [
            (*layout[: dims[i]], (run,), *layout[dims[i] + 1 :]) if i in dims else layout
            for i, layout in enumerate(ins)
        ]

    def _take(self, node: fx.Node, merge: Merge) -> None:
        self.plan.merges.setdefault(node, []).append(merge)
        compared = merge.how.compares(size_hint(merge.length)) if merge.groups is None else 0
        self.plan.bill.merge(merge.block, merge.step, merge.length, compared=compared)

    def _merged(self, node: fx.Node, layout: Layout) -> list[tuple[Dim, Step]]:
        """The leaves of a value that are merged, by which step."""
        dims = self.facts.dims(node)
        return [(leaves(dim)[run.start : run.start + run.count], run.step)
                for dim, runs in zip(dims, layout, strict=True) for run in runs]  # fmt: skip

    def _made(
        self, index: int, dim: int, held: Run | tuple[int, int], around: Sequence[tuple[Dim, Step]]
    ) -> Merge | None:
        """The merge of a block; None, and a reason noted, where there is none.

        held: the run of its tokens, merged before, or its key. around: what is merged of the value that would merge.
        """
        block, wanted = self.blocks[index], self.wanted[index]
        key, prev = (held.key, held.step) if isinstance(held, Run) else (held, None)
        if clash := _clash(block, held if isinstance(held, Run) else None, around):
            self._skip(block, "merged otherwise", clash)
            return None
        lo, hi = block.around
        part = prev.within(lo, hi) if prev is not None else Part(None, lo, block.length)
        if part is None:
            self._skip(block, "merged otherwise", "some of its tokens merged together with others before")
            return None
        r = self._count(index, part.length, prev)
        if r == 0:
            why = self._why_none(block, part.length) if wanted else self._unasked(block)
            self._skip(block, "nothing to merge", why)
            return None
        special = block.special
        free = size_hint(part.length) - special.prefix - special.suffix
        asked = share_of(free, wanted) if isinstance(wanted, float) else wanted
        if self.multiple == 1 and size_hint(r) < asked:
            self.plan.asked[index] = asked
        before: Any = prev.after if prev is not None else block.length + lo + hi
        prefix = part.start + special.prefix
        suffix = before - part.start - part.length + special.suffix
        ends, how = (lo + special.prefix, hi + special.suffix), self.hows[index]
        goes = _share(how.least, r) if how.padded else r
        step = Step(index, prev, block.sample, before, before - goes, prefix, suffix, ends, block.branch)
        return Merge(block=block, dim=dim, key=key, step=step, length=part.length, r=goes, pairs=r, how=how,
                     groups=self._groups(block, step, r), even=not isinstance(wanted, float))  # fmt: skip

    def _count(self, index: int, before: Any, prev: Step | None) -> Any:
        """How many of `before` tokens a block merges away."""
        block, wanted = self.blocks[index], self.wanted[index]
        kept, ends = block.special.count, block.special.prefix + block.special.suffix
        free = block.length - kept
        limit = _most(self.facts, block, self.hows[index], before - kept)
        if block.room and not isinstance(wanted, float):
            r = _in_parts(block.room, wanted)
        else:
            r = merged_away(wanted, before, kept, limit)
        most = [_least(block.room)] if block.room else []
        if isinstance(free, int) and free < SHORT_AXIS:
            most.append(max(before - kept - free // 2, 0))
        if block.special.inner:  # all of them may stand where sources do
            most.append(max((before - ends) // 2 - len(block.special.inner), 0))
        if self.multiple > 1 and isinstance(before, int):
            most.append(limit if not block.special.inner else (before - ends) // 2)
            r = self._rounded(r, before, min(most), prev.chain()[0].site if prev else index)
        return min([r, *most])

    def _unasked(self, block: Block) -> str:
        config, (at, n) = self.facts.config, block.turn
        return NO_SHARE if at in config.chosen(n) else f"blocks={config.blocks!r} leaves it out"

    def _why_none(self, block: Block, before: Any) -> str:
        if block.room and _least(block.room) == 0:
            return "its mask leaves some token no partner"
        how, free = self.hows[self.blocks.index(block)], block.length - block.special.count
        if _most(self.facts, block, how, free) <= 0:
            sizes = grid_of(self.facts, block.tokens).sizes
            grid = " x ".join(map(str, sizes)) if all(isinstance(n, int) for n in sizes) else "a size that is dynamic"
            return f"{self.facts.config.choices} lets none of its {block.length} tokens go, on a grid of {grid}"
        why = f"{before} tokens left of {block.length}, {block.special.count} protected"
        return why + f", counts in multiples of {self.multiple}" * (self.multiple > 1)

    def _groups(self, block: Block, step: Step, r: int) -> Step | None:
        """The step of an MLP's attention, or of a branch up to `reuse` blocks before, where it merges the same tokens
        in the same samples, and as many."""
        tokens = _tokens(block, step, r)
        for merge in reversed(self.plan.every):
            own = merge.block.site is block.site and block.alike and not merge.block.mlp
            before = not block.mlp and self._serves(merge, block)
            if (own or before) and _tokens(merge.block, merge.step, merge.pairs) == tokens:
                return merge.groups or merge.step
        return None

    def _serves(self, merge: Merge, block: Block) -> bool:
        """Whether the groups that a merge found are near enough to serve a later branch."""
        found = merge.groups is None and not merge.block.mlp and merge.step.branch and block.branch
        apart = block.turn[0] - merge.block.turn[0]
        kinds = [(how.names, how.merging, how.pruned) for how in (merge.how, self.hows[self.blocks.index(block)])]
        alike = kinds[0] == kinds[1] and merge.block.crossed == block.crossed
        return found and alike and not merge.how.padded and 0 < apart <= self.facts.config.reuse

    def _rounded(self, r: int, before: int, most: int, chain: int) -> int:
        """r and what earlier merges of the chain left over, so that a multiple of `multiple` tokens is left."""
        due = r + self.owed.get(chain, 0)
        r = to_multiple(min(due, most), before, self.multiple)
        self.owed[chain] = due - r
        return r

    def _skip(self, block: Block, kind: str, detail: str) -> None:
        self.plan.skipped.append(SkipReason(kind, block.name, detail))


UNUSED = SkipReason("reuse", "", "no branch merges the tokens of one before it, and as many of them")
IDLE = "nothing to save"
NO_SHARE = "its share of the schedule is 0"


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


def _in_parts(room: Room, want: int) -> int:
    """What the parts of every window can give, as each is a sample of its own."""
    return min(sum(min(want, most) for most in window) for window in room)


def _least(room: Room) -> int:
    """How many tokens every window can give."""
    return min(map(sum, room))


def _tokens(block: Block, step: Step, r: int) -> tuple[Any, ...]:
    """What two merges have in common that can have the same groups."""
    return (block.tokens, block.masks, block.parts, block.special, step.prev, step.sample, step.before, r)


__all__ = ["Merge", "Plan", "make_plan"]
