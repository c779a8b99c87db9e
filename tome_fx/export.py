"""A merged model that leaves Python: `export` to a program of plain ATen, ONNX, AOTInductor or OpenVINO."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tome_fx.explain import apart, in_order, rewritten_module
from tome_fx.passes import Target
from tome_fx.passes.analysis.sites import place

FORMATS = ("pt2", "onnx", "aoti", "openvino")
SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "openvino": ".xml"}
"""How the name of a file must end, where its reader cares."""
SHOWN = 3
"""Modules that a refusal lists."""
LOG_SIZES = {"pt2": "mask", "onnx": "column", "aoti": "mask", "openvino": "column"}
"""How log sizes join the scores of an attention: torch's kernels take a mask for nothing, runtimes that spell attention
out add it to the score of every pair (`benchmarks/runtimes.py`)."""


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
        path: the file; None writes none. Its name ends in .pt2 for pt2 and aoti, in .xml for openvino.

    Returns the program, whatever the format: `program.module()` runs it. Weights are the model's own until saved. Its
    outputs are those of the compiled model but for ties between equally similar pairs, which a runtime may break
    otherwise, and rounding.

    Raises ValueError for options that cannot leave Python (matchers of your own), for another format and for a file
    that it does not take; RuntimeError where nothing merges (with the reasons), and where the format has no form for
    an op, naming it and the modules that it stands in; ImportError naming the package that a format needs; and what
    torch.export raises where the model cannot be traced whole.
    """
    _check_target(format, path)
    gm, report = rewritten_module(model, args, kwargs, {"r": r, **config}, dynamic_shapes, Target(LOG_SIZES[format]))
    if not report.merged_sites:
        raise RuntimeError(f"nothing to export: {report.summary()}")
    given, named = apart((tuple(args), in_order(model, kwargs or {})))
    program = torch.export.export(gm, given, named, dynamic_shapes=dynamic_shapes, strict=False)
    if path is not None:
        write(program, format, Path(path))
    return program


def write(program: torch.export.ExportedProgram, format: str, path: Path) -> None:
    """Write any exported program in one of `FORMATS`. Raises what `export` raises of formats and files."""
    _check_target(format, path)
    try:
        WRITERS[format](program, path)
    except (ImportError, OSError):
        raise  # a package that is missing, a disk that is full: nothing of the model's
    except Exception as error:
        raise RuntimeError(_refusal(program, format, error)) from error


def _check_target(format: str, path: str | Path | None) -> None:
    """Before the work, not after it. Raises ValueError."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    suffix = SUFFIXES.get(format)
    if path is not None and suffix is not None and Path(path).suffix != suffix:
        raise ValueError(f"a file of the format {format} must end in {suffix}, got {str(path)!r}")


def _refusal(program: torch.export.ExportedProgram, format: str, error: BaseException) -> str:
    """One sentence: the op that a writer has no form for, and the modules of the model that it stands in."""
    messages = [*_messages(error)]
    first = next(iter(messages[0].strip().splitlines()), "")
    for calls in _calls(program):
        for message in messages:
            named = [n for n in calls if str(n.target) in message] or [n for n in calls if _says(message, n.target)]
            if named:
                why = "" if message is messages[0] or not first else f": {first}"
                return f"{format} has no form for {' and '.join(_where(named))}{why}"
    return f"{format} does not take this model: {first or type(error).__name__}"


def _where(nodes: Sequence[fx.Node]) -> Iterator[str]:
    """Each op of some nodes with the modules that it stands in."""
    found: dict[str, dict[str, None]] = {}
    for node in nodes:
        op = str(node.meta.get("original_aten") or node.target)  # what it was before a writer took it apart
        found.setdefault(op, {})[place(node) or "the model itself"] = None
    for op, places in found.items():
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        yield f"{op} (in {', '.join(list(places)[:SHOWN])}{more})"


def _messages(error: BaseException | None) -> Iterator[str]:
    """What an exception and its causes say, the innermost first: it knows what was the matter."""
    if error is not None:
        yield from _messages(error.__cause__ or error.__context__)
        yield str(error)


def _calls(program: torch.export.ExportedProgram) -> Iterator[list[fx.Node]]:
    """The ops of a program, then those that a writer may have taken it apart into."""
    yield [n for n in program.graph.nodes if n.op == "call_function"]
    apart = program.run_decompositions(dict(torch._decomp.decomposition_table))
    yield [n for n in apart.graph.nodes if n.op == "call_function"]


def _says(message: str, target: Any) -> bool:
    """Whether a message speaks of an op without its overload: `aten::foo` or `op='aten.foo'`."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = f"{target.namespace}(::|\\.){target._opname}"
    return re.search(rf"(?<![\w.:]){name}(?!\w)", message) is not None


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
    from openvino.frontend.pytorch import ConversionExtension

    reductions = [n.args[4] for n in program.graph.find_nodes(op="call_function", target=_SCATTER)]
    # Its reader of programs (2026.4.1) has no rule for this op, and does not show the reduction to one that is added.
    rules = [ConversionExtension(str(_SCATTER), _scatter_max)] if {*reductions} == {"amax"} else None
    model = openvino.convert_model(program, extension=rules)
    openvino.save_model(model, str(path), compress_to_fp16=False)


_SCATTER = torch.ops.aten.scatter_reduce.two


def _scatter_max(node: Any) -> Any:
    """`x.scatter_reduce(dim, index, values, "amax")` in OpenVINO."""
    from openvino import opset12

    x, dim, index, values = (node.get_input(i) for i in range(4))
    return opset12.scatter_elements_update(x, index, values, dim, reduction="max").outputs()


def _needs(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ImportError(f"the format {extra} needs the package {module}: pip install 'tome-fx[export]'")


WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path], None]] = {
    "pt2": _pt2, "onnx": _onnx, "aoti": _aoti, "openvino": _openvino,
}  # fmt: skip

__all__ = ["FORMATS", "export", "write"]
