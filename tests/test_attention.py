"""Forms of attention with a term for each key: equal to the mask, put where they belong, chosen by the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.models import Spec, build
from tests.recording import record
from tome_fx import attention, tome_backend
from tome_fx.attention import MASK, Row
from tome_fx.passes.lower import FORMS, for_gpu

ATTEND = torch.ops.tome.attend
LOWER = sys.modules["tome_fx.passes.lower"]
SHAPES = {
    "plain": (4, 4, 16, 16, None),
    "grouped": (4, 2, 16, 16, None),
    "narrow values": (2, 2, 24, 8, None),
    "own scale": (2, 2, 16, 16, 0.7),
}
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(shape: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, float, bool]:
    """((query, key, value), log sizes, scale, grouped): 9 queries, 13 keys."""
    heads, shared, d, e, scale = SHAPES[shape]
    operands = [torch.randn(2, h, n, w) for h, n, w in ((heads, 9, d), (shared, 13, d), (shared, 13, e))]
    bias = torch.randint(1, 90, (2, 1, 1, 13)).float().log()
    return [x.to(dtype).requires_grad_() for x in operands], bias, scale or d**-0.5, heads != shared


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", attention.FORMS)
def test_every_form_is_the_mask(form: str, shape: str, dtype: torch.dtype) -> None:
    """Result and gradients against attention with the mask in float64."""
    operands, bias, scale, grouped = case(shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in operands]
    want = scaled_dot_product_attention(*exact, attn_mask=bias.double(), scale=scale, enable_gqa=grouped)
    got = ATTEND(*operands, bias, scale, grouped, form)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=NEAR[dtype], atol=NEAR[dtype])
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    (got * weight.to(dtype)).sum().backward()
    for mine, other in zip(operands, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=4 * NEAR[dtype], atol=4 * NEAR[dtype])


def test_column_keeps_the_kernels_of_flash_attention_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask, one head dim for all operands, a multiple of 8; and the term to 16 bits where the dtype has 8."""
    seen = {}

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen.update(options, key=key, dims={x.shape[-1] for x in (query, key, value)})
        return value

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    (query, key, value), bias, scale, _ = case("plain", torch.bfloat16)
    ATTEND(query, key, value, bias, scale, False, "column")
    assert seen["dims"] == {24}
    assert "attn_mask" not in seen
    term = seen["key"][:, :1, :, 16:].float().sum(-1) * scale
    torch.testing.assert_close(term, bias[:, :, 0], rtol=2**-15, atol=0)


def test_masks_are_aligned_and_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps between rows are multiples of 16 elements, and heads and queries share one row."""
    seen = {}
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda q, k, v, **options: seen.update(options) or v)
    operands, bias, scale, _ = case("plain", torch.float16)
    for form in ("efficient", "cudnn"):
        ATTEND(*operands, bias, scale, False, form)
        assert seen["attn_mask"].shape == (2, 4, 9, 13)
        assert seen["attn_mask"].stride() == (16, 0, 0, 1)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of CUDA on this device, without the Triton kernels, which need a GPU."""
    monkeypatch.setitem(FORMS, "cpu", for_gpu)
    monkeypatch.setattr(LOWER, "triton_kernels", lambda: False)


def test_lower_puts_the_chosen_form(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each attention behind a merge, and at no other."""
    model, args = build(Spec(depth=3, mlp="gelu", readout="cls"))
    want, seen = record(model, args, r=4)
    assert seen.ops()["aten.scaled_dot_product_attention"] == 3
    for form in ("column", "efficient", "flex"):
        monkeypatch.setattr(attention, "ROWS", [Row(form)])
        got, seen = record(model, args, r=4)
        torch.testing.assert_close(got, want)
        assert seen.ops()["tome.attend"] == 2
        assert seen.ops()["aten.scaled_dot_product_attention"] == 1


def test_a_training_step_under_each_form(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd takes the forms apart: gradients are those with the mask."""
    model, args = build(Spec(depth=2, mlp="gelu", readout="cls"))
    found = []
    for form in (MASK, "column", "flex"):
        torch._dynamo.reset()
        monkeypatch.setattr(attention, "ROWS", [Row(form)])
        model.zero_grad()
        torch.compile(model, backend=tome_backend(r=4, inner="aot_eager"))(*args).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """Two blocks of attention, the second with a mask of keys of its own, dropout or a scale."""

    def __init__(self, dropout: float = 0.0, scale: float | None = None) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(2))
        self.options = {"dropout_p": dropout, "scale": scale}

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        for i, qkv in enumerate(self.qkv):
            q, k, v = qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind()
            mask = None if seen is None or i == 0 else seen[:, None, None]
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, **(self.options if i else {}))
            x = x + out.transpose(1, 2).flatten(2)
        return x.mean(1)


@pytest.mark.parametrize("why", ["nothing", "mask", "dropout", "scale"])
def test_lower_leaves_what_it_cannot_prove(why: str, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask beside the sizes, dropout, and a scale for which the column would leave float16."""
    model = Masked(dropout=0.1 if why == "dropout" else 0.0, scale=1e-4 if why == "scale" else None)
    args = [torch.randn(2, 64, 64), torch.ones(2, 64, dtype=torch.bool)][: 2 if why == "mask" else 1]
    monkeypatch.setattr(attention, "ROWS", [Row("column")])
    _, seen = record(model, args, r=8, placement="stream")
    assert seen.reports[0].merged_sites
    assert seen.ops()["tome.attend"] == (1 if why == "nothing" else 0)


def test_the_first_row_that_fits_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("column", ("bfloat16",), (1, 64), (513, 1024)), Row("efficient", tokens=(1025, None))]
    monkeypatch.setattr(attention, "ROWS", rows)
    half, single = torch.bfloat16, torch.float32
    assert attention.choose(half, 64, 1024) == "column"
    assert (
        attention.choose(half, 80, 1024) == attention.choose(single, 64, 1024) == attention.choose(half, 64, 1) == MASK
    )
    assert attention.choose(single, 64, 5000) == "efficient"
    monkeypatch.setattr(attention, "ROWS", [Row("column")])
    assert attention.choose(half, 248, 99) == "column"
    assert attention.choose(half, 256, 99) == MASK  # FlashAttention ends at 256


def test_tables_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps({"measured": None, "rows": [{"form": "flex", "dtypes": ["float16"], "tokens": [1, None]}]})
    )
    assert attention.read(path) == [Row("flex", ("float16",), tokens=(1, None))]
    for row, error in (({"form": "columns"}, ValueError), ({"form": "flex", "head": 3}, TypeError)):
        path.write_text(json.dumps({"rows": [row]}))
        with pytest.raises(error):
            attention.read(path)


def test_the_stored_table_says_what_it_rests_on() -> None:
    """Rows that leave the mask stand there only with the machine, torch and date that measured them."""
    table = json.loads(attention.TABLE.read_text())
    rows = attention.read(attention.TABLE)
    if table["measured"] is None:
        assert {row.form for row in rows} <= {MASK}
    else:
        assert {"device", "torch", "date"} <= set(table["measured"])
