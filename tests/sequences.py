"""Many spellings of how a sequence is put together and read: special tokens, frames, windows, streams, heads.

All functions are pure; tests and `benchmarks/fuzz.py` draw from the dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings import scores

# -- special tokens: (e [B, n, D], s [B, k, D]) -> [B, n + k, D] -------------------------------------------------------


def written(e: Tensor, s: Tensor, at: int) -> Tensor:
    k = s.shape[1]
    y = e.new_zeros(e.shape[0], e.shape[1] + k, e.shape[2])
    y[:, :at], y[:, at : at + k], y[:, at + k :] = e[:, :at], s, e[:, at:]
    return y


def put(e: Tensor, s: Tensor, at: int) -> Tensor:
    """By index_put, out of place and in place."""
    k, n = s.shape[1], e.shape[1]
    rest = torch.arange(n) + k * (torch.arange(n) >= at)
    y = e.new_zeros(e.shape[0], n + k, e.shape[2])
    y = torch.index_put(y, (torch.arange(len(e))[:, None], rest[None]), e)
    y[:, torch.arange(at, at + k)] = s
    return y


def copied(e: Tensor, s: Tensor, at: int) -> Tensor:
    k, n = s.shape[1], e.shape[1]
    y = e.new_zeros(e.shape[0], n + k, e.shape[2])
    y = y.index_copy(1, torch.arange(n) + k * (torch.arange(n) >= at), e)
    return y.index_copy(1, torch.arange(at, at + k), s)


def scattered(e: Tensor, s: Tensor, at: int, add: bool) -> Tensor:
    """By index_add and scatter_add, or by masked_scatter."""
    k, n = s.shape[1], e.shape[1]
    places, own = torch.arange(n) + k * (torch.arange(n) >= at), torch.arange(at, at + k)
    y = e.new_zeros(e.shape[0], n + k, e.shape[2])
    if add:
        y = y.index_add(1, places, e)
        return y.scatter_add(1, own[None, :, None].expand(len(e), -1, e.shape[2]), s.expand(len(e), -1, -1))
    free = ((torch.arange(n + k) < at) | (torch.arange(n + k) >= at + k))[None, :, None].expand_as(y)
    return y.masked_scatter(free, e).masked_scatter(~free, s.expand(len(e), -1, -1).contiguous())


def sliced_in(e: Tensor, s: Tensor, at: int) -> Tensor:
    """By slice_scatter."""
    k = s.shape[1]
    y = F.pad(e[:, at:], (0, 0, at + k, 0))
    y = y.slice_scatter(e[:, :at], 1, 0, at)
    return y.slice_scatter(s, 1, at, at + k)


def padded_sum(e: Tensor, s: Tensor, at: int) -> Tensor:
    k, n = s.shape[1], e.shape[1]
    before, after = F.pad(e[:, :at], (0, 0, 0, n + k - at)), F.pad(e[:, at:], (0, 0, at + k, 0))
    return before + F.pad(s, (0, 0, at, n - at)) + after


def reordered(e: Tensor, s: Tensor, at: int) -> Tensor:
    """All in front, then brought into order."""
    k, n = s.shape[1], e.shape[1]
    order = torch.cat([torch.arange(k, k + at), torch.arange(k), torch.arange(k + at, k + n)])
    return torch.cat([s, e], 1)[:, order]


def split(e: Tensor, s: Tensor, at: int) -> Tensor:
    before, after = e.split([at, e.shape[1] - at], 1)
    return torch.cat([before, s, after], 1)


def tokens_first(e: Tensor, s: Tensor, at: int) -> Tensor:
    e, s = e.transpose(0, 1), s.transpose(0, 1)
    return torch.cat([e[:at], s, e[at:]]).transpose(0, 1)


def stacked(e: Tensor, s: Tensor, at: int) -> Tensor:
    rows = list(e.unbind(1))
    return torch.stack([*rows[:at], *s.unbind(1), *rows[at:]], 1)


def chosen(e: Tensor, s: Tensor, at: int) -> Tensor:
    """where(special, ..., tokens)"""
    k, n = s.shape[1], e.shape[1]
    places = torch.arange(n + k)
    own = ((places >= at) & (places < at + k))[:, None]
    tokens = torch.cat([e[:, :at], e.new_zeros(e.shape[0], k, e.shape[2]), e[:, at:]], 1)
    return torch.where(own, F.pad(s, (0, 0, at, n - at)), tokens)


Insert = Callable[[Tensor, Tensor, int], Tensor]
INSERT: dict[str, Insert] = {
    "cat of slices": lambda e, s, at: torch.cat([t for t in (e[:, :at], s, e[:, at:]) if t.shape[1]], 1),
    "split, cat": split,
    "narrow, hstack": lambda e, s, at: torch.hstack((e.narrow(1, 0, at), s, e.narrow(1, at, e.shape[1] - at))),
    "cat on [n, B, D]": tokens_first,
    "slices written": written,
    "index_put": put,
    "index_copy": copied,
    "index_add, scatter_add": lambda e, s, at: scattered(e, s, at, True),
    "masked_scatter": lambda e, s, at: scattered(e, s, at, False),
    "slice_scatter": sliced_in,
    "sum of padded": padded_sum,
    "reordered": reordered,
    "stack of rows": stacked,
    "where": chosen,
}  # fmt: skip

# -- frames: (x [B, F, P, D], s [1, 1, k, D]) -> [B, F * (k + P), D] ---------------------------------------------------


def frames_written(x: Tensor, s: Tensor) -> Tensor:
    k = s.shape[2]
    y = x.new_empty(*x.shape[:2], k + x.shape[2], x.shape[3])
    y[:, :, :k] = s
    y[:, :, k:] = x
    return y.flatten(1, 2)


def frames_put(x: Tensor, s: Tensor) -> Tensor:
    b, f, p, d = x.shape
    k = s.shape[2]
    place = torch.arange(f * (k + p)).view(f, k + p)  # by a mask the graph would break
    y = x.new_zeros(b, f * (k + p), d)
    y[:, place[:, k:].flatten()] = x.flatten(1, 2)
    y[:, place[:, :k].flatten()] = s[0].repeat(1, f, 1)
    return y


def frames_where(x: Tensor, s: Tensor) -> Tensor:
    k, p = s.shape[2], x.shape[2]
    own = (torch.arange(k + p) < k)[:, None]
    return torch.where(own, F.pad(s, (0, 0, 0, p)), F.pad(x, (0, 0, k, 0))).reshape(len(x), -1, x.shape[-1])


FRAMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat, reshape": lambda x, s: torch.cat([s.expand(*x.shape[:2], -1, -1), x], 2).reshape(len(x), -1, x.shape[-1]),
    "cat of [B * F, P, D]": lambda x, s: torch.cat(
        [s[0].expand(len(x) * x.shape[1], -1, -1), x.flatten(0, 1)], 1).view(len(x), -1, x.shape[-1]),
    "cat frame by frame": lambda x, s: torch.cat(
        [torch.cat([s[0].expand(len(x), -1, -1), t], 1) for t in x.unbind(1)], 1),
    "stack of frames": lambda x, s: torch.stack(
        [torch.cat([s[0].expand(len(x), -1, -1), x[:, i]], 1) for i in range(x.shape[1])], 1).flatten(1, 2),
    "slices written": frames_written,
    "index_put": frames_put,
    "where": frames_where,
}  # fmt: skip
READ_FRAMES: dict[str, Callable[[Tensor, int], Tensor]] = {  # (y [B, F * p, D], F) -> first token of each, [B, F, D]
    "view, [:, :, 0]": lambda y, f: y.view(len(y), f, -1, y.shape[-1])[:, :, 0],
    "unflatten, select": lambda y, f: y.unflatten(1, (f, -1)).select(2, 0),
    "[:, ::p]": lambda y, f: y[:, :: y.shape[1] // f],
    "[B * F, p, D][:, 0]": lambda y, f: y.reshape(len(y) * f, -1, y.shape[-1])[:, 0].view(len(y), f, -1),
    "index_select": lambda y, f: y.index_select(1, torch.arange(f) * (y.shape[1] // f)),
    "chunk, stack": lambda y, f: torch.stack([t[:, 0] for t in y.chunk(f, 1)], 1),
    "unbind": lambda y, f: y.view(len(y), f, -1, y.shape[-1]).unbind(2)[0],
}

# -- windows of a grid whose sides are no multiple: [B, h, w, D] -> the same with zeros below and on the right ---------


def pad_written(x: Tensor, h: int, w: int) -> Tensor:
    y = x.new_zeros(len(x), h, w, x.shape[-1])
    y[:, : x.shape[1], : x.shape[2]] = x
    return y


def pad_cat(x: Tensor, h: int, w: int) -> Tensor:
    x = torch.cat([x, x.new_zeros(len(x), h - x.shape[1], *x.shape[2:])], 1)
    return torch.cat([x, torch.zeros(*x.shape[:2], w - x.shape[2], x.shape[3], dtype=x.dtype)], 2)


def pad_scatter(x: Tensor, h: int, w: int) -> Tensor:
    rows = torch.zeros(len(x), x.shape[1], w, x.shape[-1], dtype=x.dtype).slice_scatter(x, 2, 0, x.shape[2])
    return torch.zeros(len(x), h, w, x.shape[-1], dtype=x.dtype).slice_scatter(rows, 1, 0, x.shape[1])


PAD_GRID: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "F.pad": lambda x, h, w: F.pad(x, (0, 0, 0, w - x.shape[2], 0, h - x.shape[1])),
    "F.pad on [B, D, h, w]": lambda x, h, w: F.pad(
        x.permute(0, 3, 1, 2), (0, w - x.shape[2], 0, h - x.shape[1])).permute(0, 2, 3, 1),
    "one side after the other": lambda x, h, w: F.pad(
        F.pad(x, (0, 0, 0, w - x.shape[2])), (0, 0, 0, 0, 0, h - x.shape[1])),
    "slices written": pad_written,
    "cat of zeros": pad_cat,
    "slice_scatter": pad_scatter,
}  # fmt: skip

# -- two streams in one attention: (a, b) [.., n, ..] along a dim, and back --------------------------------------------


def join_written(a: Tensor, b: Tensor, dim: int) -> Tensor:
    shape = list(a.shape)
    shape[dim] += b.shape[dim]
    y, lead, n = a.new_empty(shape), (slice(None),) * dim, a.shape[dim]
    y[(*lead, slice(0, n))] = a
    y[(*lead, slice(n, None))] = b
    return y


JOIN: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "cat": lambda a, b, dim: torch.cat([a, b], dim),
    "written": join_written,
    "transposed cat": lambda a, b, dim: torch.cat([a.transpose(0, dim), b.transpose(0, dim)]).transpose(0, dim),
}
CUT: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {  # along dim 1, after n
    "slices": lambda y, n: (y[:, :n], y[:, n:]),
    "split": lambda y, n: y.split([n, y.shape[1] - n], 1),
    "narrow": lambda y, n: (y.narrow(1, 0, n), y.narrow(1, n, y.shape[1] - n)),
    "tensor_split": lambda y, n: y.tensor_split([n], 1),
    "from the end": lambda y, n: (y[:, : n - y.shape[1]], y[:, n - y.shape[1] :]),
}

# -- heads that share keys and values: q [B, H, n, c], k and v [B, G, n, c], a term of the scores or None --------------


def term(s: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [B, H, n, n] under a mask that broadcasts to them."""
    if mask is None:
        return s
    return s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask


