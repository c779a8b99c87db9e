"""Exported models in the runtimes that read them: how far the outputs of a file are from the program's.

One process for each model, so that a failure costs one row. Numbers that are there already are kept, refusals are
tried again; `--fresh` starts over. For each model, small and with random weights, in float32 on a CPU: the merged
model as a program (`tome_fx.export`), that program in each format, and each file in its runtime on one random input. A
cell is the largest difference from the program's outputs over the largest value of the output, or the sentence that a
format refuses with.

Writes benchmarks/results/export.json and the table between the marks in docs/export.md.

    python benchmarks/export.py [FILTER ...] [--fresh] [--page]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "export.json"
PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- begin: python benchmarks/export.py -->", "<!-- end -->"
GOAL = 1e-5
"""Largest relative difference that is asked for, in float32."""
LIMIT = 600
"""Seconds that one model may take."""
R = 8
FORMATS = {"pt2": ".pt2", "onnx": ".onnx", "openvino": ".xml", "aoti": ".pt2"}
"""Format -> suffix of its file, in the order of the table."""
NAMES = {"pt2": "torch.export", "onnx": "onnxruntime", "openvino": "OpenVINO", "aoti": "AOTInductor"}
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "timm", "torchvision", "transformers")
Row = dict[str, Any]
Made = tuple[Any, tuple[Any, ...]]
"""A model and its inputs."""


# -- models ------------------------------------------------------------------------------------------------------------


def _zoo(name: str) -> Made:
    """A model of benchmarks/zoo.py, of a few small blocks."""
    import zoo_models

    made = zoo_models.build(name)
    assert not made.kwargs, f"{name}: what a file takes is given by position"
    return made.model, made.args


def _timm(name: str, size: int = 112, **options: Any) -> Made:
    """A timm model of three blocks of 96 channels, or as its options say."""
    import timm
    import torch

    sizes = {"depth": 3, "embed_dim": 96, "num_heads": 3} if "depths" not in options else {}
    return timm.create_model(name, img_size=size, **{**sizes, **options}), (torch.randn(2, 3, size, size),)


def _mvit() -> Made:
    import torch
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg((1, 2), 48, stride_q=((1, 1), (2, 2)))
    return MultiScaleVit(config, img_size=112), (torch.randn(2, 3, 112, 112),)


def _torchvision() -> Made:
    import torch
    from torchvision.models import VisionTransformer

    return VisionTransformer(96, 16, 3, 3, 48, 96, num_classes=10), (torch.randn(2, 3, 96, 96),)


def _clip() -> Made:
    """Two towers and their product: the tokens of the image merge, those of the text see only what was before them."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    vision = {**sizes, "image_size": 96, "patch_size": 16}
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 40, "eos_token_id": 99, "bos_token_id": 98}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    words = torch.randint(3, 90, (2, 40))
    words[:, -1] = 99
    return model, (words, torch.randn(2, 3, 96, 96))


def _whisper() -> Made:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(d_model=48, encoder_layers=3, encoder_attention_heads=3, encoder_ffn_dim=96,
                           max_source_positions=64, num_mel_bins=16)  # fmt: skip
    return WhisperEncoder(config), (torch.randn(2, 16, 128),)


def _dit() -> Made:
    import models

    net = models.DiT((4, 32, 32), embed_dim=96, depth=3, num_heads=3)
    return net, models.inputs(net, 2)


