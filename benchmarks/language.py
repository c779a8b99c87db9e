"""What a language model gains when a tower's tokens stay merged: a LLaVA of random weights in eager PyTorch.

The tower is that of LLaVA-1.5 (CLIP ViT-L/14 at 336 px, 576 image tokens, read before its last block), the language
model six LLaMA layers of 2048 channels; a prompt is one image and 32 tokens of text. For each share of image tokens
that merging leaves out: seconds of the tower (with the projector), of the prefill and of 16 more tokens, and entries
and bytes of the key-value cache. Image tokens keep the positions of their representatives. Shares are interleaved, and
ratios taken within a round. Seconds are processor time on one thread, which other work on the machine moves little; the
wall clock's are in the result too. Writes results/language-cpu.json and prints the table of docs/language.md.

    python benchmarks/language.py [--shares 0 0.25 0.5 0.75] [--rounds 5]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import harness
import tome_fx
from tome_fx import timing

PHASES = ("tower", "prefill", "decode")
TEXT = 32
"""Tokens of text of a prompt: half of them before the image, half behind it."""


class Features(nn.Module):
    """What LLaVA feeds its language model: pixels [B, 3, H, W] -> [B, N, D], without the class token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        return self.projector(hidden[:, 1:])


def llava(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """A LLaVA of random weights, with the last id of its vocabulary for image tokens."""
    import transformers

    text_config = transformers.LlamaConfig(**text)
    image = text_config.vocab_size - 1
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), text_config=text_config,
                                      image_token_id=image)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)


VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14}  # fmt: skip
LANGUAGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 6, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": 32000}  # fmt: skip


def schedule(total: int, blocks: int) -> list[int]:
    """Tokens to merge away in each block: `total` in all, as even as can be, the first blocks one more."""
    each, more = divmod(total, blocks)
    return [each + (block < more) for block in range(blocks)]


@dataclass
class Row:
    """One share of image tokens left out: seconds of each phase by round (processor, and wall clock), and what the
    cache holds."""

    image_tokens: int = 0
    cache_entries: int = 0
    cache_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    wall: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})


