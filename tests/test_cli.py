"""The command line: what it parses, what it prints, and one sentence for every mistake of the user."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import Spec, build
from tome_fx import ToMeWarning, cli, runtimes, timing
from tome_fx.cli import subjects, values
from tome_fx.export import SUFFIXES

HERE = "tests.test_cli"
INPUT = ["--input", "2,3,24,24"]
NUMBER = 3


def tiny_vit() -> nn.Module:
    """37 tokens, three blocks."""
    return build(Spec())[0]


def convolution() -> nn.Module:
    """Nothing to merge."""
    return nn.Conv2d(3, 4, 3)


def no_module() -> int:
    return NUMBER


@pytest.mark.parametrize(
    ("text", "r"),
    [
        ("16", 16),
        ("0", 0),
        ("0.1", 0.1),
        ("16,-1", (16, -1.0)),
        ("16,0.5", (16, 0.5)),
        ("8,8,4", [8, 8, 4]),
        ("8, 8, 4, 2", [8, 8, 4, 2]),
    ],
)
def test_parse_r(text: str, r: Any) -> None:
    parsed = values.parse_r(text)
    assert parsed == r
    assert type(parsed) is type(r)


@pytest.mark.parametrize("text", ["", "many", "8,", "8,8,x", "0.5,1"])
def test_parse_r_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="count per block"):
        values.parse_r(text)


@pytest.mark.parametrize(
    ("text", "protect"), [("auto", "auto"), ("1", 1), ("2/10", (2, 10)), ("0,5,-1", [0, 5, -1]), ("3,", None)]
)
def test_parse_protect(text: str, protect: Any) -> None:
    if protect is None:
        with pytest.raises(argparse.ArgumentTypeError, match="positions"):
            values.parse_protect(text)
    else:
        assert values.parse_protect(text) == protect


def arguments(*words: str) -> argparse.Namespace:
    return cli.make_parser().parse_args(words)


def test_the_configuration_reaches_the_backend() -> None:
    args = arguments("explain", "m", "--r", "16,-1", "--metric", "input", "--placement", "stream", "--strict")
    expected = {"r": (16, -1.0), "placement": "stream", "metric": "input", "inner": "inductor", "strict": True}
    unsaid = ("importance", "candidates", "similarity", "alpha", "partition", "matcher", "merging", "prune", "counts",
              "least", "blocks")  # fmt: skip
    defaults = {**dict.fromkeys((*unsaid, "prop_attn")), "method": "tome"}
    defaults |= {"protect": "auto", "every": 1, "reuse": 0, "multiple": 1, "padding_first": False}
    assert subjects.config_of(args) == {**expected, **defaults, "drop_unread": True}
    choices = {"similarity": "dot", "partition": "random", "matcher": "random", "merging": "prune", "method": "saint"}
    words = [word for name, value in choices.items() for word in (f"--{name}", value)]
    assert choices.items() <= subjects.config_of(arguments("bench", "m", *words)).items()
    assert subjects.config_of(arguments("explain", "m"))["r"] == subjects.DEFAULT_R
    several = arguments("explain", "m", "--merging", "prune,mlerp", "--blocks", "0.25,0.5", "--number", "tau=0.5")
    wanted = {"merging": ("prune", "mlerp"), "blocks": (0.25, 0.5), "tau": 0.5}
    assert wanted.items() <= subjects.config_of(several).items()
    assert [subjects.config_of(arguments("explain", "m", "--reuse", k))["reuse"] for k in ("0", "2")] == [0, 2]
    flops = subjects.config_of(arguments("bench", "m", "--flops", "0.5", "--inner", "eager"))
    assert (flops["flops"], flops["inner"], "r" in flops) == (0.5, "eager", False)


def test_explain_prints_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert cli.main(["explain", f"{HERE}:tiny_vit", "--r", "4", *INPUT, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "37 -> 33" in printed
    written = json.loads(out.read_text())
    assert written["model"] == f"{HERE}:tiny_vit"
    assert written["input"] == [2, 3, 24, 24]
    assert written["tokens"] == [[37, 33], [33, 29]]  # nobody reads the third merge


def test_a_matcher_of_the_users_module(capsys: pytest.CaptureFixture[str]) -> None:
    """The module that a function comes from is where its matcher is registered."""
    module = "tests.custom_matcher"
    assert cli.main(["explain", f"{module}:model", "--r", "4", *INPUT, "--matcher", "first", "--merging", "keep"]) == 0
    assert "37 -> 33" in capsys.readouterr().out


def test_explain_says_when_there_is_nothing_to_merge(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(ToMeWarning, match="nothing merged"):
        assert cli.main(["explain", f"{HERE}:convolution", "--size", "16"]) == 0
    assert "nothing merged" in capsys.readouterr().out


def test_explain_a_timm_model_at_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert cli.main(["explain", "vit_tiny_patch16_224", "--size", "96", "--r", "2"]) == 0
    assert "37 -> 35" in capsys.readouterr().out


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("aoti", "openvino")]


@pytest.mark.parametrize("kind", ["pt2", "onnx", *SLOW])
def test_export_writes_checks_and_times(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One line each for the file, what its runtime gives, and the speed there."""
    if kind in ("onnx", "openvino"):
        pytest.importorskip("onnxruntime" if kind == "onnx" else kind)
    file, numbers = tmp_path / f"model{SUFFIXES.get(kind, '.onnx')}", tmp_path / "numbers.json"
    words = ["export", f"{HERE}:tiny_vit", "--r", "4", *INPUT, "--placement", "stream", "--rounds", "1"]
    assert cli.main([*words, "--format", kind, "-o", str(file), "--dynamic-batch", "--json", str(numbers)]) == 0
    said, found = capsys.readouterr().out, json.loads(numbers.read_text())
    assert file.exists()
    assert found["difference"] < 1e-5
    assert "MiB" in said and "differ by" in said and "times the plain model's" in said


