"""normalize: one meaning, one form. What a model can spell in many ways is put into the one way that later passes read.

| spelling                                                | form                                                     |
|---------------------------------------------------------|----------------------------------------------------------|
| slices written until nothing is left of what was there  | one cat (`normal/join_writes.py`)                        |
| `x.new_zeros(size)`                                     | `full(size, 0)`, which reads nothing of x                |
| `addcmul(x, a, b, value=c)`, `addcdiv`                  | `add(x, mul(a, b), alpha=c)`, `add(x, div(a, b), ...)`   |
| `pad(x, (m, 0))`                                        | `cat([full(m), x], -1)`                                  |
| `stack([x, y]).sum(0)`, `cat([x[None], y[None]]).sum(0)`| `add(x, y)`                                              |
| `stack([x, y]).mean(0)`                                 | `div(add(x, y), 2)`                                      |
| what is the same along a dim, spread out                | its row (`normal/spread.py`)                             |
| numbers that change nothing                             | left out (`normal/idle.py`)                              |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .algebra.axes import expr
from .building.emit import Emit
from .normal.idle import drop_idle, numbers
from .normal.join_writes import join_writes
from .normal.spread import narrow_spread
from .rules import Call

aten = torch.ops.aten

MOST = 8
"""Values whose sum is still written as adds."""


def normalize(graph: fx.Graph, mode: FakeTensorMode, impure: Callable[[fx.Node], bool]) -> None:
    """Rewrite in place. impure: the nodes that stay though nobody reads them."""
    _by_table(graph, mode)
    graph.eliminate_dead_code(is_impure_node=impure)
    join_writes(graph)
    known = numbers(graph, {})
    narrow_spread(graph, mode, known.get)
    graph.eliminate_dead_code(is_impure_node=impure)
    drop_idle(graph, known)
    graph.eliminate_dead_code(is_impure_node=impure)


def _by_table(graph: fx.Graph, mode: FakeTensorMode) -> None:
    emit = Emit(graph, mode)
    for node in list(graph.nodes):
        form = FORMS.get(node.target) if node.op == "call_function" else None
        if form is None:
            continue
        with emit.before(node):
            new = form(Call(node), emit)
        if new is not None:
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)


Form = Callable[[Call, Emit], fx.Node | None]


def _filled(number: float) -> Form:
    def form(call: Call, emit: Emit) -> fx.Node | None:
        own, size = call.out, call.args["size"]
        if not all(isinstance(n, int) for n in size):
            return None
        value = number if own.dtype.is_floating_point else int(number)
        return emit(aten.full.default, size, value, dtype=own.dtype, device=own.device)

    return form


def _added(product: Any) -> Form:
    """A sum with a product or a quotient."""

    def form(call: Call, emit: Emit) -> fx.Node | None:
        if not _one_kind(call):
            return None
        a = call.args
        other, value = emit(product, a["tensor1"], a["tensor2"]), a["value"]
        return emit(aten.add.Tensor, a["self"], other, **({} if value == 1 else {"alpha": value}))

    return form


def _padded(call: Call, emit: Emit) -> fx.Node | None:
    """What is padded along one dim stands beside what it is padded with."""
    pads, own = call.args["pad"], call.out
    value = call.args.get("value")
    if call.args.get("mode", "constant") != "constant" or not all(isinstance(n, int) and n >= 0 for n in pads):
        return None
    places = [k for k, amount in enumerate(pads) if amount]
    dims = {own.dim() - 1 - k // 2 for k in places}
    if len(dims) != 1 or not all(isinstance(size, int) for size in own.shape) or isinstance(value, fx.Node):
        return None
    (d,) = dims
    pieces: list[Any] = [call.nodes[0]]
    for k in places:
        size = [pads[k] if i == d else n for i, n in enumerate(own.shape)]
        beside = emit(aten.full.default, size, value or 0, dtype=own.dtype, device=own.device)
        pieces.insert(len(pieces) if k % 2 else 0, beside)
    return emit(aten.cat.default, pieces, d)


def _summed(call: Call, emit: Emit) -> fx.Node | None:
    found = _terms(call, emit)
    return None if found is None else _total(found, emit)


def _averaged(call: Call, emit: Emit) -> fx.Node | None:
    found = _terms(call, emit)
    return None if found is None else emit(aten.div.Tensor, _total(found, emit), len(found))


def _total(terms: list[fx.Node], emit: Emit) -> fx.Node:
    total = terms[0]
    for term in terms[1:]:
        total = emit(aten.add.Tensor, total, term)
    return total


def _terms(call: Call, emit: Emit) -> list[fx.Node] | None:
    """The values that stand one beside the other in the dim that a reduction sums over, and in no other."""
    source, dims = call.nodes[0], call.args["dim"]
    if source.target not in (aten.stack.default, aten.cat.default) or not _one_kind(call) or not dims or len(dims) != 1:
        return None
    pieces, d = Call(source), call.axis(dims[0])
    if not _one_kind(pieces) or not 1 < len(pieces.nodes) <= MOST:
        return None
    if source.target is aten.stack.default:
        if pieces.axis(pieces.args["dim"], call.vals[0].dim()) != d:
            return None
        terms = pieces.nodes
    else:
        if pieces.axis(pieces.args["dim"]) != d or any(expr(val.shape[d]) != 1 for val in pieces.vals):
            return None
        terms = [emit(aten.squeeze.dim, n, d) for n in pieces.nodes]
    return [emit(aten.unsqueeze.default, n, d) for n in terms] if call.args["keepdim"] else terms


def _one_kind(call: Call) -> bool:
    """Whether operands and result are floats of one dtype. (In half precision a form may round once more.)"""
    held = [*call.vals, *call.results]
    return all(isinstance(v, Tensor) and v.is_floating_point() and v.dtype == held[0].dtype for v in held)


FORMS: dict[Any, Form] = {
    aten.new_zeros.default: _filled(0.0),
    aten.new_ones.default: _filled(1.0),
    aten.addcmul.default: _added(aten.mul.Tensor),
    aten.addcdiv.default: _added(aten.div.Tensor),
    aten.pad.default: _padded,
    aten.constant_pad_nd.default: _padded,
    aten.sum.dim_IntList: _summed,
    aten.mean.dim: _averaged,
}

__all__ = ["normalize"]
