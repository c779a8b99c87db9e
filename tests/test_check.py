"""`tome_fx.check`: the merged model is the unmerged one with tied groups, and the check can fail."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx
from tests import strategies, test_masks, test_two_streams
from tests.models import Spec, build, redraw
from tome_fx import cli, matching, ops

HERE = "tests.test_check"
ROUNDING = 1e-9
TOKENS = Spec(readout="tokens", stem="tokens", prefix="none")
"""[B, 36, 32] to the same."""


def law(model: Any, args: Any, r: Any = 4, **config: Any) -> tome_fx.Check:
    with torch.no_grad():
        return tome_fx.check(model, args, r=r, **config)


def holds(model: Any, args: Any, r: Any = 4, *, exact: bool = True, **config: Any) -> tome_fx.Check:
    """The law to rounding; exact: without any approximation."""
    found = law(model, args, r, **config)
    assert found.merges, found
    assert found.explained < ROUNDING and found.spelling < ROUNDING and not found.notes, found
    assert all(m.error is None or m.error < ROUNDING for m in found.merges), found
    if exact:
        assert found.error < ROUNDING and not found.approximations, found
    return found


class Coded(nn.Module):
    """A linear layer on 8-bit codes of weights and tokens: the largest of a token stands at an edge between two."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("weight", (linear.weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(-1, keepdim=True) / 127.5
        codes = (rows / scale).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(codes, self.weight.t()).to(x.dtype) * scale * self.scale).unflatten(0, x.shape[:-1])


def test_codes_of_tokens_are_left_unrounded_where_rounding_decides() -> None:
    model, args = build(TOKENS)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Coded(child))
    found = law(model, args, 8, placement="branch")
    assert found.merges and found.explained > found.tolerance > found.unrounded and found.holds, found
    assert "holds up to rounding" in found.summary()


SPECS = [
    Spec(readout="tokens"),
    Spec(readout="mean", mask="bool", attention="matmul"),
    Spec(readout="masked_mean", mask="bool", prefix="none"),
    Spec(readout="attn_pool", mask="float", attention="bmm", layout="nbd"),
    Spec(readout="cls", prefix="late", mask="bool"),
    Spec(readout="mean", extra="front"),
    Spec(readout="mean", extra="sink", attention="matmul", mask="bool"),
    Spec(readout="hidden", slice_write=True, pos="inplace", mlp="relu_"),
    Spec(readout="mean", kind="linear", attention="matmul"),
    Spec(readout="mean", attention="encoder", norm="post", drop=0.1),
    Spec(readout="mean", cross=True),
    Spec(readout="max", attention="matmul", softmax="manual"),
]


def some_slow(cases: Sequence[Any], step: int) -> list[Any]:
    """Each `step`-th by default, the others with the slow ones."""
    return [c if i % step == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(cases)]


@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("spec", some_slow(SPECS, 3), ids=str)
def test_random_tokens_in_many_spellings(spec: Spec, placement: str) -> None:
    """Unequal tokens, random weights: what merging computes is the tied model to the last digits."""
    found = holds(*build(spec), placement=placement)
    assert found.moved > 1e-4, "the test says nothing: merging moved nothing"
    assert min(m.similarity for m in found.merges) < 0.999


def test_a_query_without_any_key() -> None:
    """torch's fused layer reads any float mask as bool, so that random floats mask every key: zero, and no mean."""
    spec = Spec(attention="encoder", prefix="none", readout="mean", mask="float", skip=True)
    holds(*build(spec), r=1, exact=False, placement="stream")


class Joined(nn.Module):
    """Blocks under padding that is joined with itself: of each padded query all keys are ruled out, by a number."""

    def __init__(self, fills: bool) -> None:
        super().__init__()
        self.fills = fills
        self.qkv, self.out = (nn.ModuleList(nn.Linear(32, n) for _ in range(2)) for n in (96, 32))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        both = keep[:, None, :, None] & keep[:, None, None, :]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT
            scores = scores.masked_fill(~both, -2e7) if self.fills else scores + (1 - both.to(scores.dtype)) * -2e7
            x = x + out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("fills", [False, True])
