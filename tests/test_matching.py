"""The choices of matching and merging: each against loops, each under the lossless law, and matchers of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx
from tests import reference, strategies
from tests.models import Spec, build, redraw
from tests.palette import (
    LossyMatch,
    assert_lossless,
    compiled,
    distance,
    equalize,
    palette_input,
    palette_tokens,
    run,
)
from tests.recording import record
from tests.test_branch import Net, Shifted
from tests.test_masks import D, Masked, N, seen_of
from tests.test_tome_exact import vit
from tests.test_training import assert_same, gradients
from tome_fx import matching, ops

OPS = torch.ops.tome
PARTITIONS, SIMILARITIES = tuple(matching.PARTITIONS), tuple(matching.SIMILARITIES)
CPU = torch.device("cpu")


@pytest.fixture
def registry() -> Iterator[None]:
    """A test begins with the built-in matchers alone, whatever ran before it, and what it registers is gone after."""
    held = dict(matching._MATCHERS)
    for name in held.keys() - set(matching.BUILT_IN):
        del matching._MATCHERS[name]
    yield
    matching._MATCHERS.clear()
    matching._MATCHERS.update(held)


# -- pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("n", [2, 9, 36, 37])
@pytest.mark.parametrize("name", PARTITIONS)
def test_partition(name: str, n: int, first: int) -> None:
    """Two sides, ascending, of nearly half of the tokens each, the same in every call."""
    sides = matching.PARTITIONS[name](n, first, CPU)
    assert sorted(torch.cat(sides).tolist()) == list(range(n))
    assert min(map(len, sides)) >= n // 2
    assert all(side.tolist() == sorted(side.tolist()) for side in sides)
    assert all(map(torch.equal, sides, matching.PARTITIONS[name](n, first, CPU)))


def test_partitions_are_what_they_are_called() -> None:
    sides = {name: matching.PARTITIONS[name](8, 1, CPU)[0].tolist() for name in PARTITIONS}
    assert sides["alternating"] == [1, 3, 5, 7], "position 1 + 1 of the whole sequence is even"
    assert sides["sequential"] == [0, 1, 2, 3]
    assert sides["random"] not in (sides["alternating"], sides["sequential"])


def test_a_permutation_does_not_depend_on_the_seed_of_the_process() -> None:
    """Nor on what was drawn before: another process, or the next call, pairs the same tokens."""
    torch.manual_seed(1)
    a = matching.permutation.__wrapped__(37, CPU)
    torch.manual_seed(2)
    assert torch.equal(a, matching.permutation.__wrapped__(37, CPU))
    assert torch.equal(a, matching.permutation(37, CPU))


def looped(keys: Tensor, r: int, prefix: int, suffix: int, partition: str, similarity: str) -> list[list[int]]:
    """The groups of one sample in their new order, by loops; keys [N, d]. The destination stands last in its group."""
    n, free = len(keys), len(keys) - prefix - suffix
    if partition == "alternating":
        sources = [i for i in range(prefix, n - suffix) if i % 2 == 0]
    elif partition == "sequential":
        sources = [prefix + i for i in range((free + 1) // 2)]
    else:
        drawn = torch.randperm(free, generator=torch.Generator().manual_seed(free)).tolist()
        sources = sorted(prefix + i for i in drawn[: (free + 1) // 2])
    destinations = [i for i in range(prefix, n - suffix) if i not in sources]
    rows = keys / keys.norm(dim=-1, keepdim=True) if similarity == "cosine" else keys
    best = {i: max(((rows[i] @ rows[j]).item(), j) for j in destinations) for i in sources}
    gone = sorted(sources, key=lambda i: best[i], reverse=True)[:r]
    left = [*range(prefix), *(i for i in sources if i not in gone), *destinations, *range(n - suffix, n)]
    return [[*(i for i in gone if best[i][1] == j), j] for j in left]


def groups_of(assign: Tensor, keep: Tensor) -> list[list[int]]:
    """The old positions of each new token of one sample, its representative last."""
    return [
        [*(i for i, g in enumerate(assign.tolist()) if g == new and i != lead), lead]
        for new, lead in enumerate(keep.tolist())
    ]


@settings(max_examples=40)
@given(
    st.integers(4, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, min(n - 4, 3)), st.integers(0, 1))),
    st.sampled_from(PARTITIONS),
    st.sampled_from(SIMILARITIES),
    st.integers(0, 999),
)
def test_bipartite_is_the_loops(case: tuple[int, int, int], partition: str, similarity: str, seed: int) -> None:
    """Partners, order, and what is merged, for every partition and similarity."""
    n, prefix, suffix = case
    keys = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(seed))
    for r in {0, 1, (n - prefix - suffix) // 2}:
        assign, keep, *_ = OPS.match_by(keys, r, prefix, suffix, False, "bipartite", partition, similarity)
        for b in range(2):
            want = [[*sorted(g[:-1]), g[-1]] for g in looped(keys[b], r, prefix, suffix, partition, similarity)]
            assert groups_of(assign[b], keep[b]) == want


@settings(max_examples=40)
@given(
    st.integers(4, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, min(n - 4, 3)), st.integers(0, 1))),
    st.sampled_from(matching.BUILT_IN),
    st.sampled_from(PARTITIONS),
    st.sampled_from(SIMILARITIES),
)
def test_index_form(case: tuple[int, int, int], matcher: str, partition: str, similarity: str) -> None:
    """Onto, protected tokens alone and in place, keep and moved a partition, similarity sorted and true."""
    n, prefix, suffix = case
    keys = torch.randn(2, n, 4)
    alike = matching.SIMILARITIES[similarity](keys, keys)
    for r in {0, 1, (n - prefix - suffix) // 2}:
        assign, keep, moved, value = OPS.match_by(keys, r, prefix, suffix, False, matcher, partition, similarity)
        assert all(t.is_contiguous() for t in (assign, keep, moved, value))
        for b in range(2):
            assert sorted(keep[b].tolist() + moved[b].tolist()) == list(range(n))
            assert assign[b, keep[b]].tolist() == list(range(n - r))
            assert keep[b, :prefix].tolist() == list(range(prefix))
            assert keep[b, n - r - suffix :].tolist() == list(range(n - suffix, n))
            ends = [*range(prefix), *range(n - suffix, n)]
            assert not set(ends) & {*moved[b].tolist(), *keep[b, assign[b, moved[b]]].tolist()}
            torch.testing.assert_close(value[b], alike[b, moved[b], keep[b, assign[b, moved[b]]]])
            assert (value[b].diff() <= 0).all()


def test_the_papers_choices_are_the_op_match() -> None:
    """So an ablation changes one thing: the order of the new tokens too is that of `match`."""
    keys = torch.randn(2, 3, 29, 2, 8)
    got = OPS.match_by(keys, 9, 1, 2, True, "bipartite", "alternating", "cosine")
    for a, b in zip(got, OPS.match(keys, 9, 1, 2, True), strict=True):
        torch.testing.assert_close(a, b)


def test_the_op_is_a_good_citizen() -> None:
    """Schema, fake tensor; float32 under autocast; no gradient."""
    keys = torch.randn(2, 17, 2, 8, requires_grad=True)
    args = (6, 1, 0, True, "random", "random", "dot")
    torch.library.opcheck(OPS.match_by.default, (keys.detach(), *args))
    with torch.autocast("cpu", torch.bfloat16):
        inside = OPS.match_by(keys, *args)
    for a, b in zip(inside, OPS.match_by(keys, *args), strict=True):
        assert torch.equal(a, b)
    assert not any(index.requires_grad for index in inside[:3])


def test_random_pairs_are_the_same_for_all_samples_and_calls() -> None:
    """A result must not depend on where in the batch its input stands."""
    one, two = (OPS.match_by(torch.randn(3, 20, 4), 6, 1, 0, False, "random", "alternating", "cosine") for _ in "ab")
    moved = {tuple(sorted(row)) for row in (*one[2].tolist(), *two[2].tolist())}
    assert len(moved) == 1
    assert {i % 2 for i in moved.pop()} == {0, 1}, "of both sides"


@given(st.booleans(), st.integers(0, 999))
def test_apart_by_dot_product(first: bool, seed: int) -> None:
    """Kinds come before lengths, within a kind the order of the products stays, padding is the most alike if asked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 12, 4, generator=generator) * torch.rand(1, 12, 1, generator=generator).mul(8).exp()
    seen = torch.arange(12)[None] < 7
    metric = ops.apart(x, ops.key_kinds(ops.key_weight(seen)), False, first, "dot")
    got, plain = matching.dot(metric, metric)[0], matching.dot(x, x)[0]
    same = seen[0][:, None] == seen[0][None]
    assert got[same].min() > got[~same].max()
    scale = x.norm(dim=-1).amax().square()
    torch.testing.assert_close(got[:7, :7] - 4, plain[:7, :7] / scale)
    if first:
        assert got[7:, 7:].min() > got[:7, :7].max()


