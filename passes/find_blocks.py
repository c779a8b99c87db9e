"""find_blocks: for every attention site the token axis, the residual stream, the merge point and the protected ends.

The merge point is the first `add` of the attention's output to a value the attention was computed from, both with
the token axis: after attention's residual, before the MLP (ToMe section 3). Where a parallel branch is added next
to it, the later add is taken.

    x1 = add(x, proj(attention(q(x), k(x), v(x))))     <- merge here, by the keys
    x2 = add(x1, mlp(norm(x1)))

Where there is no such add (windows, per-frame attention, tokens over two dims), or with `placement="branch"`, the merge
is a branch: around this attention alone, at the first value that both q and k are computed from, that the residual
stream is not computed from, and that holds the tokens in one dim (ToMe for Stable Diffusion, arXiv 2303.17604, merges
there). Keys are not there yet: their mean over heads is made for the matching alone (`projections.py`), and where that
is not possible tokens are compared by that value itself.

    y  = reshape(windows of norm(x))                       <- merge here, by the mean of the keys that y gives
    x1 = add(x, unwindow(unmerge(proj(attention(y)))))

Where no value holds the tokens of queries and keys in one dim (projections by convolution), or nothing stands between
it and the attention, the operands of the attention itself are merged, compared by the keys.

Where an attention joins the tokens of several streams (image and text), the longest of them merges for good, at the add
of its part of the output. So do the tokens of queries whose keys stand among others (learned keys, a context).

In cross attention (keys pooled from the tokens, or other tokens altogether) the queries alone merge, in a branch.
Not so a decoder's, whose tokens see each other in causal order: a group would show the past what comes after.

It only annotates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from tome_fx.methods.how import PAID
from tome_fx.report import SkipReason

from .algebra.axes import Dim, leaves, size_of, sized
from .analysis.blocks import Block, unfit
from .analysis.grid import grid_of, side_fits
from .analysis.masks import KeyMask, key_masks, leaves_all_in, masked_by_place, score_terms, token_dims
from .analysis.mlps import mlp_blocks, told_before
from .analysis.partition import Room, parted, same_mask
from .analysis.projections import Projection, projection
from .analysis.sites import TELLS_PAIRS, AttentionSite, tells_pairs
from .analysis.special import Before, before, special
from .analysis.streams import Spot, branch_point, holds, length_of, lost, merge_point, pooled, residuals, stream_beside
from .analysis.values import size_hint
from .rules import find
from .rules.contraction import Contraction, Convolution
from .rules.facts import Facts

MASKED = ("causal or windowed mask", "unclear mask")
"""Why a site is left alone whose mask keeps tokens apart, or may."""

NAMELESS = ("cross attention", "pooled tokens", "no residual add", "no branch point")
"""Why a site is left alone that may be told by the names of its tokens alone."""

UNCUT = "a mask leaves out tokens of the streams that it joins, or may: they merge around the attention alone then"

MIXED = "a weight mixes its tokens with each other, so that they cannot be told from features"


class _Left(Exception):
    """Why a site is left alone."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def find_blocks(facts: Facts) -> tuple[list[Block], list[SkipReason]]:
    """The mergeable attention blocks in graph order, and why the other sites are none."""
    blocks: list[Block] = []
    skipped: list[SkipReason] = []
    masked: set[AttentionSite] = set()
    for site in facts.sites:
        try:
            found = _block(site, facts)
            here = [b for b in blocks if b.merge is found.merge and (b.alone or found.alone)]
            if not here:
                blocks.append(found)
            elif _as_heads(here[0], found, facts):
                masks = tuple(dict.fromkeys((*here[0].masks, *found.masks)))
                blocks[blocks.index(here[0])] = replace(here[0], masks=masks, beside=(*here[0].beside, found))
            else:
                why = "another attention of the same block merges here, by its own keys alone"
                raise _Left("shared merge point", why)
        except _Left as left:
            why = lost(site, facts) if left.kind in NAMELESS else ""
            skipped.append(SkipReason("no rule" if why else left.kind, site.name, why or left.detail))
            masked |= {site} if left.kind in MASKED else set()
    # Once all sites are judged: one mask may part several.
    facts.parted |= {term for block in blocks if block.parts is not None for term in score_terms(block.site, facts)}
    if facts.config.placement != "stream":
        blocks += mlp_blocks(facts, blocks, masked)
    if facts.side is not None and facts.config.alpha is None:
        skipped.append(SkipReason("side information", "", 'nothing reads it: give alpha, or method="tosa"'))
    unplaced = [_unplaced(block, facts) for block in blocks]
    skipped += filter(None, unplaced)
    return _in_turn([block for block, why in zip(blocks, unplaced, strict=True) if why is None], facts), skipped


