"""Small random transformers in every spelling tome_fx promises to handle.

One frozen `Spec` names a model; `build(spec)` returns it (eval mode, seeded) with example inputs. A test parametrises
or draws specs; nothing here imports tome_fx. `expected_tokens(spec, r)` says what ToMe does to the token count.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# attention spellings. "encoder*" replace the whole block (or stack) by torch's own modules.
ATTENTION = ("sdpa", "matmul", "bmm", "baddbmm", "einsum", "einsum_bnhd", "kt", "mha", "mha_weights",
             "encoder_layer", "encoder")  # fmt: skip
TORCH_ATTENTION = ("mha", "mha_weights", "encoder_layer", "encoder")
TORCH_BLOCKS = ("encoder_layer", "encoder")
KIND = ("softmax", "linear", "relu", "sigmoid")
SCALE = ("scores", "q", "k", "both", "divide")
SOFTMAX = ("plain", "upcast", "manual")
QKV = ("fused", "chunk", "split", "separate", "heads_first")
MLP = ("gelu", "swiglu", "relu_", "none")
LAYOUT = ("bnd", "nbd", "rows")
STEM = ("conv", "linear", "tokens")
PREFIX = ("none", "cls", "cls_dist", "cls_reg", "late")
POS = ("none", "learned", "patches", "inplace", "sincos")
MASK = ("none", "bool", "float", "min")
EXTRA = ("none", "front", "behind", "sink")
READOUT = ("cls", "dist", "mean", "mean_all", "sum", "masked_mean", "max", "attn_pool", "cls_mean", "tokens", "patches",
           "grid", "hidden", "multi", "cumsum", "flatten", "var")  # fmt: skip
CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION, "kind": KIND, "scale": SCALE, "softmax": SOFTMAX, "qkv": QKV, "mlp": MLP, "layout": LAYOUT,
    "stem": STEM, "prefix": PREFIX, "pos": POS, "mask": MASK, "extra": EXTRA, "readout": READOUT,
    "norm": ("pre", "post"),
}  # fmt: skip
PREFIX_LEN = {"none": 0, "cls": 1, "cls_dist": 2, "cls_reg": 5, "late": 1}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One small transformer. Illegal combinations raise ValueError."""

    attention: str = "sdpa"
    kind: str = "softmax"
    """Attention of every block but the first, which is softmax: the first merge then exists whatever the kind."""
    scale: str = "scores"
    softmax: str = "plain"
    """"manual" is exp(x - max) / sum, in every block but the first."""
    qkv: str = "fused"
    norm: str = "pre"
    rms: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    drop: float = 0.0
    drop_path: float = 0.0
    mlp: str = "gelu"
    parallel: bool = False
    layout: str = "bnd"
    stem: str = "conv"
    prefix: str = "cls"
    pos: str = "none"
    readout: str = "cls"
    mask: str = "none"
    extra: str = "none"
    """Three learned keys before or behind those of the tokens, or a sink: a column of scores that no key made."""
    talking: bool = False
    """CaiT: heads mixed by a linear map with bias, before and after the softmax."""
    cross: bool = False
    """A second sequence attends to the tokens; its result is an output of its own."""
    slice_write: bool = False
    """Every block but the first writes in place through a slice of the tokens."""
    skip: bool = False
    """The tokens from before the first block are added after the last."""
    shared: bool = False
    """One block module, called `depth` times."""
    dead: bool = False
    """Computes things that nobody reads."""
    dim: int = 32
    heads: int = 2
    depth: int = 3
    grid: tuple[int, int] = (6, 6)
    patch: int = 4
    batch: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for problem, bad in {
            "unknown value": any(getattr(self, name) not in allowed for name, allowed in CHOICES.items()),
            "torch's own modules have one spelling inside": self.attention in TORCH_ATTENTION
            and (self.talking or self.kind != "softmax" or self.softmax != "plain" or self.qk_norm),
            "torch's own modules know [B, N, D] and [N, B, D]": self.attention in TORCH_ATTENTION
            and self.layout == "rows",
            "torch's own blocks fix norm, MLP and residuals": self.attention in TORCH_BLOCKS
            and (
                self.rms or self.layer_scale or self.parallel or self.drop_path > 0 or self.mlp not in ("gelu", "relu_")
            ),
            "nn.TransformerEncoder is one call": self.attention == "encoder"
            and (self.prefix == "late" or self.shared or self.slice_write or self.readout in ("hidden", "multi")),
            "SDPA has its own softmax": self.attention == "sdpa"
            and self.kind == "softmax"
            and (self.talking or self.softmax != "plain"),
            "talking heads need the head axis": self.talking
            and (self.attention in ("bmm", "baddbmm") or self.kind != "softmax"),
            "a per-key bias mixed over the heads is none any more": self.mask != "none" and self.talking,
            "torch's own modules have no such keys": self.extra != "none" and self.attention in TORCH_ATTENTION,
            "extra keys are for softmax": self.extra != "none" and self.kind != "softmax",
            "a mask of keys and learned ones has to be cut": self.extra in ("front", "behind") and self.mask != "none",
            "a sink needs an open softmax": self.extra == "sink" and self.attention == "sdpa",
            "key masks are for softmax": self.mask != "none" and self.kind != "softmax",
            "no class token to read": self.readout in ("cls", "cls_mean") and self.prefix == "none",
            "no distillation token to read": self.readout == "dist" and self.prefix != "cls_dist",
            "masked mean needs a mask": self.readout == "masked_mean" and self.mask in ("none", "float"),
            "slice write and late prefix want [B, N, D]": self.layout != "bnd"
            and (self.slice_write or self.prefix == "late"),
            "parallel blocks are pre-norm with an MLP": self.parallel and (self.norm != "pre" or self.mlp == "none"),
            "hidden states of different lengths": self.prefix == "late" and self.readout == "multi",
            "skip over a late prefix": self.prefix == "late" and self.skip,
            "dim divides by heads": self.dim % self.heads != 0,
        }.items():
            if bad:
                raise ValueError(f"{problem}: {self}")

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def prefix_len(self) -> int:
        """Leading tokens that are no patches, at the read-out."""
        return PREFIX_LEN[self.prefix]

    def replace(self, **changes: Any) -> Spec:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        """Only what differs from the default: the test id."""
        default = {f.name: f.default for f in dataclasses.fields(self)}
        named = {k: v for k, v in dataclasses.asdict(self).items() if v != default[k]}
        return ",".join(f"{k}={v}" for k, v in named.items()).replace(" ", "") or "default"


