"""The benchmarks' rivals do what they say: a rival that is wrong or slow by mistake would flatter tome_fx."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # its scripts import each other by name

from rich.console import Console  # noqa: E402

import against  # noqa: E402
import attention_forms  # noqa: E402
import cases  # noqa: E402
import growth  # noqa: E402
import harness  # noqa: E402
import language  # noqa: E402
import match_growth  # noqa: E402
import models  # noqa: E402
import oracle  # noqa: E402
import report  # noqa: E402
import schedules  # noqa: E402
import shares  # noqa: E402
import soak  # noqa: E402
import speed  # noqa: E402
import tome_patch  # noqa: E402
import tune as tuning  # noqa: E402
from tests.models import redraw  # noqa: E402
from tome_fx import SiteReport, ToMeReport, attention, timing, tome_backend  # noqa: E402

PREFIXES = [{}, {"reg_tokens": 4}, {"reg_tokens": 3}]


def vit(**options: object) -> nn.Module:
    """65 tokens and more, four blocks, random weights large enough to be felt."""
    settings = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**settings, **options)
    return redraw(model).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def palette() -> torch.Tensor:
    """Two images of four random patches each, tiled at random: every merge finds an equal partner."""
    patches = torch.randn(2, 4, 3, 8, 8)
    chosen = patches[torch.arange(2)[:, None], torch.randint(0, 4, (2, 64))]
    return chosen.view(2, 8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)


def token_counts(model: nn.Module, blocks: nn.Module) -> list[int]:
    """Tokens that leave each of `blocks` in one pass."""
    counts: list[int] = []

    def record(_: nn.Module, __: object, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        counts.append((out if isinstance(out, torch.Tensor) else out[0]).shape[1])

    hooks = [block.register_forward_hook(record) for block in blocks.children()]
    model(images())
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_r_0_is_the_model(prefix: dict[str, int]) -> None:
    model, x = vit(**prefix), images()
    expected = model(x)
    for variant in (oracle.slice_oracle, tome_patch.tome_patch):
        torch.testing.assert_close(variant(copy.deepcopy(model), 0)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 4, 8])
@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_the_patch_is_lossless_on_equal_tokens(prefix: dict[str, int], r: int) -> None:
    model, x = vit(**prefix), palette()
    torch.nn.init.zeros_(model.pos_embed)
    expected = model(x)
    torch.testing.assert_close(tome_patch.tome_patch(model, r)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_oracle_and_patch_leave_the_same_tokens(prefix: dict[str, int]) -> None:
    base = 65 + prefix.get("reg_tokens", 0)
    sliced = oracle.slice_oracle(vit(**prefix), 8)
    patched = tome_patch.tome_patch(vit(**prefix), 8)
    expected = [base - 8 * layer for layer in (1, 2, 3, 4)]
    assert token_counts(sliced, sliced.blocks) == expected
    assert token_counts(patched, patched.blocks.blocks) == expected


def test_no_more_than_half_is_removed() -> None:
    assert oracle.tokens_removed(64, 1025, 1) == 64
    assert oracle.tokens_removed(1000, 65, 1) == 32
    assert oracle.tokens_removed(1000, 1, 1) == 0


def test_the_patch_refuses_a_mean_over_merged_tokens() -> None:
    with pytest.raises(ValueError, match="class token"):
        tome_patch.tome_patch(vit(global_pool="avg", class_token=True), 4)


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_tome_fx_and_the_patch_agree(prefix: dict[str, int]) -> None:
    """Two programs that share no code, on inputs where the merges are lossy."""
    model, x = vit(**prefix), images()
    merged = torch.compile(model, backend=tome_backend(r=8, placement="stream", inner="eager", strict=True))
    with torch.no_grad():
        mine = merged(x)
        torch.testing.assert_close(mine, tome_patch.tome_patch(copy.deepcopy(model), 8)(x), rtol=1e-4, atol=1e-4)


def test_a_variant_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no variant"):
        cases.variant_of(vit(), "magic", 4)


# -- the table of cases ------------------------------------------------------------------------------------------------

TOKENS = {
    "vit_small_512": 1025,
    "vit_base_384": 577,
    "vit_huge_518": 1370,
    "video_large": 1568,
    "audio_base_512": 512,
    "ast_base_1212": 1214,
    "sam_base_4096": 4096,
    "dit_base_1024": 1024,
    "dit_base_4096": 4096,
}
STREAM = ["deit_small_r13", "vit_huge_518", "video_large", "audio_base_512", "ast_base_1212"]
BRANCH = ["sam_base_4096", "dit_base_1024"]
"""One case of each kind; the others differ from them in size alone."""


def tiny(name: str) -> dict[str, Any]:
    """Options that make a case small: two narrow blocks, 32 to 49 tokens; the kind of model stays."""
    case = cases.CASES[name]
    small: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    if case.builder == "vit":
        patch = 14 if "patch14" in case.options["model"] else 16
        return {**small, "img_size": 6 * patch}
    if case.builder == "dit":
        return {**small, "input_shape": (4, 12, 12)}
    channels, *size = case.options["input_shape"]
    return {**small, "input_shape": (channels, *((4, 64, 64) if len(size) == 3 else (96, 96)))}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., timing.Step]:
    """`cases.build` of a case made tiny, without Inductor: Dynamo and all passes run, the graphs are called eagerly.

    Without the profit test too: merges of so few tokens do not pay.
    """
    torch._dynamo.reset()
    cases._original.cache_clear()

    def backend(r: int, placement: str) -> object:
        where = "stream" if placement == "auto" else placement
        return tome_backend(r=r, placement=where, inner="eager", strict=True)

    monkeypatch.setattr(cases, "tome_backend", backend)
    compiled = cases.compiled
    monkeypatch.setattr(cases, "compiled", lambda net, backend="eager", **_: compiled(net, backend=backend))

    def small(name: str, variant: str, r: int = 4, train: bool = False) -> timing.Step:
        job = cases.job(cases.Setting(name, batch=2, train=train), variant, r, tiny(name))
        return timing.load_object(job.target)(**json.loads(json.dumps(job.kwargs)))

    return small


def test_names_are_unique_and_counts_of_tokens_are_those_of_the_models() -> None:
    assert len(cases.CASES) == len(cases.TABLE)
    assert {name: cases.tokens(cases.CASES[name]) for name in TOKENS} == TOKENS
    assert {case.group for case in cases.TABLE} == set(report.GROUPS)


@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_has_an_oracle_of_its_shape(name: str, build: Callable[..., timing.Step]) -> None:
    out, limit = build(name, "eager")(), build(name, "oracle")()
    assert out.shape[0] == 2
    assert limit.shape == out.shape
    assert not torch.allclose(limit, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_schedule_reaches_the_backend_of_a_fresh_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []
    monkeypatch.setattr(cases, "tome_backend", lambda **options: seen.append(options))
    monkeypatch.setattr(cases, "compiled", lambda net, **_: net)
    setting, options = cases.Setting(schedules.CASE, batch=1), schedules.SCHEDULES[name]
    job = cases.job(setting, "tome_fx", options=tiny(schedules.CASE), backend=options)
    timing.load_object(job.target)(**json.loads(json.dumps(job.kwargs)))
    case = cases.CASES[schedules.CASE]
    assert seen == [{"r": case.r, "placement": case.placement, **options}]


@pytest.mark.parametrize("name", STREAM)
def test_a_stream_case_in_every_variant(name: str, build: Callable[..., timing.Step]) -> None:
    """Patch and tome_fx share no code and compute the same, which is not what the model does."""
    out = {variant: build(name, variant)() for variant in cases.LABELS if variant != "oracle"}
    torch.testing.assert_close(out["inductor"], out["eager"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out["patch"], out["tome_fx"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out["patch_compiled"], out["patch"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out["patch"], out["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BRANCH)
def test_a_branch_case_in_every_variant(name: str, build: Callable[..., timing.Step]) -> None:
    out = {variant: build(name, variant)() for variant in ("eager", "inductor", "tome_fx")}
    torch.testing.assert_close(out["inductor"], out["eager"], rtol=1e-4, atol=1e-4)
    assert out["tome_fx"].shape == out["eager"].shape
    assert not torch.allclose(out["tome_fx"], out["eager"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the patch handles"):
        build(name, "patch")


@pytest.mark.parametrize("name", ["video_large", "ast_base_1212", *BRANCH])
def test_rivals_with_r_0_are_the_model(name: str, build: Callable[..., timing.Step]) -> None:
    expected = build(name, "eager")()
    for variant in ("oracle", "patch") if name in STREAM else ("oracle",):
        torch.testing.assert_close(build(name, variant, r=0)(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_patch_of_an_encoder_leaves_the_tokens_it_should(prefix: int) -> None:
    """And a mean over merged tokens is one over all: the sizes sum to their number."""
    net = models.Encoder((3, 4, 64, 64), (2, 16, 16), prefix=prefix, embed_dim=32, depth=3, num_heads=2)
    x = models.inputs(net, 2)[0]
    patched = tome_patch.tome_patch(net, 4)
    sizes = []
    for block in patched.blocks.blocks:
        block.register_forward_hook(lambda _, __, out: sizes.append(out[1]))
    patched(x)
    assert [size.shape[1] for size in sizes] == [28 + prefix, 24 + prefix, 20 + prefix]
    torch.testing.assert_close(sizes[-1].sum(1), torch.full((2, 1), 32.0 + prefix))


def test_variants_share_their_weights_but_not_when_they_train(build: Callable[..., timing.Step]) -> None:
    """A training step updates the weights it reads: of its own copy."""
    before = build("vit_base_r16", "eager")()
    for variant in ("tome_fx", "oracle", "patch"):
        step = build("vit_base_r16", variant, train=True)
        assert step() != step()
    torch.testing.assert_close(build("vit_base_r16", "eager")(), before)
    original = cases._original.__wrapped__("vit", json.dumps(cases.CASES["deit_small_r13"].options), "meta", "float32")
    assert {id(p) for p in cases._sharing(original).parameters()} == {id(p) for p in original.parameters()}


def test_claims_are_made_where_the_issue_makes_them() -> None:
    def claimed(*setting: Any) -> dict[str, float]:
        return {limit.ratio: limit.limit for limit in cases.Setting(*setting).limits}

    assert claimed("vit_base_r16", 8) == {"oracle": 0.95, "memory": 1.0}
    assert claimed("vit_base_r16", 1) == {"oracle": 0.90, "memory": 1.0}
    assert claimed("vit_base_r16", 8, "cpu", "bfloat16") == {"oracle": 0.90, "memory": 1.0}
    assert claimed("vit_base_r16", 8, "cpu", "float32", True) == {"oracle": 0.90, "memory": 1.0}
    assert claimed("vit_small_512", 2) == {"oracle": 0.95, "patch": 1.15, "cold": 1.5, "memory": 1.0}
    assert claimed("deit_small_r13", 128, "cuda", "bfloat16") == {"inductor": 1.5, "oracle": 0.90, "memory": 1.0}
    assert claimed("vit_base_r8", 8) == {"memory": 1.0}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_has_every_case_once(device: str) -> None:
    planned = list(cases.plan(device))
    assert {setting.case for setting in planned} == cases.CASES.keys()
    assert len({setting.name for setting in planned}) == len(planned)
    assert {setting.dtype for setting in planned} == {"float32", "bfloat16"}
    assert any(setting.train for setting in planned)


# -- the scripts -------------------------------------------------------------------------------------------------------


def test_the_plan_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    args = SimpleNamespace(all=True, cases=["deit_small_r13"], device="cpu", fresh=False, out=tmp_path)
    console = Console(quiet=True)
    first = [setting.name for setting in speed.settings(args, console)]
    harness.result_path(tmp_path, first[0], "cpu").touch()
    assert [setting.name for setting in speed.settings(args, console)] == first[1:]
    args.fresh = True
    assert [setting.name for setting in speed.settings(args, console)] == first


def test_the_command_line_of_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "dit_base_1024", "--batch", "3", "--mode", "max-autotune"])
    args = speed.arguments()
    assert speed.settings(args, Console(quiet=True)) == [cases.Setting("dit_base_1024", 3)]
    rows = speed.variants_of(cases.CASES["dit_base_1024"], args)
    assert rows[:4] == ["eager", "inductor", "tome_fx", "oracle"]
    assert [cases.label(row) for row in rows[4:]] == [
        "Inductor, max-autotune",
        "tome_fx, max-autotune",
        "slice oracle, max-autotune",
    ]
    monkeypatch.setattr(sys, "argv", ["speed.py", "dit_base_1024", "vit_gigantic"])
    with pytest.raises(SystemExit):
        speed.arguments()
    assert "no case vit_gigantic" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_without_a_cuda_device_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    harness.require("cpu")
    with pytest.raises(SystemExit) as error:
        harness.require("cuda")
    assert error.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_variant_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(case: timing.Case, *_: object) -> timing.ColdCompile:
        if case.kwargs:
            raise timing.ChildError("no memory")
        return timing.ColdCompile(1.0, 1.0, 1.0, 1, {})

    monkeypatch.setattr(timing, "cold_compile", cold)
    good = harness.Variant("good", timing.Case("tests.test_timing:step"))
    bad = harness.Variant("bad", timing.Case("tests.test_timing:step", {"fail": True}))
    measured, failed = harness.measure({"bad": bad, "good": good}, 2, "cpu", Console(quiet=True))
    assert list(measured) == ["good"] and len(measured["good"].seconds) == 2
    assert failed == {"bad": "no memory"}


def measurements() -> dict[str, harness.Measured]:
    """tome_fx at twice the speed of Inductor, 0.8 of the oracle's, with half of Inductor's memory."""
    plain = timing.ColdCompile(seconds=10.0, setup=9.0, call=0.5, peak_bytes=2**30, passes={})
    mine = timing.ColdCompile(seconds=30.0, setup=9.0, call=0.5, peak_bytes=2**29, passes={"plan": 0.5})
    return {
        "inductor": harness.Measured("Inductor", [2.0, 2.2], 3.0, plain),
        "tome_fx": harness.Measured("tome_fx", [1.0, 1.1], 3.0, mine),
        "oracle": harness.Measured("slice oracle", [0.8, 0.88], 3.0, plain),
        "patch": harness.Measured("patch", [4.0, 4.4], 4.0, None),
    }


def test_results_are_written_and_claims_judged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    limits = [
        harness.Limit("inductor", 1.5),
        harness.Limit("cold", 1.5, at_least=False),
        harness.Limit("patch", 1.15),  # the compiled patch was not measured
    ]
    console = Console(record=True, width=100)
    info = harness.machine("cpu", "float32", console)
    settings = {"r": 4, "batch": 2, "rounds": 2}
    harness.publish(harness.record("trial", info, measurements(), "inductor", limits, settings), tmp_path, console)
    written = json.loads((tmp_path / "trial-cpu.json").read_text())
    assert written["settings"] == settings
    assert written["variants"]["tome_fx"]["ratio"] == pytest.approx(2.0)
    assert written["variants"]["patch"]["images_per_second"] == pytest.approx(2 / 4.2)
    assert [claim["holds"] for claim in written["claims"]] == [True, False]
    assert (tmp_path / "trial-cpu.png").stat().st_size > 0
    printed = console.export_text()
    assert "speed of tome_fx over Inductor's: 2.000 ≥ 1.5 holds" in printed
    assert "cold compile of tome_fx over Inductor's: 3.000 ≤ 1.5 does not hold" in printed


def test_ratios() -> None:
    found = harness.ratios(harness.rows(measurements(), "inductor", 2))
    expected = {"inductor": 2.0, "oracle": 0.8, "limit": 2.5, "cold": 3.0, "memory": 0.5, "passes": 0.05}
    assert found == pytest.approx(expected)


def made_up() -> dict[str, Any]:
    """Results of every kind: with and without the settings of speed.py, curves and shares."""
    info = harness.machine("cpu", "float32", Console(quiet=True))
    old = harness.record("old", info, measurements(), "inductor", [], {"r": 64, "batch": 2, "rounds": 2})
    del old["left_out"]
    about = {"case": "dit_base_1024", "group": "diffusion", "tokens": 1024, "dtype": "bfloat16", "train": True}
    limits = [harness.Limit("oracle", 0.9)]
    settings = {"r": 512, "batch": 1, "rounds": 2, **about}
    new = harness.record("new", info, measurements(), "inductor", limits, settings, {"patch": "nobody\nhas one"})
    point = {"settings": {"tokens": 197, "batch": 1, "r": 24}, "variants": old["variants"]}
    seconds = {"tome_fx": dict.fromkeys(shares.GROUPS, 0.3), "oracle": dict.fromkeys(shares.GROUPS, 0.2)}
    return {
        "new-cpu": new,
        "old-cpu": old,
        "growth-cpu": {"benchmark": "growth", "machine": info, "points": [point]},
        "match_growth-cpu": {"benchmark": "match_growth", "machine": info, "points": matched()},
        "shares-cpu": {"benchmark": "shares", "machine": info, "cases": {"some:1": {"seconds": seconds}}},
        "schedules-cpu": {"benchmark": "schedules", "machine": info, "settings": about | {"batch": 2},
                          "schedules": [scheduled()]},
        "soak-cpu": {"benchmark": "soak", "machine": info, "asked": 1.1, "cases": {"some": soaked()}},
    }  # fmt: skip


def soaked() -> dict[str, Any]:
    """A case as soak.py finds it: half of Inductor's growth at twice its speed."""
    arms = {arm: {"seconds": [0.2 * n, 0.4 * n], "curve": [[20, 2**20], [40, n * 2**23]], "trimmed": n * 2**22}
            for arm, n in (("inductor", 2), ("tome_fx", 1))}  # fmt: skip
    return {"settings": {"calls": 40, "samples": [2, 12], "r": 16, "threads": 1}, "arms": arms, **soak.over(arms)}


