"""Running a graph on real values, in float64: the merged one, of which groups are kept, and the unmerged one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from tome_fx import ops
from tome_fx.passes.rules.base import draws

aten = torch.ops.aten
tome = torch.ops.tome

_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex32: torch.complex128, torch.complex64: torch.complex128}  # fmt: skip
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default}  # fmt: skip
# Sizes in the dtype they come in: the operators' own kernels take float32.
_SIZES: dict[Any, Any] = {tome.merge_size.default: ops.merge_size_aten, tome.log_size.default: torch.log}


def _wide(value: Any) -> Any:
    """A tensor or dtype in float64."""
    if isinstance(value, Tensor):
        return value.detach().to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def is_random(node: fx.Node) -> bool:
    return (
        draws(node.target)
        and node.target not in (*_DROPOUT, aten.native_dropout.default, aten.scaled_dot_product_attention.default)
        and isinstance(node.meta.get("val"), Tensor)
    )


@dataclass(frozen=True)
class Mode:
    """How graphs are run. exact: in float64. rounds: False leaves floats that become whole numbers as they are."""

    exact: bool = True
    rounds: bool = True


ROUND = {aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, aten._to_copy.default}
"""Ops that may make whole numbers of floats."""


def makes_whole(node: fx.Node) -> bool:
    """Whether an op makes whole numbers of floats."""
    whole = node.target in ROUND and (node.target is not aten._to_copy.default
                                      or not node.meta["val"].is_floating_point())  # fmt: skip
    (source, *_) = node.all_input_nodes if whole else (None,)
    return source is not None and source.meta["val"].is_floating_point() and node.meta["val"].dtype is not torch.bool


class _Runner:
    """Runs a graph on real values, by default in float64; each value lives until it was read for the last time."""

    def __init__(self, graph: fx.Graph, mode: Mode, draws: dict[str, Tensor]) -> None:
        self.graph, self.mode, self.exact, self.draws = graph, mode, mode.exact, draws
        self.env: dict[fx.Node, Any] = {}
        self.kept: set[fx.Node] = set()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs, and after them what is written to inputs."""
        left, outputs, written = iter(inputs), [], []
        last = {source: node for node in self.graph.nodes for source in node.all_input_nodes}
        ends: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            ends.setdefault(node, []).append(source)
        for node in (given := self.graph.find_nodes(op="placeholder")):
            value = next(left)
            self.env[node] = _wide(value) if self.exact else value
        for node in given:  # a merge at one of them may read another
            self.env[node] = self.after(node, self.env[node])
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                read = self.operands(node)
                outputs = [read.get(n, self.env[n]) if isinstance(n, fx.Node) else n for n in tree_leaves(node.args[0])]
            elif node.target is aten.copy_.default:
                written.append(self.env[node.args[1]])
            else:
                self.visit(node)
            for source in ends.get(node, ()):
                if source not in self.kept:
                    self.env.pop(source, None)
        self.env.clear()
        return [*outputs, *written]

    def visit(self, node: fx.Node) -> Any:
        """The value of a node, computed with what it needs where that is not there yet."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self.visit(source)
            self.env[node] = self.after(node, self.value(node))
        return self.env[node]

    def value(self, node: fx.Node) -> Any:
        held = self.operands(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: held.get(n, self.env[n]))
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if self.exact:
            args, kwargs, target = map_aggregate(args, _wide), map_aggregate(kwargs, _wide), _SIZES.get(target, target)
        if target in _DROPOUT or (not self.mode.rounds and makes_whole(node)):
            return args[0]
        if target is aten._int_mm.default and not self.mode.rounds:
            target, args = torch.mm, [x.to(torch.float64) for x in args]
        if target is aten.native_dropout.default:
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        if target is aten.scaled_dot_product_attention.default:
            args, kwargs = _without_dropout(args, kwargs)
        out = target(*args, **kwargs)
        return map_aggregate(out, _wide) if self.exact else out

    def operands(self, node: fx.Node) -> dict[fx.Node, Any]:
        """Values that a node is to read in the place of others."""
        return {}

    def after(self, node: fx.Node, value: Any) -> Any:
        """What others read of a node that has this value."""
        return value


def dropped(graph: fx.Graph) -> list[str]:
    """A note where a graph drops values at random."""
    for node in graph.nodes:
        p = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        sdpa = node.target is aten.scaled_dot_product_attention.default and p
        if sdpa or (node.target in _DROPOUT and node.args[1] and node.args[2]):
            return ["the model drops values at random (dropout); here it drops none"]
    return []


def _without_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > 4:
        return (*args[:4], 0.0, *args[5:]), kwargs
    return args, {**kwargs, "dropout_p": 0.0}


class MergedRun(_Runner):
    """groups: assign and keep of each site that merged. pairs: the lowest similarity. values: what was marked."""

    def __init__(self, graph: fx.Graph, mode: Mode) -> None:
        super().__init__(graph, mode, {})
        self.groups: dict[int, dict[str, Tensor]] = {}
        self.pairs: dict[int, float] = {}
        self.values: dict[str, Tensor] = {}

    def after(self, node: fx.Node, value: Any) -> Any:
        for site, name in node.meta.get("tome_groups", ()):
            self.groups.setdefault(site, {})[name] = value
        for site in node.meta.get("tome_pairs", ()):
            self.pairs[site] = value[3].min().item() if value[3].numel() else 1.0
        for name in node.meta.get("tome_value", ()):
            self.values[name] = value
        return value


class PlainRun(_Runner):
    """The original graph, its random numbers as the merged one drew them. draws are of full length."""

    def value(self, node: fx.Node) -> Any:
        if not is_random(node):
            return super().value(node)
        if node.name not in self.draws:
            self.draws[node.name] = super().value(node)
        return self.draws[node.name]


__all__ = ["MergedRun", "Mode", "PlainRun", "dropped", "is_random", "makes_whole"]
