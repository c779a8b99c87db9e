"""repeats: where a graph repeats itself, layer after layer, and where to cut it so that its layers are parts.

Nothing is known of layers here: a graph is compared with itself, from one call of an operator of ours to the next. The
cuts then move, all by as many nodes, to where the fewest values cross, and stand best behind a call of ours: what is
called is not fused with what follows, so that nothing is lost by the cut.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

FEWEST = 3
"""Equal parts from which it pays to cut a graph."""
MOST = 6
"""Calls of one operator in a layer at most."""


def cuts(graph: fx.Graph) -> list[int]:
    """Places in `body(graph)` to cut before; none where too little repeats itself."""
    nodes = body(graph)
    calls: dict[Any, list[int]] = {}
    for i, node in enumerate(nodes):
        if _is_ours(node):
            calls.setdefault(node.target, []).append(i)
    best: list[int] = []
    held: list[Any] = []
    for at in calls.values():
        tokens = _tokens(nodes, max((b - a for a, b in pairwise(at)), default=0))
        for every in range(1, MOST + 1):
            for first in range(every):
                run = _longest(tokens, at[first::every])
                if len(run) > FEWEST and (not best or run[-1] - run[0] > best[-1] - best[0]):
                    best, held = run, tokens
    return _best_places(nodes, held, best) if best else []


def body(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that are compiled, in order: all but inputs, outputs, and what reckons with sizes; each of several
    results stands behind the call that gives them."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and not reckons(node):
            found.setdefault(node)
            if isinstance(node.meta.get("val"), (tuple, list)):
                found.update(dict.fromkeys(user for user in node.users if _is_result(user)))
    return list(found)


def reckons(node: fx.Node) -> bool:
    """Whether a node makes a size of sizes: every part that reads one has it for itself."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int)) and node.target in (operator.add, operator.mul)


def _is_result(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tome"


def _tokens(nodes: Sequence[fx.Node], reach: int) -> list[int]:
    """What each node is, wherever it stands: equal for nodes of equal layers. reach: how far off a node is of the same
    layer or the next at most."""
    place = {node: i for i, node in enumerate(nodes)}

    def near(i: int, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return x.op if x not in place else i - place[x] if abs(i - place[x]) <= reach else "far"
        if isinstance(x, (tuple, list)):
            return tuple(near(i, y) for y in x)
        return None if type(x) is int else repr(x)

    def kind(val: Any) -> Any:
        return (val.dtype, val.dim(), val.device) if isinstance(val, Tensor) else type(val)

    def token(i: int, node: fx.Node) -> int:
        args, kwargs = near(i, node.args), near(i, tuple(node.kwargs.items()))
        users = frozenset(near(i, user) for user in node.users)
        return hash((node.op, str(node.target), args, kwargs, users, *map(kind, tree_leaves(node.meta.get("val")))))

    return [token(i, node) for i, node in enumerate(nodes)]


def _longest(tokens: Sequence[int], at: Sequence[int]) -> list[int]:
    """The longest run of places with the same between each and the next."""
    best: list[int] = []
    run: list[int] = []
    for a, b in pairwise(at):
        same = len(run) > 1 and tokens[a:b] == tokens[run[-2] : a]
        run = [*run, b] if same else [a, b]
        best = max(best, run, key=len)
    return best


def _best_places(nodes: Sequence[fx.Node], tokens: Sequence[int], run: Sequence[int]) -> list[int]:
    """The places of a run moved together to where most parts are equal, then the fewest values cross, then behind a
    call of ours."""
    place = {node: i for i, node in enumerate(nodes)}
    last = [max((place[user] for user in node.users if user in place), default=-1) for node in nodes]
    length = run[1] - run[0]

    def score(shift: int) -> Any:
        moved = [at + shift for at in run]
        parts = Counter(tuple(tokens[a:b]) for a, b in pairwise(moved))
        cut = moved[len(run) // 2]
        crossing = sum(at < cut <= end for at, end in enumerate(last))
        return -max(parts.values()), crossing, not _is_ours(nodes[cut - 1]), abs(shift)

    shifts = range(max(1 - length, 1 - run[0]), min(length, len(nodes) - run[-1]))
    best = min((shift for shift in shifts if not any(_is_result(nodes[at + shift]) for at in run)), key=score)
    return [at + best for at in run]
