"""Whether a graph is a whole model or a piece of one, and what is remembered of a model from piece to piece.

A piece does not show which tokens are special (the class token was put in front of them in another), nor how many
blocks come before and after it.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.eval_frame import OptimizedModule
from torch._guards import CompileContext, TracingContext

from tome_fx.passes.analysis.special import Before


@dataclass
class Model:
    """What is known of a model while its graphs are compiled: whether one had attention, whether the user was told.

    name: of what the user called. cut: why its graphs are pieces; empty for a model that is one graph. remedy: what to
    do about it. after: what each frame's graph told of the tokens that it gives out, by the number of the frame.
    """

    name: str = ""
    number: int = field(default_factory=itertools.count().__next__)
    attention: bool = False
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
    """A graph as a part of its model. last: no graph break ends it. frame: Dynamo's number of the code that it comes
    from. nth: which compilation of that code it is. shared: other modules of the model may run the same code."""

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
    owner, modules, asked = _owner()
    model = Model(name=getattr(owner, "__qualname__", type(owner).__qualname__) if owner is not None else "")
    if owner is not None:
        model = _MODELS.setdefault(owner, {}).setdefault(config, model)
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = reason is not None and reason.graph_break
    if not model.cut and (broken or reason is None or len(modules) > 1):
        model.cut, model.remedy = _cause(reason if broken else None, modules, asked)
    compiled = CompileContext.current_compile_id()
    frame, nth = (compiled.frame_id or 0, compiled.frame_compile_id or 0) if compiled is not None else (0, 0)
    return Piece(model, last=not broken, frame=frame, nth=nth, shared=len(modules) > 1)


def _cause(reason: Any, modules: list[torch.nn.Module], asked: Any) -> tuple[str, str]:
    """Why a graph is a piece of its model, and what to do. reason: of the graph break that ends it, if one does. asked:
    the module that torch.compile was asked for."""
    if any(type(held.get("self")).__name__ == "DDPOptimizer" for _, held in _frames()):
        cause = "torch.compile splits the graph at the gradient buckets of DistributedDataParallel"
        return cause, "Set torch._dynamo.config.optimize_ddp = False before the first call: it is one graph then"
    if reason is not None:
        remedy = "Compile the whole model as one graph (fullgraph=True shows what breaks it)"
        if "capture_scalar_outputs" in reason.reason:
            remedy = (
                "Set torch._dynamo.config.capture_scalar_outputs = True: numbers that are read from tensors stay in "
                "the graph then. Or pass them as Python numbers"
            )
        elif "data-dependent" in reason.reason.lower():
            remedy = (
                "Pass numbers that are read from tensors as Python numbers instead (lengths.tolist() before the "
                "call): the compiler knows them as sizes then"
            )
        return f"torch.compile breaks the graph {_where(reason)}", remedy
    if len(modules) < 2:
        return "the graph was split before it came here", "Hand the backend the whole graph"
    inner, outer = (type(m).__name__ for m in (modules[-1], modules[0]))
    cause = f"{inner} is compiled by itself, inside of {outer}"
    sharded = sys.modules.get("torch.distributed.fsdp")
    if sharded is not None and isinstance(modules[-1], sharded.FSDPModule):
        return f"{cause}, as fully_shard was applied to it", f"Apply fully_shard to {outer} alone: it is one graph then"
    if asked is modules[0]:
        cause = f"torch.compile gave up {outer} as a whole and compiles {inner} by itself"
        return cause, f"See what breaks {outer} (fullgraph=True says it)"
    return cause, f"Compile {outer} instead"


def _where(reason: Any) -> str:
    what = reason.reason.strip().splitlines()[0]
    if not reason.user_stack:
        return f"({what})"
    frame = reason.user_stack[-1]
    line = f" `{frame.line.strip()}`" if frame.line else ""
    return f"at {frame.filename}:{frame.lineno}{line} ({what})"


def _owner() -> tuple[Any, list[torch.nn.Module], Any]:
    """What the user called: the outermost module that runs, or the compiled function; the modules, outermost first,
    whose forward runs; and the module that was compiled."""
    running: list[Any] = []
    function = None
    for code, held in _frames():
        if code is torch.nn.Module._call_impl.__code__:
            module = held.get("self")
            if not isinstance(module, OptimizedModule) and all(module is not m for m in running):
                running.append(module)
        elif code.co_name == "compile_wrapper" and callable(held.get("fn")):
            function = held["fn"]
    asked = getattr(function, "__self__", function)
    return running[-1] if running else asked, running[::-1], asked


_READ = "_call_impl", "compile_wrapper", "compile_fn"
"""Functions of torch whose arguments say who called."""


def _frames() -> Iterator[tuple[Any, dict[str, Any]]]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_code, frame.f_locals if frame.f_code.co_name in _READ else {}
        frame = frame.f_back
