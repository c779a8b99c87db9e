"""The demo refuses what it can not do before it fetches or compiles anything, and runs to the end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tome_fx import demo


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "picture.jpg"}, "out must be"),
        ({"out": "no/such/folder/picture.png"}, "folder"),
        ({"r": 0}, "r must be"),
        ({"size": 98}, "at least 112"),
    ],
)
def test_wrong_arguments_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.assets, "dinov2_vit_small", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        demo.run(**options)


def test_the_default_r_leaves_tokens_in_every_layer() -> None:
    for size in (112, 224, 518):
        patches = (size // 14) ** 2
        assert 0 < patches - 12 * demo._checked_r(None, size) <= patches // 4


@pytest.mark.slow
def test_the_demo_runs_to_the_end(tmp_path: Path) -> None:
    """On a photo of the user at 224 px: near features for the least merging, a row of four pictures."""
    Image.effect_noise((300, 260), 80).convert("RGB").save(tmp_path / "mine.png")
    said = Console(file=io.StringIO(), width=120)
    result = demo.run(tmp_path / "mine.png", out=tmp_path / "out.png", size=224, rounds=1, console=said)
    assert result.speedup > 0
    assert result.cosines.keys() == {4, 9, 13, 18}
    assert result.cosines[4][0] > 0.9
    with Image.open(result.picture) as picture:
        assert picture.width > 4 * 224 > picture.height
    assert str(result.picture) in said.file.getvalue().replace("\n", "")
