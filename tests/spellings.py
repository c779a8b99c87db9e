"""Many spellings of one meaning: how a mask of pairs is made, how it joins attention, how special tokens come in.

A mask is bool (True: seen) or float (added), of rank 2 to 4 that broadcasts to [B, H, N, N]. `KINDS` says what it
means, `HELD` and `MADE` how it is written, `APPLY` and `MODULES` what is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tests.models import redraw

INF, LOW = -math.inf, torch.finfo(torch.float32).min
BATCH, HEADS = 2, 4
WINDOW, PARTS = 5, 4


# -- what a mask means -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """keep(i, j): whether query i sees key j, of n tokens. changed(i, n): tokens that may change without a move at
    those for which kept(i, n), through two blocks. parted: parts that see themselves and nothing else, part(i, n)."""

    keep: Callable[[Tensor, Tensor, int], Tensor]
    changed: Callable[[Tensor, int], Tensor]
    kept: Callable[[Tensor, int], Tensor]
    part: Callable[[Tensor, int], Tensor] | None = None

    def mask(self, n: int) -> Tensor:
        """bool [n, n]"""
        i = torch.arange(n)
        return self.keep(i[:, None], i[None], n)

    def places(self, n: int) -> tuple[Tensor, Tensor]:
        """(changed, kept), bool [n] each."""
        i = torch.arange(n)
        return self.changed(i, n), self.kept(i, n)


def later(i: Tensor, n: int) -> Tensor:
    return i >= n // 2


def earlier(i: Tensor, n: int) -> Tensor:
    return i < n // 2


def frame(i: Tensor, n: int) -> Tensor:
    return i // (n // PARTS)


def image(i: Tensor, n: int) -> Tensor:
    """Three of different sizes."""
    return (i >= n // 2).long() + (i >= n // 2 + n // 8).long()


KINDS = {
    "causal": Kind(lambda i, j, n: i >= j, later, earlier),
    "frames": Kind(lambda i, j, n: frame(i, n) >= frame(j, n), later, earlier),
    "prefix": Kind(lambda i, j, n: (i >= j) | (j < n // 2), later, earlier),
    "window": Kind(lambda i, j, n: (i - j).abs() < WINDOW, later, lambda i, n: i < n // 2 - 2 * WINDOW),
    "back window": Kind(lambda i, j, n: (i >= j) & (i - j < WINDOW), later, earlier),
    "one way": Kind(lambda i, j, n: (i >= n // 2) | (j < n // 2), later, earlier),
    "blocks": Kind(lambda i, j, n: frame(i, n) == frame(j, n), later, earlier, frame),
    "images": Kind(lambda i, j, n: image(i, n) == image(j, n), later, earlier, image),
    "strided": Kind(lambda i, j, n: i % 2 == j % 2, lambda i, n: i % 2 == 1, lambda i, n: i % 2 == 0,
                    lambda i, n: i % 2),
}  # fmt: skip
POSITIONAL = {"table + mask", "table held with the mask"}
"""Ways whose masks tell equal tokens apart by more than what they see."""


# -- how it is made ----------------------------------------------------------------------------------------------------


def added(keep: Tensor, low: float = INF) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, low)


def near(keep: Tensor) -> Tensor:
    """A finite table of relative positions."""
    i = torch.arange(len(keep))
    return -0.05 * (i[:, None] - i).abs()


def same(m: Tensor) -> Tensor:
    return m


Held = tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
HELD: dict[str, Held] = {  # where it is held, what is held of keep [n, n], what forward makes of it
    "bool buffer": ("buffer", same, same),
    "-inf buffer": ("buffer", added, same),
    "-1e9 buffer": ("buffer", lambda k: added(k, -1e9), same),
    "finfo.min buffer": ("buffer", lambda k: added(k, LOW), same),
    "-1e4 buffer": ("buffer", lambda k: added(k, -1e4), same),
    "bool attribute": ("attribute", same, same),
    "-inf attribute": ("attribute", added, same),
    "-inf parameter": ("parameter", added, same),
    "-1e4 parameter": ("parameter", lambda k: added(k, -1e4), same),
    "-inf frozen parameter": ("frozen", added, same),
    "~buffer": ("buffer", torch.logical_not, lambda m: ~m),
    "double negation": ("buffer", same, lambda m: torch.logical_not(~m)),
    "(1 - m) * -1e9": ("buffer", lambda k: k.float(), lambda m: (1.0 - m) * -1e9),
    "(1 - m) * finfo.min of int64": ("buffer", lambda k: k.long(), lambda m: (1 - m).float() * LOW),
    "m * 1e9 - 1e9": ("buffer", lambda k: k.float(), lambda m: m * 1e9 - 1e9),
    "(m - 1) * 1e9 frozen parameter": ("frozen", lambda k: k.float(), lambda m: (m - 1) * 1e9),
    "-1e9 * (m < 1)": ("buffer", lambda k: k.long(), lambda m: -1e9 * (m < 1)),
    "log(m)": ("buffer", lambda k: k.float(), torch.log),
    "where(m, 0, -inf)": ("buffer", same, lambda m: torch.where(m, 0.0, INF)),
    "where(~m, finfo.min, 0)": ("attribute", same, lambda m: torch.where(~m, LOW, 0.0)),
    "zeros.masked_fill(~m, -inf)": ("buffer", same, lambda m: torch.zeros(m.shape).masked_fill(~m, INF)),
    "zeros.masked_fill_(m == 0, -1e9)": ("buffer", lambda k: k.long(),
                                         lambda m: torch.zeros(m.shape).masked_fill_(m == 0, -1e9)),
    "int64 == 1": ("buffer", lambda k: k.long(), lambda m: m == 1),
    "uint8 .bool()": ("buffer", lambda k: k.to(torch.uint8), lambda m: m.bool()),
    "float > 0.5": ("buffer", lambda k: k.float(), lambda m: m > 0.5),
    "larger [:n, :n]": ("buffer", lambda k: F.pad(k, (0, 5, 0, 5), value=True), lambda m: m[:-5, :-5]),
    "larger [:, :, :n, :n]": ("buffer", lambda k: F.pad(added(k), (0, 5, 0, 5))[None, None],
                              lambda m: m[:, :, : m.shape[-1] - 5, : m.shape[-1] - 5]),
    "[1, 1, n, n] expanded": ("buffer", lambda k: k[None, None], lambda m: m.expand(BATCH, HEADS, -1, -1)),
    "[n, n] repeated": ("buffer", added, lambda m: m.repeat(BATCH, HEADS, 1, 1)),
    "per head": ("buffer", lambda k: added(k).repeat(HEADS, 1, 1), same),
    "per sample": ("buffer", lambda k: k.repeat(BATCH, 1, 1, 1), same),
    "half .to(float)": ("buffer", lambda k: added(k).half(), lambda m: m.to(torch.float32)),
    "double .float()": ("buffer", lambda k: added(k, -1e9).double(), lambda m: m.float()),
    "bfloat16 .float()": ("buffer", lambda k: added(k, -1e9).bfloat16(), lambda m: m.float()),
    "nan_to_num": ("buffer", added, lambda m: torch.nan_to_num(m, neginf=-1e9)),
    "transposed": ("buffer", lambda k: k.T.contiguous(), lambda m: m.mT),
    "flipped": ("buffer", lambda k: k.flip(0, 1), lambda m: m.flip(0, 1)),
    "stack of rows": ("buffer", same, lambda m: torch.stack(m.view(4, len(m) // 4, -1).unbind(0)).flatten(0, 1)),
    "cat of halves": ("buffer", added, lambda m: torch.cat([m[: len(m) // 2], m[len(m) // 2 :]])),
    "and of several": ("buffer", same, lambda m: m & (m | m.T) & torch.ones(len(m), 1, dtype=torch.bool)),
    "sum of two": ("buffer", lambda k: added(k, -1e9), lambda m: m.triu(1) + m.tril()),
    "product of two": ("buffer", lambda k: k.float(), lambda m: (1 - m * (m > 0.5)) * -1e9),
    "product of conditions": ("buffer", lambda k: k.long(), lambda m: (m * (m + 0) > 0)),
    "maximum with a floor": ("buffer", added, lambda m: torch.maximum(m, torch.tensor(-1e5))),
    "index of itself": ("buffer", same, lambda m: m[torch.arange(len(m))]),
    "gathered rows": ("buffer", lambda k: added(k).flip(0), lambda m: m.index_select(0, torch.arange(len(m)).flip(0))),
    "table + mask": ("buffer", added, lambda m: m + near(m)),
    "table held with the mask": ("buffer", lambda k: added(k) + near(k), same),
}  # fmt: skip


def rows_and_columns(n: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(n)
    return i[:, None], i[None]


def on_row_writes(n: int) -> Tensor:
    mask, at = torch.zeros(n, n), torch.triu_indices(n, n, 1)
    mask[at[0], at[1]] = INF
    return mask


def cumulated(n: int) -> Tensor:
    return torch.eye(n).cumsum(0) > 0


def quadrants(n: int) -> Tensor:
    h = n // 2
    half, more = torch.ones(h, h).tril(), torch.ones(n - h, n - h).tril()
    top, bottom = torch.cat([half, torch.zeros(h, n - h)], 1), torch.cat([torch.ones(n - h, h), more], 1)
    return torch.cat([top, bottom]).bool()


def by_distance(n: int, seen: Callable[[Tensor], Tensor]) -> Tensor:
    """A line of 2 n - 1 numbers read at i - j: seen(distance)."""
    i, j = rows_and_columns(n)
    line = torch.where(seen(torch.arange(1 - n, n)), 0.0, INF)
    return line[i - j + n - 1]


def written_slices(n: int, fill: Any, put: Any, sizes: tuple[int, ...]) -> Tensor:
    mask, at = torch.full((n, n), fill), 0
    for size in sizes:
        mask[at : at + size, at : at + size] = put
        at += size
    return mask


def scattered_slices(n: int) -> Tensor:
    mask, s = torch.zeros(n, n), n // PARTS
    for at in range(0, n, s):
        rows = torch.zeros(s, n).slice_scatter(torch.ones(s, s), 1, at, at + s)
        mask = mask.slice_scatter(rows, 0, at, at + s)
    return (1 - mask) * -1e9


def one_hot(n: int) -> Tensor:
    return F.one_hot(torch.arange(n) // (n // PARTS), PARTS).float()


def started(n: int) -> Tensor:
    """Ids from where the parts start."""
    return (torch.arange(n) % (n // PARTS) == 0).cumsum(0)


def banded(n: int) -> Tensor:
    return sum((torch.diag(torch.ones(n - abs(d)), d) for d in range(1 - WINDOW, WINDOW)), torch.zeros(n, n)) > 0


def pad_pieces(n: int) -> Tensor:
    s = n // PARTS
    return torch.cat([F.pad(torch.zeros(s, s), (at, n - s - at), value=INF) for at in range(0, n, s)])


def any_part(n: int) -> Tensor:
    seen = torch.zeros(n, n, dtype=torch.bool)
    for p in range(PARTS):
        own = torch.arange(n) // (n // PARTS) == p
        seen = seen | (own[:, None] & own)
    return seen


def between(n: int) -> Tensor:
    i, j = rows_and_columns(n)
    start = i // (n // PARTS) * (n // PARTS)
    return (j >= start) & (j < start + n // PARTS)


def sizes_of(n: int) -> tuple[int, ...]:
    return n // 2, n // 8, n - n // 2 - n // 8


def equal(ids: Tensor) -> Tensor:
    return ids[:, None] == ids


MADE: dict[str, dict[str, Callable[[int], Tensor]]] = {
    "causal": {
        "full(-inf).triu(1)": lambda n: torch.full((n, n), INF).triu(1),
        "generate_square_subsequent_mask": lambda n: nn.Transformer.generate_square_subsequent_mask(n),
        "ones.tril().bool()": lambda n: torch.ones(n, n).tril().bool(),
        "~ones.triu(1)": lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1),
        "ones.tril() filled": lambda n: torch.ones(n, n).tril().masked_fill(torch.ones(n, n).tril() == 0, INF) - 1,
        "arange >= arange": lambda n: torch.ge(*rows_and_columns(n)),
        "not arange < arange": lambda n: torch.lt(*rows_and_columns(n)).logical_not(),
        "difference >= 0": lambda n: torch.arange(n)[:, None] - torch.arange(n) >= 0,
        "meshgrid": lambda n: torch.ge(*torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")),
        "log(tril)": lambda n: torch.ones(n, n).tril().log(),
        "where(arange)": lambda n: torch.where(torch.ge(*rows_and_columns(n)), 0.0, INF),
        "eye.cumsum(0)": cumulated,
        "ones.cumsum <= arange + 1": lambda n: torch.ones(n, n).cumsum(1) <= torch.arange(1, n + 1)[:, None],
        "triu_indices writes": on_row_writes,
        "cat of quadrants": quadrants,
        "clamped difference": lambda n: (torch.arange(n) - torch.arange(n)[:, None]).clamp(0, 1) * -1e9,
        "relu of difference": lambda n: F.relu(torch.arange(n) - torch.arange(n)[:, None]).float() * -1e9,
        "line by distance": lambda n: by_distance(n, lambda d: d >= 0),
        "tril(-1).T": lambda n: torch.ones(n, n).tril(-1).T * LOW,
        "scatter of rows": lambda n: torch.zeros(n, n).scatter(1, torch.arange(n).expand(n, n), 1.0).tril() > 0,
        "linspace": lambda n: torch.linspace(0, 1, n)[:, None] >= torch.linspace(0, 1, n),
    },
    "frames": {
        "ids >= ids": lambda n: torch.ge(*(frame(t, n) for t in rows_and_columns(n))),
        "kron(tril, ones)": lambda n: torch.kron(torch.ones(PARTS, PARTS).tril(), torch.ones(n // PARTS, n // PARTS))
        > 0,
        "tril.repeat_interleave twice": lambda n: torch.ones(PARTS, PARTS).tril().bool()
        .repeat_interleave(n // PARTS, 0).repeat_interleave(n // PARTS, 1),
        "tril spread by expand": lambda n: torch.full((PARTS, PARTS), INF).triu(1)[:, None, :, None]
        .expand(-1, n // PARTS, -1, n // PARTS).reshape(n, n),
    },
    "window": {
        "|i - j| < w": lambda n: torch.sub(*rows_and_columns(n)).abs() < WINDOW,
        "tril & triu": lambda n: torch.ones(n, n).tril(WINDOW - 1).triu(1 - WINDOW).bool(),
        "triu(-inf) + tril(-inf)": lambda n: torch.full((n, n), INF).triu(WINDOW)
        + torch.full((n, n), INF).tril(-WINDOW),
        "minimum of two": lambda n: torch.minimum(torch.full((n, n), LOW).triu(WINDOW),
                                                  torch.full((n, n), LOW).tril(-WINDOW)),
        "sum of diagonals": banded,
        "line by distance": lambda n: by_distance(n, lambda d: d.abs() < WINDOW),
        "clamped distance": lambda n: (torch.sub(*rows_and_columns(n)).abs() + 1 - WINDOW).clamp(min=0) * -1e9,
        "logical_and": lambda n: torch.logical_and(torch.sub(*rows_and_columns(n)) < WINDOW,
                                                   torch.sub(*rows_and_columns(n)) > -WINDOW),
        "max_pool of eye": lambda n: F.max_pool1d(torch.eye(n), 2 * WINDOW - 1, 1, WINDOW - 1) > 0,
    },
    "back window": {
        "ge & lt": lambda n: torch.ge(*rows_and_columns(n)) & (torch.sub(*rows_and_columns(n)) < WINDOW),
        "tril - tril": lambda n: torch.ones(n, n).tril() - torch.ones(n, n).tril(-WINDOW) > 0,
    },
    "blocks": {
        "ids == ids": lambda n: equal(torch.arange(n) // (n // PARTS)),
        "ids by repeat_interleave": lambda n: equal(torch.arange(PARTS).repeat_interleave(n // PARTS)),
        "ids by cumsum": lambda n: equal(started(n)),
        "ids by bucketize": lambda n: equal(torch.bucketize(torch.arange(n), torch.arange(1, PARTS) * (n // PARTS),
                                                            right=True)),
        "ids by expand": lambda n: equal(torch.arange(PARTS)[:, None].expand(-1, n // PARTS).reshape(-1)),
        "ids by cat": lambda n: equal(torch.cat([torch.full((n // PARTS,), p) for p in range(PARTS)])),
        "(ids != ids) * min": lambda n: (~equal(torch.arange(n) // (n // PARTS))).float() * LOW,
        "clamped difference of ids": lambda n: torch.sub(*(frame(t, n) for t in rows_and_columns(n))).abs()
        .clamp(max=1) * -1e9,
        "block_diag": lambda n: torch.block_diag(*[torch.ones(n // PARTS, n // PARTS)] * PARTS).bool(),
        "kron(eye, ones)": lambda n: torch.kron(torch.eye(PARTS), torch.ones(n // PARTS, n // PARTS)) > 0,
        "log(kron)": lambda n: torch.kron(torch.eye(PARTS), torch.ones(n // PARTS, n // PARTS)).log(),
        "eye.repeat_interleave twice": lambda n: torch.eye(PARTS).bool().repeat_interleave(n // PARTS, 0)
        .repeat_interleave(n // PARTS, 1),
        "one_hot outer product": lambda n: one_hot(n) @ one_hot(n).T > 0.5,
        "1 - one_hot outer product": lambda n: (1 - one_hot(n) @ one_hot(n).T) * LOW,
        "einsum of one_hot": lambda n: torch.einsum("ip,jp->ij", one_hot(n), one_hot(n)).bool(),
        "full(min), slices 0": lambda n: written_slices(n, LOW, 0.0, (n // PARTS,) * PARTS),
        "full(-inf), slices 0": lambda n: written_slices(n, INF, 0.0, (n // PARTS,) * PARTS),
        "slice_scatter": scattered_slices,
        "cat of padded pieces": pad_pieces,
        "or of parts": any_part,
        "start <= j < end": between,
        "eye spread by expand": lambda n: torch.eye(PARTS)[:, None, :, None].expand(-1, n // PARTS, -1, n // PARTS)
        .reshape(n, n) > 0,
    },
    "images": {
        "zeros, slices True": lambda n: written_slices(n, False, True, sizes_of(n)),
        "full(min), slices 0": lambda n: written_slices(n, LOW, 0.0, sizes_of(n)),
        "ids by repeat_interleave of sizes": lambda n: equal(
            torch.arange(3).repeat_interleave(torch.tensor(sizes_of(n)), output_size=n)),
        "ids by cat": lambda n: equal(torch.cat([torch.full((s,), p) for p, s in enumerate(sizes_of(n))])),
        "block_diag": lambda n: torch.block_diag(*(torch.ones(s, s) for s in sizes_of(n))).log(),
    },
    "strided": {
        "i % 2 == j % 2": lambda n: torch.eq(*(t % 2 for t in rows_and_columns(n))),
        "eye(2) repeated": lambda n: torch.eye(2).repeat(n // 2, n // 2).bool(),
    },
}  # fmt: skip


class Hold(nn.Module):
    """A tensor as a buffer, an attribute, a parameter or a frozen one; forward() gives use(tensor)."""

    def __init__(self, where: str, value: Tensor, use: Callable[[Tensor], Tensor] = same) -> None:
        super().__init__()
        self.use = use
        if where == "buffer":
            self.register_buffer("held", value)
        elif where == "attribute":
            self.held = value
        else:
            self.held = nn.Parameter(value, requires_grad=where == "parameter")

    def forward(self) -> Tensor:
        return self.use(self.held)


class Make(nn.Module):
    """forward() gives make(n), from numbers."""

    def __init__(self, make: Callable[[int], Tensor], n: int) -> None:
        super().__init__()
        self.make, self.n = make, n

    def forward(self) -> Tensor:
        return self.make(self.n)


def held(keep: Tensor, way: str) -> nn.Module:
    """The mask keep [n, n], held in one way of `HELD`."""
    where, hold, use = HELD[way]
    return Hold(where, hold(keep), use)


def mask_of(kind: str, way: str, n: int) -> nn.Module:
    """The mask of a kind over n tokens, made in one of `ways(kind)`."""
    return Make(MADE[kind][way], n) if way in MADE.get(kind, {}) else held(KINDS[kind].mask(n), way)


def ways(kind: str) -> list[str]:
    return [*MADE.get(kind, {}), *HELD]


# -- how it joins attention --------------------------------------------------------------------------------------------


def as_bool(m: Tensor) -> Tensor:
    return m if m.dtype == torch.bool else m > -1e3


def as_float(m: Tensor) -> Tensor:
    return torch.zeros(m.shape).masked_fill(~m, INF) if m.dtype == torch.bool else m


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def manual(s: Tensor, seen: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp() * seen
    return e / e.sum(-1, keepdim=True)


def renormalised(s: Tensor, seen: Tensor) -> Tensor:
    p = s.softmax(-1) * seen
    return p / p.sum(-1, keepdim=True)


def einsum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhij,bhjd->bhid", (s + as_float(m)).softmax(-1), v)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    b, h, n, d = q.shape
    start = as_float(m).expand(b, h, n, n).reshape(b * h, n, n)
    s = torch.baddbmm(start, q.reshape(b * h, n, d), k.reshape(b * h, n, d).mT, alpha=d**-0.5)
    return torch.bmm(s.softmax(-1), v.reshape(b * h, n, d)).view(b, h, n, d)


def flex(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    seen = as_bool(m).reshape(-1, *m.shape[-2:])[0]
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(seen[i, j], s, INF))


def flex_added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    term = as_float(m).reshape(-1, *m.shape[-2:])[0]
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + term[i, j])


Apply = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
APPLY: dict[str, Apply] = {
    "sdpa": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    "sdpa, float": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=as_float(m)),
    "sdpa, bool": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=as_bool(m)),
    "scores + mask": lambda q, k, v, m: (scores(q, k) + as_float(m)).softmax(-1) @ v,
    "scores - mask": lambda q, k, v, m: (scores(q, k) - (~as_bool(m)).float() * 1e9).softmax(-1) @ v,
    "masked_fill(-inf)": lambda q, k, v, m: scores(q, k).masked_fill(~as_bool(m), INF).softmax(-1) @ v,
    "masked_fill(min)": lambda q, k, v, m: scores(q, k).masked_fill(as_bool(m) == 0, LOW).softmax(-1) @ v,
    "where": lambda q, k, v, m: torch.where(as_bool(m), scores(q, k), -1e9).softmax(-1) @ v,
    "softmax(dtype)": lambda q, k, v, m: (scores(q, k) + as_float(m)).softmax(-1, dtype=torch.float32) @ v,
    "exp, product, sum": lambda q, k, v, m: manual(scores(q, k), as_bool(m)) @ v,
    "product after softmax": lambda q, k, v, m: renormalised(scores(q, k), as_bool(m).to(q.dtype)) @ v,
    "einsum": einsum,
    "baddbmm": baddbmm,
    "flex, where": flex,
    "flex, sum": flex_added,
}
FLEX = ("flex, where", "flex, sum")
"""Slow to run and to trace; they take the mask of the first sample and head."""
MODULES = ("mha", "mha, weights", "mha, float", "encoder layer")
CAUSAL = "is_causal=True"


def for_module(m: Tensor, float_mask: bool) -> Tensor:
    """As torch's modules want it: [N, N] or [B * H, N, N], bool True where not seen."""
    if m.dim() > 2:
        m = m.expand(BATCH, HEADS, *m.shape[-2:]).reshape(-1, *m.shape[-2:])
    return as_float(m) if float_mask else ~as_bool(m)


