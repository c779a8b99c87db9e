#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): torch.vmap of a module inside of a compiled function.
#
# Expected from memory: `torch.vmap(module)` and `torch.vmap(lambda x: module(x))` mean the same, so that a compiled
#   function has the same graph with either.
# Seen: with the lambda there is one graph. With the module the backend is never called: the function runs uncompiled,
#   with no error and no Python warning, and fullgraph=True raises Unsupported at `str.split`.
# Why: vmap asks for the name of what it maps, for its messages (`_get_name`, torch/_functorch/vmap.py). A module has no
#   `__name__`, so that this is its repr, which Dynamo cannot trace where a submodule has an `extra_repr` of its own.
# Output:
#   the lambda: 1 graph
#   the module: 0 graphs, fullgraph Unsupported: Dynamo does not know how to trace method `split` of class `str`
#   Identity, whose extra_repr is empty: 1 graph
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from torch._dynamo.testing import CompileCounter


def graphs(f):
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.testing.assert_close(torch.compile(f, backend=counter)(x), f(x))
    return counter.frame_count


x, module, identity = torch.randn(3, 2, 4), torch.nn.LayerNorm(4), torch.nn.Identity()
with warnings.catch_warnings(record=True) as raised:
    warnings.simplefilter("always")
    found = [graphs(lambda x: torch.vmap(lambda y: module(y))(x)), graphs(lambda x: torch.vmap(module)(x))]
    found.append(graphs(lambda x: torch.vmap(identity)(x) + 1))
error = None
torch._dynamo.reset()
try:
    torch.compile(lambda x: torch.vmap(module)(x), backend="eager", fullgraph=True)(x)
except Exception as raised_error:
    error = raised_error
said = next((line.split("Explanation: ")[1] for line in str(error).splitlines() if "Explanation: " in line), "")
print(f"the lambda: {found[0]} graph")
print(f"the module: {found[1]} graphs, fullgraph {type(error).__name__}: {said}")
print(f"Identity, whose extra_repr is empty: {found[2]} graph")
told = [str(warning.message) for warning in raised if "compile" in str(warning.message)]
sys.exit(not (found == [1, 0, 1] and "`split` of class `str`" in said and not told))
PYTHON
