"""How much a merged model loses: its outputs against the unmerged model's, and a metric of outputs and targets."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Metric = Callable[[Any, Any], Any]
"""(outputs, targets) of a batch -> a number, or one of each sample [B], or [B, 2]: shares as (part, whole) of each."""
DRAWS = 2000
"""Resamples of a bootstrap."""


class MetricError(ValueError):
    """The metric raised, or gave what is no number; the message says which."""


@dataclass(frozen=True)
class Batch:
    """A call of the model, and what its outputs should be (None without a metric)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor)]

    @property
    def samples(self) -> int:
        return next((len(x) for x in self.tensors if x.dim()), 1)

    @property
    def shapes(self) -> list[tuple[Any, ...]]:
        return [(*x.shape, x.dtype) for x in self.tensors]


def batches_of(model: torch.nn.Module, batches: Iterable[Any], labelled: bool) -> tuple[list[Batch], list[str]]:
    """The batches of one shape, that of the first, and a note of those left out. labelled: each is (inputs, targets).

    Raises ValueError for none, for inputs that the model's signature does not take, or fewer than two batches.
    """
    held = [_batch(each, labelled) for each in batches]
    if not held:
        raise ValueError("there are no batches: tune needs samples of what the model will see")
    _check_signature(model, held[0], labelled)
    same = [batch for batch in held if batch.shapes == held[0].shapes]
    if len(same) < 2:
        raise ValueError("tune needs two batches of one shape at least: one to tune on, another to report on")
    left = len(held) - len(same)
    note = f"{left} of {len(held)} batches left out: their shapes are not those of the first"
    return same, [note] if left else []


def _batch(given: Any, labelled: bool) -> Batch:
    target = None
    if labelled:
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ValueError("with a metric each batch is a pair (inputs, targets)")
        given, target = given
    if isinstance(given, Mapping):
        return Batch((), dict(given), target)
    return Batch(tuple(given) if isinstance(given, (tuple, list)) else (given,), {}, target)


def _check_signature(model: torch.nn.Module, batch: Batch, labelled: bool) -> None:
    try:
        inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        hint = "" if labelled else "; without a metric a batch is inputs alone, no targets beside them"
        raise ValueError(f"a batch does not fit the model's forward: {error}{hint}") from error


