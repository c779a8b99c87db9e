"""The oracle of tests/reference_methods.py against what must hold of it, and against small cases worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import match
from tests.reference_methods import (
    METHODS,
    Plain,
    Token,
    View,
    by_attention,
    groups,
    mlerp,
    place_code,
    plain,
    reduce,
    reduced,
    saint_count,
    spread,
)

PARAMS: dict[str, dict[str, Any]] = {"evs": {"frames": 2}}
DROPPING = "saint", "saint_vlm", "evs"
LOSSLESS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tome": (2, {}),
    "tosa": (2, {"alpha": 1.0}),
    "mstm": (2, {}),
    "diffrate": (2, {}),
    "pitome": (2, {}),
    "tofu": ([0, 0, 2, 2], {}),
    "mctf": (3, {}),
    "window": ([2, 0, 0, 0], {}),
    "band": ([2, 1, 0, 0], {"k": 3}),
}
"""Merging with proportional attention: r and parameters with which a palette of these colours merges like with like."""


def photos(batch: int = 2, seed: int = 0) -> Tensor:
    """Random images of 4x4 patches."""
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def palette(batch: int = 2, seed: int = 0, counts: tuple[int, ...] = (12, 4)) -> tuple[Tensor, Tensor]:
    """Images of 4x4 patches of which counts[c] are of colour c, and the colours [B, 16]."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)])
    index = torch.stack([colour[torch.randperm(16, generator=generator)] for _ in range(batch)])
    patches = torch.randn(len(counts), 3, 4, 4, dtype=torch.float64, generator=generator)[index]
    return patches.view(batch, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, 16, 16), index


def pure(source: Tensor, colour: Tensor, prefix: int) -> bool:
    """Whether only tokens of one colour went together."""
    return all(
        len({int(of[i - prefix]) if i >= prefix else -i - 1 for i in group}) == 1
        for sample, of in zip(groups(source), colour, strict=True)
        for group in sample
    )


def view(keys: list[list[float]], prefix: int = 0, importance: list[float] | None = None, **other: Any) -> View:
    """A sample made by hand: the stream is the keys; every query row of its attention is `importance`."""
    rows = torch.tensor(keys, dtype=torch.float64)
    n = len(rows)
    row = torch.tensor(importance or [1 / n] * n, dtype=torch.float64)
    made = View(rows, rows, row.expand(1, n, n), rows.new_ones(n), [(0, i) for i in range(n)], rows, prefix)
    return replace(made, **{"source": list(range(n)), **other})


def first_keys(model: Plain, images: Tensor) -> Tensor:
    """Keys of the first block, mean over its 4 heads of 8."""
    block = model.blocks[0]
    return block.attn.qkv(block.norm1(model.embed(images))).unflatten(-1, (3, 4, 8))[:, :, 1].mean(dim=2)


def angles(*degrees: float) -> list[list[float]]:
    """Keys of these directions."""
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def split(method: str, of: View, r: int, **params: Any) -> list[tuple[int, list[int], list[int]]]:
    new: list[Token] = METHODS[method].split(of, r, **params)
    return [(t.at, t.joined, t.lost) for t in new]


# -- all methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_taken_away_is_the_model(method: str, prefix: int) -> None:
    model, images = plain(prefix=prefix), photos()
    features, source, sizes = reduced(model, images, method, 0, **PARAMS.get(method, {}))
    torch.testing.assert_close(features, model(images))
    assert (source == torch.arange(16 + prefix)).all() and (sizes == 1).all()


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_counts(method: str, prefix: int) -> None:
    """r tokens fewer after each of the method's blocks, in front the special tokens by themselves."""
    model, params = plain(prefix=prefix), PARAMS.get(method, {})
    features, source, sizes = reduced(model, photos(), method, 2, **params)
    n, left = 16 + prefix, 16 + prefix - 2 * len(set(METHODS[method].blocks(4)))
    assert features.shape == (2, left, 32) and source.shape == (2, n) and sizes.shape == (2, left)
    assert all(set(row.tolist()) == set(range(left)) for row in source)
    assert (source[:, :prefix] == torch.arange(prefix)).all() and (source[:, prefix:] >= prefix).all()
    behind = torch.stack([torch.bincount(row, minlength=left) for row in source])
    if not METHODS[method].sizes:
        assert (sizes == 1).all()
    elif method in ("diffrate", "tofu"):  # some are dropped
        assert (sizes <= behind).all()
    else:
        assert (sizes == behind).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_knows_nothing_of_another(method: str) -> None:
    model, images, params = plain(), photos(3), PARAMS.get(method, {})
    r = 3 if method == "evs" else [1, 2, 2, 0]
    together = reduced(model, images, method, r, **params)
    for b in range(3):
        alone = reduced(model, images[b : b + 1], method, r, **params)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[b : b + 1], part)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("method", LOSSLESS)