def _as_heads(block: Block, other: Block, facts: Facts) -> bool:
    """Whether two attentions that merge at one place do so as heads of one: the same tokens in the same samples, and
    as many features to compare them by."""
    alike = [(b.tokens, b.sample, b.parts, b.crossed, b.alone, _width(b, facts)) for b in (block, other)]
    return alike[0] == alike[1] and not block.operands


def _width(block: Block, facts: Facts) -> int:
    """How many features of each head the tokens of a block are compared by; 0 where it is the stream."""
    metric, made = str(facts.config.metric), block.projected
    if made is not None or block.branch:
        return made.width[0] if made is not None else 0
    named = block.site.compared(metric) if metric in ("key", "query", "value") else None
    return prod(size_hint(named.node.meta["val"].shape[d]) for d in named.features) if named is not None else 0


def _in_turn(blocks: list[Block], facts: Facts) -> list[Block]:
    """The blocks with their place in a schedule. It counts along a chain of sites, each computed from the one before: a
    model that is called twice in a graph, or two towers, go through it once each."""
    sites = sorted({block.site for block in blocks}, key=lambda site: site.out)
    depth: dict[AttentionSite, int] = {}
    first: dict[AttentionSite, AttentionSite] = {}
    for i, site in enumerate(sites):
        last = next((s for s in reversed(sites[:i]) if facts.leads(s.out, site.out)), None)
        depth[site] = depth[last] + 1 if last else 0
        first[site] = first[last] if last else site
    longest = {root: max(depth[s] for s in sites if first[s] is root) + 1 for root in set(first.values())}
    return [
        replace(block, turn=(depth[block.site] + done, longest[first[block.site]] + done))
        for block in blocks
        for done in [(before(facts, block.tokens) or Before()).blocks or 0]
    ]


def _unplaced(block: Block, facts: Facts) -> SkipReason | None:
    """Why special tokens between the others would not stay alone, or pieces would lack what they read."""
    config = facts.config
    if block.special.lost:
        why = "tokens that never merge stand between others, and their number is dynamic: compile for one size"
    elif block.special.inner and not (config.sided or config.padded):
        why = f"{config.choices} may pair special tokens that stand between others"
    elif (side := facts.side) is not None and config.alpha is not None and not side_fits(facts, block):
        grid, given = grid_of(facts, block.tokens), list(side.meta["val"].shape)
        why = f"{given} numbers do not fit its tokens, {' x '.join(map(str, grid.sizes))} of each sample"
        return SkipReason("side information", block.name, why)
    elif config.needs & PAID and not all(_attends(own, facts) for own in block.heads):
        why = f"importance={config.importance!r} reads the attention of tokens before they merge, "
        why += "and these merge before it" if block.branch else "and this one is no plain softmax of one sequence"
        return SkipReason("no attention to read", block.name, why)
    elif "change" in config.needs and (block.branch or block.mlp or not block.alone):
        why = f"importance={config.importance!r} reads what the block added to the stream, "
        why += "and these merge before it" if block.branch or block.mlp else "and these are a part of the stream"
        return SkipReason("no change to read", block.name, why)
    else:
        return None
    return SkipReason("special tokens", block.name, why)


def _attends(block: Block, facts: Facts) -> bool:
    """Whether a block merges after a fused attention of all its tokens."""
    site = block.site
    whole = site.q.axis(facts) == site.k.axis(facts) == leaves(block.tokens) and block.alone
    return site.fused and whole and not (block.branch or block.mlp) and facts.leads(site.out, block.merge)


def _block(site: AttentionSite, facts: Facts) -> Block:
    """The block of a site. Raises _Left."""
    placement, keys = facts.config.placement, site.k.axis(facts)
    queries = _without_heads(site.q.axis(facts), keys, facts)
    crossed = keys != queries
    tokens = queries if crossed else keys
    streams = [] if placement == "branch" else _joined(site, facts, queries)
    if facts.features & {*keys, *queries}:
        if _mixed(site, facts):
            raise _Left("mixed tokens", MIXED)
        raise _Left("attention over channels", "its keys are features, which a weight made")
    # Without a softmax nothing shows whether chunk after chunk is read in causal order.
    if not tokens or (crossed and not streams and (placement == "stream" or not site.softmax)):
        raise _Left("cross attention", "queries and keys are different tokens")
    if not streams and (site.q if crossed else site.k).node in facts.constant:
        raise _Left("tokens of no input", "its tokens depend on no input: they are weights")
    why = site.causal if not site.masked or crossed or placement == "stream" else None
    if why := why or (_only_causal(facts, tokens) if crossed else None):
        raise _Left("causal or windowed mask", why)
    if streams:
        return _longest(site, facts, streams)
    if placement != "branch" and not crossed and (part := _part(site, facts, tokens)):
        return part
    return _placed(site, facts, tokens, _place(site, facts, tokens))


