"""Sequences packed one behind the other, parted by a mask or by slices of the tokens that attend each to itself.

Each is a sample of its own: what changes in one moves nothing in the others, wherever tokens merge, and the tokens of
each merge all the same. Under a mask each gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.laws import PLACEMENTS, UNMOVED, moved, no_internal_error, traced
from tests.models import redraw
from tests.palette import assert_lossless, distance, palette_tokens, run
from tests.strategies import thinned

D, HEADS, R = 128, 4, 12
Attend = Callable[[Tensor], Tensor]


def attention(qkv: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


def sliced(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    ends = list(accumulate(lengths))
    return [x[:, end - n : end] for n, end in zip(lengths, ends, strict=True)]


def written(x: Tensor, lengths: Sequence[int]) -> Tensor:
    out, at = torch.zeros_like(x[..., :D]), 0
    for n in lengths:
        out[:, at : at + n] = attention(x[:, at : at + n])
        at += n
    return out


def added(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """What is there is read before it is written to."""
    out, at = x[..., :D].clone(), 0
    for n in lengths:
        out[:, at : at + n] += attention(x[:, at : at + n])
        at += n
    return out


def halved(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first, and then the rest as slices of a slice."""
    first, rest = x[:, : lengths[0]], x[:, lengths[0] :]
    return torch.cat([attention(first), *map(attention, sliced(rest, lengths[1:]))], 1)


def unbound(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Halves, whatever the lengths."""
    return torch.cat([attention(part) for part in x.unflatten(1, (2, -1)).unbind(1)], 1)


def gathered(x: Tensor, lengths: Sequence[int]) -> Tensor:
    places = torch.arange(sum(lengths)).split(list(lengths))
    return torch.cat([attention(x.index_select(1, place)) for place in places], 1)


def what_was_before(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each sees itself and those before."""
    ends, (q, k, v) = list(accumulate(lengths)), (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in x.chunk(3, -1))
    out = [F.scaled_dot_product_attention(q[:, :, end - n : end], k[:, :, :end], v[:, :, :end])
           for n, end in zip(lengths, ends, strict=True)]  # fmt: skip
    return torch.cat(out, 2).transpose(1, 2).flatten(2)


WAYS: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "split": lambda x, lengths: torch.cat([attention(part) for part in x.split(list(lengths), 1)], 1),
    "slices": lambda x, lengths: torch.cat([attention(part) for part in sliced(x, lengths)], 1),
    "narrow": lambda x, lengths: torch.cat(
        [attention(x.narrow(1, sum(lengths[:i]), n)) for i, n in enumerate(lengths)], 1
    ),
    "tensor_split": lambda x, lengths: torch.cat(
        [attention(part) for part in x.tensor_split(list(accumulate(lengths))[:-1], 1)], 1
    ),
    "slices of a slice": halved,
    "index_select": gathered,
    "what was before": what_was_before,
    "unbind": unbound,
    "written": written,
    "added": added,
    "padded and added": lambda x, lengths: sum(  # type: ignore[arg-type, return-value]
        F.pad(attention(part), (0, 0, sum(lengths[:i]), sum(lengths[i + 1 :])))
        for i, part in enumerate(sliced(x, lengths))
    ),
}


class Block(nn.Module):
    """x [B, N, D]; early: the tokens are cut before they are projected."""

    def __init__(self, way: str, lengths: Sequence[int], early: bool) -> None:
        super().__init__()
        self.way, self.lengths, self.early = WAYS[way], lengths, early
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.early:
            y = torch.cat([attention(self.qkv(part)) for part in sliced(y, self.lengths)], 1)
        else:
            y = self.way(self.qkv(y), self.lengths)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class Parted(Block):
    """Under a mask of a buffer that numbers the sequences."""

    ids: Tensor

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__("split", lengths, False)
        self.register_buffer("ids", torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.ids[:, None] == self.ids)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def packed(way: str, lengths: Sequence[int], early: bool = False) -> nn.Module:
    return redraw(nn.Sequential(*(Block(way, lengths, early) for _ in range(2))), 1).eval()


