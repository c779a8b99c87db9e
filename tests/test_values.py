"""values: what a mask says by its value, whatever numbers it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tome_fx.passes.analysis.values import ruled_out, tells_apart

N = 12
FREE = torch.ones(N, dtype=torch.bool)
SEEN = torch.ones(N, N, dtype=torch.bool).tril()
PLACE = torch.arange(N)


def levels(low: float, high: float = 0.0) -> Tensor:
    return torch.where(SEEN, high, low)


MASKS = {
    "-inf": levels(-torch.inf), "-1e9": levels(-1e9), "-1e4": levels(-1e4), "-100, two levels": levels(-100.0),
    "-100 beside 1": levels(-100.0, 1.0), "lowest": levels(torch.finfo(torch.float32).min),
    "half": levels(-20.0).half(), "log of 0": SEEN.float().log(), "subtracted": -levels(-1e9),
    "subtracted, large": -levels(-1e10),
    "table and mask": levels(-1e9) + torch.randn(N, N), "bool": SEEN, "bool, filled": ~SEEN,
    "all but itself": torch.where(PLACE[:, None] == PLACE, -torch.inf, 0.0),
}  # fmt: skip
TABLES = {
    "random": torch.randn(N, N), "distances": -0.5 * (PLACE[:, None] - PLACE).abs(), "zeros": torch.zeros(N, N),
    "wide": torch.linspace(-60.0, 0.0, N * N).view(N, N),
}  # fmt: skip
KEYS = torch.where(PLACE < 7, 0.0, -torch.inf).expand(N, N)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_pairs(name: str) -> None:
    assert tells_apart(ruled_out(MASKS[name]), (FREE, FREE))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_scores(name: str) -> None:
    assert not ruled_out(TABLES[name]).any() and not tells_apart(ruled_out(TABLES[name]), (FREE, FREE))


def test_a_mask_of_keys_says_the_same_to_all() -> None:
    assert ruled_out(KEYS).any() and not tells_apart(ruled_out(KEYS), (FREE, FREE))


def test_tokens_that_never_merge_may_be_told_apart() -> None:
    unseen = torch.zeros(N, N)
    unseen[1:, 0] = -torch.inf  # patches do not see the class token
    free = PLACE > 0
    assert not tells_apart(ruled_out(unseen), (free, free))
    assert tells_apart(ruled_out(unseen), (FREE, FREE))
    unseen[0, 5:] = -torch.inf  # which sees some patches and not others
    assert tells_apart(ruled_out(unseen), (free, free))


def test_each_head_and_window_counts() -> None:
    one = torch.zeros(3, 1, N, N)
    one[2] = levels(-1e9)
    assert tells_apart(ruled_out(one), (FREE, FREE))
