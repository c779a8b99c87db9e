"""Speech: Whisper's word error rate when tokens merge in its encoder. `python benchmarks/accuracy/speech.py [--small]`

Whisper tiny.en transcribes English voice prompts, greedily, with the key-value cache. Its encoder alone is compiled
with tome_fx: four layers over 1500 tokens, 30 s of sound. The decoder reads 1500 rows as before, since what leaves the
graph has its tokens back.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import common
import prompts
import tome_fx
import whisper_tiny as whisper
from tome_fx import assets, timing

GRID = (100, 200, 300, 350)
SMALL_GRID = (200,)
POINTS, SAME = 1.0, 0.1
"""Points of word error rate that are asked for: most that merging may cost, and between two inner compilers."""

Encoder = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Curve:
    """Sounds, their log-mel in batches (float32 [batch, 80, 3000] each) and the words that were said."""

    label: str
    sounds: list[prompts.Prompt]
    mels: list[torch.Tensor]
    said: list[str]


def errors(said: str, heard: str) -> tuple[int, int]:
    """(word errors, words said): fewest words to put in, take out or replace. Both texts are normalised.

    Raises:
        ValueError: nothing was said.
    """
    import jiwer

    if not said.split():
        raise ValueError("nothing was said, so there is no word error rate")
    found = jiwer.process_words(said, heard)
    return found.substitutions + found.deletions + found.insertions, len(said.split())


def normalize(text: str) -> str:
    """Lower case, no punctuation, no [notes] or (notes), numbers as digits: the rules of Whisper's authors.

    Their table of British spellings, which is not in transformers, is left out; hyphens part words. They leave a lone
    "one" as it is, but menus say "press one", and Whisper writes 1.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    words = EnglishTextNormalizer({})(text.replace("-", " ")).split()
    return " ".join("1" if word == "one" else word for word in words)


def rate(rows: np.ndarray) -> float:
    """Word error rate in percent of rows (errors, words): all errors over all words."""
    return float(100 * rows[:, 0].sum() / rows[:, 1].sum())


def encode(encoder: Encoder, mel: torch.Tensor) -> torch.Tensor:
    """float32 [batch, 1500, 384] of float32 [batch, 80, 3000]."""
    with torch.no_grad():
        return encoder(mel).last_hidden_state


def decode(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Tokens int64 [batch, length], greedily, up to the end of text; the only bound is the decoder's 448 positions."""
    from transformers.modeling_outputs import BaseModelOutput

    # One pass: else a time token in a ruined text has the window read again, see findings/whisper_states_read_twice.sh.
    return model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), force_unique_generate_call=True)


@dataclass
class Measured:
    """Of one encoder: (word errors, words) of each sound, seconds of each batch in the encoder and as a whole."""

    errors: list[tuple[int, int]]
    encoder: list[float]
    whole: list[float]

    @property
    def rows(self) -> np.ndarray:
        """int64 [sounds, 2]."""
        return np.array(self.errors)


def measure(
    loaded: whisper.Whisper, encoders: Mapping[int, Encoder], curve: Curve, console: Console
) -> dict[int, Measured]:
    """Transcribe every batch with every encoder in turn: each batch is a round of `timing.interleaved`."""
    found = {r: Measured([], [], []) for r in encoders}
    for number, mel in enumerate(track(curve.mels, curve.label, console=console, transient=True)):
        said = curve.said[number * len(mel) : (number + 1) * len(mel)]
        for r, encoder in encoders.items():
            start = time.perf_counter()
            states = encode(encoder, mel)
            middle = time.perf_counter()
            heard = loaded.tokenizer.batch_decode(decode(loaded.model, states), skip_special_tokens=True)
            found[r].encoder.append(middle - start)
            found[r].whole.append(time.perf_counter() - start)
            pairs = zip(said, heard, strict=False)  # the last batch is filled up
            found[r].errors += [errors(text, normalize(other)) for text, other in pairs]
    return found


