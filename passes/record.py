"""record: the pre-dispatch trace of a plain graph, as make_fx gives it and in a third of its time.

make_fx carries every op through proxies, two torch-function modes and the flattening of its arguments, for the sake of
symbolic sizes, constants and functorch. A graph of tensors of fixed sizes needs none of it: what runs at the
pre-dispatch key is written down as it is.

Used by `capture`, which goes to make_fx where `Unrecorded` is raised.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _make_graph_module  # inside torch.compile it makes no code until some is read
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_autocast_cache,
    snapshot_fake,
)
from torch.fx.node import map_aggregate
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
_META = ("nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "from_node", "custom", "original_aten")
"""What a node keeps of the node it was traced from, besides `stack_trace`."""


class Unrecorded(Exception):
    """The graph holds something that is not simply an op on tensors of fixed sizes."""


def record(run: Callable[..., Any], fakes: Sequence[Any]) -> fx.GraphModule:
    """`run` on fake tensors as a graph with one placeholder for each of `fakes`. Raises Unrecorded."""
    if not all(isinstance(fake, FakeTensor) for fake in fakes):
        raise Unrecorded
    mode = _Recorder(fakes)
    with enable_python_dispatcher(), mode, disable_autocast_cache():
        out = run(*fakes)
    mode.graph.output(mode.nodes_of(out))
    return _make_graph_module(mode.constants, mode.graph)


class _Recorder(ProxyTorchDispatchMode):
    """Appends a node for every op; a tensor is known by the node that gave it last (itself, if written in place)."""

    def __init__(self, fakes: Sequence[Tensor]) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self.graph = fx.Graph()
        self.constants = torch.nn.Module()
        # A reference of ours would make some C++ factories return a copy.
        self.held: Any = WeakTensorKeyDictionary()
        for i, fake in enumerate(fakes):
            self._hold(fake, self.graph.placeholder(f"arg{i}_1"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            raise Unrecorded
        if func is aten.lift_fresh.default:  # of a constant, which must stay as it is
            func = aten.lift_fresh_copy.default
        name = self.graph._target_to_str(func.overloadpacket.__name__)
        node = self.graph.create_node("call_function", func, self.nodes_of(args), self.nodes_of(kwargs), name)
        out = func(*args, **kwargs)
        self._describe(node, func)
        self._hold(out, node)
        return out

    def nodes_of(self, values: Any) -> Any:
        return map_aggregate(values, self._node_of)

    def _node_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.held[value] if value in self.held else self._constant(value)
        if isinstance(value, torch.SymInt):
            raise Unrecorded
        return value

    def _constant(self, value: Tensor) -> fx.Node:
        """A tensor made outside of the graph's ops (`torch.tensor(1)`)."""
        if isinstance(value, FakeTensor) or type(value) is not Tensor:
            raise Unrecorded
        name = f"_tensor_constant{len(self.constants._buffers)}"
        self.constants.register_buffer(name, value)
        return self.graph.get_attr(name)

    def _describe(self, node: fx.Node, func: Any) -> None:
        current = fx_traceback.get_current_meta()
        node.meta = {key: current[key] for key in _META if key in current}
        node.meta["original_aten"] = func
        if "stack_trace" in current:
            node.stack_trace = current["stack_trace"]

    def _hold(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, Tensor):
            if value._has_symbolic_sizes_strides:
                raise Unrecorded
            node.meta["val"] = snapshot_fake(value)
            self.held[value] = node
        elif isinstance(value, (tuple, list)):
            node.meta["val"] = type(value)(snapshot_fake(v) if isinstance(v, Tensor) else v for v in value)
            for i, part in enumerate(value):
                read = self.graph.create_node("call_function", operator.getitem, (node, i), name="getitem")
                read.meta = {k: v for k, v in node.meta.items() if k != "val"}
                self._hold(part, read)
        else:
            node.meta["val"] = value
