"""Models of other libraries in the zoo: image, video and speech models as their authors wrote them.

Every builder imports its library itself, so that a missing one costs its own rows only. All weights are random.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zoo_vit_pytorch
from tests.palette import palette_grid, palette_rows, palette_tokens
from zoo_inputs import Calls, of_grid, of_images, of_tokens, of_waves
from zoo_models import BATCH, NotOffered, ZooModel

LIBRARIES = {
    "vit_pytorch": "vit-pytorch",
    "x_transformers": "x-transformers",
    "open_clip": "open_clip_torch",
    "whisper": "openai-whisper",
    "monai": "monai",
    "kornia": "kornia",
    "torchaudio": "torchaudio",
    "speechbrain": "speechbrain",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "encodec": "encodec",
    "bs_roformer": "bs-roformer",
    "spandrel": "spandrel",
    "perceiver_pytorch": "perceiver-pytorch",
    "timesformer_pytorch": "timesformer-pytorch",
    "conformer": "conformer",
    "hiera": "hiera-transformer",
    "segment_anything": "segment-anything",
    "pytorchvideo": "pytorchvideo",
    "denoising_diffusion_pytorch": "denoising-diffusion-pytorch",
}
"""Module -> the package that brings it (the extra `zoo` of pyproject.toml)."""


# -- images ------------------------------------------------------------------------------------------------------------


def _open_clip(name: str, **vision: Any) -> ZooModel:
    """Both towers of a small CLIP, with the picture varied and one text for all."""
    import open_clip

    settings = open_clip.get_model_config(name)
    size = 64 if "image_size" in settings["vision_cfg"] else 224
    small = {"width": 64, "head_width": 32, "layers": 3, "patch_size": 8, "image_size": size, **vision}
    settings["vision_cfg"] = {**settings["vision_cfg"], **small}
    words = {"width": 48, "heads": 2, "layers": 2, "vocab_size": 100, "context_length": 16}
    settings["text_cfg"] = {**{k: v for k, v in settings["text_cfg"].items() if not k.startswith("hf_")}, **words}
    kind = open_clip.CustomTextCLIP
    if "multimodal_cfg" in settings:
        settings["multimodal_cfg"] = {**settings["multimodal_cfg"], **words}
        kind = open_clip.CoCa
    elif not settings.get("custom_text"):
        kind = open_clip.CLIP
    settings.pop("custom_text", None)
    settings["embed_dim"] = 48
    text = torch.arange(4).add(3).repeat_interleave(4).expand(BATCH, -1).contiguous()
    made = of_images(kind(**settings), size)
    return ZooModel(made.model, (*made.args, text), tuple((*palette, text) for palette in made.palettes))


def _x_vit(**encoder: Any) -> ZooModel:
    import x_transformers

    layers = x_transformers.Encoder(dim=64, depth=3, heads=2, attn_dim_head=32, **encoder)
    return of_images(
        x_transformers.ViTransformerWrapper(
            image_size=64, patch_size=8, num_classes=10, num_register_tokens=2, attn_layers=layers
        )
    )


def _x_sequence(**encoder: Any) -> ZooModel:
    import x_transformers

    layers = x_transformers.Encoder(dim=64, depth=3, heads=2, attn_dim_head=32, **encoder)
    return of_tokens(
        x_transformers.ContinuousTransformerWrapper(
            dim_in=24, dim_out=8, max_seq_len=64, use_abs_pos_emb=False, attn_layers=layers
        ),
        dim=24,
    )


def _monai(name: str, grid: tuple[int, ...], cell: tuple[int, ...], **settings: Any) -> ZooModel:
    """A network of volumes (or images) of one channel."""
    from monai.networks import nets

    return of_grid(getattr(nets, name)(in_channels=1, **settings), grid, cell, 1)


def _monai_unet() -> ZooModel:
    from monai.networks.nets import DiffusionModelUNet

    model = DiffusionModelUNet(spatial_dims=2, in_channels=3, out_channels=3, num_res_blocks=(1, 1), channels=(32, 64),
                               attention_levels=(False, True), norm_num_groups=8, num_head_channels=32,
                               with_conditioning=True, cross_attention_dim=24)  # fmt: skip
    return of_images(
        model, 32, 2, timesteps=torch.tensor([3] * BATCH), context=torch.randn(1, 9, 24).expand(BATCH, -1, -1)
    )


def _monai_navit() -> ZooModel:
    from monai.networks.nets.navit import NaViT

    model = NaViT(image_size=64, patch_size=8, num_classes=10, hidden_size=64, mlp_dim=96, num_layers=3, num_heads=2,
                  in_channels=3, spatial_dims=2)  # fmt: skip
    # Two images of two sizes stand in each sequence, with padding after them.
    return of_images(Calls(model, lambda navit, x: navit([[x[0], x[1, :, :32]], [x[1]]])))


def _nested_navit() -> ZooModel:
    from vit_pytorch.na_vit import NaViT

    model = NaViT(image_size=64, patch_size=8, num_classes=10, dim=64, depth=3, heads=2, dim_head=32, mlp_dim=96)
    return of_images(Calls(model, lambda navit, x: navit([[x[0], x[1, :, :32]], [x[1]]])))


def _mil() -> ZooModel:
    """Bags of instances that attend to each other (multiple instance learning)."""
    from monai.networks.nets import MILModel

    features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64))
    features.fc = nn.Identity()
    model = MILModel(3, "att_trans", pretrained=False, backbone=features, backbone_num_features=64, trans_blocks=2)
    model.transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 96, 0.0, batch_first=False), 2)
    bags = palette_tokens(BATCH, 64, 3 * 8 * 8, k=4).reshape(BATCH, 64, 3, 8, 8)
    return ZooModel(model.eval(), (torch.randn_like(bags),), ((bags,),))


def _kornia_vit() -> ZooModel:
    from kornia.models.vit import VisionTransformer

    return of_images(VisionTransformer(64, 8, 3, 64, 3, 2))


def _kornia_mobile() -> ZooModel:
    from kornia.models.vit_mobile import MobileViT

    return of_images(MobileViT("xxs"), 128)


def _kornia_tiny() -> ZooModel:
    from kornia.models.tiny_vit import TinyViT

    return of_images(TinyViT(224, 3, 10, (32, 48, 64, 64), (1, 2, 2, 2), (2, 2, 2, 2)), 224)


def _kornia_siglip() -> ZooModel:
    from kornia.models.siglip2.config import SigLip2VisionConfig
    from kornia.models.siglip2.vision_encoder import SigLip2VisionModel

    config = SigLip2VisionConfig(image_size=64, patch_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                 num_attention_heads=2)  # fmt: skip
    return of_images(SigLip2VisionModel(config))


def _kornia_qwen() -> ZooModel:
    from kornia.models.qwen25 import Qwen25VisionConfig, Qwen25VisionTransformer

    config = Qwen25VisionConfig(depth=3, hidden_size=64, intermediate_size=96, num_heads=2, fullatt_block_indexes=(1,),
                                out_hidden_size=48)  # fmt: skip
    return of_images(Qwen25VisionTransformer(config), 168, 14)


def _kornia_moonvit() -> ZooModel:
    from kornia.models.kimi_vl import MoonViT, MoonViTConfig

    config = MoonViTConfig(image_size=112, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
                           intermediate_size=96)  # fmt: skip
    return of_images(MoonViT(config), 112, 14)


def _loftr() -> ZooModel:
    """Two images whose points attend to their own and to the other's: the coarse transformer of LoFTR."""
    from kornia.feature.loftr.loftr_module import LocalFeatureTransformer

    config = {"d_model": 64, "d_ffn": 96, "nhead": 2, "layer_names": ["self", "cross"] * 2, "attention": "full"}
    other = palette_tokens(1, 64, 64, k=4, seed=1).expand(BATCH, -1, -1).contiguous()
    return of_tokens(LocalFeatureTransformer(config), 64, 64, 1, other)


