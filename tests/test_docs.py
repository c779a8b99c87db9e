"""What the docs name is there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

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
