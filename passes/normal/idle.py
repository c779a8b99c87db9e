"""idle: what is made of numbers alone and changes nothing is left out of the graph.

Libraries hand on a mask where there is nothing to mask (`arange(n) >= 0` over all pairs, `ones(b, n)`), or add its
zeros to the scores. One graph of a model then has it and another has not, as some of them look whether they are
traced. Without it all are one spelling.

    scaled_dot_product_attention(q, k, v, expand(ge(arange(65), 0)))    ->    scaled_dot_product_attention(q, k, v)
    add(scores, where(ge(arange(65), 0), 0.0, -3.4e38))                 ->    scores
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..analysis.values import gives_one_value

aten = torch.ops.aten

LARGEST = 2**20
"""Elements of a tensor that is still computed, those along an expanded dim counted once."""


def numbers(graph: fx.Graph, known: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """The values of what is made of numbers alone. known: those that have been computed, or that an input has."""
    values: dict[fx.Node, Tensor] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = known.get(node, node.meta.get("constant"))
        if value is not None and not any(_writes(user) for user in node.users):
            values[node] = value
    for node in _calls(graph):
        value = known[node] if node in known else _computed(node, values)
        if value is not None:
            values[node] = value
    return values


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]


def drop_idle(graph: fx.Graph, values: Mapping[fx.Node, Tensor]) -> None:
    """Rewrite in place. values: what `numbers` gives of the graph. Dead code is left to the caller."""
    for node in _calls(graph):
        if node in values:
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # torch.export's, of each cast: what was traced for one dtype has it
        elif node.target is aten.scaled_dot_product_attention.default:
            _drop_mask(node, values)
        elif (kept := _kept(node, values)) is not None:
            node.replace_all_uses_with(kept)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _computed(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor | None:
    """The value of a node whose operands are numbers or known."""
    val, target = node.meta.get("val"), node.target
    if not isinstance(val, Tensor) or any(n not in values for n in node.all_input_nodes):
        return None
    if not gives_one_value(target) or val.is_meta or not _small(val):  # type: ignore[arg-type]
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    with _disable_current_modes(), torch.no_grad():
        return target(*args, **kwargs)  # type: ignore[operator]


def _small(val: Tensor) -> bool:
    count = 1
    for size, step in zip(val.shape, val.stride(), strict=True):
        if not isinstance(size, int) or not isinstance(step, int):
            return False
        count *= size if step else 1
    return count <= LARGEST


def _all(value: Tensor | None, number: float) -> bool:
    """Whether a known value is one number everywhere."""
    if value is None or not value.numel():
        return False
    for d, step in enumerate(value.stride()):
        value = value.narrow(d, 0, 1) if step == 0 else value
    return bool((value == number).all())


def _drop_mask(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> None:
    """Attention under a mask that leaves all in, or adds 0."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    value = values.get(mask) if isinstance(mask, fx.Node) else None
    if value is None or not _all(value, 1 if value.dtype is torch.bool else 0):
        return
    if len(node.args) > 3:
        node.args = (*node.args[:3], None, *node.args[4:])
    else:
        node.kwargs = {**node.kwargs, "attn_mask": None}


_NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.logical_and.default: 1,
    aten.bitwise_and.Tensor: 1, aten.logical_or.default: 0, aten.bitwise_or.Tensor: 0,
}  # fmt: skip
_ONE_SIDED = {aten.sub.Tensor, aten.div.Tensor}
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def _kept(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> fx.Node | None:
    """The operand that an op gives back as it is."""
    args = [a if isinstance(a, fx.Node) else None for a in node.args]
    known = [values.get(a) if a is not None else None for a in args]
    kept: fx.Node | None = None
    if node.target in _NEUTRAL:
        if len(args) == 2 and _bits(node) and _all(known[1], _NEUTRAL[node.target]):
            kept = args[0]
        elif len(args) == 2 and node.target not in _ONE_SIDED and _bits(node) and _all(known[0], _NEUTRAL[node.target]):
            kept = args[1] if node.kwargs.get("alpha", 1) == 1 else None
    elif node.target in _FILLS:
        kept = args[0] if _all(known[1], 0) else None
    elif node.target is aten.where.self:
        kept = args[1] if _all(known[0], 1) else args[2] if _all(known[0], 0) else None
    if kept is None:
        return None
    before, after = kept.meta["val"], node.meta["val"]
    same = before.shape == after.shape and before.dtype == after.dtype and before.device == after.device
    return kept if same else None


def _bits(node: fx.Node) -> bool:
    """Whether 1 is neutral: of bitwise ops, it is to bools alone."""
    return "bitwise" not in str(node.target) or node.meta["val"].dtype is torch.bool


__all__ = ["drop_idle", "numbers"]