def test_merging_equal_tokens_changes_nothing(method: str, prefix: int) -> None:
    model, (images, colour) = plain(prefix=prefix), palette()
    r, params = LOSSLESS[method]
    features, source, sizes = reduced(model, images, method, r, **params)
    assert pure(source, colour, prefix), "void: unequal tokens were merged"
    assert features.shape[1] < 16 and sizes.max() > 1
    torch.testing.assert_close(spread(features, source), model(images))


@pytest.mark.parametrize("method", ["evit", "grid", "saint", "saint_vlm", "tofu"])
def test_reducing_equal_tokens_in_the_last_block_changes_nothing(method: str) -> None:
    """No attention comes after it, so sizes do not matter."""
    model, (images, colour) = plain(), palette()
    features, source, _ = reduced(model, images, method, [0, 0, 0, 2])
    assert pure(source, colour, 1), "void: unequal tokens were merged"
    torch.testing.assert_close(spread(features, source), model(images))


@pytest.mark.parametrize("method", DROPPING)
def test_what_is_not_dropped_in_the_last_block_stays(method: str) -> None:
    model, images = plain(), photos()
    features, source, _ = reduced(model, images, method, [0, 0, 0, 4], **PARAMS.get(method, {}))
    whole = model(images)
    for b in range(2):
        for row in range(features.shape[1]):
            behind = whole[b, source[b] == row]
            assert (behind - features[b, row]).abs().amax(dim=-1).min() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_most_that_makes_sense(method: str) -> None:
    left = {"mstm": 1, "evit": 1, "diffrate": 1, "saint_vlm": 1, "grid": 4}.get(method, 8)
    for prefix in (0, 1):
        params = PARAMS.get(method, {})
        features, _, _ = reduced(plain(prefix=prefix), photos(), method, [0, 0, 0, 99], **params)
        assert features.shape[1] == prefix + left


def test_two_equal_keys_are_one_key_of_size_2() -> None:
    """Proportional attention: the sizes are felt on the key axis."""
    model = plain(depth=2, prefix=0)
    tokens = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens[:, 3] = tokens[:, 2]
    features, source, sizes = reduced(model, tokens, "tome", [1, 0])
    assert groups(source)[0] == {frozenset(g) for g in [{0}, {1}, {2, 3}, {4}, {5}]}
    assert sizes.tolist() == [[1, 1, 1, 2, 1]]
    torch.testing.assert_close(spread(features, source), model(tokens))


# -- what all methods stand on ---------------------------------------------------------------------------------------


def test_class_attention_and_attention_received() -> None:
    weights = torch.tensor([[[0.2, 0.8], [0.6, 0.4]], [[0.4, 0.6], [1.0, 0.0]]], dtype=torch.float64)
    of = view(angles(0, 90), 1, weights=weights)
    torch.testing.assert_close(of.importance.tolist(), [0.3, 0.7])
    torch.testing.assert_close(of.received.tolist(), [0.55, 0.45])
    torch.testing.assert_close(replace(of, prefix=0).importance.tolist(), [0.55, 0.45])


def test_a_reduction() -> None:
    """Values, codes and sizes meet by size, the place is the destination's, tokens follow where their row goes."""
    of = view([[1, 0], [4, 1], [0, 1]], size=torch.tensor([3.0, 1, 1], dtype=torch.float64), source=[1, 0, 2, 0, 0])
    after = reduce(of, METHODS["tome"], 1, {})
    assert after.x.tolist() == after.code.tolist() == [[0, 1], [1.75, 0.25]]
    assert after.size.tolist() == [1, 4] and after.place == [(0, 2), (0, 1)] and after.source == [1, 1, 0, 1, 1]
    of = view([[1, 0], [0, 2]], importance=[0.25, 0.75])
    assert reduce(of, METHODS["evit"], 1, {}).x.tolist() == [[0.25, 1.5]]
    torch.testing.assert_close(reduce(of, METHODS["tofu"], 1, {}).x.tolist(), [[0.0, 2.0]])
    late = reduce(replace(of, layer=1, layers=2), METHODS["tofu"], 1, {}).x
    torch.testing.assert_close(late.tolist(), [[2 / math.sqrt(5), 4 / math.sqrt(5)]])
    assert reduce(of, METHODS["grid"], 1, {}).x.tolist() == [[0.5, 1]]


