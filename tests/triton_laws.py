"""The Triton kernels under Triton's interpreter, against the ATen forms.

`test_triton.py` runs this file in a process of its own, because TRITON_INTERPRET must be set before triton is imported.
The interpreter cuts float32 off to bfloat16 where a GPU rounds, and it is slow: shapes are small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import Spec, build
from tests.recording import record
from tests.test_kernels import narrowest_choice
from tome_fx import ops
from tome_fx.kernels import gpu  # noqa: F401 - registers the operators
from tome_fx.passes.lower import BLOCKED, FORMS, for_gpu

OPS = torch.ops.tome
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
few = settings(max_examples=10)


def keys_of(n: int, heads: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[2, n, heads, width], not contiguous."""
    x = torch.randn(2, n, 3, heads, width, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, :, 1]


@st.composite
def cases(draw: st.DrawFn, most: int = 40) -> tuple[Tensor, int, int, int]:
    """(keys [2, N, h, d], r, prefix, suffix)."""
    prefix, suffix, body = draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.integers(2, most))
    heads, width, dtype = draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 17, 70])), draw(st.sampled_from(DTYPES))
    keys = keys_of(prefix + body + suffix, heads, width, dtype, draw(st.integers(0, 99)))
    return keys, draw(st.integers(0, body // 2)), prefix, suffix


@few
@given(cases(), st.booleans())
@example((keys_of(300, 2, 20, torch.float32, 0), 100, 3, 2), True)  # several blocks of sources, destinations and places
def test_match(case: tuple[Tensor, int, int, int], blocked: bool) -> None:
    """The same indices and similarities as the ATen form wherever no two candidates are equal."""
    keys, r, prefix, suffix = case
    got, want = OPS.match_triton(keys, r, prefix, suffix, True, blocked), ops.match_aten(keys, r, prefix, suffix)
    torch.testing.assert_close(got[3], want[3])
    if narrowest_choice(keys, prefix, suffix) > 1e-5:
        for a, b in zip(got[:3], want[:3], strict=True):
            assert torch.equal(a, b)


def test_samples_and_shared_heads() -> None:
    """[batch, frame, N, d] gives what each frame gives alone."""
    keys = torch.randn(2, 3, 20, 8)
    together = OPS.match_triton(keys, 5, 1, 0, False, True)
    for b in range(2):
        alone = OPS.match_triton(keys[b], 5, 1, 0, False, True)
        for a, c in zip(together, alone, strict=True):
            assert torch.equal(a[b], c)


def test_equal_destinations_take_the_first() -> None:
    """Across the blocks of a row too, as torch.max does."""
    keys = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(300, 8)
    unit = ops.directions(keys[None, :, None], 0, 0)
    best, partner = OPS.best_partner(unit, 0)
    assert (partner == 0).all()
    torch.testing.assert_close(best, torch.ones_like(best))


def test_nan_and_infinity_stay_where_they_are() -> None:
    """A model that overflowed still merges something, and no index leaves its range."""
    keys = torch.randn(2, 30, 2, 8)
    keys[0, 5], keys[1] = torch.nan, torch.nan
    assign, keep, moved, _ = OPS.match_triton(keys, 9, 1, 0, True, True)
    for b in range(2):
        assert sorted(keep[b].tolist() + moved[b].tolist()) == list(range(30))
    x, size_out = torch.randn(2, 30, 4), OPS.merge_size_triton(None, assign, keep, moved)
    x[:, 7] = torch.inf
    hit = assign[:, 7]
    out = OPS.merge_triton(x, None, None, size_out, assign, keep, moved)
    for b in range(2):
        assert [g for g in range(21) if not out[b, g].isfinite().all()] == [hit[b].item()]


@few
@given(cases(most=24), st.booleans(), st.booleans())
def test_merge(case: tuple[Tensor, int, int, int], sized: bool, added: bool) -> None:
    """Sizes are the same, means too but for rounding; rows that nothing joins are copied bit for bit; twice is once."""
    keys, r, prefix, suffix = case
    index = ops.match_aten(keys, r, prefix, suffix)[:3]
    size = torch.randint(1, 9, keys.shape[:2]).float() if sized else None
    size_out = OPS.merge_size_triton(size, *index)
    assert torch.equal(size_out, ops.merge_size_aten(size, *index))
    y = keys.flip(-1) if added else None
    out = OPS.merge_triton(keys, y, size, size_out, *index)
    whole = keys if y is None else keys + y
    want = ops.merge_aten(whole, size, size_out, *index)
    assert out.dtype == keys.dtype
    torch.testing.assert_close(out, want, rtol=NEAR[keys.dtype], atol=NEAR[keys.dtype])
    if added and keys.dtype is torch.bfloat16:
        return  # the interpreter does not round
    assign, keep, moved = index
    for b in range(2):
        alone = sorted(set(range(keep.shape[1])) - set(assign[b, moved[b]].tolist()))
        assert torch.equal(out[b, alone], whole[b, keep[b, alone]])
    assert torch.equal(out, OPS.merge_triton(keys, y, size, size_out, *index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens_merge_without_rounding(dtype: torch.dtype) -> None:
    """The lossless law: the merged stream, given back, is the stream. All of them join one row, over several blocks."""
    x = torch.randn(2, 1, 7).to(dtype).expand(2, 45, 7)
    assign, keep, moved, _ = OPS.match_triton(x, 22, 1, 0, False, True)
    size = torch.randint(1, 9, (2, 45)).float()
    size_out = OPS.merge_size_triton(size, assign, keep, moved)
    out = OPS.merge_triton(x, None, size, size_out, assign, keep, moved)
    assert torch.equal(OPS.unmerge(out, assign), x)


def test_merge_copies_zeros_with_their_sign() -> None:
    x = torch.full((1, 12, 3), -0.0)
    assign, keep, moved, _ = OPS.match_triton(torch.randn(1, 12, 3), 1, 0, 0, False, True)
    out = OPS.merge_triton(x, None, None, OPS.merge_size_triton(None, assign, keep, moved), assign, keep, moved)
    assert out.signbit().sum() >= 10 * 3


@pytest.mark.parametrize("added", [False, True])
def test_gradients(added: bool) -> None:
    """Those of the ATen form."""
    index = ops.match_aten(keys_of(21, 1, 8, torch.float32, 0), 6, 1, 0)[:3]
    size = torch.randint(1, 9, (2, 21)).float()
    size_out = ops.merge_size_aten(size, *index)
    found = []
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: OPS.merge_triton(x, y if added else None, size, size_out, *index),
        lambda x, y: ops.merge_aten(x + y if added else x, size, size_out, *index),
    ]
    for form in forms:
        x, y = (torch.randn(2, 21, 5, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (1, 2))
        (form(x, y) * torch.arange(150.0).reshape(2, 15, 5)).sum().backward()
        found.append((x.grad, y.grad))
    torch.testing.assert_close(*found)


def test_a_lowered_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of CUDA, with the device's name changed, in both kinds of matching."""
    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    want, _ = record(model, args, r=4, drop_unread=False)
    monkeypatch.setitem(FORMS, "cpu", for_gpu)
    for least in (1, BLOCKED):
        monkeypatch.setattr(sys.modules["tome_fx.passes.lower"], "BLOCKED", least)
        got, seen = record(model, args, r=4, drop_unread=False)
        torch.testing.assert_close(got, want)
        ops_seen = {name: count for name, count in seen.ops().items() if name.startswith("tome.")}
        assert ops_seen == {"tome.match_triton": 2, "tome.merge_triton": 2, "tome.merge_size_triton": 2}
