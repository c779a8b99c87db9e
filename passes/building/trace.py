"""Traced values: what rules compute with while `rewrite` emits the new graph.

A `Traced` stands for a tensor of the new graph: its node, and a tensor on the meta device for shape and dtype. A
method call appends a node. Tracing through fake tensors would give the same graph and cost a millisecond a node; here
the ops of the old graph get the shapes that the plan foresees, and only what the passes add is run on meta tensors.

    y = x.permute([0, 2, 1])      ->  %permute = aten.permute.default(%x, [0, 2, 1])

Symbolic sizes are plain SymInts here; a node is made for one when it becomes an argument.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..algebra.axes import Size, expr, same, sized

aten = torch.ops.aten


class Builder:
    """The new graph. Every node gets the meta of `origin`, the node of the old graph that it comes from."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self.mode = mode
        self.origin: dict[str, Any] = {}
        self._size_nodes: dict[Any, fx.Node] = {}
        self._size_sources: dict[Any, tuple[fx.Node, int]] = {}
        self._empties: dict[Any, Tensor] = {}

    def begin(self, node: fx.Node) -> None:
        """Nodes made from now on come from `node`."""
        self.origin = {k: v for k, v in node.meta.items() if k not in OF_THE_VALUE}

    def placeholder(self, node: fx.Node) -> Any:
        """A copy of an input of the old graph."""
        new = self.graph.placeholder(str(node.target))
        return self._held(new, node.meta.get("val"))

    def copy(self, target: Any, args: Any, kwargs: Any, val: Any) -> Any:
        """A node whose result is known: `val`, the old graph's fake value, or one made by `like`."""
        new = self.graph.call_function(target, self.arguments(args), self.arguments(kwargs))
        return self._held(new, val)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A node of ours: shape and dtype come from running it on meta tensors."""
        tensors = [a for a in flat((args, kwargs)) if isinstance(a, Traced)]
        device = tensors[0].device if tensors else kwargs["device"]
        on_meta = {k: torch.device("meta") if k == "device" else v for k, v in kwargs.items()}
        with enable_python_dispatcher(), torch.no_grad():
            found = target(*_on_meta(args), **_on_meta(on_meta))
        val = map_aggregate(found, lambda m: self._fake(m, device))
        return self._held(self.graph.call_function(target, self.arguments(args), self.arguments(kwargs)), val)

    def again(self, nodes: Sequence[fx.Node], x: Traced, other: Callable[[fx.Node], Any], *, same: bool = False) -> Any:
        """What nodes of the old graph do to the first of them, done to `x`. other: what they read besides. same: their
        results have the shapes that they had."""
        held: dict[fx.Node, Any] = {nodes[0]: x}
        for node in nodes[1:]:
            held |= {n: other(n) for n in node.all_input_nodes if n not in held}
            args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
            target: Any = aten.reshape.default if node.target is aten.view.default else node.target
            if target is operator.getitem:
                held[node] = args[0][args[1]]  # type: ignore[index]
            elif same:
                held[node] = self.copy(target, args, kwargs, node.meta["val"])
            else:
                held[node] = self.call(target, *args, **kwargs)
        return held[nodes[-1]]

    def like(self, val: Any, shapes: Sequence[Sequence[Any]]) -> Any:
        """Fake values as `val`, a tensor or a tuple with tensors, with other shapes."""
        left = iter(shapes)

        def changed(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return v
            return self._fake(self.empty(next(left), v.dtype), v.device)

        return tuple(map(changed, val)) if isinstance(val, (tuple, list)) else changed(val)

    def arguments(self, values: Any) -> Any:
        """Traced values and symbolic sizes as nodes."""
        return map_aggregate(values, self._argument)

    def empty(self, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """A tensor on the meta device, one for each shape and dtype: with symbolic sizes each costs a millisecond."""
        key = (dtype, *map(expr, shape))
        if key not in self._empties:
            self._empties[key] = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return self._empties[key]

    # -- results ---------------------------------------------------------------------------------------------------

    def _fake(self, meta: Any, device: torch.device) -> Any:
        return FakeTensor(self.mode, meta, device) if isinstance(meta, Tensor) else meta

    def _held(self, node: fx.Node, val: Any) -> Any:
        """The value of a new node, as rules see it: Traced, a tuple of them, a SymInt, or the bare node."""
        node.meta = {**self.origin, "val": val}
        if isinstance(val, Tensor):
            for d, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt):
                    self._size_sources.setdefault(expr(size), (node, d))
            return Traced(self, node, val)
        if isinstance(val, torch.SymInt):
            self._size_nodes.setdefault(expr(val), node)
            return val
        if isinstance(val, (tuple, list)):
            return tuple(
                self._held(self.graph.call_function(operator.getitem, (node, i)), v) if isinstance(v, Tensor) else v
                for i, v in enumerate(val)
            )
        return node

    # -- arguments -------------------------------------------------------------------------------------------------

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Traced):
            return value.node
        if isinstance(value, torch.SymInt):
            return self._size(expr(value))
        return value

    def _size(self, size: Any) -> Any:
        """A node for a symbolic size: a graph input, a dim of some tensor, or computed from other sizes."""
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size in self._size_nodes:
            return self._size_nodes[size]
        if size in self._size_sources:
            source, d = self._size_sources[size]
            node = self.graph.call_function(aten.sym_size.int, (source, d))
        else:
            tracer = GraphAppendingTracer(self.graph)
            last = next(iter(reversed(self.graph.nodes)))
            symbols = {s: fx.Proxy(self._size(s), tracer) for s in size.free_symbols}
            node = sympy_interp(PythonReferenceAnalysis, symbols, size).node
            while (last := last.next) is not node:
                if "val" not in last.meta:
                    self._evaluate(last)
        self._evaluate(node)
        self._size_nodes[size] = node
        return node

    def _evaluate(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        node.meta = {**self.origin, "val": node.target(*args)}  # type: ignore[operator]

    def size(self, size: Any) -> Any:
        """An int or sympy expression as an int or SymInt."""
        return sized(size, self.mode)


OF_THE_VALUE = frozenset({"val", "tensor_meta", "example_value", "constant", "unbacked_bindings"})


def fake_like(val: FakeTensor, shape: Sequence[Any]) -> FakeTensor:
    """A fake value as `val` with another shape; running the op again to be told it takes a millisecond a node."""
    return FakeTensor(val.fake_mode, torch.empty(tuple(shape), dtype=val.dtype, device="meta"), val.device)


def in_order(x: Traced, like: Any) -> Traced:
    """`x` with its dims in memory in the order of those of `like`, which has as many; no copy is made where they are.
    Where `like` does not fill the memory that it spans, `x` as it is."""
    order = _order(like)
    if order is None:
        return x
    if order == sorted(order):
        return x.contiguous()
    return x.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def _order(val: Any) -> list[int] | None:
    """The dims from the outermost in memory; None where no order says how they lie. Compared without guards."""
    if not isinstance(val, Tensor) or val.layout is not torch.strided:
        return None
    sizes, strides = list(map(expr, val.shape)), list(map(expr, val.stride()))
    left, step = [*range(val.dim())], expr(1)
    order: list[int] = []
    while left:
        # Of dims of size 1 the stride says nothing.
        d = next((d for d in reversed(left) if sizes[d] == 1 or same(strides[d], step)), None)
        if d is None:
            return None
        left.remove(d)
        order.insert(0, d)
        step = step * sizes[d]
    return order


def flat(value: Any) -> list[Any]:
    """What the arguments of a node hold, out of lists and dicts."""
    found: list[Any] = []
    map_aggregate(value, found.append)
    return found


def _on_meta(value: Any) -> Any:
    return map_aggregate(value, lambda v: v.meta if isinstance(v, Traced) else v)


class Traced:
    """A tensor of the new graph. Methods have the meaning of torch.Tensor's."""

    __slots__ = ("_meta", "builder", "node", "val")

    def __init__(self, builder: Builder, node: fx.Node, val: Tensor) -> None:
        self.builder, self.node, self.val = builder, node, val
        self._meta: Tensor | None = None

    @property
    def meta(self) -> Tensor:
        """The value on the meta device."""
        if self._meta is None:
            self._meta = self.builder.empty(self.val.shape, self.val.dtype)
        return self._meta

    @property
    def shape(self) -> torch.Size:
        return self.val.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.val.dtype

    @property
    def device(self) -> torch.device:
        return self.val.device

    def dim(self) -> int:
        return self.val.dim()

    def _call(self, target: Any, *args: Any) -> Traced:
        return self.builder.call(target, self, *args)

    def reshape(self, shape: Sequence[Any]) -> Traced:
        """Every size is to be given: with symbolic ones it takes torch milliseconds to find the same shape."""
        val = self.builder.like(self.val, [shape])
        return self.builder.copy(aten.reshape.default, (self, list(shape)), {}, val)

    def permute(self, order: Sequence[int]) -> Traced:
        return self._call(aten.permute.default, list(order))

    def contiguous(self) -> Traced:
        return self._call(aten.contiguous.default)

    def transpose(self, a: int, b: int) -> Traced:
        return self._call(aten.transpose.int, a, b)

    def flatten(self, start: int, end: int = -1) -> Traced:
        return self._call(aten.flatten.using_ints, start, end)

    def unsqueeze(self, d: int) -> Traced:
        return self._call(aten.unsqueeze.default, d)

    def expand(self, sizes: Sequence[Any]) -> Traced:
        return self._call(aten.expand.default, list(sizes))

    def narrow(self, d: int, start: Any, length: Any) -> Traced:
        val = self.builder.like(self.val, [[*self.shape[:d], length, *self.shape[d:][1:]]])
        return self.builder.copy(aten.slice.Tensor, (self, d, start, start + length), {}, val)

    def select(self, d: int, index: Any) -> Traced:
        return self._call(aten.select.int, d, index)

    def split_with_sizes(self, sizes: Sequence[Any], d: int) -> tuple[Traced, ...]:
        return self.builder.call(aten.split_with_sizes.default, self, list(sizes), d)

    def slice_scatter(self, src: Traced, d: int, start: Any, stop: Any) -> Traced:
        return self._call(aten.slice_scatter.default, src, d, start, stop)

    def gather(self, d: int, index: Traced) -> Traced:
        return self._call(aten.gather.default, d, index)

    def detach(self) -> Traced:
        return self._call(aten.detach.default)

    def to(self, dtype: torch.dtype) -> Traced:
        return self if dtype is self.dtype else self.builder.call(aten._to_copy.default, self, dtype=dtype)

    def sum(self, dims: Sequence[int], *, keepdim: bool) -> Traced:
        return self._call(aten.sum.dim_IntList, list(dims), keepdim)

    def sqrt(self) -> Traced:
        return self._call(aten.sqrt.default)

    def logical_not(self) -> Traced:
        return self._call(aten.logical_not.default)

    def masked_fill(self, mask: Traced, value: float) -> Traced:
        return self._call(aten.masked_fill.Scalar, mask, value)

    def choose(self, yes: float, no: float) -> Traced:
        """float32: `yes` where this bool tensor is True, `no` elsewhere (torch.where); finite numbers stay finite."""
        return self._call(aten.where.Scalar, single(yes), single(no)).to(torch.float32)

    def pad(self, pads: Sequence[Size], value: float) -> Traced:
        return self._call(aten.constant_pad_nd.default, list(pads), value)

    # Numbers too go to the overload for tensors, as torch traces them: OpenVINO has no rule for the others.
    def __add__(self, other: Any) -> Traced:
        return self._call(aten.add.Tensor, other)

    def __sub__(self, other: Any) -> Traced:
        return self._call(aten.sub.Tensor, other)

    def __mul__(self, other: Traced) -> Traced:
        return self._call(aten.mul.Tensor, other)

    def __truediv__(self, other: Any) -> Traced:
        return self._call(aten.div.Tensor, other)


def single(number: float) -> float:
    """A number as float32 holds it: models in float64 mask by the lowest number of theirs."""
    largest = torch.finfo(torch.float32).max
    return number if abs(number) == float("inf") else max(-largest, min(float(number), largest))


def cat(parts: Sequence[Traced], d: int) -> Traced:
    """torch.cat."""
    return parts[0].builder.call(aten.cat.default, list(parts), d)


__all__ = ["OF_THE_VALUE", "Builder", "Traced", "cat", "fake_like", "in_order", "single"]
