"""Models that reach the backend in pieces, and what the user hears of it; limits that would end merging in silence."""

from __future__ import annotations

import functools
import logging
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_fx
from tests.palette import distance, said
from tests.strategies import thinned
from tests.test_explain import Block, D, N, Stack, tokens

R = 6


class Cut(nn.Module):
    """A stem, a class token, four blocks, a head; cut: where the graph breaks."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.stem, self.head = cut, nn.Linear(D, D), nn.Linear(D, 5)
        self.cls = nn.Parameter(torch.randn(1, 1, D))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.eval()

    def broken(self, x: Tensor, place: str) -> Tensor:
        if place not in self.cut:
            return x
        if "print" in self.cut:
            print(end="")  # noqa: T201 - what people put there
        elif "item" in self.cut and x.sum().item() == 0.5:
            return x * 2
        torch._dynamo.graph_break()
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.broken(self.stem(x), "ends")
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = self.blocks[1](self.blocks[0](x))
        x = self.broken(x, "middle")
        x = self.blocks[3](self.blocks[2](x))
        return self.head(self.broken(x, "ends").mean(1))


def told(model: Any, *args: Tensor, strict: bool = False, **options: Any) -> tuple[list[str], tome_fx.ToMeReport]:
    before = len(tome_fx.reports())
    backend = tome_fx.tome_backend(**{"r": R, "inner": "eager", "placement": "stream", "strict": strict, **options})
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(model, backend=backend)(*args)
    return said(caught), sum(
        tome_fx.reports()[before:], tome_fx.ToMeReport()
    )


BREAKS = ["middle", "middle print", "middle item", "ends middle"]
SCHEDULES = [R, 0.1, [6, 5, 4, 3], [6, 5], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(("how", "r"), thinned(product(BREAKS, SCHEDULES), 5))
def test_pieces_go_on(how: str, r: Any) -> None:
    """What one piece knows of tokens the next does too: each merges as in one graph, and there is nothing to say."""
    x = torch.randn(2, N, D)
    for shape in (x, torch.randn(3, N, D)):
        messages, report = told(Cut(how), shape, r=r, strict=True)
        assert messages == []
        assert report.graphs >= 2
        assert report.r == r
        whole = tome_fx.explain(Cut(""), (shape,), r=r if r != SCHEDULES[-1] else r[:4], placement="stream")
        less = [[a - b for a, b in each.tokens] for each in (report, whole)]
        if isinstance(r, float):  # a piece gives all tokens back at its end
            less = [found[:2] for found in less]
        assert less[0] == less[1]
        assert [site.protected for site in report.sites if site.merged] == [1] * len(report.tokens)


@pytest.mark.parametrize("how", BREAKS[:3])
@pytest.mark.parametrize("options", [{"r": (6, -1)}, {"r": None, "flops": 0.9}], ids=str)
def test_a_graph_break_is_told_once(how: str, options: dict[str, Any]) -> None:
    """Cause, line and remedy, where something is lost: a schedule that needs the number of all blocks."""
    (message,), report = told(Cut(how), torch.randn(2, N, D), **options)
    assert "piece of the model: torch.compile breaks the graph at" in message
    assert "test_pieces.py" in message
    assert "schedule starts anew" in message
    assert ("capture_scalar_outputs = True" in message) is ("item" in how)
    assert "class tokens" not in message
    assert report.graphs >= 2


def test_tokens_that_no_piece_has_made() -> None:
    """A class token that was put in front outside of all graphs."""

    class Outside(Cut):
        @torch._dynamo.disable
        def joined(self, x: Tensor) -> Tensor:
            return torch.cat([self.cls.expand(len(x), -1, -1), x], 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.joined(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    (message,), _ = told(Outside(""), torch.randn(2, N, D))
    assert "class tokens that come from another piece" in message
    assert "protect=1" in message


CHANGES = {
    "a slice": lambda x: x[:, : N - 8],
    "padded": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 8)),
    "twice": lambda x: torch.cat([x, x * 2], 1),
}
MADE_ANEW = {
    "pooled": lambda x: torch.cat([x[:, :1], x[:, 1:].unflatten(1, (2, -1)).mean(1)], 1),
    "another order": lambda x: x.flip(1),
}


class Changed(Cut):
    """Tokens change their number between two pieces."""

    def __init__(self, change: Any) -> None:
        super().__init__("")
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.stem(x)], 1)
        x = self.blocks[1](self.blocks[0](x))
        torch._dynamo.graph_break()
        return self.head(self.blocks[3](self.blocks[2](self.change(x))).mean(1))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_made_of_known_tokens_is_known(change: str) -> None:
    messages, report = told(Changed(CHANGES[change]), torch.randn(2, N, D), r=[6, 5, 4, 3], strict=True)
    assert messages == []
    assert [a - b for a, b in report.tokens] == [6, 5, 4, 3]
    assert min(site.protected for site in report.sites) >= 1


@pytest.mark.parametrize("change", MADE_ANEW)
def test_what_cannot_be_known_of_them_is_told(change: str) -> None:
    (message,), report = told(Changed(MADE_ANEW[change]), torch.randn(2, N, D), r=[6, 5, 4, 3])
    assert [a - b for a, b in report.tokens] == [6, 5, 6, 5]
    assert "the schedule starts anew" in message
    assert ("class tokens" in message) is (change == "another order")


@pytest.mark.parametrize("r", [[6, 5, 4, 3], R])
def test_a_break_inside_of_a_block_is_told_for_a_list(r: Any) -> None:
    """All blocks run one piece of code, and with it one count."""

    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x

    class Looped(Cut):
        def __init__(self) -> None:
            super().__init__("")
            self.blocks = nn.ModuleList(Broken() for _ in range(4)).eval()

    messages, _ = told(Looped(), torch.randn(2, N, D), r=r)
    assert len(messages) == int(isinstance(r, list))
    assert all("merges as the first of them does" in message for message in messages)
    assert not any("Compile Looped instead" in message for message in messages)  # it was


def test_two_towers_of_one_length_are_not_confused() -> None:
    """Both begin in the first piece: the second does not go on where the first ended, and one message says so."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.other = nn.Linear(5, D), nn.Linear(5, D)
            self.first, self.second = (nn.Sequential(Block(), Block()) for _ in range(2))
            self.eval()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x, y = self.stem(x), self.other(y)
            torch._dynamo.graph_break()
            x = self.first(x)
            torch._dynamo.graph_break()
            return x.mean(1) + self.second(y).mean(1)

    args = torch.randn(2, N, 5), torch.randn(2, N, 5)
    messages, report = told(Two(), *args, r=[6, 5])
    assert [a - b for a, b in report.tokens] == [6, 5, 6, 5]
    assert len(messages) == 1


