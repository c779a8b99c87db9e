"""The law of masks: what a mask of pairs keeps from a token never reaches it, however the mask is made and applied.

Under a mask that is causal, windowed or asymmetric, outputs do not move when tokens out of reach change. Under one
that cuts the tokens into parts, no group holds tokens of two parts, and merging equal tokens of one part is exact.
Leaving a site alone is right. Masks that tell no two merging tokens apart must not stop merging: the controls below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import strategies
from tests.laws import (
    LAW,
    PLACEMENTS,
    UNMOVED,
    Traced,
    apart_from,
    mixed_groups,
    moved,
    no_internal_error,
    traced,
)
from tests.models import redraw
from tests.palette import assert_lossless, distance, is_rounding, palette_tokens, run
from tests.spellings import (
    APPLY,
    BATCH,
    CAUSAL,
    FLEX,
    HEADS,
    HELD,
    INF,
    KINDS,
    MADE,
    MODULES,
    POSITIONAL,
    Hold,
    Make,
    added,
    applies,
    held,
    mask_of,
    masked,
    near,
    ways,
)

N, D, R = 96, 256, 12  # where "auto" merges


def obey(kind: str, way: str, apply: str, r: Any, placements: tuple[str, ...], once: bool = True) -> Traced:
    """The law for one spelling, under each placement."""
    model = masked(mask_of(kind, way, N), apply, D, once=once)
    meaning = KINDS[kind]
    changed, kept = meaning.places(N)
    part = meaning.part(torch.arange(N), N) if meaning.part else None
    x, palette = torch.randn(BATCH, N, D, generator=torch.Generator().manual_seed(1)), palette_tokens(BATCH, N, D, k=3)
    y = apart_from(x, changed)
    with torch.no_grad():
        want, other = model(palette), moved(model(y), model(x), kept)
    assert other < UNMOVED, f"the mask does not say what it should: {other:.0e}"
    made = traced(model, r, placements)
    for name in placements:
        before = made(name, x)
        groups = made.groups(N)
        leak, report = moved(made(name, y), before, kept), made.reports[name]
        no_internal_error(report)
        assert leak < UNMOVED, f"{name}: outputs moved by {leak:.0e} with tokens that they cannot see\n{report}"
        if part is not None:
            mixed = mixed_groups(groups, part)
            assert not mixed, f"{name}: {mixed} groups hold tokens of two parts\n{report}"
        if way not in POSITIONAL:
            error = distance(made(name, palette), want)
            lowest = made.lowest
            assert error < LAW or is_rounding(error, want, model, (palette,), None, r, placement=name), (
                f"{name}: merging at cosine {lowest:.4f} changed the output by {error:.0e}\n{report}"
            )
    return made


PLAIN = [name for name in (*APPLY, *MODULES) if name not in FLEX]
SPELLED = [(kind, way) for kind in MADE for way in MADE[kind]]
SPELLED += zip(list(KINDS) * len(HELD), HELD, strict=False)
TURNS = [  # the ways to apply take turns
    pytest.param(kind, way, PLAIN[i % len(PLAIN)], id=f"{kind}-{way}", marks=[pytest.mark.slow] * (i % 2))
    for i, (kind, way) in enumerate(SPELLED)
]
APPLIED = [
    *(("causal", "finfo.min buffer", name) for name in (*PLAIN, FLEX[0], CAUSAL)),
    *(pytest.param("images", "-inf buffer", name, marks=pytest.mark.slow) for name in PLAIN),
]


@pytest.mark.parametrize(("kind", "way", "apply"), TURNS)
def test_every_way_to_make_a_mask(kind: str, way: str, apply: str) -> None:
    obey(kind, way, apply, R, ("auto",))


@pytest.mark.parametrize(("kind", "way", "apply"), APPLIED)
def test_every_way_to_apply_a_mask(kind: str, way: str, apply: str) -> None:
    obey(kind, way, apply, R, PLACEMENTS)


@settings(max_examples=10)
@given(strategies.masks(flex=False), st.sampled_from([4, 12, 0.3, [20, 4], (8, -1)]), st.booleans())
def test_any_mask(mask: tuple[str, str, str], r: Any, once: bool) -> None:
    note(f"obey(*{mask!r}, {r!r}, PLACEMENTS, {once})")
    obey(*mask, r, PLACEMENTS, once)


@pytest.mark.slow
@settings(max_examples=600)
@given(strategies.masks(), st.sampled_from([4, 12, 0.3, [20, 4], (8, -1)]), st.booleans())
def test_any_mask_many(mask: tuple[str, str, str], r: Any, once: bool) -> None:
    note(f"obey(*{mask!r}, {r!r}, PLACEMENTS, {once})")
    obey(*mask, r, PLACEMENTS, once)


# -- controls: what must go on merging ---------------------------------------------------------------------------------

TOKENS = [(N, N - R), (N - R, N - 2 * R)]
ADDED = ["sdpa, float", "scores + mask", "softmax(dtype)", "einsum", "baddbmm", "mha, float"]


@pytest.mark.parametrize("way", ["ids == ids", "-inf buffer"])
@pytest.mark.parametrize("once", [False, True], ids=["anew", "once"])
def test_one_mask_parts_every_block(way: str, once: bool) -> None:
    """Before, a mask that parted the first block counted as none in the second."""
    report = obey("blocks", way, "sdpa", R, ("branch",), once).reports["branch"]
    assert [site.merged for site in report.sites] == [True, True], str(report)


def test_without_a_mask_auto_merges_on_the_stream() -> None:
    """So the law above is not held by leaving small models alone."""
    model = masked(Make(lambda n: torch.zeros(1, 1), N), "sdpa", D)
    report = run(model, (torch.randn(BATCH, N, D),), None, R)[1]
    assert report.tokens == TOKENS
    assert {site.placement for site in report.sites} == {"stream"}


def distances(n: int) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] - i).abs()


class Learned(nn.Module):
    """Relative positions from a learned table [2 N - 1, H], read by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * N - 1, HEADS)

    def forward(self) -> Tensor:
        i = torch.arange(N)
        return self.table(i[:, None] - i + N - 1).permute(2, 0, 1)


