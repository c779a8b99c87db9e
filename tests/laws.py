"""Laws beside the lossless one: what masks forbid, what samples owe each other, which tokens stay alone.

`Traced` compiles one Dynamo trace under several configs, and records the groups of every merge as it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tome_fx
from tests.palette import distance
from tome_fx.report import ToMeReport

LAW, UNMOVED = 5e-5, 1e-5
PLACEMENTS = ("auto", "stream", "branch")
tome = torch.ops.tome
MATCHES = (tome.match.default, tome.match_by.default, tome.match_parts.default, tome.match_size.default,
           tome.match_pieces.default)  # fmt: skip


class Matches(TorchDispatchMode):
    """Keeps (assign, similarity) of every match that runs inside."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MATCHES:
            self.found.append((out[0], out[3]))
        return out


class Traced:
    """A model traced once and compiled by tome_backend under each of several named configs, eagerly.

    `reports[name]`: the report under a config, of all graphs. `groups(count)`, `lowest`: of the last call.
    """

    def __init__(self, model: Callable[..., Any], configs: dict[str, dict[str, Any]], dynamic: bool | None = False):
        self.configs, self.chosen = configs, ""
        self.reports = {name: ToMeReport() for name in configs}
        self.matches = Matches()
        torch._dynamo.reset()
        self.fast = torch.compile(model, backend=self._backend, dynamic=dynamic)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        made: dict[str, Callable[..., Any]] = {"": gm}
        for name, config in self.configs.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", tome_fx.ToMeWarning)
                made[name] = tome_fx.tome_backend(**{"inner": "eager", **config})(gm, inputs)
            self.reports[name] = self.reports[name] + tome_fx.reports()[-1]

        def run(*real: Any) -> Any:
            with self.matches:
                return made[self.chosen](*real)

        return run

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The outputs under the config of that name; under "" those of Dynamo's own graph."""
        self.chosen = name
        self.matches.found.clear()
        with torch.no_grad():
            return self.fast(*args, **kwargs)

    @property
    def lowest(self) -> float:
        """The lowest similarity at which the last call merged two tokens."""
        return min((float(s.min()) for _, s in self.matches.found if s.numel()), default=1.0)

    def groups(self, count: int) -> list[Tensor]:
        """Of the last call: the groups [samples, count] after each merge of a sequence of `count` tokens, as
        `tome_fx.trace_tokens` gives them; merges of shorter ones continue those before them."""
        made: list[Tensor] = []
        for assign, _ in self.matches.found:
            assign = assign.reshape(-1, assign.shape[-1])
            if assign.shape[-1] == count:
                made.append(assign)
            elif made and int(made[-1].max()) + 1 == assign.shape[-1] and len(made[-1]) == len(assign):
                made.append(assign.gather(-1, made[-1]))
        return made


def traced(model: nn.Module, r: Any, placements: Sequence[str] = PLACEMENTS, **config: Any) -> Traced:
    """By placement, each a name."""
    return Traced(model, {name: {"r": r, "placement": name, **config} for name in placements})


def no_internal_error(report: ToMeReport) -> None:
    assert not any(s.kind == "internal error" for s in report.skipped), report.skipped[0].detail
    assert report.merged_sites or report.skipped, "nothing merged and no reason"


def shared_tokens(groups: Sequence[Tensor], places: Sequence[int]) -> int:
    """How many of the tokens at `places` share a group with any other token, over all merges and samples."""
    return sum(int((g == g[p]).sum()) > 1 for made in groups for g in made for p in places)


def mixed_groups(groups: Sequence[Tensor], part: Tensor) -> int:
    """How many groups hold tokens of two parts; part [tokens] numbers them."""
    return sum(len(part[g == i].unique()) > 1 for made in groups for g in made for i in g.unique())


def apart_from(x: Tensor, changed: Tensor, seed: int = 7) -> Tensor:
    """x [B, N, D] with other random tokens where `changed` [N]."""
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(changed[:, None], other, x)


def moved(a: Tensor, b: Tensor, kept: Tensor) -> float:
    """Largest difference at the tokens `kept` [N], relative."""
    return distance(a[:, kept], b[:, kept])
