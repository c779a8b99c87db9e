#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): torch.vmap over scaled_dot_product_attention.
#
# Expected from memory: vmap makes one batched call of an op, and attention has a batch dim to take it in.
# Seen: the fused kernel of a CPU runs once for each sample, and there is a UserWarning about it at most.
# Why: `_scaled_dot_product_flash_attention_for_cpu` has no batching rule, so that the fallback loops over the samples.
# Output (one event is the op itself):
#   events of the fused op for 16 samples: 1 as one batch, 17 under vmap
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
import torch.nn.functional as F
from torch.profiler import profile

warnings.simplefilter("ignore")
q, k, v = torch.randn(3, 16, 2, 4, 32, 8).unbind(0)
with profile() as plain:
    F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
with profile() as mapped:
    out = torch.vmap(F.scaled_dot_product_attention)(q, k, v)
torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
name = "aten::_scaled_dot_product_flash_attention_for_cpu"
calls = [sum(e.name == name for e in run.events()) for run in (plain, mapped)]
print(f"events of the fused op for 16 samples: {calls[0]} as one batch, {calls[1]} under vmap")
sys.exit(calls != [1, 17])
PYTHON
