"""Rows that nobody reads are not computed, and those that are read do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import tome_fx
from tests import models
from tests.strategies import specs
from tome_fx.backend import transform
from tome_fx.config import config_from
from tome_fx.explain import _flat_value, _module
from tome_fx.passes.capture import capture
from tome_fx.passes.drop_unread import drop_unread

aten, tome = torch.ops.aten, torch.ops.tome


def both(model: nn.Module, args: tuple[Any, ...], r: Any = 4) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """The rewritten graph, the one with every row, and how many ops of the first compute fewer."""
    source = _module(torch.export.export(model, args, strict=False))
    flat = [_flat_value(node) for node in source.graph.find_nodes(op="placeholder")]
    made = [
        transform(source, flat, config_from({"r": r, "inner": "eager", "drop_unread": drop})) for drop in (True, False)
    ]
    (short, report), (whole, _) = made
    assert short is not None and whole is not None
    return short, whole, report.unread_ops


def of(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=target)


def rows(gm: fx.GraphModule) -> list[int]:
    """Queries of each attention, in order."""
    nodes = of(gm, aten.scaled_dot_product_attention.default)
    return [int(node.args[0].meta["val"].shape[-2]) for node in nodes]


def results(gm: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    out = gm(*args)
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]


@pytest.mark.parametrize(("readout", "prefix", "read"), [("cls", "cls", 1), ("dist", "cls_dist", 2)])
def test_the_last_block_computes_the_rows_that_are_read(readout: str, prefix: str, read: int) -> None:
    model, args = models.build(models.Spec(readout=readout, prefix=prefix, depth=3))
    short, whole, ops = both(model.eval(), args)
    assert ops > 0
    assert rows(short)[-1] <= read < rows(whole)[-1]
    assert rows(short)[:-1] == rows(whole)[:-1]
    # the match of the last block moves rows that nobody reads
    matches = [len(of(gm, tome.match.default)) + len(of(gm, tome.match_size.default)) for gm in (short, whole)]
    assert matches == [2, 3]
    torch.testing.assert_close(results(short, args), results(whole, args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("readout", ["mean", "mean_all", "tokens", "grid", "hidden", "attn_pool"])
def test_nothing_is_dropped_where_all_rows_are_read(readout: str) -> None:
    model, args = models.build(models.Spec(readout=readout))
    assert both(model.eval(), args)[2] == 0


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs(), st.sampled_from(["cls", "dist", "cls_mean"]), st.sampled_from(["cls", "cls_dist", "cls_reg", "late"]))
def test_any_transformer_read_at_its_prefix(spec: models.Spec, readout: str, prefix: str) -> None:
    try:
        spec = spec.replace(readout=readout, prefix=prefix)
    except ValueError:
        assume(False)
    model, args = models.build(spec)
    try:
        short, whole, _ = both(model.eval(), args, r=2)
    except tome_fx.ToMeWarning:
        assume(False)  # nothing merges
    torch.testing.assert_close(results(short, args), results(whole, args), atol=2e-5, rtol=2e-5)


def test_gradients_are_those_of_every_row() -> None:
    model, args = models.build(models.Spec(depth=3, layer_scale=True))
    found = []
    for gm in both(model.eval(), args)[:2]:
        parameters = [p for p in gm.parameters() if p.requires_grad]
        loss = sum(x.square().sum() for x in results(gm, args))
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_through_inductor(training: bool) -> None:
    model, args = models.build(models.Spec(depth=4))
    model = model.train(training)
    tome_fx.clear_reports()
    with torch.set_grad_enabled(training):
        found = torch.compile(model, backend=tome_fx.tome_backend(r=3, strict=True))(*args)
        want = torch.compile(model, backend=tome_fx.tome_backend(r=3, inner="eager"))(*args)
    assert [report.unread_ops > 0 for report in tome_fx.reports()] == [True, True]
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_a_trace_shows_the_merges_of_the_graph() -> None:
    """Those that compiled code leaves out are shown where it computes all rows."""
    model, args = models.build(models.Spec(depth=4))
    assert len(tome_fx.trace_tokens(model.eval(), args, r=2).merges) == 3
    assert len(tome_fx.trace_tokens(model.eval(), args, r=2, drop_unread=False).merges) == 4


# -- single graphs -----------------------------------------------------------------------------------------------------

W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(12, 12).tril().log()


def rope(q: Tensor, table: Tensor) -> Tensor:
    """Rotates all but the first row."""
    x = q[:, 1:]
    a, b = x.chunk(2, -1)
    return torch.cat([q[:, :1], x * table + torch.cat([-b, a], -1)], 1)


CASES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    # what is computed of x [2, 12, 8], and how many rows the first linear then has
    "select": (lambda x: F.linear(x, W).relu()[:, 0], 1),
    "last": (lambda x: F.linear(x, W)[:, -1], 1),
    "slice": (lambda x: F.linear(x, W)[:, 2:5], 3),
    "hull": (lambda x: (lambda y: y[:, 1] + y[:, 4])(F.linear(x, W)), 4),
    "slice of a slice": (lambda x: F.linear(x, W)[:, 2:8][:, 1:3], 2),
    "two readers": (lambda x: (lambda y: (y.relu()[:, 0], y.sigmoid()[:, 1:3]))(F.linear(x, W)), 3),
    "heads": (lambda x: F.linear(x, W).view(2, 12, 2, 4).transpose(1, 2)[:, :, 0].reshape(2, 8), 1),
    "flat": (lambda x: F.linear(x, W).flatten(1)[:, :8], 12),
    "more than half": (lambda x: F.linear(x, W)[:, :7], 12),
    "steps": (lambda x: F.linear(x, W)[:, ::4], 12),
    "all rows": (lambda x: (lambda y: (y[:, 0], y.mean(1)))(F.linear(x, W)), 12),
    "mixed": (lambda x: F.linear(x, W).cumsum(1)[:, 0], 12),
    "softmax over rows": (lambda x: F.linear(x, W).softmax(1)[:, 0], 12),
    "norm": (lambda x: F.layer_norm(F.linear(x, W), (8,))[:, 0], 1),
    "table": (lambda x: (F.linear(x, W) + W[:1].expand(12, 8))[:, 3], 1),
    "expand": (lambda x: F.linear(x, W).unsqueeze(2).expand(2, 12, 3, 8)[:, 0], 1),
    "product with itself": (lambda x: (lambda y: (y @ y.transpose(1, 2))[:, 0])(F.linear(x, W)), 12),
    "squared": (lambda x: (lambda y: y * (y * y).mean(-1, keepdim=True))(F.linear(x, W))[:, 0], 1),
    "gated": (lambda x: (lambda y: y[..., :4] * y[..., 4:])(F.linear(x, W))[:, 0], 1),
    "rotated": (lambda x: rope(F.linear(x, W), W[:1].expand(11, 8))[:, 0], 1),
    "rotated, one further": (lambda x: rope(F.linear(x, W), W[:1].expand(11, 8))[:, 1:3], 2),
    "attention": (lambda x: F.scaled_dot_product_attention(F.linear(x, W), x, x)[:, 0], 1),
    "causal": (lambda x: F.scaled_dot_product_attention(F.linear(x, W), x, x, is_causal=True)[:, 1], 12),
    "masked": (lambda x: F.scaled_dot_product_attention(F.linear(x, W), x, x, MASK)[:, 1], 1),
    "chunks": (lambda x: torch.cat(F.linear(x, W).chunk(2, -1)[::-1], -1)[:, 0], 1),
    "unbound": (lambda x: F.linear(x, W).view(2, 12, 2, 4).unbind(2)[1][:, :2].sin(), 2),
    "sizes": (lambda x: (F.linear(x, W) + F.linear(x, W).new_ones(2, 12, 8))[:, 0], 1),
    "squeezed": (lambda x: F.linear(x, W)[:, 0:1].squeeze(1), 1),
}  # fmt: skip


class Fn(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


@pytest.mark.parametrize("name", CASES)
def test_single_graphs(name: str) -> None:
    fn, want = CASES[name]
    x = torch.randn(2, 12, 8)
    source = _module(torch.export.export(Fn(fn), (x,), strict=False))
    captured = capture(source, [_flat_value(n) for n in source.graph.find_nodes(op="placeholder")])
    drop_unread(captured.gm)
    first = of(captured.gm, aten.linear.default)[0]
    assert first.meta["val"].shape[1] == want
    inputs = [*captured.attributes.values(), x]
    torch.testing.assert_close(results(captured.gm, tuple(inputs)), results(fn, (x,)), atol=1e-5, rtol=1e-5)
