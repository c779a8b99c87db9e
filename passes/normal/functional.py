"""functional: in-place writes become values, a write through a view becomes a scatter into its base.

    add_(x, pos)                    ->  x_1 = add(x, pos), later reads of x read x_1
    copy_(slice(x, 1, 1, N), y)     ->  x_1 = slice_scatter(x, y, 1, 1, N)

Nothing but writes to graph inputs mutates afterwards, and those stand at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..algebra.axes import expr
from ..building.emit import Emit
from ..rules.base import draws, tensors_of
from .memory import storage
from .regions import CaptureError

aten = torch.ops.aten

_VIEW_SCATTER: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def is_impure(node: fx.Node) -> bool:
    """Nodes that must stay though nobody reads them: inputs, outputs, writes, and switches of global state."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or (not draws(node.target) and node.is_impure())
    return node.target in _STATE_SWITCHES


_STATE_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._functorch._vmap_increment_nesting,
    torch._C._functorch._vmap_decrement_nesting,
}


def functionalise(gm: fx.GraphModule, mode: FakeTensorMode, learned: Collection[fx.Node] = ()) -> None:
    """Replace in-place ops by values (see the module docstring). Raises CaptureError where one has no such form.

    learned: the placeholders that gradients flow to.
    """
    emit = Emit(gm.graph, mode)
    _root_strided_views(emit)
    if not any(_mutated(node) for node in gm.graph.nodes):
        return
    _name_views(emit)
    _Functionaliser(emit, learned).run()
    gm.graph.lint()


def _mutated(node: fx.Node) -> list[str]:
    """Names of the arguments that a node writes to."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory a node's result shares."""
    own = node.meta.get("val")
    if node.op != "call_function" or not isinstance(own, Tensor):
        return None
    sources = node.all_input_nodes
    if node.target is operator.getitem:  # one of several views
        sources = sources[0].all_input_nodes
    for source in sources:
        held = source.meta.get("val")
        if isinstance(held, Tensor) and storage(held) == storage(own):
            return source
    return None


def _root_strided_views(emit: Emit) -> None:
    """`as_strided` reads memory as it lies: let it read a row of all elements in the order in which they lie now,
    whatever strides its operand will have.

        as_strided(x.mT, size, stride)    ->    as_strided(contiguous(reshape(x, [-1])), size, stride, 0)
    """
    for node in list(emit.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.as_strided.default, aten.as_strided_.default):
            continue
        root = node
        while (source := _viewed(root)) is not None:
            root = source
        held, own = root.meta["val"], node.meta["val"]
        if not _ints([*held.shape, *held.stride(), *own.shape, *own.stride(), own.storage_offset()]):
            raise CaptureError("as_strided of a tensor of dynamic shape is left as it is")
        order = sorted(range(held.dim()), key=lambda d: (held.stride(d), held.shape[d]), reverse=True)
        start = own.storage_offset() - held.storage_offset()
        last = start + sum((n - 1) * step for n, step in zip(own.shape, own.stride(), strict=True))
        if not _dense(held, order) or start < 0 or last >= held.numel():
            raise CaptureError("as_strided reads memory that its operand does not hold, and is left as it is")
        with emit.before(node):
            row = root if order == sorted(order) else emit(aten.permute.default, root, order)
            row = row if row.meta["val"].dim() == 1 else emit(aten.reshape.default, row, [-1])
            row = emit(aten.contiguous.default, row)
            view = emit(aten.as_strided.default, row, list(own.shape), list(own.stride()), start)
        node.replace_all_uses_with(view)
        emit.graph.erase_node(node)


