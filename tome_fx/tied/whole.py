"""The tied run: the captured graph at full length, each token replaced by the mean of its group at every merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tome_fx import ops
from tome_fx.passes import Result
from tome_fx.passes.algebra.axes import Dim, leaves
from tome_fx.passes.algebra.layout import Step
from tome_fx.passes.analysis.masks import KeyMask, token_dims
from tome_fx.passes.plan import Merge, Plan
from tome_fx.passes.rules import Call, find
from tome_fx.passes.rules.base import Fill
from tome_fx.passes.rules.facts import Facts
from tome_fx.passes.rules.pointwise import MaskRule
from tome_fx.tied.groups import Groups, axes_of, widened
from tome_fx.tied.marks import Join, steps_between
from tome_fx.tied.runs import Mode, PlainRun

aten = torch.ops.aten


class TiedRun(PlainRun):
    """The original graph at full length, tied at every merge, and at those joins that are approximated.

    moved, joined: how far a tie moved a value, by merge and by join. values: what merges left.
    """

    def __init__(
        self, result: Result, mode: Mode, draws: dict[str, Tensor], groups: Groups, joins: Sequence[Join],
        approximated: frozenset[Join] = frozenset(),
    ) -> None:  # fmt: skip
        assert result.captured is not None
        super().__init__(result.captured.gm.graph, mode, draws)
        self.facts, self.plan, self.groups = result.facts, result.plan, groups
        self.approximated = approximated
        self.at: dict[fx.Node, list[Join]] = {}
        for join in joins:
            self.at.setdefault(join.node, []).append(join)
        self.moved: dict[Step, float] = {}
        self.joined: dict[Join, float] = {}
        self.values: dict[str, Tensor] = {}
        masks = [mask.node for merge in self.plan.every for mask in merge.block.masks]
        self.kept = _above(masks)

    def after(self, node: fx.Node, value: Any) -> Any:
        merges = self.plan.merges.get(node, [])
        for merge in merges:
            step = merge.step
            if not merge.block.operands and self.groups.ran(step):
                self._see(merge)
                tied = self.groups.tied(value, self.facts.dims(node), merge.dim, merge.key, [step], Fill.MEAN)
                self.moved[step] = relative(tied, value)
                value = tied
        if merges:
            self.values[node.name] = value
        return value

    def value(self, node: fx.Node) -> Any:
        call = self.facts.calls.get(node)
        held = self._read(node)
        if call is None or not held:
            return super().value(node)
        if isinstance(find(call), MaskRule) and (masked := _masked(call, held, self.env)) is not None:
            return masked
        values = dict(call.args)
        for (name, at), source in call.operands:
            if (name, at, source) in held:
                values[name] = _put(values[name], at, held[name, at, source])
        values = {name: fx.map_arg(value, lambda n: self.env[n]) for name, value in values.items()}
        given = call.target._schema.arguments
        positional = tuple(values[a.name] for a in given if not a.kwarg_only)
        return self.call(node, positional, {a.name: values[a.name] for a in given if a.kwarg_only})

    def operands(self, node: fx.Node) -> dict[fx.Node, Any]:
        """Outputs that are sums over groups, shared out evenly where that is approximated."""
        if node.op != "output":
            return {}
        return {j.source: self._tie(j, self.env[j.source]) for j in self.at.get(node, ()) if j in self.approximated}

    def _read(self, node: fx.Node) -> dict[tuple[str, int | None, fx.Node], Tensor]:
        """The operands of a node that it reads tied, by argument."""
        call, found = self.facts.calls.get(node), {}
        merge = next(iter(self.plan.merges.get(node, [])), None)
        for join in self.at.get(node, ()) if call is not None else ():
            assert call is not None
            merges = is_merge(join, self.plan, self.facts)
            if merge is not None and merges:
                self._see(merge)
            steps = {s for *_, chain, _ in steps_between(join.have, join.want) for s in chain}
            if not (merges or join in self.approximated) or not all(map(self.groups.ran, steps)):
                continue
            for i, ((name, at), source) in enumerate(call.operands):
                if source is join.source and self.plan.decisions[node].ins[i] == join.want:
                    found[name, at, source] = self._tie(join, self.env[source], call, name)
            if merge is not None and merges:
                self.moved[merge.step] = max(self.moved.get(merge.step, 0.0), self.joined.pop(join, 0.0))
        return found

    def _tie(self, join: Join, x: Any, call: Call | None = None, name: str = "") -> Tensor:
        dims, have, want = self.facts.dims(join.source), join.have, join.want
        if x.dtype is torch.bool:
            x = _as_number(x, join.fill, call).to(torch.float64 if self.exact else torch.float32)
        factor = _factor(call, name) if join.fill is Fill.BIAS else 1
        before = x = x * factor
        if join.frame is not None:
            x, dims, have, want = widened(x, dims, have, want, join.frame)
        for d, key, steps, shared_out in steps_between(have, want):
            x = self.groups.tied(x, dims, d, key, steps, Fill.COUNT if shared_out else join.fill)
        if join.fill is Fill.BIAS:
            self.joined[join] = relative(x.exp(), before.expand_as(x).exp())
        else:
            self.joined[join] = relative(x, before.expand_as(x))
        return x / factor

    def _see(self, merge: Merge) -> None:
        """Find what tokens weigh under the masks of keys of a merge."""
        block, step = merge.block, merge.step
        if block.masks and step not in self.groups.masked:
            held = [
                _weights(self.visit(mask.node), mask, block.tokens, step.sample, self.facts) for mask in block.masks
            ]
            like = self.groups.index(step)
            weight = held[0]
            for other in held[1:]:
                weight = torch.minimum(weight, other)
            self.groups.masked[step] = weight.expand(like.shape)


def is_merge(join: Join, plan: Plan, facts: Facts) -> bool:
    """Whether an operand is what its op's merge merges."""
    inside = [i for merge in plan.merges.get(join.node, []) for i, _ in merge.block.operands]
    return any(facts.calls[join.node].nodes[i] is join.source for i in inside)


