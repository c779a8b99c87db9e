"""normalize: one meaning, one form. What a model can spell in many ways is put into the one way that later passes read.

`capture` has made of other ops what torch makes of them (`normal/composites.py`), and values of writes
(`normal/functional.py`). What is left:

| spelling                                                | form                                                     |
|---------------------------------------------------------|----------------------------------------------------------|
| slices written until nothing is left of what was there  | one cat (`normal/join_writes.py`)                        |
| `x.new_zeros(size)`                                     | `full(size, 0)`, which reads nothing of x                |
| `addcmul(x, a, b, value=c)`, `addcdiv`                  | `add(x, mul(mul(a, b), c))`, `add(x, mul(div(a, b), c))` |
| `add(x, y, alpha=c)`, `sub`                             | `add(x, mul(y, c))`                                      |
| `lerp(x, y, w)`                                         | `add(x, mul(sub(y, x), w))`                              |
| `baddbmm(x, a, b, beta=c, alpha=d)`, `addmm` of rows    | `add(mul(x, c), mul(bmm(a, b), d))`                      |
| attention, norms, convolutions as below autograd        | as above it: `scaled_dot_product_attention`, `conv2d`    |
| `index_add`, `scatter_add`, `index_put` of what is      | `add(x, y)`                                              |
| added to every row, each once and in order              |                                                          |
| `x[mask] = 0`, or a row: the same for all places        | `masked_fill(x, mask, 0)`, `where(mask, row, x)`         |
| rows that an index reads or writes one behind the other | `slice`, `slice_scatter`                                 |
| `x == 0`, `x != 0`                                      | `logical_not(x)`, `x` as bools                           |
| `x.max(d).values`, a pool to one place                  | `amax(x, d)`, `mean(x, d)` (`normal/pools.py`)           |
| `pad(x, (m, 0))`                                        | `cat([full(m), x], -1)`                                  |
| the sum of what stands side by side along a dim         | adds: `add(x, y)`                                        |
| the same, each times a number of its own (`linear` too) | adds: `add(mul(x, w0), mul(y, w1))`                      |
| `cat` of slices that the same was done to               | it, of the whole (`normal/tiles.py`)                     |
| rows of all samples in one dim, and apart again         | they stay apart (`normal/folds.py`)                      |
| exp over its sum, or of what has been normalised        | `softmax` (`normal/weights.py`)                          |
| the mean of it                                          | adds, divided: `div(add(x, y), 2)`                       |
| one of its running sums (`cumsum`)                      | adds: `add(x, y)`                                        |
| one of it (`unbind`, `split`, `select`, `slice`)        | itself: `x`                                              |
| what is the same along a dim, spread out                | its row (`normal/spread.py`)                             |
| letters of an einsum that always stand side by side      | one letter (`normal/letters.py`)                         |
| `(q[:, :, None] * k[:, None]).sum(-1)`                  | `einsum("bnd,bmd->bnm", q, k)`                           |
| `stack([x, x])`, `cat([x, x])`                          | `expand(unsqueeze(x))`, flattened for a cat              |
| views, slices of the same shape, `cat([x])`, `x * 1.0`  | `x`                                                      |
| a slice written over all there is                       | what was written                                         |
| numbers that change nothing                             | left out (`normal/idle.py`)                              |

Side by side stand the operands of a `stack`, a `cat`, and of permutes and views of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, permutations
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .algebra.axes import expr
from .building.emit import Emit, drop_dead
from .normal.folds import unfolded
from .normal.idle import drop_idle, numbers
from .normal.join_writes import added_in_order, join_writes, put_where, read_in_order, written_in_order
from .normal.letters import side_by_side, summed_pairs
from .normal.memory import Outputs
from .normal.pools import extreme, pooled
from .normal.spread import narrow_spread
from .normal.tiles import tiled
from .normal.weights import from_log, over_their_sum, shifted
from .rules import Call, find
from .rules.base import Role
from .rules.contraction import Contraction
from .rules.facts import NO_FACTS
from .rules.joins import CatRule
from .rules.views import PermuteRule, ViewRule

aten = torch.ops.aten

MOST = 8
"""Values whose sum is still written as adds."""


def normalize(graph: fx.Graph, mode: FakeTensorMode, impure: Callable[[fx.Node], bool]) -> dict[fx.Node, Tensor]:
    """Rewrite in place. impure: the nodes that stay though nobody reads them. Returns the values of what is made of
    numbers alone."""
    outputs, known = Outputs(graph), numbers(graph, {})
    _by_table(graph, Emit(graph, mode, known=known))
    drop_dead(graph, impure)
    if join_writes(graph):
        drop_dead(graph, impure)
        _by_table(graph, Emit(graph, mode, known=known))
    drop_dead(graph, impure)
    known = numbers(graph, known)
    narrow_spread(graph, mode, known.get)
    drop_dead(graph, impure)
    known = numbers(graph, known)
    drop_idle(graph, known)
    outputs.keep_apart(Emit(graph, mode))
    drop_dead(graph, impure)
    return known


def _by_table(graph: fx.Graph, emit: Emit) -> None:
    for node in list(graph.nodes):
        form = FORMS.get(node.target) if node.op == "call_function" else None
        if form is None:
            continue
        with emit.before(node):
            new = form(Call(node), emit)
        if isinstance(new, fx.Node):
            node.replace_all_uses_with(new)
        elif new is not None:
            for user in list(node.users):
                user.replace_all_uses_with(new[user.args[1]])


Form = Callable[[Call, Emit], "fx.Node | list[fx.Node] | None"]
"""What stands for the result of a call, or for each of its results."""


def _itself(call: Call, emit: Emit) -> fx.Node | None:
    """A view of the same shape, or a value that is joined with nothing."""
    before, after = (list(map(expr, val.shape)) for val in (call.vals[0], call.out))
    return call.nodes[0] if before == after else None


def _changed_by(neutral: float) -> Form:
    """Arithmetic with the number that changes nothing."""

    def form(call: Call, emit: Emit) -> fx.Node | None:
        same = call.vals[0].dtype == call.out.dtype and not isinstance(call.args["other"], bool)
        return call.nodes[0] if same and len(call.nodes) == 1 and call.args["other"] == neutral else None

    return form


def _filled(number: float) -> Form:
    def form(call: Call, emit: Emit) -> fx.Node | None:
        own, size = call.out, call.args["size"]
        if not all(isinstance(n, int) for n in size):
            return None
        value = number if own.dtype.is_floating_point else int(number)
        return emit(aten.full.default, size, value, dtype=own.dtype, device=own.device)

    return form


def _added(product: Any) -> Form:
    """A sum with a product or a quotient."""

    def form(call: Call, emit: Emit) -> fx.Node | None:
        if not _one_kind(call):
            return None
        a = call.args
        other, value = emit(product, a["tensor1"], a["tensor2"]), a["value"]
        return emit(aten.add.Tensor, a["self"], other if value == 1 else emit(aten.mul.Tensor, other, value))

    return form


def _sum(call: Call, emit: Emit) -> fx.Node | list[fx.Node] | None:
    """A sum with 0, or with so many times a value."""
    alpha, other, own = call.args.get("alpha", 1), call.args["other"], call.out.dtype
    if alpha == 1 or not isinstance(other, fx.Node) or not own.is_floating_point:
        return _changed_by(0)(call, emit)
    if other.meta["val"].dtype != own:
        other = emit(aten._to_copy.default, other, dtype=own)
    return emit(call.target, call.args["self"], emit(aten.mul.Tensor, other, alpha))


def _compared(target: Any, **kwargs: Any) -> Form:
    """A comparison with 0 is the negation, or the truth, of what is compared."""
    return lambda call, emit: emit(target, call.nodes[0], **kwargs) if call.args["other"] == 0 else None


def _padded(call: Call, emit: Emit) -> fx.Node | None:
    """What is padded along one dim stands beside what it is padded with."""
    pads, own = call.args["pad"], call.out
    value = call.args.get("value")
    if call.args.get("mode", "constant") != "constant" or not all(isinstance(n, int) and n >= 0 for n in pads):
        return None
    places = [k for k, amount in enumerate(pads) if amount]
    if not places:
        return call.nodes[0]
    dims = {own.dim() - 1 - k // 2 for k in places}
    if len(dims) != 1 or not all(isinstance(size, int) for size in own.shape) or isinstance(value, fx.Node):
        return None
    (d,) = dims
    pieces: list[Any] = [call.nodes[0]]
    for k in places:
        size = [pads[k] if i == d else n for i, n in enumerate(own.shape)]
        beside = emit(aten.full.default, size, value or 0, dtype=own.dtype, device=own.device)
        pieces.insert(len(pieces) if k % 2 else 0, beside)
    return emit(aten.cat.default, pieces, d)


def _toward(call: Call, emit: Emit) -> fx.Node | None:
    """A part of the way from one value to another."""
    x, y, weight = (call.args[name] for name in ("self", "end", "weight"))
    if not _one_kind(call):
        return None
    return emit(aten.add.Tensor, x, emit(aten.mul.Tensor, emit(aten.sub.Tensor, y, x), weight))


def _plus_product(product: Any) -> Form:
    """A sum with a matrix product. A row for all of them is a bias, which stays."""

    def form(call: Call, emit: Emit) -> fx.Node | None:
        a, b = call.nodes[-2:]
        beta, alpha = call.args["beta"], call.args["alpha"]
        numbers = isinstance(beta, (int, float)) and isinstance(alpha, (int, float))
        if not numbers or not _one_kind(call) or call.vals[0].dim() < 2:
            return None
        out = emit(product, a, b)
        out = out if alpha == 1 else emit(aten.mul.Tensor, out, alpha)
        if beta == 0:
            return out
        return emit(aten.add.Tensor, call.nodes[0] if beta == 1 else emit(aten.mul.Tensor, call.nodes[0], beta), out)

    return form


def _whole(form: Form) -> Form:
    """What is read of an op with several results is the first."""

    def first(call: Call, emit: Emit) -> list[fx.Node] | None:
        if any(user.args[1] != 0 for user in call.node.users if user.users):
            return None
        found = form(call, emit)
        return [found] * len(call.node.meta["val"]) if isinstance(found, fx.Node) else None

    return first


def _attention(call: Call, emit: Emit) -> fx.Node:
    a = call.args
    options: dict[str, Any] = {"dropout_p": a.get("dropout_p") or 0.0, "is_causal": a.get("is_causal") or False}
    mask = a.get("attn_mask", a.get("attn_bias"))
    options |= {} if mask is None else {"attn_mask": mask}
    options |= {} if a.get("scale") is None else {"scale": a["scale"]}
    return emit(aten.scaled_dot_product_attention.default, *call.nodes[:3], **options)


def _layer_norm(call: Call, emit: Emit) -> fx.Node:
    a = call.args
    return emit(aten.layer_norm.default, a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"])


def _convolution(call: Call, emit: Emit) -> fx.Node | None:
    a, spatial = call.args, call.vals[0].dim() - 2
    if a["transposed"] or spatial not in _CONVOLUTIONS:
        return None
    rest = (a["stride"], a["padding"], a["dilation"], a["groups"])
    return emit(_CONVOLUTIONS[spatial], a["input"], a["weight"], a["bias"], *rest)


_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
# What is left of attention below autograd (vmap, exported programs), as far as this release of torch has it.
_ATTENTIONS = [
    getattr(aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
                 "fused_attention_overrideable", "attention_math", "attention_math_for_mps")
    if hasattr(aten, f"_scaled_dot_product_{name}")
]  # fmt: skip


# -- values side by side -----------------------------------------------------------------------------------------------


def _pieces(node: fx.Node, d: int, emit: Emit) -> list[fx.Node] | None:
    """The values that stand side by side along dim d of a value, each without that dim; None where there are none."""
    if node.op != "call_function":
        return None
    call = Call(node)
    rule = find(call)
    if node.target is aten.stack.default and call.axis(call.args["dim"], call.out.dim()) == d:
        return [_as(call.out.dtype, n, emit) for n in call.nodes] if _floats(call) else None
    if node.target is aten.cat.default and all(expr(val.shape[d]) == 1 for val in call.vals if val.dim() > d):
        joined = call.axis(call.args["dim"]) == d and _floats(call)
        return [_as(call.out.dtype, emit(aten.squeeze.dim, n, d), emit) for n in call.nodes] if joined else None
    if node.target is aten.cumsum.default and call.axis(call.args["dim"]) == d and _one_kind(call):
        inner = _pieces(call.nodes[0], d, emit)
        few = inner is not None and len(inner) <= MOST
        return list(accumulate(inner, lambda x, y: emit(aten.add.Tensor, x, y))) if inner and few else None
    if node.target is aten.mul.Tensor:
        return _times(call, d, emit)
    if isinstance(rule, PermuteRule):
        order = rule.order(call)
        rest = [k - (k > order[d]) for k in order if k != order[d]]
        inner = _pieces(call.nodes[0], order[d], emit)
        moved = rest != sorted(rest)
        return inner and [emit(aten.permute.default, n, rest) if moved else n for n in inner]
    if isinstance(rule, ViewRule) and d + 1 < call.out.dim():
        before, after = ([expr(n) for n in val.shape] for val in (call.vals[0], call.out))
        if [*after[:d], prod(after[d : d + 2]), *after[d + 2 :]] == before:
            held = _spans(call.nodes[0], d)
            whole = held is not None and [expr(n) for _, n in held] == [after[d + 1]] * after[d]
            return [n for n, _ in held] if held is not None and whole else None
    return None


def _times(call: Call, d: int, emit: Emit) -> list[fx.Node] | None:
    """The products of what stands side by side along dim d with what belongs to each."""
    for x, w in (call.nodes, call.nodes[::-1]) if len(call.nodes) == 2 and _one_kind(call) else ():
        at = d - call.out.dim() + w.meta["val"].dim()
        inner = _pieces(x, d, emit) if x.meta["val"].shape == call.out.shape else None
        if inner is not None:
            own = w.meta["val"].shape[at] if at >= 0 else 1
            each = [w if at < 0 else emit(aten.select.int, w, at, k if own != 1 else 0) for k in range(len(inner))]
            return [emit(aten.mul.Tensor, n, by) for n, by in zip(inner, each, strict=True)]
    return None


def _spans(node: fx.Node, d: int) -> list[tuple[fx.Node, Any]] | None:
    """The values that a cat joins along dim d, and how long each is."""
    if node.target is not aten.cat.default or not _one_dtype(call := Call(node)):
        return None
    same_rank = all(val.dim() == call.out.dim() for val in call.vals)
    held = list(zip(call.nodes, (val.shape[d] for val in call.vals if val.dim() > d), strict=False))
    return held if same_rank and call.axis(call.args["dim"]) == d else None


def _summed(call: Call, emit: Emit) -> fx.Node | None:
    """The sum of what stands side by side."""
    dims = call.args["dim"]
    if not dims or len(dims) != 1 or not _one_kind(call):
        return None
    d = call.axis(dims[0])
    terms = _pieces(call.nodes[0], d, emit)
    if terms is None or not 1 < len(terms) <= MOST:
        return None
    total = _total(terms, emit)
    return emit(aten.unsqueeze.default, total, d) if call.args["keepdim"] else total


def _total(terms: Sequence[fx.Node], emit: Emit) -> fx.Node:
    return reduce(lambda x, y: emit(aten.add.Tensor, x, y), terms)


def _weighted(call: Call, emit: Emit) -> fx.Node | None:
    """A product that sums what stands side by side, each times a number of its own; a result may be a dim of size 1."""
    rule = find(call)
    if not isinstance(rule, Contraction) or len(call.nodes) != 2 or not _one_kind(call):
        return None
    sig = rule.signature(call, NO_FACTS)
    for (letters, node), (by, weights) in permutations(zip(sig.ins, call.nodes, strict=True)):
        x = next((c for c in by if c in letters and sig.role(c) is Role.SUM), None)
        new = [c for c in by if c != x]
        one = all(expr(weights.meta["val"].shape[by.index(c)]) == 1 for c in new[:1]) and len(new) < 2
        if x is None or not one or (*sig.outs[0],) != (*(c for c in letters if c != x), *new):
            continue
        terms = _pieces(node, letters.index(x), emit)
        if terms is not None and 1 < len(terms) <= MOST:
            row = emit(aten.select.int, weights, by.index(new[0]), 0) if new else weights
            scaled = (emit(aten.mul.Tensor, n, emit(aten.select.int, row, 0, k)) for k, n in enumerate(terms))
            total = _total(list(scaled), emit)
            return emit(aten.unsqueeze.default, total, -1) if new else total
    return None


def _averaged(call: Call, emit: Emit) -> fx.Node | None:
    total = _summed(call, emit)
    return None if total is None else emit(aten.div.Tensor, total, call.vals[0].shape[call.args["dim"][0]])


def _each(call: Call, emit: Emit) -> list[fx.Node] | None:
    return _pieces(call.nodes[0], call.axis(call.args["dim"]), emit) if _only_taken(call.nodes[0]) else None


def _only_taken(join: fx.Node) -> bool:
    """Whether nobody reads values together: else what is taken from them is a part of that stream."""
    takes = (aten.unbind.int, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
    return all(user.target in takes for user in join.users)


def _one(call: Call, emit: Emit) -> fx.Node | None:
    pieces, at = _each(call, emit), call.args["index"]
    return pieces[at] if pieces is not None and isinstance(at, int) else None


def _apart(call: Call, emit: Emit) -> list[fx.Node] | None:
    """What was joined, taken apart where it was joined."""
    d = call.axis(call.args["dim"])
    held = _spans(call.nodes[0], d) if _only_taken(call.nodes[0]) else None
    return [n for n, _ in held] if held and [n for _, n in held] == [val.shape[d] for val in call.results] else None


def _part(call: Call, emit: Emit) -> fx.Node | None:
    if (whole := _itself(call, emit)) is not None:
        return whole
    d, start = call.axis(call.args["dim"]), call.args["start"] or 0
    held, at = (_spans(call.nodes[0], d) if _only_taken(call.nodes[0]) else None) or [], 0
    if call.args["step"] != 1 or not all(isinstance(n, int) for n in (start, *(size for _, size in held))):
        return None
    start = start + call.vals[0].shape[d] if start < 0 else start
    for n, size in held:
        if at == start and size == call.out.shape[d]:
            return n
        at += size
    return None


def _overwritten(call: Call, emit: Emit) -> fx.Node | None:
    """All of it: what was there is not left."""
    (before, src), own = call.vals, call.out
    whole = list(map(expr, before.shape)) == list(map(expr, src.shape))
    return call.nodes[1] if whole and src.dtype == own.dtype and src.device == own.device else None


def _beside_itself(call: Call, emit: Emit) -> fx.Node | None:
    """One value several times is spread out."""
    k, new = len(call.nodes), call.target is aten.stack.default
    if len(set(call.nodes)) != 1 or k < 2 or not all(isinstance(n, int) for n in call.out.shape):
        return None
    d = call.axis(call.args["dim"], call.out.dim())
    own = list(call.vals[0].shape)
    row = emit(aten.unsqueeze.default, call.nodes[0], d)
    out = emit(aten.expand.default, row, [*own[:d], k, *own[d:]])
    out = emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    return out if new else emit(aten.reshape.default, out, list(call.out.shape))


def _one_kind(call: Call) -> bool:
    """Whether operands and result are floats of one dtype. (In half precision a form may round once more.)"""
    held = [*call.vals, *call.results]
    return all(isinstance(v, Tensor) and v.is_floating_point() and v.dtype == held[0].dtype for v in held)


def _one_dtype(call: Call) -> bool:
    return len({val.dtype for val in call.vals}) == 1


def _floats(call: Call) -> bool:
    """Whether operands are of one dtype, or floats that become one."""
    return _one_dtype(call) or all(val.is_floating_point() for val in call.vals)


def _as(dtype: torch.dtype, node: fx.Node, emit: Emit) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else emit(aten._to_copy.default, node, dtype=dtype)


FORMS: dict[Any, Form] = {
    **dict.fromkeys(_ATTENTIONS, _whole(_attention)),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unflatten.int),
                    lambda call, emit: _itself(call, emit) or unfolded(call, emit)),
    aten.expand.default: _itself,
    aten._unsafe_view.default: lambda call, emit: _itself(call, emit) or emit(aten.view.default, *call.node.args),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), _changed_by(1)),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor),
                    lambda call, emit: _changed_by(1)(call, emit) or over_their_sum(call, emit)),
    aten.exp.default: from_log,
    aten.softmax.int: shifted,
    **dict.fromkeys((aten.matmul.default, aten.linear.default), _weighted),
    aten.einsum.default: lambda call, emit: _weighted(call, emit) or side_by_side(call, emit),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), _sum),
    aten.native_layer_norm.default: _whole(_layer_norm),
    **dict.fromkeys((aten.max.dim, aten.min.dim), _whole(extreme)),
    **dict.fromkeys((aten.max.default, aten.min.default), extreme),
    **dict.fromkeys((aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default), _whole(pooled)),
    **dict.fromkeys((aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
                     aten.adaptive_avg_pool3d.default), pooled),
    aten.convolution.default: _convolution,
    aten.eq.Scalar: _compared(aten.logical_not.default),
    aten.ne.Scalar: _compared(aten._to_copy.default, dtype=torch.bool),
    aten.new_zeros.default: _filled(0.0),
    aten.new_ones.default: _filled(1.0),
    aten.addcmul.default: _added(aten.mul.Tensor),
    aten.addcdiv.default: _added(aten.div.Tensor),
    aten.lerp.Scalar: _toward,
    aten.lerp.Tensor: _toward,
    aten.baddbmm.default: _plus_product(aten.bmm.default),
    aten.addmm.default: _plus_product(aten.mm.default),
    aten.cat.default: lambda call, emit: (
        (_itself(call, emit) if _one_dtype(call) else None)
        or _beside_itself(call, emit)
        or tiled(call, CatRule.dim(call), emit)
    ),
    aten.stack.default: _beside_itself,
    **dict.fromkeys((aten.index_add.default, aten.scatter_add.default, aten.scatter_reduce.two), added_in_order),
    aten.index_put.default: lambda call, emit: (
        put_where(call, emit) or added_in_order(call, emit) or written_in_order(call, emit)
    ),
    aten.index_copy.default: written_in_order,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), read_in_order),
    aten.pad.default: _padded,
    aten.constant_pad_nd.default: _padded,
    aten.sum.dim_IntList: lambda call, emit: _summed(call, emit) or summed_pairs(call, emit),
    aten.mean.dim: _averaged,
    aten.unbind.int: _each,
    aten.select.int: _one,
    aten.split.Tensor: _apart,
    aten.split_with_sizes.default: _apart,
    aten.slice.Tensor: _part,
    aten.slice_scatter.default: _overwritten,
}

__all__ = ["normalize"]
