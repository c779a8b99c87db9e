"""join_writes: slices that are written one after the other until nothing is left of what was there are one cat, what
is added to every row by an index is added, what is written alike where a mask says so is filled in, and rows that an
index names one behind the other are a slice.

    y = empty(B, n + m, D); y[:, :n] = a; y[:, n:] = b        ->    y = cat([a, b], 1)
    slice_scatter(slice_scatter(y, a, 1, 0, n), b, 1, n)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..algebra.axes import expr, from_front, same
from ..building.emit import Emit
from ..rules import Call

aten = torch.ops.aten
_WRITES = {aten.slice_scatter.default, aten.select_scatter.default}


def join_writes(graph: fx.Graph) -> bool:
    """Rewrite in place, and say whether anything was joined. Dead code is left to the caller."""
    joined = False
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        _read_past(node)
    for node in list(graph.nodes):
        if node.target in _WRITES and not _written_again(node):
            pieces = _pieces(node)
            if pieces is not None:
                _join(graph, node, pieces)
                joined = True
    return joined


def _read_past(node: fx.Node) -> None:
    """A slice of what a write left as it was, before others, is one of what was there before."""
    source: Any = node.args[0]
    while source.target in _WRITES and _written_again(source):
        (dim, start, stop, step), (d, begin, end, by) = _spot(source), _spot(node, 1, source)
        apart = any(isinstance(x, int) and isinstance(y, int) and x <= y for x, y in ((end, start), (stop, begin)))
        if dim != d or step != 1 or by != 1 or not apart:
            return
        source = source.args[0]
        node.args = (source, *node.args[1:])


def _written_again(node: fx.Node) -> bool:
    return any(user.target in _WRITES and user.args[0] is node for user in node.users)


def _pieces(last: fx.Node) -> list[fx.Node] | None:
    """What was written, in the order of the places, if together it is all that is left."""
    dim, node = _spot(last)[0], last
    found: list[tuple[Any, Any, fx.Node]] = []
    while node.target in _WRITES:
        d, start, stop, step = _spot(node)
        src = node.args[1]
        if d != dim or step != 1 or (node is not last and len(node.users) > 1) or not isinstance(src, fx.Node):
            return None
        if src.meta["val"].dtype != node.meta["val"].dtype:
            return None
        if not any(same(start, a) and same(stop, b) for a, b, _ in found):  # `x[:, 1:] += y` writes it twice
            found.append((start, stop, src))
        node = node.args[0]  # type: ignore[assignment]
    at: Any = 0
    ordered = []
    while not same(at, expr(last.meta["val"].shape[dim])):
        piece = next((p for p in found if same(p[0], at) and not same(p[0], p[1])), None)
        if piece is None:
            return None
        ordered.append(piece[2])
        at = piece[1]
    return ordered if len(ordered) == len(found) > 1 else None


def _spot(node: fx.Node, skip: int = 2, of: fx.Node | None = None) -> tuple[int, Any, Any, int]:
    """(dim, from, to, step) of a write, or of a slice; skip: the operands before. of: what is cut."""
    args, held = [*node.args[skip:], *[None] * 4], (of or node).meta["val"]
    dim = (args[0] if args[0] is not None else node.kwargs.get("dim", 0)) % held.dim()
    size = expr(held.shape[dim])
    if node.target is aten.select_scatter.default:
        index = _bound(args[1], 0, size)
        return dim, index, index + 1, 1
    start, stop = args[1] or node.kwargs.get("start"), args[2] or node.kwargs.get("end")
    step = args[3] or node.kwargs.get("step", 1)
    return dim, _bound(start, 0, size), _bound(stop, size, size), step  # type: ignore[return-value]


def _bound(value: Any, default: Any, size: Any) -> Any:
    if value is None:
        return default
    value = from_front(value.meta["val"] if isinstance(value, fx.Node) else value, size)
    beyond = isinstance(value, int) and (value >= size if isinstance(size, int) else value >= 2**62)
    return size if beyond else value


def _join(graph: fx.Graph, node: fx.Node, pieces: list[fx.Node]) -> None:
    dim, rank = _spot(node)[0], node.meta["val"].dim()
    with graph.inserting_before(node):
        whole = []
        for piece in pieces:
            if piece.meta["val"].dim() < rank:
                row = graph.call_function(aten.unsqueeze.default, (piece, dim))
                row.meta = {**node.meta, "val": piece.meta["val"].unsqueeze(dim)}
                piece = row
            whole.append(piece)
        joined = graph.call_function(aten.cat.default, (whole, dim))
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)


def added_in_order(call: Call, emit: Emit) -> fx.Node | None:
    """What is added to all rows, each once and in order."""
    a, own = call.args, call.out
    other = next(a[name] for name in ("source", "src", "values") if name in a)
    sums = a.get("accumulate", True) and a.get("reduce", "sum") == "sum" and a.get("include_self", True)
    indices = dict(enumerate(a["indices"])) if "indices" in a else {call.axis(a["dim"]): a["index"]}
    indices = {d: index for d, index in indices.items() if index is not None}
    last, val = max(indices, default=0), other.meta["val"]
    if not sums or val.shape != own.shape or val.dtype != own.dtype or [*indices] != [*range(min(indices), last + 1)]:
        return None
    each = call.target in (aten.scatter_add.default, aten.scatter_reduce.two)  # an index for each entry
    behind = 0 if each else own.dim() - 1 - last
    known = {d: emit.known.get(index) for d, index in indices.items()}
    if any(each and index.meta["val"].shape != own.shape for index in indices.values()) or not all(
        value is not None and _counts_up(value, d, behind, own.shape) for d, value in known.items()
    ):
        return None
    other = other if a.get("alpha", 1) == 1 else emit(aten.mul.Tensor, other, a["alpha"])
    return emit(aten.add.Tensor, a["self"], other)


def put_where(call: Call, emit: Emit) -> fx.Node | None:
    """What is written alike to all places that a mask names: `x[mask] = 0`."""
    a, own = call.args, call.out
    mask, value = a["indices"][0], a["values"]
    if a["accumulate"] or len(a["indices"]) > 1 or mask is None or mask.meta["val"].dtype is not torch.bool:
        return None
    rest, val = own.dim() - mask.meta["val"].dim(), value.meta["val"]
    if val.dtype != own.dtype or val.dim() > rest + 1 or (val.dim() > rest and expr(val.shape[0]) != 1):
        return None
    for _ in range(rest):
        mask = emit(aten.unsqueeze.default, mask, -1)
    known = emit.known.get(value)
    if known is not None and known.numel() == 1:
        return emit(aten.masked_fill.Scalar, a["self"], mask, known.item())
    return emit(aten.where.self, mask, value, a["self"])


def read_in_order(call: Call, emit: Emit) -> fx.Node | None:
    """Rows that an index reads one behind the other are a slice."""
    found = _rows(call, emit)
    return emit(aten.slice.Tensor, call.nodes[0], *found) if found is not None else None


def written_in_order(call: Call, emit: Emit) -> fx.Node | None:
    """Rows that an index writes one behind the other are a slice that is written."""
    a, found = call.args, _rows(call, emit)
    src = a["source" if "source" in a else "values"]
    if found is None or a.get("accumulate") or src.meta["val"].dtype != call.out.dtype:
        return None
    dim, start, stop = found
    shape = [stop - start if d == dim else n for d, n in enumerate(call.out.shape)]
    if not all(isinstance(n, int) for n in shape):
        return None
    src = src if list(src.meta["val"].shape) == shape else emit(aten.expand.default, src, shape)
    return emit(aten.slice_scatter.default, call.nodes[0], src, dim, start, stop)


def _rows(call: Call, emit: Emit) -> tuple[int, int, int] | None:
    """The dim whose entries an index names in order, from where to where."""
    a, own = call.args, call.vals[0]
    indices = dict(enumerate(a["indices"])) if "indices" in a else {call.axis(a["dim"]): a["index"]}
    (d, index), *others = [(d, index) for d, index in indices.items() if index is not None] or [(0, None)]
    value, size = emit.known.get(index) if isinstance(index, fx.Node) else None, own.shape[d] if own.dim() else None
    if others or value is None or value.dtype is not torch.int64 or value.dim() != 1 or not isinstance(size, int):
        return None
    value = torch.where(value < 0, value + size, value) if "indices" in a else value  # no other op counts from behind
    start, count = int(value[0]) if len(value) else -1, len(value)
    inside = 0 <= start <= size - count and bool((value == torch.arange(start, start + count)).all())
    return (d, start, start + count) if inside else None


def _counts_up(value: Tensor, d: int, behind: int, shape: Sequence[Any]) -> bool:
    """Whether an index of a tensor, with so many dims behind its own, is the place of each entry along dim d."""
    for k, step in enumerate(value.stride()):
        value = value.narrow(k, 0, 1) if step == 0 else value
    value = value.reshape(*value.shape, *[1] * behind)
    at, places = d - len(shape) + value.dim(), torch.arange(shape[d]).view(-1, *[1] * (len(shape) - 1 - d))
    whole = value.dtype is torch.int64 and at >= 0 and value.shape[at] == shape[d]
    return whole and bool((value == places.to(value.device)).all())


__all__ = ["added_in_order", "join_writes", "put_where", "read_in_order", "written_in_order"]
