"""Builds `cpu.cpp`: the CPU kernels of the `tome` operators, as operators of the namespace `tome_cpu`.

Inductor's C++ compiler builds them at first use (some two seconds, afterwards from Inductor's cache), and they register
themselves with the dispatcher, so that compiled code calls them without a way through Python. Where there is no
compiler `library()` is None and `tome_fx.ops` uses the ATen forms, which compute the same.

Arguments and results are those of the operators of the same names in `tome_fx.ops`. They carry no gradient.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

NAMESPACE = "tome_cpu"

DTYPES = frozenset({torch.float32, torch.bfloat16})
"""Floating dtypes that the kernels read and write."""

INDEX = "Tensor assign, Tensor keep, Tensor moved"
"""The arguments that an operator gets from a matching."""
SCHEMAS = {
    "match_size": "(Tensor metric, Tensor? size, SymInt r, int prefix, int suffix, bool heads=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "merge": f"(Tensor x, Tensor? size, Tensor size_out, {INDEX}) -> Tensor",
    "merge_add": f"(Tensor x, Tensor y, Tensor? size, Tensor size_out, {INDEX}) -> Tensor",
    "merge_bias": f"(Tensor x, Tensor? size, Tensor size_out, {INDEX}) -> Tensor",
    "merge_size": f"(Tensor? size, {INDEX}) -> Tensor",
    "merge_backward": f"(Tensor grad, Tensor? size, Tensor size_out, {INDEX}) -> Tensor",
    "unmerge": "(Tensor x, Tensor index) -> Tensor",
    "unmerge_backward": "(Tensor grad, Tensor index, SymInt groups) -> Tensor",
    "product": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
}
"""Those of `tome_fx.ops` too."""
PIECES = {"energy": "(Tensor metric, float margin) -> Tensor"}
"""Those that pieces of methods call themselves, with plain tensors."""

LONGEST = 8192
"""Products over more channels than this would read their panel of weights from beyond the second cache."""


@functools.cache
def has_products() -> bool:
    """Whether products in bfloat16 are ours: with the instruction for them, and without the tiles that ATen uses."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


# Inductor writes its loops with vector intrinsics and turns the compiler's own vectors off.
_FLAGS = ("-O3", "-march=native", "-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast")


def define(namespace: str) -> torch.library.Library:
    """A namespace of operators for `build` to fill, there as long as the result is."""
    made = torch.library.Library(namespace, "DEF")
    for name, schema in {**SCHEMAS, **PIECES}.items():
        made.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        made.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return made


_BUILDING = threading.Lock()


def library() -> Any | None:
    """`torch.ops.tome_cpu` with its kernels; None, with one line in the log, where they cannot be built."""
    with _BUILDING:
        return _library()


def prepare() -> None:
    """Start to build the kernels beside whatever comes next: one core is idle while a graph is compiled."""
    threading.Thread(target=library, name="tome_fx kernels", daemon=True).start()


@functools.cache
def _library() -> Any | None:
    return build(_FLAGS, NAMESPACE)


def build(flags: Sequence[str], namespace: str) -> Any | None:
    """Compile the kernels with more flags than Inductor's own, and register them in a namespace that `define` made.

    Returns the namespace, as an attribute of `torch.ops`; None where that is not possible.
    """
    from torch._inductor.codecache import CppCodeCache  # here: a second of imports
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = Path(__file__).with_name("cpu.cpp").read_text()
    try:
        held = CppCodeCache.load(source, extra_flags=tuple(flags))
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        log.warning("no C++ kernels, the ATen forms are used: %s", error)
        return None
    register = held.tome_register
    register.argtypes, register.restype = [ctypes.c_char_p], ctypes.c_bool
    if not register(namespace.encode()):
        log.warning("the C++ kernels could not be registered, the ATen forms are used")
        return None
    return getattr(torch.ops, namespace)
