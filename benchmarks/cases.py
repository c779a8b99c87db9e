"""Builds what the benchmarks time: a timm ViT in one of five variants, over the same weights and images."""

from __future__ import annotations

import timm
import torch
from torch import nn

from oracle import slice_oracle
from tome_fx import tome_backend
from tome_fx.timing import Case, Step
from tome_patch import tome_patch

LABELS = {
    "inductor": "Inductor",
    "tome_fx": "tome_fx",
    "oracle": "slice oracle",
    "patch": "patch, eager",
    "patch_compiled": "patch, compiled",
}
"""Variant -> what the tables call it."""

NOT_COMPILED = frozenset({"patch"})


def case(variant: str, model: str, r: int, size: int, batch: int, device: str = "cpu", dtype: str = "float32") -> Case:
    """The variant as a fresh process can build it. `size` in pixels, `batch` in images."""
    options = {"model": model, "r": r, "size": size, "batch": batch, "device": device, "dtype": dtype}
    return Case("cases:build", {"variant": variant, **options})


def build(variant: str, model: str, r: int, size: int, batch: int, device: str, dtype: str) -> Step:
    """One forward pass without gradients, as a function of no arguments; compiles, if at all, when first called."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    net = timm.create_model(model, img_size=size).eval().to(device, kind)
    images = torch.randn(batch, 3, size, size, device=device, dtype=kind)
    run = variant_of(net, variant, r)

    def step() -> object:
        with torch.no_grad():
            return run(images)

    return step


def variant_of(net: nn.Module, variant: str, r: int) -> nn.Module:
    """Apply a variant to a timm VisionTransformer, in place. Raises ValueError for an unknown one."""
    if variant == "inductor":
        return compiled(net)
    if variant == "tome_fx":
        return compiled(net, backend=tome_backend(r=r))
    if variant == "oracle":
        return compiled(slice_oracle(net, r))
    if variant == "patch":
        return tome_patch(net, r)
    if variant == "patch_compiled":
        return compiled(tome_patch(net, r))
    raise ValueError(f"no variant {variant!r}; there are {', '.join(LABELS)}")


def compiled(net: nn.Module, **options: object) -> nn.Module:
    """torch.compile without dynamic shapes: five variants share a code object, and must not make each other's inputs
    symbolic."""
    return torch.compile(net, dynamic=False, **options)  # type: ignore[call-overload]
