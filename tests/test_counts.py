"""Counts that depend on the data in one graph: each sample as if its tokens had really gone, at its own counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
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
from tests.palette import assert_lossless, palette_grid, run, samples_apart
from tests.test_check import ROUNDING, law
from tome_fx.methods import PIECES

# -- an independent plain implementation -------------------------------------------------------------------------------

Split = Callable[[reference.View, int, Callable[..., int]], list[reference.Token]]


def by_threshold(similar: list[list[float]], a: list[int], b: list[int], tau: float) -> int:
    return sum(max(similar[i][j] for j in b) >= tau for i in a)


def by_votes(similar: list[list[float]], a: list[int], b: list[int], tau: float) -> int:
    return sum(sum(similar[i][j] >= tau for j in b) >= 3 for i in a)


RULES = {"threshold": by_threshold, "votes": by_votes}


def sided(make: Callable[..., list[reference.Token]]) -> Split:
    """A method whose sides alternate: its counts are of these sides, and it is run with the count for r."""

    def split(view: reference.View, bound: int, count: Callable[..., int]) -> list[reference.Token]:
        return make(view, min(count(*reference.alternating(view)), view.half))

    return split


def mstm(view: reference.View, bound: int, count: Callable[..., int]) -> list[reference.Token]:
    """Of the `bound` least important, each with its most similar other, the best pairs."""
    others = reference.lowest(view.importance, view.free, min(bound, len(view.free) - 1))
    crucial, similar = [i for i in view.free if i not in others], reference.cosines(view.keys)
    pairs = reference.best_pairs(others, crucial, lambda i, j: similar[i][j], count(others, crucial))
    return reference.in_place(view, pairs, {})


def least_norm(view: reference.View, bound: int, count: Callable[..., int]) -> list[reference.Token]:
    """Of the 2 `bound` tokens of shortest keys in turn a source and a destination, the best pairs."""
    low, similar = reference.lowest(view.keys.norm(dim=-1), view.free, 2 * bound), reference.cosines(view.keys)
    most = min(count(low[0::2], low[1::2]), view.half)
    pairs = reference.best_pairs(low[0::2], low[1::2], lambda i, j: similar[i][j], most)
    return reference.in_place(view, pairs, {})


def pitome(view: reference.View, bound: int, count: Callable[..., int]) -> list[reference.Token]:
    """Of the 2 `bound` tokens of highest energy in turn a source and a destination, the best pairs."""
    floor, similar = 0.9 * (1 - view.layer / view.layers), reference.cosines(view.keys)

    def energy(i: int) -> float:
        row = [similar[i][j] for j in view.free]
        return sum(s if s >= floor else math.exp(s - floor) - 1 for s in row) / len(row)

    high = sorted(view.free, key=energy, reverse=True)[: 2 * bound]
    most = min(count(high[0::2], high[1::2]), view.half)
    pairs = reference.best_pairs(high[0::2], high[1::2], lambda i, j: similar[i][j], most)
    return reference.in_place(view, pairs, {})


def near(view: reference.View, bound: int, count: Callable[..., int]) -> list[reference.Token]:
    """Alternating, at most 4 apart first: a pair that is further apart does not count."""
    a, b = reference.alternating(view)
    similar = [[s if abs(i - j) <= 4 else -9.0 for j, s in enumerate(row)]
               for i, row in enumerate(reference.cosines(view.keys))]  # fmt: skip
    return reference.band(view, min(count(a, b, similar=similar), view.half), 4)


TAU = {"threshold": 0.55, "votes": 0.4}
MEAN = reference.METHODS["tome"]
METHODS: dict[str, tuple[Split, reference.Method, dict[str, Any]]] = {
    "tome": (sided(reference.tome), MEAN, {}),
    "saint": (sided(lambda v, r: reference.saint(v, r, TAU["votes"])), reference.METHODS["saint"],
              {"method": "saint", "blocks": "all"}),
    "flat": (sided(reference.tome), MEAN, {"prop_attn": False}),
    "mlerp": (sided(reference.tome), replace(MEAN, mix=reference.mlerp), {"merging": "mlerp"}),
    "plain": (sided(reference.tome), replace(MEAN, mix=reference.plain_mean), {"merging": "plain"}),
    "keep": (sided(reference.tome), replace(MEAN, mix=lambda v, at: v.x[at[0] if len(at) == 1 else kept(v, at)]),
             {"merging": "keep"}),
    "weighted": (mstm, replace(MEAN, mix=reference.by_attention),
                 {"method": "mstm", "merging": "weighted"}),
    "mstm": (mstm, MEAN, {"method": "mstm"}),
    "pitome": (pitome, MEAN, {"method": "pitome"}),
    "least": (least_norm, MEAN, {"importance": "norm", "candidates": "least"}),
    "band": (near, MEAN, {"partition": "band:4"}),
}  # fmt: skip


def kept(view: reference.View, at: list[int]) -> int:
    """The destination of an alternating pair: the one at an odd position."""
    return next(i for i in at if i % 2 == 1)


def counted(
    model: reference.Plain, image: Tensor, method: str, rule: tuple[str, float], counts: tuple[int, int]
) -> reference.View:
    """One sample through the model, its tokens really gone. counts: at most so many a block, rows that must go."""
    (split, how, _), (name, tau), (bound, least) = METHODS[method], rule, counts
    (view,) = reference.begin(model, image[None], None, 16)
    rows = len(view.x)
    for layer, block in enumerate(model.blocks):
        size = torch.ones_like(view.size) if method == "flat" else view.size
        out, keys, weights = reference.attention(block.attn, block.norm1(view.x)[None], size[None])
        view = replace(view, x=view.x + out[0], keys=keys[0], weights=weights[0], layer=layer)
        rows -= least
        must, similar = len(view.x) - rows, reference.cosines(view.keys)

        def count(a: list[int], b: list[int], must: int = must, similar: Any = similar) -> int:
            return max(min(RULES[name](similar, a, b, tau), bound), must) if a and b else 0

        if min(bound, view.half):
            new = split(view, bound, count)
            view = reference.reduce(view, replace(how, split=lambda *_, new=new: new), 1, {})
        view = replace(view, x=view.x + block.mlp(block.norm2(view.x)))
    return replace(view, x=model.norm(view.x))


def images(batch: int = 3, seed: int = 0) -> Tensor:
    """Some with a half like the other half, so that counts differ."""
    x = torch.randn(batch, 3, 24, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[1:, :, :, 16:] = x[1:, :, :, :16] + 0.2 * x[1:, :, :, 16:]
    x[2:, :, 12:] = x[2:, :, :12] + 0.2 * x[2:, :, 12:]
    return x


def options_of(method: str, rule: tuple[str, float], counts: tuple[int, int]) -> dict[str, Any]:
    return {"counts": rule[0], "tau": rule[1], "votes": 3, "placement": "stream", "r": counts[0],
            "least": [counts[1]] * 4, **METHODS[method][2]}  # fmt: skip


CASES = [(method, prefix, rule, counts) for method in METHODS for prefix in (1, 0, 3) for rule in TAU.items()
         if (method, rule[0]) != ("saint", "threshold") for counts in ((10, 0), (12, 3), (20, 6))]  # fmt: skip


@pytest.mark.parametrize(("method", "prefix", "rule", "counts"), strategies.thinned(CASES, 23))
def test_each_sample_is_as_if_its_tokens_had_really_gone(
    method: str, prefix: int, rule: tuple[str, float], counts: tuple[int, int]
) -> None:
    """The same groups, sizes and features, with our operators and as plain ATen."""
    model, x = reference.plain(seed=2, prefix=prefix), images()
    options = options_of(method, rule, counts)
    with torch.no_grad():
        want = [counted(model, image, method, rule, counts) for image in x]
        for plain in (False, True):
            found = tome_fx.rewrite(model, (x,), keep="merged", plain=plain, **options)(x)
            assert found.output.shape[1] == 48 + prefix - 4 * counts[1]
            assert (found.sizes > 0).sum(-1).tolist() == [len(view.x) for view in want]
            for i, view in enumerate(want):
                source = torch.tensor([view.source])
                assert reference.groups(found.source[i : i + 1]) == reference.groups(source)
                got = reference.spread(found.output[i : i + 1], found.source[i : i + 1])
                torch.testing.assert_close(got, reference.spread(view.x[None], source), rtol=1e-6, atol=1e-6)
    differ = len({len(view.x) for view in want}) > 1
    assert method != "tome" or counts[0] == 10 or differ, "the test says little: all merge as many"


def test_gradients_are_those_of_the_plain_implementation() -> None:
    x, rule, counts, grads = images(), ("threshold", 0.55), (12, 3), []
    for ours in (False, True):
        model = reference.plain(seed=2, prefix=1)
        if ours:
            gm = tome_fx.rewrite(model, (x,), plain=False, **options_of("tome", rule, counts))
            out = gm(x)
        else:
            views = [counted(model, image, "tome", rule, counts) for image in x]
            out = torch.stack([view.x[view.source] for view in views])
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# -- one compiled graph ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_compiled_graph_serves_any_counts() -> None:
    """Through Inductor, in float32, forwards and backwards."""
    model = reference.plain(seed=2, prefix=1, dtype=torch.float32, depth=2)
    options = options_of("tome", ("threshold", 0.55), (12, 3))
    torch._dynamo.reset()
    fast = torch.compile(model, backend=tome_fx.tome_backend(**options))
    gm = tome_fx.rewrite(model, (images().float(),), plain=False, **options)
    before, whole = len(tome_fx.reports()), []
    for seed in (0, 1):
        x = images(seed=seed).float()
        got, want = fast(x), gm(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        whole.append([torch.autograd.grad(out.square().sum(), model.norm.weight)[0] for out in (got, want)])
    assert len(tome_fx.reports()) == before + 1
    for mine, own in whole:
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-3)


def test_of_the_bound_alone_nothing_depends() -> None:
    """Pairs that the rule does not accept change nothing."""
    model, x = reference.plain(seed=2, prefix=1), images()
    with torch.no_grad():
        few, many = (tome_fx.rewrite(model, (x,), plain=False, **options_of("tome", ("threshold", 0.97), (r, 0)))(x)
                     for r in (21, 24))  # fmt: skip
        none = tome_fx.rewrite(model, (x,), plain=False, **options_of("tome", ("threshold", 2.0), (24, 0)))(x)
        torch.testing.assert_close(few, many, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(none, model(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(few, model(x), rtol=1e-3)


def test_with_all_of_least_it_is_the_static_list() -> None:
    model, x = reference.plain(seed=2, prefix=1), images()
    options = options_of("tome", ("threshold", 0.55), (8, 0))
    with torch.no_grad():
        want = tome_fx.rewrite(model, (x,), r=8, placement="stream", plain=False)(x)
        for least in (1.0, 1, [8] * 4):  # a list of all too finds no rows that stand for nothing
            got = tome_fx.rewrite(model, (x,), plain=False, **{**options, "least": least, "tau": 2.0})(x)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(run(model, (x,), None, 0, counts="votes")[0], run(model, (x,), None, 0)[0])


# -- laws --------------------------------------------------------------------------------------------------------------

COUNTS: dict[str, Any] = {"counts": "threshold", "tau": 0.6, "least": 0.25, "r": 10}
LAWS: list[tuple[Spec, dict[str, Any]]] = [
    (Spec(readout="tokens", mask="bool", prefix="none"), {}),
    (Spec(readout="max"), {}), (Spec(readout="mean", attention="matmul"), {}), (Spec(readout="var"), {}),
    (Spec(readout="tokens", mask="float"), {}), (Spec(readout="attn_pool"), {}),
    (Spec(readout="tokens"), {"placement": "branch"}), (Spec(prefix="late", readout="tokens"), {}),
    (Spec(readout="hidden", skip=True), {"merging": "plain"}), (Spec(readout="tokens", norm="post"), {}),
    (Spec(readout="tokens", kind="linear"), {}), (Spec(readout="mean", softmax="manual", attention="matmul"), {}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "more"), strategies.thinned(LAWS, 2), ids=str)
def test_the_tied_law(spec: Spec, more: dict[str, Any]) -> None:
    found = law(*build(spec), **{"placement": "stream", **COUNTS, **more})
    assert found.merges and max(found.explained, found.spelling) < ROUNDING, found


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_a_sample_does_not_depend_on_its_batch(mask: str) -> None:
    spec = Spec(batch=2, mask=mask, readout="tokens")
    options = {"placement": "stream", **{k: v for k, v in COUNTS.items() if k != "r"}}
    difference, report = samples_apart(build(spec)[0], inputs(spec, 1), None, 10, 2, **options)
    assert report.merged_sites and difference is not None and difference < 1e-6


def test_equal_tokens_merge_without_loss() -> None:
    model = reference.plain(seed=2, prefix=1, dtype=torch.float32)
    x = palette_grid(3, (6, 8), (4, 4), k=4)
    for more in ({}, {"merging": "prune"}):
        options: dict[str, Any] = {"counts": "threshold", "tau": 0.9999, "least": 0.25, "placement": "stream", **more}
        if more:
            with torch.no_grad():
                kept = tome_fx.rewrite(model, (x,), r=20, keep="merged", plain=False, **options)(x)
            assert (kept.sizes > 0).sum(-1).max() <= 12 and set(kept.sizes.unique().tolist()) == {0, 1}
        else:
            assert_lossless(model, (x,), 20, sites=4, **options)


@pytest.mark.parametrize("first", [False, True])
def test_padding_neither_counts_nor_changes_a_token(first: bool) -> None:
    """Tokens behind a mask of keys: the others come out as if these were not there."""
    spec = Spec(readout="tokens", mask="bool", stem="tokens", prefix="none", pos="none", depth=3)
    model, (x, mask) = build(spec)
    model, x = model.double(), x.double()
    left = [int(n) for n in mask.sum(-1)]
    mask = torch.stack([torch.arange(mask.shape[1]) < n for n in left])
    other = torch.where(mask[..., None], x, 3 * torch.randn_like(x))
    options: dict[str, Any] = {"counts": "threshold", "tau": 0.3, "placement": "stream", "padding_first": first}
    r = [18] * 3 if first else [18]  # else padding stays, and moves what alternates behind it
    with torch.no_grad():
        gm = tome_fx.rewrite(model, (x, mask), r=r, plain=False, **options)
        got = gm(x, mask)
        torch.testing.assert_close(gm(other, mask)[mask], got[mask], rtol=1e-9, atol=1e-9)
        for i, n in enumerate(left):
            whole = torch.ones(1, n, dtype=torch.bool)
            own = (x[i : i + 1, :n], whole)
            want = tome_fx.rewrite(model, own, r=[n // 2] * len(r), plain=False, **options)(*own)
            torch.testing.assert_close(got[i : i + 1, :n], want, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(want, model(*own), rtol=1e-3), "the test says nothing: nothing merged"


def test_special_tokens_between_others_stay_alone() -> None:
    """The threshold is that of the metric, and they are never paired."""
    model, x = reference.plain(seed=2, prefix=0), images()
    options = {**options_of("tome", ("threshold", 0.3), (12, 2)), "protect": [7, 8, 20]}
    with torch.no_grad():
        found = tome_fx.rewrite(model, (x,), keep="merged", plain=False, **options)(x)
    for rows, sizes in zip(found.source, found.sizes, strict=True):
        assert sizes[rows[[7, 8, 20]]].tolist() == [1, 1, 1]
        assert (sizes > 0).sum() < 40


def test_half_precision_and_shapes() -> None:
    model, x = reference.plain(seed=2, prefix=1).bfloat16(), images().bfloat16()
    options = options_of("tome", ("threshold", 0.55), (12, 3))
    with torch.no_grad():
        got, report = run(model, (x,), None, options.pop("r"), **options)
    assert got.shape == (3, 49, 32) and got.dtype is torch.bfloat16 and got.isfinite().all()
    assert [after for _, after in report.tokens] == [46, 43, 40, 37]


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@settings(max_examples=5)
@given(strategies.specs(), st.sampled_from([0, 0.25, 0.6]), st.sampled_from(["mean", "prune", "plain", "keep"]),
       st.sampled_from(["stream", "branch"]))  # fmt: skip
def test_any_transformer(spec: Spec, least: float, merging: str, placement: str) -> None:
    """A result of the same kind, or a reason; where the rule accepts nothing and nothing must go, the same result."""
    model, args = build(spec)
    options = {"counts": "threshold", "least": least, "merging": merging, "placement": placement}
    with torch.no_grad():
        want = model(*copy.deepcopy(args))
        for tau in (0.5, 2.0):
            got, report = run(model, copy.deepcopy(args), None, 10, tau=tau, **options)
            for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, want)), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.isfinite().all() == b.isfinite().all()
                if tau == 2 and not least:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert not any("internal" in reason.kind for reason in report.skipped), report


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": "vote"}, 'did you mean "votes"'),
        ({"least": 0.5}, "give counts too"),
        ({"counts": "votes", "least": 2.0}, "least must be"),
        ({"counts": "votes", "multiple": 8}, "multiple rounds r"),
        ({"counts": "votes", "matcher": "greedy"}, "matcher='greedy' would take them for tokens"),
        ({"counts": "votes", "method": "grid"}, "partition='grid:2' would take them"),
        ({"counts": "votes", "importance": "norm", "prune": 0.5}, "give one of them"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tome_fx.tome_backend(r=8, **options)


def test_where_no_row_goes_nothing_is_saved() -> None:
    model, x = reference.plain(seed=2, prefix=1, dtype=torch.float32), images().float()
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning, match="a larger least may pay"):
        run(model, (x,), None, 8, counts="threshold")


def test_a_rule_of_ones_own() -> None:
    """As many as the caller likes: here the first three of the sources."""

    def three(tokens: Any, sides: Any, alike: Tensor) -> Tensor:
        return (torch.arange(alike.shape[1]) < 3).expand(alike.shape[:2])

    tome_fx.register_piece("counts", "test_three", three)
    try:
        model, x = reference.plain(seed=2, prefix=1), images()
        with torch.no_grad():
            found = tome_fx.trace_tokens(model, (x,), r=8, counts="test_three", placement="stream")
        assert [len(own.unique()) for own in found.groups] == [37] * 3
        assert found.merges[0].similarity.isfinite().sum(-1).tolist() == [3] * 3
    finally:
        del PIECES["counts"]["test_three"]


def test_merged_tokens_say_which_rows_stand_for_nothing() -> None:
    model, x = reference.plain(seed=2, prefix=0), images()
    with torch.no_grad():
        found = tome_fx.rewrite(model, (x,), keep="merged", **options_of("tome", ("threshold", 0.55), (12, 3)))(x)
    assert found.sizes.sum(-1).tolist() == [48] * 3
    mean = found.mean(torch.arange(48.0)[:, None].expand(3, 48, 1))
    assert mean.isfinite().all() and (mean[found.sizes == 0] == 0).all()
    prompt = torch.ones(1, 48, dtype=torch.bool)
    one = type(found)(*(part[:1] for part in found))
    assert one.columns(prompt).shape[1] == int((one.sizes > 0).sum())


# -- calibrate ---------------------------------------------------------------------------------------------------------


def test_calibrate_does_not_count_padding_and_compares_the_metric() -> None:
    spec = Spec(readout="tokens", mask="bool", stem="tokens", prefix="none", pos="none", depth=2)
    model, (x, mask) = build(spec)
    n = 20
    mask = torch.arange(mask.shape[1])[None].expand_as(mask) < n
    whole = torch.ones(x.shape[0], n, dtype=torch.bool)
    options: dict[str, Any] = {"method": "tome", "tau": 0.5, "placement": "stream"}
    first = tome_fx.calibrate(model, [(x, mask)], **options)[0]
    assert first == tome_fx.calibrate(model, [(x[:, :n], whole)], **options)[0] > 0


def test_calibrate_takes_batches_of_several_shapes() -> None:
    model, x = reference.plain(seed=2, prefix=1, depth=2), images()
    options: dict[str, Any] = {"method": "tome", "tau": 0.5, "placement": "stream"}
    whole = tome_fx.calibrate(model, [x], **options)
    assert tome_fx.calibrate(model, [x[:2], x[2:]], **options) == whole
    least, most = (tome_fx.calibrate(model, [x], of=of, **options) for of in ("least", "most"))
    assert least[0] < whole[0] < most[0]
    small = tome_fx.calibrate(model, [x, x[..., :24]], of="most", **options)
    assert len(small) == 2 and small[0] == most[0]
    with pytest.raises(ValueError, match="of must be"):
        tome_fx.calibrate(model, [x], of="median")


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (reference.plain(seed=seed, prefix=1, depth=2) for seed in (1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def test_calibrate_says_what_to_do_with_towers() -> None:
    model, x = Towers(), images()
    with pytest.raises(ValueError, match=r"left\S* and right\S* are both block 0 of their chains.*each as a model"):
        tome_fx.calibrate(model, [x], method="tome", tau=0.5, placement="stream")
    assert len(tome_fx.calibrate(model.left, [x], method="tome", tau=0.5, placement="stream")) == 2


# -- change of representation, random cells ----------------------------------------------------------------------------


def change(view: reference.View, before: Tensor, r: int) -> list[reference.Token]:
    """mstm, by how much the attention changed each token."""
    scores = (view.x - before).norm(dim=-1) / before.norm(dim=-1)
    others = reference.lowest(scores, view.free, r)
    crucial = [i for i in view.free if i not in others]
    return reference.in_place(view, reference.nearest(others, crucial, reference.cosines(view.keys)), {})


def test_change_is_the_plain_implementation() -> None:
    model, x = reference.plain(seed=3, prefix=1), images()
    options = {"importance": "change", "partition": "importance", "placement": "stream"}
    with torch.no_grad():
        for plain in (False, True):
            found = tome_fx.rewrite(model, (x,), r=5, keep="merged", plain=plain, **options)(x)
            for i, image in enumerate(x):
                (view,) = reference.begin(model, image[None], None, 16)
                for block in model.blocks:
                    before = view.x
                    out, keys, _ = reference.attention(block.attn, block.norm1(view.x)[None], view.size[None])
                    view = replace(view, x=view.x + out[0], keys=keys[0])
                    new = change(view, before, 5)
                    view = reference.reduce(view, replace(MEAN, split=lambda *_, new=new: new), 1, {})
                    view = replace(view, x=view.x + block.mlp(block.norm2(view.x)))
                source = torch.tensor([view.source])
                assert reference.groups(found.source[i : i + 1]) == reference.groups(source)
                got = reference.spread(found.output[i : i + 1], found.source[i : i + 1])
                torch.testing.assert_close(got, reference.spread(model.norm(view.x)[None], source))


def test_change_says_where_there_is_none() -> None:
    model, args = build(Spec(readout="tokens"))
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning, match="reads what the block added to the stream"):
        run(model, args, None, 4, importance="change", partition="importance", placement="branch")


def test_random_cells() -> None:
    """One destination in each cell, any of the four, the same in each call, sample and runtime; no pair has two."""
    model, x = reference.plain(seed=1, prefix=1), images()
    options = {"partition": "grid_random:2", "placement": "stream"}
    with torch.no_grad():
        for plain in (False, True):
            found = tome_fx.rewrite(model, (x,), r=[36], keep="merged", plain=plain, **options)(x)
            place = found.place[:, 1:] - 1
            row, column = place // 8, place % 8
            assert torch.equal(place[0], place[1]) and place.shape == (3, 12)
            assert len({(int(i) // 2, int(j) // 2) for i, j in zip(row[0], column[0], strict=True)}) == 12
            assert len({(int(i) % 2, int(j) % 2) for i, j in zip(row[0], column[0], strict=True)}) == 4
    found = tome_fx.trace_tokens(model, (x,), r=4, **options)
    assert len(found.merges) == 4