def test_seen_first() -> None:
    """A representative that a mask leaves out gives its place to the most similar seen token of its group, if any."""
    # 6 tokens: 0, 1 and 2 join 3; 4 and 5 are alone. Only 1, 2 and 5 are seen.
    assign, keep, moved = torch.tensor([[0, 0, 0, 0, 1, 2]]), torch.tensor([[3, 4, 5]]), torch.tensor([[0, 2, 1]])
    weight = ops.key_weight(torch.tensor([[False, True, True, False, False, True]]))
    lead, rest = ops.seen_first(weight, assign, keep, moved)
    assert lead.tolist() == [[2, 4, 5]]
    assert rest.tolist() == [[0, 3, 1]]
    assert [t.tolist() for t in ops.seen_first(torch.ones(1, 6), assign, keep, moved)] == [
        keep.tolist(),
        moved.tolist(),
    ]


# -- against eager PyTorch ---------------------------------------------------------------------------------------------


def eager(model: Any, image: Tensor, r: int, metric: str, partition: str, similarity: str, merging: str) -> Tensor:
    """ToMe with these choices in a timm VisionTransformer, by loops: `reference.tome_vit` is the paper's."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    size, prefix, full = torch.ones(x.shape[:2]), model.num_prefix_tokens, x.shape[1]
    for block in model.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, -1)).unbind(2)
        heads = block.attn.num_heads
        compared = {"query": q, "key": k, "value": v}.get(metric)
        compared = x if compared is None else compared.unflatten(-1, (heads, -1)).mean(2)
        x = x + block.ls1(reference.attention(block.attn, y, size)[0])
        rows, sizes = [], []
        for b in range(len(x)):
            groups = looped(compared[b], min(r, (x.shape[1] - prefix) // 2), prefix, 0, partition, similarity)
            if merging == "mean":
                rows.append(torch.stack([(x[b, g] * size[b, g, None]).sum(0) / size[b, g].sum() for g in groups]))
            elif merging == "plain":
                rows.append(torch.stack([x[b, g].mean(0) for g in groups]))
            else:
                rows.append(torch.stack([x[b, g[-1]] for g in groups]))
            sizes.append(torch.stack([size[b, g[-1:] if merging == "prune" else g].sum() for g in groups]))
        x, size = torch.stack(rows), torch.stack(sizes)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return reference.head(model, model.norm(x), size, x.shape[1] if merging == "prune" else full)


PAPERS = {"metric": "key", "partition": "alternating", "similarity": "cosine", "merging": "mean"}
ONE_CHANGED = [
    {"metric": "query"},
    {"metric": "value", "merging": "plain"},
    {"metric": "input", "similarity": "dot"},
    {"partition": "sequential", "merging": "keep"},
    {"partition": "random", "merging": "prune"},
    {"merging": "plain"},
]


@pytest.mark.parametrize("change", ONE_CHANGED, ids=lambda c: "-".join(c.values()))
def test_against_eager_tome(change: dict[str, str]) -> None:
    """On random images, where every choice gives something else, and a pool that reads sizes."""
    choice = {**PAPERS, **change}
    model, image = vit(depth=3, global_pool="avg"), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        want, papers = eager(model, image, 5, **choice), eager(model, image, 5, **PAPERS)
    assert distance(want, papers) > 1e-4, "the choice makes no difference: the test cannot fail"
    got, report = run(model, (image,), None, 5, **choice)
    assert report.tokens == [(37, 32), (32, 27), (27, 22)]
    assert distance(got, want) < 1e-5


class Open(nn.Module):
    """One block whose heads are mixed, so that its attention stays open: keys and values of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48)
        self.mix, self.proj = nn.Linear(2, 2), nn.Linear(48, 32)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + x.tanh()


