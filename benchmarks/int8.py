"""Merging on quantised weights: ViT-B with torchao's int8 weights, with and without merging, against float32.

All variants compiled by Inductor in one process, rounds interleaved; writes results/int8-cpu.json (or -gpu).

    python benchmarks/int8.py [--model vit_base_patch16_224] [--r 16] [--batch 4] [--device cpu|cuda]
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import harness
from tome_fx import timing, tome_backend

WEIGHTS = {"float32": None, "int8 weights": "Int8WeightOnlyConfig",
           "int8 weights and activations": "Int8DynamicActivationInt8WeightConfig"}  # fmt: skip


def model_of(name: str, config: str | None, device: str) -> torch.nn.Module:
    """A timm model with random weights, quantised."""
    import timm
    from torchao import quantization

    torch.manual_seed(0)
    model = timm.create_model(name).eval().requires_grad_(False).to(device)
    if config is not None:
        quantization.quantize_(model, getattr(quantization, config)())
    return model


def measured(name: str, r: int, batch: int, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of each variant, and how many sites merged."""
    import tome_fx

    warnings.simplefilter("ignore")
    runs, merged = {}, {}
    x = torch.randn(batch, 3, 224, 224, device=device)
    for kind, config in WEIGHTS.items():
        model = model_of(name, config, device)
        plain = torch.compile(model)
        fast = torch.compile(model, backend=tome_backend(r=r, placement="stream"))
        plain(x)
        fast(x)
        merged[kind] = tome_fx.reports()[-1].merged_sites
        runs |= {f"{kind}, unmerged": (lambda f=plain: f(x)), f"{kind}, merged": (lambda f=fast: f(x))}
    return {"seconds": timing.interleaved(runs, rounds, device=device), "merged": merged}


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("--model", default="vit_base_patch16_224")
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--rounds", type=int, default=9)
    args = options.parse_args()
    harness.require(args.device)
    with torch.inference_mode():
        found = measured(args.model, args.r, args.batch, args.device, args.rounds)
    times, base = found["seconds"], found["seconds"]["float32, unmerged"]
    table = Table("weights", "merged sites", "over float32", "merged, over float32", "merged, over the same weights")
    speed = {}
    for kind in WEIGHTS:
        own, fast = times[f"{kind}, unmerged"], times[f"{kind}, merged"]
        speed[kind] = {"unmerged": timing.ratio(own, base), "merged": timing.ratio(fast, base),
                       "by merging": timing.ratio(fast, own)}  # fmt: skip
        table.add_row(kind, str(found["merged"][kind]), *(f"{value:.2f}" for value in speed[kind].values()))
    Console().print(table)
    result = {"benchmark": "int8", "machine": timing.machine_info(args.device), "model": args.model, "r": args.r,
              "batch": args.batch, "speed": speed, **found}  # fmt: skip
    harness.result_path(args.out, "int8", args.device).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
