#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): torch._dynamo.mark_dynamic with one of min= and max=.
#
# Expected from memory: both are optional, as their signature (int | None) has it, so that min=32 alone means "at least
#   32": sizes of images or numbers of tokens have a least and often no greatest.
# Seen: with neither, and with both, the function compiles. With one of them the first call raises an AssertionError,
#   "not simple sympy type <class 'NoneType'>: None", which names neither mark_dynamic nor the bound and points at the
#   user's code ("from user code: ...").
# Why: Dynamo makes a range of the two as they are, and a missing one is not filled in with 0 or infinity.
# Output:
#   {} compiled
#   {'min': 2} AssertionError: not simple sympy type <class 'NoneType'>: None
#   {'max': 64} AssertionError: not simple sympy type <class 'NoneType'>: None
#   {'min': 2, 'max': 64} compiled
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
cat > bounds.py <<'PYTHON'
import sys

import torch


def mean(x):
    return x.mean(1)


wanted = {"compiled": ({}, {"min": 2, "max": 64}), "AssertionError": ({"min": 2}, {"max": 64})}
right = True
for bounds in ({}, {"min": 2}, {"max": 64}, {"min": 2, "max": 64}):
    torch._dynamo.reset()
    x = torch.randn(3, 16, 8)
    torch._dynamo.mark_dynamic(x, 1, **bounds)
    try:
        torch.compile(mean, backend="eager")(x)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        said = "compiled"
    print(bounds, said)
    right &= bounds in wanted.get(said.partition(":")[0], ())
sys.exit(not right)
PYTHON
"$dir/venv/bin/python" bounds.py
