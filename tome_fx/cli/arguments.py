"""The commands and their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import torch

from tome_fx import tuning
from tome_fx.cli import bench as timed
from tome_fx.cli import commands as run
from tome_fx.cli.subjects import DEFAULT_R, DTYPES, TRAINED
from tome_fx.cli.values import (
    parse_blocks,
    parse_count,
    parse_device,
    parse_list,
    parse_name_or_number,
    parse_names,
    parse_number,
    parse_output,
    parse_positive,
    parse_protect,
    parse_r,
    parse_shape,
    parse_target,
)
from tome_fx.export import FORMATS

INNERS = ("inductor", "aot_eager", "eager")


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The commands with their options; `command` of the result is the function to call."""
    parser = _Parser(prog="tome_fx", description="Token merging for any traced transformer.")
    commands = parser.add_subparsers(required=True, metavar="explain|check|bench|export|tune|demo|show")

    explain = commands.add_parser("explain", help="say what would be merged in a model, and what not and why")
    _add_model_options(explain, batch=1)
    explain.set_defaults(command=run.explain)

    check = commands.add_parser("check", help="check that a merged model computes the unmerged one with tied groups")
    _add_model_options(check, batch=2)
    check.set_defaults(command=run.check)

    bench = commands.add_parser("bench", help="time a model with and without merging")
    _add_model_options(bench, batch=8)
    bench.add_argument("--rounds", type=parse_positive, default=5, help="timed rounds (default %(default)s)")
    bench.add_argument("--no-cold", action="store_true", help="skip cold compile time and peak memory")
    bench.set_defaults(command=timed.bench)

    export = commands.add_parser("export", help="write a merged model to a file that needs no tome_fx")
    _add_model_options(export, batch=2)
    export.add_argument("--format", choices=FORMATS, default="pt2", help="default %(default)s")
    export.add_argument("-o", "--out", type=parse_output, required=True, metavar="FILE", help="the file to write")
    export.add_argument("--dynamic-batch", action="store_true", help="leave the number of images free, from 2 on")
    export.add_argument("--rounds", type=parse_positive, default=5, help="timed rounds (default %(default)s)")
    export.add_argument("--no-time", action="store_true", help="skip the speed of the merged and the plain model")
    export.set_defaults(command=run.export)

    tune = commands.add_parser("tune", help="find what each block of a model may merge, on data, for a target")
    _add_model(tune, batch=8)
    _add_tune_options(tune)
    tune.set_defaults(command=run.tune)

    demo = commands.add_parser("demo", help="merge the tokens of a trained model and draw them on a photo")
    demo.add_argument("--photo", help="path of a picture (default: photos that come with scikit-learn)")
    demo.add_argument("--r", type=parse_positive, help="tokens merged in each layer")
    demo.add_argument("--out", default="tome_demo.png", help="path of the PNG (default %(default)s)")
    demo.set_defaults(command=run.demo)

    show = commands.add_parser("show", help="draw which tokens of a photo or video a model merges, and its new graph")
    show.add_argument("photo", help="path of a picture, or of a video: then a GIF")
    show.add_argument("--model", default=TRAINED, help=f"timm name, package.module:function, or {TRAINED}: DINOv2")
    show.add_argument("--r", type=parse_r, help=f"as in explain (default {DEFAULT_R})")
    show.add_argument("--size", type=parse_positive, help="side in pixels (default: the model's own)")
    show.add_argument("--input", type=parse_shape, help="input shape, as 1,3,16,224,224; for package.module:function")
    show.add_argument("--grid", type=parse_shape,
                      help="steps, rows, columns of a clip's tubelets (default: from a Conv3d)")  # fmt: skip
    show.add_argument("--pretrained", action="store_true", help="load the weights of a timm model")
    show.add_argument("--out", help="path of the PNG or GIF (default tome_show.png, tome_show.gif)")
    show.set_defaults(command=run.show, batch=1, device=torch.device("cpu"), dtype="float32")
    return parser


