"""The tied law, measured: does the merged model compute what the unmerged one does with its groups tied?

*A model whose tokens merge computes what the unmerged model computes when, at every merge, each token is replaced, at
full length, by the mean of its group.* `check` runs both on real inputs and compares their outputs. It holds for any
weights and any input, through convolutions, windows and masks, on the stream and on branches.

Some of what a merge does is an approximation on purpose, where a value that still differs within a group meets merged
tokens (`Approximation`). Such operands are then tied as the merge averages them; what is left is the law's error. The
runs are in `tied/`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_map

from tome_fx.backend import ToMeError
from tome_fx.config import ToMeConfig, config_from
from tome_fx.explain import APART, check_call, unlimited
from tome_fx.passes import Result, run_pipeline
from tome_fx.passes.algebra.layout import Layout
from tome_fx.passes.analysis.sites import place
from tome_fx.passes.capture import capture
from tome_fx.passes.normal.wrappers import opened
from tome_fx.passes.rules import Call, op_name
from tome_fx.passes.rules.base import Fill
from tome_fx.report import ToMeReport
from tome_fx.tied import (
    Groups,
    Join,
    Marked,
    MergedRun,
    Mode,
    PlainRun,
    TiedRun,
    dropped,
    given_back,
    is_merge,
    is_random,
    makes_whole,
    relative,
    steps_between,
)

TOLERANCE = 1e-6
"""Largest relative error in float64 at which the law counts as kept."""
IN_OWN_DTYPE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""The same where the model does not run in float64."""
_UNCHANGED = 1e-12
"""Tying that moves a value less than this, relative to its largest element, moves it by rounding alone."""


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedMerge:
    """One merge. name: place in the model. tokens_before, tokens_after: lengths of the token axis.

    similarity: the lowest at which a pair was merged. moved: how far tying its groups moves the value that merges.
    error: how far the merged value, given back to all tokens, is from the tied one; None where nobody reads all of its
    tokens. Both are largest absolute differences relative to the largest absolute value.
    """

    name: str
    tokens_before: int
    tokens_after: int
    similarity: float
    moved: float
    error: float | None


@dataclass(frozen=True)
class CheckedOutput:
    """One output of one traced graph. error: of the merged model against the tied one, approximations not taken into
    account. moved: of the merged model against the unmerged one. Both relative to the largest absolute value."""

    graph: int
    index: int
    shape: tuple[int, ...]
    error: float
    moved: float


@dataclass(frozen=True)
class Approximation:
    """An op at which a value that differs within groups meets merged tokens.

    name: place in the model. op: the op. what: what the merge makes of the value. moved: how far that moves the value.
    effect: how far it moves the outputs of the tied model, if no other approximation is made; None if that was not
    asked for. Both are relative.
    """

    name: str
    op: str
    what: str
    moved: float
    effect: float | None


