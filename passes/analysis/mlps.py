"""mlps: the MLPs of blocks whose stream cannot merge, each a branch of its own.

An MLP is what stands between a residual add and the stream it adds to, after an attention, without one, and with a
product with weights. It is merged at the last value that all of it comes from (the norm's result), or where it reads
the stream itself at its first product:

    x1 = add(x, unwindow(attention(...)))
    y  = norm(x1)                                          <- merge here, by y itself
    x2 = add(x1, unmerge(fc2(gelu(fc1(y)))))

Its tokens need not be those of the attention: an MLP maps each token on its own. They are the last tokens of the dim
that holds the attention's, as few leaves as make no fewer tokens than the attention has: some rows of the grid. Where
one dim does not hold as many (a row of a grid that stays a grid), the MLP is left alone.

Where a mask keeps tokens apart that the MLP would merge, or one of single tokens went in that its attention does not
have, it is left alone too (`_unmasked`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..algebra.axes import Atom, Dim, leaves, same, size_of
from ..algebra.layout import SHORT_AXIS
from ..rules import Call, find
from ..rules.base import Role
from ..rules.contraction import Contraction, Convolution
from ..rules.facts import Facts
from ..rules.signature import SignatureRule
from .blocks import Block, unfit
from .masks import KeyMask, score_terms, token_dims
from .partition import Room, same_mask
from .sites import AttentionSite
from .special import special
from .streams import Spot, length_of, origin, stream_beside, terms_of, tokens_in

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """One MLP: the site whose stream it reads, what merges and along which tokens. features: the leaves that its first
    product combines."""

    site: AttentionSite
    spot: Spot
    tokens: Dim
    features: frozenset[Atom]


# -- what is one -------------------------------------------------------------------------------------------------------


def _find_mlps(facts: Facts, whole: set[AttentionSite]) -> list[Mlp]:
    """The MLPs after the sites `whole`, whose stream keeps its length, in graph order."""
    found: list[Mlp] = []
    for node in facts.reach.nodes if whole else ():
        terms = terms_of(node, facts)
        for branch, stream in (terms, terms[::-1]) if len(terms) == 2 else ():
            stream = origin(stream, branch, facts)
            if facts.leads(stream, branch):
                site = _last_before(stream, facts)
                mlp = _mlp(branch, stream, site, facts) if site is not None and site in whole else None
                found += [mlp] if mlp is not None else []
    return found


def _last_before(stream: fx.Node, facts: Facts) -> AttentionSite | None:
    before = [site for site in facts.sites if facts.leads(site.out, stream)]
    return max(before, key=lambda site: facts.reach.index[site.out], default=None)


def _mlp(branch: fx.Node, stream: fx.Node, site: AttentionSite, facts: Facts) -> Mlp | None:
    inner = facts.reach.between(stream, branch)[1:]
    if any(other.out in inner for other in facts.sites):
        return None
    products = [n for n in inner if n in facts.calls and _by_weights(facts.calls[n], facts)]
    if not products:
        return None
    first = facts.calls[products[0]]
    above = facts.reach.passages(stream, branch)
    free = [n for n in above if not any(facts.leads(product, n) for product in products)]
    at_entry = not free and bool(above) and above[-1] is first.node and first.nodes[0] is stream
    if not free and not at_entry:
        return None
    value = stream if at_entry else free[0]
    found = _tokens_of(site, value, facts)
    if found is None:
        return None
    dim, tokens = found
    merge, operands = (first.node, ((0, dim),)) if at_entry else (value, ())
    spot = Spot(merge=merge, stream=value, branch=True, operands=operands)
    return Mlp(site=site, spot=spot, tokens=tokens, features=_combined(first, facts))


def _tokens_of(site: AttentionSite, value: fx.Node, facts: Facts) -> tuple[int, Dim] | None:
    """The dim in which a value holds what may merge, and the last leaves of it that are no fewer tokens than the
    attention has."""
    # Attention over channels has its tokens where others have features.
    queries, keys = set(site.q.axis(facts)), facts.dims(site.k.node)
    own = {*queries, *(leaf for d in site.k.features for leaf in leaves(keys[d]))} - facts.features
    axes = [set(leaves(dim)) for dim in facts.dims(value)]
    spots = [d for d, axis in enumerate(axes) if own & axis and not facts.features & axis]
    least = 1 if facts.features & queries else size_of(site.q.axis(facts))
    if not spots:  # the attention joins this stream's tokens with another's
        known = facts.features | facts.leaves_of(site.q.node)
        spots, least = [d for d, axis in enumerate(axes) if axis and not known & axis], 1
    if not spots:
        return None
    tokens: Dim = ()
    for leaf in reversed(leaves(facts.dims(value)[spots[-1]])):
        if tokens and _enough(size_of(tokens), least):
            break
        tokens = (leaf, *tokens)
    return (spots[-1], tokens) if _enough(size_of(tokens), least) else None


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


# -- what may merge of it ----------------------------------------------------------------------------------------------


def mlp_blocks(facts: Facts, blocks: list[Block], masked: set[AttentionSite]) -> list[Block]:
    """Blocks for the MLPs whose stream does not merge. blocks: those of attentions. masked: the sites whose mask keeps
    tokens apart, or may."""
    held = {own.site: block for block in blocks for own in block.heads}
    taken = {block.merge for block in blocks}
    whole = {site for site in facts.sites if site not in held or held[site].branch}
    found = []
    for mlp in _find_mlps(facts, whole):
        same_queries = [site for site in facts.sites if site.q.axis(facts) == mlp.tokens]
        sites = [mlp.site, *same_queries]
        if mlp.spot.merge in taken or masked & set(sites) or _cut(mlp, facts):
            continue
        block = _mlp_block(mlp, [(site, held.get(site)) for site in sites], facts)
        found += [block] if block is not None else []
    return found


Attended = list[tuple[AttentionSite, Block | None]]
"""The attentions of an MLP's tokens, its own first, and their blocks."""