@pytest.mark.parametrize(
    ("way", "lengths"), thinned(product([*WAYS, "early"], [(40, 56), (48, 48), (32, 24, 40)]), 4)
)
def test_a_part_of_a_pack_does_not_see_the_others(way: str, lengths: tuple[int, ...]) -> None:
    model = packed("split" if way == "early" else way, lengths, way == "early")
    lengths = (sum(lengths) // 2,) * 2 if way == "unbind" else lengths
    x, made = torch.randn(2, sum(lengths), D), traced(model, R)
    first = torch.arange(sum(lengths)) < lengths[0]
    other = torch.where(first[:, None], x, torch.randn_like(x))
    for name in PLACEMENTS:
        gap = moved(made(name, x), made(name, other), first)
        no_internal_error(made.reports[name])
        assert gap < UNMOVED, f"{name}: moved by {gap:.0e}\n{made.reports[name]}"
    assert made.reports["branch"].merged_sites >= 2 * len(lengths), str(made.reports["branch"])


@pytest.mark.parametrize("way", WAYS)
def test_equal_tokens_of_a_pack_merge_without_loss(way: str) -> None:
    assert_lossless(packed(way, (40, 56)), (palette_tokens(2, 96, D, k=3),), R, placement="branch")


@pytest.mark.parametrize("r", [12, 3, [8, 4], 0.25], ids=str)
def test_a_masked_part_of_a_pack_is_what_it_is_alone(r: Any) -> None:
    """With MLPs and all: an int is for each part, a fraction of each part."""
    lengths = (72, 88, 64)
    blocks = nn.Sequential(*(Parted(lengths) for _ in range(2)))
    model, x = redraw(blocks, 1).eval().double(), torch.randn(2, sum(lengths), D, dtype=torch.float64)
    whole, report = run(model, (x,), None, r, placement="branch")
    assert all(site.mlp for site in report.sites), str(report)
    for part, own in zip(x.split(list(lengths), 1), whole.split(list(lengths), 1), strict=True):
        alone = nn.Sequential(*(Parted((part.shape[1],)) for _ in range(2))).eval().double()
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if "ids" not in k}, strict=False)
        assert distance(run(alone, (part,), None, r, placement="branch")[0], own) < 1e-12


def test_pieces_that_one_attention_sees_leave_the_mlps_as_they_were() -> None:
    """The control: cut, put together and attended as one, the MLPs merge."""

    class Whole(Block):
        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(self.norm1(x))
            x = x + self.out(attention(torch.cat(qkv.split(list(self.lengths), 1), 1)))
            return x + self.mlp(self.norm2(x))

    model = redraw(nn.Sequential(*(Whole("split", (40, 56), False) for _ in range(2))), 1).eval()
    report = assert_lossless(model, (palette_tokens(2, 96, D, k=3),), R, placement="branch")
    assert [site.mlp for site in report.sites] == [(96, 84)] * 2, str(report)


CUT = [way for way in WAYS if way not in ("index_select", "what was before", "unbind")]


class Tower(nn.Module):
    """Blocks on a pack of images, and a head on all tokens."""

    def __init__(self, way: str, lengths: Sequence[int], early: bool = False, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(way, lengths, early) for _ in range(depth))
        self.head = nn.Linear(D, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Varied(Tower):
    """Lengths are what the caller says, and differ from call to call."""

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in block.qkv(block.norm1(x)).chunk(3, -1))
            parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
            y = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2).transpose(1, 2).flatten(2)
            x = x + block.out(y)
            x = x + block.mlp(block.norm2(x))
        return self.head(x)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_packs_of_any_lengths(inner: str) -> None:
    """Lengths that are Python numbers: one graph serves them all, on the stream; a shorter image than r allows makes
    another."""
    model = Varied("split", [])
    fast = torch.compile(model, backend=tome_fx.tome_backend(r=6, placement="stream", inner=inner), dynamic=True)
    with torch.no_grad():
        for lengths in ([36, 50, 34], [50, 36, 34], [34, 36, 60]):
            x = torch.cat([palette_tokens(2, n, D, k=2) for n in lengths], 1)
            assert distance(fast(x, lengths), model(x, lengths)) < 2e-5
            (report,) = tome_fx.reports()
            assert [a - b for a, b in report.tokens] == [6] * 9
            assert [site.tokens[0] for site in report.sites] == [n - 6 * i for i in range(3) for n in (36, 50, 34)]
            assert {site.placement for site in report.sites} == {"stream"}
        lengths = [80, 10, 30]
        x = torch.cat([palette_tokens(2, n, D, k=1) for n in lengths], 1)
        assert distance(fast(x, lengths), model(x, lengths)) < 2e-5
        assert len(tome_fx.reports()) == 2


@pytest.mark.parametrize("lengths", [pytest.param((60, 40), marks=pytest.mark.slow), (36, 50, 34)], ids=str)
@pytest.mark.parametrize("way", thinned(CUT, 2))
def test_images_of_a_pack_merge_on_the_stream(way: str, lengths: tuple[int, ...]) -> None:
    """Each loses r tokens a block, for good, compared by its own keys: the tied law, and what each is alone."""
    model, x = Tower(way, lengths), torch.randn(2, sum(lengths), D)
    with torch.no_grad():
        found = tome_fx.check(model, (x,), r=6, placement="stream", drop_unread=False)
        assert found.holds and found.error < 1e-9, found
        sites = [site for site in found.report.sites if site.placement == "stream"]
        left = {n: [n - 6 * i for i in range(1, 4)] for n in lengths}
        if (way, len(lengths)) == ("padded and added", 3):  # each sum unmerges what the other parts lost
            return
        assert [site.tokens[1] for site in sites] == [left[n][i] for i in range(3) for n in lengths]
        fast = tome_fx.rewrite(model, (x,), r=6, placement="stream")
        same = "added" if way == "added" else "split"
        alone = [tome_fx.rewrite(Tower(same, [n]), (part,), r=6, placement="stream")(part)
                 for n, part in zip(lengths, x.split(lengths, 1), strict=True)]  # fmt: skip
        assert distance(fast(x), torch.cat(alone, 1)) < 1e-5