def _add_model(parser: argparse.ArgumentParser, batch: int) -> None:
    """The model and its input."""
    parser.add_argument("model", help=f"timm name, package.module:function returning an nn.Module, or {TRAINED}")
    parser.add_argument("--batch", type=parse_positive, default=batch, help="images (default %(default)s)")
    parser.add_argument("--size", type=parse_positive, help="image side in pixels (default: the model's own, or 224)")
    parser.add_argument("--input", type=parse_shape,
                        help="whole input shape, as 1,3,224,224; for package.module:function")  # fmt: skip
    parser.add_argument("--device", type=parse_device, default=torch.device("cpu"), help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="load the weights of a timm model")
    parser.add_argument("--inner", choices=INNERS, default="inductor", help="compiler behind (default %(default)s)")
    parser.add_argument("--placement", help="where merging goes")
    parser.add_argument("--protect", type=parse_protect, default="auto", help="auto, 1, 2/10 (of every 10) or 0,5,-1")


def _add_model_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """The model, its input and the configuration of the pass."""
    _add_model(parser, batch)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--r", type=parse_r, help=f"16, 0.1, 16,-1 or 8,8,4 (default {DEFAULT_R})")
    amount.add_argument("--flops", type=float, help="target share of the FLOPs, 0.5 for half")
    amount.add_argument("--tune", type=Path, metavar="FILE", help="what `tune` found and wrote")
    parser.add_argument("--method", default="tome", help="a bundle of the pieces below (default %(default)s)")
    parser.add_argument("--metric", help="what tokens are compared by")
    parser.add_argument("--importance", help="how much a token matters")
    parser.add_argument("--candidates", help="who takes part")
    parser.add_argument("--similarity", help="how they are compared")
    parser.add_argument("--alpha", type=parse_name_or_number, help="weight of the metric beside places")
    parser.add_argument("--partition", type=parse_names, help="two sides of the matching")
    parser.add_argument("--matcher", type=parse_names, help="who picks the pairs")
    parser.add_argument("--merging", type=parse_names, help="what becomes of a pair")
    parser.add_argument("--prune", type=float, help="share of the r tokens that is dropped, not merged")
    parser.add_argument("--counts", help="how many of r merge, by the data: votes or threshold")
    parser.add_argument("--least", type=float, help="share of the r tokens that goes in any case, with --counts")
    parser.add_argument("--blocks", type=parse_blocks, help="all, first half, last, 3,6,9 or 0.25,0.5 of the depth")
    parser.add_argument("--number", type=parse_number, action="append", default=[], metavar="NAME=VALUE",
                        help="as tau=0.8")  # fmt: skip
    parser.add_argument("--every", type=parse_positive, default=1,
                        help="merge at every k-th block (default %(default)s)")  # fmt: skip
    parser.add_argument("--reuse", type=parse_count, default=0, help="blocks that a branch's groups serve after it")
    parser.add_argument("--multiple", type=parse_positive, default=1,
                        help="token counts in multiples (default %(default)s)")  # fmt: skip
    parser.add_argument("--no-prop-attn", dest="prop_attn", action="store_const", const=False,
                        help="no proportional attention")  # fmt: skip
    parser.add_argument("--padding-first", action="store_true", help="merge what masks leave out before all else")
    parser.add_argument("--all-rows", dest="drop_unread", action="store_false", help="compute unread rows too")
    parser.add_argument("--strict", action="store_true", help="an error instead of a warning when nothing is merged")
    parser.add_argument("--json", type=parse_output, metavar="FILE", help="write the numbers there as well")


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    """What is searched, on what, for what."""
    parser.add_argument("--data", required=True, help="a folder of photos, or package.module:function giving batches")
    parser.add_argument("--target", type=parse_target, required=True, help="loss=0.5, speed=1.5 or flops=0.6")
    parser.add_argument("--metric", default="feature", help="feature (distance of outputs), top1, wer, module:function")
    parser.add_argument("--search", type=parse_list, default=("schedule",), help=",".join(tuning.SEARCHED))
    parser.add_argument("--images", type=parse_positive, default=256, help="photos drawn (default %(default)s)")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of search (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--resume", type=parse_output, metavar="FILE", help="keeps an unfinished search, which goes on")
    parser.add_argument("-o", "--out", type=parse_output, default=Path("tune.json"), help="default %(default)s")
    parser.add_argument("--plot", type=parse_output, metavar="FILE", help="default: beside the JSON, with .png")
