"""find_sums: attention without a softmax merges as sites of its own, and not under masks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, palette_tokens, run
from tests.strategies import thinned

N, D, H = 40, 32, 2
Attend = Callable[..., Tensor]


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Lite attention: a column of ones counts the keys."""
    q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
    y = q @ (k.mT @ v)
    return y[..., :-1] / (y[..., -1:] + 1e-3)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT * 0.25).exp()
    return (w / w.sum(-1, keepdim=True)) @ v


WAVES = nn.Parameter(torch.linspace(-1, 1, 16 * 12).reshape(16, 12))


def turned(x: Tensor) -> Tensor:
    """Random Fourier features."""
    return torch.cat([x.sin(), x.cos()], -1)


class Performer(nn.Module):
    """Random features of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.linspace(-1, 1, 16 * 24).reshape(16, 24))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (torch.exp(x @ self.w - x.square().sum(-1, keepdim=True) / 2) for x in (q, k))
        return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


PAIRS: dict[str, Attend] = {
    "sigmoid": lambda q, k, v: torch.sigmoid(q @ k.mT * 0.25 - 3.0) @ v,
    "relu / n": lambda q, k, v: F.relu(q @ k.mT) / k.shape[2] @ v,
    "relu squared": lambda q, k, v: F.relu(q @ k.mT).square() / k.shape[2] @ v,
    "exp by hand": by_hand,
    "cosine": lambda q, k, v: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT @ v / k.shape[2],
    "distances": lambda q, k, v: torch.exp(-torch.cdist(q, k).square()) @ v / k.shape[2],
    "distances, absolute": lambda q, k, v: (-torch.cdist(q, k, p=1)).sigmoid() @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).mul(0.25).sigmoid(), v
    ),
    "heads folded": lambda q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).mul(0.25).sigmoid(), v.flatten(0, 1)
    ).view_as(v),
    "heads in the queries": lambda q, k, v: (
        torch.sigmoid(q.flatten(1, 2) @ k[:, 0].mT * 0.25) @ v[:, 0]
    ).unflatten(1, (H, -1)),
    "transposed": lambda q, k, v: (v.mT @ (k @ q.mT).mul(0.25).sigmoid()).mT,
}
LINEAR: dict[str, Attend] = {
    "q (k^T v)": lambda q, k, v: q @ (k.mT @ v) / k.shape[2],
    "elu": lambda q, k, v: phi(q) @ (phi(k).mT @ v) / (phi(q) @ phi(k).sum(-2, keepdim=True).mT),
    "counted": counted,
    "softmax apart": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "einsum": lambda q, k, v: torch.einsum("bhnd,bhde->bhne", phi(q), torch.einsum("bhnd,bhne->bhde", phi(k), v) / 40),
    "einsum of three": lambda q, k, v: torch.einsum(
        "bhnd,bhde,bhn->bhne", phi(q), phi(k).mT @ v, 1 / torch.einsum("bhnd,bhd->bhn", phi(q), phi(k).sum(2))
    ),
    "values first": lambda q, k, v: ((v.mT @ k.relu()) @ q.relu().mT).mT / k.shape[2],
    "scaled between": lambda q, k, v: q @ ((k.mT @ v) * 0.1),
    "performer": Performer(),
    "softmax apart, einsum": lambda q, k, v: torch.einsum(
        "bhde,bhnd->bhne", torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v), q.softmax(-1)
    ),
    "einsum of three, dots": lambda q, k, v: torch.einsum(
        "...de,...nd,...n->...ne", phi(k).mT @ v, phi(q), 1 / torch.einsum("...nd,...d->...n", phi(q), phi(k).sum(2))
    ),
    "sines and cosines": lambda q, k, v: turned(q @ WAVES) @ (turned(k @ WAVES).mT @ v) / k.shape[2],
}


class Block(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(self.attend(q, k, v, *masks).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(attend) for _ in range(3))

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *masks)
        return x


def net(attend: Attend) -> nn.Module:
    return redraw(Net(attend)).eval()


ALL = {**PAIRS, **{f"linear: {name}": f for name, f in LINEAR.items()}}


@pytest.mark.parametrize(("name", "placement"), thinned(product(ALL, ("stream", "branch")), 3))
def test_every_block_is_a_site(name: str, placement: str) -> None:
    report = assert_lossless(net(ALL[name]), (palette_tokens(2, N, D, k=3),), 6, sites=3, placement=placement)
    assert {s.placement for s in report.sites} == {placement}
    if placement == "stream":
        assert report.tokens == [(40, 34), (34, 28), (28, 22)]


@pytest.mark.parametrize(
    ("attend", "first"),
    [(PAIRS["sigmoid"], nn.Identity()), (PAIRS["exp by hand"], nn.Identity()), (LINEAR["elu"], nn.Identity()),
     (LINEAR["softmax apart"], nn.Identity()), (PAIRS["sigmoid"], nn.Linear(D, D)),
     (LINEAR["elu"], nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)))],
)  # fmt: skip
def test_the_tied_law(attend: Attend, first: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(first, net(attend)).eval()  # tokens that are an input have features of their own
    found = tome_fx.check(model, (torch.randn(2, N, D),), r=6, placement="stream")
    assert len(found.merges) == 3 and found.error < 1e-9, found


def test_it_takes_the_keys_before_their_feature_map() -> None:
    """Tokens merge as they do with scores made of the same keys."""
    torch.manual_seed(0)
    x = torch.randn(2, N, D)
    plain, mapped = net(LINEAR["q (k^T v)"]), net(LINEAR["elu"])
    mapped.load_state_dict(plain.state_dict())
    a, b = (tome_fx.trace_tokens(m, (x,), r=[6, 0, 0], placement="stream").groups for m in (plain, mapped))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def gates(k: Tensor) -> Tensor:
    """Sums of decays that the tokens give, for each pair (Mamba-2 in its quadratic form)."""
    total = -F.softplus(k.mean(-1)).cumsum(-1)
    return total[..., :, None] - total[..., None, :]


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What was before the chunk is the running sum less the chunk's own."""
    own = k.mT @ v
    return (q @ (own.cumsum(2) - own) + (q @ k.mT).tril() @ v).flatten(2, 3) / N