def _segmentation(decoder: str, encoder: str, size: int = 64, **settings: Any) -> ZooModel:
    import segmentation_models_pytorch

    make = getattr(segmentation_models_pytorch, decoder)
    return of_images(make(encoder, encoder_weights=None, classes=3, **settings), size, 32)


def _hiera() -> ZooModel:
    import hiera

    model = hiera.Hiera(input_size=(64, 64), num_classes=10, embed_dim=32, num_heads=1, stages=(1, 1, 2, 1))
    return of_images(model, 64, 4)


def _hiera_video() -> ZooModel:
    import hiera

    model = hiera.Hiera(input_size=(8, 64, 64), num_classes=10, embed_dim=32, num_heads=1, stages=(1, 1, 2, 1),
                        q_stride=(1, 2, 2), mask_unit_size=(1, 8, 8), patch_kernel=(3, 7, 7), patch_stride=(2, 4, 4),
                        patch_padding=(1, 3, 3), sep_pos_embed=True)  # fmt: skip
    return of_grid(model, (4, 16, 16), (2, 4, 4))


def _segment_anything() -> ZooModel:
    from segment_anything.modeling import ImageEncoderViT

    return of_images(ImageEncoderViT(112, 8, 3, 64, 3, 2, out_chans=32, use_rel_pos=True, window_size=7,
                                      global_attn_indexes=(1,)), 112)  # fmt: skip


