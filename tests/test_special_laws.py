"""Laws of samples, special tokens, padding and streams, each over many spellings of one meaning (`tests.sequences`).

A sample does not depend on its batch; special tokens stay alone; empty samples and zero-padded windows come out as
they are; tokens that no input reaches take no place in the schedule; two calls merge as each alone; of joined streams
the longer merges.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests import sequences as seq
from tests.laws import LAW, Traced, no_internal_error, shared_tokens, traced
from tests.models import redraw
from tests.palette import assert_lossless, distance, palette_tokens, run, samples_apart
from tests.strategies import thinned

D, H, R = 64, 4, 6
PLACED = ("stream", "branch")
Attend = Callable[..., Tensor]


class Block(nn.Module):
    """Pre-norm block; attend(q, k, v, *more) on [B, H, N, D / H]. groups: heads of keys and values."""

    def __init__(self, attend: Attend = F.scaled_dot_product_attention, groups: int = H) -> None:
        super().__init__()
        self.attend, self.groups = attend, groups
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * groups * (D // H)), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def attention(self, x: Tensor, *more: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, D // H)).transpose(1, 2) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
        return self.out(self.attend(q, k, v, *more).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *more)
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *more)
        return x


def drawn(model: nn.Module) -> nn.Module:
    return redraw(model).eval()


def grid(*choices: Iterable[Any], step: int) -> list[Any]:
    """Every combination; all but each `step`-th is slow. A step that divides no length lets all values take turns."""
    return thinned(product(*choices), step, lambda case: "-".join(map(str, case)))


# -- samples -----------------------------------------------------------------------------------------------------------


class Related(nn.Module):
    """Adds q against embeddings of distance, and k too if `both`, to the scores; opened: with a softmax of its own."""

    def __init__(self, form: str, n: int, both: bool, opened: bool) -> None:
        super().__init__()
        self.relative, self.both, self.opened = seq.RELATIVE[form], both, opened
        self.line = nn.Parameter(torch.randn(2 * n - 1, D // H))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        table = self.line[i[:, None] - i + q.shape[2] - 1]
        bias = self.relative(q, table, self.line)
        if self.both:
            bias = bias + self.relative(k, table, self.line).mT
        bias = bias * q.shape[-1] ** -0.5
        if self.opened:
            return (seq.scores(q, k) + bias).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize(
    ("form", "both", "opened", "placement"), grid(seq.RELATIVE, [False, True], [False, True], PLACED, step=5)
)
def test_relative_keys_do_not_join_samples(form: str, both: bool, opened: bool, placement: str) -> None:
    """Case 31: each sample matches on its own."""
    n = 48
    model = drawn(Net(lambda: Block(Related(form, n, both, opened))))
    difference, report = samples_apart(model, (torch.randn(3, n, D),), None, R, 3, placement=placement)
    no_internal_error(report)
    assert report.merged_sites == 2, str(report)
    assert difference is not None and difference < 1e-9, f"a sample moves with its batch by {difference:.0e}\n{report}"


@pytest.mark.parametrize(("core", "placement"), grid(seq.CORES, PLACED, step=3))
def test_shared_keys(core: str, placement: str) -> None:
    """Multi-query and grouped-query attention: every block merges, the law and the law of samples hold."""
    groups, attend = seq.CORES[core]
    model = drawn(Net(lambda: Block(lambda q, k, v: attend(q, k, v, None), groups)))
    x = palette_tokens(2, 48, D, k=3)
    assert_lossless(model, (x,), R, sites=2, placement=placement)
    difference, report = samples_apart(model, (torch.randn(2, 48, D),), None, R, 2, placement=placement)
    assert difference is not None and difference < 1e-9, f"a sample moves with its batch by {difference:.0e}\n{report}"


# -- special tokens ----------------------------------------------------------------------------------------------------

PATCHES = 48


class Special(nn.Module):
    """A class token and `count` registers: `place` "middle" (after the class token, put in once the sequence is
    made), "front" (all put in at once) or "behind". The registers are alike, and so are patches in the tests."""

    def __init__(self, insert: str, place: str, count: int, positions: bool) -> None:
        super().__init__()
        self.insert, self.place = seq.INSERT[insert], place
        self.net = Net()
        self.cls, self.registers = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 1, D))
        self.count, n = count, PATCHES + (place == "middle")
        self.positions = nn.Parameter(torch.randn(1, n, D)) if positions else None

    def sequence(self, x: Tensor) -> Tensor:
        cls, registers = self.cls.expand(len(x), -1, -1), self.registers.repeat(len(x), self.count, 1)
        if self.place == "middle":
            x = torch.cat([cls, x], 1)
        if self.positions is not None:
            x = x + self.positions
        if self.place == "middle":
            return self.insert(x, registers, 1)
        special = torch.cat([cls, registers], 1)
        return self.insert(x, special, 0 if self.place == "front" else x.shape[1])

    @property
    def places(self) -> list[int]:
        first = PATCHES if self.place == "behind" else 0
        return list(range(first, first + 1 + self.count))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.sequence(x))[:, self.places[0]]


def assert_alone(model: nn.Module, x: Tensor, count: int, places: list[int], r: int, placement: str) -> Any:
    """By `trace_tokens`: something merges, and none of the tokens at `places` of `count` shares a group."""
    trace = tome_fx.trace_tokens(model, (x,), r=r, placement=placement)
    groups = [m.groups for m in trace.merges if m.groups.shape[-1] == count]
    assert groups, f"nothing merges:\n{trace.report}"
    shared = shared_tokens(groups, places)
    assert not shared, f"{shared} special tokens share a group\n{trace.report}"
    return trace.report


@pytest.mark.parametrize(
    ("insert", "place", "positions"), grid(seq.INSERT, ["middle", "front", "behind"], [False, True], step=5)
)
def test_special_tokens_stay_alone(insert: str, place: str, positions: bool) -> None:
    """Case 33: also where they are put into the middle of a sequence that is there already."""
    model, x = drawn(Special(insert, place, 3, positions)), palette_tokens(2, PATCHES, D, k=3)
    with torch.no_grad():  # patches like registers: nothing but protection keeps these apart
        like = torch.cat([model.registers + 0.05 * torch.randn(2, 8, D), x[:, 8:]], 1)
    for placement in ("stream", "branch"):
        assert_alone(model, like, PATCHES + 4, model.places, R, placement)
    if not positions:
        assert_lossless(model, (x,), R, sites=2, placement="branch")


@pytest.mark.parametrize("insert", seq.INSERT)
def test_registers_in_the_middle_are_counted(insert: str) -> None:
    for count in (1, 4):
        model = drawn(Special(insert, "middle", count, True))
        report = run(model, (torch.randn(2, PATCHES, D),), None, R, placement="stream")[1]
        assert {site.protected for site in report.sites if site.merged} == {1 + count}, str(report)


BESIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a time, in front": lambda x, t: torch.cat([t[:, None], x], 1),
    "a time, behind": lambda x, t: torch.cat([x, t.unsqueeze(1)], 1),
    "a time and a mean": lambda x, t: torch.cat([t[:, None], x.mean(1, keepdim=True), x], 1),
    "a mean, then a time": lambda x, t: torch.cat([t[:, None], torch.cat([x.mean(1, keepdim=True), x], 1)], 1),
    "joined along rows": lambda x, t: torch.cat([t[None], x.transpose(0, 1)]).transpose(0, 1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("beside", BESIDE)
def test_a_token_that_stands_beside_all_others_stays_alone(beside: str, dynamic: bool) -> None:
    """One of a diffusion's time, or of the mean of all: no patch, though it comes from inputs."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.time = Net(), nn.Linear(8, D)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(BESIDE[beside](x, self.time(t)))

    model, (x, t) = drawn(Beside()), (torch.randn(2, PATCHES, D), torch.randn(2, 8))
    with torch.no_grad():  # patches like it at both ends: nothing but protection keeps these apart
        time = model.time(t)[:, None]
        x[:, :4], x[:, -4:] = time, time
        x[:, 4:8] = x.mean(1, keepdim=True)
    made = Traced(model, {"made": {"r": R, "placement": "stream"}}, dynamic=dynamic)
    made("made", x, t)
    count = PATCHES + 1 + ("mean" in beside)
    places = [count - 1] if "behind" in beside else list(range(count - PATCHES))
    groups = made.groups(count)
    assert len(groups) == 2, str(made.reports["made"])
    assert not shared_tokens(groups, places), str(made.reports["made"])


