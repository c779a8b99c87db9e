"""Real models of timm, torchvision and transformers (image, video, audio), tiny: the lossless law, shapes, r=0."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import tome_fx
from tests import palette
from tests.library import CASES, DEPTH, Case
from tests.models import effective
from tests.palette import assert_lossless
from tests.strategies import thinned

R = 4
NO_RULE = {"aten.type_as": "VideoMAE casts its position table, before anything is merged"}
IDENTITY = [name for name in CASES if not name.endswith("-eager") and "classify" not in name]


def tokens(case: Case, r: int = R) -> list[tuple[int, int]]:
    """(before, after) of the merges when every block merges."""
    out, n = [], case.tokens
    for _ in range(DEPTH):
        out.append((n, n - effective(n, case.prefix, r)))
        n = out[-1][1]
    return out


@pytest.mark.parametrize("name", thinned(CASES, 2))
def test_lossless(name: str) -> None:
    """Every merge joins equal tokens, so nothing may change; and all blocks merge, prefix tokens protected."""
    case = CASES[name]()
    exempt = name == "timm-parallel_things"  # two attentions side by side in a block: one merge for both will do
    report = assert_lossless(case.model, case.args, R, tokens=None if exempt else tokens(case), tol=3e-5)
    assert set(report.unknown_ops) <= NO_RULE.keys(), f"ops of the zoo without a rule: {report.unknown_ops}"


@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip", "timm-gap", "torchvision-vit", "transformers-dinov2-sdpa",
                                  "transformers-videomae-eager", "transformers-whisper-eager"])  # fmt: skip
def test_the_law_can_fail(name: str) -> None:
    """Without proportional attention the same models are visibly off."""
    case = CASES[name]()
    assert_lossless(case.model, case.args, R, tol=3e-5, control=True)


@pytest.mark.parametrize("name", thinned(IDENTITY, 3))
def test_r_zero_is_the_identity(name: str) -> None:
    """Bit for bit what Dynamo's own graph computes, on random input."""
    case = CASES[name]()
    args = case.random_args
    with torch.no_grad():
        want = torch.compile(case.model, backend="eager")(*args)
        got = palette.compiled(case.model, 0)(*args)
    for a, b in zip(palette.leaves(got), palette.leaves(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["timm-vit", "timm-features", "timm-dinov2_reg", "transformers-clip-sdpa",
                                  "transformers-videomae-sdpa", "transformers-ast-eager"])  # fmt: skip
def test_random_input_keeps_shapes(name: str) -> None:
    """Lossy merges: outputs keep shape and dtype and are finite."""
    case = CASES[name]()
    args = case.random_args
    with torch.no_grad():
        want = case.model(*args)
    got, report = palette.run(case.model, args, None, 8, drop_unread=False)
    assert report.merged_sites == DEPTH
    assert palette.distance(got, want) > 0


def test_hidden_states_and_forward_features() -> None:
    """transformers' output_hidden_states and timm's forward_intermediates come back in full length."""
    case = CASES["transformers-vit-sdpa"]()
    assert_lossless(case.model, case.args, R, kwargs={"output_hidden_states": True}, tokens=tokens(case))
    case = CASES["timm-vit"]()
    with torch.no_grad():
        want = case.model.forward_intermediates(*case.args)
        got = palette.compiled(case.model.forward_intermediates, R)(*case.args)
    assert palette.distance(got, want) < 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "deit3_small_patch16_224"])
def test_full_size(name: str) -> None:
    """The models at their real size: r=12 over all layers on palettes of 8 patches."""
    import timm

    model = palette.equalize(timm.create_model(name), seed=0)
    assert_lossless(model, (palette.palette_image(2, 224, 16, k=8),), 12, sites=12, tol=1e-4, control=True)


def test_whisper_reads_the_states_of_a_merged_encoder_once() -> None:
    """As docs/programs.md has it: without its last option, time stamps have `generate` read the same states again."""
    config = WhisperConfig(
        vocab_size=51864, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_target_positions=64, bos_token_id=50257,
        eos_token_id=50256, pad_token_id=50256, decoder_start_token_id=50257, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.no_timestamps_token_id = 50362
    model.generation_config.max_initial_timestamp_index = 50
    model.generation_config.is_multilingual = False
    with torch.no_grad():
        encoder = palette.compiled(model.model.encoder, 200, placement="stream")
        states = encoder(torch.randn(2, 80, 3000)).last_hidden_state
    assert tome_fx.reports()[-1].tokens == [(1500, 1300), (1300, 1100)] and states.shape == (2, 1500, 32)
    given = BaseModelOutput(last_hidden_state=states)
    text = model.generate(
        encoder_outputs=given, return_timestamps=True, max_new_tokens=8, force_unique_generate_call=True
    )
    assert text.shape == (2, 9)
