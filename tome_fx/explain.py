"""Look before (or instead of) compiling: `explain`, `rewrite`, `trace_tokens`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed, UserError
from torch.fx._pytree import tree_flatten_spec
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from tome_fx.backend import ToMeError, finish, transform
from tome_fx.config import ToMeConfig, config_from
from tome_fx.passes import KeptError, Result, Target, read_graph, run_config
from tome_fx.report import SCRIPTED, SkipReason, ToMeReport
from tome_fx.tokens import MergedTokens

tome = torch.ops.tome


def explain(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    r: Any = None,
    **config: Any,
) -> ToMeReport:
    """What tome_backend would do to `model(*args, **kwargs)`. Nothing is merged and nothing is compiled.

    Each graph is analysed on fake tensors and then runs once as it is, unmerged, so that Python which reads numbers
    from tensors between graphs goes the way that it goes in a call. What the call writes to buffers and inputs is
    undone, and so are the random numbers that it draws. `config`: the keywords of `tome_backend`. Raises what
    torch.compile raises where it cannot trace, and what the model itself raises.
    """
    settings = config_from({"r": r, "inner": "eager", **config})
    check_call(model, args)
    found: list[ToMeReport] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        found.append(transform(gm, inputs, settings)[1])
        return gm.forward

    told = Counter(torch._dynamo.utils.counters["graph_break"])
    with unlimited(), _undone(model, (args, kwargs)):
        try:
            torch.compile(model, backend=backend, **APART)(*args, **(kwargs or {}))
        except BackendCompilerFailed as error:
            raise error.inner_exception from None  # the user asked us, not torch.compile
    total = ToMeReport(r=settings.r, method=settings.described)
    for report in found:
        total = total + report
    if not found:
        breaks = Counter(torch._dynamo.utils.counters["graph_break"]) - told
        lines = [next(iter(why.strip().splitlines()), "") for why in breaks]
        total.skipped += [SkipReason("graph break", "", line) for line in dict.fromkeys(lines)]
    total.skipped += _scripted(model)
    return total


def _scripted(model: Any) -> list[SkipReason]:
    """The modules that torch.compile runs as they are, as they are TorchScript already."""
    if isinstance(model, torch.jit.ScriptFunction):
        return [SkipReason(SCRIPTED, "", NO_GRAPH)]
    named = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    found = [name for name, module in named if isinstance(module, torch.jit.ScriptModule)]
    above = (name for name in found if not any(name.startswith(f"{other}." if other else "") for other in found
                                               if other != name))  # fmt: skip
    return [SkipReason(SCRIPTED, name, NO_GRAPH) for name in above]


NO_GRAPH = "it was scripted or traced, and torch.compile runs such a module as it is: give it the one it was made of"


APART: dict[str, Any] = {name: True for name in ("isolate_recompiles",) if name in signature(torch.compile).parameters}
"""For torch.compile, where it knows this: what is compiled to be looked at counts against no limit of the user's."""


def check_call(model: Any, args: Any) -> None:
    """Raise TypeError where a model is none, or its inputs are not given as a tuple or list."""
    if not callable(model):
        raise TypeError(f"model must be a module or a function, got {type(model).__name__}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple or list of the model's inputs, as (x,), got {type(args).__name__}")


def unlimited() -> Any:
    """Allow many compilations of one function: each that is looked at is one more."""
    names = ("recompile_limit", "accumulated_recompile_limit")
    return torch._dynamo.config.patch({name: 10_000 for name in names})


