"""Which values a value is computed from (ancestors, dominators), and what becomes of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import networkx as nx
from torch import fx

from ..algebra.axes import Atom, leaves
from ..rules import Call, find
from ..rules.base import Role
from ..rules.facts import Facts
from ..rules.signature import SignatureRule
from ..rules.views import ExpandRule, PermuteRule, ViewRule


class Reach:
    """Ancestors of every node as bit sets over graph order, dominators on demand."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.nodes = list(facts.graph.nodes)
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


def nearest(start: Iterable[fx.Node], onward: Callable[[Call], Iterable[fx.Node]], facts: Facts) -> Iterator[Call]:
    """The calls from some nodes on, the nearest first, each once. onward: the nodes to go to from one."""
    todo, seen = list(start), set[fx.Node]()
    while todo:
        node = todo.pop(0)
        if node not in seen and node in facts.calls:
            seen.add(node)
            yield facts.calls[node]
            todo += onward(facts.calls[node])


def only_summed(node: fx.Node, tokens: frozenset[Atom], facts: Facts) -> bool:
    """Whether all that reads a value sums over these leaves of its axes, after homogeneous ops at most."""
    return all(user in facts.calls and _sums(facts.calls[user], node, tokens, facts) for user in node.users)


def _sums(call: Call, node: fx.Node, tokens: frozenset[Atom], facts: Facts) -> bool:
    rule = find(call)
    if isinstance(rule, (ViewRule, PermuteRule, ExpandRule)):
        return only_summed(call.node, tokens, facts)
    if not isinstance(rule, SignatureRule):
        return False
    sig = rule.signature(call, facts)
    goes_on = False
    for i, letters in enumerate(sig.ins):
        if call.nodes[i] is not node:
            continue
        roles = {sig.role(x) for x, dim in zip(letters, facts.dims(node), strict=True) if tokens & set(leaves(dim))}
        if roles == {Role.SUM}:
            continue
        if roles != {Role.MAP} or i not in sig.linear or len(sig.outs) != 1 or sig.additive:
            return False
        goes_on = True
    return not goes_on or only_summed(call.node, tokens, facts)


__all__ = ["Reach", "nearest", "only_summed"]
