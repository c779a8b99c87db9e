"""Spoken English with transcripts: the voice prompts of Asterisk, out of two Debian packages (CC-BY-SA-3.0).

One speaker, studio sound at 8 kHz, telephone menus. The packages are fetched with `apt-get download` and unpacked with
`dpkg-deb`, which needs no root; files that lie in the cache folder already are used instead. Nothing is installed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tome_fx import assets

RATE = 16_000
"""Samples a second that Whisper wants."""
WINDOW = 30.0
"""Seconds of sound that Whisper's encoder sees at once."""
MIN_WORDS = 7


@dataclass(frozen=True)
class PinnedDeb:
    """One release of a Debian package that we take files from. `sha256`: of the file, 64 hex digits."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.package}_{self.version}_all.deb"

    @property
    def requirement(self) -> str:
        return f"{self.package}={self.version}"


SOUNDS = PinnedDeb(
    "asterisk-core-sounds-en-wav", "1.6.1-1", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"
)
TEXTS = PinnedDeb(
    "asterisk-core-sounds-en", "1.6.1-1", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"
)
SOUND_FOLDER = "usr/share/asterisk/sounds/en_US_f_Allison"
TEXT_FILE = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


@dataclass(frozen=True)
class Prompt:
    """What was said, and its sound: float32 [samples] in -1 to 1, `RATE` samples a second."""

    name: str
    text: str
    sound: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.sound) / RATE


def load(min_words: int = MIN_WORDS) -> list[Prompt]:
    """Every prompt of at least `min_words` words that has a sound of at most `WINDOW` seconds, shortest sound first.

    Raises:
        AssetError: a package or a tool can not be had, or a file is another than the one that was pinned.
    """
    assets.require("scipy", extra="accuracy")
    with tempfile.TemporaryDirectory(dir=assets.cache_dir()) as scratch:
        root = Path(scratch)
        for deb in (SOUNDS, TEXTS):
            unpack(deb, root)
        texts = transcripts(gzip.decompress((root / TEXT_FILE).read_bytes()).decode())
        found = [
            Prompt(name, text, read_wave(path))
            for name, text in texts.items()
            if len(text.split()) >= min_words and (path := root / SOUND_FOLDER / f"{name}.wav").is_file()
        ]
    return sorted((p for p in found if p.seconds <= WINDOW), key=lambda prompt: prompt.seconds)


def transcripts(lines: str) -> dict[str, str]:
    """{name: text} of a file with a line `name: text` for each prompt, comments behind a semicolon, empty lines.

    The keys of a telephone are written * and #, but spoken.
    """
    pairs = (line.split(":", 1) for line in lines.splitlines() if ":" in line and not line.startswith(";"))
    spoken = ((name.strip(), text.replace("*", " star ").replace("#", " pound ")) for name, text in pairs)
    return {name: " ".join(text.split()) for name, text in spoken}


def read_wave(path: Path) -> np.ndarray:
    """float32 [samples] in -1 to 1 at `RATE`, from a mono wav file of 16 bits at a rate that divides it.

    Raises:
        ValueError: the file is of another kind.
    """
    from scipy.signal import resample_poly

    with wave.open(str(path)) as file:
        kind = file.getnchannels(), file.getsampwidth(), RATE % file.getframerate()
        if kind != (1, 2, 0):
            raise ValueError(f"{path} has {kind[0]} channels of {kind[1]} bytes at {file.getframerate()} Hz")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        return resample_poly(samples, RATE // file.getframerate(), 1).astype(np.float32)


def joined(prompts: Sequence[Prompt], seed: int = 0, pause: float = 0.3) -> list[Prompt]:
    """The prompts in random order, as many one after another as fit `WINDOW` with `pause` seconds between them.

    A prompt alone fills a fifth of what the encoder sees: the rest is silence, which merges for nothing. Here it is
    speech nearly to the end.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    rest = np.zeros(round(pause * RATE), np.float32)
    windows: list[list[Prompt]] = [[]]
    for prompt in (prompts[i] for i in order):
        used = sum(p.seconds + pause for p in windows[-1])
        if windows[-1] and used + prompt.seconds > WINDOW:
            windows.append([])
        windows[-1].append(prompt)
    return [_join(window, rest) for window in windows]


def _join(window: Sequence[Prompt], rest: np.ndarray) -> Prompt:
    sounds = [part for prompt in window for part in (prompt.sound, rest)][:-1]
    return Prompt("+".join(p.name for p in window), " ".join(p.text for p in window), np.concatenate(sounds))


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Lists of `size` prompts in order; the last one is filled up with its last prompt: one shape, one graph."""
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


# ----------------------------------------------------------------------------------------------------- fetching


def unpack(deb: PinnedDeb, into: Path) -> None:
    """Unpack the files of `deb` below `into`, an existing folder.

    Raises:
        AssetError: as `load`.
    """
    archive = assets.cache_dir() / deb.filename
    if not archive.exists():
        _download(deb, archive)
    assets.check(archive, deb.sha256, deb.requirement)
    _run(["dpkg-deb", "-x", str(archive), str(into)], deb, into)


def _download(deb: PinnedDeb, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        _run(["apt-get", "download", deb.requirement], deb, Path(scratch))
        made = Path(scratch) / deb.filename
        if not made.exists():
            raise AssetMissing(deb, "apt-get gave another file")
        os.replace(made, archive)


def _run(command: list[str], deb: PinnedDeb, where: Path) -> None:
    if shutil.which(command[0]) is None:
        raise AssetMissing(deb, f"there is no {command[0]} here (it comes with Debian and Ubuntu)")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()[-1:]
        raise AssetMissing(deb, " ".join(said) or f"{command[0]} failed and gave no reason")


class AssetMissing(assets.AssetError):
    """A Debian package could not be had; the message says why and what to do."""

    def __init__(self, deb: PinnedDeb, why: str) -> None:
        super().__init__(
            f"the Debian package {deb.requirement} can not be had: {why}. "
            f"Run `apt-get update` and `apt-get download {deb.requirement}` on a Debian or Ubuntu machine and put "
            f"{deb.filename} into {assets.cache_dir()}"
        )
