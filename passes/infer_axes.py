"""infer_axes: name the axes of an unnamed graph.

Each dim of each value becomes a product of atoms (`axes.py`); the op rules say which dims are indexed alike. On the
way it notes what depends on no model input, which tensors are terms of attention scores, and which positions of an
axis are read on their own. It only annotates.

    linear(x: [b][n][d], w) -> [b][n][o]      view(.., [B, N, H, e]) -> [b][n][h][e]     q @ k^T -> [b][h][n][n]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .axes import expr as size_expr
from .axes import fresh_dims
from .rules import Call, Facts, find, tensors_of
from .rules.base import UNKNOWN
from .rules.pointwise import POINTWISE, MaskRule

aten = torch.ops.aten


def infer_axes(gm: fx.GraphModule, model_input: Sequence[bool]) -> tuple[Facts, dict[fx.Node, Call]]:
    """Facts about every value, and the bound call of every node that runs an op on tensors."""
    facts, calls = Facts(), {}
    varies = iter(model_input)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if not next(varies):
                facts.constant.add(node)
        elif node.op == "get_attr" or (
            node.op == "call_function" and all(n in facts.constant for n in node.all_input_nodes)
        ):
            facts.constant.add(node)
        if node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            held = source.meta.get("val")
            at = sum(isinstance(v, Tensor) for v in held[:index])
            facts.axes[node] = (facts.axes[source][at],) if isinstance(held[index], Tensor) else ()
            continue
        results = tensors_of(node.meta.get("val"))
        if node.op != "call_function" or not results:
            facts.axes[node] = tuple(fresh_dims(v.shape) for v in results)
            continue
        call = calls[node] = Call(node)
        rule = find(call)
        facts.axes[node] = rule.axes(call, facts)
        if rule is UNKNOWN and call.operands:
            facts.unknown[call.op] = facts.unknown.get(call.op, 0) + 1
    facts.scores = _scores(calls)
    return facts, calls


def _scores(calls: dict[fx.Node, Call]) -> set[fx.Node]:
    """Nodes whose value reaches a softmax through pointwise ops and views alone: terms of the attention scores."""
    from .rules.contraction import Contraction
    from .rules.views import ExpandRule, PermuteRule, ViewRule

    todo = [
        c.nodes[0]
        for c in calls.values()
        if getattr(c.target, "overloadpacket", None) in (aten.softmax, aten._softmax) and c.nodes
    ]
    found: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in found or node not in calls:
            continue
        call = calls[node]
        rule = find(call)
        if isinstance(rule, Contraction):
            found.add(node)
        elif rule is POINTWISE or isinstance(rule, (MaskRule, ViewRule, PermuteRule, ExpandRule)):
            found.add(node)
            todo += call.nodes
    return found


__all__ = ["infer_axes", "size_expr"]
