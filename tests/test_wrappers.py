"""Weights that are tensor subclasses: what a weight is kept as is nothing to merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.palette import assert_lossless, compiled, distance, palette_tokens, run
from tests.strategies import thinned
from tests.test_explain import D, Stack

N, R = 48, 6
aten = torch.ops.aten


class Coded(Tensor):
    """int8 rows and one scale a row, which become floats where an op has no way of its own."""

    names: ClassVar[tuple[str, ...]] = ("codes", "scale")

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, wrapped: Any = None) -> Coded:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, wrapped: Any = None) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.names), None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Coded:
        return cls(inner["codes"], inner["scale"])

    def floats(self) -> Tensor:
        return self.codes.to(torch.float32) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return cls(args[0].codes, args[0].scale)
        if (own := cls.way(func, args)) is not None:
            return own
        given = [[_floats(b) for b in a] if isinstance(a, list) else _floats(a) for a in args]
        return func(*given, **(kwargs or {}))

    @classmethod
    def way(cls, func: Any, args: Any) -> Tensor | None:
        return None


def _floats(value: Any) -> Any:
    return value.floats() if isinstance(value, Coded) else value


class ByFunction(Coded):
    """F.linear is its own, above dispatch."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w, bias = (*args, (kwargs or {}).get("bias"))[:3]
            out = (x @ w.codes.to(x.dtype).mT) * w.scale[:, 0]
            return out if bias is None else out + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Turned(Coded):
    """Transposes stay coded, products are its own, at dispatch."""

    @classmethod
    def way(cls, func: Any, args: Any) -> Tensor | None:
        if func is aten.t.default:
            return cls(args[0].codes.t(), args[0].scale.t())
        if func is aten.addmm.default:
            bias, x, w = args
            return (x @ w.codes.to(x.dtype)) * w.scale + bias
        return None


class Dynamic(Coded):
    """Both sides are integers: what comes in is coded row by row."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w, bias = (*args, (kwargs or {}).get("bias"))[:3]
            scale = x.abs().amax(-1, keepdim=True) / 127
            codes = (x / scale).round().clamp(-128, 127).to(torch.int8)
            product = torch._int_mm(codes.flatten(0, -2), w.codes.t()).view(*x.shape[:-1], -1)
            out = product * scale * w.scale[:, 0]
            return out if bias is None else out + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Nested(Coded):
    """The scale is a wrapper too."""

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Coded:
        return cls(inner["codes"], inner["scale"])

    def floats(self) -> Tensor:
        return self.codes.to(torch.float32) * _floats(self.scale)


def coded(weight: Tensor, kind: type[Coded]) -> Coded:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    if kind is Nested:
        largest = scale.amax(1, keepdim=True) / 64
        return Nested(codes, Coded((scale / largest).round().to(torch.int8), largest))
    return kind(codes, scale)


def quantised(model: nn.Module, kind: type[Coded], *, learned: bool = False) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(coded(m.weight.detach(), kind), requires_grad=learned)
    return model


KINDS = [Coded, ByFunction, Turned, Dynamic, Nested]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_quantised_weights(kind: type[Coded], placement: str) -> None:
    """All blocks merge, and the law holds against the quantised model."""
    report = assert_lossless(quantised(Stack(), kind), (palette_tokens(2, N, D),), R, sites=3, placement=placement)
    assert not report.unknown_ops


@pytest.mark.parametrize("kind", thinned(KINDS, 2, lambda kind: kind.__name__))
def test_quantised_weights_whole_way(kind: type[Coded]) -> None:
    """Through AOTAutograd and Inductor, by `rewrite`, and tied on any input."""
    model, x = quantised(Stack(), kind), palette_tokens(2, N, D)
    with torch.no_grad():
        want = model(x)
        for inner in ("aot_eager", "inductor") if kind is Dynamic else ("aot_eager",):
            assert distance(compiled(model, R, inner=inner, placement="stream")(x), want) < 2e-5
        assert distance(tome_fx.rewrite(model, (x,), r=R, placement="stream")(x), want) < 2e-5
    found = tome_fx.check(model, (torch.randn(2, N, D),), r=R, placement="stream")
    assert found.error < 1e-5
    assert len(found.merges) == 3


@pytest.mark.parametrize("grad", [False, True])
def test_fused_inference_ops(grad: bool) -> None:
    """nn.TransformerEncoderLayer in eval mode runs as one op, which is spelled out before the weights are opened."""
    torch.manual_seed(0)
    layers = (nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True) for _ in range(3))
    model = quantised(nn.Sequential(*layers).eval(), Coded)
    for layer in model:
        weight = coded(layer.self_attn.in_proj_weight.detach(), Coded)
        layer.self_attn.in_proj_weight = nn.Parameter(weight, requires_grad=False)
    with torch.set_grad_enabled(grad):
        assert_lossless(model, (palette_tokens(2, N, D),), R, sites=3, placement="stream", grad=grad)


def test_other_layers() -> None:
    """A convolution that embeds, an embedding, an output head; a buffer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.stem, self.place = Stack(), nn.Conv1d(D, D, 1), nn.Embedding(N, D)
            self.register_buffer("head", coded(torch.randn(5, D), Coded))
            self.stem.weight = nn.Parameter(Coded((self.stem.weight.detach() * 99).to(torch.int8), torch.tensor(0.01)))
            self.place.weight = nn.Parameter(coded(self.place.weight.detach()[:1].expand(N, D), Coded))
            self.requires_grad_(False).eval()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.mT).mT + self.place(torch.arange(N))
            return self.blocks(x).mean(1) @ self.head.t()

    assert_lossless(Model(), (palette_tokens(2, N, D),), R, sites=3, placement="stream")


