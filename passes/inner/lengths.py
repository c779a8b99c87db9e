"""lengths: make the token counts that merges leave symbols, in the ATen graph that a compiler is about to lower.

Layers whose token counts differ in nothing else then share kernels. AOTAutograd has traced the graph with numbers by
then, which is several times as fast as to trace it with symbols; here each number is read back as what it came from.

It cannot make a result wrong: a symbol stands for one number in every call, so it is right wherever that number stood.
Where a count meets a width of the same number by accident, the compiler takes the symbol for that number again.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._inductor import inductor_prims
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..algebra.axes import Expr, expr, quotient
from ..analysis.values import size_hint
from ..plan import Plan
from ..rules import Call

aten, prims = torch.ops.aten, torch.ops.prims
Shape = tuple[Expr, ...]

_TO_THE_END = 2**62
"""From here a slice's end is no number of tokens."""

FEWEST = 3
"""Lengths from which sharing kernels saves more than symbolic sizes cost."""


def lengths_to_share(gm: fx.GraphModule, plan: Plan) -> list[int]:
    """The lengths that merges leave, each once; none where another size of the captured graph is symbolic."""
    for node in gm.graph.nodes:
        for val in tree_leaves(node.meta.get("val")):
            if any(isinstance(size, torch.SymInt) for size in (val.shape if isinstance(val, Tensor) else [val])):
                return []
    found = list(dict.fromkeys(size_hint(merge.step.after) for merge in plan.merges.values()))
    return found if len(found) >= FEWEST else []


class Lengths:
    """The symbols of one compiled function, for its forward and its backward graph."""

    def __init__(self, values: Sequence[int]) -> None:
        self.values = tuple(values)
        self.known: dict[str, Shape] = {}
        self.met: dict[int, Expr] = {}
        self._numbers: dict[Expr, int] = {}
        self._symbols: dict[int, Expr] = {}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        """Rewrite in place a graph that AOTAutograd gives; returns what its inputs are then.

        A forward graph has inputs for the lengths, symbols of its fake mode's ShapeEnv. A backward graph has those
        values of the forward graph that were saved for it, by the same names.
        """
        walk = _Walk(gm, list(inputs), self)
        walk.run()
        gm.recompile()
        return walk.inputs

    def number(self, size: Expr) -> int:
        """What a size is in every call."""
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            self._numbers[size] = int(size.xreplace({s: n for n, s in self._symbols.items()}))
        return self._numbers[size]

    def symbol(self, value: int) -> Expr:
        """The symbol of a length; the number itself where it is none."""
        return self._symbols.get(value, value)

    def add(self, value: int, symbol: Expr) -> None:
        """Let a symbol stand for a length from now on."""
        self._symbols[value] = symbol
        self.met.setdefault(value, symbol)

    def meet(self, size: Expr) -> None:
        """Remember a size that is a length but for a few tokens."""
        if not isinstance(size, int) and any((size - symbol).is_Integer for symbol in size.free_symbols):
            self.met.setdefault(self.number(size), size)


