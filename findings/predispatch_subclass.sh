#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): make_fx with a tensor subclass among the operands.
#
# Expected from memory: what make_fx traces it traces with pre_dispatch=True as well, only higher up: a weight that is a
#   wrapper subclass (the TwoTensor of torch itself) is taken apart by its __torch_dispatch__.
# Seen: RuntimeError "Unable to cast NotImplemented to Tensor", which names neither the subclass nor the op.
# Why: the tracing mode gives NotImplemented for types that it does not handle, so that the subclass is asked next. Below
#   autograd the dispatcher does so; at the pre-dispatch key nobody does, and NotImplemented itself is the result.
# Output:
#   make_fx: True
#   pre_dispatch=True: RuntimeError: Unable to cast NotImplemented to Tensor
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
from torch.testing._internal.two_tensor import TwoTensor

x = torch.randn(3, 4)
weight = TwoTensor(torch.randn(5, 4), torch.randn(5, 4))
made = make_fx(lambda x: torch.nn.functional.linear(x, weight).a)(x)
print("make_fx:", any("mm" in str(n.target) for n in made.graph.nodes))
error = None
try:
    make_fx(lambda x: torch.nn.functional.linear(x, weight).a, pre_dispatch=True)(x)
except Exception as raised:
    error = raised
print(f"pre_dispatch=True: {type(error).__name__}: {error}")
sys.exit("NotImplemented" not in str(error))
PYTHON
