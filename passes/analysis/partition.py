"""partition: masks of pairs that cut every window into parts.

A mask of pairs lets each query see keys of its own (shifted windows, a window of several pictures). Merging is right
where such a mask cuts every window into parts that see themselves and nobody else, and only tokens of one part merge:
`parted` proves the first from the mask's value, which must be known while compiling, and counts how many tokens may.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, fx

from tome_fx.ops import LEFT_OUT

from ..algebra.axes import Dim
from ..rules import find
from ..rules.facts import Facts
from .masks import VIEWS, token_dims, varies_with
from .special import special

aten = torch.ops.aten
_SUMS = {aten.add.Tensor, aten._to_copy.default, aten.clone.default}

Room = tuple[tuple[int, ...], ...]
"""How many tokens may merge: of each part, for all windows that differ."""


def parted(
    term: fx.Node, facts: Facts, tokens: Dim, sample: Dim
) -> tuple[fx.Node, Room] | None:
    """The mask of pairs that a term of the scores is a sum with, and how many tokens of each part may merge.

    None where the value of the mask is not known, or does not cut each window into parts that see only themselves.
    """

    def tells(node: fx.Node) -> bool:
        pair = token_dims(node, facts, tokens)
        return len(pair) == 2 and facts.per_pair(node, *pair)

    def is_mask(node: fx.Node) -> bool:
        known = varies_with(node, facts) <= {*tokens, *sample} and _value(node, facts) is not None
        return known and tells(node) and _allowed(node, facts, tokens) is not None

    masks, others = _summands(term, is_mask, facts)
    # Parts of two masks at once are not counted out.
    if len(masks) != 1 or any(map(tells, others)):
        return None
    allowed = _allowed(masks[0], facts, tokens)
    return None if allowed is None else (masks[0], allowed)


def same_mask(a: fx.Node, b: fx.Node, facts: Facts) -> bool:
    """Whether two known masks of pairs say the same: some models add theirs twice."""
    x, y = _value(a, facts), _value(b, facts)
    return x is not None and y is not None and torch.equal(x.flatten(), y.flatten())


def _value(node: fx.Node, facts: Facts) -> Tensor | None:
    """The value of a constant of known shape."""
    sized = all(isinstance(size, int) for size in node.meta["val"].shape)
    return facts.value(node) if sized else None


def _allowed(node: fx.Node, facts: Facts, tokens: Dim) -> Room | None:
    """How many tokens of every part have a partner in it; None where there are no such parts."""
    value = _value(node, facts)
    if value is None:
        return None
    value = value.movedim(tuple(token_dims(node, facts, tokens)), (-2, -1))
    seen = value if value.dtype is torch.bool else value > LEFT_OUT
    if value.dtype is not torch.bool and not bool((value.masked_fill(~seen, 0.0) == 0).all()):
        return None  # scores of its own
    n = seen.shape[-1]
    row = seen.reshape(prod(seen.shape[:-2]), n, n).to(torch.float32)
    shared, count = row @ row.mT, row.sum(-1)
    same = (shared == count[:, :, None]) & (shared == count[:, None, :])
    if not bool((same | (shared == 0)).all()) or not bool((same == row.bool()).all()):
        return None
    free = special(facts, tokens).free(n).to(same.device)
    same = same & free & free[:, None]
    # Sources stand at even places of the axis: see `tome_fx.ops.match`.
    part, paired = row[:, ::2].argmax(-1), same[:, ::2, 1::2].any(-1)
    return tuple({tuple(at[found].bincount(minlength=1).tolist()) for at, found in zip(part, paired, strict=True)})


def _summands(
    root: fx.Node, wanted: Callable[[fx.Node], bool], facts: Facts
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The values whose sum `root` is, through views: the wanted, nearest to the root, and the others."""
    todo, found, others = [root], dict[fx.Node, None](), dict[fx.Node, None]()
    while todo:
        node = todo.pop(0)
        if wanted(node):
            found[node] = None
        elif node in facts.calls and (node.target in _SUMS or isinstance(find(facts.calls[node]), VIEWS)):
            kind = node.meta["val"].is_floating_point()
            todo += [n for n in facts.calls[node].nodes if n.meta["val"].is_floating_point() == kind]
        else:
            others[node] = None
    return list(found), list(others)


__all__ = ["Room", "parted", "same_mask"]
