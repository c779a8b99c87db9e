"""emit: new nodes in a graph that is rewritten in place, each with its fake value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .trace import OF_THE_VALUE


@dataclass
class Emit:
    """Appends nodes to a graph, each with its fake value and the place in the model of `origin`. known: the values of
    nodes that are made of numbers alone."""

    graph: fx.Graph
    mode: FakeTensorMode
    origin: fx.Node | None = None
    known: Mapping[fx.Node, Tensor] = field(default_factory=dict)

    def before(self, node: fx.Node) -> Any:
        self.origin = node
        return self.graph.inserting_before(node)

    def after(self, node: fx.Node) -> Any:
        self.origin = node
        return self.graph.inserting_after(node)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        concrete = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        if self.origin is not None and self.origin.op == "call_function":
            node.meta = {k: v for k, v in self.origin.meta.items() if k not in OF_THE_VALUE}
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*concrete[0], **concrete[1])
        return node


def drop_dead(graph: fx.Graph, impure: Callable[[fx.Node], bool]) -> None:
    """Erase what nobody reads. (`eliminate_dead_code` lints first, and asks of nodes that are read what they do.)"""
    for node in reversed(graph.nodes):
        if not node.users and not impure(node):
            graph.erase_node(node)


__all__ = ["Emit", "drop_dead"]
