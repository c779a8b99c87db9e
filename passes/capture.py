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

import operator
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from .axes import expr
from .emit import Emit
from .flex import flex_attention
from .normalize import normalize
from .regions import CaptureError, cut_out, enters_vmap, retrace, vmap_stretch
from .rules.base import tensors_of

aten = torch.ops.aten


@dataclass
class Captured:
    """The IR of one graph.

    gm: the graph module. fakes: one fake value per placeholder. attributes: tensor attributes and constants by name,
    for which the first `len(attributes)` placeholders stand. model_input: per placeholder, whether it varies from
    call to call. values: the real values of constant placeholders, parameters and buffers.
    """

    gm: fx.GraphModule
    fakes: list[Any]
    attributes: dict[str, Tensor]
    model_input: list[bool]
    fake_mode: FakeTensorMode
    values: dict[fx.Node, Tensor]


def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Captured:
    """Trace `gm` on fake versions of `inputs` (tensors, SymInts, numbers). Raises CaptureError with a reason."""
    mode = _fake_mode(inputs)
    attributes = _tensor_attributes(gm)
    values = [*(attributes.values()), *inputs]
    if any(map(_is_distributed, values)):
        raise CaptureError("it has distributed tensors (DTensor, as tensor parallelism makes of weights)")
    fakes = [_fakeify(v, mode) if isinstance(v, Tensor) else v for v in values]
    count = len(attributes)

    def run(*args: Any) -> Any:
        held = dict(zip(attributes, args[:count], strict=True))
        return _Tracer(gm, held).run(*args[count:], enable_io_processing=False)

    with _as_found(), mode, fx_traceback.preserve_node_meta():
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(*fakes)
    # Left in place it makes AOTAutograd bypass its cache.
    traced.__dict__.pop("shape_env", None)
    traced.graph.eliminate_dead_code(is_impure_node=is_impure)
    constants = _lift_constants(traced, mode)
    inside = traced.graph.find_nodes(op="placeholder")[len(constants) :]
    learned = [n for n, fake in zip(inside, fakes, strict=True) if isinstance(fake, Tensor) and fake.requires_grad]
    functionalise(traced, mode, learned)
    normalize(traced.graph, mode, is_impure)
    traced.recompile()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    held = {**constants, **attributes}
    varies = [False] * len(held) + [_is_model_input(n, v) for n, v in zip(placeholders, inputs, strict=True)]
    inside = traced.graph.find_nodes(op="placeholder")
    known = {
        node: value
        for node, value, moves in zip(inside, [*held.values(), *inputs], varies, strict=True)
        if type(value) in (Tensor, torch.nn.Parameter) and not moves and not value.is_meta
    }
    for node, value in known.items():
        if value.dim() == 0 and not isinstance(value, torch.nn.Parameter):
            node.meta["held"] = value
    return Captured(traced, [node.meta.get("val") for node in inside], held, varies, mode, known)


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


def _fake_mode(inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), FakeTensorMode(allow_non_fake_inputs=True))


def _fakeify(value: Tensor, mode: FakeTensorMode) -> Tensor:
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
        if real.numel() == 1:
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
        return self._vmapped(n) if enters_vmap(n) else super().run_node(n)

    def _vmapped(self, first: fx.Node) -> Any:
        """The nodes from here to the end of vmap, as plain ops on whole tensors."""
        stretch = vmap_stretch(first)
        body, inputs, outputs = cut_out(self.module, stretch)
        values = [self.env[n] if n in self.env else self.run_node(n) for n in inputs]
        plain = retrace(lambda *args: fx.Interpreter(body).run(*args, enable_io_processing=False), values)
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
        if (expansion := EXPANSIONS.get(target)) is not None:
            return expansion(*args, **kwargs)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(target, args, kwargs)
        return super().call_function(target, args, kwargs)

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


