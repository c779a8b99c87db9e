"""Seconds of the first call: cold, in a second process, and for a second r, against Inductor's own.

Each call in a process of its own: `cold` with an empty cache, `warm` with the cache that cold filled, `other` with
another r and that cache (Inductor: nothing to compare, so over its cold). Rounds interleaved, the least of each counts.
Imports are not in it. Writes results/cold-cpu.json (or -gpu) after each model and goes on where it stopped.

    python benchmarks/cold.py [MODEL ...] [--rounds 2] [--fresh] [--check]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table

import harness
from tome_fx import timing

MODELS: dict[str, tuple[str, int, int, str]] = {
    "vit_small_512": ("vit_small_patch16_224", 512, 64, ""),
    "vit_large_512": ("vit_large_patch16_224", 512, 32, ""),
    "vit_base_224": ("vit_base_patch16_224", 224, 16, ""),
    "vit_base_224_free_batch": ("vit_base_patch16_224", 224, 16, "free batch"),
    "vit_small_512_train": ("vit_small_patch16_224", 512, 64, "training"),
}
"""Name -> timm model, side in pixels, r, and what is more: "training", or a "free batch" (`dynamic=True`)."""
ASKED = {"cold": 1.0, "cold, training": 1.2, "cold, free batch": 1.1, "warm": 1.1, "other": 0.3}
"""The most that is asked for, in Inductor's cold compile (warm: its warm one; other: our own cold one)."""


def one(name: str, way: str, r: int, device: str) -> float:
    """Seconds of the first call, with the backward pass where it trains."""
    import timm
    import torch

    import tome_fx

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net, side, _, more = MODELS[name]
    training, free = more == "training", more == "free batch"
    model = timm.create_model(net, img_size=side).train(training).to(device)
    x = torch.randn(2 if free else 1, 3, side, side, device=device)
    import torch._inductor.compile_fx

    backend = "inductor" if way == "inductor" else tome_fx.tome_backend(r=r)
    compiled = torch.compile(model, backend=backend, dynamic=True if free else None)
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        out = compiled(x)
    if training:
        out.sum().backward()
    timing.synchronize(device)
    return time.perf_counter() - start


def run(name: str, way: str, r: int, device: str, cache: str) -> float:
    """`one` in a process of its own with a cache folder."""
    command = [sys.executable, __file__, name, "--one", way, "--r", str(r), "--device", device]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(name: str, device: str, rounds: int) -> dict[str, Any]:
    r = MODELS[name][2]
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way in ("inductor", "tome"):
            with tempfile.TemporaryDirectory() as cache:
                kinds = {"cold": r, "warm": r} | ({"other": r // 2} if way == "tome" else {})
                for kind, count in kinds.items():
                    times.setdefault(f"{way}, {kind}", []).append(run(name, way, count, device, cache))
    least = {kind: min(held) for kind, held in times.items()}
    ratios = {kind: least[f"tome, {kind}"] / least[f"inductor, {kind}"] for kind in ("cold", "warm")}
    ratios["other"] = least["tome, other"] / least["tome, cold"]
    return {"r": r, "seconds": times, "ratios": ratios, "holds": {k: v <= asked(name, k) for k, v in ratios.items()}}


def asked(name: str, kind: str) -> float:
    return ASKED[f"cold, {MODELS[name][3]}" if kind == "cold" and MODELS[name][3] else kind]


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("models", nargs="*", help="default: all")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--fresh", action="store_true", help="measure again what has a result")
    options.add_argument("--check", action="store_true", help="exit with status 1 where more is taken than asked")
    options.add_argument("--one", help="the first call alone, of this compiler: inductor or tome")
    options.add_argument("--r", type=int)
    args = options.parse_args()
    harness.require(args.device)
    if args.one:
        print(one(args.models[0], args.one, args.r, args.device))
        return 0
    console = Console()
    path = harness.result_path(args.out, "cold", args.device)
    held = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in args.models or MODELS:
        if name not in held or args.fresh:
            held[name] = measured(name, args.device, args.rounds)
            result = {"benchmark": "cold", "machine": timing.machine_info(args.device), "asked": ASKED, "models": held}
            path.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("model", "r", "cold", "warm", "other r, of cold", title="first call, over Inductor's")
    for name, row in held.items():
        table.add_row(name, str(row["r"]), *(f"{row['ratios'][kind]:.2f}" for kind in ("cold", "warm", "other")))
    console.print(table)
    return int(args.check and not all(all(row["holds"].values()) for row in held.values()))


if __name__ == "__main__":
    sys.exit(main())