def test_export_without_the_runtime(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file is written, and the numbers that there are."""
    monkeypatch.setattr(runtimes, "runtime_of", lambda format: None)
    file, numbers = tmp_path / "model.pt2", tmp_path / "numbers.json"
    words = ["export", f"{HERE}:tiny_vit", "--r", "4", *INPUT, "--placement", "stream", "-o", str(file)]
    assert cli.main([*words, "--json", str(numbers)]) == 0
    assert file.exists() and "not run" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["format"] == "pt2"


def test_a_runtime_that_does_not_run_the_file_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """onnxruntime has no kernels for bfloat16 on a CPU, and exceptions of its own."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = ["export", f"{HERE}:tiny_vit", "--r", "4", *INPUT, "--placement", "stream", "--dtype", "bfloat16"]
    assert cli.main([*words, "--format", "onnx", "-o", str(tmp_path / "model.onnx")]) == 2
    error = capsys.readouterr().err
    assert "is written, but onnxruntime does not run it here" in error
    assert error.count("\n") == 1


def test_export_of_nothing_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["export", f"{HERE}:convolution", "--size", "16", "-o", str(tmp_path / "model.pt2")]
    with pytest.warns(ToMeWarning):
        assert cli.main(words) == 2
    assert "nothing to export" in capsys.readouterr().err


def test_bench_times_both_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", f"{HERE}:tiny_vit", "--r", "4", *INPUT, "--inner", "eager", "--rounds", "2", "--no-cold"]
    assert cli.main([*words, "--json", str(out)]) == 0
    assert "images/s" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert set(written["candidates"]) == {"plain", "tome_fx"}
    assert written["candidates"]["plain"]["ratio"] == 1.0
    for row in written["candidates"].values():
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(2 / row["median"])
        assert row["cold"] is None


def test_the_cold_process_rebuilds_a_candidate_from_the_command_line() -> None:
    """A tuple r would come back from JSON as a list, which means another schedule: hence the words themselves."""
    words = ["bench", f"{HERE}:tiny_vit", "--r", "8,-1", *INPUT, "--inner", "eager"]
    case = timing.Case("tome_fx.cli:bench_step", {"argv": words, "candidate": "tome_fx"})
    merged = cli.bench_step(**json.loads(json.dumps(dict(case.kwargs))))()
    plain = cli.bench_step(words, "plain")()
    assert isinstance(merged, torch.Tensor)
    assert isinstance(plain, torch.Tensor)
    assert merged.shape == plain.shape
    assert not torch.equal(merged, plain)


@pytest.mark.slow
def test_bench_measures_cold_compiles(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert cli.main(["bench", f"{HERE}:tiny_vit", "--r", "4", *INPUT, "--rounds", "1", "--json", str(out)]) == 0
    candidates = json.loads(out.read_text())["candidates"]
    assert candidates["plain"]["cold"]["passes"] == {}
    assert candidates["tome_fx"]["cold"]["passes"]
    assert all(row["cold"]["seconds"] > 0 and row["cold"]["peak_bytes"] > 0 for row in candidates.values())


MISTAKES = [
    (["explain", "vit_smal_patch16_224"], "did you mean vit_small_patch16_224"),
    (["explain", "vit_tiny_patch16_224.nonsense"], "nonsense"),
    (["explain", "resnet18", "--input", "1,3,32,32"], "--batch and --size"),
    (["explain", "no_such_package.models:vit"], "no module 'no_such_package'"),
    (["explain", "tests.nothing:vit"], "no module 'tests.nothing'"),
    (["explain", f"{HERE}:nothing"], "nothing"),
    (["explain", f"{HERE}:NUMBER"], "not a function"),
    (["explain", f"{HERE}:no_module"], "returned int"),
    (["explain", f"{HERE}:"], "package.module:function"),
    (["explain", f"{HERE}:tiny_vit", "--input", "1,5,24,24"], "does not take an input [1, 5, 24, 24]"),
    (["explain", f"{HERE}:tiny_vit", "--input", "1,3,24,24", "--size", "24"], "leave --size out"),
    (["explain", f"{HERE}:tiny_vit", "--pretrained"], "--pretrained is for timm"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--metric", "kee"], "metric"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--placement", "nowhere"], "placement"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--merging", "men"], "merging must be one of"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--matcher", "nobody"], "matcher must be one of"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--r", "-3"], "r must be"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--r", "1.5"], "r must be"),
    (["bench", f"{HERE}:tiny_vit", *INPUT, "--flops", "2"], "flops must be"),
    (["explain", f"{HERE}:tiny_vit", *INPUT, "--r", "4,4,4,4"], "lists 4 blocks"),
    (["explain", f"{HERE}:convolution", "--size", "16", "--strict"], "nothing merged"),
    (["bench", f"{HERE}:convolution", "--size", "16", "--strict", "--inner", "eager"], "nothing merged"),
    (["export", f"{HERE}:tiny_vit", *INPUT, "--format", "openvino", "-o", "model.bin"], "must end in .xml"),
    (["demo", "--out", "no/such/folder/picture.png"], "folder"),
]


