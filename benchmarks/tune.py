"""What `tome_fx.tune` finds over the best constant r, (r, -1) and (r, 1), on trained models and data held out.

    python benchmarks/tune.py [--tasks small_vit images_112 images_224 saliency speech video] [--budget SECONDS]

For each task a target of loss: half a point of accuracy, one of word error rate, a correlation of 0.99, or a distance
of features. Every member of the three families (of hundreds every eighth or tenth, and each around the limit) is judged
on the data that `tune` tunes on, and the fastest that keeps the target (as predicted) is the baseline. Then the
unmerged model, the baseline, what `tune` found by the schedule alone and, with --options, with method, metric,
similarity and prop_attn too, are compiled by Inductor and timed in turn; losses are those of the half of the data that
no search saw. Writes results/tune-cpu.json, saved after each task; a task that is
there is not measured again (--fresh). `--page` writes the table of docs/tune.md and its plot.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import tome_fx
from tome_fx import assets, timing
from tome_fx.tuning import judge as judging
from tome_fx.tuning import search as searching
from tome_fx.tuning.data import top1, words

sys.path.append(str(Path(__file__).parent / "accuracy"))

RESULTS = Path(__file__).parent / "results" / "tune-cpu.json"
PAGE = Path(__file__).parent.parent / "docs" / "tune.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
GOALS = {"schedule": (0.99, 1.05), "options": (0.99, 1.10)}
"""Of the measured throughput over the baseline's: never below the first, on four of six tasks the second."""
OPTIONS = searching.SEARCHED
ENOUGH = 2000
"""Images from which half a point of accuracy can be told at all; with fewer the distance of features is the target."""


@dataclass(frozen=True)
class Task:
    """A trained model in eval mode, batches (pairs with a metric) and a target of loss. most: the largest r of the
    families that is tried. what: the data in words. step: where it is not 1, every so many r's of a family are tried,
    and each between the last that keeps the target and the next."""

    model: nn.Module
    batches: Sequence[Any]
    target: tome_fx.Loss
    metric: judging.Metric | None
    most: int
    what: str
    step: int = 1


def small_vit(console: Console, count: int) -> Task:
    """The small ViT at CIFAR's native size."""
    import cifar
    import small_vit as trained

    model, _ = trained.trained(trained.Recipe(), console)
    pixels, labels = trained.test_images(count or 4000, 0, console)
    parts = [slice(i, i + 100) for i in range(0, len(pixels), 100)]
    batches = [(cifar.tensor(pixels[part]), torch.from_numpy(labels[part])) for part in parts]
    what = f"small ViT, CIFAR-10 at 32 px, {len(pixels)} test images, top-1"
    return Task(model, batches, tome_fx.Loss(0.5), top1, 12, what)


