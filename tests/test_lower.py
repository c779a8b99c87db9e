"""lower: the same values in another form."""

from __future__ import annotations

import pytest
import torch

from tests.models import Spec, build
from tests.recording import record
from tome_fx import tome_backend
from tome_fx.kernels import cpu
from tome_fx.passes.lower import FORMS, call_kernels, fuse, spell_out

CPU_FORM = {"tome.match_size": 2, "tome.merge_add": 2}
READABLE = {"tome.match": 2, "tome.merge": 2, "tome.merge_size": 2, "tome.log_size": 1}
SPELLED_OUT = {"tome.match": 2, "tome.merge_aten": 2, "tome.merge_size_aten": 2, "aten.log": 1}
CASES = {"cpu": (fuse, CPU_FORM), "none": (None, READABLE), "other": (spell_out, SPELLED_OUT)}


@pytest.mark.parametrize("form", CASES)
def test_every_form_computes_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    want, _ = record(model, args, r=4, drop_unread=False)
    chosen, expected = CASES[form]
    monkeypatch.setitem(FORMS, "cpu", chosen)
    got, seen = record(model, args, r=4, drop_unread=False)
    torch.testing.assert_close(got, want)
    ops = {name: count for name, count in seen.ops().items() if name.startswith("tome.") or name == "aten.log"}
    assert ops == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("train", [False, True])
def test_compiled_code_calls_the_kernels(dtype: torch.dtype, train: bool) -> None:
    """Inductor's code reaches the C++ operators without Python between, where they know the dtype."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    model, args = model.to(dtype), tuple(x.to(dtype) for x in args)
    fast = torch.compile(model, backend=tome_backend(r=4))
    with fresh_cache(), torch.set_grad_enabled(train):
        _, (code, *_) = run_and_get_code(fast, *args)
    for name in CPU_FORM:
        kernel = name.replace("tome.", "tome_cpu.")
        called = [op for op in (name, kernel) if f"torch.ops.{op}.default(" in code]
        assert called == [name if dtype is torch.float64 else kernel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_kernels_are_called_for_the_dtypes_they_know(dtype: torch.dtype) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(1, 4, 2).to(dtype)
    merge = graph.call_function(torch.ops.tome.merge.default, (x, None, *map(graph.placeholder, "sakm")))
    graph.output(merge)
    assert call_kernels(graph) == (dtype in cpu.DTYPES)
