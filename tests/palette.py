"""The lossless law: when the tokens that get merged are equal, the merged model equals the original one.

A palette input is made of K random patches tiled at random over the grid, so that (positions aside) every merge finds
an equal partner, layer after layer. `equalize` takes the positions out of any model. `assert_lossless` is the law; it
tells three failures apart: `LossyMatch` (the test is void: unequal tokens were merged), a wrong report, a wrong result.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import tome_fx
from tests.models import Spec, complete, redraw

POSITION = re.compile(
    r"(^|\.|_)(pos_emb\w*|position_emb\w*|positional_emb\w*|pos_embedding\w*|embed_positions|rel_pos\w*|"
    r"relative_position_bias_table|cpb_mlp|continuous_position_bias_mlp|rel_attn_embed|linear_pos|wpe)(\.|$)"
)
"""Names of position embeddings and bias tables in timm, transformers, torchvision, open_clip and our models."""
ROTARY = re.compile(r"rope|rotary", re.IGNORECASE)
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
LAYER_SCALE = re.compile(r"(^|\.)(ls\d?|layer_?scale\w*)(\.\w+)*$|(^|\.)(gamma|lambda)_\d$")


class LossyMatch(AssertionError):
    """Tokens that are not equal were merged, so the law says nothing about this case. Not a bug of the rewrite."""


# -- inputs ----------------------------------------------------------------------------------------------------------


def palette_index(batch: int, count: int, k: int, generator: torch.Generator, run: int = 1) -> Tensor:
    """[batch, count] in 0..k-1, each sample its own; `run` neighbours share one value."""
    index = torch.randint(k, (batch, math.ceil(count / run)), generator=generator)
    return index.repeat_interleave(run, dim=1)[:, :count]


def palette_grid(
    batch: int, grid: Sequence[int], cell: Sequence[int], channels: int = 3, k: int = 4, seed: int = 0
) -> Tensor:
    """[batch, channels, *(grid * cell)]: K random cells tiled at random over an image (2-d) or a video (3-d grid)."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randn(batch, k, channels, *cell, generator=generator)
    index = palette_index(batch, math.prod(grid), k, generator)
    tiles = torch.stack([p[i] for p, i in zip(palette, index, strict=True)])
    d = len(grid)
    tiles = tiles.view(batch, *grid, channels, *cell)
    order = [0, d + 1, *(axis for i in range(d) for axis in (1 + i, d + 2 + i))]
    return tiles.permute(order).reshape(batch, channels, *(g * c for g, c in zip(grid, cell, strict=True)))


def palette_rows(batch: int, shape: Sequence[int], channels: int = 3, run: int = 1, seed: int = 0) -> Tensor:
    """[batch, channels, *shape], random along all axes but the last, `run` equal neighbours on the first of them."""
    generator = torch.Generator().manual_seed(seed)
    lead = [math.ceil(shape[0] / run), *shape[1:-1]]
    rows = torch.randn(batch, channels, *lead, 1, generator=generator).repeat_interleave(run, dim=2)
    return rows[:, :, : shape[0]].expand(batch, channels, *shape).contiguous()


