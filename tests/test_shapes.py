"""Static, marked, automatic and all-dynamic shapes: every size gets the lossless result, with few compilations."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_fx
from tests.library import CASES
from tests.models import Spec, build
from tests.palette import compiled, distance, equalize, palette_image, palette_input
from tests.strategies import thinned

R = 4
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
SPECS = [
    Spec(readout="mean", prefix="none"),
    Spec(readout="cls", attention="matmul"),
    Spec(readout="tokens", attention="bmm", layout="nbd", prefix="none"),
    Spec(readout="sum", attention="einsum", layout="rows"),
    Spec(readout="attn_pool", mask="bool"),
    Spec(readout="mean", attention="mha", prefix="late", layout="bnd"),
    # Before torch 2.12 Dynamo breaks nn.TransformerEncoder's graph where the batch is symbolic.
    *([Spec(readout="mean", attention="encoder", prefix="none")] if TORCH >= (2, 12) else []),
    Spec(readout="mean", kind="relu", prefix="none"),
]


def model_of(spec: Spec) -> nn.Module:
    model, _ = build(spec)
    return equalize(model)


def check(fast: Any, model: nn.Module, args: tuple[Any, ...], tol: float = 2e-5) -> None:
    """Compiled == eager on these inputs, same shape."""
    with torch.no_grad():
        assert distance(fast(*args), model(*args)) < tol


def compilations(since: int) -> int:
    return len(tome_fx.reports()) - since


@pytest.mark.parametrize("spec", thinned(SPECS, 2))
def test_mark_dynamic_batch(spec: Spec) -> None:
    """One graph for every batch size (at least 2), and it merges."""
    model, start = model_of(spec), len(tome_fx.reports())
    fast = compiled(model, R)
    for batch in (2, 3, 5):
        args = palette_input(spec.replace(batch=batch), seed=batch)
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
        check(fast, model, args)
    assert compilations(start) == 1
    assert tome_fx.reports()[-1].merged_sites == spec.depth - (spec.depth - 1) * (spec.kind != "softmax")


@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_automatic_dynamic_batch(spec: Spec) -> None:
    """A second batch size makes the batch dynamic; from then on no more compilations (1 is a size of its own)."""
    model, start = model_of(spec), len(tome_fx.reports())
    fast = compiled(model, R)
    for batch in (2, 3, 5, 2):
        check(fast, model, palette_input(spec.replace(batch=batch), seed=batch))
    assert compilations(start) == 2
    assert tome_fx.reports()[-1].merged_sites > 0
    check(fast, model, palette_input(spec.replace(batch=1)))


@pytest.mark.parametrize(
    "spec",
    [SPECS[0], SPECS[1].replace(stem="linear"), SPECS[7].replace(stem="tokens"), SPECS[2].replace(stem="tokens")],
    ids=str,
)
def test_second_resolution(spec: Spec) -> None:
    """Another number of tokens: merged or cleanly unmerged, always right; the first size still works."""
    model = model_of(spec)
    fast = compiled(model, R)
    for grid in ((6, 6), (6, 8), (8, 7), (6, 6)):
        check(fast, model, palette_input(spec.replace(grid=grid), seed=sum(grid)))
        assert tome_fx.reports()[-1].merged_sites > 0


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_no_samples(placement: str) -> None:
    """An empty batch gives what the model gives for it."""
    case = CASES["timm-siglip"]()
    x = case.args[0][:0]
    with torch.no_grad():
        assert compiled(case.model, R, placement=placement)(x).shape == case.model(x).shape
    assert tome_fx.reports()[-1].merged_sites == 3


@pytest.mark.parametrize("spec", thinned(SPECS, 3))
def test_dynamic_true(spec: Spec) -> None:
    """torch.compile(dynamic=True): every size and Python float is symbolic from the start."""
    model = model_of(spec)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=tome_fx.tome_backend(R, inner="eager"), dynamic=True)
    for batch, grid in ((2, (6, 6)), (3, (6, 6)), (2, (8, 6))):
        check(fast, model, palette_input(spec.replace(batch=batch, grid=grid), seed=batch))
    assert tome_fx.reports()[-1].merged_sites > 0


def test_mark_dynamic_tokens() -> None:
    """The token axis itself marked dynamic: the number merged follows r, not a size seen at compile time."""
    spec = Spec(stem="tokens", prefix="none", readout="tokens")
    model = model_of(spec)
    fast = compiled(model, R)
    for count in (36, 40, 64):
        (x,) = palette_input(spec.replace(grid=(count, 1)), seed=count)
        torch._dynamo.mark_dynamic(x, 1, min=32, max=128)
        check(fast, model, (x,))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dynamic_batch_in_training(inner: str) -> None:
    """Symbolic batch under autograd."""
    spec = Spec(readout="mean")
    model = model_of(spec)
    fast = compiled(model, R, inner=inner)
    for batch in (2, 3, 5):
        args = palette_input(spec.replace(batch=batch))
        model.zero_grad()
        model(*args).square().sum().backward()
        want = model.head.weight.grad.clone()  # type: ignore[union-attr, operator]
        model.zero_grad()
        fast(*args).square().sum().backward()
        assert distance(model.head.weight.grad, want) < 2e-5


@pytest.mark.parametrize("name", ["timm-siglip", "torchvision-vit", "transformers-dinov2-sdpa"])
def test_real_models_dynamic_batch(name: str) -> None:
    """timm, torchvision and transformers with batch sizes 2, 3, 4."""
    case, start = CASES[name](), len(tome_fx.reports())
    fast = compiled(case.model, R)
    for batch in (2, 3, 4):
        check(fast, case.model, (palette_image(batch, 96, 16, k=3, seed=batch),), tol=3e-5)
    assert compilations(start) == 2
    static, dynamic = tome_fx.reports()[start:]
    assert dynamic.merged_sites == static.merged_sites >= 2


class Chosen(nn.Module):
    """A net for those samples (dim 0) or tokens (dim 1) that `keep` names: only its values tell how many there are."""

    def __init__(self, net: nn.Module, dim: int) -> None:
        super().__init__()
        self.net, self.dim = net, dim

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.nonzero(keep)[:, 0]
        torch._check(index.shape[0] >= 2)
        y = self.net(x.index_select(self.dim, index) if self.dim >= 0 else x)
        return y, torch.nonzero(y > 0)


@pytest.mark.parametrize("dim", [-1, 0, 1], ids=["outputs", "samples", "tokens"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_only_values_tell(dim: int) -> None:
    """With nonzero in the graph all merges, or, where it makes the tokens, the report says why nothing does."""
    spec = Spec(stem="tokens", prefix="none", readout="tokens", batch=4)
    model = Chosen(model_of(spec), dim)
    fast = compiled(model, R)
    (x,) = palette_input(spec)
    for step in (2, 3):
        keep = torch.arange(x.shape[max(dim, 0)]) % step == 0
        told = pytest.warns(tome_fx.ToMeWarning) if (dim, step) == (1, 2) else nullcontext()
        with torch.no_grad(), told:
            for got, want in zip(fast(x, keep), model(x, keep), strict=True):
                assert distance(got, want) < 2e-5
    report = tome_fx.reports()[-1]
    assert report.merged_sites == (0 if dim == 1 else spec.depth)
    assert [s.kind for s in report.skipped] == (["unknown token count"] * spec.depth if dim == 1 else [])
