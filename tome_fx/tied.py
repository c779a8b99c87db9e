"""The merged model with marks on what its merges did, and the unmerged one at full length with tied groups.

From the passes come the *places* of merges (which node, which dim holds the tokens, along which axes samples stand);
from a run of the rewritten graph the groups that its matches found. The tied run knows nothing of layouts, sizes or
rules: it computes the captured graph, and at every merge replaces each token by the mean of its group.

    x_1 = add(x, attention(...))     [2, 197, 384]
    x_1 = tied(x_1)                  [2, 197, 384], each row the mean of its group's rows

Where a value that still differs within a group meets merged tokens (`Join`), the merge averages it; the tied run does
so only at those joins that it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from tome_fx import ops
from tome_fx.config import ToMeConfig
from tome_fx.passes import Result
from tome_fx.passes.algebra.axes import Dim, Dims, leaves
from tome_fx.passes.algebra.layout import Layout, Run, Step
from tome_fx.passes.analysis.masks import KeyMask, token_dims
from tome_fx.passes.building.trace import Traced
from tome_fx.passes.drop_unread import drop_unread
from tome_fx.passes.normal.functional import is_impure
from tome_fx.passes.plan import Merge, Plan
from tome_fx.passes.rewrite import Emitter
from tome_fx.passes.rules import Call, find
from tome_fx.passes.rules.base import Fill
from tome_fx.passes.rules.facts import Facts
from tome_fx.passes.rules.pointwise import MaskRule
from tome_fx.passes.verify import verify

aten = torch.ops.aten
tome = torch.ops.tome


# -- the merged graph --------------------------------------------------------------------------------------------------


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


# -- running graphs ----------------------------------------------------------------------------------------------------

_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex32: torch.complex128, torch.complex64: torch.complex128}  # fmt: skip
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default}  # fmt: skip
# Sizes in the dtype they come in: the operators' own kernels take float32.
_SIZES: dict[Any, Any] = {tome.merge_size.default: ops.merge_size_aten, tome.log_size.default: torch.log}


def _wide(value: Any) -> Any:
    """A tensor or dtype in float64."""
    if isinstance(value, Tensor):
        return value.detach().to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        and node.target not in (*_DROPOUT, aten.native_dropout.default, aten.scaled_dot_product_attention.default)
        and isinstance(node.meta.get("val"), Tensor)
    )


@dataclass(frozen=True)
class Mode:
    """How graphs are run. exact: in float64. rounds: False leaves floats that become whole numbers as they are."""

    exact: bool = True
    rounds: bool = True


ROUND = {aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, aten._to_copy.default}
"""Ops that may make whole numbers of floats."""


def makes_whole(node: fx.Node) -> bool:
    """Whether an op makes whole numbers of floats."""
    whole = node.target in ROUND and (node.target is not aten._to_copy.default
                                      or not node.meta["val"].is_floating_point())  # fmt: skip
    (source, *_) = node.all_input_nodes if whole else (None,)
    return source is not None and source.meta["val"].is_floating_point() and node.meta["val"].dtype is not torch.bool


class _Runner:
    """Runs a graph on real values, by default in float64; each value lives until it was read for the last time."""

    def __init__(self, graph: fx.Graph, mode: Mode, draws: dict[str, Tensor]) -> None:
        self.graph, self.mode, self.exact, self.draws = graph, mode, mode.exact, draws
        self.env: dict[fx.Node, Any] = {}
        self.kept: set[fx.Node] = set()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs, and after them what is written to inputs."""
        left, outputs, written = iter(inputs), [], []
        last = {source: node for node in self.graph.nodes for source in node.all_input_nodes}
        ends: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            ends.setdefault(node, []).append(source)
        for node in (given := self.graph.find_nodes(op="placeholder")):
            value = next(left)
            self.env[node] = _wide(value) if self.exact else value
        for node in given:  # a merge at one of them may read another
            self.env[node] = self.after(node, self.env[node])
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                read = self.operands(node)
                outputs = [read.get(n, self.env[n]) if isinstance(n, fx.Node) else n for n in tree_leaves(node.args[0])]
            elif node.target is aten.copy_.default:
                written.append(self.env[node.args[1]])
            else:
                self.visit(node)
            for source in ends.get(node, ()):
                if source not in self.kept:
                    self.env.pop(source, None)
        self.env.clear()
        return [*outputs, *written]

    def visit(self, node: fx.Node) -> Any:
        """The value of a node, computed with what it needs where that is not there yet."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self.visit(source)
            self.env[node] = self.after(node, self.value(node))
        return self.env[node]

    def value(self, node: fx.Node) -> Any:
        held = self.operands(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: held.get(n, self.env[n]))
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if self.exact:
            args, kwargs, target = map_aggregate(args, _wide), map_aggregate(kwargs, _wide), _SIZES.get(target, target)
        if target in _DROPOUT or (not self.mode.rounds and makes_whole(node)):
            return args[0]
        if target is aten._int_mm.default and not self.mode.rounds:
            target, args = torch.mm, [x.to(torch.float64) for x in args]
        if target is aten.native_dropout.default:
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        if target is aten.scaled_dot_product_attention.default:
            args, kwargs = _without_dropout(args, kwargs)
        out = target(*args, **kwargs)
        return map_aggregate(out, _wide) if self.exact else out

    def operands(self, node: fx.Node) -> dict[fx.Node, Any]:
        """Values that a node is to read in the place of others."""
        return {}

    def after(self, node: fx.Node, value: Any) -> Any:
        """What others read of a node that has this value."""
        return value


def dropped(graph: fx.Graph) -> list[str]:
    """A note where a graph drops values at random."""
    for node in graph.nodes:
        p = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        sdpa = node.target is aten.scaled_dot_product_attention.default and p
        if sdpa or (node.target in _DROPOUT and node.args[1] and node.args[2]):
            return ["the model drops values at random (dropout); here it drops none"]
    return []


def _without_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > 4:
        return (*args[:4], 0.0, *args[5:]), kwargs
    return args, {**kwargs, "dropout_p": 0.0}


class MergedRun(_Runner):
    """groups: assign and keep of each site that merged. pairs: the lowest similarity. values: what was marked."""

    def __init__(self, graph: fx.Graph, mode: Mode) -> None:
        super().__init__(graph, mode, {})
        self.groups: dict[int, dict[str, Tensor]] = {}
        self.pairs: dict[int, float] = {}
        self.values: dict[str, Tensor] = {}

    def after(self, node: fx.Node, value: Any) -> Any:
        for site, name in node.meta.get("tome_groups", ()):
            self.groups.setdefault(site, {})[name] = value
        for site in node.meta.get("tome_pairs", ()):
            self.pairs[site] = value[3].min().item() if value[3].numel() else 1.0
        for name in node.meta.get("tome_value", ()):
            self.values[name] = value
        return value


class PlainRun(_Runner):
    """The original graph, its random numbers as the merged one drew them. draws are of full length."""

    def value(self, node: fx.Node) -> Any:
        if not is_random(node):
            return super().value(node)
        if node.name not in self.draws:
            self.draws[node.name] = super().value(node)
        return self.draws[node.name]


# -- groups at full length ---------------------------------------------------------------------------------------------


class Groups:
    """The groups of merges, of original tokens, and what tying does with them."""

    def __init__(self, result: Result, config: ToMeConfig, merged: MergedRun) -> None:
        self.facts, self.config, self.found = result.facts, config, merged.groups
        self.merges = {merge.step: merge for merge in result.plan.every}
        self._index: dict[Step, Tensor] = {}
        self._lead: dict[Step, Tensor] = {}
        self.masked: dict[Step, Tensor] = {}

    def ran(self, step: Step) -> bool:
        """Whether a merge is in the graph: not where nobody reads what it would make."""
        return all({"assign", "keep"} <= set(self.found.get(s.site, ())) for s in step.chain())

    def index(self, step: Step) -> Tensor:
        """int64 [*sample, N]: the group of each original token."""
        if step not in self._index:
            own = self._own(step)
            self._index[step] = own if step.prev is None else own.gather(-1, self.index(step.prev))
        return self._index[step]

    def _own(self, step: Step) -> Tensor:
        """`assign` of one merge alone, with more or fewer protected tokens at the ends."""
        lo, hi = step.offset
        held = self.found[step.site]["assign"]
        places = self.found[step.site]["keep"].shape[-1]
        held = held[..., max(-lo, 0) : held.shape[-1] - max(-hi, 0)] + lo
        front = torch.arange(max(lo, 0), device=held.device).expand(*held.shape[:-1], -1)
        behind = (torch.arange(max(hi, 0), device=held.device) + places + lo).expand(*held.shape[:-1], -1)
        return torch.cat([front, held, behind], -1)

    def lead(self, step: Step) -> Tensor:
        """int64 [*sample, N']: of each group the original token that stands for it."""
        if step not in self._lead:
            own, (lo, hi) = self.found[step.site]["keep"], step.offset
            before = self.found[step.site]["assign"].shape[-1]
            own = own[..., max(-lo, 0) : own.shape[-1] - max(-hi, 0)] + lo
            front = torch.arange(max(lo, 0), device=own.device).expand(*own.shape[:-1], -1)
            behind = (torch.arange(max(hi, 0), device=own.device) + before + lo).expand(*own.shape[:-1], -1)
            own = torch.cat([front, own, behind], -1)
            self._lead[step] = own if step.prev is None else self.lead(step.prev).gather(-1, own)
        return self._lead[step]

    def count(self, step: Step) -> int:
        return int(self.index(step).max()) + 1

    def weights(self, step: Step) -> Tensor | None:
        """[*sample, N]: what each original token weighs in a mean under the masks of keys of a merge; None: all 1."""
        base = step.base or step
        held, (lo, hi) = self.masked.get(base), map(int, step.offset)
        if held is None:
            return None
        held = held[..., max(-lo, 0) : held.shape[-1] - max(-hi, 0)]
        return torch.nn.functional.pad(held, (max(lo, 0), max(hi, 0)), value=1.0)

    def tied(self, x: Tensor, dims: Dims, d: int, key: tuple[int, int], steps: Sequence[Step], fill: Fill) -> Tensor:
        """x with each token replaced by what its group makes of it."""
        kinds = [self.merges[s.base or s].how.merging for s in steps]
        one_by_one = fill is Fill.MEAN and ("plain" in kinds or len(set(kinds)) > 1)
        for merging, stretch in zip(kinds, [[s] for s in steps] if one_by_one else [steps], strict=False):
            step = stretch[-1]
            flat, back = _flat(x, dims, d, key, step)
            index = self.index(step)
            if fill is Fill.ROW or (fill is Fill.MEAN and merging == "keep"):
                out = _rows(_rows(flat, self.lead(step)), index)
            elif fill is Fill.BIAS:
                out = _rows(_log_mean_exp(flat, index, self.count(step)), index)
            else:
                weight = None if fill is Fill.COUNT else self.weights(stretch[0])
                if fill is Fill.MEAN and merging == "plain":
                    weight = self._row_weights(step)
                out = _rows(_mean(flat, index, weight, self.count(step)), index)
            x = back(out)
        return x

    def _row_weights(self, step: Step) -> Tensor:
        """What each original token weighs in a mean of the rows that meet, one for each group before the merge."""
        seen = self.weights(step)
        index = self.index(step)
        if step.prev is None:
            return torch.ones(index.shape, device=index.device) if seen is None else seen
        index = self.index(step.prev)
        ones = torch.ones(index.shape, dtype=torch.float64, device=index.device)
        sizes = torch.zeros_like(ones).scatter_add(-1, index, ones)
        if seen is not None:
            whole = torch.zeros_like(ones).scatter_add(-1, index, seen.to(ones))
            ones = ops.key_weight(whole > 0.5).to(ones).gather(-1, index)
        return ones / sizes.gather(-1, index)


def _axes(dims: Dims, shape: Sequence[int]) -> list[tuple[int, Any, int]]:
    """(dim, leaf, size) of each leaf of a value, a dim of size 1 as one without a leaf."""
    found: list[tuple[int, Any, int]] = []
    for d, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        own = leaves(dim)
        known = [leaf.size if isinstance(leaf.size, int) else 0 for leaf in own]
        rest = size // prod(n for n in known if n) if own else 1
        found += [(d, leaf, n or rest) for leaf, n in zip(own, known, strict=True)] or [(d, None, size)]
    return found


def _flat(x: Tensor, dims: Dims, d: int, key: tuple[int, int], step: Step) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as [*sample, N, rest], and the way back."""
    axes = _axes(dims, x.shape)
    start, count = key
    mine = [i for i, (e, leaf, _) in enumerate(axes) if e == d and leaf is not None]
    token = mine[start : start + count]
    spots = [next(i for i, axis in enumerate(axes) if axis[1] is leaf) for leaf in leaves(step.sample)]
    rest = [i for i in range(len(axes)) if i not in token and i not in spots]
    order = [*spots, *token, *rest]
    sizes = [size for *_, size in axes]
    moved = x.reshape(sizes).permute(order)
    held = moved.shape
    lead = [sizes[i] for i in spots]
    flat = moved.reshape(*lead, prod(sizes[i] for i in token), prod(sizes[i] for i in rest))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat, lambda y: y.reshape(held).permute(inverse).reshape(x.shape)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _mean(x: Tensor, index: Tensor, weight: Tensor | None, count: int) -> Tensor:
    weight = torch.ones(index.shape, dtype=x.dtype, device=x.device) if weight is None else weight.to(x)
    at = index.unsqueeze(-1).expand_as(x)
    total = x.new_zeros(*x.shape[:-2], count, x.shape[-1]).scatter_add(-2, at, x * weight.unsqueeze(-1))
    return total / weight.new_zeros(*index.shape[:-1], count).scatter_add(-1, index, weight).unsqueeze(-1)


def _log_mean_exp(x: Tensor, index: Tensor, count: int) -> Tensor:
    """A group that is masked out whole stays so, -inf: a query without any key gets zero, not a mean of all values."""
    at = index.unsqueeze(-1).expand_as(x)
    top = x.new_full((*x.shape[:-2], count, x.shape[-1]), -torch.inf).scatter_reduce(-2, at, x, "amax")
    held = top.clamp_min(torch.finfo(x.dtype).min)  # -inf less -inf is no number
    return _mean((x - held.gather(-2, at)).exp(), index, None, count).log() + held


def _widened(x: Tensor, dims: Dims, have: Layout, want: Layout, frame: Dims) -> tuple[Tensor, Dims, Layout, Layout]:
    """x of the rank of the frame, and of full size along sample axes that it lacks."""
    more = len(frame) - len(dims)
    dims, x = (*((),) * more, *dims), x.reshape((1,) * more + x.shape)
    have, want = (*((),) * more, *have), (*((),) * more, *want)
    sample = {leaf for runs in want for run in runs for leaf in leaves(run.step.sample)}
    sample -= {leaf for dim in dims for leaf in leaves(dim)}
    grow = [d for d in range(len(dims)) if not leaves(dims[d]) and sample & set(leaves(frame[d]))]
    sizes = [prod(int(leaf.size) for leaf in leaves(frame[d])) if d in grow else n for d, n in enumerate(x.shape)]
    return x.expand(sizes), tuple(frame[d] if d in grow else dims[d] for d in range(len(dims))), have, want


def given_back(x: Tensor, dims: Dims, shape: Sequence[int], layout: Layout, d: int, run: Run, groups: Groups) -> Tensor:
    """x, merged as `layout` says, with a row for every token along one run."""
    axes = _axes(dims, [int(n) for n in shape])
    merged: list[tuple[int, Any, int]] = []
    for e in range(len(dims)):
        own = [axis for axis in axes if axis[0] == e]
        held = {r.start: r for r in layout[e]}
        at = 0
        while at < len(own):
            if at in held:
                merged.append((e, held[at], groups.count(held[at].step)))
                at += held[at].count
            else:
                merged.append(own[at])
                at += 1
    x = x.reshape([n for *_, n in merged])
    token = next(i for i, axis in enumerate(merged) if axis[1] is run)
    spots = [next(i for i, axis in enumerate(merged) if axis[1] is leaf) for leaf in leaves(run.step.sample)]
    rest = [i for i in range(len(merged)) if i != token and i not in spots]
    order = [*spots, token, *rest]
    y = x.permute(order)
    tail = y.shape[len(spots) + 1 :]
    y = _rows(y.reshape(*y.shape[: len(spots) + 1], prod(tail)), groups.index(run.step))
    y = y.reshape(*y.shape[:-1], *tail)
    return y.permute(sorted(range(len(order)), key=order.__getitem__)).reshape([int(n) for n in shape])


# -- the tied run ------------------------------------------------------------------------------------------------------


class TiedRun(PlainRun):
    """The original graph at full length, tied at every merge, and at those joins that are approximated.

    moved, joined: how far a tie moved a value, by merge and by join. values: what merges left.
    """

    def __init__(
        self, result: Result, mode: Mode, draws: dict[str, Tensor], groups: Groups, joins: Sequence[Join],
        approximated: frozenset[Join] = frozenset(),
    ) -> None:  # fmt: skip
        assert result.captured is not None
        super().__init__(result.captured.gm.graph, mode, draws)
        self.facts, self.plan, self.groups = result.facts, result.plan, groups
        self.approximated = approximated
        self.at: dict[fx.Node, list[Join]] = {}
        for join in joins:
            self.at.setdefault(join.node, []).append(join)
        self.moved: dict[Step, float] = {}
        self.joined: dict[Join, float] = {}
        self.values: dict[str, Tensor] = {}
        masks = [mask.node for merge in self.plan.every for mask in merge.block.masks]
        self.kept = _above(masks)

    def after(self, node: fx.Node, value: Any) -> Any:
        merges = self.plan.merges.get(node, [])
        for merge in merges:
            step = merge.step
            if not merge.block.operands and self.groups.ran(step):
                self._see(merge)
                tied = self.groups.tied(value, self.facts.dims(node), merge.dim, merge.key, [step], Fill.MEAN)
                self.moved[step] = relative(tied, value)
                value = tied
        if merges:
            self.values[node.name] = value
        return value

    def value(self, node: fx.Node) -> Any:
        call = self.facts.calls.get(node)
        held = self._read(node)
        if call is None or not held:
            return super().value(node)
        if isinstance(find(call), MaskRule) and (masked := _masked(call, held, self.env)) is not None:
            return masked
        values = dict(call.args)
        for (name, at), source in call.operands:
            if (name, at, source) in held:
                values[name] = _put(values[name], at, held[name, at, source])
        values = {name: fx.map_arg(value, lambda n: self.env[n]) for name, value in values.items()}
        given = call.target._schema.arguments
        positional = tuple(values[a.name] for a in given if not a.kwarg_only)
        return self.call(node, positional, {a.name: values[a.name] for a in given if a.kwarg_only})

    def operands(self, node: fx.Node) -> dict[fx.Node, Any]:
        """Outputs that are sums over groups, shared out evenly where that is approximated."""
        if node.op != "output":
            return {}
        return {j.source: self._tie(j, self.env[j.source]) for j in self.at.get(node, ()) if j in self.approximated}

    def _read(self, node: fx.Node) -> dict[tuple[str, int | None, fx.Node], Tensor]:
        """The operands of a node that it reads tied, by argument."""
        call, found = self.facts.calls.get(node), {}
        merge = next(iter(self.plan.merges.get(node, [])), None)
        for join in self.at.get(node, ()) if call is not None else ():
            assert call is not None
            merges = is_merge(join, self.plan, self.facts)
            if merge is not None and merges:
                self._see(merge)
            steps = {s for *_, chain, _ in steps_between(join.have, join.want) for s in chain}
            if not (merges or join in self.approximated) or not all(map(self.groups.ran, steps)):
                continue
            for i, ((name, at), source) in enumerate(call.operands):
                if source is join.source and self.plan.decisions[node].ins[i] == join.want:
                    found[name, at, source] = self._tie(join, self.env[source], call, name)
            if merge is not None and merges:
                self.moved[merge.step] = max(self.moved.get(merge.step, 0.0), self.joined.pop(join, 0.0))
        return found

    def _tie(self, join: Join, x: Any, call: Call | None = None, name: str = "") -> Tensor:
        dims, have, want = self.facts.dims(join.source), join.have, join.want
        if x.dtype is torch.bool:
            x = _as_number(x, join.fill, call).to(torch.float64 if self.exact else torch.float32)
        factor = _factor(call, name) if join.fill is Fill.BIAS else 1
        before = x = x * factor
        if join.frame is not None:
            x, dims, have, want = _widened(x, dims, have, want, join.frame)
        for d, key, steps, shared_out in steps_between(have, want):
            x = self.groups.tied(x, dims, d, key, steps, Fill.COUNT if shared_out else join.fill)
        if join.fill is Fill.BIAS:
            self.joined[join] = relative(x.exp(), before.expand_as(x).exp())
        else:
            self.joined[join] = relative(x, before.expand_as(x))
        return x / factor

    def _see(self, merge: Merge) -> None:
        """Find what tokens weigh under the masks of keys of a merge."""
        block, step = merge.block, merge.step
        if block.masks and step not in self.groups.masked:
            held = [
                _weights(self.visit(mask.node), mask, block.tokens, step.sample, self.facts) for mask in block.masks
            ]
            like = self.groups.index(step)
            weight = held[0]
            for other in held[1:]:
                weight = torch.minimum(weight, other)
            self.groups.masked[step] = weight.expand(like.shape)


def is_merge(join: Join, plan: Plan, facts: Facts) -> bool:
    """Whether an operand is what its op's merge merges."""
    inside = [i for merge in plan.merges.get(join.node, []) for i, _ in merge.block.operands]
    return any(facts.calls[join.node].nodes[i] is join.source for i in inside)


def _above(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What these nodes are computed from, themselves included."""
    found, left = set(nodes), list(nodes)
    while left:
        new = [source for source in left.pop().all_input_nodes if source not in found]
        found.update(new)
        left += new
    return found


def _weights(x: Tensor, mask: KeyMask, tokens: Dim, sample: Dim, facts: Facts) -> Tensor:
    """[*sample, N] (length 1 along a sample axis that the mask lacks): 1 for a token that it leaves in, else 2^-40."""
    x = x * mask.scale if x.dtype is not torch.bool else x if mask.scale > 0 else ~x
    dims = facts.dims(mask.node)
    (at,) = token_dims(mask.node, facts, tokens)
    axes = _axes(dims, x.shape)
    own = [i for i, (e, leaf, _) in enumerate(axes) if e == at and leaf in leaves(tokens)]
    spots = [next((i for i, axis in enumerate(axes) if axis[1] is leaf), None) for leaf in leaves(sample)]
    order = [*(i for i in spots if i is not None), *own]
    rest = [i for i in range(len(axes)) if i not in order]
    x = x.reshape([size for *_, size in axes]).permute([*rest, *order])
    x = x[(0,) * len(rest)]
    x = x.reshape(*x.shape[: x.dim() - len(own)], -1)
    for i, spot in enumerate(spots):
        x = x.unsqueeze(i) if spot is None else x
    seen = x if x.dtype is torch.bool else x - x.amax(-1, keepdim=True)
    return ops.key_weight(seen).to(torch.float64)


def _put(value: Any, at: int | None, tensor: Tensor) -> Any:
    return tensor if at is None else [tensor if i == at else item for i, item in enumerate(value)]


def _as_number(mask: Tensor, fill: Fill, call: Call | None) -> Tensor:
    """A bool mask as what it adds to the scores, or, as a factor, what it leaves."""
    if call is not None and (parts := _parts(call)) is not None:
        value, drops = parts
        drop = mask if drops else ~mask
        return torch.where(drop, value, 0.0) if fill is Fill.BIAS else torch.where(drop, 0.0, 1.0)
    return torch.where(mask, 0.0, float("-inf")) if fill is Fill.BIAS else mask


def _parts(call: Call) -> tuple[float, bool] | None:
    parts = MaskRule.parts(call) if isinstance(find(call), MaskRule) else None
    return None if parts is None else (parts[2], parts[3])


def _masked(call: Call, held: Mapping[Any, Tensor], env: Mapping[fx.Node, Any]) -> Tensor | None:
    """masked_fill and where with a tied bool mask: it adds its value, or leaves its share."""
    parts = MaskRule.parts(call)
    if parts is None:
        return None
    x_at, mask_at, value, _ = parts
    (x_name, mask_name) = (call.operands[i][0][0] for i in (x_at, mask_at))
    tied = held.get((mask_name, None, call.nodes[mask_at]))
    if tied is None:
        return None
    x = held.get((x_name, None, call.nodes[x_at]), env[call.nodes[x_at]])
    return x * tied if value == 0 else x + tied


def _factor(call: Call | None, name: str) -> float:
    """How often an operand is in the result of a sum or difference; 1 for all other ops."""
    packet = getattr(call.target, "overloadpacket", None) if call is not None else None
    if call is None or packet not in (aten.add, aten.sub, aten.subtract, aten.rsub):
        return 1
    alpha = call.args.get("alpha", 1)
    if name != ("self" if packet is aten.rsub else "other") or not isinstance(alpha, (int, float)) or not alpha:
        return 1
    return alpha if packet is aten.add else -alpha


def relative(got: Any, want: Any) -> float:
    """Largest |got - want| relative to the largest |want|; inf where they differ in what is not finite."""
    if not isinstance(want, Tensor):
        return 0.0 if got == want else float("inf")
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.to(wide), want.to(wide)
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    difference = torch.where(finite, a - b, 0).abs().amax().item()
    largest = torch.where(finite, b, 0).abs().amax().item()
    return difference / largest if largest else float(difference > 0)


__all__ = ["Groups", "Join", "Marked", "MergedRun", "PlainRun", "TiedRun", "given_back", "is_merge", "is_random",
           "relative", "steps_between"]  # fmt: skip
