"""Joining and taking apart: cat, stack, slice, select, split, unbind, index, gather, pad.

Along any other dim these map. Along a merged axis, cutting at a protected boundary keeps the merge: the class token
may be sliced off, rotated around and put back, and the pieces share one merge state (`Step.shift`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..axes import Dims, fresh, leaves, same, unify
from ..axes import expr as size_expr
from ..layout import DimLayout, Layout, Run, plain
from .base import Call, Decision, Emitter, Facts, Fill, Letter, Role, Rule, Signature, SignatureRule, register

aten = torch.ops.aten
WHOLE_SAMPLE = "takes apart the samples it was merged within"


def _drop(layout: Layout, d: int) -> Layout:
    return (*layout[:d], *layout[d + 1 :])


def _replaced(layout: Layout, d: int, runs: DimLayout) -> Layout:
    return (*layout[:d], runs, *layout[d + 1 :])


def without_samples_in(dims: Dims, layout: Layout, touched: int) -> Layout:
    """The layout less the runs whose samples live in the dim that an op takes apart."""
    held = set(leaves(dims[touched]))
    return tuple(tuple(run for run in runs if not held & set(leaves(run.step.sample))) for runs in layout)


def covering(dims: Dims, layout: Layout, d: int) -> Run | None:
    """The run that is all of dim d, if there is one."""
    runs = layout[d]
    whole = len(runs) == 1 and runs[0].key == (0, len(leaves(dims[d])))
    return runs[0] if whole else None


class CatRule(Rule):
    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d = self.dim(call)
        pieces = self.pieces(call)
        dims: list[Any] = []
        for k in range(call.out.dim()):
            if k == d:
                dims.append(self._joined(call, facts, d, pieces))
                continue
            known = [facts.dims(call.nodes[i])[k] for i in pieces]
            for other in known[1:]:
                unify(known[0], other)
            dims.append(known[0] if known else fresh(size_expr(call.out.shape[k])))
        return (tuple(dims),)

    @staticmethod
    def dim(call: Call) -> int:
        return call.axis(call.args.get("dim", call.args.get("axis", 0)), call.out.dim())

    def pieces(self, call: Call) -> list[int]:
        """The operands that hold anything: `x[:, :0]` is left out, and so is the legacy empty 1-d tensor."""
        d, rank = self.dim(call), call.out.dim()
        return [i for i, v in enumerate(call.vals) if v.dim() == rank and size_expr(v.shape[d]) != 0]

    def _joined(self, call: Call, facts: Facts, d: int, pieces: list[int]) -> Any:
        if len(pieces) == 1:
            return facts.dims(call.nodes[pieces[0]])[d]
        dims = [facts.dims(call.nodes[i])[d] for i in pieces]
        origins = [facts.slices.get(("origin", leaves(dim))) for dim in dims]
        total = size_expr(call.out.shape[d])
        whole = next((o for o in origins if o is not None), None)
        if whole is not None and self._restores(call, facts, d, pieces, whole):
            return whole[0]
        # The same axes in the same order make the same axis: joined queries and joined keys are the same tokens.
        found = [leaves(dim) for dim in dims]
        known = next((axis for parts, axis in facts.joins if [leaves(part) for part in parts] == found), None)
        joined = fresh(total) if known is None else known
        if known is None:
            facts.joins.append((dims, joined))
        return joined

    def _restores(self, call: Call, facts: Facts, d: int, pieces: list[int], whole: Any) -> bool:
        """Whether the pieces, in order, have the extents of one axis of which one is a slice."""
        source, lo, _ = whole
        total = size_expr(call.out.shape[d])
        at: Any = 0
        from math import prod

        if not same(total, prod((a.size for a in leaves(source)), start=1)):
            return False
        for i in pieces:
            dim = leaves(facts.dims(call.nodes[i])[d])
            if facts.slices.get(("origin", dim)) == whole:
                return same(at, lo)
            at = at + size_expr(call.vals[i].shape[d])
        return False

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, pieces = self.dim(call), self.pieces(call)
        if not any(any(layout) for layout in ins):
            return Decision(tuple(ins), (plain(call.out.dim()),))
        sig = self._signature(call, d, facts)
        inner = SignatureRule(lambda *_: sig)
        bare = [_replaced(layout, d, ()) if len(layout) > d else layout for layout in ins]
        base = inner.plan(call, bare, facts)
        run, at, why = self._along(call, ins, facts, d, pieces)
        if run is None:
            return Decision(base.ins, base.outs, (*base.reasons, *((i, why) for i in pieces if ins[i][d] and why)))
        step = run.step
        outs = _replaced(base.outs[0], d, (Run(0, len(leaves(facts.dims(call.node)[d])), step),))
        piece = ins[at][d][0].intensive()
        return Decision(
            tuple(_replaced(layout, d, (piece,)) if i == at else layout for i, layout in enumerate(base.ins)),
            (outs,),
            base.reasons,
        )

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        fills = self._fills(call, env.facts)
        operands = [
            env.fetch(n, layout, fills.get(i, Fill.MEAN))
            for i, (n, layout) in enumerate(zip(call.nodes, decision.ins, strict=True))
        ]
        return env.run(call, operands)

    @staticmethod
    def _fills(call: Call, facts: Facts) -> dict[int, Fill]:
        """Columns of scores merge as what is added to scores does."""
        floats = [i for i, v in enumerate(call.vals) if v.dtype.is_floating_point]
        return dict.fromkeys(floats, Fill.BIAS) if call.node in facts.scores else {}

    def _signature(self, call: Call, d: int, facts: Facts) -> Signature:
        rank = call.out.dim()
        letters: tuple[Letter, ...] = tuple(("cat" if k == d else k) for k in range(rank))
        own = [
            tuple(("piece", i) if name == "cat" else name for name in letters[: v.dim()])
            for i, v in enumerate(call.vals)
        ]
        linear = frozenset(range(len(call.vals)))
        return Signature(tuple(own), (letters,), linear=linear, additive=True, fills=self._fills(call, facts))

    def _along(
        self, call: Call, ins: Sequence[Layout], facts: Facts, d: int, pieces: list[int]
    ) -> tuple[Run | None, int, str]:
        """The run of the joined axis, the piece it comes from, or why there is none."""
        merged = [i for i in pieces if ins[i][d]]
        if not merged:
            return None, -1, ""
        if len(merged) > 1:
            return None, -1, "joins two merged axes"
        at = merged[0]
        run = covering(facts.dims(call.nodes[at]), ins[at], d)
        lo = [call.vals[i].shape[d] for i in pieces if i < at]
        hi = [call.vals[i].shape[d] for i in pieces if i > at]
        if run is None or not all(isinstance(s, int) for s in (*lo, *hi)):
            return None, -1, "joins a part of the token axis"
        samples = {leaf for dim in facts.dims(call.node) for leaf in leaves(dim)}
        if not set(leaves(run.step.sample)) <= samples:
            return None, -1, "loses the samples it was merged within"
        return Run(0, run.count, run.step.shift(sum(lo), sum(hi)), False), at, ""


class StackRule(Rule):
    """stack: a new dim; every other dim maps."""

    def _dim(self, call: Call) -> int:
        return call.axis(call.args["dim"], call.out.dim())

    def _signature(self, call: Call) -> Signature:
        letters: tuple[Letter, ...] = tuple(range(call.out.dim()))
        own = tuple(k for k in letters if k != self._dim(call))
        count = len(call.vals)
        return Signature((own,) * count, (letters,), linear=frozenset(range(count)), additive=True)

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        return SignatureRule(lambda *_: self._signature(call)).axes(call, facts)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        return SignatureRule(lambda *_: self._signature(call)).plan(call, ins, facts)


def slice_dim(facts: Facts, dim: Any, size: Any, start: Any, stop: Any, step: int) -> Any:
    """The axis `dim[start:stop:step]`: the same object for the same slice of the same axis."""
    if same(start, 0) and same(stop, size) and step == 1:
        return dim
    key = (leaves(dim), str(start), str(stop), step)
    if key not in facts.slices:
        length = stop - start if step == 1 else -(-(stop - start) // step)
        new = fresh(length)
        facts.slices[key] = new
        if step == 1 and new:
            facts.slices["origin", leaves(new)] = (dim, start, stop)
            facts.origins.append((new, dim, start, stop))
    return facts.slices[key]


def cut(facts: Facts, dims: Dims, layout: Layout, d: int, start: Any, stop: Any, size: Any) -> DimLayout | None:
    """The layout of dim d after `[start:stop]`, None where the cut falls inside the merged part."""
    if same(start, 0) and same(stop, size):
        return layout[d]
    run = covering(dims, layout, d)
    if run is None or not isinstance(start, int):
        return None
    back = size - stop
    if not isinstance(back, int):
        return None
    step = run.step
    if start <= step.fixed_prefix() and back <= step.fixed_suffix():
        return (Run(0, 1, step.shift(-start, -back), run.extensive),)
    if isinstance(stop, int) and stop <= step.fixed_prefix():
        return ()
    if isinstance(size, int) and start >= size - step.fixed_suffix():
        return ()
    return None


def bounds(start: Any, stop: Any, size: Any) -> tuple[Any, Any]:
    """Slice bounds as offsets from the front, as Python counts them."""

    def clip(value: Any, default: Any) -> Any:
        if value is None:
            return default
        value = value.meta["val"] if hasattr(value, "meta") else value
        value = size_expr(value)
        if isinstance(value, int) and value < 0:
            value = value + size
        if isinstance(value, int) and isinstance(size, int):
            return min(max(value, 0), size)
        return size if isinstance(value, int) and value >= 2**62 else value

    lo = clip(start, 0)
    hi = clip(stop, size)
    return (lo, lo) if isinstance(lo, int) and isinstance(hi, int) and hi < lo else (lo, hi)


class SliceRule(Rule):
    def _spec(self, call: Call) -> tuple[int, Any, Any, int, Any]:
        """(dim, start, stop, step, size)."""
        a = call.args
        d = call.axis(a.get("dim", 0))
        size = size_expr(call.vals[0].shape[d])
        if "length" in a:  # narrow
            start, _ = bounds(a["start"], None, size)
            return d, start, start + size_expr(call.out.shape[d]), 1, size
        start, stop = bounds(a.get("start"), a.get("end"), size)
        return d, start, stop, a.get("step") or 1, size

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d, start, stop, step, size = self._spec(call)
        dims = facts.dims(call.nodes[0])
        _note_cut(facts, call.nodes[0], dims[d], start, stop, size)
        return ((*dims[:d], slice_dim(facts, dims[d], size, start, stop, step), *dims[d + 1 :]),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, start, stop, step, size = self._spec(call)
        dims, layout = facts.dims(call.nodes[0]), ins[0]
        if same(start, 0) and same(stop, size) and step == 1:
            return Decision((layout,), (layout,))
        first = without_samples_in(dims, layout, d)
        why = ((0, WHOLE_SAMPLE),) if first != layout else ()
        if first[d]:
            runs = cut(facts, dims, first, d, start, stop, size) if step == 1 else None
            if runs is None:
                return Decision(
                    (_replaced(first, d, ()),),
                    (_replaced(first, d, ()),),
                    (*why, (0, "reads a part of the token axis")),
                )
            runs = tuple(Run(0, len(leaves(facts.dims(call.node)[d])), r.step, r.extensive) for r in runs)
            return Decision((first,), (_replaced(first, d, runs),), why)
        return Decision((first,), (first,), why)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        d, start, stop, _, size = self._spec(call)
        if not decision.ins[0][d] or (same(start, 0) and same(stop, size)):
            return env.run(call, [x]) if not decision.ins[0][d] else x
        if decision.outs[0][d]:
            return x.narrow(d, start, x.shape[d] - start - (size - stop))
        if isinstance(stop, int) and stop <= decision.ins[0][d][0].step.fixed_prefix():
            return x.narrow(d, start, stop - start)
        return x.narrow(d, x.shape[d] - (size - start), stop - start)


def _note_cut(facts: Facts, node: fx.Node | None, dim: Any, start: Any, stop: Any, size: Any) -> None:
    """Remember that a part of an axis of a value is read on its own, or (None) written."""
    if dim and not (same(start, 0) and same(stop, size)):
        facts.cuts.append((node, dim, start, stop))


class SelectRule(Rule):
    def _spec(self, call: Call) -> tuple[int, Any, Any]:
        d = call.axis(call.args["dim"])
        size = size_expr(call.vals[0].shape[d])
        index = call.args["index"]
        index = size_expr(index.meta["val"]) if hasattr(index, "meta") else index
        return d, index + size if isinstance(index, int) and index < 0 else index, size

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d, index, size = self._spec(call)
        dims = facts.dims(call.nodes[0])
        _note_cut(facts, call.nodes[0], dims[d], index, index + 1, size)
        return ((*dims[:d], *dims[d + 1 :]),)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, index, size = self._spec(call)
        dims = facts.dims(call.nodes[0])
        first = without_samples_in(dims, ins[0], d)
        why = ((0, WHOLE_SAMPLE),) if first != ins[0] else ()
        if first[d]:
            run = covering(dims, first, d)
            fixed = run is not None and not run.extensive and self._fixed(run, index, size)
            if not fixed:
                first, why = _replaced(first, d, ()), (*why, (0, "reads a token that is not protected"))
        return Decision((first,), (_drop(first, d),), why)

    @staticmethod
    def _fixed(run: Run, index: Any, size: Any) -> bool:
        if not isinstance(index, int):
            return False
        back = size - index
        return index < run.step.fixed_prefix() or (isinstance(back, int) and back <= run.step.fixed_suffix())

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        d, index, size = self._spec(call)
        if not decision.ins[0][d]:
            return env.run(call, [x])
        return x.select(d, index if index < decision.ins[0][d][0].step.fixed_prefix() else index - size)


class SplitRule(Rule):
    """split, chunk, unbind, tensor_split: along a merged axis it needs it whole; otherwise a slice for each piece."""

    def __init__(self, *, keeps_dim: bool) -> None:
        self.keeps_dim = keeps_dim

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        d, dims = call.axis(call.args.get("dim", 0)), facts.dims(call.nodes[0])
        if not self.keeps_dim:
            return tuple((*dims[:d], *dims[d + 1 :]) for _ in call.results)
        size, at, out = size_expr(call.vals[0].shape[d]), 0, []
        for piece in call.results:
            stop = at + size_expr(piece.shape[d])
            _note_cut(facts, call.nodes[0], dims[d], at, stop, size)
            out.append((*dims[:d], slice_dim(facts, dims[d], size, at, stop, 1), *dims[d + 1 :]))
            at = stop
        return tuple(out)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d, dims = call.axis(call.args.get("dim", 0)), facts.dims(call.nodes[0])
        first = without_samples_in(dims, ins[0], d)
        why = ((0, WHOLE_SAMPLE),) if first != ins[0] else ()
        if not first[d]:
            out = first if self.keeps_dim else _drop(first, d)
            return Decision((first,), (out,) * len(call.results), why)
        pieces = self._cuts(call, facts, first, d) if self.keeps_dim else None
        if pieces is None:
            first = _replaced(first, d, ())
            out = first if self.keeps_dim else _drop(first, d)
            return Decision((first,), (out,) * len(call.results), (*why, (0, "splits the token axis")))
        return Decision((first,), pieces, why)

    def _cuts(self, call: Call, facts: Facts, layout: Layout, d: int) -> tuple[Layout, ...] | None:
        dims, size, at, out = facts.dims(call.nodes[0]), size_expr(call.vals[0].shape[d]), 0, []
        for k, piece in enumerate(call.results):
            stop = at + size_expr(piece.shape[d])
            runs = cut(facts, dims, layout, d, at, stop, size)
            if runs is None:
                return None
            count = len(leaves(facts.axes[call.node][k][d]))
            out.append(_replaced(layout, d, tuple(Run(0, count, r.step, r.extensive) for r in runs)))
            at = stop
        return tuple(out)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        x = env.fetch(call.nodes[0], decision.ins[0])
        d = call.axis(call.args.get("dim", 0))
        if not decision.ins[0][d]:
            return env.run(call, [x])
        fixed = [None if out[d] else val.shape[d] for val, out in zip(call.results, decision.outs, strict=True)]
        rest = x.shape[d] - sum(s for s in fixed if s is not None)
        return x.split_with_sizes([rest if s is None else s for s in fixed], d)


def _gather(call: Call, facts: Facts) -> Signature:
    """gather, scatter: the dim mixes, the others are indexed alike where they have equal size."""
    d = call.axis(call.args["dim"] if call.args["dim"] is not None else 0)
    shape = call.vals[0].shape

    def alike(k: int, size: Any) -> bool:
        return k != d and same(size_expr(size), size_expr(shape[k]))

    ins: list[tuple[Letter | None, ...]] = [
        tuple(k if alike(k, size) else ("at", i, k) for k, size in enumerate(v.shape)) for i, v in enumerate(call.vals)
    ]
    roles: dict[Letter, Role] = {letter: Role.MIX for own in ins for letter in own if isinstance(letter, tuple)}
    roles[d] = Role.MIX
    out = tuple(k if alike(k, size) else None for k, size in enumerate(call.out.shape))
    return Signature(tuple(ins), (out,), roles)


def _index_write(call: Call, facts: Facts) -> Signature:
    """index_add, index_copy: the indexed dim mixes, the others are indexed alike."""
    d, rank = call.axis(call.args["dim"]), call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    source = tuple(None if k == d else k for k in letters)
    rest = tuple(source if v.dim() == rank else (None,) * v.dim() for v in call.vals[1:])
    return Signature((letters, *rest), (letters,), {d: Role.MIX})


def _index_select(call: Call, facts: Facts) -> Signature:
    d, rank = call.axis(call.args["dim"]), call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    return Signature(
        (letters, *((None,) * v.dim() for v in call.vals[1:])),
        (tuple(None if k == d else k for k in letters),),
        {d: Role.MIX},
    )


def _index(call: Call, facts: Facts) -> Signature:
    """x[..., idx, ...] with one index tensor: that dim mixes, the others map. Several: everything mixes."""
    spots = [k for k, item in enumerate(call.args["indices"]) if item is not None]
    rank = call.vals[0].dim()
    rest = tuple((None,) * v.dim() for v in call.vals[1:])
    boolean = any(v.dtype is torch.bool for v in call.vals[1:])
    if len(spots) != 1 or boolean:
        return Signature(((None,) * rank, *rest), ((None,) * call.out.dim(),))
    d = spots[0]
    letters: tuple[Letter, ...] = tuple(range(rank))
    out = (*letters[:d], *((None,) * call.vals[1].dim()), *letters[d + 1 :])
    return Signature((letters, *rest), (out,), {d: Role.MIX})


def _pad(call: Call, facts: Facts) -> Signature:
    rank, pads = call.vals[0].dim(), call.args["pad"]
    padded = {rank - 1 - k // 2 for k, amount in enumerate(pads) if not (isinstance(amount, int) and amount == 0)}
    letters: tuple[Letter, ...] = tuple(range(rank))
    out = tuple(None if k in padded else k for k in letters)
    return Signature((letters,), (out,), {d: Role.MIX for d in padded}, frozenset({0}))


def _scatter_slice(call: Call, facts: Facts) -> Signature:
    """slice_scatter, select_scatter: the written dim mixes (a write is no merge boundary), the others map."""
    d, rank = call.axis(call.args.get("dim", 0)), call.vals[0].dim()
    letters: tuple[Letter, ...] = tuple(range(rank))
    removed = call.vals[1].dim() < rank
    src = tuple(k for k in letters if k != d) if removed else tuple(None if k == d else k for k in letters)
    return Signature((letters, src), (letters,), {d: Role.MIX}, frozenset({0, 1}), additive=True)


class ScatterSlice(SignatureRule):
    """Writing into a slice leaves the axis what it was: it keeps its atoms.

    Where the slice ends at protected tokens and the written value is merged alike, the write is to the merged rows.
    """

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        super().axes(call, facts)
        dims, d = facts.dims(call.nodes[0]), call.axis(call.args.get("dim", 0))
        if "start" in call.args:
            start, stop, step, size = self._spec(call, d)
            if step == 1 and call.vals[1].dim() == call.vals[0].dim():
                unify(slice_dim(facts, dims[d], size, start, stop, step), facts.dims(call.nodes[1])[d])
                _note_cut(facts, None, dims[d], start, stop, size)
        return (dims,)

    @staticmethod
    def _spec(call: Call, d: int) -> tuple[Any, Any, int, Any]:
        size = size_expr(call.vals[0].shape[d])
        start, stop = bounds(call.args.get("start"), call.args.get("end"), size)
        return start, stop, call.args.get("step") or 1, size

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        d = call.axis(call.args.get("dim", 0))
        whole = super().plan(call, ins, facts)
        if "start" not in call.args or not ins[0][d]:
            return whole
        start, stop, step, size = self._spec(call, d)
        runs = cut(facts, facts.dims(call.nodes[0]), ins[0], d, start, stop, size) if step == 1 else None
        source = ins[1][d]
        if (
            not runs
            or len(source) != 1
            or source[0].step is not runs[0].step
            or runs[0].extensive
            or source[0].extensive
        ):
            return whole
        base, src = (_replaced(layout, d, own) for layout, own in ((whole.ins[0], ins[0][d]), (whole.ins[1], source)))
        return Decision(
            (base, src), (_replaced(whole.outs[0], d, ins[0][d]),), tuple(r for r in whole.reasons if r[0] > 1)
        )

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        base, src = (env.fetch(n, layout) for n, layout in zip(call.nodes, decision.ins, strict=True))
        d = call.axis(call.args.get("dim", 0))
        if not decision.ins[0][d]:
            return env.run(call, [base, src])
        start, stop, _, size = self._spec(call, d)
        return base.slice_scatter(src, d, start, base.shape[d] - (size - stop))


register(CatRule(), aten.cat.default, aten.concat.default, aten.concatenate.default)
register(StackRule(), aten.stack)
register(SliceRule(), aten.slice.Tensor, aten.narrow.default)
register(SelectRule(), aten.select.int)
register(SplitRule(keeps_dim=True), aten.split.Tensor, aten.split.sizes, aten.split_with_sizes, aten.chunk,
         aten.tensor_split.sections, aten.tensor_split.indices)  # fmt: skip
register(SplitRule(keeps_dim=False), aten.unbind.int)
register(SignatureRule(_gather), aten.gather, aten.scatter, aten.scatter_add, aten.take_along_dim)
register(SignatureRule(_index_write), aten.index_add, aten.index_copy)
# A write to an input of the graph, at its end: the caller's tensor has full length.
register(Rule(), aten.copy_)
register(SignatureRule(_index_select), aten.index_select)
register(SignatureRule(_index), aten.index.Tensor)
register(SignatureRule(_pad), aten.constant_pad_nd, aten.pad)
register(ScatterSlice(_scatter_slice), aten.slice_scatter, aten.select_scatter)
