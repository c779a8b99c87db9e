"""The zoo: its committed results hold what docs/zoo.md says, and a few of its models run here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import palette

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
sys.path.append(str(ROOT / "benchmarks"))

import zoo  # noqa: E402
import zoo_models  # noqa: E402
import zoo_outside  # noqa: E402
import zoo_packed  # noqa: E402

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
    "aten._upsample_bilinear2d_aa": "resizes a position table",
    "aten.grid_sampler": "resizes a position table",
    "aten.bucketize": "makes positions",
    "aten.embedding_bag": "looks up positions",
    "aten.repeat_interleave": "numbers the images of a pack",
    "aten.polar": "makes rotary angles",
    "aten.complex": "rotary angles and channels as complex numbers",
    "aten.pad_sequence": "packs samples of several lengths, before anything is merged",
    "aten.fft_fft2": "mixes the pixels of each patch, before anything is merged",
    "aten.conv_transpose3d": "neighbours on a grid",
    "aten.convolution": "neighbours on a grid: it is a transposed one",
    "aten._weight_norm_interface": "makes a weight",
    "aten.histc": "counts the tokens of each expert",
    "aten.uniform": "draws noise",
    "aten.multinomial": "draws which patches are kept",
    "transformers.grouped_mm_fallback": "the products of experts: values choose which weight a token meets",
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


def test_every_library_outside_is_in_the_extra() -> None:
    """A library that a row imports can be installed with `pip install tome-fx[zoo]`, and none stands there unused."""
    text = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^zoo = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert extra is not None
    named = set(re.findall(r'"([\w.-]+)>=', extra.group(1))) - {"diffusers"}
    assert named == set(zoo_outside.LIBRARIES.values())
    assert {name.partition("/")[0] for name in zoo_outside.names()} == zoo_outside.LIBRARIES.keys()
    names = zoo_models.names()
    assert len(names) == len(set(names))


def test_a_missing_library_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    with pytest.raises(zoo_models.NotOffered, match=r"x-transformers is not installed .* pip install 'tome-fx\[zoo\]'"):
        zoo_models.build("x_transformers/vit")


def test_a_missing_tower_is_a_row_that_says_so() -> None:
    with pytest.raises(zoo_models.NotOffered, match="no packed tower nothing"):
        zoo_models.build("packed/nothing")


def test_packed_towers_are_found_by_looking() -> None:
    """Every model of transformers that packs images has its vision tower there, and that of no language model."""
    towers = zoo_packed.towers()
    assert {"qwen2_vl", "qwen2_5_vl", "glm4v", "pixtral", "kimi_k25"} <= towers.keys()
    assert all("Vision" in kind for _, kind in towers.values())


def well_formed(name: str) -> None:
    """A builder gives a model in eval mode, with inputs and palettes of one form, every sample in all of them."""
    try:
        built = zoo_models.build(name)
    except zoo_models.NotOffered as missing:
        pytest.skip(str(missing))
    assert not any(module.training for module in built.model.modules())
    forms = {tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x) for x in args)
             for args in (built.args, *built.palettes)}  # fmt: skip
    assert len(forms) == 1 and built.palettes
    assert built.args[0].shape[0] == zoo_models.BATCH
    with torch.no_grad():
        outputs = palette.leaves(built.model(*built.args, **built.kwargs))
    assert outputs and all(x.isfinite().all() for x in outputs)


ONE_OF_EACH = ["packed/qwen2_vl", "packed/idefics2", "packed/qwen2_5_omni_audio", "vit_pytorch/vit", "whisper/encoder",
               "torchaudio/Conformer", "hiera/image", "x_transformers/vit"]  # fmt: skip


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_builders_are_well_formed(name: str) -> None:
    well_formed(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in (*(f"packed/{n}" for n in zoo_packed.names()), *zoo_outside.names())
                                  if n not in ONE_OF_EACH])  # fmt: skip
def test_all_builders_are_well_formed(name: str) -> None:
    well_formed(name)


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
