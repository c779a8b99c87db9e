"""spread: what is the same along a dim is computed, and read, with size 1 there.

Libraries spread masks and tables over heads, queries or a batch before they use them. Every op that broadcasts reads
the same from what was spread; taken so, all spellings are one, and a mask of keys costs what its row costs.

    scores + expand(where(keep, 0, -inf), [B, H, N, N])        ->    scores + where(keep, 0, -inf)
    scores + repeat_interleave(mask, H, 0).view(B, H, N, N)    ->    scores + unsqueeze(mask, 1)
    ge(arange(N), 0)[:, None] & keep                           ->    ge(arange(N), 0)[:1, None] & keep
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..algebra.axes import expr
from ..analysis.values import gives_one_value, same_along
from ..building.emit import Emit
from ..rules import Call, find
from ..rules.base import FILLED, Role, Signature, sources
from ..rules.facts import NO_FACTS
from ..rules.pointwise import POINTWISE, MaskRule
from ..rules.signature import SignatureRule
from ..rules.views import PermuteRule, ViewRule

aten = torch.ops.aten

_SDPA, _MASK = aten.scaled_dot_product_attention.default, 3
"""Products, and which of their operands broadcasts."""
_UNLIKE = {aten.copy.default}
"""Pointwise ops whose operands do not all broadcast."""

Shape = tuple[Any, ...]


@dataclass
class _Spread:
    """A node that is `row().expand(shape).reshape(its shape)`. same: the dims of `shape` along which it is spread."""

    row: Callable[[], fx.Node]
    shape: Shape
    same: frozenset[int]

    @property
    def narrow(self) -> Shape:
        return tuple(1 if d in self.same else size for d, size in enumerate(self.shape))


def narrow_spread(graph: fx.Graph, mode: FakeTensorMode, known: Callable[[fx.Node], Tensor | None]) -> None:
    """Rewrite in place. known: the value of a node that is made of numbers. Dead code is left to the caller."""
    _Narrower(graph, mode, known).run()


class _Narrower:
    def __init__(self, graph: fx.Graph, mode: FakeTensorMode, known: Callable[[fx.Node], Tensor | None]) -> None:
        self.graph, self.emit, self.known = graph, Emit(graph, mode), known
        self.spread: dict[fx.Node, _Spread] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            if node.target is _SDPA:
                self._read_narrow(Call(node), [_MASK])
                continue
            found = self._spread(node) if gives_one_value(node.target) else None
            if found is not None and found.same:
                self.spread[node] = found

    # What an op makes of what is spread.

    def _spread(self, node: fx.Node) -> _Spread | None:
        if (value := self.known(node)) is not None:
            return self._of_value(node, value)
        if node.target in FILLED:
            return self._filled(node)
        if node.target is aten.expand.default:
            return self._expanded(node)
        call = Call(node)
        rule = find(call)
        if (rule is POINTWISE or isinstance(rule, MaskRule)) and node.target not in _UNLIKE:
            return self._pointwise(call)
        if node.target is aten.index.Tensor:
            return self._indexed(call)
        if isinstance(rule, SignatureRule) and len(call.results) == 1:
            return self._mapped(call, rule.signature(call, NO_FACTS))
        held = self.spread.get(call.nodes[0]) if call.nodes else None
        if held is not None and isinstance(rule, ViewRule):
            return self._view(call, held)
        if held is not None and held.shape == _shape(call.nodes[0]):
            if isinstance(rule, PermuteRule):
                return self._permuted(call, rule.order(call), held)
            if node.target is aten.slice.Tensor:
                return self._sliced(call, held)
        return None

    def _of_value(self, node: fx.Node, value: Tensor) -> _Spread:
        """Of what is made of numbers: the dims along which it does not vary."""
        shape = _shape(node)
        flat = [d for d, step in enumerate(value.stride()) if step == 0]
        for d in flat:
            value = value.narrow(d, 0, 1)
        for d in (along := same_along(value)):
            value = value.narrow(d, 0, 1)
        same = frozenset(d for d in (*flat, *along) if shape[d] != 1)

        def row() -> fx.Node:
            if value.numel() == 1:
                return self._number(node, value.item())
            found = node
            for d in sorted(same):
                with self.emit.after(found):
                    found = self.emit(aten.slice.Tensor, found, d, 0, 1)
            return found

        return _Spread(cache(row), shape, same)

    def _filled(self, node: fx.Node) -> _Spread | None:
        """One number everywhere."""
        names = str(node.target).split(".")[1]
        fill = 1 if "ones" in names else 0 if "zero" in names else Call(node).args["fill_value"]
        shape = _shape(node)
        row = cache(lambda: self._number(node, fill))
        return None if isinstance(fill, fx.Node) else _Spread(row, shape, frozenset(range(len(shape))))

    def _number(self, node: fx.Node, number: Any) -> fx.Node:
        """A number in the place of a node, with its rank."""
        own = node.meta["val"]
        return self._emit(node, aten.full.default, [1] * own.dim(), number, dtype=own.dtype, device=own.device)

    def _expanded(self, node: fx.Node) -> _Spread:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        shape, own = _shape(node), _shape(source)
        lead = len(shape) - len(own)
        held = self.spread.get(source)
        if held is not None and held.shape == own:
            narrow, take = held.narrow, held.row
        else:
            narrow, take = own, lambda: source
        same = frozenset(d for d in range(len(shape)) if shape[d] != 1 and (d < lead or narrow[d - lead] == 1))

        def row() -> fx.Node:
            found = take()
            for _ in range(lead):
                found = self._emit(node, aten.unsqueeze.default, found, 0)
            return found

        return _Spread(cache(row), shape, same)

    def _pointwise(self, call: Call) -> _Spread | None:
        """Of an op whose operands broadcast: the op on what was spread. Where the other operands have the size, the
        op itself reads what was spread."""
        node, read = call.node, sources(call.node, call.nodes)
        held = [self.spread.get(n) for n in read]
        taken = {n: h for n, h in zip(read, held, strict=True) if h}
        if not taken:
            return None
        row = self._again(node, taken)
        self._read_narrow(call, range(len(read)))
        if all(h is None or h.shape == _shape(n) for h, n in zip(held, read, strict=True)):
            narrow = _broadcast(h.narrow if h else _shape(n) for h, n in zip(held, read, strict=True))
            shape, same = _shape(node), frozenset(d for d, size in enumerate(narrow) if size != _shape(node)[d])
            if len(narrow) < len(shape):  # its shape is not that of what it reads
                return None
        else:
            cut = {h.shape for h in held if h}
            if len(cut) > 1 or any(h is None and prod(_shape(n)) != 1 for h, n in zip(held, read, strict=True)):
                return None
            (shape,) = cut
            same = frozenset.intersection(*(h.same for h in held if h))
        return _Spread(row, shape, same)

    def _indexed(self, call: Call) -> _Spread | None:
        """Of what is read at indices for all its dims: what it is at the rows of those."""
        indices = call.args["indices"]
        if any(not isinstance(i, fx.Node) or i.meta["val"].dtype is torch.bool for i in indices):
            return None
        if len(indices) != call.vals[0].dim():
            return None
        held = {i: h for i in indices if (h := self.spread.get(i)) is not None and h.shape == _shape(i)}
        shape = _shape(call.node)
        narrow = _broadcast(held[i].narrow if i in held else _shape(i) for i in indices)
        same = frozenset(d for d, size in enumerate(narrow) if size != shape[d])
        return _Spread(self._again(call.node, held), shape, same)

    def _mapped(self, call: Call, sig: Signature) -> _Spread | None:
        """Of an op that maps dims and sums nothing (an outer product, a gather, a running sum): the op without what is
        spread in all operands."""
        if Role.SUM in sig.roles.values() or len({*call.nodes}) < len(call.nodes):
            return None
        held = [h if (h := self.spread.get(n)) and h.shape == _shape(n) else None for n in call.nodes]
        narrow = [h.narrow if h else _shape(n) for h, n in zip(held, call.nodes, strict=True)]
        places = [(letter, i, d) for i, letters in enumerate(sig.ins) for d, letter in enumerate(letters)]
        whole = {letter for letter, i, d in places if narrow[i][d] != 1}
        gone = {letter for letter in sig.outs[0] if letter is not None and sig.role(letter) is Role.MAP} - whole
        same = frozenset(d for d, x in enumerate(sig.outs[0]) if x in gone and _shape(call.node)[d] != 1)
        if not same:
            return None
        cut: dict[fx.Node, _Spread] = {}
        for node, h, letters in zip(call.nodes, held, sig.ins, strict=True):
            sizes = tuple(1 if x in gone else n for x, n in zip(letters, h.shape, strict=True)) if h else ()
            if h is not None and sizes != h.narrow:
                if not all(isinstance(n, int) for n in sizes):
                    return None
                h = replace(h, row=cache(partial(self._emit, call.node, aten.expand.default, h.row(), [*sizes])))
            cut |= {node: h} if h else {}
        return _Spread(self._again(call.node, cut), _shape(call.node), same)

    def _view(self, call: Call, held: _Spread) -> _Spread | None:
        """A view of what is spread: plain again where no dim of it is spread in part."""
        node, source, shape = call.node, call.nodes[0], _shape(call.node)
        if node.target is aten.unsqueeze.default and held.shape == _shape(source):
            d = call.axis(call.args["dim"], len(shape))
            return _Spread(self._again(node, {source: held}), shape, frozenset(x + (x >= d) for x in held.same))
        if (groups := _groups(held.shape, shape)) is None:
            return None
        return held if _mixed(groups, held) else self._plain(node, held)

    def _plain(self, node: fx.Node, held: _Spread) -> _Spread | None:
        """What is spread, by the dims of its node: what shares a dim with what is not is written out."""
        shape = _shape(node)
        if held.shape == shape:
            return held
        if (groups := _groups(held.shape, shape)) is None:
            return None
        mixed = _mixed(groups, held)
        whole = [size if d in mixed else n for d, (size, n) in enumerate(zip(held.shape, held.narrow, strict=True))]
        same = {d for before, after in groups if set(before) & held.same - mixed for d in after if shape[d] != 1}
        sizes = [1 if d in same else size for d, size in enumerate(shape)]

        def row() -> fx.Node:
            found = held.row()
            if tuple(whole) != held.narrow:
                found = self._emit(node, aten.expand.default, found, whole)
            return self._reshaped(node, found, sizes)

        return _Spread(cache(row), shape, frozenset(same))

    def _permuted(self, call: Call, order: Sequence[int], held: _Spread) -> _Spread:
        same = frozenset(k for k, d in enumerate(order) if d in held.same)
        row = cache(lambda: self._emit(call.node, aten.permute.default, held.row(), list(order)))
        return _Spread(row, _shape(call.node), same)

    def _sliced(self, call: Call, held: _Spread) -> _Spread:
        d, shape = call.axis(call.args["dim"]), _shape(call.node)
        if d in held.same:
            return _Spread(held.row, shape, held.same if shape[d] != 1 else held.same - {d})
        return _Spread(self._again(call.node, {call.nodes[0]: held}), shape, held.same)

    # The new graph.

    def _read_narrow(self, call: Call, places: Iterable[int]) -> None:
        """Let an op read what was spread in these operands, where its result has the same shape."""
        node, shapes = call.node, [_shape(n) for n in call.nodes]
        read = len(sources(node, call.nodes))
        for i in (i for i in places if i < len(call.nodes)):
            held = self.spread.get(call.nodes[i])
            held = self._plain(call.nodes[i], held) if held is not None else None
            if held is None or not held.same:
                continue
            before, shapes[i] = shapes[i], held.narrow
            if node.target is not _SDPA and _broadcast(shapes[:read]) != _shape(node):
                shapes[i] = before
                continue
            name = call.operands[i][0][0]
            at = [a.name for a in call.target._schema.arguments].index(name)
            if at < len(node.args):
                node.update_arg(at, held.row())
            else:
                node.update_kwarg(name, held.row())

    def _again(self, node: fx.Node, taken: Mapping[fx.Node, _Spread]) -> Callable[[], fx.Node]:
        """An op as it is now, on the rows of its operands."""
        held = node.args, node.kwargs

        def build() -> fx.Node:
            args, kwargs = fx.map_arg(held, lambda n: taken[n].row() if n in taken else n)
            again = self._emit(node, node.target, *args, **kwargs)
            again.meta["val"] = again.meta["val"].to(node.meta["val"].dtype)  # under autocast it may be another
            return again

        return cache(build)

    def _emit(self, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.emit.before(origin):
            return self.emit(target, *args, **kwargs)

    def _reshaped(self, origin: fx.Node, source: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        if _shape(source) == tuple(sizes):
            return source
        return self._emit(origin, aten.reshape.default, source, list(sizes))


def _shape(node: fx.Node) -> Shape:
    return tuple(expr(size) for size in node.meta["val"].shape)


def _broadcast(shapes: Iterable[Shape]) -> Shape:
    found: list[Any] = []
    for shape in shapes:
        found = [1] * (len(shape) - len(found)) + found
        for d in range(-len(shape), 0):
            found[d] = shape[d] if found[d] == 1 else found[d]
    return tuple(found)


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """The dims of two shapes of the same elements in row-major order, in the finest groups of equal size."""
    if not all(isinstance(size, int) and size for size in (*before, *after)):
        return None
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        i, j = i + len(left), j + len(right)
        while (a := prod(before[d] for d in left)) != (b := prod(after[d] for d in right)):
            if a < b:
                left, i = [*left, i], i + 1
            else:
                right, j = [*right, j], j + 1
        found.append((left, right))
    return found


def _mixed(groups: list[tuple[list[int], list[int]]], held: _Spread) -> set[int]:
    """The dims of what is spread that share a dim of its node with one that is, or is not."""
    own = [{d for d in before if held.shape[d] != 1} for before, _ in groups]
    return {d for dims in own if dims & held.same and not dims <= held.same for d in dims}


__all__ = ["narrow_spread"]
