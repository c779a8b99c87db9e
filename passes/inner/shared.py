"""shared: compile one layer of a model once, and call it for every layer.

Layers of a merged model differ in their token counts and weights alone, and the counts are symbols here (`lengths`). A
graph that AOTAutograd gives is cut into its layers (`repeats`); parts that are the same but for the names of their
symbols are compiled once, what stands before and behind them as it is.

It cannot make a result wrong: what the compiler assumed of a part's symbols must hold for the numbers of every part
that is to use what it made (`Compiled.fits`), else that part is compiled for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..algebra.axes import expr
from .lengths import Lengths
from .repeats import body, cuts, reckons


def compile_shared(
    gm: fx.GraphModule, inputs: Sequence[Any], lengths: Lengths, compile_one: Any, **kwargs: Any
) -> Any:
    """`compile_one(gm, inputs, **kwargs)`, by its layers where they are the same. lengths: what sizes are in all calls.

    Returns what takes a list of inputs, which it empties, and gives the outputs.
    """
    from .run import Run, unheard  # here: a second of imports

    places = [] if torch._inductor.config.cpp_wrapper or _writes(gm.graph) else cuts(gm.graph)
    if not places:
        return compile_one(gm, inputs, **kwargs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, inputs, strict=True):  # a backward graph's are as its forward graph left them
        node.meta["val"] = value
    static = {placeholders[i] for i in kwargs.pop("static_input_idxs", ())}
    held: dict[str, list[Compiled]] = {}
    calls = []
    with unheard() as donate:
        for part in _parts(gm.graph, places, static, _donated(placeholders, kwargs)):
            known = held.setdefault(part.key, [])
            numbers = {symbol: sympy.sympify(lengths.number(symbol)) for symbol in part.symbols}
            found = next((one for one in known if one.fits(part, numbers)), None)
            if found is None:
                donate([i for i, node in enumerate(part.reads) if node in part.donated])
                fixed = [i for i, node in enumerate(part.reads) if node in static]
                found = Compiled(compile_one(part.module(gm), part.inputs, static_input_idxs=fixed, **kwargs), part)
                known.append(found)
            calls.append((found.run, part))
    made = Run(placeholders, calls, tree_leaves(gm.graph.output_node().args), lengths.hint)
    made.tell_strides()
    return made


def _writes(graph: fx.Graph) -> bool:
    """Whether anything is written in place: a part does not see which of its inputs share memory."""
    ops = (node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(op._schema.is_mutable for op in ops)


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """Nodes of a graph, in order; what they read of others; what others read of them.

    donated: inputs that it may overwrite. key: the same for parts that one compiled function can serve, but for their
    numbers; symbols: those in its sizes, in the order in which the key meets them.
    """

    nodes: Sequence[fx.Node]
    reads: Sequence[fx.Node]
    gives: Sequence[fx.Node]
    donated: frozenset[fx.Node]
    key: str = ""
    symbols: tuple[sympy.Symbol, ...] = ()

    @property
    def inputs(self) -> list[Any]:
        return [node.meta["val"] for node in self.reads]

    def module(self, root: fx.GraphModule) -> fx.GraphModule:
        """A graph of its own, whose outputs have the strides that their readers expect."""
        graph = fx.Graph()
        held: dict[fx.Node, fx.Node] = {}
        for node in self.reads:
            held[node] = graph.placeholder(node.name)
            held[node].meta["val"] = node.meta["val"]
        for node in self.nodes:
            held[node] = graph.node_copy(node, held.__getitem__)
        out = graph.output(tuple(held[node] for node in self.gives))
        out.meta["original_output_strides"] = [_strides(node) or None for node in self.gives]
        out.meta["user_visible_output_idxs"] = [i for i, node in enumerate(self.gives) if _strides(node)]
        return fx.GraphModule(root, graph)


def _strides(node: fx.Node) -> tuple[Any, ...]:
    val = node.meta.get("val")
    return tuple(val.stride()) if isinstance(val, Tensor) else ()


def _parts(graph: fx.Graph, places: Sequence[int], static: set[fx.Node], donated: Sequence[fx.Node]) -> Iterator[Part]:
    nodes = body(graph)
    pieces = [nodes[a:b] for a, b in pairwise([0, *places, len(nodes)])]
    read = [_with_reads(piece) for piece in pieces]
    last = {node: k for k, (_, reads) in enumerate(read) for node in reads}
    last |= {x: len(pieces) for x in tree_leaves(graph.output_node().args) if isinstance(x, fx.Node)}
    for k, (whole, reads) in enumerate(read):
        gives = [node for node in pieces[k] if last.get(node, k) > k]
        alone = (node for node in donated if node in reads and _views(node) <= set(whole) - set(gives))
        yield _named(Part(nodes=whole, reads=reads, gives=gives, donated=frozenset(alone)), static)


def _with_reads(piece: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes of a part, with those that reckon with sizes for it, and what they read of others."""
    nodes: dict[fx.Node, None] = {}
    reads: dict[fx.Node, None] = {}
    own = set(piece)

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if reckons(source) and source not in nodes:
                visit(source)
            elif source not in own and not reckons(source):
                reads.setdefault(source)
        nodes.setdefault(node)

    for node in piece:
        visit(node)
    return list(nodes), list(reads)


