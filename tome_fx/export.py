"""A merged model that leaves Python: `export` to a program of plain ATen, ONNX, AOTInductor or OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tome_fx.explain import in_order, rewrite

FORMATS = ("pt2", "onnx", "aoti", "openvino")


def export(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    r: Any = None,
    dynamic_shapes: Any = None,
    format: str = "pt2",
    path: str | Path | None = None,
    **config: Any,
) -> torch.export.ExportedProgram:
    """The merged model as a program that needs no tome_fx, written to `path` where one is given.

    Args:
        args, kwargs: inputs, as for `model(*args, **kwargs)`.
        r, config: the keywords of `tome_backend`.
        dynamic_shapes: dims that stay free (a batch, a resolution), as `torch.export.export` takes them.
        format: of the file: "pt2" (`torch.export.load` reads it), "onnx" (needs onnx and onnxscript), "aoti"
            (`torch._inductor.aoti_load_package` reads it; compiled for this kind of machine) or "openvino" (an .xml
            and a .bin; needs openvino).
        path: the file; None writes none.

    Returns the program, whatever the format: `program.module()` runs it. Weights are the model's own until saved. Its
    outputs are those of the compiled model but for ties between equally similar pairs, which a runtime may break
    otherwise, and rounding.

    Raises ValueError for options that cannot leave Python (matchers of your own) and for another format, RuntimeError
    where nothing merges (with the reasons), ImportError naming the package that a format needs, and what torch.export
    raises where the model cannot be traced whole.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    gm = rewrite(model, args, kwargs, r=r, dynamic_shapes=dynamic_shapes, **config)
    report = gm.meta["tome_report"]
    if not report.merged_sites:
        raise RuntimeError(f"nothing to export: {report.summary()}")
    named = in_order(model, kwargs or {})
    program = torch.export.export(gm, tuple(args), named, dynamic_shapes=dynamic_shapes, strict=False)
    if path is not None:
        write(program, format, Path(path))
    return program


def write(program: torch.export.ExportedProgram, format: str, path: Path) -> None:
    """Write any exported program in one of `FORMATS`. Raises ImportError naming a package that the format needs."""
    WRITERS[format](program, path)


def _pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    _needs("onnxscript", "onnx")
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.save(str(path))


def _aoti(program: torch.export.ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def _openvino(program: torch.export.ExportedProgram, path: Path) -> None:
    _needs("openvino", "openvino")
    import openvino

    openvino.save_model(openvino.convert_model(program), str(path), compress_to_fp16=False)


def _needs(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ImportError(f"the format {extra} needs the package {module}: pip install 'tome-fx[export]'")


WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path], None]] = {
    "pt2": _pt2, "onnx": _onnx, "aoti": _aoti, "openvino": _openvino,
}  # fmt: skip

__all__ = ["FORMATS", "export", "write"]
