"""lower: replace the tome ops by the form that is fastest on the device. It changes no value.

On a CPU the ops are opaque calls: every layer has another token count, and Inductor would compile five more C++ kernels
for each of them. Opaque calls are few and large, so neighbours become one:

    cpu:   match, merge_size, log_size            ->  match_size
           merge(add(x, y), ...)                  ->  merge_add(x, y, ...)    where nobody else reads the sum
           unmerge                                ->  unmerge_aten            where no gradient is asked for

Gathering rows is a loop that Inductor fuses into the norms: in a training step that costs more than it saves, and the
gradient of a call is a call.

On CUDA they are Triton kernels that Inductor sees, where triton can be imported, and attention that has log sizes as
its only mask takes the form that `tome_fx.attention.ROWS` says (none as long as nothing is measured):

    cuda:  match(metric)                          ->  match_triton(metric, blocked), from `BLOCKED` tokens without the
                                                      matrix of similarities
           merge, merge(add(x, y), ...)           ->  merge_triton
           merge_size                             ->  merge_size_triton
           sdpa(q, k, v, log sizes)               ->  attend(q, k, v, log sizes, form)

What is left, and all on other devices, is spelled out in ATen, so that it fuses:

    other: merge, merge_bias, merge_size, log_size  ->  merge_aten, merge_bias_aten, merge_size_aten, log
           unmerge                                  ->  unmerge_aten

That is before AOTAutograd, which needs the ops' derivatives. After it `call_kernels` lets Inductor call the compiled
CPU kernels themselves, not the Python that chooses between them and ATen:

    cpu:   match_size, merge, merge_add, ...      ->  tome_cpu::match_size, ...   in float32 and bfloat16
           x @ weight + bias                      ->  tome_cpu::product           in bfloat16, where it is as fast: the
                                                      library keeps half a MiB of code for each number of rows
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from tome_fx import attention
from tome_fx.kernels import cpu

from .algebra.axes import expr, same
from .analysis.values import size_hint
from .building.emit import drop_dead
from .capture import is_impure
from .rules import Call

aten = torch.ops.aten
tome = torch.ops.tome

_SPELLED_OUT: dict[Any, Any] = {
    tome.merge.default: tome.merge_aten.default,
    tome.merge_bias.default: tome.merge_bias_aten.default,
    tome.merge_size.default: tome.merge_size_aten.default,
    tome.log_size.default: aten.log.default,
    tome.unmerge.default: tome.unmerge_aten.default,
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
    if node.target is tome.unmerge.default:
        return not torch.is_grad_enabled() and spell_out(graph, node)
    return node.target is tome.merge.default and _fuse_add(graph, node)


BLOCKED = 1024
"""Tokens from which matching keeps no matrix of similarities: 1 MiB for each sample. Not measured on a GPU."""


def for_gpu(graph: fx.Graph, node: fx.Node) -> bool:
    """Put a Triton kernel in the place of an opaque call, or an attention into the form of the table."""
    if node.target is aten.scaled_dot_product_attention.default:
        return _attend(graph, node)
    return (triton_kernels() and _use_triton(graph, node)) or spell_out(graph, node)


@functools.cache
def triton_kernels() -> bool:
    """Whether the Triton kernels are there; registers them."""
    try:
        import tome_fx.kernels.gpu  # noqa: F401
    except ImportError:
        return False
    return True


# device type -> what is tried on each node; "" is every device not listed.
FORMS: dict[str, Callable[[fx.Graph, fx.Node], bool] | None] = {"cpu": fuse, "cuda": for_gpu, "": spell_out}


def lower(gm: fx.GraphModule) -> int:
    """Rewrite in place; returns how many ops were replaced."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and (device := _device(node)) is not None:
            form = FORMS.get(device, FORMS[""])
            count += form is not None and form(gm.graph, node)
    if count:
        drop_dead(gm.graph, is_impure)
        gm.recompile()
    return count


def _device(node: fx.Node) -> str | None:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first.device.type if isinstance(first, Tensor) else None


KERNELS = {getattr(tome, name).default: getattr(torch.ops.tome_cpu, name).default for name in cpu.SCHEMAS}


def call_kernels(graph: fx.Graph) -> int:
    """Put calls of the compiled CPU kernels into a graph that AOTAutograd made; returns how many.

    Does not wait until they are compiled: without them the operators are the opaque calls themselves.
    """
    nodes = [node for node in graph.nodes if node.target in KERNELS and _has_kernel(node)]
    for node in nodes:
        node.target = KERNELS[node.target]
    return len(nodes) + sum(map(_call_product, [*graph.nodes] if KERNELS and cpu.has_products() else ()))


FEWEST_ROWS = 16
"""Rows from which a product takes as long as to bring its weights into order."""


