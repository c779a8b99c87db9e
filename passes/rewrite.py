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

Invariants: placeholders and outputs keep their order, shapes, dtypes and devices, outputs the order of their dims in
memory; matching carries no gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _make_graph_module  # inside torch.compile it makes no code until some is read

from .algebra.axes import Dims, leaves
from .algebra.layout import Layout, Run, is_plain, plain
from .analysis.reach import only_summed
from .building.emit import drop_dead
from .building.trace import Builder, Traced, in_order
from .capture import Captured
from .merging.groups import Groups
from .merging.kept import Kept
from .merging.laid import Laid, dim_size, spread
from .merging.steps import Steps
from .normal.functional import is_impure
from .plan import Merge, Plan
from .rules import Call, find
from .rules.base import Fill, tensors_of
from .rules.facts import Facts

aten = torch.ops.aten


def rewrite(captured: Captured, facts: Facts, plan: Plan, kept: bool = False) -> fx.GraphModule:
    """The rewritten graph, with the placeholders of `captured.gm`. kept: its outputs stay merged, and after them stands
    what their rows stand for (`Kept.told`)."""
    graph = Emitter(captured, facts, plan).run_graph(kept)
    drop_dead(graph, is_impure)
    return _make_graph_module(torch.nn.Module(), graph)


