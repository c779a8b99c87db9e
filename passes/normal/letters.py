"""letters: tokens of two dims (frames of patches, rows and columns) that a product of activations keeps side by side
are one dim to it.

    einsum("btnhd,bsmhd->bhtnsm", q, k)    ->    unflatten(einsum("bxhd,byhd->bhxy", flatten(q), flatten(k)))
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import fx

from ..building.emit import Emit
from ..rules import Call
from ..rules.contraction import parse_einsum

aten = torch.ops.aten


def side_by_side(call: Call, emit: Emit) -> fx.Node | None:
    """A product of two activations of one batch, with one letter for those that stand side by side wherever they
    stand."""
    shapes = [list(val.shape) for val in call.vals]
    if len(shapes) != 2 or not all(isinstance(n, int) for shape in shapes for n in shape):
        return None
    terms, out = parse_einsum(call.args["equation"], [len(shape) for shape in shapes])
    words = [*terms, out]
    batch = {*terms[0]} & {*terms[1]} & {*out}
    if any(len({*word}) < len(word) for word in words) or not all(terms) or not {terms[0][0], terms[1][0]} <= batch:
        return None
    for run in _runs(words, batch):
        words = [word.replace(run, run[0]) for word in words]
    if words[-1] == out and words[:-1] == terms:
        return None
    size = {x: n for term, shape in zip(terms, shapes, strict=True) for x, n in zip(term, shape, strict=True)}
    operands = [
        emit(aten.reshape.default, node, _sizes(word, term, size))
        for node, term, word in zip(call.nodes, terms, words[:2], strict=True)
    ]
    new = emit(aten.einsum.default, f"{words[0]},{words[1]}->{words[2]}", operands)
    return emit(aten.reshape.default, new, [size[x] for x in out])


def _runs(words: list[str], batch: set[str]) -> list[str]:
    """The longest stretches of letters, none of the batch, that every word has whole or not at all."""
    found, at = list[str](), ""
    for x in [*words[0], ",", *words[1]]:
        longer = at + x
        if at and x not in {",", *batch} and all((longer in w) or not {*longer} & {*w} for w in words):
            at = longer
            continue
        found += [at] if len(at) > 1 and at not in found else []
        at = x if x not in {",", *batch} else ""
    return [*found, at] if len(at) > 1 and at not in found else found


def _sizes(word: str, term: str, size: dict[str, int]) -> list[int]:
    """The shape of an operand whose runs are one dim each."""
    ends = [term.index(x) for x in word] + [len(term)]
    return [prod(size[x] for x in term[a:b]) for a, b in pairwise(ends)]


__all__ = ["side_by_side"]
