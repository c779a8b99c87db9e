"""Configuration: what is not possible is refused with a sentence that says what is."""

from __future__ import annotations

import contextlib
import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sympy
import torch

import tome_fx
from tests.models import Spec, build
from tests.palette import compiled
from tome_fx import tome_backend
from tome_fx.backend import tome
from tome_fx.config import ToMeConfig, config_from, updated

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": -1}, ValueError, "0 or more"),
    ({"r": "16"}, TypeError, "int"),
    ({"r": True}, TypeError, "int"),
    ({"r": 1.0}, ValueError, "below 1"),
    ({"r": 16.0}, ValueError, "below 1"),
    ({"r": -0.1}, ValueError, "share"),
    ({"r": float("nan")}, ValueError, "share"),
    ({"r": (16,)}, TypeError, "inflection"),
    ({"r": (16, 2)}, ValueError, r"\[-1, 1\]"),
    ({"r": (16, float("nan"))}, ValueError, r"\[-1, 1\]"),
    ({"r": (-1, 0)}, ValueError, "0 or more"),
    ({"r": ("16", 0)}, TypeError, "inflection"),
    ({"r": [1, -2]}, ValueError, "negative"),
    ({"r": [1, 2.5]}, TypeError, "ints"),
    ({"r": [1, True]}, TypeError, "ints"),
    ({"flops": 0.0}, ValueError, "between 0 and 1"),
    ({"flops": 1.5}, ValueError, "between 0 and 1"),
    ({"flops": "half"}, (ValueError, TypeError), "between 0 and 1"),
    ({"r": 4, "metric": "keys"}, ValueError, 'did you mean "key"'),
    ({"r": 4, "metric": "values"}, ValueError, 'did you mean "value"'),
    ({"r": 4, "similarity": "cosin"}, ValueError, 'did you mean "cosine"'),
    ({"r": 4, "partition": "alternate"}, ValueError, 'did you mean "alternating"'),
    ({"r": 4, "matcher": "bipartit"}, ValueError, 'matcher must be one of .* did you mean "bipartite"'),
    ({"r": 4, "matcher": ["bipartite", 3]}, ValueError, "matcher must be one of"),
    ({"r": 4, "merging": "pruned"}, ValueError, 'did you mean "prune"'),
    ({"r": 4, "matcher": "random", "padding_first": True}, ValueError, "padding_first goes by similarity"),
    ({"r": 4, "inner": "inducto"}, ValueError, 'did you mean "inductor"'),
    ({"r": 4, "placement": "steam"}, ValueError, 'did you mean "stream"'),
    ({"r": 4, "protect": -1}, ValueError, "0 or more"),
    ({"r": 4, "protect": "class"}, ValueError, "auto"),
    ({"r": 4, "protect": 1.5}, (ValueError, TypeError), "auto"),
    ({"r": 4, "prop_attn": 1}, TypeError, "True or False"),
    ({"r": 4, "drop_unread": 1}, TypeError, "drop_unread must be True or False"),
    ({"r": 4, "strict": "no"}, TypeError, "True or False"),
    ({"r": 4, "margin": float("nan")}, ValueError, "margin must be a number, got nan"),
    ({"r": 4, "levels": 0}, ValueError, "levels must be a number of 1 or more, got 0"),
]


@pytest.mark.parametrize(("values", "error", "sentence"), BAD, ids=lambda v: str(v)[:40])
def test_bad_values(values: dict[str, Any], error: Any, sentence: str) -> None:
    """At tome_backend(...), not at the first call of the model."""
    with pytest.raises(error, match=sentence):
        tome_backend(**values)


def test_r_and_flops_exclude_each_other() -> None:
    with pytest.raises((ValueError, TypeError), match="flops"):
        tome_backend(8, flops=0.5)


@pytest.mark.parametrize("entry", ["explain", "rewrite", "trace_tokens"])
def test_the_other_entries_refuse_the_same(entry: str) -> None:
    model, args = build(Spec())
    with pytest.raises(ValueError, match="0 or more"):
        getattr(tome_fx, entry)(model, args, r=-1)
    with pytest.raises((ValueError, TypeError), match="metrik"):
        getattr(tome_fx, entry)(model, args, r=4, metrik="key")


def test_list_longer_than_the_blocks() -> None:
    """Only the model tells: an error at the first call, never a silent cut or a warning."""
    model, args = build(Spec(depth=3))
    with pytest.raises(ValueError, match=r"4 blocks.*3"):
        tome_fx.explain(model, args, r=[1, 1, 1, 1])
    with pytest.raises(Exception, match=r"4 blocks.*3"):
        compiled(model, [1, 1, 1, 1])(*args)


