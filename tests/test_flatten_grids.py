"""flatten_grids: MLPs on a grid run, and merge, over one dim of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import redraw
from tests.palette import assert_lossless, compiled, distance, equalize, palette_grid
from tests.test_branch import Attention, unwindow, windows
from tome_fx.passes.capture import capture
from tome_fx.passes.flatten_grids import flatten_grids


class GridBlock(nn.Module):
    """A block whose stream stays [B, H, W, C] (Swin in torchvision's layout, ViTDet); windows of `w` x `w`."""

    def __init__(self, form: str, w: int = 4, dim: int = 32) -> None:
        super().__init__()
        self.form, self.w = form, w
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim)
        self.fc1, self.fc2, self.gate = nn.Linear(dim, 64), nn.Linear(64, dim), nn.Linear(dim, 64)
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def mlp(self, x: Tensor) -> Tensor:
        if self.form == "swiglu":
            return self.fc2(F.silu(self.gate(x)) * self.fc1(x))
        return self.scale * F.dropout(self.fc2(F.gelu(self.fc1(x))), 0.1, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C]"""
        b, h, _, c = x.shape
        y = self.attn(windows(self.norm1(x), self.w))
        x = x + unwindow(y, self.w, b, h).reshape(b, h, h, c)
        if self.form == "res_post":
            return x + self.norm2(self.mlp(x))
        return x + self.mlp(self.norm2(x))


class Grid(nn.Module):
    def __init__(self, form: str, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(*(GridBlock(form) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 4 H, 4 W] -> [B, H, W, 32]"""
        return self.blocks(self.embed(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize("form", ["pre", "swiglu", "res_post"])
def test_mlps_on_a_grid_merge(form: str) -> None:
    """Over rows that make no fewer tokens than a window, where one row alone (12) has fewer than one (16)."""
    torch.manual_seed(0)
    model = equalize(redraw(Grid(form)).eval())
    image = palette_grid(2, (12, 12), (4, 4), k=2)
    report = assert_lossless(model, (image,), 3, sites=2, placement="branch", control=True)
    assert [site.mlp for site in report.sites] == [(48, 45)] * 2


def test_training_and_gradients() -> None:
    """Dropout and gradients go through the flattened region."""
    torch.manual_seed(0)
    model = equalize(redraw(Grid("pre")).eval())
    image = palette_grid(2, (12, 12), (4, 4), k=2)
    grads = []
    for run in (model, compiled(model, 3, placement="branch")):
        model.zero_grad()
        run(image).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert distance(grads[1], grads[0]) < 1e-4
    out = compiled(model.train(), 3, placement="branch")(image)
    out.sum().backward()
    assert out.shape == (2, 12, 12, 32)


def test_a_projection_alone_stays_as_it_is() -> None:
    """One product after a grid is no MLP: the graph has no view that it did not have."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu() + 1

    x = torch.randn(2, 3, 4, 8)
    captured = capture(torch.export.export(Single(), (x,)).module(), (x,))
    before = captured.gm.code
    assert flatten_grids(captured.gm) == 0
    captured.gm.recompile()
    assert captured.gm.code == before