class Frames(nn.Module):
    """Special tokens in front of the patches of every frame, one attention over all frames; the first one is read."""

    def __init__(self, join: str, read: str, count: int) -> None:
        super().__init__()
        self.join, self.read, self.count = seq.FRAMES[join], seq.READ_FRAMES[read], count
        self.special, self.net = nn.Parameter(torch.randn(1, 1, count, D)), Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.net(self.join(x, self.special)), x.shape[1])


FRAME_FORMS = [(join, list(seq.READ_FRAMES)[i % len(seq.READ_FRAMES)]) for i, join in enumerate(seq.FRAMES)]
FRAME_FORMS += [("cat, reshape", read) for read in seq.READ_FRAMES]


@pytest.mark.parametrize(("form", "count"), grid(dict.fromkeys(FRAME_FORMS), [1, 3], step=3))
def test_special_tokens_of_every_frame_stay_alone(form: tuple[str, str], count: int) -> None:
    """Case 11: those that are read, one a frame."""
    f, p = 4, 20
    model = drawn(Frames(*form, count))
    x = torch.randn(2, f, p, D)
    with torch.no_grad():
        x[:, :, :4] = model.special[:, :, :1] + 0.05 * torch.randn(2, f, 4, D)
    read_places = [i * (p + count) for i in range(f)]
    palette = palette_tokens(2, f * p, D, k=3).view(2, f, p, D)
    for placement in ("stream", "branch"):
        assert_alone(model, x, f * (p + count), read_places, 12, placement)
        assert_lossless(model, (palette,), 8, placement=placement)


