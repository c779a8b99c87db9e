"""tome::match, merge, merge_size, merge_bias, unmerge alone: against loops, fake tensors, gradients, opcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tome_fx  # noqa: F401  (registers the ops)
from tests import reference

OPS = torch.ops.tome


def matched(n: int = 17, r: int = 6, prefix: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(assign, keep, moved) of a random match of 2 samples."""
    keys = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(seed))
    return OPS.match(keys, r, prefix, 0)[:3]


def groups_of(assign: Tensor) -> list[reference.Groups]:
    """assign [B, N] -> for each sample, for each new token, the old positions."""
    out = []
    for row in assign.tolist():
        out.append([[i for i, g in enumerate(row) if g == new] for new in range(max(row) + 1)])
    return out


@given(
    st.integers(4, 40).flatmap(
        lambda n: st.tuples(
            st.just(n), st.integers(0, min(n - 4, 5)), st.integers(0, min(n - 4, 3)), st.integers(0, 999)
        )
    )
)
def test_match_invariants(case: tuple[int, int, int, int]) -> None:
    """Onto, protected tokens alone and in place, keep and moved a partition, similarity sorted and true."""
    n, prefix, suffix, seed = case
    keys = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(seed))
    most = (n - prefix - suffix) // 2
    for r in {0, min(1, most), most}:
        assign, keep, moved, similarity = OPS.match(keys, r, prefix, suffix)
        unit = torch.nn.functional.normalize(keys, dim=-1)
        for b in range(2):
            assert sorted(set(assign[b].tolist())) == list(range(n - r))
            assert sorted(keep[b].tolist() + moved[b].tolist()) == list(range(n))
            assert assign[b, keep[b]].tolist() == list(range(n - r))
            assert assign[b, :prefix].tolist() == list(range(prefix))
            assert assign[b, n - suffix :].tolist() == list(range(n - r - suffix, n - r))
            sizes = assign[b].bincount()
            assert (sizes[:prefix] == 1).all()
            assert (sizes[n - r - suffix :] == 1).all()
            representative = keep[b, assign[b, moved[b]]]
            torch.testing.assert_close(similarity[b], (unit[b, moved[b]] * unit[b, representative]).sum(-1))
            assert (similarity[b].diff() <= 1e-6).all()


