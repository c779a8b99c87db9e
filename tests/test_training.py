"""Training: gradients, train mode, autocast, checkpointing.

On palette inputs merging is lossless for *any* weights, so the gradients of all parameters (positions aside) must be
those of the original model: the lossless law of the backward pass.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tome_fx
from tests.library import CASES
from tests.models import Block, Spec, build, expected_tokens
from tests.palette import compiled, distance, equalize, leaves, palette_input

R = 4
SPECS = [
    Spec(readout="cls"),
    Spec(readout="mean", attention="matmul", prefix="none"),
    Spec(readout="tokens", attention="bmm", mask="bool", layout="nbd"),
    Spec(readout="attn_pool", attention="mha", mask="float"),
    Spec(readout="multi", kind="linear", parallel=True, mlp="swiglu"),
    Spec(readout="mean", attention="encoder"),
    Spec(readout="mean", prefix="late", slice_write=True),
]


def loss_of(out: Any) -> Tensor:
    """A scalar that weighs every output element differently."""
    total = torch.zeros(())
    for i, leaf in enumerate(leaves(out)):
        total = total + (leaf.float() * torch.linspace(0.5, 1.5 + i, leaf.numel()).view(leaf.shape)).mean()
    return total


def gradients(model: nn.Module, forward: Any, args: Any) -> dict[str, Tensor]:
    """Gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss_of(forward(*args)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    """Same parameters have gradients; differences relative to the largest of all gradients."""
    assert got.keys() == want.keys()
    scale = max(g.abs().max().item() for g in want.values())
    assert scale > 1e-4
    for name, grad in want.items():
        error = (got[name] - grad).abs().max().item() / scale
        assert error < tol, f"gradient of {name} is off by {error:.2e} of the largest"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parameter_gradients_are_lossless(spec: Spec) -> None:
    model, _ = build(spec)
    model, args = equalize(model), palette_input(spec)
    want = gradients(model, model, args)
    got = gradients(model, compiled(model, R), args)
    assert tome_fx.reports()[-1].merged_sites > 0
    assert_same(got, want, 2e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_gradients_of_the_compiled_graph_are_those_of_the_rewritten_graph(spec: Spec, inner: str) -> None:
    """Random inputs, lossy merges: what AOTAutograd derives == autograd through the same graph run eagerly."""
    model, args = build(spec)
    args[0].requires_grad_()
    gm = tome_fx.rewrite(model, args, r=R)
    want = torch.autograd.grad(loss_of(gm(*args)), [args[0], *gm.parameters()], allow_unused=True)
    fast = compiled(model, R, inner=inner)
    got = torch.autograd.grad(loss_of(fast(*args)), [args[0], *gm.parameters()], allow_unused=True)
    assert len(want) > 10
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_under_inductor() -> None:
    spec = Spec(readout="mean", depth=2)
    model, _ = build(spec)
    model, args = equalize(model), palette_input(spec)
    want = gradients(model, model, args)
    assert_same(gradients(model, compiled(model, R, inner="inductor"), args), want, 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "matmul", "mha", "encoder"])
def test_train_mode_with_dropout_learns(attention: str) -> None:
    """model.train(): dropout, attention dropout and DropPath on; merges happen; thirty steps bring the loss down."""
    drop_path = 0.0 if attention == "encoder" else 0.1
    spec = Spec(attention=attention, drop=0.1, drop_path=drop_path, readout="cls", depth=2, batch=4)
    model, args = build(spec)
    fast = compiled(model.train(), R, inner="aot_eager" if attention == "sdpa" else "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target, losses = torch.arange(4), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(fast(*args), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not [s for s in tome_fx.reports()[-1].sites if not s.merged and "not read" not in s.skipped]
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(fast(*args), fast(*args)), "dropout is off in train mode"


def test_eval_after_train_recompiles() -> None:
    """The graph of train mode is not used in eval mode: no dropout then, and the lossless law holds."""
    spec = Spec(drop=0.5, readout="mean")
    model, _ = build(spec)
    model, args = equalize(model), palette_input(spec)
    want = model(*args).detach()
    fast = compiled(model.train(), R)
    assert distance(fast(*args).detach(), want) > 1e-2
    model.eval()
    assert distance(fast(*args).detach(), want) < 2e-5


class Cast(nn.Module):
    """A model that switches autocast on (or off) itself."""

    def __init__(self, inner: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.inner, self.enabled = inner, enabled

    def forward(self, *xs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.inner(*xs)


@pytest.mark.parametrize("where", ["around", "inside", "off_inside"])
@pytest.mark.parametrize("attention", ["sdpa", "matmul", "bmm"])
def test_autocast(attention: str, where: str) -> None:
    """bf16 autocast around the call, inside the model, or around and switched off inside: same dtype, same merges,
    right to the accuracy that eager has."""
    spec = Spec(attention=attention, readout="mean")
    inner, _ = build(spec)
    model, args = equalize(inner), palette_input(spec)
    if where != "around":
        model = Cast(inner, enabled=where == "inside")
    with torch.no_grad():
        exact = inner(*args)
    fast = compiled(model, R)
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "inside"):
        want, got = model(*args), fast(*args)
    assert got.dtype == want.dtype == (torch.float32 if where == "off_inside" else torch.bfloat16)
    noise = distance(want.float(), exact)
    assert distance(got.float(), exact) < (2e-5 if where == "off_inside" else 2 * noise + 1e-2)
    assert [tuple(t) for t in tome_fx.reports()[-1].tokens] == expected_tokens(spec, R)
    got.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Checkpointed(nn.Module):
    """Every block under torch.utils.checkpoint."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec, first=i == 0) for i in range(spec.depth))
        self.head = nn.Linear(spec.dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, None, x.shape[0], use_reentrant=False)
        return self.head(x.mean(1))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpoint_is_handled_or_left_alone_with_a_reason(inner: str) -> None:
    """Result and gradients are right either way; what is not merged says why."""
    spec = Spec(stem="tokens", prefix="none", readout="mean")
    torch.manual_seed(0)
    model, (x,) = Checkpointed(spec), palette_input(spec)
    want_out, want = model(x).detach(), gradients(model, model, (x,))
    fast = compiled(model, R, inner=inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing merged" is as good as merged here
        got = gradients(model, fast, (x,))
        again = fast(x).detach()
    assert_same(got, want, 2e-5)
    assert distance(again, want_out) < 2e-5
    report = tome_fx.reports()[-1]
    assert report.merged_sites == 3 or any("checkpoint" in str(s) for s in report.skipped), report


def test_timm_grad_checkpointing() -> None:
    """timm's own switch."""
    case = CASES["timm-vit"]()
    case.model.set_grad_checkpointing()
    case.model.train()
    want = gradients(case.model, case.model, case.args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = gradients(case.model, compiled(case.model, R), case.args)
    assert_same(got, want, 5e-5)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_runs_are_equal_to_the_bit(inner: str) -> None:
    """Deterministic mode refuses no op of ours, and outputs and gradients of two training steps are the same."""
    model, args = build(Spec(depth=4, mask="float", readout="mean"))
    model.train()
    torch.use_deterministic_algorithms(True)
    try:
        run = compiled(model, R, inner=inner)
        found = []
        for _ in range(2):
            model.zero_grad()
            out = run(*args)
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found[0]) > 10
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