def _mixed(site: AttentionSite, facts: Facts) -> bool:
    """Whether the axis of the keys, or of the queries, was there before the last weight on its way: one before it mixes
    tokens."""
    reach, own = facts.reach, site.k if facts.features & {*site.k.axis(facts)} else site.q
    axis = {*own.axis(facts)} & facts.features
    for node in reversed(reach.nodes[: reach.index[own.node] + 1]):
        call, rule = facts.calls.get(node), find(facts.calls[node]) if node in facts.calls else None
        if call is None or not isinstance(rule, (Contraction, Convolution)) or not reach.leads(node, own.node):
            continue
        if any(n in facts.constant for n in call.nodes):
            above = [n for n in call.nodes if n not in facts.constant]
            return bool(above) and axis <= facts.leaves_of(above[0]) - rule.summed(call, facts)
    return False


def _without_heads(queries: Dim, keys: Dim, facts: Facts) -> Dim:
    """The axis of the queries less the heads that are folded into it, where the keys have one head for all."""
    apart = set(queries) - set(keys)
    return keys if keys and apart <= facts.features and tuple(x for x in queries if x in keys) == keys else queries


def _only_causal(facts: Facts, tokens: Dim) -> str | None:
    """Why the queries of cross attention must not merge: they are a decoder's, and see each other in causal order."""
    own = [site for site in facts.sites if site.q.axis(facts) == site.k.axis(facts) == tokens]
    if own and all(site.causal is not None for site in own):
        return f"its tokens are those of {own[0].name}: {own[0].causal}"
    return None


# -- one stream --------------------------------------------------------------------------------------------------------


def _place(site: AttentionSite, facts: Facts, tokens: Dim) -> Spot:
    """Where to merge. Raises _Left."""
    placement = facts.config.placement
    crossed = site.k.axis(facts) != tokens
    if placement != "branch" and pooled(site, facts, tokens):
        raise _Left("pooled tokens", "its queries are pooled from the tokens for this attention alone")
    found: Spot | SkipReason | None = None
    if placement != "branch" and not crossed:
        found = merge_point(site, facts, tokens)
    if isinstance(found, Spot):
        return found
    if found is not None and placement == "stream":
        raise _unplaceable(found, site, facts, tokens)
    return _around(site, facts, tokens)


def branch_instead(block: Block, facts: Facts) -> Block | None:
    """A block on the stream as a branch around its attention; None where that is not possible."""
    if block.branch or block.beside or not block.alone or block.site.k.axis(facts) != leaves(block.tokens):
        return None
    try:
        found = _placed(block.site, facts, block.tokens, _around(block.site, facts, block.tokens))
    except _Left:
        return None
    return None if found.parts is not None or _unplaced(found, facts) else replace(found, turn=block.turn)


def _unplaceable(why: SkipReason, site: AttentionSite, facts: Facts, tokens: Dim) -> _Left:
    cut = site.masked and any(parts for parts in facts.joined(tokens))
    return _Left(why.kind, UNCUT if cut and why.kind == "no residual add" else why.detail)


def _around(site: AttentionSite, facts: Facts, tokens: Dim) -> Spot:
    """Where to merge around one attention. Raises _Left."""
    crossed, found = site.k.axis(facts) != tokens, branch_point(site, facts, tokens)
    if isinstance(found, Spot):
        return found
    if facts.config.placement == "stream" or not site.fused or (not crossed and site.q.axis(facts) != tokens):
        raise _unplaceable(found, site, facts, tokens)
    if crossed:
        return Spot(merge=site.out, stream=site.q.node, branch=True, operands=((0, site.q.tokens),))
    operands = tuple((i, val.dim() - 2) for i, val in enumerate(facts.calls[site.out].vals[:3]))
    return Spot(merge=site.out, stream=site.k.node, branch=True, operands=operands)