def shared_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    p = term(torch.einsum("bhid,bjd->bhij", q * q.shape[-1] ** -0.5, k[:, 0]), mask).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", p, v[:, 0])


def five_dims(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    mask = mask if mask is None or mask.dim() < 4 else mask[:, None]
    return (term(scores(q, k[:, :, None]), mask).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    mask = mask if mask is None or mask.dim() < 4 else mask[:, None]
    p = term(torch.einsum("bghid,bgjd->bghij", q * q.shape[-1] ** -0.5, k), mask).softmax(-1)
    return torch.einsum("bghij,bgjd->bghid", p, v).flatten(1, 2)


def open_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return term(scores(q, k), mask).softmax(-1) @ v


def spread_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def expanded_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


Core = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
CORES: dict[str, tuple[int, Core]] = {  # groups of keys among 4 heads, and the attention
    "sdpa": (4, lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)),
    "scores": (4, open_scores),
    "multi-query, broadcast": (1, open_scores),
    "multi-query, einsum": (1, shared_einsum),
    "multi-query, expand": (1, expanded_sdpa),
    "grouped, five dims": (2, five_dims),
    "grouped, einsum": (2, grouped_einsum),
    "grouped, repeat_interleave": (2, spread_sdpa),
    "grouped, expand": (2, expanded_sdpa),
    "grouped, enable_gqa": (2, lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True)),
}

