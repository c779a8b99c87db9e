"""capture: Dynamo's torch-level graph, or an exported module, to the one IR that all passes read.

The IR is pre-dispatch ATen with fake tensors in `meta["val"]`: still differentiable, with `linear`, `layer_norm` and
`scaled_dot_product_attention` whole. Two things are put straight on the way:

- fused inference ops (`nn.TransformerEncoderLayer`, `nn.MultiheadAttention` in eval mode) and `flex_attention`
  (`flex.py`) are spelled out, vmap becomes ops on whole tensors, regions that mean a call are inlined (`regions.py`);
- in-place writes become values, a write through a view becomes a scatter into its base.

    add_(x, pos)                    ->  x_1 = add(x, pos), later reads of x read x_1
    copy_(slice(x, 1, 1, N), y)     ->  x_1 = slice_scatter(x, y, 1, 1, N)

Invariants: placeholders are those of the source in order, preceded by one for each tensor attribute (`attributes`);
nothing but writes to graph inputs mutates, and those stand at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .building.emit import drop_dead
from .normal.composites import composites, is_composite
from .normal.functional import functionalise, is_impure
from .normal.fused import expansion
from .normal.idle import numbers
from .normal.regions import CaptureError, SpelledOut, cut_out, enters_vmap, retrace, vmap_stretch
from .normal.wrappers import Path, closed, holds_wrapper, is_wrapper, opened, through, why_not
from .normalize import normalize

aten = torch.ops.aten


@dataclass
class Captured:
    """The IR of one graph.

    gm: the graph module. fakes: one fake value per placeholder. attributes: tensor attributes and constants by name,
    for which the first `len(attributes)` placeholders stand. model_input: per placeholder, whether it varies from
    call to call. values: the real values of constant placeholders, parameters and buffers. opened: of each input of the
    graph that was captured, the paths to the plain tensors that stand for it (see `normal/wrappers.py`).
    """

    gm: fx.GraphModule
    fakes: list[Any]
    attributes: dict[str, Tensor]
    model_input: list[bool]
    fake_mode: FakeTensorMode
    values: dict[fx.Node, Tensor]
    opened: list[list[Path]]


def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Captured:
    """Trace `gm` on fake versions of `inputs` (tensors, SymInts, numbers). Raises CaptureError with a reason."""
    mode = mode_of(inputs)
    whole = _tensor_attributes(gm)
    values = [*(whole.values()), *inputs]
    if any(map(_is_distributed, values)):
        raise CaptureError("it has distributed tensors (DTensor, as tensor parallelism makes of weights)")
    placeholders = gm.graph.find_nodes(op="placeholder")
    moves = [_is_model_input(n, v) for n, v in zip(placeholders, inputs, strict=True)]
    for value, given in zip(values, [False] * len(whole) + moves, strict=True):
        if is_wrapper(value) and (why := why_not(value, given)):
            raise CaptureError(why)
    closed_fakes = [fakeify(v, mode) if isinstance(v, Tensor) else v for v in values]
    fakes = [leaf for fake in closed_fakes for _, leaf in opened(fake)]
    attributes = {".".join((name, *path)): leaf for name, value in whole.items() for path, leaf in opened(value)}
    leaves = [opened(value) for value in inputs]

    def run(*args: Any) -> Any:
        plain = iter(args)
        again = [closed(fake, plain) for fake in closed_fakes]
        held = dict(zip(whole, again[: len(whole)], strict=True))
        with torch._C._EnableTorchFunction():
            return _Tracer(gm, held).run(*again[len(whole) :], enable_io_processing=False)

    # make_fx asks each input twenty things, and its modes would see each of them.
    with _as_found(), mode, fx_traceback.preserve_node_meta(), torch._C.DisableTorchFunction():
        traced = make_fx(run, composites(), tracing_mode="real", pre_dispatch=True)(*fakes)
    # Left in place it makes AOTAutograd bypass its cache.
    traced.__dict__.pop("shape_env", None)
    drop_dead(traced.graph, is_impure)
    constants = _lift_constants(traced, mode)
    inside = traced.graph.find_nodes(op="placeholder")[len(constants) :]
    learned = [n for n, fake in zip(inside, fakes, strict=True) if isinstance(fake, Tensor) and fake.requires_grad]
    functionalise(traced, mode, learned)
    made = normalize(traced.graph, mode, is_impure)
    traced.recompile()
    held = {**constants, **attributes}
    varies = [False] * len(held) + [move for own, move in zip(leaves, moves, strict=True) for _ in own]
    inside = traced.graph.find_nodes(op="placeholder")
    real = [*held.values(), *(leaf for own in leaves for _, leaf in own)]
    known = {
        node: value
        for node, value, move in zip(inside, real, varies, strict=True)
        if type(value) in (Tensor, torch.nn.Parameter) and not move and not value.is_meta
    }
    single = {node: value for node, value in known.items() if value.numel() == 1 and not value.requires_grad}
    for node, value in numbers(traced.graph, {**made, **single}).items():
        if value.numel() == 1 and not value.is_complex():
            node.meta["held"] = value
    paths = [[path for path, _ in own] for own in leaves]
    return Captured(traced, [node.meta.get("val") for node in inside], held, varies, mode, known, paths)


@contextmanager
def _as_found() -> Iterator[None]:
    """Leave every level of functorch, the grad mode, saved-tensor hooks and autocast as they are now, though a trace
    ends within them."""
    depth, regions = torch._C._functorch.get_dynamic_layer_stack_depth(), len(_ENTERED)
    hooks, in_place = _hooks_off(), torch._C._functorch.get_inplace_requires_grad_allowed()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            while len(_ENTERED) > regions:
                _exit_autocast(_ENTERED[-1])
            if torch._C._functorch.get_dynamic_layer_stack_depth() > depth:
                torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            torch._C._functorch.set_inplace_requires_grad_allowed(in_place)
            if hooks is None:
                torch._C._autograd._saved_tensors_hooks_enable()
            else:
                torch._C._autograd._saved_tensors_hooks_disable(hooks)


def _hooks_off() -> str | None:
    """Why saved-tensor hooks are refused (torch.func.grad refuses them); None where they are not."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()


