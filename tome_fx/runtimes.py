"""Exported files in the runtimes that read them: what `tome-fx export` checks and times."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Run = Callable[[], list[Tensor]]


def runtime_of(format: str) -> str | None:
    """The package that runs a format here; None where it is not installed."""
    package = {"pt2": "torch", "aoti": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[format]
    return package if importlib.util.find_spec(package) else None


def size(path: Path) -> int:
    """Bytes of a file and of those that belong to it: weights beside an .xml or an .onnx."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")
    return sum(file.stat().st_size for file in (path, beside) if file.exists())


def loaded(format: str, path: Path, args: tuple[Any, ...]) -> Run:
    """A file as a call without arguments: its outputs for `args`, tensors that the model takes by position."""
    return LOADERS[format](path, args)


def _pt2(path: Path, args: tuple[Any, ...]) -> Run:
    module = torch.export.load(path).module()
    return lambda: tree_leaves(module(*args))


def _aoti(path: Path, args: tuple[Any, ...]) -> Run:
    run = torch._inductor.aoti_load_package(str(path))
    return lambda: tree_leaves(run(*args))


def _onnx(path: Path, args: tuple[Any, ...]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, tree_leaves(args), strict=True)}
    return lambda: [torch.from_numpy(x) for x in session.run(None, feed)]


def _openvino(path: Path, args: tuple[Any, ...]) -> Run:
    import openvino

    # Its CPU plugin computes float32 models in bfloat16 unless told otherwise.
    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # numpy has no bfloat16: such tensors cross as their bits.
    feed = [_shared(x, given.element_type) for x, given in zip(tree_leaves(args), model.inputs, strict=True)]
    dtypes = [torch.bfloat16 if out.element_type == openvino.Type.bf16 else None for out in model.outputs]
    return lambda: [_tensor(x, dtype) for x, dtype in zip(model(feed).values(), dtypes, strict=True)]


def _shared(x: Tensor, kind: Any) -> Any:
    """A tensor as OpenVINO takes it."""
    import openvino

    if x.dtype is not torch.bfloat16:
        return x.numpy()
    return openvino.Tensor(x.contiguous().view(torch.int16).numpy(), openvino.Shape(list(x.shape)), kind)


def _tensor(x: Any, dtype: torch.dtype | None) -> Tensor:
    """What OpenVINO gives as a tensor, of `dtype` where numpy has no such."""
    return torch.from_numpy(x) if dtype is None else torch.from_numpy(x.view("int16")).view(dtype)


LOADERS: dict[str, Callable[[Path, tuple[Any, ...]], Run]] = {
    "pt2": _pt2, "aoti": _aoti, "onnx": _onnx, "openvino": _openvino,
}  # fmt: skip


def difference(got: list[Tensor], want: Any) -> float:
    """The largest difference of the outputs, over the largest value of each; NaN where one is not finite alone."""
    pairs = zip(got, [x for x in tree_leaves(want) if isinstance(x, Tensor)], strict=True)
    return float(torch.stack([_difference(a.double(), b.double()) for a, b in pairs if b.numel()]).amax())


def _difference(got: Tensor, want: Tensor) -> Tensor:
    largest = want[want.isfinite()].abs().amax() if want.isfinite().any() else want.new_ones(())
    # Infinities of one sign are equal, and less each other no number.
    return (torch.where(got == want, 0.0, (got - want).abs()) / largest.clamp_min(1e-12)).amax()


__all__ = ["Run", "difference", "loaded", "runtime_of", "size"]
