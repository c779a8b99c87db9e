"""The torch.compile backend: `torch.compile(model, backend=tome_backend(r=16))`."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor.custom_graph_pass import CustomGraphPass

from tome_fx import passes
from tome_fx.across import Across
from tome_fx.config import ToMeConfig, config_from, from_environment, updated
from tome_fx.kernels import cpu
from tome_fx.passes import KeptError, PortableError, Result, Target, run_pipeline
from tome_fx.passes.analysis.sites import UNKNOWN_VALUE
from tome_fx.passes.inner import lengths
from tome_fx.passes.inner.shared import compile_shared
from tome_fx.passes.lower import KERNELS, call_kernels
from tome_fx.passes.normal.wrappers import closed_input
from tome_fx.pieces import Model, Piece, compilations, piece_of
from tome_fx.register import RuleError
from tome_fx.report import SkipReason, ToMeError, ToMeReport, ToMeWarning, record, together
from tome_fx.schedule import ScheduleError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToMeBackend:
    """A torch.compile backend. Equal instances share compiled code."""

    config: ToMeConfig = field(default_factory=ToMeConfig)

    @property
    def __name__(self) -> str:
        return "tome"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Rewrite one Dynamo graph and compile it.

        `mode=` and `options=` of torch.compile reach the inner compiler; options that begin with "tome." are ours and
        replace the config's. Raises ValueError or TypeError for such an option that is not allowed.
        """
        options = dict(kwargs.pop("options", None) or {})
        own = {key.removeprefix("tome."): options.pop(key) for key in list(options) if key.startswith("tome.")}
        config = updated(self.config, own) if own else self.config
        if wrong := [key for key in options if config.inner == "inductor" and _is_ours(key)]:
            name = wrong[0].removeprefix("tome_")
            raise ValueError(f"options of tome_backend begin with tome.: say tome.{name} instead of {wrong[0]}")
        piece = piece_of(gm, config)
        rewritten, report = transform(gm, example_inputs, config, piece=piece)
        if rewritten is not None:
            on_cpu = _shares_kernels(example_inputs, config)
            if on_cpu:
                cpu.prepare()
            else:
                rewritten.meta.pop(LENGTHS)
            across = Across(rewritten, lambda gm, xs: compile_inner(gm, xs, config.inner, options=options, **kwargs))
            try:
                across.run = across.compile(rewritten, example_inputs)
            except torch._dynamo.exc.TorchDynamoException:  # how Dynamo is asked to trace again
                raise
            except Exception:  # noqa: BLE001 - a graph of ours that does not compile: the same rung as in `transform`
                report = _internal_error(config, piece)
            else:
                if on_cpu:
                    cpu.library()  # no call may meet the dispatcher while the kernels register themselves
                record(report, piece.group)
                return across
        record(report, piece.group)
        return compile_inner(gm, example_inputs, config.inner, options=options, **kwargs)


def _is_ours(key: str) -> bool:
    """Whether the name of an inner option is none of Inductor's but one of ours."""
    ours = key.removeprefix("tome_") in {one.name for one in fields(ToMeConfig)}
    return ours and not hasattr(torch._inductor.config, key)