def reason(model: Callable[..., Any], *args: Any) -> str:
    before = len(tome_fx.reports())
    torch._dynamo.reset()
    with pytest.warns(tome_fx.ToMeWarning):
        torch.compile(model, backend=tome_fx.tome_backend(r=R, inner="eager", placement="stream"))(*args)
    return str(sum(tome_fx.reports()[before:], tome_fx.ToMeReport()).skipped)


def test_gradients_around_frozen_codes() -> None:
    """What is not quantised (norms, biases) trains as without tome_fx, by palette tokens."""
    model, x = quantised(Stack(), Coded), palette_tokens(2, N, D)
    learned = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), learned)
    for inner in ("eager", "aot_eager"):
        fast = compiled(model, R, inner=inner, placement="stream")
        assert distance(torch.autograd.grad(fast(x).square().sum(), learned), want) < 1e-4
    assert tome_fx.reports()[-1].merged_sites == 3


def test_what_is_not_opened_is_told() -> None:
    """A coded weight that is trained; a wrapper that the caller gives."""
    model, x = quantised(Stack(), Coded, learned=True), palette_tokens(2, N, D)
    assert "a Coded that is trained" in reason(model, x)
    with torch.no_grad():
        assert_lossless(model, (x,), R, sites=3, placement="stream")
        given = coded(torch.randn(D, D), Coded)
        assert "an input is a Coded" in reason(lambda x, w: Stack()(x @ w.t()), x, given)


CONFIGS = {"Int8WeightOnlyConfig": 0, "Float8WeightOnlyConfig": 0, "IntxWeightOnlyConfig": 0,
           "Int8DynamicActivationInt8WeightConfig": 1 / 127}  # fmt: skip
"""How far a result may be off: where tokens are coded too, a rounding may tip one to the next code."""


@pytest.mark.parametrize("config", CONFIGS)
def test_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = Stack(dim=64), palette_tokens(2, N, 64)
    quantization.quantize_(model, getattr(quantization, config)())
    if not CONFIGS[config]:
        report = assert_lossless(model, (x,), R, sites=3, placement="stream")
    else:
        with torch.no_grad():
            out, report = run(model, (x,), None, R, placement="stream")
            assert distance(out, model(x)) < CONFIGS[config]
        assert report.merged_sites == 3
        found = tome_fx.check(model, (torch.randn(2, N, 64),), r=R, placement="stream")
        assert found.rounds and "rounds merged values" in str(found)
        assert "BROKEN" not in str(found)
        assert found.holds or "undecided" in found.summary()
        assert tome_fx.rewrite(model, (x,), r=R, placement="stream").meta["tome_report"].merged_sites == 3
    assert not report.unknown_ops
