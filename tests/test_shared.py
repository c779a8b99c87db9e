"""The passes `repeats` and `shared`: a graph that is compiled by its layers computes what it did as a whole."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import tome_fx
from tests.models import Spec, build
from tests.strategies import specs
from tome_fx import tome_backend
from tome_fx.passes.inner import shared
from tome_fx.passes.inner.lengths import Fresh, Lengths
from tome_fx.passes.inner.repeats import cuts
from tome_fx.passes.inner.run import Run
from tome_fx.passes.inner.shared import Compiled, Part


class Stand:
    """In the place of Inductor: runs the graphs that it is given, and the whole graph beside its parts."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.runs: list[int] = []
        self.equal: list[bool] = []

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        assert all(0 <= i < len(inputs) for i in kwargs["static_input_idxs"])
        gm.graph.lint()
        self.graphs.append(gm)

        def run(given: list[Any]) -> Any:
            args = list(given)
            given.clear()
            return gm(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile_shared(self, gm: fx.GraphModule, inputs: Sequence[Any], *rest: Any, **kwargs: Any) -> Any:
        parts = shared.compile_shared(gm, inputs, *rest, **kwargs)
        self.runs.append(len(parts.calls) if isinstance(parts, Run) else 1)

        def run(given: list[Any]) -> Any:
            want = gm(*given)
            got = parts(given)
            assert not given
            self.equal.append(all(same(a, b) for a, b in zip(got, want, strict=True)))
            return got

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, Tensor) else a == b


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    found = Stand()
    monkeypatch.setattr(tome_fx.backend, "_compile_traced", found.compile)
    monkeypatch.setattr(tome_fx.backend, "compile_shared", found.compile_shared)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield found
    torch._dynamo.reset()


def call(model: torch.nn.Module, args: Sequence[Any], r: Any = 4, **config: Any) -> Any:
    torch._dynamo.reset()
    out = torch.compile(model, backend=tome_backend(r, **config))(*args)
    assert not any(reason.kind == "internal error" for reason in tome_fx.reports()[-1].skipped)
    return out


def vit(depth: int = 8, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=48, num_heads=3, **kwargs)


IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_layers_are_compiled_once(stand: Stand) -> None:
    """Eight blocks: what comes before the first whole one, one for all, and the last, of which one row is read."""
    with torch.no_grad():
        call(vit().eval(), (IMAGES,))
    assert stand.equal == [True]
    assert (len(stand.graphs), stand.runs) == (3, [7])


def test_training(stand: Stand) -> None:
    """Forward and backward graph, bit-equal to the whole ones; the gradients are those of the uncompiled graph."""
    model, images = vit().train().double(), IMAGES.double()
    call(model, (images,)).square().sum().backward()
    assert stand.equal == [True, True]
    assert min(stand.runs) > 5
    assert len(stand.graphs) < 10
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    call(model, (images,), inner="eager").square().sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-8, atol=1e-10)


def test_a_free_batch(stand: Stand) -> None:
    """Layers are shared, one compilation serves all batches, and samples come out as each alone does."""
    torch._dynamo.reset()
    run = torch.compile(vit().eval(), backend=tome_backend(4), dynamic=True)
    with torch.no_grad():
        found = [run(IMAGES[:1].repeat(n, 1, 1, 1)) for n in (2, 5, 3)]
    assert (len(stand.graphs), stand.runs, stand.equal) == (3, [7], [True] * 3)
    for out in found:
        torch.testing.assert_close(out, found[0][:1].expand_as(out), rtol=1e-4, atol=1e-5)


def test_what_is_assumed_of_a_free_batch_is_a_guard() -> None:
    """Told where the batch came from, with the numbers of the lengths in it; what is said of lengths alone is not."""
    outer = ShapeEnv()
    batch = outer.create_symbol(6, ConstantSource("batch"), DimDynamic.DYNAMIC)
    size = outer.create_symintnode(batch, hint=6)
    with FakeTensorMode(shape_env=outer):
        x = torch.empty(size, 181, 8)
    fresh = Fresh([size, x])
    own = next(iter(fresh.free))
    assert [str(n) for n in fresh.inputs[1].shape] == [str(own), "181", "8"]
    assert fresh.free[own] == 6
    length = fresh.env.create_symbol(181, ConstantSource("length"), DimDynamic.DYNAMIC)
    lengths = Lengths([181], fresh.free)
    lengths.add(181, length)
    assert fresh.env.evaluate_expr(length > 40)
    assert fresh.env.evaluate_expr(own * length > 1000)
    assert fresh.env.evaluate_expr(sympy.Ne(own, 7))
    fresh.tell(lengths)
    assert {str(guard.expr) for guard in outer.guards} == {f"181*{batch} > 1000", f"Ne({batch}, 7)"}


