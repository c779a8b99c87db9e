"""ToMe exactly: the rewritten graph against an independent eager implementation, on random (not palette) images."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer

import tome_fx
from tests import palette, reference
from tests.models import redraw

VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {},
    "registers": {"reg_tokens": 4},
    "one_register": {"reg_tokens": 1, "no_embed_class": True},
    "gap": {"global_pool": "avg", "class_token": False},
    "gap_cls": {"global_pool": "avg"},
    "map": {"global_pool": "map", "class_token": False},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax", "class_token": False},
    "layer_scale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
}
SCHEDULES: list[Any] = [3, 8, 100, (6, -1), (6, 1), (5, 0.5), [7, 0, 3, 2], [0, 9, 0, 0]]


def vit(depth: int = 4, img_size: int = 96, **kwargs: Any) -> Any:
    """A random ViT of 36 patches whose every part is felt at the output."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 16, "embed_dim": 32, "num_heads": 2, "num_classes": 10, **kwargs}
    return redraw(VisionTransformer(img_size=img_size, depth=depth, **kwargs), seed=0).eval()


def agree(model: Any, r: Any, seed: int = 0, size: int = 96, **config: Any) -> Any:
    """Compiled model == oracle to 1e-5, and the same token counts, also after the last block; returns the report."""
    config = {"drop_unread": False, **config}
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    counts: list[tuple[int, int]] = []
    with torch.no_grad():
        want = reference.tome_vit(model, image, r, lambda a, b: counts.append((a, b)))
        plain = model(image)
    got, report = palette.run(model, (image,), None, r, **config)
    assert [tuple(t) for t in report.tokens] == [c for c in counts if c[0] != c[1]]
    error = palette.distance(got, want)
    assert error < 1e-5, f"off by {error:.2e} from eager ToMe:\n{report}"
    if any(a != b for a, b in counts[:-1]):
        assert palette.distance(got, plain) > 1e-4, "the oracle merges nothing: the test cannot fail"
    return report


def test_the_oracle_itself() -> None:
    """r=0 is the model; palette images are lossless; without log(size) they are not."""
    reference.self_test()
    model = palette.equalize(vit())
    image = palette.palette_image(2, 96, 16, k=3)
    with torch.no_grad():
        want = model(image)
        for r in (0, 4):
            assert palette.distance(reference.tome_vit(model, image, r), want) < 2e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    """Class token, distillation token, registers, none; every pooling of timm."""
    agree(vit(**VARIANTS[variant]), 4)


@pytest.mark.parametrize("r", SCHEDULES, ids=str)
def test_schedules(r: Any) -> None:
    """Constant, linear with int() truncation, list; r capped at half the mergeable tokens."""
    agree(vit(), r, seed=1)


@pytest.mark.parametrize("seed", range(3))
def test_seeds(seed: int) -> None:
    agree(vit(depth=3), 5, seed=seed)


def test_distilled() -> None:
    """Two protected tokens: even and odd positions are those of the whole sequence."""
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=3, embed_dim=32, num_heads=2, img_size=96)
    report = agree(redraw(model, 0).eval(), 4)
    assert tuple(report.tokens[0]) == (38, 34)


def test_eager_attention() -> None:
    """timm without fused attention: q scaled, softmax spelled out."""
    set_fused_attn(False)
    try:
        model = vit()
    finally:
        set_fused_attn(True)
    agree(model, 4)


def test_rewrite_equals_the_compiled_model() -> None:
    """tome_fx.rewrite, called like the model, computes what the backend compiles, and shows its ops by name."""
    model, image = vit(), torch.randn(2, 3, 96, 96)
    gm = tome_fx.rewrite(model, (image,), r=4, plain=False)
    assert isinstance(gm, torch.fx.GraphModule)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    for op in ("tome.match", "tome.merge"):
        assert any(n.startswith(op) for n in names), f"no {op} in the graph"
    with torch.no_grad():
        assert palette.distance(gm(image), reference.tome_vit(model, image, 4)) < 1e-5


def test_linear_schedule_over_twelve_layers() -> None:
    """DESIGN section 3: (16, -1) over 12 layers is 32,29,26,23,20,17,14,11,8,5,2,0."""
    model = vit(depth=12, img_size=224)
    report = tome_fx.explain(model, (torch.randn(1, 3, 224, 224),), r=(16, -1))
    removed = [a - b for a, b in report.tokens]
    assert removed == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2]
    assert report.tokens[0][0] == 197


def test_constant_over_twelve_layers() -> None:
    """The paper's ViT-B: r=16 over 12 layers leaves 197 - 192 = 5 tokens, unless the cap of half the tokens binds."""
    model = vit(depth=12, img_size=224)
    report = tome_fx.explain(model, (torch.randn(1, 3, 224, 224),), r=16, drop_unread=False)
    want, n = [], 197
    for _ in range(12):
        want.append((n, n - min(16, (n - 1) // 2)))
        n = want[-1][1]
    assert [tuple(t) for t in report.tokens] == [(a, b) for a, b in want if a != b]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_share(share: float) -> None:
    """A float below 1 removes that share of the block's mergeable (unprotected) tokens, half of them at most."""
    report = tome_fx.explain(vit(), (torch.randn(1, 3, 96, 96),), r=share, placement="stream", drop_unread=False)
    assert len(report.tokens) == 4
    for before, after in report.tokens:
        assert abs((before - after) - share * (before - 1)) <= 1


@pytest.mark.parametrize("every", [2, 3])
def test_every(every: int) -> None:
    """every=k: as many tokens are left at the end, by merges at every k-th block and at the last."""
    report = tome_fx.explain(vit(), (torch.randn(1, 3, 96, 96),), r=4, every=every, drop_unread=False)
    want = {2: [(37, 29), (29, 21)], 3: [(37, 25), (25, 21)]}[every]
    assert [tuple(t) for t in report.tokens] == want


def test_multiple() -> None:
    """multiple=8: 37 tokens become 32, 32 (nothing due yet), 24, 24; what is left over is not forgotten."""
    report = tome_fx.explain(vit(), (torch.randn(1, 3, 96, 96),), r=5, multiple=8, placement="stream")
    assert [tuple(t) for t in report.tokens] == [(37, 32), (32, 24)]
    assert any("multiples of 8" in s.detail for s in report.skipped)


def test_flops_target() -> None:
    """flops=0.6 finds the largest-FLOPs constant r that stays at or below 60 % of the original."""
    model, image = vit(depth=6, img_size=160), torch.randn(1, 3, 160, 160)
    report = tome_fx.explain(model, (image,), r=None, flops=0.6)
    ratio = report.flops_after / report.flops_before
    r = max(a - b for a, b in report.tokens)
    assert ratio <= 0.6
    less = tome_fx.explain(model, (image,), r=r - 1)
    assert less.flops_after / less.flops_before > 0.6, "a smaller r would do"


def test_match_op_is_the_papers() -> None:
    """tome::match alone, against the loops of the oracle, for both parities of the prefix and any r."""
    for prefix in (0, 1, 2, 5):
        for n in (16, 17, 33):
            for r in (1, 5, (n - prefix) // 2):
                keys = torch.randn(2, n, 8)
                assign = torch.ops.tome.match(keys, r, prefix, 0)[0]
                for b in range(2):
                    groups: reference.Groups = [[] for _ in range(n - r)]
                    for i, g in enumerate(assign[b].tolist()):
                        groups[g].append(i)
                    assert groups == [sorted(g) for g in reference.match(keys[b], r, prefix)]