# -- padding -----------------------------------------------------------------------------------------------------------


def keys_of(n: int, *lengths: int) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


class Padded(nn.Module):
    """Blocks under a mask of keys made in one way, put to the scores or given to SDPA."""

    def __init__(self, padding: str, core: str) -> None:
        super().__init__()
        groups, attend = seq.CORES[core]
        self.padding, self.net = padding, Net(lambda: Block(attend, groups))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.net(x, seq.padding(self.padding, keep, x.dtype))


EMPTY = [(padding, "sdpa") for padding in seq.EXACT_WHEN_EMPTY]
FINITE = list(product([padding for padding in seq.PADDING if padding not in seq.EXACT_WHEN_EMPTY], ["sdpa", "scores"]))


def assert_samples(model: nn.Module, x: Tensor, keep: Tensor, placement: str) -> None:
    """Every sample as eager gives it: where the mask leaves tokens in those, in an empty sample all."""
    with torch.no_grad():
        want = model(x, keep)
    made = traced(model, R, (placement,))
    got, report = made(placement, x, keep), made.reports[placement]
    no_internal_error(report)
    assert report.merged_sites == 2, str(report)
    for i, seen in enumerate(keep):
        seen = seen if seen.any() else ~seen
        error = distance(got[i][seen], want[i][seen])
        assert error < LAW, f"sample {i} moved by {error:.0e}\n{report}"


@pytest.mark.parametrize(("form", "placement"), grid(EMPTY, PLACED, step=3))
def test_empty_samples_stay_zero(form: tuple[str, str], placement: str) -> None:
    """Case 09: SDPA gives a query that sees no key zero, for bool and for -inf."""
    model = drawn(Padded(*form))
    assert_samples(model, palette_tokens(3, 48, D, k=3), keys_of(48, 48, 30, 0), placement)


@pytest.mark.parametrize(("form", "placement"), grid(FINITE, PLACED, step=3))
def test_empty_samples_keep_their_mean(form: tuple[str, str], placement: str) -> None:
    """Under a mask of large numbers a query that sees no key gives what the unmerged model gives.

    A score beside 1e4 has three digits in float32, so those in float64; beside finfo.min it has none: the point.
    """
    model, x = drawn(Padded(*form)), palette_tokens(3, 48, D, k=3)
    if "1e4" in form[0]:
        model, x = model.double(), x.double()
    assert_samples(model, x, keys_of(48, 48, 30, 0), placement)


