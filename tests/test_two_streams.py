"""Two streams joined in each attention (image and text): the longer merges for good, with a state of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tome_fx
from tests.models import redraw
from tests.palette import assert_lossless, palette_tokens, run

tome = torch.ops.tome
TURNS = {torch.ops.aten.cos.default, torch.ops.aten.sin.default}
D, IMAGE, TEXT = 32, 48, 10


class Joint(nn.Module):
    """A block of MM-DiT: own norms, projections and MLPs for each stream, one attention over both."""

    def __init__(self, first: str, rotary: bool) -> None:
        super().__init__()
        self.first, self.rotary = first, rotary
        self.norm1, self.norm2 = (nn.ModuleList(nn.LayerNorm(D) for _ in range(2)) for _ in range(2))
        self.qkv, self.proj = (nn.ModuleList(nn.Linear(D, k * D) for _ in range(2)) for k in (3, 1))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, turn: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        own = [self.qkv[i](self.norm1[i](t)).unflatten(-1, (3, 2, -1)).unbind(2) for i, t in enumerate((x, y))]
        order = (0, 1) if self.first == "image" else (1, 0)
        q, k, v = (torch.cat([own[i][part] for i in order], 1).transpose(1, 2) for part in range(3))
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        if self.first == "image":
            a, b = out[:, : x.shape[1]], out[:, x.shape[1] :]
        else:
            b, a = out.split([y.shape[1], x.shape[1]], dim=1)
        x, y = x + self.proj[0](a), y + self.proj[1](b)
        return x + self.mlp[0](self.norm2[0](x)), y + self.mlp[1](self.norm2[1](y))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = turn.cos(), turn.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Net(nn.Module):
    frequencies: Tensor

    def __init__(self, first: str = "image", *, rotary: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint(first, rotary) for _ in range(3))
        self.head = nn.Linear(D, D)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]))

    def forward(self, x: Tensor, y: Tensor, places: Tensor | None = None, mask: Tensor | None = None) -> Any:
        turn = None if places is None else torch.outer(places, self.frequencies)
        for block in self.blocks:
            x, y = block(x, y, turn, mask)
        return self.head(x), y


def inputs(k: int = 3) -> tuple[Tensor, Tensor]:
    return palette_tokens(2, IMAGE, D, k=k), torch.randn(2, TEXT, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("first", ["image", "text"])
def test_the_longer_stream_merges_for_good(first: str) -> None:
    torch.manual_seed(0)
    model = redraw(Net(first)).eval()
    tokens = [(48, 42), (42, 36), (36, 30)]
    report = assert_lossless(model, inputs(), 6, tokens=tokens, placement="stream", control=True)
    assert {u.op for u in report.unmerges} == {"output"}
    assert {site.placement for site in report.sites} == {"stream"}


def test_by_request_around_the_attention() -> None:
    """Then all joined tokens but the protected ones may merge, and the streams keep their lengths."""
    torch.manual_seed(0)
    report = assert_lossless(redraw(Net()).eval(), inputs(), 6, sites=3, placement="branch")
    assert {site.placement for site in report.sites} == {"branch"}


@pytest.mark.filterwarnings("ignore:tome_backend. nothing merged")
def test_a_mask_over_both_keeps_the_streams_whole() -> None:
    torch.manual_seed(0)
    mask = torch.arange(IMAGE + TEXT).expand(2, 1, 1, -1) < IMAGE + 6
    model = redraw(Net()).eval()
    args = (*inputs(), None, mask)
    with torch.no_grad():
        want = model(*args)
    got, report = run(model, args, None, 6)
    assert {site.placement for site in report.sites if site.merged} <= {"branch", "mlp"}
    _, report = run(model, args, None, 6, placement="stream")
    assert {s.detail.split(",")[0] for s in report.skipped} == {"a mask leaves out tokens of the streams that it joins"}
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)


class Cut(nn.Module):
    """Positions are added to both as one sequence, which is cut into its streams again."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.places = Net(), nn.Parameter(torch.randn(IMAGE + TEXT, D))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        both = torch.cat([x, y], 1) + self.places
        return self.net(*both.split([IMAGE, TEXT], 1))


def test_one_sequence_that_is_cut_into_its_streams() -> None:
    torch.manual_seed(0)
    model = redraw(Cut()).eval()
    found = tome_fx.check(model, (torch.randn(2, IMAGE, D), inputs()[1]), r=6, placement="stream")
    assert [(m.tokens_before, m.tokens_after) for m in found.merges] == [(48, 42), (42, 36), (36, 30)]
    assert found.error < 1e-9, found


class Padded(nn.Module):
    """The text is padded; the image says in a mask of its own, made of numbers, that it is not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = Net(), kind

    def forward(self, x: Tensor, y: Tensor, keep: Tensor) -> Any:
        mask = torch.cat([keep.new_ones(x.shape[:2]), keep], 1)[:, None, None]
        return self.net(x, y, None, mask if self.kind == "bool" else (1 - mask.float()) * -1e9)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_text_alone_lets_the_image_merge(kind: str) -> None:
    torch.manual_seed(0)
    model, keep = redraw(Padded(kind)).eval(), torch.arange(TEXT).expand(2, -1) < torch.tensor([[TEXT], [6]])
    assert_lossless(model, (*inputs(), keep), 6, sites=3, placement="stream", control=True)
    assert tome_fx.check(model, (torch.randn(2, IMAGE, D), inputs()[1], keep), r=6, placement="stream").error < 1e-9


@pytest.mark.parametrize("first", ["image", "text"])
def test_rotary_positions_from_outside(first: str) -> None:
    """Where all places are one, the law; where they are not, each group turns as its representative: norms are kept."""
    torch.manual_seed(0)
    model = redraw(Net(first, rotary=True)).eval()
    assert_lossless(model, (*inputs(), torch.zeros(IMAGE + TEXT)), 6, sites=3, placement="stream")
    places = torch.arange(IMAGE + TEXT, dtype=torch.float32)
    tables: dict[str, int] = {"unmerge": 0, "merge": 0}

    def source(node: torch.fx.Node) -> torch.fx.Node:
        while node.target not in TURNS and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node

    def spy(gm: torch.fx.GraphModule, values: Any) -> Any:
        rewritten, _ = tome_fx.backend.transform(gm, values, tome_fx.tome_backend(6, placement="stream").config)
        assert rewritten is not None
        for name, op in (("unmerge", tome.unmerge_aten.default), ("merge", tome.merge.default)):
            nodes = rewritten.graph.find_nodes(op="call_function", target=op)
            tables[name] += sum(source(node.args[0]).target in TURNS for node in nodes)
        return rewritten.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=spy)(*inputs(), places)
    assert tables["unmerge"] > 0, "the row of the representative is read by the gather that also unmerges"
    assert tables["merge"] == 0, "the mean of two rotations is none"


def test_gradients() -> None:
    torch.manual_seed(0)
    model = redraw(Net())
    (a, b), report = run(model, inputs(), None, 6, grad=True, placement="stream")
    (a.square().mean() + b.square().mean()).backward()
    assert report.merged_sites == 3
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_equal_lengths() -> None:
    """Neither is longer: one of them merges, the other stays."""
    torch.manual_seed(0)
    x, y = palette_tokens(2, 40, D, k=3), palette_tokens(2, 40, D, k=3, seed=1)
    report = assert_lossless(redraw(Net()).eval(), (x, y), 4, sites=3, placement="stream")
    assert report.tokens == [(40, 36), (36, 32), (32, 28)]
