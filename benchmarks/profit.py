"""Whether the profit test speaks truly: ten models of real width where it says yes, ten where it says no, by time.

What merges (`placement="auto"`) must not be slower than the model as it is. Where the test says no, to
merge all the same (`placement="stream"` or "branch", as its reason says) must not be faster than what it decided. Each
model in a process of its own, compiled by Inductor, rounds interleaved; writes results/profit-cpu.json (or -gpu) after
each model and goes on where it was stopped.

    python benchmarks/profit.py [MODEL ...] [--device cpu|cuda] [--batch 4] [--fresh] [--check]
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
from tome_fx import timing

SAYS_YES = {
    "deit_small_patch16_224": 13, "vit_base_patch16_224": 8, "beit_base_patch16_224": 16, "convit_small": 16,
    "eva02_small_patch14_224": 16, "hiera_tiny_224": 16, "nest_tiny": 16, "cait_xxs24_224": 8, "crossvit_15_240": 16,
    "davit_tiny": 64,
}  # fmt: skip
SAYS_NO = {
    "coatnet_0_rw_224": 64, "visformer_small": 16, "efficientvit_m4": 64, "gcvit_tiny": 8, "mvitv2_tiny": 8,
    "maxvit_tiny_tf_224": 8, "pvt_v2_b1": 16, "tiny_vit_21m_224": 8, "xcit_tiny_12_p16_224": 16, "botnet26t_256": 16,
}  # fmt: skip
NOISE = 0.03
"""By how much two times of one thing may differ."""


def measured(name: str, r: int, device: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of one model as it is, as the profit test has it, and, where that says no, merged all the same."""
    import timm

    import tome_fx

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(batch, *model.default_cfg["input_size"], device=device)
    made = {"inductor": torch.compile(model)}
    with torch.inference_mode():
        made["auto"] = torch.compile(model, backend=tome_fx.tome_backend(r=r))
        made["auto"](x)
        report = tome_fx.reports()[-1]
        refused = [s for s in report.skipped if "pay" in s.kind]
        if refused:
            kind = "stream" if 'placement="stream"' in refused[0].detail else "branch"
            made["forced"] = torch.compile(model, backend=tome_fx.tome_backend(r=r, placement=kind))
        runs = {key: (lambda run=run: run(x)) for key, run in made.items()}
        for run in runs.values():
            run()
        times = timing.interleaved(runs, rounds, device=device)
    told = {"r": r, "batch": batch, "sites": report.attention_sites, "merged": report.merged_sites,
            "refused": len(refused), "forced": kind if refused else None,
            "flops": report.flops_after / report.flops_before}  # fmt: skip
    return {**told, "seconds": times}


def judged(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its ratios, and whether the test was right. auto, forced: speed over the model as it is."""
    times = row["seconds"]
    speed = {key: timing.ratio(times[key], times["inductor"]) for key in ("auto", "forced") if key in times}
    best = max(1.0, speed["auto"])
    right = speed["auto"] >= 1 - NOISE and (name in SAYS_YES or speed.get("forced", 0.0) <= best * (1 + NOISE))
    return {**row, "speed": speed, "says": "yes" if name in SAYS_YES else "no", "right": right}


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("models", nargs="*", help="default: all")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--fresh", action="store_true", help="measure again what has a result")
    options.add_argument("--check", action="store_true", help="exit with status 1 where the test was wrong")
    args = options.parse_args()
    harness.require(args.device)
    console = Console()
    path = harness.result_path(args.out, "profit", args.device)
    held = json.loads(path.read_text())["models"] if path.exists() else {}
    wanted = {**SAYS_YES, **SAYS_NO}
    for name, r in wanted.items():
        if (args.models and name not in args.models) or (name in held and not args.fresh):
            continue
        row = harness.alone(measured, name, r, args.device, args.batch, args.rounds)
        held[name] = row if "failed" in row else judged(name, row)
        console.print(name, held[name].get("failed") or held[name]["speed"], highlight=False)
        result = {"benchmark": "profit", "machine": timing.machine_info(args.device), "noise": NOISE, "models": held}
        path.write_text(json.dumps(result, indent=2) + "\n")
    columns = ("model", "r", "says", "sites", "merged", "auto", "all the same", "right")
    table = Table(*columns, title="speed over Inductor's")
    for name, row in held.items():
        if "failed" not in row:
            forced = f"{row['speed']['forced']:.2f}" if "forced" in row["speed"] else ""
            cells = (row["r"], row["says"], row["sites"], row["merged"], f"{row['speed']['auto']:.2f}", forced)
            table.add_row(name, *map(str, cells), "yes" if row["right"] else "no")
    console.print(table)
    wrong = [name for name, row in held.items() if not row.get("right")]
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
