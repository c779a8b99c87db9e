"""The speech and video benchmarks' own parts, offline: word errors, container, prompts, clips, network."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import tome_fx
from tome_fx import assets
from tome_fx.assets import AssetError

pytest.importorskip("timm")
pytest.importorskip("transformers")

ACCURACY = Path(__file__).parent.parent / "benchmarks" / "accuracy"
sys.path.append(str(ACCURACY))  # its scripts import each other by name

import clips  # noqa: E402
import prompts  # noqa: E402
import speech  # noqa: E402
import whisper_tiny as whisper  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("TOME_FX_CACHE", str(tmp_path / "cache"))
    return assets.cache_dir()


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heard", "wrong"),
    [
        ("press 1 to exit", 0),
        ("press to exit", 1),
        ("press 1 two exit", 1),
        ("please press 1 to exit", 1),
        ("", 4),
        ("exit to 1 press", 4),
        ("a b c d e f", 6),
    ],
)
def test_word_errors(heard: str, wrong: int) -> None:
    pytest.importorskip("jiwer")
    assert speech.errors("press 1 to exit", heard) == (wrong, 4)


def test_nothing_said_has_no_error_rate() -> None:
    pytest.importorskip("jiwer")
    with pytest.raises(ValueError, match="nothing was said"):
        speech.errors(" ", "word")


def test_the_rate_is_over_all_words() -> None:
    assert speech.rate(np.array([(1, 2), (0, 8)])) == pytest.approx(10)
    assert speech._difference(np.array([(1, 2, 0, 2), (0, 8, 0, 8)])) == pytest.approx(10)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Press ONE, then two.", "press 1 then 2"),
        ("That's re-entered (tone) [beep]!", "that is re entered"),
        ("...callers  waiting", "callers waiting"),
    ],
)
def test_texts_are_compared_without_case_and_signs(text: str, plain: str) -> None:
    assert speech.normalize(text) == plain


# -- the container ---------------------------------------------------------------------------------------------------


def container(variables: dict[str, np.ndarray], aliases: dict[str, str]) -> bytes:
    """A CTranslate2 container, written by its description."""
    codes = {np.dtype(kind): code for code, kind in whisper.DTYPES.items()}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    return out + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())


def test_a_container_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    a, b = np.arange(6, dtype=np.float16).reshape(2, 3), np.array(7, np.int8)
    path.write_bytes(container({"x/a": a, "x/b": b}, {"y/a": "x/a"}))
    found = whisper.read_container(path)
    assert list(found) == ["x/a", "x/b", "y/a"]
    assert (found["y/a"] == a).all() and found["x/a"].dtype == np.float16
    assert found["x/b"].shape == () and found["x/b"] == 7


@pytest.mark.parametrize("keep", [3, 40, -3])
def test_a_container_that_ends_early_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(container({"x/a": np.zeros((2, 3), np.float32)}, {"y/a": "x/a"})[:keep])
    with pytest.raises(ValueError, match="no CTranslate2 container"):
        whisper.read_container(path)


def tiny_state() -> tuple[object, dict[str, np.ndarray]]:
    """A transformers Whisper of width 8, and its weights under the names of a container."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {**whisper.SIZES, "vocab_size": 12, "d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**{**sizes, **heads}, num_mel_bins=4, **ids))
    state = {name: value.numpy() for name, value in model.state_dict().items() if name != "proj_out.weight"}
    out = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def get(name: str, kind: str) -> np.ndarray:
        return state.get(f"model.{name}.{kind}", np.zeros(8, np.float32))  # k_proj has no bias

    def put(target: str, *sources: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        for name, kind in zip(names, ("weight", "bias"), strict=True):
            out[f"{target}/{name}"] = np.concatenate([get(source, kind) for source in sources])

    scale = ("gamma", "beta")
    for side, layers in (("encoder", 1), ("decoder", 2)):
        put(f"{side}/layer_norm", f"{side}.layer_norm", names=scale)
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        for i in range(layers):
            a, b = f"{side}/layer_{i}", f"{side}.layers.{i}"
            put(f"{a}/self_attention/layer_norm", f"{b}.self_attn_layer_norm", names=scale)
            put(f"{a}/self_attention/linear_0", *(f"{b}.self_attn.{n}_proj" for n in "qkv"))
            put(f"{a}/self_attention/linear_1", f"{b}.self_attn.out_proj")
            if side == "decoder":
                put(f"{a}/attention/layer_norm", f"{b}.encoder_attn_layer_norm", names=scale)
                put(f"{a}/attention/linear_0", f"{b}.encoder_attn.q_proj")
                put(f"{a}/attention/linear_1", *(f"{b}.encoder_attn.{n}_proj" for n in "kv"))
                put(f"{a}/attention/linear_2", f"{b}.encoder_attn.out_proj")
            put(f"{a}/ffn/layer_norm", f"{b}.final_layer_norm", names=scale)
            put(f"{a}/ffn/linear_0", f"{b}.fc1")
            put(f"{a}/ffn/linear_1", f"{b}.fc2")
    for i in (1, 2):
        put(f"encoder/conv{i}", f"encoder.conv{i}")
    return state, out


def test_every_weight_gets_its_name_back(tmp_path: Path) -> None:
    state, named = tiny_state()
    path = tmp_path / "model.bin"
    path.write_bytes(container(named, {}))
    found = whisper.to_transformers(whisper.read_container(path))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert (found[name] == value).all(), name


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_transcripts() -> None:
    lines = "; a comment: not text\n\nvm/help: Press * for help: now.\nagent: Then press #\n"
    assert prompts.transcripts(lines) == {"vm/help": "Press star for help: now.", "agent": "Then press pound"}


def write_wave(path: Path, samples: np.ndarray, rate: int = 8000, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def test_sound_is_resampled(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    time = np.arange(800) / 8000
    write_wave(path, 16384 * np.sin(2 * np.pi * 440 * time))
    sound = prompts.read_wave(path)
    assert sound.shape == (1600,) and sound.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1600) / prompts.RATE)
    assert np.abs(sound - expected)[100:-100].max() < 0.01
    write_wave(path, np.zeros(10), channels=2)
    with pytest.raises(ValueError, match="2 channels"):
        prompts.read_wave(path)


def test_joined_prompts_fill_windows_and_lose_none() -> None:
    sounds = [prompts.Prompt(str(i), f"word{i}", np.ones(prompts.RATE * (i % 7 + 3), np.float32)) for i in range(20)]
    windows = prompts.joined(sounds)
    assert all(window.seconds <= prompts.WINDOW for window in windows)
    assert sorted(word for window in windows for word in window.text.split()) == sorted(p.text for p in sounds)
    assert len(windows) < len(sounds) / 2


def test_the_last_batch_is_filled_up() -> None:
    assert list(prompts.batches([1, 2, 3, 4, 5], 3)) == [[1, 2, 3], [4, 5, 5]]


def test_a_package_is_fetched_once_and_unpacked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb = prompts.PinnedDeb("some-sounds", "1.0", "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae")
    commands = []

    def fake(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[0])
        if command[0] == "apt-get":
            (cwd / deb.filename).write_bytes(b"foo")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    prompts.unpack(deb, tmp_path)
    prompts.unpack(deb, tmp_path)
    assert commands == ["apt-get", "dpkg-deb", "dpkg-deb"]
    (cache / deb.filename).write_bytes(b"bar")
    with pytest.raises(AssetError, match=r"some-sounds=1\.0.*sha256"):
        prompts.unpack(deb, tmp_path)


def test_without_the_tools_the_way_out_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AssetError) as caught:
        prompts.unpack(prompts.SOUNDS, tmp_path)
    for part in ("apt-get", prompts.SOUNDS.requirement, prompts.SOUNDS.filename, str(cache)):
        assert part in str(caught.value)