class Block(nn.Module):
    """Pre-norm block whose attention applies a mask in one way."""

    def __init__(self, apply: str, dim: int) -> None:
        super().__init__()
        self.apply_mask = apply
        if apply == "encoder layer":
            self.layer = nn.TransformerEncoderLayer(dim, HEADS, 2 * dim, 0.0, batch_first=True, norm_first=True)
            return
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        if apply in MODULES:
            self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.apply_mask in MODULES:
            mask = for_module(mask, self.apply_mask == "mha, float")
            return self.attention(x, x, x, attn_mask=mask, need_weights=self.apply_mask == "mha, weights")[0]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.apply_mask == CAUSAL:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = APPLY[self.apply_mask](q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.apply_mask == "encoder layer":
            return self.layer(x, src_mask=for_module(mask, False))
        x = x + self.attend(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Masked(nn.Module):
    """Blocks under one mask: made anew in each block, or once for all. cls: a class token in front."""

    def __init__(self, mask: nn.Module, apply: str, dim: int, depth: int = 2, once: bool = True, cls: bool = False):
        super().__init__()
        self.mask, self.once = mask, once
        self.cls = nn.Parameter(torch.randn(1, 1, dim)) if cls else None
        self.blocks = nn.ModuleList(Block(apply, dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        mask = self.mask()
        for block in self.blocks:
            x = block(x, mask if self.once else self.mask())
        return x if self.cls is None else x[:, 0]


def applies(kind: str) -> list[str]:
    """The ways to apply a mask of that kind."""
    own = [*APPLY, *MODULES]
    return [*own, CAUSAL] if kind == "causal" else own


def masked(mask: nn.Module, apply: str, dim: int, seed: int = 0, **options: Any) -> Masked:
    """`Masked` in eval mode, with weights large enough that every part is felt; the mask is left as it is."""
    torch.manual_seed(seed)
    model = Masked(mask, apply, dim, **options)
    redraw(model.blocks, seed)
    return model.eval()
