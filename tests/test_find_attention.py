"""find_attention: one canonical SDPA for every spelling, and only where nobody reads what stands between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tome_fx
from tests.models import Spec, build
from tests.palette import assert_lossless, palette_tokens, run
from tests.recording import record
from tests.strategies import thinned

FUSED = [
    Spec(attention=attention, scale=scale)
    for attention in ("matmul", "bmm", "baddbmm", "einsum", "einsum_bnhd")
    for scale in ("scores", "q", "k", "divide")
]


@pytest.mark.parametrize("spec", thinned(FUSED, 2, lambda s: f"{s.attention}-{s.scale}"))
def test_every_spelling_becomes_one_sdpa(spec: Spec) -> None:
    model, args = build(spec)
    _, seen = record(model, args, r=4, drop_unread=False)
    ops = seen.ops()
    assert ops["aten.scaled_dot_product_attention"] == spec.depth
    assert ops["aten.softmax"] == ops["aten._softmax"] == 0
    assert ops["tome.match_size"] == spec.depth


class Readers(nn.Module):
    """Attention whose probabilities, or scores, somebody else reads too."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT * 0.25
        p = scores.softmax(-1)
        x = x + self.out(p @ v)
        return x.mean(1), p if self.read == "probabilities" else scores


@pytest.mark.parametrize("read", ["probabilities", "scores"])
def test_what_is_read_twice_is_not_fused(read: str) -> None:
    model = Readers(read).eval()
    x = torch.randn(2, 24, 16)
    got, seen = record(model, (x,), r=4, placement="stream")
    ops = seen.ops()
    assert ops["aten.scaled_dot_product_attention"] == 0
    assert ops["tome.match_size"] == 1
    with torch.no_grad():
        torch.testing.assert_close(got[1], model(x)[1])


def test_the_rewritten_block() -> None:
    """The canonical block, op by op: a match by the keys with sizes and log(size), and a merge that adds."""
    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    _, seen = record(model, args, r=4, drop_unread=False)
    ops = seen.ops()
    want = {"tome.match_size": 2, "tome.merge_add": 2, "tome.unmerge_aten": 0}
    assert {name: ops[name] for name in want} == want


class Transposed(nn.Module):
    """Channels first: scores from q^T k, and values times the transposed probabilities (EfficientViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(16, 48), nn.Linear(16, 16), nn.Parameter(torch.randn(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.mT for t in self.qkv(x).chunk(3, -1))
        p = (q.transpose(-2, -1) @ k * 0.25 + self.table).softmax(-1)
        return x + self.out((v @ p.transpose(-2, -1)).mT)


def test_transposed_probabilities_are_fused() -> None:
    model, x = nn.Sequential(Transposed(), Transposed()).eval(), palette_tokens(2, 24, 16, k=3)
    for layer in model:
        nn.init.zeros_(layer.table)
    _, seen = record(model, (x,), r=4, placement="stream")
    assert seen.ops()["aten.scaled_dot_product_attention"] == 2
    report = assert_lossless(model, (x,), 4, placement="stream", control=True)
    assert report.tokens[0] == (24, 20)


class SequenceFirst(nn.Module):
    """Tokens first, [N, B, D], and a mask of keys [N, N, B] that an einsum of one operand turns to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.content = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 24)).chunk(3, -1)
        scores = (torch.einsum("ibnd,jbnd->bnij", q, k) + torch.einsum("nd,jbnd->bnj", self.content, k)[:, :, None]) / 3
        scores = scores - 1e30 * torch.einsum("ijbn->bnij", hidden[..., None])
        return x + self.out(torch.einsum("bnij,jbnd->ibnd", scores.softmax(3), v).flatten(2))


class SequenceFirstNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SequenceFirst() for _ in range(3))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x, hidden = x.transpose(0, 1), padding.T[None].expand(x.shape[1], -1, -1)
        for block in self.blocks:
            x = block(x, hidden)
        return x.transpose(0, 1)


def test_a_mask_turned_by_an_einsum_of_one_operand() -> None:
    """XLNet's spelling. The tied law holds, and what is padded moves nothing."""
    torch.manual_seed(0)
    model, x = SequenceFirstNet().eval(), torch.randn(2, 24, 16)
    padding = (torch.arange(24) >= torch.tensor([[24], [17]])).float()
    found = tome_fx.check(model, (x, padding), r=4, placement="branch")
    assert found.merges and found.error < 1e-9, found
    out, _ = run(model, (x, padding), None, 4, placement="branch")
    other, _ = run(model, (torch.where(padding[..., None] > 0, 9 * torch.randn_like(x), x), padding), None, 4,
                   placement="branch")  # fmt: skip
    kept = padding == 0
    torch.testing.assert_close(other[kept], out[kept])


@pytest.mark.parametrize("low", [-1e9, float("-inf")])
def test_a_mask_of_one_dim_is_a_row_for_all_queries(low: float) -> None:
    """SDPA wants two dims of a mask, a softmax does not."""

    class Rowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.mlp = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            scores = (q @ k.mT).masked_fill(torch.arange(x.shape[1]) % 5 == 0, low)
            x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            return x + self.mlp(x)

    with torch.no_grad():
        found = tome_fx.check(Rowed(), (torch.randn(2, 60, 64),), r=8, placement="stream")
    assert found.holds and len(found.merges) == 1, found
