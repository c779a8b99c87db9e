"""Data parallel and sharded models, each in two gloo processes."""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tome_fx
from tests.palette import palette_tokens, said
from tests.test_explain import Block

D, N, R, DEPTH = 256, 32, 3, 3
pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="gloo processes")


class Net(nn.Module):
    """Wider than DistributedDataParallel's first bucket (1 MiB), so that it would be cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cls, self.head = nn.Parameter(torch.randn(1, 1, D)), nn.Linear(D, 3)
        self.blocks = nn.ModuleList(Block(D) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def _wrapped(how: str) -> Any:
    model = Net()
    backend = tome_fx.tome_backend(r=R, inner="aot_eager", placement="stream")
    if how == "compile(ddp)":
        return torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend), model
    if how == "ddp(compile)":
        return DistributedDataParallel(torch.compile(model, backend=backend), bucket_cap_mb=1), model
    if how == "ddp, module.compile":
        model.compile(backend=backend)
        return DistributedDataParallel(model, bucket_cap_mb=1), model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks if how == "fsdp, blocks" else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return torch.compile(model, backend=backend), model


def _process(rank: int, port: int, how: str, whole: bool, out: str) -> None:
    """One of the processes: half of a batch, one backward pass."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch._dynamo.config.optimize_ddp = not whole
    fast, model = _wrapped(how)
    x = palette_tokens(4, N, D)[2 * rank : 2 * rank + 2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast(x).square().sum().backward()
    report = sum(tome_fx.reports(), tome_fx.ToMeReport())
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    told = said(caught)
    if rank == 0:
        torch.save(grads, f"{out}.pt")
        found = {"graphs": report.graphs, "tokens": report.tokens, "merged": report.merged_sites, "told": told}
        Path(f"{out}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def two_processes(how: str, out: Path, *, whole: bool = True) -> tuple[dict[str, Any], float]:
    """What rank 0 saw, and how far the gradients are from those of the bare model on the whole batch, which are the
    mean over processes times two."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    mp.spawn(_process, (port, how, whole, str(out / "rank")), nprocs=2)
    model = Net()
    model(palette_tokens(4, N, D)).square().sum().backward()
    want = [p.grad for p in model.parameters()]
    grads = torch.load(out / "rank.pt")
    scale = max(float(w.abs().max()) for w in want)
    error = max(float((2 * g - w).abs().max()) for g, w in zip(grads, want, strict=True)) / scale
    return json.loads((out / "rank.json").read_text()), error


WHOLE = [[N + 1 - R * i, N + 1 - R * (i + 1)] for i in range(DEPTH)]


def test_ddp_is_one_graph(tmp_path: Path) -> None:
    """README's line: all blocks merge on the stream, gradients are those of the unwrapped, unmerged model (equal tokens
    merge)."""
    found, error = two_processes("compile(ddp)", tmp_path)
    assert (found["graphs"], found["tokens"], found["told"]) == (1, WHOLE, [])
    assert error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp(compile)", "ddp, module.compile"])
def test_ddp_in_any_order(how: str, tmp_path: Path) -> None:
    found, error = two_processes(how, tmp_path)
    assert (found["graphs"], found["tokens"], found["told"]) == (1, WHOLE, [])
    assert error < 1e-5


@pytest.mark.slow
def test_ddp_that_is_cut_says_so(tmp_path: Path) -> None:
    """Without the line: right all the same, and one message names the cause and the line."""
    found, error = two_processes("compile(ddp)", tmp_path, whole=False)
    assert found["graphs"] > 1
    assert error < 1e-5
    (message,) = found["told"]
    assert "gradient buckets of DistributedDataParallel" in message
    assert "optimize_ddp = False" in message


@pytest.mark.slow
def test_fsdp_of_the_whole_is_one_graph(tmp_path: Path) -> None:
    found, error = two_processes("fsdp, whole", tmp_path)
    assert (found["graphs"], found["tokens"], found["told"]) == (1, WHOLE, [])
    assert error < 1e-5


@pytest.mark.slow
def test_fsdp_of_blocks_merges_in_each(tmp_path: Path) -> None:
    """One graph serves all blocks; tokens are given back at the end of each, which is told with the remedy."""
    found, error = two_processes("fsdp, blocks", tmp_path)
    assert error < 1e-5
    assert found["tokens"] == [WHOLE[0]]
    (message,) = found["told"]
    assert "fully_shard was applied to it" in message
    assert "Apply fully_shard to FSDPNet alone" in message
