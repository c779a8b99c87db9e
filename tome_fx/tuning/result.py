"""What a search found: options for `tome_backend`, with the figures by which they were chosen."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tome_fx.backend import ToMeBackend, tome_backend
from tome_fx.config import config_from

VERSION = 1
SHOWN = 12
"""Points of the front that a table shows."""


class TuneFileError(ValueError):
    """A file that `Tuned.save` did not write, or that was changed since; the message says what is wrong with it."""


@dataclass(frozen=True)
class TunedBlock:
    """One block. r: tokens it merges away, of `before`, so that `after` are left. loss: its share of the distance, as
    fitted to all schedules that were evaluated (None where the schedule was not searched). saves: share of the
    unmerged model's time that this merge saves beyond all others, as predicted."""

    name: str
    r: int
    before: int
    after: int
    loss: float | None
    saves: float


@dataclass(frozen=True)
class Tried:
    """One schedule that was evaluated. speed, flops: predicted, over the unmerged model's. distance: 1 - cosine of
    outputs to the unmerged model's. loss: as the target means it. samples: how many it was judged on."""

    name: str
    r: list[int]
    options: dict[str, Any]
    speed: float
    flops: float
    distance: float
    loss: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What `tune` found.

    options: for `tome_backend`, `r` a list with a count for each block. target: as `tome-fx tune --target` takes it.
    reached: whether it was, on the batches tuned on and, of a speed, as measured. unit: of the losses, "points" of a
    metric or "1 - cosine". tuned_loss: on the batches tuned on. loss, low, high: on the batches held out, with its 95 %
    interval (a bootstrap over samples); None where the search was stopped before. distance: 1 - cosine there. speed:
    measured throughput over the unmerged model's, both compiled; None as before. predicted: what the cost curves said
    of it. flops: share of the unmerged model's. family: the best constant r, (r, -1) or (r, 1) under the options given,
    with the same figures. samples: how many were tuned on and reported on. seconds: the search took.
    """

    options: dict[str, Any]
    target: str
    reached: bool
    unit: str
    tuned_loss: float
    loss: float | None
    low: float | None
    high: float | None
    distance: float | None
    speed: float | None
    predicted: float
    flops: float
    family: dict[str, Any] | None
    blocks: list[TunedBlock]
    front: list[Tried]
    tried: list[Tried]
    samples: tuple[int, int]
    seconds: float
    notes: list[str] = field(default_factory=list)
    model: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    def backend(self, **more: Any) -> ToMeBackend:
        """The backend for `torch.compile(model, backend=found.backend())`. more: options of `tome_backend` beside what
        was found. Raises as it does."""
        return tome_backend(**{**self.options, **more})

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON, which `Tuned.load` reads and `--tune` of the command line."""
        Path(path).write_text(json.dumps({"tome_fx_tune": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Tuned:
        """Read what `save` wrote. Raises TuneFileError, a ValueError, where it did not, and OSError."""
        try:
            held = json.loads(Path(path).read_text())
            version = held.pop("tome_fx_tune")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise TuneFileError(f"{path} is no file of `tome-fx tune`") from error
        if version != VERSION:
            raise TuneFileError(f"{path} is of version {version}, and this tome_fx reads version {VERSION}: tune anew")
        try:
            held["blocks"] = [TunedBlock(**block) for block in held["blocks"]]
            for name in ("front", "tried"):
                held[name] = [Tried(**point) for point in held[name]]
            held["samples"] = tuple(held["samples"])
            found = cls(**held)
            config_from(found.options)
        except (TypeError, KeyError, ValueError) as error:
            raise TuneFileError(f"{path} is damaged: {error}") from error
        return found

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=110, color_system=None)
        console.print(self._block_table())
        console.print(self._front_table())
        for line in self._lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return buffer.getvalue().rstrip()

    def _lines(self) -> list[str]:
        measured = "not measured" if self.speed is None else f"{self.speed:.2f} times the speed, measured"
        lines = [f"asked for {self.target}: {self._verdict()}"]
        lines += [f"{measured} (predicted {self.predicted:.2f}), {self.flops:.0%} of the FLOPs"]
        if self.loss is None:
            lines += [f"loss {self._of(self.tuned_loss)} on the {self.samples[0]} samples tuned on, not held out"]
        else:
            interval = f"95 % interval {self.low:.3g} to {self.high:.3g}"
            held = f"loss {self._of(self.loss)} ({interval}) on {self.samples[1]} samples held out"
            lines += [f"{held}, {self.tuned_loss:.3g} on the {self.samples[0]} tuned on"]
        if self.family is not None:
            lines += [f"the best of constant r, (r, -1) and (r, 1): {_family(self.family)}"]
        more = {name: value for name, value in self.options.items() if name != "r"}
        lines += [f"options: r={self.options['r']}" + "".join(f", {name}={value!r}" for name, value in more.items())]
        return lines + [f"note: {note}" for note in self.notes]

    def _of(self, loss: float) -> str:
        return f"{loss:.3g} ({self.unit})" if self.unit != "points" else f"{loss:.2f} points"

    def _verdict(self) -> str:
        return "reached" if self.reached else "the target cannot be reached by what was tried: this is the nearest"

    def _block_table(self) -> Table:
        table = Table(title="schedule", title_justify="left")
        for name in ("block", "r", "tokens", "loses", "saves"):
            table.add_column(name, justify="left" if name == "block" else "right")
        for block in self.blocks:
            loses = "" if block.loss is None or not block.r else f"{block.loss:.2g}"
            saves = f"{block.saves:.1%}" if block.r else ""
            table.add_row(block.name, str(block.r), f"{block.before} -> {block.after}", loses, saves)
        return table

    def _front_table(self) -> Table:
        table = Table(title="front of what was tried", title_justify="left")
        for name in ("", "speed (predicted)", "FLOPs", "1 - cosine", "loss"):
            table.add_column(name, justify="right" if name else "left")
        for point in thinned(self.front, SHOWN):
            loss = "" if self.unit != "points" else f"{point.loss:.2f}"
            table.add_row(point.name, f"{point.speed:.2f}", f"{point.flops:.2f}", f"{point.distance:.2g}", loss)
        return table

    def plot(self, path: str | Path) -> None:
        """Draw all that was tried, loss against predicted speed, with the front and what was chosen, to a picture.

        Raises ImportError without matplotlib, ValueError for a file that it does not write.
        """
        try:
            from matplotlib.figure import Figure  # late: it is no dependency
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, points in self._groups().items():
            axes.plot([p.speed for p in points], [p.distance for p in points], "o", ms=4, label=label, alpha=0.8)
        front = [(p.speed, p.distance) for p in self.front]
        if front:
            axes.plot(*zip(*front, strict=True), "-", color="0.4", lw=1, label="front")
        if self.distance is not None:
            axes.plot(self.predicted, self.distance, "*", ms=14, color="#c1121f", label="chosen, held out")
        axes.set(xlabel="speed over the unmerged model's, predicted", ylabel="1 - cosine of outputs")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.suptitle(f"{self.model}: {self.target}")
        figure.savefig(path, dpi=150)

    def _groups(self) -> dict[str, list[Tried]]:
        """What a plot tells apart; single blocks are no schedules."""
        groups: dict[str, list[Tried]] = {}
        for point in self.tried:
            if point.name.startswith("block "):
                continue
            plain = point.options == {name: value for name, value in self.options.items() if name != "r"}
            label = "proposals" if point.name.startswith("proposal") else "other options"
            if point.name.startswith("r="):
                label = "(r, -1)" if "-1" in point.name else "(r, 1)" if "(" in point.name else "constant r"
            groups.setdefault(label if plain or label != "constant r" else "constant r", []).append(point)
        return groups


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some points, ends included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _family(family: Mapping[str, Any]) -> str:
    speed = "" if family["speed"] is None else f", {family['speed']:.2f} times the speed"
    loss = family["loss"] if family["loss"] is not None else family["tuned_loss"]
    return f"{family['name']}{speed}, loss {loss:.3g}"
