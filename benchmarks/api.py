"""Write docs/api.md: every public name with its signature and docstring. `--check` exits with status 1 where it is old.

    python benchmarks/api.py [--check]
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import tome_fx

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
INTRO = """# API

Everything that `import tome_fx` gives, from its docstrings (`python benchmarks/api.py` writes this page).
"""


def signature(name: str, what: Any) -> str:
    """A call as Python writes it, one parameter a line where it is long."""
    parameters = [str(p).replace("'", "") for p in inspect.signature(what).parameters.values()]
    kinds = [p.kind for p in inspect.signature(what).parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    line = f"tome_fx.{name}({', '.join(parameters)})"
    return line if len(line) < 100 else f"tome_fx.{name}(\n    " + ",\n    ".join(parameters) + ",\n)"


def entry(name: str, what: Any) -> str:
    """One name: a function, a class with its public members, an exception."""
    text = [f"## {name}\n"]
    if inspect.isfunction(what) or (dataclasses.is_dataclass(what) and name != "ToMeConfig"):
        text.append(f"```python\n{signature(name, what)}\n```\n")
    text.append(inspect.getdoc(what) or "")
    if inspect.isclass(what):
        for member, value in vars(what).items():
            own = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(own) and own.__doc__:
                call = "" if isinstance(value, property) else "()"
                text.append(f"\n- `.{member}{call}`: {' '.join(inspect.getdoc(own).split())}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text))


def page() -> str:
    """The whole of it."""
    functions = [n for n in tome_fx.__all__ if inspect.isfunction(getattr(tome_fx, n))]
    rest = [n for n in tome_fx.__all__ if n not in functions]
    return "\n".join([INTRO, *(entry(n, getattr(tome_fx, n)) + "\n" for n in [*functions, *rest])])


def written(path: Path, text: str) -> int:
    """Write a page, or compare it where the command line says --check: 1 if it is another."""
    if "--check" in sys.argv[1:]:
        return int(not path.exists() or path.read_text() != text)
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(written(PAGE, page()))
