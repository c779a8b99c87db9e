"""values: what constants are while compiling, and what a mask says by its value.

A constant of the graph is made of numbers, buffers and parameters. Its value decides what it does to attention scores,
whatever it was spelled with: an entry that rules a pair of tokens out is no number to be averaged. Buffers and
parameters have the values of compile time; sizes that are symbols have those that they were traced with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.value_ranges import bound_sympy

from ..rules.base import draws, sources

LARGEST = 2**26
"""Elements of a constant that is computed."""
KEPT = 2**18
"""Elements of a value that is kept for what is made of it."""
LEFT_OUT = -1e4
"""A term of the scores this low leaves a key out."""
GAP = 50.0
"""Two levels this far apart are seen and not seen: exp(-50) is nothing beside 1."""
NEAR = 16.0
"""No entry this near to its row's largest is left out: exp(-16) is a number in every dtype."""


def size_hint(size: Any) -> int:
    """A size as a number: a symbolic one by the value it was traced with, one that only values tell (nonzero) by its
    least."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    node: Any = size.node
    if node.hint is not None:
        return int(node.hint)
    return int(max(bound_sympy(node.expr, node.shape_env.var_to_range).lower, 0))


class Values:
    """The values of constants. held: those that the model has (buffers, parameters). constant: the nodes that depend on
    no input."""

    def __init__(self, held: Mapping[fx.Node, Tensor], constant: set[fx.Node]) -> None:
        self.constant = constant
        self.known: dict[fx.Node, Any] = dict(held)
        self.unknown: set[fx.Node] = set()

    def of(self, root: fx.Node) -> Tensor | None:
        """The value of a node; None where an input, a random op or a tensor without a value goes into it, or where it
        is too large to be computed."""
        if root in self.known:
            return self.known[root]
        order = self._above(root)
        if order is None:
            self.unknown.add(root)
            return None
        held: dict[fx.Node, Any] = {}
        with _disable_current_modes(), torch.no_grad():
            for node in order:
                held[node] = self.known[node] if node in self.known else _run(node, held)
                if node is root or not isinstance(held[node], Tensor) or held[node].numel() <= KEPT:
                    self.known[node] = held[node]
        return held[root]

    def _above(self, root: fx.Node) -> list[fx.Node] | None:
        """What must be computed for a node, in order, with it; None where some of it cannot be."""
        found, todo = set[fx.Node](), [root]
        while todo:
            node = todo.pop()
            if node in found:
                continue
            if node in self.unknown or not (node in self.known or _is_size(node) or self._pure(node)):
                return None
            found.add(node)
            todo += [] if node in self.known or _is_size(node) else sources(node, node.all_input_nodes)
        return sorted(found)

    def _pure(self, node: fx.Node) -> bool:
        target = cast(Any, node.target)
        if node.op != "call_function" or node not in self.constant:
            return False
        if isinstance(target, torch._ops.OpOverload) and not gives_one_value(target):
            return False
        held = node.meta.get("val")
        tensors = [v for v in (held if isinstance(held, (tuple, list)) else [held]) if isinstance(v, Tensor)]
        return all(not v.is_meta and _elements(v) <= LARGEST for v in tensors)


def gives_one_value(target: torch._ops.OpOverload) -> bool:
    """Whether an op gives the same for the same operands, and writes to none."""
    random = draws(target) or "empty" in target._schema.name
    return not random and not target._schema.is_mutable


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _run(node: fx.Node, held: Mapping[fx.Node, Any]) -> Any:
    if _is_size(node):
        return size_hint(node.meta["val"])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: held[n] if n in held else _stand_in(n))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _stand_in(node: fx.Node) -> Any:
    """For an operand of which only shape and dtype are read."""
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return size_hint(val)
    return torch.empty((), dtype=val.dtype).expand([size_hint(size) for size in val.shape])


def _elements(value: Tensor) -> int:
    count = 1
    for size in value.shape:
        count *= size_hint(size)
    return count


# -- what a mask says --------------------------------------------------------------------------------------------------


def ruled_out(value: Tensor) -> Tensor:
    """bool, the shape of `value`: the entries that leave a key out, where `value` [..., keys] is added to scores; of a
    mask of bools the True ones, which is as good where only a difference counts.

    Those at or below -1e4, those whose exp beside that of the row's largest is 0 in the dtype, and, where there are two
    levels 50 apart or more, those on the lower.
    """
    if not value.is_floating_point():
        return value != 0
    if not value.numel():
        return value != value
    top = value.amax(-1, keepdim=True)
    out = (value <= LEFT_OUT) | ((value - top).exp() == 0)
    high, low = value.max(), value.min()
    far = high - value >= GAP  # beside a large number high - GAP is high
    if bool(high - low >= GAP) and bool(((value == high) | far | (value == low)).all()):
        out = out | far
    return out


def rules_none_out(value: Tensor) -> bool:
    """Whether a term of the scores is seen at once to leave no key out: its numbers lie near each other."""
    if not value.is_floating_point() or not value.numel():
        return False
    low, high = value.aminmax()
    return bool(low > LEFT_OUT) and bool(high - low <= NEAR)


def tells_apart(out: Tensor, free: tuple[Tensor, Tensor]) -> bool:
    """Whether what is ruled out, bool [..., queries, keys], says something else of each of the tokens that may merge.

    free: bool [queries] and [keys]. It does not where all queries see the same keys (a mask of keys), or where no two
    free tokens are told apart, as queries or as keys.
    """
    if not out.numel() or bool((out == out[..., :1, :]).all()):
        return False
    rows, columns = out[..., free[0], :], out[..., free[1]]
    return not (bool((rows == rows[..., :1, :]).all()) and bool((columns == columns[..., :1]).all()))


def same_along(value: Tensor) -> frozenset[int]:
    """The dims along which a value does not vary."""
    if not value.numel():
        return frozenset()
    return frozenset(d for d in range(value.dim()) if bool((value == value.narrow(d, 0, 1)).all()))


__all__: Sequence[str] = [
    "LARGEST",
    "Values",
    "gives_one_value",
    "ruled_out",
    "rules_none_out",
    "same_along",
    "size_hint",
    "tells_apart",
]
