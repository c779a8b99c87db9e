"""A merged model that leaves Python: plain ATen, the same merges, any batch, other runtimes, processes without us."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import cpp_extension

import tome_fx
from tests.library import CASES as CASES_OF_LIBRARIES
from tests.models import Spec, build, redraw
from tests.palette import distance, run
from tests.strategies import thinned
from tests.test_explain import Block, D, N, Stack, tokens
from tests.test_plan import tables
from tome_fx import runtimes
from tome_fx.export import write
from tome_fx.passes import portable

R = 6


class Classed(Stack):
    """A class token and registers between the others; read at the class token."""

    def __init__(self, registers: int = 0, depth: int = 3) -> None:
        super().__init__(depth=depth)
        self.cls, self.registers = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, registers, D))

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        first = [self.cls.expand(len(x), -1, -1), x[:, :4], self.registers.expand(len(x), -1, -1), x[:, 4:]]
        return super().forward(torch.cat(first, 1), *more, **named)


PADDED = (torch.arange(N) < torch.tensor([[N], [30]])).long()
PACKED = torch.arange(N) >= 20


class Masked(nn.Module):
    """Some keys are padding, which the caller says; or a buffer keeps two packs apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("apart", (PACKED[:, None] == PACKED)[None, None])
        self.eval()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.apart if mask is None else (mask > 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, seen)
        return x


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "plain": (Stack, (), {}),
    "class token": (Classed, (), {}),
    "registers": (lambda: Classed(2), (), {}),
    "padding": (lambda: Masked(), (PADDED,), {}),
    "padding first": (lambda: Masked(), (PADDED,), {"padding_first": True}),
    "counts under padding": (lambda: Masked(), (PADDED,), {"counts": "threshold", "tau": 0.5, "least": 0.5}),
    "packs": (lambda: Masked(), (), {"placement": "branch"}),
    "keep": (lambda: Masked(), (PADDED,), {"merging": "keep"}),
    "branch": (Stack, (), {"placement": "branch"}),
    "prune": (Classed, (), {"merging": "prune"}),
    "plain mean": (Classed, (), {"merging": "plain"}),
    "dot": (Classed, (), {"similarity": "dot", "metric": "query"}),
    "sequential": (Classed, (), {"partition": "sequential"}),
    "a share": (Stack, (), {"r": 0.3}),
}


FILES = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2", "openvino": ".xml"}
"""How a file of each format ends."""


def foreign(gm: torch.fx.GraphModule) -> set[str]:
    """Ops that are not torch's own."""
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    return {str(t) for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace != "aten"}


@pytest.mark.parametrize("name", thinned(CASES, 2))
def test_plain_ops_compute_the_same(name: str) -> None:
    """The same tokens merge as by our own operators, on any input."""
    make, more, options = CASES[name]
    model, x = make(), torch.randn(2, N, D)
    options = {"r": R, "placement": "stream", **options}
    with torch.no_grad():
        gm, own = (tome_fx.rewrite(model, (x, *more), plain=plain, **options) for plain in (True, False))
        assert foreign(own)
        assert not foreign(gm)
        assert gm.meta["tome_report"].merged_sites == own.meta["tome_report"].merged_sites > 0
        # Padding ties with padding, and which of it merges first is nobody's business.
        seen = (PADDED > 0)[..., None] if more == (PADDED,) else torch.ones(())
        got, want, unmerged = (seen * run(x, *more) for run in (gm, own, model))
        assert distance(got, want) < 1e-6
        assert distance(got, unmerged) > 1e-4 or name == "padding first"  # something did merge
    assert gm.training is model.training is False


def test_tables_of_relative_positions() -> None:
    """Score terms merge by log-mean-exp."""
    model, x = tables(), torch.randn(2, 64, 32)
    with torch.no_grad():
        gm, own = (tome_fx.rewrite(model, (x,), r=8, placement="stream", plain=plain) for plain in (True, False))
        assert not foreign(gm)
        assert distance(gm(x), own(x)) < 1e-6


