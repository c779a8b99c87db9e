"""run: the compiled parts of a graph, called one after the other, and what AOTAutograd hears of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch._guards import TracingContext
from torch._inductor.codecache import FxGraphCache
from torch._inductor.output_code import OutputCode

from ..algebra.axes import expr


class Run(OutputCode):
    """The parts of a graph, called one after the other; a value is let go when its last reader has it.

    AOTAutograd stores it as it stores what Inductor compiles of a whole graph.
    """

    def __init__(
        self,
        inputs: Sequence[fx.Node],
        calls: Sequence[tuple[Any, Any]],
        outputs: Sequence[Any],
        number: Callable[[Any], int],
    ) -> None:
        """calls: what runs, and the `shared.Part` that it runs. number: what a size is in the call at hand."""
        super().__init__()
        self._boxed_call = True
        place: dict[Any, int] = {node: i for i, node in enumerate(inputs)}
        for _, part in calls:
            place |= {node: i for i, node in enumerate(part.gives, len(place))}
        constants = [x for x in outputs if not isinstance(x, fx.Node)]
        self.blank = [*[None] * (len(place) - len(inputs)), *constants]
        ends = iter(range(len(place), len(place) + len(constants)))
        self.outputs = [place[x] if isinstance(x, fx.Node) else next(ends) for x in outputs]
        self.strides = [_strides(x.meta.get("val"), number) if isinstance(x, fx.Node) else None for x in outputs]
        self.calls: list[tuple[Any, list[int], list[int], slice]] = []
        later = set(self.outputs)
        for run, part in reversed(calls):
            reads = [place[node] for node in part.reads]
            drops = [i for i in reads if i not in later]
            later.update(reads)
            first = place[part.gives[0]] if part.gives else 0
            self.calls.insert(0, (run, reads, drops, slice(first, first + len(part.gives))))

    def __call__(self, given: Any) -> list[Any]:
        values = [*given, *self.blank]
        given.clear()
        for run, reads, drops, gives in self.calls:
            inputs = [values[i] for i in reads]
            for i in drops:
                values[i] = None
            values[gives] = run(inputs)
        return [values[i] for i in self.outputs]

    def tell_strides(self) -> None:
        """Tell the tracing context the strides of the outputs, for the backward graph."""
        context = TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            context.output_strides.extend(self.strides)

    # -- in the cache of AOTAutograd -------------------------------------------------------------------------------

    def _each(self, change: Callable[[Any], Any]) -> None:
        """Change what runs, once for parts that share it."""
        made = {id(run): change(run) for run in {id(run): run for run, *_ in self.calls}.values()}
        self.calls = [(made[id(run)], *rest) for run, *rest in self.calls]

    def prepare_for_serialization(self) -> None:
        def stored(run: Any) -> Any:
            run = copy.copy(run)
            run.prepare_for_serialization()
            return run

        self._each(stored)

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """After it came out of the cache. Raises RuntimeError where code that it needs is not in the cache any more."""

        def loaded(run: Any) -> Any:
            graph, _ = FxGraphCache.cache_hit_post_compile(run, {}, constants)
            if graph is None:
                raise RuntimeError("the code of a graph is not in Inductor's cache any more")
            graph.post_compile([], constants, graph_kwargs)
            return graph

        with unheard():
            self._each(loaded)
        self.tell_strides()

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """There is none: parts are C++."""


def _strides(val: Any, number: Callable[[Any], int]) -> tuple[int, ...] | None:
    return tuple(number(expr(n)) for n in val.stride()) if isinstance(val, Tensor) else None


@contextmanager
def unheard() -> Iterator[Callable[[list[int]], None]]:
    """While parts are compiled the tracing context hears nothing of their outputs' strides. Gives a function that says
    which of a part's inputs may be overwritten."""
    context = TracingContext.try_get()
    if context is None:
        yield lambda places: None
        return
    strides, meta = context.output_strides, context.fw_metadata
    before = meta.bw_donated_idxs if meta is not None else None
    context.output_strides = None

    def donate(places: list[int]) -> None:
        if meta is not None:
            meta.bw_donated_idxs = places

    try:
        yield donate
    finally:
        context.output_strides = strides
        if meta is not None:
            meta.bw_donated_idxs = before