def _mlp_block(mlp: Mlp, attended: Attended, facts: Facts) -> Block | None:
    tokens, value = mlp.tokens, mlp.spot.stream
    kept = special(facts, tokens)
    masks = _unmasked(mlp, attended, facts)
    if masks is None or unfit(mlp.site, size_of(tokens), kept.count):
        return None
    keys, parts, room = masks
    own = attended[0][1]
    rest = facts.features | mlp.features | set(tokens)
    sample = tuple(leaf for dim in facts.dims(value) for leaf in leaves(dim) if leaf not in rest)
    alike = own is not None and not _told_after(own, value, facts)
    site = own.site if own is not None else mlp.site
    return Block(site=site, tokens=tokens, sample=sample, spot=mlp.spot, special=kept, mlp=True, masks=keys,
                 length=length_of(value, facts, tokens), parts=parts, room=room, alike=alike)  # fmt: skip


def _unmasked(
    mlp: Mlp, attended: Attended, facts: Facts
) -> tuple[tuple[KeyMask, ...], fx.Node | None, Room] | None:
    """The masks of keys and the parts that its attentions' tokens merge with, and None where a mask may keep them apart
    in a way that these do not say."""
    own, tokens = attended[0][1], mlp.tokens
    masks = own.masks if own is not None and own.tokens == tokens else ()
    parts, room = _same_parts([block for _, block in attended], facts, tokens)
    if not masks and parts is None:
        apart = any(_keeps_apart(site, block, facts, tokens) for site, block in attended)
        if apart or told_before(mlp.spot.stream, facts, tokens):
            return None
    return masks, parts, room


def _same_parts(blocks: list[Block | None], facts: Facts, tokens: Dim) -> tuple[fx.Node | None, Room]:
    """The mask that parts these tokens in all of some blocks, and its room."""
    masks = [block.parts if block is not None and block.tokens == tokens else None for block in blocks]
    first, *others = masks
    if first is None or not all(mask is not None and same_mask(first, mask, facts) for mask in others):
        return None, ()
    return first, next(block.room for block in blocks if block is not None)


def _cut(mlp: Mlp, facts: Facts) -> bool:
    """Whether several attentions before an MLP have the queries of some of its tokens each, and none since of all:
    sequences packed one behind the other, or chunks that see only what was before."""
    value = mlp.spot.stream
    own = []
    for site in reversed([site for site in facts.sites if facts.leads(site.out, value)]):
        if not tokens_in(site.q.node, facts) < tokens_in(value, facts):
            break
        own.append(site)
    queries = {site.q.axis(facts) for site in own}
    return len(queries) > 1 or any(not facts.leads(b.out, a.out) for i, a in enumerate(own) for b in own[i + 1 :])


def _told_after(block: Block, value: fx.Node, facts: Facts) -> bool:
    """Whether something that joins between an attention and its MLP, and was not in what merged before, says of single
    tokens what the model did not compute."""
    way = facts.reach.between(block.site.out, value)
    merged = block.stream if block.operands else block.merge
    operands = (n for node in way[1:] if node in facts.calls for n in facts.calls[node].nodes)
    joining = {n for n in operands if not facts.leads(n, merged)}
    return any(
        (facts.told(n) or n in facts.constant) and token_dims(n, facts, block.tokens) for n in joining - set(way)
    )


def _keeps_apart(site: AttentionSite, block: Block | None, facts: Facts, tokens: Dim) -> bool:
    """Whether a mask of this attention may keep tokens of the axis apart that an MLP would merge."""
    if block is not None and block.parts is not None:
        return block.tokens == tokens
    if site.causal is not None:
        return True
    stream = stream_beside(site, facts)
    own = site.q.axis(facts) == site.k.axis(facts)
    own |= stream is not None and facts.leads(stream, site.k.node)
    return own and any(
        facts.told(term) or (len(pair := token_dims(term, facts, tokens)) > 1 and facts.per_pair(term, *pair[-2:]))
        for term in score_terms(site, facts)
    )


def told_before(value: fx.Node, facts: Facts, tokens: Dim) -> bool:
    """Whether a mask of single tokens went into a value, in whatever way."""
    features = facts.features | facts.entering - facts.leaves_of(value)
    return any(
        (node.meta["val"].dtype is torch.bool or node.meta["val"].is_floating_point())
        and not facts.leaves_of(node) & features
        and facts.told(node)  # last: it may compute a constant
        for node in facts.along.get(tokens, ())
        if node is not value and facts.leads(node, value)
    )


__all__ = ["Mlp", "mlp_blocks", "told_before"]