class _Walk:
    def __init__(self, gm: fx.GraphModule, inputs: list[Any], lengths: Lengths) -> None:
        self.graph, self.inputs, self.lengths, self.number = gm.graph, inputs, lengths, lengths.number
        self.mode = next(
            (x.fake_mode for x in tree_leaves(inputs) if isinstance(x, FakeTensor)), cast(FakeTensorMode, None)
        )
        self.shapes: dict[fx.Node, tuple[Shape | None, ...]] = {}
        self.nodes: dict[Expr, fx.Node] = {}
        self._ints: dict[Expr, Any] = {}
        self._fakes: dict[Any, Tensor] = {}

    def run(self) -> None:
        placeholders = self.graph.find_nodes(op="placeholder")
        if self.mode is None or not isinstance(self.mode.shape_env, ShapeEnv):
            return
        self.last = placeholders[-1]
        for node in placeholders:
            self._defined(node)
        for i, node in enumerate(placeholders):
            self._saved(node, i)
        if not self.nodes:
            return
        for node in list(self.graph.nodes):
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                self._visit(node)
            elif node.target is operator.getitem:
                whole, at = cast(tuple[fx.Node, int], node.args)
                if whole in self.shapes:
                    self._hold(node, (self.shapes[whole][at],))

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _defined(self, node: fx.Node) -> None:
        """Find the symbols that an input gives: those that are all of it, or all of one of its sizes."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr.is_Symbol and val.node.hint in self.lengths.values:
            self.lengths.add(size_hint(val), val.node.expr)
            self.nodes.setdefault(val.node.expr, node)
            self._ints[val.node.expr] = val
        for d, size in enumerate(self._known(node)):
            if not isinstance(size, int) and size.is_Symbol and size not in self.nodes:
                self.nodes[size] = self._after_inputs(aten.sym_size.int, (node, d), size)

    def _saved(self, node: fx.Node, i: int) -> None:
        """Let an input have the sizes that it had in the forward graph."""
        shape = self._known(node)
        if _symbolic(shape) and {s for n in shape if not isinstance(n, int) for s in n.free_symbols} <= set(self.nodes):
            self._hold(node, (shape,))
            self.inputs[i] = node.meta["val"]

    def _known(self, node: fx.Node) -> Shape:
        val, shape = node.meta.get("val"), self.lengths.known.get(node.name, ())
        return self._checked(shape, val) if isinstance(val, Tensor) and len(shape) == val.dim() else ()

    # -- nodes of the graph ----------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        results = val if isinstance(val, (tuple, list)) else (val,)
        read = _tensors(node)
        makes_sizes = not read or node.target in _MAKE_SIZES
        if not makes_sizes and not any(n in self.shapes for n in read):
            return
        rule = _RULES.get(node.target, _like_the_operands)
        shapes = tuple(
            self._checked(rule(self, node, tuple(v.shape), k), v) if isinstance(v, Tensor) else None
            for k, v in enumerate(results)
        )
        if any(shape is not None and _symbolic(shape) for shape in shapes):
            self._hold(node, shapes)
        if "eager_input_vals" in node.meta:
            node.meta["eager_input_vals"] = self._as_traced(node)
        self._arguments(node, shapes)

    def _as_traced(self, node: fx.Node) -> Any:
        """The operands of an operator as it was called when traced: their strides are what it may ask for."""
        given, spec = tree_flatten(node.meta["eager_input_vals"])
        sources = tree_leaves((node.args, node.kwargs))
        if len(given) == len(sources):
            for i, (source, val) in enumerate(zip(sources, given, strict=True)):
                if isinstance(source, fx.Node) and isinstance(val, Tensor):
                    shape = self._checked(self.shape(source), val)
                    given[i] = self._fake(val, shape, source) if _symbolic(shape) else val
        return tree_unflatten(given, spec)

    def _checked(self, shape: Shape, val: Tensor) -> Shape:
        return tuple(
            n if isinstance(s, int) or s.is_Integer or self.number(s) != n else s
            for s, n in zip(shape, val.shape, strict=True)
        )

    def shape(self, node: fx.Node) -> Shape:
        """The sizes of a value that is one tensor."""
        held = self.shapes.get(node)
        return held[0] if held and held[0] is not None else tuple(node.meta["val"].shape)

    def _hold(self, node: fx.Node, shapes: tuple[Shape | None, ...]) -> None:
        """Give a value symbolic sizes and strides."""
        val = node.meta["val"]
        several = isinstance(val, (tuple, list))
        fakes = [
            v if shape is None or not _symbolic(shape) else self._fake(v, shape, node)
            for v, shape in zip(val if several else (val,), shapes, strict=True)
        ]
        self.shapes[node] = shapes
        node.meta["val"] = type(val)(fakes) if several else fakes[0]
        node.meta.pop("tensor_meta", None)
        for size in {size for shape in shapes for size in shape or ()}:
            self.lengths.meet(size)
        if not several and shapes[0] is not None:
            self.lengths.known[node.name] = shapes[0]

    def _fake(self, val: Tensor, shape: Shape, node: fx.Node) -> Tensor:
        strides = self._strides(val, shape, node)
        key = (val.dtype, val.device, shape, strides)
        if key not in self._fakes:
            size, stride = ([self.int(n) for n in ns] for ns in (shape, strides))
            with _disable_current_modes():
                meta = torch.empty_strided(size, stride, dtype=val.dtype, device="meta")
            self._fakes[key] = FakeTensor(self.mode, meta, val.device)
        return self._fakes[key]

    def _strides(self, val: Tensor, shape: Shape, node: fx.Node) -> Shape:
        """A dim's stride is the size times the stride of the dim inside it, or what an operand has."""
        found: list[Expr] = list(val.stride())
        inner: Expr = 1
        for d in sorted(range(val.dim()), key=lambda d: (val.stride(d), val.shape[d] != 1, -d)):
            if val.stride(d) == 0:
                continue
            if self.number(inner) == val.stride(d):
                found[d] = inner
            else:
                found[d] = self._stride_of_an_operand(val.stride(d), node)
            inner = found[d] * shape[d]
        return tuple(found)

    def _stride_of_an_operand(self, stride: int, node: fx.Node) -> Expr:
        for source in node.all_input_nodes:
            held = source.meta.get("val")
            if isinstance(held, Tensor):
                for size in held.stride():
                    own = expr(size)
                    if not isinstance(own, int) and self.number(own) == stride:
                        return own
        return stride

    # -- arguments -------------------------------------------------------------------------------------------------

    def _arguments(self, node: fx.Node, shapes: tuple[Shape | None, ...]) -> None:
        """Put symbols in the place of numbers among the arguments that may be symbolic."""
        rule = _ARGUMENTS.get(node.target)
        if rule is not None:
            rule(self, node, shapes)
            return
        around = {self.number(s): s for shape in (*shapes, *map(self.shape, _tensors(node))) if shape
                  for s in shape if not isinstance(s, int)}  # fmt: skip
        for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name not in _may_be_symbolic(node.target):
                continue
            if i < len(node.args):
                node.update_arg(i, self.named(fx.node.map_aggregate(node.args[i], lambda a: _met(a, around))))
            elif argument.name in node.kwargs:
                held = fx.node.map_aggregate(node.kwargs[argument.name], lambda a: _met(a, around))
                node.update_kwarg(argument.name, self.named(held))

    def named(self, value: Any) -> Any:
        """Sizes as the graph writes them: numbers, and nodes for all that is symbolic."""
        return fx.node.map_aggregate(value, lambda v: self._node(v) if isinstance(v, sympy.Expr) else v)

    def int(self, size: Expr) -> Any:
        """A size as torch has it."""
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size not in self._ints:
            env = cast(ShapeEnv, self.mode.shape_env)
            self._ints[size] = env.create_symintnode(size, hint=self.number(size))
        return self._ints[size]

    def _node(self, size: Expr) -> Any:
        if size.is_Integer:
            return int(size)
        if size not in self.nodes:
            if size.is_Pow:
                target, first, rest = operator.mul, size.base, size / size.base
            else:
                target = {sympy.Add: operator.add, sympy.Mul: operator.mul}[size.func]
                first, rest = size.args[0], size.func(*size.args[1:])
            self.nodes[size] = self._after_inputs(target, (self._node(first), self._node(rest)), size)
        return self.nodes[size]

    def _after_inputs(self, target: Any, args: Any, size: Expr) -> fx.Node:
        """A node for a size, before all that may use it."""
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(target, args)
        self.last.meta["val"] = self.int(size)
        return self.last