def tome_backend(
    r: Any = None,
    *,
    flops: float | None = None,
    method: str = "tome",
    every: int = 1,
    reuse: int = 0,
    multiple: int = 1,
    prop_attn: bool | None = None,
    metric: str | None = None,
    importance: str | None = None,
    candidates: str | None = None,
    similarity: str | None = None,
    alpha: float | str | None = None,
    partition: str | Sequence[str] | None = None,
    matcher: str | Sequence[str] | None = None,
    merging: str | Sequence[str] | None = None,
    prune: float | Sequence[int] | None = None,
    counts: str | None = None,
    least: float | Sequence[int] | None = None,
    blocks: str | Sequence[int] | Sequence[float] | None = None,
    protect: str | int | tuple[int, int] | list[int] = "auto",
    placement: str | None = None,
    padding_first: bool = False,
    drop_unread: bool = True,
    inner: str = "inductor",
    strict: bool = False,
    **numbers: float,
) -> ToMeBackend:
    """A backend for `torch.compile` that merges tokens (ToMe, arXiv 2210.09461) in every transformer it is given.

    Args:
        r: tokens merged away per block (16 unless given): an int; a float below 1, a share of the block's mergeable
            tokens; `(r, inflection)`, falling (-1) or rising (1) linearly over the blocks; or a list of ints, one for
            each block in order (none for blocks beyond its end; a longer list raises ScheduleError). In packed
            sequences that a mask parts it is for each part.
        flops: instead of `r`, the share of the model's FLOPs to aim at.
        method: a bundle of the choices below, "tome", "saint", "tosa", "mstm", "pitome", "tofu", "mctf", "diffrate",
            "evit" and others (docs/methods.md), or a name given to `register_method`; what is given beside it replaces
            its piece. What stands first below is ToMe's, which holds where no method says otherwise.
        every: merge at every k-th block only, what the schedule gives to the k blocks up to it.
        reuse: the groups of one branch serve those of the next k blocks too.
        multiple: keep token counts at multiples of this number; what is left over is merged by a later block.
        prop_attn: proportional attention, equation 1 of the paper.
        metric: what tokens are compared by, "key", "query", "value", "input" (the residual stream) or "token" (what
            merges).
        importance: how much a token matters, to pieces that go by it: "none", "attention", "received", "change",
            "norm", "energy", "rare" or "size".
        candidates: who takes part, "all" or the 2r "least" important.
        similarity: how tokens are compared, "cosine", "dot" or "joined".
        alpha: the share of that beside how near their places on the grid are: None, a number, or "rising", "falling",
            "constant" with depth.
        partition: the two sides of the matching, "alternating", "sequential", "random", "importance", "band:8",
            "window:2", "window3d:2", "frame", "grid:2", "grid3d:2" or "grid_random:2".
        matcher: who picks the pairs, "bipartite", "votes", "both", "fuse", "greedy", "previous", "random" or a name
            given to `register_matcher`.
        merging: what becomes of a pair, "mean", "plain", "keep", "prune", "mlerp" or "weighted"; see `ToMeConfig`. A
            tuple of names (partition, matcher, merging) is one for each equal part of the merging blocks.
        prune: how many of the r tokens are dropped while the others merge: a share, or a count for each merging block.
        counts: how many of r merge, sample by sample: "none" (all), "votes", "threshold" or a registered piece's name.
        least: of these how many go whatever the data say, the rows that are saved: a share, or a count for each block.
        blocks: which blocks merge: "all", "first half", "last", or a list of positions or of shares of the depth.
        protect: tokens that never merge: a number of leading ones, `(count, period)`, or a list of positions (from the
            end where negative); "auto" finds class, distillation, camera and register tokens.
        placement: "stream" merges for good, "branch" around each attention and MLP alone; "auto" takes the stream where
            there is one, a branch elsewhere, and either only where it pays.
        padding_first: merge the tokens that a mask of keys leaves out before all others. Their outputs are then those
            of other padding; valid tokens do not notice.
        drop_unread: compute only the rows of the last block that are read (the class token, mostly).
        inner: "inductor", "aot_eager" or "eager".
        strict: raise ToMeError where the default is a ToMeWarning.
        numbers: those of the pieces, by name (`tome_fx.methods.NUMBERS`): tau=0.8, margin=0.75.

    Raises: TypeError or ValueError on values that are not allowed. The compiled call raises ScheduleError (a
    ValueError) for a list `r` that is too long and, with `strict=True`, ToMeError.

    Where neither r nor flops is given, the environment's TOME_R or TOME_FLOPS are taken, before r=16.
    """
    if r is None and flops is None:
        r, flops = map(from_environment().get, ("r", "flops"))
    options = {
        "method": method, "every": every, "reuse": reuse, "multiple": multiple, "prop_attn": prop_attn,
        "metric": metric, "importance": importance, "candidates": candidates, "similarity": similarity, "alpha": alpha,
        "partition": partition, "matcher": matcher, "merging": merging, "prune": prune, "counts": counts,
        "least": least, "blocks": blocks, "protect": protect, "placement": placement, "padding_first": padding_first,
        "drop_unread": drop_unread, "inner": inner, "strict": strict,
    }  # fmt: skip
    return ToMeBackend(config_from({"r": r, "flops": flops, **options, **numbers}))


