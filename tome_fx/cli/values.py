"""What is typed for an option, and its value; mistakes are one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tome_fx import tuning


def parse_r(text: str) -> int | float | tuple[int, float] | list[int]:
    """A schedule as typed: "16"; "0.1", a share; "16,-1", r and inflection; "8,8,4", tokens of each block.

    Raises ArgumentTypeError for anything else; whether the numbers make sense is for `tome_backend` to say.
    """
    parts = text.split(",")
    try:
        if len(parts) == 1:
            return int(text) if text.lstrip("-").isdecimal() else float(text)
        if len(parts) == 2:
            return int(parts[0]), float(parts[1])
        return [int(part) for part in parts]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a count (16), a share (0.1), r and inflection (16,-1) or a count per block (8,8,4), not {text!r}"
        ) from error


def parse_protect(text: str) -> str | int | tuple[int, int] | list[int]:
    """Protected tokens as typed: "auto"; "1", leading ones; "2/10", the first two of every ten; "0,5,-1", positions.

    Raises ArgumentTypeError for anything else; whether the numbers make sense is for `tome_backend` to say.
    """
    try:
        if text == "auto":
            return text
        if "/" in text:
            count, period = text.split("/")
            return int(count), int(period)
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be auto, a count (1), count/period (2/10) or positions (0,5,-1), not {text!r}"
        ) from error


def parse_names(text: str) -> str | tuple[str, ...]:
    """A name, or several with commas between: one for each part of the merging blocks."""
    return tuple(text.split(",")) if "," in text else text


def parse_name_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def parse_blocks(text: str) -> str | tuple[int, ...] | tuple[float, ...]:
    """Blocks as typed: "all", "first half", "last"; "3,6,-1", positions; "0.25,0.5", shares of the depth.

    Raises ArgumentTypeError for numbers that are neither.
    """
    if text[-1:].isalpha():
        return text
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be all, first half, last or numbers (3,6,9), not {text!r}") from error


def parse_number(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, as tau=0.8, not {text!r}") from error


def parse_count(text: str) -> int:
    """A whole number, 0 or more."""
    return 0 if text.strip() == "0" else parse_positive(text)


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parse_target(text: str) -> tuning.Target:
    """A target as typed."""
    try:
        return tuning.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def parse_shape(text: str) -> tuple[int, ...]:
    """Comma-separated sizes."""
    return tuple(parse_positive(part.strip()) for part in text.split(","))


def parse_device(text: str) -> torch.device:
    """A device that this machine has."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch built without CUDA raises AssertionError
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    return device


def parse_output(text: str) -> Path:
    """A file in a directory that exists: checked before the work, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: not a file in an existing directory")
    return path