def _above(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What these nodes are computed from, themselves included."""
    found, left = set(nodes), list(nodes)
    while left:
        new = [source for source in left.pop().all_input_nodes if source not in found]
        found.update(new)
        left += new
    return found


def _weights(x: Tensor, mask: KeyMask, tokens: Dim, sample: Dim, facts: Facts) -> Tensor:
    """[*sample, N] (length 1 along a sample axis that the mask lacks): 1 for a token that it leaves in, else 2^-40."""
    x = x * mask.scale if x.dtype is not torch.bool else x if mask.scale > 0 else ~x
    dims = facts.dims(mask.node)
    (at,) = token_dims(mask.node, facts, tokens)
    axes = axes_of(dims, x.shape)
    own = [i for i, (e, leaf, _) in enumerate(axes) if e == at and leaf in leaves(tokens)]
    spots = [next((i for i, axis in enumerate(axes) if axis[1] is leaf), None) for leaf in leaves(sample)]
    order = [*(i for i in spots if i is not None), *own]
    rest = [i for i in range(len(axes)) if i not in order]
    x = x.reshape([size for *_, size in axes]).permute([*rest, *order])
    x = x[(0,) * len(rest)]
    x = x.reshape(*x.shape[: x.dim() - len(own)], -1)
    for i, spot in enumerate(spots):
        x = x.unsqueeze(i) if spot is None else x
    seen = x if x.dtype is torch.bool else x - x.amax(-1, keepdim=True)
    return ops.key_weight(seen).to(torch.float64)


def _put(value: Any, at: int | None, tensor: Tensor) -> Any:
    return tensor if at is None else [tensor if i == at else item for i, item in enumerate(value)]


def _as_number(mask: Tensor, fill: Fill, call: Call | None) -> Tensor:
    """A bool mask as what it adds to the scores, or, as a factor, what it leaves."""
    if call is not None and (parts := _parts(call)) is not None:
        value, drops = parts
        drop = mask if drops else ~mask
        return torch.where(drop, value, 0.0) if fill is Fill.BIAS else torch.where(drop, 0.0, 1.0)
    return torch.where(mask, 0.0, float("-inf")) if fill is Fill.BIAS else mask


def _parts(call: Call) -> tuple[float, bool] | None:
    parts = MaskRule.parts(call) if isinstance(find(call), MaskRule) else None
    return None if parts is None else (parts[2], parts[3])


def _masked(call: Call, held: Mapping[Any, Tensor], env: Mapping[fx.Node, Any]) -> Tensor | None:
    """masked_fill and where with a tied bool mask: it adds its value, or leaves its share."""
    parts = MaskRule.parts(call)
    if parts is None:
        return None
    x_at, mask_at, value, _ = parts
    (x_name, mask_name) = (call.operands[i][0][0] for i in (x_at, mask_at))
    tied = held.get((mask_name, None, call.nodes[mask_at]))
    if tied is None:
        return None
    x = held.get((x_name, None, call.nodes[x_at]), env[call.nodes[x_at]])
    return x * tied if value == 0 else x + tied


def _factor(call: Call | None, name: str) -> float:
    """How often an operand is in the result of a sum or difference; 1 for all other ops."""
    packet = getattr(call.target, "overloadpacket", None) if call is not None else None
    if call is None or packet not in (aten.add, aten.sub, aten.subtract, aten.rsub):
        return 1
    alpha = call.args.get("alpha", 1)
    if name != ("self" if packet is aten.rsub else "other") or not isinstance(alpha, (int, float)) or not alpha:
        return 1
    return alpha if packet is aten.add else -alpha


def relative(got: Any, want: Any) -> float:
    """Largest |got - want| relative to the largest |want|; inf where they differ in what is not finite."""
    if not isinstance(want, Tensor):
        return 0.0 if got == want else float("inf")
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.to(wide), want.to(wide)
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    difference = torch.where(finite, a - b, 0).abs().amax().item()
    largest = torch.where(finite, b, 0).abs().amax().item()
    return difference / largest if largest else float(difference > 0)


__all__ = ["TiedRun", "is_merge", "relative"]
