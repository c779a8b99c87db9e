"""The index form: built from pairs, checked, and put in the shape that `gather` wants."""

from __future__ import annotations

import torch
from torch import Tensor


def alternating_form(moved_src: Tensor, partner: Tensor, n: int, prefix: int, suffix: int) -> tuple[Tensor, ...]:
    """assign, keep and moved of N tokens whose even ones are sources. moved_src: `[batch, r]`, ranks of the sources
    that merge. partner: `[batch, sources]`, the rank of the destination of each."""
    (batch, r), device = moved_src.shape, moved_src.device
    places = torch.arange(n, device=device)
    src_pos, dst_pos = (places[prefix : n - suffix][odd::2] for odd in (prefix % 2, 1 - prefix % 2))
    # Merged sources sort behind all others, so the first entries are the survivors in position order.
    survivors = len(src_pos) - r
    ranks = torch.arange(len(src_pos), device=device).expand(batch, -1)
    order = ranks.scatter(1, moved_src, len(src_pos)).sort(-1).values[:, :survivors]
    head, rest = places[:prefix].expand(batch, -1), torch.cat([dst_pos, places[n - suffix :]]).expand(batch, -1)
    keep = torch.cat([head, src_pos[order], rest], 1)
    moved = src_pos[moved_src]
    assign = torch.empty((batch, n), dtype=torch.int64, device=device)
    assign.scatter_(1, keep, places[: n - r].expand(batch, -1))
    assign.scatter_(1, moved, partner.gather(1, moved_src) + (prefix + survivors))
    return assign, keep, moved


def index_form(
    source: Tensor, destination: Tensor, body: Tensor, prefix: int, suffix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """assign, keep and moved of pairs `[batch, r]`. body: the positions that may merge, in their new order."""
    batch, r = source.shape
    n = prefix + len(body) + suffix
    places = torch.arange(n, device=body.device)
    order = torch.cat([places[:prefix], body, places[n - suffix :]]).expand(batch, -1)
    stays = torch.ones((batch, n), dtype=torch.bool, device=body.device).scatter_(1, source, False).gather(1, order)
    slot = stays.cumsum(1) - 1
    # What goes is written behind the end.
    spot = torch.where(stays, slot, n - r)
    keep = order.new_empty((batch, n - r + 1)).scatter_(1, spot, order)[:, : n - r].contiguous()
    assign = order.new_empty((batch, n)).scatter_(1, order, slot)
    return assign.scatter_(1, source, assign.gather(1, destination)), keep, source


def index_for(index: Tensor, like: Tensor) -> Tensor:
    """`[*sample, n]` -> `[*sample, n, *rest]`, the form `gather` wants for `like` `[*sample, N, *rest]`."""
    rest = like.shape[index.dim() :]
    return index.reshape(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)


def column(size: Tensor, like: Tensor) -> Tensor:
    return size.reshape(*size.shape, *(1 for _ in range(like.dim() - size.dim())))


def check_shapes(
    size: Tensor | None, size_out: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor, **rows: Tensor
) -> None:
    """Raise ValueError unless all fit one matching, as the C++ kernels do; for the forms that have no such check.

    rows: by name, x and y `[*sample, N, *rest]` or grad `[*sample, N', *rest]`.
    """
    lead, n, r = assign.shape[:-1], assign.shape[-1], moved.shape[-1]
    after = min(max(keep.shape[-1], n - r), n)
    must_begin("moved", moved, (*lead, r), moved.dim())
    must_begin("keep", keep, (*lead, after), keep.dim())
    for name, x, length in (("size", size, n), ("size_out", size_out, after)):
        if x is not None:
            must_begin(name, x, (*lead, length), x.dim())
    for name, x in rows.items():
        must_begin(name, x, (*lead, after if name == "grad" else n), assign.dim())


def must_begin(name: str, x: Tensor, shape: tuple[int, ...], dims: int) -> None:
    if x.shape[:dims] != shape:
        raise ValueError(f"{name} must be {list(shape)} to fit the sample axes and tokens of the others, "
                         f"and is {list(x.shape)}")  # fmt: skip