@dataclass(frozen=True)
class Check:
    """What `check` found, the worst of all graphs that the model was traced into.

    error: largest relative difference of the outputs of the merged model and the tied one. explained: the same once the
    approximations are made in the tied model too: the error of the law. moved: how far merging moves the outputs from
    those of the unmerged model, for context. spelling: how far the outputs of the unmerged model move by the one
    spelling into which the passes bring it. dtype: what it ran in. notes: what was left out, and why. rounds: whether
    the model rounds merged values to whole numbers, as quantised activations are, or compares them with the largest of
    them: a value at an edge then falls either way by noise, so that a law that does not hold may not be broken.
    unrounded: where it rounds and the law does not hold, the error with these floats left as they are, if it runs so.
    """

    error: float
    explained: float
    moved: float
    spelling: float
    merges: list[CheckedMerge]
    outputs: list[CheckedOutput]
    approximations: list[Approximation]
    report: ToMeReport
    dtype: torch.dtype = torch.float64
    notes: list[str] = field(default_factory=list)
    rounds: bool = False
    unrounded: float | None = None

    @property
    def tolerance(self) -> float:
        """The largest error that counts as rounding: 1e-6 in float64, more in the dtypes of a model that does not run
        in it."""
        return IN_OWN_DTYPE.get(self.dtype, TOLERANCE)

    @property
    def holds(self) -> bool:
        """Whether what is left once approximations are taken into account is at most `tolerance`, or would be if the
        model did not round to whole numbers. Where nothing merges it is: see `merges`, or say strict=True."""
        errors = (max(self.explained, self.spelling), math.inf if self.unrounded is None else self.unrounded)
        return min(errors) <= self.tolerance

    def summary(self) -> str:
        """One line: whether the law holds, and how far merging moves the outputs."""
        if not self.merges:
            return f"nothing merges, so there is nothing to check: {self.report.summary()}"
        broken = "the tied law is undecided" if self.rounds else "THE TIED LAW IS BROKEN: please report this"
        verdict = "the tied law holds" if self.holds else broken
        verdict += " up to rounding to whole numbers" if self.holds and self.unrounded is not None else ""
        parts = [f"{verdict} for {len(self.merges)} merges: error {self.error:.1e}"]
        if self.approximations:
            count = len(self.approximations)
            parts.append(f"{self.explained:.1e} without {count} approximation" + "s" * (count > 1))
        if self.unrounded is not None:
            parts.append(f"{self.unrounded:.1e} where nothing is rounded to them")
        if self.spelling > self.tolerance:
            parts.append(f"the unmerged model moves by {self.spelling:.1e} when it is brought into one spelling")
        return "; ".join([*parts, f"merging moves the outputs by {self.moved:.1e}"])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, ready for JSON."""
        names = ("error", "explained", "moved", "spelling", "unrounded", "notes", "holds")
        numbers = {name: getattr(self, name) for name in names}
        rows = {name: [vars(row) for row in getattr(self, name)] for name in ("merges", "outputs", "approximations")}
        return {**numbers, **rows, "dtype": str(self.dtype).removeprefix("torch."), "report": self.report.to_dict()}

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=110, color_system=None)
        if self.merges:
            rows = [(m.name, f"{m.tokens_before} -> {m.tokens_after}", f"{m.similarity:.3f}", f"{m.moved:.1e}",
                     "" if m.error is None else f"{m.error:.1e}") for m in self.merges]  # fmt: skip
            console.print(_table("merges", ("place", "tokens", "similarity", "moved", "error"), rows))
        if self.approximations:
            found = [(a.name, a.op, a.what, "" if a.effect is None else f"{a.effect:.1e}") for a in self.approximations]
            console.print(_table("approximations", ("place", "op", "what the merge makes of it", "effect"), found))
        for note in dict.fromkeys(self.notes):
            console.print(f"note: {note}", markup=False)
        console.print(self.summary(), markup=False)
        return buffer.getvalue().rstrip()


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


class NoLawError(ValueError):
    """These options keep no law that could be checked; the message says why."""


# -- the call ----------------------------------------------------------------------------------------------------------


def check(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    r: Any = None,
    effects: bool = True,
    **config: Any,
) -> Check:
    """Whether the merged model computes what the unmerged one does with its groups tied, on these inputs.

    The model is traced as torch.compile traces it, graph breaks and all. Each graph is then run three times in float64:
    unmerged, merged, and unmerged with tied groups. Weights, inputs and random states are left as they were; random
    numbers are drawn once for all three, and dropout drops nothing. Where a graph does not run in float64 it is run in
    the dtypes it has, and the result says so.

    effects: whether to run the tied graph once more for each approximation, to see what it alone does to the outputs.
    args, kwargs: the inputs, as for `model(*args, **kwargs)`.
    config: the keywords of `tome_backend`; strict=True raises ToMeError where nothing merges.

    Raises NoLawError (a ValueError) for `prop_attn=False`, `prune` and merging="prune", "mlerp" or "weighted", which
    keep no law, and what torch.compile raises where it cannot trace.
    """
    settings = config_from({"r": r, "inner": "eager", **config})
    if not settings.tied:
        what = "prune" if settings.drops_some else "merging"
        why = "computes the model on fewer tokens, or on others than their mean: there is no law to check"
        raise NoLawError(f"{what}={getattr(settings, what)!r} {why}")
    if not settings.prop_attn:
        raise NoLawError("prop_attn=False lets a group count as one token, so no law holds: there is nothing to check")
    check_call(model, args)
    graphs: list[_Graph] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        graphs.append(_Graph(gm, inputs, settings, effects))
        return graphs[-1]

    with unlimited(), _same_random_state(), _same_buffers(model):
        try:
            torch.compile(model, backend=backend, dynamic=False, **APART)(*_copied(args), **_copied(dict(kwargs or {})))
        except BackendCompilerFailed as error:
            raise error.inner_exception from None  # the user asked us, not torch.compile
    found = _total(graphs, settings)
    if settings.strict and not found.merges:
        raise ToMeError(found.summary())
    return found


def _copied(values: Any) -> Any:
    """Inputs of their own: a model may write to them."""
    return tree_map(
        lambda x: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, values
    )


@contextmanager
def _same_random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _same_buffers(model: Any) -> Iterator[None]:
    """Give a module the buffers back that it had: batch statistics count each call."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    held = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, held, strict=True):
                if buffer.layout is not torch.strided or not torch.equal(buffer, before):
                    buffer.copy_(before)


