"""The zoo: its committed results hold what docs/zoo.md says, and a few of its models run here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
sys.path.append(str(ROOT / "benchmarks"))

import zoo  # noqa: E402
import zoo_models  # noqa: E402

NO_RULE = {
    "aten.meshgrid": "makes coordinates out of sizes, before anything is merged",
    "aten.unfold": "overlapping windows of a grid (HaloNet): positions",
    "aten.one_hot": "position indices",
    "aten.conv_transpose2d": "neighbours on a grid",
    "aten.adaptive_max_pool2d": "neighbours on a grid",
    "aten._weight_norm": "makes a weight",
    "aten.index_put": "makes the table of the blocks of a flex_attention mask",
    "aten.im2col": "neighbours on a grid",
    "aten.col2im": "neighbours on a grid",
    "aten._upsample_bicubic2d_aa": "resizes a position table",
}
"""Ops of the zoo that have no rule: merged values are unmerged before them. Why that is all there is to say."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"]


def test_no_row_is_bad(rows: list[dict[str, Any]]) -> None:
    """No crash, no changed shape, r=0 the identity, the lossless law kept, and a reason wherever nothing merges."""
    assert len(rows) > 100
    assert {row["name"]: row.get("failed") or zoo.verdict(row) for row in rows if zoo.bad(row)} == {}


def test_every_op_has_a_rule_or_a_reason(rows: list[dict[str, Any]]) -> None:
    seen = {op for row in rows for op in row.get("unknown", {})}
    assert seen <= NO_RULE.keys(), f"write a rule, or why there is none: {sorted(seen - NO_RULE.keys())}"


def test_the_table_is_that_of_the_results(rows: list[dict[str, Any]]) -> None:
    held = json.loads(RESULTS.read_text())
    assert zoo.table(held["rows"], held["r"]) == zoo.TABLE.read_text()


def test_bad_rows_are_told() -> None:
    """Each kind of defect makes a row bad; a model that merges nothing needs a reason."""
    good = {"name": "x", "shapes": True, "identity": True, "sites": 3, "merged": 3, "lossless": "exact", "reasons": {}}
    assert not zoo.bad(good)
    assert not zoo.bad({**good, "merged": 0, "reasons": {"causal": 3}, "lossless": ""})
    for change in ({"failed": "boom"}, {"shapes": False}, {"identity": False}, {"lossless": "broken"}, {"merged": 0},
                   {"batch": "mixed: 3e-2"}, {"tied": {"holds": False}}):  # fmt: skip
        assert zoo.bad({**good, **change}), change


def test_the_tied_law_in_one_cell() -> None:
    held = {"holds": True, "error": 4e-16, "explained": 4e-16, "approximations": {}, "dtype": "float64"}
    assert zoo.tied({}) == ""
    assert zoo.tied({"tied": held}) == "4e-16"
    rotary = {**held, "error": 2e-3, "approximations": {"mul": 12}}
    assert zoo.tied({"tied": rotary}) == "2e-03, 4e-16 without 12 mul"
    assert zoo.tied({"tied": {**held, "holds": False, "dtype": "float32"}}) == "BROKEN 4e-16 (float32)"


def test_models_are_found_by_looking() -> None:
    """Every module of timm that speaks of attention is there, each with the smallest variant of every family."""
    modules = zoo_models.timm_modules()
    assert {"vision_transformer", "swin_transformer", "pit", "xcit", "maxxvit", "davit", "eva"} <= modules.keys()
    assert "caformer_s18" in modules["metaformer"]
    assert len(zoo_models.names(sweep=True)) > 200


ONE_ROW = [
    "transformers/vit:sdpa",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("timm/pit_ti_224", "torchvision/swin_t")),
]


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row(name: str) -> None:
    """A row by the command that makes it, in its own process."""
    if name.startswith("timm/pit"):
        (name,) = [f"timm/{n}" for n in zoo_models.timm_modules()["pit"]]
    row = zoo.run(name, 8)
    assert not zoo.bad(row), row
    assert row["merged"] > 0
    assert row["tied"]["explained"] < 1e-9


def test_help() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks/zoo.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--sweep" in done.stdout
