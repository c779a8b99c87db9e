"""ToMe's design choices one by one, as in the paper's table 1: by what tokens are compared, paired and merged.

On DINOv2 ViT-S/14 with a probe at 112 px (images.py) and on the small ViT at 32 px (small_vit.py). Each row changes one
option of `tome_backend` and leaves the rest. The paper's differences are those of a ViT-L (MAE) on ImageNet at r=8;
"found" says for each whether ours point the same way, with the paired interval of ours.

Writes ablations_dinov2.json and ablations_small_vit.json. Two cores, quiet: about 15 minutes, and the training of
small_vit.py where it is not done.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

import cifar
import common
import evaluate
import images
import small_vit

DEFAULT = "default"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "metric: input": {"metric": "input"},
    "metric: query": {"metric": "query"},
    "metric: value": {"metric": "value"},
    "similarity: dot": {"similarity": "dot"},
    "partition: sequential": {"partition": "sequential"},
    "partition: random": {"partition": "random"},
    "merging: plain mean": {"merging": "plain"},
    "merging: keep one": {"merging": "keep"},
    "merging: prune": {"merging": "prune"},
    "pairs at random": {"matcher": "random"},
    "prune at random": {"matcher": "random", "merging": "prune"},
    "proportional attention: off": {"prop_attn": False},
}
"""Label -> the options of `tome_backend` that differ from its defaults: key, cosine, alternating, weighted mean."""


@dataclass(frozen=True)
class Expected:
    """What the paper says: the default is better than `label` by `points` (None: it gives the sign alone)."""

    label: str
    text: str
    points: float | None


PAPER = (
    Expected("metric: input", "key over input", 0.55),
    Expected("similarity: dot", "cosine over dot", 1.5),
    Expected("partition: sequential", "alternating over sequential", 3.2),
    Expected("merging: plain mean", "weighted over plain mean", 0.7),
    Expected("prune at random", "merging over pruning at random", 5.0),
)
TRAIN, TEST = 1000, 1000
R = {"dinov2": 4, "small_vit": 8}
"""Tokens merged in each block: of 65 about 17 are left after the last in both nets."""


def verdicts(right: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row of "found" for each of the paper's differences that was measured, from bools [n] of each variant.

    holds: true where ours has the paper's sign and its 95 % interval leaves out 0, false where it has the other so,
    null where the interval holds 0.
    """
    rows = []
    for each in PAPER:
        if each.label not in right:
            continue
        ours = evaluate.loss(right[each.label], right[DEFAULT])
        agrees = True if ours["low"] > 0 else False if ours["high"] < 0 else None
        said = {True: "same sign", False: "the other sign", None: "undecided: the interval holds 0"}[agrees]
        rows.append(
            {
                "text": f"{each.text} (paper, ViT-L, r=8: {each.points:+g} points)",
                "value": f"{ours['value']:+.2f} points ({ours['low']:+.2f} to {ours['high']:+.2f}): {said}",
                "holds": agrees,
            }
        )
    return rows


def measure(task: images.Task, r: int, info: dict[str, Any], seed: int, small: bool, console: Console) -> dict:
    """Every variant on one net, as common.py has it. No timing: all merge as many tokens."""
    samples = np.arange(len(task.labels))

    def right(options: evaluate.Options) -> tuple[np.ndarray, evaluate.Outputs]:
        out = evaluate.outputs(task.model, options, task.load, samples, task.batch, console)
        return task.judge(out.values) == task.labels, out

    variants = dict(list(VARIANTS.items())[:2]) if small else VARIANTS
    base, _ = right(None)
    outcomes = {label: right({"r": r, **options}) for label, options in variants.items()}
    return {
        "title": f"Design choices, {task.title}",
        "measure": "top-1 accuracy",
        "unit": "%",
        "better": "higher",
        "data": task.data,
        "machine": info,
        "settings": {"r": r, "seed": seed, "test_images": len(samples), "variants": variants},
        "baseline": common.binomial(int(base.sum()), len(base)),
        "curves": [
            {"label": label, "points": [evaluate.point(r, hits, out, None)]} for label, (hits, out) in outcomes.items()
        ],
        "found": verdicts({label: hits for label, (hits, _) in outcomes.items()}),
        "notes": [
            "Variants see the same images; differences under found have paired intervals.",
            "The paper's differences are of another net, task and r: only their signs are compared.",
            *task.notes,
        ],
    }


def small_vit_task(recipe: small_vit.Recipe, test: int, seed: int, console: Console) -> images.Task:
    """The small ViT of small_vit.py, trained first where it is not in the cache."""
    model, _ = small_vit.trained(recipe, console)
    pixels, labels = small_vit.test_images(test, seed, console)
    return images.Task(
        name="small_vit",
        title="small ViT at 32 px, patch 4",
        data=f"CIFAR-10 at its native 32 px, {test} of the 10,000 test images (seed {seed}); the net of small_vit.py, "
        f"trained for {recipe.epochs} epochs without merging.",
        model=model,
        load=lambda rows: cifar.tensor(pixels[rows]),
        labels=labels,
        judge=lambda outputs: outputs.argmax(-1).numpy(),
        batch=250,
        grid=(),
    )


def main() -> int:
    """Measure both nets."""
    parser = evaluate.parser(__doc__ or "")
    parser.add_argument("--nets", nargs="+", default=list(R), choices=list(R))
    parser.add_argument("--test", type=int, help=f"test images (default: {TEST} for dinov2, all for small_vit)")
    parser.add_argument("--epochs", type=int, default=small_vit.Recipe.epochs, help="that small_vit.py trained for")
    args, console = parser.parse_args(), Console()
    for net in args.nets:
        name = f"ablations_{net}"
        if not evaluate.pending(args, name, console):
            continue
        info = evaluate.machine()
        if net == "dinov2":
            train, test = (50, 32) if args.small else (TRAIN, args.test or TEST)
            task = images.cifar_task(112, train, test, args.seed, (), console)
        else:
            recipe = small_vit.SMALL if args.small else small_vit.Recipe(epochs=args.epochs, seed=args.seed)
            task = small_vit_task(recipe, 250 if args.small else args.test or 10_000, args.seed, console)
        result = measure(task, R[net], info, args.seed, args.small, console)
        common.save(name, result, console, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
