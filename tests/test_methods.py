"""Methods: each equals an independent plain implementation, keeps the laws, and its pieces go together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx
from tests import reference_methods as reference
from tests import strategies
from tests.models import Spec, build, inputs
from tests.palette import run, samples_apart
from tests.test_check import ROUNDING, law
from tome_fx.methods import METHODS, PIECES

METHOD = ("tome", "saint", "tosa", "mstm", "evit", "diffrate", "pitome", "tofu", "mctf", "grid", "saint_vlm", "local")
TIED = ("tosa", "mstm", "pitome", "mctf", "algm", "local")
OPTIONS: dict[str, dict[str, Any]] = {"tosa": {"alpha": 0.5}, "grid": {}, "local": {}}
"""At alpha = 0 many pairs are equally near, and rounding chooses."""
PARAMS: dict[str, dict[str, Any]] = {"tosa": {"alpha": 0.5}, "local": {"k": 8}}


def merged(model: nn.Module, x: Tensor, method: str, r: Any, **options: Any) -> Any:
    """`MergedTokens` of the model by a method, on the stream."""
    options = {"placement": "stream", **OPTIONS.get(method, {}), **options}
    return tome_fx.rewrite(model, (x,), r=r, method=method, keep="merged", **options)(x)


def spread(found: Any) -> Tensor:
    return reference.spread(found.output, found.source)


def expected(model: nn.Module, x: Tensor, method: str, r: Any) -> tuple[Tensor, Tensor, Tensor]:
    name = "band" if method == "local" else method
    return reference.reduced(model, x, name, r, **PARAMS.get(method, {}))  # type: ignore[arg-type]


EACH = [(method, prefix, r) for method in METHOD for prefix in (1, 3, 0) for r in (2, 3, 5)]


@pytest.mark.parametrize(("method", "prefix", "r"), strategies.thinned(EACH, 11))
def test_is_the_plain_implementation(method: str, prefix: int, r: int) -> None:
    """The same groups and features, with our operators and as plain ATen; a class token, registers too, none."""
    model, x = reference.plain(seed=r, prefix=prefix), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    want, source, _ = expected(model, x, method, r)
    with torch.no_grad():
        for plain in (False, True):
            found = merged(model, x, method, r, plain=plain)
            assert found.output.shape == want.shape
            assert reference.groups(found.source) == reference.groups(source)
            torch.testing.assert_close(spread(found), reference.spread(want, source), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", strategies.thinned(METHOD, 2))
def test_gradients_are_those_of_the_plain_implementation(method: str) -> None:
    x = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    grads = []
    for ours in (False, True):
        model = reference.plain(seed=4, prefix=1)
        if ours:
            out = spread(merged(model, x, method, 4, plain=False))
        else:
            want, source, _ = expected(model, x, method, 4)
            out = reference.spread(want, source)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for got, want_grad in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", strategies.thinned(["mstm", "pitome", "diffrate"], 3))
def test_through_inductor(method: str) -> None:
    model, x = reference.plain(seed=2, prefix=1, dtype=torch.float32), torch.randn(2, 3, 24, 32)
    want, source, _ = expected(model, x, method, 3)
    with torch.no_grad():
        got, report = run(model, (x,), None, 3, inner="inductor", method=method, placement="stream")
    assert report.merged_sites == 4
    torch.testing.assert_close(got, reference.spread(want, source), rtol=1e-4, atol=1e-4)


def test_frames() -> None:
    """EVS reads the frame before; the reference stacks frames along the height of a picture."""

    class Clip(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, clip: Tensor) -> Tensor:
            x = self.inner.patch_embed(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
            x = x.permute(0, 2, 1, 3, 4).flatten(2).transpose(1, 2)
            for block in self.inner.blocks:
                x = block(x)
            return self.inner.norm(x)

    inner = reference.plain(seed=1, prefix=0)
    clip = torch.randn(2, 3, 3, 12, 16, dtype=torch.float64)
    picture = clip.permute(0, 2, 1, 3, 4).flatten(2, 3)
    for r in (3, 9):
        want, source, _ = reference.reduced(inner, picture, "evs", r, frames=3)
        with torch.no_grad():
            found = merged(Clip(inner), clip, "evs", r)
        assert reference.groups(found.source) == reference.groups(source)
        torch.testing.assert_close(spread(found), reference.spread(want, source), rtol=1e-6, atol=1e-6)


SPECS = [Spec(readout="mean"), Spec(readout="tokens", mask="bool", prefix="none"), Spec(prefix="cls_reg")]


@pytest.mark.parametrize(("method", "spec"), strategies.thinned([(m, s) for s in SPECS for m in TIED], 2))
def test_the_tied_law(method: str, spec: Spec) -> None:
    found = law(*build(spec), 4, method=method, placement="stream")
    assert found.merges and max(found.explained, found.spelling) < ROUNDING, found


ALONE = [(method, mask) for method in sorted({*METHOD, "algm"} - {"grid"}) for mask in ("none", "bool")]


@pytest.mark.parametrize(("method", "mask"), strategies.thinned(ALONE, 3))
def test_a_sample_does_not_depend_on_its_batch(method: str, mask: str) -> None:
    spec = Spec(batch=2, mask=mask, readout="tokens")
    options = {"placement": "stream", "method": method, **OPTIONS.get(method, {})}
    difference, report = samples_apart(build(spec)[0], inputs(spec, 1), None, 4, 2, **options)
    assert report.merged_sites and difference is not None and difference < 1e-6


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@settings(max_examples=8)
@given(strategies.specs(), st.sampled_from(sorted(METHODS)), st.sampled_from([0, 1, 5, 0.3]),
       st.sampled_from(["auto", "stream", "branch"]))  # fmt: skip
def test_any_transformer(spec: Spec, method: str, r: Any, placement: str) -> None:
    """A result of the same kind, or a reason; with r = 0 the same result."""
    model, args = build(spec)
    with torch.no_grad():
        want = model(*copy.deepcopy(args))
        got, report = run(model, args, None, r, method=method, placement=placement, strict=False)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, want)), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and a.isfinite().all() == b.isfinite().all()
        if r == 0:  # to rounding: eager takes fused paths that are compiled spelled out
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any("internal" in reason.kind for reason in report.skipped), report
    assert report.merged_sites or report.skipped or r == 0, report


# -- options -----------------------------------------------------------------------------------------------------------


def test_what_is_given_replaces_a_piece() -> None:
    config = tome_fx.ToMeConfig(r=8, method="mstm", merging="keep", numbers={"tau": 0.5})
    assert (config.importance, config.partition, config.merging) == ("attention", "importance", "keep")
    assert config.given == ("merging",) and dict(config.numbers)["tau"] == 0.5
    assert tome_fx.ToMeConfig(r=8) == tome_fx.ToMeConfig(r=8, method="tome", metric="key")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "saind"}, 'did you mean "saint"'),
        ({"method": "saint", "tua": 0.5}, 'did you mean "tau"'),
        ({"partition": "importance"}, "goes by importance: say which"),
        ({"partition": "window:x"}, "no partition 'window:x'"),
        ({"alpha": "up"}, "alpha must be"),
        ({"prune": 2.0}, "prune must be"),
        ({"blocks": "half"}, "blocks must be"),
        ({"merging": ("mean", "men")}, 'did you mean "mean"'),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tome_fx.tome_backend(r=8, **options)


def test_which_blocks_merge() -> None:
    chosen = {
        str(blocks): tome_fx.ToMeConfig(r=8, blocks=blocks).chosen(12)
        for blocks in ("all", "first half", "last", [0, 3, -1], [0.25, 0.5, 0.75])
    }
    assert list(chosen.values()) == [[*range(12)], [*range(6)], [11], [0, 3, 11], [3, 6, 9]]
    model, args = build(Spec(depth=4, readout="tokens"))
    with torch.no_grad():
        _, report = run(model, args, None, [5, 3], blocks=[1, 3], placement="stream")
    assert [tuple(t) for t in report.tokens] == [(37, 32), (32, 29)]
    assert any(reason.detail == "blocks=(1, 3) leaves it out" for reason in report.skipped)
    _, report = run(model, args, None, (4, 1), blocks=[0, 2], placement="stream")
    assert [tuple(t) for t in report.tokens] == [(37, 29)]  # 0 at the first, 8 at the last


def test_the_table_of_diffrate() -> None:
    """DiffRate's counts for DeiT-S at 2.9 GFLOPs (arXiv 2305.17997): tokens after pruning, after merging, per block."""
    pruned = [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
    merged_to = [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]
    before = [197, *merged_to[:-1]]
    r = [a - b for a, b in zip(before, merged_to, strict=True)]
    prune = [a - b for a, b in zip(before, pruned, strict=True)]
    model, x = reference.plain(seed=1, depth=12, dtype=torch.float32), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        _, report = run(model, (x,), None, r, method="diffrate", prune=prune, placement="stream")
    assert [after for _, after in report.tokens] == merged_to[1:]


def test_a_reason_where_no_attention_can_be_read() -> None:
    model, args = build(Spec(readout="tokens"))
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning, match="reads the attention of tokens before they merge"):
        run(model, args, None, 4, method="mstm", placement="branch")