@pytest.mark.parametrize(("core", "placement"), grid(seq.CORES, PLACED, step=3))
def test_padding_under_shared_keys(core: str, placement: str) -> None:
    model = drawn(Padded("bool", core))
    assert_samples(model, palette_tokens(3, 48, D, k=3), keys_of(48, 48, 30, 20), placement)


def over_channels(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Efficient attention: keys are normalised over the tokens, and a mask leaves some out there."""
    k = k.masked_fill(~keep[:, None, :, None], -1e9).softmax(-2)
    return q.softmax(-1) @ (k.mT @ v)


def sorted_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Keys and values with those that count first."""
    order = torch.argsort((~keep).int(), dim=1, stable=True)
    k, v = (t.gather(2, order[:, None, :, None].expand_as(t)) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.gather(1, order)[:, None, None])


@pytest.mark.parametrize("placement", PLACED)
@pytest.mark.parametrize("core", [over_channels, sorted_keys], ids=lambda f: f.__name__)
def test_padding_that_masks_elsewhere(core: Attend, placement: str) -> None:
    """What stands at padded places moves no valid token, though the mask joins no scores of the tokens themselves."""
    model, keep = drawn(Net(lambda: Block(core))), keys_of(48, 48, 30, 20)
    x = torch.randn(3, 48, D)
    other = torch.where(keep[..., None], x, torch.randn(3, 48, D))
    made = traced(model, R, (placement,), padding_first=True)
    assert distance(made(placement, other, keep)[keep], made(placement, x, keep)[keep]) < 1e-5, str(made.reports)


ZEROED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kept": lambda y, keep: y,
    "where": lambda y, keep: torch.where(keep[..., None], y, 0.0),
    "times": lambda y, keep: y * keep[..., None],
    "masked_fill": lambda y, keep: y.masked_fill(~keep[..., None], 0.0),
    "where a weight": lambda y, keep: torch.where(keep[..., None], y, y.mean(-1, keepdim=True).detach() * 0 + 0.5),
    "einsum": lambda y, keep: torch.einsum("bnd,bn->bnd", y, keep.to(y.dtype)),
}


MASK_BESIDE: dict[str, Callable[[Tensor, int], Tensor]] = {
    # of keep, bool [B, N], and a number of learned keys before the tokens: the mask of all keys
    "pad": lambda keep, m: F.pad(keep, (m, 0), value=True),
    "cat": lambda keep, m: torch.cat([keep.new_ones(len(keep), m), keep], 1),
    "cat numbers": lambda keep, m: torch.cat([torch.zeros(len(keep), m), torch.where(keep, 0.0, -1e9)], 1),
    "pad numbers": lambda keep, m: F.pad((1.0 - keep.float()) * torch.finfo(torch.float32).min, (m, 0)),
    "pad, then fill": lambda keep, m: torch.zeros(len(keep), m + keep.shape[1]).masked_fill(
        F.pad(~keep, (m, 0)), -torch.inf
    ),
}


class Beside(Block):
    """Learned keys beside the tokens, and the attention's output zeroed at padded places."""

    def __init__(self, zeroed: str, learned: int, mask: str = "pad") -> None:
        super().__init__()
        self.zeroed, self.mask = ZEROED[zeroed], MASK_BESIDE[mask]
        self.learned = nn.Parameter(torch.randn(2, 1, H, learned, D // H)) if learned else None

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        y = self.norm1(x)
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (self.q(y), *self.kv(y).chunk(2, -1)))
        mask = keep
        if self.learned is not None:
            own = self.learned.expand(-1, len(x), -1, -1, -1)
            k, v = (torch.cat([m, t], 2) for m, t in zip(own, (k, v), strict=True))
            mask = self.mask(keep, self.learned.shape[3])
        y = self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2))
        x = x + self.zeroed(y, keep)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("learned", [0, 5])
