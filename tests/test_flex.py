"""flex: the spelled-out graph computes what eager flex_attention computes, merges as any attention, or says why not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from tests.palette import distance, palette_tokens
from tests.recording import record
from tests.strategies import thinned
from tome_fx.passes.capture import capture

B, H, N, E = 2, 4, 20, 16
torch.manual_seed(0)
KEEP = torch.rand(B, N) > 0.3
BIAS, TABLE, SLOPES = torch.randn(B, 1, N, N), torch.randn(H, 2 * N - 1), torch.rand(H)
LOOKUP, PAIRS = torch.randn(7, H), torch.randint(0, 7, (N, N))


def blocks(mask: Callable[..., Tensor]) -> BlockMask:
    return create_block_mask(mask, B, None, N, N, device="cpu")


def cap(s: Tensor) -> Tensor:
    return 5 * torch.tanh(s / 5)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Callable[..., Tensor], mod: Any = None) -> Tensor:
    return flex_attention(q, k, v, score_mod=mod, block_mask=BLOCKS[mask])


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    few = BLOCKS[MASKS["few"]]
    out, aux = flex_attention(q, k, v, score_mod=MODS["table"], block_mask=few, return_aux=AuxRequest(lse=True))
    return out, aux.lse


MODS: dict[str, Callable[..., Tensor]] = {
    "alibi": lambda s, b, h, i, j: s + SLOPES[h] * (j - i),
    "table": lambda s, b, h, i, j: s + TABLE[h, i - j + N - 1],
    "lookup": lambda s, b, h, i, j: s + LOOKUP[PAIRS[i, j], h],
    "minus": lambda s, b, h, i, j: s - BIAS[b, 0, i, j] - SLOPES[h],
    "minus_score": lambda s, b, h, i, j: TABLE[h, i] - s,
    "chained": lambda s, b, h, i, j: s + BIAS[b][0][i][j],
    "swapped": lambda s, b, h, i, j: s + BIAS[b, 0, j, i],
    "last": lambda s, b, h, i, j: s + TABLE[h, -1] * j,
    "cap": lambda s, b, h, i, j: cap(s),
    "cap_bias_mask": lambda s, b, h, i, j: torch.where(KEEP[b, j], cap(s) + BIAS[b, 0, i, j], -float("inf")),
    "where": lambda s, b, h, i, j: torch.where(i < j, -float("inf"), s),
    "constant": lambda s, b, h, i, j: s + torch.tensor(2.0) * h,
    "no_score": lambda s, b, h, i, j: TABLE[h, i - j + N - 1],
    "scaled": lambda s, b, h, i, j: s * 2 + (i - j) * 0.1,
}
MASKS: dict[str, Callable[..., Tensor]] = {
    "padding": lambda b, h, i, j: KEEP[b, j],
    "padding_over_pairs": lambda b, h, i, j: (i + 0 >= 0) & KEEP[b, j + 0],
    "causal": lambda b, h, i, j: i >= j,
    "window": lambda b, h, i, j: (i - j).abs() < 3,
    "few": lambda b, h, i, j: (i >= 3) & (i >= j) & KEEP[b, j],
    "rows": lambda b, h, i, j: KEEP[b, i],
    "none": lambda b, h, i, j: j < 0,
}
MASKS["always"] = lambda b, h, i, j: i + 0 >= 0
BLOCKS = {mask: blocks(mask) for mask in MASKS.values()}
CASES: dict[str, Callable[..., Any]] = {
    "identity": flex_attention,
    "scale": lambda q, k, v: flex_attention(q, k, v, scale=0.7),
    "grouped": lambda q, k, v: flex_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "grouped_cap": lambda q, k, v: flex_attention(q, k[:, :2], v[:, :2], score_mod=MODS["cap"], enable_gqa=True),
    "one_key_sample": lambda q, k, v: masked(q, k[:1], v[:1], MASKS["padding"]),
    "narrow_values": lambda q, k, v: flex_attention(q, k, v[..., :8]),
    "cap_few": lambda q, k, v: masked(q, k, v, MASKS["few"], MODS["cap"]),
    "lse": with_lse,
    **{name: lambda q, k, v, mod=mod: flex_attention(q, k, v, score_mod=mod) for name, mod in MODS.items()},
    **{name: lambda q, k, v, mod=mod: masked(q, k, v, mod) for name, mod in MASKS.items()},
}


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, H, N, E, dtype=dtype) for _ in range(3))
    return q, k, v


Spelled = tuple[fx.GraphModule, list[Any], Sequence[Any]]


def spelled(f: Callable[..., Any], *args: Tensor, grad: bool = False) -> Spelled:
    """The IR of f, its real inputs, and what Dynamo's own graph gives for them."""
    found: list[Spelled] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        ir = capture(gm, inputs)

        def run(*real: Any) -> Any:
            found.append((ir.gm, [*ir.attributes.values(), *real], gm(*real)))
            return found[-1][2]

        return run

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(f, backend=backend, fullgraph=True)(*args)
    return found[0]


