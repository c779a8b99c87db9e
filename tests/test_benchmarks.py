"""The benchmarks' rivals do what they say: a rival that is wrong or slow by mistake would flatter tome_fx."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # its scripts import each other by name

from rich.console import Console  # noqa: E402

import cases  # noqa: E402
import harness  # noqa: E402
import oracle  # noqa: E402
import tome_patch  # noqa: E402
from tests.models import redraw  # noqa: E402
from tome_fx import timing, tome_backend  # noqa: E402

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
    merged = torch.compile(model, backend=tome_backend(r=8, inner="eager", strict=True))
    with torch.no_grad():
        mine = merged(x)
        torch.testing.assert_close(mine, tome_patch.tome_patch(copy.deepcopy(model), 8)(x), rtol=1e-4, atol=1e-4)


def test_a_variant_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no variant"):
        cases.variant_of(vit(), "magic", 4)


def test_results_are_written_and_claims_judged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cold = timing.ColdCompile(seconds=10.0, setup=9.0, call=0.5, peak_bytes=2**30, passes={"plan": 0.5})
    measured = {
        "inductor": harness.Measured("Inductor", [2.0, 2.2], 3.0, cold),
        "tome_fx": harness.Measured("tome_fx", [1.0, 1.1], 3.0, cold),
        "patch": harness.Measured("patch", [4.0, 4.4], 4.0, None),
    }
    claims = [harness.Claim("fast", 2.0, 1.5, at_least=True), harness.Claim("small", 2.0, 1.5, at_least=False)]
    args = argparse.Namespace(device="cpu", dtype="float32", r=4, batch=2, rounds=2)
    console = Console(record=True, width=100)
    info = harness.machine(args, console)
    harness.publish(harness.record("trial", info, measured, "inductor", claims, args), tmp_path, console)
    written = json.loads((tmp_path / "trial-cpu.json").read_text())
    assert written["variants"]["tome_fx"]["ratio"] == pytest.approx(2.0)
    assert written["variants"]["patch"]["images_per_second"] == pytest.approx(2 / 4.2)
    assert [claim["holds"] for claim in written["claims"]] == [True, False]
    assert (tmp_path / "trial-cpu.png").stat().st_size > 0
    printed = console.export_text()
    assert "fast: 2.000 ≥ 1.5 holds" in printed
    assert "small: 2.000 ≤ 1.5 does not hold" in printed
