"""ViT-S/16 at 512 px (1025 tokens), batch 2, r=64: does merging in the graph reach what merging can give?

Claims: tome_fx runs at 0.95 or more of the slice oracle's speed; its passes take less than a tenth of plain Inductor's
cold compile; its whole cold compile takes at most three times plain Inductor's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console

import cases
import harness
from tome_fx import timing

MODEL, SIZE, R, BATCH = "vit_small_patch16_224", 512, 64, 2


def claims(measured: Mapping[str, harness.Measured]) -> list[harness.Claim]:
    """The claims that the measured variants can decide."""
    found = []
    if {"tome_fx", "oracle"} <= measured.keys():
        speed = timing.ratio(measured["tome_fx"].seconds, measured["oracle"].seconds)
        found.append(harness.Claim("speed of tome_fx over the slice oracle's", speed, 0.95, at_least=True))
    if {"tome_fx", "inductor"} <= measured.keys():
        mine, plain = measured["tome_fx"].cold, measured["inductor"].cold
        assert mine is not None and plain is not None  # both are compiled variants
        passes = sum(mine.passes.values()) / plain.seconds
        whole = mine.seconds / plain.seconds
        found.append(harness.Claim("tome_fx passes over Inductor's cold compile", passes, 0.10, at_least=False))
        found.append(harness.Claim("cold compile of tome_fx over Inductor's", whole, 3.0, at_least=False))
    return found


def main() -> int:
    """Run the benchmark; 1 with --check when a claim does not hold."""
    args = harness.arguments(__doc__, R, BATCH)
    console = Console()
    info = harness.machine(args, console)
    variants = {
        name: harness.Variant(
            label,
            cases.case(name, MODEL, args.r, SIZE, args.batch, args.device, args.dtype),
            compiled=name not in cases.NOT_COMPILED,
        )
        for name, label in cases.LABELS.items()
        if name == "inductor" or not args.only or name in args.only
    }
    measured = harness.measure(variants, args.rounds, args.device, console)
    result = harness.record("vit_small_512", info, measured, "inductor", claims(measured), args)
    harness.publish(result, args.out, console)
    return int(args.check and not all(claim["holds"] for claim in result["claims"]))


if __name__ == "__main__":
    sys.exit(main())
