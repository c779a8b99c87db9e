"""explain, rewrite and trace_tokens: how they are called, what they leave as it was, that they agree with a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.palette import compiled, distance
from tests.strategies import thinned
from tome_fx.report import SkipReason, together

N, D, R = 48, 32, 6


class Block(nn.Module):
    def __init__(self, dim: int = D) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Three blocks on prepare(x, *more, **named); read: what is given back of the tokens."""

    def __init__(
        self,
        prepare: Callable[..., Tensor] = lambda x: x,
        read: Callable[[Tensor], Tensor] = lambda x: x,
        depth: int = 3,
        dim: int = D,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.prepare, self.read = prepare, read
        self.eval()

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        x = self.prepare(x, *more, **named)
        for block in self.blocks:
            x = block(x)
        return self.read(x)


def tokens(batch: int = 2, count: int = N, dim: int = D) -> Tensor:
    """Each token one of four copies."""
    base = torch.randn(batch, 4, dim)
    return torch.stack([b[torch.randint(4, (count,))] for b in base])


# -- arguments ---------------------------------------------------------------------------------------------------------


class Named(Stack):
    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, context: Tensor | None = None, *, extra: dict[str, Any] | None = None
    ) -> Tensor:
        x = x + time[:, None, None]
        if context is not None:
            x = x + context.mean(1, keepdim=True)
        return super().forward(x if extra is None else x * extra["scale"] + extra["pair"][1])


TIME, CONTEXT = torch.tensor([0.5, -1.0]), torch.arange(2 * 3 * D).view(2, 3, D) / 100
EXTRA = {"scale": 2.0, "pair": (torch.ones(1), torch.full((D,), 0.5))}
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((TIME, CONTEXT), {}),
    ((TIME,), {"context": CONTEXT}),
    ((), {"time": TIME, "context": CONTEXT}),
    ((), {"context": CONTEXT, "time": TIME}),
    ((TIME,), {}),
    ((), {"extra": EXTRA, "context": CONTEXT, "time": TIME}),
    ((TIME, None), {"extra": dict(reversed(EXTRA.items()))}),
]


@pytest.mark.parametrize(("call", "first"), thinned(product(range(len(CALLS)), ["by position", "by name", "last"]), 2))
def test_arguments_by_name(call: int, first: str) -> None:
    """By position, by name in any order, nested: groups and output are those of the call, and the rewritten module is
    called as the model is."""
    model, x, (args, kwargs) = Named(), tokens(), CALLS[call]
    if first == "by position":
        args = (x, *args)
    elif args:
        return
    else:
        kwargs = {"x": x, **kwargs} if first == "by name" else {**kwargs, "x": x}
    trace = tome_fx.trace_tokens(model, args, kwargs, r=R, placement="stream")
    gm = tome_fx.rewrite(model, args, kwargs, r=R, placement="stream")
    assert [step.tokens_after for step in trace.merges] == [N - R, N - 2 * R, N - 3 * R]
    with torch.no_grad():
        want = model(*args, **kwargs)
        assert distance(gm(*args, **kwargs), want) < 2e-5
        backwards = dict(reversed(kwargs.items()))
        assert distance(gm(*args, **backwards), want) < 2e-5
    same = tome_fx.trace_tokens(model, args, backwards, r=R, placement="stream")
    assert torch.equal(trace.groups, same.groups)


# -- Python that reads numbers -----------------------------------------------------------------------------------------


def checked(x: Tensor, n: Tensor) -> Tensor:
    if n.sum().item() != x.shape[1]:
        raise ValueError(f"{n.sum().item()} patches, but {x.shape[1]} rows")
    return x


def branch(x: Tensor, n: Tensor) -> Tensor:
    if (x * x).sum() > 0:
        return x + 1
    raise RuntimeError("no energy")


def inverse(x: Tensor, n: Tensor) -> Tensor:
    return x * (1 / n.float().mean().item())


def whole(x: Tensor, n: Tensor) -> Tensor:
    return x[:, : int(n.sum())].unflatten(1, (int(n[0] * 1), -1)).flatten(1, 2)


def listed(x: Tensor, n: Tensor) -> Tensor:
    return torch.cat(x.split((n * 1).tolist(), 1), 1)


def looped(x: Tensor, n: Tensor) -> Tensor:
    for count in n * 1:
        x = x + x[:, : count.item()].mean(1, keepdim=True)
    return x


def counted(x: Tensor, n: Tensor) -> Tensor:
    while n.sum() < 2 * x.shape[1]:
        n = n * 2
    return x * n[0]


def indexed(x: Tensor, n: Tensor) -> Tensor:
    return x + [None, 1.0, 2.0][(n.argmax() + 1).item()]  # type: ignore[operator]


