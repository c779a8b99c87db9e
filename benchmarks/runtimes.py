"""Whether merging is as fast where a model is shipped to: merged over unmerged in the same runtime, on a CPU.

onnxruntime, OpenVINO (float32 hint), AOTInductor, and Inductor in Python as the measure: 0.90 of its ratio is asked
for. Each runtime in turn, merged and unmerged interleaved; writes results/runtimes-cpu.json after each row and goes on
where it was stopped.

    python benchmarks/runtimes.py [CASE ...] [--runtimes onnx openvino aoti] [--fresh]
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import harness
import tome_fx
from tome_fx import runtimes, timing
from tome_fx.export import write

GOAL = 0.90


def _timm(name: str, **options: Any) -> torch.nn.Module:
    import timm

    return timm.create_model(name, **options).eval()


def _whisper() -> torch.nn.Module:
    """The encoder of Whisper base at its full length, random weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048)
    encoder = WhisperEncoder(config).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, return_dict=False)[0]

    return Encoder().eval()


CASES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], int]] = {
    "vit_base_r16:8": (lambda: _timm("vit_base_patch16_224"), (8, 3, 224, 224), 16),
    "vit_small_512:2": (lambda: _timm("vit_small_patch16_224", img_size=512), (2, 3, 512, 512), 64),
    "whisper_base:1": (_whisper, (1, 80, 3000), 200),
}


def measured(case: str, runtime: str, rounds: int) -> dict[str, Any]:
    """Seconds of the unmerged and the merged model in one runtime."""
    make, shape, r = CASES[case]
    torch.manual_seed(0)
    model, x = make().requires_grad_(False), torch.randn(shape)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if runtime == "inductor":
            made = {"plain": torch.compile(model),
                    "merged": torch.compile(model, backend=tome_fx.tome_backend(r=r, placement="stream"))}  # fmt: skip
            runs: dict[str, Any] = {key: (lambda run=run: run(x)) for key, run in made.items()}
            error = None
        else:
            suffix = {"onnx": "onnx", "openvino": "xml", "aoti": "pt2"}[runtime]
            files = {key: Path(folder) / f"{key}.{suffix}" for key in ("plain", "merged")}
            write(torch.export.export(model, (x,), strict=False), runtime, files["plain"])
            program = tome_fx.export(model, (x,), r=r, placement="stream", format=runtime, path=files["merged"])
            runs = {key: runtimes.loaded(runtime, path, (x,)) for key, path in files.items()}
            error = runtimes.difference(runs["merged"](), program.module()(x))
        seconds = timing.interleaved(runs, rounds, warmup=2)
    return {"seconds": seconds, "speed": timing.ratio(seconds["merged"], seconds["plain"]), "error": error}


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("cases", nargs="*", help="default: all")
    options.add_argument("--runtimes", nargs="+", default=["inductor", "onnx", "openvino", "aoti"])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--fresh", action="store_true", help="measure again what has a result")
    args = options.parse_args()
    warnings.simplefilter("ignore")
    console, path = Console(), harness.result_path(args.out, "runtimes", "cpu")
    held = json.loads(path.read_text())["rows"] if path.exists() else {}
    for case in args.cases or CASES:
        for runtime in args.runtimes:
            key = f"{case} {runtime}"
            if (key in held and not args.fresh) or (runtime != "inductor" and runtimes.runtime_of(runtime) is None):
                continue
            try:
                held[key] = measured(case, runtime, args.rounds)
            except Exception as error:  # noqa: BLE001 - the row says what went wrong
                held[key] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            console.print(key, held[key].get("failed") or f"{held[key]['speed']:.2f}", highlight=False)
            result = {"benchmark": "runtimes", "machine": timing.machine_info("cpu"), "goal": GOAL, "rows": held}
            path.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("case", "runtime", "speed by merging", "of Inductor's", "error")
    for key, row in held.items():
        case, runtime = key.split()
        if "failed" not in row:
            of = row["speed"] / held[f"{case} inductor"]["speed"] if f"{case} inductor" in held else float("nan")
            error = f"{row['error']:.0e}" if row["error"] is not None else ""
            table.add_row(case, runtime, f"{row['speed']:.2f}", f"{of:.2f}", error)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
