"""The command line: ``python -m tome_fx explain|check|bench|export|tune|demo|show``.

A model is a timm name (vit_small_patch16_224), package.module:function, a function or class that returns an nn.Module
when called without arguments, or demo, the trained model of the demo. Mistakes of the user end with one sentence on
stderr and status 2; `check` ends with status 1 where the law does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from tome_fx import timing
from tome_fx.cli.arguments import make_parser
from tome_fx.cli.bench import steps_of
from tome_fx.cli.subjects import UserError, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status: 0, 1 where `check` finds the law
    broken, or 2 for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    try:
        return args.command(args, words, Console()) or 0
    except UserError as error:
        sys.stderr.write(f"tome_fx: error: {error}\n")
        return 2


def bench_step(argv: Sequence[str], candidate: str) -> timing.Step:
    """A candidate of `bench`, built anew from its command line: how the process of a cold compile gets it."""
    args = make_parser().parse_args(argv)
    return steps_of(args, *load(args))[candidate]
