"""A training step under DistributedDataParallel: what merging gives in two processes against what it gives in one.

Each process has one thread and its own batch; both ways are compiled by Inductor and take turns. Two gloo processes
with `torch._dynamo.config.optimize_ddp = False`, as the README says, against plain DDP as torch has it. Writes
results/ddp-cpu.json.

    python benchmarks/ddp.py [--model vit_small_patch16_224] [--r 16] [--batch 4]
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

import harness
from tome_fx import timing, tome_backend

WAYS = "inductor", "merged"
GOAL = 0.9


def _process(rank: int, world: int, port: int, args: Any, out: str) -> None:
    import timm
    from torch.nn.parallel import DistributedDataParallel

    import tome_fx

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    x, seconds, graphs = torch.randn(args.batch, 3, 224, 224), dict[str, list[float]](), {}
    steps = {}
    for way in WAYS:
        torch.manual_seed(0)
        torch._dynamo.config.optimize_ddp = way == "inductor"
        model = timm.create_model(args.model)
        whole = DistributedDataParallel(model) if world > 1 else model
        backend = tome_backend(r=args.r, placement="stream") if way == "merged" else "inductor"
        steps[way] = torch.compile(whole, backend=backend)
        steps[way](x).square().mean().backward()
        if way == "merged":
            report = sum(tome_fx.reports(), tome_fx.ToMeReport())
            graphs = {"graphs": report.graphs, "merged": report.merged_sites, "sites": report.attention_sites}
    for _ in range(args.rounds):
        for way, step in steps.items():
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            step(x).square().mean().backward()
            seconds.setdefault(way, []).append(time.perf_counter() - start)
    if rank == 0:
        Path(out).write_text(json.dumps({"seconds": seconds, **graphs}))
    if world > 1:
        dist.destroy_process_group()


def measured(world: int, args: Any) -> dict[str, Any]:
    """Seconds of each way in `world` processes, as rank 0 sees them."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        mp.spawn(_process, (world, port, args, out), nprocs=world)
        found: dict[str, Any] = json.loads(Path(out).read_text())
    return {**found, "speed": timing.ratio(found["seconds"]["merged"], found["seconds"]["inductor"])}


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("--model", default="vit_small_patch16_224")
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--rounds", type=int, default=9)
    args = options.parse_args()
    found = {f"{world} process{'es' * (world > 1)}": measured(world, args) for world in (1, 2)}
    speeds = [row["speed"] for row in found.values()]
    console = Console()
    for name, row in found.items():
        told = f"{row['merged']} of {row['sites']} merged in {row['graphs']} graph"
        console.print(f"{name}: a step {row['speed']:.2f} times as fast as Inductor's, {told}", highlight=False)
    console.print(f"two processes keep {speeds[1] / speeds[0]:.2f} of it (goal {GOAL})", highlight=False)
    result = {"benchmark": "ddp", "machine": timing.machine_info("cpu"), "model": args.model, "r": args.r,
              "batch": args.batch, "kept": speeds[1] / speeds[0], "processes": found}  # fmt: skip
    harness.result_path(args.out, "ddp", "cpu").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