@contextmanager
def _undone(model: Any, inputs: Any) -> Iterator[None]:
    """Put back what is written to a model's buffers and to inputs, and the state of random numbers."""
    held = [*model.buffers()] if isinstance(model, torch.nn.Module) else []
    held += [x for x in tree_leaves(inputs) if type(x) is Tensor]
    before = [(x, x.detach().clone()) for x in held if not x.is_inference()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for x, value in before:
            if not torch.equal(x, value):
                x.copy_(value)


def rewrite(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    r: Any = None,
    dynamic_shapes: Any = None,
    plain: bool = True,
    keep: str = "full",
    **config: Any,
) -> fx.GraphModule:
    """The rewritten graph as a module with the call signature of `model`, sharing its parameters.

    It is traced whole by torch.export: for the shapes of `args`, but for dims that `dynamic_shapes` frees, as
    torch.export takes it. It is made of ATen ops alone, so that it can be exported anew and runs where tome_fx is not
    installed; plain=False keeps our operators, which are faster in Python. Where nothing merges it is the traced graph
    itself, and `.meta["tome_report"]` says why.

    keep="merged": the module gives back `MergedTokens`, whose `output` is the model's own with its tokens left merged:
    for a language model that is to see fewer of them. How many there are does not depend on the input: `kept_tokens`.

    Raises ToMeError where a pass fails, ValueError for options that cannot leave Python (matchers of your own, with
    plain=True) and, with keep="merged", for a model whose outputs hold no merged tokens or hold them after different
    merges, and what torch.export raises where the model cannot be traced whole.
    """
    if keep not in ("full", "merged"):
        raise ValueError(f"keep must be full or merged, got {keep!r}")
    target = Target("mask" if plain else "", keep == "merged")
    gm, report = rewritten_module(model, args, kwargs, {"r": r, **config}, dynamic_shapes, target)
    gm.meta["tome_report"] = report
    return gm


def kept_tokens(gm: fx.GraphModule) -> int:
    """How many rows of merged tokens a module of `rewrite(..., keep="merged")` gives back, known without a call: an
    int, or a SymInt where the model's number of tokens is free. Raises ValueError for any other module."""
    output = gm.graph.output_node().args[0]
    if not isinstance(gm._out_spec, TreeSpec) or gm._out_spec.context is not MergedTokens:
        raise ValueError('not a module of rewrite(..., keep="merged")')
    place = tree_leaves(output)[-1]
    count: int = place.meta["val"].shape[-1]
    return count


def rewritten_module(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    dynamic_shapes: Any = None,
    target: Target | None = None,
) -> tuple[fx.GraphModule, ToMeReport]:
    """The module of `rewrite`, and its report. target: as `transform` takes it."""
    settings = config_from({"inner": "eager", **config})
    source = _traced(model, args, kwargs, dynamic_shapes)
    flat = [_flat_value(node) for node in source.graph.find_nodes(op="placeholder")]
    rewritten, report = transform(source, flat, settings, target)
    for module in (rewritten if rewritten is not None else source).modules():
        module.training = model.training
    if any(s.kind == "internal error" for s in report.skipped):
        raise ToMeError(str(report.skipped[0]))
    kept = target is not None and target.kept
    if rewritten is None:
        if kept:
            raise KeptError(report.summary())
        return source, report
    return _called_as(source, rewritten, kept), report


def _called_as(source: fx.GraphModule, rewritten: fx.GraphModule, kept: bool = False) -> fx.GraphModule:
    """The rewritten graph with the call signature of its source."""
    rewritten.graph._codegen = copy.deepcopy(source.graph._codegen)
    for name in ("_in_spec", "_out_spec"):
        if hasattr(source, name):
            setattr(rewritten, name, getattr(source, name))
    if kept:
        _told_beside(rewritten)
    _flatten_output(rewritten.graph)
    rewritten.recompile()
    return rewritten


class Source:
    """A model that is traced and read once, to be rewritten for many configs; each takes as long as planning does.

    module: the traced graph, unmerged. Raises CaptureError, and what torch.export raises, where it cannot be traced.
    """

    def __init__(self, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        self.module = _traced(model, args, kwargs)
        self.training = model.training
        flat = [_flat_value(node) for node in self.module.graph.find_nodes(op="placeholder")]
        self.read = read_graph(self.module, flat, ToMeConfig(inner="eager"))

    def rewritten(self, config: Mapping[str, Any]) -> tuple[fx.GraphModule, Result]:
        """As `rewritten_module`, and all that the passes found. Raises ValueError where options do not fit the model.
        """
        result = run_config(self.read, config_from({"inner": "eager", **config}))
        if result.gm is None:
            return self.module, result
        merged = _called_as(self.module, finish(self.module, result))
        for module in merged.modules():
            module.training = self.training
        return merged, result


def _traced(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any = None
) -> fx.GraphModule:
    """The model as torch.export has it. Raises TypeError for what is no module, or a call that it does not take."""
    check_call(model, args)
    if not isinstance(model, torch.nn.Module):
        raise TypeError("torch.export takes an nn.Module, got a function; `explain` and `check` take functions too")
    return _module(_exported(model, tuple(args), in_order(model, kwargs or {}), dynamic_shapes))


def _exported(model: torch.nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> Any:
    """torch.export, without Dynamo where it can: Python's own `len(x)` is a number then, with Dynamo it stays free."""
    args, kwargs = apart((args, kwargs))
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except UserError:
        if dynamic_shapes is None:
            raise
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=True)


def apart(inputs: Any) -> Any:
    """Inputs in which no tensor stands twice: of two that are one, torch.export would read the last in both places
    (torch 2.14, `findings/export_same_input_twice.sh`)."""
    seen = set[int]()

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) not in seen:
            seen.add(id(x))
            return x
        return x.detach().clone().requires_grad_(x.requires_grad)

    return tree_map(own, inputs)


def in_order(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the order of the model's signature, so that the traced module takes them by position too."""
    names = [name for name in signature(model.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in dict.fromkeys([*names, *kwargs])}


def _module(exported: Any) -> fx.GraphModule:
    """The exported program as a module, without the call that re-checks input shapes."""
    module = exported.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            module.graph.erase_node(node)
    module.recompile()
    return module


def _flat_value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _told_beside(gm: fx.GraphModule) -> None:
    """Three more outputs: the module gives back `MergedTokens`."""
    own: Any = gm._out_spec
    output = tree_unflatten(range(own.num_leaves), own)
    gm._out_spec = tree_flatten(MergedTokens(output, 0, 0, 0))[1]  # type: ignore[arg-type]
    codegen: Any = gm.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=gm._out_spec)


def _flatten_output(graph: fx.Graph) -> None:
    """The codegen of an exported module unflattens a flat list."""
    (output,) = graph.find_nodes(op="output")
    if not isinstance(output.args[0], (list, tuple)):
        output.args = ([output.args[0]],)


@dataclass(frozen=True)
class MergeStep:
    """One merge as it ran.

    name: place in the model. tokens_before, tokens_after: lengths of the token axis. groups: int64 [*sample, N0], the
    index after this merge of each ORIGINAL token. similarity: float32 [*sample, r], of each merged pair (its cosine
    unless the config says otherwise), most similar first; inf of those that `counts` does not let merge. protected:
    leading tokens that never merge. There is always at least one sample axis.
    """

    name: str
    tokens_before: int
    tokens_after: int
    groups: Tensor
    similarity: Tensor
    protected: int


@dataclass(frozen=True)
class TokenTrace:
    """Which original tokens ended in which group, merge by merge, as the rewritten graph did it."""

    merges: list[MergeStep]
    report: ToMeReport

    @property
    def groups(self) -> Tensor:
        """int64 [*sample, N0]: the groups after the last merge. Raises ValueError where nothing merged."""
        if not self.merges:
            raise ValueError(f"no tokens were merged: {self.report.summary()}")
        return self.merges[-1].groups


class MatchRecorder(fx.Interpreter):
    """Keeps what each matching of a graph was given, by name, and what it found."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[tuple[fx.Node, dict[str, Any], tuple[Tensor, ...]]] = []

    def run_node(self, n: fx.Node) -> Any:
        if "tome_step" not in n.meta:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        names = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
        self.found.append((n, {**dict(zip(names, args, strict=False)), **kwargs}, value))
        return value


def trace_tokens(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    r: Any = None,
    **config: Any,
) -> TokenTrace:
    """Run the rewritten model eagerly and read off every merge of its graph; `drop_unread=False` adds those that nobody
    reads.

    On branches an MLP that takes its attention's groups has no entry of its own.

    Raises what `rewrite` raises.
    """
    gm, report = rewritten_module(model, args, kwargs, {"r": r, **config})
    recorder = MatchRecorder(gm)
    with torch.no_grad():
        recorder.run(*flat_inputs(gm, args, kwargs), enable_io_processing=False)
    merges: list[MergeStep] = []
    known: dict[int, Tensor] = {}
    for node, given, (assign, keep, _, similarity, *_) in recorder.found:
        assign = assign[None] if assign.dim() == 1 else assign  # a batch of one has no axis in the graph
        before_it = known.get(node.meta["tome_prev"])
        groups = known[node.meta["tome_step"]] = assign if before_it is None else assign.gather(-1, before_it)
        before = assign.shape[-1]
        similarity = similarity[None] if similarity.dim() == 1 else similarity
        after, prefix = keep.shape[-1], given["prefix"]
        merges.append(MergeStep(node.meta["tome_merge"], before, after, groups, similarity, prefix))
    return TokenTrace(merges, report)


def flat_inputs(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Any]:
    """A call's arguments as the graph takes them, by name where they were named."""
    return list(tree_flatten_spec((tuple(args), dict(kwargs or {})), gm._in_spec))
