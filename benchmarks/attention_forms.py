"""Which form of attention with log sizes is the fastest (`tome_fx/attention.py`), by dtype, head dim, tokens and batch.

Self-attention alone, forward, each form under Inductor, on views as a projection to queries, keys and values leaves
them. A form that fails, or differs from the mask by more than rounding, is left out with the reason. Writes
results/attention_forms-gpu.json with every round, and the table that `lower` reads, tome_fx/attention_forms.json: in
each range the form of the least time, as the geometric mean over batches, if it saves 3 % or more over the mask.

    python benchmarks/attention_forms.py [--rounds 20] [--fresh] [--table FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import harness
from tome_fx import attention, timing

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 80, 128)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 8, 32)
HEADS = 12
GAIN = 1.03
"""How many times faster than the mask a form must be to stand in the table."""
CALLS = 10
"""Calls in a round: one alone is shorter than what the host needs to start it."""
NEAR = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-3}
"""Largest difference from attention in float32, absolute and relative; float32 may run in TF32."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, claims=False)
    parser.set_defaults(device="cuda")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--table", type=Path, default=attention.TABLE, help="where the table goes")
    parser.add_argument("--fresh", action="store_true", help="even where there is a result")
    return parser.parse_args()


def masked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The form that all others are compared with: what the graph holds without a table."""
    return scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))


def form(name: str, head_dim: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A form of attention by its name."""
    if name == attention.MASK:
        return masked
    return lambda q, k, v, b: torch.ops.tome.attend(q, k, v, b, head_dim**-0.5, False, name)


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under Inductor, for one shape."""
    return torch.compile(fn, dynamic=False, fullgraph=True)


def operands(dtype: str, head_dim: int, tokens: int, batch: int, device: str) -> tuple[Tensor, ...]:
    """(query, key, value, log sizes)."""
    whole = torch.randn(batch, tokens, 3, HEADS, head_dim, device=device, dtype=getattr(torch, dtype))
    sizes = torch.randint(1, 9, (batch, 1, 1, tokens), device=device)
    return (*whole.permute(2, 0, 3, 1, 4).unbind(), sizes.float().log())


def point(dtype: str, head_dim: int, tokens: int, batch: int, device: str, rounds: int) -> dict[str, Any]:
    """All forms at one shape: "seconds" for a call {form: [each round]}, and "left_out" {form: why}."""
    torch._dynamo.reset()
    args = operands(dtype, head_dim, tokens, batch, device)
    want = masked(*(x[:1].float() for x in args))  # one sample: in float32 all may not fit
    steps: dict[str, timing.Step] = {}
    left_out: dict[str, str] = {}
    for name in (attention.MASK, *attention.FORMS):
        try:
            run = compiled(form(name, head_dim))
            torch.testing.assert_close(run(*args)[:1].float(), want, rtol=NEAR[dtype], atol=NEAR[dtype])
        except (RuntimeError, AssertionError) as error:  # refused by a kernel or the compiler, or a wrong answer
            left_out[name] = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            steps[name] = lambda run=run: [run(*args) for _ in range(CALLS)]
    times = timing.interleaved(steps, rounds, device=device) if attention.MASK in steps else {}
    seconds = {name: [t / CALLS for t in found] for name, found in times.items()}
    shape = {"dtype": dtype, "head_dim": head_dim, "tokens": tokens, "batch": batch}
    return {**shape, "seconds": seconds, "left_out": left_out}


def rows(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table. A head dim stands for those above the one before it, tokens for all that is nearest."""
    found = []
    dims, tokens = (sorted({p[name] for p in points}) for name in ("head_dim", "tokens"))
    for dtype, (low, dim), n in itertools.product(
        dict.fromkeys(p["dtype"] for p in points), itertools.pairwise([0, *dims]), tokens
    ):
        here = [p["seconds"] for p in points if (p["dtype"], p["head_dim"], p["tokens"]) == (dtype, dim, n)]
        best, gain = fastest([seconds for seconds in here if seconds])
        if gain >= GAIN:
            at = tokens.index(n)
            start = math.isqrt(tokens[at - 1] * n) + 1 if at else 1
            end = math.isqrt(n * tokens[at + 1]) if at + 1 < len(tokens) else None
            found.append({"form": best, "dtypes": [dtype], "head_dim": [low + 1, dim], "tokens": [start, end]})
    return found


def fastest(batches: Sequence[Mapping[str, Sequence[float]]]) -> tuple[str, float]:
    """The form that ran at all batches with the highest geometric mean of speeds over the mask's, and that speed."""
    common = [name for name in attention.FORMS if batches and all(name in seconds for seconds in batches)]
    speeds = {
        name: math.exp(sum(math.log(timing.ratio(s[name], s[attention.MASK])) for s in batches) / len(batches))
        for name in common
    }
    best = max(speeds, key=speeds.__getitem__, default=attention.MASK)
    return best, speeds.get(best, 1.0)


def show(points: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Speeds over the mask."""
    table = Table("dtype", "head dim", "tokens", "batch", "mask, us", *attention.FORMS)
    for p in points:
        base = p["seconds"].get(attention.MASK)
        cells = [str(p[name]) for name in ("dtype", "head_dim", "tokens", "batch")]
        cells.append(f"{timing.summary(base).median * 1e6:.0f}" if base else "-")
        for name in attention.FORMS:
            cells.append(f"{timing.ratio(p['seconds'][name], base):.2f}" if base and name in p["seconds"] else "-")
        table.add_row(*cells)
    console.print(table)
    for name, why in dict.fromkeys(found for p in points for found in p["left_out"].items()):
        console.print(f"left out: {name}: {why}", markup=False)


def main() -> int:
    """Measure every point; write the result and the table."""
    args, console = arguments(), Console()
    path = harness.pending(args, "attention_forms", console)
    if path is None:
        return 0
    info = harness.machine(args.device, args.dtypes[0], console)
    shapes = list(itertools.product(args.dtypes, args.head_dims, args.tokens, args.batches))
    with torch.no_grad():
        points = [point(*shape, args.device, args.rounds) for shape in shapes]
    show(points, console)
    result = {"benchmark": "attention_forms", "machine": info, "rounds": args.rounds, "points": points}
    measured = {name: info[name] for name in ("device", "torch", "date")}
    for file, held in ((path, result), (args.table, {"measured": measured, "rows": rows(points)})):
        file.write_text(json.dumps(held, indent=2) + "\n")
        console.print(f"written: {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