def palette_image(batch: int, size: int, patch: int, k: int = 4, seed: int = 0, channels: int = 3) -> Tensor:
    """Square palette image [batch, channels, size, size]."""
    return palette_grid(batch, (size // patch,) * 2, (patch,) * 2, channels, k, seed)


def palette_tokens(batch: int, count: int, dim: int, k: int = 4, seed: int = 0, run: int = 1) -> Tensor:
    """[batch, count, dim] of K distinct random tokens; runs of `run` equal neighbours (for overlapping stems)."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randn(batch, k, dim, generator=generator)
    index = palette_index(batch, count, k, generator, run)
    return torch.stack([p[i] for p, i in zip(palette, index, strict=True)])


def palette_input(spec: Spec, k: int = 3, seed: int = 0) -> tuple[Tensor | None, ...]:
    """Palette inputs for a model of tests.models, with mask and second sequence where the spec wants them."""
    if spec.stem == "conv":
        x = palette_grid(spec.batch, spec.grid, (spec.patch, spec.patch), 3, k, seed)
    else:
        dim = spec.dim if spec.stem == "tokens" else 3 * spec.patch**2
        x = palette_tokens(spec.batch, spec.patches, dim, k, seed)
    return complete(spec, x, torch.Generator().manual_seed(seed + 1))


# -- models ----------------------------------------------------------------------------------------------------------


def equalize(model: nn.Module, seed: int | None = None, layer_scale: float = 0.5) -> nn.Module:
    """Make equal patches equal tokens, in place: positions zeroed, LayerScale raised. Returns the model in eval mode.

    Finds positions by name among parameters, buffers and plain tensor attributes. Rotary tables get the same row
    everywhere (zeros would zero the keys), rotary frequencies 0 and periods no end. `seed` also redraws all weights,
    so that every part is felt at the output.
    """
    if seed is not None:
        redraw(model, seed)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, CONVOLUTIONS):  # a patch embedding may stand inside what is called pos_embed
                continue
            rotary = ROTARY.search(type(module).__name__) or ROTARY.search(path.rpartition(".")[2])
            plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
            own = {**plain, **dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
            for name, value in own.items():
                full = f"{path}.{name}"
                if not value.is_floating_point():
                    continue
                if rotary and "period" in name:
                    value.fill_(1e30)
                elif rotary and (value.dim() == 1 or "freq" in name):
                    value.zero_()
                elif rotary:
                    value.copy_(value[:1].expand_as(value).clone())
                elif POSITION.search(full):
                    value.zero_()
                elif LAYER_SCALE.search(full):
                    value.fill_(layer_scale)
    return model.eval()


def wrap_convolutions(model: nn.Module) -> nn.Module:
    """Convolutions that pad by wrapping around, in place: along an axis on which the input does not vary, neither does
    what they make of it. Returns the model."""
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS) and module.padding_mode == "zeros":
            module.padding_mode = "circular"
    return model


# -- comparing -------------------------------------------------------------------------------------------------------


def said(caught: Iterable[Any]) -> list[str]:
    """What tome_fx warned of, among all warnings: other packages have theirs."""
    return [str(warning.message) for warning in caught if issubclass(warning.category, tome_fx.ToMeWarning)]


def levels() -> tuple[Any, ...]:
    """Everything global that a trace may enter."""
    return (
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        len(torch.overrides._get_current_function_mode_stack()),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        torch._C._functorch.get_inplace_requires_grad_allowed(),
    )


def leaves(out: Any) -> list[Tensor]:
    """Every tensor of a (nested) output, transformers' ModelOutput included."""
    if isinstance(out, dict):
        return [t for value in out.values() for t in leaves(value)]
    if isinstance(out, (list, tuple)):
        return [t for value in out for t in leaves(value)]
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def distance(got: Any, want: Any) -> float:
    """Largest |got - want| of any leaf, relative to that leaf's largest |want|; shapes and dtypes must agree."""
    a, b = leaves(got), leaves(want)
    assert len(a) == len(b) > 0, f"{len(a)} output tensors, expected {len(b)}"
    worst = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        same = (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        assert same, f"output {i}: {x.dtype} {tuple(x.shape)}, expected {y.dtype} {tuple(y.shape)}"
        assert all(bool(t.isfinite().all()) for t in (x, y)), f"output {i}: not finite"
        if x.numel():
            x, y = x.detach().double(), y.detach().double()
            worst = max(worst, ((x - y).abs().amax() / y.abs().amax().clamp_min(1e-6)).item())
    return worst


def lowest_similarity(trace: Any) -> float:
    """The lowest cosine at which any two tokens of a TokenTrace were merged; 1.0 when none was."""
    values = [m.similarity.min().item() for m in trace.merges if m.similarity.numel()]
    return min(values, default=1.0)


def compiled(model: nn.Module, r: Any, **config: Any) -> Callable[..., Any]:
    """The model under tome_backend, after a Dynamo reset so that no earlier graph is taken over."""
    torch._dynamo.reset()
    return torch.compile(model, backend=tome_fx.tome_backend(r, **{"inner": "eager", **config}))


def run(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None, r: Any, *, grad: bool = False, **config: Any
) -> tuple[Any, Any]:
    """(output, report) of the model under tome_backend, without gradients unless `grad`."""
    fast, before = compiled(model, r, **config), len(tome_fx.reports())
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        out = fast(*args, **(kwargs or {}))
    made = tome_fx.reports()[before:] if len(tome_fx.reports()) > before else tome_fx.reports()[-1:]
    assert made, "tome_fx.reports() has no report of the graph that was just compiled"
    return out, made[-1]


def _exact(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def in_float64(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A copy of a model, and its inputs."""
    return copy.deepcopy(model).double(), *tree_map(_exact, (tuple(args), kwargs or {}))


def is_rounding(
    error: float,
    want: Any,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None,
    r: Any,
    *,
    grad: bool = False,
    seen: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    **config: Any,
) -> bool:
    """Whether an error against float32's `want` is float32's own: in float64 the law holds to 1e-9, and `want` is at
    least a quarter as far from float64 (the variance of tokens that have become alike has no digits left).

    seen: what of an output counts."""
    exact, args, kwargs = in_float64(model, args, kwargs)
    with torch.set_grad_enabled(grad):
        truth = [seen(out) for out in leaves(exact(*args, **kwargs))]
    if error > 4 * distance([_exact(seen(out)) for out in leaves(want)], truth):
        return False
    merged = run(exact, args, kwargs, r, grad=grad, **config)[0]
    return distance([seen(out) for out in leaves(merged)], truth) < 1e-9


def untied(model: Any, args: Sequence[Any], kwargs: dict[str, Any] | None, r: Any, **config: Any) -> str:
    """What the tied law (`tome_fx.check`) finds wrong, or ""; a call costs as much as one more compilation."""
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", tome_fx.ToMeWarning)
        found = tome_fx.check(model, args, kwargs, r=r, effects=False, **config)
    return "" if found.holds and not found.notes else "; ".join([found.summary(), *found.notes])


def samples_apart(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None, r: Any, batch: int, **config: Any
) -> tuple[float | None, Any]:
    """(difference, report): how far a sample's merged result in a batch is from its result alone, relative to it.

    In float64, where no tie is broken by rounding. Outputs that mix samples without merging too (noise, a contrastive
    loss) do not count; None where all do.
    """
    model, *given = in_float64(model, args, kwargs)

    def fresh(given: Any) -> Any:
        """Inputs of their own for a call: a model may write to them."""
        torch.manual_seed(1)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)

    def eager(given: Any) -> list[Tensor]:
        args, kwargs = fresh(given)
        with torch.no_grad():
            return leaves(model(*args, **kwargs))

    def merged(given: Any) -> tuple[list[Tensor], Any]:
        out, report = run(model, *fresh(given), r, **config)
        return leaves(out), report

    want = eager(given)
    got, report = merged(given)
    worst: float | None = None
    for i in range(batch):
        alone = tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) and x.shape[:1] == (batch,) else x, given)
        try:
            single = eager(alone)
        except AssertionError:  # torch._check: it has a mask as long as the longest sample of its batch
            continue
        for whole, own, whole_merged, own_merged in zip(want, single, got, merged(alone)[0], strict=True):
            dims = [d for d, (n, m) in enumerate(zip(whole.shape, own.shape, strict=True)) if n != m]
            if len(dims) != 1 or whole.shape[dims[0]] != batch * own.shape[dims[0]]:
                continue
            a, b = (x.narrow(dims[0], i * own.shape[dims[0]], own.shape[dims[0]]) for x in (whole, whole_merged))
            if distance(a, own) < 1e-6:
                worst = max(worst or 0.0, distance(b, own_merged))
    return worst, report


def assert_lossless(
    model: nn.Module,
    args: Sequence[Any],
    r: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    tokens: list[tuple[int, int]] | None = None,
    sites: int | None = None,
    tol: float = 2e-5,
    control: bool = False,
    grad: bool = False,
    **config: Any,
) -> Any:
    """The law for one model whose inputs are palettes and whose positions are out; returns the report.

    tokens: the (before, after) of each merge that the report must show, but for those that nobody reads; sites: only
    their number. tol: the largest
    relative error, but where `is_rounding`. control=True proves that the test can fail: without log(size) the error
    must exceed 1e-4.
    grad: run with gradients on, which takes torch's own modules off their fused eval path.
    Raises LossyMatch when unequal tokens were merged.
    """
    with torch.set_grad_enabled(grad):
        want = model(*args, **(kwargs or {}))
    got, report = run(model, args, kwargs, r, grad=grad, **config)
    unread = unread_merges(report)
    assert report.merged_sites + unread > 0, f"nothing was merged:\n{report}"
    if tokens is not None:
        made = tokens[: len(tokens) - unread]
        assert [tuple(t) for t in report.tokens] == made, f"expected tokens {made}:\n{report}"
    if sites is not None:
        assert report.merged_sites + unread == sites, f"expected {sites} merges:\n{report}"
    error = distance(got, want)
    if error > tol:
        lowest = trace_similarity(model, args, kwargs, r, config)
        if lowest <= 1 - 1e-4:
            raise LossyMatch(f"lossy match, test is void: merged at cosine {lowest:.6f}, error {error:.2e}")
        assert is_rounding(error, want, model, args, kwargs, r, grad=grad, **config), (
            f"merging equal tokens (cosine {lowest:.7f}) changed the output by {error:.2e}:\n{report}"
        )
    if control:
        without = distance(run(model, args, kwargs, r, grad=grad, **{**config, "prop_attn": False})[0], want)
        assert without > 1e-4, f"the test cannot fail: without proportional attention the error is {without:.2e} too"
    return report


def unread_merges(report: Any) -> int:
    """Merges that are not made since nobody reads their tokens: the last, where a model is read at its class token."""
    return sum(reason.kind == "not read" for reason in report.skipped)


def trace_similarity(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None, r: Any, config: dict[str, Any]
) -> float:
    """Lowest similarity merged, from the rewritten graph's own provenance."""
    config = {k: v for k, v in config.items() if k not in ("inner", "strict")}
    return lowest_similarity(tome_fx.trace_tokens(model, tuple(args), kwargs, r=r, **config))