def _perceiver() -> ZooModel:
    import perceiver_pytorch

    model = perceiver_pytorch.Perceiver(num_freq_bands=2, depth=2, max_freq=4.0, num_latents=48, latent_dim=64,
                                        cross_dim_head=32, latent_heads=2, latent_dim_head=32, num_classes=10,
                                        self_per_cross_attn=2)  # fmt: skip
    random = torch.randn(BATCH, 16, 16, 3)
    plain = torch.randn(BATCH, 1, 1, 3).expand(-1, 16, 16, -1).contiguous()
    return ZooModel(model.eval(), (random,), ((plain,),))


def _spandrel(name: str, size: int = 32, **settings: Any) -> ZooModel:
    """A network for restoring images: its tokens are pixels."""
    module = importlib.import_module(f"spandrel.architectures.{name}")
    return of_images(getattr(module, name)(**settings), size, 2)


_RESTORE: dict[str, Any] = {"img_size": 32, "embed_dim": 36, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8}


def _unet() -> ZooModel:
    import denoising_diffusion_pytorch

    model = denoising_diffusion_pytorch.Unet(32, dim_mults=(1, 2), full_attn=(False, True), attn_heads=2)
    return of_images(model, 32, 2, time=torch.tensor([3] * BATCH))


# -- videos ------------------------------------------------------------------------------------------------------------


def _timesformer() -> ZooModel:
    """Frames first: videos [BATCH, frames, channels, height, width]."""
    import timesformer_pytorch

    model = timesformer_pytorch.TimeSformer(dim=64, num_frames=8, num_classes=10, image_size=64, patch_size=8, depth=2,
                                            heads=2, dim_head=32)  # fmt: skip
    clips = palette_grid(BATCH, (8, 8, 8), (1, 8, 8), 3, k=4), palette_rows(BATCH, (8, 64, 64))
    palettes = tuple((clip.transpose(1, 2).contiguous(),) for clip in clips)
    return ZooModel(model.eval(), (torch.randn_like(palettes[0][0]),), palettes)


def _multiscale() -> ZooModel:
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers as create

    model = create(spatial_size=64, temporal_size=8, depth=4, patch_embed_dim=32, num_heads=1, head_num_classes=10,
                   embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]], pool_q_stride_size=[[1, 1, 2, 2]],
                   pool_kv_stride_adaptive=[1, 4, 4], pool_kvq_kernel=[3, 3, 3])  # fmt: skip
    return of_grid(model, (4, 16, 16), (2, 4, 4))


# -- speech and sound --------------------------------------------------------------------------------------------------


def _whisper(whole: bool) -> ZooModel:
    from whisper.model import ModelDimensions, Whisper

    model = Whisper(ModelDimensions(16, 64, 64, 2, 3, 64, 16, 64, 2, 2))
    mel = palette_tokens(BATCH, 128, 16, k=2, run=32).transpose(1, 2).contiguous()
    if not whole:
        return ZooModel(model.encoder.eval(), (torch.randn_like(mel),), ((mel,),))
    text = torch.arange(7).add(3).expand(BATCH, -1).contiguous()
    return ZooModel(model.eval(), (torch.randn_like(mel), text), ((mel, text),))


