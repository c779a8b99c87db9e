"""What the benchmarks time: a table of models and settings, the claims about each, and how to build its variants.

`python benchmarks/speed.py --list` prints the table. A variant is a row of the results: a key of `LABELS`, for a
compiled one with a mode of torch.compile after a plus sign ("tome_fx+reduce-overhead").
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

import models
from harness import Limit
from oracle import branch_oracle, slice_oracle
from tome_fx import timing, tome_backend
from tome_patch import tome_patch

LABELS = {
    "eager": "eager",
    "inductor": "Inductor",
    "tome_fx": "tome_fx",
    "oracle": "slice oracle",
    "patch": "patch, eager",
    "patch_compiled": "patch, compiled",
}
"""Variant -> what the tables call it."""

NOT_COMPILED = frozenset({"eager", "patch"})
WITH_MODES = ("inductor", "tome_fx", "oracle")
"""The variants that `--mode` adds a row for."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is merged.

    builder, options: a key of `models.BUILDERS` and its arguments. r, placement: as for `tome_backend`.
    batches: device type -> batch sizes, those that fit into 24 GiB and ten minutes on two CPU cores; train: device type
    -> batch of the training step, none where it does not fit. no_patch: why there is no row of the usual patch.
    """

    name: str
    group: str
    builder: str
    options: Mapping[str, Any]
    r: int
    placement: str = "auto"
    batches: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: {"cpu": (1, 8), "cuda": GPU})
    train: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rounds: int = 7
    limits: tuple[Limit, ...] = ()
    no_patch: str = ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run of a case. `device` is a type ("cpu", "cuda"), `batch` in samples."""

    case: str
    batch: int
    device: str = "cpu"
    dtype: str = "float32"
    train: bool = False

    @property
    def name(self) -> str:
        """The stem of its result files."""
        return f"{self.case}-b{self.batch}-{self.dtype}{'-train' if self.train else ''}"

    @property
    def limits(self) -> list[Limit]:
        """The claims about it."""
        return [limit for limit in (*CASES[self.case].limits, *EVERYWHERE) if limit.applies(self)]


GPU = (1, 32, 128)
SMALL = {"cpu": (1, 8, 32), "cuda": GPU}
LARGE = {"cpu": (1,), "cuda": GPU}
EVERYWHERE = (
    Limit("memory", 1.0, at_least=False, train=None),
    Limit("oracle", 0.90, train=True),
    Limit("oracle", 0.90, device="cuda"),
)
"""Claims about every case."""
LONG = (Limit("patch", 1.15, device="cpu"),)
"""Claims about cases of 1025 tokens or more for which there is a patch."""
NO_GRID = "the usual patch merges for good, and this model needs its grid"
NO_FRAMES = "the usual patch knows no frames"
LONGEST = 16384
NO_CONDITION = "patches of diffusion models match in another way: one random destination in each cell of the grid"


def near_oracle(batch: int) -> tuple[Limit, ...]:
    """The claims of issue 4 about a case's main batch, batch 1 and bfloat16 on a CPU."""
    main = Limit("oracle", 0.95, device="cpu", dtype="float32", batch=batch)
    one = Limit("oracle", 0.90, device="cpu", dtype="float32", batch=1)
    return (main, *((one,) if batch != 1 else ()), Limit("oracle", 0.90, device="cpu", dtype="bfloat16"))


def _image(name: str, model: str, size: int, r: int, **options: Any) -> Case:
    """A timm ViT over square images of `size` pixels."""
    return Case(name, "image", "vit", {"model": model, "img_size": size}, r, **options)


