"""The random transformers of `benchmarks/fuzz.py`: what is drawn, that it can be built, and that its judge can fail."""

from __future__ import annotations

import random

import pytest
import torch

from tests import mixtures
from tests import sequences as seq
from tests.mixtures import Judge, Mixture, draw


def test_a_number_draws_one_model() -> None:
    assert draw(random.Random("0:1")) == draw(random.Random("0:1")) != draw(random.Random("0:2"))
    mix = draw(random.Random("0:1"))
    assert eval(repr(mix)) == mix  # what a failure prints


def test_every_spelling_is_drawn() -> None:
    drawn = [draw(random.Random(i)) for i in range(3000)]
    assert {m.core for m in drawn} == set(seq.CORES)
    assert {m.insert[0] for m in drawn if m.insert} == set(seq.INSERT)
    assert {m.frames[:2] for m in drawn if m.frames} == {(a, b) for a in seq.FRAMES for b in seq.READ_FRAMES}
    assert {m.windows for m in drawn} == {"", *seq.PAD_GRID}
    assert {m.relative for m in drawn} == {"", *seq.RELATIVE}
    assert {m.padding for m in drawn} == {"", *seq.PADDING}
    assert any(0 in m.lengths for m in drawn) and any(m.order[0] == "keep" for m in drawn)


def test_a_plain_one_has_no_problem() -> None:
    judged = Judge(Mixture(insert=("cat of slices", "front", 0), placement="stream")).judge()
    assert (judged.problems, judged.void, judged.merged) == ([], False, 2)


@pytest.mark.parametrize("broken", ["futures", "samples", "law"])
def test_the_judge_sees_what_is_wrong(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose merged form leaks: into earlier tokens, from other samples, or by a constant."""
    judged = Judge(Mixture(pairs=("causal", "bool buffer", "sdpa, bool") if broken == "futures" else ()))
    made = judged.made

    def leak(name: str, *args: torch.Tensor) -> torch.Tensor:
        y = type(made).__call__(made, name, *args)
        if name != "merged":
            return y
        return y + {"futures": y.flip(1), "samples": y.flip(0), "law": 0.1}[broken]

    monkeypatch.setattr(judged, "made", type("Leaking", (), {
        "__call__": lambda self, *a: leak(*a), "__getattr__": lambda self, name: getattr(made, name)})())  # fmt: skip
    wanted = {"futures": "cannot see", "samples": "a sample moved", "law": "equal tokens"}[broken]
    assert any(wanted in problem for problem in judged.judge().problems), judged.problems


def test_special_tokens_stand_where_they_are_put() -> None:
    mix = Mixture(insert=("index_put", "behind", 2))
    model = mixtures.Model(mix)
    y = model.join(torch.zeros(2, mix.n, mixtures.D))
    assert (y.abs().sum(-1)[0] > 0).nonzero().flatten().tolist() == mix.special