class Read(Tower):
    """A head on some tokens; whole: after each pack, attention over all."""

    def __init__(self, lengths: Sequence[int], places: Sequence[int], whole: bool = False) -> None:
        super().__init__("split", lengths, depth=2)
        self.places, self.whole = places, Block("split", [sum(lengths)], False) if whole else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.whole(block(x))
        return self.head(torch.stack([x[:, i] for i in self.places], 1))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_read_of_a_pack_is_special_in_its_images(placement: str) -> None:
    """The first token of each, and two in the middle."""
    model, x = Read((40, 60), (0, 40, 70, 75)), torch.randn(2, 100, D)
    _, report = run(model, (x,), None, 6, placement=placement, drop_unread=False)
    assert [site.protected for site in report.sites] == [1, 3] * 2, str(report)
    with torch.no_grad():
        assert tome_fx.check(model, (x,), r=6, placement=placement, drop_unread=False).holds


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_images_of_a_pack_are_no_special_tokens_where_all_attend_to_all(placement: str) -> None:
    _, report = run(Read((20, 20, 30, 30), (0,), True), (torch.randn(2, 100, D),), None, 6, placement=placement)
    assert [site.protected for site in report.sites[:5]] == [1, 0, 0, 0, 1], str(report)


def test_special_tokens_at_the_same_places_of_images_of_unequal_length() -> None:
    model, x = Tower("slices", (30, 40, 30)), torch.randn(2, 100, D)
    for placement in PLACEMENTS:
        found = tome_fx.check(model, (x,), r=6, protect=(1, 20), placement=placement)
        assert found.holds and found.merges, found


def test_a_part_counted_from_the_end_by_a_number_of_the_callers() -> None:
    """Nothing but a guard says that -n is an index from the end."""

    class FromTheEnd(Tower):
        def forward(self, x: Tensor, n: int, m: int) -> Tensor:  # type: ignore[override]
            for block in self.blocks:
                qkv = block.qkv(block.norm1(x))
                parts = (qkv[:, : -n - m], qkv[:, -n - m : -n], qkv[:, -n:])
                x = x + block.out(torch.cat([attention(part) for part in parts], 1))
                x = x + block.mlp(block.norm2(x))
            return self.head(x[:, -n:])

    model = FromTheEnd("split", [], depth=2)
    fast = torch.compile(model, backend=tome_fx.tome_backend(r=6, placement="stream", inner="eager"), dynamic=True)
    with torch.no_grad():
        for lengths in ((36, 50, 34), (50, 36, 44)):
            x = torch.cat([palette_tokens(2, n, D, k=2) for n in lengths], 1)
            assert distance(fast(x, *lengths[:0:-1]), model(x, *lengths[:0:-1])) < 2e-5
            (report,) = tome_fx.reports()
            no_internal_error(report)
            assert [a - b for a, b in report.tokens] == [6] * 6, str(report)


def filled(scores: Tensor) -> Tensor:
    scores[..., ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()] = -1e9
    return scores.softmax(-1)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_mask_that_no_operand_shows_leaves_a_part_alone(placement: str) -> None:
    """Causal in each part: written into the open scores."""

    class Causal(Tower):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                out = []
                for part in block.qkv(block.norm1(x)).split([40, 60], 1):
                    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in part.chunk(3, -1))
                    out.append((filled(q @ k.mT / 4) @ v).transpose(1, 2).flatten(2))
                x = x + block.out(torch.cat(out, 1))
                x = x + block.mlp(block.norm2(x))
            return self.head(x)

    x = torch.randn(2, 100, D)
    late = (torch.arange(100) % 40 >= 20) & (torch.arange(100) < 80)
    made = traced(Causal("split", [], depth=2), R)
    first, second = (made(placement, torch.where(late[:, None], other, x)) for other in (x, -x))
    no_internal_error(made.reports[placement])
    assert moved(first, second, torch.arange(100) < 20) < UNMOVED, made.reports[placement]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_mask_before_attention_without_softmax_leaves_a_part_alone(placement: str) -> None:
    class Linear(Tower):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                out = []
                for part in block.qkv(block.norm1(x)).split([40, 60], 1):
                    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in part.chunk(3, -1))
                    q, k = F.elu(q) + 1, (F.elu(k) + 1) * (torch.arange(k.shape[2]) % 5 != 0)[:, None]
                    weighed = q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)
                    out.append(weighed.transpose(1, 2).flatten(2))
                x = x + block.out(torch.cat(out, 1))
                x = x + block.mlp(block.norm2(x))
            return self.head(x)

    made = traced(Linear("split", [], depth=2), 6)
    made(placement, torch.randn(2, 100, D))
    no_internal_error(made.reports[placement])
    assert not made.reports[placement].merged_sites, made.reports[placement]