TABLES: dict[str, Callable[[], nn.Module]] = {
    "buffer": lambda: Hold("buffer", near(torch.ones(N, N))),
    "attribute": lambda: Hold("attribute", near(torch.ones(N, N))),
    "parameter": lambda: Hold("parameter", torch.randn(HEADS, N, N)),
    "frozen parameter": lambda: Hold("frozen", torch.randn(N, N)),
    "numbers": lambda: Make(lambda n: -0.05 * distances(n), N),
    "steep slopes": lambda: Make(lambda n: -(2.0 ** -torch.arange(1, HEADS + 1))[:, None, None] * distances(n), N),
    "half buffer": lambda: Hold("buffer", near(torch.ones(N, N)).half(), lambda m: m.float()),
    "learned, by distance": Learned,
    "normal": lambda: Hold("buffer", torch.exp(-distances(N).float() / 9).add(1e-6).log().clamp(min=-6)),
    "causal by sign": lambda: Make(lambda n: (torch.arange(n)[:, None] - torch.arange(n)).clamp(-1, 1) * 0.5, N),
}


@pytest.mark.parametrize(("table", "apply"), [(t, ADDED[i % len(ADDED)]) for i, t in enumerate(TABLES)])
def test_tables_of_finite_terms_merge(table: str, apply: str) -> None:
    report = run(masked(TABLES[table](), apply, D), (torch.randn(BATCH, N, D),), None, R, placement="stream")[1]
    assert report.tokens == TOKENS, str(report)


@pytest.mark.parametrize("way", ["buffer", "numbers", "half buffer", "parameter"])
def test_tables_of_zeros_lose_nothing(way: str) -> None:
    mask = {
        "buffer": lambda: Hold("buffer", torch.zeros(N, N)),
        "numbers": lambda: Make(lambda n: 0.0 * distances(n), N),
        "half buffer": lambda: Hold("buffer", torch.zeros(HEADS, N, N).half(), lambda m: m.float()),
        "parameter": lambda: Hold("parameter", torch.zeros(N, N)),
    }[way]()
    x = palette_tokens(BATCH, N, D, k=3)
    assert_lossless(masked(mask, "scores + mask", D), (x,), R, tokens=TOKENS, placement="stream")


def unseen_class() -> Tensor:
    seen = torch.ones(N + 1, N + 1, dtype=torch.bool)
    seen[1:, 0] = False
    return seen


def lonely_class() -> Tensor:
    seen = torch.ones(N + 1, N + 1, dtype=torch.bool)
    seen[0, 1:] = False
    return seen


def apart_class() -> Tensor:
    return unseen_class() & lonely_class()


