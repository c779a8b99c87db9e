"""What sharing groups between calls costs in fidelity and saves in time: `tome_fx.reuse_across_calls`.

frames: DINOv2 ViT-S/14 with its trained weights on frames of real clips that follow one another, merged on the stream;
how far the class token is from the unmerged model's. sampler: a DiT of the size of DiT-B with random weights, merged in
branches, on the latents of an Euler sampler, whose steps see nearly the same tokens; how far its outputs are from the
unmerged model's on the same latents, and time with Inductor, interleaved. Random weights say little of how pictures
look. Writes results/reuse-cpu.json and prints the tables of docs/measured.md.

    python benchmarks/reuse.py [--frames 24] [--rounds 5] [--no-speed]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import harness
import models
import tome_fx
from tome_fx import assets, timing

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
import clips

SIDE, R_FRAMES, TOKENS, SHARE, SAMPLED = 224, (12, 16), 1024, 0.5, 20
STEPS = (1, 2, 4, 8)
"""How many calls share groups."""


def reusing(steps: int) -> Any:
    return tome_fx.reuse_across_calls(steps) if steps > 1 else nullcontext()


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, backend=tome_fx.tome_backend(**options))  # type: ignore[return-value]


def of_frames(count: int, console: Console) -> dict[str, Any]:
    """Mean 1 - cosine of class tokens, by r, how many frames share groups, and clip."""
    model, found = assets.dinov2_vit_small(SIDE, console), {}
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pictures = {
        name: torch.stack([pixels(assets.crop(p, SIDE)) for p in assets.video_frames(path, count, step=1)])
        for name, path in clips.real_clips().items()
    }
    pictures = {name: (x - mean) / deviation for name, x in pictures.items()}
    plain = {name: torch.cat([model(x) for x in xs.split(1)]) for name, xs in pictures.items()}
    for r in R_FRAMES:
        fast = compiled(model, r=r, inner="eager")
        for steps in STEPS:
            row = {}
            for name, xs in pictures.items():
                with reusing(steps):
                    y = torch.cat([fast(x) for x in xs.split(1)])
                row[name] = float(1 - torch.cosine_similarity(y, plain[name]).mean())
            found[f"r={r}, steps={steps}"] = row
            console.print(f"frames, r={r}, steps={steps}: {row}")
    return found


def pixels(picture: Any) -> Tensor:
    """float32 `[3, side, side]` of 0 to 1."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)


def path(model: Callable[..., Tensor], x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Euler steps from noise, each along the model's output, as large as the latent is: (latent, time, output) of
    each."""
    found = []
    for step in range(SAMPLED):
        time = torch.tensor([1000.0 * (1 - step / SAMPLED)])
        found.append((x, time, velocity := model(x, time)))
        x = x - velocity * (x.std() / velocity.std() / SAMPLED)
    return found


def of_sampler(rounds: int, console: Console) -> dict[str, Any]:
    """Mean relative error of a step's output by how many steps share groups, and seconds of 8 steps."""
    torch.manual_seed(0)
    side = 2 * math.isqrt(TOKENS)
    model, x = models.BUILDERS["dit"](input_shape=(4, side, side)).eval(), torch.randn(1, 4, side, side)
    steps_of, error = path(model, x), {}
    fast = compiled(model, r=SHARE, placement="branch", inner="eager")
    for steps in (*STEPS, SAMPLED):
        with reusing(steps):
            off = [float((fast(x, time) - y).norm() / y.norm()) for x, time, y in steps_of]
        error[str(steps)] = sum(off) / len(off)
        console.print(f"sampler, steps={steps}: {error[str(steps)]:.5f}")
    result: dict[str, Any] = {"error": error}
    if rounds:
        result["seconds"] = seconds(model, x, rounds)
    return result


def seconds(model: nn.Module, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Of 8 calls each, interleaved: unmerged, merged, and with groups that serve so many calls."""
    calls = max(STEPS)
    torch._dynamo.reset()
    plain, fast = torch.compile(model), torch.compile(model, backend=tome_fx.tome_backend(r=SHARE, placement="branch"))

    def job(run: Callable[..., Tensor], steps: int) -> Callable[[], None]:
        def go() -> None:
            with reusing(steps):
                for step in range(calls):
                    run(x, torch.tensor([float(step)]))

        return go

    ways = {"unmerged": job(plain, 1), **{str(steps): job(fast, steps) for steps in STEPS}}
    return timing.interleaved(ways, rounds)  # type: ignore[return-value]


def tables(result: dict[str, Any]) -> list[str]:
    """Those of docs/measured.md."""
    lines = ["| frames that share groups | " + " | ".join(f"r={r}" for r in R_FRAMES) + " |", "| --: | --: | --: |"]
    for steps in STEPS:
        rows = [result["frames"][f"r={r}, steps={steps}"].values() for r in R_FRAMES]
        lines.append(f"| {steps} | " + " | ".join(f"{sum(row) / len(row):.4f}" for row in rows) + " |")
    lines += ["", "| steps that share groups | relative error | times as fast as unmerged |", "| --: | --: | --: |"]
    times = result["sampler"].get("seconds", {})
    for steps, error in result["sampler"]["error"].items():
        speed = f"{timing.ratio(times[steps], times['unmerged']):.2f}" if steps in times else ""
        lines.append(f"| {steps} | {error:.5f} | {speed} |")
    return lines


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--frames", type=int, default=24)
    options.add_argument("--no-speed", action="store_true")
    args, console = options.parse_args(), Console()
    with torch.no_grad():
        result = {
            "benchmark": "reuse",
            "machine": timing.machine_info(),
            "frames": of_frames(args.frames, console),
            "sampler": of_sampler(0 if args.no_speed else args.rounds, console),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    harness.result_path(args.out, "reuse", "cpu").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
