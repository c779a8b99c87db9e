"""The models of vit-pytorch in the zoo: one of each of its modules that takes an image, a video or a sequence."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from tests.palette import palette_tokens
from zoo_inputs import of_grid, of_images
from zoo_models import BATCH, ZooModel

_VIT: dict[str, Any] = {
    "image_size": 64, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 3, "heads": 2, "mlp_dim": 128,
    "dim_head": 32, "cls_depth": 2, "frames": 8, "image_patch_size": 8, "frame_patch_size": 2, "spatial_depth": 2,
    "temporal_depth": 2, "seq_len": 512,
}  # fmt: skip
# module -> (class, what it takes beside or instead of _VIT)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {}),
    "simple_vit": ("SimpleViT", {}),
    "simple_flash_attn_vit": ("SimpleViT", {}),
    "simple_vit_with_register_tokens": ("SimpleViT", {}),
    "simple_vit_with_patch_dropout": ("SimpleViT", {}),
    "simple_vit_with_qk_norm": ("SimpleViT", {}),
    "simple_vit_with_value_residual": ("SimpleViT", {}),
    "simple_vit_with_fft": ("SimpleViT", {"freq_patch_size": 8}),
    "simple_vit_with_hyper_connections": ("SimpleViT", {"num_residual_streams": 2}),
    "simple_vit_with_relative_proj_pos_bias": ("SimpleViT", {}),
    "simple_vit_with_sparse_gating": ("SimpleViTWithSparseGating", {}),
    "simple_vit_with_specialized_cls": ("SimpleViT", {}),
    "simple_vit_orthog_residual_update": ("SimpleViT", {}),
    "simple_vit_attn_residual": ("SimpleViTAttnResidual", {}),
    "attn_residual_with_dca_simple_vit": ("SimpleViT", {}),
    "simple_uvit": ("SimpleUViT", {"depth": 4}),
    "ats_vit": ("ViT", {"max_tokens_per_depth": (48, 40, 32)}),
    "cait": ("CaiT", {}),
    "cct": ("CCT", {"img_size": (64, 64), "embedding_dim": 64, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2}),
    "crossformer": ("CrossFormer", {"dim": (32, 64, 64, 64), "depth": (1, 1, 2, 1), "image_size": 224}),
    "cross_vit": ("CrossViT", {"sm_dim": 48, "lg_dim": 64, "sm_patch_size": 8, "lg_patch_size": 16, "depth": 2}),
    "cvt": ("CvT", {"s1_emb_dim": 32, "s2_emb_dim": 48, "s3_emb_dim": 64, "s3_depth": 2, "s3_heads": 2}),
    "deepvit": ("DeepViT", {}),
    "jet_vit": ("JetViT", {}),
    "jumbo_vit": ("JumboViT", {}),
    "learnable_memory_vit": ("ViT", {}),
    "levit": ("LeViT", {"image_size": 128, "dim": (32, 48, 64), "depth": 2, "heads": (2, 2, 2), "mlp_mult": 2}),
    "look_vit": ("LookViT", {"highres_patch_size": 8, "patch_size": 16}),
    "looped_vit": ("LoopedViT", {}),
    "max_vit": ("MaxViT", {"depth": (1, 1, 1), "window_size": 4, "dim": 32, "image_size": 128}),
    "max_vit_with_registers": ("MaxViT", {"depth": (1, 1, 1), "window_size": 4, "dim": 32, "image_size": 128}),
    "mobile_vit": ("MobileViT", {"dims": [48, 64, 80], "channels": [8, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96],
                                 "image_size": (128, 128), "patch_size": (2, 2)}),
    "nest": ("NesT", {"num_hierarchies": 2, "block_repeats": (2, 2)}),
    "normalized_vit": ("nViT", {}),
    "parallel_vit": ("ViT", {}),
    "pit": ("PiT", {"depth": (2, 2)}),
    "regionvit": ("RegionViT", {"dim": (32, 48, 64, 64), "depth": (1, 1, 2, 1), "image_size": 224}),
    "rvt": ("RvT", {}),
    "scalable_vit": ("ScalableViT", {"depth": (1, 2), "heads": (2, 2), "reduction_factor": (2, 1),
                                     "window_size": (4, 4)}),
    "sep_vit": ("SepViT", {"depth": (1, 2), "heads": (2, 2), "image_size": 224}),
    "t2t": ("T2TViT", {}),
    "twins_svt": ("TwinsSVT", {"image_size": 224, "s1_emb_dim": 32, "s2_emb_dim": 48, "s3_emb_dim": 64,
                               "s4_emb_dim": 64, "s3_depth": 1}),
    "vat_siglip": ("SigLIP", {}),
    "vit_5": ("ViT", {}),
    "vit_detpool": ("ViTDetPool", {}),
    "vit_for_small_dataset": ("ViT", {}),
    "vit_with_decorr": ("ViT", {}),
    "vit_with_keel_post_ln": ("ViT", {}),
    "vit_with_patch_merger": ("ViT", {"patch_merge_layer": 2, "patch_merge_num_tokens": 24}),
    "wwt": ("WWT", {"num_slots": 4}),
    "xcit": ("XCiT", {}),
    "vit_1d": ("ViT", {}),
    "vit_3d": ("ViT", {}),
    "simple_vit_3d": ("SimpleViT", {}),
    "vivit": ("ViViT", {}),
    "vivit_with_moss": ("ViViT", {}),
    "vit_nd": ("ViTND", {"ndim": 2, "input_shape": (64, 64)}),
    "vit_nd_rotary": ("ViTND", {"ndim": 2, "input_shape": (64, 64)}),
    "vit_nd_pope": ("ViTND", {"ndim": 2, "input_shape": (64, 64)}),
}  # fmt: skip


def build(name: str) -> ZooModel:
    """A model by the name of its module."""
    kind, settings = MODELS[name]
    made = getattr(importlib.import_module(f"vit_pytorch.{name}"), kind)
    takes = inspect.signature(made.__init__).parameters
    model = made(**{field: value for field, value in _VIT.items() if field in takes} | {
        field: value for field, value in settings.items() if field in takes or "kwargs" in takes})
    if name.endswith("_1d"):
        series = palette_tokens(BATCH, 64, 8 * 3, k=4).reshape(BATCH, 64, 3, 8).transpose(1, 2).reshape(BATCH, 3, 512)
        return ZooModel(model.eval(), (torch.randn_like(series),), ((series,),))
    if "frames" in takes:
        return of_grid(model, (4, 8, 8), (2, 8, 8))
    size = settings.get("image_size", 64)
    return of_images(model, size if isinstance(size, int) else size[0])
