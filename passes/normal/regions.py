"""Regions: stretches of a traced graph that are brought into the IR by a trace of their own.

A pre-dispatch trace stands above functorch: inside vmap it sees batched tensors, whose values it would keep as
constants. `retrace` traces below autograd and functorch, where vmap has become plain ops on whole tensors; what it
gives is run, or read, in the trace around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import _pop_mode_temporarily

aten = torch.ops.aten


class CaptureError(Exception):
    """The graph holds something that cannot be brought into the IR; the message is a reason for the user."""


def retrace(run: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """`run` as a graph of plain ATen ops, one placeholder for each of `values` (fake tensors, SymInts, numbers).

    The graph is still differentiable in its tensor inputs when it is run; composite ops are decomposed.
    """
    with ExitStack() as stack:  # the trace around this must not see it
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(disable_proxy_modes_tracing())
        return make_fx(run, tracing_mode="real")(*values)


class SpelledOut(fx.Interpreter):
    """Runs a graph with attention as products and a softmax: vmap takes a fused one sample by sample."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(_attention if target in _FUSED else target, args, kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any
) -> Tensor:  # fmt: skip
    math = aten._scaled_dot_product_attention_math.default.decompose
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]


_FUSED = {torch.nn.functional.scaled_dot_product_attention, aten.scaled_dot_product_attention.default}


ENTERS, LEAVES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def enters_vmap(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == ENTERS


def vmap_stretch(first: fx.Node) -> list[fx.Node]:
    """The nodes from the one that enters vmap to the one that leaves it. Raises CaptureError where none does."""
    found, depth, node = [first], 1, first
    while depth:
        node = node.next
        if node.op == "output":
            raise CaptureError("the graph enters vmap and does not leave it")
        name = getattr(node.target, "__name__", "")
        depth += (name == ENTERS) - (name == LEAVES)
        found.append(node)
    return found


def cut_out(owner: torch.nn.Module, stretch: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """A stretch of a graph as a module, the nodes that are its inputs, and those that are its outputs.

    Attributes that it reads become inputs.
    """
    body = [node for node in stretch if node.op != "get_attr"]
    inside = set(body)
    inputs = list(dict.fromkeys(a for node in body for a in node.all_input_nodes if a not in inside))
    outputs = [node for node in body if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    held = {node: graph.placeholder(node.name) for node in inputs}
    for node in body:
        held[node] = graph.node_copy(node, held.__getitem__)
    graph.output([held[node] for node in outputs])
    return fx.GraphModule(owner, graph), inputs, outputs


__all__ = ["CaptureError", "SpelledOut", "cut_out", "enters_vmap", "retrace", "vmap_stretch"]
