"""Methods: named bundles of pieces, and the registry of both.

A method is data. `METHODS["mstm"]` says: importance by attention, the least important join the others; what it does not
say is ToMe's. The options of `tome_backend` replace any of its pieces. docs/methods.md lists all, with their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tome_fx import matching

from .how import How
from .tokens import KINDS, PIECES, Order, Sides, Tokens, named, piece

MERGINGS = ("mean", "plain", "keep", "prune", "mlerp", "weighted")
NUMBERS = {
    "tau": "SAINT, thresholds: from which similarity on two tokens are close",
    "gamma": "SAINT: how much more a closer token counts",
    "votes": "SAINT: close partners from which a token counts as redundant (`counts`, `calibrate`)",
    "margin": "PiToMe: from which similarity on tokens are close, at the first block; at block l of L times 1 - l / L",
    "similarity_weight": "MCTF: exponent of the similarity",
    "information_weight": "MCTF: exponent of the little information",
    "size_weight": "MCTF: exponent of the small size",
    "levels": "ToSA: whole levels of what the caller says of each token, between 0 and 1",
}
DEFAULTS = {"tau": 0.75, "gamma": 10.0, "votes": 5.0, "margin": 0.9, "similarity_weight": 1.0,
            "information_weight": 1 / 20, "size_weight": 1 / 40, "levels": 16.0}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A bundle: options by name (those of `tome_backend`), and where they come from. verified: whether the formula was
    read first-hand. note: which reading was built where it was not, or what differs."""

    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    verified: bool = True
    note: str = ""


METHODS: dict[str, Method] = {
    "tome": Method({}, "arXiv 2210.09461"),
    "saint": Method(
        {"matcher": "votes", "merging": "prune", "blocks": "first half"}, "arXiv 2503.11549, ViT mode",
        note="r is static; calibrate(method='saint') lists the paper's counts, counts='votes' takes each sample's",
    ),
    "tosa": Method(
        {"alpha": "rising"}, "arXiv 2506.20066",
        note="the code of a place has 16 frequencies for each coordinate, which the paper does not say; log(size) "
        "joins the keys, where the public code adds it to the queries, which a softmax cancels; where places alone "
        "count, the metric has a share of 0.001",
    ),
    "mstm": Method(
        {"importance": "attention", "partition": "importance"}, "arXiv 2306.04897", verified=False,
        note="the part that needs no training, from the abstract: crucial tokens by the class token's attention, each "
        "other one merges into the most similar of them; of registers alone the first stands for a class token",
    ),
    "evit": Method(
        {"importance": "attention", "partition": "importance", "matcher": "fuse", "merging": "weighted",
         "prop_attn": False, "blocks": (0.25, 0.5, 0.75)}, "arXiv 2202.07800",
    ),
    "diffrate": Method(
        {"importance": "attention", "partition": "importance", "prune": 1 / 3}, "arXiv 2305.17997",
        note="the learned tables are lists of r and of prune; where none is given a third of r is dropped, about the "
        "share of the paper's table for DeiT-S, rounded down",
    ),
    "pitome": Method(
        {"importance": "energy", "candidates": "least"}, "arXiv 2405.16148",
        note="margin starts at 0.9; the paper has 0.75 for DeiT and MAE, 0.95 for CLIP",
    ),
    "tofu": Method(
        {"merging": ("prune", "mlerp")}, "arXiv 2312.01026", verified=False,
        note="the first half of the merging blocks drops, the second merges; the norm of a merged token is the largest "
        "of its group, as the paper says (public code rescales by the old destination's)",
    ),
    "mctf": Method(
        {"metric": "token", "importance": "received", "similarity": "joined", "matcher": "both"}, "arXiv 2403.10030",
        note="without the learned one-step-ahead attention",
    ),
    "grid": Method(
        {"partition": "grid:2", "merging": "plain", "prop_attn": False, "placement": "branch"}, "arXiv 2303.17604",
        note="destinations are the first token of each cell; partition='grid_random:2' draws them once",
    ),
    "algm": Method(
        {"partition": ("window:2", "alternating"), "blocks": (0.0, 0.34)}, "CVPR 2024", verified=False,
        note="counts are static; its thresholds are counts='threshold', or calibrate's",
    ),
    "local": Method({"partition": "band:8"}, "arXiv 2405.17951", verified=False, note="from the abstract"),
    "saint_vlm": Method(
        {"matcher": "greedy", "merging": "prune", "blocks": "last"}, "arXiv 2503.11549, vision tower", verified=False,
    ),
    "evs": Method(
        {"matcher": "previous", "merging": "prune", "blocks": "last", "metric": "token"}, "arXiv 2510.14624",
        verified=False, note="a fixed count is dropped; the first frame stays",
    ),
}  # fmt: skip


def register_method(name: str, *, source: str = "", note: str = "", replace: bool = False, **options: Any) -> None:
    """Give a bundle of options a name: `tome_backend(method=name)`.

    options: as in `tome_backend`. Raises ValueError for a name that is taken (`replace=True`: unless it is built in).
    """
    if name in METHODS and (name in BUILT_IN or not replace):
        raise ValueError(f'there is a method "{name}" already: choose another name, or pass replace=True')
    METHODS[name] = Method(options, source, note=note)


def register_piece(kind: str, name: str, fn: Callable[..., Any] | None = None, **asks: Any) -> Any:
    """Give a piece of a method a name: `register_piece("importance", "mine", fn)`; without `fn`, a decorator.

    kind: "importance", "candidates", "partition", "similarity", "matcher" or "counts"; what each gets and returns is in
    `tome_fx.methods.tokens`. A name that ends in ":k" gets a number behind its other arguments ("window:8": 8). asks:
    needs, a tuple of "attention" (the class token's), "received" (attention received), "change" (by the block), "place"
    (on the grid); scored, whether it reads the importance; all_pairs, whether it compares all tokens with all;
    most(free, whole, grid, k), how many of `free` tokens may go at most (else half of them; the least of a method's
    pieces holds); fixed, overlaps, apart, alone, counted: see `tome_fx.methods.tokens.Piece`.

    Raises ValueError for another kind, or a name that is taken.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if name in PIECES[kind] or (kind == "matcher" and name in matching.matchers()):
        raise ValueError(f"there is a {kind} {name!r} already: choose another name")
    listed = piece(kind, name, **asks)
    return listed if fn is None else listed(fn)


BUILT_IN = frozenset(METHODS)

__all__ = ["BUILT_IN", "DEFAULTS", "KINDS", "MERGINGS", "METHODS", "NUMBERS", "PIECES", "How", "Method", "Order",
           "Sides", "Tokens", "named", "piece", "register_method", "register_piece"]  # fmt: skip
