"""flex: `flex_attention` spelled out, for `capture`.

Its meaning: scores = scale * q k^T, then `score_mod`, then -inf where `mask_mod` says False, then softmax and @ v; a
row that sees nothing gives 0. Both mods are programs over one score and its four positions. They are traced once as
such and spread over [B, H, N, S]: each position becomes an index tensor of rank four that varies along its own dim, so
a pointwise op broadcasts, and what a mod reads from a table is gathered. Nothing is larger than what it depends on.

    score_mod = s                       ->  scaled_dot_product_attention(q, k, v, scale=scale)
    mask_mod = keep[b, k]               ->  attn_mask=keep[:, None, None, :]
    mask_mod = q >= k                   ->  attn_mask=(arange(N)[:, None] >= arange(S))
    score_mod = s + table[h, q - k + n] ->  attn_mask=table[arange(H)[:, None, None], q - k + n]
    score_mod = c * tanh(s / c)         ->  softmax(c * tanh(scale * q @ k^T / c)) @ v

Handled: additive terms and masks around the score or around any other program of it; grouped queries; keys of one
sample for all; logsumexp and largest score where they are read; half precision (scores and terms are float32, as in
the op); autocast. A bool that is the same at all positions is folded (`q >= 0`).

Limits. Block sparsity is not kept: attention of a graph in which something merges is computed densely. So a mask or
table of more than `LARGEST` elements, and a block mask without a mask_mod, whose blocks alone say who sees whom, leave
the graph as it is. Elsewhere blocks are an index of what mask_mod says, as eager flex_attention takes them. A mod that
is no program of pointwise ops and reads from tables leaves the graph as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes

from ..algebra.axes import expr as size_expr
from ..algebra.axes import same
from ..rules import Call, find
from ..rules.base import draws
from ..rules.pointwise import POINTWISE, MaskRule, scalar
from ..rules.views import ExpandRule, ViewRule
from .regions import CaptureError, retrace

aten = torch.ops.aten

LARGEST = 2**26
"""Elements of a mask or a table of terms that is still spelled out."""
_FOLDED = 2**22
"""Elements of a mask of positions whose value is looked into."""
_SCORE = "score"
_SAME = {aten.alias.default, aten.clone.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}
_MADE = {aten.full.default, aten.scalar_tensor.default}
_SIGNS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_NEW = {aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default}


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: fx.GraphModule,
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: Sequence[Any] = (),
    mask_mod_other_buffers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of that name: [B, H, N, E], [B | 1, G, S, E], [B | 1, G, S, F] with H a multiple of G -> [B, H, N, F] in
    the query's dtype, and logsumexp and largest score [B, H, N] to base two, natural under the backend "FLASH".

    Raises CaptureError with a reason where a mod or the mask has no dense form.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (_autocast(x) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            return flex_attention(query, key, value, score_mod, block_mask, scale, kernel_options,
                                  score_mod_other_buffers, mask_mod_other_buffers)  # fmt: skip
    if not same(size_expr(key.shape[0]), size_expr(query.shape[0])):
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    site = _Site(query, key, value, scale)
    mask_mod = _Spread(site, "mask_mod", block_mask[-1], mask_mod_other_buffers)
    if mask_mod.free and _blocks(block_mask) > 1:
        raise CaptureError("a block mask without a mask_mod is left as it is: its blocks alone say who sees whom")
    parts = _peeled(_Spread(site, "score_mod", score_mod, score_mod_other_buffers))
    if not mask_mod.always:
        parts.masks.append(mask_mod.lane(mask_mod.result))
    for part in (*parts.masks, *(term for term, _ in parts.terms)):
        _check_size(part)
    base = 1.0 if kernel_options.get("BACKEND") == "FLASH" else math.log(2)
    scores = site.masked(parts)
    return site.attend(parts), scores.logsumexp(-1) / base, scores.amax(-1) / base


def _autocast(x: Tensor) -> Tensor:
    fits = x.is_floating_point() and x.dtype is not torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if fits else x


def _blocks(block_mask: Sequence[Any]) -> int:
    """How many blocks the scores of one head are cut into, at least."""
    counts = [size_expr(x.shape[-1]) for x in block_mask if isinstance(x, Tensor) and x.dim() == 4]
    return max((n if isinstance(n, int) else 2 for n in counts), default=1)


def _check_size(part: Tensor) -> None:
    count = size_expr(part.numel())
    if isinstance(count, int) and count > LARGEST:
        raise CaptureError(f"spelled out, a mask or table of flex_attention would hold {count:,} elements")


@dataclass
class _Parts:
    """scores = core + sum of (term, sign), -inf where a mask is False. core: None for the plain scores."""

    core: Tensor | None = None
    terms: list[tuple[Tensor, int]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


class _Site:
    """One attention: its scores, in float32 or wider, are made once and only where they are read."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.query, self.key, self.value, self.scale = query, key, value, scale
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        self._scores: Tensor | None = None
        self.places: dict[int, Tensor] = {}

    def place(self, d: int) -> Tensor:
        """The positions along one dim of the scores."""
        if d not in self.places:
            self.places[d] = _along(d, torch.arange(self.sizes[d], device=self.query.device))
        return self.places[d]

    @property
    def grouped(self) -> bool:
        return not same(size_expr(self.query.shape[1]), size_expr(self.key.shape[1]))

    def _each_head(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.query.shape[1] // x.shape[1], dim=1) if self.grouped else x

    @property
    def scores(self) -> Tensor:
        if self._scores is None:
            keys = _cast(self._each_head(self.key), self.wide)
            self._scores = _cast(self.query, self.wide) @ keys.transpose(-2, -1) * self.scale
        return self._scores

    def masked(self, parts: _Parts) -> Tensor:
        """The scores with all that was said of them."""
        scores = self.scores if parts.core is None else parts.core
        for term, sign in parts.terms:
            scores = scores + term if sign > 0 else scores - term
        for mask in parts.masks:
            scores = torch.where(mask, scores, float("-inf"))
        return scores

    def attend(self, parts: _Parts) -> Tensor:
        if parts.core is None:
            return self._fused(parts)
        weights = self.masked(parts).softmax(-1)
        if parts.masks:
            seen = _all_of(parts.masks).expand(*(-1,) * 3, self.sizes[3]).any(-1, keepdim=True)
            weights = torch.where(seen, weights, 0.0)
        return _cast(weights, self.query.dtype) @ _cast(self._each_head(self.value), self.query.dtype)

    def _fused(self, parts: _Parts) -> Tensor:
        dtype = self.query.dtype
        operands = [self.query, self.key, _cast(self.value, dtype)]
        if self.key.dtype != dtype or len(parts.terms) > 1 or any(term.dtype != dtype for term, _ in parts.terms):
            operands = [_cast(x, self.wide) for x in operands]  # terms in half precision would be rounded
        bias = _all_of(parts.masks) if parts.masks else None
        if parts.terms:
            terms = [_cast(term, operands[0].dtype) for term, _ in parts.terms]
            terms = [term if sign > 0 else -term for term, (_, sign) in zip(terms, parts.terms, strict=True)]
            if bias is not None:
                terms.append(_cast(torch.where(bias, 0.0, float("-inf")), operands[0].dtype))
            bias = sum(terms[1:], start=terms[0])
        if bias is not None and not same(size_expr(bias.shape[3]), size_expr(self.sizes[3])):
            bias = bias.expand(-1, -1, -1, self.sizes[3])  # kernels broadcast all dims but the keys
        q, k, v = operands
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale, enable_gqa=self.grouped)
        return _cast(out, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _all_of(masks: Sequence[Tensor]) -> Tensor:
    out = masks[0]
    for mask in masks[1:]:
        out = out & mask
    return out


# -- programs of one score ---------------------------------------------------------------------------------------------


class _OneScore(fx.Interpreter):
    """Runs a mod on one score: reading a table at a position is a gather, never a number read from the position."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not operator.getitem or not isinstance(args[0], Tensor):
            return super().call_function(target, args, kwargs)
        x, keys = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(isinstance(k, (Tensor, int, torch.SymInt)) for k in keys):
            return super().call_function(target, args, kwargs)
        for k in keys:
            x = aten.index.Tensor(x, [k]) if isinstance(k, Tensor) else x.select(0, k)
        return x


@dataclass(frozen=True)
class _Rows:
    """A table read at some of its leading dims; the others are still to come."""

    table: Tensor
    at: tuple[Any, ...]


class _Spread:
    """A mod over all scores of a site. `value(node)` is what a node of its graph is: a tensor of rank four that
    broadcasts against the scores where it depends on a position or the score, a plain value otherwise."""

    def __init__(self, site: _Site, name: str, mod: fx.GraphModule, buffers: Sequence[Any]) -> None:
        self.site, self.name = site, name
        places: list[Any] = [_SCORE, 0, 1, 2, 3] if name == "score_mod" else [0, 1, 2, 3]
        with disable_proxy_modes_tracing():
            dtypes = [site.wide if place == _SCORE else torch.int64 for place in places]
            one = [site.query.new_zeros((), dtype=dtype) for dtype in dtypes]
        self.module = retrace(_runner(mod), [*one, *buffers])
        result = self.module.graph.output_node().args[0]
        if not isinstance(result, fx.Node):
            raise CaptureError(f"a {name} that returns no tensor is left as it is")
        self.result = result
        inputs = self.module.graph.find_nodes(op="placeholder")
        self.held: dict[fx.Node, Any] = dict(zip(inputs[len(places) :], buffers, strict=True))
        self.reads: dict[fx.Node, frozenset[Any]] = {n: frozenset() for n in self.held}
        self.reads |= {n: frozenset([place]) for n, place in zip(inputs, places, strict=False)}
        self.fixed = {n for n, place in zip(inputs, places, strict=False) if place != _SCORE}
        for node in self.module.graph.nodes:
            if node not in self.reads and node.op != "output":
                self._note(node)

    def _note(self, node: fx.Node) -> None:
        """What a node depends on, and whether on nothing but positions and numbers."""
        sources = [] if node.target in _NEW else node.all_input_nodes
        self.reads[node] = frozenset().union(*(self.reads[n] for n in sources))
        made = node.op == "call_function" and (node.target in _NEW or node.target in _MADE)
        if made or (_is_pointwise(node) and all(n in self.fixed for n in sources)):
            self.fixed.add(node)

    @property
    def free(self) -> bool:
        """Whether the result does not depend on where the score stands."""
        return not self.reads[self.result]

    @property
    def always(self) -> bool:
        """Whether the result is known to be True everywhere."""
        return self._folded(self.result) is True

    def lane(self, node: fx.Node) -> Tensor:
        """The value of a node as a tensor of rank four."""
        value = self.value(node)
        return value if self.reads[node] else value.view(1, 1, 1, 1)

    def value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in self.held:
            folded = self._folded(node) if self.reads[node] else None
            self.held[node] = self._value(node) if folded is None else self._full(folded)
        return self.held[node]

    def _full(self, value: bool) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=torch.bool, device=self.site.query.device)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            (place,) = self.reads[node]
            return self.site.scores if place == _SCORE else self.site.place(place)
        if node.op == "get_attr":
            return getattr(self.module, cast(str, node.target))
        if not self.reads[node]:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
            return cast(Any, node.target)(*args, **kwargs)
        if node.target in (aten.index.Tensor, aten.select.int):
            return self._read(node)
        if node.target in _SAME or _adds_nothing(node):
            return self.value(node.args[0])
        if not _is_pointwise(node):
            raise CaptureError(f"a {self.name} that uses {Call(node).op} is left as it is")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        out = cast(Any, node.target)(*args, **kwargs)
        return _cast(out, node.meta["val"].dtype)

    # Tables.

    def _read(self, node: fx.Node) -> Any:
        source = self.value(node.args[0])
        if isinstance(node.args[0], fx.Node) and self.reads[node.args[0]] and not isinstance(source, _Rows):
            raise CaptureError(f"a {self.name} that indexes what it computed is left as it is")
        rows = source if isinstance(source, _Rows) else _Rows(source, ())
        if node.target is aten.select.int:
            if node.args[1] != 0:
                raise CaptureError(f"a {self.name} that reads a table across is left as it is")
            new = [node.args[2]]
        else:
            new = list(cast(Any, node.args[1]))
        positions = [n.meta["val"] for n in new if isinstance(n, fx.Node) and isinstance(n.meta["val"], Tensor)]
        if None in new or any(val.dim() or val.dtype in (torch.bool, torch.uint8) for val in positions):
            raise CaptureError(f"a {self.name} that reads several rows of a table at once is left as it is")
        rows = _Rows(rows.table, (*rows.at, *map(self.value, new)))
        return rows if len(rows.at) < rows.table.dim() else self._looked_up(rows)

    def _looked_up(self, rows: _Rows) -> Tensor:
        table, at = rows.table, list(rows.at)
        for d in reversed(range(len(at))):
            if not isinstance(at[d], Tensor):
                table = table.select(d, at.pop(d))
        where = [next((p for p, x in self.site.places.items() if x is k), None) for k in at]
        whole = None not in where and len(set(where)) == len(where)
        if whole and all(self._fits(n, p) for n, p in zip(table.shape, where, strict=True)):
            table = table.permute([where.index(p) for p in sorted(cast(list[int], where))])
            for p in range(4):
                table = table if p in where else table.unsqueeze(p)
            return table
        return aten.index.Tensor(table, at)

    def _fits(self, size: Any, place: Any) -> bool:
        return same(size_expr(size), size_expr(self.site.sizes[place]))

    # What is known while compiling.

    def _folded(self, node: fx.Node) -> bool | None:
        """The value of a bool that nothing but positions goes into, where it is the same at all of them."""
        if node not in self.fixed or node.op != "call_function" or node.meta["val"].dtype is not torch.bool:
            return None
        sizes = [size_expr(self.site.sizes[d]) for d in self.reads[node]]
        if not all(isinstance(n, int) for n in sizes) or math.prod(sizes) > _FOLDED:
            return None
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            value = self._known(node, {})
            if bool(value.all()):
                return True
            return None if bool(value.any()) else False

    def _known(self, node: Any, held: dict[fx.Node, Tensor]) -> Any:
        """The real value, on the CPU, of a node that positions and numbers alone go into."""
        if not isinstance(node, fx.Node):
            return node
        if node not in held and node.op == "placeholder":
            (d,) = self.reads[node]
            held[node] = _along(d, torch.arange(int(self.site.sizes[d])))
        elif node not in held:
            first = [torch.zeros((), dtype=n.meta["val"].dtype) for n in node.all_input_nodes if node.target in _NEW]
            args, kwargs = fx.map_arg((node.args[len(first) :], node.kwargs), lambda n: self._known(n, held))
            kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
            held[node] = cast(Any, node.target)(*first, *args, **kwargs)
        return held[node]


def _along(d: int, x: Tensor) -> Tensor:
    """[n] as a tensor of rank four that varies along d."""
    return x.view([-1 if k == d else 1 for k in range(4)])


def _runner(mod: fx.GraphModule) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return _OneScore(mod).run(*args, enable_io_processing=False)

    return run


def _is_pointwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    call = Call(node)
    rule = find(call)
    single = len(call.results) == 1 and all(val.dim() == 0 for val in (*call.vals, *call.results))
    return single and not draws(node.target) and (rule is POINTWISE or isinstance(rule, MaskRule))


def _adds_nothing(node: fx.Node) -> bool:
    """A view of a number, or a sum with 0: after it a position must still be seen to be one."""
    call = Call(node)
    if isinstance(find(call), (ViewRule, ExpandRule)):
        return call.vals[0].dim() == 0 == call.out.dim()
    return node.target is aten.add.Tensor and type(node.args[1]) is int and node.args[1] == 0


def _peeled(spread: _Spread) -> _Parts:
    """What a score_mod adds to the score, and where it puts -inf; what is left is the core."""
    parts, node = _Parts(), spread.result
    while (inner := _inside(spread, node, parts)) is not None:
        node = inner
    if node.op != "placeholder" or spread.reads[node] != {_SCORE}:
        parts.core = _cast(spread.lane(node), spread.site.wide)
        if _SCORE not in spread.reads[node]:
            parts.core = parts.core.expand(spread.site.sizes)
    return parts


def _inside(spread: _Spread, node: fx.Node, parts: _Parts) -> fx.Node | None:
    """The operand of a node that the score goes into, where the node is a term or a mask of it, which joins `parts`."""
    if node.op != "call_function" or node.meta["val"].dtype != spread.site.wide or node.kwargs:
        return None
    scored = [isinstance(a, fx.Node) and _SCORE in spread.reads[a] for a in node.args]
    if sum(scored) != 1:
        return None
    at, args = scored.index(True), cast(Any, node.args)
    inner = args[at]
    if inner.meta["val"].dtype != spread.site.wide:
        return None
    if node.target in _SAME:
        return inner
    if node.target in _SIGNS and isinstance(args[1 - at], fx.Node):
        if at == 1 and node.target is aten.sub.Tensor:
            return None
        parts.terms.append((spread.lane(args[1 - at]), _SIGNS[node.target]))
        return inner
    if node.target is aten.where.self and _minus_inf(spread, args[3 - at]):
        mask = spread.lane(args[0])
        parts.masks.append(mask if at == 1 else ~mask)
        return inner
    if node.target is aten.masked_fill.Scalar and args[2] == -math.inf:
        parts.masks.append(~spread.lane(args[1]))
        return inner
    return None


def _minus_inf(spread: _Spread, x: Any) -> bool:
    while isinstance(x, fx.Node) and x.target in _SAME:
        x = x.args[0]
    if isinstance(x, fx.Node) and x.op == "get_attr":
        held = getattr(spread.module, cast(str, x.target))
        held = held.constant if isinstance(held, FakeTensor) else held
        return held is not None and held.dim() == 0 and float(held) == -math.inf
    return scalar(x) == -math.inf


__all__ = ["LARGEST", "flex_attention"]