MODELS: dict[str, Callable[[], Made]] = {
    "ViT (timm)": partial(_timm, "vit_tiny_patch16_224"),
    "DeiT, distilled (timm)": partial(_timm, "deit_tiny_distilled_patch16_224"),
    "DINOv2, registers (timm)": partial(_timm, "vit_small_patch14_reg4_dinov2"),
    "SigLIP (timm)": partial(_timm, "vit_base_patch16_siglip_224"),
    "EVA-02 (timm)": partial(_timm, "eva02_tiny_patch14_224"),
    "BEiT (timm)": partial(_timm, "beit_base_patch16_224"),
    "Swin (timm)": partial(_timm, "swin_tiny_patch4_window7_224", depths=(1, 2), num_heads=(2, 4), embed_dim=64),
    "MViTv2 (timm)": _mvit,
    "ViT (torchvision)": _torchvision,
    "DiT (benchmarks/models.py)": _dit,
    "CLIP, both towers (transformers)": _clip,
    "DINOv3 (transformers)": partial(_zoo, "transformers/dinov3_vit:sdpa"),
    "SAM (transformers)": partial(_zoo, "transformers/sam_vision:sdpa"),
    "Hiera (transformers)": partial(_zoo, "transformers/hiera:eager"),
    "SegFormer (transformers)": partial(_zoo, "transformers/segformer:sdpa"),
    "DPT (transformers)": partial(_zoo, "transformers/dpt:sdpa"),
    "VideoMAE (transformers)": partial(_zoo, "transformers/videomae:sdpa"),
    "TimeSformer (transformers)": partial(_zoo, "transformers/timesformer:eager"),
    "AST, spelled-out attention (transformers)": partial(_zoo, "transformers/ast:eager"),
    "Whisper encoder (transformers)": _whisper,
    "wav2vec 2.0 (transformers)": partial(_zoo, "transformers/wav2vec2:sdpa"),
    "BERT (transformers)": partial(_zoo, "transformers/bert:sdpa"),
}
"""Name -> how to make a model with its inputs; `one` draws its weights."""


# -- one model, in a process of its own --------------------------------------------------------------------------------


def one(name: str, held: Row) -> Row:
    """The row of one model; numbers that are held stay. Raises what torch.export and the passes raise."""
    import torch

    import tome_fx
    from tests.models import redraw

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, args = MODELS[name]()
    # Some libraries begin with zeros: their outputs would say nothing.
    model = redraw(model.eval(), 1).requires_grad_(False)
    placement = "auto"
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if not tome_fx.explain(model, args, r=R).merged_sites:
            placement = "branch"  # by the estimate for a CPU it does not gain at this size: exported all the same
        program = tome_fx.export(model, args, r=R, placement=placement)
        report = tome_fx.rewrite(model, args, r=R, placement=placement).meta["tome_report"]
        row: Row = {"placement": placement, "sites": report.attention_sites, "merged": report.merged_sites}
        row["aten"] = _core(program)
        for format, suffix in FORMATS.items():
            if "difference" in held.get(format, {}) and (format != "onnx" or held.get("operators")):
                row[format] = held[format]
                continue
            start = time.perf_counter()
            row[format] = _cell(program, format, Path(folder) / f"{format}{suffix}", args)
            if not row[format].get("difference", 1.0) <= GOAL:
                # Is it the merging, or the model itself?
                plain = torch.export.export(model, args, strict=False)
                row[format]["unmerged"] = _cell(plain, format, Path(folder) / f"plain{suffix}", args)
            row[format]["seconds"] = round(time.perf_counter() - start, 2)
        row["operators"] = _operators(Path(folder) / "onnx.onnx") or held.get("operators", "")
    return row


def _core(program: Any) -> str:
    """The core ATen ops of a program: what a compiler that reads those alone must know."""
    import torch

    targets = {n.target for n in program.run_decompositions().graph.nodes if n.op == "call_function"}
    return " ".join(sorted(str(t).removeprefix("aten.") for t in targets if isinstance(t, torch._ops.OpOverload)))


def _operators(path: Path) -> str:
    """The operators of an ONNX file, "" where there is none."""
    import onnx

    return " ".join(sorted({node.op_type for node in onnx.load(path).graph.node})) if path.exists() else ""


def _cell(program: Any, format: str, path: Path, args: Any) -> dict[str, Any]:
    """How far a format's runtime is from the program, or why there is no such file."""
    from tome_fx import runtimes
    from tome_fx.export import write

    if runtimes.runtime_of(format) is None:
        return {"error": "its runtime is not installed"}
    try:
        write(program, format, path)
        got = runtimes.loaded(format, path, args)()
    except Exception as error:  # noqa: BLE001 - the cell says what went wrong
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
    return {"difference": runtimes.difference(got, program.module()(*args))}


def _child(pipe: Any, name: str, held: Row) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        pipe.send(one(name, held))
    except Exception as error:  # noqa: BLE001 - the row says what went wrong
        pipe.send({"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"})


