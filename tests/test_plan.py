"""plan: what a merge is estimated to cost and to save, and which merges are dropped for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, equalize, palette_grid
from tests.test_mlps import Block, Net
from tome_fx.passes.analysis import costs
from tome_fx.passes.merging.steps import Steps


class Table(nn.Module):
    """A pre-norm block whose scores get a table [heads, N, N] of its own (BEiT)."""

    def __init__(self, tokens: int, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.table, self.heads = nn.Parameter(torch.randn(heads, tokens, tokens)), heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.table)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def tables(depth: int = 4, tokens: int = 64, dim: int = 32, heads: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return redraw(nn.Sequential(*(Table(tokens, dim, heads) for _ in range(depth)))).eval()


def test_a_table_goes_through_all_merges_at_once() -> None:
    """The table of block 4 has full length on both axes: three merges before it are one call for each axis.

    They were one call for each merge, on tables of every sample: in BEiT that cost more than all the merges saved."""
    gm = tome_fx.rewrite(tables(), (torch.randn(2, 64, 32),), r=8, placement="stream", plain=False)
    calls = [n for n in gm.graph.nodes if "merge_bias" in str(n.target)]
    assert len(calls) == 2 * 3


def test_composed_merges_are_the_merges_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same groups and sizes, whatever the input: size-weighted means and log-mean-exps are associative."""
    model, x = tables(), torch.randn(2, 64, 32)
    with torch.no_grad():
        got = tome_fx.rewrite(model, (x,), r=8, placement="stream")(x)
        monkeypatch.setattr(Steps, "stretches", lambda self, steps, fill: [[step] for step in steps])
        apart = tome_fx.rewrite(model, (x,), r=8, placement="stream", plain=False)
        assert len([n for n in apart.graph.nodes if "merge_bias" in str(n.target)]) == 2 * 6
        torch.testing.assert_close(got, apart(x), rtol=1e-5, atol=1e-5)


def wide() -> nn.Module:
    """Two windowed blocks wide enough for costs to count."""
    torch.manual_seed(0)
    net = Net(Block("pre", dim=96), Block("pre", dim=96))
    net.embed = nn.Conv2d(3, 96, 4, 4)
    return equalize(redraw(net).eval())


def test_a_branch_that_costs_more_than_it_saves_is_left_alone() -> None:
    """3 of 16 tokens of a window: matching, merging and giving back take longer than what they save."""
    image = palette_grid(2, (12, 12), (4, 4), k=2)
    with pytest.warns(tome_fx.ToMeWarning, match="does not pay"):
        report = tome_fx.explain(wide(), (image,), r=3)
    assert report.merged_sites == 0
    assert {s.kind for s in report.skipped} == {"does not pay", "MLP does not pay"}
    assert_lossless(wide(), (image,), 3, sites=2, placement="branch")


def test_cheap_moves_let_it_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a device on which only products cost anything."""
    free = dataclasses.replace(costs.COSTS["cpu"], **dict.fromkeys(("match", "merge", "gather", "bias", "masked"), 0.0))
    monkeypatch.setitem(costs.COSTS, "cpu", free)
    report = tome_fx.explain(wide(), (palette_grid(2, (12, 12), (4, 4), k=2),), r=3)
    assert report.merged_sites == 2


def test_a_chain_pays_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream the schedule is the user's: the last block's merge stays although alone it would not pay; where
    the chain does not pay, its worst merge goes first."""
    model, x = tables(dim=64, heads=1), (torch.randn(2, 64, 64),)
    dear = {name: 0.0 for name in ("merge", "gather", "bias", "touch", "masked")}
    monkeypatch.setitem(costs.COSTS, "cpu", costs.Costs(match=300.0, **dear))
    assert tome_fx.explain(model, x, r=8).merged_sites == 4
    assert tome_fx.explain(model, x, r=[0, 0, 0, 8], placement="stream").merged_sites == 1
    with pytest.warns(tome_fx.ToMeWarning, match="does not pay"):
        assert tome_fx.explain(model, x, r=[0, 0, 0, 8]).merged_sites == 0
    monkeypatch.setitem(costs.COSTS, "cpu", costs.Costs(match=700.0, **dear))
    assert 0 < tome_fx.explain(model, x, r=8).merged_sites < 4


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_multiples_keep_half_of_a_short_axis(multiple: int) -> None:
    """What earlier blocks owe takes no later one below the floor: with multiples of 2 the last block owed one more."""
    x = torch.randn(2, 30, 32)
    report = tome_fx.explain(tables(6, tokens=30), (x,), r=3, multiple=multiple, placement="stream")
    assert report.tokens[-1][1] == {1: 15, 2: 16, 4: 16}[multiple]
    assert all(after % multiple == 0 for _, after in report.tokens)