def test_match_ignores_length_and_carries_no_gradient() -> None:
    """Cosine, not dot product; the choice is not differentiated."""
    keys = torch.randn(1, 12, 4, requires_grad=True)
    scaled = keys * torch.rand(1, 12, 1).add(0.1)
    for a, b in zip(OPS.match(keys, 4, 1, 0)[:3], OPS.match(scaled, 4, 1, 0)[:3], strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_match_runs_in_float32_under_autocast() -> None:
    """bfloat16 rounding must not choose the partners of float32 keys."""
    keys = torch.randn(2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = OPS.match(keys, 10, 1, 0)
    for a, b in zip(inside, OPS.match(keys, 10, 1, 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rest", [(), (8,), (3, 4)], ids=str)
def test_merge_is_the_weighted_mean(rest: tuple[int, ...]) -> None:
    """Twice in a row, against the loops of the oracle, for values with any trailing axes."""
    x, size = torch.randn(2, 17, *rest), None
    want, want_size = x.flatten(2) if rest else x[..., None], torch.ones(2, 17)
    for step, r in enumerate((6, 4)):
        assign, keep, moved = matched(x.shape[1], r, seed=step)
        size_out = OPS.merge_size(size, assign, keep, moved)
        want, want_size = reference.merge(want, want_size, groups_of(assign))
        x, size = OPS.merge(x, size, size_out, assign, keep, moved), size_out
        torch.testing.assert_close(size, want_size)
        torch.testing.assert_close(x.reshape(want.shape), want)
    assert size is not None
    assert size.dtype == torch.float32
    assert size.sum(1).tolist() == [17.0, 17.0]


def test_sample_axes_are_kept_apart() -> None:
    """[batch, frame, N]: each frame merges on its own."""
    keys = torch.randn(2, 3, 10, 4)
    together = OPS.match(keys, 3, 0, 0)
    for b in range(2):
        for t in range(3):
            alone = OPS.match(keys[b, t][None], 3, 0, 0)
            for a, c in zip(together, alone, strict=True):
                assert torch.equal(a[b, t], c[0])
    assign, keep, moved, _ = together
    out = OPS.merge(keys, None, OPS.merge_size(None, assign, keep, moved), assign, keep, moved)
    assert out.shape == (2, 3, 7, 4)


def test_merge_keeps_the_dtype_and_sums_in_float32() -> None:
    """1000 equal bfloat16 values: a bfloat16 sum would stop at 256."""
    x = torch.full((1, 2001, 1), 1.001, dtype=torch.bfloat16)
    assign, keep, moved = OPS.match(torch.ones(1, 2001, 4), 1000, 1, 0)[:3]
    out = OPS.merge(x, None, OPS.merge_size(None, assign, keep, moved), assign, keep, moved)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.unique(), x.unique())


def bias_reference(bias: Tensor, size: Tensor, assign: Tensor) -> Tensor:
    """log(sum(size * exp(bias)) / sum(size)) of each group, one group at a time, in float64."""
    rows = []
    for b, groups in enumerate(groups_of(assign)):
        mean = [(bias[b, g].double() + size[b, g].double().log()).logsumexp(0) - size[b, g].sum().log() for g in groups]
        rows.append(torch.stack(mean))
    return torch.stack(rows).float()


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_merge_bias(spread: float) -> None:
    """Log-mean-exp for any spread of the scores: each group has its own maximum."""
    bias = torch.randn(2, 17) * spread
    bias[0, 3:9] = -math.inf
    bias[1, 2] = torch.finfo(torch.float32).min
    size = torch.randint(1, 5, (2, 17)).float()
    assign, keep, moved = matched()
    out = OPS.merge_bias(bias, size, OPS.merge_size(size, assign, keep, moved), assign, keep, moved)
    want = bias_reference(bias, size, assign)
    lowest = torch.finfo(torch.float32).min / 2  # as good as -inf to a softmax
    torch.testing.assert_close(out.clamp_min(lowest), want.clamp_min(lowest), rtol=1e-5, atol=1e-5)


def test_merge_bias_gradient_is_finite_where_all_is_masked() -> None:
    """A learnt bias with -inf on top: softmax gives masked keys a gradient of zero, and so must a masked group."""
    learnt = torch.randn(2, 17, requires_grad=True)
    assign, keep, moved = matched()
    masked = learnt.masked_fill(assign == assign[:, :1] + 3, -math.inf)
    merged = OPS.merge_bias(masked, None, OPS.merge_size(None, assign, keep, moved), assign, keep, moved)
    (merged.softmax(-1) * torch.arange(11.0)).sum().backward()
    assert learnt.grad is not None
    assert learnt.grad.isfinite().all()


def test_merge_bias_gradient() -> None:
    """The written derivative is that of the form spelled out."""
    assign, keep, moved = matched()
    size = torch.randint(1, 4, (2, 17)).float()
    index = size, OPS.merge_size(size, assign, keep, moved), assign, keep, moved
    found = []
    for op in (OPS.merge_bias, OPS.merge_bias_aten):
        x = torch.randn(2, 17, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (op(x, *index) * torch.arange(66.0).reshape(2, 11, 3)).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_unmerge_undoes_the_merge_of_equal_tokens() -> None:
    """x -> merge -> unmerge is x when groups are equal, and two merges compose to one gather."""
    base = torch.randn(2, 3, 5)
    which = torch.randint(0, 3, (2, 30))
    x = torch.stack([base[b, which[b]] for b in range(2)])
    a1, keep1, moved1, s1 = OPS.match(x, 6, 1, 0)
    size1 = OPS.merge_size(None, a1, keep1, moved1)
    y = OPS.merge(x, None, size1, a1, keep1, moved1)
    a2, keep2, moved2, s2 = OPS.match(y, 4, 1, 0)
    assert min(s1.min(), s2.min()) > 1 - 1e-5
    z = OPS.merge(y, size1, OPS.merge_size(size1, a2, keep2, moved2), a2, keep2, moved2)
    torch.testing.assert_close(OPS.unmerge(y, a1), x)
    torch.testing.assert_close(OPS.unmerge(z, OPS.unmerge(a2, a1)), x)


def test_gradients() -> None:
    """merge and unmerge in float64 against finite differences, and the gradients of their gradients."""
    assign, keep, moved = matched()
    size = torch.randint(1, 4, (2, 17)).float()
    size_out = OPS.merge_size(size, assign, keep, moved)
    x = torch.randn(2, 17, 3, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda t: OPS.merge(t, size, size_out, assign, keep, moved), x)
        assert check(lambda t: OPS.unmerge(t[:, :11], assign), x)


def test_operators_are_good_citizens() -> None:
    """opcheck: schema, fake tensor, autograd registration, dynamic shapes."""
    torch.library.opcheck(OPS.match.default, (torch.randn(2, 17, 8), 6, 1, 0))
    x, index = torch.randn(2, 11, 3, requires_grad=True), matched()
    size_out = OPS.merge_size(None, *index)
    torch.library.opcheck(OPS.unmerge.default, (x, index[0]))
    torch.library.opcheck(OPS.unmerge_backward.default, (torch.randn(2, 17, 3, requires_grad=True), index[0], 11))
    torch.library.opcheck(OPS.merge_backward.default, (x, None, size_out, *index))