def tome(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend by name: `torch.compile(model, backend="tome", options={"tome.r": 16})`."""
    return tome_backend()(gm, example_inputs, **kwargs)


def transform(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: ToMeConfig,
    target: Target | None = None,
    piece: Piece | None = None,
) -> tuple[fx.GraphModule | None, ToMeReport]:
    """The rewritten graph with the placeholders of `gm`, or None where `gm` is to be used as it is, and the report.
    target: what it is rewritten for, if not for this process (PortableError or KeptError where that cannot be).
    piece: the place of the graph in its model; looked for where it is not given.

    `meta[LENGTHS]` of the graph holds the lengths that merges leave, where layers can share kernels by them.

    Warns (strict: raises ToMeError) where a site does not pay, nothing merges, or a pass fails.
    """
    piece = piece or piece_of(gm, config)
    try:
        result = _run(gm, inputs, config, piece, target)
        lost = _lost(result, config, piece) if piece.cut else []
        if piece.cut and result.captured is not None:
            piece.remember(result.after(piece.first))
        rewritten = None if result.gm is None else finish(gm, result)
    except (ScheduleError, RuleError, PortableError, KeptError):
        raise
    except Exception:  # noqa: BLE001 - the last rung of the ladder: a bug of ours must not cost the user's result
        return None, _internal_error(config, piece)
    report = _placed(result.report, piece)
    _count(report)
    log.info("%s", report)
    if piece.cut:
        _tell_of_piece(report, lost, config, piece)
    else:
        _tell(report, config)
    if report.merged_sites:
        _tell_of_limit()
    return rewritten, report


def _run(gm: fx.GraphModule, inputs: Sequence[Any], config: ToMeConfig, piece: Piece, target: Target | None) -> Result:
    """The passes; for a piece of a model a list `r` may be longer than its blocks."""
    try:
        return run_pipeline(gm, inputs, config, piece.known, target)
    except ScheduleError as error:
        if not piece.cut:
            raise
        shorter = updated(config, {"r": list(config.r)[: error.blocks]})  # type: ignore[arg-type]
        result = run_pipeline(gm, inputs, shorter, piece.known, target)
        result.report.r = config.schedule
        return result


def _placed(report: ToMeReport, piece: Piece) -> ToMeReport:
    report.compile_id, report.model = str(CompileContext.current_compile_id() or ""), piece.model.name
    return report


def _internal_error(config: ToMeConfig, piece: Piece) -> ToMeReport:
    """The last rung of the fallback ladder: the original graph is compiled, and the traceback is shown."""
    text, error = traceback.format_exc(), sys.exc_info()[1]
    message = f"tome_backend failed on a graph and left it as it is; please report this:\n{text}"
    if config.strict:
        raise ToMeError(message)
    _tell_user(message)
    counters["tome_fx"]["internal_errors"] += 1
    first = next(iter(str(error).strip().splitlines()), "")
    what = f"{type(error).__name__}: {first}".removesuffix(": ")
    return _placed(ToMeReport(graphs=1, skipped=[SkipReason("internal error", "", what)], r=config.r), piece)


def _count(report: ToMeReport) -> None:
    counts = counters["tome_fx"]
    counts["graphs"] += 1
    counts["attention_sites"] += report.attention_sites
    counts["merged_sites"] += report.merged_sites
    for name, count in report.merged_by_placement.items():
        counts[f"merged_{name}"] += count
    counts["unmerges"] += len(report.unmerges)
    counts["skipped"] += len(report.skipped)


def _tell(report: ToMeReport, config: ToMeConfig) -> None:
    unpaid = [s for s in report.skipped if s.kind in ("does not pay", "flops target")]
    if not report.merged_sites and not _nothing_wanted(config):
        _warn(f"tome_backend: {report.summary()}", config)
    elif unpaid and config.strict:
        raise ToMeError(together(unpaid))


def _nothing_wanted(config: ToMeConfig) -> bool:
    return config.flops is None and not _wants_any(config.r)


def _lost(result: Result, config: ToMeConfig, piece: Piece) -> list[str]:
    """What a piece that merges does otherwise than the whole model would."""
    found: list[str] = []
    if not result.report.merged_sites:
        return found
    if result.strange and not piece.first and config.protect == "auto":
        found.append("class tokens that come from another piece cannot be seen here and may merge")
    scheduled = isinstance(config.r, tuple)
    if config.flops is not None or (scheduled and (not config.is_list or (result.anew and not piece.first))):
        found.append("the schedule starts anew in each piece")
    elif piece.shared and config.is_list and len(set(config.r)) > 1:  # type: ignore[arg-type]
        found.append("each module that runs this code merges as the first of them does")
    if names := config.by_depth(result.anew or piece.shared):
        found.append(f"{', '.join(names)} go by the depth of each piece alone")
    return found


def _tell_of_piece(report: ToMeReport, lost: list[str], config: ToMeConfig, piece: Piece) -> None:
    """Of all the pieces of a model the user hears once. One without attention, a stem or a head, is none to speak of,
    unless no piece has any."""
    model, merged = piece.model, report.merged_sites > 0
    model.attention |= bool(report.attention_sites)
    model.merged |= merged
    spoken_of = report.attention_sites or (piece.last and not model.attention)
    nothing_lost = report.skipped and all(_no_loss(reason, model) for reason in report.skipped)
    if not merged and spoken_of and not nothing_lost:
        lost = [report.summary()]
    if not lost or model.told or _nothing_wanted(config):
        return
    model.told = True
    _warn(
        f"tome_backend: this graph is a piece of the model: {piece.cut}. So {'; '.join(lost)}. {model.remedy}"
        + (", or say protect=1 (or how many leading tokens never merge) and a constant r." if merged else "."),
        config,
    )


def _no_loss(reason: SkipReason, model: Model) -> bool:
    """Whether an attention that merges nothing has lost nothing: no schedule had anything for it, or it is masked (the
    language model behind a tower that merged), and not by a mask that a graph break may have made unknown."""
    masked = reason.kind == "causal or windowed mask" and UNKNOWN_VALUE not in reason.detail
    return reason.kind in NO_LOSS or (masked and model.merged)


NO_LOSS = "nothing to merge", "not read"
"""Reasons by which nothing is lost that was asked for: the schedule is at its end, or no token is read after it."""


def _tell_of_limit() -> None:
    """Dynamo compiles a function so many times, then runs it as it is and says nothing to the backend."""
    limit = torch._dynamo.config.recompile_limit
    if compilations() == limit:
        _tell_user(
            f"tome_backend: this is compilation {limit} of one function, and torch._dynamo.config.recompile_limit "
            "allows no more: inputs that need another (another size) will run as the plain model, unmerged. Compile "
            "with dynamic=True, pad inputs to fewer sizes, or raise that limit."
        )


def _wants_any(r: Any) -> bool:
    return any(r) if isinstance(r, tuple) else bool(r)


def _warn(message: str, config: ToMeConfig) -> None:
    if config.strict:
        raise ToMeError(message)
    _tell_user(message)


_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__, passes.__file__))


def _tell_user(message: str) -> None:
    """Warn at the line that called what was compiled: where a graph broke, lines of the model's own stand inside of
    it."""
    frame, level, found = sys._getframe(1), 2, 0
    while frame is not None:
        if frame.f_code.co_filename.startswith((*_NOT_THE_USERS, "<")):
            found = 0 if frame.f_code.co_name == "compile_wrapper" else found
        else:
            found = found or level
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, ToMeWarning, stacklevel=found or 2)


def finish(source: fx.GraphModule, result: Result) -> fx.GraphModule:
    """Make the rewritten graph a drop-in for the source graph: its inputs and their meta, its attributes, its meta."""
    gm, captured = result.gm, result.captured
    assert gm is not None and captured is not None
    placeholders = gm.graph.find_nodes(op="placeholder")
    originals = source.graph.find_nodes(op="placeholder")
    lifted = placeholders[: len(captured.attributes)]
    inputs = iter(placeholders[len(lifted) :])
    for (name, value), node in zip(captured.attributes.items(), lifted, strict=True):
        _attach(gm, name, value)
        with gm.graph.inserting_after(placeholders[-1]):
            held = gm.graph.get_attr(name)
        held.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(held)
        gm.graph.erase_node(node)
    for original, paths in zip(originals, captured.opened, strict=True):
        plain = [next(inputs) for _ in paths]
        node = plain[0] if paths == [()] else closed_input(gm, plain, paths)
        node.meta.update({k: v for k, v in original.meta.items() if k not in ("val", "example_value", "tensor_meta")})
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    gm.graph.lint()
    gm.recompile()
    gm.meta.update(source.meta)
    gm.meta[LENGTHS] = result.lengths
    return gm


def _attach(gm: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    """Register a tensor under a dotted name."""
    owner: torch.nn.Module = gm
    *path, last = name.split(".")
    for part in path:
        if not isinstance(getattr(owner, part, None), torch.nn.Module):
            setattr(owner, part, torch.nn.Module())
        owner = getattr(owner, part)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(last, value)
    else:
        owner.register_buffer(last, value)


LENGTHS = "tome_lengths"
"""Key in the meta of a rewritten graph: the lengths that merges leave, each once."""


def _shares_kernels(inputs: Sequence[Any], config: ToMeConfig) -> bool:
    """Whether layers of other token counts are to share kernels: C++ takes a second for each, and reads sizes as
    arguments for nothing."""
    devices = {x.device.type for x in inputs if isinstance(x, torch.Tensor)}
    return config.inner == "inductor" and devices == {"cpu"}


def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], inner: str, **kwargs: Any) -> Callable[..., Any]:
    """Hand a graph to the inner compiler, with the `mode` and `options` of torch.compile."""
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {}
    if mode := kwargs.get("mode"):
        patches.update(list_mode_options(mode, kwargs.get("dynamic")))
    patches.update({key.replace("-", "_"): value for key, value in (kwargs.get("options") or {}).items()})
    patches.update(_cache_identity())
    if counts := gm.meta.get(LENGTHS):
        return _by_length(gm, inputs, counts, patches)
    return cast(Callable[..., Any], compile_fx(gm, list(inputs), _compile_traced, config_patches=patches))


def _compile_traced(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor on a graph that AOTAutograd made."""
    from torch._inductor.compile_fx import compile_fx_inner

    if call_kernels(graph.graph):
        graph.recompile()
    return compile_fx_inner(graph, inputs, **kwargs)


def _by_length(
    gm: fx.GraphModule, inputs: Sequence[Any], counts: Sequence[int], patches: dict[str, Any]
) -> Callable[..., Any]:
    """`compile_fx` for a graph that gets token counts as inputs: AOTAutograd sees numbers, Inductor symbols (see
    `passes.inner.lengths`), and every call gives the same numbers.

    The symbols live in a fake mode of their own, so that what the compiler assumes of them is no guard of Dynamo's.
    """
    from torch._inductor.compile_fx import compile_fx

    for i, _ in enumerate(counts):
        last = gm.graph.find_nodes(op="placeholder")[-1]
        with gm.graph.inserting_after(last):
            gm.graph.placeholder(f"tome_length_{i}")
    gm.recompile()
    fresh = lengths.Fresh(inputs)
    with_symbols = lengths.Lengths(counts, fresh.free)
    bundled = torch._functorch.config.bundled_autograd_cache

    def inner_compile(graph: fx.GraphModule, values: Sequence[Any], **kwargs: Any) -> Any:
        with torch._functorch.config.patch(bundled_autograd_cache=bundled):  # a layer has an entry of its own
            return compile_shared(graph, with_symbols(graph, values), with_symbols, _compile_traced, **kwargs)

    context = TracingContext(fresh.mode)
    if (outer := TracingContext.try_get()) is not None:
        context.guards_context = outer.guards_context
    # the whole of the layers is one entry of AOTAutograd's cache
    with tracing(context), torch._functorch.config.patch(bundled_autograd_cache=True):
        run = cast(Callable[..., Any], compile_fx(gm, [*fresh.inputs, *counts], inner_compile, config_patches=patches))
    fresh.tell(with_symbols)
    return lambda *args: run(*args, *counts)


class _CacheIdentity(CustomGraphPass):
    """A pass that does nothing but put our sources into Inductor's cache keys: the keys hold only the names of ops."""

    def __init__(self, user: Any) -> None:
        self.user = user

    def __call__(self, graph: fx.Graph) -> None:
        if self.user is not None:
            self.user(graph)

    def uuid(self) -> Any:
        own = self.user.uuid() if isinstance(self.user, CustomGraphPass) else None
        return (source_digest(), bool(KERNELS), own)


def _cache_identity() -> dict[str, Any]:
    return {"post_grad_custom_pre_pass": _CacheIdentity(torch._inductor.config.post_grad_custom_pre_pass)}


@functools.cache
def source_digest() -> str:
    """sha256 over the sources that decide what our operators compute."""
    here, inner = Path(__file__).parent, Path(lengths.__file__).parent
    sources = [here / "matching.py", here / "attention.py", here / "kernels" / "gpu.py", inner.parent / "lower.py"]
    sources += [path for folder in (here / "ops", here / "methods", inner) for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