def run(name: str, held: Row) -> Row:
    """`one` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch._inductor.config", "transformers", "tome_fx"])
    start = time.perf_counter()
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, name, held))
    child.start()
    there.close()
    try:
        row = here.recv() if here.poll(LIMIT) else {"failed": f"took more than {LIMIT} s"}
    except EOFError:
        child.join()
        row = {"failed": f"its process ended with code {child.exitcode}"}
    child.kill()
    return {**row, "wall": round(time.perf_counter() - start, 1)}


# -- the page ----------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The part of docs/export.md that a result writes."""
    machine, versions = result["machine"], result["versions"]
    with_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"Written by `python benchmarks/export.py` on {machine['date'][:10]} ({machine['cpu']}; {with_versions}), "
        f"r={result['r']}, float32, random weights, batch 2: the largest difference from the program's outputs, over "
        f"the largest value of the output. At most {result['goal']:.0e} is asked for."
    )
    lines = [
        head,
        "",
        "| model | merged of sites | " + " | ".join(NAMES.values()) + " |",
        "|---|---|" + "---|" * len(NAMES),
    ]
    notes: list[str] = []
    for name, row in result["rows"].items():
        if "failed" in row:
            notes.append(row["failed"])
            lines.append(f"| {name} | not exported [{len(notes)}] |" + " |" * len(NAMES))
            continue
        asked = "" if row["placement"] == "auto" else ", branch"
        cells = []
        for format in NAMES:
            cell, plain = row[format], row[format].get("unmerged", {})
            if "error" in cell:
                too = " (so is the unmerged model)" if "error" in plain else ""
                notes.append(f"{cell['error']}{too}")
                cells.append(f"refused [{len(notes)}]")
                continue
            beside = f" (unmerged {shown(plain['difference'])})" if "difference" in plain else ""
            cells.append(shown(cell["difference"]) + beside)
        lines.append(f"| {name} | {row['merged']} of {row['sites']}{asked} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[{i}] {note}  " for i, note in enumerate(notes, 1))]
    return "\n".join(lines).strip()


def shown(difference: float) -> str:
    """A cell: bold where the goal is missed."""
    text = "0" if difference == 0 else f"{difference:.0e}"
    return text if difference <= GOAL else f"**{text}**"


def between(page: str) -> str:
    """What stands between the marks of a page."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def write_page(result: dict[str, Any]) -> None:
    """Put the table of a result between the marks."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """Measure what is missing and write the page; 1 where a model fails or misses the goal by merging."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="*", help="only models whose name holds one of these, again")
    parser.add_argument("--fresh", action="store_true", help="forget the rows there are")
    parser.add_argument("--page", action="store_true", help="write the page alone, from the JSON")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    from tome_fx import timing

    rows: dict[str, Row] = {}
    if RESULTS.exists() and not options.fresh:
        rows = json.loads(RESULTS.read_text())["rows"]
    chosen = [n for n in MODELS if (any(f in n for f in options.filter) if options.filter else missed(rows.get(n, {})))]
    for name in [] if options.page else chosen:
        rows[name] = run(name, {} if options.filter else rows.get(name, {}))
        print(name, json.dumps({k: v for k, v in rows[name].items() if k not in ("aten", "operators")}), flush=True)
        versions = {package: importlib.metadata.version(package) for package in PACKAGES if _installed(package)}
        result = {
            "benchmark": "export", "machine": timing.machine_info("cpu"), "versions": versions, "r": R, "goal": GOAL,
            "rows": {n: rows[n] for n in MODELS if n in rows},
        }  # fmt: skip
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    result = json.loads(RESULTS.read_text())
    write_page(result)
    return int(any("failed" in row or any(ours(row[f]) for f in FORMATS) for row in result["rows"].values()))


def ours(cell: dict[str, Any]) -> bool:
    """Whether a number misses the goal that the unmerged model keeps."""
    allowed = max(GOAL, 1.5 * cell.get("unmerged", {}).get("difference", 0.0))
    return "difference" in cell and not cell["difference"] <= allowed


def missed(row: Row) -> bool:
    """Whether a row is not there, has a failure, or a difference above the goal."""
    return any(not row.get(f, {}).get("difference", 1.0) <= GOAL for f in FORMATS)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
