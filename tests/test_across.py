"""Groups of one call that serve the next calls: what they give, whose they are, and that nothing is compared again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tome_fx
from tests.models import Spec, build, redraw
from tome_fx import across, backend, matching
from tome_fx.matching import bipartite
from tome_fx.report import ToMeWarning

R = 6


class Replayed:
    """A matcher that keeps the pairs it finds, or gives those it kept, in order."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.turn: Iterator[Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.turn is None:
            self.kept.append(bipartite(*args))
            return self.kept[-1]
        return next(self.turn)


@pytest.fixture
def replayed() -> Iterator[Replayed]:
    held = dict(matching._MATCHERS)
    tome_fx.register_matcher("replayed", made := Replayed())
    yield made
    matching._MATCHERS.clear()
    matching._MATCHERS.update(held)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend=tome_fx.tome_backend(**{"r": R, "inner": "eager", **options}))


def model_and_inputs(spec: Spec, count: int) -> tuple[nn.Module, list[Any]]:
    """A model and different inputs, each the arguments of a call."""
    return build(spec)[0], [build(replace(spec, seed=spec.seed + i))[1] for i in range(count)]


@pytest.mark.parametrize("options", [{}, {"placement": "branch"}, {"placement": "branch", "reuse": 1}])
def test_later_calls_merge_what_the_first_one_merged(replayed: Replayed, options: dict[str, Any]) -> None:
    """Against a matcher that finds pairs for the first input and gives the same for the second."""
    model, (first, second) = model_and_inputs(Spec(depth=3), 2)
    fast = compiled(model, matcher="replayed", **options)
    expected = [fast(*first)]
    replayed.turn = iter(list(replayed.kept))
    expected.append(fast(*second))
    assert replayed.kept, "nothing was merged"
    replayed.turn = None
    count = len(replayed.kept)
    with tome_fx.reuse_across_calls(2):
        found = [fast(*first), fast(*second)]
    assert len(replayed.kept) == 2 * count
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_turns() -> None:
    """Every fourth call compares, a restart too, and outside every call does."""
    model, xs = model_and_inputs(Spec(depth=2), 6)
    fast = compiled(model)
    plain = [fast(*x) for x in xs]
    with tome_fx.reuse_across_calls(4) as reuse:
        found = [fast(*x) for x in xs]
        reuse.restart()
        again = fast(*xs[5])
    own = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert own == [True, False, False, False, True, False]
    assert torch.equal(again, plain[5])
    assert all(torch.equal(fast(*x), y) for x, y in zip(xs, plain, strict=True))


def test_a_call_that_raised_has_no_turn(replayed: Replayed) -> None:
    """Called again it finds its groups: there are none that it could reuse."""
    model, (x, y) = model_and_inputs(Spec(depth=2), 2)
    fast = compiled(model, matcher="replayed")
    plain = fast(*x)
    with tome_fx.reuse_across_calls(2):
        replayed.turn = iter(())
        with pytest.raises(StopIteration):
            fast(*x)
        replayed.turn = None
        assert torch.equal(fast(*x), plain)
        assert not torch.equal(fast(*y), plain)


def test_calls_of_a_step_have_groups_of_their_own() -> None:
    model, xs = model_and_inputs(Spec(depth=2), 4)
    fast = compiled(model)
    apart = []
    for pair in (xs[::2], xs[1::2]):
        with tome_fx.reuse_across_calls(2):
            apart.append([fast(*x) for x in pair])
    with tome_fx.reuse_across_calls(2, calls=2):
        found = [fast(*x) for x in xs]
    assert all(
        torch.equal(a, b) for a, b in zip(found, [x for pair in zip(*apart, strict=True) for x in pair], strict=True)
    )


def test_modules_that_share_code_and_shapes_have_groups_of_their_own() -> None:
    """One graph serves both; each finds its groups at its own first call."""
    models = [build(Spec(depth=2))[0], redraw(build(Spec(depth=2))[0], 5).eval()]
    x, y = (build(Spec(seed=seed))[1] for seed in (0, 1))
    torch.compiler.reset()
    counter = CompileCounterWithBackend(tome_fx.tome_backend(r=R, inner="eager"))
    fast = torch.compile(lambda model, x: model(*x), backend=counter)
    plain = [fast(model, x) for model in models]
    with tome_fx.reuse_across_calls(2):
        found = [fast(model, x) for model in models]
        later = [fast(model, y) for model in models]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert not any(torch.equal(a, fast(model, y)) for a, model in zip(later, models, strict=True))


def test_other_shapes_find_their_own() -> None:
    model, (x, y) = model_and_inputs(Spec(depth=2), 2)
    fast = compiled(model)
    torch._dynamo.mark_dynamic(x[0], 0)
    wide = tuple(torch.cat([a, b]) for a, b in zip(x, y, strict=True))
    plain = fast(*x), fast(*wide)
    with tome_fx.reuse_across_calls(9):
        assert torch.equal(fast(*x), plain[0])
        assert torch.equal(fast(*wide), plain[1])
        assert not torch.equal(fast(*y), fast(*x))


def test_nothing_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that reuses has no match, nor what only matches read; the other one gives what it takes."""
    made = []
    monkeypatch.setattr(backend, "Across", lambda *args: made.append(across.Across(*args)) or made[-1])
    model, x = build(Spec(depth=3))
    compiled(model, placement="branch")(*x)
    (graph,) = made
    given, taken = across.giving(graph.gm).graph, across.taking(graph.gm).graph
    groups = across.groups_of(given)
    assert len(groups) >= 3 * 3, groups
    assert given.output_node().args[0][1:] == tuple(groups)
    inputs = [len(g.find_nodes(op="placeholder")) for g in (given, taken)]
    assert inputs[1] == inputs[0] + len(groups)
    assert not across.groups_of(taken) and len(taken.nodes) < len(given.nodes)


def test_gradients() -> None:
    """Of the same input, reused groups are its own: so are the gradients."""
    model, x = build(Spec(depth=2))
    fast, found = compiled(model), []
    with tome_fx.reuse_across_calls(2):
        for _ in range(3):
            model.zero_grad()
            fast(*x).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_inductor(dtype: torch.dtype) -> None:
    model, (x, y) = model_and_inputs(Spec(depth=2), 2)
    model, x, y = model.to(dtype), *(tuple(part.to(dtype) for part in parts) for parts in (x, y))
    outputs = {}
    for inner in ("inductor", "eager"):
        fast = compiled(model, inner=inner)
        with torch.no_grad(), tome_fx.reuse_across_calls(2):
            outputs[inner] = [fast(*x), fast(*y), fast(*y), fast(*x)]
    for a, b in zip(*outputs.values(), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
        )


def test_words() -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="steps must be an int of 1 or more"):
            tome_fx.reuse_across_calls(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calls must be an int of 1 or more"):
        tome_fx.reuse_across_calls(2, calls=0)
    with pytest.warns(ToMeWarning, match="no model that merges tokens was called"), tome_fx.reuse_across_calls(2):
        pass
    once = tome_fx.reuse_across_calls(2)
    with pytest.raises(RuntimeError, match="entered already"), once, once:
        pass