def test_another_size_starts_from_the_same_block() -> None:
    """A piece that is compiled again counts from where it stands, not from where the model ended."""
    model = Cut("middle")
    backend = tome_fx.tome_backend(r=[6, 5, 4, 3], inner="eager", placement="stream")
    fast = torch.compile(model, backend=backend, dynamic=False)
    for batch in (2, 3):
        before = len(tome_fx.reports())
        with torch.no_grad():
            fast(torch.randn(batch, N, D))
        tokens = sum(tome_fx.reports()[before:], tome_fx.ToMeReport()).tokens
        assert [a - b for a, b in tokens] == [6, 5, 4, 3]


@pytest.mark.parametrize("how", BREAKS)
def test_pieces_are_one_report(how: str) -> None:
    """Of one model one report for each compilation, whatever it was cut into; another model has its own."""
    backends = [tome_fx.tome_backend(r=r, inner="eager") for r in (R, R - 1)]
    fast = [torch.compile(Cut(how), backend=backend, dynamic=False) for backend in backends]
    with torch.no_grad():
        for run, batch in ((0, 2), (0, 3), (1, 2)):
            fast[run](torch.randn(batch, N, D))
    found = tome_fx.reports()
    assert [(report.model, report.attention_sites, report.merged_sites) for report in found] == [("Cut", 4, 4)] * 3
    assert all(report.graphs >= 2 and report.compile_id.count(", ") == report.graphs - 1 for report in found)


