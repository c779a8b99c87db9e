"""Pictures of merged tokens: colours are means, borders lie where two groups meet and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tome_fx
from tome_fx.visualize import infer_grid, sheet, visualize, write_gif

PIXEL = 6
RED = (255, 0, 0)


def noise(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """An image of random colours whose red stays below RED, in patches of PIXEL pixels."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 250, (rows * PIXEL, columns * PIXEL, 3), dtype=np.uint8))


def patches(image: Image.Image) -> np.ndarray:
    """float64 [rows, columns, pixels of a patch, 3]."""
    pixels = np.asarray(image, dtype=np.float64)
    rows, columns = pixels.shape[0] // PIXEL, pixels.shape[1] // PIXEL
    tiles = pixels.reshape(rows, PIXEL, columns, PIXEL, 3).swapaxes(1, 2)
    return tiles.reshape(rows, columns, -1, 3)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """(rows, columns, prefix, group of each of prefix + rows * columns tokens)."""
    rows, columns, prefix = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 3))
    count = prefix + rows * columns
    return rows, columns, prefix, draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))


@given(grouped(), st.integers(0, 5))
def test_each_group_has_its_mean_color(case: tuple[int, int, int, list[int]], seed: int) -> None:
    rows, columns, prefix, groups = case
    image = noise(rows, columns, seed)
    drawn = patches(visualize(image, torch.tensor(groups), prefix=prefix, patch_size=PIXEL, border=0))
    labels = np.array(groups[prefix:]).reshape(rows, columns)
    for group in np.unique(labels):
        mean = np.rint(patches(image)[labels == group].reshape(-1, 3).mean(0))
        assert (drawn[labels == group] == mean).all()


@given(st.integers(1, 6), st.integers(1, 6))
def test_unmerged_patches_keep_their_own_mean(rows: int, columns: int) -> None:
    image = noise(rows, columns)
    drawn = patches(visualize(image, torch.arange(rows * columns), prefix=0, patch_size=PIXEL))
    assert (drawn == np.rint(patches(image).mean(2, keepdims=True))).all()


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, RED]))
def test_one_group_is_one_color_without_a_border(rows: int, columns: int, color: tuple[int, int, int] | None) -> None:
    groups = torch.zeros(1 + rows * columns, dtype=torch.int64)
    drawn = visualize(noise(rows, columns), groups, patch_size=PIXEL, border_color=color)
    assert len(drawn.getcolors()) == 1