READERS = [checked, branch, inverse, whole, listed, looped, counted, indexed]


GOING = thinned(product(READERS, [False, True]), 3, lambda case: f"{case[0].__name__}-{case[1]}")


@pytest.mark.parametrize(("prepare", "scalars"), GOING)
def test_explain_goes_the_way_of_the_numbers(prepare: Callable[..., Tensor], scalars: bool) -> None:
    """Whatever Python does with values that graphs give, explain tells what the compiled call does."""
    model, args = Stack(prepare), (tokens(), torch.tensor([32, 16]))
    with torch._dynamo.config.patch(capture_scalar_outputs=scalars), warnings.catch_warnings():
        warnings.simplefilter("ignore", tome_fx.ToMeWarning)
        before = len(tome_fx.reports())
        with torch.no_grad():
            try:
                compiled(model, R, placement="stream")(*args)
            except Exception:  # noqa: BLE001 - torch cannot compile it either
                with pytest.raises(Exception, match=r"(?s).+"):
                    tome_fx.explain(model, args, r=R, placement="stream")
                return
            want = sum(tome_fx.reports()[before:], tome_fx.ToMeReport())
            torch._dynamo.reset()
            report = tome_fx.explain(model, args, r=R, placement="stream")
    assert report.tokens == want.tokens
    assert report.merged_sites == want.merged_sites > 0
    assert scalars or want.merged_sites == 3
    assert report.graphs == want.graphs


def test_explain_leaves_things_as_they_were() -> None:
    """It runs the graphs: buffers, inputs and random numbers are put back."""

    class Changing(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)
            self.train()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x.mul_(2)
            return super().forward(self.norm(x.mT).mT + 0 * torch.rand(1))

    model, x = Changing(), tokens()
    held, state = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        assert tome_fx.explain(model, (x,), r=R, placement="stream").merged_sites == 3
    assert torch.equal(x, held)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


# -- masks that say nothing --------------------------------------------------------------------------------------------


def ones(x: Tensor) -> Tensor:
    return torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool)


def positions(x: Tensor) -> Tensor:
    n = torch.arange(x.shape[1])
    return ((n[:, None] >= 0) & (n[None] >= 0)).expand(len(x), 1, -1, -1)


def joined(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(x), 20), torch.ones(len(x), x.shape[1] - 20)], 1).bool()[:, None, None]


def zeros(x: Tensor) -> Tensor:
    return x.new_zeros(1, 1, x.shape[1], x.shape[1])


def lowest(x: Tensor) -> Tensor:
    return (1.0 - ones(x).float()) * torch.finfo(torch.float32).min


def chosen(x: Tensor) -> Tensor:
    return torch.where(positions(x), torch.tensor(0.0), torch.finfo(x.dtype).min)


def refilled(x: Tensor) -> Tensor:
    return zeros(x).masked_fill(~joined(x), -torch.inf)


class Idle(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor] | None, spelled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.mask, self.spelled = nn.ModuleList(Block() for _ in range(2)), mask, spelled
        for block in self.blocks if spelled else ():
            block.attention = self.attention(block)
        self.eval()

    @staticmethod
    def attention(block: nn.Module) -> Callable[..., Tensor]:
        def attend(x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
            scores = q @ k.mT * 0.25
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e9) if mask.dtype is torch.bool else scores + mask
            return block.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        return attend

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


MASKS_NOTHING = product([ones, positions, joined, zeros, lowest, chosen, refilled], [False, True])


@pytest.mark.parametrize(("mask", "spelled"), thinned(MASKS_NOTHING, 3, lambda case: f"{case[0].__name__}-{case[1]}"))
def test_masks_of_numbers_that_mask_nothing(mask: Callable[[Tensor], Tensor], spelled: bool) -> None:
    """Compiled, explained and rewritten: merges and FLOPs are those of the model without the mask."""
    x, plain, model = tokens(), Idle(None, spelled), Idle(mask, spelled)
    with torch.no_grad():
        want = tome_fx.explain(plain, (x,), r=R, placement="stream")
        gm = tome_fx.rewrite(model, (x,), r=R, placement="stream")
        for report in (tome_fx.explain(model, (x,), r=R, placement="stream"), gm.meta["tome_report"]):
            assert (report.tokens, report.merged_sites) == (want.tokens, 2)
            assert report.flops_after == pytest.approx(want.flops_after, rel=0.01)
        assert distance(gm(x), model(x)) < 2e-5