def test_protect_longer_than_the_tokens() -> None:
    """protect=1000 leaves nothing to merge: one warning, right result."""
    model, args = build(Spec())
    with pytest.warns(tome_fx.ToMeWarning, match="(?i)merge"), torch.no_grad():
        got = compiled(model, 4, protect=1000)(*args)
    with torch.no_grad():
        torch.testing.assert_close(got, model(*args))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tome.rr": 16}, r'unknown.*rr.*did you mean "r"'),
        ({"tome.r": 4, "tome.metrc": "key"}, 'did you mean "metric"'),
        ({"tome.r": -4}, "0 or more"),
        ({"tome.matcher": "randm"}, 'did you mean "random"'),
        ({"tome.is_list": True, "tome.r": 4}, "unknown"),
    ],
    ids=str,
)
def test_bad_options_through_torch_compile(options: dict[str, Any], sentence: str) -> None:
    """The backend by name; where it is not installed as a package, the function that the name stands for."""
    model, args = build(Spec())
    with pytest.raises(Exception, match=sentence):
        torch.compile(model, backend=tome, options={"tome.inner": "eager", **options})(*args)


def test_tome_options_to_an_instance_are_not_dropped() -> None:
    """tome_backend(4) with options={"tome.r": 8}: applied or refused, never silently ignored."""
    model, args = build(Spec())
    fast = torch.compile(model, backend=tome_backend(4, inner="eager"), options={"tome.r": 8})
    start = len(tome_fx.reports())
    with contextlib.suppress(Exception):
        fast(*args)
    assert [tuple(report.tokens[0]) for report in tome_fx.reports()[start:]] in ([], [(37, 29)])


def test_config_is_a_frozen_value() -> None:
    """Equal values are equal and hash alike, a list is not a tuple, nothing can be changed."""
    assert ToMeConfig(r=[3, 1]) == ToMeConfig(r=[3, 1])
    assert hash(ToMeConfig(r=[3, 1])) == hash(ToMeConfig(r=[3, 1]))
    assert ToMeConfig(r=[3, 1]) != ToMeConfig(r=(3, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ToMeConfig(r=3).r = 4  # type: ignore[misc]


class Index:
    """A whole number of somebody's own."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(
    "whole",
    [np.int64, np.int8, np.uint16, np.array, torch.tensor, Index, sympy.Integer, np.intp],
    ids=lambda w: w.__name__,
)
def test_whole_numbers_of_others(whole: Any) -> None:
    """In every place that takes an int, in a list, in a pair and through loose keys: the same config, the same hash."""
    for name in ("r", "protect", "every", "multiple"):
        made, plain = (ToMeConfig(**{"r": 4, name: value}) for value in (whole(3), 3))
        assert made == plain
        assert hash(made) == hash(plain)
        assert type(getattr(made, name)) is int
    assert tome_backend([whole(8), 4, whole(2)]) == tome_backend([8, 4, 2])
    assert tome_backend((whole(8), -1)) == tome_backend((8, -1))
    assert tome_backend((8, whole(-1) if whole is not np.uint16 else -1)) == tome_backend((8, -1))
    assert config_from({"r": whole(8)}) == updated(ToMeConfig(), {"r": whole(8)}) == ToMeConfig(r=8)


@pytest.mark.parametrize(
    "real",
    [np.float64, np.float32, np.float16, np.array, torch.tensor, lambda x: Fraction(x)],
    ids=lambda real: real.__name__,
)
def test_real_numbers_of_others(real: Any) -> None:
    assert ToMeConfig(r=real(0.125)) == ToMeConfig(r=0.125)
    assert ToMeConfig(flops=real(0.5)) == ToMeConfig(flops=0.5)
    assert ToMeConfig(r=(8, real(0.5))) == ToMeConfig(r=(8, 0.5))
    with pytest.raises(ValueError, match="below 1"):
        ToMeConfig(r=real(8.0))


def test_arrays_and_flags_of_others() -> None:
    assert ToMeConfig(r=np.array([8, 4, 2])) == ToMeConfig(r=torch.tensor([8, 4, 2])) == ToMeConfig(r=[8, 4, 2])
    assert ToMeConfig(r=4, prop_attn=np.bool_(False), strict=torch.tensor(True)) == ToMeConfig(
        r=4, prop_attn=False, strict=True
    )
    for wrong in (np.bool_(True), torch.tensor(True), np.datetime64("2020")):
        with pytest.raises(TypeError, match="r must be an int"):
            ToMeConfig(r=wrong)
    with pytest.raises(TypeError, match="ints"):
        ToMeConfig(r=np.array([1.5, 2]))


def test_config_from_loose_keys() -> None:
    assert config_from({"r": 8, "metric": "input"}) == ToMeConfig(r=8, metric="input")
    choices = {"metric": "value", "similarity": "dot", "partition": "random", "matcher": "random", "merging": "plain"}
    assert config_from({"r": 8, **choices}) == tome_backend(8, **choices).config == ToMeConfig(r=8, **choices)
    assert config_from({"r": 8, **choices}) != ToMeConfig(r=8)
    with pytest.raises(ValueError, match="unknown"):
        config_from({"r": 8, "is_list": True})


def test_every_field_has_a_docstring() -> None:
    """The attribute docstrings are the documentation of the options."""
    import ast
    import inspect

    (node,) = ast.parse(inspect.getsource(ToMeConfig)).body
    assert isinstance(node, ast.ClassDef)
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{ast.unparse(item.target)} has no docstring"