SPECIAL_ONLY = {"patches do not see it": unseen_class, "it sees only itself": lonely_class, "both": apart_class}
CONSTANT = [  # how constants are held that no training changes
    "bool buffer", "-inf buffer", "finfo.min buffer", "-1e4 buffer", "bool attribute", "-inf attribute", "~buffer",
    "(1 - m) * -1e9", "log(m)", "where(m, 0, -inf)", "zeros.masked_fill(~m, -inf)", "larger [:n, :n]", "uint8 .bool()",
    "[1, 1, n, n] expanded", "per head", "half .to(float)", "transposed", "and of several",
]  # fmt: skip
JOINED = ["sdpa", "scores + mask", "masked_fill(-inf)", "where", "mha", "einsum", "sdpa, bool", "softmax(dtype)"]
CONSTANT_FORMS = [  # every third way by default, in another way to join than its neighbours
    pytest.param(way, JOINED[i % len(JOINED)], marks=[pytest.mark.slow] * (i % 3 > 0)) for i, way in enumerate(CONSTANT)
]
SPECIAL_FORMS = [
    (meaning, way, JOINED[i % len(JOINED)])
    for i, (way, meaning) in enumerate(zip(CONSTANT, list(SPECIAL_ONLY) * len(CONSTANT), strict=False))
]


@pytest.mark.parametrize(("meaning", "way", "apply"), SPECIAL_FORMS)
def test_masks_that_only_treat_protected_tokens_otherwise_merge(meaning: str, way: str, apply: str) -> None:
    model = masked(held(SPECIAL_ONLY[meaning](), way), apply, D, cls=True)
    tokens = [(n + 1, m + 1) for n, m in TOKENS]
    assert_lossless(model, (palette_tokens(BATCH, N, D, k=3),), R, tokens=tokens, placement="stream")


@pytest.mark.parametrize(("way", "apply"), CONSTANT_FORMS)
def test_masks_of_keys_merge(way: str, apply: str) -> None:
    """Every query sees the same keys; valid tokens come out as they were."""
    valid = torch.arange(N) < 60
    model, x = masked(held(valid.expand(N, N).clone(), way), apply, D), palette_tokens(BATCH, N, D, k=3)
    with torch.no_grad():
        want = model(x)
    got, report = run(model, (x,), None, R, placement="stream")
    assert report.tokens == TOKENS, str(report)
    assert distance(got[:, valid], want[:, valid]) < LAW, str(report)


@pytest.mark.parametrize(("way", "apply"), CONSTANT_FORMS)
def test_masks_that_leave_all_in_say_nothing(way: str, apply: str) -> None:
    model = masked(held(torch.ones(N, N, dtype=torch.bool), way), apply, D)
    assert_lossless(model, (palette_tokens(BATCH, N, D, k=3),), R, tokens=TOKENS, placement="stream")


HALF = N // 2


def halves(s: Tensor, low: float) -> Tensor:
    """The first half does not see the second: added to a slice of a slice."""
    first, second = s.split(HALF, -2)
    seen, unseen = first.chunk(2, -1)
    return torch.cat([torch.cat([seen, unseen + low], -1), second], -2)


def filled(s: Tensor, low: float) -> Tensor:
    s[..., :HALF, HALF:] = low
    return s


def subtracted(s: Tensor, low: float) -> Tensor:
    s[..., :HALF, :].chunk(2, -1)[1].sub_(-low)
    return s


def indexed(s: Tensor, low: float) -> Tensor:
    rows, columns = torch.triu_indices(N, N, 1)
    s[..., rows, columns] = low
    return s


def strided(s: Tensor, low: float) -> Tensor:
    corner = torch.full((HALF, HALF), low).expand(*s.shape[:2], -1, -1)
    return torch.as_strided_scatter(s, corner, corner.shape, s.stride(), HALF)


def copied(s: Tensor, low: float) -> Tensor:
    out = torch.full_like(s, low)
    for i in range(2):
        out[..., i * HALF : (i + 1) * HALF, : (i + 1) * HALF] = s[..., i * HALF : (i + 1) * HALF, : (i + 1) * HALF]
    return out


WRITTEN: dict[str, Callable[[Tensor, float], Tensor]] = {
    "a slice set": filled,
    "a piece of a slice lowered": subtracted,
    "cat of halves": halves,
    "cat with low ones": lambda s, low: torch.cat(
        [torch.cat([s[..., :HALF, :HALF], torch.full_like(s[..., :HALF, HALF:], low)], -1), s[..., HALF:, :]], -2
    ),
    "padded": lambda s, low: torch.cat(
        [nn.functional.pad(s[..., :HALF, :HALF], (0, HALF), value=low), s[..., HALF:, :]], -2
    ),
    "triu_indices": indexed,
    "as_strided_scatter": strided,
    "copied into low ones": copied,
    "index_fill of a slice": lambda s, low: torch.cat(
        [s[..., :HALF, :].index_fill(-1, torch.arange(HALF, N), low), s[..., HALF:, :]], -2
    ),
    "triu of a factor": lambda s, low: s + torch.full((N, N), low).triu(1) * (1 + s.mean().sigmoid()),
}