def test_a_mask_that_masks_stays() -> None:
    """One place of the mask is False, or its numbers are an input's."""

    def one(x: Tensor) -> Tensor:
        return torch.arange(x.shape[1])[None, None, None] != 5

    def own(x: Tensor) -> Tensor:
        return (x[..., 0] > -100)[:, None, None]

    x = torch.randn(2, N, D)
    for mask in (one, own):
        model = Idle(mask, False)
        with torch.no_grad():
            gm = tome_fx.rewrite(model, (x,), r=1, placement="stream")
            y = x.clone()
            y[:, 5] += 1
            want = [model(t) for t in (x, y)]
            got = [gm(t) for t in (x, y)]
        others = [i for i in range(N) if i != 5]
        moved = distance(got[0][:, others], got[1][:, others])
        assert (moved == 0) is (distance(want[0][:, others], want[1][:, others]) == 0)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(Block(), Block()) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x).mean(1) + self.right(y).mean(1)


def test_two_towers_are_told_one_by_one() -> None:
    given = torch.randn(2, 96, D), torch.randn(2, 64, D)
    report = tome_fx.explain(TwoTowers().eval(), given, r=8, placement="stream")
    assert "96 -> 80 tokens, 64 -> 48 tokens" in report.summary()


def test_names_without_the_locals_of_dynamo() -> None:
    """Whatever the variable is called that a model stands in."""
    stack = nn.Sequential(Block(), Block()).eval()

    class Odd(nn.Module):
        def __init__(this) -> None:
            super().__init__()
            this.layers = stack

        def forward(this, *inputs: Tensor) -> Tensor:
            return this.layers(inputs[0])

    report = tome_fx.explain(Odd().eval(), (torch.randn(2, 96, D),), r=8, placement="stream")
    assert [site.name for site in report.sites] == ["layers.0", "layers.1"]


def test_a_model_of_which_no_graph_came_says_so() -> None:
    """A break before the attention: the backend has seen nothing, and cannot say that there is none."""

    @torch._dynamo.disable
    def hidden(x: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(x, x, x)

    summary = tome_fx.explain(lambda x: hidden(x), (torch.randn(2, 36, D),), r=4).summary()
    assert "in 0 graphs" in summary and "gave the backend no graph" in summary


def test_what_broke_off_is_named() -> None:
    """Dynamo's own reason stands in the sentence."""
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    summary = tome_fx.explain(encoder, (torch.randn(2, N, D),), {"mask": torch.zeros(N, N)}, r=4).summary()
    assert "in 0 graphs" in summary and "Tensor.item()" in summary


def test_a_short_axis_is_not_blamed_on_a_mask() -> None:
    """There is none: half of its tokens are kept, and they are reached."""
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    report = tome_fx.explain(model, (torch.randn(2, 16, D),), r=6, placement="stream")
    reasons = [reason.detail for reason in report.skipped if reason.kind == "nothing to merge"]
    assert reasons and all("tokens left of 16" in why for why in reasons), reasons


def test_tokens_that_leave_ask_whether_the_model_goes_on() -> None:
    """A graph that ends in tokens may be one that a break ended."""
    ends = str(tome_fx.explain(Stack(), (tokens(),), r=R, placement="stream"))
    assert "TORCH_LOGS=graph_breaks" in ends
    pooled = Stack(read=lambda x: x.mean(1))
    assert "graph_breaks" not in str(tome_fx.explain(pooled, (tokens(),), r=R, placement="stream"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_named() -> None:
    """torch.compile runs such modules as they are, and no message blames the model's attention."""
    x = torch.randn(1, 16, 8)
    traced = torch.jit.trace(nn.Linear(8, 8), x)
    for model in (traced, nn.Sequential(traced, nn.Identity())):
        said = tome_fx.explain(model, (x,), r=4).summary()
        assert "it was scripted or traced" in said and "TransformerEncoder" not in said, said


def test_reasons_that_are_alike_are_told_once() -> None:
    """Of twelve blocks with one reason the user reads one, with the first's numbers; other reasons stay apart."""
    paid = [SkipReason("does not pay", f"blocks.{i}", f"costs {i + 1}.5e+06 and saves {i}") for i in range(5)]
    told = together([*paid, SkipReason("does not pay", "head", "its tokens are few"), SkipReason("cross", "a", "b")])
    assert told == (
        "blocks.0, blocks.1 and 3 more: does not pay (the first: costs 1.5e+06 and saves 0); "
        "head: does not pay (its tokens are few); a: cross (b)"
    )
    assert together([SkipReason("cross", name, "b") for name in "xyz"]) == "x, y, z: cross (b)"
    assert together([SkipReason("few", "", f"{n} tokens") for n in (3, 4)]) == "few (the first: 3 tokens)"
