"""join_writes: slices that are written until nothing is left of what was there become one cat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tome_fx.passes.capture import capture

aten = torch.ops.aten
JOINS = {aten.cat.default, aten.slice_scatter.default, aten.select_scatter.default}


def captured(f: Callable[..., Tensor], *args: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The IR of a function, and its joins and writes in order."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(capture(gm, inputs).gm)
        return found[-1].forward

    torch._dynamo.reset()
    assert torch.equal(torch.compile(f, backend=backend)(*args), f(*args))
    (gm,) = found
    return gm, [node.target for node in gm.graph.nodes if node.target in JOINS]


def two(a: Tensor, b: Tensor) -> Tensor:
    y = a.new_empty(2, a.shape[1] + b.shape[1], 4)
    y[:, : a.shape[1]] = a
    y[:, a.shape[1] :] = b
    return y


def backwards(a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros(2, a.shape[1] + b.shape[1], 4)
    y[:, -b.shape[1] :] = b
    y[:, : -b.shape[1]] = a
    return y


def token_first(a: Tensor, b: Tensor) -> Tensor:
    y = torch.ones(2, 1 + b.shape[1], 4)
    y[:, 0] = a[:, 0]
    y[:, 1:] = b
    return y


def narrowed(a: Tensor, b: Tensor) -> Tensor:
    y = b.new_empty(2, a.shape[1] + b.shape[1], 4)
    y.narrow(1, 0, a.shape[1]).copy_(a)
    y.narrow(1, a.shape[1], b.shape[1]).copy_(b)
    return y


def gap(a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros(2, a.shape[1] + b.shape[1] + 1, 4)
    y[:, : a.shape[1]] = a
    y[:, a.shape[1] + 1 :] = b
    return y


def over(a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros(2, b.shape[1], 4)
    y[:] = b
    y[:, : a.shape[1]] = a
    return y


def read_between(a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros(2, a.shape[1] + b.shape[1], 4)
    y[:, : a.shape[1]] = a
    seen = y.sum()
    y[:, a.shape[1] :] = b
    return y + seen


A, B = torch.randn(2, 3, 4), torch.randn(2, 5, 4)


@pytest.mark.parametrize("f", [two, backwards, token_first, narrowed])
def test_covered_is_a_cat(f: Callable[..., Tensor]) -> None:
    assert captured(f, A, B)[1] == [aten.cat.default]


@pytest.mark.parametrize("f", [gap, over, read_between])
def test_what_is_left_stays_written(f: Callable[..., Tensor]) -> None:
    assert aten.cat.default not in captured(f, A, B)[1]


@pytest.mark.parametrize("f", [torch.hstack, torch.vstack, torch.dstack, torch.column_stack])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_stacks_are_cats(f: Callable[..., Tensor], rank: int) -> None:
    parts = torch.randn(2, 3, 4)[(0,) * (3 - rank)], torch.randn(2, 3, 4)[(0,) * (3 - rank)]
    assert captured(lambda a, b: f((a, b)), *parts)[1] == [aten.cat.default]
