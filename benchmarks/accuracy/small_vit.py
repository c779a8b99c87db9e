"""A small ViT on CIFAR-10 at its native 32 px, patch 4, trained here: accuracy against r, off the shelf and trained in.

At native size no token is redundant by upsampling, so this is the hard case beside images.py. The net is timm's plain
VisionTransformer; it is trained without merging, then merged as it is (off the shelf); then the same net, seed and
schedule is trained with `tome_backend(r)`, at the r that costs off the shelf `HARD` points or more.

Weights and a checkpoint of every epoch lie in the cache folder, so a stopped training goes on where it was, with the
same batches. `--train-only` trains without merging and stops there. An epoch takes 11 minutes of one core (AMD EPYC,
AVX2; 3 with AVX-512), so both trainings about 75 minutes of two (or 25); the rest 15 (or 4). Width 192 and depth 9
would take 50 minutes of a core for each epoch: a result that can be made again on two cores is worth more here than a
few points of accuracy.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

import cifar
import common
import evaluate
from tome_fx import assets

HARD = 2.0
"""Points lost off the shelf from which training with merging is asked to win half back."""
GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12)


@dataclass(frozen=True)
class Recipe:
    """All that decides what a training gives. `r`: tokens merged in each block while training; 0: no merging."""

    width: int = 96
    depth: int = 6
    heads: int = 3
    epochs: int = 8
    images: int = 50_000
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.05
    smoothing: float = 0.1
    seed: int = 0
    r: int = 0

    @property
    def stem(self) -> str:
        """Name of its files in the cache: a change of any field is another training."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        return f"small_vit-w{self.width}-d{self.depth}-e{self.epochs}-r{self.r}-{digest}"


SMALL = Recipe(width=32, depth=3, heads=2, epochs=2, images=1280)
"""A net that runs in seconds and has learned next to nothing."""


def build(recipe: Recipe) -> nn.Module:
    """The net with its first weights: float32 [B, 3, 32, 32] -> [B, 10]; 64 patches and a class token."""
    torch.manual_seed(recipe.seed)
    return VisionTransformer(
        img_size=cifar.SIDE,
        patch_size=4,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        num_classes=len(cifar.CLASSES),
    )


