"""The folders of passes/ stand in an order, and each imports only from those before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PASSES = Path(__file__).parent.parent / "passes"
ORDER = ("algebra", "building", "rules", "analysis", "merging", "normal", "", "inner")
"""The folders, the passes themselves as ""."""
FILES = sorted(PASSES.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The files of passes/ that one imports when it is imported, relative to passes/, without their ending."""
    own, found = path.relative_to(PASSES).parent.parts, set()
    # What stands under TYPE_CHECKING is there for types alone.
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = own[: len(own) - (node.level - 1)]
            found.add("/".join([*base, *(node.module or "").split(".")]).rstrip("/"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PASSES)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(PASSES).parts[0] if path.parent != PASSES else ""
    if path.name == "__init__.py":
        return
    places = [name.split("/")[0] if name.split("/")[0] in ORDER else "" for name in imported(path)]
    assert all(ORDER.index(place) <= ORDER.index(folder) for place in places), imported(path)


def test_files_are_short() -> None:
    """No file above 500 lines; more than five parameters only where an operator of torch is spelled out."""
    assert {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 500} == {}
    operators = {"_multi_head_attention", "_encoder_layer", "flex_attention", "_attention"}
    long = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                long |= {node.name} if len([n for n in names if n not in ("self", "cls")]) > 5 else set()
    assert long <= operators