# -- fused inference ops -----------------------------------------------------------------------------------------------


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * e] -> [B, H, N, e]."""
    batch, n, dim = x.shape
    return x.reshape(batch, n, heads, dim // heads).transpose(1, 2)


def _fused_mask(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """The fused ops' mask as SDPA takes it (True is kept). Types: 0 [N, N], 1 [B, N] keys, 2 [B, H, N, N].

    The fused kernels read a mask of any dtype as bool, True (non-zero) is left out: so do we.
    """
    if mask is None:
        return None
    return torch.logical_not((mask[:, None, None, :] if mask_type == 1 else mask).to(torch.bool))


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`aten::_native_multi_head_attention`, spelled out."""
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    parts = zip((query, key, value), weights, biases, strict=True)
    q, k, v = (_heads(linear(x, w, b), num_head) for x, w, b in parts)
    allowed = _fused_mask(mask, mask_type)
    shown = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) * (embed_dim // num_head) ** -0.5
        if allowed is not None:
            scores = scores + torch.where(allowed, 0.0, float("-inf"))
        shown = scores.softmax(-1)
        out = shown @ v
        shown = shown.mean(1) if average_attn_weights else shown
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return linear(out.transpose(1, 2).reshape(query.shape), proj_weight, proj_bias), shown


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    ffn1_weight: Tensor,
    ffn1_bias: Tensor,
    ffn2_weight: Tensor,
    ffn2_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`aten::_transformer_encoder_layer_fwd`, spelled out; [B, N, D] in and out."""

    def norm1(x: Tensor) -> Tensor:
        return layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    def attend(x: Tensor) -> Tensor:
        out, _ = _multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )
        return out

    def feed_forward(x: Tensor) -> Tensor:
        hidden = linear(x, ffn1_weight, ffn1_bias)
        hidden = torch.nn.functional.gelu(hidden) if use_gelu else torch.relu(hidden)
        return linear(hidden, ffn2_weight, ffn2_bias)

    if norm_first:
        x = src + attend(norm1(src))
        return x + feed_forward(norm2(x))
    x = norm1(src + attend(src))
    return norm2(x + feed_forward(x))


def _stacked(dim: int, least: Callable[..., Any]) -> Callable[[Sequence[Tensor]], Tensor]:
    """hstack and its kin as the cat that they are."""

    def run(tensors: Sequence[Tensor]) -> Tensor:
        whole = [least(t) for t in tensors]
        return torch.cat(whole, min(dim, whole[0].dim() - 1))

    return run


_ROWS, _DEEP = _stacked(0, torch.atleast_2d), _stacked(2, torch.atleast_3d)
_COLUMNS = _stacked(1, lambda t: t.reshape(t.numel(), 1) if t.dim() < 2 else t)

EXPANSIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.hstack, aten.hstack.default), _stacked(1, torch.atleast_1d)),
    **dict.fromkeys((torch.vstack, torch.row_stack, aten.vstack.default, aten.row_stack.default), _ROWS),
    **dict.fromkeys((torch.dstack, aten.dstack.default), _DEEP),
    **dict.fromkeys((torch.column_stack, aten.column_stack.default), _COLUMNS),
    torch._native_multi_head_attention: _multi_head_attention,
    aten._native_multi_head_attention.default: _multi_head_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    torch.ops.higher_order.flex_attention: flex_attention,
    torch._C._autograd._get_data_attr: Tensor.detach,  # type: ignore[attr-defined]
}


# -- functionalisation -------------------------------------------------------------------------------------------------

_VIEW_SCATTER: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def is_impure(node: fx.Node) -> bool:
    """Nodes that must stay though nobody reads them: inputs, outputs, writes, and switches of global state."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or (
            torch.Tag.nondeterministic_seeded not in node.target.tags and (node.is_impure())
        )
    return node.target in _STATE_SWITCHES


_STATE_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._functorch._vmap_increment_nesting,
    torch._C._functorch._vmap_decrement_nesting,
}


def functionalise(gm: fx.GraphModule, mode: FakeTensorMode, learned: Collection[fx.Node] = ()) -> None:
    """Replace in-place ops by values (see the module docstring). Raises CaptureError where one has no such form.

    learned: the placeholders that gradients flow to.
    """
    emit = Emit(gm.graph, mode)
    _root_strided_views(emit)
    if not any(_mutated(node) for node in gm.graph.nodes):
        return
    _name_views(emit)
    _Functionaliser(emit, learned).run()
    gm.graph.lint()


def _mutated(node: fx.Node) -> list[str]:
    """Names of the arguments that a node writes to."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory a node's result shares."""
    own = node.meta.get("val")
    if node.op != "call_function" or not isinstance(own, Tensor):
        return None
    sources = node.all_input_nodes
    if node.target is operator.getitem:  # one of several views
        sources = sources[0].all_input_nodes
    for source in sources:
        held = source.meta.get("val")
        if isinstance(held, Tensor) and _storage(held) == _storage(own):
            return source
    return None


