"""The law of the batch: what a sample gives does not depend on the samples beside it.

The lossless law does not see it: samples that are matched as one still find equal tokens, only fewer of them.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from torch import nn

import tome_fx
from tests import strategies
from tests import test_branch as branch
from tests import test_joined_keys as joined
from tests import test_mlps as mlps
from tests import test_two_streams as streams
from tests.models import LAYOUT, MASK, Spec, build, inputs, redraw
from tests.palette import leaves, samples_apart

R, BATCH = 6, 2


def assert_apart(model: nn.Module, args: tuple[Any, ...], r: Any, **config: Any) -> Any:
    """Merge all samples at once and each alone; returns the report."""
    difference, report = samples_apart(model.eval(), args, None, r, BATCH, **config)
    assert report.merged_sites > 0, f"nothing was merged:\n{report}"
    assert difference is not None
    assert difference < 1e-6, f"a sample's result depends on the others: {difference:.2e}\n{report}"
    return report


PLAIN = [*(Spec(batch=BATCH, layout=x, readout="multi") for x in LAYOUT),
         *(Spec(batch=BATCH, mask=x) for x in MASK[1:]),
         Spec(batch=BATCH, stem="tokens", prefix="none", pos="inplace", readout="mean")]  # fmt: skip


@pytest.mark.parametrize(("spec", "placement"), strategies.thinned(product(PLAIN, ["stream", "branch"]), 3))
def test_plain_transformers(spec: Spec, placement: str) -> None:
    assert_apart(build(spec)[0], inputs(spec, 1), R, placement=placement)


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@settings(max_examples=5)
@given(data=st.data())
def test_any_transformer(data: st.DataObject) -> None:
    spec = data.draw(strategies.specs(), label="spec").replace(batch=BATCH)
    placement = data.draw(st.sampled_from(["stream", "branch"]), label="placement")
    note(f"assert_apart(*build({spec!r}), placement={placement!r})")
    model, args = build(spec)
    with torch.no_grad():  # torch's own encoder layer may see no key under a float mask
        assume(all(bool(out.isfinite().all()) for out in leaves(model.eval()(*args))))
    assert_apart(model, args, data.draw(strategies.schedules(spec), label="r"), placement=placement)


def test_what_a_norm_divides_by_is_no_mask() -> None:
    """Of one sample alone it has the shape of a mask of single tokens, and the caller's tokens are all that it is made
    of."""
    spec = Spec(batch=BATCH, layout="rows", kind="sigmoid", rms=True, stem="tokens", prefix="none", readout="mean")
    report = assert_apart(*build(spec), R, placement="stream")
    assert report.merged_sites == spec.depth


def test_a_condition_has_a_batch_too() -> None:
    """Shift and scale of adaLN are [B, 1, C]: no axis of theirs makes the batch an axis of features.

    Before, the samples of a batch were matched as one at every MLP of a DiT."""
    torch.manual_seed(0)
    args = torch.randn(BATCH, 36, 32), torch.randn(BATCH, 32)
    report = assert_apart(redraw(mlps.Conditioned()), args, R, placement="branch")
    assert [site.mlp for site in report.sites] == [(36, 30)] * 2


@pytest.mark.parametrize("form", mlps.FORMS)
def test_mlps(form: str) -> None:
    torch.manual_seed(0)
    model = redraw(mlps.Net(mlps.Block(form), mlps.Block(form)))
    assert_apart(model, (torch.randn(BATCH, 3, 48, 48),), 3, placement="branch")


@pytest.mark.parametrize("name", branch.GRIDS)
def test_grids(name: str) -> None:
    """Windows, rows and channels-first maps, and the MLPs between them."""
    torch.manual_seed(0)
    model = redraw(branch.GRIDS[name][0]())
    assert_apart(model, (torch.randn(BATCH, 3, 48, 48),), 3, placement="branch")


def test_two_streams() -> None:
    torch.manual_seed(0)
    args = torch.randn(BATCH, streams.IMAGE, streams.D), torch.randn(BATCH, streams.TEXT, streams.D)
    assert_apart(redraw(streams.Net("text")), args, R)


@pytest.mark.parametrize("form", joined.FORMS)
def test_keys_among_others(form: str) -> None:
    torch.manual_seed(0)
    assert_apart(redraw(joined.Net(form)), (torch.randn(BATCH, joined.N, joined.D),), R)


class OneByOne(nn.Module):
    """Attention sample by sample, beside the others on one stream: `by` an index or a slice."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.norm, self.qkv, self.out = by, nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attend = nn.functional.scaled_dot_product_attention
        if self.by == "index":
            y = torch.stack([attend(q[i], k[i], v[i]) for i in range(len(x))])
        else:
            y = torch.cat([attend(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(x))])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize("placement", ["auto", "stream", "branch"])
@pytest.mark.parametrize("by", ["index", "slice"])
def test_attention_sample_by_sample(by: str, placement: str) -> None:
    """An attention that sees one sample of the stream beside it must not group the tokens of the others."""
    torch.manual_seed(0)
    model, x = redraw(OneByOne(by)).eval(), torch.randn(2, 40, 32)
    fast = torch.compile(model, backend=tome_fx.tome_backend(r=8, inner="eager", placement=placement))
    with torch.no_grad():
        moved = (fast(x)[0] - fast(torch.cat([x[:1], torch.randn(1, 40, 32)]))[0]).abs().max()
    assert moved < 1e-6


def test_vmap_over_samples() -> None:
    """vmap merges as the batch does."""
    model, (x, *_) = build(Spec(batch=BATCH, readout="mean"))
    backend = tome_fx.tome_backend(r=R, inner="eager", placement="stream")
    with torch.no_grad():
        want = torch.compile(model, backend=backend)(x)
        plain = tome_fx.reports()[-1].tokens
        got = torch.compile(lambda x: torch.vmap(lambda row: model(row[None])[0])(x), backend=backend)(x)
    assert tome_fx.reports()[-1].tokens == plain
    torch.testing.assert_close(got, want)


def test_ensembles() -> None:
    """Models whose weights are stacked and that vmap runs at once merge as each does alone."""
    spec = Spec(batch=BATCH, readout="mean")
    models, (x, *_) = [build(spec)[0] for _ in range(3)], build(spec)[1]
    with torch.no_grad():
        for i, model in enumerate(models):
            for weight in model.parameters():
                weight += 0.02 * i * torch.randn_like(weight)
    weights, buffers = torch.func.stack_module_state(models)
    base = models[0]

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda w, b: torch.func.functional_call(base, (w, b), (x,)))(weights, buffers)

    backend = tome_fx.tome_backend(r=R, inner="eager", placement="stream")
    with torch.no_grad():
        got = torch.compile(run, backend=backend)(x)
        tokens = tome_fx.reports()[-1].tokens
        want = [torch.compile(model, backend=backend)(x) for model in models]
    assert tokens == tome_fx.reports()[-1].tokens
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-4)
