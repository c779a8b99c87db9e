"""wrappers: a tensor subclass that keeps its values in plain tensors (a quantised weight: integers and their scale) is
opened, so that the graph has the plain tensors for inputs and the ops that the subclass makes of its own.

    linear(x, w: Int8Tensor)    ->    mul(mm(x, to(w.qdata)), w.scale)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..building.trace import flat
from .regions import retrace

Path = tuple[str, ...]
"""The attributes on the way to a plain tensor inside of a wrapper; () for a tensor that is none."""


def is_wrapper(value: Any) -> bool:
    """Whether AOTAutograd opens such a value too."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def opened(value: Any) -> list[tuple[Path, Any]]:
    """The plain tensors that a value is made of, each with its path; the value itself where it is no wrapper."""
    if not is_wrapper(value):
        return [((), value)]
    names, _ = value.__tensor_flatten__()
    return [((name, *path), leaf) for name in names for path, leaf in opened(getattr(value, name))]


def closed(like: Any, leaves: Iterator[Any]) -> Any:
    """The way back: a value made as `like` is, of the next tensors."""
    if not is_wrapper(like):
        return next(leaves)
    names, context = like.__tensor_flatten__()
    inner = {name: closed(getattr(like, name), leaves) for name in names}
    return type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())


def through(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A call as the plain ops that wrappers among its arguments, or a library's operator itself, make of it."""
    flat, form = tree_flatten((args, kwargs))
    moving = [isinstance(value, (Tensor, torch.SymInt)) for value in flat]
    results: list[Any] = []

    def run(*leaves: Any) -> list[Any]:
        rest = iter(leaves)
        given = [closed(value, rest) if move else value for value, move in zip(flat, moving, strict=True)]
        own, named = tree_unflatten(given, form)
        results[:] = tree_flatten(function(*own, **named))
        return [leaf for value in results[0] for _, leaf in opened(value)]

    leaves = [leaf for value, move in zip(flat, moving, strict=True) if move for _, leaf in opened(value)]
    found = iter(fx.Interpreter(retrace(run, leaves)).run(*leaves))
    made, shape = results
    return tree_unflatten([closed(value, found) for value in made], shape)


def holds_wrapper(args: Any, kwargs: Any) -> bool:
    return any(map(is_wrapper, flat((args, kwargs))))


def why_not(value: Any, varies: bool) -> str:
    """Why a wrapper cannot be opened; empty where it can."""
    kind = type(value).__name__
    if varies:
        return f"an input is a {kind}, a tensor subclass: only those that the model holds are opened"
    if value.requires_grad and torch.is_grad_enabled():
        return f"a {kind} that is trained, a tensor subclass: gradients do not pass through what it holds"
    return ""


def closed_input(gm: fx.GraphModule, plain: Sequence[fx.Node], paths: Sequence[Path]) -> fx.Node:
    """One input, a wrapper, in the place of those for the plain tensors in it."""
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    with gm.graph.inserting_before(plain[0]):
        whole = gm.graph.placeholder(f"{plain[0].name}_whole")
    for path, node in zip(paths, plain, strict=True):
        held = whole
        with gm.graph.inserting_before(first):
            for name in path:
                held = gm.graph.call_function(getattr, (held, name))
        held.meta.update(node.meta)
        node.replace_all_uses_with(held)
        gm.graph.erase_node(node)
    return whole


__all__ = ["Path", "closed", "closed_input", "holds_wrapper", "is_wrapper", "opened", "through", "why_not"]
