"""Whether a graph is a whole model or a piece of one, and what is remembered of a model from piece to piece.

A piece does not show which tokens are special (the class token was put in front of them in another), nor how many
blocks come before and after it.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.cache_size import CacheSizeRelevantForFrame
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import graph_break_reasons
from torch._guards import CompileContext, TracingContext

from tome_fx.passes.analysis.special import Before


@dataclass
class Model:
    """What is known of a model while its graphs are compiled: whether one had attention, whether one merged, whether
    the user was told.

    name: of what the user called. cut: why its graphs are pieces; empty for a model that is one graph. remedy: what to
    do about it. after: what each frame's graph told of the tokens that it gives out, by the number of the frame.
    """

    name: str = ""
    number: int = field(default_factory=itertools.count().__next__)
    attention: bool = False
    merged: bool = False
    told: bool = False
    cut: str = ""
    remedy: str = ""
    after: dict[int, dict[int, Before]] = field(default_factory=dict)

    def before(self, frame: int) -> dict[int, Before]:
        """What graphs of the frames before one told of tokens, by how many they are: Dynamo numbers frames as they
        run."""
        found: dict[int, Before] = {}
        for earlier in sorted(self.after):
            found |= self.after[earlier] if earlier < frame else {}
        return found


_MODELS: weakref.WeakKeyDictionary[Any, dict[Any, Model]] = weakref.WeakKeyDictionary()


@dataclass
class Piece:
    """A graph as a part of its model. last: no graph break ends it, and it is no module, nor a function that one calls,
    that Dynamo compiles by itself since it gave up the whole. frame: Dynamo's number of the code that it comes from.
    nth: which compilation of that code it is. shared: other modules of the model may run the same code."""

    model: Model
    last: bool
    frame: int = 0
    nth: int = 0
    shared: bool = False

    @property
    def cut(self) -> str:
        return self.model.cut

    @property
    def group(self) -> tuple[int, int] | None:
        """What the graphs of one model have in common; None where one graph is all of it."""
        return (self.model.number, self.nth) if self.cut else None

    @property
    def known(self) -> dict[int, Before]:
        """What the pieces before this one tell of tokens."""
        return self.model.before(self.frame) if self.cut else {}

    @property
    def first(self) -> bool:
        """Whether the model's own inputs enter it, and nothing that another piece has made."""
        return not self.shared and not any(frame < self.frame for frame in self.model.after)

    def remember(self, after: dict[int, Before]) -> None:
        self.model.after.setdefault(self.frame, {}).update(after)


def piece_of(gm: fx.GraphModule, config: Any) -> Piece:
    """The place of a graph that Dynamo is about to compile. A graph from elsewhere is a whole model."""
    if TracingContext.try_get() is None:
        return Piece(Model(), last=True)
    owner, modules, function = _owner()
    model = Model(name=getattr(owner, "__qualname__", type(owner).__qualname__) if owner is not None else "")
    if owner is not None:
        model = _MODELS.setdefault(owner, {}).setdefault(config, model)
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = reason is not None and reason.graph_break
    inner = _inner(modules, function)
    given_up = not broken and bool(inner)
    if given_up or (not model.cut and (broken or reason is None or len(modules) > 1)):
        model.cut, model.remedy = _cause(reason if broken else None, modules, inner)
    compiled = CompileContext.current_compile_id()
    frame, nth = (compiled.frame_id or 0, compiled.frame_compile_id or 0) if compiled is not None else (0, 0)
    return Piece(model, last=not (broken or given_up), frame=frame, nth=nth, shared=len(modules) > 1)


def _inner(modules: list[torch.nn.Module], function: Any) -> str:
    """What Dynamo compiles inside of a function that it was asked for, a method of the first of these modules: another
    one, or a function that is called there; empty where it is what was asked for, or what a graph break left of it."""
    if not modules or getattr(function, "__self__", None) is not modules[0]:
        return ""
    if len(modules) > 1:
        return type(modules[-1]).__name__
    code = next((held["code"] for code, held in _frames() if code.co_name == "_compile" and "code" in held), None)
    asked = [f for outer in (function, modules[0].forward) for f in _unwrapped(outer)]
    codes = [f.__code__ for f in asked if hasattr(f, "__code__")]  # a decorator's code has a name of its own
    names = {*(getattr(f, "__name__", "") for f in asked), *(own.co_name for own in codes)}
    resumed = code is not None and any(f"_resume_in_{name}_at_" in code.co_name for name in names)
    if code is None or code in codes or resumed or code.co_name in {getattr(f, "__name__", "") for f in asked}:
        return ""
    return re.sub(r"^torch_dynamo_resume_in_(.*)_at_(\d+)$", r"the rest of \1 (from line \2 on)", code.co_name)


