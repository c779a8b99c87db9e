"""Schedules: what each block merges away."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import reference
from tome_fx.schedule import gathered, merged_away, to_multiple, tokens_per_block


@pytest.mark.parametrize(
    ("r", "blocks", "want"),
    [
        (16, 3, [16, 16, 16]),
        (0, 2, [0, 0]),
        ((16, -1), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        ((16, 1), 12, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]),
        ((8, 0.5), 3, [4, 8, 12]),
        ((8, 0), 3, [8, 8, 8]),
        ((8, -1), 1, [16]),
        ([5, 0, 2], 3, [5, 0, 2]),
        ([5], 3, [5, 0, 0]),
        (0.25, 2, [0.25, 0.25]),
    ],
    ids=str,
)
def test_forms(r: Any, blocks: int, want: list[Any]) -> None:
    assert tokens_per_block(r, blocks) == want


def test_list_longer_than_the_blocks() -> None:
    with pytest.raises(ValueError, match=r"4 blocks.*3"):
        tokens_per_block([1, 1, 1, 1], 3)


@given(st.integers(0, 64), st.floats(-1, 1, width=32), st.integers(2, 32))
def test_linear_agrees_with_the_oracle_and_keeps_its_sum(r: int, inflection: float, blocks: int) -> None:
    """The mean stays r but for truncation, none is negative."""
    got = tokens_per_block((r, inflection), blocks)
    assert all(abs(a - b) <= 1 for a, b in zip(got, reference.schedule((r, inflection), blocks), strict=True))
    assert all(isinstance(n, int) and n >= 0 for n in got)
    assert r * blocks - blocks <= sum(got) <= r * blocks


@given(st.integers(0, 300), st.integers(0, 400), st.integers(0, 6))
def test_cap(want: int, tokens: int, protected: int) -> None:
    """min(r, (N - protected) // 2), never negative."""
    assert merged_away(want, tokens, protected) == max(0, min(want, (tokens - protected) // 2))


@given(st.floats(0, 0.99), st.integers(8, 400), st.integers(0, 6))
def test_share(share: float, tokens: int, protected: int) -> None:
    """A share of the unprotected tokens, half of them at most."""
    got = merged_away(share, tokens, protected)
    assert got <= (tokens - protected) // 2
    assert got == (tokens - protected) // 2 or abs(got - share * (tokens - protected)) < 1


@pytest.mark.parametrize(
    ("wanted", "every", "want"),
    [
        ([8, 8, 8, 8], 1, [8, 8, 8, 8]),
        ([8, 8, 8, 8, 8], 2, [0, 16, 0, 16, 8]),
        ([5, 0, 2], 3, [0, 0, 7]),
        ([5, 0, 2], 9, [0, 0, 7]),
        ([0.5, 0.5, 0.5], 2, [0, 0.75, 0.5]),
        ([0.0, 0.0], 2, [0, 0]),
        ([], 2, []),
    ],
    ids=str,
)
def test_gathered(wanted: list[Any], every: int, want: list[Any]) -> None:
    """Every k-th block merges what the k blocks up to it would have; shares compound."""
    assert gathered(wanted, every) == want


@given(st.integers(0, 64), st.integers(1, 400), st.sampled_from([1, 8, 16, 32]))
def test_to_multiple(r: int, tokens: int, multiple: int) -> None:
    """As many as go without passing r or leaving something else than a multiple."""
    got = to_multiple(r, tokens, multiple)
    assert 0 <= got <= r
    assert got == 0 or (tokens - got) % multiple == 0
    assert not any((tokens - more) % multiple == 0 and tokens > more for more in range(got + 1, r + 1))
