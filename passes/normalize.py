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
| `s * mask + ~mask * -1e9`                               | `masked_fill(s, ~mask, -1e9)` (`normal/chosen.py`)       |
| `x.max(d).values`, a pool to one place, a product with  | `amax(x, d)`, `mean(x, d)` (`normal/pools.py`)           |
| `1 / N` everywhere                                      |                                                          |
| `pad(x, (m, 0))`                                        | `cat([full(m), x], -1)`                                  |
| the sum of what stands side by side along a dim         | adds: `add(x, y)`                                        |
| the same, each times a number of its own (`linear` too) | adds: `add(mul(x, w0), mul(y, w1))`                      |
| `cat` of slices that the same was done to               | it, of the whole (`normal/tiles.py`)                     |
| rows of all samples in one dim, and apart again         | they stay apart (`normal/folds.py`)                      |
| exp over its sum, or of what has been normalised        | `softmax` (`normal/weights.py`)                          |
| the mean of it                                          | adds, divided: `div(add(x, y), 2)`                       |
| one of its running sums (`cumsum`)                      | adds: `add(x, y)`                                        |
| one of it (`unbind`, `split`, `select`, `slice`)        | itself: `x`                                              |
| `x.unbind(d)[0]`, `x.split(1, d)[0]` alone              | `x.select(d, 0)`, `x.narrow(d, 0, 1)`                    |
| what is the same along a dim, spread out                | its row (`normal/spread.py`)                             |
| letters of an einsum that always stand side by side      | one letter (`normal/letters.py`)                         |
| `einsum("npij,bnpj->bnpi", r, x)`, i and j 2 or 3       | `(r * x[..., None, :]).sum(-1)` (`normal/letters.py`)    |
| `(q[:, :, None] * k[:, None]).sum(-1)`                  | `einsum("bnd,bmd->bnm", q, k)`                           |
| `stack([x, x])`, `cat([x, x])`                          | `expand(unsqueeze(x))`, flattened for a cat              |
| views, slices of the same shape, `cat([x])`, `x * 1.0`  | `x`                                                      |
| a slice written over all there is                       | what was written                                         |
| numbers that change nothing                             | left out (`normal/idle.py`)                              |

Side by side stand the operands of a `stack`, a `cat`, and of permutes and views of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .building.emit import Emit, drop_dead
from .normal import beside
from .normal.chosen import chosen
from .normal.folds import unfolded
from .normal.idle import drop_idle, numbers
from .normal.join_writes import added_in_order, join_writes, put_where, read_in_order, written_in_order
from .normal.letters import side_by_side, summed_pairs, turned
from .normal.memory import Outputs
from .normal.pools import by_one_number, extreme, pooled, topmost, windowed
from .normal.spread import narrow_spread
from .normal.tiles import neighbours, tiled
from .normal.weights import from_log, over_their_sum, shifted
from .rules import Call
from .rules.joins import CatRule

aten = torch.ops.aten

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
        if not beside.one_kind(call):
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
        row = emit(aten.full.default, size, value or 0, dtype=own.dtype, device=own.device)
        pieces.insert(len(pieces) if k % 2 else 0, row)
    return emit(aten.cat.default, pieces, d)


def _toward(call: Call, emit: Emit) -> fx.Node | None:
    """A part of the way from one value to another."""
    x, y, weight = (call.args[name] for name in ("self", "end", "weight"))
    if not beside.one_kind(call):
        return None
    return emit(aten.add.Tensor, x, emit(aten.mul.Tensor, emit(aten.sub.Tensor, y, x), weight))


def _plus_product(product: Any) -> Form:
    """A sum with a matrix product. A row for all of them is a bias, which stays."""

    def form(call: Call, emit: Emit) -> fx.Node | None:
        a, b = call.nodes[-2:]
        beta, alpha = call.args["beta"], call.args["alpha"]
        numbers = isinstance(beta, (int, float)) and isinstance(alpha, (int, float))
        if not numbers or not beside.one_kind(call) or call.vals[0].dim() < 2:
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


FORMS: dict[Any, Form] = {
    **dict.fromkeys(_ATTENTIONS, _whole(_attention)),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unflatten.int),
                    lambda call, emit: beside.itself(call, emit) or unfolded(call, emit)),
    aten.expand.default: beside.itself,
    aten._unsafe_view.default: lambda call, emit: beside.itself(call, emit) or emit(aten.view.default, *call.node.args),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), _changed_by(1)),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor),
                    lambda call, emit: _changed_by(1)(call, emit) or over_their_sum(call, emit)),
    aten.exp.default: from_log,
    aten.softmax.int: shifted,
    **dict.fromkeys((aten.matmul.default, aten.linear.default, aten.bmm.default, aten.mv.default),
                    lambda call, emit: beside.weighted(call, emit) or by_one_number(call, emit) or turned(call, emit)),
    aten.einsum.default: lambda call, emit: (
        beside.weighted(call, emit) or by_one_number(call, emit) or turned(call, emit) or side_by_side(call, emit)
    ),
    **dict.fromkeys((aten.add.Scalar, aten.sub.Scalar), _sum),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor),
                    lambda call, emit: chosen(call, emit) or _sum(call, emit)),
    aten.native_layer_norm.default: _whole(_layer_norm),
    **dict.fromkeys((aten.max.dim, aten.min.dim), _whole(extreme)),
    **dict.fromkeys((aten.max.default, aten.min.default), extreme),
    **dict.fromkeys((aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default), _whole(windowed)),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
                     aten.avg_pool2d.default, aten.avg_pool3d.default), windowed),
    aten.topk.default: _whole(topmost),
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
    **dict.fromkeys((aten.lerp.Scalar, aten.lerp.Tensor), _toward),
    aten.baddbmm.default: _plus_product(aten.bmm.default),
    aten.addmm.default: _plus_product(aten.mm.default),
    aten.cat.default: lambda call, emit: (
        (beside.itself(call, emit) if beside.one_dtype(call) else None)
        or beside.beside_itself(call, emit)
        or tiled(call, CatRule.dim(call), emit)
        or neighbours(call, CatRule.dim(call), emit)
    ),
    aten.stack.default: beside.beside_itself,
    **dict.fromkeys((aten.index_add.default, aten.scatter_add.default, aten.scatter_reduce.two), added_in_order),
    aten.index_put.default: lambda call, emit: (
        put_where(call, emit) or added_in_order(call, emit) or written_in_order(call, emit)
    ),
    aten.index_copy.default: written_in_order,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), read_in_order),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _padded),
    aten.sum.dim_IntList: lambda call, emit: beside.summed(call, emit) or summed_pairs(call, emit),
    aten.mean.dim: beside.averaged,
    aten.unbind.int: lambda call, emit: beside.each(call, emit) or beside.only_one(call, emit),
    aten.select.int: beside.one,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default),
                    lambda call, emit: beside.apart(call, emit) or beside.only_one(call, emit)),
    aten.slice.Tensor: beside.part,
    aten.slice_scatter.default: beside.overwritten,
}

__all__ = ["normalize"]
