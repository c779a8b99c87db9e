"""Inputs and palettes of the zoo's models from other libraries: a model in, a ZooModel out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.palette import palette_grid, palette_rows, palette_tokens
from zoo_models import BATCH, ZooModel, _images


class Calls(nn.Module):
    """A module called in another way than by its own forward."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *args: Any) -> Any:
        return self.call(self.inner, *args)


def of_images(model: nn.Module, size: int = 64, patch: int = 8, channels: int = 3, **rest: Any) -> ZooModel:
    """A model of square images; `rest` follows the image by name."""
    random, palettes = _images(size, patch, channels)
    return ZooModel(model.eval(), (random,), palettes, rest)


def of_grid(model: nn.Module, grid: tuple[int, ...], cell: tuple[int, ...], channels: int = 3) -> ZooModel:
    """A model of videos or volumes [BATCH, channels, depth, height, width] made of grid x cell."""
    cells = palette_grid(BATCH, grid, cell, channels, k=4)
    rows = palette_rows(BATCH, cells.shape[2:], channels)
    return ZooModel(model.eval(), (torch.randn_like(cells),), ((cells,), (rows,)))


def of_tokens(model: nn.Module, count: int = 64, dim: int = 64, run: int = 1, *rest: Any) -> ZooModel:
    """A model of sequences [BATCH, count, dim]."""
    tokens = palette_tokens(BATCH, count, dim, k=4, run=run)
    hum = torch.randn(BATCH, 1, dim).expand(-1, count, -1).contiguous()
    return ZooModel(model.eval(), (torch.randn_like(tokens), *rest), ((tokens, *rest), (hum, *rest)))


def of_waves(model: nn.Module, channels: int | None = None, count: int = 16000, period: int = 80) -> ZooModel:
    """A model of waveforms [BATCH, count], or [BATCH, channels, count]."""
    wave = palette_tokens(BATCH, count, 1, k=4, run=count // 8)[..., 0]
    hum = torch.randn(BATCH, period).repeat(1, count // period)
    if channels is not None:
        wave, hum = (x[:, None].repeat(1, channels, 1) for x in (wave, hum))
    return ZooModel(model.eval(), (torch.randn_like(wave),), ((wave,), (hum,)))