@pytest.mark.parametrize(
    ("words", "sentence"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_gets_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    if ":" not in words[1] and words[0] != "demo":
        pytest.importorskip("timm")
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("tome_fx: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["explain"], "model"),
        (["bench", "m", "--r", "some"], "count per block"),
        (["bench", "m", "--r", "8", "--flops", "0.5"], "not allowed with"),
        (["bench", "m", "--batch", "0"], "above 0"),
        (["bench", "m", "--rounds", "two"], "above 0"),
        (["bench", "m", "--input", "1,3,x"], "above 0"),
        (["bench", "m", "--device", "toaster"], "no device of this machine"),
        (["bench", "m", "--dtype", "int8"], "invalid choice"),
        (["bench", "m", "--json", "no/such/folder/out.json"], "cannot write"),
        (["measure", "m"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_word_that_cannot_be_parsed(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_without_timm_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subjects.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["explain", "vit_tiny_patch16_224"]) == 2
    assert "pip install timm torchvision" in capsys.readouterr().err


def test_an_import_error_inside_the_module_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing dependency of the user's module is not a missing module: the sentence would point at the wrong one."""
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        cli.main(["explain", "needs_more:vit"])


def test_the_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = pytest.importorskip("tome_fx.demo")
    got: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run", lambda photo=None, **options: got.update(photo=photo, **options))
    assert cli.main(["demo", "--photo", "cat.jpg", "--r", "24", "--out", "cat.png"]) == 0
    assert {key: got[key] for key in ("photo", "r", "out")} == {"photo": "cat.jpg", "r": 24, "out": "cat.png"}
