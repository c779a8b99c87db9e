"""fused: torch's fused inference ops as the ops that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm, linear, scaled_dot_product_attention

from ..rules.base import op_key
from .flex import flex_attention

aten = torch.ops.aten


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * e] -> [B, H, N, e]."""
    batch, n, dim = x.shape
    return x.reshape(batch, n, heads, dim // heads).transpose(1, 2)


def _fused_mask(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """The fused ops' mask as SDPA takes it (True is kept). Types: 0 [N, N], 1 [B, N] keys, 2 [B, H, N, N].

    The fused kernels read a mask of any dtype as bool, True (non-zero) is left out: so do we.
    """
    if mask is None:
        return None
    return torch.logical_not((mask[:, None, None, :] if mask_type == 1 else mask).to(torch.bool))


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`aten::_native_multi_head_attention`, spelled out."""
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    parts = zip((query, key, value), weights, biases, strict=True)
    q, k, v = (_heads(linear(x, w, b), num_head) for x, w, b in parts)
    allowed = _fused_mask(mask, mask_type)
    shown = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) * (embed_dim // num_head) ** -0.5
        if allowed is not None:
            scores = scores + torch.where(allowed, 0.0, float("-inf"))
        shown = scores.softmax(-1)
        out = shown @ v
        shown = shown.mean(1) if average_attn_weights else shown
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return linear(out.transpose(1, 2).reshape(query.shape), proj_weight, proj_bias), shown


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    ffn1_weight: Tensor,
    ffn1_bias: Tensor,
    ffn2_weight: Tensor,
    ffn2_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`aten::_transformer_encoder_layer_fwd`, spelled out; [B, N, D] in and out."""

    def norm1(x: Tensor) -> Tensor:
        return layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    def attend(x: Tensor) -> Tensor:
        out, _ = _multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )
        return out

    def feed_forward(x: Tensor) -> Tensor:
        hidden = linear(x, ffn1_weight, ffn1_bias)
        hidden = torch.nn.functional.gelu(hidden) if use_gelu else torch.relu(hidden)
        return linear(hidden, ffn2_weight, ffn2_bias)

    if norm_first:
        x = src + attend(norm1(src))
        return x + feed_forward(norm2(x))
    x = norm1(src + attend(src))
    return norm2(x + feed_forward(x))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In eval nothing, as `composites` has it, but without a call of an op to be taken apart."""
    return dropout(input, p, training, inplace) if training else input


_EXPANSIONS: dict[Any, Callable[..., Any]] = {
    torch._native_multi_head_attention: _multi_head_attention,
    op_key(aten._native_multi_head_attention.default): _multi_head_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    op_key(aten._transformer_encoder_layer_fwd.default): _encoder_layer,
    torch.ops.higher_order.flex_attention: flex_attention,
    dropout: _dropout,
    torch._C._autograd._get_data_attr: Tensor.detach,  # type: ignore[attr-defined]
}


def expand(target: Any, by: Callable[..., Any]) -> None:
    """Have `by` captured in the place of an operator."""
    _EXPANSIONS[op_key(target)] = by


def expansion(target: Any) -> Callable[..., Any] | None:
    return _EXPANSIONS.get(op_key(target))


__all__ = ["expand", "expansion"]
