"""Speed, compile time and memory of every case of cases.py in all its variants.

    python benchmarks/speed.py CASE [CASE ...] [--device cpu|cuda] [--dtype float32|bfloat16] [--batch N] [--train]
    python benchmarks/speed.py --all [--device cpu|cuda] [--fresh]      # the plan of cases.py, but what is there
    python benchmarks/speed.py --list                                   # the cases and their claims

Each setting is a result of its own: results/CASE-bBATCH-DTYPE[-train]-cpu.json (or -gpu) and a plot. A training step is
forward, backward and AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch
from rich.console import Console
from rich.table import Table

import cases
import harness
from tome_fx import timing

BASELINE = "inductor"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names that --list prints")
    parser.add_argument("--all", action="store_true", help="the whole plan; goes on where it was stopped")
    parser.add_argument("--fresh", action="store_true", help="with --all: again, what is there too")
    parser.add_argument("--list", action="store_true", help="print the cases and leave")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; the plan with --all")
    parser.add_argument("--batch", type=int, help="samples; default: all of the case's")
    parser.add_argument("--train", action="store_true", help="a training step instead of inference")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: the case's")
    parser.add_argument("--no-cold", action="store_true", help="neither cold compile times nor peak memory")
    parser.add_argument("--mode", nargs="+", default=[], help="more rows: these modes of torch.compile")
    args = parser.parse_args()
    if not (args.cases or args.all or args.list):
        parser.error("name a case, or give --all or --list")
    if unknown := set(args.cases) - cases.CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(cases.CASES)}")
    return args


def settings(args: argparse.Namespace, console: Console) -> list[cases.Setting]:
    """What the command line asks for."""
    device = torch.device(args.device).type
    if args.all:
        wanted = [s for s in cases.plan(device) if not args.cases or s.case in args.cases]
        if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            console.print("This processor has no bfloat16 instructions: those settings are left out.")
            wanted = [s for s in wanted if s.dtype != "bfloat16"]
        return [s for s in wanted if args.fresh or not harness.result_path(args.out, s.name, device).exists()]
    found = []
    for name in args.cases:
        case = cases.CASES[name]
        batches = [case.train.get(device, 1)] if args.train else case.batches[device]
        for batch in [args.batch] if args.batch else batches:
            found.append(cases.Setting(name, batch, device, args.dtype or "float32", args.train))
    return found


def variants_of(case: cases.Case, args: argparse.Namespace) -> list[str]:
    """The rows of a case: those of `--only`, with the baseline, and no patch where there is none."""
    names = [name for name in cases.LABELS if not (case.no_patch and name.startswith("patch"))]
    names += [f"{name}+{mode}" for mode in args.mode for name in cases.WITH_MODES]
    return [name for name in names if name == BASELINE or not args.only or name in args.only]


def run(setting: cases.Setting, args: argparse.Namespace, console: Console) -> bool:
    """Measure one setting and write its files; whether all of its claims hold."""
    case = cases.CASES[setting.case]
    rounds = args.rounds or case.rounds
    console.rule(setting.name)
    info = harness.machine(args.device, setting.dtype, console)
    variants = {
        # in a fresh process the eager variants too, for their peak memory
        name: harness.Variant(cases.label(name), cases.job(setting, name), compiled=not args.no_cold)
        for name in variants_of(case, args)
    }
    measured, failed = harness.measure(variants, rounds, args.device, console)
    if BASELINE not in measured:
        raise timing.ChildError(f"{setting.name}: the baseline did not run: {failed[BASELINE]}")
    where = {"group": case.group, "tokens": cases.tokens(case), "r": case.r, "placement": case.placement}
    described = {**dataclasses.asdict(setting), **where, "rounds": rounds}
    if case.no_patch:
        failed = {**failed, "patch": case.no_patch}
    result = harness.record(setting.name, info, measured, BASELINE, setting.limits, described, failed)
    harness.publish(result, args.out, console)
    return all(claim["holds"] for claim in result["claims"])


def show(console: Console) -> None:
    """The cases and their claims, for `--list`."""
    table = Table()
    for column in ("case", "tokens", "r", "placement", "batches", "training"):
        table.add_column(column)
    for case in cases.TABLE:
        batches = "; ".join(f"{device} {', '.join(map(str, of))}" for device, of in case.batches.items())
        train = "; ".join(f"{device} {batch}" for device, batch in case.train.items())
        table.add_row(case.name, str(cases.tokens(case)), str(case.r), case.placement, batches, train)
    console.print(table)
    for name, limits in [*((case.name, case.limits) for case in cases.TABLE), ("everywhere", cases.EVERYWHERE)]:
        for limit in limits:
            console.print(f"{name}: {described(limit)}", highlight=False)


def described(limit: harness.Limit) -> str:
    """A claim as a line of `--list`."""
    given = [limit.device, limit.dtype, limit.batch and f"batch {limit.batch}", "training" if limit.train else None]
    sign = "\N{GREATER-THAN OR EQUAL TO}" if limit.at_least else "\N{LESS-THAN OR EQUAL TO}"
    return f"{harness.RATIOS[limit.ratio]} {sign} {limit.limit:g} {', '.join(x for x in given if x)}"


def main() -> int:
    """Run what was asked for; 1 where a setting failed, with --check also where a claim does not hold."""
    args, console = arguments(), Console()
    if args.list:
        show(console)
        return 0
    harness.require(args.device)
    status = 0
    for setting in settings(args, console):
        try:
            holds = run(setting, args, console)
        except (timing.ChildError, torch.OutOfMemoryError) as error:
            console.print(f"[red]{setting.name} failed:[/] {error}")
            status = 1
        else:
            status |= int(args.check and not holds)
    return status


if __name__ == "__main__":
    sys.exit(main())
