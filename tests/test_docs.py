"""What the docs name is there."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tome_fx
from tome_fx.methods import METHODS, PIECES

ROOT = Path(__file__).parent.parent
PAGES = [(ROOT / "docs" / name).read_text() for name in ("programs.md", "export.md", "limits.md")]
NAMED = sorted({named for page in PAGES for named in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)})


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_behind_a_row_is_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("page", "before", "count"), [("programs.md", "# Programs", 20), ("limits.md", "## Good to know", 8)]
)
def test_every_row_names_a_test(page: str, before: str, count: int) -> None:
    """In the first table after a heading."""
    table = (ROOT / "docs" / page).read_text().partition(before)[2]
    table = table[table.index("| ") :].split("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > count
    assert all("`test_" in row.rsplit("|", 2)[1] for row in rows)


def test_the_api_page_is_that_of_the_docstrings() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    import api

    assert api.PAGE.read_text() == api.page(), "python benchmarks/api.py writes it"


def page_of_methods() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # first: benchmarks/accuracy has a methods.py too
    import methods_page

    return methods_page


def test_the_page_of_methods_is_that_of_the_registry_and_the_results() -> None:
    methods_page = page_of_methods()

    assert methods_page.PAGE.read_text() == methods_page.page(), "python benchmarks/methods_page.py writes it"


def test_the_example_of_a_method_of_ones_own_merges() -> None:
    """What docs/methods.md shows, and it is not in the page afterwards."""
    methods_page = page_of_methods()
    names: dict[str, Any] = {"__name__": "example"}
    try:
        exec(methods_page.EXAMPLE, names)
        model, x = torch.nn.TransformerEncoder(layer(), 3, enable_nested_tensor=False).eval(), torch.randn(2, 33, 32)
        report = tome_fx.explain(model, (x,), r=4, method="middle_out")
        assert report.merged_sites == 3
        assert methods_page.PAGE.read_text() == methods_page.page()
    finally:
        METHODS.pop("middle_out", None)
        PIECES["importance"].pop("middle", None)


def layer() -> torch.nn.TransformerEncoderLayer:
    return torch.nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, norm_first=True)


def test_the_table_of_exported_models_is_that_of_its_result() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    import export

    result = json.loads(export.RESULTS.read_text())
    assert list(result["rows"]) == list(export.MODELS), "python benchmarks/export.py measures them"
    assert export.between(export.PAGE.read_text()) == export.table(result), "benchmarks/export.py --page writes it"
    # A number that misses the goal by merging is a defect; a refusal has its reason below the table.
    assert not [(name, f) for name, row in result["rows"].items() for f in export.FORMATS if export.ours(row[f])]


def test_the_table_of_language_models_is_that_of_its_result() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    import language

    result = json.loads((language.harness.RESULTS / "language-cpu.json").read_text())
    assert "\n".join(language.table(language.loaded(result))) in (ROOT / "docs" / "language.md").read_text()


def test_the_table_of_tuned_models_is_that_of_its_result() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    import tune

    page = tune.PAGE.read_text()
    result = json.loads(tune.RESULTS.read_text())
    assert tune.written(page, result) == page, "python benchmarks/tune.py --page writes it"