def _symbolic(shape: Shape) -> bool:
    return not all(isinstance(size, int) for size in shape)


def _met(value: Any, around: dict[int, Expr]) -> Any:
    return around.get(value, value) if type(value) is int else value


@functools.cache
def _may_be_symbolic(op: Any) -> frozenset[str]:
    """Names of the arguments that are sizes; what `Argument.type` calls int may be an int and no more. A number to
    reckon with (`Scalar`) stays one: an exponent that became a symbol would be a call of pow."""
    return frozenset(re.findall(r"SymInt\S* (\w+)", str(op._schema).partition("->")[0]))


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


# -- rules: the sizes of result `k` of a node, for which the graph has the numbers `found` ----------------------------
#
# Each may be wrong about where a number came from: what does not give the number is dropped, and see the top.

Rule = Callable[[_Walk, fx.Node, tuple[int, ...], int], Shape]


def _like_the_operands(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """A size is that of an operand's dim in the same place, from behind or from the front, or of any symbolic dim."""
    shapes = [walk.shape(n) for n in _tensors(node)]

    def size(d: int) -> Expr:
        n = found[d]
        for places in ([len(s) - len(found) + d for s in shapes], [d] * len(shapes)):
            here = [s[p] for s, p in zip(shapes, places, strict=True) if 0 <= p < len(s) and walk.number(s[p]) == n]
            if here:
                return here[0]
        return next((m for s in shapes for m in s if not isinstance(m, int) and walk.number(m) == n), n)

    return tuple(map(size, range(len(found))))


def _new(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """A value made of nothing: its sizes are those met before."""
    return tuple(walk.lengths.met.get(n, n) for n in found)


def _merge(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """[*keep, *rest of x]: the first of the dims that an index of `keep` has are its own."""
    keep = walk.shape(cast(fx.Node, node.args[-2]))
    return (*keep, *walk.shape(_tensors(node)[0])[len(keep) :])


def _unmerge(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """[*index, *rest of x]"""
    x, *_ = args = cast(Sequence[fx.Node], node.args)
    index = walk.shape(args[-1 if node.target is torch.ops.tome.unmerge.default else -3])
    return (*index, *walk.shape(x)[len(index) :])


def _sums(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """[*sample, groups, *rest of grad]"""
    grad, index = (walk.shape(n) for n in cast(Sequence[fx.Node], node.args[:2]))
    return (*index[:-1], walk.lengths.symbol(found[len(index) - 1]), *grad[len(index) :])


def _match(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """assign, keep, moved, similarity, size and log size, each [*sample, tokens]."""
    sample = walk.shape(_tensors(node)[0])[: len(found) - 1]
    before, after = _before_and_after(walk, node)
    return (*sample, (before, after, before - after, before - after, after, after)[k])


def _before_and_after(walk: _Walk, node: fx.Node) -> tuple[Expr, Expr]:
    assign, keep = node.meta["val"][:2]
    return walk.shape(_tensors(node)[0])[assign.dim() - 1], walk.lengths.symbol(walk.number(expr(keep.shape[-1])))


def _product(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    a, b = (walk.shape(n) for n in cast(Sequence[fx.Node], node.args[-2:]))
    return (*a[:-1], b[-1])


def _view(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    """Dims are cut where the products from the front are equal; a group's symbols go where they fit."""
    before = list(walk.shape(_tensors(node)[0]))
    shape: list[Expr] = list(found)
    if 0 in found:
        return found
    i = j = 0
    while j < len(found):
        start, total, size = j, before[i] if i < len(before) else 1, found[j]
        group = [total]
        i, j = i + 1, j + 1
        while walk.number(total) != size:
            if walk.number(total) < size:
                group.append(before[i])
                total, i = total * before[i], i + 1
            else:
                size, j = size * found[j], j + 1
        if _symbolic(tuple(group)):
            shape[start:j] = _shared_out(walk, group, total, found[start:j])
    return tuple(shape)


def _shared_out(walk: _Walk, group: Sequence[Expr], total: Expr, found: Sequence[int]) -> list[Expr]:
    """Symbolic sizes of the dims that a group of dims is viewed as: first those that stay, then one that is left."""
    shape: list[Expr] = list(found)
    left = list(group)
    for d, n in enumerate(found):
        same = next((s for s in left if not isinstance(s, int) and walk.number(s) == n), None)
        if same is not None and quotient(total, same) is not None:
            shape[d], total = same, quotient(total, same)
            left.remove(same)
    for d, n in enumerate(found):
        rest = quotient(total, prod(m for e, m in enumerate(shape) if e != d and isinstance(m, int)))
        if isinstance(shape[d], int) and rest is not None and walk.number(rest) == n:
            shape[d] = rest
            break
    return shape


def _expand(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    shape = _like_the_operands(walk, node, found, k)
    old = walk.shape(_tensors(node)[0])
    added = len(shape) - len(old)
    grown = [d < added or walk.number(old[d - added]) != found[d] for d in range(len(found))]
    return tuple(walk.lengths.met.get(found[d], found[d]) if grown[d] else shape[d] for d in range(len(found)))


def _permute(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    old = walk.shape(_tensors(node)[0])
    return tuple(old[d] for d in cast(Sequence[int], node.args[1]))


def _index_shape(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    return walk.shape(cast(fx.Node, node.args[2]))


def _cat(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    parts = [walk.shape(n) for n in cast(Sequence[fx.Node], node.args[0])]
    parts = [p for p in parts if len(p) == len(found)]
    d = Call(node).args["dim"] % len(found)
    shape = list(_like_the_operands(walk, node, found, k))
    shape[d] = sum(p[d] for p in parts)
    return tuple(shape)


def _part(walk: _Walk, whole: Expr, n: int) -> Expr:
    """How many tokens n are, of so many: a length, all but a few, or a few."""
    if isinstance(whole, int) or n == 1:
        return n
    if walk.number(whole) == n:
        return whole
    if walk.lengths.symbol(n) != n:
        return walk.lengths.symbol(n)
    return whole - (walk.number(whole) - n) if 2 * n > walk.number(whole) else n


def _slice(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    old, d = _cut(walk, node)
    return (*old[:d], _part(walk, old[d], found[d]), *old[d + 1 :])


def _split(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    old, d = _cut(walk, node)
    return (*old[:d], _split_sizes(walk, old[d], cast(Sequence[int], node.args[1]))[k], *old[d + 1 :])


def _cut(walk: _Walk, node: fx.Node) -> tuple[Shape, int]:
    """The sizes of what a slice or split cuts, and the dim along which."""
    old = walk.shape(_tensors(node)[0])
    return old, Call(node).args["dim"] % len(old)


def _split_sizes(walk: _Walk, whole: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Parts that are lengths, and the largest of the others as what is left."""
    parts: list[Expr] = list(map(walk.lengths.symbol, sizes))
    if not isinstance(whole, int) and sizes:
        large = max(range(len(parts)), key=lambda i: (isinstance(parts[i], int), sizes[i]))
        parts[large] = whole - sum(p for i, p in enumerate(parts) if i != large)
    return parts


def _pad(walk: _Walk, node: fx.Node, found: tuple[int, ...], k: int) -> Shape:
    source, pads = cast(tuple[fx.Node, Sequence[int]], node.args[:2])
    old, shape = walk.shape(source), list(found)
    for d, n in enumerate(found):
        at = 2 * (len(found) - 1 - d)
        grows = sum(pads[at : at + 2]) if at < len(pads) else 0
        length = walk.lengths.symbol(n)
        shape[d] = length if grows and not isinstance(length, int) else old[d] + grows
    return tuple(shape)


_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MATCHES = tuple(getattr(torch.ops.tome, name).default for name in ("match", "match_by", "match_parts", "match_size"))
_MERGES = tuple(getattr(torch.ops.tome, name).default for name in ("merge", "merge_add", "merge_size", "merge_bias"))
_UNMERGES = (torch.ops.tome.unmerge.default, torch.ops.tome.merge_backward.default)
_SUMS = torch.ops.tome.unmerge_backward.default
_NEW = (
    aten.full.default, aten.empty.memory_format, aten.zeros.default, aten.ones.default, aten.rand.default,
    aten.randn.default, inductor_prims.random
)  # fmt: skip
_NEW_LIKE = (aten.new_zeros.default, aten.new_full.default, aten.new_empty.default)
_MAKE_SIZES = frozenset((*_MATCHES, *_MERGES, _SUMS, *_NEW, *_NEW_LIKE, aten.expand.default))
"""What can have a length where no operand has one."""
_RULES: dict[Any, Rule] = {
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


def _sizes_at(place: int) -> Callable[[_Walk, fx.Node, Sequence[Shape | None]], None]:
    """The argument there is the shape of the result."""

    def rule(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
        node.update_arg(place, walk.named(list(cast(Shape, shapes[0]))))

    return rule


def _expand_sizes(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    asked, shape = cast(Sequence[int], node.args[1]), cast(Shape, shapes[0])
    node.update_arg(1, walk.named([a if a == -1 else s for a, s in zip(asked, shape, strict=True)]))


def _merged_away(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    before, after = _before_and_after(walk, node)
    at = [argument.name for argument in node.target._schema.arguments].index("r")  # type: ignore[union-attr]
    node.update_arg(at, walk.named(before - after))


def _iota_length(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    node.update_arg(0, walk.named(cast(Shape, shapes[0])[0]))


def _slice_bounds(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    old, d = _cut(walk, node)
    start, end, step = (Call(node).args[name] for name in ("start", "end", "step"))
    whole, size = old[d], cast(Shape, shapes[0])[d]
    if step != 1 or isinstance(whole, int):
        return
    n = walk.number(whole)
    first = start or 0
    first = max(first + n, 0) if first < 0 else min(first, n)
    begin = whole - (n - first) if 2 * first > n else first
    if not isinstance(begin, int):
        node.update_arg(2, walk.named(begin))
    if end is not None and end < _TO_THE_END:
        node.update_arg(3, walk.named(begin + size))


def _split_lengths(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    _, d = _cut(walk, node)
    node.update_arg(1, walk.named([cast(Shape, shape)[d] for shape in shapes]))


def _pads(walk: _Walk, node: fx.Node, shapes: Sequence[Shape | None]) -> None:
    source, pads = cast(tuple[fx.Node, Sequence[int]], node.args[:2])
    old, shape, changed = walk.shape(source), cast(Shape, shapes[0]), list[Any](pads)
    for at in range(0, len(pads), 2):
        d = len(shape) - 1 - at // 2
        before, behind = pads[at : at + 2]
        grows = shape[d] - old[d]
        if before == 0 or behind:
            changed[at + 1] = grows - before
        else:
            changed[at] = grows
    node.update_arg(1, walk.named(changed))


_ARGUMENTS: dict[Any, Callable[[_Walk, fx.Node, Sequence[Shape | None]], None]] = {
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