# -- masks of keys [B, n] -> broadcast to [B, H, n, n] -----------------------------------------------------------------

LOW = torch.finfo(torch.float32).min
PADDING: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda k: k[:, None, None],
    "-inf by masked_fill": lambda k: torch.zeros(k.shape).masked_fill(~k, -torch.inf)[:, None, None],
    "-inf by where": lambda k: torch.where(k, 0.0, -torch.inf)[:, None, None],
    "expanded": lambda k: k[:, None, None].expand(-1, -1, k.shape[1], -1),
    "and over pairs": lambda k: k[:, None, None] & torch.ones(k.shape[1], 1, dtype=torch.bool),
    "log": lambda k: k.float().log()[:, None, None],
    "(1 - m) * min": lambda k: (1.0 - k[:, None, None].float()) * LOW,
    "(m - 1) * 1e4": lambda k: (k[:, None, None].float() - 1) * 1e4,
}
EXACT_WHEN_EMPTY = ("bool", "-inf by masked_fill", "-inf by where", "expanded", "and over pairs", "log")
"""Under SDPA a query that sees no key gives zero for these; the finite ones give a mean of all values."""


def padding(form: str, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of keys that PADDING makes of keep [B, N], for scores of a dtype; SDPA takes no other."""
    mask = PADDING[form](keep)
    return mask.to(dtype) if mask.is_floating_point() and mask.dtype is not dtype else mask


# -- relative keys: (q [B, H, n, c], table [n, n, c] by pair, line [2 n - 1, c] by distance) -> [B, H, n, n] -----------


def shifted(q: Tensor, line: Tensor) -> Tensor:
    """q against all distances, then the rows shifted into place by a pad and a view (Transformer-XL)."""
    b, h, n, _ = q.shape
    s = F.pad(q @ line.flip(0).T, (0, 1)).flatten(2)
    return F.pad(s, (0, n - 1)).view(b, h, n + 1, 2 * n - 1)[:, :, :n, n - 1 :]


def gathered(q: Tensor, line: Tensor) -> Tensor:
    n = q.shape[2]
    i = torch.arange(n)
    return (q @ line.T).gather(-1, (i[:, None] - i + n - 1).expand(*q.shape[:3], n))


Relative = Callable[[Tensor, Tensor, Tensor], Tensor]
RELATIVE: dict[str, Relative] = {
    "einsum": lambda q, table, line: torch.einsum("bhld,lrd->bhlr", q, table),
    "matmul by query": lambda q, table, line: (q.permute(2, 0, 1, 3).flatten(1, 2) @ table.mT)
    .unflatten(1, q.shape[:2]).permute(1, 2, 0, 3),
    "rows": lambda q, table, line: (q[..., None, :] @ table.mT)[..., 0, :],
    "product and sum": lambda q, table, line: (q[..., None, :] * table).sum(-1),
    "shifted": lambda q, table, line: shifted(q, line),
    "gather": lambda q, table, line: gathered(q, line),
}  # fmt: skip