def test_what_apt_said_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "W: old lists\nE: Unable to locate package some\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 100, "", said))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(AssetError, match=r"can not be had: E: Unable to locate"):
        prompts.unpack(prompts.SOUNDS, tmp_path)


# -- clips -----------------------------------------------------------------------------------------------------------


def test_a_clip_moves_as_its_label_says() -> None:
    """White discs before black: their centre moves by the motion that is returned, in the direction of the label."""
    black, white = (
        torch.zeros(1, 3, clips.TEXTURE, clips.TEXTURE),
        torch.full((1, 3, clips.TEXTURE, clips.TEXTURE), 255),
    )
    pieces = torch.cat([black, white]).to(torch.uint8)
    x, labels, motion = clips.moving(pieces, 64, 8, 64, torch.Generator().manual_seed(0))
    assert x.shape == (64, 3, 8, 64, 64) and x.dtype == torch.float32
    light = (x[:, 0] * 0.25 + 0.5).clamp(0, 1)
    disc = (light[:, :, 0, 0].mean(1) < 0.1) & (light.amax((1, 2, 3)) > 0.9)
    assert disc.sum() > 5
    line = torch.arange(64) + 0.5
    weight = (light > 0.5).float()
    centre = (
        torch.stack([(weight.sum(2) * line).sum(-1), (weight.sum(3) * line).sum(-1)], -1)
        / weight.sum((2, 3))[..., None]
    )
    moved = (centre[:, 5] - centre[:, 2]) / 3  # whole in the frame half way
    assert (moved - motion)[disc].abs().max() < 0.1
    angle = torch.atan2(motion[:, 1], motion[:, 0]) * clips.DIRECTIONS / (2 * torch.pi)
    assert ((angle.round() % clips.DIRECTIONS).long() == labels % clips.DIRECTIONS).all()
    speed = motion.norm(dim=1)
    for number, (low, high) in enumerate(clips.SPEEDS):
        of_it = speed[labels // clips.DIRECTIONS == number]
        assert len(of_it) and low <= of_it.min() and of_it.max() <= high + 1e-5


def test_clips_repeat_by_their_seed() -> None:
    sources = [torch.rand(3, 80, 100) * 255]
    made = [clips.pieces(sources, 2, np.random.default_rng(0)) for _ in range(2)]
    assert torch.equal(*made)
    assert made[0].shape == (2, 3, clips.TEXTURE, clips.TEXTURE)
    first, second = (clips.moving(made[0], 3, 4, 32, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_photo_is_in_both_parts() -> None:
    assert not clips.TRAIN_PHOTOS.keys() & clips.TEST_PHOTOS.keys()
    assert all(len(sha256) == 64 for sha256 in {**clips.TRAIN_PHOTOS, **clips.TEST_PHOTOS}.values())


def test_the_tubelet_network_merges() -> None:
    model, x = clips.TubeletViT(48, 3, 3).eval(), torch.randn(2, 3, 8, 32, 32)
    fast = torch.compile(model, backend=tome_fx.tome_backend(r=8, inner="eager"))
    with torch.no_grad():
        out, merged = model(x), fast(x)
    report = tome_fx.reports()[-1]
    assert report.merged_sites > 0
    assert report.tokens[0] == (64, 56)
    assert merged.shape == out.shape == (2, clips.CLASSES)
    assert 0 < (merged - out).abs().max() < 1


def test_positions_of_tubelets_differ() -> None:
    rows = clips.positions((4, 8, 8), 128)
    assert rows.shape == (256, 128)
    assert torch.cdist(rows, rows).fill_diagonal_(1).min() > 0.1


# -- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("script", "names"), [("speech", ["speech"]), ("video", ["video", "video_real"])])
def test_the_small_runs_end(script: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches the packages unless the cache has them; the numbers are not judged."""
    monkeypatch.delenv("TOME_FX_CACHE")
    command = [sys.executable, str(ACCURACY / f"{script}.py"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        result = json.loads((tmp_path / f"{name}-small.json").read_text())
        assert result["curves"] and result["found"] and result["notes"]
        for curve in result["curves"]:
            assert curve["points"][0]["r"] == 0
            assert all(point["low"] <= point["value"] <= point["high"] for point in curve["points"])
