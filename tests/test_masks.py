"""Masks and merging: what a mask leaves out never reaches what it leaves in; shifted windows stay in their parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, equalize, palette_grid, palette_tokens, run
from tests.strategies import thinned
from tests.test_branch import Net, Shifted, Windowed, unwindow, windows
from tome_fx import ops

tome = torch.ops.tome
N, D = 40, 32


class Masked(nn.Module):
    """Three pre-norm blocks under a mask of keys [B, N] (True: seen), put to the scores in one of several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norm1, self.norm2 = (nn.ModuleList(nn.LayerNorm(D) for _ in range(3)) for _ in range(2))
        self.qkv, self.proj = (nn.ModuleList(nn.Linear(D, k * D) for _ in range(3)) for k in (3, 1))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D)) for _ in range(3))

    def attend(self, i: int, x: Tensor, seen: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv[i](x).view(b, n, 3, 2, D // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mask = seen[:, None, None, :]
        if self.form == "expanded":
            mask = mask.expand(b, 1, n, n)
        elif self.form == "heads":
            mask = mask.expand(b, 2, n, n).reshape(b * 2, n, n).view(b, 2, n, n)
        elif self.form == "min":
            mask = (1.0 - mask.to(x.dtype)) * torch.finfo(x.dtype).min
        elif self.form == "bias":  # beside a table over pairs
            mask = torch.where(mask, 0.0, -math.inf) + self.proj[i].weight[0, 0] * torch.ones(2, n, n)
        if self.form == "matmul":
            scores = (q @ k.mT * (D // 2) ** -0.5).masked_fill(~mask, -math.inf)
            out = scores.softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj[i](out.transpose(1, 2).reshape(b, n, D))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for i in range(3):
            x = x + self.attend(i, self.norm1[i](x), seen)
            x = x + self.mlp[i](self.norm2[i](x))
        return x


FORMS = ("bool", "expanded", "heads", "min", "bias", "matmul")


def seen_of(*counts: int) -> Tensor:
    return torch.arange(N) < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_first_hides_the_padding(form: str, placement: str) -> None:
    """What stands in padded places changes nothing elsewhere, not by one bit, and not which tokens merge."""
    torch.manual_seed(0)
    model, seen = redraw(Masked(form)).eval(), seen_of(17, 33)
    x, noise = torch.randn(2, N, D), 5 * torch.randn(2, N, D)
    other = torch.where(seen[..., None], x, noise)
    a, report = run(model, (x, seen), None, 8, placement=placement, padding_first=True)
    b, _ = run(model, (other, seen), None, 8, placement=placement, padding_first=True)
    assert report.merged_sites == 3
    assert not torch.equal(x, other)
    assert torch.equal(a[seen], b[seen])


@pytest.mark.parametrize("form", FORMS)
def test_padding_that_merges_costs_nothing(form: str) -> None:
    """Where only padding merges, valid tokens come out as from the whole model."""
    torch.manual_seed(1)
    model, seen = redraw(Masked(form)).eval(), seen_of(16, 16)
    x = torch.randn(2, N, D)
    with torch.no_grad():
        want = model(x, seen)
    got, report = run(model, (x, seen), None, [10, 0, 0], placement="stream", padding_first=True)
    assert report.tokens == [(N, N - 10)]
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forced_into_padding(form: str, first: bool) -> None:
    """Every destination is padding: valid tokens must merge into it, and still nothing of it reaches them."""
    torch.manual_seed(2)
    model = redraw(Masked(form)).eval()
    seen = (torch.arange(N) % 2 == 0).expand(2, N)
    x = torch.where(seen[..., None], palette_tokens(2, 1, D).expand(2, N, D), 5 * torch.randn(2, N, D))
    with torch.no_grad():
        want = model(x, seen)
    got, report = run(model, (x, seen), None, [N // 2], placement="stream", padding_first=first)
    assert report.tokens == [(N, N // 2)]
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)


@settings(max_examples=10)
@given(st.lists(st.integers(4, N), min_size=2, max_size=2), st.integers(1, 12), st.booleans())
def test_valid_tokens_keep_to_themselves(counts: list[int], r: int, first: bool) -> None:
    """With as many equal tokens on either side as need be, merging is exact everywhere that the mask lets through."""
    torch.manual_seed(3)
    model, seen = redraw(Masked("bool")).eval(), seen_of(*counts)
    x = torch.where(seen[..., None], palette_tokens(2, N, D, k=1), 5 * torch.randn(2, 1, D))
    with torch.no_grad():
        want = model(x, seen)
    got, _ = run(model, (x, seen), None, r, placement="stream", padding_first=first)
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)


def test_gradients_pass_by_the_padding() -> None:
    torch.manual_seed(4)
    model, seen = redraw(Masked("bool")), seen_of(17, 33)
    x = torch.randn(2, N, D, requires_grad=True)
    out, _ = run(model, (x, seen), None, 8, grad=True, placement="stream", padding_first=True)
    out[seen].square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all()) and float(x.grad[seen].abs().min(-1).values.max()) > 0
    assert float(x.grad[~seen].abs().max()) < 1e-6


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times": lambda x, seen: (x * seen[..., None].to(x.dtype)).sum(1) / seen.sum(1, keepdim=True),
    "expanded": lambda x, seen: (
        (x * seen[..., None].expand(x.shape).float()).sum(1) / seen.sum(1)[:, None].clamp(min=1)
    ),
    "fill": lambda x, seen: x.masked_fill(~seen[..., None], 0.0).mean(1),
    "where": lambda x, seen: torch.where(seen[..., None], x, 0.0).transpose(1, 2).sum(-1),
    "einsum": lambda x, seen: torch.einsum("bnd,bn->bd", x, seen.to(x.dtype)),
    "bmm": lambda x, seen: (seen.to(x.dtype)[:, None] @ x)[:, 0],
    "weights": lambda x, seen: (seen / seen.sum(1, keepdim=True))[:, None] @ x,
    "attention": lambda x, seen: x[..., :1].masked_fill(~seen[..., None], -math.inf).softmax(1).mT @ x,
    "max": lambda x, seen: x.masked_fill(~seen[..., None], -math.inf).amax(1),
    "zeroed": lambda x, seen: x * seen[..., None],
}


class Pooled(Masked):
    """`Masked` read through a pool over the tokens that the mask leaves in."""

    def __init__(self, pool: str) -> None:
        super().__init__("bool")
        self.pool = POOLS[pool]

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.pool(super().forward(x, seen), seen)


@pytest.mark.parametrize("pool", POOLS)
def test_masked_pools_count_what_the_mask_leaves_in(pool: str) -> None:
    """Also where a valid token had to merge into a padded one: such a group counts as one token, not as two."""
    torch.manual_seed(2)
    model = redraw(Pooled(pool)).eval()
    seen = torch.arange(N).expand(2, N) % torch.tensor([[2], [4]]) == 0
    x = torch.where(seen[..., None], palette_tokens(2, 1, D).expand(2, N, D), 5 * torch.randn(2, N, D))
    with torch.no_grad():
        want = model(x, seen)
    got, report = run(model, (x, seen), None, [N // 2], placement="stream")
    assert report.tokens == [(N, N // 2)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- open scores -------------------------------------------------------------------------------------------------------


class Open(Masked):
    """Two blocks as `Masked`, with a softmax that cannot be fused. kind: why. form: how the mask joins the scores, from
    what the caller gives: a bool or number for each key, [B, N], lengths [B] or what is added, [B, 1, 1, N]."""

    def __init__(self, form: str, kind: str) -> None:
        super().__init__(form)
        self.kind = kind
        self.register_buffer("low", torch.full((1,), -1e9))
        self.mix_before = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.mix_after = nn.ModuleList(nn.Conv2d(2, 2, 1, bias=False) for _ in range(3))

    def mask_scores(self, s: Tensor, given: Tensor) -> Tensor:  # noqa: C901
        """s: [B, H, N, N]."""
        b, h, n, _ = s.shape
        wide = given[:, None, None] if given.dim() == 2 else given
        low = torch.finfo(s.dtype).min
        match self.form:
            case "fill":
                return s.masked_fill(~wide, -math.inf)
            case "fill low":
                return s.masked_fill(wide == 0, -1e4)
            case "fill expanded":
                return s.masked_fill(wide.expand(b, h, n, n).logical_not(), low)
            case "fill expand_as":
                return s.masked_fill((~wide).expand_as(s), low)
            case "where":
                return torch.where(wide, s, -math.inf)
            case "where other":
                return torch.where(wide.logical_not(), low, s)
            case "where full":
                return torch.where(wide, s, torch.full_like(s, -math.inf))
            case "where held":
                return torch.where(wide, s, self.low.clamp(max=-1e8))
            case "where made":
                return torch.where(wide, s, torch.zeros_like(s) - 1e9)
            case "float" | "given":
                return s + (torch.zeros_like(wide, dtype=s.dtype).masked_fill(~wide, low) if wide.dtype is torch.bool
                            else wide)  # fmt: skip
            case "one minus":
                return s + (1.0 - wide.to(s.dtype)) * -1e4
            case "minus":
                return s - 1e4 * (1 - wide.to(s.dtype))
            case "raised":
                return s + wide * 1e4
            case "times":
                return s * wide - 1e4 * (1 - wide)
            case "folded":
                return (s.reshape(b * h, n, n) + (wide[:, 0] * 1e4 - 1e4).repeat_interleave(h, 0)).view(b, h, n, n)
            case "folded view":
                return s.reshape(b * h, n, n).masked_fill(~wide.expand(b, h, 1, n).reshape(b * h, 1, n), low).view_as(s)
            case "table":
                return s + (self.proj[0].weight[0, 0] * torch.ones(h, n, n) + (1.0 - wide.to(s.dtype)) * low)
            case "lengths":
                return s.masked_fill((torch.arange(n) >= given[:, None])[:, None, None], -math.inf)
            case "zeroed":
                return s.masked_fill(~wide, -math.inf)
        raise ValueError(self.form)

    def attend(self, i: int, x: Tensor, seen: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv[i](x).view(b, n, 3, 2, D // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT * (D // 2) ** -0.5
        if self.kind == "before":
            scores = self.mix_before[i](scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.kind == "unmerged":  # no rule for it: full length under the mask, and merged again where v is
            scores = scores.flip(-1).flip(-1)
        p = self.mask_scores(scores, seen).softmax(-1)
        if self.form == "zeroed":
            p = p.masked_fill(~seen[:, None, None], 0.0)
        if self.kind == "after":
            p = self.mix_after[i](p)
        out = p @ v
        if self.kind == "twice":
            out = out + p @ v.roll(1, -1)
        return self.proj[i](out.transpose(1, 2).reshape(b, n, D)), p

    def forward(self, x: Tensor, seen: Tensor) -> Any:
        probabilities = []
        for i in range(2):
            y, p = self.attend(i, self.norm1[i](x), seen)
            probabilities.append(p)
            x = x + y
            x = x + self.mlp[i](self.norm2[i](x))
        return (x, *probabilities) if self.kind == "returned" else x


KINDS = ("before", "after", "returned", "twice", "unmerged")
OPEN = {  # the spelling -> what the caller gives
    "fill": "bool", "fill low": "int", "fill expanded": "bool", "fill expand_as": "bool", "where": "bool",
    "where other": "bool", "where full": "bool", "where held": "bool", "where made": "bool", "float": "bool",
    "given": "added", "one minus": "int", "minus": "bool",
    "raised": "float", "times": "float", "folded": "int", "folded view": "bool",
    "table": "int", "lengths": "lengths", "zeroed": "bool",
}  # fmt: skip


def opened(form: str, kind: str, seen: Tensor) -> tuple[nn.Module, Tensor]:
    """The model of a spelling, and its mask as the caller gives it."""
    model, given = redraw(Open(form, kind)).eval(), OPEN[form]
    if given == "lengths":
        return model, seen.sum(-1)
    if given == "added":
        return model, torch.where(seen, 0.0, -math.inf)[:, None, None]
    return model, seen.to({"bool": torch.bool, "int": torch.int64, "float": torch.float32}[given])


def tokens_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


SOME = [("fill", kind) for kind in KINDS] + [(form, "before") for form in OPEN if form != "fill"]


@pytest.mark.parametrize(("form", "kind"), thinned(SOME, 2))
def test_open_padding_first_hides_the_padding(form: str, kind: str) -> None:
    """As of fused attention: what stands in padded places changes nothing elsewhere."""
    torch.manual_seed(0)
    seen = seen_of(17, 33)
    model, given = opened(form, kind, seen)
    x, noise = torch.randn(2, N, D), 5 * torch.randn(2, N, D)
    other = torch.where(seen[..., None], x, noise)
    for placement in ("stream", "branch") if form == "fill" else ("stream",):
        a, report = run(model, (x, given), None, 8, placement=placement, padding_first=True)
        b, _ = run(model, (other, given), None, 8, placement=placement, padding_first=True)
        assert report.merged_sites == 2
        assert torch.equal(tokens_of(a)[seen], tokens_of(b)[seen])


ALL = [pytest.param(*case, marks=[pytest.mark.slow] * (case not in SOME)) for case in product(OPEN, KINDS)]


@pytest.mark.parametrize(("form", "kind"), ALL)
def test_open_forced_into_padding(form: str, kind: str) -> None:
    """Every destination is padding: valid tokens must merge into it, and still nothing of it reaches them, and they
    count in later blocks for what they are: the log-mean-exp of the mask is exact."""
    torch.manual_seed(2)
    seen = (torch.arange(N) % 2 == 0).expand(2, N) if OPEN[form] != "lengths" else seen_of(11, 11)
    model, given = opened(form, kind, seen)
    x = torch.where(seen[..., None], palette_tokens(2, 1, D).expand(2, N, D), 5 * torch.randn(2, N, D))
    with torch.no_grad():
        want = model(x, given)
    got, report = run(model, (x, given), None, N // 2, placement="stream")
    assert report.tokens == [(N, N // 2), (N // 2, N // 4)]
    torch.testing.assert_close(tokens_of(got)[seen], tokens_of(want)[seen], rtol=1e-4, atol=1e-4)


class Unclear(Open):
    """Masks in open scores that keep pairs apart, or of which nothing can be told."""

    def mask_scores(self, s: Tensor, given: Tensor) -> Tensor:
        n = s.shape[-1]
        wide = given[:, None, None]
        match self.form:
            case "causal":
                return s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
            case "causal and keys":
                return s.masked_fill(~(wide & torch.ones(n, n, dtype=torch.bool).tril()), -math.inf)
            case "given pairs":
                return s + torch.where(given, 0.0, -1e9)[:, None]
            case "mixed":
                s = s.masked_fill(~wide, -1e4)
                return self.mix_before[0](s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "scaled":
                return (s * 8 + (1.0 - wide.to(s.dtype)) * -1e6) / 8
            case "times only":
                return s * wide.to(s.dtype)
            case "clipped":
                return (s.masked_fill(~wide, -math.inf) / 30).tanh() * 30
            case "heads":
                return s.masked_fill(~(wide & torch.tensor([True, False])[:, None, None]), -math.inf)
        raise ValueError(self.form)


UNCLEAR = ("causal", "causal and keys", "given pairs", "mixed", "scaled", "times only", "clipped", "heads")


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize("form", UNCLEAR)
def test_open_masks_that_are_not_understood_leave_the_site_alone(form: str) -> None:
    """With the reason: to merge by a plain mean would mix what is masked into what is not."""
    model = redraw(Unclear(form, "returned")).eval()
    seen = torch.ones(2, N, N, dtype=torch.bool).tril() if form == "given pairs" else seen_of(17, 33)
    report = run(model, (torch.randn(2, N, D), seen), None, 8)[1]
    pairs = form in ("causal", "causal and keys", "given pairs")
    assert [s.kind for s in report.skipped] == ["causal or windowed mask" if pairs else "unclear mask"] * 2
    assert report.merged_sites == 0


# -- shifted windows ---------------------------------------------------------------------------------------------------


class Computed(Shifted):
    """The mask comes from numbers in each forward pass (torchvision), and joins scores of their own."""

    def attend(self, x: Tensor) -> Tensor:
        b, h, _, c = x.shape
        w = self.w
        part = x.new_zeros((h, h))
        for i, rows in enumerate((slice(0, -w), slice(-w, -w // 2), slice(-w // 2, None))):
            for j, columns in enumerate((slice(0, -w), slice(-w, -w // 2), slice(-w // 2, None))):
                part[rows, columns] = 3 * i + j
        part = windows(part[None, :, :, None], w)[..., 0]
        mask = (part[:, None] - part[:, :, None]).masked_fill(part[:, None] != part[:, :, None], -100.0)
        y = windows(x.roll((-3, -3), (1, 2)), w)
        q, k, v = self.attn.qkv(y).view(len(y), w * w, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // 2) ** -0.5) @ k.mT + self.rel_pos
        scores = scores.view(b, -1, 2, w * w, w * w) + mask[:, None].masked_fill(mask[:, None] > -50, 0.0)
        out = scores.view(len(y), 2, w * w, w * w).softmax(-1) @ v
        return unwindow(self.attn.proj(out.transpose(1, 2).reshape(len(y), w * w, c)), w, b, h).roll((3, 3), (1, 2))


class Twice(Shifted):
    """The same mask is added two times to open scores (Swin v2)."""

    def attend(self, x: Tensor) -> Tensor:
        b, h, _, c = x.shape
        y = windows(x.roll((-3, -3), (1, 2)), self.w)
        q, k, v = self.attn.qkv(y).view(len(y), 36, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 3 + self.rel_pos).view(b, -1, 2, 36, 36)
        scores = scores + self.mask.unsqueeze(1).unsqueeze(0)
        scores = scores + self.mask.unsqueeze(1).unsqueeze(0)
        out = scores.view(len(y), 2, 36, 36).softmax(-1) @ v
        return unwindow(self.attn.proj(out.transpose(1, 2).reshape(len(y), 36, c)), self.w, b, h).roll((3, 3), (1, 2))


@pytest.mark.parametrize("kind", [Shifted, Computed, Twice])
def test_shifted_windows_merge_within_their_parts(kind: Any) -> None:
    """Exactly, on palettes; and on any input no group holds tokens of two parts."""
    torch.manual_seed(0)
    model = equalize(redraw(Net(Windowed(), kind())).eval())
    image = palette_grid(2, (12, 12), (4, 4), k=2)
    report = assert_lossless(model, (image,), 3, sites=2, placement="branch", control=True)
    assert report.tokens == [(36, 33)] * 2


def test_groups_stay_in_their_parts() -> None:
    """By the groups themselves: the mask of the shifted windows sees every token of a group from each of them."""
    torch.manual_seed(0)
    block = Shifted()
    mask = block.mask  # [4, 36, 36]
    x = torch.randn(2, 4, 36, 16)
    parts = ops.part_labels(mask).expand(2, -1, -1)
    found = ops.match_parts(x, parts, 12, 0, 0, False, True)
    assign = found[0]
    together = assign[..., :, None] == assign[..., None, :]
    assert bool((together & (mask < -50)).any()) is False
    plain = ops.match(x, 12, 0, 0)[0]
    assert bool(((plain[..., :, None] == plain[..., None, :]) & (mask < -50)).any()), "the test cannot fail"


@pytest.mark.parametrize("even", [False, True])
def test_each_part_has_a_count_of_its_own(even: bool) -> None:
    """How many of a part merge, and which, does not follow from what another part holds: it is a sample of its own."""
    parts = torch.tensor([0] * 7 + [1] * 20 + [2] * 2 + [3] * 11)
    x = torch.randn(2, 40, 8)
    one = ops.match_parts(x, parts.expand(2, -1), 9, 0, 0, False, even)[0]
    other = torch.where((parts == 1)[:, None], x, torch.randn(2, 40, 8))
    other[0, 0:7] = 1.0  # all alike: without a count of its own this part would give all it has
    two = ops.match_parts(other, parts.expand(2, -1), 9, 0, 0, False, even)[0]
    same = [(a[:, :, None] == a[:, None, :])[:, parts == 1][:, :, parts == 1] for a in (one, two)]
    assert torch.equal(*same)
    shared = same[0].float().sum((-1, -2)) - 20
    assert bool((shared > 0).all()), "the test cannot fail"
    gone = [len(parts[parts == p]) - len(one[0, parts == p].unique()) for p in range(4)]
    assert sum(gone) == 9 and gone[1] == max(gone), gone
    if even:  # the third has one pair
        assert gone[2] == 1 and max(gone) - min(gone[0], gone[1], gone[3]) <= 1, gone


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize("change", ["overlap", "scores", "direction"])
def test_masks_that_part_nothing_are_left_alone(change: str) -> None:
    """Windows that slide, scores beside the mask, order: no parts that see only themselves."""
    model = Net(Windowed(), block := Shifted()).eval()
    near = (torch.arange(36)[:, None] - torch.arange(36)).abs()
    if change == "overlap":
        block.mask[1] = (near > 5).float() * -100.0
    elif change == "scores":
        block.mask[1] = block.mask[1] - near * 0.1
    else:
        block.mask[1] = torch.full((36, 36), -100.0).triu(1)
    report = run(model, (torch.randn(2, 3, 48, 48),), None, 3, placement="branch")[1]
    assert [s.kind for s in report.skipped] == ["causal or windowed mask"]
    assert [site.tokens[0] != site.tokens[1] for site in report.sites] == [True, False]


def test_no_more_than_have_a_partner() -> None:
    """A part of one column in every window leaves its tokens no partner at odd places: fewer than asked for merge."""
    model = Net(Shifted()).eval()
    part = torch.zeros(36, dtype=torch.long)
    part[2:] = torch.arange(34)  # tokens 0 and 1 see each other, all others only themselves
    model.blocks[0].mask.copy_((part[:, None] != part[None]).float() * -100.0)  # type: ignore[operator, union-attr]
    report = run(model, (torch.randn(2, 3, 48, 48),), None, 8, placement="branch")[1]
    assert report.tokens == [(36, 34)] or report.tokens == [(36, 35)]


# -- ops ---------------------------------------------------------------------------------------------------------------


def test_apart_keeps_the_order_within_a_kind() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 20, 2, 8)
    kinds = torch.ones(3, 20, 1)
    want = ops.match(x, 6, 1, 0, True)
    got = ops.match(tome.apart(x, kinds, True, False), 6, 1, 0)
    assert torch.equal(want[0], got[0])


def test_weights_of_keys() -> None:
    seen = torch.tensor([[True, False, True]])
    assert tome.key_weight(seen).tolist() == [[1.0, 2.0**-40, 1.0]]
    assert tome.key_weight(torch.where(seen, 0.0, torch.finfo(torch.float32).min)).tolist() == [[1.0, 2.0**-40, 1.0]]
    assert tome.key_kinds(torch.tensor([[2.0, 2.0**-39]])).tolist() == [[[1.0, 0.0], [0.0, 1.0]]]


def test_reports_name_the_option() -> None:
    assert "padding_first" in tome_fx.tome_backend(padding_first=True).config.to_dict()
    with pytest.raises(TypeError, match="padding_first"):
        tome_fx.tome_backend(padding_first=1)  # type: ignore[arg-type]


def test_dynamic_shapes() -> None:
    """One graph for every batch and length."""
    torch.manual_seed(5)
    model = redraw(Masked("bool")).eval()
    torch._dynamo.reset()
    backend = tome_fx.tome_backend(8, inner="eager", placement="stream", padding_first=True)
    fast, before = torch.compile(model, backend=backend, dynamic=True), len(tome_fx.reports())
    for batch, n in ((2, 40), (3, 52), (5, 64)):
        x, seen = torch.randn(batch, n, D), torch.arange(n) < torch.randint(10, n, (batch, 1))
        other = torch.where(seen[..., None], x, torch.randn_like(x))
        with torch.no_grad():
            assert torch.equal(fast(x, seen)[seen], fast(other, seen)[seen])
    assert len(tome_fx.reports()) == before + 1


@pytest.mark.parametrize("kind", ["keys", pytest.param("parts", marks=pytest.mark.slow)])
def test_the_whole_way(kind: str) -> None:
    """Through Inductor: as eager."""
    torch.manual_seed(6)
    if kind == "keys":
        model, args = redraw(Masked("bool")).eval(), (torch.randn(2, N, D), seen_of(17, 33))
    else:
        model, args = redraw(Net(Shifted())).eval(), (torch.randn(2, 3, 48, 48),)
    placement = "stream" if kind == "keys" else "branch"
    want, _ = run(model, args, None, 6, placement=placement)
    got, report = run(model, args, None, 6, placement=placement, inner="inductor")
    assert report.merged_sites > 0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


class Filled(nn.Module):
    """A plain block, one whose scores are filled by fill(scores, keep, low), a plain block."""

    def __init__(self, fill: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fill, self.low = fill, nn.Parameter(torch.tensor(-3.0))
        self.norm = nn.ModuleList(nn.LayerNorm(D) for _ in range(6))
        self.qkv, self.proj = (nn.ModuleList(nn.Linear(D, k * D) for _ in range(3)) for k in (3, 1))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D)) for _ in range(3))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for i in range(3):
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv[i](self.norm[i](x)).chunk(3, -1))
            scores = q @ k.mT * (D // 2) ** -0.5
            scores = self.fill(scores, keep[:, None, None], self.low) if i == 1 else scores
            x = x + self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + self.mlp[i](self.norm[i + 3](x))
        return x


FILLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a parameter": lambda s, k, low: s.masked_fill(~k, low),
    "a parameter, where": lambda s, k, low: torch.where(k, s, low),
    "a parameter, swapped": lambda s, k, low: torch.where(~k, low, s),
    "in place": lambda s, k, low: s.masked_fill_(~k, low.detach()),
    "computed": lambda s, k, low: torch.where(k, s, s.amin().detach()),
    "one of a row": lambda s, k, low: torch.where(k, s, low[None]),
    "a small number": lambda s, k, low: s.masked_fill(~k, -3.0),
    "a small number, where": lambda s, k, low: torch.where(k, s, 0.5),
    "a low tensor": lambda s, k, low: torch.where(k, s, torch.tensor(-1e9, dtype=s.dtype)),
    "the lowest": lambda s, k, low: s.masked_fill(~k, -torch.finfo(s.dtype).max),
    "the lowest, where": lambda s, k, low: torch.where(k, s, torch.finfo(s.dtype).min),
    "the lowest, a factor": lambda s, k, low: s + (1 - k.to(s.dtype)) * torch.finfo(s.dtype).min,
    "the lowest, swapped": lambda s, k, low: torch.where(~k, -torch.finfo(s.dtype).max, s),
    "the lowest, a tensor": lambda s, k, low: s.masked_fill(~k, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype)),
}


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_what_masked_scores_are_filled_with(fill: str) -> None:
    """A tensor, a number that leaves nothing out, one that float32 does not hold: the law, and no internal error, also
    where tokens that an earlier block merged come to it."""
    torch.manual_seed(0)
    model = Filled(FILLS[fill]).eval().to(torch.float64 if "lowest" in fill else torch.float32)
    x, keep = palette_tokens(2, N, D).to(model.low.dtype), torch.ones(2, N, dtype=torch.bool)
    keep[:, ::3] = False
    with torch.no_grad():
        want = model(x, keep)
    got, report = run(model, (x, keep), None, 4, placement="stream")
    assert report.merged_sites >= 1
    seen = keep if "low" in fill else torch.ones_like(keep)
    assert ((got - want)[seen].abs().max() / want.abs().max()).item() < 2e-5
