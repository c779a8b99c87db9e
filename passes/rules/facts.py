"""Facts: all that the analyses know of one graph, and the questions that passes and rules ask about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tome_fx.config import ToMeConfig

from ..algebra.axes import Atom, Dim, Dims, leaves
from ..algebra.axes import expr as size_expr

if TYPE_CHECKING:
    from ..analysis.grid import Grid
    from ..analysis.pairs import Pairs
    from ..analysis.reach import Reach
    from ..analysis.special import Before, Special
    from ..find_attention import AttentionSite
    from .base import Call


FILLED = frozenset(
    getattr(torch.ops.aten, f"{new}{name}{like}").default
    for name in ("full", "ones", "zeros")
    for new, like in (("", ""), ("new_", ""), ("", "_like"))
) | {torch.ops.aten.zero.default}
"""Ops that fill in one number; of an operand they have only the shape, or dtype and device."""


@dataclass(eq=False)
class Facts:
    """What the analyses know of a graph.

    axes: dims of every tensor result of every node. calls: the bound call of every node that runs an op on tensors.
    constant: nodes that depend on no model input. scores: nodes on the way to a softmax. decided: values that a bool
    tensor went into. given: inputs of the model, and what was made of them without a product. origins: axes that are
    slices: (axis, of which, from, to). mixed: values with entries of several origins (`provenance.py`). joins: axes
    that were concatenated, and the axis it made. rejoins: parts of an axis that were concatenated to it again.
    channels: axes that come from a weight. entering: leaves of the features of tokens that are inputs. cuts: reads of
    a part of an axis, (value, axis, from, to), and writes to one, (None, ...). buffers: the model's buffers. attends:
    axes of queries and of keys whose scores stand open.
    special: what was found of the tokens of an axis that never merge. grids: how those of an axis stand. parted: masks
    of pairs within whose parts alone tokens merge. angles: sines and cosines of positions, and what is put together
    from them. unknown: ops without a rule. config: the options. before: of a piece of a model, what the pieces before
    it know of tokens, by how many they are.

    Known once all axes are: pairs (what masks say of pairs), reach (what is computed from what), sites (attention).
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    axes: dict[fx.Node, tuple[Dims, ...]] = field(default_factory=dict)
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)
    scores: set[fx.Node] = field(default_factory=set)
    decided: set[fx.Node] = field(default_factory=set)
    given: set[fx.Node] = field(default_factory=set)
    slices: dict[tuple, Any] = field(default_factory=dict)
    origins: list[tuple[Dim, Dim, Any, Any]] = field(default_factory=list)
    mixed: dict[fx.Node, Tensor] = field(default_factory=dict)
    joins: list[tuple[list[Dim], Dim]] = field(default_factory=list)
    rejoins: list[tuple[list[Dim], Dim]] = field(default_factory=list)
    channels: list[Dim] = field(default_factory=list)
    entering: set[Atom] = field(default_factory=set)
    cuts: list[tuple[fx.Node | None, Dim, Any, Any]] = field(default_factory=list)
    buffers: set[fx.Node] = field(default_factory=set)
    attends: set[tuple[Dim, Dim]] = field(default_factory=set)
    special: dict[Dim, Special] = field(default_factory=dict)
    grids: dict[Dim, Grid] = field(default_factory=dict)
    parted: set[fx.Node] = field(default_factory=set)
    angles: set[fx.Node] = field(default_factory=set)
    unknown: list[Call] = field(default_factory=list)
    config: ToMeConfig = field(default_factory=ToMeConfig)
    before: Mapping[int, Before] = field(default_factory=dict)
    pairs: Pairs | None = None
    sites: list[AttentionSite] = field(default_factory=list)

    reach: Reach = field(init=False)

    def use(self, config: ToMeConfig) -> None:
        """Take other options, and forget what followed from the old ones."""
        self.config = config
        self.special.clear()
        self.parted.clear()

    def dims(self, node: fx.Node, result: int = 0) -> Dims:
        return self.axes[node][result]

    def leaves_of(self, node: fx.Node) -> set[Atom]:
        """The leaves of all dims of a value."""
        return {leaf for dim in self.dims(node) for leaf in leaves(dim)}

    @cached_property
    def features(self) -> set[Atom]:
        """The leaves of all axes that come from a weight, once all are known."""
        return {leaf for dim in self.channels for leaf in leaves(dim)}

    @cached_property
    def along(self) -> dict[Dim, list[fx.Node]]:
        """The values that vary along each axis, in order, once all are known."""
        found: dict[Dim, list[fx.Node]] = {}
        for node in self.axes:
            if isinstance(node.meta.get("val"), Tensor):
                for axis in dict.fromkeys(leaves(dim) for d, dim in enumerate(self.dims(node)) if self.varies(node, d)):
                    found.setdefault(axis, []).append(node)
        return found

    @cached_property
    def parts(self) -> set[tuple[Dim, Any, Any]]:
        """Of axes that are packs: the slices that attend each to itself, (axis, from, to), once sites are known."""
        own = {site.k.axis(self) for site in self.sites if site.q.axis(self) == site.k.axis(self)}
        found = {part for axis in own for part in self.cut_from(axis)}
        held = Counter(axis for axis, *_ in found)
        return {part for part in found if held[part[0]] > 1}

    @cached_property
    def side(self) -> fx.Node | None:
        """What the caller says of each token beside the model's inputs."""
        found = self.graph.find_nodes(op="call_function", target=torch.ops.tome.with_side.default)
        return found[0].args[1] if found else None

    def leads(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether b is computed from a (or is a)."""
        return self.reach.leads(a, b)

    def cut_from(self, axis: Dim) -> list[tuple[Dim, Any, Any]]:
        """What an axis is a slice of, from where to where."""
        return [(leaves(source), start, stop) for new, source, start, stop in self.origins if leaves(new) == axis]

    def joined(self, axis: Dim) -> list[list[Dim]]:
        """The axes, in order, that were concatenated to this one, for each place where they were."""
        return [[leaves(part) for part in parts] for parts, whole in self.joins if leaves(whole) == leaves(axis)]

    def varies(self, node: fx.Node, d: int) -> bool:
        """Whether a value may differ along a dim. (In normal form what is the same along one has size 1 there; what is
        filled with one number differs along none.)"""
        return node.target not in FILLED and size_expr(node.meta["val"].shape[d]) != 1

    def told(self, node: fx.Node) -> bool:
        """Whether a value says of single tokens what the caller, a comparison or a constant mask said: no model
        computed or learned it."""
        if self.pairs is not None and (self.pairs.value(node) is not None or self.pairs.marks(node)):
            return self.pairs.marks(node)
        return node in self.given or node in self.decided or node.meta["val"].dtype is torch.bool

    def value(self, node: fx.Node) -> Tensor | None:
        """The value of a node, if it is known while compiling."""
        return self.pairs.value(node) if self.pairs is not None else None

    def per_pair(self, node: fx.Node, query: int, key: int) -> bool:
        """Whether a term of the scores is a mask of pairs (see `pairs.py`), so that no merge can keep what it says."""
        if self.pairs is None or node in self.parted or node.meta["val"].dim() < 2:
            return False
        dims = self.dims(node)
        return self.pairs.tell(node, leaves(dims[query]), leaves(dims[key]))


NO_FACTS = Facts()
"""For signatures that are read before anything is known of their graph."""

__all__ = ["NO_FACTS", "Facts"]
