"""What the masks of an attention say about merging its tokens.

A mask of keys gives the tokens that it leaves out no weight: in a merge they count for nothing, and a group of both
kinds is a group of the valid ones (`key_masks`).

A mask of pairs lets each query see keys of its own (shifted windows, a window of several pictures). Merging is right
where such a mask cuts every window into parts that see themselves and nobody else, and only tokens of one part merge:
`parted` proves the first from the mask's value, which must be known while compiling, and counts how many tokens may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from tome_fx.ops import LEFT_OUT

from .axes import Dim, leaves
from .find_attention import AttentionSite
from .rules import Call, Facts, find
from .rules.views import ExpandRule, PermuteRule, RepeatRule, ViewRule

aten = torch.ops.aten
_SUMS = {aten.add.Tensor, aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
_VIEWS = ViewRule, PermuteRule, ExpandRule, RepeatRule
_LARGEST = 2**22
"""Elements of a mask whose value is looked into."""


def score_terms(site: AttentionSite, facts: Facts, calls: dict[fx.Node, Call]) -> list[fx.Node]:
    """What is added to, or masks, the scores of a site."""
    if site.fused:
        return list(calls[site.out].nodes[3:]) if site.masked else []
    fixed = facts.constant | facts.given
    return [n for n in sorted(facts.scores & fixed) if any(user in facts.scores - fixed for user in n.users)]


def key_masks(
    site: AttentionSite, facts: Facts, calls: dict[fx.Node, Call], tokens: Dim, sample: Dim
) -> tuple[fx.Node, ...]:
    """The masks of keys among the terms of a fused site's scores: bool (True: seen) or float (0 / very low).

    Each holds the tokens in one dim along which it varies, and is the same for all queries and heads.
    """
    if not site.masked:
        return ()

    def is_mask(node: fx.Node) -> bool:
        told = node in facts.given or node in facts.decided
        return told and len(token_dims(node, facts, tokens)) == 1 and _varies_with(node, facts) <= {*tokens, *sample}

    return tuple(_summands(calls[site.out].nodes[3], is_mask, calls)[0])


def _summands(
    root: fx.Node, wanted: Callable[[fx.Node], bool], calls: dict[fx.Node, Call]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The values whose sum `root` is, through views: the wanted, nearest to the root, and the others."""
    todo, found, others = [root], dict[fx.Node, None](), dict[fx.Node, None]()
    while todo:
        node = todo.pop(0)
        if wanted(node):
            found[node] = None
        elif node in calls and (node.target in _SUMS or isinstance(find(calls[node]), _VIEWS)):
            kind = node.meta["val"].is_floating_point()
            todo += [n for n in calls[node].nodes if n.meta["val"].is_floating_point() == kind]
        else:
            others[node] = None
    return list(found), list(others)


def token_dims(node: fx.Node, facts: Facts, tokens: Dim) -> list[int]:
    """The dims of a value that are the token axis and along which it varies."""
    return [d for d, dim in enumerate(facts.dims(node)) if leaves(dim) == tokens and facts.varies(node, d)]


def _varies_with(node: fx.Node, facts: Facts) -> set[Any]:
    return {leaf for d, dim in enumerate(facts.dims(node)) if facts.varies(node, d) for leaf in leaves(dim)}


def parted(
    term: fx.Node, facts: Facts, calls: dict[fx.Node, Call], tokens: Dim, sample: Dim, prefix: int, suffix: int
) -> tuple[fx.Node, int] | None:
    """The mask of pairs that a term of the scores is a sum with, and how many tokens of any window may merge.

    None where the value of the mask is not known, or does not cut each window into parts that see only themselves.
    """

    def told(node: fx.Node) -> bool:
        return bool(_varies_with(node, facts) & set(sample)) or node in facts.decided or node in facts.given

    values: dict[fx.Node, Tensor] = {}

    def is_mask(node: fx.Node) -> bool:
        pair = len(token_dims(node, facts, tokens)) == 2 and told(node)
        if not pair or not _varies_with(node, facts) <= {*tokens, *sample}:
            return False
        value = _value(node, facts)
        if value is not None:
            values[node] = value
        return value is not None

    masks, others = _summands(term, is_mask, calls)
    # Parts of two masks at once are not counted out.
    if len(masks) != 1 or any(len(token_dims(node, facts, tokens)) == 2 and told(node) for node in others):
        return None
    allowed = _allowed(values[masks[0]], token_dims(masks[0], facts, tokens), prefix, suffix)
    return None if allowed is None else (masks[0], allowed)


def same_mask(a: fx.Node, b: fx.Node, facts: Facts) -> bool:
    """Whether two known masks of pairs say the same: some models add theirs twice."""
    x, y = _value(a, facts), _value(b, facts)
    return x is not None and y is not None and torch.equal(x.flatten(), y.flatten())


def _value(root: fx.Node, facts: Facts) -> Tensor | None:
    """A constant of the graph computed from numbers and buffers; None where a weight or an input goes into it."""
    order, todo, seen = [], [root], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        order.append(node)
        val, target = node.meta.get("val"), cast(Any, node.target)
        if node in facts.buffers:
            continue
        pure = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
        if node not in facts.constant or node.op != "call_function" or not pure or not isinstance(val, Tensor):
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or "empty" in target._schema.name:
            return None
        if not all(isinstance(s, int) for s in val.shape) or val.numel() > _LARGEST:
            return None
        todo += node.all_input_nodes
    held: dict[fx.Node, Any] = {}
    with _disable_current_modes(), torch.no_grad():
        for node in sorted(order):
            if node in facts.buffers:
                held[node] = facts.buffers[node]
            else:
                args, kwargs = fx.map_arg(node.args, held.get), fx.map_arg(node.kwargs, held.get)
                held[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return held[root]


def _allowed(value: Tensor, pair: Sequence[int], prefix: int, suffix: int) -> int | None:
    """How many tokens of every window have a partner in their own part; None where there are no such parts."""
    value = value.movedim(tuple(pair), (-2, -1))
    seen = value if value.dtype is torch.bool else value > LEFT_OUT
    if value.dtype is not torch.bool and not bool((value.masked_fill(~seen, 0.0) == 0).all()):
        return None  # scores of its own
    n = seen.shape[-1]
    row = seen.reshape(prod(seen.shape[:-2]), n, n).to(torch.float32)
    shared, count = row @ row.mT, row.sum(-1)
    same = (shared == count[:, :, None]) & (shared == count[:, None, :])
    if not bool((same | (shared == 0)).all()) or not bool((same == row.bool()).all()):
        return None
    body = same[:, prefix : n - suffix, prefix : n - suffix]
    # Sources stand at even places of the axis: see `tome_fx.ops.match`.
    odd = prefix % 2
    return int(body[:, odd::2, 1 - odd :: 2].any(-1).sum(-1).min())


__all__ = ["key_masks", "parted", "same_mask", "score_terms", "token_dims"]