def _total(graphs: Sequence[_Graph], settings: ToMeConfig) -> Check:
    report = ToMeReport(r=settings.r)
    for graph in graphs:
        report = report + graph.result.report
    found = [one for graph in graphs for one in graph.found]

    def worst(name: str) -> float:
        return max((getattr(one, name) for one in found), default=0.0)

    def every(name: str) -> list[Any]:
        return [x for one in found for x in getattr(one, name)]

    outputs = [replace(out, graph=i) for i, graph in enumerate(graphs) for one in graph.found for out in one.outputs]
    own = next((one.dtype for one in found if one.dtype is not torch.float64), torch.float64)
    return Check(worst("error"), worst("explained"), worst("moved"), worst("spelling"), every("merges"), outputs,
                 every("approximations"), report, own, every("notes"), any(one.rounds for one in found),
                 _unrounded(found))  # fmt: skip


def _unrounded(found: Sequence[Check]) -> float | None:
    """The worst error without rounding, of graphs that need it, and with it of the others; None where one is not known
    that is needed, or none is."""
    errors = [one.unrounded for one in found if one.rounds and one.unrounded is not None]
    rest = [max(one.explained, one.spelling) for one in found if one.unrounded is None]
    return max([*errors, *rest]) if errors else None


class _Graph:
    """One traced graph. A call checks it on the real inputs and then gives what the graph itself computes."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], config: ToMeConfig, effects: bool) -> None:
        self.gm, self.config, self.effects = gm, config, effects
        self.result = run_pipeline(gm, inputs, config)
        self.found: list[Check] = []
        if self.result.plan.merges:
            self.plain = capture(gm, inputs)
            self.merged = Marked(self.result, config)

    def __call__(self, *args: Any) -> Any:
        if self.result.plan.merges:
            with torch.no_grad():
                self.found.append(self._checked(args))
        return self.gm(*args)

    def _checked(self, args: Sequence[Any]) -> Check:
        assert self.result.captured is not None
        inputs = [*self.result.captured.attributes.values(), *(leaf for arg in args for _, leaf in opened(arg))]
        try:
            found = _Comparison(self, inputs, Mode()).run()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            found = _Comparison(self, inputs, Mode(exact=False)).run()
            found = replace(found, notes=[*found.notes, f"it does not run in float64 ({first})"])
        return found if found.holds or not _rounded(self.result) else self._unrounded(found, inputs)

    def _unrounded(self, found: Check, inputs: Sequence[Any]) -> Check:
        """What was found, with the error where nothing is rounded to whole numbers, if it runs so."""
        try:
            smooth = _Comparison(self, inputs, Mode(rounds=False)).run()
        except (RuntimeError, NotImplementedError, TypeError):
            return found
        return replace(found, unrounded=max(smooth.explained, smooth.spelling))


# -- comparing ---------------------------------------------------------------------------------------------------------


_COMPARE = {getattr(torch.ops.aten, name).Tensor for name in ("ge", "gt", "le", "lt", "eq", "ne")}


def _edge(result: Result) -> str:
    """What the first op does of which noise may make something else, and its place; empty where there is none."""
    for node in _rounded(result):
        return f"{place(node) or op_name(node)} rounds merged values to whole numbers (check the model unquantised)"
    for node in result.plan.layouts:
        if node.target in _COMPARE and _compares(node, result):
            return f"{place(node) or op_name(node)} compares values of merged tokens, some of which are equal"
    return ""


def _rounded(result: Result) -> list[fx.Node]:
    """The ops that make whole numbers of merged floats."""
    return [n for n, layouts in result.plan.layouts.items() if any(map(any, layouts)) and makes_whole(n)]


def _compares(node: fx.Node, result: Result) -> bool:
    """Whether an op compares floats with others that are made of the same ones, after a merge."""
    call, reach = Call(node), result.facts.reach
    if len(call.nodes) != 2 or not all(val.is_floating_point() for val in call.vals):
        return False
    one, other = call.nodes
    if not reach.leads(one, other) and not reach.leads(other, one):
        return False
    return any(reach.leads(merged, n) for merged in result.plan.merges for n in call.nodes)


class _Comparison:
    """One graph on one set of inputs."""

    def __init__(self, graph: _Graph, inputs: Sequence[Any], mode: Mode) -> None:
        self.graph, self.result, self.inputs, self.mode = graph, graph.result, inputs, mode
        self.draws: dict[str, Tensor] = {}

    def run(self) -> Check:
        result, mode = self.result, self.mode
        assert result.captured is not None
        merged = MergedRun(self.graph.merged.gm.graph, mode)
        got = merged.run(self.inputs)
        self.groups = Groups(result, self.graph.config, merged)
        self._draw(merged)
        plain = PlainRun(result.captured.gm.graph, mode, self.draws).run(self.inputs)
        traced = PlainRun(self.graph.plain.gm.graph, mode, self.draws).run(self.inputs)
        tied, want = self._tied(frozenset())
        error = _worst(got, want)
        joins = self.graph.merged.joins
        candidates = [join for join in joins if not is_merge(join, result.plan, result.facts)]
        approximations: list[Approximation] = []
        last, explained = tied, error
        if error > _UNCHANGED and candidates:
            last, exactly = self._tied(frozenset(candidates))
            explained = _worst(got, exactly)
            approximations = self._approximations(candidates, last.joined, want)
        dtype = torch.float64 if mode.exact else _own_dtype(self.inputs)
        rows = enumerate(zip(got, want, plain, strict=True))
        outputs = [CheckedOutput(0, i, tuple(b.shape), relative(a, b), relative(a, c))
                   for i, (a, b, c) in rows if isinstance(b, Tensor)]  # fmt: skip
        edge = _edge(result)
        notes = dropped(result.captured.gm.graph)
        if edge:
            notes.append(f"{edge}: a value at an edge falls either way")
        return Check(error, explained, _worst(got, plain), _worst(plain, traced), self._merges(merged, last), outputs,
                     approximations, result.report, dtype, notes, bool(edge))  # fmt: skip

    def _draw(self, merged: MergedRun) -> None:
        """Random numbers as the merged graph drew them, at full length."""
        for node in self.result.plan.layouts:
            if is_random(node) and node.name in merged.values:
                (layout,) = self.result.plan.layouts[node]
                self.draws[node.name] = self._unmerged(merged.values[node.name], node, layout)

    def _unmerged(self, x: Tensor, node: fx.Node, layout: Layout) -> Tensor:
        """A value of the merged graph with a row for every token."""
        dims, shape = self.result.facts.dims(node), list(node.meta["val"].shape)
        for d, runs in enumerate(layout):
            for run in runs:
                x = given_back(x, dims, shape, layout, d, run, self.groups)
                layout = (*layout[:d], tuple(r for r in layout[d] if r is not run), *layout[d + 1 :])
        return x

    def _tied(self, approximated: frozenset[Join]) -> tuple[TiedRun, list[Any]]:
        run = TiedRun(self.result, self.mode, self.draws, self.groups, self.graph.merged.joins, approximated)
        return run, run.run(self.inputs)

    def _approximations(
        self, candidates: Sequence[Join], moved: Mapping[Join, float], want: Sequence[Any]
    ) -> list[Approximation]:
        found = []
        for join in candidates:
            if moved.get(join, 0.0) <= _UNCHANGED:
                continue
            effect = _worst(self._tied(frozenset({join}))[1], want) if self.graph.effects else None
            if effect is None or effect > _UNCHANGED:
                found.append(Approximation(place(join.node) or place(join.source), op_name(join.node), _what(join),
                                           moved[join], effect))  # fmt: skip
        return sorted(found, key=lambda a: -(a.effect or 0.0))

    def _merges(self, merged: MergedRun, tied: TiedRun) -> list[CheckedMerge]:
        found = []
        for merge in self.result.plan.every:
            node, step = merge.block.merge, merge.step
            if not self.groups.ran(step):
                continue
            pairs = merged.pairs.get(step.site, 1.0)
            before, after = (self.groups.found[step.site][name].shape[-1] for name in ("assign", "keep"))
            found.append(CheckedMerge(merge.block.name, before, after, pairs, tied.moved.get(step, 0.0),
                                      self._gap(node, merged, tied)))  # fmt: skip
        return found

    def _gap(self, node: fx.Node, merged: MergedRun, tied: TiedRun) -> float | None:
        (layout,) = self.result.plan.layouts[node]
        value, want = merged.values.get(node.name), tied.values.get(node.name)
        if value is None or want is None or any(run.extensive for runs in layout for run in runs):
            return None
        rows = [self.groups.count(run.step) for runs in layout for run in runs]
        if value.numel() * prod(self.groups.index(run.step).shape[-1] for runs in layout for run in runs) != (
            want.numel() * prod(rows)
        ):
            return None  # narrowed to the rows that are read
        return relative(self._unmerged(value, node, layout), want)


def _worst(got: Sequence[Any], want: Sequence[Any]) -> float:
    return max((relative(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


def _own_dtype(inputs: Sequence[Any]) -> torch.dtype:
    return next((x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)


_WHAT = {
    Fill.MEAN: "a value of full length joins merged tokens: its mean in each group",
    Fill.SHARE: "a mask or gate of full length meets merged tokens: its mean in each group",
    Fill.COUNT: "a factor of what is summed over tokens: its mean in each group",
    Fill.ROW: "a table of positions: the row of the token that stands for the group",
    Fill.BIAS: "a term of the attention scores: its log-mean-exp in each group",
}


def _what(join: Join) -> str:
    if all(shared_out for *_, shared_out in steps_between(join.have, join.want)):
        return "probabilities of a group: shared out evenly among its tokens"
    return _WHAT[join.fill]


__all__ = ["Approximation", "Check", "CheckedMerge", "CheckedOutput", "NoLawError", "check"]
