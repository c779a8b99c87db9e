"""Attention with one term for each key (the log sizes of merged tokens), in forms that suit a GPU's kernels.

A float mask rules FlashAttention out on CUDA. Every form computes the same as `scaled_dot_product_attention` with the
mask; which is fastest depends on dtype, head dim and tokens, and `ROWS` says which to take. The rows come from
`attention_forms.json`, written by `benchmarks/attention_forms.py` on a GPU; as long as its "measured" is null nothing
was measured and every site keeps the mask. To choose yourself, put a row in front before compiling:

    from tome_fx import attention
    attention.ROWS.insert(0, attention.Row("column", dtypes=("bfloat16",), tokens=(1024, None)))

or read another table: `attention.ROWS[:] = attention.read("my_table.json")`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from tome_fx import ops

MASK = "mask"
"""The form that leaves a site as it is."""
TABLE = Path(__file__).with_name("attention_forms.json")


def column(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, grouped: bool) -> Tensor:
    """The term as one more feature: 1 in the query, bias / scale in the key. No mask is left: FlashAttention can run.

    In half precision the next feature holds what rounding the first one left over: the term is more exact than a mask
    in half precision would be. All features are filled up with zeros to a multiple of 8.
    """
    term = (bias.float() / scale).transpose(-1, -2)
    terms = [term.to(key.dtype)]
    if key.dtype != torch.float32:
        terms.append((term - terms[0].float()).to(key.dtype))
    one, width = query.new_ones((*query.shape[:-1], len(terms))), value.shape[-1]
    key = torch.cat([key, *(t.expand(*key.shape[:-1], 1) for t in terms)], -1)
    query = torch.cat([query, one], -1)
    wide = max(key.shape[-1], width)
    wide += -wide % 8
    query, key, value = (pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)[..., :width]


def _masked(first: SDPBackend) -> Callable[..., Tensor]:
    others = [b for b in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) if b is not first]
    order = [first, *others, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def form(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, grouped: bool) -> Tensor:
        keys = bias.shape[-1]
        # The kernels ask for rows that begin at multiples of 16 elements; expanded, there is one row for a sample.
        mask = pad(bias.to(query.dtype), (0, -keys % 16))[..., :keys].expand(*query.shape[:-1], keys)
        with sdpa_kernel(order, set_priority=True):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)

    form.__doc__ = f"The mask broadcast without being written, and {first.name} asked first."
    return form


def flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, grouped: bool) -> Tensor:
    """flex_attention's kernel, with the term looked up for each score."""
    # The public function would start Dynamo, and this runs while AOTAutograd traces.
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import _apply_kernel_options, _create_empty_block_mask

    table = bias.float()[:, 0, 0].expand(query.shape[0], -1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        return score + table[b, k]

    blocks = _create_empty_block_mask(query, key).as_tuple()
    options: Any = _apply_kernel_options(query, key, value, False, None)
    return flex_attention(query, key, value, score_mod, blocks, scale, options, (table,))[0]


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], Tensor]] = {
    "column": column,
    "efficient": _masked(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _masked(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
}
"""name -> form: query `[B, h, l, d]`, key `[B, k, s, d]`, value `[B, k, s, e]` (k = h unless grouped), bias finite and
without gradient `[B or 1, 1, 1, s]`, scale above 0 -> `[B, h, l, e]`."""

LARGEST_HEAD = 256
"""Head dim up to which FlashAttention runs, what `column` adds included."""


@dataclass(frozen=True)
class Row:
    """One line of the table; what it does not name fits. Ranges include both ends, None is no end."""

    form: str
    dtypes: tuple[str, ...] = ()
    head_dim: tuple[int, int | None] = (1, None)
    tokens: tuple[int, int | None] = (1, None)

    def __post_init__(self) -> None:
        if self.form not in (MASK, *FORMS):
            raise ValueError(f"no form of attention is called {self.form!r}: {', '.join((MASK, *FORMS))}")

    def fits(self, dtype: torch.dtype, head_dim: int, tokens: int) -> bool:
        """Whether the row is about such an attention."""
        ranges = ((self.head_dim, head_dim), (self.tokens, tokens))
        named = not self.dtypes or str(dtype).removeprefix("torch.") in self.dtypes
        return named and all(low <= n and (high is None or n <= high) for (low, high), n in ranges)


def read(path: str | Path) -> list[Row]:
    """The rows of a table, JSON {"measured": null or what by, "rows": [the fields of `Row`]}. Raises ValueError for an
    unknown form, TypeError for an unknown field."""

    def row(**fields: Any) -> Row:
        found: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        return Row(**found)

    return [row(**fields) for fields in json.loads(Path(path).read_text())["rows"]]


ROWS: list[Row] = read(TABLE)
"""The first that fits decides; none: the mask."""


def choose(dtype: torch.dtype, head_dim: int, tokens: int) -> str:
    """The form for keys of a dtype and head dim, with so many tokens."""
    found = next((row.form for row in ROWS if row.fits(dtype, head_dim, tokens)), MASK)
    wide = found == "column" and head_dim + 2 > LARGEST_HEAD
    return MASK if wide else found


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, grouped: bool, form: str) -> Tensor:
    """`tome::attend`: one of `FORMS` by name."""
    return FORMS[form](query, key, value, bias, scale, grouped)


ops.spelled_out(
    "attend(Tensor query, Tensor key, Tensor value, Tensor bias, float scale, bool grouped, str form) -> Tensor", attend
)
