"""find_mlps: the MLPs of blocks whose stream cannot merge, each a branch of its own.

An MLP is what stands between a residual add and the stream it adds to, after an attention, without one, and with a
product with weights. It is merged at the last value that all of it comes from (the norm's result), or where it reads
the stream itself at its first product:

    x1 = add(x, unwindow(attention(...)))
    y  = norm(x1)                                          <- merge here, by y itself
    x2 = add(x1, unmerge(fc2(gelu(fc1(y)))))

Its tokens need not be those of the attention: an MLP maps each token on its own. They are the last tokens of the dim
that holds the attention's, as few leaves as make no fewer tokens than the attention has: some rows of the grid. Where
one dim does not hold as many (a row of a grid that stays a grid), the MLP is left alone.

Used by `find_blocks`; it only annotates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import Atom, Dim, leaves, same, size_of
from .find_attention import AttentionSite
from .layout import SHORT_AXIS
from .reach import Reach
from .rules import Call, Facts, find
from .rules.base import Role, SignatureRule
from .rules.contraction import Contraction, Convolution

aten = torch.ops.aten


@dataclass(frozen=True)
class Mlp:
    """One MLP: the site whose stream it reads, what merges and along which tokens. features: the leaves that its first
    product combines. entry: the operand of `merge` that merges, where it is not the value of `merge` itself."""

    site: AttentionSite
    merge: fx.Node
    stream: fx.Node
    dim: int
    tokens: Dim
    features: frozenset[Atom]
    entry: int | None

    @property
    def value(self) -> fx.Node:
        """What is merged."""
        return self.merge if self.entry is None else self.stream


def find_mlps(
    facts: Facts, calls: dict[fx.Node, Call], sites: list[AttentionSite], whole: set[AttentionSite], reach: Reach
) -> list[Mlp]:
    """The MLPs after the sites `whole`, whose stream keeps its length, in graph order."""
    found: list[Mlp] = []
    if not whole:
        return found
    for node in reach.nodes:
        if node.target is not aten.add.Tensor or len(node.all_input_nodes) != 2:
            continue
        for branch, stream in (node.args[:2], node.args[1::-1]):
            if isinstance(branch, fx.Node) and isinstance(stream, fx.Node) and reach.leads(stream, branch):
                mlp = _mlp(branch, stream, facts, calls, sites, whole, reach)
                if mlp is not None:
                    found.append(mlp)
    return found


def _mlp(
    branch: fx.Node,
    stream: fx.Node,
    facts: Facts,
    calls: dict[fx.Node, Call],
    sites: list[AttentionSite],
    whole: set[AttentionSite],
    reach: Reach,
) -> Mlp | None:
    site = max((s for s in sites if reach.leads(s.out, stream)), key=lambda s: reach.index[s.out], default=None)
    if site is None or site not in whole:
        return None
    inner = reach.between(stream, branch)[1:]
    if any(other.out in inner for other in sites):
        return None
    products = [n for n in inner if n in calls and _by_weights(calls[n], facts)]
    if not products:
        return None
    above = reach.passages(stream, branch)
    free = [n for n in above if not any(reach.leads(product, n) for product in products)]
    if free:
        merge, entry, value = free[0], None, free[0]
    elif above and above[-1] is products[0] and calls[products[0]].nodes[0] is stream:
        merge, entry, value = products[0], 0, stream
    else:
        return None
    # Attention over channels has its tokens where others have features.
    dims = [leaves(facts.dims(site.k)[d]) for d in site.inner_dims]
    queries = leaves(facts.dims(site.q)[site.query_dim])
    own = {*queries, *(leaf for dim in dims for leaf in dim)} - reach.features
    axes = [set(leaves(dim)) for dim in facts.dims(value)]
    spots = [d for d, axis in enumerate(axes) if own & axis and not reach.features & axis]
    least = 1 if reach.features & set(queries) else size_of(queries)
    if not spots:  # the attention joins this stream's tokens with another's
        known = reach.features | {leaf for dim in facts.dims(site.q) for leaf in leaves(dim)}
        spots, least = [d for d, axis in enumerate(axes) if axis and not known & axis], 1
    if not spots:
        return None
    tokens: Dim = ()
    for leaf in reversed(leaves(facts.dims(value)[spots[-1]])):
        if tokens and _enough(size_of(tokens), least):
            break
        tokens = (leaf, *tokens)
    if not _enough(size_of(tokens), least):
        return None
    return Mlp(site, merge, stream, spots[-1], tokens, _combined(calls[products[0]], facts), entry)


def _enough(size: Any, least: Any) -> bool:
    """Whether an axis has at least `least` tokens, and not so few that half of them would be kept; symbolic sizes are
    those of whole axes."""
    return size >= max(least, SHORT_AXIS) if isinstance(size, int) and isinstance(least, int) else same(size, least)


def _combined(product: Call, facts: Facts) -> frozenset[Atom]:
    """The leaves that a product by weights does not map one by one. No others are features: a scale or shift that joins
    before it may have the batch."""
    rule = find(product)
    assert isinstance(rule, SignatureRule)
    sig = rule.signature(product, facts)
    found: set[Atom] = set()
    for node, letters in zip(product.nodes, sig.ins, strict=True):
        if node not in facts.constant:
            for x, dim in zip(letters, facts.dims(node), strict=True):
                if x is not None and sig.role(x) is not Role.MAP:
                    found |= set(leaves(dim))
    return frozenset(found)


def _by_weights(call: Call, facts: Facts) -> bool:
    """Whether a product combines features by a weight."""
    return isinstance(find(call), (Contraction, Convolution)) and any(n in facts.constant for n in call.nodes)


__all__ = ["Mlp", "find_mlps"]
