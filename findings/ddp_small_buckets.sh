#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): DistributedDataParallel under torch.compile.
#
# Expected from memory: any positive `bucket_cap_mb` that works in eager mode works compiled; fewer megabytes are more
#   buckets, and so more graphs.
# Seen: below 1 MiB the first compiled call raises AssertionError "First bucket should be smaller/equal to other buckets".
# Why: DDPOptimizer (torch/_dynamo/backends/distributed.py) takes the size of the first bucket from a constant of the
#   reducer, 1 MiB, and asserts that the others are not smaller. `torch._dynamo.config.optimize_ddp = False` leaves it out.
# Output:
#   bucket_cap_mb=25: eager runs, compiled runs
#   bucket_cap_mb=1: eager runs, compiled runs
#   bucket_cap_mb=0.5: eager runs, compiled AssertionError: First bucket should be smaller/equal to other buckets to get
#   comms warmed up ASAP
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
same = True
for megabytes in (25, 1, 0.5):
    torch._dynamo.reset()
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(6)))
    model = DistributedDataParallel(model, bucket_cap_mb=megabytes)
    x, error = torch.randn(4, 256), None
    model(x).sum().backward()
    try:
        torch.compile(model, backend="eager")(x)
    except Exception as raised:
        error = raised
    print(f"bucket_cap_mb={megabytes}: eager runs, compiled {type(error).__name__}: {error}".replace("NoneType: None", "runs"))
    same &= (error is None) is (megabytes >= 1) and (error is None or "First bucket should be smaller" in str(error))
dist.destroy_process_group()
sys.exit(not same)
PYTHON