def test_queries_that_numbers_leave_no_key(fills: bool) -> None:
    """2e7 absorbs scores of float32 and none of float64, in which the law is checked."""
    keep = torch.arange(36) < torch.tensor([[36], [20]])
    holds(redraw(Joined(fills)).eval(), (torch.randn(2, 36, 32), keep), placement="stream")


@settings(max_examples=6)
@given(strategies.specs(), st.integers(1, 12), st.sampled_from(["auto", "stream", "branch"]),
       st.sampled_from(["mean", "plain", "keep"]))  # fmt: skip
def test_any_transformer(spec: Spec, r: int, placement: str, merging: str) -> None:
    found = law(*build(spec), r, placement=placement, merging=merging, effects=False)
    assert max(found.explained, found.spelling) < ROUNDING and not found.notes, found


@pytest.mark.parametrize("merging", ["mean", "plain", "keep"])
@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_padding_shares_groups_with_valid_tokens(merging: str, placement: str) -> None:
    """Random pairs put both kinds into one group: the valid ones come out as if alone, in the mean and in the mask."""
    spec = Spec(readout="masked_mean", mask="bool", prefix="none")
    holds(*build(spec), r=8, matcher="random", merging=merging, placement=placement)


@pytest.mark.parametrize("pool", ["times", "where", "attention", "zeroed"])
def test_masked_pools_over_groups_of_both_kinds(pool: str) -> None:
    seen = torch.arange(test_masks.N).expand(2, -1) % torch.tensor([[2], [4]]) == 0
    model = redraw(test_masks.Pooled(pool)).eval()
    holds(model, (torch.randn(2, test_masks.N, test_masks.D), seen), 8, matcher="random", placement="stream")


@pytest.mark.parametrize("form", ["fill", "where other", "minus", "times", "zeroed"])
def test_probabilities_under_a_mask_are_named(form: str) -> None:
    """A group of both kinds shares its probability out evenly when it is returned token by token: nothing else is."""
    seen = torch.arange(test_masks.N).expand(2, -1) % torch.tensor([[2], [4]]) == 0
    model, mask = test_masks.opened(form, "returned", seen)
    x = torch.randn(2, test_masks.N, test_masks.D)
    found = holds(model, (x, mask), 6, exact=False, matcher="random", placement="stream")
    assert found.error > 1e-3 and found.approximations


@pytest.mark.parametrize("rotary", [False, True])
def test_streams_that_an_attention_joins(rotary: bool) -> None:
    model = redraw(test_two_streams.Net("text", rotary=rotary)).eval()
    places = (torch.arange(58.0),) if rotary else ()
    args = (torch.randn(2, 48, 32), torch.randn(2, 10, 32), *places)
    found = holds(model, args, 8, exact=not rotary, placement="stream", effects=False)
    assert all(a.op == "aten.mul" and "table of positions" in a.what for a in found.approximations)
    assert bool(found.approximations) is rotary


def test_a_skip_connection_is_named() -> None:
    """What joins the merged stream at full length is averaged: the one approximation, and nothing else is left."""
    found = holds(*build(Spec(readout="mean", skip=True)), exact=False, placement="stream")
    assert found.error > 1e-3
    (join,) = found.approximations
    assert join.op == "aten.add" and "full length" in join.what
    assert join.effect == pytest.approx(found.error, rel=1e-6)


# -- the check can fail ------------------------------------------------------------------------------------------------

rewriting = importlib.import_module("tome_fx.passes.rewrite")


def _ones(*args: Any, old: Any = rewriting.Emitter.weight) -> Any:
    value = old(*args)
    return value / value


