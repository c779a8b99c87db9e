"""Near pairs found in tiles are those that comparing all pairs finds, and no matrix of all pairs is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tome_fx
from tests.test_show import Tubelets
from tome_fx import matching, ops
from tome_fx.methods import how as hows
from tome_fx.methods.how import How, pick
from tome_fx.methods.tokens import Tokens

BATCH, WIDTH = 3, 16
PARTITIONS = ("window:2", "window:3", "window:8", "window3d:2", "window3d:3", "frame", "band:1", "band:2", "band:5",
              "band:40")  # fmt: skip


def some_tokens(grid: tuple[int, int, int], lost: float, first: int) -> Tokens:
    """Tokens of a grid of frames, other ones left in each sample."""
    generator = torch.Generator().manual_seed(sum(grid))
    place = ops.grid_places(grid, 0, 0).expand(BATCH, -1, -1)
    n = int(place.shape[1] * (1 - lost))
    left = [torch.randperm(place.shape[1], generator=generator)[:n].sort().values for _ in range(BATCH)]
    place = place.gather(1, torch.stack(left)[..., None].expand(-1, -1, 3))
    return Tokens(torch.randn(BATCH, n, WIDTH, generator=generator), first, torch.ones(BATCH, n), place=place)


def pairs(how: How, tokens: Tokens, r: int) -> list[dict[int, int]]:
    source, destination, score, _ = pick(how, tokens, r, 0)
    assert bool((score.diff(dim=1) <= 0).all())
    return [dict(zip(*each, strict=True)) for each in zip(source.tolist(), destination.tolist(), strict=True)]


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 5, 7), (1, 1, 33), (2, 16, 16)])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_same_pairs(partition: str, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all pairs that merge are near, or sources that nothing is near follow."""
    for similarity, lost, first in (("cosine", 0.0, 0), ("dot", 0.4, 1)):
        how, tokens = How(partition=partition, similarity=similarity), some_tokens(grid, lost, first)
        for r in (0, 1, tokens.count // 4, tokens.count // 2):
            found = pairs(how, tokens, r)
            with monkeypatch.context() as patched:
                patched.setattr(hows, "_in_blocks", lambda *_: False)
                assert found == pairs(how, tokens, r)


CELLS = {
    "window:2": lambda frame, row, column: (frame, row // 2, column // 2),
    "window3d:2": lambda frame, row, column: (frame // 2, row // 2, column // 2),
    "frame": lambda frame, row, column: frame,
}
"""What tokens of one window have in common."""


@pytest.mark.parametrize("partition", CELLS)
def test_windows(partition: str) -> None:
    """Pairs are of one window as long as there are any, against loops over the places."""
    tokens = some_tokens((3, 4, 5), 0.3, 0)
    own = [[CELLS[partition](*at) for at in sample] for sample in tokens.places().tolist()]
    sides = [[set(sample[i::2]) for i in (0, 1)] for sample in own]
    least = min(sum(cell in sides[i][1] for cell in own[i][::2]) for i in range(BATCH))
    for sample, found in zip(own, pairs(How(partition=partition), tokens, least), strict=True):
        assert len(found) == least > 0
        assert all(sample[a] == sample[b] for a, b in found.items())


@pytest.mark.parametrize(("partition", "frames"), [("grid:2", 1), ("grid3d:2", 2)])
def test_cells(partition: str, frames: int) -> None:
    """The first token of each cell stays, all others may go; no more go than a whole grid has beside its cells."""
    grid = (4, 4, 6)
    tokens = some_tokens(grid, 0.0, 0)
    cells = [(frame // frames, row // 2, column // 2) for frame, row, column in tokens.places()[0].tolist()]
    first = {cells.index(cell) for cell in set(cells)}
    how, r = How(partition=partition), tokens.count - len(first)
    assert how.most(tokens.count, tokens.count, grid) == r
    for found in pairs(how, tokens, r):
        assert set(found.values()) <= first and not set(found) & first


@pytest.mark.parametrize("partition", ["window:2", "band:1"])
def test_a_sample_does_not_depend_on_its_batch(partition: str) -> None:
    """Pairs and scores, where samples have different numbers of tokens that nothing is near."""
    tokens = some_tokens((1, 8, 8), 0.4, 0)
    alone = replace(tokens, metric=tokens.metric[:1], size=tokens.size[:1], place=tokens.place[:1])
    for r in (1, tokens.count // 2):
        whole, own = (pick(How(partition=partition), of, r, 0) for of in (tokens, alone))
        assert all(torch.allclose(a[:1], b, atol=1e-6) for a, b in zip(whole[:3], own[:3], strict=True))


def test_a_metric_that_is_no_number_is_matched_all_the_same() -> None:
    """As by the matrix of all pairs: some r pairs, and no error of ours."""
    tokens = some_tokens((1, 8, 8), 0.0, 0)
    tokens.metric[0, :9] = float("nan")
    source, *_ = pick(How(partition="window:2"), tokens, 32, 0)
    assert all(len(set(row)) == 32 for row in source.tolist())


class Largest(TorchDispatchMode):
    """The most elements that any result had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("partition", ["window:4", "band:8"])
def test_memory_grows_with_the_tokens(partition: str) -> None:
    """Four times the tokens take four times as much, not sixteen times."""
    most = []
    for side in (32, 64):
        tokens = some_tokens((1, side, side), 0.0, 0)
        with Largest() as mode:
            pick(How(partition=partition), tokens, side * side // 4, 0)
        most.append(mode.most)
    assert most[1] <= 4.5 * most[0], most


def test_blocks_give_what_one_product_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more similarities than are held at once no more are held."""
    x = torch.randn(2, 300, 1, 8)
    args = (x, 40, 1, 0)
    whole = ops.match_aten(*args), ops.match_by(*args, True, "bipartite", "sequential", "dot")
    monkeypatch.setattr(matching, "AT_ONCE", 5000)
    with Largest() as mode:
        parts = ops.match_aten(*args), ops.match_by(*args, True, "bipartite", "sequential", "dot")
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert mode.most <= max(5000, x.numel())


@pytest.mark.parametrize("partition", ["window3d:2", "grid3d:2"])
def test_tubelets(partition: str) -> None:
    """The grid of a video is found, and merges by its windows and cells keep the tied law."""
    model, x = Tubelets().double().eval(), torch.randn(2, 3, 8, 24, 24, dtype=torch.float64)
    options: dict[str, Any] = {"r": [6, 5], "placement": "stream", "partition": partition}
    assert tome_fx.explain(model, (x,), **options).merged_sites == 2
    assert tome_fx.check(model, (x,), **options).holds
    merge = tome_fx.trace_tokens(model, (x,), **options).merges[0]
    if partition == "window3d:2":
        cell = [(i // 9 // 2, i // 3 % 3 // 2, i % 3 // 2) for i in range(36)]
        for groups in merge.groups.tolist():
            assert all(cell[i] == cell[j] for i in range(36) for j in range(36) if groups[i] == groups[j])
