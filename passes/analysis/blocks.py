"""blocks: one place to merge, as `find_blocks` and `mlps` find it and `plan` and `rewrite` read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tome_fx.report import SkipReason

from ..algebra.axes import Dim, Size
from .masks import KeyMask
from .partition import Room
from .projections import Projection
from .sites import AttentionSite
from .special import Special
from .streams import Spot

# Shorter axes (a few frames) are not merged: pairing 8 tokens by halves is not what the similarity measure is for.
SHORTEST_AXIS = 9


@dataclass(frozen=True, kw_only=True)
class Block:
    """One place to merge.

    tokens: the leaves of the token axis. sample: the leaves along which each entry is merged on its own.
    spot: the node whose value is merged, or whose operands are, and the stream that they are compared by. special:
    tokens that never merge. length: tokens before any merge. around: how many others the stream holds in front of them
    and behind, that this attention does not see. crossed: the tokens are the queries of cross attention.
    mlp: what merges is the MLP that reads the stream of the site.
    masks: the masks of keys, which give a token no weight. parts: the mask of pairs within whose parts tokens merge.
    room: how many of them may. turn: the sites that merge before it along its chain, and all of the chain.
    alike: of an MLP, whether tokens that its attention saw as equal are still equal. projected: of a branch, how what
    its tokens are compared by comes from them. beside: attentions that merge here with it, heads of their own: tokens
    are compared by the mean over the heads of all.
    """

    site: AttentionSite
    tokens: Dim
    sample: Dim
    spot: Spot
    special: Special
    length: Any
    around: tuple[Size, Size] = (0, 0)
    crossed: bool = False
    mlp: bool = False
    masks: tuple[KeyMask, ...] = ()
    parts: fx.Node | None = None
    room: Room = ()
    turn: tuple[int, int] = (0, 1)
    alike: bool = False
    projected: Projection | None = None
    beside: tuple[Block, ...] = ()

    @property
    def heads(self) -> tuple[Block, ...]:
        """The blocks of all attentions that merge here."""
        return (self, *self.beside)

    @property
    def name(self) -> str:
        """The place in the model."""
        return f"{self.site.name} (MLP)" if self.mlp else self.site.name

    @property
    def merge(self) -> fx.Node:
        return self.spot.merge

    @property
    def stream(self) -> fx.Node:
        return self.spot.stream

    @property
    def alone(self) -> bool:
        """Whether its tokens are all that the stream holds."""
        return all(isinstance(size, int) and size == 0 for size in self.around)

    @property
    def branch(self) -> bool:
        """Whether the merge ends where its values meet the stream."""
        return self.spot.branch

    def compared(self, metric: str) -> str:
        """What the tokens of a branch are compared by, in words, where that is not quite the metric asked for."""
        made, named = self.projected, {"key": "keys", "query": "queries", "value": "values"}.get(metric)
        names = list(dict.fromkeys(block.name for block in self.heads))
        if len(names) > 1 and named is not None and not (self.branch and made is None):
            return f"the mean of the {named} of {', '.join(names)}"
        if named is None or not self.branch or self.operands or self.mlp:
            return ""
        own = "queries" if self.crossed else named
        if made is None:
            return "all channels of what merges"
        if made.later is not None:
            return f"its {own} as they are projected"
        return f"the mean of its {own} over heads, normed after" if made.norm else ""

    @property
    def operands(self) -> tuple[tuple[int, int], ...]:
        return self.spot.operands


def unfit(site: AttentionSite, length: Any, kept: int) -> SkipReason | None:
    """Why nothing can merge on an axis of so many tokens, `kept` of them protected."""
    if isinstance(length, int) and length - kept < SHORTEST_AXIS:
        why = f"{length} tokens, {kept} of them protected: fewer than {SHORTEST_AXIS} to merge"
        return SkipReason("short axis", site.name, why)
    if free_unbacked_symbols(length):
        return SkipReason("unknown token count", site.name, f"only the values of an input tell its {length} tokens")
    return None


__all__ = ["SHORTEST_AXIS", "Block", "unfit"]