def _call_product(node: fx.Node) -> bool:
    """Let a product of rows with the transpose of dense weights be ours."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    *bias, x, weight = (cast(fx.Node, x).meta["val"] for x in node.args)
    rows, (k, n), held = x.shape[0], weight.shape, (x, weight, *bias)
    if any(v.dtype is not torch.bfloat16 or v.device.type != "cpu" for v in held) or any(v.shape != (n,) for v in bias):
        return False
    numbers = all(isinstance(size, int) for size in (k, n, x.stride(1), *weight.stride()))
    laid = numbers and x.stride(1) == weight.stride(0) == 1 and k % 2 == weight.stride(1) % 2 == 0 and k <= cpu.LONGEST
    if not laid or (isinstance(rows, int) and rows < FEWEST_ROWS):
        return False
    node.target, node.args = torch.ops.tome_cpu.product.default, (*node.args[-2:], *node.args[:-2])
    return True


def _has_kernel(node: fx.Node) -> bool:
    first = next(x.meta["val"] for x in node.args if isinstance(x, fx.Node))
    other = first.dtype.is_floating_point or first.dtype.is_complex
    return first.device.type == "cpu" and (first.dtype in cpu.DTYPES or not other)


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
    terms = _sum_alone(merge)
    if terms is not None:
        _replace(graph, merge, tome.merge_add.default, (*terms, *merge.args[1:]))
    return terms is not None


def _sum_alone(merge: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The terms of what is merged, where it is a sum of two like values that nobody else reads."""
    added = cast(fx.Node, merge.args[0])
    if added.target is not aten.add.Tensor or len(added.users) != 1 or added.kwargs:
        return None
    x, y = added.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return None
    whole = added.meta["val"]
    return (x, y) if all(_same_kind(n.meta["val"], whole) for n in (x, y)) else None


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _same_kind(a: Tensor, b: Tensor) -> bool:
    shapes = a.dim() == b.dim() and all(same(expr(m), expr(n)) for m, n in zip(a.shape, b.shape, strict=True))
    return shapes and a.dtype == b.dtype and a.device == b.device


# -- CUDA --------------------------------------------------------------------------------------------------------------


def _use_triton(graph: fx.Graph, node: fx.Node) -> bool:
    from tome_fx.kernels import gpu

    if node.target is tome.match.default:
        metric, heads = cast(fx.Node, node.args[0]), len(node.args) > 4 and bool(node.args[4])
        tokens = size_hint(metric.meta["val"].shape[-3 if heads else -2])
        _replace(graph, node, tome.match_triton.default, (*node.args[:4], heads, tokens >= BLOCKED))
    elif node.target is tome.merge.default and node.meta["val"].dtype in gpu.DTYPES:
        terms = _sum_alone(node) or (node.args[0], None)
        _replace(graph, node, tome.merge_triton.default, (*terms, *node.args[1:]))
    elif node.target is tome.merge_size.default:
        node.target = tome.merge_size_triton.default
    else:
        return False
    return True


@dataclass(frozen=True)
class LogSizes:
    """What an attention is made of that adds log sizes to its scores and nothing else. bias: `[B or 1, 1, 1, s]`."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    bias: fx.Node
    scale: float
    grouped: bool

    @classmethod
    def of(cls, node: fx.Node) -> LogSizes | None:
        call = Call(node)
        bias = call.args.get("attn_mask")
        if not isinstance(bias, fx.Node) or not _log_sizes(bias) or call.args.get("dropout_p"):
            return None
        query, key, value = call.nodes[:3]
        q, k, _, term = call.vals
        dim, scale = q.shape[-1], call.args.get("scale")
        if k.dim() != 4 or not isinstance(dim, int) or not _per_sample(term, k.shape[0]):
            return None
        scale = dim**-0.5 if scale is None else scale
        if not isinstance(scale, float) or scale < _SMALLEST_SCALE:
            return None
        while bias.target in _CASTS:  # the sizes' own float32
            bias = cast(fx.Node, bias.args[0])
        return cls(query, key, value, bias, scale, bool(call.args.get("enable_gqa")))


def _attend(graph: fx.Graph, node: fx.Node) -> bool:
    found = LogSizes.of(node)
    if found is None:
        return False
    q, k = found.query.meta["val"], found.key.meta["val"]
    form = attention.choose(q.dtype, q.shape[-1], size_hint(k.shape[2]))
    if form == attention.MASK:
        return False
    operands = (found.query, found.key, found.value, found.bias)
    _replace(graph, node, tome.attend.default, (*operands, found.scale, found.grouped, form))
    return True


# Below it, log(size) / scale leaves float16.
_SMALLEST_SCALE = 2.0**-7
_CASTS = frozenset({aten._to_copy.default})
_VIEWS = frozenset(
    {aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.expand.default,
     aten.unsqueeze.default, aten.narrow.default, aten.slice.Tensor}
)  # fmt: skip
_SIZES = frozenset({"merge_size", "merge_size_aten", "merge_size_triton"})


def _log_sizes(node: fx.Node) -> bool:
    """Whether a value is nothing but logarithms of sizes: finite, and without gradient."""
    while node.target in _CASTS | _VIEWS:
        node = cast(fx.Node, node.args[0])
    if node.target not in (tome.log_size.default, aten.log.default):
        return False
    size = cast(fx.Node, node.args[0])
    return isinstance(size.target, torch._ops.OpOverload) and size.target._opname in _SIZES


def _per_sample(bias: Tensor, batch: Any) -> bool:
    """Whether a term is `[B or 1, 1, 1, s]`."""
    if bias.dim() != 4 or any(expr(n) != 1 for n in bias.shape[1:3]):
        return False
    return expr(bias.shape[0]) == 1 or same(expr(bias.shape[0]), expr(batch))