@pytest.mark.parametrize(("name", "kwargs"), [
    ("beit_base_patch16_224", {"depth": 7, "embed_dim": 48, "num_heads": 3}),  # a table of positions for each block
    pytest.param("swin_tiny_patch4_window7_224", {"depths": (1, 1, 9, 1)}, marks=pytest.mark.slow),  # windows in turn
    ("deit3_small_patch16_224", {"depth": 7, "embed_dim": 48, "num_heads": 3}),  # layer scale
])  # fmt: skip
def test_nets(stand: Stand, name: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        call(timm.create_model(name, **kwargs).eval(), (IMAGES,), 9)
    assert stand.equal == [True]
    assert len(stand.graphs) < stand.runs[0], "something is shared"


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(spec=specs())
def test_random_transformers(stand: Stand, spec: Spec) -> None:
    before = len(stand.equal)
    model, args = build(spec)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.eval(), backend=tome_backend(2))(*args)
    assert not any(reason.kind == "internal error" for reason in tome_fx.reports()[-1].skipped)
    assert all(stand.equal[before:])


def test_few_layers_stay_whole(stand: Stand) -> None:
    with torch.no_grad():
        call(vit(depth=4).eval(), (IMAGES,))
    assert (stand.runs, stand.equal) == ([1], [True])


class Writes(torch.nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit().eval()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.vit(x) * self.calls


def test_graphs_that_write_stay_whole(stand: Stand) -> None:
    model = Writes()
    with torch.no_grad():
        call(model, (IMAGES,))
    assert stand.runs == [1]
    assert model.calls.item() == 2  # the stand runs everything twice


class Unequal(torch.nn.Module):
    """Every block has a factor of its own, which no weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=10).eval()
        for i, block in enumerate(self.vit.blocks):
            block.mlp.register_forward_hook(lambda _, __, out, i=i: out * (1 + i / 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


def test_other_numbers_are_another_layer(stand: Stand) -> None:
    """A constant is part of what a layer is: nothing is shared, and nothing is wrong."""
    with torch.no_grad():
        call(Unequal(), (IMAGES,))
    assert stand.equal == [True]
    assert len(stand.graphs) == stand.runs[0]


def part_of(symbols: Sequence[sympy.Symbol]) -> Part:
    return Part(nodes=(), reads=(), gives=(), donated=frozenset(), symbols=tuple(symbols))


def test_assumptions_hold_for_every_part() -> None:
    """A part is not served by code that was made for numbers of which something else holds."""
    a, b, c, other = sympy.symbols("a b c other", integer=True, positive=True)
    made = Compiled(None, part_of([a, b]))
    guards = [SimpleNamespace(expr=a - b >= 8), SimpleNamespace(expr=other > 900)]
    made.env = SimpleNamespace(guards=guards, replacements={})
    assert made.fits(part_of([b, c]), {b: 60, c: 52})
    assert not made.fits(part_of([b, c]), {b: 60, c: 53})
    made.env.replacements = {a: sympy.Integer(64)}
    assert made.fits(part_of([b, c]), {b: 64, c: 32})
    assert not made.fits(part_of([b, c]), {b: 60, c: 52})


def test_values_are_let_go() -> None:
    """A value is freed when its last reader has it: none is left when the next part runs."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), *(graph.call_function(torch.neg, ()) for _ in range(3))]
    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []

    def step(given: list[Any]) -> list[Any]:
        (x,) = given
        given.clear()
        alive.append(weakref.ref(x))
        out = -x
        del x
        gc.collect()
        left.append(sum(ref() is not None for ref in alive))
        return [out]

    parts = [Part(nodes=(), reads=[a], gives=[b], donated=frozenset()) for a, b in pairwise(nodes)]
    calls = [(step, part) for part in parts]
    (out,) = Run(nodes[:1], calls, nodes[-1:], int)([torch.ones(3)])
    assert out.tolist() == [-1.0] * 3
    assert left == [0, 0, 0]


def test_cuts_fall_where_little_crosses() -> None:
    """In a chain of layers, each a product and a call of ours: behind the call."""
    aten, unmerge = torch.ops.aten, torch.ops.tome.unmerge.default
    graph = fx.Graph()
    x, index = graph.placeholder("x"), graph.placeholder("index")
    x.meta["val"], index.meta["val"] = torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64)
    layer = (aten.mul.Tensor, aten.exp.default, unmerge)
    for target in (aten.sin.default, *6 * layer, aten.cos.default, aten.tan.default):
        args = {aten.mul.Tensor: (x, x), unmerge: (x, index)}.get(target, (x,))
        x = graph.call_function(target, args)
        x.meta["val"] = torch.randn(1, 4, 8)
    graph.output((x,))
    places = cuts(graph)
    assert len(places) >= 5
    assert all(place % 3 == 1 for place in places)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inductor(training: bool) -> None:
    """The whole way: Inductor compiles the parts; AOTAutograd stores them as one graph and finds them again, but for
    training: a backward graph is compiled when it is called, and no setting of ours reaches that far."""
    model = vit(6, img_size=96).train(training)
    images = IMAGES[:, :, :96, :96]

    def results(**config: Any) -> list[Tensor]:
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out = call(model, (images,), 3, **config)
        if training:
            out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with fresh_cache():
        found = [results(), results()]
        stored = dict(counters["aot_autograd"])
        counters.clear()
        found.append(results())
    for a, b in pairwise(found):
        assert all(map(torch.equal, a, b))
    if not training:
        assert (stored["autograd_cache_saved"], counters["aot_autograd"]["autograd_cache_hit"]) == (1, 1)
    for a, b in zip(found[0], results(inner="eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
