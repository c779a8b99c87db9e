"""Measures `COSTS` of `passes/analysis/costs.py`: what work of each kind costs for an element, in FLOPs of a product.

Prints the table for this device and writes benchmarks/results/costs-{cpu,gpu}.json: the median over a few shapes. Every
round runs all kinds of work in turn, so an operand is seldom still in a cache; inside a model it often is, and there
the same work costs less. `passes/analysis/costs.py` says how its constants stand to these figures.

    python benchmarks/costs.py [--device cpu] [--rounds 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from tome_fx import ops, timing
from tome_fx.passes.lower import FORMS, fuse

RESULTS = Path(__file__).parent / "results"
SHAPES = ((2, 197, 768, 12), (8, 197, 384, 6), (2, 1025, 384, 6), (128, 49, 96, 3), (32, 49, 192, 6), (112, 56, 96, 3))
"""(samples, tokens, channels, heads): isotropic models, and windows and rows of a pyramid."""


def measure(samples: int, tokens: int, channels: int, heads: int, device: str, rounds: int) -> dict[str, float]:
    """Costs for an element, in FLOPs (`masked`: a share), at one shape."""
    tome = torch.ops.tome
    opaque = FORMS.get(device, FORMS[""]) is fuse
    x = torch.randn(samples, tokens, channels, device=device)
    k = x.unflatten(-1, (heads, -1))
    assign, keep, moved, _, size, _ = tome.match_size(x, None, tokens // 4, 0, 0)
    merge = tome.merge if opaque else tome.merge_aten
    bias = torch.randn(samples, tokens, heads, tokens, device=device)
    q = torch.randn(samples, heads, tokens, channels // heads, device=device)
    short = merge(x, None, size, assign, keep, moved)
    term = torch.randn(samples, 1, 1, tokens, device=device)
    weight = torch.randn(channels, 4 * channels, device=device)
    src, dst = k[:, ::2, 0].contiguous(), k[:, 1::2, 0].contiguous()
    merge_bias = tome.merge_bias if opaque else tome.merge_bias_aten
    steps: dict[str, Callable[[], object]] = {
        "product": lambda: x @ weight,
        "match": lambda: tome.match(k, tokens // 4, 0, 0, True),
        "compare": lambda: torch.bmm(src, dst.mT),
        "merge": lambda: merge(x, None, size, assign, keep, moved),
        "gather": _compiled(lambda y, index, z: ops.unmerge(y, index) + z, short, assign, x),
        "add": _compiled(lambda y, z: y + z, x, x),
        "bias": lambda: merge_bias(bias, None, size, assign, keep, moved),
        "gelu": _compiled(lambda y: gelu(y) * 0.5, x),
        "plain": lambda: scaled_dot_product_attention(q, q, q),
        "masked": lambda: scaled_dot_product_attention(q, q, q, attn_mask=term),
    }
    best = {name: min(found) for name, found in timing.interleaved(steps, rounds, 2, device=device).items()}
    rate = 8.0 * samples * tokens * channels**2 / best["product"]
    each = rate / x.numel()
    return {
        "match": (best["match"] - best["compare"]) * each,
        "merge": best["merge"] * each,
        "gather": max(best["gather"] - best["add"], 0.0) * each,
        "bias": best["bias"] * rate / bias.numel(),
        "touch": min(best["gelu"], best["add"]) * each,
        "masked": best["masked"] / best["plain"] - 1.0,
    }


def _compiled(form: Callable[..., Tensor], *args: Tensor) -> Callable[[], object]:
    torch._dynamo.reset()
    run = torch.compile(form, dynamic=False)
    return lambda: run(*args)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds for each shape (default %(default)s)")
    args = parser.parse_args()
    info = timing.machine_info(args.device)
    with torch.no_grad():
        found = {shape: measure(*shape, args.device, args.rounds) for shape in SHAPES}
    names = list(next(iter(found.values())))
    median = {name: statistics.median(row[name] for row in found.values()) for name in names}
    table = Table("samples, tokens, channels, heads", *names)
    for shape, row in (*found.items(), ("median", median)):
        table.add_row(str(shape), *(f"{row[name]:.3g}" for name in names))
    Console().print(table)
    rows = [{"shape": list(shape), **row} for shape, row in found.items()]
    path = RESULTS / f"costs-{'cpu' if args.device == 'cpu' else 'gpu'}.json"
    path.write_text(json.dumps({"machine": info, "median": median, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