MASKED: dict[str, Attend] = {
    # of q, k, v and keep, float [B, N]
    "tril of weights": lambda q, k, v, m: torch.sigmoid(q @ k.mT).tril() @ v,
    "times tril": lambda q, k, v, m: torch.sigmoid(q @ k.mT) * torch.ones(N, N).tril() @ v,
    "scores filled": lambda q, k, v, m: torch.sigmoid((q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, -1e9)) @ v,
    "zeros filled": lambda q, k, v, m: (q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, 0.0) @ v,
    "tril of gates": lambda q, k, v, m: (q @ k.mT * gates(k).exp().tril()) @ v / N,
    "tril of other scores": lambda q, k, v, m: (torch.sigmoid(q @ k.mT) * (k @ q.mT).tril()) @ v / N,
    "less its triangle": lambda q, k, v, m: ((q @ k.mT) - (q @ k.mT).triu(1)) @ v / N,
    "chunks, less their own": lambda q, k, v, m: in_chunks(*(x.unflatten(2, (-1, 8)) for x in (q, k, v))),
    "probabilities times gates": lambda q, k, v, m: F.normalize(
        (q @ k.mT * 0.1).softmax(-1) * gates(k).clamp(max=0).exp().tril(), 1, -1
    ) @ v,
    "cumulated": lambda q, k, v, m: (phi(q)[..., None, :] @ (phi(k)[..., None] * v[..., None, :]).cumsum(2))[..., 0, :],
}
PADDED: dict[str, Attend] = {
    "weights times keep": lambda q, k, v, m: torch.sigmoid(q @ k.mT) * m[:, None, None] @ v,
    "keys times keep": lambda q, k, v, m: q @ ((k * m[:, None, :, None]).mT @ v) / 40,
    "values times keep": lambda q, k, v, m: q @ (k.mT @ (v * m[:, None, :, None])) / 40,
    "keys filled": lambda q, k, v, m: q @ (k.masked_fill(m[:, None, :, None] == 0, 0.0).mT @ v) / 40,
    "softmax apart": lambda q, k, v, m: (
        q.softmax(-1) @ (k.masked_fill(m[:, None, :, None] == 0, -1e9).softmax(-2).mT @ v)
    ),
}


@pytest.mark.filterwarnings("ignore:tome_backend. nothing merged")
@pytest.mark.parametrize(("name", "placement"), thinned(product(MASKED, ("stream", "branch", "auto")), 2))
def test_the_past_does_not_see_the_future(name: str, placement: str) -> None:
    torch.manual_seed(0)
    model, x, keep = net(MASKED[name]), torch.randn(2, N, D), torch.ones(2, N)
    other = torch.cat([x[:, :20], torch.randn(2, N - 20, D)], 1)
    a, b = (run(model, (t, keep), None, 8, placement=placement)[0] for t in (x, other))
    torch.testing.assert_close(a[:, :20], b[:, :20])


class InChunks(nn.Module):
    """Chunks of 16 tokens, projected one by one; each reads what is summed before it, and itself in causal order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state, outs = torch.zeros(()), []
        for chunk in self.norm(x).split(16, 1):
            q, k, v = self.qkv(chunk).chunk(3, -1)
            own = (q @ k.mT).tril() @ v / 40
            outs.append(own + q @ state / 40 if state.dim() else own)
            state = state + k.mT @ v
        return x + self.out(torch.cat(outs, 1))


@pytest.mark.filterwarnings("ignore:tome_backend. nothing merged")
@pytest.mark.parametrize("placement", ["stream", "branch", "auto"])
def test_chunks_that_read_what_was_before(placement: str) -> None:
    torch.manual_seed(0)
    model, x = redraw(nn.Sequential(InChunks(), InChunks())).eval(), torch.randn(2, 48, D)
    other = torch.cat([x[:, :20], torch.randn(2, 28, D)], 1)
    a, b = (run(model, (t,), None, 4, placement=placement)[0] for t in (x, other))
    torch.testing.assert_close(a[:, :20], b[:, :20])


@pytest.mark.filterwarnings("ignore:tome_backend. nothing merged")
@pytest.mark.parametrize(("name", "placement"), thinned(product(PADDED, ("stream", "branch", "auto")), 2))
def test_padding_is_not_read(name: str, placement: str) -> None:
    torch.manual_seed(0)
    model, x = net(PADDED[name]), torch.randn(2, N, D)
    keep = (torch.arange(N) < torch.tensor([[N], [25]])).float()
    other = torch.where(keep[..., None] > 0, x, 9 * torch.randn(2, N, D))
    a, b = (run(model, (t, keep), None, 8, placement=placement)[0] for t in (x, other))
    torch.testing.assert_close(a[keep > 0], b[keep > 0])


@pytest.mark.filterwarnings("ignore:tome_backend. nothing merged")
def test_channels_are_no_tokens() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1).matmul(v.mT).mT

    _, report = run(net(attend), (torch.randn(2, N, D),), None, 6, placement="stream")
    assert not report.merged_sites and {s.kind for s in report.skipped} == {"attention over channels"}