def matched() -> list[dict[str, Any]]:
    """Two numbers of tokens as match_growth.py finds them."""
    form = {"seconds": 0.25, "bytes": 2**20}
    return [{"tokens": n, "forms": {"match": form, "window:8": {**form, "seconds": n / 4096}}} for n in (1024, 4096)]


def scheduled() -> dict[str, Any]:
    """A schedule as schedules.py finds it."""
    sites = [SiteReport(f"block {i}", (a, b), 1, True) for i, (a, b) in enumerate([(1025, 897), (897, 769)])]
    report = ToMeReport(sites=sites, flops_before=4.0, flops_after=3.0)
    measured = measurements()
    return schedules.row(
        "every=2", {**measured, "every=2": measured["tome_fx"], schedules.BASE: measured["oracle"]}, report
    )


def test_the_report(tmp_path: Path) -> None:
    for name, result in made_up().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "zoo.json").write_text('{"machine": {}, "rows": []}')
    page = report.render(report.read(tmp_path), "results")
    assert "## Image: cpu, float32, inference" in page
    assert "## Diffusion: cpu, bfloat16, training step" in page
    assert page.index("## Image") < page.index("## Diffusion")
    row = "2.00 | 2.50 | 0.80 | - | 3.00 | 0.50 | 1050 (1000)"
    assert f"| [old](results/old-cpu.png) |  | 64 | 2 | {row} | 1.9 | 0.50 |" in page
    assert "| speed of tome_fx over the slice oracle's | new-cpu | 0.800 | at least 0.9 | **does not hold** |" in page
    assert "| new-cpu | patch | 0.50 | - | 4200 (4000) |" in page
    assert "- new-cpu, patch: has one" in page
    assert "| 197 | 1 | 24 | +25.0 % | 2.00 | 2.50 |" in page
    assert "| 4,096 | 250 ms, 1 MiB | 1,000 ms, 1 MiB |" in page and "`match` 1, `window:8` 4." in page
    assert "| some:1 | tome_fx | 1.50 | 20.0 % |" in page
    assert "| every=2 | 2 | 769 | 0.75 | 2.00 | 0.80 | 3.00 |" in page
    assert page.count(torch.__version__) == 1  # one machine, once
    assert "zoo" not in page