@pytest.mark.parametrize("zeroed", ZEROED)
def test_groups_of_padding_and_valid_tokens(zeroed: str, learned: int) -> None:
    """Case 08: tokens equal before the attention are not equal after it where padding is zeroed; r is large."""
    model, keep = drawn(Net(lambda: Beside(zeroed, learned))), keys_of(64, 64, 44)
    x = palette_tokens(2, 64, D, k=3)
    with torch.no_grad():
        want = model(x, keep)
    got, report = run(model, (x, keep), None, 14, placement="branch")
    assert report.merged_sites == 2, str(report)
    error = distance(got[keep], want[keep])
    assert error < LAW, f"valid tokens moved by {error:.0e}\n{report}"


@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("mask", MASK_BESIDE)
def test_padding_beside_learned_keys(mask: str, placement: str) -> None:
    """What is padded is in no group of a valid token: its content moves none."""
    model, keep = drawn(Net(lambda: Beside("kept", 5, mask))), keys_of(64, 64, 44)
    x = torch.randn(2, 64, D)
    other = torch.where(keep[..., None], x, 9 * torch.randn(2, 64, D))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tome_fx.ToMeWarning)
        (a, report), (b, _) = (
            run(model, (t, keep), None, 14, placement=placement, padding_first=True) for t in (x, other)
        )
    assert report.merged_sites == (2 if placement == "branch" else 0), str(report)
    torch.testing.assert_close(a[keep], b[keep])