def _zeros(*args: Any, old: Any = rewriting.Emitter.log_weight) -> Any:
    value = old(*args)
    return value - value


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_a_missing_log_size_is_seen(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that count once, in a model whose every other op is right."""
    monkeypatch.setattr(rewriting.Emitter, "log_weight", _zeros)
    found = law(*build(Spec(readout="tokens")), placement=placement)
    assert not found.holds and found.explained > 1e-3 and "BROKEN" in found.summary()


class Largest(nn.Module):
    """Attention that leaves out what is below the eighth largest score: equal tokens stand at that edge."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / 6
        scores = scores.masked_fill(scores < scores.topk(8, -1).values[..., -1:], -torch.inf)
        return x + self.out(scores.softmax(-1) @ v)


def test_an_edge_among_equal_tokens_decides_nothing() -> None:
    torch.manual_seed(0)
    found = law(redraw(nn.Sequential(Largest(), Largest(), Largest())).eval(), (torch.randn(2, 40, 32),), 8)
    assert found.rounds and "compares values of merged tokens" in str(found)
    assert found.holds or "undecided" in found.summary()


def test_a_pool_that_counts_groups_once_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting.Emitter, "weight", _ones)
    found = law(*build(Spec(readout="mean")))
    assert not found.holds and found.explained > 1e-3


def test_a_mean_without_sizes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that stands for two counts once in its next merge: seen there, and in the outputs."""
    first = ops.merge_aten

    def plain(x: Tensor, size: Any, size_out: Tensor, *index: Tensor) -> Tensor:
        return first(x, None, ops.merge_size_aten(None, *index), *index)

    monkeypatch.setattr(ops.merging, "merge_aten", plain)
    found = law(*build(Spec(readout="tokens")), 8, placement="stream")
    errors = [merge.error or 0.0 for merge in found.merges]
    assert not found.holds and errors[0] < 1e-6 and errors[1] > 1e-3


def test_a_mask_that_takes_one_row_of_a_group_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    one = lambda x, size, out, assign, keep, moved: ops.unmerge_aten(x, keep)  # noqa: E731
    monkeypatch.setattr(ops.merging, "merge_bias_aten", one)
    spec = Spec(readout="masked_mean", mask="bool", prefix="none")
    assert law(*build(spec), r=8, matcher="random", placement="stream").explained > 1e-3


def test_a_spelling_that_changes_the_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`spelling` compares the unmerged model before and after its attention is fused: here with a wrong scale."""
    finding = importlib.import_module("tome_fx.passes.fuse_attention")
    first = finding._Fuser._at_product

    def wrong(self: Any, node: Any) -> Any:
        match = first(self, node)
        match.scale = 2.0
        return match

    monkeypatch.setattr(finding._Fuser, "_at_product", wrong)
    found = law(*build(Spec(readout="mean", attention="matmul")))
    assert not found.holds and found.spelling > 1e-3 and "one spelling" in found.summary()


# -- models that are traced, drawn, or run otherwise -------------------------------------------------------------------


class Broken(nn.Module):
    """Two graphs, an int and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (build(TOKENS.replace(seed=seed))[0] for seed in (1, 2))

    def forward(self, x: Tensor, *, times: int = 1) -> dict[str, Tensor]:
        x = self.first(x)
        torch._dynamo.graph_break()
        return {"tokens": self.second(x * times)}


def test_graph_breaks_and_keywords() -> None:
    x = torch.randn(2, 36, 32)
    with torch.no_grad():
        found = tome_fx.check(Broken().eval(), (x,), {"times": 2}, r=4)
    assert found.report.graphs == 2 and {out.graph for out in found.outputs} == {0, 1}
    assert found.error < ROUNDING and len(found.merges) == 6


class MaskedAutoencoder(nn.Module):
    """Keeps a random half of the tokens, and adds noise to each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, _ = build(TOKENS.replace(depth=2, drop=0.1))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, : x.shape[1] // 2]
        x = self.body(x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])))
        return x + torch.randn_like(x)


@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_are_drawn_once(training: bool) -> None:
    """A mask drawn twice would make any comparison void; the caller's random state stays what it was."""
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    model, x = MaskedAutoencoder().train(training), torch.randn(2, 72, 32)
    torch.random.set_rng_state(state)
    found = law(model, (x,), placement="stream")
    assert len(found.merges) == 2 and max(found.error, found.spelling) < ROUNDING, found
    assert [note for note in found.notes if "dropout" in note] == found.notes and bool(found.notes) is training
    assert torch.equal(state, torch.random.get_rng_state())