def test_matching_alone_is_measured_in_every_form() -> None:
    """The local ones hold less than the matrix of all pairs; the paper's is its ATen form's equal."""
    with torch.no_grad():
        found = {name: fn() for name, fn in match_growth.forms(16, "cpu").items()}
    assert {x[2].shape for x in found.values()} == {(1, 64)}
    assert torch.equal(found["match"][0], found["match, ATen"][0])
    point = match_growth.point(8, 1, "cpu")
    assert point["tokens"] == 64 and all(of["seconds"] > 0 <= of["bytes"] for of in point["forms"].values())


def test_builds_take_turns() -> None:
    """A call of each row a round, in one order."""
    asked: list[str] = []
    calls = {row: (lambda name: (asked.append(name) or (1.0, 2.0)), row) for row in ("this", "other")}
    assert against.rounds(calls, 2) == {"this": [(1.0, 2.0)] * 2, "other": [(1.0, 2.0)] * 2}
    assert asked == ["this", "other"] * 2


def test_growth_of_memory_is_over_inductors() -> None:
    assert soak.over(soaked()["arms"]) == {"growth": 0.5, "trimmed": 0.5, "speed": 2.0}
    assert soak.cells("some", soaked()) == ["some", "2 to 12", "40", "+16 (+8)", "+8 (+4)", "0.50 (0.50)", "2.00"]


