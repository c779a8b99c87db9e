"""How the image benchmarks run a net with and without merging: outputs, tokens, multiply-adds, throughput, losses.

A way to merge is a dict of `tome_backend`'s keywords; None is the net without merging.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import common
import tome_fx
from tome_fx import assets, timing

Options = Mapping[str, Any] | None
Loader = Callable[[np.ndarray], Tensor]
"""Indices [b] -> the net's input of these samples."""

NEAR = 0.5
"""Points of accuracy: a loss within it is what "found" asks for."""
EPS = 1e-9
"""Points: shares of a few thousand images are not exact in binary."""


@dataclass(frozen=True)
class Outputs:
    """`values` [n, ...] of a net, and the report of its graph; None where nothing merges."""

    values: Tensor
    report: tome_fx.ToMeReport | None

    @property
    def tokens(self) -> int | None:
        """Tokens after the last merge."""
        return self.report.tokens[-1][1] if self.report and self.report.tokens else None

    @property
    def macs(self) -> float | None:
        """Multiply-adds of a forward pass over the original's."""
        return self.report.flops_after / self.report.flops_before if self.report and self.report.flops_before else None


def compiled(model: nn.Module, options: Options, inner: str) -> Callable[[Tensor], Tensor]:
    """`model` merged by `options` over the compiler `inner`; the model itself for None over "eager".

    Raises ValueError or TypeError on options that `tome_backend` does not know.
    """
    if options is not None:
        backend: Any = tome_fx.tome_backend(**options, inner=inner)
    elif inner == "eager":
        return model
    else:
        backend = inner
    return torch.compile(model, backend=backend, dynamic=False)


def outputs(
    model: nn.Module,
    options: Options,
    load: Loader,
    samples: Sequence[int] | np.ndarray,
    batch: int,
    console: Console,
    inner: str = "eager",
) -> Outputs:
    """What the net says to `samples`, in batches of one shape: the last is filled up with its first sample.

    With `options` the graph is compiled afresh, in inference mode without gradients.
    """
    torch.compiler.reset()  # each r is another graph of the same code: Dynamo's limit of recompilations is near
    tome_fx.clear_reports()
    run, samples, parts = compiled(model, options, inner), np.asarray(samples), []
    starts = range(0, len(samples), batch)
    with torch.no_grad():
        for start in bar(starts, f"{name_of(options)}, {inner}", console):
            chosen = samples[start : start + batch]
            filled = np.concatenate([chosen, np.repeat(chosen[:1], batch - len(chosen))])
            parts.append(run(load(filled))[: len(chosen)].float())
    done = tome_fx.reports()
    return Outputs(torch.cat(parts), done[0] if options is not None and done else None)


def bar(items: Sequence[Any], title: str, console: Console) -> Iterable[Any]:
    """The items under a progress bar that goes when they are done; none where the output is a file."""
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def name_of(options: Options) -> str:
    """ "r=8, metric='input'" of a way to merge."""
    return ", ".join(f"{k}={v!r}" for k, v in options.items()) if options else "no merging"


def throughput(
    model: nn.Module, ways: Mapping[str, Options], x: Tensor, rounds: int, console: Console
) -> dict[str, float]:
    """Throughput of each way over plain Inductor's on one batch `x`, all interleaved in one process."""
    torch.compiler.reset()
    steps: dict[str, timing.Step] = {}
    with torch.no_grad(), common.room_for(len(ways) + 1):
        for name, options in bar([("", None), *ways.items()], "compiling", console):
            steps[name] = partial(compiled(model, options, "inductor"), x)
            steps[name]()
        with console.status(f"timing, {rounds} interleaved rounds"):
            found = common.speeds(steps, "", rounds)
    return {name: found[name] for name in ways}


# ------------------------------------------------------------------------------------------------------ results


def point(r: Any, right: np.ndarray, out: Outputs, speed: float | None) -> dict[str, Any]:
    """A point of a curve, from bools [n] that say which samples were right."""
    return {
        "r": list(r) if isinstance(r, tuple) else r,
        "tokens": out.tokens,
        **common.binomial(int(right.sum()), len(right)),
        "speed": speed,
        "macs": out.macs,
    }


def loss(right: np.ndarray, plain: np.ndarray, seed: int = 0) -> dict[str, float | int]:
    """Points of accuracy lost on the same samples, bools [n] each, with a paired bootstrap's interval: "value", ..."""
    both = np.stack([plain, right], axis=1).astype(float)
    return common.bootstrap(both, lambda rows: 100 * float((rows[:, 0] - rows[:, 1]).mean()), seed=seed)


def largest_within(
    points: Iterable[Mapping[str, Any]], baseline: float, points_lost: float
) -> Mapping[str, Any] | None:
    """The point of a constant schedule with the largest r that loses at most `points_lost` of `baseline`.

    Every smaller r must do so too: a lucky large r is no find.
    """
    best = None
    for each in sorted((p for p in points if isinstance(p["r"], int)), key=lambda p: p["r"]):
        if baseline - each["value"] > points_lost + EPS:
            break
        best = each
    return best


def describe(best: Mapping[str, Any] | None, lost: Mapping[str, Any] | None) -> str:
    """The find in words, with the paired interval of its loss."""
    if best is None or lost is None:
        return "none of the grid"
    speed = f", throughput ratio {best['speed']:.2f}" if best["speed"] else ""
    interval = f"{lost['value']:.2f} points ({lost['low']:.2f} to {lost['high']:.2f})"
    return f"r={best['r']}: {interval} lost{speed}, MACs ratio {best['macs']:.2f}"


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options of a script on images."""
    options = common.parser(description)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, help="threads of torch (default: torch's)")
    options.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default %(default)s)")
    options.add_argument("--no-speed", action="store_true", help="leave the throughput ratios out")
    return options


def pending(args: argparse.Namespace, name: str, console: Console) -> bool:
    """`common.pending`. Sets the threads too."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.small:
        args.no_speed = True
    return common.pending(args, name, console)


def machine() -> dict[str, Any]:
    """Of the processor; to be taken before anything is measured."""
    return timing.machine_info("cpu", torch.float32)


def cached(name: str, rows: int, make: Callable[[int], np.ndarray]) -> np.ndarray:
    """The first `rows` rows of `<cache>/name`; `make(start)` gives rows start to `rows` that are not there yet."""
    path = assets.cache_dir() / name
    have = np.load(path) if path.exists() else None
    if have is None or len(have) < rows:
        new = make(0 if have is None else len(have))
        have = new if have is None else np.concatenate([have, new])
        scratch = path.with_suffix(f".{os.getpid()}.npy")
        np.save(scratch, have)
        os.replace(scratch, path)
    return have[:rows]