@pytest.mark.parametrize("metric", ["query", "key", "value"])
def test_operands_of_open_attention(metric: str) -> None:
    """Where the softmax is not fused, the operands are found at its two products."""
    model, x = redraw(Open()).eval(), torch.randn(2, 30, 32)
    trace = tome_fx.trace_tokens(model, (x,), r=7, metric=metric, placement="stream")
    compared = dict(zip(("query", "key", "value"), model.heads(x), strict=True))[metric].transpose(1, 2)
    assert torch.equal(trace.groups, OPS.match(compared, 7, 0, 0, True)[0])


def test_operands_inside_an_attention() -> None:
    """Where the operands of an attention themselves merge, the metric picks one of them."""
    model = redraw(Operands()).eval()
    x = torch.randn(2, 30, 32)
    for metric, i in (("query", 0), ("key", 1), ("value", 2)):
        trace = tome_fx.trace_tokens(model, (x,), r=7, metric=metric, placement="branch")
        compared = (i + 1) * x.roll(i, -1).unflatten(-1, (2, 16)).transpose(1, 2)
        # no weight made its heads, so each is a sample of its own
        assert torch.equal(trace.groups, OPS.match(compared, 7, 0, 0)[0])


class Operands(nn.Module):
    """Attention without projections: nothing stands between the stream and its operands."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (((i + 1) * x.roll(i, -1)).unflatten(-1, (2, 16)).transpose(1, 2) for i in range(3))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# -- the graph ---------------------------------------------------------------------------------------------------------


def tome_ops(**config: Any) -> dict[str, int]:
    model, args = build(Spec(depth=2, readout="mean"))
    _, seen = record(model, args, r=4, **config)
    return {name.removeprefix("tome."): count for name, count in seen.ops().items() if name.startswith("tome.")}


def test_each_choice_costs_only_what_it_needs() -> None:
    """The paper's choices emit what they always did; others one op for the match, and as few for the merge."""
    assert tome_ops() == tome_ops(metric="value") == {"match_size": 2, "merge_add": 2}
    assert tome_ops(merging="keep") == {"match_size": 2, "unmerge_aten": 2}
    assert tome_ops(merging="prune") == {"match": 2, "unmerge_aten": 2}
    # what the rows weigh in the second merge; in the first it is the sizes
    assert tome_ops(merging="plain") == {"match_size": 2, "merge_add": 2, "merge_size": 1}
    assert tome_ops(partition="random") == {"match_by": 2, "merge_size": 2, "merge_add": 2, "log_size": 1}