def _unwrapped(function: Any) -> Iterator[Any]:
    """A function, and what each of its decorators wraps."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _cause(reason: Any, modules: list[torch.nn.Module], given_up: str) -> tuple[str, str]:
    """Why a graph is a piece of its model, and what to do. reason: of the graph break that ends it, if one does.
    given_up: what is compiled by itself, inside of the module that torch.compile was asked for."""
    if any(type(held.get("self")).__name__ == "DDPOptimizer" for _, held in _frames()):
        cause = "torch.compile splits the graph at the gradient buckets of DistributedDataParallel"
        return cause, "Set torch._dynamo.config.optimize_ddp = False before the first call: it is one graph then"
    if reason is not None:
        return f"torch.compile breaks the graph {_where(reason)}", _remedy(reason)
    if len(modules) < 2 and not given_up:
        return "the graph was split before it came here", "Hand the backend the whole graph"
    inner, outer = given_up or type(modules[-1]).__name__, type(modules[0]).__name__
    cause = f"{inner} is compiled by itself, inside of {outer}"
    sharded = sys.modules.get("torch.distributed.fsdp")
    if sharded is not None and isinstance(modules[-1], sharded.FSDPModule):
        return f"{cause}, as fully_shard was applied to it", f"Apply fully_shard to {outer} alone: it is one graph then"
    if given_up:
        cause, broke = f"torch.compile gave up {outer} as a whole and compiles {inner} by itself", _broke(modules)
        if broke is not None:
            return f"{cause}: the graph breaks {_where(broke)}", _remedy(broke)
        return cause, f"See what breaks {outer} (fullgraph=True says it)"
    return cause, f"Compile {outer} instead"


def _broke(modules: list[torch.nn.Module]) -> Any:
    """The last graph break that Dynamo met inside of the forward of one of these modules, or None."""
    codes = [getattr(inspect.unwrap(type(module).forward), "__code__", None) for module in modules]
    places = {(code.co_filename, code.co_name) for code in codes if code is not None}
    met = (r for r in reversed(graph_break_reasons) if any((f.filename, f.name) in places for f in r.user_stack))
    return next(met, None)


def _remedy(reason: Any) -> str:
    """What to do about a graph break: a setting where Dynamo's hints name one."""
    if "capture_scalar_outputs" in reason.reason:
        return (
            "Set torch._dynamo.config.capture_scalar_outputs = True: numbers that are read from tensors stay in "
            "the graph then. Or pass them as Python numbers"
        )
    if "data-dependent" in reason.reason.lower():
        return (
            "Pass numbers that are read from tensors as Python numbers instead (lengths.tolist() before the call): the "
            "compiler knows them as sizes then"
        )
    hints = [line.strip() for line in reason.reason.split("  Hint: ")[1:] if "torch._dynamo.config." in line]
    what = "Compile the whole model as one graph (fullgraph=True shows what breaks it)"
    return f"{what}, or do what Dynamo says: {hints[0].rstrip('.')}" if hints else what


def _where(reason: Any) -> str:
    what = reason.reason.strip().splitlines()[0]
    if not reason.user_stack:
        return f"({what})"
    frame = reason.user_stack[-1]
    statement = _statement(frame)
    return f"at {frame.filename}:{frame.lineno}{statement and f' `{statement}`'} ({what})"


def _statement(frame: Any) -> str:
    """The statement at a line, which often says itself what is wrong (a call of a logger); its first line where it is
    long."""
    first = (frame.line or "").strip()
    try:
        tree = ast.parse("".join(linecache.getlines(frame.filename)))
    except (SyntaxError, ValueError):
        return first
    spans = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= frame.lineno <= (node.end_lineno or node.lineno)
    ]
    if not spans:
        return first
    whole = ast.unparse(max(spans, key=lambda node: node.lineno))
    return whole if len(whole) <= LONG and "\n" not in whole else first


LONG = 400
"""Characters of source that a message shows at most."""


def _owner() -> tuple[Any, list[torch.nn.Module], Any]:
    """What the user called: the outermost module that runs, or the compiled function; the modules, outermost first,
    whose forward runs; and the function, or bound method, that was compiled."""
    running: list[Any] = []
    function = None
    for code, held in _frames():
        if code is torch.nn.Module._call_impl.__code__:
            module = held.get("self")
            if not isinstance(module, OptimizedModule) and all(module is not m for m in running):
                running.append(module)
        elif code.co_name == "compile_wrapper" and callable(held.get("fn")):
            function = held["fn"]
    return running[-1] if running else getattr(function, "__self__", function), running[::-1], function


def compilations() -> int:
    """How many compilations of the function that Dynamo compiles now count against its limit, this one too; 0 outside
    of Dynamo."""
    for _, held in _frames():
        if isinstance(counted := held.get("cache_size"), CacheSizeRelevantForFrame):
            return counted.num_cache_entries_with_same_id_matched_objs + 1
    return 0


_READ = "_call_impl", "compile_wrapper", "compile_fn", "_compile"
"""Functions of torch whose arguments say who called."""


def _frames() -> Iterator[tuple[Any, dict[str, Any]]]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_code, frame.f_locals if frame.f_code.co_name in _READ else {}
        frame = frame.f_back
