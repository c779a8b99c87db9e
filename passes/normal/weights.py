"""weights: the weights of a softmax, however they are normalised.

| spelling                                              | form                                       |
|-------------------------------------------------------|--------------------------------------------|
| `exp(log_softmax(s))`, `exp(s - logsumexp(s))`        | `softmax(s)`                               |
| `e / e.sum(-1)`, `e @ v / e.sum(-1)` of `e = exp(s)`  | `softmax(s)`, `softmax(s) @ v`             |
| the same times `1 / e.sum(-1)`, `e.sum(-1) ** -1`     | the same                                   |
| the same of `exp2(s)`, `pow(2, s)`                    | of `s * log(2)`                            |
| the same of `e * mask`, of `where(mask, e, 0)`        | of `masked_fill(s, ~mask, -inf)`           |
| `softmax(s - s.amax(-1))`                             | `softmax(s)`: what is the same for all goes |
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..building.emit import Emit
from ..rules import Call, find
from ..rules.pointwise import MaskRule

aten = torch.ops.aten
_BASES: dict[Any, float] = {aten.exp.default: math.e, aten.exp2.default: 2.0}


def from_log(call: Call, emit: Emit) -> fx.Node | None:
    """exp of what has been normalised."""
    of = call.nodes[0]
    if of.target is aten.log_softmax.int:
        return emit(aten.softmax.int, *of.args, **of.kwargs)
    scores, total = [*of.args, None, None][:2]
    if of.target is not aten.sub.Tensor or of.kwargs or not isinstance(total, fx.Node):
        return None
    d = _reduced(total, aten.logsumexp.default, scores)
    return None if d is None else emit(aten.softmax.int, scores, d)


def over_their_sum(call: Call, emit: Emit) -> fx.Node | None:
    """What is divided by its sum over keys, before or after the product with the values."""
    a, b = call.args["self"], call.args["other"]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if call.target is aten.div.Tensor:
        return _over(a, b, emit)
    found = ((above, _inverted(below)) for above, below in ((a, b), (b, a)))
    return next((new for above, total in found if total is not None and (new := _over(above, total, emit))), None)


def _inverted(node: fx.Node) -> fx.Node | None:
    """Of one over a value: the value."""
    if node.op != "call_function":
        return None
    of: Any = node.args[0] if node.args else None
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == -1
    return of if power or node.target is aten.reciprocal.default else None


def _over(above: fx.Node, total: fx.Node, emit: Emit) -> fx.Node | None:
    product = above.target is aten.matmul.default
    weights: Any = above.args[0] if product else above
    d = _reduced(total, aten.sum.dim_IntList, weights)
    scores = None if d is None or (product and d != weights.meta["val"].dim() - 1) else _scores(weights, d, emit)
    if scores is None:
        return None
    found = emit(aten.softmax.int, scores, d)
    return emit(aten.matmul.default, found, above.args[1]) if product else found


def shifted(call: Call, emit: Emit) -> fx.Node | None:
    scores, d = call.nodes[0], call.axis(call.args["dim"])
    free = _free(scores, d)
    return None if free is scores else emit(aten.softmax.int, free, *call.node.args[1:], **call.node.kwargs)


def _reduced(total: fx.Node, op: Any, of: Any) -> int | None:
    """The one dim over which `total`, of size 1 there, is an op of a value."""
    kept = total.target is not aten.unsqueeze.default
    at = total if kept else total.args[0]
    if not isinstance(at, fx.Node) or at.target is not op or at.args[0] is not of:
        return None
    call = Call(at)
    dims = [call.axis(d) for d in call.args["dim"] or ()]
    if len(dims) != 1 or bool(call.args["keepdim"]) != kept or call.args.get("dtype") is not None:
        return None
    return dims[0] if kept or Call(total).axis(Call(total).args["dim"], call.vals[0].dim()) == dims[0] else None


def _scores(weights: fx.Node, d: int, emit: Emit) -> fx.Node | None:
    """Of weights that are not normalised: what they are the softmax of. A mask that zeroes them fills in -inf."""
    if weights.op != "call_function":
        return None
    call = Call(weights)
    base = call.args["self"] if weights.target is aten.pow.Scalar else _BASES.get(weights.target, 0.0)
    if isinstance(base, (int, float)) and base > 1:  # a smaller one would turn masks of -inf into others
        return _times(_free(call.nodes[0], d), math.log(base), emit)
    if weights.target is aten.softmax.int:
        return call.nodes[0] if call.axis(call.args["dim"]) == d and call.args["dtype"] is None else None
    x, mask, fills = _masked(call)
    scores = None if mask is None or x is None else _scores(x, d, emit)
    if scores is None or scores.meta["val"].shape != call.out.shape or scores.meta["val"].dtype != call.out.dtype:
        return None
    drop = mask if fills else emit(aten.logical_not.default, mask)
    return emit(aten.masked_fill.Scalar, scores, drop, -math.inf)


def _times(scores: fx.Node, by: float, emit: Emit) -> fx.Node:
    """Scores times a number, which goes before the masks that are filled in or added."""
    if by == 1:
        return scores
    call = Call(scores)
    parts = MaskRule.parts(call) if isinstance(find(call), MaskRule) else None
    if parts is not None and parts[2] is not None and call.vals[parts[0]].shape == call.out.shape:
        x, mask, value, fills = parts
        drop = call.nodes[mask] if fills else emit(aten.logical_not.default, call.nodes[mask])
        return emit(aten.masked_fill.Scalar, _times(call.nodes[x], by, emit), drop, value * by)
    if scores.target is aten.add.Tensor and len(call.nodes) == 2 and not scores.kwargs:
        return emit(aten.add.Tensor, *(_times(n, by, emit) for n in call.nodes))
    return emit(aten.mul.Tensor, scores, by)


def _masked(call: Call) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """(what is masked by zeros, the mask, whether its True means 0)"""
    if isinstance(find(call), MaskRule):
        parts = MaskRule.parts(call)
        return (call.nodes[parts[0]], call.nodes[parts[1]], parts[3]) if parts and parts[2] == 0 else (None, None, True)
    if call.target is aten.mul.Tensor and len(call.nodes) == 2:
        for x, mask in (call.nodes, call.nodes[::-1]):
            mask = mask.args[0] if mask.target is aten._to_copy.default else mask  # type: ignore[assignment]
            if mask.meta["val"].dtype is torch.bool:
                return x, mask, False
    return None, None, True


def _free(scores: fx.Node, d: int) -> fx.Node:
    """Scores without what is subtracted from all of them alike."""
    if scores.target is not aten.sub.Tensor or scores.kwargs:
        return scores
    own, less = scores.args
    if not isinstance(own, fx.Node) or own.meta["val"].shape != scores.meta["val"].shape:
        return scores
    val = less.meta["val"] if isinstance(less, fx.Node) else None
    alike = val is None or (val.dim() == own.meta["val"].dim() and val.shape[d] == 1)
    return _free(own, d) if alike and own.meta["val"].dtype == scores.meta["val"].dtype else scores


__all__ = ["from_log", "over_their_sum", "shifted"]