def _root_strided_views(emit: Emit) -> None:
    """`as_strided` reads memory as it lies: let it read a row of all elements in the order in which they lie now,
    whatever strides its operand will have.

        as_strided(x.mT, size, stride)    ->    as_strided(contiguous(reshape(x, [-1])), size, stride, 0)
    """
    for node in list(emit.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.as_strided.default, aten.as_strided_.default):
            continue
        root = node
        while (source := _viewed(root)) is not None:
            root = source
        held, own = root.meta["val"], node.meta["val"]
        if not _ints([*held.shape, *held.stride(), *own.shape, *own.stride(), own.storage_offset()]):
            raise CaptureError("as_strided of a tensor of dynamic shape is left as it is")
        order = sorted(range(held.dim()), key=lambda d: (held.stride(d), held.shape[d]), reverse=True)
        start = own.storage_offset() - held.storage_offset()
        last = start + sum((n - 1) * step for n, step in zip(own.shape, own.stride(), strict=True))
        if not _dense(held, order) or start < 0 or last >= held.numel():
            raise CaptureError("as_strided reads memory that its operand does not hold, and is left as it is")
        with emit.before(node):
            row = root if order == sorted(order) else emit(aten.permute.default, root, order)
            row = row if row.meta["val"].dim() == 1 else emit(aten.reshape.default, row, [-1])
            row = emit(aten.contiguous.default, row)
            view = emit(aten.as_strided.default, row, list(own.shape), list(own.stride()), start)
        node.replace_all_uses_with(view)
        emit.graph.erase_node(node)


