"""beside: what is made of values that stand side by side, in terms of these values.

    stack([x, y]).sum(0)                 ->    add(x, y)
    einsum("sbnd,s->bnd", stack, w)      ->    add(mul(x, w0), mul(y, w1))
    cat([x, y]).split(sizes)             ->    x, y
    cat([x, x])                          ->    expand(unsqueeze(x)), flattened
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, permutations
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..algebra.axes import expr
from ..building.emit import Emit
from ..rules import Call, find
from ..rules.base import Role, Signature
from ..rules.contraction import Contraction
from ..rules.facts import NO_FACTS
from ..rules.views import PermuteRule, ViewRule

aten = torch.ops.aten

MOST = 8
"""Values whose sum is still written as adds."""


def itself(call: Call, emit: Emit) -> fx.Node | None:
    """A view of the same shape, or a value that is joined with nothing."""
    before, after = (list(map(expr, val.shape)) for val in (call.vals[0], call.out))
    return call.nodes[0] if before == after else None



def _pieces(node: fx.Node, d: int, emit: Emit) -> list[fx.Node] | None:
    """The values that stand side by side along dim d of a value, each without that dim; None where there are none."""
    if node.op != "call_function":
        return None
    call = Call(node)
    rule = find(call)
    if node.target is aten.stack.default and call.axis(call.args["dim"], call.out.dim()) == d:
        return [_as(call.out.dtype, n, emit) for n in call.nodes] if _floats(call) else None
    if node.target is aten.cat.default and all(expr(val.shape[d]) == 1 for val in call.vals if val.dim() > d):
        joined = call.axis(call.args["dim"]) == d and _floats(call)
        return [_as(call.out.dtype, emit(aten.squeeze.dim, n, d), emit) for n in call.nodes] if joined else None
    if node.target is aten.cumsum.default and call.axis(call.args["dim"]) == d and one_kind(call):
        inner = _pieces(call.nodes[0], d, emit)
        few = inner is not None and len(inner) <= MOST
        return list(accumulate(inner, lambda x, y: emit(aten.add.Tensor, x, y))) if inner and few else None
    if node.target is aten.mul.Tensor:
        return _times(call, d, emit)
    if isinstance(rule, PermuteRule):
        order = rule.order(call)
        rest = [k - (k > order[d]) for k in order if k != order[d]]
        inner = _pieces(call.nodes[0], order[d], emit)
        moved = rest != sorted(rest)
        return inner and [emit(aten.permute.default, n, rest) if moved else n for n in inner]
    if isinstance(rule, ViewRule) and d + 1 < call.out.dim():
        before, after = ([expr(n) for n in val.shape] for val in (call.vals[0], call.out))
        if [*after[:d], prod(after[d : d + 2]), *after[d + 2 :]] == before:
            held = _spans(call.nodes[0], d)
            whole = held is not None and [expr(n) for _, n in held] == [after[d + 1]] * after[d]
            return [n for n, _ in held] if held is not None and whole else None
    return None


def _times(call: Call, d: int, emit: Emit) -> list[fx.Node] | None:
    """The products of what stands side by side along dim d with what belongs to each."""
    for x, w in (call.nodes, call.nodes[::-1]) if len(call.nodes) == 2 and one_kind(call) else ():
        at = d - call.out.dim() + w.meta["val"].dim()
        inner = _pieces(x, d, emit) if x.meta["val"].shape == call.out.shape else None
        if inner is not None:
            own = w.meta["val"].shape[at] if at >= 0 else 1
            each = [w if at < 0 else emit(aten.select.int, w, at, k if own != 1 else 0) for k in range(len(inner))]
            return [emit(aten.mul.Tensor, n, by) for n, by in zip(inner, each, strict=True)]
    return None


def _spans(node: fx.Node, d: int) -> list[tuple[fx.Node, Any]] | None:
    """The values that a cat joins along dim d, and how long each is."""
    if node.target is not aten.cat.default or not one_dtype(call := Call(node)):
        return None
    same_rank = all(val.dim() == call.out.dim() for val in call.vals)
    held = list(zip(call.nodes, (val.shape[d] for val in call.vals if val.dim() > d), strict=False))
    return held if same_rank and call.axis(call.args["dim"]) == d else None


def summed(call: Call, emit: Emit) -> fx.Node | None:
    """The sum of what stands side by side."""
    dims = call.args["dim"]
    if not dims or len(dims) != 1 or not one_kind(call):
        return None
    d = call.axis(dims[0])
    terms = _pieces(call.nodes[0], d, emit)
    if terms is None or not 1 < len(terms) <= MOST:
        return None
    total = _total(terms, emit)
    return emit(aten.unsqueeze.default, total, d) if call.args["keepdim"] else total


def _total(terms: Sequence[fx.Node], emit: Emit) -> fx.Node:
    return reduce(lambda x, y: emit(aten.add.Tensor, x, y), terms)


def weighted(call: Call, emit: Emit) -> fx.Node | None:
    """A product that sums what stands side by side, each times a number of its own; a result may be a dim of size 1."""
    sig = product_of_two(call)
    if sig is None:
        return None
    for (letters, node), (by, weights) in permutations(zip(sig.ins, call.nodes, strict=True)):
        x = next((c for c in by if c in letters and sig.role(c) is Role.SUM), None)
        new = [c for c in by if c != x]
        one = all(expr(weights.meta["val"].shape[by.index(c)]) == 1 for c in new[:1]) and len(new) < 2
        if x is None or not one or (*sig.outs[0],) != (*(c for c in letters if c != x), *new):
            continue
        terms = _pieces(node, letters.index(x), emit)
        if terms is not None and 1 < len(terms) <= MOST:
            row = emit(aten.select.int, weights, by.index(new[0]), 0) if new else weights
            scaled = (emit(aten.mul.Tensor, n, emit(aten.select.int, row, 0, k)) for k, n in enumerate(terms))
            total = _total(list(scaled), emit)
            return emit(aten.unsqueeze.default, total, -1) if new else total
    return None


def averaged(call: Call, emit: Emit) -> fx.Node | None:
    total = summed(call, emit)
    return total and emit(aten.div.Tensor, total, call.vals[0].shape[call.args["dim"][0]])


def each(call: Call, emit: Emit) -> list[fx.Node] | None:
    return _pieces(call.nodes[0], call.axis(call.args["dim"]), emit) if _only_taken(call.nodes[0]) else None


def only_one(call: Call, emit: Emit) -> list[fx.Node] | None:
    """Of what is taken apart the one piece that is read."""
    read: list[Any] = [user.args[1] for user in call.node.users if user.users]
    d = call.axis(call.args["dim"])
    if call.target is aten.unbind.int:
        return [emit(aten.select.int, call.nodes[0], d, *read)] * len(call.results) if len(read) == 1 else None
    ends = [*accumulate((val.shape[d] for val in call.results), initial=0)]
    if len(read) != 1 or not all(isinstance(n, int) for n in ends):
        return None
    return [emit(aten.slice.Tensor, call.nodes[0], d, *ends[read[0] : read[0] + 2])] * len(call.results)


def _only_taken(join: fx.Node) -> bool:
    """Whether nobody reads values together: else what is taken from them is a part of that stream."""
    takes = (aten.unbind.int, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
    return all(user.target in takes for user in join.users)


def one(call: Call, emit: Emit) -> fx.Node | None:
    pieces, at = each(call, emit), call.args["index"]
    return pieces[at] if pieces is not None and isinstance(at, int) else None


def apart(call: Call, emit: Emit) -> list[fx.Node] | None:
    """What was joined, taken apart where it was joined."""
    d = call.axis(call.args["dim"])
    held = _spans(call.nodes[0], d) if _only_taken(call.nodes[0]) else None
    return [n for n, _ in held] if held and [n for _, n in held] == [val.shape[d] for val in call.results] else None


def part(call: Call, emit: Emit) -> fx.Node | None:
    if (whole := itself(call, emit)) is not None:
        return whole
    d, start = call.axis(call.args["dim"]), call.args["start"] or 0
    held, at = (_spans(call.nodes[0], d) if _only_taken(call.nodes[0]) else None) or [], 0
    if call.args["step"] != 1 or not all(isinstance(n, int) for n in (start, *(size for _, size in held))):
        return None
    start = start + call.vals[0].shape[d] if start < 0 else start
    for n, size in held:
        if at == start and size == call.out.shape[d]:
            return n
        at += size
    return None


def overwritten(call: Call, emit: Emit) -> fx.Node | None:
    """All of it: what was there is not left."""
    (before, src), own = call.vals, call.out
    whole = list(map(expr, before.shape)) == list(map(expr, src.shape))
    return call.nodes[1] if whole and src.dtype == own.dtype and src.device == own.device else None


def beside_itself(call: Call, emit: Emit) -> fx.Node | None:
    """One value several times is spread out."""
    k, new = len(call.nodes), call.target is aten.stack.default
    if len(set(call.nodes)) != 1 or k < 2 or not all(isinstance(n, int) for n in call.out.shape):
        return None
    d = call.axis(call.args["dim"], call.out.dim())
    own = list(call.vals[0].shape)
    row = emit(aten.unsqueeze.default, call.nodes[0], d)
    out = emit(aten.expand.default, row, [*own[:d], k, *own[d:]])
    out = emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    return out if new else emit(aten.reshape.default, out, list(call.out.shape))


def product_of_two(call: Call) -> Signature | None:
    """The letters of a product of two floats of one dtype; None of anything else."""
    rule = find(call)
    if not isinstance(rule, Contraction) or len(call.nodes) != 2 or not one_kind(call):
        return None
    return rule.signature(call, NO_FACTS)


def one_kind(call: Call) -> bool:
    """Whether operands and result are floats of one dtype. (In half precision a form may round once more.)"""
    held = [*call.vals, *call.results]
    return all(isinstance(v, Tensor) and v.is_floating_point() and v.dtype == held[0].dtype for v in held)


def one_dtype(call: Call) -> bool:
    return len({val.dtype for val in call.vals}) == 1


def _floats(call: Call) -> bool:
    """Whether operands are of one dtype, or floats that become one."""
    return one_dtype(call) or all(val.is_floating_point() for val in call.vals)


def _as(dtype: torch.dtype, node: fx.Node, emit: Emit) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else emit(aten._to_copy.default, node, dtype=dtype)


__all__ = [
    "apart", "averaged", "beside_itself", "each", "itself", "one", "one_dtype", "one_kind", "only_one", "overwritten",
    "part", "product_of_two", "summed", "weighted",
]  # fmt: skip