def _placed(site: AttentionSite, facts: Facts, tokens: Dim, spot: Spot) -> Block:
    """The block of tokens for which there is a place to merge. Raises _Left where a mask keeps them apart."""
    crossed = site.k.axis(facts) != tokens
    own = site.q if crossed else site.k
    sample = _sample(site, facts, tokens, spot.stream if spot.operands else spot.merge)
    kept = special(facts, tokens)
    if short := unfit(site, size_of(tokens), kept.count):
        raise _Left(short.kind, short.detail)
    block = Block(site=site, tokens=tokens, sample=sample, spot=spot, special=kept, crossed=crossed,
                  length=own.node.meta["val"].shape[own.tokens])  # fmt: skip
    pairs = _pair_mask(block, facts)
    if pairs is None and site.causal is not None:  # told apart in a way that names no axis of tokens
        raise _Left("causal or windowed mask", site.causal)
    masks = _key_masks(block, facts)
    if not site.softmax and told_before(site.out, facts, tokens):
        why = "a mask tells its tokens apart, and it has no softmax that the mask could leave them out of"
        raise _Left("unclear mask", why)
    parts, room = pairs or (None, ())
    return replace(block, masks=masks, parts=parts, room=room, projected=_projected(block, facts))


def _projected(block: Block, facts: Facts) -> Projection | None:
    """What makes the metric of a block whose tokens merge before the operands of its attention are there."""
    if not block.branch or block.operands:
        return None
    found = projection(block.site, str(facts.config.metric), block.crossed, block.merge, facts)
    if found is None or not holds(facts, found.node, block.tokens):
        return None
    return found if set(leaves(block.sample)) <= facts.leaves_of(found.node) else None


def _sample(site: AttentionSite, facts: Facts, tokens: Dim, node: fx.Node) -> Dim:
    """The leaves of the stream, tokens and channels apart, that the keys (crossed: the queries) share: batch, frames,
    windows."""
    crossed = site.k.axis(facts) != tokens
    source = site.q.node if crossed else site.k.node
    # Heads are features: all of them share one matching (ToMe section 3).
    keys = facts.leaves_of(source) - facts.features
    inner_dims = (source.meta["val"].dim() - 1,) if crossed else site.k.features
    inner = {leaf for d in inner_dims for leaf in leaves(facts.dims(source)[d])}
    own = [leaves(dim) for dim in facts.dims(node) if not inner & set(leaves(dim))]
    return tuple(leaf for dim in own for leaf in dim if leaf in keys and leaf not in tokens)


def _pair_mask(block: Block, facts: Facts) -> tuple[fx.Node, Room] | None:
    """A mask of pairs among the terms of the scores (see `pairs.py`): one group could hold tokens that it keeps apart.

    Returns the mask and how many tokens of each part may merge where only tokens of one part do (see `partition.py`).
    Raises _Left where nothing may.
    """
    site, tokens = block.site, block.tokens
    found: tuple[fx.Node, Room] | None = None
    if masked_by_place(site, facts):
        raise _Left("causal or windowed mask", TELLS_PAIRS)
    keys = site.k.axis(facts)
    for term in score_terms(site, facts):
        if keys != tokens and facts.pairs is not None and facts.pairs.tell(term, tokens, keys):
            raise _Left("causal or windowed mask", TELLS_PAIRS)
        pair = token_dims(term, facts, tokens)
        if len(pair) < 2 or not facts.leads(term, site.out) or not facts.per_pair(term, *pair[-2:]):
            continue
        mask = parted(term, facts, tokens, block.sample)
        if mask is None or (found is not None and not same_mask(mask[0], found[0], facts)):
            raise _Left("causal or windowed mask", tells_pairs(term, facts))
        found = mask
    if found is not None and not block.branch:
        why = 'its mask parts the stream, which merges for good (placement="branch" merges within the parts)'
        raise _Left("causal or windowed mask", why)
    if found is not None and not facts.config.sided:  # partners are counted for the paper's sides
        why = f"{facts.config.choices} may pair tokens that its mask parts"
        raise _Left("causal or windowed mask", why)
    return found


def _key_masks(block: Block, facts: Facts) -> tuple[KeyMask, ...]:
    """The masks of keys that give tokens no weight at a merge. Raises _Left where they cannot."""
    site = block.site
    if block.crossed:
        stream = stream_beside(site, facts)
        own = stream is not None and facts.leads(stream, site.k.node)
        if not own or not any(map(facts.told, score_terms(site, facts))):
            return ()
    masks = key_masks(site, facts, block.tokens, block.sample)
    if block.crossed and (isinstance(masks, str) or not masks):
        masks = "its keys are its tokens in another order, beside others, or some of them, and a mask leaves keys out"
    elif not isinstance(masks, str) and not block.crossed and any(facts.leads(block.merge, m.node) for m in masks):
        masks = "its mask of keys is computed from the tokens that would merge"
    if isinstance(masks, str):
        raise _Left("unclear mask", masks)
    return masks


