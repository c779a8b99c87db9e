"""Hypothesis: any legal small transformer of tests.models; any mask of pairs of tests.spellings."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import strategies as st

from tests import spellings
from tests.models import CHOICES, Spec

_FLAGS = ("rms", "qk_norm", "layer_scale", "parallel", "talking", "cross", "slice_write", "skip", "shared", "dead")
_SIZES: dict[str, tuple[Any, ...]] = {
    "grid": ((6, 6), (5, 6), (4, 8), (7, 5)),
    "dim": (32, 48),
    "heads": (2, 4),
    "depth": (3, 2, 4),
    "batch": (2, 1, 3),
    "drop": (0.0, 0.1),
    "drop_path": (0.0, 0.1),
}
_ORDER: dict[str, tuple[Any, ...]] = {
    **{name: CHOICES[name] for name in ("attention", "kind", "softmax", "mask", "prefix", "readout")},
    **{name: values for name, values in CHOICES.items() if name not in ("attention", "kind", "softmax")},
    **dict.fromkeys(_FLAGS, (False, True)),
    **_SIZES,
}


def legal(spec: Spec, **changes: Any) -> Spec | None:
    """The changed spec, or None when there is no such model."""
    try:
        return spec.replace(**changes)
    except ValueError:
        return None


def thinned(cases: Iterable[Any], step: int, ids: Any = str) -> list[Any]:
    """pytest.params of all cases, of which all but each `step`-th are slow; tuples are several arguments."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), id=ids(case), marks=[pytest.mark.slow] * (i % step > 0)
        )
        for i, case in enumerate(cases)
    ]


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Chooses field after field among the values that keep the spec legal; shrinks to the plainest model."""
    spec = Spec(readout="tokens", seed=draw(st.integers(0, 999)))
    for name, values in _ORDER.items():
        options = [made for value in values if (made := legal(spec, **{name: value}))]
        spec = draw(st.sampled_from(options))
    return spec


def random_spec(rng: random.Random) -> Spec:
    """As `specs`, with all values alike and no hypothesis."""
    spec = Spec(readout="tokens", seed=rng.randrange(1000))
    for name, values in _ORDER.items():
        spec = rng.choice([made for value in values if (made := legal(spec, **{name: value}))])
    return spec


def schedules(spec: Spec) -> st.SearchStrategy[Any]:
    """Every form of r that merges something and leaves enough equal partners among 30 and more tokens."""
    blocks = spec.depth if (spec.kind == "softmax" and spec.softmax != "manual") or spec.shared else 1
    return st.one_of(
        st.integers(1, 4),
        st.lists(st.integers(0, 5), min_size=1, max_size=blocks).filter(any),
        st.tuples(st.integers(2, 3), st.sampled_from([-1, 0.5])),
        st.sampled_from([0.05, 0.1]),
    )


@st.composite
def masks(draw: st.DrawFn, flex: bool = True) -> tuple[str, str, str]:
    """(kind, way to make it, way to apply it) of a mask of pairs; see `tests.spellings`."""
    kind = draw(st.sampled_from(list(spellings.KINDS)))
    way = draw(st.sampled_from(spellings.ways(kind)))
    applies = [name for name in spellings.applies(kind) if flex or name not in spellings.FLEX]
    return kind, way, draw(st.sampled_from(applies))
