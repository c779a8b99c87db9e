"""Which values a value is computed from: ancestors and dominators in a graph."""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import fx

from .axes import leaves
from .rules import Facts


class Reach:
    """Ancestors of every node as bit sets over graph order, dominators on demand.

    features: the leaves of all axes that come from a weight.
    """

    def __init__(self, graph: fx.Graph, facts: Facts) -> None:
        self.facts = facts
        self.features = {leaf for dim in facts.channels for leaf in leaves(dim)}
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for source in node.all_input_nodes:
                bits |= self.above[self.index[source]]
            self.above.append(bits)
        self._before: dict[fx.Node, fx.Node] | None = None

    def leads(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether b is computed from a (or is a)."""
        return bool(self.above[self.index[b]] >> self.index[a] & 1)

    def between(self, a: fx.Node, b: fx.Node) -> list[fx.Node]:
        """The nodes computed from a that b is computed from, both included, in graph order."""
        inner = self.nodes[self.index[a] : self.index[b] + 1]
        return [node for node in inner if self.leads(a, node) and self.leads(node, b)]

    def dominators(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that every path from the model's inputs to `node` passes, the nearest (itself) first."""
        if self._before is None:
            # `self.nodes[-1]`, the output, stands in for the one root that all inputs hang from.
            root, constant = self.nodes[-1], self.facts.constant
            graph: Any = nx.DiGraph()
            for n in self.nodes[:-1]:
                if n not in constant:
                    sources = [source for source in n.all_input_nodes if source not in constant]
                    graph.add_edges_from((source, n) for source in sources or [root])
            self._before = dict(nx.immediate_dominators(graph, root)) if root in graph else {}
        found = []
        while node in self._before and node is not self.nodes[-1]:
            found.append(node)
            node = self._before[node]
        return found

    def passages(self, a: fx.Node, b: fx.Node) -> list[fx.Node]:
        """The nodes after a that every path from a to b passes, the nearest to b (itself) first.

        What joins on the way from elsewhere (a condition's scale and gate) does not count.
        """
        inner = self.between(a, b)
        held = set(inner)
        graph: Any = nx.DiGraph()
        graph.add_edges_from((source, n) for n in inner for source in n.all_input_nodes if source in held)
        before = dict(nx.immediate_dominators(graph, a)) if a in graph else {}
        found = []
        while b is not a and b in before:
            found.append(b)
            b = before[b]
        return found


__all__ = ["Reach"]
