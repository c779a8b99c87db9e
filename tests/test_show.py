"""`show`: the diagram holds the block and its sizes, the page is drawn, videos become GIFs, mistakes are sentences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tome_fx
from tests.models import Spec, build
from tome_fx import cli, diagram, show
from tome_fx.assets import AssetError, video_frames

HERE = "tests.test_show"
SIZE, TOKENS, R = 24, 37, 4
needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")


def tiny_vit() -> nn.Module:
    """37 tokens, three blocks, for [1, 3, 24, 24]."""
    return build(Spec())[0]


class Tubelets(nn.Module):
    """Two blocks over 4 x 3 x 3 tubelets of [1, 3, 8, 24, 24]; no class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """20 frames of noise."""
    import av

    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        random = np.random.default_rng(0)
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_the_diagram_holds_the_block_and_where_sizes_go() -> None:
    model, x = tiny_vit().eval(), torch.randn(1, 3, SIZE, SIZE)
    report = tome_fx.explain(model, (x,), r=R)
    graph = tome_fx.rewrite(model, (x,), r=R, plain=False).graph
    block = diagram.block_graph(graph, report.sites[1].name)
    kinds = [kind for _, kind in block.nodes(data="kind")]
    assert kinds.count("match") == kinds.count("merge") == kinds.count("attention") == 1
    labels = {label.split("\n")[0] for _, label in block.nodes(data="label")}
    assert {"linear", "norm", "merge", "match", "attention"} <= labels
    assert not labels & {"view", "reshape", "permute", "getitem", "transpose"}
    edges = {(block.nodes[a]["kind"], block.nodes[b]["kind"], kind) for a, b, kind in block.edges(data="kind")}
    assert ("outside", "attention", "size") in edges
    assert ("match", "merge", "size") in edges
    assert ("match", "merge", "plan") in edges
    for source, target, _ in block.edges:
        assert block.nodes[source]["layer"] < block.nodes[target]["layer"]


def test_a_merge_that_is_not_there_is_named() -> None:
    graph = tome_fx.rewrite(tiny_vit().eval(), (torch.randn(1, 3, SIZE, SIZE),), r=R, plain=False).graph
    with pytest.raises(ValueError, match="'nowhere'"):
        diagram.block_graph(graph, "nowhere")


def test_a_page_has_the_photo_and_its_groups() -> None:
    pytest.importorskip("matplotlib")
    picture = Image.effect_noise((SIZE, SIZE), 80).convert("RGB")
    page = show.page(picture, tiny_vit().eval(), R)
    assert page.width > 4 * SIZE
    assert page.crop((12, 12 + 12 + 6, 12 + SIZE, 12 + 12 + 6 + SIZE)) == picture


def test_show_a_photo(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "page.png"
    words = ["--model", f"{HERE}:tiny_vit", "--input", f"1,3,{SIZE},{SIZE}", "--r", "4", "--out", str(out)]
    assert cli.main(["show", str(photo), *words]) == 0
    assert "weights as that function" in capsys.readouterr().out
    with Image.open(out) as page:
        assert page.format == "PNG"


def test_random_weights_of_timm_are_called_random(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    seen = []
    monkeypatch.setattr(show, "run", lambda photo, subject, *_, **__: seen.append(subject))
    assert cli.main(["show", str(photo), "--model", "vit_tiny_patch16_224", "--size", "32"]) == 0
    assert seen[0].title == "vit_tiny_patch16_224, RANDOM weights"
    assert seen[0].shape == (1, 3, 32, 32)


@needs_av
def test_show_a_video_to_a_model_of_clips(video: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.gif"
    words = ["--model", f"{HERE}:Tubelets", "--input", "1,3,8,24,24", "--r", "4", "--out", str(out)]
    assert cli.main(["show", str(video), *words]) == 0
    with Image.open(out) as gif:
        assert gif.n_frames == 8


@needs_av
def test_show_a_video_to_a_model_of_pictures(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(show, "FRAMES", 2)
    out = tmp_path / "out.gif"
    words = ["--model", f"{HERE}:tiny_vit", "--input", "1,3,24,24", "--r", "4", "--out", str(out)]
    assert cli.main(["show", str(video), *words]) == 0
    assert "each frame is merged alone" in capsys.readouterr().out
    with Image.open(out) as gif:
        assert gif.n_frames == 2


@needs_av
def test_frames_of_a_video(video: Path, photo: Path, tmp_path: Path) -> None:
    assert [f.size for f in video_frames(video, 3, step=2, start=1)] == [(64, 48)] * 3
    with pytest.raises(AssetError, match="too short: 10 frames, needed 11"):
        video_frames(video, 11)
    (tmp_path / "no.mp4").write_text("no video")
    for wrong in (tmp_path / "no.mp4", tmp_path / "missing.mp4"):
        with pytest.raises(AssetError, match="can not read the video"):
            video_frames(wrong, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "page.jpg"], "out must be a .png"),
        (["--out", "no/such/folder/page.png"], "folder"),
        (["--r", "0"], "no tokens were merged"),
        (["--input", "1,3,24,30"], "24"),
        (["--input", "1,3,8,24,24", "--model", f"{HERE}:Tubelets"], "give a video"),
        (["--model", "demo"], "for other models"),
    ],
)
def test_mistakes_are_sentences(
    photo: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    monkeypatch.chdir(photo.parent)
    first = ["--model", f"{HERE}:tiny_vit", "--input", f"1,3,{SIZE},{SIZE}", "--r", "4"]
    assert cli.main(["show", str(photo), *first, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_photo_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["--model", f"{HERE}:tiny_vit", "--input", f"1,3,{SIZE},{SIZE}", "--out", str(tmp_path / "a.png")]
    assert cli.main(["show", str(tmp_path / "none.jpg"), *words]) == 2
    assert "can not read the photo" in capsys.readouterr().err