def test_gradients_pass_through_plain_ops() -> None:
    model, x = Classed(), torch.randn(2, N, D)
    grads = []
    for plain in (True, False):
        gm = tome_fx.rewrite(model, (x,), r=R, placement="stream", plain=plain)
        loss = gm(x).square().sum()
        grads.append(torch.autograd.grad(loss, [p for p in gm.parameters() if p.requires_grad], allow_unused=True))
    assert len(grads[0]) > 20
    for a, b in zip(*grads, strict=True):
        assert (a is None) is (b is None)
        assert a is None or distance(a, b) < 1e-5


BATCH = torch.export.Dim("batch", min=2, max=64)
LENGTH = torch.export.Dim("length", min=32, max=256)
FREE = {"batch": {0: BATCH}, "length": {1: LENGTH}, "both": {0: BATCH, 1: LENGTH}}


@pytest.mark.parametrize("free", ["batch", "length", pytest.param("both", marks=pytest.mark.slow)])
def test_free_dims(free: str) -> None:
    """Any batch, any number of tokens, or both: rewritten, exported anew, and called.

    A free length beside a fixed batch was refused: of (n - 6) // 2 torch makes n // 2 - 3, and then cannot show that
    a product of two such sizes is 2 or more."""
    model, shapes = Classed(), (FREE[free],)
    with torch.no_grad():
        gm = tome_fx.rewrite(model, (tokens(3, 40),), r=R, placement="stream", dynamic_shapes=shapes)
        program = tome_fx.export(model, (tokens(3, 40),), r=R, placement="stream", dynamic_shapes=shapes)
        for batch, length in ((3, 40), (2 if 0 in shapes[0] else 3, 65 if 1 in shapes[0] else 40)):
            x = tokens(batch, length)
            for run in (gm, program.module()):
                assert distance(run(x), model(x)) < 2e-5


@pytest.mark.parametrize("more", [{}, {"method": "diffrate"}, {"counts": "threshold", "least": 0.5}], ids=str)
def test_a_share_is_of_the_length_that_comes(more: dict[str, Any]) -> None:
    """Not of that which was traced: int() of a symbol is the number it had. Nor has what reads all queries that one."""
    model, options = Stack(), {"r": 0.2, "placement": "stream", **more}
    with torch.no_grad():
        gm = tome_fx.rewrite(model, (torch.randn(2, 40, D),), dynamic_shapes=(FREE["length"],), **options)
        x = torch.randn(2, 65, D)
        want = tome_fx.rewrite(model, (x,), **options)(x)
        assert distance(gm(x), want) < 1e-5 < distance(want, model(x))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40, 41])
def test_half_of_a_free_count(count: int) -> None:
    symbol = ShapeEnv().create_unbacked_symint()
    found = portable._half(symbol).node.expr
    assert found.subs(symbol.node.expr, count) == count // 2 == portable._half(count)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [{}, {0: BATCH}], ids=["fixed batch", "any batch"])
def test_any_resolution(batch: dict[int, Any], tmp_path: Path) -> None:
    """One file for images of any size, in onnxruntime too."""
    timm, runtime = pytest.importorskip("timm"), pytest.importorskip("onnxruntime")
    sizes = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 96, "num_classes": 10}
    model = redraw(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes).eval(), 1)
    sides = (16 * torch.export.Dim(name, min=6, max=32) for name in ("height", "width"))
    shapes, options = ({**batch, **dict(zip((2, 3), sides, strict=True))},), {"r": 4, "placement": "stream"}
    file, x = tmp_path / "model.onnx", torch.randn(3, 3, 112, 128)
    with torch.no_grad():
        program = tome_fx.export(model, (x,), dynamic_shapes=shapes, format="onnx", path=file, **options)
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for size in ((112, 128), (96, 160), (160, 96)):
            x = torch.randn(3, 3, *size)
            want = tome_fx.rewrite(model, (x,), **options)(x)  # for this one size
            assert distance(program.module()(x), want) < 1e-5
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert distance(torch.from_numpy(got), want) < 1e-5