class Windows(nn.Module):
    """x + attention in windows of w x w of a grid padded with zeros after the norm."""

    def __init__(self, pad: str, w: int, before_norm: bool = False) -> None:
        super().__init__()
        self.pad, self.w, self.before_norm = seq.PAD_GRID[pad], w, before_norm
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        size, high, wide = self.w, -(-h // self.w) * self.w, -(-w // self.w) * self.w
        y = self.pad(self.norm(x), high, wide)
        y = y.view(b, high // size, size, wide // size, size, d).transpose(2, 3).reshape(-1, size * size, d)
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y.view(b, high // size, wide // size, size, size, d).transpose(2, 3).reshape(b, high, wide, d)
        return x + y[:, :h, :w]


@pytest.mark.parametrize(("pad", "r"), grid(seq.PAD_GRID, [2, 8, 20], step=2))
def test_zeros_merge_before_all_else(pad: str, r: int) -> None:
    """Case 32: windows with enough zeros come out as they would unmerged, and their tokens stay alone."""
    model, x = drawn(Windows(pad, 8)), torch.randn(2, 10, 10, D)
    with torch.no_grad():
        want = model(x) - x
    made = traced(model, r, ("branch",))
    got, report = made("branch", x) - x, made.reports["branch"]
    no_internal_error(report)
    assert report.tokens == [(64, 64 - r)], str(report)
    real = F.pad(torch.ones(10, 10, dtype=torch.bool), (0, 6, 0, 6)).view(2, 8, 2, 8).transpose(1, 2).reshape(4, 64)
    (groups,) = made.groups(64)
    shared = sum(shared_tokens([g[None]], real[i % 4].nonzero().flatten().tolist())
                 for i, g in enumerate(groups) if i % 4)  # fmt: skip
    assert not shared, f"{shared} tokens of windows with zeros share a group"
    inner = torch.ones(10, 10, dtype=torch.bool)
    inner[:8, :8] = False
    error = distance(got[:, inner], want[:, inner])
    assert error < LAW, f"windows with zeros moved by {error:.0e}\n{report}"


# -- tokens of no input ------------------------------------------------------------------------------------------------

SIDE, BANDS, PATCH = 8, 4, 4


class Unfed(nn.Module):
    """Blocks that see the input, and a block or more over learned tokens alone, used in one of several ways."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.net, self.own = use, Net(depth=3), Net(depth=1)
        self.learned, self.bands = nn.Parameter(torch.randn(1, SIDE * SIDE, D)), nn.Parameter(torch.randn(1, BANDS, D))
        self.project, self.to_bias = nn.Linear(D, BANDS), nn.Linear(D, 1)
        self.off = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        match self.use:
            case "positions":
                return self.net(x + self.off * self.own(self.learned))
            case "positions expanded first":
                return self.net(x + self.off * self.own(self.learned.expand(len(x), -1, -1)))
            case "weights":
                w = self.own(torch.cat([self.learned, self.bands], 1))[0, :D]
                return self.net(F.linear(x, w) * 0.2)
            case "prompts for logits":
                return self.net(x) @ self.own(self.learned).mT
            case "pooled scale":
                return self.net(x * (1 + self.own(self.learned).mean(1, keepdim=True).sigmoid()))
            case "condition":
                return self.net(x) + self.own(self.learned)[:, :1]
            case "gate at the end":
                return self.net(x).mean(1) * self.own(self.learned).mean(1)
        raise ValueError(self.use)


UNFED = ("positions", "positions expanded first", "weights", "prompts for logits", "pooled scale", "condition",
         "gate at the end")  # fmt: skip
SCHEDULES = [(6, [6, 6, 6]), ([9, 5, 2], [9, 5, 2]), ([8, 0, 0], [8])]


@pytest.mark.parametrize(("use", "schedule"), grid(UNFED, SCHEDULES, step=2))
def test_tokens_of_no_input_take_no_place(use: str, schedule: tuple[Any, list[int]]) -> None:
    """Case 23: the first entry of a list belongs to the first block that sees the input."""
    r, merged = schedule
    torch.manual_seed(0)
    model = drawn(Unfed(use))
    model.off.data.zero_()
    n, tokens = SIDE * SIDE, []
    for count in merged:
        tokens.append((n, n - count))
        n -= count
    assert_lossless(model, (palette_tokens(2, SIDE * SIDE, D, k=3),), r, tokens=tokens, placement="stream")


# -- two calls ---------------------------------------------------------------------------------------------------------

TWICE: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "sum": lambda model, x: model(x) + model(x.flip(1)),
    "pair": lambda model, x: (model(x), model(2 * x)),
    "stack": lambda model, x: torch.stack([model(t) for t in (x, x.flip(1))]).mean(0),
    "halves": lambda model, x: torch.cat([model(t) for t in x.chunk(2)]),
    "with and without gradients": lambda model, x: (model(x), model(x.roll(1, 1)).detach()),
    "ensemble in float64": lambda model, x: model(x).double() + model(-x).double(),
}


@pytest.mark.parametrize(("calls", "r"), grid(TWICE, [4, [9, 5, 2], (6, -1), (6, 1), 0.1], step=3))
def test_two_calls_merge_as_each_alone(calls: str, r: Any) -> None:
    """Case 16: the schedule is of the model's blocks, not of the graph's."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(depth=3)

        def forward(self, x: Tensor) -> Any:
            return TWICE[calls](self.net, x)

    model, x = drawn(Both()), palette_tokens(2, 48, D, k=3)
    alone = run(model.net, (x[:1] if calls == "halves" else x,), None, r, placement="stream")[1].tokens
    assert_lossless(model, (x,), r, tokens=alone * 2, placement="stream")


# -- joined streams ----------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def close(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class Joint(nn.Module):
    """One attention over two streams; `early`: joined before the heads are cut, else q, k and v one by one."""

    def __init__(self, join: str, cut: str, text_first: bool, early: bool) -> None:
        super().__init__()
        self.join, self.cut, self.text_first, self.early = seq.JOIN[join], seq.CUT[cut], text_first, early
        self.text, self.image = Stream(), Stream()

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (self.text, self.image) if self.text_first else (self.image, self.text)
        a, b = (text, image) if self.text_first else (image, text)
        parts = first.qkv(first.norm1(a)), second.qkv(second.norm1(b))
        if self.early:
            heads = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.join(*parts, 1).chunk(3, -1))
        else:
            split = ([t.unflatten(-1, (H, -1)).transpose(1, 2) for t in p.chunk(3, -1)] for p in parts)
            heads = (self.join(s, t, 2) for s, t in zip(*split, strict=True))
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        y, z = self.cut(y, a.shape[1])
        a, b = first.close(a, y), second.close(b, z)
        return (a, b) if self.text_first else (b, a)


class Streams(nn.Module):
    def __init__(self, *form: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint(*form) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            text, image = block(text, image)
        return image, text


FORMS = [("cat", cut) for cut in seq.CUT] + [(join, "slices") for join in list(seq.JOIN)[1:]]


FREE = {"nothing": (), "image": (1,), "both": (0, 1), "both and batch": (0, 1)}
"""Of which of text and image the length is dynamic."""


@pytest.mark.parametrize(
    ("form", "early", "text_first", "free"), grid(FORMS, [True, False], [True, False], list(FREE), step=5)
)
def test_the_longer_stream_merges(form: tuple[str, str], early: bool, text_first: bool, free: str) -> None:
    """Case 10: of a fixed length and of dynamic ones, at the lengths compiled for and at others, in one graph."""
    model = drawn(Streams(*form, text_first, early))

    def inputs(batch: int, *lengths: int) -> list[Tensor]:
        return [palette_tokens(batch, n, D, k=3, seed=n) for n in lengths]

    args = inputs(2, 20, 64)
    for i in FREE[free]:
        torch._dynamo.mark_dynamic(args[i], 1)
    if "batch" in free:
        torch._dynamo.mark_dynamic(args[0], 0)
        torch._dynamo.mark_dynamic(args[1], 0)
    made = Traced(model, {"stream": {"r": R, "placement": "stream"}}, dynamic=None if FREE[free] else False)
    others = {"nothing": [], "image": [(2, 20, 75)], "both": [(2, 27, 75), (2, 40, 36)]}.get(free, [(3, 27, 75)])
    for given in (args, *(inputs(*sizes) for sizes in others)):
        with torch.no_grad():
            want = model(*given)
        error = distance(made("stream", *given), want)
        assert error < LAW, f"{error:.0e} at {[x.shape for x in given]}\n{made.reports['stream']}"
    report = made.reports["stream"]
    no_internal_error(report)
    assert report.graphs == 1, f"{report.graphs} graphs"
    lengths = [site.tokens[0] for site in report.sites if site.merged]
    assert len(lengths) == 2 and 20 not in lengths, str(report)
    assert {site.placement for site in report.sites} == {"stream"}, str(report)


class ReadFromTheEnd(Streams):
    """One token is read, as many places from the end as there are words."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        image, _ = super().forward(text, image)
        return torch.ops.aten.select.int(image, 1, -text.shape[1])


def test_a_token_at_a_symbolic_place_from_the_end() -> None:
    """It was taken for one of the first: an index below 0 that is no number."""
    model = drawn(ReadFromTheEnd("cat", "slices", True, True))
    made = Traced(model, {"stream": {"r": R, "placement": "stream"}}, dynamic=True)
    for lengths in ((20, 64), (27, 75)):
        args = [palette_tokens(2, n, D, k=3, seed=n) for n in lengths]
        with torch.no_grad():
            assert distance(made("stream", *args), model(*args)) < LAW
    report = made.reports["stream"]
    no_internal_error(report)
    assert report.merged_sites > 0


# -- named by the caller -----------------------------------------------------------------------------------------------


NAMED = [((2, 10), [0, 1, 10, 11, 50, 91]), ([0, 50, -1], [0, 50, 99]), (3, [0, 1, 2])]


@pytest.mark.parametrize(("protect", "alone"), NAMED)
def test_protect_names_places(protect: Any, alone: list[int]) -> None:
    """A period, positions, or a number of leading tokens: none shares its group, through all merges."""
    model = drawn(nn.Sequential(*(nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True) for _ in range(3))).eval())
    trace = tome_fx.trace_tokens(model, (torch.randn(2, 100, D),), r=8, placement="stream", protect=protect)
    groups = trace.groups
    assert len(trace.merges) == 3
    assert all(int((g == g[p]).sum()) == 1 for g in groups for p in alone)


def test_places_of_a_dynamic_axis_are_not_guessed() -> None:
    """Where the number of tokens is dynamic, places between others cannot be kept: the sites say so and stay alone."""
    model, x = drawn(nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True).eval()), torch.randn(2, 100, D)
    torch._dynamo.mark_dynamic(x, 1)
    tome_fx.clear_reports()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning, match="compile for one size"):
        torch.compile(model, backend=tome_fx.tome_backend(r=8, inner="eager", protect=(2, 10)))(x)
