"""lower: replace the tome ops by the form that is fastest on the device. It changes no value.

On a CPU the ops are opaque calls: every layer has another token count, and Inductor would compile five more C++ kernels
for each of them. Opaque calls are few and large, so neighbours become one:

    cpu:   match, merge_size, log_size            ->  match_size
           merge(add(x, y), ...)                  ->  merge_add(x, y, ...)    where nobody else reads the sum

Elsewhere merging and sizes are spelled out in ATen, so that they fuse:

    cuda:  merge, merge_bias, merge_size, log_size  ->  merge_aten, merge_bias_aten, merge_size_aten, log
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from tome_fx import ops  # noqa: F401 - defines the operators

from .axes import expr, same
from .capture import is_impure

aten = torch.ops.aten
tome = torch.ops.tome

_SPELLED_OUT: dict[Any, Any] = {
    tome.merge.default: tome.merge_aten.default,
    tome.merge_bias.default: tome.merge_bias_aten.default,
    tome.merge_size.default: tome.merge_size_aten.default,
    tome.log_size.default: aten.log.default,
}


def spell_out(graph: fx.Graph, node: fx.Node) -> bool:
    """Put the ATen form in the place of an opaque call."""
    form = _SPELLED_OUT.get(node.target)
    if form is not None:
        node.target = form
    return form is not None


def fuse(graph: fx.Graph, node: fx.Node) -> bool:
    """Let an opaque call take over its neighbours' work."""
    if node.target is tome.match.default:
        return _fuse_sizes(graph, node)
    return node.target is tome.merge.default and _fuse_add(graph, node)


# device type -> what is tried on each node; "" is every device not listed.
FORMS: dict[str, Callable[[fx.Graph, fx.Node], bool] | None] = {"cpu": fuse, "": spell_out}


def lower(gm: fx.GraphModule) -> int:
    """Rewrite in place; returns how many ops were replaced."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and (device := _device(node)) is not None:
            form = FORMS.get(device, FORMS[""])
            count += form is not None and form(gm.graph, node)
    if count:
        gm.graph.eliminate_dead_code(is_impure_node=is_impure)
        gm.recompile()
    return count


def _device(node: fx.Node) -> str | None:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first.device.type if isinstance(first, Tensor) else None


def _fuse_sizes(graph: fx.Graph, match: fx.Node) -> bool:
    results = {user.args[1]: user for user in match.users if user.target is operator.getitem}
    index = [results.get(i) for i in range(3)]
    sizes = [u for u in (index[0].users if index[0] else ()) if u.target is tome.merge_size.default]
    own = next((u for u in sizes if list(u.args[1:]) == index), None)
    before = own.args[0] if own else None
    if own is None or (isinstance(before, fx.Node) and not before < match):
        return False
    with graph.inserting_before(match):
        fused = graph.call_function(tome.match_size.default, (match.args[0], before, *match.args[1:]), match.kwargs)
    size = own.meta["val"]
    fused.meta = {**match.meta, "val": (*match.meta["val"], size, size)}
    match.replace_all_uses_with(fused)
    logs = [u for u in own.users if u.target is tome.log_size.default]
    for at, nodes in ((4, [own]), (5, logs)):
        with graph.inserting_after(max(results.values())):
            part = graph.call_function(operator.getitem, (fused, at))
        part.meta = dict(own.meta)
        for node in nodes:
            node.replace_all_uses_with(part)
    return True


def _fuse_add(graph: fx.Graph, merge: fx.Node) -> bool:
    added = cast(fx.Node, merge.args[0])
    if added.target is not aten.add.Tensor or len(added.users) != 1 or added.kwargs:
        return False
    x, y = added.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return False
    whole = added.meta["val"]
    if not all(_same_kind(n.meta["val"], whole) for n in (x, y)):
        return False
    with graph.inserting_before(merge):
        fused = graph.call_function(tome.merge_add.default, (x, y, *merge.args[1:]))
    fused.meta = dict(merge.meta)
    merge.replace_all_uses_with(fused)
    return True


def _same_kind(a: Tensor, b: Tensor) -> bool:
    shapes = a.dim() == b.dim() and all(same(expr(m), expr(n)) for m, n in zip(a.shape, b.shape, strict=True))
    return shapes and a.dtype == b.dtype and a.device == b.device
