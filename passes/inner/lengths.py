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
from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..algebra.axes import Expr, expr
from ..analysis.values import size_hint
from ..plan import Plan
from .shape_rules import ARGUMENTS, MAKE_SIZES, RULES, Shape, like_the_operands, symbolic, tensors_read

aten, prims = torch.ops.aten, torch.ops.prims

FEWEST = 3
"""Lengths from which sharing kernels saves more than symbolic sizes cost."""


def lengths_to_share(gm: fx.GraphModule, plan: Plan) -> list[int]:
    """The lengths that merges leave, each once; none where another size of the captured graph is symbolic."""
    for node in gm.graph.nodes:
        for val in tree_leaves(node.meta.get("val")):
            if any(isinstance(size, torch.SymInt) for size in (val.shape if isinstance(val, Tensor) else [val])):
                return []
    found = list(dict.fromkeys(size_hint(merge.step.after) for merge in plan.every))
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
        walk = Walk(gm, list(inputs), self)
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


class Walk:
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
        if symbolic(shape) and {s for n in shape if not isinstance(n, int) for s in n.free_symbols} <= set(self.nodes):
            self._hold(node, (shape,))
            self.inputs[i] = node.meta["val"]

    def _known(self, node: fx.Node) -> Shape:
        val, shape = node.meta.get("val"), self.lengths.known.get(node.name, ())
        return self._checked(shape, val) if isinstance(val, Tensor) and len(shape) == val.dim() else ()

    # -- nodes of the graph ----------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        results = val if isinstance(val, (tuple, list)) else (val,)
        read = tensors_read(node)
        makes_sizes = not read or node.target in MAKE_SIZES
        if not makes_sizes and not any(n in self.shapes for n in read):
            return
        rule = RULES.get(node.target, like_the_operands)
        shapes = tuple(
            self._checked(rule(self, node, tuple(v.shape), k), v) if isinstance(v, Tensor) else None
            for k, v in enumerate(results)
        )
        if any(shape is not None and symbolic(shape) for shape in shapes):
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
                    given[i] = self._fake(val, shape, source) if symbolic(shape) else val
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
            v if shape is None or not symbolic(shape) else self._fake(v, shape, node)
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
        rule = ARGUMENTS.get(node.target)
        if rule is not None:
            rule(self, node, shapes)
            return
        around = {self.number(s): s for shape in (*shapes, *map(self.shape, tensors_read(node))) if shape
                  for s in shape if not isinstance(s, int)}  # fmt: skip
        for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name not in _may_besymbolic(node.target):
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


def _met(value: Any, around: dict[int, Expr]) -> Any:
    return around.get(value, value) if type(value) is int else value


@functools.cache
def _may_besymbolic(op: Any) -> frozenset[str]:
    """Names of the arguments that are sizes; what `Argument.type` calls int may be an int and no more. A number to
    reckon with (`Scalar`) stays one: an exponent that became a symbol would be a call of pow."""
    return frozenset(re.findall(r"SymInt\S* (\w+)", str(op._schema).partition("->")[0]))


__all__ = ["FEWEST", "Lengths", "lengths_to_share"]
