"""portable: the tome ops as functional ATen, so that a rewritten graph runs where tome_fx is not installed.

    tome.merge(x, ...)    ->    gather, sub, mul, scatter_add
    tome.match(...)       ->    index_select, bmm, max, topk, scatter_add

Only what the runtimes behind `torch.export` compute alike is used: no sort (a stable one is not exported to ONNX), no
strided slice (OpenVINO guards on its parity), no scatter that writes or reduces otherwise than by adding.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tome_fx import matching, ops
from tome_fx.methods.how import from_key

from .building.emit import Emit
from .lower import LogSizes
from .normal.regions import retrace

aten = torch.ops.aten
NAMESPACES = "tome", "tome_cpu"
FOUND = "tome_merge", "tome_step", "tome_prev", "tome_turn"
"""What is written to a matching."""


class PortableError(ValueError):
    """An op of ours that cannot leave Python; the message names it and what to do."""


def make_portable(gm: fx.GraphModule, mode: FakeTensorMode, form: str) -> int:
    """Rewrite in place; returns how many ops were replaced. form: how log sizes join the scores of an attention, as a
    "mask" or as a "column" of queries and keys. Raises PortableError where an op cannot be replaced."""
    if form == "column":
        for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            _as_column(gm.graph, node, mode)
    nodes = [n for n in gm.graph.nodes if getattr(n.target, "namespace", None) in NAMESPACES]
    for node in nodes:
        _inline(gm, node, mode)
    for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _four_dims(gm, node, mode)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return len(nodes)


def _as_column(graph: fx.Graph, node: fx.Node, mode: FakeTensorMode) -> None:
    """Log sizes as one more feature of queries and keys: what spells attention out adds a mask to the score of every
    pair."""
    found = LogSizes.of(node)
    if found is None or found.query.meta["val"].dtype is not torch.float32:  # log(size) / scale would be rounded
        return
    emit = Emit(graph, mode)
    with emit.before(node):
        term = emit(aten.transpose.int, emit(aten.div.Tensor, found.bias, found.scale), -1, -2)
        none, one = (emit(aten.full_like.default, emit(aten.slice.Tensor, x, -1, 0, 1), fill)
                     for x, fill in ((found.key, 0.0), (found.query, 1.0)))  # fmt: skip
        key = emit(aten.cat.default, [found.key, emit(aten.add.Tensor, none, term)], -1)
        query = emit(aten.cat.default, [found.query, one], -1)
    node.args = (query, key, found.value)
    node.kwargs = {"scale": found.scale, "enable_gqa": found.grouped}


def _inline(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> None:
    form = FORMS.get(node.target._opname)  # type: ignore[union-attr]
    if form is None:
        raise PortableError(f"{node.target} has no form outside of tome_fx")
    inputs = node.all_input_nodes

    def run(*values: Any) -> Any:
        held = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
        with torch.no_grad() if _finds(node) else torch.enable_grad():
            return form(*args, **kwargs)

    with mode:
        body = retrace(run, [n.meta["val"] for n in inputs])
    env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    meta = {k: v for k, v in node.meta.items() if k != "val" and k not in FOUND}
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                env[inner] = gm.graph.node_copy(inner, env.__getitem__)
                if inner.target is aten.view.default:  # values may lie in memory otherwise than they did
                    env[inner].target = aten.reshape.default
                env[inner].meta = {**meta, "val": inner.meta.get("val")}
            elif inner.op == "get_attr":
                raise PortableError(f"{node.target} depends on a constant of the process")
    found: Any = fx.map_arg(body.graph.output_node().args[0], env.__getitem__)
    if isinstance(found, fx.Node):
        node.replace_all_uses_with(found)
    else:
        if _finds(node):
            found[0].meta.update({k: v for k, v in node.meta.items() if k in FOUND})
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _finds(node: fx.Node) -> bool:
    """Whether an op finds groups: it carries no gradient."""
    return node.target._opname.startswith("match")  # type: ignore[union-attr]


def _four_dims(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> None:
    """Attention of more or fewer than four dims with four: torch.onnx has a form for those alone. In place.

    It stays where sizes before the tokens are free or broadcast, or heads share keys."""
    given: list[Any] = list(node.args)
    operands, mask = given[:3], cast(Any, given[3] if given[3:] else node.kwargs.get("attn_mask"))
    shapes = [x.meta["val"].shape for x in operands]
    lead = [*shapes[0][:-2]]
    fixed = all(isinstance(size, int) for size in lead) and all([*shape[:-2]] == lead for shape in shapes)
    if len(lead) in (0, 2) or not fixed or node.kwargs.get("enable_gqa"):
        return
    emit = Emit(gm.graph, mode)

    def folded(x: Any) -> fx.Node:
        return emit(aten.unsqueeze.default, emit(aten.flatten.using_ints, x, 0, -3), 0)

    with emit.before(node):
        if mask is not None and len(mask.meta["val"].shape) > 2:
            before = [*mask.meta["val"].shape[:-2]]
            if any(size != 1 for size in before):
                mask = emit(aten.expand.default, mask, [*lead, -1, -1])
            mask = folded(mask)
        options = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        found = emit(node.target, *(folded(x) for x in operands), mask, *given[4:], **options)
        found = emit(aten.unflatten.int, emit(aten.squeeze.dim, found, 0), 0, lead)
    node.replace_all_uses_with(found)
    gm.graph.erase_node(node)


# -- matching ----------------------------------------------------------------------------------------------------------


def _places(count: Any, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def _half(count: Any) -> Any:
    """`count // 2`. Of a free count torch takes even terms out of the quotient, (n - 6) // 2 is n // 2 - 3, and then
    cannot show that the product of two such sizes is 2 or more; with a free count beside a fixed batch it must."""
    return count // 2 if isinstance(count, int) else (2 * count + 1) // 4


@dataclass(frozen=True)
class Sides:
    """Where sources and destinations stand among n tokens, as `matching.PARTITIONS` has it, without strided slices.

    start, step, count: of the sources; others: the same of the destinations.
    """

    start: Any
    step: int
    count: Any
    others: tuple[Any, int, Any]

    @classmethod
    def of(cls, partition: str, n: Any, prefix: int, suffix: int) -> Sides:
        body, first = n - prefix - suffix, prefix % 2
        if partition == "alternating":
            return cls(prefix + first, 2, _half(body + 1 - first), (prefix + 1 - first, 2, _half(body + first)))
        if partition == "sequential":
            half = _half(body + 1)
            return cls(prefix, 1, half, (prefix + half, 1, _half(body)))
        raise PortableError(f"partition={partition!r} cannot leave Python; plain=False keeps it")

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sources and the destinations of `[batch, n, ...]`."""
        ways = (self.start, self.step, self.count), self.others
        sides = (_places(count, x.device) * step + start for start, step, count in ways)
        first, second = (x.index_select(1, side) for side in sides)
        return first, second


