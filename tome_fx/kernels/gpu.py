"""Triton kernels of the `tome` operators. Importing this needs triton and registers them; `lower` does so on CUDA, and
who loads an exported program that holds them must.

They compute what the ATen forms in `tome_fx.ops` do, in float32, and never add with atomics: two runs agree in every
bit. Inductor sees the kernels and what stands around them, not opaque calls. No block size is measured; with those here
ptxas spills no registers for sm_90.

| operator             | what the ATen form would need                                                       |
|----------------------|-------------------------------------------------------------------------------------|
| `tome::best_partner` | the matrix of all cosines: here blocks of it, and a running maximum                 |
| `tome::merge_index`  | a sort and scatters: here every position counts the merged sources before it        |
| `tome::merge_size_triton` | a scatter: here every group looks for the tokens that join it                  |
| `tome::merge_triton` | gathers and a scatter, in four passes: here one pass over x                         |
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tome_fx import ops

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Floating dtypes that `merge_triton` reads and writes."""


@triton.jit
def _best_partner(unit, best, partner, n, d, sources, first, BS: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
    blocks = tl.cdiv(sources, BS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    rows = unit + sample * n * d
    s = tl.program_id(0) % blocks * BS + tl.arange(0, BS)
    top = tl.full([BS], float("-inf"), tl.float32)
    where = tl.zeros([BS], tl.int32)
    for start in range(0, n - sources, BD):
        t = start + tl.arange(0, BD)
        scores = tl.zeros([BS, BD], tl.float32)
        for low in range(0, d, BK):
            k = low + tl.arange(0, BK)
            x = rows + (first + 2 * s)[:, None] * d + k[None, :]
            y = rows + (1 - first + 2 * t)[None, :] * d + k[:, None]
            x = tl.load(x, (s < sources)[:, None] & (k < d)[None, :], 0.0)
            y = tl.load(y, (t < n - sources)[None, :] & (k < d)[:, None], 0.0)
            # TF32 would order tokens otherwise than float32 does.
            scores = tl.dot(x, y, scores, input_precision="ieee")
        scores = tl.where((t < n - sources)[None, :], scores, float("-inf"))
        value, at = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        better = value > top  # not >=: of equal destinations the first stays
        top = tl.where(better, value, top)
        where = tl.where(better, start + at, where)
    tl.store(best + sample * sources + s, top, s < sources)
    tl.store(partner + sample * sources + s, where, s < sources)


@triton_op("tome::best_partner", mutates_args=())
def best_partner(unit: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The most similar destination of every source, without the matrix of similarities.

    Args:
        unit: float32 `[batch, n, d]`, unit vectors.
        first: 0 where even rows are sources and odd rows destinations, 1 the other way round.

    Returns: `(best, partner)` `[batch, sources]`: float32 dot product, int32 rank among the destinations; of equal ones
        the lowest, as in `torch.max`. A source that holds NaN, or meets nothing else, has -inf and 0.
    """
    batch, n, d = unit.shape
    unit, sources = unit.contiguous(), (n + 1 - first) // 2
    best = unit.new_empty((batch, sources))
    partner = unit.new_empty((batch, sources), dtype=torch.int32)
    grid = (batch * ((sources + 63) // 64),)
    wrap_triton(_best_partner)[grid](unit, best, partner, n, d, sources, first, BS=64, BD=64, BK=16)
    return best, partner


@triton.jit
def _merge_index(merged, partner, assign, keep, n, r, prefix, suffix, sources, BN: tl.constexpr, BR: tl.constexpr):
    blocks = tl.cdiv(n, BN)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    inside = (p >= prefix) & (p < n - suffix)
    source = inside & (p % 2 == 0)
    rank = (p - prefix) // 2  # among sources, or among destinations
    before = tl.zeros([BN], tl.int32)
    found = tl.zeros([BN], tl.int32)
    for start in range(0, r, BR):
        m = start + tl.arange(0, BR)
        other = tl.load(merged + sample * r + m, m < r, n)
        before += tl.sum((other[None, :] < rank[:, None]).to(tl.int32), 1)
        found += tl.sum((other[None, :] == rank[:, None]).to(tl.int32), 1)
    goes = source & (found > 0)
    to = tl.load(partner + sample * sources + rank, goes, 0)
    place = tl.where(source, prefix + rank - before, prefix + sources - r + tl.where(goes, 0, rank))
    place = tl.where(goes, prefix + sources - r + to, place)
    place = tl.where(inside, place, tl.where(p < prefix, p, p - r))
    tl.store(assign + sample * n + p, place.to(tl.int64), p < n)
    tl.store(keep + sample * (n - r) + place, p.to(tl.int64), (p < n) & (goes == 0))


@triton_op("tome::merge_index", mutates_args=())
def merge_index(merged: Tensor, partner: Tensor, n: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """`assign` and `keep` of `tome::match` from the ranks of the merged sources.

    Args:
        merged: int64 `[batch, r]`, ranks of the merged sources among all sources, each once.
        partner: integer `[batch, sources]`, rank of each source's destination.
        n: tokens, protected ones included.

    Returns: int64 `[batch, n]` and `[batch, n - r]`.
    """
    batch, r = merged.shape
    assign, keep = merged.new_empty((batch, n)), merged.new_empty((batch, n - r))
    grid = (batch * ((n + 63) // 64),)
    wrap_triton(_merge_index)[grid](
        merged.contiguous(), partner.contiguous(), assign, keep, n, r, prefix, suffix, partner.shape[1], BN=64, BR=64
    )
    return assign, keep


@triton.jit
def _merge_size(size, slot, keep, moved, out, n, after, r, SIZED: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr):
    blocks = tl.cdiv(after, BG)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * BG + tl.arange(0, BG)
    total = tl.full([BG], 1.0, tl.float32)
    if SIZED:
        total = tl.load(size + sample * n + tl.load(keep + sample * after + g, g < after, 0))
    for start in range(0, r, BR):
        m = start + tl.arange(0, BR)
        joins = g[:, None] == tl.load(slot + sample * r + m, m < r, -1)[None, :]
        weight = tl.full([BR], 1.0, tl.float32)
        if SIZED:
            weight = tl.load(size + sample * n + tl.load(moved + sample * r + m, m < r, 0))
        total += tl.sum(tl.where(joins, weight[None, :], 0.0), 1)
    tl.store(out + sample * after + g, total, g < after)


@triton_op("tome::merge_size_triton", mutates_args=())
def merge_size(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`tome::merge_size`: float32 `[*sample, N']`. No gradient."""
    ops.check_shapes(size, None, assign, keep, moved)
    assign, keep, moved = assign.contiguous(), keep.contiguous(), moved.contiguous()
    out = keep.new_empty(keep.shape, dtype=torch.float32)
    slot, after = assign.gather(-1, moved), keep.shape[-1]
    sizes = keep if size is None else size.contiguous()  # not read: a kernel's pointer cannot be None
    grid = (math.prod(keep.shape[:-1]) * ((after + 63) // 64),)
    wrap_triton(_merge_size)[grid](
        sizes, slot, keep, moved, out, assign.shape[-1], after, moved.shape[-1], SIZED=size is not None, BG=64, BR=64
    )
    return out


@triton.jit
def _merge(
    x, y, size, size_out, slot, keep, moved, out, n, after, r, width,
    ADD: tl.constexpr, SIZED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // after
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    here = sample * n * width + tl.load(keep + row) * width + c
    kept = tl.load(x + here, c < width, 0.0)
    if ADD:
        kept = (kept.to(tl.float32) + tl.load(y + here, c < width, 0.0).to(tl.float32)).to(kept.dtype)
    mean = kept.to(tl.float32)
    total = tl.load(size_out + row)
    gain = tl.zeros([BC], tl.float32)
    joined = 0
    for start in range(0, r, BR):
        m = start + tl.arange(0, BR)
        joins = tl.load(slot + sample * r + m, m < r, -1) == row % after
        some = tl.max(joins.to(tl.int32), 0)
        joined = tl.maximum(joined, some)
        if some > 0:
            i = tl.load(moved + sample * r + m, joins, 0)
            there = (sample * n + i)[:, None] * width + c[None, :]
            both = joins[:, None] & (c < width)[None, :]
            other = tl.load(x + there, both, 0.0)
            if ADD:
                other = (other.to(tl.float32) + tl.load(y + there, both, 0.0).to(tl.float32)).to(other.dtype)
            share = tl.full([BR], 1.0, tl.float32) / total
            if SIZED:
                share = tl.load(size + sample * n + i, joins, 0.0) / total
            apart = (other.to(tl.float32) - mean[None, :]) * share[:, None]
            gain += tl.sum(tl.where(both, apart, 0.0), 0)
    # Where nothing joins, not even -0.0 changes.
    tl.store(out + row * width + c, tl.where(joined > 0, mean + gain, mean).to(kept.dtype), c < width)


@triton_op("tome::merge_triton", mutates_args=())
def merge(
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    size_out: Tensor,
    assign: Tensor,
    keep: Tensor,
    moved: Tensor,
) -> Tensor:
    """`tome::merge_add` of `x` and `y` (None: `tome::merge`), `[*sample, N, *rest]` of one dtype in `DTYPES`."""
    ops.check_shapes(size, size_out, assign, keep, moved, x=x, **({} if y is None else {"y": y}))
    x, size_out, assign, keep, moved = (t.contiguous() for t in (x, size_out, assign, keep, moved))
    rest = x.shape[assign.dim() :]
    out = x.new_empty((*keep.shape, *rest))
    slot, width = assign.gather(-1, moved), math.prod(rest)
    added, sizes = x if y is None else y.contiguous(), size_out if size is None else size.contiguous()
    # A block size is a constant: of a symbolic width it would be a guard.
    columns = min(max(triton.next_power_of_2(width), 16), 256) if isinstance(width, int) else 256
    grid = (math.prod(keep.shape), (width + columns - 1) // columns)
    wrap_triton(_merge)[grid](
        x, added, sizes, size_out, slot, keep, moved, out, assign.shape[-1], keep.shape[-1], moved.shape[-1], width,
        ADD=y is not None, SIZED=size is not None, BR=16, BC=columns,
    )  # fmt: skip
    return out


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = ops.merge_backward_aten(grad, *ctx.saved_tensors)
    return back, back if ctx.added else None, None, None, None, None, None


def _merge_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.added = inputs[1] is not None
    ops.merge_setup(ctx, (inputs[0], *inputs[2:]), output)


merge.register_autograd(_merge_backward, setup_context=_merge_setup)


def match(
    metric: Tensor, r: int, prefix: int, suffix: int, heads: bool, blocked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`tome::match`; `blocked`: without the matrix of similarities. topk finds the `r` best, nothing is sorted."""
    with torch.autocast(metric.device.type, enabled=False):
        metric = metric.detach() if heads else metric.detach().unsqueeze(-2)
        sample, n = metric.shape[:-3], metric.shape[-3]
        metric = metric if len(sample) == 1 else metric.reshape(-1, *metric.shape[-3:])
        unit = ops.directions(metric, prefix, suffix)
        first = prefix % 2
        best, partner = best_partner(unit, first) if blocked else ops.best_partner_aten(unit, first)
        best, partner = ops.pair_nulls(unit, first, best, partner)
        similarity, merged = best.topk(r, dim=-1)
        assign, keep = merge_index(merged, partner, n, prefix, suffix)
        moved = merged * 2 + (prefix + first)
        whole = [t.reshape(*sample, t.shape[-1]) for t in (assign, keep, moved, similarity)]
        return whole[0], whole[1], whole[2], whole[3]


ops.spelled_out(
    "match_triton(Tensor metric, SymInt r, int prefix, int suffix, bool heads, bool blocked)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    match,
)
