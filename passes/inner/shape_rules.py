"""shape_rules: what the sizes of a node were before AOTAutograd made them numbers, op by op.

A rule gives the sizes of result `k` of a node, for which the graph has the numbers `found`. Each may be wrong about
where a number came from: what does not give the number is dropped, and see `lengths.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch._inductor import inductor_prims

from ..algebra.axes import Expr, expr, quotient
from ..rules import Call

if TYPE_CHECKING:
    from .lengths import Walk

aten, prims = torch.ops.aten, torch.ops.prims
Shape = tuple[Expr, ...]
_TO_THE_END = 2**62
"""From here a slice's end is no number of tokens."""


def symbolic(shape: Shape) -> bool:
    return not all(isinstance(size, int) for size in shape)


def shape_of(val: Tensor) -> Shape:
    return tuple(map(expr, val.shape))


def tensors_read(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


Rule = Callable[["Walk", fx.Node, Shape, int], Shape]


def like_the_operands(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """A size is that of an operand's dim in the same place, from behind or from the front, or of any symbolic dim."""
    shapes = [walk.shape(n) for n in tensors_read(node)]

    def size(d: int) -> Expr:
        n = found[d]
        for places in ([len(s) - len(found) + d for s in shapes], [d] * len(shapes)):
            here = [s[p] for s, p in zip(shapes, places, strict=True) if 0 <= p < len(s) and walk.number(s[p]) == n]
            if here:
                return here[0]
        return next((m for s in shapes for m in s if not isinstance(m, int) and walk.number(m) == n), n)

    return tuple(map(size, range(len(found))))


def _new(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """A value made of nothing: its sizes are those met before."""
    return tuple(walk.lengths.met.get(n, n) for n in found)


def _merge(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """[*keep, *rest of x]: the first of the dims that an index of `keep` has are its own."""
    keep = walk.shape(cast(fx.Node, node.args[-2]))
    return (*keep, *walk.shape(tensors_read(node)[0])[len(keep) :])


def _unmerge(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """[*index, *rest of x]"""
    x, *_ = args = cast(Sequence[fx.Node], node.args)
    index = walk.shape(args[-1 if node.target is torch.ops.tome.unmerge.default else -3])
    return (*index, *walk.shape(x)[len(index) :])


def _sums(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """[*sample, groups, *rest of grad]"""
    grad, index = (walk.shape(n) for n in cast(Sequence[fx.Node], node.args[:2]))
    return (*index[:-1], walk.lengths.symbol(found[len(index) - 1]), *grad[len(index) :])


def _match(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """assign, keep, moved, similarity, size and log size, each [*sample, tokens]."""
    sample = walk.shape(tensors_read(node)[0])[: len(found) - 1]
    before, after = _before_and_after(walk, node)
    pairs = found[-1] if node.target is torch.ops.tome.match_some.default else before - after
    return (*sample, (before, after, pairs, pairs, after, after)[k])


def _before_and_after(walk: Walk, node: fx.Node) -> tuple[Expr, Expr]:
    assign, keep = node.meta["val"][:2]
    return walk.shape(tensors_read(node)[0])[assign.dim() - 1], walk.lengths.symbol(walk.number(expr(keep.shape[-1])))


def _product(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    a, b = (walk.shape(n) for n in cast(Sequence[fx.Node], node.args[-2:]))
    return (*a[:-1], b[-1])


def _view(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    """Dims are cut where the products from the front are equal; a group's symbols go where they fit."""
    before = list(walk.shape(tensors_read(node)[0]))
    shape: list[Expr] = list(found)
    if 0 in found:
        return found
    i = j = 0
    while j < len(found):
        start, total, size = j, before[i] if i < len(before) else 1, found[j]
        group = [total]
        i, j = i + 1, j + 1
        while walk.hint(total) != walk.hint(size):
            if walk.hint(total) < walk.hint(size):
                group.append(before[i])
                total, i = total * before[i], i + 1
            else:
                size, j = size * found[j], j + 1
        if symbolic(tuple(group)):
            shape[start:j] = _shared_out(walk, group, total, found[start:j])
    return tuple(shape)


def _shared_out(walk: Walk, group: Sequence[Expr], total: Expr, found: Sequence[Expr]) -> list[Expr]:
    """Symbolic sizes of the dims that a group of dims is viewed as: first those that stay, then one that is left."""
    shape: list[Expr] = list(found)
    left, placed = list(group), set[int]()
    for d, n in enumerate(found):
        same = next((s for s in left if not isinstance(s, int) and walk.number(s) == n), None)
        if same is not None and quotient(total, same) is not None:
            shape[d], total = same, quotient(total, same)
            left.remove(same)
            placed.add(d)
    for d, n in enumerate(found):
        rest = quotient(total, prod(m for e, m in enumerate(shape) if e != d and e not in placed))
        if d not in placed and rest is not None and walk.number(rest) == n:
            shape[d] = rest
            break
    return shape


def _expand(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    shape = like_the_operands(walk, node, found, k)
    old = walk.shape(tensors_read(node)[0])
    added = len(shape) - len(old)
    grown = [d < added or walk.number(old[d - added]) != found[d] for d in range(len(found))]
    return tuple(walk.lengths.met.get(found[d], found[d]) if grown[d] else shape[d] for d in range(len(found)))


def _permute(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    old = walk.shape(tensors_read(node)[0])
    return tuple(old[d] for d in cast(Sequence[int], node.args[1]))


def _index_shape(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    return walk.shape(cast(fx.Node, node.args[2]))


def _cat(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    parts = [walk.shape(n) for n in cast(Sequence[fx.Node], node.args[0])]
    parts = [p for p in parts if len(p) == len(found)]
    d = Call(node).args["dim"] % len(found)
    shape = list(like_the_operands(walk, node, found, k))
    shape[d] = sum(p[d] for p in parts)
    return tuple(shape)


def _part(walk: Walk, whole: Expr, n: int) -> Expr:
    """How many tokens n are, of so many: a length, all but a few, or a few."""
    if isinstance(whole, int) or n == 1 or not (isinstance(n, int) and isinstance(walk.number(whole), int)):
        return n
    if walk.number(whole) == n:
        return whole
    if walk.lengths.symbol(n) != n:
        return walk.lengths.symbol(n)
    return whole - (walk.number(whole) - n) if 2 * n > walk.number(whole) else n


def _slice(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    old, d = _cut(walk, node)
    return (*old[:d], _part(walk, old[d], found[d]), *old[d + 1 :])


def _split(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    old, d = _cut(walk, node)
    sizes = cast(Sequence[int], node.args[1])
    if not all(isinstance(n, int) for n in sizes):
        return found
    return (*old[:d], _split_sizes(walk, old[d], sizes)[k], *old[d + 1 :])


def _cut(walk: Walk, node: fx.Node) -> tuple[Shape, int]:
    """The sizes of what a slice or split cuts, and the dim along which."""
    old = walk.shape(tensors_read(node)[0])
    return old, Call(node).args["dim"] % len(old)


def _split_sizes(walk: Walk, whole: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Parts that are lengths, and the largest of the others as what is left."""
    parts: list[Expr] = list(map(walk.lengths.symbol, sizes))
    if not isinstance(whole, int) and sizes:
        large = max(range(len(parts)), key=lambda i: (isinstance(parts[i], int), sizes[i]))
        parts[large] = whole - sum(p for i, p in enumerate(parts) if i != large)
    return parts


def _pad(walk: Walk, node: fx.Node, found: Shape, k: int) -> Shape:
    source, pads = cast(tuple[fx.Node, Sequence[int]], node.args[:2])
    old, shape = walk.shape(source), list(found)
    if not all(isinstance(n, int) for n in pads):
        return found
    for d, n in enumerate(found):
        at = 2 * (len(found) - 1 - d)
        grows = sum(pads[at : at + 2]) if at < len(pads) else 0
        length = walk.lengths.symbol(n)
        shape[d] = length if grows and not isinstance(length, int) else old[d] + grows
    return tuple(shape)


_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_FINDERS = ("match", "match_by", "match_parts", "match_pieces", "match_some", "match_size")
_MATCHES = tuple(getattr(torch.ops.tome, name).default for name in _FINDERS)
_MERGES = tuple(getattr(torch.ops.tome, name).default for name in ("merge", "merge_add", "merge_size", "merge_bias"))
_UNMERGES = (torch.ops.tome.unmerge.default, torch.ops.tome.merge_backward.default)
_SUMS = torch.ops.tome.unmerge_backward.default
_NEW = (
    aten.full.default, aten.empty.memory_format, aten.zeros.default, aten.ones.default, aten.rand.default,
    aten.randn.default, inductor_prims.random
)  # fmt: skip
_NEW_LIKE = (aten.new_zeros.default, aten.new_full.default, aten.new_empty.default)
MAKE_SIZES = frozenset((*_MATCHES, *_MERGES, _SUMS, *_NEW, *_NEW_LIKE, aten.expand.default))
"""What can have a length where no operand has one."""
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MATCHES, _match),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default), _product),
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.gather.default: _index_shape,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.split_with_sizes.default: _split,
    aten.constant_pad_nd.default: _pad,
    **dict.fromkeys(_MERGES, _merge),
    **dict.fromkeys(_UNMERGES, _unmerge),
    _SUMS: _sums,
    **dict.fromkeys((*_NEW, *_NEW_LIKE, prims.iota.default), _new),
}

# -- arguments that are no size of the result ------------------------------------------------------------------------


def _sizes_at(place: int) -> Callable[[Walk, fx.Node, Sequence[Shape | None]], None]:
    """The argument there is the shape of the result."""

    def rule(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
        node.update_arg(place, walk.named(list(cast(Shape, shapes[0]))))

    return rule


def _expand_sizes(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    asked, shape = cast(Sequence[int], node.args[1]), cast(Shape, shapes[0])
    node.update_arg(1, walk.named([a if a == -1 else s for a, s in zip(asked, shape, strict=True)]))


def _merged_away(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    before, after = _before_and_after(walk, node)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index("least" if "least" in names else "r")
    node.update_arg(at, walk.named(before - after))


def _iota_length(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    node.update_arg(0, walk.named(cast(Shape, shapes[0])[0]))


def _slice_bounds(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    old, d = _cut(walk, node)
    start, end, step = (Call(node).args[name] for name in ("start", "end", "step"))
    whole, size = old[d], cast(Shape, shapes[0])[d]
    n = walk.number(whole)
    if step != 1 or isinstance(whole, int) or not all(type(x) is int for x in (n, start or 0, end or 0)):
        return
    first = start or 0
    first = max(first + n, 0) if first < 0 else min(first, n)
    begin = whole - (n - first) if 2 * first > n else first
    if not isinstance(begin, int):
        node.update_arg(2, walk.named(begin))
    if end is not None and end < _TO_THE_END:
        node.update_arg(3, walk.named(begin + size))


def _split_lengths(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    _, d = _cut(walk, node)
    node.update_arg(1, walk.named([cast(Shape, shape)[d] for shape in shapes]))


def _pads(walk: Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    source, pads = cast(tuple[fx.Node, Sequence[int]], node.args[:2])
    old, shape, changed = walk.shape(source), cast(Shape, shapes[0]), list[Any](pads)
    if not all(isinstance(n, int) for n in pads):
        return
    for at in range(0, len(pads), 2):
        d = len(shape) - 1 - at // 2
        before, behind = pads[at : at + 2]
        grows = shape[d] - old[d]
        if before == 0 or behind:
            changed[at + 1] = grows - before
        else:
            changed[at] = grows
    node.update_arg(1, walk.named(changed))


ARGUMENTS: dict[Any, Callable[[Walk, fx.Node, Sequence[Shape | None]], None]] = {
    **dict.fromkeys(_VIEWS, _sizes_at(1)),
    aten.expand.default: _expand_sizes,
    aten.slice.Tensor: _slice_bounds,
    aten.split_with_sizes.default: _split_lengths,
    aten.constant_pad_nd.default: _pads,
    **dict.fromkeys(_NEW, _sizes_at(0)),
    **dict.fromkeys(_NEW_LIKE, _sizes_at(1)),
    prims.iota.default: _iota_length,
    **dict.fromkeys(_MATCHES, _merged_away),
}

__all__ = ["ARGUMENTS", "MAKE_SIZES", "RULES", "Shape", "like_the_operands", "shape_of", "symbolic", "tensors_read"]
