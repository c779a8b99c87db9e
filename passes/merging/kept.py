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
    tokens. lead: the sizes of the dims before the tokens, where these are the samples; None where they are not."""

    def __init__(self, env: Emitter) -> None:
        self.env, self.call = env, env.builder.call
        self.step: Step | None = None
        self.lead: list[Any] | None = None
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
        dims = env.facts.dims(n)
        laid = Laid(env.fetch(n, layout), dims, layout)
        if self.step is None and [a for dim in dims[:d] for a in leaves(dim)] == [*leaves(run.step.sample)]:
            self.lead = [*laid.x.shape[:d]]  # a batch of one too
        self.step = run.step
        x, back = laid.canonical(d, run.key, leaves(run.step.sample))
        return back(self.call(tome.unmerge.default, x, self._ordered()), layout).x

    def told(self) -> tuple[Traced, Traced, Traced]:
        """What the rows stand for: float32 [*lead, N'], how many tokens each; int64 [*lead, N], the row that each token
        went into; int64 [*lead, N'], the token that represents each row. Raises KeptError where no output is merged."""
        if self.step is None:
            raise KeptError(self._why_none())
        held = self.env.steps.through(self.step.chain())
        dim, order = held.keep.dim() - 1, self._ordered()
        size = held.size if held.size is not None else self.call(aten.ones_like.default, order, dtype=torch.float32)
        told = size.gather(dim, order), self._ranked().gather(dim, held.assign), held.keep.gather(dim, order)
        size, source, place = (x if self.lead is None else x.reshape([*self.lead, x.shape[-1]]) for x in told)
        return size, source, place

    def _why_none(self) -> str:
        """Where the last tokens were given back, as far as it was before the end."""
        why = "none of its outputs holds merged tokens: "
        given = [u for u in self.env.plan.unmerges if u.op != "output"]
        if not given:
            return why + "they are pooled"
        op, detail = given[-1].op, given[-1].detail
        where = f" in {given[-1].where}" if given[-1].where else ""
        where = f"at full length for {op}{where}, which {detail}"
        return f"{why}they are pooled, or given back before it ends ({where}): rewrite the part that ends before that"

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