def _conformer() -> ZooModel:
    import conformer

    return of_tokens(conformer.Conformer(64, depth=3, dim_head=32, heads=2, conv_kernel_size=5), run=16)


def _torchaudio_conformer(lengths: tuple[int, int]) -> ZooModel:
    from torchaudio.models import Conformer

    return of_tokens(Conformer(64, 2, 96, 3, 5), 64, 64, 16, torch.tensor(lengths))


def _emformer() -> ZooModel:
    from torchaudio.models import Emformer

    model = Emformer(64, 2, 96, 2, 16, left_context_length=16, right_context_length=4)
    return of_tokens(model, 68, 64, 17, torch.tensor([64] * BATCH))


def _torchaudio_waves(kind: str) -> ZooModel:
    import torchaudio

    stem = [(16, 10, 5), (16, 4, 4), (16, 4, 4)]
    rest = (False, 64, 0.0, 16, 4, 3, 2, *([32, 80] if kind == "wavlm_model" else []), 0.0, 96, 0.0, 0.0, False, 0.0)
    return of_waves(getattr(torchaudio.models, kind)("group_norm", stem, *rest, None))


def _speech_encoder(kind: str, attention: str, masked: bool = False) -> ZooModel:
    """The encoder of SpeechBrain's TransformerASR on frames of 24 features; `masked`: the second sample is shorter."""
    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

    model = TransformerASR(
        tgt_vocab=32, input_size=24, d_model=64, nhead=2, num_encoder_layers=3, num_decoder_layers=1, d_ffn=96,
        dropout=0.0, kernel_size=5, encoder_module=kind, attention_type=attention, normalize_before=True, causal=False,
        csgu_linear_units=96,
    )  # fmt: skip
    lengths = torch.tensor([1.0, 0.75]) if masked else None
    return of_tokens(Calls(model, lambda asr, x: asr.encode(x, lengths)), 64, 24, 16)


def _beats() -> ZooModel:
    """Patches of spectrograms, with gated relative positions."""
    from speechbrain.lobes.models import beats

    config = {"encoder_layers": 3, "encoder_embed_dim": 64, "encoder_ffn_embed_dim": 96, "encoder_attention_heads": 2,
              "embed_dim": 48, "conv_pos": 16, "conv_pos_groups": 4, "relative_position_embedding": True,
              "num_buckets": 32, "max_distance": 80, "gru_rel_pos": True, "deep_norm": True}  # fmt: skip
    held, beats.BEATsConfig.__init__.__defaults__ = beats.BEATsConfig.__init__.__defaults__, (config,)
    try:
        model = beats.BEATs()
    finally:
        beats.BEATsConfig.__init__.__defaults__ = held
    sound = palette_grid(BATCH, (8, 8), (16, 16), 1, k=4)[:, 0]
    return ZooModel(Calls(model, _beats_features).eval(), (torch.randn_like(sound),), ((sound,),))


def _beats_features(net: Any, spectrogram: Tensor) -> Tensor:
    patches = net.patch_embedding(spectrogram[:, None]).flatten(2).transpose(1, 2)
    features = net.post_extract_proj(net.layer_norm(patches))
    return net.encoder(features)[0]


def _separator() -> ZooModel:
    """Dual-path transformer over chunks of a sound (SepFormer)."""
    from speechbrain.lobes.models.dual_path import Dual_Path_Model, SBTransformerBlock

    intra, inter = (SBTransformerBlock(2, 64, 2, d_ffn=96, dropout=0.0, norm_before=True) for _ in range(2))
    model = Dual_Path_Model(64, 64, intra, inter, num_layers=1, K=32)
    sound = palette_tokens(BATCH, 512, 64, k=4, run=64).transpose(1, 2).contiguous()
    return ZooModel(model.eval(), (torch.randn_like(sound),), ((sound,),))