def test_the_names_are_in_the_graph() -> None:
    """As arguments of the op, so that no cache takes one choice for another."""
    model, args = build(Spec(depth=2))
    gm = tome_fx.rewrite(model, args, r=4, partition="sequential", similarity="dot", drop_unread=False, plain=False)
    (first, _) = gm.graph.find_nodes(op="call_function", target=OPS.match_by.default)
    assert first.args[-3:] == ("bipartite", "sequential", "dot")


# -- laws --------------------------------------------------------------------------------------------------------------


LAWS: list[dict[str, Any]] = [
    {"metric": "query"},
    {"metric": "value", "merging": "keep", "partition": "sequential"},
    {"metric": "input", "merging": "plain", "partition": "random"},
    {"merging": "plain"},
    {"merging": "keep"},
]


@pytest.mark.parametrize("choice", LAWS, ids=lambda c: "-".join(c.values()))
def test_law(choice: dict[str, Any]) -> None:
    """Each step of the matching and of the merging: tokens that are equal merge without a trace."""
    spec = Spec(readout="mean")
    model, _ = build(spec)
    control = choice.get("merging") == "keep"  # rows alone do not need sizes: the test can fail because of them
    assert_lossless(equalize(model), palette_input(spec), 4, placement="stream", control=control, **choice)