def _unmasked(site: AttentionSite, facts: Facts, tokens: Dim) -> bool:
    """Whether no mask tells the tokens of an attention apart, or leaves any out."""
    if site.causal is not None or site.masked or score_terms(site, facts) or masked_by_place(site, facts):
        return False
    return site.softmax or not told_before(site.out, facts, tokens)


# -- joined streams ----------------------------------------------------------------------------------------------------


def _joined(site: AttentionSite, facts: Facts, queries: Dim) -> list[tuple[Spot, Dim]]:
    """Where the keys join the tokens of several streams (image and text), or those of the queries and others (learned
    keys): the merge points of these streams, in graph order.

    Each is the add of a part of the output to a stream that was joined. Under a mask, which would have to be cut, none
    but those of which it leaves all tokens in.
    """
    keys = site.k.axis(facts)
    pieces = {part for parts in facts.joined(keys) for part in parts} - {()}
    if keys != queries:
        pieces &= {queries}
    else:  # one sequence, cut into its streams
        pieces |= {leaves(part) for parts, whole in facts.rejoins if leaves(whole) == keys for part in parts}
    if pieces and not _unmasked(site, facts, keys):
        pieces = {part for part in pieces if site.causal is None and leaves_all_in(site, facts, part)}
    if not pieces:
        return []
    if isinstance(merge_point(site, facts, keys), Spot):
        return []
    first = {piece: next(filter(None, residuals(site, facts, piece)), None) for piece in pieces}
    found = [(spot, piece) for piece, spot in first.items() if spot is not None]
    return sorted(found, key=lambda stream: stream[0].merge)


def _longest(site: AttentionSite, facts: Facts, streams: list[tuple[Spot, Dim]]) -> Block:
    """The block of the longest of the streams that an attention joins. Raises _Left."""
    spot, tokens = max(streams, key=lambda found: _hint(length_of(found[0].merge, facts, found[1])))
    kept = special(facts, tokens)
    if why := unfit(site, size_of(tokens), kept.count):
        raise _Left(why.kind, why.detail)
    keys = facts.leaves_of(site.k.node)
    sample = tuple(leaf for dim in facts.dims(spot.merge) for leaf in leaves(dim) if leaf in keys)
    length = length_of(spot.merge, facts, tokens)
    return Block(site=site, tokens=tokens, sample=sample, spot=spot, special=kept, length=length)


def _hint(length: Any) -> int:
    return size_hint(length) if isinstance(length, (int, torch.SymInt)) else 0


# -- packed streams ----------------------------------------------------------------------------------------------------


def _part(site: AttentionSite, facts: Facts, tokens: Dim) -> Block | None:
    """The block of tokens that are a part of a stream and attend to themselves: an image in a pack of images. Raises
    _Left."""
    if not _unmasked(site, facts, tokens) or isinstance(merge_point(site, facts, tokens), Spot):
        return None
    for stream, start, stop in _sliced_from(tokens, facts):
        spot = merge_point(site, facts, stream)
        if not isinstance(spot, Spot):
            continue
        kept, length = special(facts, tokens), site.k.node.meta["val"].shape[site.k.tokens]
        if why := unfit(site, size_of(tokens), kept.count):
            raise _Left(why.kind, why.detail)
        symbolic = (x for x in (length, length_of(spot.merge, facts, stream)) if isinstance(x, torch.SymInt))
        held = next((x.node for x in symbolic), None)
        around = sized(start, held), sized(size_of(stream) - stop, held)
        sample = _sample(site, facts, stream, spot.merge)
        return Block(site=site, tokens=stream, sample=sample, spot=spot, special=kept, length=length, around=around)
    return None


def _sliced_from(axis: Dim, facts: Facts) -> Iterator[tuple[Dim, Any, Any]]:
    """What an axis is a slice of, from where to where, and what that is a slice of."""
    for source, start, stop in facts.cut_from(axis):
        yield source, start, stop
        yield from ((above, start + more, stop + more) for above, more, _ in _sliced_from(source, facts))


__all__ = ["branch_instead", "find_blocks"]
