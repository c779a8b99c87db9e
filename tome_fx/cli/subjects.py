"""The model, its input and the backend that a command line names."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import tome_fx
from tome_fx import matching, timing
from tome_fx.schedule import ScheduleError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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


class UserError(Exception):
    """A mistake of the user, told in one sentence."""


def load(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
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
        raise UserError(first_line(error)) from error


def _from_module(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """The model that a function of the user's returns, and its input shape."""
    if args.pretrained:
        raise UserError("--pretrained is for timm models; let the function load its own weights")
    if args.input and args.size:
        raise UserError("--input already says the size: leave --size out")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the console script does not have it, `python -m` does
    model = user_function(args.model)()
    if not isinstance(model, nn.Module):
        raise UserError(f"{args.model} returned {type(model).__name__}, not an nn.Module")
    side = args.size or DEFAULT_INPUT[1]
    return model, args.input or (args.batch, DEFAULT_INPUT[0], side, side)


def user_function(path: str) -> Any:
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
        raise UserError(f"timm cannot make {args.model}: {first_line(error)}") from error
    size = args.size or side
    return model, (args.batch, channels, size, size)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_runs(model: nn.Module, x: torch.Tensor) -> None:
    """One eager pass: an input that does not fit is reported before anything is compiled. Raises UserError."""
    try:
        with torch.no_grad():
            model(x)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the model does not take an input {list(x.shape)}: {first_line(error)}") from error


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `tome_backend`. Raises UserError for a file of `tune` that cannot be read, and for options given
    beside it though it has them."""
    amount = {"flops": args.flops} if args.flops is not None else {"r": DEFAULT_R if args.r is None else args.r}
    given = {**{name: getattr(args, name) for name in OPTIONS}, **dict(args.number)}
    if args.tune is None:
        return {**amount, **given}
    try:
        found = tome_fx.Tuned.load(args.tune).options
    except (tome_fx.TuneFileError, OSError) as error:
        raise UserError(first_line(error)) from error
    unsaid = {None: "", "method": "tome", "protect": "auto"}
    if twice := [name for name in found if given.get(name) not in (None, unsaid.get(name), found[name])]:
        raise UserError(f"{args.tune} says {twice[0]} already: leave --{twice[0].replace('_', '-')} out")
    return {**given, **found}


def backend_of(args: argparse.Namespace) -> Any:
    """The backend, and with it the check of its options. Raises UserError."""
    if ":" in args.model and args.matcher not in (None, *matching.BUILT_IN):
        user_function(args.model)  # its module may be what registers the matcher
    try:
        return tome_fx.tome_backend(**config_of(args))
    except (ValueError, TypeError) as error:
        raise UserError(first_line(error)) from error


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn what --strict refuses, and an r with too many blocks, into a UserError."""
    try:
        yield
    except (tome_fx.ToMeError, ScheduleError) as error:
        raise UserError(str(error)) from error
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, (tome_fx.ToMeError, ScheduleError)):
            raise UserError(str(error.inner_exception)) from error
        raise


def write_numbers(path: Path | None, numbers: dict[str, Any]) -> None:
    """Write `numbers` to `path`, if there is one."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