def _is_distributed(value: Any) -> bool:
    """Whether a tensor is spread over a mesh of devices; there is none where nobody has imported that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), FakeTensorMode(allow_non_fake_inputs=True))


def fakeify(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """Under the tracing context's fake mode: a second ShapeEnv would turn static dims into symbols."""
    if isinstance(value, FakeTensor):
        return value
    context = TracingContext.try_get()
    if context is not None and value in context.tensor_to_context:
        symbolic = context.tensor_to_context[value]
        return mode.from_tensor(value, static_shapes=False, symbolic_context=symbolic, source=symbolic.tensor_source)
    return mode.from_tensor(value, static_shapes=True)


def _tensor_attributes(gm: fx.GraphModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(value := _resolve(gm, node.target), Tensor):
            found.setdefault(node.target, value)
    return found


def _resolve(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _is_model_input(node: fx.Node, value: Any) -> bool:
    """Parameters and buffers do not vary from call to call; everything else may."""
    if isinstance(value, torch.nn.Parameter):
        return False
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return True
    try:
        guard = source.guard_source
        guard = guard() if callable(guard) else guard
    except NotImplementedError:  # synthetic sources have none
        return True
    return not (guard.is_specialized_nn_module() or guard.is_unspecialized_nn_module())


LISTED = 2**12
"""Elements of a constant that is read as numbers."""


def _lift_constants(gm: fx.GraphModule, mode: FakeTensorMode) -> dict[str, Tensor]:
    """Turn constants made while tracing into leading placeholders, so that a second trace can take them as inputs."""
    found: dict[str, Tensor] = {}
    first = next(iter(gm.graph.nodes))
    for node in list(gm.graph.find_nodes(op="get_attr")):
        held = _resolve(gm, node.target)
        if not isinstance(held, Tensor):
            continue
        real = held.constant if isinstance(held, FakeTensor) else held
        if real is None or torch._C._functorch.is_functorch_wrapped_tensor(held):
            shape = list(held.shape)
            raise CaptureError(f"a tensor {shape} is made outside of the graph's ops (by torch.func, or from .item())")
        with gm.graph.inserting_before(first):
            lifted = gm.graph.placeholder(f"constant_{len(found)}")
        lifted.meta["val"] = held if isinstance(held, FakeTensor) else mode.from_tensor(held, static_shapes=True)
        if real.numel() <= LISTED:
            lifted.meta["constant"] = real
        found[f"_tome_constant{len(found)}"] = real
        node.replace_all_uses_with(lifted)
        gm.graph.erase_node(node)
    return found


# -- tracing -----------------------------------------------------------------------------------------------------------


class _Tracer(fx.Interpreter):
    """Runs the source graph, spells out fused ops, inlines regions, refuses other higher-order ops."""

    def __init__(self, gm: fx.GraphModule, attributes: dict[str, Any]) -> None:
        super().__init__(gm)
        self.attributes = attributes

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":  # no node is made, so none needs a place in the model
            return self.placeholder(n.target, *self.fetch_args_kwargs_from_env(n))
        return self._vmapped(n) if enters_vmap(n) else super().run_node(n)

    def _vmapped(self, first: fx.Node) -> Any:
        """The nodes from here to the end of vmap, as plain ops on whole tensors."""
        stretch = vmap_stretch(first)
        body, inputs, outputs = cut_out(self.module, stretch)
        values = [self.env[n] if n in self.env else self.run_node(n) for n in inputs]
        plain = retrace(lambda *args: SpelledOut(body).run(*args, enable_io_processing=False), values)
        self.env.update(dict.fromkeys(stretch))
        self.env.update(zip(outputs, fx.Interpreter(plain).run(*values), strict=True))
        return self.env[first]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.attributes[target] if target in self.attributes else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in AUTOCAST_SWITCHES:
            return AUTOCAST_SWITCHES[target](*args)
        if getattr(target, "__name__", "").endswith("_increment_nesting"):  # vmap is a stretch of its own
            raise CaptureError("it takes derivatives inside (torch.func.grad, vjp, jvp, ...)")
        own = expansion(target) or target
        if own is target and isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(target, args, kwargs)
        if holds_wrapper(args, kwargs) or is_composite(own):
            return through(own, args, kwargs)
        return super().call_function(own, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if holds_wrapper(args, kwargs):
            return through(lambda own, *rest, **named: getattr(own, target)(*rest, **named), args, kwargs)
        return super().call_method(target, args, kwargs)

    def _region(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = target.name()
        if name == "tag_activation_checkpoint":
            body, *rest = args
            if "_checkpoint_context_fn" in body.meta:
                raise CaptureError("selective activation checkpointing (context_fn) is left as it is")
            _, own = target.divide_kwargs(kwargs)
            _mark_recompute(body)
            return self._inline(body, rest, own)
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *rest = args
            with torch.set_grad_enabled(enabled):
                return self._inline(body, rest, kwargs)
        if name == "wrap_with_autocast":
            device_type, dtype, enabled, cache, body, *rest = args
            with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache):
                return self._inline(body, rest, kwargs)
        if name in _REGIONS:
            return self._inline(*_REGIONS[name](*args, **kwargs), {})
        raise CaptureError(f"the graph holds the higher-order op {name}, which is left as it is")

    def _inline(self, body: fx.GraphModule, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs:
            raise CaptureError("a region that is called with keyword arguments is left as it is")
        return _Tracer(body, {}).run(*args, enable_io_processing=False)


# Regions that mean no more than a call of their body: what they are called with -> (body, operands).
_REGIONS: dict[str, Callable[..., tuple[fx.GraphModule, Sequence[Any]]]] = {
    "wrap": lambda body, *args: (body, args),
    "invoke_subgraph": lambda body, identifier, *args: (body, args),
    "hints_wrapper": lambda body, args, kwargs, hints: (body, args),
}


def _mark_recompute(body: fx.GraphModule) -> None:
    """Tag the region's nodes as torch.utils.checkpoint does, so that the partitioner still recomputes them."""
    from torch.utils.checkpoint import CheckpointPolicy

    for node in body.graph.nodes:
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["ac_graph_id"] = id(body)


_ENTERED: list[torch.autocast] = []
"""Regions that the graph being traced has entered and not left."""


def _enter_autocast(device: str, dtype: torch.dtype, enabled: bool, cache: bool) -> torch.autocast:
    """Really enter the region: a pre-dispatch trace only records the switch, and dtypes would be wrong."""
    region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
    region.__enter__()
    _ENTERED.append(region)
    return region


def _exit_autocast(region: torch.autocast) -> None:
    _ENTERED.remove(region)
    region.__exit__(None, None, None)


AUTOCAST_SWITCHES: dict[Any, Callable[..., Any]] = {
    torch.amp.autocast_mode._enter_autocast: _enter_autocast,
    torch.amp.autocast_mode._exit_autocast: _exit_autocast,
}


__all__ = ["AUTOCAST_SWITCHES", "CaptureError", "Captured", "capture"]