class Pipeline:
    """One image and its prompt through tower, prefill and decoding. r: a schedule of the tower's blocks; none where it
    stays as it is."""

    def __init__(self, model: Any, pixels: Tensor, r: Sequence[int] = (), text: int = TEXT) -> None:
        self.model, self.pixels, plain = model, pixels, Features(model).eval()
        image, tokens = model.config.image_token_id, plain(pixels).shape[1]
        self.prompt = torch.tensor([[*range(text // 2), *[image] * tokens, *range(text // 2, text)]])
        self.features: Callable[[Tensor], Any] = plain
        if any(r):
            self.features = tome_fx.rewrite(plain, (pixels,), r=[*r], placement="stream", keep="merged", plain=False)

    def tower(self) -> None:
        """Rows for the language model, and which columns of the prompt stay."""
        found = self.features(self.pixels)
        image = self.prompt == self.model.config.image_token_id
        merged = isinstance(found, tome_fx.MergedTokens)
        self.rows = found.output if merged else found
        self.stay = found.columns(image) if merged else torch.arange(image.shape[1])[None]

    def prefill(self) -> None:
        ids = self.prompt.gather(1, self.stay)
        embeds = self.model.get_input_embeddings()(ids)
        embeds[ids == self.model.config.image_token_id] = self.rows.flatten(0, -2)
        self.out = self.model.model.language_model(inputs_embeds=embeds, position_ids=self.stay, use_cache=True)

    def decode(self, count: int) -> Tensor:
        """int64 [1, count]: the next tokens, each the likeliest."""
        out, told, place = self.out, [], self.prompt.shape[1]
        for i in range(count):
            told.append(self.model.lm_head(out.last_hidden_state[:, -1:]).argmax(-1))
            position = torch.tensor([[place + i]])
            out = self.model.model.language_model(told[-1], position_ids=position, cache=out.cache)
        return torch.cat(told, 1)

    def cache(self) -> Iterator[Tensor]:
        """Keys and values [1, heads, entries, channels] of each layer."""
        for layer in self.out.cache.layers:
            yield from (layer.keys, layer.values)


def spent(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of processor time and of the wall clock."""
    start = time.process_time()
    wall = timing.seconds_of(run)
    return time.process_time() - start, wall


def measured(pipelines: dict[str, Pipeline], rounds: int, new: int, progress: Callable[[str], None]) -> dict[str, Row]:
    """All of a round one after another; the first round is a warm-up."""
    rows = {name: Row() for name in pipelines}
    for turn in range(rounds + 1):
        for name, pipe in pipelines.items():
            row, times = rows[name], {"tower": spent(pipe.tower), "prefill": spent(pipe.prefill)}
            row.image_tokens, row.cache_entries = pipe.rows.shape[-2], pipe.out.cache.get_seq_length()
            row.cache_bytes = sum(x.numel() * x.element_size() for x in pipe.cache())
            times["decode"] = spent(lambda pipe=pipe: pipe.decode(new))  # type: ignore[misc]
            for phase in PHASES if turn else ():
                row.seconds[phase].append(times[phase][0])
                row.wall[phase].append(times[phase][1])
            progress(f"{turn} of {rounds}, {name}: " + ", ".join(f"{k} {v[0]:.2f} s" for k, v in times.items()))
    return rows


def first_token(row: Row) -> list[float]:
    """Seconds until the first token is known, by round."""
    return [sum(pair) for pair in zip(row.seconds["tower"], row.seconds["prefill"], strict=True)]


def table(rows: dict[str, Row]) -> list[str]:
    """The rows of docs/language.md: seconds are medians; in brackets how many times as fast as the first row."""
    base = next(iter(rows.values()))

    def cell(mine: list[float], other: list[float]) -> str:
        return f"{timing.summary(mine).median:.2f} s ({timing.ratio(mine, other):.2f})"

    lines = ["| image tokens | tower | prefill | first token after | 16 more tokens | cache entries | cache |",
             "|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in rows.values():
        times = [cell(row.seconds[p], base.seconds[p]) for p in PHASES]
        times.insert(2, cell(first_token(row), first_token(base)))
        lines.append(f"| {row.image_tokens} | " + " | ".join(times) + f" | {row.cache_entries} "
                     f"| {row.cache_bytes / 2**20:.1f} MiB |")  # fmt: skip
    return lines


def record(rows: dict[str, Row], info: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON: per share what `Row` has."""
    told = {name: vars(row) for name, row in rows.items()}
    return {"benchmark": "language", "machine": info, "settings": settings, "rows": told}


def loaded(result: dict[str, Any]) -> dict[str, Row]:
    """The rows of a result."""
    return {name: Row(**row) for name, row in result["rows"].items()}


def main() -> int:
    options = harness.parser(__doc__ or "", claims=False)
    options.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75], help="the first is the base")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--new", type=int, default=16, help="tokens to decode")
    args = options.parse_args()
    torch.set_num_threads(1)
    console, info = Console(), timing.machine_info()
    model, pixels = llava(VISION, LANGUAGE), torch.randn(1, 3, VISION["image_size"], VISION["image_size"])
    tokens, blocks = (VISION["image_size"] // VISION["patch_size"]) ** 2, VISION["num_hidden_layers"] - 1
    with torch.no_grad():
        schedules = {share: schedule(round(share * tokens), blocks) for share in args.shares}
        pipelines = {f"{share:.0%}": Pipeline(model, pixels, r) for share, r in schedules.items()}
        rows = measured(pipelines, args.rounds, args.new, lambda line: console.print(line, highlight=False))
    settings = {"vision": VISION, "language": LANGUAGE, "text": TEXT, "new": args.new, "rounds": args.rounds,
                "r": {f"{share:.0%}": r for share, r in schedules.items()}}  # fmt: skip
    path = harness.result_path(args.out, "language", "cpu")
    path.write_text(json.dumps(record(rows, info, settings), indent=2) + "\n")
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
