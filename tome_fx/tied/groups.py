"""The groups of merges at full length: which token is in which, and what tying makes of a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tome_fx import ops
from tome_fx.config import ToMeConfig
from tome_fx.passes import Result
from tome_fx.passes.algebra.axes import Dims, leaves
from tome_fx.passes.algebra.layout import Layout, Run, Step
from tome_fx.passes.rules.base import Fill
from tome_fx.tied.runs import MergedRun


class Groups:
    """The groups of merges, of original tokens, and what tying does with them."""

    def __init__(self, result: Result, config: ToMeConfig, merged: MergedRun) -> None:
        self.facts, self.config, self.found = result.facts, config, merged.groups
        self.merges = {merge.step: merge for merge in result.plan.every}
        self._index: dict[Step, Tensor] = {}
        self._lead: dict[Step, Tensor] = {}
        self.masked: dict[Step, Tensor] = {}

    def ran(self, step: Step) -> bool:
        """Whether a merge is in the graph: not where nobody reads what it would make."""
        return all({"assign", "keep"} <= set(self.found.get(s.site, ())) for s in step.chain())

    def index(self, step: Step) -> Tensor:
        """int64 [*sample, N]: the group of each original token."""
        if step not in self._index:
            own = self._own(step)
            self._index[step] = own if step.prev is None else own.gather(-1, self.index(step.prev))
        return self._index[step]

    def _own(self, step: Step) -> Tensor:
        """`assign` of one merge alone, with more or fewer protected tokens at the ends."""
        lo, hi = step.offset
        held = self.found[step.site]["assign"]
        places = self.found[step.site]["keep"].shape[-1]
        held = held[..., max(-lo, 0) : held.shape[-1] - max(-hi, 0)] + lo
        front = torch.arange(max(lo, 0), device=held.device).expand(*held.shape[:-1], -1)
        behind = (torch.arange(max(hi, 0), device=held.device) + places + lo).expand(*held.shape[:-1], -1)
        return torch.cat([front, held, behind], -1)

    def lead(self, step: Step) -> Tensor:
        """int64 [*sample, N']: of each group the original token that stands for it."""
        if step not in self._lead:
            own, (lo, hi) = self.found[step.site]["keep"], step.offset
            before = self.found[step.site]["assign"].shape[-1]
            own = own[..., max(-lo, 0) : own.shape[-1] - max(-hi, 0)] + lo
            front = torch.arange(max(lo, 0), device=own.device).expand(*own.shape[:-1], -1)
            behind = (torch.arange(max(hi, 0), device=own.device) + before + lo).expand(*own.shape[:-1], -1)
            own = torch.cat([front, own, behind], -1)
            self._lead[step] = own if step.prev is None else self.lead(step.prev).gather(-1, own)
        return self._lead[step]

    def count(self, step: Step) -> int:
        return int(self.index(step).max()) + 1

    def weights(self, step: Step) -> Tensor | None:
        """[*sample, N]: what each original token weighs in a mean under the masks of keys of a merge; None: all 1."""
        base = step.base or step
        held, (lo, hi) = self.masked.get(base), map(int, step.offset)
        if held is None:
            return None
        held = held[..., max(-lo, 0) : held.shape[-1] - max(-hi, 0)]
        return torch.nn.functional.pad(held, (max(lo, 0), max(hi, 0)), value=1.0)

    def tied(self, x: Tensor, dims: Dims, d: int, key: tuple[int, int], steps: Sequence[Step], fill: Fill) -> Tensor:
        """x with each token replaced by what its group makes of it."""
        kinds = [self.merges[s.base or s].how.merging for s in steps]
        one_by_one = fill is Fill.MEAN and ("plain" in kinds or len(set(kinds)) > 1)
        for merging, stretch in zip(kinds, [[s] for s in steps] if one_by_one else [steps], strict=False):
            step = stretch[-1]
            flat, back = _flat(x, dims, d, key, step)
            index = self.index(step)
            if fill is Fill.ROW or (fill is Fill.MEAN and merging == "keep"):
                out = rows_at(rows_at(flat, self.lead(step)), index)
            elif fill is Fill.BIAS:
                out = rows_at(_log_mean_exp(flat, index, self.count(step)), index)
            else:
                weight = None if fill is Fill.COUNT else self.weights(stretch[0])
                if fill is Fill.MEAN and merging == "plain":
                    weight = self._row_weights(step)
                out = rows_at(_mean(flat, index, weight, self.count(step)), index)
            x = back(out)
        return x

    def _row_weights(self, step: Step) -> Tensor:
        """What each original token weighs in a mean of the rows that meet, one for each group before the merge."""
        seen = self.weights(step)
        index = self.index(step)
        if step.prev is None:
            return torch.ones(index.shape, device=index.device) if seen is None else seen
        index = self.index(step.prev)
        ones = torch.ones(index.shape, dtype=torch.float64, device=index.device)
        sizes = torch.zeros_like(ones).scatter_add(-1, index, ones)
        if seen is not None:
            whole = torch.zeros_like(ones).scatter_add(-1, index, seen.to(ones))
            ones = ops.key_weight(whole > 0.5).to(ones).gather(-1, index)
        return ones / sizes.gather(-1, index)


def axes_of(dims: Dims, shape: Sequence[int]) -> list[tuple[int, Any, int]]:
    """(dim, leaf, size) of each leaf of a value, a dim of size 1 as one without a leaf."""
    found: list[tuple[int, Any, int]] = []
    for d, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        own = leaves(dim)
        known = [leaf.size if isinstance(leaf.size, int) else 0 for leaf in own]
        rest = size // prod(n for n in known if n) if own else 1
        found += [(d, leaf, n or rest) for leaf, n in zip(own, known, strict=True)] or [(d, None, size)]
    return found


def _flat(x: Tensor, dims: Dims, d: int, key: tuple[int, int], step: Step) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as [*sample, N, rest], and the way back."""
    axes = axes_of(dims, x.shape)
    start, count = key
    mine = [i for i, (e, leaf, _) in enumerate(axes) if e == d and leaf is not None]
    token = mine[start : start + count]
    spots = [next(i for i, axis in enumerate(axes) if axis[1] is leaf) for leaf in leaves(step.sample)]
    rest = [i for i in range(len(axes)) if i not in token and i not in spots]
    order = [*spots, *token, *rest]
    sizes = [size for *_, size in axes]
    moved = x.reshape(sizes).permute(order)
    held = moved.shape
    lead = [sizes[i] for i in spots]
    flat = moved.reshape(*lead, prod(sizes[i] for i in token), prod(sizes[i] for i in rest))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat, lambda y: y.reshape(held).permute(inverse).reshape(x.shape)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _mean(x: Tensor, index: Tensor, weight: Tensor | None, count: int) -> Tensor:
    weight = torch.ones(index.shape, dtype=x.dtype, device=x.device) if weight is None else weight.to(x)
    at = index.unsqueeze(-1).expand_as(x)
    total = x.new_zeros(*x.shape[:-2], count, x.shape[-1]).scatter_add(-2, at, x * weight.unsqueeze(-1))
    return total / weight.new_zeros(*index.shape[:-1], count).scatter_add(-1, index, weight).unsqueeze(-1)


def _log_mean_exp(x: Tensor, index: Tensor, count: int) -> Tensor:
    """A group that is masked out whole stays so, -inf: a query without any key gets zero, not a mean of all values."""
    at = index.unsqueeze(-1).expand_as(x)
    top = x.new_full((*x.shape[:-2], count, x.shape[-1]), -torch.inf).scatter_reduce(-2, at, x, "amax")
    held = top.clamp_min(torch.finfo(x.dtype).min)  # -inf less -inf is no number
    return _mean((x - held.gather(-2, at)).exp(), index, None, count).log() + held


def widened(x: Tensor, dims: Dims, have: Layout, want: Layout, frame: Dims) -> tuple[Tensor, Dims, Layout, Layout]:
    """x of the rank of the frame, and of full size along sample axes that it lacks."""
    more = len(frame) - len(dims)
    dims, x = (*((),) * more, *dims), x.reshape((1,) * more + x.shape)
    have, want = (*((),) * more, *have), (*((),) * more, *want)
    sample = {leaf for runs in want for run in runs for leaf in leaves(run.step.sample)}
    sample -= {leaf for dim in dims for leaf in leaves(dim)}
    grow = [d for d in range(len(dims)) if not leaves(dims[d]) and sample & set(leaves(frame[d]))]
    sizes = [prod(int(leaf.size) for leaf in leaves(frame[d])) if d in grow else n for d, n in enumerate(x.shape)]
    return x.expand(sizes), tuple(frame[d] if d in grow else dims[d] for d in range(len(dims))), have, want


def given_back(x: Tensor, dims: Dims, shape: Sequence[int], layout: Layout, d: int, run: Run, groups: Groups) -> Tensor:
    """x, merged as `layout` says, with a row for every token along one run."""
    axes = axes_of(dims, [int(n) for n in shape])
    merged: list[tuple[int, Any, int]] = []
    for e in range(len(dims)):
        own = [axis for axis in axes if axis[0] == e]
        held = {r.start: r for r in layout[e]}
        at = 0
        while at < len(own):
            if at in held:
                merged.append((e, held[at], groups.count(held[at].step)))
                at += held[at].count
            else:
                merged.append(own[at])
                at += 1
    x = x.reshape([n for *_, n in merged])
    token = next(i for i, axis in enumerate(merged) if axis[1] is run)
    spots = [next(i for i, axis in enumerate(merged) if axis[1] is leaf) for leaf in leaves(run.step.sample)]
    rest = [i for i in range(len(merged)) if i != token and i not in spots]
    order = [*spots, token, *rest]
    y = x.permute(order)
    tail = y.shape[len(spots) + 1 :]
    y = rows_at(y.reshape(*y.shape[: len(spots) + 1], prod(tail)), groups.index(run.step))
    y = y.reshape(*y.shape[:-1], *tail)
    return y.permute(sorted(range(len(order)), key=order.__getitem__)).reshape([int(n) for n in shape])


__all__ = ["Groups", "axes_of", "given_back", "widened"]
