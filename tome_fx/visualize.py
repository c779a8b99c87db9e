"""Pictures of merged tokens, still and moving, as in the ToMe paper (arXiv 2210.09461, figure 4 and appendix D).

pillow is imported when a picture is made: importing this module needs no extra package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["infer_grid", "sheet", "visualize", "write_gif"]

RGB = tuple[int, int, int]

# Patches are near square: a grid whose cells are longer than this is a sign of a wrong `prefix`, not of a wide patch.
MAX_CELL_ASPECT = 1.5


@overload
def visualize(
    picture: Sequence[Image.Image] | np.ndarray,
    groups: torch.Tensor,
    *,
    prefix: int = 1,
    grid: tuple[int, ...] | None = None,
    patch_size: int | tuple[int, ...] | None = None,
    border: int = 1,
    border_color: RGB | None = None,
) -> list[Image.Image]: ...


@overload
def visualize(
    picture: Image.Image,
    groups: torch.Tensor,
    *,
    prefix: int = 1,
    grid: tuple[int, ...] | None = None,
    patch_size: int | tuple[int, ...] | None = None,
    border: int = 1,
    border_color: RGB | None = None,
) -> Image.Image: ...


def visualize(
    picture: Any,
    groups: torch.Tensor,
    *,
    prefix: int = 1,
    grid: tuple[int, ...] | None = None,
    patch_size: int | tuple[int, ...] | None = None,
    border: int = 1,
    border_color: RGB | None = None,
) -> Any:
    """Draw every group of patches in its mean colour, with a border where two groups meet.

    A group need not be connected. With ``border_color=None`` each group of two or more patches has a border colour
    of its own, so that its parts can be told: same inside, same border, same token. Lone patches then get no
    border of their own. In a clip a group has one colour and one border over all frames.

    Args:
        picture: the picture the model saw, H x W pixels: cropped like the model's input, at any scale. Or a clip: a
            sequence of T such pictures, or uint8 [T, H, W, 3].
        groups: integer [N0], for every original token the index of its group. The first ``prefix`` tokens (class,
            registers) are left out; the other N are the patches in row-major order, of a clip frame by frame.
        prefix: how many leading tokens are no patches.
        grid: (rows, columns) of patches; of a clip (steps, rows, columns) of tubelets. Default: from ``patch_size``,
            else, for one picture, by :func:`infer_grid`.
        patch_size: side, or (height, width), of a patch in pixels of ``picture``; of a clip (frames, height, width).
        border: width in pixels on each side of a boundary; 0 for none.
        border_color: one colour (red, green, blue; 0 to 255) for all borders.

    Returns:
        RGB image of the size of ``picture``; of a clip the list of its T frames.

    Raises:
        ValueError: sizes do not fit each other, or a number is out of its range.
        TypeError: ``groups`` does not hold integers, or the clip is an array of another dtype.
    """
    from PIL import Image as pil

    labels = _patch_labels(groups, prefix)
    if isinstance(picture, pil.Image):
        pixels = np.asarray(picture.convert("RGB"))[None]
        shape: tuple[int, ...] = (1, *_grid(labels.size, pixels.shape[1:3], grid, patch_size))
        return pil.fromarray(_drawn(pixels, labels.reshape(shape), border, border_color)[0])
    pixels = _frames(picture)
    shape = _clip_grid(labels.size, pixels.shape[:3], grid, patch_size)
    return [pil.fromarray(frame) for frame in _drawn(pixels, labels.reshape(shape), border, border_color)]


def write_gif(frames: Sequence[Image.Image], path: str | os.PathLike[str], fps: float = 8.0) -> None:
    """Write frames of one size as a GIF that repeats for ever.

    Raises:
        ValueError: no frames, frames of different sizes, or ``fps`` is not above 0.
    """
    if len({frame.size for frame in frames}) != 1 or fps <= 0:
        raise ValueError(f"need frames of one size, at least one, and fps above 0, got {len(frames)} and {fps}")
    first, *others = frames
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def _drawn(pixels: np.ndarray, labels: np.ndarray, border: int, border_color: RGB | None) -> np.ndarray:
    """uint8 [T, H, W, 3]: ``pixels`` of that shape with the groups ``labels`` [steps, rows, columns] drawn."""
    smallest = min(pixels.shape[1] // labels.shape[1], pixels.shape[2] // labels.shape[2])
    if border < 0 or 2 * border > smallest:
        raise ValueError(f"border must lie in [0, {smallest // 2}] for patches of {smallest} pixels, got {border}")
    # Patch row of each pixel row: patches may differ by one pixel where the grid does not divide the picture.
    at = (np.arange(n) * cells // n for n, cells in zip(pixels.shape, labels.shape, strict=False))
    label_map = labels[np.ix_(*at)]
    drawn = _mean_colors(pixels, label_map)[label_map]
    edge = np.stack([_edges(frame, border) for frame in label_map])
    if border_color is None:
        edge &= (np.bincount(labels.reshape(-1)) > 1)[label_map]
        drawn[edge] = _palette(int(labels.max()) + 1)[label_map[edge]]
    else:
        drawn[edge] = _checked_color(border_color)
    return drawn


def infer_grid(patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) with ``rows * columns == patches`` whose cells in an image of (height, width) are squarest.

    Raises:
        ValueError: even the squarest cells are longer than 3:2, so ``patches`` is hardly a count of patches.
    """
    height, width = image_size
    if patches < 1 or height < 1 or width < 1:
        raise ValueError(f"need at least one patch and one pixel, got {patches} patches, {height} x {width} pixels")

    def aspect(rows: int) -> float:
        return abs(math.log(height / rows * (patches // rows) / width))

    rows = min((r for r in range(1, patches + 1) if patches % r == 0), key=aspect)
    if aspect(rows) > math.log(MAX_CELL_ASPECT):
        raise ValueError(
            f"{patches} patches make no grid of near-square cells on {height} x {width} pixels: "
            f"is `prefix` right? Otherwise give `grid` or `patch_size`"
        )
    return rows, patches // rows


def sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[Sequence[str]], *, gap: int = 12, text: int = 18
) -> Image.Image:
    """Pictures side by side on white, each below its title.

    Args:
        rows: pictures, the same number in each row.
        titles: one line of text for each picture.
        gap: space between the pictures in pixels.
        text: height of the letters in pixels.

    Raises:
        ValueError: no pictures, rows of different lengths, or not one title a picture.
    """
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    lengths = {len(row) for row in rows} | {len(row) for row in titles}
    if len(lengths) != 1 or 0 in lengths or len(rows) != len(titles):
        raise ValueError("need rows of one length, at least one picture, and a title for each")
    widths = [max(row[i].width for row in rows) for i in range(lengths.pop())]
    heights = [max(picture.height for picture in row) + text + gap // 2 for row in rows]
    page = pil.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(text)
    top = gap
    for row, names, height in zip(rows, titles, heights, strict=True):
        left = gap
        for picture, name, width in zip(row, names, widths, strict=True):
            draw.text((left, top + text), name, fill="black", font=font, anchor="ls")
            page.paste(picture, (left, top + text + gap // 2))
            left += width + gap
        top += height + gap
    return page


def _patch_labels(groups: torch.Tensor, prefix: int) -> np.ndarray:
    """int64 [N]: the patches' groups, renumbered 0, 1, ... without holes."""
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups must hold integers, got {groups.dtype}")
    if groups.ndim != 1:
        raise ValueError(f"groups must be of one sample, [N0], got shape {list(groups.shape)}")
    if not 0 <= prefix < groups.numel():
        raise ValueError(f"prefix must lie in [0, {groups.numel()}) for {groups.numel()} tokens, got {prefix}")
    return np.unique(groups[prefix:].cpu().numpy(), return_inverse=True)[1].reshape(-1)


def _frames(clip: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] of a clip."""
    if isinstance(clip, np.ndarray):
        if clip.dtype != np.uint8:
            raise TypeError(f"a clip must be uint8, got {clip.dtype}")
        if clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
            raise ValueError(f"a clip must be [T, H, W, 3], got {list(clip.shape)}")
        return clip
    if len({frame.size for frame in clip}) != 1:
        raise ValueError(f"a clip needs frames of one size, at least one, got {[frame.size for frame in clip]}")
    return np.stack([np.asarray(frame.convert("RGB")) for frame in clip])


def _clip_grid(
    tubelets: int,
    clip_size: tuple[int, ...],
    grid: tuple[int, ...] | None,
    patch_size: int | tuple[int, ...] | None,
) -> tuple[int, ...]:
    """(steps, rows, columns), checked against the number of tubelets and the clip (T, H, W)."""
    frames = clip_size[0]
    cells = grid or patch_size
    if not isinstance(cells, tuple) or any(isinstance(x, tuple) and len(x) != 3 for x in (grid, patch_size)):
        raise ValueError("a clip needs grid=(steps, rows, columns) or patch_size=(frames, height, width)")
    steps = grid[0] if grid else frames // max(cells[0], 1)
    if steps < 1 or frames % steps or (isinstance(patch_size, tuple) and patch_size[0] * steps != frames):
        raise ValueError(f"{frames} frames do not part into {steps} steps of one length")
    if tubelets % steps:
        raise ValueError(f"{tubelets} tubelets do not fill {steps} steps: is `prefix` right?")
    inner = patch_size[1:] if isinstance(patch_size, tuple) else None
    return steps, *_grid(tubelets // steps, clip_size[1:], grid[1:] if grid else None, inner)


def _grid(
    patches: int,
    image_size: tuple[int, ...],
    grid: tuple[int, ...] | None,
    patch_size: int | tuple[int, ...] | None,
) -> tuple[int, int]:
    """(rows, columns), checked against the number of patches and the image."""
    height, width = image_size
    if patch_size is not None:
        tall, wide = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if min(tall, wide) < 1 or height % tall or width % wide:
            raise ValueError(f"patches of {tall} x {wide} pixels do not tile an image of {height} x {width}")
        by_size = (height // tall, width // wide)
        if grid not in (None, by_size):
            raise ValueError(f"patch_size gives a grid of {by_size}, grid says {grid}")
        grid = by_size
    rows, columns = grid or infer_grid(patches, (height, width))
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ValueError(f"{patches} patches do not fill a grid of {rows} x {columns}: is `prefix` right?")
    if rows > height or columns > width:
        raise ValueError(f"a grid of {rows} x {columns} needs at least as many pixels, got {height} x {width}")
    return rows, columns


def _mean_colors(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 [groups, 3]: mean of uint8 ``pixels`` [..., 3] over each group of ``labels`` [...]."""
    flat = labels.reshape(-1)
    sums = [np.bincount(flat, weights=pixels[..., channel].reshape(-1)) for channel in range(3)]
    return np.rint(np.stack(sums, 1) / np.bincount(flat)[:, None]).astype(np.uint8)


def _edges(labels: np.ndarray, border: int) -> np.ndarray:
    """bool [H, W]: another group lies within ``border`` pixels to the left, right, top or bottom."""
    edge = np.zeros(labels.shape, bool)
    for step in range(1, border + 1):
        down = labels[step:] != labels[:-step]
        edge[step:] |= down
        edge[:-step] |= down
        right = labels[:, step:] != labels[:, :-step]
        edge[:, step:] |= right
        edge[:, :-step] |= right
    return edge


def _palette(count: int) -> np.ndarray:
    """uint8 [count, 3]: bright colours; steps of the golden ratio keep hues of neighbouring indices apart."""
    hue = np.arange(count) * 0.6180339887 % 1
    channels = np.abs((hue[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return np.rint(255 * (0.25 + 0.75 * channels.clip(0, 1))).astype(np.uint8)


def _checked_color(color: RGB) -> np.ndarray:
    if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
        raise ValueError(f"a colour is three numbers from 0 to 255, got {color}")
    return np.array(color, np.uint8)
