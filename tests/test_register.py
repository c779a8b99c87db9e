"""Operators of a user's library: with a rule, or as an attention."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, palette_tokens, run

N, D, H = 40, 32, 2


@torch.library.custom_op("tome_test::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x * weight / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    return y if bias is None else y + bias


@norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tome_test::norm_unknown", mutates_args=())
def norm_unknown(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


@norm_unknown.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tome_test::pool", mutates_args=())
def pool(x: Tensor, weights: Tensor) -> Tensor:
    """[B, N, D] and [B, N]: the weighted sum over the tokens."""
    return torch.einsum("bnd,bn->bd", x, weights)


@pool.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2])


@torch.library.custom_op("tome_test::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, is_causal: bool = False) -> Tensor:
    """On [B, N, H, d]."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, is_causal: bool = False) -> Tensor:
    return torch.empty_like(query)


tome_fx.register_rule(norm, "...nd,d,d->...nd", mix="d")
tome_fx.register_rule(torch.ops.tome_test.pool, "bnd,bn->bd", sum="n")
tome_fx.register_attention(
    attention, "query", "key", "value", layout="bnhd", scale="softmax_scale", causal="is_causal"
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, unknown: bool = False, causal: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.unknown, self.causal, self.heads = unknown, causal, 1 if shared else H
        self.w1, self.w2, self.b = (nn.Parameter(torch.rand(D) + 0.5) for _ in range(3))
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * self.heads * D // H), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))

    def normed(self, x: Tensor, w: Tensor) -> Tensor:
        return norm_unknown(x, w) if self.unknown else norm(x, w, self.b) if w is self.w1 else norm(x, w)

    def forward(self, x: Tensor) -> Tensor:
        y = self.normed(x, self.w1)
        q, (k, v) = self.q(y).unflatten(-1, (H, -1)), self.kv(y).unflatten(-1, (2, self.heads, -1)).unbind(2)
        x = x + self.out(attention(q, k, v, 0.3, self.causal).flatten(2))
        return x + self.mlp(self.normed(x, self.w2))


class Net(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(**kind) for _ in range(3)))
        self.score = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(x)
        return x, torch.ops.tome_test.pool(x, self.score(x)[..., 0].softmax(-1))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_an_operator_with_a_rule_runs_on_merged_tokens(placement: str, shared: bool) -> None:
    model = redraw(Net(shared=shared)).eval()
    report = assert_lossless(model, (palette_tokens(2, N, D, k=3),), 6, sites=3, placement=placement)
    assert not report.unknown_ops
    assert placement == "branch" or [tuple(t) for t in report.tokens] == [(40, 34), (34, 28), (28, 22)]
    assert not any("tome_test" in unmerge.op for unmerge in report.unmerges), report.unmerges


def test_without_a_rule_tokens_are_given_back() -> None:
    report = assert_lossless(redraw(Net(unknown=True)).eval(), (palette_tokens(2, N, D, k=3),), 6, placement="stream")
    assert list(report.unknown_ops) == ["tome_test.norm_unknown"]