def _ints(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _dense(value: Tensor, order: Sequence[int]) -> bool:
    """Whether the elements of a tensor lie one behind the other, its dims in that order."""
    step = 1
    for d in reversed(order):
        if value.shape[d] != 1 and value.stride(d) != step:
            return False
        step *= value.shape[d]
    return True


def _name_views(emit: Emit) -> None:
    """Views in one spelling: one of several results is a slice or a select, an op that changes its operand's shape
    in place gives a view of it.

        getitem(chunk(x, 2, -1), 1)    ->    slice(x, -1, 4, 8)
        unsqueeze_(x, 0)               ->    unsqueeze(x, 0)
    """
    for node in list(emit.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and (base := _viewed(node)) is not None:
            with emit.before(node):
                view = _one_of_several(emit, node, base)
            if view is not None:
                node.replace_all_uses_with(view)
                emit.graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.inplace_view in node.target.tags:
            node.target = _as_view(node.target)


def _one_of_several(emit: Emit, node: fx.Node, base: fx.Node) -> fx.Node | None:
    """The view that a result of chunk, split, unbind, ... is; None where it is none that has a name."""
    several, at = node.args
    assert isinstance(several, fx.Node) and isinstance(at, int)
    views, held, own = several.meta["val"], base.meta["val"], node.meta["val"]
    if several.args[0] is not base or not _ints([*own.shape, *held.shape, *own.stride(), *held.stride()]):
        return None
    if several.target is aten.unbind.int:
        return emit(aten.select.int, base, *several.args[1:] or (0,), at)
    if own.dim() != held.dim() or own.stride() != held.stride():
        return None
    cut = [d for d in range(own.dim()) if own.shape[d] != held.shape[d]] or [0]
    if len(cut) > 1 or not held.numel():
        return None
    start = sum(view.shape[cut[0]] for view in views[:at]) if own.shape != held.shape else 0
    if own.storage_offset() != held.storage_offset() + start * held.stride(cut[0]):
        return None
    return emit(aten.slice.Tensor, base, cut[0], start, start + own.shape[cut[0]])


def _as_view(target: Any) -> Any:
    """The op that gives as a view what an in-place view op makes of its operand."""
    space, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name.rstrip("_"), None)
    wanted = [str(a.type) for a in target._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        taken, given = found._schema.arguments, found._schema.returns
        if [str(a.type) for a in taken] == wanted and given[0].alias_info is not None and not found._schema.is_mutable:
            return found
    raise CaptureError(f"the in-place op {target._schema.name} has no form that returns a view")


class _Functionaliser:
    """Walks the graph once. Identity is by the nodes of the graph as it was: `value[n]` is what n holds by now,
    `parent[n]` the node that n is a view of, `last[n]` the last place at which n, or a view of it, is read, `learned`
    holds the nodes that gradients flow to, `unclear` the views whose first operand is not what they are a view of."""

    def __init__(self, emit: Emit, learned: Collection[fx.Node]) -> None:
        self.graph, self.emit = emit.graph, emit
        self.learned, self.grad = set(learned), torch.is_grad_enabled()
        self.unclear: set[fx.Node] = set()
        self.value: dict[fx.Node, fx.Node] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.written: dict[fx.Node, None] = {}
        self.at = {node: i for i, node in enumerate(self.graph.nodes)}
        self.last: dict[fx.Node, int] = {}

    def run(self) -> None:
        in_place = []
        viewed = {node: _viewed(node) for node in self.at}
        self.unclear = {n for n, source in viewed.items() if source is not None and n.args[0] is not source}
        self.last = {node: max([self.at[user] for user in node.users], default=-1) for node in self.at}
        for node in reversed(self.at):
            if (source := viewed[node]) is not None:
                self.last[source] = max(self.last[source], self.last[node])
        for node in self.at:
            source = viewed[node]
            if node.op == "output":
                with self.emit.before(node):
                    for placeholder in self.written:
                        self.emit(aten.copy_.default, placeholder, self.value[placeholder])
            if node.target is torch._C._set_grad_enabled:
                self.grad = bool(node.args[0])
            if self._learns(node):
                self.learned.add(node)
            names = _mutated(node)
            target = node.args[0] if names else None
            node.args = fx.map_arg(node.args, self._now)
            node.kwargs = fx.map_arg(node.kwargs, self._now)
            if target is not None:
                in_place.append(node)
                with self.emit.before(node):
                    self._write(node, target, names)
            elif source is not None:
                self.parent[node] = source
        for node in reversed(in_place):
            self.graph.erase_node(node)

    def _learns(self, node: fx.Node) -> bool:
        """Whether gradients flow through a node's result to a learned one."""
        if not self.grad or node.target is aten.detach.default or node.op != "call_function":
            return False
        floats = any(v.is_floating_point() or v.is_complex() for v in tensors_of(node.meta.get("val")))
        return floats and any(n in self.learned for n in node.all_input_nodes)

    def _now(self, node: fx.Node) -> fx.Node:
        return self.value.get(node, node)

    def _write(self, node: fx.Node, target: Any, names: list[str]) -> None:
        """Give `target` the value that the in-place `node` writes, and its base and other views what follows."""
        schema = _schema(node)
        if len(names) != 1 or schema.arguments[0].name != names[0] or not isinstance(target, fx.Node):
            raise CaptureError(f"the in-place op {schema.name} writes to more than its first argument")
        views = list(self.parent)
        self.value[target] = self._functional(node, target)
        self.parent[node] = target
        done, base = {target}, target
        while (up := self.parent.get(base)) is not None:
            self.value[up] = self._scatter(base, self._now(up), self._now(base))
            base = up
            done.add(base)
        if base in self.learned and not (self.grad and target in self.learned):  # autograd does not see it
            raise CaptureError(f"a write past gradients ({schema.name} under no_grad or .detach()) is left as it is")
        for view in (*views, node):
            # What nobody reads any more need not be taken anew: a mask written piece by piece has many such views.
            if view not in done and self.parent[view] in done and self.last[view] > self.at[node]:
                self.value[view] = self._again(view, self._now(self.parent[view]))
                done.add(view)
        if node in self.learned:
            self.learned.update(done)
        if base.op == "placeholder":
            self.written[base] = None

    def _functional(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The new value of the target of an in-place op."""
        schema = _schema(node)
        held = target.meta["val"]
        if node.target is aten.copy_.default:
            out: Any = node.args[1]
            given = out.meta["val"]
            if given.device != held.device:
                out = self.emit(aten.to.device, out, held.device, held.dtype)
            elif given.dtype != held.dtype:
                out = self.emit(aten.to.dtype, out, held.dtype)
            return self.emit(aten.expand_as.default, out, target) if out.meta["val"].shape != held.shape else out
        space, name = schema.name.split("::")
        packet = getattr(getattr(torch.ops, space), _FUNCTIONAL.get(name, name.rstrip("_")), None)
        overload = getattr(packet, schema.overload_name or "default", None)
        overload = _FUNCTIONAL_OVERLOAD.get(node.target, overload)
        if overload is None or overload._schema.is_mutable:
            raise CaptureError(f"the in-place op {schema.name} has no form that returns a new value")
        out = self.emit(overload, *node.args, **node.kwargs)
        return self.emit(aten.to.dtype, out, held.dtype) if out.meta["val"].dtype != held.dtype else out

    def _again(self, view: fx.Node, base: fx.Node) -> fx.Node:
        """A view taken anew of its base; the result of an in-place op is its target."""
        if _mutated(view):
            return base
        self._check_view(view)
        return self.emit(view.target, base, *view.args[1:], **view.kwargs)

    def _scatter(self, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        """The base after `value` was written through one view of it."""
        if _mutated(view):
            return value
        self._check_view(view)
        if view.target in _VIEW_SCATTER:
            return self.emit(_VIEW_SCATTER[view.target], base, value, *view.args[1:], **view.kwargs)
        held = base.meta["val"]
        with self.emit.mode, torch.no_grad():  # what the op does to a tensor that lies in order
            whole = held.new_empty(held.shape)
            rest = fx.map_arg((view.args[1:], view.kwargs), lambda n: n.meta["val"])
            taken = view.target(whole, *rest[0], **rest[1])  # type: ignore[operator]
        order = _permutation(whole, taken)
        if order is not None:
            return self.emit(aten.permute.default, value, order) if order != sorted(order) else value
        if not _ints(held.shape) or taken.dtype != held.dtype or taken.is_conj() or taken.is_neg():
            raise CaptureError(f"a write through the view {view.target} is left as it is")
        if (cut := _cut(whole, taken)) is not None:
            return self.emit(aten.slice_scatter.default, base, value, *cut)
        row, shape = [-1], list(held.shape)
        if not (taken.is_contiguous() and taken.numel() == whole.numel()):
            place = self.emit(aten.arange.default, held.numel(), device=held.device)
            place = self.emit(aten.reshape.default, place, shape)
            place = self.emit(view.target, place, *view.args[1:], **view.kwargs)
            flat = [self.emit(aten.reshape.default, x, row) for x in (base, place, value)]
            value = self.emit(aten.scatter.src, flat[0], 0, flat[1], flat[2])
        return self.emit(aten.reshape.default, value, shape)

    def _check_view(self, view: fx.Node) -> None:
        if view in self.unclear:
            several = view.args[0] if view.target is operator.getitem else view
            raise CaptureError(f"a write to a tensor of which {several.target} gives a view is left as it is")  # type: ignore[union-attr]


def _cut(whole: Tensor, taken: Tensor) -> tuple[int, int, int, int] | None:
    """The slice (dim, start, stop, step) that `taken` is of a tensor that lies in order, if it is one."""
    if taken.dim() != whole.dim():
        return None
    other = [d for d in range(whole.dim()) if taken.shape[d] != whole.shape[d] or taken.stride(d) != whole.stride(d)]
    if len(other) != 1 or not taken.numel():
        return None
    (d,) = other
    start, step = int(taken.storage_offset()) // whole.stride(d), taken.stride(d) // whole.stride(d)
    if step < 1 or (start * whole.stride(d), step * whole.stride(d)) != (taken.storage_offset(), taken.stride(d)):
        return None
    return d, start, start + (taken.shape[d] - 1) * step + 1, step


def _permutation(whole: Tensor, taken: Tensor) -> list[int] | None:
    """Where each dim of `whole` stands in `taken`, if `taken` is the same elements with the dims in another order."""
    if taken.dim() != whole.dim() or taken.dtype != whole.dtype or expr(taken.storage_offset()) != 0:
        return None
    places = [(expr(n), expr(s)) for n, s in zip(taken.shape, taken.stride(), strict=True)]
    order: list[int] = []
    for n, s in zip(whole.shape, whole.stride(), strict=True):
        free = [d for d, (size, step) in enumerate(places)
                if d not in order and size == expr(n) and (size == 1 or step == expr(s))]  # fmt: skip
        if not free:
            return None
        order.append(free[0])
    return order


def _schema(node: fx.Node) -> Any:
    return node.target._schema  # type: ignore[union-attr]


_FUNCTIONAL = {"zero_": "zero", "fill_": "fill", "normal_": "normal_functional", "uniform_": "uniform"}
_FUNCTIONAL_OVERLOAD: dict[Any, Any] = {aten.bernoulli_.float: aten.bernoulli.p}


__all__ = ["EXPANSIONS", "CaptureError", "Captured", "capture", "functionalise", "is_impure"]