def images(console: Console, count: int, px: int) -> Task:
    """DINOv2 with a linear probe, or at 224 px the distance of its features alone."""
    import cifar
    import images as probed

    model = assets.dinov2_vit_small(px, console)
    pixels, labels = cifar.load("test", console)
    chosen = cifar.subset(count or 256, len(pixels), 0)
    size = 16 if px < 200 else 8
    parts = [chosen[i : i + size] for i in range(0, len(chosen) // size * size, size)]
    inputs = [cifar.tensor(pixels[part], px) for part in parts]
    what = f"DINOv2 ViT-S/14, CIFAR-10 at {px} px, {len(parts) * size} test images"
    if len(parts) * size < ENOUGH:
        return Task(model, inputs, tome_fx.Loss(0.003), None, px // 10, f"{what}, 1 - cosine of the class token")
    rows, truth = cifar.load("train", console)
    drawn = cifar.subset(probed.TRAIN[px], len(rows), 0)
    features = probed.plain_features(model, rows[drawn], f"cifar_train-{px}-s0.npy", px, console)
    classifier = probed.probe(features, truth[drawn], 0)

    def right(outputs: Any, targets: np.ndarray) -> Any:
        return (classifier.predict(outputs.float().numpy()) == targets).astype(float)

    batches = [(x, labels[part]) for x, part in zip(inputs, parts, strict=True)]
    return Task(model, batches, tome_fx.Loss(0.5), right, px // 10, f"{what}, top-1 of a linear probe")


def saliency(console: Console, count: int) -> Task:
    """The saliency decoder behind DINOv2: correlation with the unmerged model's heat map."""
    import dense

    model = dense.saliency(console)
    photos = [assets.preprocess(photo, dense.SIDE) for photo in dense.photos(False, console).values()]
    x = torch.cat(photos)[: count or None]
    with torch.no_grad():
        batches = [(x[i : i + 2], model(x[i : i + 2])) for i in range(0, len(x) // 2 * 2, 2)]
    return Task(model, batches, tome_fx.Loss(1.0), lambda out, own: dense.correlation(out, own), 22,
                f"saliency of {len(batches) * 2} photos at 224 px, correlation of heat maps")  # fmt: skip


def speech(console: Console, count: int) -> Task:
    """Whisper's encoder, its words by the decoder."""
    import prompts
    import speech as spoken
    import whisper_tiny as whisper

    loaded = whisper.load(console)
    every = prompts.joined(prompts.load())[: count or 48]
    curve = spoken.curve_of("joined", every, 4, loaded)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = loaded.model.model.encoder

        def forward(self, mel: torch.Tensor) -> torch.Tensor:
            return self.encoder(mel).last_hidden_state

        def decode(self, states: torch.Tensor) -> list[str]:
            heard = loaded.tokenizer.batch_decode(spoken.decode(loaded.model, states), skip_special_tokens=True)
            return [spoken.normalize(text) for text in heard]

    model = Encoder().eval()
    said = [curve.said[i : i + 4] for i in range(0, len(curve.said), 4)]
    whole = [pair for pair in zip(curve.mels, said, strict=True) if len(pair[1]) == 4]  # the last is filled up
    what = f"Whisper tiny.en, {4 * len(whole)} windows, words"
    return Task(model, whole, tome_fx.Loss(1.0), words(model), 350, what, step=10)


def video(console: Console, count: int) -> Task:
    """The tubelet ViT on synthetic motion."""
    import clips
    import video as moving

    model, generator = moving.trained(console), torch.Generator().manual_seed(1)
    source = clips.textures("test", 200, 1)
    made = [clips.moving(source, 40, *moving.SHAPE, generator)[:2] for _ in range((count or 800) // 40)]
    what = f"tubelet ViT, {40 * len(made)} clips of synthetic motion, top-1"
    return Task(model, made, tome_fx.Loss(0.5), top1, 128, what, step=8)


TASKS: dict[str, Callable[[Console, int], Task]] = {
    "images_224": partial(images, px=224), "images_112": partial(images, px=112), "small_vit": small_vit,
    "speech": speech, "video": video, "saliency": saliency,
}  # fmt: skip


class Kept(searching.Search):
    """A search of which the benchmark keeps hold: the families are judged by its judge and its costs."""

    last: Kept | None = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        Kept.last = self


def baseline(search: searching.Search, task: Task) -> tuple[searching.Point | None, list[searching.Point]]:
    """Members of the families (every one, but for `step`) on all the batches tuned on, and the fastest that keeps the
    target."""
    search.options = dict(search.task.base)
    points: list[searching.Point] = []

    def kept(family: str, r: int) -> bool:
        name = searching.named(family, r)
        points.append(search.evaluate(search.list_of(family, r), name, search.whole, late=True))
        return points[-1].loss <= task.target.most

    for family in searching.FAMILIES:
        last = 0
        for r in range(task.step, task.most + 1, task.step):
            last = r if kept(family, r) else last
            # Twice the loss allowed, and a larger r loses more: no member of a family comes back from there.
            if points[-1].loss > 2 * task.target.most + 1e-9:
                break
        for r in range(last + 1, min(last + task.step, task.most + 1)):
            kept(family, r)
    held = [point for point in points if point.loss <= task.target.most]
    return max(held, key=lambda point: point.speed, default=None), points


def timed(model: nn.Module, x: Any, ways: dict[str, dict[str, Any]], rounds: int) -> dict[str, float]:
    """Throughput over the unmerged model's, all compiled by Inductor, rounds interleaved; equal options once."""
    torch.compiler.reset()
    spelled = {name: json.dumps(options, sort_keys=True) for name, options in ways.items()}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=100):
        runs: dict[str, Any] = {"": torch.compile(model, dynamic=False)}
        for name, options in {spelled[name]: options for name, options in ways.items()}.items():
            runs[name] = torch.compile(model, backend=tome_fx.tome_backend(**options), dynamic=False)
        times = timing.interleaved({name: partial(run, x) for name, run in runs.items()}, rounds, warmup=2)
    return {name: timing.ratio(times[spelled[name]], times[""]) for name in ways}


def measure(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    searches = {"schedule": ("schedule",), **({"options": OPTIONS} if args.options else {})}
    found: dict[str, tome_fx.Tuned] = {}
    begun = timing.machine_info()
    tome_fx.tuning.Search = Kept  # type: ignore[attr-defined]
    best, points = None, []
    for name, names in searches.items():
        start = time.perf_counter()
        found[name] = tome_fx.tune(task.model, task.batches, target=task.target, metric=task.metric, search=names,
                                   budget=args.budget, inner="eager")  # fmt: skip
        found[name] = replace(found[name], seconds=time.perf_counter() - start)
        print(found[name])
        if best is None:
            assert Kept.last is not None
            best, points = baseline(Kept.last, task)
    ways = {name: tuned.options for name, tuned in found.items()}
    if best is not None:
        ways["baseline"] = {"r": list(best.r)}
    held, _ = judging.batches_of(task.model, task.batches, task.metric is not None)
    _, out = judging.parted(held, 0.5, 0)
    speeds = timed(task.model, out[0].args[0], ways, args.rounds)
    judge = judging.Judge(searching.runner(task.model), out, task.metric)
    losses = {name: held_out(task, judge, options) for name, options in ways.items()}
    rows = {name: {"options": ways[name], "speed": speeds[name], **losses[name]} for name in ways}
    for name, tuned in found.items():
        rows[name] |= {"predicted": tuned.predicted, "flops": tuned.flops, "tuned_loss": tuned.tuned_loss,
                       "seconds": tuned.seconds, "notes": tuned.notes, "reached": tuned.reached}  # fmt: skip
    if best is not None:
        rows["baseline"] |= {"name": best.name, "predicted": best.speed, "flops": best.flops, "tuned_loss": best.loss}
    fronts = {"families": [front_of(point) for point in points]}
    fronts |= {name: [front_of(p) for p in tuned.front] for name, tuned in found.items()}
    return {"what": task.what, "target": task.target.most, "unit": found["schedule"].unit, "machine": begun,
            "samples": found["schedule"].samples, "rounds": args.rounds, "rows": rows, "fronts": fronts}  # fmt: skip


def retimed(task: Task, row: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A row whose speeds are measured again, on a quieter machine; the rest stays."""
    held, _ = judging.batches_of(task.model, task.batches, task.metric is not None)
    speeds = timed(task.model, held[0].args[0], {name: own["options"] for name, own in row["rows"].items()}, rounds)
    rows = {name: {**own, "speed": speeds[name]} for name, own in row["rows"].items()}
    return {**row, "rows": rows, "rounds": rounds, "machine": timing.machine_info()}


def front_of(point: Any) -> dict[str, Any]:
    return {name: getattr(point, name) for name in ("name", "speed", "flops", "distance", "loss")}


def held_out(task: Task, judge: judging.Judge, options: dict[str, Any]) -> dict[str, Any]:
    """The loss on the batches held out, with its interval."""
    gm = tome_fx.rewrite(task.model, judge.batches[0].args, plain=False, **options)
    judged = judge.judge(searching.runner(gm))
    low, high = judge.interval(judged, 0)
    return {"loss": judge.loss(judged), "low": low, "high": high, "distance": judged.distance}


# -- the page ----------------------------------------------------------------------------------------------------------


def ratio(row: dict[str, Any], name: str) -> float | None:
    """Measured throughput over the baseline's; None where there is none."""
    rows = row["rows"]
    if name not in rows:
        return None
    return float(rows[name]["speed"] / (rows["baseline"]["speed"] if "baseline" in rows else 1.0))


def table(result: dict[str, Any]) -> str:
    """The results as the page shows them."""
    lines = ["| task | target | best of the families | found by the schedule | over it | with options | over it |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["tasks"].values():
        cells = [row["what"], f"{row['target']:g} {'points' if row['unit'] == 'points' else ''}".strip()]
        cells.append(_cell(row, "baseline", row["rows"].get("baseline", {}).get("name", "none")))
        for name in ("schedule", "options"):
            over = ratio(row, name)
            cells += [_cell(row, name), "-" if over is None else f"{over:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str, label: str = "") -> str:
    if name not in row["rows"]:
        return label or "-"
    own = row["rows"][name]
    loss = f"{own['loss']:.2g} ({own['low']:.2g} to {own['high']:.2g})"
    more = ", ".join(f"{key}={value!r}" for key, value in own["options"].items() if key not in ("r", "blocks"))
    return "; ".join(filter(None, [label or more, f"{own['speed']:.2f} times", f"loses {loss}"]))


KINDS = {"r": "o", "(r, -1)": "v", "(r, 1)": "^", "proposals": "*"}
"""What the plots call a schedule -> its marker."""
NOTHING = 1e-9
"""A distance that is rounding alone, as where no token that is read has merged: not plotted."""


def kind_of(name: str) -> str:
    """The family of a schedule, by what a search calls it."""
    if not name.startswith("r="):
        return "proposals"
    return next((kind for kind, end in (("(r, -1)", ", -1)"), ("(r, 1)", ", 1)")) if name.endswith(end)), "r")


def plot(result: dict[str, Any], path: Path) -> None:
    """All that was tried: a panel for each task, the distance that outputs move (data tuned on) against speed."""
    from matplotlib.figure import Figure  # late: as in harness

    figure = Figure(figsize=(10, 3.2 * -(-len(result["tasks"]) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(result["tasks"]) // 2), 2, squeeze=False).flatten()
    for axes, (name, row) in zip(panels, result["tasks"].items(), strict=False):
        points = [point for front in row["fronts"].values() for point in front if point["distance"] > NOTHING]
        for kind, marker in KINDS.items():
            own = [point for point in points if kind_of(point["name"]) == kind]
            x, y = [point["speed"] for point in own], [point["distance"] for point in own]
            axes.plot(x, y, marker, label=kind, markersize=9 if marker == "*" else 4, alpha=0.7)
        axes.set(title=name, yscale="log", xlabel="speed, predicted", ylabel="1 - cosine")
        axes.axvline(row["rows"]["schedule"]["predicted"], color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(result["tasks"]) :]:
        axes.set_axis_off()
    panels[0].legend()
    figure.savefig(path, dpi=110)


def written(page: str, result: dict[str, Any]) -> str:
    """The page with the table of a result."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Measure the tasks that are asked for and have no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of each search (default %(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="of each task (default: by task)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default %(default)s)")
    parser.add_argument("--options", action="store_true", help="search method, metric, similarity and prop_attn too")
    parser.add_argument("--fresh", action="store_true", help="even where there is a result")
    parser.add_argument("--retime", action="store_true", help="time again what is there, and search nothing")
    parser.add_argument("--page", action="store_true", help="write the table of docs/tune.md and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, console = parser.parse_args(), Console()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"benchmark": "tune", "tasks": {}}
    for name in [] if args.page else args.tasks:
        if args.retime and name in result["tasks"]:
            result["tasks"][name] = retimed(TASKS[name](console, args.samples), result["tasks"][name], args.rounds)
        elif name in result["tasks"] and not args.fresh:
            console.print(f"{name} is there; --fresh measures again")
            continue
        else:
            result["tasks"][name] = measure(TASKS[name](console, args.samples), args)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {args.out}")
    if args.page:
        PAGE.write_text(written(PAGE.read_text(), result))
        plot(result, RESULTS.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
