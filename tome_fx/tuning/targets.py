"""What a search is asked for: `Loss`, `Speed` or `Flops`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """As fast as it gets while merging loses at most `most`.

    With a metric that is a share (accuracy, a correlation), points: 100 times what the metric falls by. Without one,
    the distance of outputs: 1 - cosine to the unmerged model's. Raises ValueError for a number that is not above 0.
    """

    most: float

    def __post_init__(self) -> None:
        _check(self, self.most, 0.0, math.inf, "above 0")

    def __str__(self) -> str:
        return f"a loss of at most {self.most:g}"


@dataclass(frozen=True)
class Speed:
    """As little loss as it gets at `least` times the unmerged model's throughput. Raises ValueError for 1 or less."""

    least: float

    def __post_init__(self) -> None:
        _check(self, self.least, 1.0, math.inf, "above 1, as 1.5 for half as fast again")

    def __str__(self) -> str:
        return f"{self.least:g} times the speed"


@dataclass(frozen=True)
class Flops:
    """As little loss as it gets with a `share` of the model's FLOPs. Raises ValueError for a number outside (0, 1)."""

    share: float

    def __post_init__(self) -> None:
        _check(self, self.share, 0.0, 1.0, "between 0 and 1, as 0.6")

    def __str__(self) -> str:
        return f"{self.share:g} of the FLOPs"


Target = Loss | Speed | Flops
KINDS: dict[str, type[Loss] | type[Speed] | type[Flops]] = {"loss": Loss, "speed": Speed, "flops": Flops}


def _check(target: Target, value: object, low: float, high: float, allowed: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low < value < high:  # type: ignore[operator]
        raise ValueError(f"{type(target).__name__} must be a number {allowed}, got {value!r}")


def parse(text: str) -> Target:
    """A target as typed: "loss=0.5", "speed=1.5", "flops=0.6". Raises ValueError for anything else."""
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in KINDS or math.isnan(value):
        raise ValueError(f"a target is loss=0.5, speed=1.5 or flops=0.6, not {text!r}")
    return KINDS[kind](value)


def spelled(target: Target) -> str:
    """What `parse` reads."""
    kind = next(name for name, made in KINDS.items() if isinstance(target, made))
    return f"{kind}={next(iter(vars(target).values()))!r}"
