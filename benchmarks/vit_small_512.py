"""ViT-S/16 at 512 px (1025 tokens), batch 2, r=64: does merging in the graph reach what merging can give?

Claims: tome_fx runs at 0.95 or more of the slice oracle's speed, and 1.15 times as fast as a compiled ToMe patch; its
passes take less than a tenth of plain Inductor's cold compile; its whole cold compile takes at most 1.5 times plain
Inductor's; a call takes no more memory.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

import cases
import harness

CASE = "vit_small_512"
LIMITS = (
    harness.Limit("oracle", 0.95),
    harness.Limit("patch", 1.15),
    harness.Limit("passes", 0.10, at_least=False),
    harness.Limit("cold", 1.5, at_least=False),
    harness.Limit("memory", 1.0, at_least=False),
)
VARIANTS = ("inductor", "tome_fx", "oracle", "patch", "patch_compiled")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--r", type=int, default=cases.CASES[CASE].r, help="tokens per block (default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; 1 with --check when a claim does not hold."""
    args = arguments()
    harness.require(args.device)
    console = Console()
    info = harness.machine(args.device, args.dtype, console)
    setting = cases.Setting(CASE, args.batch, args.device, args.dtype)
    variants = {
        name: harness.Variant(
            cases.label(name), cases.job(setting, name, args.r), compiled=name not in cases.NOT_COMPILED
        )
        for name in VARIANTS
        if name == "inductor" or not args.only or name in args.only
    }
    measured, failed = harness.measure(variants, args.rounds, args.device, console)
    tokens = cases.tokens(cases.CASES[CASE])
    settings = {"tokens": tokens, "r": args.r, "batch": args.batch, "rounds": args.rounds}
    result = harness.record("vit_small_512", info, measured, "inductor", LIMITS, settings, failed)
    harness.publish(result, args.out, console)
    return int(args.check and not all(claim["holds"] for claim in result["claims"]))


if __name__ == "__main__":
    sys.exit(main())
