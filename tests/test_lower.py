"""lower: the same values in another form."""

from __future__ import annotations

import pytest
import torch

from tests.models import Spec, build
from tests.recording import RecordingBackend, record
from tests.strategies import thinned
from tome_fx import ToMeConfig, tome_backend
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


CALLED = [(True, torch.float32), (False, torch.float64), (False, torch.bfloat16)]
CALLED += [(False, torch.float32), (True, torch.bfloat16), (True, torch.float64)]


@pytest.mark.parametrize(("train", "dtype"), thinned(CALLED, 3))
def test_compiled_code_calls_the_kernels(train: bool, dtype: torch.dtype) -> None:
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


@pytest.mark.slow
def test_compiled_branches_call_the_kernels_back_and_forth() -> None:
    """Unmerging is a call too, and so are the gradients of merging and unmerging; results are those of eager ops."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    model, (x,) = build(Spec(depth=2, readout="tokens"))
    backends = [tome_backend(r=4, placement="branch", inner=inner) for inner in ("inductor", "eager")]
    found = []
    for backend in backends:
        torch._dynamo.reset()
        held = x.clone().requires_grad_()
        fast = torch.compile(model, backend=backend)
        with fresh_cache():
            _, codes = run_and_get_code(lambda fast=fast, held=held: fast(held).square().sum().backward())
        found.append((held.grad, "".join(codes)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for name in ("match_size", "merge", "unmerge", "merge_backward", "unmerge_backward"):
        assert f"torch.ops.tome_cpu.{name}.default(" in found[0][1], name
    assert not found[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_kernels_are_called_for_the_dtypes_they_know(dtype: torch.dtype) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(1, 4, 2).to(dtype)
    merge = graph.call_function(torch.ops.tome.merge.default, (x, None, *map(graph.placeholder, "sakm")))
    graph.output(merge)
    assert call_kernels(graph) == (dtype in cpu.DTYPES)


@pytest.mark.parametrize(("rows", "dtype", "weight", "beta", "ours"), [
    (40, torch.bfloat16, torch.randn(6, 8).t(), 1, True),
    (40, torch.float32, torch.randn(6, 8).t(), 1, False),
    (40, torch.bfloat16, torch.randn(8, 6), 1, False),
    (40, torch.bfloat16, torch.randn(6, 11).bfloat16()[:, :8].t(), 1, False),  # rows an odd number of elements apart
    (40, torch.bfloat16, torch.randn(6, 8).t(), 2, False),
    (4, torch.bfloat16, torch.randn(6, 8).t(), 1, False),  # to bring the weights into order takes longer
])  # fmt: skip
@pytest.mark.parametrize("wide", [6, 1])
@pytest.mark.parametrize("here", [True, False])
def test_products_that_are_ours(
    rows: int, dtype: torch.dtype, weight: torch.Tensor, beta: int, ours: bool, wide: int, here: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Those in bfloat16 of rows with the transpose of dense weights, on processors where they are as fast."""
    monkeypatch.setattr(cpu, "has_products", lambda: here)
    graph = torch.fx.Graph()
    held = {"bias": torch.randn(wide).to(dtype), "x": torch.randn(rows, 8).to(dtype), "weight": weight.to(dtype)}
    nodes = [graph.placeholder(name) for name in held]
    for node, value in zip(nodes, held.values(), strict=True):
        node.meta["val"] = value
    kwargs = {} if beta == 1 else {"beta": beta}
    graph.output(graph.call_function(torch.ops.aten.addmm.default, tuple(nodes), kwargs))
    assert call_kernels(graph) == int(ours and here and wide == 6)
    got = torch.fx.GraphModule({}, graph)(*held.values())
    torch.testing.assert_close(got, torch.addmm(*held.values(), beta=beta), rtol=2**-7, atol=2**-7)


def test_unmerging_is_a_call_in_training_alone() -> None:
    model, args = build(Spec(depth=2, readout="tokens"))
    for train, name in ((True, "tome.unmerge"), (False, "tome.unmerge_aten")):
        torch._dynamo.reset()
        backend = RecordingBackend(ToMeConfig(r=4, placement="branch"))
        with torch.set_grad_enabled(train):
            torch.compile(model, backend=backend)(*args)
        assert {op: count for op, count in backend.ops().items() if "unmerge" in op} == {name: 4}