@pytest.mark.parametrize("merging", ["mean", "plain", "keep"])
@pytest.mark.parametrize(("matcher", "similarity"), [("random", "cosine"), ("bipartite", "dot")])
def test_law_where_all_patches_are_equal(matcher: str, similarity: str, merging: str) -> None:
    """Random pairs and the longest vectors are equal tokens only where all are."""
    spec = Spec(readout="mean", depth=2)
    model, _ = build(spec)
    choice = {"matcher": matcher, "similarity": similarity, "merging": merging}
    assert_lossless(equalize(model), palette_input(spec, k=1), 6, placement="stream", **choice)


@settings(max_examples=6)
@given(
    strategies.specs(),
    st.sampled_from(["key", "query", "value", "input"]),
    st.sampled_from(PARTITIONS),
    st.sampled_from(["mean", "plain", "keep"]),
    st.sampled_from(["stream", "branch"]),
)
@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
def test_any_transformer(spec: Spec, metric: str, partition: str, merging: str, placement: str) -> None:
    """Any spelling under any choice: masks, pools, linear attention and skip connections follow."""
    note(f"{spec!r} {metric} {partition} {merging} {placement}")
    if spec.mask == "float" and spec.attention in ("encoder", "encoder_layer"):
        reject()  # torch's fused eval path takes a float key mask for a bool one
    model, _ = build(spec)
    choice = {"metric": metric, "partition": partition, "merging": merging, "placement": placement}
    try:
        assert_lossless(equalize(model), palette_input(spec), 3, **choice)
    except LossyMatch:
        reject()


@pytest.mark.parametrize("merging", ["plain", "keep"])
def test_shares_are_weighted_by_size(merging: str) -> None:
    """A masked pool and linear attention: what a mask leaves of a group is a share of its size, however rows merge."""
    spec = Spec(readout="masked_mean", mask="bool", prefix="none")
    model, _ = build(spec)
    assert_lossless(equalize(model), palette_input(spec), 4, placement="stream", merging=merging)


def test_pruning_is_lossy() -> None:
    """Documented: dropped tokens count no more, so even equal tokens leave a trace. The shape stays."""
    spec = Spec(readout="hidden")
    model, _ = build(spec)
    args = palette_input(spec)
    with torch.no_grad():
        want = equalize(model)(*args)
    got, report = run(model, args, None, 4, merging="prune", placement="stream")
    assert report.merged_sites == 3
    assert distance(got, want) > 1e-4


def test_r_zero_is_the_identity() -> None:
    model, args = build(Spec())
    choice = {"matcher": "random", "partition": "random", "similarity": "dot", "merging": "prune", "metric": "value"}
    with torch.no_grad():
        assert torch.equal(run(model, args, None, 0, **choice)[0], model(*args))


# -- masks -------------------------------------------------------------------------------------------------------------


HIDING = [{"merging": "plain"}, {"merging": "keep", "similarity": "dot"}, {"merging": "prune"}]


