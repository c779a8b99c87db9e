"""find_blocks: where a site merges, in spellings that strangers use, and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, compiled, distance
from tests.strategies import thinned

N, D, H = 64, 32, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm; attend(q, k, v) on [B, heads, N, c], keys with H heads or one; add(x, y) is the residual add."""

    def __init__(self, attend: Attend, add: Any = torch.add, heads: int = H) -> None:
        super().__init__()
        self.attend, self.add, c = attend, add, D // H
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, heads * c), nn.Linear(D, heads * c)
        self.out, self.mlp = nn.Linear(D, D), nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, D // H)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = self.add(x, self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        return self.add(x, self.mlp(self.norm2(x)))


def net(attend: Attend = F.scaled_dot_product_attention, add: Any = torch.add, heads: int = H) -> nn.Module:
    return redraw(nn.Sequential(*(Block(attend, add, heads) for _ in range(2)))).eval()


def tokens() -> Tensor:
    """[2, N, D]: each token one of three copies."""
    base, pick = torch.randn(2, 3, D), torch.randint(3, (2, N))
    return torch.stack([b[p] for b, p in zip(base, pick, strict=True)])


def in_parts(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, 9:] += y[:, 9:]
    x[:, :9] += y[:, :9]
    return x


BOTH = nn.Parameter(torch.eye(D).repeat(1, 2))
ADDS: dict[str, Any] = {
    "to(device)": lambda x, y: y + x.to(y.device), "to(like)": lambda x, y: x.to(y) + y,
    "float": lambda x, y: x.float() + y, "clone": lambda x, y: y + x.clone(), "twice": lambda x, y: 2.0 * x + y,
    "contiguous": lambda x, y: x.contiguous() + y, "eval dropout": lambda x, y: F.dropout(x, 0.5, False) + y,
    "stack": lambda x, y: torch.stack([x, y]).sum(0), "stack last": lambda x, y: torch.stack([y, x], -1).sum(-1),
    "cat": lambda x, y: torch.cat([x[None], y[None]]).sum(0), "list": lambda x, y: sum([x, y]),
    "running": lambda x, y: torch.stack([x, y]).cumsum(0)[1],
    "running inside": lambda x, y: torch.stack([y, x], 2).cumsum(2)[:, :, -1],
    "mean": lambda x, y: torch.stack([x, y]).mean(0) * 2, "minus": lambda x, y: x - (-y),
    "from": lambda x, y: torch.rsub(-y, x), "alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "addcmul": lambda x, y: torch.addcmul(x, y, torch.full((D,), 0.3)), "in place": lambda x, y: x.clone().add_(y),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, torch.full((D,), 3.0)), "halved": lambda x, y: (x + y) / 2**0.5,
    "einsum": lambda x, y: torch.einsum("s,sbnd->bnd", torch.ones(2), torch.stack([x, y])),
    "matmul": lambda x, y: torch.stack([x, y], -1) @ torch.tensor([1.0, 0.5]),
    "parts": lambda x, y: torch.cat([x[:, :9] + y[:, :9], x[:, 9:] + y[:, 9:]], 1), "parts written": in_parts,
    "subtracted": lambda x, y: x - y * -1.0, "weights": lambda x, y: F.linear(x, torch.eye(D)) + y,
    "channels first": lambda x, y: (x.mT + y.mT).mT,
    "rows": lambda x, y: (x.flatten(0, 1) + y.flatten(0, 1)).view_as(x),
    "index_add": lambda x, y: x.index_add(1, torch.arange(N), y),
    "tensordot": lambda x, y: torch.tensordot(torch.tensor([1.0, 0.5]), torch.stack([x, y]), 1),
    "cat, weights": lambda x, y: F.linear(torch.cat([x, y], -1), BOTH),
    "stack, weights": lambda x, y: torch.stack([x, y], 2).flatten(2) @ BOTH.mT,
    "difference": lambda x, y: x + 0.7 * (y - x), "gated": lambda x, y: torch.lerp(x, y, x.sigmoid()),
    "gated by both": lambda x, y: (lambda z: (1 - z) * x + z * y.tanh())((x + y).sigmoid()),
    "scaled apart": lambda x, y: torch.cat([x[:, :1] * 0.5, x[:, 1:] * 2], 1) + y,
    "added apart": lambda x, y: torch.cat([x[:, :1] + y[:, :1] * 0.5, x[:, 1:] + y[:, 1:]], 1),
}  # fmt: skip