def train(
    recipe: Recipe,
    pixels: np.ndarray,
    labels: np.ndarray,
    score: Callable[[nn.Module], float],
    console: Console,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained net in eval mode and its curve: "epoch", "loss", "accuracy" (by `score`, in %), "seconds".

    pixels uint8 [n, 32, 32, 3], labels int64 [n]. Goes on from the last epoch's checkpoint where there is one.
    """
    model = build(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    steps = len(pixels) // recipe.batch  # the rest of an epoch is left out: every batch has one shape
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * steps, pct_start=0.15, cycle_momentum=False
    )
    path = assets.cache_dir() / f"{recipe.stem}.pt"
    curve = _resume(path, {"model": model, "optimizer": optimizer, "rates": rates})
    torch.compiler.reset()
    # Eagerly, merged or not: on CPUs Inductor gained nothing on this net, and `score` drops compiled code.
    step = evaluate.compiled(model, {"r": recipe.r} if recipe.r else None, "eager")
    for epoch in range(len(curve), recipe.epochs):
        start, total = time.perf_counter(), 0.0
        torch.manual_seed(1000 * recipe.seed + epoch)  # a resumed training sees what an uninterrupted one does
        model.train()
        for chosen in torch.randperm(len(pixels)).numpy()[: steps * recipe.batch].reshape(steps, recipe.batch):
            loss = _loss(step(augmented(pixels[chosen])), torch.from_numpy(labels[chosen]), recipe.smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        curve.append({"epoch": epoch + 1, "loss": total / steps, "accuracy": score(model.eval()), "seconds": seconds})
        _keep(path, {"model": model, "optimizer": optimizer, "rates": rates}, curve)
        said = f"epoch {epoch + 1} of {recipe.epochs}: loss {total / steps:.3f}, accuracy {curve[-1]['accuracy']:.1f} %"
        console.print(f"{recipe.stem}, {said}, {seconds:.0f} s")
    return model.eval(), curve


def _loss(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing)


def _resume(path: Path, parts: dict[str, Any]) -> list[dict[str, float]]:
    """Fill the parts from a checkpoint and give its curve; an empty one where there is none."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["curve"]


def _keep(path: Path, parts: dict[str, Any], curve: list[dict[str, float]]) -> None:
    """Write a checkpoint; one that is half written never has its name."""
    scratch = path.with_suffix(f".{os.getpid()}")
    torch.save({**{name: part.state_dict() for name, part in parts.items()}, "curve": curve}, scratch)
    os.replace(scratch, path)


AUGMENT = v2.Compose([v2.RandomCrop(cifar.SIDE, padding=4), v2.RandomHorizontalFlip()])


def augmented(pixels: np.ndarray) -> Tensor:
    """uint8 [b, 32, 32, 3] -> float32 [b, 3, 32, 32]: every image cropped and flipped by its own draw, normalised."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return cifar.tensor(torch.stack([AUGMENT(image) for image in images]).permute(0, 2, 3, 1).numpy())


def correct(
    model: nn.Module, options: evaluate.Options, pixels: np.ndarray, labels: np.ndarray, console: Console
) -> tuple[np.ndarray, evaluate.Outputs]:
    """Which images the net gets right, bools [n], and its outputs; merged eagerly."""
    load = lambda chosen: cifar.tensor(pixels[chosen])  # noqa: E731
    out = evaluate.outputs(model, options, load, np.arange(len(pixels)), 250, console)
    return out.values.argmax(-1).numpy() == labels, out


def test_images(n: int, seed: int, console: Console) -> tuple[np.ndarray, np.ndarray]:
    """`n` test images by a seeded draw: uint8 [n, 32, 32, 3] and labels int64 [n]."""
    pixels, labels = cifar.load("test", console)
    chosen = cifar.subset(n, len(pixels), seed)
    return pixels[chosen], labels[chosen]


def trained(recipe: Recipe, console: Console) -> tuple[nn.Module, list[dict[str, float]]]:
    """`train` on CIFAR-10; the curve's accuracy is of 2,000 test images, as it was trained. Nothing is chosen by it."""
    pixels, labels = cifar.load("train", console)
    few = test_images(2000, recipe.seed, console)
    options = {"r": recipe.r} if recipe.r else None

    def score(net: nn.Module) -> float:
        return 100 * float(correct(net, options, *few, console)[0].mean())

    return train(recipe, pixels[: recipe.images], labels[: recipe.images], score, console)


def training_step(model: nn.Module, options: evaluate.Options, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW of a compiled net, on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the same work, and the weights stay
    run = evaluate.compiled(model, options, "inductor")

    def step() -> None:
        _loss(run(x), y, 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_ratio(recipe: Recipe, x: Tensor, y: Tensor, rounds: int) -> float:
    """Training steps a second with merging over those without, both compiled by Inductor."""
    torch.compiler.reset()
    ways: dict[str, evaluate.Options] = {"": None, "merged": {"r": recipe.r}}
    with common.room_for(len(ways)):
        steps = {name: training_step(build(recipe).train(), options, x, y) for name, options in ways.items()}
        return common.speeds(steps, "", rounds)["merged"]


def arguments() -> Any:
    """The command line."""
    parser = evaluate.parser(__doc__ or "")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="of each training (default %(default)s)")
    parser.add_argument("--width", type=int, default=Recipe.width, help="(default %(default)s)")
    parser.add_argument("--depth", type=int, default=Recipe.depth, help="(default %(default)s)")
    parser.add_argument("--heads", type=int, default=Recipe.heads, help="(default %(default)s)")
    parser.add_argument("--test", type=int, default=10_000, help="test images (default all)")
    parser.add_argument("--train-r", type=int, help=f"r to train with (default: the least that costs {HARD:g} points)")
    parser.add_argument("--train-only", action="store_true", help="train without merging, measure nothing")
    return parser.parse_args()


def main() -> int:
    """Train, merge, train merged, write small_vit.json."""
    args, console = arguments(), Console()
    if not evaluate.pending(args, "small_vit", console) and not args.train_only:
        return 0
    plain = recipe_of(args)
    info = evaluate.machine()
    model, curve = trained(plain, console)
    if args.train_only:
        return 0
    pixels, labels = test_images(args.test, args.seed, console)
    grid = (2, 8) if args.small else GRID
    base, _ = correct(model, None, pixels, labels, console)
    outcomes = {r: correct(model, {"r": r}, pixels, labels, console) for r in grid}
    x = cifar.tensor(pixels[:128])
    speeds = {} if args.no_speed else speeds_of(model, grid, x, args.rounds, console)
    shelf = [evaluate.point(r, right, out, speeds.get(r)) for r, (right, out) in outcomes.items()]
    lost = {r: evaluate.loss(right, base) for r, (right, _) in outcomes.items()}
    hard = args.train_r or next((r for r in grid if lost[r]["value"] >= HARD), grid[-1])

    merged = Recipe(**{**asdict(plain), "r": hard})
    again, merged_curve = trained(merged, console)
    ratio = None if args.no_speed else step_ratio(merged, x, torch.from_numpy(labels[:128]), args.rounds)
    tuned = {r: correct(again, {"r": r}, pixels, labels, console) for r in dict.fromkeys((*grid, hard))}
    inside = [evaluate.point(r, right, out, speeds.get(r)) for r, (right, out) in tuned.items()]
    result = {
        "title": "A small ViT at 32 px, patch 4, off the shelf and trained with merging",
        "measure": "top-1 accuracy",
        "unit": "%",
        "better": "higher",
        "data": f"CIFAR-10 at its native 32 px: {plain.images} training and {len(pixels)} test images. The net "
        f"was trained here for {plain.epochs} epochs only, so its accuracy is far from the best for this data.",
        "machine": info,
        "settings": {
            **asdict(plain),
            "trained_r": hard,
            "test_images": len(pixels),
            "curve": curve,
            "curve_merged": merged_curve,
            "step_ratio": ratio,
        },
        "baseline": common.binomial(int(base.sum()), len(base)),
        "curves": [
            {"label": "off the shelf", "points": shelf},
            {"label": f"trained with r={hard}", "points": inside},
        ],
        "found": found(shelf, base, outcomes[hard][0], lost, tuned[hard][0], hard, ratio),
        "notes": [
            "Accuracy is that of the merged graphs run eagerly.",
            "The throughput ratio is Inductor's over Inductor's, on one batch of 128.",
            "65 tokens are few: matching costs a larger share of the time than in a net of hundreds.",
            "The baseline is the net trained without merging; both trainings saw the same seed, batches and schedule.",
            "One training each: the spread between seeds is not in the intervals.",
        ],
    }
    common.save("small_vit", result, console, args.out)
    return 0


def recipe_of(args: Any) -> Recipe:
    """What the command line asks for; with --small a net that learns in seconds."""
    if args.small:
        args.test = min(args.test, 500)
        return SMALL
    return Recipe(width=args.width, depth=args.depth, heads=args.heads, epochs=args.epochs, seed=args.seed)


def speeds_of(model: nn.Module, grid: tuple[int, ...], x: Tensor, rounds: int, console: Console) -> dict[int, float]:
    """Throughput ratio of each r."""
    ways = {f"r={r}": {"r": r} for r in grid}
    found = evaluate.throughput(model, ways, x, rounds, console)
    return {r: found[f"r={r}"] for r in grid}


def found(
    shelf: list[dict[str, Any]],
    base: np.ndarray,
    off: np.ndarray,
    lost: dict[int, dict[str, float | int]],
    tuned: np.ndarray,
    hard: int,
    ratio: float | None,
) -> list[dict[str, Any]]:
    """The answers. off, tuned: which images were right at r=hard, off the shelf and trained in."""
    best = evaluate.largest_within(shelf, 100 * float(base.mean()), evaluate.NEAR)
    left = evaluate.loss(tuned, base)
    back = evaluate.loss(off, tuned)
    enough = lost[hard]["value"] >= HARD
    share = 100 * back["value"] / lost[hard]["value"] if lost[hard]["value"] > 0 else 0.0
    rows = [
        {
            "text": f"largest r that loses at most {evaluate.NEAR:g} points off the shelf",
            "value": evaluate.describe(best, lost[best["r"]] if best else None),
            "holds": None,
        },
        {
            "text": f"training with merging wins back at least half of a loss of {HARD:g} points or more (at r={hard})",
            "value": f"{lost[hard]['value']:.2f} points lost off the shelf, {left['value']:.2f} "
            f"({left['low']:.2f} to {left['high']:.2f}) trained in: {share:.0f} % won back",
            "holds": bool(share >= 50) if enough else None,
        },
    ]
    if ratio is not None:
        rows.append({"text": f"training steps a second with r={hard}", "value": f"{ratio:.2f} of plain", "holds": None})
    return rows


if __name__ == "__main__":
    sys.exit(main())