def parted(batches: Sequence[Batch], share: float, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Batches to tune on, and a share of them to report on, drawn by a seed; one of each at least."""
    order = list(batches)
    random.Random(seed).shuffle(order)
    held = min(max(round(len(order) * share), 1), len(order) - 1)
    return order[held:], order[:held]


def floats(outputs: Any, samples: int) -> list[Tensor]:
    """The float outputs as rows: [samples, n] where they have a row for each sample, else [1, n]."""
    found = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    return [x.reshape(samples, -1) if x.dim() and len(x) == samples else x.reshape(1, -1) for x in found]


def distance(outputs: Sequence[Tensor], plain: Sequence[Tensor], samples: int) -> np.ndarray:
    """1 - cosine of each sample's outputs to the unmerged model's, the mean over outputs: float64 [samples]."""
    found = [_apart(a, b.to(a.device)).expand(samples) for a, b in zip(outputs, plain, strict=True)]
    return torch.stack(found).mean(0).cpu().numpy()


def _apart(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / lengths.clamp_min(1e-300)
    both_zero = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
    return torch.where(both_zero, 0.0, (1 - cosine).clamp_min(0.0))


def rows_of(metric: Metric, outputs: Any, batch: Batch) -> np.ndarray:
    """What a metric says of a batch as (part, whole): float64 [n, 2]; n is 1 where it gives one number for all.

    Raises MetricError where it raises, or gives something else.
    """
    try:
        said = metric(outputs, batch.target)
    except Exception as error:
        raise MetricError(f"the metric raised {type(error).__name__}: {_first_line(error)}") from error
    try:
        rows = np.asarray(said.detach().cpu().double() if isinstance(said, Tensor) else said, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MetricError(f"the metric gave {type(said).__name__}, not numbers") from error
    if rows.ndim == 0:
        rows = rows[None]
    if rows.ndim == 1:
        rows = np.stack([rows, np.ones_like(rows)], 1)
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise MetricError(f"the metric gave an array {list(rows.shape)}; it is to give a number, [B] or [B, 2]")
    if not np.isfinite(rows).all():
        raise MetricError("the metric gave a number that is not finite")
    return rows


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "without a message")


@dataclass(frozen=True)
class Judged:
    """Of some batches: `apart` float64 [samples], 1 - cosine; `rows` float64 [n, 2] of the metric, None without one."""

    apart: np.ndarray
    rows: np.ndarray | None = None

    @property
    def distance(self) -> float:
        return float(self.apart.mean())


def value(rows: np.ndarray) -> float:
    """The metric of rows (part, whole)."""
    return float(rows[:, 0].sum() / max(float(rows[:, 1].sum()), 1e-300))


class Judge:
    """The batches, and what the unmerged model gives for them."""

    def __init__(self, run: Callable[[Batch], Any], batches: Sequence[Batch], metric: Metric | None) -> None:
        self.batches, self.metric = list(batches), metric
        self.plain: list[list[Tensor]] = []
        self.rows: list[np.ndarray] = []
        for batch in self.batches:
            outputs = run(batch)
            self.plain.append([x.cpu() for x in floats(outputs, batch.samples)])
            if not self.plain[-1]:
                raise ValueError("the model's outputs hold no floats to compare")
            if not all(bool(x.isfinite().all()) for x in self.plain[-1]):
                raise ValueError("the unmerged model itself gives NaN or infinity on these batches")
            if metric is not None:
                self.rows.append(rows_of(metric, outputs, batch))

    def judge(self, run: Callable[[Batch], Any], count: int | None = None) -> Judged:
        """Another run of the first `count` batches."""
        apart, rows = [], []
        for batch, plain in zip(self.batches[:count], self.plain, strict=False):
            outputs = run(batch)
            apart.append(distance(floats(outputs, batch.samples), plain, batch.samples))
            if self.metric is not None:
                rows.append(rows_of(self.metric, outputs, batch))
        return Judged(np.concatenate(apart), np.concatenate(rows) if rows else None)

    def loss(self, judged: Judged) -> float:
        """What a target of loss means: points of the metric, or without one the distance."""
        if judged.rows is None:
            return judged.distance
        return 100 * (value(self._own(judged.rows)) - value(judged.rows))

    def interval(self, judged: Judged, seed: int) -> tuple[float, float]:
        """95 % of `loss`, by a bootstrap over samples, paired where there is a metric."""
        draw = np.random.default_rng(seed)
        n = len(judged.apart if judged.rows is None else judged.rows)
        picks = draw.integers(0, n, (DRAWS, n))
        if judged.rows is None:
            found = judged.apart[picks].mean(1)
        else:
            own = self._own(judged.rows)
            found = 100 * np.array([value(own[pick]) - value(judged.rows[pick]) for pick in picks])
        low, high = np.percentile(found, (2.5, 97.5))
        return float(low), float(high)

    def _own(self, rows: np.ndarray) -> np.ndarray:
        """The unmerged model's rows of the same samples."""
        return np.concatenate(self.rows)[: len(rows)]


def rising(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression: the xs in order, and the rising ys nearest to the given ones (pool adjacent violators)."""
    order = np.argsort(xs, kind="stable")
    pools: list[list[float]] = []
    for y in np.asarray(ys, float)[order]:
        pools.append([y, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append([(a * n + b * m) / (n + m), n + m])
    fitted = np.concatenate([np.full(int(n), y) for y, n in pools])
    return np.asarray(xs, float)[order], fitted


def level(distances: Sequence[float], losses: Sequence[float], most: float) -> float:
    """The largest distance at which the loss, rising with it, is at most `most`; beyond the largest that was tried it
    is not known, and 0 where it is more from the start. Single losses are noisy, all of them together less so."""
    xs, ys = rising([0.0, *distances], [0.0, *losses])
    fits = np.flatnonzero(ys <= most)
    if not len(fits):
        return 0.0
    last = int(fits[-1])
    if last + 1 == len(xs):
        return float(xs[last])
    rise = max(float(ys[last + 1] - ys[last]), 1e-300)
    return float(xs[last] + (xs[last + 1] - xs[last]) * (most - ys[last]) / rise)