@pytest.mark.parametrize("choice", HIDING, ids=lambda c: "-".join(c.values()))
def test_padding_first_hides_the_padding(choice: dict[str, str]) -> None:
    """What stands in padded places changes nothing elsewhere, not by one bit."""
    model, seen = redraw(Masked("bool")).eval(), seen_of(17, 33)
    x = torch.randn(2, N, D)
    other = torch.where(seen[..., None], x, 5 * torch.randn(2, N, D))
    a, b = (run(model, (t, seen), None, 8, placement="stream", padding_first=True, **choice)[0] for t in (x, other))
    assert torch.equal(a[seen], b[seen])


@pytest.mark.parametrize("merging", ["mean", "plain", "keep"])
def test_a_matcher_that_does_not_look_at_the_mask(merging: str) -> None:
    """Random pairs put padding and valid tokens into one group: nothing of the padding reaches the valid ones."""
    model, seen = redraw(Masked("min")).eval(), torch.rand(2, N) < 0.6
    x = torch.where(seen[..., None], palette_tokens(2, 1, D).expand(2, N, D), 5 * torch.randn(2, N, D))
    with torch.no_grad():
        want = model(x, seen)
    got, report = run(model, (x, seen), None, 9, placement="stream", matcher="random", merging=merging)
    assert report.merged_sites == 3
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
def test_parts_of_windows_are_for_the_papers_pairs() -> None:
    """A shifted window's mask bounds r by the paper's sides: other pairs are refused with the reason."""
    model, x = Net(Shifted()).eval(), torch.randn(2, 3, 48, 48)
    for choice in ({"matcher": "random"}, {"partition": "random"}):
        report = tome_fx.explain(model, (x,), r=4, placement="branch", **choice)
        assert any("may pair tokens that" in s.detail for s in report.skipped), report
    assert tome_fx.explain(model, (x,), r=4, placement="branch", similarity="dot", merging="keep").merged_sites


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"merging": "plain"}, {"merging": "keep", "matcher": "random"}],
                         ids=lambda c: "-".join(c.values()))  # fmt: skip
def test_gradients_are_lossless(choice: dict[str, str]) -> None:
    """Through AOTAutograd, where all patches are equal: those of the original."""
    spec = Spec(readout="mean", depth=2)
    model, _ = build(spec)
    args = palette_input(spec, k=1)
    want = gradients(equalize(model), model, args)
    got = gradients(model, compiled(model, 6, inner="aot_eager", placement="stream", **choice), args)
    assert_same(got, want, 1e-4)