APART = ("weights", "cat, weights", "stack, weights")
"""Of these the MLP has no stream of its own to merge in."""


@pytest.mark.parametrize(("name", "placement"), thinned(product(ADDS, ("stream", "branch")), 3))
def test_residual_adds_through_ops_that_keep_each_entry(name: str, placement: str) -> None:
    """The stream stays the stream: it merged inside a branch where a copy of it was added."""
    report = assert_lossless(net(add=ADDS[name]), (tokens(),), 6, sites=2, placement=placement)
    assert {site.placement for site in report.sites} == {placement}, report
    plain = assert_lossless(net(), (tokens(),), 6, sites=2, placement=placement)
    assert [site.tokens for site in report.sites] == [site.tokens for site in plain.sites]
    assert [site.mlp for site in report.sites] == [site.mlp for site in plain.sites] or name in APART


class Hyper(nn.Module):
    """Hyper-connections: several copies of the stream, mixed by weights; a block reads a mixture and adds to all."""

    def __init__(self, copies: int = 3) -> None:
        super().__init__()
        self.block = Block(F.scaled_dot_product_attention)
        self.read, self.write = nn.Linear(copies, 1), nn.Linear(1, copies)
        self.mix = nn.Parameter(torch.randn(copies, copies))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.norm1(torch.einsum("s,bsnd->bnd", self.read.weight[0], x))
        q, k, v = (f(y).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.block.q, self.block.k, self.block.v))
        y = self.block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = torch.einsum("st,bsnd->btnd", self.mix, x) + self.write.weight[:, :, None] * y[:, None]
        return x + self.block.mlp(self.block.norm2(x.mean(1)))[:, None]


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Hyper(), Hyper())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None].expand(-1, 3, -1, -1)).sum(1)


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_streams_that_weights_mix(placement: str) -> None:
    report = assert_lossless(redraw(Copies()).eval(), (tokens(),), 6, sites=2, placement=placement)
    length = 58 if placement == "stream" else N
    assert report.tokens == [(N, 58), (length, length - 6)]