SERVE = """
import sys, torch
with torch.no_grad():
    run = torch.export.load(sys.argv[1]).module() if sys.argv[1].endswith(".pt2") else None
    torch.save(run(torch.load(sys.argv[2])), sys.argv[3])
assert "tome_fx" not in sys.modules
"""


def test_served_by_a_process_without_us(tmp_path: Path) -> None:
    model, x = Classed(2), torch.randn(2, N, D)
    file = tmp_path / "model.pt2"
    with torch.no_grad():
        program = tome_fx.export(model, (x,), r=R, placement="stream", path=file)
        want = program.module()(x)
        torch.save(x, tmp_path / "x.pt")
        files = [str(tmp_path / name) for name in ("x.pt", "out.pt")]
        subprocess.run([sys.executable, "-c", SERVE, str(file), *files], check=True, cwd=tmp_path)
        assert distance(torch.load(tmp_path / "out.pt"), want) < 1e-6
        fast = torch.compile(model, backend=tome_fx.tome_backend(r=R, inner="eager", placement="stream"))
        assert distance(want, fast(x)) < 1e-5


def _onnx(model: nn.Module, x: Tensor, path: Path, **options: Any) -> tuple[Any, Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        program = tome_fx.export(model, (x,), r=R, placement="stream", format="onnx", path=path, **options)
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), program.module()(x)


def test_onnx(tmp_path: Path) -> None:
    """A tiny ViT in onnxruntime, by the operators of the standard alone."""
    pytest.importorskip("onnx")
    import onnx

    x = torch.randn(2, N, D)
    session, want = _onnx(Classed(2), x, tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(got), want) < 1e-5
    held = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in held.graph.node} <= {"", "ai.onnx"}