@torch.library.custom_op("tome_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


opaque.register_fake(torch.empty_like)


class At(nn.Module):
    """A block with an operator without a rule at one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.at: Any = lambda here, x: opaque(x) if place in here.split() else x
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.at("products", self.qkv(self.at("norm", self.norm(x))))
        q, k, v = y.unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = self.at("attention", v)
        y = self.at("scores", q @ k.mT).softmax(-1) @ v if y is v else y
        x = x + self.out(self.at("products values", y).transpose(1, 2).flatten(2))
        return x + self.mlp(self.at("norm", self.norm(x)))


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize(
    ("place", "placement", "said"),
    [
        ("norm", "auto", "nothing to save"), ("norm", "stream", "tokens are given back before"),
        ("products", "stream", "no rule"), ("products", "auto", "back before"), ("attention", "auto", "no attention"),
        ("scores", "stream", "back before"), ("values", "stream", "back before"), ("", "auto", ""),
    ],
)  # fmt: skip
def test_what_an_operator_without_a_rule_keeps_whole_is_said(place: str, placement: str, said: str) -> None:
    """By its name and its place, and only where it is the cause."""
    model = redraw(nn.Sequential(*(At(place) for _ in range(2)))).eval()
    told = tome_fx.explain(model, (torch.randn(2, N, D),), r=6, placement=placement).summary()
    named = rf"{said}.* tome_test.opaque at [01], which has no rule \(tome_fx.register_rule"
    assert re.search(named, told) if said else "rule" not in told, told


def test_a_causal_one_is_left_alone() -> None:
    with pytest.warns(tome_fx.ToMeWarning, match="causal"):
        _, report = run(redraw(Net(causal=True)).eval(), (torch.randn(2, N, D),), None, 6, placement="stream")
    assert not report.merged_sites


def test_an_equal_of_ones_own() -> None:
    def equal(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, is_causal: bool = False) -> Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * softmax_scale
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)

    try:
        tome_fx.register_attention(torch.ops.tome_test.attention.default, equal=equal)
        assert_lossless(redraw(Net()).eval(), (palette_tokens(2, N, D, k=3),), 6, sites=3, placement="stream")
    finally:
        tome_fx.register_attention(
            attention, "query", "key", "value", layout="bnhd", scale="softmax_scale", causal="is_causal"
        )  # fmt: skip


def test_the_example_of_the_readme() -> None:
    """As it stands there; then its two operators in three blocks."""
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/options.md").read_text(), re.DOTALL)
    (example,) = (code for code in blocks if "register_rule" in code)
    space: dict[str, Any] = {}
    exec(example, space)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(D) + 0.5)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(space["rms_norm"](x, self.weight)).unflatten(-1, (3, H, -1)).unbind(2)
            return x + self.out(space["attention"](q, k, v, 0.3).flatten(2))

    model = redraw(nn.Sequential(*(Own() for _ in range(3)))).eval()
    report = assert_lossless(model, (palette_tokens(2, N, D, k=3),), 6, sites=3, placement="stream")
    assert not report.unknown_ops and [tuple(t) for t in report.tokens] == [(40, 34), (34, 28), (28, 22)]


def test_an_operator_that_is_defined_anew() -> None:
    """A cell of a notebook that runs twice: when the first definition is collected, a graph holds a third object."""

    def defined() -> Any:
        @torch.library.custom_op("tome_test::again", mutates_args=())
        def again(x: Tensor) -> Tensor:
            return x * 2

        again.register_fake(torch.empty_like)
        tome_fx.register_rule(again, "...->...")
        return again

    defined()
    second = defined()
    gc.collect()
    layer = nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True).eval()

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(second(layer(x)))

    report = run(Net(), (torch.randn(2, N, D),), None, 4)[1]
    assert not report.unknown_ops and [tuple(t) for t in report.tokens] == [(40, 36), (36, 32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: tome_fx.register_rule(norm, "...nd,d->...nd", mix="d"), "takes 3 tensors"),
        (lambda: tome_fx.register_rule(norm, "...nd,d,d"), "no '->'"),
        (lambda: tome_fx.register_rule(pool, "bnd,bn->bd"), r"\['n'\] of"),
        (lambda: tome_fx.register_attention(attention), "no argument 'q'"),
        (lambda: tome_fx.register_attention(attention, "query", "key", "value", layout="bnh"), "layout"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


def test_what_is_no_operator_is_named() -> None:
    with pytest.raises(TypeError, match="expected, not"):
        tome_fx.register_rule(torch.relu, "...->...")


@pytest.mark.parametrize(
    ("signature", "options", "message"),
    [("bnd,d->bnd", {"mix": "m"}, "does not have"), ("bnn,n->bnn", {}, "stand twice")],
)
def test_letters_that_say_nothing(signature: str, options: dict[str, str], message: str) -> None:
    """Before, a letter that the signature lacks was taken in silence."""
    with pytest.raises(ValueError, match=message):
        tome_fx.register_rule(norm_unknown, signature, **options)


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("bnd,nd->bnd", "'nd' stands for a tensor of 1 dims"),
        ("bd,d->bd", "'bd' stands for a tensor of 3 dims"),
        ("bdn,d->bdn", "along 'd' its tensors have sizes"),
    ],
)
def test_a_rule_that_does_not_fit_the_tensors(signature: str, message: str) -> None:
    """Told as the caller's, by name: before, it was an internal error to be reported, or taken in silence."""

    @torch.library.custom_op("tome_test::scaled", mutates_args=())
    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    scaled.register_fake(lambda x, weight: torch.empty_like(x))
    tome_fx.register_rule(scaled, signature)
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True).eval()
    fast = torch.compile(
        lambda x: layer(scaled(x, torch.ones(D))), backend=tome_fx.tome_backend(r=4, inner="eager"), fullgraph=True
    )
    with torch.no_grad(), pytest.raises(Exception, match=f"tome_test.scaled.*{message}") as raised:
        fast(torch.randn(2, N, D))
    assert isinstance(raised.value.__cause__ or raised.value.inner_exception, tome_fx.RuleError)  # type: ignore[attr-defined]