SEEN = torch.arange(N) < torch.tensor([[N], [40]])
TERM = torch.linspace(-1, 1, D // H)
PADDED: dict[str, Attend] = {
    # masks of keys that are no operand of the softmax, and terms that the model computes beside one
    "over their sum": lambda q, k, v: (lambda p: p / p.sum(-1, keepdim=True) @ v)(
        (q @ k.mT).softmax(-1) * SEEN[:, None, None]
    ),
    "over their sum and more": lambda q, k, v: (lambda p: p / (p.sum(-1, keepdim=True) + 1e-20) @ v)(
        (q @ k.mT).softmax(-1) * SEEN[:, None, None]
    ),
    "exp by hand": lambda q, k, v: (lambda e: e @ v / e.sum(-1, keepdim=True))((q @ k.mT).exp() * SEEN[:, None, None]),
    "logsumexp": lambda q, k, v: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ v)(
        (q @ k.mT).masked_fill(~SEEN[:, None, None], -1e9)
    ),
    "filled twice": lambda q, k, v: torch.where(
        SEEN[:, None, None], torch.where(SEEN[:, None, None], q @ k.mT, 0.0), -1e30
    ).softmax(-1) @ v,
    "with itself": lambda q, k, v: (q @ k.mT).masked_fill(
        ~(SEEN[:, None, None] & SEEN[:, None, :, None]), torch.finfo(torch.float32).min
    ).softmax(-1) @ v,
    "with itself, numbers": lambda q, k, v: (q @ k.mT).masked_fill(
        ~(SEEN.long()[:, None, None] * SEEN.long()[:, None, :, None]).bool(), -1e9
    ).softmax(-1) @ v,
    "with itself, outer product": lambda q, k, v: (q @ k.mT).masked_fill(
        torch.bmm(SEEN.float()[:, :, None], SEEN.float()[:, None])[:, None] == 0, -1e9
    ).softmax(-1) @ v,
    "with itself, einsum": lambda q, k, v: (q @ k.mT).masked_fill(
        ~torch.einsum("bi,bj->bij", SEEN.float(), SEEN.float()).bool()[:, None], -1e9
    ).softmax(-1) @ v,
    "with itself, the smaller": lambda q, k, v: (q @ k.mT).masked_fill(
        ~torch.minimum(SEEN.long()[:, None, None], SEEN.long()[:, None, :, None]).bool(), -1e9
    ).softmax(-1) @ v,
    "exp2": lambda q, k, v: (lambda e: e / e.sum(-1, keepdim=True) @ v)(
        torch.exp2(torch.where(SEEN[:, None, None], q @ k.mT * 1.44, -1e9))
    ),
    "pow, zeroed": lambda q, k, v: (lambda e: e @ v / e.sum(-1, keepdim=True))(
        torch.pow(2, (q @ k.mT - 1) * 0.5) * SEEN[:, None, None]
    ),
    "none of either": lambda q, k, v: (q @ k.mT).masked_fill(
        (~SEEN)[:, None, None] | (~SEEN)[:, None, :, None], -1e9
    ).softmax(-1) @ v,
    "beside a term of the keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(k @ TERM)[:, :, None] + torch.zeros(2, N).masked_fill(~SEEN, -torch.inf)[:, None, None]
    ),
    "a factor of each head after folded ones": lambda q, k, v: (
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(2, H, N, N) * torch.linspace(0.5, 1, H)[:, None, None]
    ).masked_fill(~SEEN[:, None, None], -torch.inf).softmax(-1) @ v,
    "in a term of the keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(k @ TERM)[:, :, None].masked_fill(~SEEN[:, None, None], -torch.inf)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "placement"), thinned(product(PADDED, ("stream", "branch")), 3))
def test_padding_in_other_words(name: str, placement: str) -> None:
    """A mask of keys, and none of pairs: as many merge as without one, and no padded token moves a valid one."""
    model, x = net(PADDED[name]), tokens()
    assert_lossless(model, (x,), 6, sites=2, placement=placement)
    other = torch.where(SEEN[..., None], x, torch.randn(2, N, D))
    fast = compiled(model, 6, placement=placement)
    with torch.no_grad():
        torch.testing.assert_close(fast(x)[SEEN], fast(other)[SEEN])


TRANSPOSED: dict[str, Attend] = {
    # scores of keys by queries
    "softmax": lambda q, k, v: (k @ q.mT).softmax(-2).mT @ v,
    "values first": lambda q, k, v: (v.mT @ (k @ q.mT * 0.3).softmax(2)).mT,
    "turned": lambda q, k, v: (k @ q.mT).mT.softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bmnh,bhmd->bhnd", torch.einsum("bhmd,bhnd->bmnh", k, q).softmax(1), v
    ),
    "sigmoid": lambda q, k, v: torch.sigmoid(k @ q.mT).mT @ v,
    "distances": lambda q, k, v: (-torch.cdist(k, q)).softmax(-2).mT @ v,
    "distances, by hand": lambda q, k, v: (2 * q @ k.mT - k.square().sum(-1)[..., None, :]).softmax(-1) @ v,
    "by hand": lambda q, k, v: (lambda e: (e / (e.sum(-2, keepdim=True) + 1e-6)).mT @ v)((k @ q.mT).exp()),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_scores_compare_keys(name: str) -> None:
    x, plain, model = torch.randn(2, N, D), net(), net(TRANSPOSED[name])
    model.load_state_dict(plain.state_dict())
    first, other = (tome_fx.trace_tokens(m, (x,), r=[6, 0], placement="stream").groups for m in (plain, model))
    assert torch.equal(first, other)