def test_pieces_and_methods_of_ones_own() -> None:
    """The example of docs/methods.md."""

    def first(tokens: tome_fx.Tokens) -> Tensor:
        return -tokens.positions.expand(tokens.metric.shape[0], -1).to(torch.float32)

    tome_fx.register_piece("importance", "test_first", first)
    tome_fx.register_method("test_mine", importance="test_first", partition="importance", source="nowhere")
    try:
        with pytest.raises(ValueError, match="already"):
            tome_fx.register_piece("importance", "test_first", first)
        with pytest.raises(ValueError, match="already"):
            tome_fx.register_method("saint")
        model, x = reference.plain(seed=1, prefix=0), torch.randn(1, 3, 24, 32, dtype=torch.float64)
        with torch.no_grad():
            found = merged(model, x, "test_mine", [4], blocks=[0], plain=False)
        assert set(found.source[0, -4:].tolist()) <= {*range(44)}
        kept = found.source[0, :44]
        assert kept.unique().numel() == 44, "the first 44 stay apart"
    finally:
        del PIECES["importance"]["test_first"], METHODS["test_mine"]


def test_what_a_piece_of_ones_own_returns_is_checked() -> None:
    def all_to_first(tokens: Any, sides: Any, r: int, compare: Any) -> Any:
        source = tokens.positions[:r].expand(tokens.metric.shape[0], -1)
        return source, torch.zeros_like(source), tokens.metric[:, :r, 0]

    tome_fx.register_piece("matcher", "test_wrong", all_to_first)
    try:
        model, x = reference.plain(seed=1, prefix=0), torch.randn(1, 3, 24, 32, dtype=torch.float64)
        gm = tome_fx.rewrite(model, (x,), r=4, matcher="test_wrong", plain=False)
        with pytest.raises(ValueError, match=r"pieces test_wrong must return .* a destination is a source too"):
            gm(x)
    finally:
        del PIECES["matcher"]["test_wrong"]