def test_which_blocks_reduce() -> None:
    where = {name: sorted(set(method.blocks(12))) for name, method in METHODS.items()}
    assert where.pop("saint") == [0, 1, 2, 3, 4, 5] and where.pop("evit") == [3, 6, 9]
    assert where.pop("saint_vlm") == where.pop("evs") == [11]
    assert all(blocks == list(range(12)) for blocks in where.values())
    assert list(METHODS["saint"].blocks(5)) == [0, 1, 2]


# -- each method, by hand --------------------------------------------------------------------------------------------


def test_the_first_reduction_is_by_the_keys_of_that_block() -> None:
    model, images = plain(), photos()
    source = reduced(model, images, "tome", [5, 0, 0, 0])[1]
    for sample, keys in zip(groups(source), first_keys(model, images), strict=True):
        assert sample == {frozenset(g) for g in match(keys, 5, 1)}


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tome_is_the_other_reference(prefix: int) -> None:
    keys = torch.randn(13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(prefix))
    new = METHODS["tome"].split(view(keys.tolist(), prefix), 4)
    assert [t.joined for t in new] == [sorted(g) for g in match(keys, 4, prefix)]


def test_saint() -> None:
    """A: 0, 2, 4; B: 1, 3, 5. Token 0 has two neighbours, 2 one that is nearer: with a steep gamma that one goes."""
    of = view(angles(0, 20, 90, 30, 180, 89))
    assert split("saint", of, 1) == [(0, [0], []), (4, [4], []), (1, [1], []), (3, [3], []), (5, [5], [2])]
    assert split("saint", of, 1, gamma=1) == [(2, [2], []), (4, [4], []), (1, [1], [0]), (3, [3], []), (5, [5], [])]
    assert split("saint", of, 2) == [(4, [4], []), (1, [1], [0]), (3, [3], []), (5, [5], [2])]
    assert [saint_count(of.keys[None], 0, least=k) for k in (1, 2, 3)] == [2, 1, 0]
    assert saint_count(torch.stack([of.keys, torch.eye(6, 2).double()]), 0, least=2) == 0  # half of 1, rounded down


def test_saint_without_neighbours_goes_by_the_mean_of_all() -> None:
    """Token 0 has the one highest similarity, 2 the higher mean."""
    of = view(angles(20, 0, 59, 120))
    assert split("saint", of, 1, tau=0.99) == [(0, [0], []), (1, [1], [2]), (3, [3], [])]


def test_saint_takes_its_r_from_the_batch() -> None:
    model, (images, colour) = plain(depth=1), palette()
    with torch.no_grad():  # the class token has many neighbours, and is not counted
        model.special[0] = model.embed(images)[0, 1 + int(colour[0].mode().indices)]
    keys = first_keys(model, images[:1])
    assert saint_count(keys, 0) == saint_count(keys, 1) + 1
    keys = first_keys(model, images)
    r = saint_count(keys, 1)
    assert r > 0 and reduced(model, images, "saint", None)[0].shape[1] == 17 - r
    r = saint_count(keys[:1], 1)
    assert reduced(model, images[:1], "saint", None)[0].shape[1] == 17 - r
    assert reduced(model, images, "saint", None, least=9)[0].shape[1] == 17 - saint_count(keys, 1, least=9)


def test_tosa() -> None:
    """By meaning 0 goes to 1 and 2 to 3; by place 0 goes to 3 and 2 to 1."""
    of = view(angles(0, 5, 90, 93), layers=3)
    of = replace(of, code=torch.tensor(angles(0, 90, 93, 5), dtype=torch.float64))
    space, meaning = [(1, [1, 2], []), (3, [3], [])], [(1, [1], []), (3, [2, 3], [])]
    assert split("tosa", of, 1)[1:] == split("tosa", replace(of, layer=2), 1, alpha="falling")[1:] == space
    assert split("tosa", replace(of, layer=2), 1)[1:] == split("tosa", of, 1, alpha="falling")[1:] == meaning
    assert split("tosa", replace(of, layer=1), 1, alpha=1)[1:] == meaning


def test_codes_of_places() -> None:
    code = place_code(3, 5, 0.99, 4)
    assert len(code) == 96 and len(place_code(3, 5)) == 64
    assert code[0] == math.sin(3) and code[16] == math.cos(3) and code[32] == math.sin(5) and code[64] == math.sin(3)
    assert math.isclose(code[8], math.sin(3 / 100)) and place_code(0, 0, 1.0) == place_code(0, 0, 15 / 16)
    model, images = plain(depth=1), photos()
    depth = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    flat, deep = (reduced(model, images, "tosa", 5, alpha=0.0, **d)[1] for d in ({}, {"depth": depth}))
    assert (flat[0] == flat[1]).all() and groups(deep) != groups(flat)


