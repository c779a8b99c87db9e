"""What docs/limits.md calls good to know: each is as it says, and its remedy works."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tome_fx
from tests.palette import said
from tests.test_explain import Block, Stack, tokens
from tome_fx.explain import APART

R = 6


def backend(r: Any = R) -> Any:
    return tome_fx.tome_backend(r=r, inner="eager", placement="stream")


def made(call: Any, *args: Any) -> list[tome_fx.ToMeReport]:
    """Reports of the graphs that a call compiles."""
    before = len(tome_fx.reports())
    with torch.no_grad():
        call(*args)
    return tome_fx.reports()[before:]


def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_a_hook_added_later() -> None:
    """Dynamo has no guards on hooks of modules: the graph of before goes on being used, until a reset."""
    for skipped in (True, False):
        torch._dynamo.reset()
        model, x = Stack(), tokens()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skipped):
            fast = torch.compile(model, backend=backend())
            with torch.no_grad():
                before = fast(x)
            model.blocks[1].register_forward_hook(twice)
            assert len(made(fast, x)) == int(not skipped)
            with torch.no_grad():
                assert torch.equal(fast(x), before) is skipped  # whether the hook ran
                torch._dynamo.reset()
                assert not torch.equal(fast(x), before)
    assert torch._dynamo.config.skip_nnmodule_hook_guards  # what people have who set nothing


def test_a_module_added_later() -> None:
    model, x = Stack(), tokens()
    fast = torch.compile(model, backend=backend())
    (first,) = made(fast, x)
    model.blocks.append(Block().eval())
    (second,) = made(fast, x)
    assert (first.merged_sites, second.merged_sites) == (3, 4)


def test_a_rewritten_module_merges_again() -> None:
    """Compiled with tome_backend; with another backend it stays what it is."""
    model, x = Stack(), tokens()
    gm = tome_fx.rewrite(model, (x,), r=R, placement="stream")
    (again,) = made(torch.compile(gm, backend=backend()), x)
    assert again.merged_sites > 0
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(gm, backend="eager")(x), gm(x))


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_flops_are_counted_on_the_rewritten_module() -> None:
    """Dynamo steps aside under the counter's mode: a compiled model counts as the plain one, compiled before or not."""
    model, x = Stack(), tokens()
    fast, gm = torch.compile(model, backend=backend()), tome_fx.rewrite(model, (x,), r=R, placement="stream")

    def counted(f: Any) -> int:
        with FlopCounterMode(display=False) as mode, torch.no_grad():
            f(x)
        return mode.get_total_flops()

    plain = counted(model)
    for _ in range(2):
        assert not made(counted, fast) and counted(fast) == plain
        fast(x)
    assert counted(gm) < plain
    report = gm.meta["tome_report"]
    assert counted(gm) / plain == pytest.approx(report.flops_after / report.flops_before, abs=0.03)


def test_a_sweep_over_r() -> None:
    """Each r is a compilation of one function, also of a copy of the model; what is compiled is taken again."""
    x = tokens()
    with torch._dynamo.config.patch(recompile_limit=3):
        model = Stack()
        assert [len(made(torch.compile(model, backend=backend(r)), x)) for r in (1, 2, 1)] == [1, 1, 0]
        with pytest.warns(tome_fx.ToMeWarning, match="recompile_limit"):
            assert len(made(torch.compile(copy.deepcopy(model), backend=backend(3)), x)) == 1
        assert len(made(torch.compile(model, backend=backend(4)), x)) == 0  # as the plain model
        torch._dynamo.reset()
        assert len(made(torch.compile(model, backend=backend(4)), x)) == 1
        with torch._dynamo.config.patch(recompile_limit=10):
            assert [len(made(torch.compile(model, backend=backend(r)), x)) for r in range(5, 9)] == [1] * 4


@pytest.mark.skipif(not APART, reason="this release of torch counts all compilations of a function as one")
@pytest.mark.parametrize("look", ["explain", "check"])
def test_looking_takes_no_room(look: str) -> None:
    """Before, models that had been looked at a few times ran unmerged when they were compiled, without a word."""
    model, x = Stack(), tokens()
    with torch._dynamo.config.patch(recompile_limit=3):
        for r in range(1, 6):
            assert getattr(tome_fx, look)(model, (x,), r=r, placement="stream")
        fast, told = torch.compile(model, backend=backend(), dynamic=False), []
        for batch in range(2, 6):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = made(fast, tokens(batch))
            told.append((len(found), len(said(caught))))
    assert told == [(1, 0), (1, 0), (1, 1), (0, 0)]


@pytest.mark.skipif(not APART, reason="torch.compile has no isolate_recompiles in this release")
def test_isolated_recompiles() -> None:
    """Each torch.compile has a limit of its own, and is told of that."""
    model = Stack()
    with torch._dynamo.config.patch(recompile_limit=2):
        for r in range(1, 5):
            fast = torch.compile(model, backend=backend(r), dynamic=False, isolate_recompiles=True)
            assert len(made(fast, tokens(2))) == 1
        with pytest.warns(tome_fx.ToMeWarning, match="this is compilation 2 of one function"):
            assert len(made(fast, tokens(3))) == 1


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_over_a_compiled_module(name: str) -> None:
    """No backend is called, before a plain call compiled it and after."""
    model, x = Stack(), tokens()
    fast = torch.compile(model, backend=backend())
    for _ in range(2):
        assert not made(TRANSFORMS[name], fast, x)
        torch.testing.assert_close(TRANSFORMS[name](fast, x), TRANSFORMS[name](model, x))
        fast(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_of_a_module_inside_of_a_compiled_function() -> None:
    """vmap reads the name of what it maps: a function has one, a module spells itself out, which Dynamo cannot."""
    model, x = Stack(), tokens()
    assert not made(torch.compile(lambda x: torch.vmap(model)(x), backend=backend()), x[None])
    report = tome_fx.explain(lambda x: torch.vmap(model)(x), (x[None],), r=R, placement="stream")
    assert report.graphs == 0 and report.skipped
    (report,) = made(torch.compile(lambda x: torch.vmap(lambda y: model(y))(x), backend=backend()), x[None])
    assert report.merged_sites == 3


def test_reports_are_kept_to_a_thousand() -> None:
    for _ in range(1100):
        tome_fx.report.record(tome_fx.ToMeReport())
    assert len(tome_fx.reports()) == 1000
