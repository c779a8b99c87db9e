"""The axis algebra: unify and regroup, on random factorisations and on the awkward cases."""

from __future__ import annotations

from math import prod

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from tome_fx.passes.algebra.axes import Atom, fresh, leaves, locate, quotient, regroup, same, size_of, unify

FACTORS = st.lists(st.integers(2, 5), min_size=1, max_size=4)


def dim(*sizes: int) -> tuple[Atom, ...]:
    return tuple(Atom(size) for size in sizes)


@given(FACTORS, st.data())
def test_regroup_there_and_back(sizes: list[int], data: st.DataObject) -> None:
    """Any view of a product of atoms and back again holds the same leaves in the same order."""
    dims = tuple((atom,) for atom in dim(*sizes))
    flat = regroup(dims, [prod(sizes)])
    assert flat is not None
    cut = data.draw(st.integers(0, len(sizes)))
    shape = [prod(sizes[:cut]), prod(sizes[cut:])]
    halves = regroup(flat, shape)
    assert halves is not None
    assert [size_of(leaves(d)) for d in halves] == shape
    assert [x for d in halves for x in leaves(d)] == [x for d in dims for x in leaves(d)]


@given(FACTORS)
def test_unify_makes_dims_one(sizes: list[int]) -> None:
    """A dim of factors and an uncut dim of the same size have the same leaves afterwards."""
    a, b = dim(*sizes), dim(prod(sizes))
    assert unify(a, b)
    assert leaves(a) == leaves(b)
    assert unify(b, a)


def test_unify_refines_both_sides() -> None:
    """[4][3] against [2][6]: the common cut is [2][2][3]."""
    a, b = dim(4, 3), dim(2, 6)
    assert unify(a, b)
    assert [x.size for x in leaves(a)] == [2, 2, 3]
    assert leaves(a) == leaves(b)


def test_windows_against_halves_have_no_common_cut() -> None:
    """Swin: 56 = 8 * 7 against 28 * 2 is a boundary, not a wrong answer."""
    assert not unify(dim(8, 7), dim(28, 2))


def test_identity_is_never_by_size() -> None:
    """Batch and tokens of equal length stay two axes."""
    batch, tokens = dim(8), dim(8)
    rows = regroup((batch, tokens), [64])
    assert rows is not None
    again = regroup(rows, [8, 8])
    assert again is not None
    assert leaves(again[0]) == leaves(batch)
    assert leaves(again[1]) == leaves(tokens)
    assert leaves(batch) != leaves(tokens)


def test_a_late_cut_is_seen_everywhere() -> None:
    """Rows that turn out to be batch * tokens are so in every value that holds them."""
    rows = dim(24)
    before = rows
    assert regroup((rows,), [2, 12]) is not None
    assert [x.size for x in leaves(before)] == [2, 12]


def test_size_one_is_the_empty_product() -> None:
    assert fresh(1) == ()
    assert regroup((dim(6), ()), [1, 6, 1]) is not None


def test_regroup_gives_up_on_ragged_cuts() -> None:
    assert regroup((dim(7), dim(3)), [3, 7]) is None


def test_symbols_need_no_guard() -> None:
    """s * 197 rows into [s, 197]; (h // 16) * (w // 16) tokens into a grid."""
    s, h, w = (sympy.Symbol(x, integer=True, positive=True) for x in "shw")
    rows = (Atom(197 * s),)
    halves = regroup((rows,), [s, 197])
    assert halves is not None
    assert same(size_of(leaves(halves[0])), s)
    high, wide = sympy.floor(h / 16), sympy.floor(w / 16)
    assert regroup(((Atom(sympy.expand(high * wide)),),), [high, wide]) is not None
    assert quotient(s, 2) is None
    assert quotient(2 * s + 2, 27) is None  # a sum of fractions
    assert quotient(2 * s + 2, s + 1) == 2


@pytest.mark.parametrize(("part", "want"), [(slice(0, 2), [(0, 0)]), (slice(1, 2), [(0, 1)]), (slice(0, 0), [])])
def test_locate(part: slice, want: list[tuple[int, int]]) -> None:
    atoms = dim(2, 3, 4)
    assert locate(atoms[part], ((atoms[0], atoms[1]), (atoms[2],))) == want