def test_score_splits() -> None:
    """Class attention, lowest first: 4, 2, 5, 1, 3. Directions: 4 and 2 are near to 3, 5 is near to 1."""
    of = view(angles(0, 10, 80, 90, 85, 15), 1, [0.1, 0.3, 0.05, 0.35, 0.02, 0.18])
    special, mixed = (0, [0], []), torch.tensor(angles(80, 85, 15), dtype=torch.float64)
    assert split("mstm", of, 3) == [special, (1, [1, 5], []), (3, [2, 3, 4], [])]
    assert split("diffrate", of, 3) == [special, (1, [1, 5], []), (3, [2, 3], [4])]
    assert split("diffrate", of, 3, prune=1) == [special, (1, [1], [5]), (3, [3], [2, 4])]
    assert split("evit", of, 2) == [special, (1, [1], []), (3, [3], []), (5, [2, 4, 5], [])]
    expected = (mixed * torch.tensor([[0.05], [0.02], [0.18]])).sum(dim=0) / 0.25
    torch.testing.assert_close(by_attention(of, [2, 4, 5]), expected, rtol=1e-6, atol=1e-6)


def test_pitome() -> None:
    """0, 2, 3 and 5 stand together, and the more energy, the nearer to 1 and 6: the order is 3, 2, 5, 0."""
    of = view(angles(0, 120, 4, 9, 240, 1, 125), layers=2)
    expected = [(0, [0, 5], []), (1, [1], []), (2, [2, 3], []), (4, [4], []), (6, [6], [])]
    assert split("pitome", of, 2) == expected
    assert split("pitome", of, 1) == [(0, [0], []), (1, [1], []), (2, [2, 3], []), *((i, [i], []) for i in (4, 5, 6))]


def test_margin_of_pitome_falls() -> None:
    """A close pair, and three that are 40 degrees apart: these count as near (cos 0.77) in the second block alone."""
    of = view(angles(0, 3, 140, 180, 220), layers=2)
    assert split("pitome", of, 1)[:-3] in ([(0, [0, 1], [])], [(1, [0, 1], [])])
    late = replace(of, layer=1)
    assert split("pitome", late, 1) == [(0, [0], []), (1, [1], []), (2, [2, 3], []), (4, [4], [])]
    assert split("pitome", late, 1, margin=1.8)[-3:] == [(i, [i], []) for i in (2, 3, 4)]


def test_tofu() -> None:
    """0 goes to 3. In the first half 3's row stays; in the second the direction is the mean's, the norm the largest."""
    of = view([[1, 0], [0, 4], [-4, 1], [1, 3]], layers=2)
    assert split("tofu", of, 1) == [(2, [2], []), (1, [1], []), (3, [3], [0])]
    assert split("tofu", replace(of, layer=1), 1) == [(2, [2], []), (1, [1], []), (3, [0, 3], [])]
    mixed = mlerp(replace(of, size=torch.tensor([2.0, 1, 1, 1], dtype=torch.float64)), [0, 1])
    torch.testing.assert_close(mixed, torch.tensor([2.0, 4.0], dtype=torch.float64) / math.sqrt(20) * 4)


def test_mctf() -> None:
    """A: 0, 2, 4; B: 1, 3, 5. First 2 -> 3, then of the B's 1 and 5 the better one to one of the A's 0 and 4."""
    of = view(angles(0, 8, 90, 91, 180, 175))
    assert split("mctf", of, 1) == [(0, [0], []), (4, [4], []), (1, [1], []), (3, [2, 3], []), (5, [5], [])]
    assert split("mctf", of, 2) == [(0, [0], []), (4, [4, 5], []), (1, [1], []), (3, [2, 3], [])]
    assert split("mctf", of, 3) == [(0, [0, 1], []), (3, [2, 3], []), (5, [4, 5], [])]
    received = view(angles(0, 8, 90, 91, 180, 175), importance=[0.01, 0.01, 0.48, 0.48, 0.01, 0.01])
    assert split("mctf", received, 1, info=1)[-1] == (5, [4, 5], [])  # what is attended to stays
    large = replace(of, size=torch.tensor([1.0, 1, 9, 9, 9, 9], dtype=torch.float64))
    assert split("mctf", large, 1, size=1)[2] == (1, [0, 1], [])  # what is large stays
    large = replace(of, size=torch.tensor([1.0, 1, 1, 9, 1, 9], dtype=torch.float64))
    assert split("mctf", large, 1, size=1)[2] == (1, [0, 1], [])  # on either side
    by_stream = replace(of, x=torch.tensor(angles(0, 8, 90, 120, 180, 150), dtype=torch.float64))
    assert split("mctf", by_stream, 1)[2] == (1, [0, 1], [])


