"""memory: outputs of a graph that were tensors of their own stay so, though their values are an input's or another's.

`x + 0` is x in normal form; what the caller writes to the one must not reach the other, and what the graph writes to an
input at its end must not reach an output.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..building.emit import Emit

aten = torch.ops.aten


def storage(value: Tensor) -> int:
    """What two tensors have in common that share memory."""
    return value.untyped_storage()._cdata


def _held(node: fx.Node) -> int | None:
    val = node.meta.get("val")
    return storage(val) if isinstance(val, Tensor) and val.layout is torch.strided else None


def _root(node: fx.Node) -> fx.Node:
    """What a value may be a view of."""
    while True:
        made = node.all_input_nodes[0] if node.target is operator.getitem else node
        target = made.target
        if not isinstance(target, torch._ops.OpOverload) or all(r.alias_info is None for r in target._schema.returns):
            return node
        node = made.all_input_nodes[0]


class Outputs:
    """The memory of the outputs, beside that of the inputs, as a graph has them before its values are put elsewhere."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.inputs = {_held(node) for node in graph.find_nodes(op="placeholder")}
        self.before = [_held(node) for node in self._nodes()]

    def _nodes(self) -> list[fx.Node]:
        return [n for n in tree_leaves(self.graph.output_node().args) if isinstance(n, fx.Node)]

    def keep_apart(self, emit: Emit) -> None:
        """Copy the outputs that may share memory now and did not when this was made."""
        taken: dict[fx.Node, int | None] = {}
        copied = []
        for node, was in zip(self._nodes(), self.before, strict=True):
            root = _root(node)
            inside = root.op == "placeholder" and was not in self.inputs
            copied.append(was is not None and (inside or taken.setdefault(root, was) != was))
        left, given = iter(copied), self.graph.find_nodes(op="placeholder")

        def copy(node: fx.Node) -> fx.Node:
            if not next(left):
                return node
            with emit.after(given[-1] if node.op == "placeholder" else node):
                return emit(aten.clone.default, node)

        self.graph.output_node().args = fx.map_arg(self.graph.output_node().args, copy)


__all__ = ["Outputs", "storage"]