def _views(node: fx.Node) -> set[fx.Node]:
    """What reads a value, and what reads it through views of it."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        users = set(queue.pop().users) - found
        found |= users
        queue += [user for user in users if not isinstance(user.target, torch._ops.OpOverload) or _is_view(user.target)]
    return found


def _is_view(op: torch._ops.OpOverload) -> bool:
    return any(returned.alias_info is not None for returned in op._schema.returns)


def _named(part: Part, static: set[fx.Node]) -> Part:
    """The part with its key: all that there is to say of it, symbols by the order in which they are met."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    number = {node: i for i, node in enumerate((*part.reads, *part.nodes))}

    def size(n: Any) -> Any:
        own = expr(n) if isinstance(n, torch.SymInt) else n
        if not isinstance(own, sympy.Expr):
            return own
        for symbol in sorted(own.free_symbols - names.keys(), key=str):
            names[symbol] = sympy.Symbol(f"n{len(names)}")
        return str(own.xreplace(names))

    def value(val: Any) -> Any:
        if not isinstance(val, Tensor):
            return type(val).__name__, size(val)
        return str(val.dtype), str(val.device), val.requires_grad, [*map(size, val.shape)], [*map(size, val.stride())]

    def argument(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return "node", number[x]
        return [*map(argument, x)] if isinstance(x, (tuple, list)) else (type(x).__name__, repr(x))

    def values(node: fx.Node) -> list[Any]:
        return [value(val) for val in tree_leaves(node.meta.get("val"))]

    reads = [(values(node), node in static, node in part.donated) for node in part.reads]
    nodes = [(node.op, str(node.target), argument(node.args), argument([*node.kwargs.items()]), values(node))
             for node in part.nodes]  # fmt: skip
    key = repr((reads, nodes, [number[node] for node in part.gives]))
    return replace(part, key=key, symbols=tuple(names))


class Compiled:
    """A compiled part, the symbols it was compiled for, and what the compiler assumes of them."""

    def __init__(self, run: Any, part: Part) -> None:
        from torch._inductor.utils import shape_env_from_inputs

        self.run, self.symbols, self.env = run, part.symbols, shape_env_from_inputs(part.inputs)

    def fits(self, part: Part, numbers: Mapping[sympy.Symbol, Any]) -> bool:
        """Whether all that is assumed of the symbols holds for a part's numbers."""
        if self.env is None:
            return True
        own = {mine: numbers[other] for mine, other in zip(self.symbols, part.symbols, strict=True)}
        assumed = [guard.expr for guard in self.env.guards]
        assumed += [sympy.Eq(symbol, value) for symbol, value in self.env.replacements.items()]
        # what is said of symbols of other parts decides nothing about sizes of this one
        mine = [c.xreplace(own) for c in assumed if c.free_symbols and c.free_symbols <= own.keys()]
        # of free symbols it is a guard from now on
        return all(c == sympy.true or (c.free_symbols and self.env.evaluate_expr(c)) for c in mine)


def _donated(placeholders: Sequence[fx.Node], kwargs: Mapping[str, Any]) -> list[fx.Node]:
    """Inputs of a backward graph that it may overwrite."""
    from torch._inductor.utils import get_donated_idxs

    return [placeholders[i] for i in get_donated_idxs() or ()] if kwargs.get("is_backward") else []


__all__ = ["compile_shared"]
