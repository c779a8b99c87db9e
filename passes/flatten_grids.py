"""flatten_grids: an MLP on a grid [B, H, W, C] becomes the same MLP on [B, H * W, C].

Merging takes tokens that stand in one dim. An MLP maps each token on its own, so its grid can be one dim while it runs:

    fc2(gelu(fc1(y)))    ->    y1 = flatten(y, 1, 2)
                               unflatten(fc2(gelu(fc1(y1))), 1, [H, W])

From every value of rank four or more that a product with a weight maps, the region of ops that map its last dim, or
single elements, is flattened; views at its ends are all that is added. A region needs two products, one after the
other: a single projection (queries, keys) has no tokens to merge on its own.

Invariants: each op keeps its arguments and its place; what leaves a region has the shape it had. If nothing merges, the
graph that Dynamo gave is compiled, and nothing of this is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from .building.trace import fake_like
from .rules import Call, find
from .rules.pointwise import PointwiseRule

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}


def flatten_grids(gm: fx.GraphModule) -> int:
    """Rewrite in place; returns how many regions were flattened."""
    count, taken = 0, set[fx.Node]()
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not aten.linear.default or node in taken:
            continue
        source = cast(fx.Node, node.args[0])
        if source not in taken and _is_grid(source.meta["val"]):
            region = _region(source)
            taken |= {*region}
            products = [n for n in region if n.target is aten.linear.default]
            if any(n.args[0] is not source for n in products):
                _flatten(gm.graph, source, region)
                count += 1
    if count:
        gm.graph.lint()
    return count


def _is_grid(val: Any) -> bool:
    return isinstance(val, Tensor) and val.dim() >= 4 and all(isinstance(s, int) for s in val.shape[1:])


def _region(source: fx.Node) -> list[fx.Node]:
    """What maps `source` token by token, in graph order, through ops whose every other operand is the same for all."""
    inside, found = {source}, []
    node = source.next
    while node.op != "output":
        if any(n in inside for n in node.all_input_nodes) and _by_token(node, inside):
            inside.add(node)
            found.append(node)
        node = node.next
    return found


def _by_token(node: fx.Node, inside: set[fx.Node]) -> bool:
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    call = Call(node)
    held = [n for n in call.nodes if n in inside]
    if not held or any(n.meta["val"].shape[:-1] != node.meta["val"].shape[:-1] for n in held):
        return False
    if node.target is aten.linear.default:
        return held == [call.nodes[0]]
    if node.target in _NORMS:
        return held == [call.nodes[0]] and len(call.args["normalized_shape"]) == 1
    others = [n for n in call.nodes if n not in inside]
    return isinstance(find(call), PointwiseRule) and all(n.meta["val"].dim() <= 1 for n in others)


def _flatten(graph: fx.Graph, source: fx.Node, region: list[fx.Node]) -> None:
    shape = source.meta["val"].shape
    last = len(shape) - 2
    with graph.inserting_before(region[0]):
        first = graph.call_function(aten.flatten.using_ints, (source, 1, last))
    first.meta = {**region[0].meta, "val": _flat(source.meta["val"])}
    flat = {source: first}
    for node in region:
        with graph.inserting_before(node):
            args, kwargs = (_mapped(x, flat) for x in (node.args, node.kwargs))
            flat[node] = graph.call_function(cast(Any, node.target), args, kwargs)
        flat[node].meta = {**node.meta, "val": _flat(node.meta["val"])}
    inside = set(region)
    for node in region:
        outside = [user for user in node.users if user not in inside]
        if outside:
            with graph.inserting_before(node):
                back = graph.call_function(aten.unflatten.int, (flat[node], 1, list(shape[1 : last + 1])))
            back.meta = dict(node.meta)
            node.replace_all_uses_with(back, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        graph.erase_node(node)


def _flat(val: FakeTensor) -> FakeTensor:
    """What a value is in a flattened region."""
    batch, *grid, channels = val.shape
    return fake_like(val, (batch, prod(grid), channels))


def _mapped(values: Any, flat: Mapping[fx.Node, fx.Node]) -> Any:
    return fx.map_arg(values, lambda n: flat.get(n, n))


__all__ = ["flatten_grids"]