class Written(nn.Module):
    """Blocks whose scores, or probabilities, are masked by what is written into them."""

    def __init__(self, way: str, late: bool) -> None:
        super().__init__()
        self.way, self.late = WRITTEN[way], late
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, qkv in zip(self.norms, self.qkv, strict=True):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv(norm(x)).chunk(3, -1))
            s = q @ k.mT * q.shape[-1] ** -0.5
            p = self.way(s.softmax(-1).clone(), 0.0) if self.late else self.way(s, -1e9).softmax(-1)
            p = p / p.sum(-1, keepdim=True)
            x = x + (p @ v).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("late", [False, True], ids=["scores", "probabilities"])
@pytest.mark.parametrize("way", WRITTEN)
def test_masks_that_are_written_into_the_scores(way: str, late: bool) -> None:
    """No operand says them: a part of the scores is replaced."""
    if late and way in ("a piece of a slice lowered", "cat of halves", "triu of a factor"):
        pytest.skip("adds 0 to probabilities")
    model = redraw(Written(way, late), 1).eval()
    x, first = torch.randn(BATCH, N, D), torch.arange(N) < HALF
    other, made = apart_from(x, ~first), traced(model, R)
    with torch.no_grad():
        assert moved(model(other), model(x), first) < UNMOVED, "the mask does not say what it should"
    for name in PLACEMENTS:
        leak = moved(made(name, other), made(name, x), first)
        no_internal_error(made.reports[name])
        assert leak < UNMOVED, f"{name}: moved by {leak:.0e}\n{made.reports[name]}"


def test_scores_that_are_put_together_merge() -> None:
    """The control: pieces in their places, and a row of the class token's own terms, are no mask."""

    class Together(Written):
        def forward(self, x: Tensor) -> Tensor:
            self.way = lambda s, low: torch.cat(s.split(HALF, -2), -2).index_add(
                -2, torch.tensor([0]), torch.ones(1, 1, 1, N).expand(*s.shape[:2], -1, -1)
            )
            return super().forward(x)

    model = redraw(Together("padded", False), 1).eval()
    report = run(model, (torch.randn(BATCH, N, D),), None, R, placement="branch")[1]
    assert report.merged_sites == 2, str(report)


DIAGONAL: dict[str, Callable[[], nn.Module]] = {
    "bool buffer": lambda: Hold("buffer", ~torch.eye(N, dtype=torch.bool)),
    "-inf buffer": lambda: Hold("buffer", added(~torch.eye(N, dtype=torch.bool))),
    "fill_diagonal_": lambda: Make(lambda n: torch.zeros(n, n).fill_diagonal_(-math.inf), N),
    "eye * min": lambda: Make(lambda n: torch.eye(n) * torch.finfo(torch.float32).min, N),
    "i != j": lambda: Make(lambda n: torch.arange(n)[:, None] != torch.arange(n), N),
    "diag_embed": lambda: Make(lambda n: torch.diag_embed(torch.full((n,), INF)), N),
}


@pytest.mark.parametrize("apply", ["sdpa", "masked_fill(-inf)"])
@pytest.mark.parametrize("way", DIAGONAL)
def test_a_token_that_does_not_see_itself_is_a_mask_of_pairs(way: str, apply: str) -> None:
    """Two equal tokens see each other and not themselves: one group would see both or none."""
    model, x = masked(DIAGONAL[way](), apply, D), palette_tokens(BATCH, N, D, k=3)
    with torch.no_grad():
        want = model(x)
    made = traced(model, R)
    for name in PLACEMENTS:
        error = distance(made(name, x), want)
        assert error < LAW, f"{name}: {error:.0e}\n{made.reports[name]}"


def test_ways() -> None:
    """As many as there should be, and each says what its kind does."""
    assert len(HELD) > 30
    for kind, meaning in KINDS.items():
        assert applies(kind)
        for way in ways(kind):
            mask = mask_of(kind, way, 48)()
            seen = mask if mask.dtype == torch.bool else mask > -1e3
            assert torch.equal(seen.reshape(-1, 48, 48)[0], meaning.mask(48)), (kind, way)