class Folded(nn.Module):
    """Attention with `lead` dims before the tokens: heads of windows, or heads folded into the batch."""

    def __init__(self, lead: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
        super().__init__()
        self.lead = lead
        self.register_buffer("mask", None if mask is None else torch.randn(*mask, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, self.lead)
        return F.scaled_dot_product_attention(x, x * 0.5, x + 1, attn_mask=self.mask).flatten(0, -3)


@pytest.mark.parametrize(
    ("lead", "mask"),
    [((12,), None), ((12,), (12,)), ((12,), (1,)), ((12,), ()), ((2, 3, 2), None), ((2, 3, 2), (3, 1)),
     ((2, 3, 2), (1, 1, 1)), ((2, 3, 2), ()), ((2, 6), (6,))],
)  # fmt: skip
def test_attention_leaves_with_four_dims(lead: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    model, x = Folded(lead, mask), torch.randn(12, 5, 8)
    gm = torch.export.export(model, (x,)).module()
    (value,) = (n.meta["val"] for n in gm.graph.find_nodes(op="placeholder"))
    portable.make_portable(gm, value.fake_mode, "mask")
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert node.args[0].meta["val"].dim() == 4
    assert distance(gm(x), model(x)) < 1e-6


@pytest.mark.slow
def test_operators_that_merging_adds(tmp_path: Path) -> None:
    """Those that docs/export.md holds against the list of a runtime that cannot run here."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    def operators(program: torch.export.ExportedProgram) -> set[tuple[str, int]]:
        write(program, "onnx", tmp_path / "model.onnx")
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
        return {(node.op_type, types.get(node.input[0], 0) if node.input else 0) for node in graph.node}

    added: set[tuple[str, int]] = set()
    with torch.no_grad():
        for name in ("registers", "padding", "packs"):
            make, more, options = CASES[name]
            model, args = make(), (torch.randn(2, N, D), *more)
            program = tome_fx.export(model, args, **{"r": R, "placement": "stream", **options})
            added |= operators(program) - operators(torch.export.export(model, args, strict=False))
    page = (Path(__file__).parent.parent / "docs/export.md").read_text()
    listed = re.findall(r"`([A-Z]\w+(?: [A-Z]\w+)+)`", page)
    assert {op for op, _ in added} == set(" ".join(listed).split())
    assert {kind for op, kind in added if op == "CumSum"} == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
def test_onnx_of_any_batch(tmp_path: Path) -> None:
    model = Classed()
    session, _ = _onnx(model, torch.randn(3, N, D), tmp_path / "model.onnx", dynamic_shapes=({0: BATCH},))
    name = session.get_inputs()[0].name
    for batch in (2, 5):
        x = tokens(batch)
        with torch.no_grad():
            assert distance(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model(x)) < 2e-5


@pytest.mark.slow
def test_aoti(tmp_path: Path) -> None:
    """Compiled ahead of time, loaded by a process without us."""
    model, x = Classed(2), torch.randn(2, N, D)
    file = tmp_path / "model.pt2"
    with torch.no_grad():
        want = tome_fx.export(model, (x,), r=R, placement="stream", format="aoti", path=file).module()(x)
    torch.save(x, tmp_path / "x.pt")
    code = SERVE.replace("torch.export.load(sys.argv[1]).module()", "torch._inductor.aoti_load_package(sys.argv[1])")
    files = [str(tmp_path / name) for name in ("x.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", code, str(file), *files], check=True, cwd=tmp_path)
    assert distance(torch.load(tmp_path / "out.pt"), want) < 1e-5


@pytest.mark.slow
def test_executorch() -> None:
    """Lowered to its edge dialect and run by its portable kernels."""
    pytest.importorskip("executorch")
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    model, x = Classed(2), torch.randn(2, N, D)
    with torch.no_grad():
        program = tome_fx.export(model, (x,), r=R, placement="stream")
        method = Runtime.get().load_program(to_edge(program).to_executorch().buffer).load_method("forward")
        assert distance(method.execute([x])[0], program.module()(x)) < 1e-5


MAIN = r"""
#include <fstream>
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int, char** argv) {
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor x = at::empty({BATCH, TOKENS, WIDTH});
  std::ifstream(argv[2], std::ios::binary).read((char*)x.data_ptr(), x.nbytes());
  at::Tensor y = model.run({x}).at(0).contiguous();
  std::ofstream(argv[3], std::ios::binary).write((const char*)y.data_ptr(), y.nbytes());
}
"""


@pytest.mark.slow
def test_aoti_from_cpp(tmp_path: Path) -> None:
    """A program without Python: its main loads the file and runs it."""
    compiler = shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler")
    model, x = Classed(2), torch.randn(2, N, D)
    with torch.no_grad():
        program = tome_fx.export(model, (x,), r=R, placement="stream", format="aoti", path=tmp_path / "model.pt2")
        want = program.module()(x)
    (tmp_path / "main.cpp").write_text(MAIN)
    x.numpy().tofile(tmp_path / "x.bin")
    libraries = cpp_extension.library_paths()
    words = [compiler, "-std=c++20", "main.cpp", "-o", "main", "-ltorch", "-ltorch_cpu", "-lc10"]
    words += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    words += [f"-D{name}={size}" for name, size in zip(("BATCH", "TOKENS", "WIDTH"), x.shape, strict=True)]
    words += [f"-I{path}" for path in cpp_extension.include_paths()]
    words += [word for path in libraries for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    subprocess.run(words, check=True, cwd=tmp_path)
    subprocess.run(["./main", "model.pt2", "x.bin", "out.bin"], check=True, cwd=tmp_path)
    got = torch.from_file(str(tmp_path / "out.bin"), size=want.numel()).view_as(want)
    assert distance(got, want) < 1e-5
    assert want.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("name", CASES)
def test_every_option_in_a_runtime(name: str, format: str, tmp_path: Path) -> None:
    """OpenVINO takes float32 models in bfloat16 unless told otherwise: `runtimes` tells it."""
    pytest.importorskip("onnxruntime" if format == "onnx" else "openvino")
    make, more, options = CASES[name]
    # Its reader of programs divides by the size of an empty weight, merged or not: registers, but some.
    model, x = Classed(2) if make is Classed else make(), torch.randn(2, N, D)
    path = tmp_path / f"model{FILES[format]}"
    with torch.no_grad():
        options = {"r": R, "placement": "stream", **options}
        program = tome_fx.export(model, (x, *more), format=format, path=path, **options)
        # Padding ties with padding, as above.
        seen = (PADDED > 0)[..., None] if more == (PADDED,) else torch.ones(())
        (got,), want = runtimes.loaded(format, path, (x, *more))(), program.module()(x, *more)
    assert distance(seen * got, seen * want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    """A few units in the last place of its dtype from the float32 program, inputs and outputs in its dtype."""
    package = runtimes.runtime_of(format) or pytest.skip(f"what runs {format} is not installed")
    model, x, path = Classed(2), torch.randn(2, N, D), tmp_path / f"model{FILES[format]}"
    options = {"r": R, "placement": "stream"}
    with torch.no_grad():
        want = tome_fx.export(model, (x,), **options).module()(x)
        tome_fx.export(model.to(dtype), (x.to(dtype),), format=format, path=path, **options)
        if package == "onnxruntime" and dtype is torch.bfloat16:
            with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
                runtimes.loaded(format, path, (x.to(dtype),))
            return
        (got,) = runtimes.loaded(format, path, (x.to(dtype),))()
    assert got.dtype is dtype
    assert 0 < distance(got.float(), want) < 4 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_tables_in_a_runtime(format: str, tmp_path: Path) -> None:
    """Log-mean-exp takes the greatest of each group."""
    pytest.importorskip("onnxruntime" if format == "onnx" else "openvino")
    model, x, path = tables(), torch.randn(2, 64, 32), tmp_path / f"model{FILES[format]}"
    with torch.no_grad():
        program = tome_fx.export(model, (x,), r=8, placement="stream", format=format, path=path)
        (got,), want = runtimes.loaded(format, path, (x,))(), program.module()(x)
    assert "aten.scatter_reduce.two" in {str(n.target) for n in program.graph.nodes}
    assert distance(got, want) < 1e-5


def test_weights_are_the_models_own() -> None:
    """Nothing is copied until a file is written: two programs of a large model fit where the model does."""
    model = Classed()
    with torch.no_grad():
        program = tome_fx.export(model, (torch.randn(2, N, D),), r=R, placement="stream")
    own = {p.data_ptr() for p in model.parameters()}
    held = [w.data_ptr() for w in program.state_dict.values() if w.numel()]
    assert len(held) > 20
    assert set(held) <= own


@pytest.mark.slow
def test_onnx_keeps_large_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file as long as one can hold the weights (protobuf ends at 2 GB), else a second one beside it."""
    exporter = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    x, (small, large) = torch.randn(2, N, D), (tmp_path / name for name in ("small.onnx", "large.onnx"))
    session, want = _onnx(Classed(), x, small)
    assert not small.with_name("small.onnx.data").exists()
    monkeypatch.setattr(exporter, "_LARGE_MODEL_THRESHOLD", 1024)
    session, want = _onnx(Classed(), x, large)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(got), want) < 1e-5
    assert large.stat().st_size < small.stat().st_size
    assert runtimes.size(large) >= runtimes.size(small) == small.stat().st_size


@torch.library.custom_op("tome_test::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    return x.tanh()


@squash.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Squashed(Stack):
    """The last block has a function of the user's, in a module of its own."""

    def __init__(self, inside: Any = squash) -> None:
        super().__init__()
        self.blocks[2].mlp[1] = Pointwise(inside)


class Pointwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


REFUSED = {
    "of the user's": (squash, "tome_test.squash.default"),
    "of torch's": (torch.special.i0e, "aten.special_i0e.default"),
}


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("kind", REFUSED)
def test_an_op_without_a_form_is_named(kind: str, format: str, tmp_path: Path) -> None:
    """With the module that it stands in, as the model calls it, and what the exporter said behind it."""
    pytest.importorskip("onnxscript" if format == "onnx" else format)
    inside, name = REFUSED[kind]
    path = tmp_path / f"model{FILES[format]}"
    options = {"r": R, "placement": "stream", "format": format, "path": path}
    with torch.no_grad(), pytest.raises(RuntimeError) as raised:
        tome_fx.export(Squashed(inside), (torch.randn(2, N, D),), **options)
    assert str(raised.value) == f"{format} has no form for {name} (in blocks.2.mlp.1)"
    assert raised.value.__cause__ is not None


def test_an_operator_of_the_users_stays_in_a_program(tmp_path: Path) -> None:
    """`torch.export.load` finds it where it is registered."""
    model, x = Squashed(), torch.randn(2, N, D)
    with torch.no_grad():
        want = tome_fx.export(model, (x,), r=R, placement="stream", path=tmp_path / "model.pt2").module()(x)
        assert distance(torch.export.load(tmp_path / "model.pt2").module()(x), want) < 1e-6


@pytest.mark.parametrize("format", ["pt2", "aoti", "openvino"])
def test_the_name_of_a_file_is_checked_first(format: str) -> None:
    with pytest.raises(ValueError, match=r"must end in \.(pt2|xml), got 'model.bin'"):
        tome_fx.export(None, format=format, path="model.bin")  # type: ignore[arg-type]  # the model is not looked at


def test_names_in_any_order() -> None:
    """Two inputs of one shape, by name, not in the order of the signature."""

    class Named(Stack):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y.roll(1, -1) * 0.5)

    model, x, y = Named(), torch.randn(2, N, D), torch.randn(2, N, D)
    with torch.no_grad():
        want = tome_fx.rewrite(model, (x, y), r=R, placement="stream")(x, y)
        program = tome_fx.export(model, (), {"y": y, "x": x}, r=R, placement="stream")
        assert distance(program.module()(x=x, y=y), want) < 1e-6
        assert distance(program.module()(y=y, x=x), want) < 1e-6


def test_no_sort_leaves() -> None:
    """A stable one is not exported to ONNX."""
    gm = tome_fx.rewrite(Masked(), (torch.randn(2, N, D),), r=R, placement="branch")
    assert not [n for n in gm.graph.nodes if "sort" in str(n.target)]


def test_what_cannot_leave_is_named() -> None:
    model, x = Classed(), torch.randn(2, N, D)
    with pytest.raises(ValueError, match="matcher='random' cannot leave Python"):
        tome_fx.export(model, (x,), r=R, matcher="random")
    with pytest.raises(ValueError, match="format must be one of pt2"):
        tome_fx.export(model, (x,), r=R, format="tflite")
    with pytest.warns(tome_fx.ToMeWarning), pytest.raises(RuntimeError, match="nothing to export"):
        tome_fx.export(nn.Linear(D, D), (x,), r=R)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES_OF_LIBRARIES))
def test_models_of_libraries(name: str, tmp_path: Path) -> None:
    """Image, video and audio models, pyramids and windows, as a file; equal tokens merge, so the model itself is the
    measure."""
    case = CASES_OF_LIBRARIES[name]()
    with torch.no_grad():
        program = tome_fx.export(case.model, case.args, r=4, path=tmp_path / "model.pt2")
        got = torch.export.load(tmp_path / "model.pt2").module()(*case.args)
        assert not foreign(program.module())
        assert distance(got, case.model(*case.args)) < 1e-4


def test_one_tensor_given_twice() -> None:
    """Of two inputs that are one tensor torch.export reads the last in both places."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(Spec(stem="tokens", prefix="none", readout="tokens"))[0]

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a) + 10 * b

    model, x = Net().eval(), torch.randn(2, 36, 32)
    a, b = torch.randn(2, 36, 32), torch.randn(2, 36, 32)
    want, _ = run(model, (a, b), None, 4, placement="stream")
    with torch.no_grad():
        for got in (
            tome_fx.rewrite(model, (x, x), r=4, placement="stream")(a, b),
            tome_fx.export(model, (x, x), r=4, placement="stream").module()(a, b),
        ):
            torch.testing.assert_close(got, want)
