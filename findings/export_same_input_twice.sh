#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): torch.export, and make_fx, with one tensor given as two of the inputs.
#
# Expected from memory: example inputs tell shapes and dtypes; which tensors they are does not matter. A program that was
#   exported with (x, x) computes f(a, b) of whatever it is given, or refuses inputs that are not one tensor, as the code
#   of torch.compile is guarded by it.
# Seen: no error and no warning. All reads of the first of the two inputs become reads of the last one, so that the
#   program computes f(b, b). The first input stays in the signature, unread. make_fx does the same, in each tracing mode.
#   torch.jit.trace and torch.compile compute f(a, b).
# Why: tracing finds the node of a value by the identity of its tensor, and the last input to register it stays.
# Output, of f(a, b) = 10 a + b exported with (x, x), for a = 1, b = 2:
#   eager 12.0
#   torch.export 22.0
#   make_fx 22.0
#   torch.compile 12.0
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx


class F(torch.nn.Module):
    def forward(self, a, b):
        return a * 10 + b


x, a, b = torch.zeros(2), torch.full((2,), 1.0), torch.full((2,), 2.0)
compiled = torch.compile(F(), backend="aot_eager")
compiled(x, x)
found = {
    "eager": F()(a, b),
    "torch.export": torch.export.export(F(), (x, x)).module()(a, b),
    "make_fx": make_fx(lambda a, b: F()(a, b))(x, x)(a, b),
    "torch.compile": compiled(a, b),
}
for name, value in found.items():
    print(name, value[0].item())
sys.exit([value[0].item() for value in found.values()] != [12.0, 22.0, 22.0, 12.0])
PYTHON
