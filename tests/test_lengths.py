"""The pass `lengths`: a graph with symbols in the place of token counts computes what the graph with numbers did."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import tome_fx
from tests.models import Spec, build
from tests.strategies import specs
from tome_fx import tome_backend
from tome_fx.passes.inner.lengths import Lengths


@dataclass
class Seen:
    """What the stand-in for Inductor saw of each graph: was it bit-equal to the graph with numbers, which symbols came
    to be one number again, and how many values had symbolic sizes."""

    equal: list[bool] = field(default_factory=list)
    numbers: list[dict] = field(default_factory=list)
    symbolic: list[int] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Runs each graph both ways in the place of Inductor, after a run over fake tensors as Inductor makes it."""
    found, plain = Seen(), []
    rewrite = Lengths.__call__

    def keep(self: Lengths, gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        before = copy.deepcopy(gm)
        values = rewrite(self, gm, inputs)
        plain.append(before)
        return values

    def compile_both(gm: fx.GraphModule, inputs: Sequence[Any], *_: Any, **kwargs: Any) -> Any:
        gm.graph.lint()
        mode, with_numbers = detect_fake_mode(inputs), plain.pop()
        found.symbolic.append(sum(has_symbol(node) for node in gm.graph.nodes))
        with enable_python_dispatcher(), torch.no_grad():
            FakeTensorProp(copy.deepcopy(gm), mode).propagate_dont_convert_inputs(*inputs)
        found.numbers.append(dict(mode.shape_env.replacements))

        def run(args: list[Any]) -> Any:
            state = torch.random.get_rng_state()
            again = [a.clone() if isinstance(a, Tensor) else a for a in args]  # a graph may write into its inputs
            got = gm(*args)
            torch.random.set_rng_state(state)
            want = with_numbers(*again)
            args.clear()
            found.equal.append(all(map(same, got, want)))
            return got

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(Lengths, "__call__", keep)
    monkeypatch.setattr(tome_fx.backend, "compile_shared", compile_both)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield found
    torch._dynamo.reset()


def has_symbol(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and any(isinstance(size, torch.SymInt) for size in val.shape)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def call(model: torch.nn.Module, args: Sequence[Any], r: Any = 4) -> Any:
    torch._dynamo.reset()
    out = torch.compile(model, backend=tome_backend(r))(*args)
    assert not any(reason.kind == "internal error" for reason in tome_fx.reports()[-1].skipped)
    return out


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")  # there is a spec in which nothing merges
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(spec=specs())
@example(spec=Spec(prefix="late", batch=2, depth=4))  # a batch of tokens and one more, viewed as two dims
def test_random_transformers(seen: Seen, spec: Spec) -> None:
    """Bit-equal, and a symbol is given up only where its number is a width of the model too."""
    before = len(seen.equal)
    model, args = build(spec)
    with torch.no_grad():
        call(model.eval(), args)
    assert all(seen.equal[before:])
    widths = {n for p in model.parameters() for n in p.shape} | {2 * spec.dim, 3 * spec.dim, 4 * spec.dim}
    assert {int(n) for found in seen.numbers[before:] for n in found.values()} <= widths, seen.numbers[before:]


NETS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 4, "proj_drop_rate": 0.1},
    "eva02_tiny_patch14_224": {"depth": 4},  # rotary embeddings, prefix kept out: lengths less one, strided slices
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 48, "num_heads": 3},
    "pit_ti_224": {},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2)},  # in windows, on a branch: 40 tokens of 49
}


IN_TESTS = [(name, False) for name in NETS if not name.startswith("swin")] + [("vit_tiny_patch16_224", True)]
SWEEP = [(name, training) for name in NETS for training in (False, True) if (name, training) not in IN_TESTS]


@pytest.mark.parametrize(
    ("name", "training"), [*IN_TESTS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SWEEP)]
)
def test_nets(seen: Seen, name: str, training: bool) -> None:
    """Forward and backward, no symbol is given up, and a good part of all values has symbolic sizes."""
    torch.manual_seed(0)
    model = timm.create_model(name, **NETS[name]).train(training)
    with torch.set_grad_enabled(training):
        out = call(model, (torch.randn(2, 3, 224, 224),), 9)
    if training:
        out.square().mean().backward()
    graphs = 2 if training else 1
    assert seen.equal == [True] * graphs
    assert seen.numbers == [{}] * graphs
    assert min(seen.symbolic) > 50


def test_a_length_that_is_a_width(seen: Seen) -> None:
    """48 tokens beside a width of 48 are told apart by where they stand."""
    torch.manual_seed(0)
    net = {"depth": 4, "img_size": 112, "embed_dim": 48, "num_heads": 3, "class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", **net).eval()
    with torch.no_grad():
        call(model, (torch.randn(1, 3, 112, 112),), [1, 1, 1, 1])
    assert seen.equal == [True]
    assert seen.numbers == [{}]


@pytest.mark.slow
def test_other_symbols_leave_it_alone(seen: Seen) -> None:
    """With a symbolic batch the graph goes to the compiler as it is."""
    model, (x, *rest) = build(Spec(depth=4))
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(model.eval(), backend=tome_backend(2))(x, *rest)
    assert tome_fx.reports()[-1].merged_sites
    assert not seen.equal