def ops(gm: fx.GraphModule) -> list[str]:
    return [n.target._schema.name for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("name", thinned(CASES, 2))
def test_same_as_eager(name: str) -> None:
    ir, inputs, want = spelled(CASES[name], *operands())
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in ir.graph.nodes)
    for got, expected in zip(ir(*inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["identity", "alibi", "cap", "padding", "lse"])
def test_half_precision(name: str) -> None:
    """Terms of float32 are not rounded to the precision of the queries."""
    ir, inputs, want = spelled(CASES[name], *operands(torch.bfloat16))
    for got, expected in zip(ir(*inputs), want, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["identity", "table", "padding", "causal", "lookup", "grouped", "where"])
def test_stays_one_op(name: str) -> None:
    """Terms and masks become SDPA's mask; nothing else is left of the scores."""
    found = ops(spelled(CASES[name], *operands())[0])
    assert found.count("aten::scaled_dot_product_attention") == 1
    assert not {"aten::matmul", "aten::softmax", "aten::logsumexp"} & set(found)


@pytest.mark.parametrize(("name", "shape"), [("padding", (B, 1, 1, N)), ("padding_over_pairs", (B, 1, 1, N)),
                                             ("causal", (1, 1, N, N)), ("table", (1, H, N, N))])  # fmt: skip
def test_mask_is_no_larger_than_what_it_depends_on(name: str, shape: tuple[int, ...]) -> None:
    gm = spelled(CASES[name], *operands())[0]
    (site,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    mask = site.kwargs.get("attn_mask", site.args[3] if len(site.args) > 3 else None)
    assert tuple(mask.meta["val"].shape) == shape
    gathers = "aten::index" in ops(gm)
    assert gathers == (name == "table"), "a table read at its own positions needs no gather"


def test_true_everywhere_is_no_mask() -> None:
    """`q >= 0`, how some libraries spell a mask that leaves nothing out, keeps kernels without a mask."""
    gm = spelled(CASES["always"], *operands())[0]
    assert ops(gm) == ["aten::scaled_dot_product_attention"]


@pytest.mark.parametrize("name", ["table", "cap_table", "padded_table"])
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys, values and a learned table get the gradients of eager flex_attention."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)  # it has kernels for CPUs in inference only
    table = nn.Parameter(torch.randn(H, 2 * N - 1))
    mask = BLOCKS[MASKS["padding"]]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (cap(s) if name == "cap_table" else s) + table[h, i - j + N - 1]

        return flex_attention(q, k, v, score_mod=mod, block_mask=mask if name == "padded_table" else None)

    args = [x.requires_grad_() for x in operands()]
    ir, inputs, want = spelled(f, *args, grad=True)
    leaves = [*args, table]
    weight = torch.randn(B, H, N, E)
    expected = torch.autograd.grad((want[0] * weight).sum(), leaves)
    got = torch.autograd.grad((ir(*inputs)[0] * weight).sum(), leaves)
    assert all(bool(g.abs().max() > 0) for g in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flex_attention(q, k, v, score_mod=MODS["cap"])

    ir, inputs, want = spelled(f, *operands())
    got = ir(*inputs)[0]
    assert got.dtype == want[0].dtype
    torch.testing.assert_close(got, want[0], rtol=1e-2, atol=1e-2)


# Two of four blocks, and no mask_mod.
SPARSE = BlockMask.from_kv_blocks(torch.ones(1, 1, 2, dtype=torch.int32),
                                  torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32),
                                  BLOCK_SIZE=N // 2, seq_lengths=(N, N))  # fmt: skip
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "blocks": (lambda q, k, v: flex_attention(q, k, v, block_mask=SPARSE), "block mask without a mask_mod"),
    "rows": (lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + BIAS[b, 0, i].sum()),
             "score_mod that"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    f, reason = REFUSED[name]
    with pytest.raises(Exception, match=reason):
        spelled(f, *operands())


def test_large_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tome_fx.passes.normal.flex"], "LARGEST", N * N * H - 1)
    with pytest.raises(Exception, match="would hold 1,600 elements"):
        spelled(CASES["table"], *operands())
    spelled(CASES["causal"], *operands())


# -- whole models ------------------------------------------------------------------------------------------------------

TOKENS, DIM, HEADS = 48, 32, 2


class FlexBlock(nn.Module):
    def __init__(self, mod: Callable[..., Tensor] | None, mask: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.mod, self.mask = mod, mask
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mask = None if self.mask is None else create_block_mask(self.mask, b, None, n, n, device="cpu")
        if keep is not None:
            mask = create_block_mask(lambda b, h, i, j: keep[b, j], b, None, n, n, device="cpu")
        out = flex_attention(q, k, v, score_mod=self.mod, block_mask=mask)
        x = x + self.proj(out.transpose(1, 2).reshape(b, n, DIM))
        return x + self.mlp(self.norm2(x))


class FlexModel(nn.Module):
    def __init__(self, mod: Callable[..., Tensor] | None = None, mask: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(FlexBlock(mod, mask) for _ in range(3))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, keep)
        return x.mean(1) if keep is None else (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def palette() -> Tensor:
    torch.manual_seed(2)
    return palette_tokens(2, TOKENS, DIM, k=4)


@pytest.mark.parametrize("mod", [None, lambda s, b, h, i, j: cap(s)], ids=["identity", "cap"])
def test_merges_without_loss(mod: Callable[..., Tensor] | None) -> None:
    model = FlexModel(mod).eval()
    got, backend = record(model, (palette(),), r=8, placement="stream")
    assert backend.reports[0].merged_sites == 3, backend.reports[0]
    with torch.no_grad():
        assert distance(got, model(palette())) < 1e-5


def test_padding_is_seen_as_a_mask_of_keys() -> None:
    """Equal tokens, some of them left out: the merged groups weigh what their valid tokens weigh."""
    keep = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.3
    model = FlexModel().eval()
    got, backend = record(model, (palette(), keep), r=8, placement="stream")
    assert backend.reports[0].merged_sites == 3, backend.reports[0]
    assert backend.ops()["tome.merge_bias"] > 0
    with torch.no_grad():
        assert distance(got, model(palette(), keep)) < 1e-5


@pytest.mark.filterwarnings("ignore::tome_fx.ToMeWarning")
@pytest.mark.parametrize("mask", [MASKS["causal"], MASKS["window"]], ids=["causal", "window"])
def test_causal_is_refused_and_the_original_kept(mask: Callable[..., Tensor]) -> None:
    model = FlexModel(mask=mask).eval()
    _, backend = record(model, (palette(),), r=8)
    assert backend.after == [None]
    assert any("which keys it sees" in reason.detail for reason in backend.reports[0].skipped), backend.reports[0]


def test_r_zero_keeps_the_original_graph() -> None:
    model = FlexModel().eval()
    got, backend = record(model, (palette(),), r=0)
    assert backend.after == [None]
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(got, torch.compile(model, backend="eager")(palette()))