def _ints(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _dense(value: Tensor, order: Sequence[int]) -> bool:
    """Whether the elements of a tensor lie one behind the other, its dims in that order."""
    step = 1
    for d in reversed(order):
        if value.shape[d] != 1 and value.stride(d) != step:
            return False
        step *= value.shape[d]
    return True


def _name_views(emit: Emit) -> None:
    """Views in one spelling: one of several results is a slice or a select, an op that changes its operand's shape
    in place gives a view of it.

        getitem(chunk(x, 2, -1), 1)    ->    slice(x, -1, 4, 8)
        unsqueeze_(x, 0)               ->    unsqueeze(x, 0)
    """
    for node in list(emit.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and (base := _viewed(node)) is not None:
            with emit.before(node):
                view = _one_of_several(emit, node, base)
            if view is not None:
                node.replace_all_uses_with(view)
                emit.graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.inplace_view in node.target.tags:
            node.target = _as_view(node.target)


def _one_of_several(emit: Emit, node: fx.Node, base: fx.Node) -> fx.Node | None:
    """The view that a result of chunk, split, unbind, ... is; None where it is none that has a name."""
    several, at = node.args
    assert isinstance(several, fx.Node) and isinstance(at, int)
    views, held, own = several.meta["val"], base.meta["val"], node.meta["val"]
    if several.args[0] is not base or not _ints([*own.shape, *held.shape, *own.stride(), *held.stride()]):
        return None
    if several.target is aten.unbind.int:
        return emit(aten.select.int, base, *several.args[1:] or (0,), at)
    if own.dim() != held.dim() or own.stride() != held.stride():
        return None
    cut = [d for d in range(own.dim()) if own.shape[d] != held.shape[d]] or [0]
    if len(cut) > 1 or not held.numel():
        return None
    start = sum(view.shape[cut[0]] for view in views[:at]) if own.shape != held.shape else 0
    if own.storage_offset() != held.storage_offset() + start * held.stride(cut[0]):
        return None
    return emit(aten.slice.Tensor, base, cut[0], start, start + own.shape[cut[0]])


def _as_view(target: Any) -> Any:
    """The op that gives as a view what an in-place view op makes of its operand."""
    for found in _pure(target):
        if found._schema.returns[0].alias_info is not None:
            return found
    raise CaptureError(f"the in-place op {target._schema.name} has no form that returns a view")


def _pure(target: Any) -> list[Any]:
    """The overloads that write nothing and take the arguments of an in-place op. Their names need not agree:
    pow_.Scalar is pow.Tensor_Scalar."""
    name = target._schema.name.split("::")[1]
    name = _FUNCTIONAL.get(name, name.rstrip("_"))
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    wanted = [str(a.type) for a in target._schema.arguments]
    found = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return [o for o in found if not o._schema.is_mutable and [str(a.type) for a in o._schema.arguments] == wanted]


class _Functionaliser:
    """Walks the graph once. Identity is by the nodes of the graph as it was: `value[n]` is what n holds by now,
    `parent[n]` the node that n is a view of, `last[n]` the last place at which n, or a view of it, is read, `learned`
    holds the nodes that gradients flow to, `unclear` the views whose first operand is not what they are a view of."""

    def __init__(self, emit: Emit, learned: Collection[fx.Node]) -> None:
        self.graph, self.emit = emit.graph, emit
        self.learned, self.grad = set(learned), torch.is_grad_enabled()
        self.unclear: set[fx.Node] = set()
        self.value: dict[fx.Node, fx.Node] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.written: dict[fx.Node, None] = {}
        self.at = {node: i for i, node in enumerate(self.graph.nodes)}
        self.last: dict[fx.Node, int] = {}

    def run(self) -> None:
        in_place = []
        viewed = {node: _viewed(node) for node in self.at}
        self.unclear = {n for n, source in viewed.items() if source is not None and n.args[0] is not source}
        self.last = {node: max([self.at[user] for user in node.users], default=-1) for node in self.at}
        for node in reversed(self.at):
            if (source := viewed[node]) is not None:
                self.last[source] = max(self.last[source], self.last[node])
        for node in self.at:
            source = viewed[node]
            if node.op == "output":
                with self.emit.before(node):
                    for placeholder in self.written:
                        self.emit(aten.copy_.default, placeholder, self.value[placeholder])
            if node.target is torch._C._set_grad_enabled:
                self.grad = bool(node.args[0])
            if self._learns(node):
                self.learned.add(node)
            names = _mutated(node)
            target = node.kwargs.get("out", node.args[0] if node.args else None) if names else None
            node.args = fx.map_arg(node.args, self._now)
            node.kwargs = fx.map_arg(node.kwargs, self._now)
            if target is not None:
                in_place.append(node)
                with self.emit.before(node):
                    self._write(node, target, names)
            elif source is not None:
                self.parent[node] = source
        for node in reversed(in_place):
            self.graph.erase_node(node)

    def _learns(self, node: fx.Node) -> bool:
        """Whether gradients flow through a node's result to a learned one."""
        if not self.grad or node.target is aten.detach.default or node.op != "call_function":
            return False
        floats = any(v.is_floating_point() or v.is_complex() for v in tensors_of(node.meta.get("val")))
        return floats and any(n in self.learned for n in node.all_input_nodes)

    def _now(self, node: fx.Node) -> fx.Node:
        return self.value.get(node, node)

    def _write(self, node: fx.Node, target: Any, names: list[str]) -> None:
        """Give `target` the value that the in-place `node` writes, and its base and other views what follows."""
        schema = _schema(node)
        if len(names) != 1 or names[0] not in (schema.arguments[0].name, "out") or not isinstance(target, fx.Node):
            raise CaptureError(f"the in-place op {schema.name} writes to more than its first argument")
        if names[0] == "out" and node.meta["val"].shape != target.meta["val"].shape:
            raise CaptureError(f"{schema.name} gives its out= another shape")
        views = list(self.parent)
        self.value[target] = self._functional(node, target)
        self.parent[node] = target
        done, base = {target}, target
        while (up := self.parent.get(base)) is not None:
            self.value[up] = self._scatter(base, self._now(up), self._now(base))
            base = up
            done.add(base)
        if base in self.learned and not (self.grad and target in self.learned):  # autograd does not see it
            raise CaptureError(f"a write past gradients ({schema.name} under no_grad or .detach()) is left as it is")
        for view in (*views, node):
            # What nobody reads any more need not be taken anew: a mask written piece by piece has many such views.
            if view not in done and self.parent[view] in done and self.last[view] > self.at[node]:
                self.value[view] = self._again(view, self._now(self.parent[view]))
                done.add(view)
        if node in self.learned:
            self.learned.update(done)
        if base.op == "placeholder":
            self.written[base] = None

    def _functional(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The new value of the target of an in-place op."""
        schema = _schema(node)
        held = target.meta["val"]
        if node.target is aten.copy_.default:
            out = self._as(node.args[1], held)
            if out.meta["val"].shape == held.shape:
                return out
            sizes = [n if isinstance(n, int) else self.emit(aten.sym_size.int, target, d)
                     for d, n in enumerate(held.shape)]  # fmt: skip
            return self.emit(aten.expand.default, out, sizes)
        kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
        if kwargs.keys() != node.kwargs.keys():
            overload = _without_out(node.target)
        else:
            overload = _FUNCTIONAL_OVERLOAD.get(node.target) or next(iter(_pure(node.target)), None)
        if overload is None or overload._schema.is_mutable:
            raise CaptureError(f"the in-place op {schema.name} has no form that returns a new value")
        return self._as(self.emit(overload, *node.args, **kwargs), held)

    def _as(self, node: Any, held: Tensor) -> fx.Node:
        """A value in the dtype, and on the device, of another."""
        own = node.meta["val"]
        if own.device == held.device and own.dtype == held.dtype:
            return node
        where = {} if own.device == held.device else {"device": held.device}
        return self.emit(aten._to_copy.default, node, dtype=held.dtype, **where)

    def _again(self, view: fx.Node, base: fx.Node) -> fx.Node:
        """A view taken anew of its base; the result of an in-place op is its target."""
        if _mutated(view):
            return base
        self._check_view(view)
        return self.emit(view.target, base, *view.args[1:], **view.kwargs)

    def _scatter(self, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        """The base after `value` was written through one view of it."""
        if _mutated(view):
            return value
        self._check_view(view)
        if view.target in _VIEW_SCATTER:
            return self.emit(_VIEW_SCATTER[view.target], base, value, *view.args[1:], **view.kwargs)
        held = base.meta["val"]
        with self.emit.mode, torch.no_grad():  # what the op does to a tensor that lies in order
            whole = held.new_empty(held.shape)
            rest = fx.map_arg((view.args[1:], view.kwargs), lambda n: n.meta["val"])
            taken = view.target(whole, *rest[0], **rest[1])  # type: ignore[operator]
        order = _permutation(whole, taken)
        if order is not None:
            return self.emit(aten.permute.default, value, order) if order != sorted(order) else value
        if not _ints(held.shape) or taken.dtype != held.dtype or taken.is_conj() or taken.is_neg():
            raise CaptureError(f"a write through the view {view.target} is left as it is")
        if (cut := _cut(whole, taken)) is not None:
            return self.emit(aten.slice_scatter.default, base, value, *cut)
        row, shape = [-1], list(held.shape)
        if not (taken.is_contiguous() and taken.numel() == whole.numel()):
            place = self.emit(aten.arange.default, held.numel(), device=held.device)
            place = self.emit(aten.reshape.default, place, shape)
            place = self.emit(view.target, place, *view.args[1:], **view.kwargs)
            flat = [self.emit(aten.reshape.default, x, row) for x in (base, place, value)]
            value = self.emit(aten.scatter.src, flat[0], 0, flat[1], flat[2])
        return self.emit(aten.reshape.default, value, shape)

    def _check_view(self, view: fx.Node) -> None:
        if view in self.unclear:
            several = view.args[0] if view.target is operator.getitem else view
            raise CaptureError(f"a write to a tensor of which {several.target} gives a view is left as it is")  # type: ignore[union-attr]


def _without_out(target: Any) -> Any:
    """The overload that returns what this one writes to `out`."""
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if a.name != "out"]
    packet = target.overloadpacket
    found = (getattr(packet, name) for name in packet.overloads())
    return next((op for op in found if [(a.name, str(a.type)) for a in op._schema.arguments] == wanted), None)


def _cut(whole: Tensor, taken: Tensor) -> tuple[int, int, int, int] | None:
    """The slice (dim, start, stop, step) that `taken` is of a tensor that lies in order, if it is one."""
    if taken.dim() != whole.dim():
        return None
    other = [d for d in range(whole.dim()) if taken.shape[d] != whole.shape[d] or taken.stride(d) != whole.stride(d)]
    if len(other) != 1 or not taken.numel():
        return None
    (d,) = other
    start, step = int(taken.storage_offset()) // whole.stride(d), taken.stride(d) // whole.stride(d)
    if step < 1 or (start * whole.stride(d), step * whole.stride(d)) != (taken.storage_offset(), taken.stride(d)):
        return None
    return d, start, start + (taken.shape[d] - 1) * step + 1, step


def _permutation(whole: Tensor, taken: Tensor) -> list[int] | None:
    """Where each dim of `whole` stands in `taken`, if `taken` is the same elements with the dims in another order."""
    if taken.dim() != whole.dim() or taken.dtype != whole.dtype or expr(taken.storage_offset()) != 0:
        return None
    places = [(expr(n), expr(s)) for n, s in zip(taken.shape, taken.stride(), strict=True)]
    order: list[int] = []
    for n, s in zip(whole.shape, whole.stride(), strict=True):
        free = [d for d, (size, step) in enumerate(places)
                if d not in order and size == expr(n) and (size == 1 or step == expr(s))]  # fmt: skip
        if not free:
            return None
        order.append(free[0])
    return order


def _schema(node: fx.Node) -> Any:
    return node.target._schema  # type: ignore[union-attr]


_FUNCTIONAL = {"zero_": "zero", "fill_": "fill", "normal_": "normal_functional", "uniform_": "uniform"}
_FUNCTIONAL_OVERLOAD: dict[Any, Any] = {aten.bernoulli_.float: aten.bernoulli.p}


__all__ = ["functionalise", "is_impure"]