def test_a_warning_stands_at_the_line_that_called() -> None:
    """Not at a line of torch or of ours, which says nothing to the user."""
    run = torch.compile(NoAttention(), backend=tome_fx.tome_backend(inner="eager"))
    with pytest.warns(tome_fx.ToMeWarning) as caught:
        run(torch.randn(2, N, D))
    line = Path(caught[0].filename).read_text(encoding="utf-8").splitlines()[caught[0].lineno - 1]
    assert (caught[0].filename, line.strip()) == (__file__, "run(torch.randn(2, N, D))")


def test_no_word_where_nothing_is_lost() -> None:
    """A stem and a head in graphs of their own; a number that says what is protected, and a constant r."""
    for options in ({}, {"strict": True}):
        assert told(Cut("ends"), torch.randn(2, N, D), **options)[0] == []
    assert told(Cut("middle"), torch.randn(2, N, D), protect=1, strict=True)[0] == []


class Decoded(nn.Module):
    """A tower, and behind a graph break a causal decoder of its tokens. first: the decoder is called before it too;
    outside: its mask is made there."""

    def __init__(self, first: bool = False, outside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.outside, self.tower = first, outside, nn.Sequential(Block(), Block(), Block())
        self.decoder = nn.TransformerEncoderLayer(D, 2, D, batch_first=True)
        self.eval()

    def decoded(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if mask is None else mask
        return self.decoder(x, src_mask=mask, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.outside else None
        if self.first:
            x = self.decoded(x, mask)
            torch._dynamo.graph_break()
        x = self.tower(x)
        torch._dynamo.graph_break()
        return self.decoded(x, mask)


def test_a_decoder_behind_a_tower_that_merges_is_not_told() -> None:
    """Causal attention never merges: no break took anything from it, and strict does not refuse it. Where nothing has
    merged so far, and where a break keeps the mask from being known, it is told."""
    for strict in (False, True):
        messages, report = told(Decoded(), tokens(), strict=strict)
        assert (messages, report.merged_sites, report.attention_sites) == ([], 3, 4)
    for options in ({"first": True}, {"outside": True}):
        messages, report = told(Decoded(**options), tokens())
        assert len(messages) == 1 and "causal" in messages[0] and report.merged_sites == 3


class GivenUp(nn.Module):
    """Dynamo gives up the forward, which breaks inside of `with`, and compiles what it calls: first a function without
    attention, then blocks under a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.TransformerEncoderLayer(D, 2, D, batch_first=True)
        self.eval()

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2 + 1

    def attended(self, x: Tensor) -> Tensor:
        return self.blocks(x, src_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        with Untraced():
            torch._dynamo.graph_break()
            return self.attended(self.scaled(x))


class Untraced:
    """A context manager through which Dynamo does not go on after a break."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: Any) -> None:
        pass


def test_what_a_forward_calls_is_no_model_without_attention() -> None:
    """The message is of the attention that does not merge, not of a function before it that has none."""
    messages, report = told(GivenUp(), tokens())
    assert report.graphs > 1 and report.attention_sites == 1
    assert len(messages) == 1 and "causal" in messages[0] and "no attention" not in messages[0]


class Encoded(nn.Module):
    """A method is compiled, and called by a forward that is not."""

    def encoded(self, x: Tensor) -> Tensor:
        return x * 2 + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(x)


def test_a_method_that_is_compiled_is_whole() -> None:
    model = Encoded()
    model.fast = torch.compile(model.encoded, backend=tome_fx.tome_backend(R, inner="eager"))
    with pytest.warns(tome_fx.ToMeWarning, match="^tome_backend: nothing merged in 1 graph .*: no attention"):
        model(tokens())


def scaled(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("scale", None)
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    """Its forward runs by a decorator's name, and its attributes are looked up by a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    @scaled
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_forward_with_a_decorator_is_whole() -> None:
    (message,), report = told(Decorated().eval(), tokens(), r=0.001)
    assert message.startswith("tome_backend: nothing merged in 1 graph with 2 attention sites: blocks.0, blocks.1: ")
    assert [site.name for site in report.sites] == ["blocks.0", "blocks.1"]


def test_blocks_compiled_one_by_one() -> None:
    model, x = Cut(""), torch.randn(2, N, D)
    for block in model.blocks:
        block.compile(backend=tome_fx.tome_backend(r=[6, 5, 4, 3], inner="eager", placement="stream"))
    with pytest.warns(tome_fx.ToMeWarning, match=r"Block is compiled by itself, inside of Cut.*protect=1"):
        model(x)


def test_pieces_of_strict_raise_what_matters() -> None:
    with pytest.raises(Exception, match="piece of the model"):
        told(Cut("middle"), torch.randn(2, N, D), r=(6, -1), strict=True)


class Stem(nn.Module):
    """A module of its own that Dynamo compiles by itself where it gives up the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


LOGGER = logging.getLogger(__name__)


class Logging(Block):
    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        LOGGER.info(
            "no weights under this attention: %s",
            "choose another",
        )
        return super().attention(x, mask)


class Complaining(nn.Module):
    """Every attention logs a line, inside of a try: Dynamo gives up all that stand around it.

    Before, the message came with the stem, and named neither the line nor what it says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = Stem(), nn.ModuleList(Logging() for _ in range(3))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x
        finally:
            self.done = True


def test_what_breaks_a_model_that_is_given_up_is_named() -> None:
    """The statement itself, with what it says, and the setting that Dynamo's hint names; one message."""
    (message,), report = told(Complaining(), tokens())
    assert report.graphs > 2
    assert "torch.compile gave up Complaining as a whole" in message
    assert "Stem" not in message
    assert "LOGGER.info('no weights under this attention: %s', 'choose another')" in message
    assert "test_pieces.py" in message
    assert "torch._dynamo.config." in message
    torch._dynamo.reset()
    with torch._dynamo.config.patch(ignore_logger_methods={logging.Logger.info}):
        messages, report = told(Complaining(), tokens(), strict=True)
    assert (messages, report.graphs, report.merged_sites) == ([], 1, 3)


class NoAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1


def test_pieces_without_any_attention() -> None:
    """Not silent: the last piece says it."""
    (message,), _ = told(NoAttention(), torch.randn(2, N, D))
    assert "no attention" in message


class Parted(Block):
    """Attention over parts whose lengths are read from a tensor: no graph holds a whole block."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        parts = self.norm1(x).split(lengths.tolist(), 1)
        x = x + torch.cat([self.attention(part) for part in parts], 1)
        return x + self.mlp(self.norm2(x))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Parted(), Parted(), Parted()
        self.eval()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.c(self.b(self.a(x, lengths), lengths), lengths)


def test_a_stack_cut_in_every_block_is_told_once() -> None:
    messages, report = told(Split(), torch.randn(1, 2 * N, D), torch.tensor([N, N]))
    assert report.graphs > 1
    assert len(messages) <= 1
    assert all("graph" in m and "capture_scalar_outputs" in m for m in messages)


@pytest.mark.parametrize("read", [lambda n: n.tolist(), lambda n: [n[0].item(), int(n[1])]], ids=["tolist", "item"])
def test_sizes_read_from_a_tensor_are_nodes(read: Any) -> None:
    """capture_scalar_outputs: a table of a size that a tensor says."""

    def table(x: Tensor, n: Tensor) -> Tensor:
        h, w = read(n)
        return x + torch.arange(h * w, dtype=torch.float32)[: x.shape[1], None] * 0

    model, args = Stack(table), (tokens(), torch.tensor([8, 6]))
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        want = model(*args)
        fast = torch.compile(model, backend=tome_fx.tome_backend(r=R, inner="eager", placement="stream"))
        assert distance(fast(*args), want) < 2e-5
    assert not torch._dynamo.utils.counters["tome_fx"]["internal_errors"]


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3, 5])
def test_the_recompile_limit_is_told(limit: int) -> None:
    """Once, at the last compilation that Dynamo makes, before inputs of another size run unmerged."""
    model = Stack(depth=2)
    fast = torch.compile(model, backend=tome_fx.tome_backend(r=4, inner="eager", placement="stream"), dynamic=False)
    found = []
    with torch._dynamo.config.patch(recompile_limit=limit), torch.no_grad():
        for i in range(limit + 2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fast(tokens(2, 40 + 4 * i))
            found.append(said(caught))
    assert [len(messages) for messages in found] == [int(i == limit - 1) for i in range(limit + 2)]
    assert "recompile_limit" in found[limit - 1][0]
    assert "dynamic=True" in found[limit - 1][0]


@pytest.mark.parametrize(
    ("r", "asked"),
    [(6, []), (100, [100, 100, 100]), ([6, 100], [100]), ((40, -1), [80, 40]), (0.6, [28, 14, 7]), (0.4, [])],
    ids=str,
)
def test_a_capped_r_is_told(r: Any, asked: list[int]) -> None:
    """What was asked for, and what was done; nothing where it fits, or where nobody asked for an r."""
    report = tome_fx.explain(Stack(depth=3), (tokens(2, 48),), r=r, placement="stream")
    assert [site.asked for site in report.sites if site.asked is not None] == asked
    assert ("r capped" in str(report)) is bool(asked)
    if asked:
        site = next(site for site in report.sites if site.asked)
        assert f"{site.tokens[0] - site.tokens[1]} instead of {site.asked}" in " ".join(str(report).split())


def test_nobody_asked_for_the_r_of_a_flops_target() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = tome_fx.explain(Stack(depth=3), (tokens(2, 48),), flops=0.3, placement="stream")
    assert "capped" not in str(report)


# -- strict ------------------------------------------------------------------------------------------------------------


class Bare(Stack):
    """Blocks, then an attention whose sum is only pooled."""

    def __init__(self) -> None:
        super().__init__(depth=2, dim=128)
        self.last = Block(128)
        self.eval()

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        x = super().forward(x)
        return (x + self.last.attention(self.last.norm1(x))).mean(1)


@pytest.mark.parametrize("read", ["bare", "cls", "mean", "max"])
def test_strict_and_the_last_block(read: str) -> None:
    """A last merge that nothing reads, or after which nothing is computed, is no failure; the report counts what the
    graph does."""
    model = Bare() if read == "bare" else Stack(
        read={"cls": lambda x: x[:, 0], "mean": lambda x: x.mean(1), "max": lambda x: x.amax(1)}[read], dim=128
    )  # fmt: skip
    x = tokens(2, 160, 128)
    messages, report = told(model, x, strict=True, placement="auto", r=8)
    assert messages == []
    trace, gm = (f(model, (x,), r=8) for f in (tome_fx.trace_tokens, tome_fx.rewrite))
    matches = sum("tome_step" in node.meta for node in gm.graph.nodes)
    assert report.merged_sites == gm.meta["tome_report"].merged_sites == len(trace.merges) == matches
    assert report.merged_sites == (2 if read in ("bare", "cls") else 3)
    if read == "cls":
        assert [reason.kind for reason in report.skipped] == ["not read"]
        assert len(tome_fx.trace_tokens(model, (x,), r=8, drop_unread=False).merges) == 3


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_totals_tell_where_tokens_merge(placement: str) -> None:
    """Summary, totals, JSON and counters."""
    _, report = told(Stack(), tokens(), placement=placement)
    other = "branch" if placement == "stream" else "stream"
    for held in (report.merged_by_placement, report.to_dict()["merged_by_placement"]):
        assert (held[placement], held[other]) == (3, 0)
    counts = torch._dynamo.utils.counters["tome_fx"]
    assert (counts[f"merged_{placement}"], counts[f"merged_{other}"]) == (3, 0)
    assert ("around the attention alone" in report.summary()) is (placement == "branch")