class RMSNorm(nn.Module):
    """Handwritten: x * rsqrt(mean(x^2)) * weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drops whole samples of a residual branch in training. `batch_dim` 1 for [N, B, D]."""

    def __init__(self, p: float, batch_dim: int) -> None:
        super().__init__()
        self.p, self.batch_dim = p, batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        shape = [1] * x.ndim
        shape[self.batch_dim] = x.shape[self.batch_dim]
        return x * x.new_empty(shape).bernoulli_(1 - self.p).div_(1 - self.p)


class Mlp(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, hidden = spec.mlp, 2 * spec.dim
        self.fc1 = nn.Linear(spec.dim, hidden * 2 if spec.mlp == "swiglu" else hidden)
        self.fc2 = nn.Linear(hidden, spec.dim)
        self.drop = nn.Dropout(spec.drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.kind == "relu_":
            x = F.relu_(x)
        else:
            x = F.gelu(x)
        return self.drop(self.fc2(self.drop(x)))


class Attention(nn.Module):
    """Self attention, or cross attention when `context` is given, in one spelling.

    x: [B, N, D], [N, B, D] or rows [B*N, D] by `spec.layout`; bias: what `Model.bias` made of the key mask.
    """

    def __init__(self, spec: Spec, first: bool = True) -> None:
        super().__init__()
        self.spec, self.kind = spec, "softmax" if first else spec.kind
        self.softmax_kind = "plain" if first and spec.softmax == "manual" else spec.softmax
        self.heads, self.head_dim = spec.heads, spec.dim // spec.heads
        if spec.qkv == "separate":
            self.q, self.k, self.v = (nn.Linear(spec.dim, spec.dim) for _ in range(3))
        else:
            self.qkv = nn.Linear(spec.dim, 3 * spec.dim)
        if spec.qk_norm:
            make = RMSNorm if spec.rms else nn.LayerNorm
            self.q_norm, self.k_norm = make(self.head_dim), make(self.head_dim)
        if spec.talking:
            self.mix_before, self.mix_after = nn.Linear(self.heads, self.heads), nn.Linear(self.heads, self.heads)
        if spec.extra == "sink":
            self.sink = nn.Parameter(torch.randn(self.heads, 1, 1))
        elif spec.extra != "none":
            self.learned = nn.Parameter(torch.randn(2, 1, self.heads, 3, self.head_dim))
        self.drop = nn.Dropout(spec.drop)
        self.proj = nn.Linear(spec.dim, spec.dim)

    def project(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, H, N, d]."""
        spec, h, d = self.spec, self.heads, self.head_dim
        nbd = spec.layout == "nbd"
        if spec.qkv == "separate":
            parts = [self.q(x), self.k(x), self.v(x)]
        else:
            qkv = self.qkv(x)
            if spec.layout == "rows":
                qkv = qkv.view(batch, x.shape[0] // batch, 3 * spec.dim)
            if spec.qkv == "fused":
                qkv = qkv.reshape(qkv.shape[0], qkv.shape[1], 3, h, d)
                q, k, v = qkv.permute(2, 1, 3, 0, 4) if nbd else qkv.permute(2, 0, 3, 1, 4)
                return q, k, v
            if spec.qkv == "heads_first":  # [.., H, 3, d], as in GPT-NeoX
                q, k, v = qkv.view(qkv.shape[0], qkv.shape[1], h, 3, d).unbind(dim=3)
                order = (1, 2, 0, 3) if nbd else (0, 2, 1, 3)
                return q.permute(order), k.permute(order), v.permute(order)
            parts = list(qkv.chunk(3, dim=-1) if spec.qkv == "chunk" else qkv.split(spec.dim, dim=-1))
        if nbd:
            q, k, v = (t.view(t.shape[0], t.shape[1], h, d).permute(1, 2, 0, 3) for t in parts)
        else:
            q, k, v = (t.reshape(batch, -1, h, d).transpose(1, 2) for t in parts)
        return q, k, v

    def softmax(self, scores: Tensor) -> Tensor:
        if self.softmax_kind == "upcast":
            return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        if self.softmax_kind == "manual":
            scores = (scores - scores.amax(dim=-1, keepdim=True)).exp()
            return scores / scores.sum(dim=-1, keepdim=True)
        return scores.softmax(dim=-1)

    def weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Scores (scaled) to attention weights; [B, H, N, M] or [B*H, N, M]."""
        if bias is not None:
            if scores.ndim == 3:
                bias = bias.expand(-1, self.heads, -1, -1).reshape(scores.shape[0], 1, -1)
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if self.spec.talking:
            scores = self.mix_before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.spec.extra == "sink":
            sink = self.sink if scores.ndim == 4 else self.sink.repeat(scores.shape[0] // self.heads, 1, 1)
            scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = self.softmax(scores)
        if self.spec.extra == "sink":
            weights = weights[..., :-1]
        if self.spec.talking:
            weights = self.mix_after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.drop(weights)

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:  # noqa: C901
        """[B, H, N, d] from the same."""
        spec, d = self.spec, self.head_dim
        b, h, n, m = q.shape[0], self.heads, q.shape[2], k.shape[2]
        if spec.attention == "sdpa" and not spec.talking and spec.softmax == "plain":
            return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=spec.drop if self.training else 0.0)
        scale = d**-0.5
        if spec.attention == "baddbmm":
            q, k, v = q.reshape(b * h, n, d), k.reshape(b * h, m, d), v.reshape(b * h, m, d)
            if bias is not None and bias.dtype != torch.bool:
                start, beta, bias = bias.expand(b, h, n, m).reshape(b * h, n, m), 1, None
            else:
                start, beta = torch.empty(b * h, n, m, dtype=q.dtype, device=q.device), 0
            weights = self.weights(torch.baddbmm(start, q, k.transpose(-1, -2), beta=beta, alpha=scale), bias)
            return torch.bmm(weights, v).view(b, h, n, d)
        if spec.scale in ("q", "both"):
            q = q * (scale if spec.scale == "q" else scale**0.5)
        if spec.scale in ("k", "both"):
            k = k * (scale if spec.scale == "k" else scale**0.5)
        if spec.attention == "bmm":
            q, k, v = q.reshape(b * h, n, d), k.reshape(b * h, m, d), v.reshape(b * h, m, d)
            scores = torch.bmm(q, k.transpose(1, 2))
        elif spec.attention == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        elif spec.attention == "einsum_bnhd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            scores = torch.einsum("bihd,bjhd->bhij", q, k)
        elif spec.attention == "kt":
            scores = torch.matmul(q, k.permute(0, 1, 3, 2).contiguous())
        else:
            scores = q @ k.transpose(-2, -1)
        if spec.scale == "scores":
            scores = scores * scale
        elif spec.scale == "divide":
            scores = scores / math.sqrt(d)
        weights = self.weights(scores, bias)
        if spec.attention == "bmm":
            return torch.bmm(weights, v).view(b, h, n, d)
        if spec.attention == "einsum":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if spec.attention == "einsum_bnhd":
            return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)
        return weights @ v

    def other_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "linear":  # Katharopoulos: phi(q) (phi(k)^T v) / phi(q) sum phi(k)
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(dim=-2).unsqueeze(-1))
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        weights = F.relu(scores) if self.kind == "relu" else torch.sigmoid(scores)
        return (weights / k.shape[-2]) @ v

    def forward(self, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        q, k, v = self.project(x, batch)
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.extra in ("front", "behind"):
            own = self.learned.expand(-1, batch, -1, -1, -1)
            order = 1 if self.spec.extra == "front" else -1
            k, v = (torch.cat([m, t][::order], dim=2) for m, t in zip(own, (k, v), strict=True))
        out = self.softmax_attention(q, k, v, bias) if self.kind == "softmax" else self.other_attention(q, k, v)
        if self.spec.layout == "nbd":
            out = out.permute(2, 0, 1, 3).flatten(2)
        elif self.spec.layout == "rows":
            out = out.transpose(1, 2).reshape(x.shape)
        else:
            out = out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.drop(self.proj(out))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention; `need_weights` takes its matmul path."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.weights = spec.attention == "mha_weights"
        self.attn = nn.MultiheadAttention(spec.dim, spec.heads, dropout=spec.drop, batch_first=spec.layout == "bnd")

    def forward(self, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        return self.attn(x, x, x, key_padding_mask=padding(bias), need_weights=self.weights)[0]


def padding(bias: Tensor | None) -> Tensor | None:
    """torch's modules want [B, N], True where padded, or an additive float."""
    if bias is None:
        return None
    bias = bias[:, 0, 0]
    return ~bias if bias.dtype == torch.bool else bias


class Block(nn.Module):
    def __init__(self, spec: Spec, first: bool) -> None:
        super().__init__()
        self.spec = spec
        norm = RMSNorm if spec.rms else nn.LayerNorm
        self.norm1 = norm(spec.dim)
        self.attn = TorchAttention(spec) if spec.attention in TORCH_ATTENTION else Attention(spec, first)
        self.ls1 = LayerScale(spec.dim) if spec.layer_scale else nn.Identity()
        self.drop_path = DropPath(spec.drop_path, 1 if spec.layout == "nbd" else 0)
        if spec.mlp != "none":
            self.norm2, self.mlp = norm(spec.dim), Mlp(spec)
            self.ls2 = LayerScale(spec.dim) if spec.layer_scale else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        if self.spec.norm == "post":
            x = self.norm1(x + self.drop_path(self.ls1(self.attn(x, bias, batch))))
            return x if self.spec.mlp == "none" else self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
        if self.spec.parallel:
            branches = self.ls1(self.attn(self.norm1(x), bias, batch)) + self.ls2(self.mlp(self.norm2(x)))
            return x + self.drop_path(branches)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), bias, batch)))
        return x if self.spec.mlp == "none" else x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Latent(nn.Module):
    """queries [B, M, D] or a learned one read the tokens [B, N, D]."""

    def __init__(self, spec: Spec, learned: bool) -> None:
        super().__init__()
        self.heads = spec.heads
        if learned:
            self.latent = nn.Parameter(torch.randn(1, 1, spec.dim))
        self.q, self.kv, self.proj = (nn.Linear(spec.dim, m * spec.dim) for m in (1, 2, 1))

    def forward(self, x: Tensor, bias: Tensor | None, y: Tensor | None = None) -> Tensor:
        queries = self.latent.expand(x.shape[0], -1, -1) if y is None else y
        b, m, d = queries.shape
        n = x.shape[1]
        q = self.q(queries).reshape(b, m, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(b, m, d)
        return queries + self.proj(out)


class Model(nn.Module):
    """forward(x, mask=None, y=None): image [B, 3, H, W], patches [B, N, 3*p*p] or tokens [B, N, D] to the read-out."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, p = spec, spec.prefix_len
        cell = 3 * spec.patch**2
        if spec.stem == "conv":
            self.patch_embed: nn.Module = nn.Conv2d(3, spec.dim, spec.patch, spec.patch)
        else:
            self.patch_embed = nn.Linear(cell, spec.dim) if spec.stem == "linear" else nn.Identity()
        if p:
            self.cls_token = nn.Parameter(torch.randn(1, 1, spec.dim))
        if spec.prefix == "cls_dist":
            self.dist_token = nn.Parameter(torch.randn(1, 1, spec.dim))
        if spec.prefix == "cls_reg":
            self.reg_token = nn.Parameter(torch.randn(1, 4, spec.dim))
        self.early = 0 if spec.prefix == "late" else p
        length = spec.patches + (0 if spec.pos == "patches" else self.early)
        if spec.pos == "sincos":
            angle = torch.arange(length)[:, None] / 100 ** (torch.arange(spec.dim // 2)[None] / spec.dim)
            self.register_buffer("pos_embed", torch.cat([angle.sin(), angle.cos()], dim=1)[None])
        elif spec.pos != "none":
            self.pos_embed = nn.Parameter(torch.randn(1, length, spec.dim) * 0.02)
        self.pos_drop = nn.Dropout(spec.drop)
        made = 1 if spec.shared else spec.depth
        if spec.attention in TORCH_BLOCKS:
            layer = nn.TransformerEncoderLayer(
                spec.dim,
                spec.heads,
                2 * spec.dim,
                dropout=spec.drop,
                activation="relu" if spec.mlp == "relu_" else "gelu",
                batch_first=spec.layout == "bnd",
                norm_first=spec.norm == "pre",
            )
            stack = nn.TransformerEncoder(layer, made, enable_nested_tensor=False)
            self.blocks: nn.Module = stack if spec.attention == "encoder" else stack.layers
        else:
            self.blocks = nn.ModuleList(Block(spec, first=i == 0) for i in range(made))
        self.norm = (RMSNorm if spec.rms else nn.LayerNorm)(spec.dim)
        if spec.readout == "attn_pool":
            self.attn_pool = Latent(spec, learned=True)
        if spec.cross:
            self.cross = Latent(spec, learned=False)
        self.head = nn.Linear(spec.dim, 10)

    def bias(self, x: Tensor, mask: Tensor | None, extra: int) -> Tensor | None:
        """Key mask as the attention wants it, [B, 1, 1, extra + N]; the prefix is always visible."""
        if mask is None:
            return None
        if extra:
            ones = torch.ones if mask.dtype == torch.bool else torch.zeros
            mask = torch.cat([ones(mask.shape[0], extra, dtype=mask.dtype, device=mask.device), mask], dim=1)
        mask = mask[:, None, None, :]
        return (1.0 - mask.to(x.dtype)) * torch.finfo(x.dtype).min if self.spec.mask == "min" else mask

    def embed(self, x: Tensor) -> Tensor:
        spec = self.spec
        x = self.patch_embed(x)
        if spec.stem == "conv":
            x = x.flatten(2).transpose(1, 2)
        if spec.pos == "patches":
            x = x + self.pos_embed
        prefix = [getattr(self, f"{name}_token") for name in ("cls", "dist", "reg") if hasattr(self, f"{name}_token")]
        if prefix and spec.prefix != "late":
            x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in prefix), x], dim=1)
        if spec.pos == "inplace":
            x += self.pos_embed
        elif spec.pos in ("learned", "sincos"):
            x = x + self.pos_embed
        return self.pos_drop(x)

    def encode(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Tokens [B, N, D] after the last block, those after each block, the key bias."""
        spec, batch = self.spec, x.shape[0]
        x = self.embed(x)
        bias = self.bias(x, mask, self.early)
        before, hidden = x, []
        if spec.layout == "rows":
            x = x.reshape(-1, spec.dim)
        elif spec.layout == "nbd":
            x = x.transpose(0, 1)
        for i in range(spec.depth):
            if spec.prefix == "late" and i == 1:
                x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
                bias = self.bias(x, mask, 1)
            if spec.attention == "encoder":
                x = self.blocks(x, src_key_padding_mask=padding(bias))
                break
            block = self.blocks[0 if spec.shared else i]  # type: ignore[index]
            if spec.attention == "encoder_layer":
                x = block(x, src_key_padding_mask=padding(bias))
            else:
                x = block(x, bias, batch)
            if spec.slice_write and i > 0:
                x = x.clone()
                x[:, max(1, spec.prefix_len) :] *= 0.75
            if spec.dead:
                _ = (x.flip(0).softmax(-1) * 2).sum()
            hidden.append(x)
        if spec.layout == "rows":
            x = x.view(batch, x.shape[0] // batch, spec.dim)
        elif spec.layout == "nbd":
            x = x.transpose(0, 1)
        return (x + before if spec.skip else x), hidden, bias

    def forward(self, x: Tensor, mask: Tensor | None = None, y: Tensor | None = None) -> Any:
        spec, p = self.spec, self.spec.prefix_len
        x, hidden, bias = self.encode(x, mask)
        x = self.norm(x)
        out = self.read(x, hidden, mask, bias, p)
        return {"out": out, "cross": self.cross(x, bias, y)} if spec.cross else out

    def read(self, x: Tensor, hidden: list[Tensor], mask: Tensor | None, bias: Tensor | None, p: int) -> Any:  # noqa: C901
        match self.spec.readout:
            case "cls":
                return self.head(x[:, 0])
            case "dist":
                return (self.head(x[:, 0]) + self.head(x[:, 1])) / 2
            case "mean":
                return self.head(x[:, p:].mean(dim=1))
            case "mean_all":
                return self.head(x.mean(dim=1))
            case "sum":
                return self.head(x[:, p:].sum(dim=1) / x.shape[1])
            case "masked_mean":
                assert mask is not None
                keep = mask.to(x.dtype).unsqueeze(-1)
                return self.head((x[:, p:] * keep).sum(dim=1) / keep.sum(dim=1))
            case "max":
                return self.head(x[:, p:].amax(dim=1))
            case "attn_pool":
                return self.head(self.attn_pool(x, bias)[:, 0])
            case "cls_mean":
                return self.head(x[:, 0]), torch.cat([x[:, 0], x[:, p:].mean(dim=1)], dim=-1)
            case "tokens":
                return x
            case "patches":
                return self.head(x[:, p:])
            case "grid":
                return x[:, p:].transpose(1, 2).reshape(x.shape[0], -1, *self.spec.grid)
            case "hidden":
                return [*hidden, x]
            case "multi":
                return {"tokens": x, "pooled": self.head(x.mean(dim=1)), "hidden": tuple(hidden), "first": x[:, :1]}
            case "cumsum":
                return x.cumsum(dim=1)
            case "flatten":
                return x[:, p:].flatten(1)
            case "var":
                return x[:, p:].var(dim=1)
        raise ValueError(self.spec.readout)


def redraw(model: nn.Module, seed: int = 0, gain: float = 1.3) -> nn.Module:
    """Random weights large enough that every part of the model is felt at the output; in place.

    Library initialisations (std 0.02, zero heads, norms of exactly 1) hide errors. Matrices: normal, std
    gain/sqrt(fan_in); vectors: moved by a normal of std 0.2 around what they were.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if not param.is_floating_point():
                continue
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2 and param.shape[0] > 1:
                param.copy_(noise * gain / math.sqrt(param[0].numel()))
            elif param.ndim >= 3:  # class tokens, latents, [1, N, D] tables
                param.copy_(noise * 0.5)
            else:
                param.add_(noise * 0.2)
    return model


def inputs(spec: Spec, seed: int = 0) -> tuple[Tensor | None, ...]:
    """Random example inputs; trailing ones that the spec does not use are left off."""
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "conv": (spec.batch, 3, spec.grid[0] * spec.patch, spec.grid[1] * spec.patch),
        "linear": (spec.batch, spec.patches, 3 * spec.patch**2),
        "tokens": (spec.batch, spec.patches, spec.dim),
    }[spec.stem]
    return complete(spec, torch.randn(shape, generator=generator), generator)


def complete(spec: Spec, x: Tensor, generator: torch.Generator) -> tuple[Tensor | None, ...]:
    """(x,), (x, mask) or (x, mask, y) with the mask and second sequence that the spec wants."""
    mask, y = None, None
    if spec.mask != "none":
        mask = torch.rand(spec.batch, spec.patches, generator=generator) < 0.75
        mask[:, : spec.grid[1]] = True
        if spec.mask == "float":
            mask = torch.randn(spec.batch, spec.patches, generator=generator)
    if spec.cross:
        y = torch.randn(spec.batch, 5, spec.dim, generator=generator)
    full = (x, mask, y)
    return full if y is not None else full[:2] if mask is not None else full[:1]


def build(spec: Spec) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model in eval mode with seeded, well-sized weights, and random inputs for it."""
    torch.manual_seed(spec.seed)
    model = redraw(Model(spec), spec.seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LayerScale):
                module.gamma.fill_(1e-5)
    return model.eval(), inputs(spec, spec.seed)


def effective(tokens: int, protected: int, r: int) -> int:
    """DESIGN section 3: r_eff = min(r, (N - protected) // 2)."""
    return max(0, min(r, (tokens - protected) // 2))


SHORT_AXIS = 32


def expected_tokens(spec: Spec, r: int | list[int]) -> list[tuple[int, int]]:
    """(before, after) of each merge when every softmax attention of the spec is a site."""
    softmax = [i == 0 or spec.kind == "softmax" for i in range(spec.depth)]
    plan = [r] * sum(softmax) if isinstance(r, int) else list(r)
    tokens, out = spec.patches + (0 if spec.prefix == "late" else spec.prefix_len), []
    for i in range(spec.depth):
        late = spec.prefix == "late"
        tokens += int(late and i == 1)
        protected = int(i >= 1) if late else spec.prefix_len
        if softmax[i]:
            merged = effective(tokens, protected, plan[len(out)])
            if spec.patches < SHORT_AXIS:  # half of a short axis stays
                merged = min(merged, max(tokens - protected - spec.patches // 2, 0))
            out.append((tokens, tokens - merged))
            tokens -= merged
    return [(before, after) for before, after in out if after < before]