def each(attend: Attend, q: Tensor, k: Tensor, v: Tensor, at_once: int = 1) -> list[Tensor]:
    return [attend(*parts) for parts in zip(*(x.split(at_once, 1) for x in (q, k, v)), strict=True)]


def heads_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for i in range(H):
        out[:, i] = F.scaled_dot_product_attention(q[:, i], k[:, i], v[:, i])
    return out


HEADS: dict[str, Attend] = {
    # heads that are attentions of their own
    "chunks": lambda *x: torch.cat(each(F.scaled_dot_product_attention, *x), 1),
    "two by two": lambda *x: torch.cat(each(F.scaled_dot_product_attention, *x, at_once=2), 1),
    "three and one": lambda *x: torch.cat(each(F.scaled_dot_product_attention, *x, at_once=3), 1),
    "in other words": lambda *x: torch.cat(each(lambda q, k, v: (q @ k.mT / (D // H) ** 0.5).softmax(-1) @ v, *x), 1),
    "left open": lambda *x: torch.cat(
        each(lambda q, k, v: (lambda p: p @ v + p.amax(-1, keepdim=True))((q @ k.mT * 0.3).softmax(-1)), *x), 1
    ),
    "selected": lambda q, k, v: torch.stack(
        [F.scaled_dot_product_attention(q[:, i], k[:, i], v[:, i]) for i in range(H)], 1
    ),
    "written": heads_written,
    "half of them padded": lambda q, k, v: torch.cat(
        [F.scaled_dot_product_attention(q[:, :2], k[:, :2], v[:, :2], SEEN[:, None, None]),
         F.scaled_dot_product_attention(q[:, 2:], k[:, 2:], v[:, 2:])], 1
    ),
    "chunks of queries": lambda q, k, v: torch.cat(
        [F.scaled_dot_product_attention(x, k, v, torch.ones(N, dtype=torch.bool)[None]) for x in q.split(24, 2)], 2
    ),
    "chunks of queries, in other words": lambda q, k, v: torch.cat(
        [(x @ k.mT / (D // H) ** 0.5).softmax(-1) @ v for x in q.split(24, 2)], 2
    ),
    "sample by sample": lambda *x: torch.cat(
        [F.scaled_dot_product_attention(*parts) for parts in zip(*(y.split(1) for y in x), strict=True)]
    ),
    "sigmoids": lambda *x: torch.cat(each(lambda q, k, v: torch.sigmoid(q @ k.mT * 0.3 - 3) @ v, *x), 1),
}  # fmt: skip


@pytest.mark.parametrize(("name", "placement"), thinned(product(HEADS, ("stream", "branch")), 3))
def test_heads_that_are_attentions_of_their_own(name: str, placement: str) -> None:
    """They merge once, as one, compared by the mean over all of them."""
    torch.manual_seed(0)
    x, plain, model = torch.randn(2, N, D), net(), net(HEADS[name])
    model.load_state_dict(plain.state_dict())
    first, other = (tome_fx.trace_tokens(m, (x,), r=[6, 0], placement=placement).groups[0] for m in (plain, model))
    assert torch.equal(first, other) or name == "half of them padded"  # padded tokens merge with their like
    reports = [tome_fx.explain(m, (x,), r=6, placement=placement) for m in (plain, model)]
    assert [[(s.tokens, s.mlp, s.placement) for s in report.sites] for report in reports][1:] == [
        [(s.tokens, s.mlp, s.placement) for s in reports[0].sites]
    ], reports[1]
    assert tome_fx.check(model, (x,), r=6, placement=placement).holds


def setting(x: Tensor, at: Any, value: Tensor) -> Tensor:
    x = x.clone()
    x[:, at] = value
    return x


def one_by_one(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1], x[:, 2], x[:, 3] = p.unbind(1)
    return x


PROMPTS: dict[str, Any] = {
    # tokens 1 to 3 of x, which has merged, are prompts p [1, 3, D] from here on
    "cat": lambda x, p: torch.cat([x[:, :1], p.expand(2, -1, -1), x[:, 4:]], 1),
    "written": lambda x, p: setting(x, slice(1, 4), p),
    "one by one": one_by_one,
    "index_put": lambda x, p: setting(x, [1, 2, 3], p),
    "index_copy": lambda x, p: x.index_copy(1, torch.arange(1, 4), p.expand(2, -1, -1)),
    "slice_scatter": lambda x, p: x.slice_scatter(p.expand(2, -1, -1), 1, 1, 4),
    "an index": lambda x, p: torch.cat([x[:, [0]], p.expand(2, -1, -1), x[:, torch.arange(4, N + 4)]], 1),
}


class Prompted(nn.Module):
    def __init__(self, put: Any) -> None:
        super().__init__()
        self.put, self.blocks = put, nn.ModuleList(Block(F.scaled_dot_product_attention) for _ in range(3))
        self.first, self.prompts = nn.Parameter(torch.randn(1, 4, D)), nn.Parameter(torch.randn(3, 1, 3, D))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(2, -1, -1), x], 1)
        for block, prompts in zip(self.blocks, self.prompts, strict=True):
            x = block(self.put(x, prompts))
        return x


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_put_in_the_place_of_protected_ones(name: str) -> None:
    report = assert_lossless(Prompted(PROMPTS[name]).eval(), (tokens(),), 6, sites=3, placement="stream")
    assert report.tokens == [(N + 4 - i, N - 2 - i) for i in (0, 6, 12)] and len(report.unmerges) == 1, report


BESIDE: dict[str, Attend] = {
    # columns beside the scores, which leave no key out
    "padded": lambda q, k, v: F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v,
    "values padded": lambda q, k, v: F.pad(q @ k.mT, (1, 0)).softmax(-1) @ F.pad(v, (0, 0, 1, 0)),
    "padded low": lambda q, k, v: F.pad(q @ k.mT, (0, 3), value=-torch.inf).softmax(-1) @ F.pad(v, (0, 0, 0, 3)),
    "weights padded": lambda q, k, v: F.pad((q @ k.mT).softmax(-1), (0, 1)) @ F.pad(v, (0, 0, 0, 1)),
}


@pytest.mark.parametrize("name", BESIDE)
def test_columns_beside_the_scores(name: str) -> None:
    found = tome_fx.check(net(BESIDE[name]), (torch.randn(2, N, D),), r=6, placement="stream")
    assert found.holds and len(found.merges) == 2, found


EITHER: dict[str, Attend] = {
    "alike": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN[:, None, None] == SEEN[:, None, :, None]),
    "one of them": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, SEEN[:, None, None] | SEEN[:, None, :, None]
    ),
    "the larger": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.maximum(SEEN.long()[:, None, None], SEEN.long()[:, None, :, None]).bool()
    ),
    "not both out": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, ~((~SEEN)[:, None, None] & (~SEEN)[:, None, :, None])
    ),
}


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize("name", EITHER)
def test_masks_of_pairs_made_of_one_of_tokens(name: str) -> None:
    """What joins a mask with itself otherwise leaves out by pairs."""
    report = tome_fx.explain(net(EITHER[name]), (tokens(),), r=6, placement="stream")
    assert not report.merged_sites and {s.kind for s in report.skipped} <= {"causal or windowed mask", "unclear mask"}


def triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1).tril()
    return (p / p.sum(-1, keepdim=True)) @ v