def curve_of(label: str, sounds: Sequence[prompts.Prompt], batch: int, loaded: whisper.Whisper) -> Curve:
    mels = [
        loaded.features([p.sound for p in group], sampling_rate=prompts.RATE, return_tensors="pt").input_features
        for group in prompts.batches(sounds, batch)
    ]
    return Curve(label, list(sounds), mels, [normalize(p.text) for p in sounds])


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The result in common.py's schema."""
    info = timing.machine_info()
    loaded = whisper.load(console)
    every = prompts.load()
    if args.small:
        every = every[:: len(every) // 6][:6]
    alone = curve_of("prompts, each alone", every, args.batch, loaded)
    curves = [alone, curve_of("prompts joined to 30 s", prompts.joined(every), args.batch, loaded)]
    encoder = loaded.model.model.encoder
    encoders = {0: torch.compile(encoder, dynamic=False)}
    reports = {}
    with console.status("compiling"):
        encode(encoders[0], alone.mels[0])
        for r in args.r:
            encoders[r] = torch.compile(encoder, backend=tome_fx.tome_backend(r=r), dynamic=False)
            encode(encoders[r], alone.mels[0])
            reports[r] = tome_fx.reports()[-1]
            console.print(f"r={r}: {reports[r].summary()}", highlight=False)
    found = [measure(loaded, encoders, curve, console) for curve in curves]

    check = _best(found[0], args.r) or max(args.r)
    eager = torch.compile(encoder, backend=tome_fx.tome_backend(r=check, inner="eager"), dynamic=False)
    by_eager = rate(measure(loaded, {check: eager}, alone, console)[check].rows)
    by_inductor = rate(found[0][check].rows)
    return {
        "title": "Speech: Whisper tiny.en",
        "measure": "word error rate",
        "unit": "%",
        "better": "lower",
        "data": _data(curves),
        "machine": info,
        "settings": {"r": list(args.r), "batch": args.batch, "small": args.small},
        "baseline": common.bootstrap(found[0][0].rows, rate),
        "curves": [
            {"label": curve.label, "points": _points(measured, reports)}
            for curve, measured in zip(curves, found, strict=True)
        ],
        "found": [
            *(_found(curve.label, measured, args.r) for curve, measured in zip(curves, found, strict=True)),
            {
                "text": f"inner eager and inductor give the same word error rate, to {SAME:g} point (r={check})",
                "value": f"{by_eager:.2f} % and {by_inductor:.2f} %",
                "holds": abs(by_eager - by_inductor) <= SAME,
            },
        ],
        "notes": _notes(alone, found[0], args),
    }


def _best(found: Mapping[int, Measured], grid: Sequence[int]) -> int | None:
    """The largest r up to which, along the grid, word error rate stays within `POINTS` of the unmerged model's."""
    best = None
    for r in sorted(grid):
        if rate(found[r].rows) > rate(found[0].rows) + POINTS:
            break
        best = r
    return best


def _speed(found: Mapping[int, Measured], r: int) -> tuple[float, float]:
    """Throughput over plain Inductor's, of the encoder and of the whole transcription."""
    return timing.ratio(found[r].encoder, found[0].encoder), timing.ratio(found[r].whole, found[0].whole)


def _points(found: Mapping[int, Measured], reports: Mapping[int, tome_fx.ToMeReport]) -> list[dict[str, Any]]:
    """Unmerged, then each r; `speed` is the encoder's."""
    unmerged = {"r": 0, "tokens": None, **common.bootstrap(found[0].rows, rate), "speed": 1.0, "macs": 1.0}
    return [unmerged] + [
        {
            "r": r,
            "tokens": report.tokens[-1][1] if report.tokens else None,
            **common.bootstrap(found[r].rows, rate),
            "speed": _speed(found, r)[0],
            "macs": report.flops_after / report.flops_before,
        }
        for r, report in reports.items()
    ]


def _found(label: str, found: Mapping[int, Measured], grid: Sequence[int]) -> dict[str, Any]:
    best, base = _best(found, grid), rate(found[0].rows)
    value = f"none of the grid (unmerged {base:.1f} %)"
    if best is not None:
        paired = common.bootstrap(np.hstack([found[best].rows, found[0].rows]), _difference)
        encoder, whole = _speed(found, best)
        value = (
            f"r={best}: {rate(found[best].rows):.1f} % (unmerged {base:.1f} %, paired difference "
            f"{paired['value']:+.1f}, 95 % interval {paired['low']:+.1f} to {paired['high']:+.1f} points), encoder "
            f"{encoder:.2f} times as fast, whole transcription {whole:.2f} times"
        )
    text = f"largest r with a word error rate within {POINTS:g} point of the unmerged model's ({label})"
    return {"text": text, "value": value, "holds": best is not None}


def _difference(rows: np.ndarray) -> float:
    """Merged less unmerged, points, of rows (errors, words, errors unmerged, words)."""
    return rate(rows[:, :2]) - rate(rows[:, 2:])


def _data(curves: Sequence[Curve]) -> str:
    alone, joined = (curve.sounds for curve in curves)
    words = sum(len(text.split()) for text in curves[0].said)
    return (
        f"{len(alone)} English voice prompts of Asterisk ({prompts.MIN_WORDS} words or more, at most 30 s; {words} "
        f"words, {sum(p.seconds for p in alone) / 60:.1f} minutes), one speaker, telephone menus at 8 kHz brought to "
        f"16 kHz; the same prompts joined to {len(joined)} windows of up to 30 s."
    )


def _notes(alone: Curve, found: Mapping[int, Measured], args: argparse.Namespace) -> list[str]:
    filled = np.mean([p.seconds for p in alone.sounds]) / prompts.WINDOW
    ratios = ", ".join(f"{_speed(found, r)[1]:.2f} at r={r}" for r in args.r)
    notes = f"""
        A prompt alone fills {filled:.0%} of the encoder's 30 s on average, the rest is silence, which merges for
        nothing: the joined prompts are the harder test.
        *
        Merging is in the encoder alone; its output has all 1500 rows again, so the decoder costs what it did.
        *
        Whole transcription (the decoder eagerly, in transformers; log-mel not in it) of the prompts alone over the same
        with plain Inductor's encoder: {ratios}.
        *
        Speeds: batches of {args.batch} windows of 30 s, every encoder in turn on each batch, median over the
        batches ({len(alone.mels)} of the prompts alone).
        *
        Transcripts as the package has them, a few differ from what is said; * and # are read as star and pound.
        Prompts longer than 30 s are left out.
        *
        Texts are compared in lower case, without punctuation, numbers as digits (Whisper's English rules without the
        table of spellings). Intervals: bootstrap over sounds.
        *
        A transcript that repeats itself up to the decoder's 448 positions counts as it is.
    """
    return [" ".join(note.split()) for note in notes.split("\n        *\n")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--r", type=int, nargs="+", help=f"default {' '.join(map(str, GRID))}")
    parser.add_argument("--batch", type=int, help="sounds at once (default 12)")
    args = parser.parse_args(argv)
    args.r = args.r or (SMALL_GRID if args.small else GRID)
    args.batch = args.batch or (3 if args.small else 12)
    name, console = "speech-small" if args.small else "speech", Console()
    if not common.pending(args, name, console):
        return 0
    try:
        assets.require("jiwer", "transformers", extra="accuracy")
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of a mask that nothing reads
        with common.room_for(len(args.r) + 2):
            result = run(args, console)
    except assets.AssetError as error:
        print(error, file=sys.stderr)
        return 2
    for found in result["found"]:
        console.print(f"{found['text']}: {found['value']}", highlight=False)
    common.save(name, result, console, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