def _encodec() -> ZooModel:
    """The language model over codes, one step of all of them (causal)."""
    from encodec.model import LMModel

    model = LMModel(n_q=4, card=32, dim=64, num_layers=2, num_heads=2)
    codes = torch.randint(0, 32, (BATCH, 4, 64))
    runs = torch.arange(4).add(5).repeat_interleave(16).expand(BATCH, 4, -1).contiguous()
    return ZooModel(model.eval(), (codes,), ((runs,),))


def _band_split(kind: str) -> ZooModel:
    import bs_roformer

    settings: dict[str, Any] = {"stft_n_fft": 256, "stft_hop_length": 64, "stft_win_length": 256, "dim_freqs_in": 129}
    bands = {"freqs_per_bands": (2,) * 24 + (9,) * 9} if kind == "BSRoformer" else {"num_bands": 24}
    model = getattr(bs_roformer, kind)(dim=64, depth=1, time_transformer_depth=1, freq_transformer_depth=1, dim_head=32,
                                       heads=2, num_residual_streams=1, **settings, **bands)  # fmt: skip
    return of_waves(model, None, 4096, 64)


# -- all ---------------------------------------------------------------------------------------------------------------

_VOLUME = {"grid": (6, 6, 6), "cell": (8, 8, 8)}
_SWIN: dict[str, Any] = {"grid": (4, 4, 4), "cell": (16, 16, 16), "out_channels": 2, "feature_size": 12,
                         "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}  # fmt: skip
BUILDERS: dict[str, Callable[[], ZooModel]] = {
    "vit_pytorch/na_vit": _nested_navit,
    "x_transformers/vit": _x_vit,
    "x_transformers/vit_flash": partial(_x_vit, attn_flash=True),
    "x_transformers/rotary": partial(_x_sequence, rotary_pos_emb=True),
    "x_transformers/alibi": partial(_x_sequence, alibi_pos_bias=True),
    "x_transformers/rel_pos_bias": partial(_x_sequence, rel_pos_bias=True),
    "x_transformers/memory_kv": partial(_x_sequence, attn_num_mem_kv=4),
    "x_transformers/talking_heads": partial(_x_sequence, attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "x_transformers/sigmoid": partial(_x_sequence, attn_sigmoid=True),
    "x_transformers/grouped_queries": partial(_x_sequence, attn_kv_heads=1),
    "x_transformers/macaron": partial(_x_sequence, macaron=True, ff_glu=True, use_rmsnorm=True),
    "open_clip/ViT-B-32": partial(_open_clip, "ViT-B-32"),
    "open_clip/coca_ViT-B-32": partial(_open_clip, "coca_ViT-B-32"),
    "open_clip/ViT-L-14-CLIPA": partial(_open_clip, "ViT-L-14-CLIPA"),
    "monai/ViT": partial(_monai, "ViT", **_VOLUME, img_size=48, patch_size=8, hidden_size=64, mlp_dim=96, num_layers=3,
                         num_heads=2, classification=True),
    "monai/ViTAutoEnc": partial(_monai, "ViTAutoEnc", grid=(6, 6, 6), cell=(4, 4, 4), img_size=24, patch_size=4,
                                hidden_size=64, mlp_dim=96, num_layers=3, num_heads=2),
    "monai/UNETR": partial(_monai, "UNETR", grid=(4, 4, 4), cell=(16, 16, 16), out_channels=2, img_size=64,
                           feature_size=8, hidden_size=64, mlp_dim=96, num_heads=2),
    "monai/SwinUNETR": partial(_monai, "SwinUNETR", **_SWIN),
    "monai/SwinUNETR_v2": partial(_monai, "SwinUNETR", **_SWIN, use_v2=True),
    "monai/MaskedAutoEncoderViT": partial(_monai, "MaskedAutoEncoderViT", **_VOLUME, img_size=48, patch_size=8,
                                          hidden_size=60, mlp_dim=96, num_layers=3, num_heads=2,
                                          decoder_hidden_size=48, decoder_mlp_dim=64, decoder_num_layers=2,
                                          decoder_num_heads=2),
    "monai/DiffusionModelUNet": _monai_unet,
    "monai/NaViT": _monai_navit,
    "monai/MILModel": _mil,
    "kornia/VisionTransformer": _kornia_vit,
    "kornia/MobileViT": _kornia_mobile,
    "kornia/TinyViT": _kornia_tiny,
    "kornia/SigLip2": _kornia_siglip,
    "kornia/Qwen25Vision": _kornia_qwen,
    "kornia/MoonViT": _kornia_moonvit,
    "kornia/LoFTR": _loftr,
    "segmentation_models_pytorch/Segformer": partial(_segmentation, "Segformer", "mit_b0", 128),
    "segmentation_models_pytorch/DPT": partial(_segmentation, "DPT", "tu-vit_tiny_patch16_224", 224,
                                               decoder_intermediate_channels=(16, 16, 16, 16),
                                               decoder_fusion_channels=16),
    "segmentation_models_pytorch/Unet_mit": partial(_segmentation, "Unet", "mit_b0", 128),
    "hiera/image": _hiera,
    "hiera/video": _hiera_video,
    "segment_anything/ImageEncoderViT": _segment_anything,
    "perceiver_pytorch/Perceiver": _perceiver,
    "spandrel/SwinIR": partial(_spandrel, "SwinIR", **_RESTORE),
    "spandrel/HAT": partial(_spandrel, "HAT", **_RESTORE, upscale=2),
    "spandrel/DAT": partial(_spandrel, "DAT", img_size=32, embed_dim=36, split_size=[4, 8], depth=[2], num_heads=[2]),
    "spandrel/DRCT": partial(_spandrel, "DRCT", **_RESTORE, gc=16, upscale=2, upsampler="pixelshuffle"),
    "spandrel/Swin2SR": partial(_spandrel, "Swin2SR", **_RESTORE),
    "spandrel/IPT": partial(_spandrel, "IPT", 48, n_feats=8, num_layers=2, num_heads=2),
    "spandrel/SCUNet": partial(_spandrel, "SCUNet", 64, config=[1] * 7, dim=64, input_resolution=64),
    "denoising_diffusion_pytorch/Unet": _unet,
    "timesformer_pytorch/TimeSformer": _timesformer,
    "pytorchvideo/MViT": _multiscale,
    "whisper/encoder": partial(_whisper, whole=False),
    "whisper/Whisper": partial(_whisper, whole=True),
    "conformer/Conformer": _conformer,
    "torchaudio/Conformer": partial(_torchaudio_conformer, (64, 64)),
    "torchaudio/Conformer_padded": partial(_torchaudio_conformer, (64, 48)),
    "torchaudio/Emformer": _emformer,
    "torchaudio/wav2vec2": partial(_torchaudio_waves, "wav2vec2_model"),
    "torchaudio/wavlm": partial(_torchaudio_waves, "wavlm_model"),
    "speechbrain/transformer": partial(_speech_encoder, "transformer", "regularMHA"),
    "speechbrain/transformer_padded": partial(_speech_encoder, "transformer", "regularMHA", masked=True),
    "speechbrain/conformer": partial(_speech_encoder, "conformer", "RelPosMHAXL"),
    "speechbrain/conformer_rope": partial(_speech_encoder, "conformer", "RoPEMHA"),
    "speechbrain/conformer_padded": partial(_speech_encoder, "conformer", "RelPosMHAXL", masked=True),
    "speechbrain/branchformer": partial(_speech_encoder, "branchformer", "RelPosMHAXL"),
    "speechbrain/BEATs": _beats,
    "speechbrain/SepFormer": _separator,
    "encodec/LMModel": _encodec,
    "bs_roformer/BSRoformer": partial(_band_split, "BSRoformer"),
    "bs_roformer/MelBandRoformer": partial(_band_split, "MelBandRoformer"),
}  # fmt: skip


def names() -> list[str]:
    """`library/model` of every model, whether its library is installed or not."""
    return [*(f"vit_pytorch/{name}" for name in zoo_vit_pytorch.MODELS), *BUILDERS]


def build(name: str) -> ZooModel:
    """The model of a name. Raises NotOffered where its library is not installed."""
    library, _, rest = name.partition("/")
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise NotOffered(f"{LIBRARIES[library]} is not installed ({error}): pip install 'tome-fx[zoo]'") from error
    return BUILDERS[name]() if name in BUILDERS else zoo_vit_pytorch.build(rest)