def _dit(tokens: int, **options: Any) -> Case:
    """DiT-B/2 over a latent of `tokens` patches, of which half merge in each branch; the largest has four blocks."""
    side = 2 * math.isqrt(tokens)
    fixed: dict[str, Any] = {"placement": "branch", "rounds": 5 if tokens < LONGEST else 3, "no_patch": NO_CONDITION}
    shape = {"input_shape": (4, side, side), **({} if tokens < LONGEST else {"depth": 4})}
    return Case(f"dit_base_{tokens}", "diffusion", "dit", shape, tokens // 2, **fixed, **options)


TABLE = (
    _image(
        "vit_small_512", "vit_small_patch16_224", 512, 64,
        batches={"cpu": (1, 2), "cuda": GPU}, train={"cpu": 2, "cuda": 32},
        limits=(*near_oracle(2), *LONG, Limit("cold", 1.5, at_least=False, device="cpu", dtype="float32", batch=2)),
    ),
    _image(
        "deit_small_r13", "deit_small_patch16_224", 224, 13, batches=SMALL, train={"cpu": 8, "cuda": 128},
        limits=(Limit("inductor", 1.5, device="cuda", batch=128),),
    ),
    _image("vit_base_r8", "vit_base_patch16_224", 224, 8, batches=SMALL),
    _image("vit_base_r13", "vit_base_patch16_224", 224, 13, batches=SMALL),
    _image(
        "vit_base_r16", "vit_base_patch16_224", 224, 16, batches=SMALL, train={"cpu": 8, "cuda": 128},
        limits=near_oracle(8),
    ),
    _image("vit_large_r8", "vit_large_patch16_224", 224, 8),
    _image("vit_base_384", "vit_base_patch16_384", 384, 23),
    _image(
        "vit_large_512", "vit_large_patch16_224", 512, 40, batches=LARGE, rounds=5,
        limits=(*LONG, Limit("inductor", 1.9, device="cuda", dtype="bfloat16")),
    ),
    _image(
        "vit_huge_518", "vit_huge_patch14_224", 518, 40, batches=LARGE, rounds=3,
        limits=(*LONG, Limit("inductor", 1.9, device="cuda", dtype="bfloat16")),
    ),
    Case(
        "video_large", "video", "encoder",
        {"input_shape": (3, 16, 224, 224), "kernel": (2, 16, 16), "embed_dim": 1024, "depth": 24, "num_heads": 16},
        65, batches={"cpu": (1,), "cuda": (1, 8, 32)}, train={"cuda": 8}, rounds=5, limits=(*near_oracle(1), *LONG),
    ),
    Case(
        "audio_base_512", "audio", "encoder",
        {"input_shape": (1, 128, 1024), "kernel": (16, 16), "num_classes": 527},
        40, train={"cpu": 4, "cuda": 32}, limits=near_oracle(8),
    ),
    Case(
        "ast_base_1212", "audio", "encoder",
        {"input_shape": (1, 128, 1024), "kernel": (16, 16), "stride": (10, 10), "prefix": 2, "num_classes": 527},
        40, rounds=5, limits=(*near_oracle(8), *LONG),
    ),
    Case(
        "sam_base_4096", "dense", "dense", {"input_shape": (3, 1024, 1024), "kernel": (16, 16)}, 2048,
        placement="branch", batches={"cpu": (1,), "cuda": (1, 8, 32)}, rounds=5, no_patch=NO_GRID,
    ),
    _dit(1024, train={"cpu": 2, "cuda": 32}),
    _dit(4096, batches={"cpu": (1,), "cuda": (1, 8, 32)}),
    _dit(16384, batches={"cpu": (1,), "cuda": (1, 8)}, limits=near_oracle(1)),
    Case(
        "alternating_16384", "video", "alternating",
        {"input_shape": (3, 16, 512, 512), "kernel": (1, 16, 16)}, 256,
        batches={"cpu": (1,), "cuda": (1, 8)}, rounds=3, limits=near_oracle(1), no_patch=NO_FRAMES,
    ),
)  # fmt: skip
CASES = {case.name: case for case in TABLE}


def plan(device: str) -> Iterator[Setting]:
    """Every setting that `speed.py --all` runs on a device type: all batches in its usual dtype, the middle one in the
    other dtype, and the training step."""
    usual, other = ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float32")
    for case in TABLE:
        batches = case.batches[device]
        yield from (Setting(case.name, batch, device, usual) for batch in batches)
        yield Setting(case.name, batches[len(batches) // 2], device, other)
        if device in case.train:
            yield Setting(case.name, case.train[device], device, usual, train=True)


def job(
    setting: Setting,
    variant: str,
    r: int | None = None,
    options: Mapping[str, Any] | None = None,
    backend: Mapping[str, Any] | None = None,
) -> timing.Case:
    """The variant as a fresh process can build it; `r` and `options`, where given, replace the case's, and `backend`
    holds more arguments of `tome_backend`."""
    own = {"r": r, "options": dict(options or {}), "backend": dict(backend or {})}
    return timing.Case("cases:build", {"variant": variant, **dataclasses.asdict(setting), **own})


def build(
    variant: str,
    case: str,
    batch: int,
    device: str,
    dtype: str,
    train: bool = False,
    r: int | None = None,
    options: Mapping[str, Any] | None = None,
    backend: Mapping[str, Any] | None = None,
) -> timing.Step:
    """One forward pass without gradients, or one training step, as a function of no arguments.

    It compiles, if at all, when first called. A training step is forward, backward and AdamW in `dtype` throughout.
    """
    what, kind = CASES[case], getattr(torch, dtype)
    original = _original(what.builder, json.dumps({**what.options, **(options or {})}), device, dtype)
    net = copy.deepcopy(original) if train else _sharing(original)
    torch.manual_seed(1)
    inputs = [x.to(device, kind) for x in models.inputs(original, batch)]
    given = {"r": what.r if r is None else r, "placement": what.placement, **(backend or {})}
    if isinstance(given["r"], list):
        given["r"] = tuple(given["r"])  # JSON, by which a fresh process gets its arguments, has no tuples
    run = variant_of(net.train(train), variant, **given)
    optimizer = torch.optim.AdamW(net.parameters()) if train else None

    def step() -> object:
        if optimizer is None:
            with torch.no_grad():
                return run(*inputs)
        loss = run(*inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@functools.lru_cache(maxsize=1)
def _original(builder: str, options: str, device: str, dtype: str) -> nn.Module:
    """The model that the variants of a case copy, so that all have the same weights; `options` as JSON."""
    torch.manual_seed(0)
    return models.BUILDERS[builder](**json.loads(options)).eval().to(device, getattr(torch, dtype))


def _sharing(net: nn.Module) -> nn.Module:
    """A copy of the modules over the same weights: six copies of the largest would not fit into memory."""
    return copy.deepcopy(net, {id(x): x for x in (*net.parameters(), *net.buffers())})


def tokens(case: Case) -> int:
    """How many tokens enter the first block, those of a prefix included."""
    with torch.device("meta"):
        net: Any = models.BUILDERS[case.builder](**case.options)
    patches = math.prod(net.grid) if hasattr(net, "grid") else net.patch_embed.num_patches
    return patches + net.num_prefix_tokens


def label(variant: str) -> str:
    """What the tables call a variant."""
    name, _, mode = variant.partition("+")
    return f"{LABELS[name]}, {mode}" if mode else LABELS[name]


def variant_of(net: nn.Module, variant: str, r: Any, placement: str = "auto", **backend: Any) -> nn.Module:
    """Apply a variant to a model, in place. backend: more arguments of `tome_backend`. Raises ValueError for an unknown
    one."""
    name, _, mode = variant.partition("+")
    options = {"mode": mode} if mode else {}
    if name == "eager":
        return net
    if name == "inductor":
        return compiled(net, **options)
    if name == "tome_fx":
        return compiled(net, backend=tome_backend(**{"r": r, "placement": placement, **backend}), **options)
    if name == "oracle":
        return compiled((branch_oracle if placement == "branch" else slice_oracle)(net, r), **options)
    if name == "patch":
        return tome_patch(net, r)
    if name == "patch_compiled":
        return compiled(tome_patch(net, r), **options)
    raise ValueError(f"no variant {variant!r}; there are {', '.join(LABELS)}")


def compiled(net: nn.Module, **options: Any) -> nn.Module:
    """torch.compile without dynamic shapes: five variants share a code object, and must not make each other's inputs
    symbolic."""
    return torch.compile(net, dynamic=False, **options)  # type: ignore[return-value]
