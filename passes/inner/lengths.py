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
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..algebra.axes import Expr, expr
from ..analysis.values import size_hint
from ..capture import fakeify, mode_of
from ..plan import Plan
from .shape_rules import ARGUMENTS, MAKE_SIZES, RULES, Shape, like_the_operands, shape_of, symbolic, tensors_read

aten, prims = torch.ops.aten, torch.ops.prims

FEWEST = 3
"""Lengths from which sharing kernels saves more than symbolic sizes cost."""


def lengths_to_share(gm: fx.GraphModule, plan: Plan) -> list[int]:
    """The lengths that merges leave, each once; none where they are symbols already.

    Other sizes may be symbols (a free batch) where no gradient is asked for: what a backward graph assumes of them
    comes too late for a guard.
    """
    after = dict.fromkeys(expr(merge.step.after) for merge in plan.every)
    found = [int(n) for n in after if isinstance(n, (int, sympy.Integer))]
    values = (val for node in gm.graph.nodes for val in tree_leaves(node.meta.get("val")))
    free = [size for val in values for size in _symbolic_sizes(val)]
    if len(found) < max(FEWEST, len(after)) or (free and torch.is_grad_enabled()):
        return []
    return found if all(expr(size).is_polynomial() for size in free) else []


def _symbolic_sizes(val: Any) -> list[torch.SymInt]:
    sizes = [*val.shape, *val.stride()] if isinstance(val, Tensor) else [val]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


class Lengths:
    """The symbols of one compiled function, for its forward and its backward graph."""

    def __init__(self, values: Sequence[int], free: Mapping[sympy.Symbol, int] | None = None) -> None:
        """free: symbols of the graph that are no lengths, with what they are in the call that it is compiled for."""
        self.values = tuple(values)
        self.free = dict(free or {})
        self.known: dict[str, Shape] = {}
        self.met: dict[Expr, Expr] = {}
        self._numbers: dict[Expr, Expr] = {}
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

    def number(self, size: Expr) -> Expr:
        """What a size is in every call: a number, or what it is of free symbols."""
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            held = sympy.expand(size.xreplace({s: n for n, s in self._symbols.items()}))
            self._numbers[size] = int(held) if held.is_Integer else held
        return self._numbers[size]

    def hint(self, size: Expr) -> int:
        """What a size is in the call that the graph is compiled for."""
        held = self.number(size)
        return held if isinstance(held, int) else int(held.xreplace(self.free))

    def settled(self, condition: sympy.Basic) -> sympy.Basic:
        """What is said of lengths, with their numbers."""
        return condition.xreplace({s: sympy.Integer(n) for n, s in self._symbols.items()})

    def symbol(self, value: Expr) -> Expr:
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


class Fresh:
    """The inputs of a graph in a fake mode of their own, its symbols in a ShapeEnv of their own, so that no symbol that
    is made there, and nothing that is assumed of one, is known to Dynamo. What is assumed of symbols that came from
    there is told when all is compiled (`tell`)."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        # a length may be the same number as a free size, and is not that size
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env)
        # layers of other lengths share few entries, and to copy a symbolic shape out costs more than to run the op
        self.mode.cache_enabled = False
        self.outer: ShapeEnv | None = None
        self.own: dict[sympy.Symbol, sympy.Symbol] = {}
        self.free: dict[sympy.Symbol, int] = {}
        self._seen = mode_of(inputs)
        self.inputs = [self._input(x) for x in inputs]

    def _input(self, x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            return self._size(x)
        if not isinstance(x, Tensor):
            return x
        held = fakeify(x, self._seen)
        if not _symbolic_sizes(held):
            return self.mode.from_tensor(x, static_shapes=True)
        with _disable_current_modes():
            size, stride = ([*map(self._size, ns)] for ns in (held.shape, held.stride()))
            meta = torch.empty_strided(size, stride, dtype=x.dtype, device="meta")
        return FakeTensor(self.mode, meta, x.device).requires_grad_(x.requires_grad)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt) or size.node.is_constant():
            return int(size)
        held, self.outer = size.node.expr, size.node.shape_env
        for symbol in sorted(held.free_symbols - self.own.keys(), key=str):
            self._add(symbol)
        return self.env.create_symintnode(held.xreplace(self.own), hint=size_hint(size))

    def _add(self, symbol: sympy.Symbol) -> None:
        assert self.outer is not None
        hint = size_hint(self.outer.create_symintnode(symbol, hint=None))
        source = ConstantSource(f"tome_free_{len(self.own)}")
        own = self.env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        self.env.var_to_range[own] = self.outer.var_to_range[symbol]
        self.own[symbol], self.free[own] = own, hint

    def tell(self, lengths: Lengths) -> None:
        """Let what was assumed of symbols of the graph's own be assumed where they came from."""
        back = {own: symbol for symbol, own in self.own.items()}
        assumed = [guard.expr for guard in self.env.guards]
        assumed += [sympy.Eq(symbol, value) for symbol, value in self.env.replacements.items()]
        for condition in map(lengths.settled, assumed):
            if condition.free_symbols & back.keys():
                assert self.outer is not None and self.outer.evaluate_expr(condition.xreplace(back))


class Walk:
    def __init__(self, gm: fx.GraphModule, inputs: list[Any], lengths: Lengths) -> None:
        self.graph, self.inputs, self.lengths = gm.graph, inputs, lengths
        self.number, self.hint = lengths.number, lengths.hint
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
        for find in (self._defined, self._measured):
            for node in placeholders:
                find(node)
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
        symbol = expr(val) if isinstance(val, torch.SymInt) else 0
        if symbol in self.lengths.free or (isinstance(symbol, sympy.Symbol) and size_hint(val) in self.lengths.values):
            if symbol not in self.lengths.free:
                self.lengths.add(size_hint(val), symbol)
            self.nodes.setdefault(symbol, node)
            self._ints[symbol] = val

    def _measured(self, node: fx.Node) -> None:
        """Find those that no input is, but a size of one."""
        for d, size in enumerate(self._known(node) or (shape_of(node.meta["val"]) if self._is_free(node) else ())):
            if not isinstance(size, int) and size.is_Symbol and size not in self.nodes:
                self.nodes[size] = self._after_inputs(aten.sym_size.int, (node, d), size)

    def _is_free(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        return isinstance(val, Tensor) and any(size in self.lengths.free for size in shape_of(val))

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
            self._checked(rule(self, node, shape_of(v), k), v) if isinstance(v, Tensor) else None
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
            for s, n in zip(shape, shape_of(val), strict=True)
        )

    def shape(self, node: fx.Node) -> Shape:
        """The sizes of a value that is one tensor."""
        held = self.shapes.get(node)
        return held[0] if held and held[0] is not None else shape_of(node.meta["val"])

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
        found: list[Expr] = list(map(expr, val.stride()))
        inner: Expr = 1
        for d in sorted(range(val.dim()), key=lambda d: (self.hint(found[d]), self.hint(shape[d]) != 1, -d)):
            if found[d] == 0:
                continue
            if self.number(inner) == found[d]:
                found[d] = inner
            else:
                found[d] = self._stride_of_an_operand(found[d], node)
            inner = found[d] * shape[d]
        return tuple(found)

    def _stride_of_an_operand(self, stride: Expr, node: fx.Node) -> Expr:
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
            self._ints[size] = env.create_symintnode(size, hint=self.hint(size))
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
