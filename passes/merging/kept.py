"""kept: outputs that stay merged, in the order of their tokens, and what their rows stand for.

Merging leaves groups in the order of the matching. Here a group stands where the token that represents it stood, so
that positions still rise along the axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..algebra.axes import leaves
from ..algebra.layout import Step, is_plain
from ..building.trace import Traced
from .laid import Laid

if TYPE_CHECKING:
    from ..rewrite import Emitter

aten = torch.ops.aten
tome = torch.ops.tome


class KeptError(ValueError):
    """Outputs that cannot stay merged; the message says which and why."""


class Kept:
    """The outputs of a graph, merged. env: the emitter whose graph they are added to. step: the last merge of their
    tokens."""

    def __init__(self, env: Emitter) -> None:
        self.env, self.call = env, env.builder.call
        self.step: Step | None = None
        self._rank: Traced | None = None
        self._order: Traced | None = None

    def value(self, n: fx.Node) -> Any:
        """An output as it is given back: merged tokens in order, other values as they were."""
        env = self.env
        if not isinstance(env.env[n], Traced) or is_plain(env.layout(n)):
            return env.whole(n)
        layout = tuple(tuple(run.intensive() for run in runs) for runs in env.layout(n))
        found = [(d, run) for d, runs in enumerate(layout) for run in runs]
        (d, run), *others = found
        if others or self.step not in (None, run.step):
            why = "along two axes" if others else "by different merges (hidden states of several blocks)"
            raise KeptError(f"its outputs hold tokens that are merged {why}: give back the last tokens alone")
        self.step = run.step
        laid = Laid(env.fetch(n, layout), env.facts.dims(n), layout)
        x, back = laid.canonical(d, run.key, leaves(run.step.sample))
        return back(self.call(tome.unmerge.default, x, self._ordered()), layout).x

    def told(self) -> tuple[Traced, Traced]:
        """What the rows stand for: float32 [*sample, N'], how many tokens each, and int64 [*sample, N], the row that
        each token went into. Raises KeptError where no output is merged."""
        if self.step is None:
            raise KeptError("none of its outputs holds merged tokens: they are pooled, or given back before it ends")
        held = self.env.steps.through(self.step.chain())
        dim, order = held.keep.dim() - 1, self._ordered()
        size = held.size if held.size is not None else self.call(aten.ones_like.default, order, dtype=torch.float32)
        return size.gather(dim, order), self._ranked().gather(dim, held.assign)

    def _ranked(self) -> Traced:
        """int64 [*sample, N']: the place of each group among all, by the tokens that represent them."""
        if self._rank is None:
            assert self.step is not None
            held = self.env.steps.through(self.step.chain())
            dim = held.keep.dim() - 1
            none, ones = self.call(aten.zeros_like.default, held.assign), self.call(aten.ones_like.default, held.keep)
            marked = self.call(aten.scatter_add.default, none, dim, held.keep, ones)
            # Runtimes count in floats alone.
            before = self.call(aten.cumsum.default, marked.to(torch.float32), dim).to(torch.int64)
            self._rank = before.gather(dim, held.keep) - 1
        return self._rank

    def _ordered(self) -> Traced:
        """int64 [*sample, N']: the group at each place."""
        if self._order is None:
            rank = self._ranked()
            dim, count = rank.dim() - 1, rank.shape[-1]
            place = self.call(aten.arange.default, count, device=rank.device).expand([*rank.shape[:-1], count])
            none = self.call(aten.zeros_like.default, rank)
            self._order = self.call(aten.scatter_add.default, none, dim, rank, place)
        return self._order


__all__ = ["Kept", "KeptError"]
