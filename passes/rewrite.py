"""rewrite: the only pass that changes values. It carries out a plan.

It walks the graph once more, and at each node brings the operands to the layout that the plan settled
(merging, unmerging, dividing by size), lets the op's rule emit the op, and after the planned nodes emits a match and
merges the value. Every shape that depended on the token count comes out of the factors of its dims.

    add_1 = add(x, proj)                                 [2, 197, 384]
    assign, keep, moved, similarity = tome.match(k as [2, 197, 12, 64], 16, 1, 0, True)
    size = tome.merge_size(None, assign, keep, moved)    [2, 181]
    x_1    = tome.merge(add_1, None, size, assign, keep, moved)
    ...
    sdpa(q, k, v, attn_mask=tome.log_size(size)[:, None, None, :])

Invariants: placeholders and outputs keep their order, shapes, dtypes and devices; matching carries no gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _make_graph_module  # inside torch.compile it makes no code until some is read

from tome_fx import ops  # noqa: F401 - defines the operators
from tome_fx.config import ToMeConfig

from .axes import Atom, Dim, Dims, leaves, size_of
from .capture import Captured, is_impure
from .find_blocks import PAPERS, Block
from .layout import DimLayout, Layout, Run, Step, is_plain, plain
from .masks import KeyMask, token_dims
from .plan import Merge, Plan
from .reach import only_summed
from .rules import Call, Facts, find
from .rules.base import Fill, tensors_of
from .trace import Builder, Traced, cat

aten = torch.ops.aten
tome = torch.ops.tome


def rewrite(
    captured: Captured,
    facts: Facts,
    calls: dict[fx.Node, Call],
    plan: Plan,
    config: ToMeConfig,
) -> fx.GraphModule:
    """The rewritten graph, with the placeholders of `captured.gm`."""
    graph = Emitter(captured, facts, calls, plan, config).run_graph()
    graph.eliminate_dead_code(is_impure_node=is_impure)
    return _make_graph_module(torch.nn.Module(), graph)


@dataclass(frozen=True)
class StepTensors:
    """What a merge step is at run time: see `tome_fx.ops` for the index form.

    size: float32 [*sample, N'], None where tokens are pruned. before, after: where a mask gives some tokens no weight,
    the weights to average by, float32 [*sample, N] and [*sample, N'].
    """

    assign: Traced
    keep: Traced
    moved: Traced
    size: Traced | None
    before: Traced | None = None
    after: Traced | None = None


class Emitter:
    """Walks the old graph and builds the new one over traced tensors with layouts."""

    def __init__(
        self, captured: Captured, facts: Facts, calls: dict[fx.Node, Call], plan: Plan, config: ToMeConfig
    ) -> None:
        self.source = captured.gm.graph
        self.facts, self.calls, self.plan, self.config = facts, calls, plan, config
        self.builder = Builder(captured.fake_mode)
        self.inputs: dict[fx.Node, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self.steps: dict[Step, StepTensors] = {}
        self._converted: dict[Any, Traced] = {}
        self._log_sizes: dict[Step, Traced] = {}
        self._index: dict[Any, Traced] = {}
        self._composed: dict[tuple[Step, Step], StepTensors] = {}
        self._weights: dict[Any, Traced] = {}
        self._met: dict[Step, tuple[Traced | None, Traced]] = {}

    # -- nodes -----------------------------------------------------------------------------------------------------

    def run_graph(self) -> fx.Graph:
        """The new graph. Its inputs stand first, in their old order, whatever a merge at one of them reads early."""
        for node in self.source.find_nodes(op="placeholder"):
            self.builder.begin(node)
            self.inputs[node] = self.builder.placeholder(node)
        for node in self.source.nodes:
            if node.op == "output":
                self.builder.begin(node)
                self.builder.graph.output(self.builder.arguments(fx.map_arg(node.args[0], self._whole)))
                break
            self._visit(node)
        return self.builder.graph

    def _visit(self, node: fx.Node) -> None:
        """Emit a node, and before it what it needs."""
        if node in self.env:
            return
        for source in node.all_input_nodes:
            self._visit(source)
        self.builder.begin(node)
        merge = self.plan.merges.get(node)
        if merge is not None and merge.block.operands:
            self._match_here(merge, None, ())
        value = self._value(node)
        if merge is not None and not merge.block.operands:
            value = self._merge_here(merge, value)
        self.env[node] = value

    def _value(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.inputs[n]
        if n.op != "call_function":
            raise NotImplementedError(f"{n.op} node {n.name}")
        if n.target is operator.getitem and isinstance(self.env.get(n.args[0]), tuple):  # type: ignore[arg-type]
            return self.env[n.args[0]][n.args[1]]  # type: ignore[index]
        call = self.calls.get(n)
        if call is not None:
            return find(call).emit(call, self, self.plan.decisions[n])
        val = n.meta.get("val")
        if isinstance(val, (int, torch.SymInt)) and (n.target in _OF_A_SHAPE or not _reads_tensors(n)):
            return val  # a size: made anew where it is read
        args, kwargs = fx.map_arg((n.args, n.kwargs), self._whole)
        return self.builder.copy(n.target, args, kwargs, val)

    def _whole(self, n: fx.Node) -> Any:
        value = self.env[n]
        return self.fetch(n, plain(value.dim())) if isinstance(value, Traced) else value

    def run(self, call: Call, operands: Sequence[Traced], **overrides: Any) -> Any:
        """The op of a call with new tensor operands, all other arguments as they were but for `overrides`."""
        values = dict(call.args)
        for ((name, at), _), tensor in zip(call.operands, operands, strict=False):
            if at is None:
                values[name] = tensor
            else:
                items = list(values[name])
                items[at] = tensor
                values[name] = items
        values.update(overrides)
        values = {name: fx.map_arg(value, lambda n: self.env[n]) for name, value in values.items()}
        used = call.given | set(overrides)
        schema = call.target._schema
        positional = [a for a in schema.arguments if not a.kwarg_only]
        last = max((i for i, a in enumerate(positional) if a.name in used), default=-1)
        args = tuple(values[a.name] for a in positional[: last + 1])
        kwargs = {a.name: values[a.name] for a in schema.arguments if a.kwarg_only and a.name in used}
        # What was unmerged may lie in memory otherwise than it did.
        target = aten.reshape.default if call.target is aten.view.default else call.target
        return self.builder.copy(target, args, kwargs, self._result(call))

    def _result(self, call: Call) -> Any:
        """The fake value of an op's results in the layouts that the plan foresees."""
        val, outs = call.node.meta["val"], self.plan.decisions[call.node].outs
        if all(map(is_plain, outs)):
            return val
        shapes = [self._shape(v, dims, out) for v, dims, out in
                  zip(tensors_of(val), self.facts.axes[call.node], outs, strict=True)]  # fmt: skip
        return self.builder.like(val, shapes)

    # -- what rules ask for ----------------------------------------------------------------------------------------

    def tensor(self, node: fx.Node) -> Traced:
        """A node's value in the layout that it has."""
        return self.env[node]

    def layout(self, node: fx.Node) -> Layout:
        return self.plan.layouts[node][0]

    def fetch(self, node: fx.Node, want: Layout, fill: Fill = Fill.MEAN, frame: Dims | None = None) -> Traced:
        """A node's value brought to a layout."""
        have = self.layout(node)
        if have == want:
            return self.env[node]
        if fill is Fill.SHARE and self.config.merging == "mean":
            fill = Fill.MEAN
        key = (node, want, fill, frame)
        if key not in self._converted:
            self._converted[key] = self.convert(self.env[node], self.facts.dims(node), have, want, fill, frame)
        return self._converted[key]

    def weight(self, node: fx.Node, layout: Layout, d: int, run: Run) -> Traced:
        """The sizes of a run's groups, float32, shaped to broadcast against a value of `node` in `layout`."""
        return self._spread(self._size(run.step), self.facts.dims(node), layout, d, run)

    def log_weight(self, node: fx.Node, layout: Layout, d: int, run: Run) -> Traced:
        """The logarithm of `weight`: what proportional attention adds to the scores."""
        size = self._size(run.step)
        if node.meta["val"].dtype is torch.float64:  # sizes are whole numbers in float32, their logarithms are rounded
            log = self.builder.call(aten.log.default, size.to(torch.float64))
            return self._spread(log, self.facts.dims(node), layout, d, run)
        if run.step not in self._log_sizes:
            self._log_sizes[run.step] = self.builder.call(tome.log_size.default, size)
        return self._spread(self._log_sizes[run.step], self.facts.dims(node), layout, d, run)

    def full_size(self, node: fx.Node, d: int) -> Any:
        """The length of a dim before any merge."""
        return node.meta["val"].shape[d]

    def summed(self, node: fx.Node, layout: Layout) -> bool:
        """Whether nothing reads the merged tokens of a value but sums over them."""
        merged = [leaf for dim, runs in zip(self.facts.dims(node), layout, strict=True)
                  for run in runs for leaf in leaves(dim)[run.key[0] : sum(run.key)]]  # fmt: skip
        return bool(merged) and only_summed(node, frozenset(merged), self.calls, self.facts)

    def shape(self, node: fx.Node, layout: Layout) -> list[Any]:
        """The shape of a node's value in a layout, from the factors of its dims."""
        return self._shape(node.meta["val"], self.facts.dims(node), layout)

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _shape(self, value: Tensor, dims: Dims, layout: Layout) -> list[Any]:
        return [
            self._dim_size(leaves(dim), runs) if runs else size
            for dim, runs, size in zip(dims, layout, value.shape, strict=True)
        ]

    def _size_of(self, atoms: Sequence[Atom]) -> Any:
        return self.builder.size(size_of(atoms))

    def _dim_size(self, atoms: Sequence[Atom], runs: DimLayout) -> Any:
        total: Any = 1
        for factor in _factors(atoms, runs):
            total = total * (factor.step.after if isinstance(factor, Run) else self._size_of([factor]))
        return total

    # -- steps -----------------------------------------------------------------------------------------------------

    def _step(self, step: Step) -> StepTensors:
        if step not in self.steps:
            assert step.base is not None, "a step is read before its merge"
            self.steps[step] = _shifted(self._step(step.base), *step.offset)
        return self.steps[step]

    def _size(self, step: Step) -> Traced:
        size = self._step(step).size
        assert size is not None, "pruned tokens have no size"
        return size

    def _stretches(self, steps: Sequence[Step], fill: Fill) -> list[Sequence[Step]]:
        """The steps that a value goes through in one call each: all of them. Means of means are the same means, if
        sizes weigh them."""
        if fill is Fill.MEAN and self.config.merging == "plain":
            return [[step] for step in steps]
        return [steps] if steps else []

    def _rows_met(self, step: Step) -> tuple[Traced | None, Traced]:
        """What each row weighs in a plain mean, and the sums: 1, but nothing where a mask leaves it out."""
        if step not in self._met:
            held, call = self._step(step), self.builder.call
            rows = None
            if held.before is not None:
                rows = call(tome.key_weight.default, call(aten.gt.Scalar, held.before, 0.5))
            first = rows is None and step.prev is None and held.size is not None
            total = held.size if first else call(tome.merge_size.default, rows, held.assign, held.keep, held.moved)
            assert total is not None
            self._met[step] = rows, total
        return self._met[step]

    def _through(self, steps: Sequence[Step]) -> StepTensors:
        """Consecutive steps as one: a value of full length goes through all of them in one call."""
        first, last = self._step(steps[0]), self._step(steps[-1])
        if len(steps) == 1:
            return first
        key = (steps[0], steps[-1])
        if key not in self._composed:
            before, dim = self._through(steps[:-1]), last.assign.dim() - 1
            moved = cat([before.moved, before.keep.gather(dim, last.moved)], -1)
            assign = self._gather_index(steps[-1], steps[0].prev)
            keep = before.keep.gather(dim, last.keep)
            self._composed[key] = StepTensors(assign, keep, moved, last.size, first.before, last.after)
        return self._composed[key]

    def _gather_index(self, step: Step, down_to: Step | None) -> Traced:
        """int64 [*sample, N]: where each token of the state `down_to` (None: unmerged) went, through all steps."""
        key = (step, down_to)
        if key not in self._index:
            own = self._step(step).assign
            if step.prev is down_to:
                self._index[key] = own
            else:
                assert step.prev is not None
                before = self._gather_index(step.prev, down_to)
                self._index[key] = own.gather(own.dim() - 1, before)
        return self._index[key]

    def _merge_here(self, merge: Merge, value: Traced) -> Traced:
        step, node = merge.step, merge.block.merge
        after = self.layout(node)
        have = tuple(
            tuple(Run(*run.key, run.step.prev) for run in runs if run.step is step and run.step.prev)
            + tuple(run for run in runs if run.step is not step)
            for runs in after
        )
        self._match_here(merge, value, have)
        return self.convert(value, self.facts.dims(node), have, after)

    def _match_here(self, merge: Merge, value: Traced | None, have: Layout) -> None:
        """Find the groups of a merge, and their sizes."""
        step = merge.step
        if merge.groups is not None:
            self.steps[step] = self._step(merge.groups)
            return
        before = self._step(step.prev).size if step.prev else None
        metric, heads = self._metric(merge, value, have)
        metric, call, block, config = metric.detach(), self.builder.call, merge.block, self.config
        weight = self._weight(block, step.prev)
        compared_by = () if config.similarity == "cosine" else (config.similarity,)
        if weight is not None:
            kind = call(tome.key_kinds.default, weight)
            metric, heads = call(tome.apart.default, metric, kind, heads, config.padding_first, *compared_by), False
        if block.special.inner:  # they are unlike all others, whatever they hold
            kind = call(tome.place_kinds.default, self._special(block, step.prev))
            metric, heads = call(tome.apart.default, metric, kind, heads, True, *compared_by), False
        how = (merge.r, step.prefix, step.suffix, heads)
        if block.parts is not None:
            parts = self._parts(block, block.parts)
            found = call(tome.match_parts.default, metric, parts, *how, merge.even, *compared_by)
        elif config.pairing == PAPERS:
            found = call(tome.match.default, metric, *how)
        else:
            found = call(tome.match_by.default, metric, *how, *config.pairing)
        assign, keep, moved, similarity = found
        similarity.node.args[0].meta.update(tome_merge=block.name, tome_step=step.site)
        size = call(tome.merge_size.default, before, assign, keep, moved) if config.counts else None
        seen = None
        if weight is not None and config.counts:
            seen = call(tome.merge_size.default, weight, assign, keep, moved)
        if weight is not None and config.merging in ("keep", "prune"):
            keep, moved = call(tome.seen_first.default, weight, assign, keep, moved)
        self.steps[step] = StepTensors(assign, keep, moved, size, weight, seen)

    def _weight(self, block: Block, step: Step | None) -> Traced | None:
        """float32 [*sample, N]: original tokens that the block's masks of keys leave in, in the state `step`."""
        if not block.masks:
            return None
        key = (block.masks, leaves(block.sample), step)
        if key not in self._weights:
            call = self.builder.call
            if step is None:
                held = [call(tome.key_weight.default, self._seen(block, mask)) for mask in block.masks]
                weight = held[0]
                for other in held[1:]:
                    weight = call(aten.minimum.default, weight, other)
            else:
                at, held_before = self._step(step), self._weight(block, step.prev)
                if self.config.counts:
                    weight = call(tome.merge_size.default, held_before, at.assign, at.keep, at.moved)
                else:
                    weight = call(tome.unmerge.default, held_before, at.keep)
            self._weights[key] = weight
        return self._weights[key]

    def _parts(self, block: Block, mask: fx.Node) -> Traced:
        """int64 [*sample, N]: the part of each token that a mask of pairs cuts; a special one is a part of its own."""
        call = self.builder.call
        labels = call(tome.part_labels.default, self._by_sample(block, mask))
        if not block.special.inner:
            return labels
        alone = call(aten.arange.default, block.length, device=labels.device) + block.length
        return call(aten.where.self, self._special(block, None), alone, labels)

    def _special(self, block: Block, step: Step | None) -> Traced:
        """bool [*sample, N]: the tokens between the ends that never merge, in the state `step`."""
        key = (block.special, leaves(block.sample), step)
        if key not in self._weights:
            call, device = self.builder.call, block.merge.meta["val"].device
            if step is None:
                marked = call(tome.places.default, list(block.special.inner), block.length, device=device)
                sizes = [self._size_of([leaf]) for leaf in leaves(block.sample)]
                self._weights[key] = marked.expand([*sizes, block.length])
            else:
                self._weights[key] = call(tome.unmerge.default, self._special(block, step.prev), self._step(step).keep)
        return self._weights[key]

    def _seen(self, block: Block, mask: KeyMask) -> Traced:
        """A mask of keys as [*sample, N]: bool, or float with 0 for the most visible token."""
        x = self._by_sample(block, mask.node)
        if x.dtype is torch.bool:
            return x if mask.scale > 0 else x.logical_not()
        x = x if mask.scale == 1 else self.builder.call(aten.mul.Scalar, x, mask.scale)
        return x - self.builder.call(aten.amax.default, x, [-1], True)

    def _by_sample(self, block: Block, node: fx.Node) -> Traced:
        """A mask as [*sample, N] or, a mask of pairs, [*sample, N, N]. It may stand further on in the old graph."""
        self._visit(node)
        dims, tokens = self.facts.dims(node), leaves(block.tokens)
        x, factors = self._factored(self._whole(node), dims, plain(len(dims)))
        spots = token_dims(node, self.facts, block.tokens)
        sample = [next((i for i, (_, f) in enumerate(factors) if f is leaf), None) for leaf in leaves(block.sample)]
        token = [i for d in spots for i, (e, f) in enumerate(factors) if e == d and f in tokens]
        order = [i for i in sample if i is not None] + token
        rest = [i for i in range(len(factors)) if i not in order]
        x = x.permute([*rest, *order])
        for _ in rest:  # the same everywhere along it
            x = x.select(0, 0)
        lead = len(order) - len(token)
        for _ in spots:
            lead += 1
            x = x.flatten(lead - 1, lead + len(tokens) - 2) if len(tokens) > 1 else x
        sizes = [self._size_of([leaf]) for leaf in leaves(block.sample)]
        for i, at in enumerate(sample):
            x = x.unsqueeze(i) if at is None else x
        return x.expand([*sizes, *x.shape[len(sizes) :]]) if None in sample else x

    def _metric(self, merge: Merge, value: Traced | None, have: Layout) -> tuple[Traced, bool]:
        """What tokens are compared by, and whether it has an axis of heads.

        The keys, queries or values of the block's attention (its queries, where those alone merge), [*sample, N, h, d],
        or the residual stream, in a branch the merged value itself, [*sample, N, d].
        """
        block, prev = merge.block, merge.step.prev
        source, at, inner_dims = self._compared(block)
        by_heads = at is not None
        dims = self.facts.dims(source)
        place = self._standing(dims, at, block.tokens)
        assert place is not None
        dim, key, ends = place
        run = (Run(*key, prev.shift(*ends)),) if prev else ()
        want = tuple(run if d == dim else () for d in range(len(dims)))
        if source is block.merge:
            assert value is not None
            whole = self.convert(value, dims, have, want)
        else:
            whole = self.fetch(source, want)
        if any(ends):
            whole = whole.narrow(dim, ends[0], merge.step.before)
        x, factors = self._factored(whole, dims, want)
        spots = [self._spot(factors, leaf) for leaf in leaves(merge.step.sample)]
        token = self._token_spots(factors, dims, dim, key)
        if by_heads:
            inner = [i for i, (d, _) in enumerate(factors) if d in inner_dims and i not in spots]
        else:
            inner = [i for i in range(len(factors)) if i not in spots and i not in token]
        heads = [i for i in range(len(factors)) if i not in (*spots, *token, *inner)]
        x = x.permute([*spots, *token, *heads, *inner])
        lead, width = len(spots), len(token)
        x = x.flatten(lead, lead + width - 1) if width > 1 else x
        x = x.flatten(lead + 1, lead + len(heads)) if len(heads) > 1 else x
        at = lead + 1 + bool(heads)
        x = x.flatten(at) if len(inner) > 1 else x if inner else x.unsqueeze(-1)
        return x, bool(heads)

    def _compared(self, block: Block) -> tuple[fx.Node, int | None, tuple[int, ...]]:
        """The node that the metric is made of, and of an operand of the attention where tokens and features stand."""
        site, metric = block.site, self.config.metric
        if block.operands and not block.mlp:  # operands of an SDPA
            if not block.crossed and metric in ("query", "value"):
                node, at, inner = site.compared(metric)
                assert node is not None
                return node, at, inner
            rank = block.stream.meta["val"].dim()
            return block.stream, rank - 2, (rank - 1,)
        if not block.branch and metric != "input":
            node, at, inner = site.compared(metric)
            if node is not None and self._holds(node, at, block):
                return node, at, inner
        return block.stream, None, ()

    def _holds(self, node: fx.Node, at: int, block: Block) -> bool:
        """Whether an operand of the attention has the tokens in that dim, and every sample axis."""
        dims = self.facts.dims(node)
        own = {leaf for dim in dims for leaf in leaves(dim)}
        return self._standing(dims, at, block.tokens) is not None and set(leaves(block.sample)) <= own

    def _standing(self, dims: Dims, at: int | None, tokens: Dim) -> tuple[int, tuple[int, int], tuple[int, int]] | None:
        """Where the tokens stand, in dim `at` if it is given: the dim, the run of its leaves that holds them, and how
        many others that run holds before and behind them; None where they do not."""
        tokens = leaves(tokens)
        for d in range(len(dims)) if at is None else (at,):
            for start in _find(leaves(dims[d]), tokens):
                return d, (start, len(tokens)), (0, 0)
        if at is None or len(leaves(dims[at])) != 1:
            return None
        for parts in self.facts.joined(dims[at]):
            if parts.count(tokens) == 1:
                i = parts.index(tokens)
                front, behind = ([size_of(part) for part in others] for others in (parts[:i], parts[i + 1 :]))
                if all(isinstance(size, int) for size in (*front, *behind)):
                    return at, (0, 1), (sum(front), sum(behind))
        return None

    # -- conversions -----------------------------------------------------------------------------------------------

    def convert(
        self, x: Traced, dims: Dims, have: Layout, want: Layout, fill: Fill = Fill.MEAN, frame: Dims | None = None
    ) -> Traced:
        """Bring a tensor with axes `dims` from one layout to another.

        Runs come or go one after the other. A tensor that lacks a sample axis of a run it must get is first expanded
        along `frame`, the dims it broadcasts against.
        """
        if have == want:
            return x
        if frame is not None and not is_plain(want):
            x, dims, have, want = self._widen(x, dims, have, want, frame)
        for d in range(len(dims)):
            for key in dict.fromkeys(run.key for run in (*have[d], *want[d])):
                old = next((run for run in have[d] if run.key == key), None)
                new = next((run for run in want[d] if run.key == key), None)
                if old == new:
                    continue
                summed = old is not None and old.extensive and not (new is not None and new.extensive)
                if old is not None and summed and self.config.counts:
                    x = x / self._spread(self._size(old.step), dims, have, d, old).to(x.dtype)
                x, have = self._move(x, dims, have, d, key, old, new, fill)
        return x

    def _move(
        self,
        x: Traced,
        dims: Dims,
        have: Layout,
        d: int,
        key: tuple[int, int],
        old: Run | None,
        new: Run | None,
        fill: Fill,
    ) -> tuple[Traced, Layout]:
        """Carry one run from the state of `old` to that of `new`: forth by merges, back by one gather."""
        start = old.step.chain() if old else ()
        goal = new.step.chain() if new else ()
        shared = 0
        while shared < min(len(start), len(goal)) and start[shared] is goal[shared]:
            shared += 1
        if len(start) > shared:
            index = self._gather_index(start[-1], start[shared - 1] if shared else None)
            sample = leaves(start[-1].sample)
            x, back = self._canonical(x, dims, have, d, key, sample)
            x = self.builder.call(tome.unmerge.default, x, index)
            have = _with_run(have, d, key, Run(*key, start[shared - 1]) if shared else None)
            x = back(x, have)
        for steps in self._stretches(goal[shared:], fill):
            step, base, held = steps[-1], steps[0].prev, self._through(steps)
            size = self._step(base).size if base else None
            x, back = self._canonical(x, dims, have, d, key, leaves(step.sample))
            counted = held.after is None or fill is Fill.COUNT
            form, merging = (held.assign, held.keep, held.moved), self.config.merging
            if fill is Fill.ROW or merging == "prune" or (fill is Fill.MEAN and merging == "keep"):
                x = self.builder.call(tome.unmerge.default, x, held.keep)
            elif fill is Fill.BIAS:
                x = self.builder.call(tome.merge_bias.default, x, size, held.size, *form)
            else:
                weighed = (size, held.size) if counted else (held.before, held.after)
                if fill is Fill.MEAN and merging == "plain":
                    weighed = self._rows_met(step)
                x = self.builder.call(tome.merge.default, x, *weighed, *form)
            have = _with_run(have, d, key, Run(*key, step))
            x = back(x, have)
        return x, _with_run(have, d, key, new)

    def _widen(
        self, x: Traced, dims: Dims, have: Layout, want: Layout, frame: Dims
    ) -> tuple[Traced, Dims, Layout, Layout]:
        """Give x the rank of the frame, and full size along the frame's dims that hold sample axes it lacks."""
        lead = len(frame) - len(dims)
        dims, have, want = (*([()] * lead), *dims), (*plain(lead), *have), (*plain(lead), *want)
        x = x.reshape([*([1] * lead), *x.shape]) if lead else x
        sample = {leaf for runs in want for run in runs for leaf in leaves(run.step.sample)}
        own = {leaf for dim in dims for leaf in leaves(dim)}
        grow = [d for d in range(len(dims)) if not leaves(dims[d]) and (sample - own) & set(leaves(frame[d]))]
        if grow:
            x = x.expand([self._size_of(leaves(frame[d])) if d in grow else -1 for d in range(len(dims))])
            dims = tuple(frame[d] if d in grow else dims[d] for d in range(len(dims)))
        return x, dims, have, want

    def _factored(self, x: Traced, dims: Dims, layout: Layout) -> tuple[Traced, list[tuple[int, Any]]]:
        """One axis per factor (leaf or run); a size-1 dim keeps its axis, with factor None."""
        factors: list[tuple[int, Any]] = []
        shape: list[Any] = []
        for d, (dim, runs) in enumerate(zip(dims, layout, strict=True)):
            own = _factors(leaves(dim), runs) or [None]
            factors += [(d, f) for f in own]
            if len(own) == 1:
                shape.append(x.shape[d])
            else:
                shape += [f.step.after if isinstance(f, Run) else self._size_of([f]) for f in own]
        return (x.reshape(shape) if len(shape) != x.dim() else x), factors

    @staticmethod
    def _spot(factors: list[tuple[int, Any]], leaf: Atom) -> int:
        return next(i for i, (_, f) in enumerate(factors) if f is leaf)

    def _canonical(
        self, x: Traced, dims: Dims, layout: Layout, d: int, key: tuple[int, int], sample: Sequence[Atom]
    ) -> tuple[Traced, Any]:
        """x as [*sample, tokens, *rest] and the way back, given the layout afterwards."""
        y, factors = self._factored(x, dims, layout)
        spots = [self._spot(factors, leaf) for leaf in sample]
        token = self._token_spots(factors, dims, d, key)
        rest = [i for i in range(len(factors)) if i not in spots and i not in token]
        order = [*spots, *token, *rest]
        y = y.permute(order) if order != sorted(order) else y
        lead = len(spots)
        if len(token) > 1:
            y = y.flatten(lead, lead + len(token) - 1)
        # After the op the tokens are one axis, wherever they stood.
        joined = [i for i in range(len(factors)) if i not in token[1:]]
        slot = {i: k for k, i in enumerate([*spots, token[0], *rest])}
        inverse = [slot[i] for i in joined]

        def back(z: Traced, after: Layout) -> Traced:
            z = z.permute(inverse) if inverse != sorted(inverse) else z
            if [factors[i][0] for i in joined] == list(range(len(dims))):
                return z
            sizes = [self._dim_size(leaves(dim), runs) for dim, runs in zip(dims, after, strict=True)]
            return z.reshape(sizes)

        return y, back

    @staticmethod
    def _token_spots(factors: list[tuple[int, Any]], dims: Dims, d: int, key: tuple[int, int]) -> list[int]:
        """The axes of the run `key` of dim d: one when merged, one per leaf when not."""
        start, count = key
        spots, position = [], 0
        for i, (dim, f) in enumerate(factors):
            if dim != d:
                continue
            width = f.count if isinstance(f, Run) else 1
            if position >= start and position + width <= start + count:
                spots.append(i)
            position += width
        return spots

    def _spread(self, size: Traced, dims: Dims, layout: Layout, d: int, run: Run) -> Traced:
        """[*sample, n] shaped to broadcast against a value with axes `dims`: 1 wherever it does not vary."""
        sample = list(leaves(run.step.sample))
        held: dict[Any, int] = {leaf: i for i, leaf in enumerate(sample)}
        order: list[int] = []
        grown: list[Any] = []
        final: list[Any] = []
        expand: list[Any] = []
        for e, (dim, runs) in enumerate(zip(dims, layout, strict=True)):
            own = _factors(leaves(dim), runs)
            mine = [f for f in own if f in held or (e == d and isinstance(f, Run) and f.key == run.key)]
            for f in own if mine else []:
                source = len(sample) if isinstance(f, Run) and f in mine else held.get(f, -1)
                length = f.step.after if isinstance(f, Run) else self._size_of([f])
                if source >= 0:
                    order.append(source)
                    grown.append(length)
                else:
                    grown.append(1)
                expand.append(length)
            if not mine:
                grown.append(1)
                expand.append(1)
            final.append(self._dim_size(leaves(dim), runs) if mine else 1)
        size = size.permute(order) if order != sorted(order) else size
        size = size.reshape(grown)
        if len(grown) == len(final):
            return size
        return size.expand(expand).reshape(final)


_OF_A_SHAPE = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}


def _reads_tensors(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)


def _find(have: Sequence[Atom], want: Sequence[Atom]) -> list[int]:
    return [i for i in range(len(have) - len(want) + 1) if tuple(have[i : i + len(want)]) == tuple(want)]


def _factors(atoms: Sequence[Atom], runs: DimLayout) -> list[Any]:
    """The leaves of a dim with each run in place of the leaves it merged."""
    out: list[Any] = []
    at = 0
    starts = {run.start: run for run in runs}
    while at < len(atoms):
        if at in starts:
            out.append(starts[at])
            at += starts[at].count
        else:
            out.append(atoms[at])
            at += 1
    return out


def _with_run(layout: Layout, d: int, key: tuple[int, int], run: Run | None) -> Layout:
    runs = tuple(r for r in layout[d] if r.key != key) + ((run,) if run else ())
    return (*layout[:d], runs, *layout[d + 1 :])


def _shifted(held: StepTensors, lo: int, hi: int) -> StepTensors:
    """The same merge on an axis with `lo` more protected tokens in front and `hi` more behind (negative: fewer)."""
    assign, keep, moved = held.assign, held.keep, held.moved
    if lo < 0 or hi < 0:
        front, back = max(-lo, 0), max(-hi, 0)
        assign = assign.narrow(-1, front, assign.shape[-1] - front - back) - front
        keep = keep.narrow(-1, front, keep.shape[-1] - front - back) - front
        moved = moved - front
    if lo > 0 or hi > 0:
        front, back = max(lo, 0), max(hi, 0)
        assign, keep = (
            _padded(x, front, back, length) for x, length in ((assign, keep.shape[-1]), (keep, assign.shape[-1]))
        )
        moved = moved + front

    def grown(size: Traced | None) -> Any:
        if size is not None and (lo < 0 or hi < 0):
            size = size.narrow(-1, max(-lo, 0), size.shape[-1] - max(-lo, 0) - max(-hi, 0))
        return size if size is None or (lo <= 0 and hi <= 0) else size.pad((max(lo, 0), max(hi, 0)), 1.0)

    return StepTensors(assign, keep, moved, grown(held.size), grown(held.before), grown(held.after))


def _padded(index: Traced, front: int, back: int, length: Any) -> Traced:
    """An index into `length` places, with places that map to themselves put before and behind."""
    call, lead = index.builder.call, index.shape[:-1]
    front_part = call(aten.arange.default, front, device=index.device).expand([*lead, front])
    back_part = call(aten.arange.default, back, device=index.device).expand([*lead, back]) + (length + front)
    return cat([front_part, index + front, back_part], -1)


__all__ = ["Emitter", "rewrite"]