def _index_form(
    moved: Tensor, partner: Tensor, sides: Sides, n: Any, ends: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """assign, keep and moved of n tokens. moved, partner: `[batch, r]`, the ranks of the sources that merge among
    sources, and of what they join among destinations. ends: protected tokens in front and behind."""
    (prefix, suffix), (batch, r), device = ends, moved.shape, moved.device
    left, place = sides.count - r, _places(n, device).expand(batch, n)
    start, step, _ = sides.others
    moved = moved * sides.step + sides.start
    gone = torch.zeros((batch, n), dtype=torch.int64, device=device).scatter_add(1, moved, torch.ones_like(moved))
    joins = torch.zeros((batch, n), dtype=torch.int64, device=device).scatter_add(1, moved, partner)
    inside = (place >= prefix) & (place < n - suffix)
    source = inside & ((place - sides.start) % 2 == 0 if step == 2 else place < start)
    stays = source & (gone == 0)
    # In the new order: prefix, sources that stay, destinations, suffix.
    slot = torch.where(inside, prefix + left + (place - start) // step, torch.where(place < prefix, place, place - r))
    # Counted in float32, exact for fewer than 2^24 tokens: TensorRT lists no CumSum of integers.
    slot = torch.where(source, stays.to(torch.float32).cumsum(1).to(torch.int64) + (prefix - 1), slot)
    assign = torch.where(gone > 0, joins + (prefix + left), slot)
    # What goes is written behind the end.
    keep = torch.zeros((batch, n - r + 1), dtype=torch.int64, device=device)
    keep = keep.scatter_add(1, torch.where(gone > 0, n - r, slot), place).narrow(1, 0, n - r)
    return assign, keep, moved


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(matching.SMALLEST_NORM)


def _best(a: Tensor, b: Tensor, similarity: str, apart: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best partner of each source, and how alike they are. apart: pairs that must not merge. By bmm and nothing
    else that is as large: of `@` and of what is pointwise on all pairs torch.export guards on sizes."""
    x, y = (a, b) if similarity == "dot" else (_unit(a), _unit(b))
    alike = torch.bmm(x, y.transpose(1, 2))
    best, partner = (alike if apart is None else alike.masked_fill(apart, -torch.inf)).max(-1)
    if similarity == "dot":
        return best, partner
    # Zeros have no direction, but are as alike as tokens can be.
    null, other = (x.abs().amax(-1) == 0 for x in (a, b))
    pairs = null & other.any(-1, keepdim=True)
    first = other.to(torch.float32).argmax(-1, keepdim=True)
    return torch.where(pairs, 1.0, best), torch.where(pairs, first, partner)


def match_by(metric: Tensor, r: Any, prefix: int, suffix: int, *how: Any) -> tuple[Tensor, ...]:
    """`tome::match_by`, for the choices that are the same in every process. how: heads, matcher, partition,
    similarity."""
    heads, matcher, *rest = how
    if matcher != "bipartite":
        raise PortableError(f"matcher={matcher!r} cannot leave Python; plain=False keeps it")
    return _matched(metric, None, r, (prefix, suffix), heads, *rest)


def match(metric: Tensor, r: Any, prefix: int, suffix: int, heads: bool = False) -> tuple[Tensor, ...]:
    """`tome::match`."""
    return _matched(metric, None, r, (prefix, suffix), heads, "alternating", "cosine")


def match_parts(metric: Tensor, parts: Tensor, r: Any, *how: Any) -> tuple[Tensor, ...]:
    """`tome::match_parts`. how: prefix, suffix, heads, even, and the similarity unless it is the cosine."""
    prefix, suffix, heads, even, *similarity = how
    return _matched(metric, (parts, even), r, (prefix, suffix), heads, "alternating", *(similarity or ["cosine"]))


def match_pieces(metric: Tensor, size: Any, attention: Any, place: Any, *how: Any) -> tuple[Tensor, ...]:
    """`tome::match_pieces`, of pieces that are the same in every process. how: what is seen, r, pruned, prefix, suffix,
    heads, first, the pieces, what never merges, how much each changed."""
    known, (r, pruned), (prefix, suffix), flags, key = _portable(how)
    dim = -3 if flags[0] else -2
    sample, n = metric.shape[:dim], metric.shape[dim]
    given = (size, attention, place, *known)
    source, destination, body, best = ops.picked(metric, given, (r, pruned), (prefix, suffix), flags, key)
    batch, place = source.shape[0], _places(n, metric.device)
    order = torch.cat([place.narrow(0, 0, prefix), body, place.narrow(0, n - suffix, suffix)]).expand(batch, n)
    none = torch.zeros((batch, n), dtype=torch.int64, device=metric.device)
    stays = 1 - none.scatter_add(1, source, torch.ones_like(source)).gather(1, order)
    slot = stays.to(torch.float32).cumsum(1).to(torch.int64) - 1
    keep = torch.zeros((batch, n - r + 1), dtype=torch.int64, device=metric.device)
    keep = keep.scatter_add(1, torch.where(stays > 0, slot, n - r), order).narrow(1, 0, n - r)
    assign = none.scatter_add(1, order, slot * stays)
    assign = assign.scatter_add(1, source, assign.gather(1, destination))
    return tuple(t.reshape(*sample, t.shape[-1]) for t in (assign, keep, source, best))


def match_some(metric: Tensor, size: Any, attention: Any, place: Any, *how: Any) -> tuple[Tensor, ...]:
    """`tome::match_some`, of pieces that are the same in every process. how: as `match_pieces`, with what goes in any
    case for pruned."""
    known, count, ends, flags, key = _portable(how)
    found = ops.some_picked(metric, (size, attention, place, *known), count, ends, flags, key)
    return tuple(t.reshape(*metric.shape[: -3 if flags[0] else -2], t.shape[-1]) for t in found)


def _portable(how: Sequence[Any]) -> tuple[Any, tuple[Any, Any], tuple[int, int], tuple[bool, bool], str]:
    """The last arguments of `match_pieces` as `ops.picked` takes them: what else is known of tokens, counts, ends,
    flags, pieces. Raises PortableError for pieces of this process alone."""
    seen, r, of_r, prefix, suffix, heads, first, key, *more = how
    if own := from_key(key).of_process:
        raise PortableError(f"{own} cannot leave Python; plain=False keeps it")
    return (seen, *more, *[None] * (2 - len(more))), (r, of_r), (prefix, suffix), (heads, first), key


def _matched(
    metric: Tensor, parts: tuple[Tensor, bool] | None, r: Any, ends: tuple[int, int], heads: bool, *how: str
) -> tuple[Tensor, ...]:
    """The r best pairs. how: partition, similarity."""
    if how[1] not in ("cosine", "dot"):
        raise PortableError(f"similarity={how[1]!r} cannot leave Python; plain=False keeps it")
    sample, n = metric.shape[: -3 if heads else -2], metric.shape[-3 if heads else -2]
    x = metric.to(torch.float32)
    x = x.mean(-2) if heads else x
    x = x.reshape(-1, *x.shape[-2:])
    sides = Sides.of(how[0], n, *ends)
    if parts is None:
        best, partner = _best(*sides.parted(x), how[1], None)
        similarity, moved = best.topk(r, dim=-1)
    else:
        own, other = sides.parted(parts[0].reshape(-1, n))
        best, partner = _best(*sides.parted(x), how[1], own[:, :, None] != other[:, None])
        chosen = ops.shared_out(best, own, r, parts[1])
        similarity, order = best.gather(1, chosen).topk(r, dim=-1)
        moved = chosen.gather(1, order)
    found = (*_index_form(moved, partner.gather(1, moved), sides, n, ends), similarity)
    return tuple(t.reshape(*sample, t.shape[-1]) for t in found)


# -- the rest ----------------------------------------------------------------------------------------------------------


def _marked(positions: Sequence[int], length: Any, *, device: torch.device) -> Tensor:
    """`tome::places`."""
    every = _places(length, device)
    return functools.reduce(operator.or_, (every == p for p in positions), every < 0)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `[*sample, N, *rest]` by an index `[*sample, n]`: a copy of whole rows, where a gather has an index for
    each element."""
    lead = index.dim() - 1
    if x.dim() == index.dim():
        return x.gather(lead, index)
    if not lead:
        return x.index_select(0, index)
    flat = index.reshape(-1, index.shape[lead])
    first = torch.arange(flat.shape[0], device=index.device)[:, None] * x.shape[lead]
    found = x.reshape(-1, *x.shape[lead + 1 :]).index_select(0, (flat + first).reshape(-1))
    return found.reshape(*index.shape, *x.shape[lead + 1 :])


FORMS: dict[str, Callable[..., Any]] = {
    "match": match, "match_by": match_by, "match_parts": match_parts, "match_pieces": match_pieces,
    "match_some": match_some,
    "attention_paid": ops.attention_paid, "grid_places": ops.grid_places, "place_metric": ops.place_metric,
    "place_code": ops.place_code, "side_code": ops.side_code, "with_side": lambda x, side: x.clone(),
    "merge": functools.partial(ops.merge_aten, rows=_rows), "merge_size": ops.merge_size_aten,
    "merge_bias": ops.merge_bias_aten, "merge_bias_aten": ops.merge_bias_aten, "log_size": torch.log, "unmerge": _rows,
    "seen_first": ops.seen_first,
    "key_weight": ops.key_weight, "key_kinds": ops.key_kinds, "places": _marked, "place_kinds": ops.place_kinds,
    "part_labels": ops.part_labels, "apart": ops.apart,
}  # fmt: skip

__all__ = ["PortableError", "make_portable"]