def test_gradients_of_pruning() -> None:
    """Only what is left has a gradient."""
    x = torch.randn(2, 30, 32, requires_grad=True)
    compiled(redraw(Open()).train(), 7, merging="prune", matcher="random", placement="stream")(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0


# -- matchers of one's own ---------------------------------------------------------------------------------------------


def backwards(metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Any) -> tuple[Tensor, ...]:
    """Sources and destinations changed round."""
    return matching.bipartite(metric, r, destinations, sources, similarity)


@pytest.mark.usefixtures("registry")
def test_a_matcher_of_ones_own() -> None:
    """What it pairs is merged; the law holds; protected tokens are none of its business."""
    seen: list[tuple[Any, ...]] = []

    @tome_fx.register_matcher("backwards")
    def fn(metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Any) -> tuple[Tensor, ...]:
        seen.append((metric.dtype, tuple(metric.shape), r, len(sources), len(destinations), torch.is_grad_enabled()))
        return backwards(metric, r, sources, destinations, similarity)

    assert matching.matchers()[-1] == "backwards"
    spec = Spec(readout="mean", depth=2, prefix="cls")
    model, _ = build(spec)
    assert_lossless(equalize(model), palette_input(spec), 4, matcher="backwards", placement="stream", grad=True)
    assert seen == [(torch.float32, (2, 36, 16), 4, 18, 18, False), (torch.float32, (2, 32, 16), 4, 16, 16, False)]


@pytest.mark.usefixtures("registry")
def test_replacing_a_matcher_reaches_compiled_code() -> None:
    """The name is looked up in each call."""
    model, args = build(Spec(depth=2))
    tome_fx.register_matcher("mine", matching.bipartite)
    fast = compiled(model, 4, matcher="mine")
    with torch.no_grad():
        before, papers = fast(*args), run(model, args, None, 4)[0]
        tome_fx.register_matcher("mine", backwards, replace=True)
        after = fast(*args)
    torch.testing.assert_close(before, papers)
    assert distance(after, before) > 1e-4


@pytest.mark.usefixtures("registry")
def test_registering() -> None:
    """A name is taken once; built-in names never."""
    assert tome_fx.register_matcher("mine", backwards) is backwards
    with pytest.raises(ValueError, match=r'a matcher "mine" already.*replace=True'):
        tome_fx.register_matcher("mine", backwards)
    with pytest.raises(ValueError, match='"random" is built in'):
        tome_fx.register_matcher("random", backwards, replace=True)
    with pytest.raises(ValueError, match="not empty"):
        tome_fx.register_matcher("", backwards)
    with pytest.raises(TypeError, match="a matcher needs a name, as in @register_matcher"):
        tome_fx.register_matcher(backwards)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a function"):
        tome_fx.register_matcher("number", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='did you mean "mine"'):
        tome_fx.tome_backend(4, matcher="min")
    with pytest.raises(ValueError, match='no matcher "gone" is registered here; there are bipartite, random, mine'):
        matching.pairs(torch.randn(1, 8, 4), 2, 0, "gone", "alternating", "cosine")


def _pairs(source: list[int], destination: list[int]) -> tuple[Tensor, ...]:
    return torch.tensor([source] * 2), torch.tensor([destination] * 2), torch.zeros(2, len(source))


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda *_: None, "three tensors, got NoneType"),
    "two": (lambda *_: _pairs([0, 2], [1, 3])[:2], "three tensors, got tuple"),
    "shape": (lambda *_: _pairs([0, 2, 4], [1, 3, 5]), r"source has shape \[2, 3\], not \[batch, r\] = \[2, 2\]"),
    "index": (lambda *_: (_pairs([0, 2], [1, 3])[0].float(), *_pairs([0, 2], [1, 3])[1:]), "source is torch.float32"),
    "similarity": (lambda *_: (*_pairs([0, 2], [1, 3])[:2], torch.zeros(2, 2).long()), "similarity is torch.int64"),
    "range": (lambda *_: _pairs([0, 8], [1, 3]), r"positions must be in \[0, 8\), got 0 to 8"),
    "negative": (lambda *_: _pairs([0, 2], [-1, 3]), "got -1 to 3"),
    "twice": (lambda *_: _pairs([2, 2], [1, 3]), "a source stands in two pairs"),
    "chain": (lambda *_: _pairs([0, 1], [1, 3]), "a destination is a source too"),
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("case", WRONG)
def test_what_a_matcher_returns_is_checked(case: str) -> None:
    fn, sentence = WRONG[case]
    tome_fx.register_matcher("wrong", fn)
    with pytest.raises(ValueError, match=f'the matcher "wrong" must return .*{sentence}'):
        OPS.match_by(torch.randn(2, 9, 4), 2, 1, 0, False, "wrong", "alternating", "cosine")


@pytest.mark.usefixtures("registry")
def test_the_example_of_the_readme() -> None:
    """As it stands there, with r=8, through Inductor; against the same matcher under the eager graph."""
    (example,) = (
        code
        for code in re.findall(r"```python\n(.*?)```", Path("docs/options.md").read_text(), re.DOTALL)
        if "register_matcher" in code
    )
    model, args = build(Spec(depth=2))
    space = {"model": model}
    exec(example, space)
    with torch.no_grad():
        got: Any = space["fast"](*args)  # type: ignore[operator]
        report = tome_fx.reports()[-1]
        want, _ = run(model, args, None, 8, matcher="faint", merging="prune")
    assert report.tokens == [(37, 29), (29, 21)]
    assert distance(got, want) < 1e-5