def triangle_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).tril()
    return s.masked_fill(s == 0, -torch.inf).softmax(-1) @ v


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s[:, :, torch.ones(N, N, dtype=torch.bool).triu(1)] = -torch.inf
    return s.softmax(-1) @ v


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize("placement", ["stream", "branch", "auto"])
@pytest.mark.parametrize("attend", [triangle, triangle_filled, written])
def test_triangles_without_a_mask(attend: Attend, placement: str) -> None:
    """Causal all the same: later tokens move no earlier output, neither by the attention nor by its MLP."""
    model, x = net(attend), torch.randn(2, N, D)
    other = torch.cat([x[:, : N // 2], torch.randn(2, N - N // 2, D)], 1)
    fast = compiled(model, 8, placement=placement)
    with torch.no_grad():
        moved = distance(fast(x)[:, : N // 2], fast(other)[:, : N // 2])
    assert moved < 1e-5, f"{moved:.0e}"


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, c = q.shape
    return F.scaled_dot_product_attention(q.reshape(b, h * n, c), k[:, 0], v[:, 0]).view(b, h, n, c)


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.permute(2, 0, 1, 3), k[:, 0].transpose(0, 1), v[:, 0].transpose(0, 1)
    p = torch.einsum("nbhd,mbd->nbhm", q, k).softmax(-1)
    return torch.einsum("nbhm,mbd->nbhd", p, v).permute(1, 2, 0, 3)


def broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("attend", [folded, sequence_first, broadcast])
def test_keys_that_heads_share(attend: Attend, placement: str) -> None:
    assert_lossless(net(attend, heads=1), (tokens(),), 6, sites=2, placement=placement)


@pytest.mark.parametrize("low", [-1e4, "lowest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sample_without_keys(dtype: torch.dtype, low: Any) -> None:
    """Low numbers leave all keys of a sample out: log(size) must not drown in them."""
    fill = torch.finfo(dtype).min if low == "lowest" else low
    model = net(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)).to(dtype)
    x = tokens().to(dtype)
    mask = torch.zeros(2, 1, 1, N, dtype=dtype)
    mask[1] = fill
    with torch.no_grad():
        error = distance(compiled(model, 8, placement="stream")(x), model(x))
    assert error < {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 2e-4}[dtype], f"{error:.0e}"


def shifted(table: Tensor) -> Attend:
    """Relative keys, shifted from distances to places (music transformer, BoTNet): cut out of a table's product."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, _ = q.shape
        far = F.pad(q @ table.mT, (0, 1)).flatten(2)  # [B, H, N * 2N]
        near = F.pad(far, (0, n - 1)).view(b, h, n + 1, 2 * n - 1)[:, :, :n, n - 1 :]
        return ((q @ k.mT + near) * 0.25).softmax(-1) @ v

    return attend


def test_relative_keys_are_no_channels() -> None:
    """What is cut from the product with a table has as many places as there are keys: they are tokens all the same."""
    table = torch.randn(2 * N - 1, D // H) * 0.1
    with torch.no_grad():
        torch.compile(net(shifted(table)), backend=tome_fx.tome_backend(r=6, inner="eager"))(tokens())
    assert "attention over channels" not in {s.kind for s in tome_fx.reports()[-1].skipped}


class TokenMixer(nn.Module):
    """A weight mixes the tokens of a residual stream after each attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.mix = nn.MultiheadAttention(D, H, batch_first=True), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return x + self.mix(x.mT).mT


def test_tokens_that_a_weight_mixes_are_called_so() -> None:
    model = nn.Sequential(nn.Linear(D, D), TokenMixer(), TokenMixer()).eval()
    with pytest.warns(match="a weight mixes its tokens"):
        report = tome_fx.explain(model, (tokens(),), r=6)
    assert {s.kind for s in report.skipped if s.kind != "MLP does not pay"} == {"mixed tokens"}


class ZeroedBias(nn.Module):
    """Keys without a bias: a part of the joint one is zeroed in each call (Swin v2); queries are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out, self.qkv = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias.clone()
        bias[D : 2 * D].zero_()
        y = F.linear(self.norm(x), self.qkv.weight, bias)
        q, k, v = y.unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_a_computed_bias_hides_no_features() -> None:
    """What a weight makes are features, whatever its bias was made of: the branch begins before the projection."""
    model = redraw(nn.Sequential(ZeroedBias(), ZeroedBias())).eval()
    report = assert_lossless(model, (tokens(),), 6, sites=2, placement="branch")
    gm = tome_fx.rewrite(model, (tokens(),), r=6, placement="branch")
    products = [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert {n.meta["val"].shape[1] for n in products if n.meta["val"].shape[-1] >= D} == {N - 6}, report