class Windows(nn.Module):
    """Attention in windows of a grid [B, 12, 12, C], with a table of relative positions and an MLP on the grid."""

    def __init__(self, side: int = 6, dim: int = 32) -> None:
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn(2, side**2, side**2))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.side
        y = self.norm(x).reshape(b, h // n, n, w // n, n, c).transpose(2, 3).reshape(-1, n * n, c)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, self.table).transpose(1, 2).flatten(2)
        y = self.proj(y).reshape(b, h // n, w // n, n, n, c).transpose(2, 3).reshape(b, h, w, c)
        x = x + self.conv((x + y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)


def test_windows_tables_convolutions_and_mlps_on_a_grid() -> None:
    """Tokens of a window are leaves of a dim, samples are windows; the table in the scores is averaged, and named."""
    model = redraw(nn.Sequential(Windows(), Windows()), 0).eval()
    found = holds(model, (torch.randn(2, 12, 12, 32),), r=8, exact=False, placement="branch")
    assert any("MLP" in m.name for m in found.merges) and not all("MLP" in m.name for m in found.merges)
    assert found.approximations and all("attention scores" in a.what for a in found.approximations)
    assert found.error > 1e-6
    model[0].table.data.zero_(), model[1].table.data.zero_()
    holds(model, (torch.randn(2, 12, 12, 32),), r=8, placement="branch")


TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 96, "global_pool": "avg"},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 96},
    "beit_base_patch16_224": {"depth": 2, "img_size": 96, "embed_dim": 48, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 84},
    "swin_tiny_patch4_window7_224": {"depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32, "img_size": 56},
    "samvit_base_patch16": {"depth": 2, "img_size": 128, "embed_dim": 48, "num_heads": 2, "global_attn_indexes": (1,)},
}


@pytest.mark.parametrize("name", some_slow(list(TIMM), 4))
@pytest.mark.parametrize("placement", ["auto", "branch"])
def test_timm(name: str, placement: str) -> None:
    """Shifted windows, decomposed tables, rotary embeddings: to rounding, once what is averaged is named."""
    timm = pytest.importorskip("timm")
    model = redraw(timm.create_model(name, **TIMM[name]), 1).eval()
    side = TIMM[name]["img_size"]
    found = law(model, (torch.randn(2, 3, side, side),), 4, placement=placement, effects=False)
    assert max(found.explained, found.spelling) < ROUNDING, found
    assert found.merges or placement == "auto"


def test_nothing_of_the_users_is_changed() -> None:
    """Parameters, buffers, inputs, training flag and random state; running statistics are not updated twice."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, _ = build(TOKENS)
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.norm(self.body(x).transpose(1, 2))

    model, x = Counting().train(), torch.randn(2, 36, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held, state = x.clone(), torch.random.get_rng_state()
    found = holds(model, (x,))
    assert torch.equal(x, held) and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype is torch.float32 and found.dtype is torch.float64
    assert len(found.outputs) == 3, "what is written to the input and to the counter of batches is compared too"


def test_a_sparse_buffer_stays() -> None:
    """Whisper holds one."""
    model, (x, *_) = build(TOKENS)
    model.register_buffer("heads", torch.eye(4).to_sparse(), persistent=False)
    assert holds(model, (x,)).merges
    assert torch.equal(model.heads.to_dense(), torch.eye(4))


@torch.library.custom_op("tome_test_check::narrow", mutates_args=())
def narrow(x: Tensor) -> Tensor:
    """An op that refuses float64."""
    if x.dtype is torch.float64:
        raise RuntimeError("narrow is not implemented for 'Double'")
    return x * 2


@narrow.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_model_that_does_not_run_in_float64() -> None:
    """It is checked in its own dtype, and the result says so."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, _ = build(TOKENS)

        def forward(self, x: Tensor) -> Tensor:
            return narrow(self.body(x))

    found = law(Narrow().eval(), (torch.randn(2, 36, 32),))
    assert found.dtype is torch.float32 and found.holds and 0 < found.error < 1e-4
    (note,) = found.notes
    assert "not implemented for 'Double'" in note and note in str(found)


def test_bfloat16_is_checked_in_float64() -> None:
    model, args = build(Spec(readout="mean"))
    holds(model.bfloat16(), tuple(a.bfloat16() for a in args if a is not None))


def test_autocast_is_checked_in_float64() -> None:
    model, args = build(Spec(readout="mean", attention="matmul"))
    with torch.autocast("cpu", torch.bfloat16):
        holds(model, args)


@pytest.mark.parametrize("options", [{"merging": "prune"}, {"prop_attn": False}], ids=str)
def test_options_without_a_law_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(tome_fx.NoLawError, match="law"):
        law(*build(Spec()), **options)


def test_nothing_merges_is_said() -> None:
    found = law(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert not found.merges and "nothing merges" in str(found) and "no queries and keys" in str(found)


def test_another_matcher_is_checked_by_its_groups() -> None:
    def neighbours(metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Any) -> Any:
        pairs = torch.arange(2 * r, device=metric.device).expand(metric.shape[0], -1)
        return pairs[:, 1::2], pairs[:, ::2], torch.ones(metric.shape[0], r)

    matching.register_matcher("check_neighbours", neighbours, replace="check_neighbours" in matching.matchers())
    holds(*build(Spec(readout="tokens")), matcher="check_neighbours", partition="random")


# -- command line ------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    return build(Spec(readout="mean"))[0]


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    words = ["check", f"{HERE}:tiny", "--r", "4", "--input", "2,3,24,24"]
    assert cli.main([*words, "--json", str(out)]) == 0
    assert "the tied law holds for 3 merges" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["holds"] is True and written["error"] < ROUNDING and len(written["merges"]) == 3
    assert cli.main([*words, "--merging", "prune"]) == 2
    assert "there is no law to check" in capsys.readouterr().err


def test_command_line_says_where_it_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting.Emitter, "weight", _ones)
    assert cli.main(["check", f"{HERE}:tiny", "--r", "4", "--input", "2,3,24,24"]) == 1
    assert "BROKEN" in capsys.readouterr().out


class Causal(nn.Module):
    """Nothing of it may merge."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(*(x[:, None] for _ in range(3)), is_causal=True)[:, 0]


def test_where_nothing_merges_strict_says_so() -> None:
    """A gate that asks for `.holds` alone would pass a model that never merges."""
    found = tome_fx.check(Causal(), (torch.randn(2, 36, 32),), r=4)
    assert found.holds and not found.merges and "nothing merges" in found.summary()
    with pytest.raises(tome_fx.ToMeError, match="nothing merges"):
        tome_fx.check(Causal(), (torch.randn(2, 36, 32),), r=4, strict=True)


@pytest.mark.parametrize("call", [tome_fx.check, tome_fx.explain, tome_fx.rewrite, tome_fx.trace_tokens])
def test_what_is_no_call_is_named(call: Any) -> None:
    """The usual slips: a tensor for the inputs, something else for the model."""
    with pytest.raises(TypeError, match=r"args must be a tuple or list of the model's inputs, as \(x,\), got Tensor"):
        call(Causal(), torch.randn(2, 36, 32))
    with pytest.raises(TypeError, match="model must be a module or a function, got str"):
        call("vit_tiny", (torch.randn(2, 36, 32),))


def test_a_merge_at_an_input_of_the_graph() -> None:
    """A block alone, whose tokens are its input: the first branch merges there. Before, it was told as broken."""
    from tests.test_find_sums import Block

    torch.manual_seed(0)
    model = redraw(Block(torch.nn.functional.scaled_dot_product_attention)).eval()
    model.norm1 = nn.Identity()
    found = tome_fx.check(model, (torch.randn(2, 40, 32),), r=6, placement="branch")
    assert found.merges and found.error < 1e-9 and found.moved > 1e-3


def test_a_bool_table_is_a_factor_of_0_or_1() -> None:
    """Not what a bool mask adds to scores."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 192) for _ in range(2))
            self.out = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in block(x).chunk(3, -1))
                v = v * (torch.arange(x.shape[1]) % 5 != 0)[:, None]
                x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x

    found = holds(redraw(Hidden(), 0), (torch.randn(2, 60, 64),), 8, exact=False, placement="stream")
    assert found.approximations, found
