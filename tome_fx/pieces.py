"""Whether a graph is a whole model or a piece of one, and what is remembered of a model from piece to piece.

A piece does not show which tokens are special (the class token was put in front of them in another), nor how many
blocks come before and after it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.eval_frame import OptimizedModule
from torch._guards import TracingContext


@dataclass
class Model:
    """What is known of a model while its graphs are compiled: whether one had attention, whether the user was told."""

    attention: bool = False
    told: bool = False
    cut: str = ""
    """Why its graphs are pieces; empty for a model that is one graph."""


_MODELS: weakref.WeakKeyDictionary[Any, dict[Any, Model]] = weakref.WeakKeyDictionary()


@dataclass
class Piece:
    """A graph as a part of its model. last: no graph break ends it."""

    model: Model
    last: bool

    @property
    def cut(self) -> str:
        return self.model.cut


def piece_of(gm: fx.GraphModule, config: Any) -> Piece:
    """The place of a graph that Dynamo is about to compile. A graph from elsewhere is a whole model."""
    if TracingContext.try_get() is None:
        return Piece(Model(), last=True)
    owner, modules = _owner()
    model = Model()
    if owner is not None:
        model = _MODELS.setdefault(owner, {}).setdefault(config, model)
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = reason is not None and reason.graph_break
    if not model.cut:
        if broken:
            model.cut = f"torch.compile breaks the graph {_where(reason)}"
        elif reason is None:
            model.cut = "the graph was split before it came here, as torch._dynamo.config.optimize_ddp does"
        elif len(modules) > 1:
            model.cut = f"{modules[-1]} is compiled by itself, inside of {modules[0]}"
    return Piece(model, last=not broken)


def _where(reason: Any) -> str:
    what = reason.reason.strip().splitlines()[0]
    if not reason.user_stack:
        return f"({what})"
    frame = reason.user_stack[-1]
    line = f" `{frame.line.strip()}`" if frame.line else ""
    return f"at {frame.filename}:{frame.lineno}{line} ({what})"


def _owner() -> tuple[Any, list[str]]:
    """What the user called: the outermost module that runs, or the compiled function; and the modules, outermost first,
    whose forward runs."""
    running: list[Any] = []
    function = None
    for code, held in _frames():
        if code is torch.nn.Module._call_impl.__code__:
            module = held.get("self")
            if not isinstance(module, OptimizedModule) and all(module is not m for m in running):
                running.append(module)
        elif code.co_name == "compile_wrapper" and callable(held.get("fn")):
            function = held["fn"]
    owner = running[-1] if running else getattr(function, "__self__", function)
    return owner, [type(m).__name__ for m in reversed(running)]


def _frames() -> Iterator[tuple[Any, dict[str, Any]]]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_code, frame.f_locals if frame.f_code.co_name in ("_call_impl", "compile_wrapper") else {}
        frame = frame.f_back
