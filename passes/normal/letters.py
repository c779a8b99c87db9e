"""letters: tokens of two dims (frames of patches, rows and columns) that a product of activations keeps side by side
are one dim to it.

    einsum("btnhd,bsmhd->bhtnsm", q, k)    ->    unflatten(einsum("bxhd,byhd->bhxy", flatten(q), flatten(k)))

A product with a matrix of each token (rotations of pairs) is a table that multiplies, and a sum.

    einsum("npij,bnpj->bnpi", r, x)    ->    (r * x[..., None, :]).sum(-1)

What every row of one is multiplied with every row of the other, and then summed, is a product too.

    (q[:, :, None] * k[:, None]).sum(-1)    ->    einsum("bnd,bmd->bnm", q, k)
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise, permutations
from math import prod
from typing import Any

import torch
from torch import fx

from ..algebra.axes import expr
from ..building.emit import Emit
from ..rules import Call
from ..rules.base import Role
from ..rules.contraction import parse_einsum
from .beside import product_of_two

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


def turned(call: Call, emit: Emit) -> fx.Node | None:
    """A product of what all samples share, small matrices side by side, with vectors of each sample."""
    sig = product_of_two(call)
    if sig is None:
        return None
    (out,), summed = sig.outs, [x for x, role in sig.roles.items() if role is Role.SUM]
    spelled = [dict(zip(own, map(expr, val.shape), strict=True)) for own, val in zip(sig.ins, call.vals, strict=True)]
    words = [{x: n for x, n in own.items() if n != 1} for own in spelled]
    for table, vectors in permutations(words):
        new, beside = {*table} - {*vectors}, {*table} & {*vectors} - {*summed}
        small = len(new) == len(summed) == len(sig.roles) == 1 and all(table.get(x) in (2, 3) for x in (*new, *summed))
        if small and beside and out[0] in vectors and out[0] not in table:
            order = [*out, *summed]
            spread = (placed(n, own, order, emit) for n, own in zip(call.nodes, sig.ins, strict=True))
            return emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, *spread), [-1])
    return None


def placed(node: fx.Node, own: Sequence[Any], order: Sequence[Any], emit: Emit) -> fx.Node:
    """A value with its letters in an order, and a dim of size 1 for each that it lacks."""
    held = sorted(range(len(own)), key=lambda d: order.index(own[d]))
    node = node if held == [*range(len(own))] else emit(aten.permute.default, node, held)
    for d, x in enumerate(order):
        node = node if x in own else emit(aten.unsqueeze.default, node, d)
    return node


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


def summed_pairs(call: Call, emit: Emit) -> fx.Node | None:
    """The sum of the products of every row of one activation with every row of another of its batch, if nobody reads
    these products."""
    pairs = call.nodes[0]
    if pairs.target is not aten.mul.Tensor or len(pairs.users) != 1 or not call.args["dim"]:
        return None
    product, rank = Call(pairs), call.vals[0].dim()
    vals = [*product.vals, call.out]
    alike = len(vals) == 3 and all(v.dtype == call.out.dtype and v.is_floating_point() for v in vals)
    if not alike or any(v.dim() != rank for v in product.vals) or rank > len(string.ascii_lowercase):
        return None
    held = [[d for d in range(rank) if expr(v.shape[d]) != 1] for v in product.vals]
    summed = {call.axis(d) for d in call.args["dim"]}
    both = {*held[0]} & {*held[1]}
    # An activation of a batch of one cannot be told from a table: the samples are dim 0.
    if not summed <= both or 0 not in both - summed or not all({*own} - both for own in held):
        return None
    kept = [d for d in sorted({*held[0], *held[1]}) if d not in summed]
    words = ["".join(string.ascii_lowercase[d] for d in own) for own in (*held, kept)]
    operands = [emit(aten.squeeze.dims, n, [d for d in range(rank) if d not in own]) if len(own) < rank else n
                for n, own in zip(product.nodes, held, strict=True)]  # fmt: skip
    new = emit(aten.einsum.default, f"{words[0]},{words[1]}->{words[2]}", operands)
    for d in range(rank):
        new = emit(aten.unsqueeze.default, new, d) if d not in kept and call.args["keepdim"] else new
    return new


__all__ = ["placed", "side_by_side", "summed_pairs", "turned"]
