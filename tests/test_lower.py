"""lower: the same values in another form."""

from __future__ import annotations

import pytest
import torch

from tests.models import Spec, build
from tests.recording import record
from tome_fx.passes.lower import FORMS, fuse, spell_out

CPU_FORM = {"tome.match_size": 2, "tome.merge_add": 2}
READABLE = {"tome.match": 2, "tome.merge": 2, "tome.merge_size": 2, "tome.log_size": 1}
SPELLED_OUT = {"tome.match": 2, "tome.merge_aten": 2, "tome.merge_size_aten": 2, "aten.log": 1}
CASES = {"cpu": (fuse, CPU_FORM), "none": (None, READABLE), "other": (spell_out, SPELLED_OUT)}


@pytest.mark.parametrize("form", CASES)
def test_every_form_computes_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    want, _ = record(model, args, r=4)
    chosen, expected = CASES[form]
    monkeypatch.setitem(FORMS, "cpu", chosen)
    got, seen = record(model, args, r=4)
    torch.testing.assert_close(got, want)
    ops = {name: count for name, count in seen.ops().items() if name.startswith("tome.") or name == "aten.log"}
    assert ops == expected
