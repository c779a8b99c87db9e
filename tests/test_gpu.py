"""On a CUDA device: compiled kernels against the ATen forms, twice the same bits, every mode of torch.compile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.models import Spec, build
from tests.test_kernels import narrowest_choice
from tome_fx import attention, ops, tome_backend
from tome_fx.attention import Row

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it before the first product
OPS = torch.ops.tome
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def triton_kernels() -> None:
    """Registered before use."""
    pytest.importorskip("triton")
    import tome_fx.kernels.gpu  # noqa: F401


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch's deterministic mode: an op that has no such form raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def keys_of(dtype: torch.dtype, tokens: int = 1025) -> Tensor:
    """[4, tokens, 6, 64], not contiguous."""
    return torch.randn(4, tokens, 3, 6, 64, device="cuda").to(dtype)[:, :, 1]


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_match(dtype: torch.dtype, blocked: bool) -> None:
    keys = keys_of(dtype, 257)
    got, want = OPS.match_triton(keys, 60, 1, 0, True, blocked), ops.match_aten(keys, 60, 1, 0)
    torch.testing.assert_close(got[3], want[3])
    if narrowest_choice(keys, 1, 0) > 1e-6:
        for a, b in zip(got[:3], want[:3], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(dtype: torch.dtype, sized: bool, added: bool) -> None:
    """To rounding, and to the bit in a second run."""
    keys = keys_of(dtype)
    x, y = keys.flatten(2), keys.flip(1).flatten(2) if added else None
    index = ops.match_aten(keys, 300, 1, 0)[:3]
    size = torch.randint(1, 9, keys.shape[:2], device="cuda").float() if sized else None
    size_out = OPS.merge_size_triton(size, *index)
    assert torch.equal(size_out, ops.merge_size_aten(size, *index))
    got, again = (OPS.merge_triton(x, y, size, size_out, *index) for _ in range(2))
    assert torch.equal(got, again)
    want = ops.merge_aten(x if y is None else x + y, size, size_out, *index)
    near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(got, want, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens_merge_without_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(2, 1, 70, device="cuda").to(dtype).expand(2, 301, 70)
    assign, keep, moved, _ = OPS.match_triton(x, 150, 1, 0, False, True)
    size = torch.randint(1, 9, (2, 301), device="cuda").float()
    out = OPS.merge_triton(x, None, size, OPS.merge_size_triton(size, assign, keep, moved), assign, keep, moved)
    assert torch.equal(OPS.unmerge(out, assign), x)


def model_on_gpu() -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    model, args = build(Spec(depth=3, mlp="gelu", readout="cls"))
    return model.cuda(), tuple(x.cuda() for x in args)


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_modes_agree(mode: str | None) -> None:
    """CUDA graphs and autotuning: what the ATen forms compute, three calls in a row."""
    model, args = model_on_gpu()
    with torch.no_grad():
        want = torch.compile(model, backend=tome_backend(r=4, inner="eager"))(*args)
        run = torch.compile(model, backend=tome_backend(r=4), mode=mode)
        for _ in range(3):
            torch.testing.assert_close(run(*args), want, rtol=1e-3, atol=1e-3)


def test_two_runs_agree_in_every_bit(deterministic: None) -> None:
    """Under torch's deterministic mode, results and gradients."""
    model, args = model_on_gpu()
    run = torch.compile(model, backend=tome_backend(r=4))
    found = []
    for _ in range(2):
        model.zero_grad()
        out = run(*args)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


KERNELS = {"column": "flash", "efficient": "efficient"}
"""What must run; cuDNN may decline, and the next in line takes over."""


@pytest.mark.parametrize("form", attention.FORMS)
def test_forms_of_attention(form: str) -> None:
    """The mask's result, from the kernel that the form is named after."""
    q, k, v = torch.randn(2, 197, 3, 6, 64, device="cuda", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    bias = torch.randint(1, 9, (2, 1, 1, 197), device="cuda").float().log()
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
    run = torch.compile(lambda q, k, v, b: OPS.attend(q, k, v, b, 0.125, False, form), fullgraph=True)
    torch.testing.assert_close(run(q, k, v, bias).float(), want, rtol=3e-2, atol=3e-2)
    if form in KERNELS:
        with torch.profiler.profile() as profile:
            OPS.attend(q, k, v, bias, 0.125, False, form)
        assert any(f"_{KERNELS[form]}_attention" in event.key for event in profile.key_averages())


def test_a_model_with_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = model_on_gpu()
    with torch.no_grad():
        want = torch.compile(model, backend=tome_backend(r=4))(*args)
        torch._dynamo.reset()
        monkeypatch.setattr(attention, "ROWS", [Row("column")])
        got = torch.compile(model, backend=tome_backend(r=4))(*args)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
