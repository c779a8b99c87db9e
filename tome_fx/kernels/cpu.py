"""Calls into `cpu.cpp`: the CPU kernels of the `tome` operators.

Inductor's C++ compiler builds them at first use (about a second, afterwards from Inductor's cache). `library()` is
None where there is no compiler; `tome_fx.ops` then uses the ATen forms, which compute the same.

Shapes are those of `tome_fx.ops` with all sample axes in one: `batch`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = frozenset({torch.float32, torch.bfloat16})
"""Floating dtypes that the kernels read and write."""

# Inductor writes its loops with vector intrinsics and turns the compiler's own vectors off.
_FLAGS = ("-O3", "-march=native", "-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast")

# Each function's arguments in order: p a pointer, i an int64.
_SIGNATURES = {
    "tome_match": "p" + 8 * "i" + "piii" + 6 * "p" + "i",
    "tome_merge": "ppi" + 6 * "p" + 5 * "i",
    "tome_merge_bias": "ppi" + 6 * "p" + 6 * "i",
    "tome_merge_size": 5 * "p" + 3 * "i",
}


_BUILDING = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one line in the log, where they cannot be built."""
    with _BUILDING:
        return _library()


def prepare() -> None:
    """Start to build the kernels beside whatever comes next: one core is idle while a graph is compiled."""
    threading.Thread(target=library, name="tome_fx kernels", daemon=True).start()


@functools.cache
def _library() -> ctypes.CDLL | None:
    return build(_FLAGS)


def build(flags: Sequence[str]) -> ctypes.CDLL | None:
    """The kernels, compiled with more flags than Inductor's own; None where they cannot be."""
    from torch._inductor.codecache import CppCodeCache  # here: a second of imports
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = Path(__file__).with_name("cpu.cpp").read_text()
    try:
        held = CppCodeCache.load(source, extra_flags=tuple(flags))
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        log.warning("no C++ kernels, the ATen forms are used: %s", error)
        return None
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    for name, letters in _SIGNATURES.items():
        function = getattr(held, name)
        function.argtypes, function.restype = [kinds[letter] for letter in letters], None
    return held


def match_size(metric: Tensor, size: Tensor | None, r: int, prefix: int, suffix: int) -> tuple[Tensor, ...]:
    """`tome::match_size` on `[batch, N, h, d]` of a dtype in `DTYPES`."""
    held = library()
    assert held is not None
    batch, n, heads, d = metric.shape
    if d > 1 and metric.stride(-1) != 1:
        metric = metric.contiguous()
    size = None if size is None else size.contiguous()
    new, index = functools.partial(torch.empty, dtype=torch.float32), functools.partial(torch.empty, dtype=torch.int64)
    assign, keep, moved, similarity = index((batch, n)), index((batch, n - r)), index((batch, r)), new((batch, r))
    size_out, log_size = new((batch, n - r)), new((batch, n - r))
    held.tome_match(metric.data_ptr(), metric.element_size(), batch, n, heads, d, *metric.stride()[:3], _pointer(size),
                    r, prefix, suffix, assign.data_ptr(), keep.data_ptr(), moved.data_ptr(), similarity.data_ptr(),
                    size_out.data_ptr(), log_size.data_ptr(), torch.get_num_threads())  # fmt: skip
    return assign, keep, moved, similarity, size_out, log_size


def merge_add(
    x: Tensor, y: Tensor | None, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor
) -> Tensor:
    """`tome::merge_add` of `x` and `y` (None: `tome::merge`), `[*sample, N, *rest]` of one dtype in `DTYPES`."""
    held = library()
    assert held is not None
    x, size_out, assign, keep, moved = (t.contiguous() for t in (x, size_out, assign, keep, moved))
    y, size = (None if t is None else t.contiguous() for t in (y, size))
    n, r = assign.shape[-1], moved.shape[-1]
    batch = assign.numel() // n
    out = x.new_empty((*keep.shape, *x.shape[assign.dim() :]))
    held.tome_merge(x.data_ptr(), _pointer(y), x.element_size(), _pointer(size), size_out.data_ptr(),
                    assign.data_ptr(), keep.data_ptr(), moved.data_ptr(), out.data_ptr(), batch, n, r,
                    prod(x.shape[assign.dim() :]), torch.get_num_threads())  # fmt: skip
    return out


def merge_bias(x: Tensor, size: Tensor | None, size_out: Tensor, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`tome::merge_bias` of `x` `[*sample, N, *rest]` of a dtype in `DTYPES`, read through its strides."""
    held = library()
    assert held is not None
    size_out, assign, keep, moved = (t.contiguous() for t in (size_out, assign, keep, moved))
    size = None if size is None else size.contiguous()
    n, r, lead = assign.shape[-1], moved.shape[-1], assign.dim() - 1
    samples, rest = _strided(x, 0, lead), _strided(x, lead + 1, x.dim())
    if len(samples) > 1 or len(rest) > 2:
        x = x.contiguous()
        samples, rest = _strided(x, 0, lead), _strided(x, lead + 1, x.dim())
    (batch, step_b), *_ = samples or [(1, 0)]
    (outer, step_o), (inner, step_i) = [*[(1, 0)] * (2 - len(rest)), *rest]
    steps = (ctypes.c_int64 * 4)(step_b, x.stride(lead), step_o, step_i)
    out = x.new_empty((*keep.shape, *x.shape[lead + 1 :]))
    held.tome_merge_bias(x.data_ptr(), ctypes.addressof(steps), x.element_size(), _pointer(size), size_out.data_ptr(),
                         assign.data_ptr(), keep.data_ptr(), moved.data_ptr(), out.data_ptr(), batch, n, r, outer,
                         inner, torch.get_num_threads())  # fmt: skip
    return out


def _strided(x: Tensor, start: int, stop: int) -> list[tuple[int, int]]:
    """(length, stride) of the dims from `start` to `stop`, as few as can address them; those of length 1 left out."""
    found: list[tuple[int, int]] = []
    for length, step in zip(x.shape[start:stop], x.stride()[start:stop], strict=True):
        if length == 1:
            continue
        if found and found[-1][1] == length * step:
            found[-1] = (found[-1][0] * length, step)
        else:
            found.append((length, step))
    return found


def merge_size(size: Tensor | None, assign: Tensor, keep: Tensor, moved: Tensor) -> Tensor:
    """`tome::merge_size`: float32 `[*sample, N']`."""
    held = library()
    assert held is not None
    assign, keep, moved = assign.contiguous(), keep.contiguous(), moved.contiguous()
    size = None if size is None else size.contiguous()
    n = assign.shape[-1]
    out = torch.empty(keep.shape, dtype=torch.float32)
    held.tome_merge_size(_pointer(size), assign.data_ptr(), keep.data_ptr(), moved.data_ptr(), out.data_ptr(),
                         assign.numel() // n, n, moved.shape[-1])  # fmt: skip
    return out


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