# -- counts that depend on the data ------------------------------------------------------------------------------------


def test_calibrate_is_the_count_of_the_paper() -> None:
    """SAINT's r of each block, the mean over the batch of the tokens with K close partners, as the reference counts."""
    model, x = reference.plain(seed=5, prefix=1), torch.randn(3, 3, 24, 32, dtype=torch.float64)
    x[:, :, :, 16:] = x[:, :, :, :16] + 0.1 * x[:, :, :, 16:]
    numbers: dict[str, Any] = {"tau": 0.3, "votes": 5}
    counts = tome_fx.calibrate(model, [x], placement="stream", **numbers)
    want, source, _ = reference.reduced(model, x, "saint", None, tau=0.3, least=5)
    with torch.no_grad():
        found = merged(model, x, "saint", counts, tau=0.3, plain=False)
    assert len(counts) == 2 and all(counts) and reference.groups(found.source) == reference.groups(source)
    torch.testing.assert_close(spread(found), reference.spread(want, source), rtol=1e-6, atol=1e-6)


def test_calibrate_by_a_threshold() -> None:
    model, x = reference.plain(seed=5, prefix=1), torch.randn(3, 3, 24, 32, dtype=torch.float64)
    low, high = (tome_fx.calibrate(model, [x, x], method="tome", tau=tau, placement="stream") for tau in (0.2, 0.6))
    assert len(low) == len(high) == 4 and low[0] > high[0] > 0
    assert tome_fx.calibrate(model, [(x,)], method="tome", tau=2.0, placement="stream") == [0, 0, 0, 0]
    odd, options = reference.plain(prefix=0, depth=2), {"method": "tome", "tau": -2.0, "placement": "stream"}
    assert tome_fx.calibrate(odd, [x[..., :20, :20]], **options) == [12, 6], "half of 25, where 13 are sources"
    with pytest.raises(ValueError, match="at least one batch"):
        tome_fx.calibrate(model, [])
    with pytest.raises(ValueError, match="rule must be"):
        tome_fx.calibrate(model, [x], rule="vote")


