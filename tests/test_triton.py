"""The Triton kernels on a machine without a GPU: interpreted, compiled for one, and as the compiler sees them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.models import Spec, build
from tome_fx import ToMeConfig
from tome_fx.backend import transform
from tome_fx.passes.lower import FORMS, for_gpu

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")

from tome_fx.kernels import gpu  # noqa: E402 - needs triton

OPS = torch.ops.tome
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is about compiled kernels")


@pytest.mark.skipif(
    not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"),
    reason="this torch does not run interpreted kernels through wrap_triton",
)
def test_under_the_interpreter() -> None:
    """All of `triton_laws.py`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_laws.py"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


FLOATS, INDEX = ("x", "y", "out"), ("slot", "keep", "moved", "merged", "assign")
SINGLE = ("unit", "best", "size", "size_out")
KERNELS = {
    "best_partner": (gpu._best_partner, {"BS": 64, "BD": 64, "BK": 16}),
    "merge_index": (gpu._merge_index, {"BN": 64, "BR": 64}),
    "merge_size": (gpu._merge_size, {"SIZED": True, "BG": 64, "BR": 64}),
    "merge": (gpu._merge, {"ADD": True, "SIZED": True, "BR": 16, "BC": 256}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code for sm_80, without atomics, whose order differs from run to run, and without TF32."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = KERNELS[name]
    types = {n: "*bf16" if name == "merge" else "*fp32" for n in FLOATS}
    types |= dict.fromkeys(INDEX, "*i64") | dict.fromkeys(SINGLE, "*fp32") | {"partner": "*i32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=compiler.GPUTarget("cuda", 80, 32))
    assert built.asm["cubin"]
    assert not re.search(r"\b(atom|red)\.|tf32", built.asm["ptx"])


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing asks for the GPU's kind to find out what a kernel writes."""
    driver = SimpleNamespace(get_current_target=lambda: compiler.GPUTarget("cuda", 80, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


class Inner:
    """Traces as Inductor does, forward and backward, keeps the graphs and runs none: kernels need a GPU."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
            self.graphs.append(gm)
            (output,) = gm.graph.find_nodes(op="output")
            vals = [None if n is None else n.meta["val"] for n in output.args[0]]
            return make_boxed_func(
                lambda *_: [
                    torch.zeros([int(s) for s in v.shape], dtype=v.dtype)
                    if isinstance(v, Tensor)
                    else None
                    if v is None
                    else int(v)
                    for v in vals
                ]
            )

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, inputs)

    def kernels(self) -> Iterator[tuple[str, list[str]]]:
        """(name, arguments that are written) of each kernel call."""
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

        for gm in self.graphs:
            for node in gm.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                yield kernel.fn.__name__, sorted(node.kwargs["tensors_to_clone"])


WRITES = {
    "_best_partner": ["best", "partner"],
    "_merge_index": ["assign", "keep"],
    "_merge_size": ["out"],
    "_merge": ["out"],
}


@pytest.mark.parametrize("train", [False, True])
def test_the_compiler_sees_every_kernel(train: bool, target: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all passes and AOTAutograd: no opaque call is left, and a kernel writes nothing but its results."""
    monkeypatch.setitem(FORMS, "cpu", for_gpu)
    monkeypatch.setattr(sys.modules["tome_fx.passes.lower"], "BLOCKED", 1)
    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    inner = Inner()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        rewritten, _ = transform(gm, inputs, ToMeConfig(r=4, drop_unread=False))
        assert rewritten is not None
        return inner(rewritten, inputs)

    with torch.set_grad_enabled(train):
        out = torch.compile(model, backend=backend)(*args)
        if train:
            out.sum().backward()
    seen = list(inner.kernels())
    assert sorted(name for name, _ in seen) == sorted(2 * list(WRITES))
    assert all(WRITES[name] == written for name, written in seen)
    assert not any("tome" in str(n.target) for gm in inner.graphs for n in gm.graph.nodes)
    assert len(inner.graphs) == 1 + train


def test_symbolic_sizes(target: None) -> None:
    """Batch, tokens and width without a guard on any: one graph serves other lengths."""
    inner = Inner()

    def step(x: Tensor, keys: Tensor) -> Tensor:
        n = x.shape[1]
        assign, keep, moved, _ = OPS.match_triton(keys, n // 4, 1, 0, True, True)
        return OPS.merge_triton(x, None, None, OPS.merge_size_triton(None, assign, keep, moved), assign, keep, moved)

    run = torch.compile(step, backend=inner, fullgraph=True)
    for batch, tokens in ((2, 40), (3, 52)):
        x, keys = torch.randn(batch, tokens, tokens), torch.randn(batch, tokens, 2, 4)
        for t, dim in ((x, 0), (x, 1), (x, 2), (keys, 0), (keys, 1)):
            torch._dynamo.mark_dynamic(t, dim)
        run(x, keys)
    assert len(inner.graphs) == 1
    (output,) = inner.graphs[0].graph.find_nodes(op="output")
    assert all(isinstance(s, torch.SymInt) for s in output.args[0][0].meta["val"].shape)