@given(grouped(), st.integers(0, PIXEL // 2))
def test_borders_lie_at_boundaries_and_nowhere_else(case: tuple[int, int, int, list[int]], border: int) -> None:
    rows, columns, prefix, groups = case
    options = {"prefix": prefix, "patch_size": PIXEL, "border": border, "border_color": RED}
    drawn = np.asarray(visualize(noise(rows, columns), torch.tensor(groups), **options))
    labels = np.kron(np.array(groups[prefix:]).reshape(rows, columns), np.ones((PIXEL, PIXEL), int))
    expected = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):  # the definition, pixel by pixel
        column = labels[max(0, y - border) : y + border + 1, x]
        row = labels[y, max(0, x - border) : x + border + 1]
        expected[y, x] = (column != labels[y, x]).any() or (row != labels[y, x]).any()
    assert ((drawn == RED).all(-1) == expected).all()


@given(grouped())
def test_group_numbers_do_not_matter(case: tuple[int, int, int, list[int]]) -> None:
    """Only the partition counts, and its order: holes in the numbering change nothing."""
    rows, columns, prefix, groups = case
    options = {"prefix": prefix, "patch_size": PIXEL}
    image, tokens = noise(rows, columns), torch.tensor(groups)
    assert visualize(image, tokens, **options) == visualize(image, 7 * tokens + 3, **options)


def test_the_parts_of_a_group_share_a_border_color_of_their_own() -> None:
    """Two groups of two patches each, apart, among lone patches of one colour."""
    image = Image.new("RGB", (5 * PIXEL, PIXEL), (10, 10, 10))
    drawn = np.asarray(visualize(image, torch.tensor([0, 1, 2, 1, 0]), prefix=0, patch_size=PIXEL))
    middle = drawn[PIXEL // 2].reshape(5, PIXEL, 3)
    assert (middle[2] == 10).all()  # alone: no border
    assert (middle[0, -1] == middle[4, 0]).all()
    assert (middle[1, 0] == middle[3, -1]).all()
    assert (middle[0, -1] != middle[1, 0]).any()


@given(st.integers(4, 40), st.integers(4, 40), st.integers(2, 16))
def test_the_grid_of_square_patches_is_inferred(rows: int, columns: int, patch: int) -> None:
    assert infer_grid(rows * columns, (rows * patch, columns * patch)) == (rows, columns)


def test_an_image_that_the_grid_does_not_divide_is_drawn_at_its_own_size() -> None:
    image = noise(10, 10).crop((0, 0, 58, 59))
    drawn = visualize(image, torch.arange(101), prefix=1)
    assert drawn.size == (58, 59)
    assert drawn.mode == "RGB"


def test_any_image_mode_is_accepted() -> None:
    gray = noise(4, 4).convert("L")
    groups = torch.zeros(16, dtype=torch.int32)
    assert visualize(gray, groups, prefix=0) == visualize(gray.convert("RGB"), groups, prefix=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": 17}, "prefix must lie"),
        ({"prefix": -1}, "prefix must lie"),
        ({"prefix": 0}, "prefix"),  # 17 patches: a prime
        ({"grid": (3, 4)}, "do not fill"),
        ({"grid": (-4, -4)}, "do not fill"),
        ({"patch_size": 5}, "do not tile"),
        ({"patch_size": 0}, "do not tile"),
        ({"patch_size": 2 * PIXEL}, "do not fill"),
        ({"patch_size": PIXEL, "grid": (2, 8)}, "patch_size gives"),
        ({"border": -1}, "border"),
        ({"border": PIXEL // 2 + 1}, "border"),
        ({"border_color": (0, 0, 256)}, "colour"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize(noise(4, 4), torch.arange(17), **options)


def test_a_batch_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="one sample"):
        visualize(noise(4, 4), torch.zeros(2, 17, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_groups_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="integers"):
        visualize(noise(4, 4), torch.zeros(17, dtype=dtype))


def test_more_patches_than_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="pixels"):
        visualize(Image.new("RGB", (3, 3)), torch.arange(16), prefix=0)


def test_a_sheet_holds_every_picture_unchanged() -> None:
    pictures = [[noise(4, 4, 0), noise(4, 4, 1)], [noise(4, 4, 2), noise(4, 4, 3)]]
    gap, text, side = 10, 16, 4 * PIXEL
    page = sheet(pictures, [["a", "b"], ["c", "d"]], gap=gap, text=text)
    head = text + gap // 2
    for (i, j), _ in np.ndenumerate(np.empty((2, 2))):
        left, top = gap + j * (side + gap), gap + head + i * (side + head + gap)
        assert page.crop((left, top, left + side, top + side)) == pictures[i][j]


@pytest.mark.parametrize(("shape", "titles"), [([], []), ([2, 1], [2, 1]), ([2], [1]), ([1, 1], [1]), ([0], [0])])
def test_a_ragged_sheet_is_refused(shape: list[int], titles: list[int]) -> None:
    with pytest.raises(ValueError, match="rows of one length"):
        sheet([[noise(1, 1)] * n for n in shape], [["x"] * n for n in titles])


def test_a_thin_count_is_no_grid() -> None:
    """1370 tokens of a 37 x 37 model with the class token left in: 10 x 137 would be drawn without a word."""
    with pytest.raises(ValueError, match="prefix"):
        infer_grid(1370, (518, 518))
    assert infer_grid(1369, (518, 518)) == (37, 37)
    assert math.prod(infer_grid(6, (2, 3))) == 6


# -- clips -----------------------------------------------------------------------------------------------------------

STEPS, ROWS, COLUMNS = 2, 3, 4
TUBELETS = STEPS * ROWS * COLUMNS


def noise_clip(frames: int = 4) -> np.ndarray:
    """uint8 [frames, H, W, 3] for a grid of ROWS x COLUMNS, red below RED."""
    shape = (frames, ROWS * PIXEL, COLUMNS * PIXEL, 3)
    return np.random.default_rng(0).integers(0, 250, shape, dtype=np.uint8)


@given(st.lists(st.integers(0, 5), min_size=TUBELETS, max_size=TUBELETS))
def test_a_group_of_tubelets_has_its_mean_color_over_all_frames(groups: list[int]) -> None:
    clip = noise_clip()
    frames = visualize(clip, torch.tensor(groups), prefix=0, grid=(STEPS, ROWS, COLUMNS), border=0)
    drawn = np.stack([np.asarray(frame) for frame in frames])
    cells = np.array(groups).reshape(STEPS, ROWS, COLUMNS)
    labels = np.kron(cells, np.ones((2, PIXEL, PIXEL), int))
    for group in np.unique(labels):
        assert (drawn[labels == group] == np.rint(clip[labels == group].mean(0))).all()


def test_a_group_keeps_its_border_color_over_the_frames() -> None:
    """One tubelet of each step makes a group, at another place; all others are alone and have no border."""
    groups = torch.arange(TUBELETS)
    groups[ROWS * COLUMNS + 1] = groups[0]
    clip = np.full_like(noise_clip(), 10)
    frames = [np.asarray(f) for f in visualize(clip, groups, prefix=0, grid=(STEPS, ROWS, COLUMNS))]
    border = frames[0][0, PIXEL - 1]  # the right side of the first cell
    assert (border != 10).any()
    assert (frames[3][0, PIXEL] == border).all()  # the left side of the second
    assert (frames[0][0, PIXEL] == 10).all()


def test_a_clip_of_one_frame_is_a_picture() -> None:
    image = noise(4, 4)
    groups = torch.randint(5, (17,))
    (frame,) = visualize([image], groups, patch_size=(1, PIXEL, PIXEL))
    assert frame == visualize(image, groups, patch_size=PIXEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a clip needs grid"),
        ({"patch_size": PIXEL}, "a clip needs grid"),
        ({"grid": (ROWS, COLUMNS)}, "a clip needs grid"),
        ({"grid": (3, ROWS, COLUMNS)}, "4 frames do not part"),
        ({"grid": (0, ROWS, COLUMNS)}, "4 frames do not part"),
        ({"grid": (4, ROWS, COLUMNS)}, "do not fill"),
        ({"patch_size": (3, PIXEL, PIXEL)}, "4 frames do not part"),
        ({"patch_size": (2, PIXEL, 5)}, "do not tile"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize(noise_clip(), torch.arange(TUBELETS), prefix=0, **options)


def test_a_clip_must_be_bytes_in_rgb_and_of_one_size() -> None:
    with pytest.raises(TypeError, match="uint8"):
        visualize(noise_clip().astype(np.float32), torch.arange(TUBELETS), grid=(STEPS, ROWS, COLUMNS))
    with pytest.raises(ValueError, match="T, H, W, 3"):
        visualize(noise_clip()[0], torch.arange(TUBELETS), grid=(STEPS, ROWS, COLUMNS))
    for frames in ([noise(4, 4), noise(3, 4)], []):
        with pytest.raises(ValueError, match="one size"):
            visualize(frames, torch.arange(TUBELETS), grid=(1, 4, 4))


def test_a_gif_has_every_frame(tmp_path: Path) -> None:
    frames = [noise(4, 4, seed) for seed in range(3)]
    write_gif(frames, tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, frames[0].size, 100, 0)
    for wrong, fps in (([], 8), (frames, 0), ([noise(4, 4), noise(3, 4)], 8)):
        with pytest.raises(ValueError, match="frames of one size"):
            write_gif(wrong, tmp_path / "b.gif", fps)


def test_the_function_and_its_module_have_one_name() -> None:
    """`tome_fx.visualize(...)` and `from tome_fx.visualize import sheet`, in any order, and after a reload."""
    import importlib

    importlib.import_module("tome_fx.visualize")
    assert tome_fx.visualize is visualize
    assert importlib.reload(tome_fx).visualize is visualize