def test_points_of_growth_are_measured_once() -> None:
    assert growth.points([224, 512], [1, 4]) == [(224, 1), (512, 1), (224, 4)]


def test_forms_of_attention_are_measured_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner end to end, without compiling; the table it writes is one that `lower` can read."""
    monkeypatch.setattr(attention_forms, "compiled", lambda fn: fn)
    table, shape = tmp_path / "table.json", ["--head-dims", "16", "--tokens", "20", "40", "--batches", "1", "2"]
    monkeypatch.setattr(sys, "argv", [
        "attention_forms.py", "--device", "cpu", "--rounds", "2", "--dtypes", "float32", *shape,
        "--out", str(tmp_path), "--table", str(table),
    ])  # fmt: skip
    assert attention_forms.main() == 0
    result = json.loads((tmp_path / "attention_forms-cpu.json").read_text())
    assert [(p["tokens"], p["batch"]) for p in result["points"]] == [(20, 1), (20, 2), (40, 1), (40, 2)]
    assert all(set(p["seconds"]) == {"mask", *attention.FORMS} and not p["left_out"] for p in result["points"])
    assert json.loads(table.read_text())["measured"]["torch"] == torch.__version__
    attention.read(table)


def test_rows_of_the_table_of_attention() -> None:
    """The fastest over all batches, where it gains enough; ranges do not overlap; a form that failed is out."""
    times = {
        (64, 100): [{"mask": [2.0], "column": [1.0], "flex": [3.0]}, {"mask": [2.0], "column": [1.0], "flex": [0.1]}],
        (64, 400): [{"mask": [2.0], "column": [1.0]}, {"mask": [2.0], "flex": [0.1]}],
        (64, 1600): [{"mask": [2.0], "efficient": [1.99]}, {}],
        (128, 100): [{"mask": [2.0], "flex": [1.0]}, {"mask": [2.0], "flex": [1.0]}],
        (128, 400): [{"mask": [2.0], "column": [1.0]}, {"mask": [2.0], "column": [1.0]}],
        (128, 1600): [{"mask": [1.0], "cudnn": [0.5]}, {"mask": [1.0], "cudnn": [0.5]}],
    }
    points = [
        {"dtype": "bfloat16", "head_dim": d, "tokens": n, "batch": b, "seconds": seconds}
        for (d, n), found in times.items()
        for b, seconds in enumerate(found)
    ]
    found = [(row["form"], row["head_dim"], row["tokens"]) for row in attention_forms.rows(points)]
    assert found == [
        ("flex", [1, 64], [1, 200]),
        ("flex", [65, 128], [1, 200]),
        ("column", [65, 128], [201, 800]),
        ("cudnn", [65, 128], [801, None]),
    ]


def test_curves_and_shares_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    variants = harness.rows(measurements(), "inductor", 1)
    places = [(197, 1), (1025, 1), (197, 8)]
    curves = [{"settings": {"tokens": tokens, "batch": batch}, "variants": variants} for tokens, batch in places]
    growth.plot(curves, "curves", tmp_path / "growth.png")
    shares.plot(made_up()["shares-cpu"]["cases"], "shares", tmp_path / "shares.png")
    match_growth.plot(matched(), "matching", tmp_path / "match_growth.png")
    soak.plot({"some": soaked()}, "batches", tmp_path / "soak.png")
    for name in ("growth", "shares", "match_growth", "soak"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_shares_count_an_operator_with_all_it_calls() -> None:
    def event(name: str, seconds: float, parent: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, cpu_parent=parent, cpu_time_total=seconds * 1e6, device_type=None)

    match = event("tome::match_size", 2.0)
    linear = event("aten::linear", 4.0)
    inner = event("aten::addmm", 3.0, linear)
    events = [match, event("aten::mm", 1.0, match), event("aten::topk", 0.5, match), linear, inner]
    events += [event("aten::copy_", 1.0, inner), event("tome::merge_add", 0.25), event("graph_0_cpp_fused_gelu", 9.0)]
    events += [event("aten::_scaled_dot_product_flash_attention_for_cpu", 5.0)]
    expected = {"matching": 2.0, "merging": 0.25, "attention": 5.0, "matrix products": 4.0}
    assert shares.grouped(events, cuda=False) == pytest.approx(expected)


def test_shares_of_a_call() -> None:
    a = torch.randn(256, 256)
    found = shares.shares({"product": lambda: (a @ a).exp()}, "cpu", rounds=2)["product"]
    assert set(found) == set(shares.GROUPS)
    assert found["matrix products"] > 0 and found[shares.REST] > 0
    assert found["matching"] == found["merging"] == found["attention"] == 0


def test_a_language_model_behind_a_merged_tower() -> None:
    """Unmerged the pipeline says what the model says by itself; merged the cache holds what was counted."""
    pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
              "image_size": 48, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    model, pixels = language.llava(vision, text), torch.randn(1, 3, 48, 48)
    assert language.schedule(17, 3) == [6, 6, 5]
    with torch.no_grad():
        pipes = {name: language.Pipeline(model, pixels, r) for name, r in (("0%", [0]), ("47%", [6, 6, 5]))}
        rows = language.measured(pipes, 1, 4, lambda line: None)
        plain = pipes["0%"]
        plain.prefill()
        own = model.generate(plain.prompt, pixel_values=pixels, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(own[:, -4:], plain.decode(4))
    assert [row.image_tokens for row in rows.values()] == [36, 19]
    assert [row.cache_entries for row in rows.values()] == [68, 51]
    assert [row.cache_bytes for row in rows.values()] == [entries * 2 * 2 * 24 * 4 for entries in (68, 51)]
    result = json.loads(json.dumps(language.record(rows, {}, {})))
    assert language.table(language.loaded(result)) == language.table(rows)


@pytest.mark.parametrize("step", [1, 10])
def test_the_families_are_searched_up_to_the_limit(step: int) -> None:
    """The fastest member that keeps the target is found, whether every one is tried or every tenth and those around."""
    tried: list[str] = []

    class Searching:
        task = SimpleNamespace(base={})
        whole = 1

        def list_of(self, family: str, r: int) -> tuple[int]:
            return (r,)

        def evaluate(self, r: tuple[int], name: str, *_: Any, **__: Any) -> Any:
            tried.append(name)
            return SimpleNamespace(name=name, loss=r[0] * (0.027 if name == f"r={r[0]}" else 0.1), speed=1 + r[0])

    target = SimpleNamespace(target=SimpleNamespace(most=1.0), most=200, step=step)
    best, points = tuning.baseline(Searching(), target)  # type: ignore[arg-type]
    assert best is not None and best.name == "r=37" and len(points) == len(tried)
    assert {tuning.kind_of(name) for name in tried} == {"r", "(r, -1)", "(r, 1)"}
    assert len(tried) < 60 or step == 1
