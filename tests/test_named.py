"""Backends by name, and what the environment says: what is said nearest to the call holds."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

import tome_fx
from tests.test_explain import Stack, tokens
from tome_fx.backend import tome
from tome_fx.named import named


def less(backend: Any, **options: Any) -> list[int]:
    """How many tokens each block merged."""
    before = len(tome_fx.reports())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Stack(), backend=backend, options={"tome.inner": "eager", "tome.placement": "stream", **options})(
            tokens()
        )
    return [a - b for a, b in sum(tome_fx.reports()[before:], tome_fx.ToMeReport()).tokens]


def test_every_name_is_a_backend() -> None:
    """The entry points that are installed, through torch's own registry."""
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    names = [point.name for point in points if point.value.startswith("tome_fx.")]
    assert {"tome", "tome_r8", "tome_r16", "tome_flops50"} <= set(names) <= set(torch._dynamo.list_backends())
    assert all(callable(torch._dynamo.lookup_backend(name)) for name in names)


def test_a_name_holds_its_schedule() -> None:
    assert less("tome_r4") == [4, 4, 4]
    assert less("tome_r4", **{"tome.r": [3, 2, 1]}) == [3, 2, 1]
    assert sum(less("tome_flops75")) > sum(less("tome_flops90")) > 0


@pytest.mark.parametrize("name", ["tome_rx", "tome_flops", "tome_r", "tome_flops100", "other_r8", "r8"])
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"no backend of tome_fx|between 0 and 1"):
        named(name)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"TOME_R": "5"}, [5, 5, 5]),
        ({"TOME_R": "[5, 4]"}, [5, 4]),
        ({"TOME_R": "0.1"}, [4, 4, 4]),
        ({"TOME_R": " "}, [16, 16, 8]),
        ({}, [16, 16, 8]),
    ],
)
def test_the_environment(variables: dict[str, str], found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert less(tome) == less(tome_fx.tome_backend(inner="eager")) == found
    assert less(tome, **{"tome.r": 3}) == less(tome_fx.tome_backend(r=3)) == [3, 3, 3]
    assert less("tome_r4") == [4, 4, 4]


def test_a_share_of_flops_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_FLOPS", "0.75")
    assert tome_fx.tome_backend().config.flops == 0.75
    assert tome_fx.tome_backend(r=2).config.flops is None
    monkeypatch.setenv("TOME_R", "8")
    with pytest.raises(ValueError, match="both set"):
        tome_fx.tome_backend()


@pytest.mark.parametrize("value", ["eight", "(8, -1)", "8 tokens", "null", "true"])
def test_what_is_no_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_R", value)
    with pytest.raises(ValueError, match=r"TOME_R=.* is no number"):
        tome_fx.tome_backend()


def test_a_number_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_R", "-3")
    with pytest.raises(ValueError, match="0 or more"):
        tome_fx.tome_backend()