# -- what the caller says of each token --------------------------------------------------------------------------------


class Image(nn.Module):
    """The reference's model under another name for its input; registers are put behind a class token in its place."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor) -> Tensor:
        if self.inner.prefix < 2:
            return self.inner(image)
        x = self.inner.patch_embed(image).flatten(2).transpose(1, 2)
        special = self.inner.special.expand(len(x), -1, -1)
        x = -torch.cat([-special[:, :1], -x], 1)  # no cat of a cat, which is one
        x = torch.cat([x[:, :1], special[:, 1:], x[:, 1:]], 1)
        for block in self.inner.blocks:
            x = block(x)
        return self.inner.norm(x)


@pytest.mark.parametrize("prefix", [1, 0, 3])
@pytest.mark.parametrize("grid", [False, True])
def test_depth(prefix: int, grid: bool) -> None:
    """ToSA with depth, as the reference has it."""
    model, x = reference.plain(seed=7, prefix=prefix), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    depth = torch.rand(2, 48, dtype=torch.float64)
    want, source, _ = reference.reduced(model, x, "tosa", 4, alpha=0.3, depth=depth)
    gm = tome_fx.rewrite(
        tome_fx.WithSide(Image(model)), (x,), {"side": depth.view(2, 6, 8) if grid else depth}, r=4, method="tosa",
        alpha=0.3, keep="merged", placement="stream",
    )  # fmt: skip
    with torch.no_grad():
        found = gm(x, side=depth.view(2, 6, 8) if grid else depth)
    assert reference.groups(found.source) == reference.groups(source)
    torch.testing.assert_close(spread(found), reference.spread(want, source), rtol=1e-6, atol=1e-6)


def test_depth_compiled_and_what_does_not_fit() -> None:
    model = reference.plain(seed=7, prefix=1, dtype=torch.float32)
    x, depth = torch.randn(2, 3, 24, 32), torch.rand(2, 48)
    with torch.no_grad():
        whole = tome_fx.WithSide(model)
        got = [run(whole, (x,), {"side": d}, 4, method="tosa", placement="stream")[0] for d in (depth, depth.flip(1))]
        assert not torch.allclose(*got), "the depth changes which tokens merge"
        with pytest.warns(tome_fx.ToMeWarning, match=r"\[2, 40\] numbers do not fit its tokens, 6 x 8"):
            run(whole, (x,), {"side": depth[:, :40]}, 4, method="tosa", placement="stream")
        with pytest.raises(TypeError, match=r"side must be floating, .* got torch\.int64"):
            whole(x, side=depth.long())
        _, report = run(whole, (x,), {"side": depth}, 4, placement="stream")
        assert report.merged_sites and "nothing reads it" in str(report)
        torch.testing.assert_close(whole(x, side=depth), model(x))


def test_explain_prints_what_a_method_stands_for() -> None:
    model, args = build(Spec(readout="tokens"))
    said = " ".join(str(tome_fx.explain(model, args, r=4, method="diffrate", prune=0.5, placement="stream")).split())
    assert "method diffrate (arXiv 2305.17997): importance='attention', partition='importance'" in said
    assert "prune=0.5" in said
    assert "'least', margin=0.5" in str(tome_fx.explain(model, args, r=4, method="pitome", margin=0.5)).split("\n")[0]
    assert not str(tome_fx.explain(model, args, r=4)).startswith("method")


# -- pieces that meet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "grid:2", "matcher": "both"}, "needs two sides"),
        ({"partition": "grid:2", "matcher": "fuse", "importance": "attention"}, "needs two sides"),
        ({"merging": "weighted", "importance": "energy"}, "weighs by attention"),
        ({"merging": ("weighted", "mean"), "importance": "norm"}, "weighs by attention"),
        ({"matcher": ("bipartite", "random"), "padding_first": True}, "padding_first goes by similarity"),
        ({"matcher": ("bipartite", "previous"), "padding_first": True}, "padding_first goes by similarity"),
    ],
)
def test_pieces_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tome_fx.tome_backend(r=8, **options)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"importance": "norm", "candidates": "least", "partition": "importance"}, 24),
        ({"importance": "norm", "partition": "importance", "matcher": "both"}, 24),
        ({"importance": "norm", "partition": "importance", "matcher": "votes"}, 47),
        ({"importance": "norm", "candidates": "least", "partition": "grid:2"}, 24),
        ({"importance": "norm", "candidates": "least", "matcher": "greedy"}, 47),
        ({"partition": "grid:2", "matcher": "votes"}, 36),
        ({"matcher": "greedy"}, 47),
    ],
    ids=str,
)
def test_no_more_go_than_all_pieces_can_give(options: dict[str, Any], most: int) -> None:
    """The pairs of any mixture can be merged: the least limit of its pieces holds."""
    model, x = reference.plain(seed=1, prefix=1), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    gm = tome_fx.rewrite(model, (x,), r=[100], placement="stream", plain=False, **options)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tome.match_pieces.default)
    assert node.args[5] == most
    with torch.no_grad():
        found = tome_fx.trace_tokens(model, (x,), r=[100], placement="stream", **options).merges[0]
    assert int(found.groups.max()) == 48 - most and all(len(own.unique()) == 49 - most for own in found.groups)


@pytest.mark.parametrize("partition", ["importance", "grid:2"])
def test_the_new_order_does_not_depend_on_the_batch(partition: str) -> None:
    """Sides that differ from sample to sample leave tokens in position order, in a batch of one too."""
    model, x = reference.plain(seed=1, prefix=0), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, alone = (merged(model, y, "tome", [5, 4], importance="attention", partition=(partition, "alternating"))
                        for y in (x, x[:1]))  # fmt: skip
    torch.testing.assert_close(whole.output[:1], alone.output)
    assert torch.equal(whole.source[:1], alone.source)


PADDED: list[dict[str, Any]] = [
    {"method": "saint"}, {"method": "pitome"}, {"method": "mctf"}, {"method": "mstm"}, {"matcher": "greedy"},
    {"importance": "received", "partition": "importance"}, {"importance": "norm", "candidates": "least"},
    {"importance": "rare", "partition": "importance", "merging": "keep"}, {"importance": "norm", "prune": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", strategies.thinned(PADDED, 2))
def test_padding_says_nothing(options: dict[str, Any]) -> None:
    """What stands at padded places changes no other token, where padding goes first."""
    spec = Spec(readout="tokens", mask="bool", stem="tokens")
    model, (x, mask) = build(spec)
    model, x = model.double(), x.double()
    other = torch.where(mask[..., None], x, 3 * torch.randn_like(x))
    gm = tome_fx.rewrite(model, (x, mask), r=6, placement="stream", padding_first=True, plain=False, **options)
    with torch.no_grad():
        got, want = (gm(y, mask)[:, 1:][mask] for y in (x, other))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("piece", ["norm", "energy", "votes", "joined"])
def test_a_mask_that_leaves_nothing_out_changes_no_choice(piece: str) -> None:
    """Lengths, margins and thresholds are those of the metric, under a mask too."""
    options: dict[str, Any] = {
        "norm": {"importance": "norm", "partition": "importance"}, "energy": {"method": "pitome", "margin": 0.3},
        "votes": {"method": "saint", "tau": 0.3}, "joined": {"method": "mctf", "information_weight": 0.5},
    }[piece]  # fmt: skip
    spec = Spec(readout="tokens", stem="tokens")
    model, (x,) = build(spec)
    masked = build(spec.replace(mask="bool"))[0].double()
    model, x, whole = model.double(), x.double(), torch.ones(2, spec.patches, dtype=torch.bool)
    with torch.no_grad():
        want = tome_fx.trace_tokens(model, (x,), r=[6], placement="stream", **options).groups
        got = tome_fx.trace_tokens(masked, (x, whole), r=[6], placement="stream", **options).groups
    assert torch.equal(got, want)


def test_attention_received_is_that_of_tokens_that_a_mask_leaves_in() -> None:
    q, k = torch.randn(2, 1, 2, 7, 4)
    mask = torch.tensor([True] * 5 + [False] * 2)[None, None, None]
    want = ((q * 0.5) @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1)[..., :5, :].mean(-2)
    for term in (mask, torch.where(mask, 0.0, -torch.inf).double()):
        got = torch.ops.tome.attention_paid(q, k, term, None, -1)
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, want)


def test_what_two_merges_leave_is_tied_one_after_the_other() -> None:
    """A value from before three merges of three kinds meets what went through them."""
    found = law(*build(Spec(readout="tokens", skip=True, mask="bool")), 4, placement="stream",
                merging=("plain", "keep", "mean"))  # fmt: skip
    assert len(found.merges) == 3 and found.explained < ROUNDING, found


# -- frames and depth --------------------------------------------------------------------------------------------------


class Frames(nn.Module):
    """All tokens of three frames in one sequence; each frame begins with a class token, or none does."""

    def __init__(self, cls: bool) -> None:
        super().__init__()
        self.inner: Any = reference.plain(seed=1, prefix=0, dtype=torch.float32)
        width = self.inner.patch_embed.out_channels
        self.cls = nn.Parameter(torch.randn(1, 1, width)) if cls else None

    def forward(self, clip: Tensor) -> Tensor:
        batch, frames = clip.shape[:2]
        x = self.inner.patch_embed(clip.flatten(0, 1))
        if self.cls is None:
            x = x.unflatten(0, (batch, frames)).permute(0, 2, 1, 3, 4).flatten(2).transpose(1, 2)
        else:
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1).reshape(batch, -1, x.shape[2])
        for block in self.inner.blocks:
            x = block(x)
        return self.inner.norm(x)


def test_places_in_frames_with_class_tokens() -> None:
    """Frame, row and column of each patch, and the side information of each, class tokens left out."""
    clip = torch.randn(1, 3, 3, 24, 32)
    gm = tome_fx.rewrite(Frames(True), (clip,), r=4, method="tosa", placement="stream", plain=False)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tome.grid_places.default)
    places = torch.ops.tome.grid_places(*node.args, device=torch.device("cpu"))
    assert places.shape == (147, 3) and places[49 + 1 + 8 + 2].tolist() == [1, 1, 2] and not places[0].any()
    with torch.no_grad():
        side = {"side": torch.rand(1, 144)}
        _, report = run(tome_fx.WithSide(Frames(True)), (clip,), side, 4, method="tosa", placement="stream")
    assert report.merged_sites == 4


def test_frames_merge_again() -> None:
    """EVS at several blocks: a token joins the last one before that is left at its place."""
    clip = torch.randn(1, 3, 3, 24, 32)
    found = tome_fx.trace_tokens(Frames(False), (clip,), r=[40, 56], method="evs", blocks=[0, 1], placement="stream")
    groups = found.merges[-1].groups[0]
    assert groups.max() == 47
    for group in range(48):
        assert len(set((groups == group).nonzero().flatten().remainder(48).tolist())) == 1, "of one place"


def test_flops_reaches_all_that_a_method_can_take() -> None:
    model, args = build(Spec(depth=4, readout="tokens"))
    with torch.no_grad():
        _, report = run(model, args, None, None, flops=0.5, method="evit", placement="stream")
    assert report.tokens[0][0] - report.tokens[0][1] > 18 and not any(s.kind == "flops target" for s in report.skipped)


def test_counts_of_a_model_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) + self.inner(x.flip(-1))

    model, args = build(Spec(depth=2, readout="tokens"))
    counts = tome_fx.calibrate(Twice(model), [args], method="tome", tau=0.3, placement="stream")
    assert len(counts) == 2 and counts[0] > 0


@pytest.mark.parametrize("options", [{"blocks": "last"}, {"alpha": "rising"}, {"merging": ("prune", "mean")}], ids=str)
def test_a_piece_says_what_goes_by_its_own_depth(options: dict[str, Any]) -> None:
    model, args = build(Spec(depth=2, readout="tokens", stem="tokens", prefix="none"))
    torch._dynamo.reset()
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=tome_fx.tome_backend(r=4, inner="eager", placement="stream", protect=0, **options))
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning, match=f"{next(iter(options))} go by the depth of each"):
        model(*args)


def test_a_choice_of_this_process_cannot_leave_it() -> None:
    model, x = reference.plain(seed=1, prefix=0), torch.randn(1, 3, 24, 32, dtype=torch.float64)
    for options, said in (({"partition": "random"}, "partition='random'"), ({"matcher": "random"}, "matcher='random'")):
        with pytest.raises(ValueError, match=f"{said} cannot leave Python"):
            tome_fx.rewrite(model, (x,), r=4, importance="attention", prune=0.5, plain=True, **options)