PLACES = [divmod(i, 4) for i in range(8)]
"""Two rows of four patches: windows {0, 1, 4, 5} and {2, 3, 6, 7}."""


def test_grid() -> None:
    """Destinations 0 and 2. Of the others 7 is the nearest to one of them, though not to that of its own window."""
    of = view(angles(0, 60, 90, 30, 180, 120, 270, 1), place=PLACES)
    assert split("grid", of, 1) == [(0, [0, 7], []), *((i, [i], []) for i in range(1, 7))]


def test_grid_after_grid_uses_the_place_of_the_representative() -> None:
    """Cells {0, 2} and {1, 3}: their first tokens are the destinations."""
    of = view(angles(0, 50, 100, 150), place=[(3, 1), (0, 0), (2, 0), (0, 1)])
    assert split("grid", of, 1) == [(0, [0], []), (1, [1, 2], []), (3, [3], [])]
    whole, images = plain(prefix=0), photos()
    _, source, _ = reduced(whole, images, "grid", [12, 0, 0, 0])
    for sample in groups(source):  # one destination in each group: a top-left patch
        assert all(len(group & {0, 2, 8, 10}) == 1 for group in sample)


def test_window() -> None:
    """0 is nearest to 7, but not in its window."""
    of = view(angles(0, 60, 90, 30, 180, 120, 270, 1), place=PLACES)
    assert split("tome", of, 1)[-1] == (7, [0, 7], [])
    assert split("window", of, 1)[-1] == (7, [7], [])
    assert split("window", of, 4) == [(1, [0, 1], []), (3, [2, 3], []), (5, [4, 5], []), (7, [6, 7], [])]


def test_window_takes_outside_pairs_last() -> None:
    """0 and 7 are nearest but apart, 2 and 3 far off but in one window, 4 and 6 alone."""
    place = [(0, 0), (0, 2), (4, 4), (5, 5), (9, 8), (5, 0), (6, 6), (1, 2)]
    of = view(angles(0, 60, 90, 180, 240, 120, 270, 1), place=place)
    assert split("window", of, 1)[4] == (3, [2, 3], [])
    assert split("window", of, 2)[-3:] == [(3, [2, 3], []), (5, [5], []), (7, [0, 7], [])]


def test_band() -> None:
    """0 is nearest to 5, but has only 1 at hand; 2 has 1 and 3; 4 has 3 and 5."""
    of = view(angles(0, 60, 90, 100, 180, 1))
    assert split("band", of, 1) == [(0, [0], []), (4, [4], []), (1, [1], []), (3, [2, 3], []), (5, [5], [])]
    assert split("band", of, 3) == [(1, [0, 1], []), (3, [2, 3, 4], []), (5, [5], [])]
    assert split("band", of, 1, k=5)[-1] == (5, [0, 5], [])


def test_saint_vlm() -> None:
    """One after the other: 2, 3, 1. All at once it would be the whole cluster 0, 1, 2."""
    of = view(angles(0, 1, 2, 90, 92))
    assert split("saint_vlm", of, 1) == [(0, [0], []), (1, [1], [2]), (3, [3], []), (4, [4], [])]
    assert split("saint_vlm", of, 3) == [(0, [0], [1, 2]), (4, [4], [3])]


def test_evs() -> None:
    """After a special token three frames of two places. The steps: 0.5, 1, 0.1 and 39 degrees."""
    of = replace(view(angles(200, 0, 50, 0.5, 51, 0.6, 90), 1), keys=torch.eye(7, dtype=torch.float64))
    kept = [(0, [0], []), (1, [1], []), (2, [2], [])]
    assert split("evs", of, 1, frames=3) == [*kept, (3, [3], [5]), (4, [4], []), (6, [6], [])]
    assert split("evs", of, 2, frames=3) == [kept[0], (1, [1], [3, 5]), kept[2], (4, [4], []), (6, [6], [])]
    assert split("evs", of, 9, frames=3) == [kept[0], (1, [1], [3, 5]), (2, [2], [4, 6])]
