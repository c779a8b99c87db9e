"""across: the groups that one call of a compiled model finds serve its next calls.

Of a compiled graph two more are made when they are first wanted: one that gives its groups out, and one that takes them
in and compares no tokens.

    finding:  x -> (y, *groups)        reusing:  (x, *groups) -> y
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tome_fx.passes.building.emit import drop_dead
from tome_fx.passes.capture import is_impure
from tome_fx.report import ToMeWarning


class reuse_across_calls:
    """Within `with reuse_across_calls(steps=4):` the groups that one call of a model finds serve its next three.

    For calls that see nearly the same tokens one after another: steps of a diffusion sampler, frames of a video. Models
    are those compiled with `tome_backend`, before or inside of it. Every `steps`-th call compares tokens; those between
    merge what it merged, and compare none (Token Merging for Stable Diffusion, arXiv 2303.17604, shares groups between
    the modules of one step; here they are shared between steps). Outside of it every call finds its own groups.

    Args:
        steps: how many calls have the same groups, the one that finds them included.
        calls: how often the model is called in each step, as with a conditional and an unconditional call: calls in the
            same place of a step share groups.

    A call of other shapes, and one of another model or module, has groups of its own. Two more graphs are compiled for
    each shape of inputs, at the first call and at the first that reuses. Samples of a batch must keep their places;
    before other samples say `restart()`:

        with tome_fx.reuse_across_calls(4) as reuse:
            for prompt in prompts:
                reuse.restart()
                sample(model, prompt)

    Holds in the thread that entered it; within another one the inner one holds. Raises ValueError for a number below
    1, and RuntimeError where it is entered twice at once. Warns (ToMeWarning) on leaving it where no model that merges
    was called.
    """

    def __init__(self, steps: int, *, calls: int = 1) -> None:
        for name, number in (("steps", steps), ("calls", calls)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be an int of 1 or more, got {number!r}")
        self.steps, self.calls = steps, calls
        self._turns: dict[Any, _Turns] = {}
        self._token: Token[reuse_across_calls | None] | None = None
        self._called = False

    def __enter__(self) -> reuse_across_calls:
        if self._token is not None:
            raise RuntimeError("this reuse_across_calls is entered already: make another one")
        self._token, self._called = _ACTIVE.set(self), False
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        assert self._token is not None
        _ACTIVE.reset(self._token)
        self._token = None
        self.restart()
        if kind is None and not self._called:
            warnings.warn(
                "reuse_across_calls had nothing to do: no model that merges tokens was called within it. Compile the "
                "model with backend=tome_backend(...), and call it inside of the with block.",
                ToMeWarning,
                stacklevel=2,
            )

    def restart(self) -> None:
        """Forget the groups: the next call of each model finds its own."""
        self._turns.clear()

    def _call(self, graph: Across, args: Sequence[Any]) -> Any:
        self._called = True
        shapes = tuple(map(_shape, args))
        # whose call it is: one graph may serve many modules, which differ in their parameters
        turns = self._turns.setdefault((graph, *shapes, *(x for x in args if isinstance(x, nn.Parameter))), _Turns())
        place = turns.count % self.calls
        if turns.count // self.calls % self.steps:
            found = graph.reusing(shapes, args, turns.groups[place])
        else:
            found, turns.groups[place] = graph.finding(shapes, args)
        turns.count += 1  # a call that raised has no turn
        return found


_ACTIVE: ContextVar[reuse_across_calls | None] = ContextVar("reuse_across_calls", default=None)


@dataclass
class _Turns:
    """The calls of one module so far, and the groups of each place in a step."""

    count: int = 0
    groups: dict[int, list[Tensor]] = field(default_factory=dict)


def _shape(x: Any) -> Any:
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x


class Across:
    """A compiled graph `run`, and what else is made of the graph it was. compile: (graph, inputs) -> callable."""

    def __init__(self, gm: fx.GraphModule, compile: Callable[[fx.GraphModule, Sequence[Any]], Callable]) -> None:
        self.gm, self.compile = copied(gm), compile
        self.run: Callable[..., Any] = gm.forward
        self.made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        reuse = _ACTIVE.get()
        return self.run(*args) if reuse is None else reuse._call(self, args)

    def finding(self, shapes: Any, args: Sequence[Any]) -> tuple[Any, list[Tensor]]:
        """What a call gives, and its groups."""
        if (shapes, True) not in self.made:
            self.made[shapes, True] = self.compile(giving(self.gm), args)
        found = self.made[shapes, True](*args)
        count = len(self.gm.graph.output_node().args[0])  # type: ignore[arg-type]
        return found[:count], [x.clone() for x in found[count:]]  # a replayed CUDA graph writes its outputs anew

    def reusing(self, shapes: Any, args: Sequence[Any], groups: Sequence[Tensor]) -> Any:
        """What a call gives with these groups."""
        if (shapes, False) not in self.made:
            self.made[shapes, False] = self.compile(taking(self.gm), [*args, *groups])
        return self.made[shapes, False](*args, *groups)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own, with the attributes and the meta of `gm`."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    found = graph.graph_copy(gm.graph, memo)
    graph.output(found)
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    for old, new in memo.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    made = fx.GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    return made


def groups_of(graph: fx.Graph) -> list[fx.Node]:
    """What is read of the results of each match."""
    return [user for node in graph.nodes if _finds(node) for user in node.users if user.target is operator.getitem]


def _finds(node: fx.Node) -> bool:
    """Whether an operator is one of ours that compares tokens."""
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and op.namespace == "tome" and op._opname.startswith("match")


def giving(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that gives its groups out behind its outputs."""
    made = copied(gm)
    out = made.graph.output_node()
    out.args = ((*out.args[0], *groups_of(made.graph)),)  # type: ignore[misc]
    made.recompile()
    return made


def taking(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that takes groups in behind its inputs, in the order in which `giving` gives them."""
    made = copied(gm)
    last = made.graph.find_nodes(op="placeholder")[-1]
    for i, node in enumerate(groups_of(made.graph)):
        with made.graph.inserting_after(last):
            last = made.graph.placeholder(f"tome_groups_{i}")
        last.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(last)
    drop_dead(made.graph, is_impure)
    made.recompile()
    return made


__all__ = ["Across", "reuse_across_calls"]