class Emitter:
    """Walks the old graph and builds the new one over traced tensors with layouts."""

    def __init__(self, captured: Captured, facts: Facts, plan: Plan) -> None:
        self.facts, self.plan, self.config = facts, plan, facts.config
        self.builder = Builder(captured.fake_mode)
        self.steps = Steps(self.builder, self.config)
        self.groups = Groups(self)
        self.inputs: dict[fx.Node, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self._converted: dict[Any, Traced] = {}
        self._ordered: dict[fx.Node, Traced] = {}

    # -- nodes -----------------------------------------------------------------------------------------------------

    def run_graph(self, kept: bool = False) -> fx.Graph:
        """The new graph. Its inputs stand first, in their old order, whatever a merge at one of them reads early."""
        for node in self.facts.graph.find_nodes(op="placeholder"):
            self.builder.begin(node)
            self.inputs[node] = self.builder.placeholder(node)
        for node in self.facts.graph.nodes:
            if node.op == "output":
                self.builder.begin(node)
                outputs = Kept(self)
                found = fx.map_arg(node.args[0], outputs.value if kept else self._in_order)
                found = [*found, *outputs.told()] if kept else found
                self.builder.graph.output(self.builder.arguments(found))
                break
            self.visit(node)
        return self.builder.graph

    def visit(self, node: fx.Node) -> None:
        """Emit a node, and before it what it needs."""
        if node in self.env:
            return
        for source in node.all_input_nodes:
            self.visit(source)
        self.builder.begin(node)
        merges = self.plan.merges.get(node, [])
        inside = [merge for merge in merges if merge.block.operands]
        for merge in inside:
            self.groups.find(merge, None)
        value = self._value(node)
        if merges and not inside:
            value = self._merge_here(node, merges, value)
        self.env[node] = value

    def _value(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.inputs[n]
        if n.op != "call_function":
            raise NotImplementedError(f"{n.op} node {n.name}")
        if n.target is operator.getitem and isinstance(self.env.get(n.args[0]), tuple):  # type: ignore[arg-type]
            return self.env[n.args[0]][n.args[1]]  # type: ignore[index]
        call = self.facts.calls.get(n)
        if call is not None:
            return find(call).emit(call, self, self.plan.decisions[n])
        val = n.meta.get("val")
        if isinstance(val, (int, torch.SymInt)) and (n.target in _OF_A_SHAPE or not _reads_tensors(n)):
            return val  # a size: made anew where it is read
        args, kwargs = fx.map_arg((n.args, n.kwargs), self._in_order if _opaque(n.target) else self.whole)
        return self.builder.copy(n.target, args, kwargs, val)

    def whole(self, n: fx.Node) -> Any:
        """A node's value at full length."""
        value = self.env[n]
        return self.fetch(n, plain(value.dim())) if isinstance(value, Traced) else value

    def _in_order(self, n: fx.Node) -> Any:
        """A node's value at full length, lying in memory as it did: what was unmerged may not, and who reads it from
        here on (the caller's `view`, a kernel) may count on it."""
        value = self.whole(n)
        if n.op == "placeholder" or not isinstance(value, Traced):
            return value
        if n not in self._ordered:
            self._ordered[n] = in_order(value, n.meta["val"])
        return self._ordered[n]

    def _merge_here(self, node: fx.Node, merges: Sequence[Merge], value: Traced) -> Traced:
        first, last, after = merges[0].step.prev, merges[-1].step, self.layout(node)
        have = tuple(
            tuple(Run(*run.key, first) for run in runs if run.step is last and first)
            + tuple(run for run in runs if run.step is not last)
            for runs in after
        )
        laid = Laid(value, self.facts.dims(node), have)
        for merge in merges:
            self.groups.find(merge, laid)
        return self.steps.convert(laid, after, Fill.TOKENS)

    def run(self, call: Call, operands: Sequence[Traced], **overrides: Any) -> Any:
        """The op of a call with new tensor operands, all other arguments as they were but for `overrides`."""
        values = dict(call.args)
        if _opaque(call.target):
            operands = [in_order(x, n.meta["val"]) for x, n in zip(operands, call.nodes, strict=False)]
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

    def _shape(self, value: Tensor, dims: Dims, layout: Layout) -> list[Any]:
        return [
            dim_size(self.builder, dim, runs) if runs else size
            for dim, runs, size in zip(dims, layout, value.shape, strict=True)
        ]

    # -- what rules ask for ----------------------------------------------------------------------------------------

    def tensor(self, node: fx.Node) -> Traced:
        """A node's value in the layout that it has."""
        return self.env[node]

    def layout(self, node: fx.Node) -> Layout:
        return self.plan.layouts[node][0]

    def fetch(self, node: fx.Node, want: Layout, fill: Fill = Fill.MEAN, frame: Dims | None = None) -> Traced:
        """A node's value brought to a layout. What lacks a sample axis of a run it must get is first expanded along
        `frame`, the dims it broadcasts against."""
        if self.layout(node) == want:
            return self.env[node]
        if fill is Fill.SHARE and self.config.merging == "mean":
            fill = Fill.MEAN
        key = (node, want, fill, frame)
        if key not in self._converted:
            self._converted[key] = self.steps.convert(self._laid(node), want, fill, frame)
        return self._converted[key]

    def fetch_as(self, x: Traced, node: fx.Node, want: Layout, fill: Fill, frame: Dims) -> Traced:
        """As `fetch`, of what stands in the place of a node's value."""
        return self.steps.convert(Laid(x, self.facts.dims(node), self.layout(node)), want, fill, frame)

    def _laid(self, node: fx.Node) -> Laid:
        return Laid(self.env[node], self.facts.dims(node), self.layout(node))

    def weight(self, node: fx.Node, layout: Layout, d: int, run: Run) -> Traced:
        """The sizes of a run's groups, float32, shaped to broadcast against a value of `node` in `layout`."""
        return spread(self.steps.size(run.step), self.facts.dims(node), layout, d, run)

    def log_weight(self, node: fx.Node, layout: Layout, d: int, run: Run) -> Traced:
        """The logarithm of `weight`: what proportional attention adds to the scores."""
        size = self.steps.log_size(run.step, node.meta["val"].dtype)
        return spread(size, self.facts.dims(node), layout, d, run)

    def full_size(self, node: fx.Node, d: int) -> Any:
        """The length of a dim before any merge."""
        return node.meta["val"].shape[d]

    def summed(self, node: fx.Node, layout: Layout) -> bool:
        """Whether nothing reads the merged tokens of a value but sums over them."""
        merged = [leaf for dim, runs in zip(self.facts.dims(node), layout, strict=True)
                  for run in runs for leaf in leaves(dim)[run.key[0] : sum(run.key)]]  # fmt: skip
        return bool(merged) and only_summed(node, frozenset(merged), self.facts)

    def shape(self, node: fx.Node, layout: Layout) -> list[Any]:
        """The shape of a node's value in a layout, from the factors of its dims."""
        return self._shape(node.meta["val"], self.facts.dims(node), layout)


_OF_A_SHAPE = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}


def _opaque(target: Any) -> bool:
    """Whether an operator may read memory as it lies: one that is none of torch's, or that gives the same bytes."""
    if target in (aten.view_as_complex.default, aten.view.dtype):
        return True
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims", "tome")


def _reads_tensors(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)


__all__ = ["Emitter", "rewrite"]
