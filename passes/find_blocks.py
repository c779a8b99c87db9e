"""find_blocks: for every attention site the token axis, the residual stream, the merge point and the protected ends.

The merge point is the first `add` of the attention's output to a value the attention was computed from, both with
the token axis: after attention's residual, before the MLP (ToMe section 3). Where a parallel branch is added next
to it, the later add is taken.

    x1 = add(x, proj(attention(q(x), k(x), v(x))))     <- merge here, by the keys
    x2 = add(x1, mlp(norm(x1)))

Where there is no such add (windows, per-frame attention, tokens over two dims), or with `placement="branch"`, the merge
is a branch: around this attention alone, at the first value that both q and k are computed from, that the residual
stream is not computed from, and that holds the tokens in one dim. Its metric is that value itself (ToMe for Stable
Diffusion, arXiv 2303.17604, merges there).

    y  = reshape(windows of norm(x))                       <- merge here, by y itself
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

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tome_fx.config import ToMeConfig
from tome_fx.report import SkipReason

from .axes import Atom, Dim, count_of, leaves, locate, size_of
from .find_attention import TELLS_PAIRS, AttentionSite, tells_pairs
from .find_mlps import Mlp, find_mlps
from .masks import KeyMask, Room, key_masks, masked_by_place, parted, same_mask, score_terms, token_dims
from .reach import Reach
from .rules import Call, Facts, find
from .rules.base import sources
from .rules.contraction import Contraction
from .rules.pointwise import POINTWISE
from .rules.views import PermuteRule, ViewRule
from .special import Special, special
from .values import size_hint

aten = torch.ops.aten
_ADDS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor}
PAPERS = ToMeConfig().pairing
"""The matcher, partition and similarity of the paper."""
# Shorter axes (a few frames) are not merged: pairing 8 tokens by halves is not what the similarity measure is for.
SHORTEST_AXIS = 9


@dataclass(frozen=True)
class Block:
    """One place to merge.

    tokens: the leaves of the token axis. sample: the leaves along which each entry is merged on its own.
    merge: the node whose value is merged. stream: the residual operand of that add. special: tokens that never merge.
    length: tokens before any merge. branch: the merge ends where its values meet the stream; merge and stream are then
    one node. crossed: the tokens are the queries of cross attention. operands: where not the value of `merge` is merged
    but operands of it (an attention's queries, keys and values), (operand, dim) of each; `stream` is the one they are
    compared by. mlp: what merges is the MLP that reads the stream of the site.
    masks: the masks of keys, which give a token no weight. parts: the mask of pairs within whose parts tokens merge.
    room: how many of them may. turn: the sites that merge before it along its chain, and all of the chain.
    alike: of an MLP, whether tokens that its attention saw as equal are still equal.
    """

    site: AttentionSite
    tokens: Dim
    sample: Dim
    merge: fx.Node
    stream: fx.Node
    special: Special
    length: Any
    branch: bool = False
    crossed: bool = False
    operands: tuple[tuple[int, int], ...] = ()
    mlp: bool = False
    masks: tuple[KeyMask, ...] = ()
    parts: fx.Node | None = None
    room: Room = ()
    turn: tuple[int, int] = (0, 1)
    alike: bool = False

    @property
    def name(self) -> str:
        """The place in the model."""
        return f"{self.site.name} (MLP)" if self.mlp else self.site.name


MASKED = ("causal or windowed mask", "unclear mask")
"""Why a site is left alone whose mask keeps tokens apart, or may."""
Placed = tuple[fx.Node, fx.Node, bool, tuple[tuple[int, int], ...]]
"""A block's merge, stream, branch and operands."""


def find_blocks(
    gm: fx.GraphModule,
    facts: Facts,
    calls: dict[fx.Node, Call],
    sites: list[AttentionSite],
    placement: str,
    pairing: tuple[str, str, str] = PAPERS,
) -> tuple[list[Block], list[SkipReason]]:
    """The mergeable attention blocks in graph order, and why the other sites are none."""
    reach = Reach(gm.graph, facts)
    blocks: list[Block] = []
    skipped: list[SkipReason] = []
    masked: set[AttentionSite] = set()
    for site in sites:
        found = _block(site, facts, calls, sites, reach, placement, pairing)
        if isinstance(found, Block) and any(b.merge is found.merge for b in blocks):
            found = SkipReason("shared merge point", site.name, "another attention of the same block merges here")
        if isinstance(found, Block):
            blocks.append(found)
        else:
            skipped.append(found)
            masked |= {site} if found.kind in MASKED else set()
    # Once all sites are judged: one mask may part several.
    facts.parted |= {
        term for block in blocks if block.parts is not None for term in score_terms(block.site, facts, calls, reach)
    }
    if placement != "stream":
        blocks += _mlps(facts, calls, sites, blocks, reach, masked)
    skipped += [why for block in blocks if (why := _unplaced(block, pairing))]
    return _in_turn([block for block in blocks if not _unplaced(block, pairing)], reach), skipped


def _in_turn(blocks: list[Block], reach: Reach) -> list[Block]:
    """The blocks with their place in a schedule. It counts along a chain of sites, each computed from the one before: a
    model that is called twice in a graph, or two towers, go through it once each."""
    sites = sorted({block.site for block in blocks}, key=lambda site: site.out)
    depth: dict[AttentionSite, int] = {}
    first: dict[AttentionSite, AttentionSite] = {}
    for i, site in enumerate(sites):
        last = next((s for s in reversed(sites[:i]) if reach.leads(s.out, site.out)), None)
        depth[site] = depth[last] + 1 if last else 0
        first[site] = first[last] if last else site
    longest = {root: max(depth[s] for s in sites if first[s] is root) + 1 for root in set(first.values())}
    return [replace(block, turn=(depth[block.site], longest[first[block.site]])) for block in blocks]


def _mlps(
    facts: Facts,
    calls: dict[fx.Node, Call],
    sites: list[AttentionSite],
    blocks: list[Block],
    reach: Reach,
    masked: set[AttentionSite],
) -> list[Block]:
    """Blocks for the MLPs whose stream does not merge, unless the attention keeps tokens of it apart."""
    found = []
    held = {block.site: block for block in blocks}
    whole = {site for site in sites if site not in held or held[site].branch}
    for mlp in find_mlps(facts, calls, sites, whole, reach):
        block, tokens, value = held.get(mlp.site), mlp.tokens, mlp.value
        same = [site for site in sites if leaves(facts.dims(site.q)[site.query_dim]) == tokens]
        masks = block.masks if block is not None and block.tokens == tokens else ()
        if any(other.merge is mlp.merge for other in blocks) or masked & {mlp.site, *same}:
            continue
        if _cut(mlp, sites, facts, reach):
            continue
        parts, room = _same_parts([held.get(s) for s in (mlp.site, *same)], facts, tokens)
        if (
            not masks
            and parts is None
            and (
                any(_keeps_apart(s, held.get(s), facts, calls, reach, tokens) for s in (mlp.site, *same))
                or _told_before(value, facts, reach, tokens)
            )
        ):
            continue
        kept, length = special(facts, tokens), size_of(tokens)
        if _unfit(mlp.site, length, kept.count):
            continue
        size = _length(value, facts, tokens)
        rest = reach.features | mlp.features | set(tokens)
        sample = tuple(leaf for dim in facts.dims(value) for leaf in leaves(dim) if leaf not in rest)
        operands = () if mlp.entry is None else ((mlp.entry, mlp.dim),)
        alike = block is not None and not _told_after(block, value, facts, calls, reach)
        found.append(Block(mlp.site, tokens, sample, mlp.merge, value, kept, size, True, False, operands, True, masks,
                           parts, room, alike=alike))  # fmt: skip
    return found


def _same_parts(blocks: list[Block | None], facts: Facts, tokens: Dim) -> tuple[fx.Node | None, Room]:
    """The mask that parts these tokens in all of some blocks, and its room."""
    masks = [block.parts if block is not None and block.tokens == tokens else None for block in blocks]
    first, *others = masks
    if first is None or not all(mask is not None and same_mask(first, mask, facts) for mask in others):
        return None, ()
    return first, next(block.room for block in blocks if block is not None)


def _cut(mlp: Mlp, sites: list[AttentionSite], facts: Facts, reach: Reach) -> bool:
    """Whether several attentions before an MLP have the queries of some of its tokens each, and none since of all:
    sequences packed one behind the other, or chunks that see only what was before."""

    def count(node: fx.Node) -> float:
        found = 1.0
        for size, dim in zip(node.meta["val"].shape, facts.dims(node), strict=True):
            features = [leaf for leaf in leaves(dim) if leaf in reach.features]
            found *= size_hint(size) / prod(map(count_of, features)) if len(features) < len(leaves(dim)) else 1
        return found

    before = [site for site in sites if reach.leads(site.out, mlp.value)]
    own = []
    for site in reversed(before):
        if not count(site.q) < count(mlp.value):
            break
        own.append(site)
    queries = {leaves(facts.dims(site.q)[site.query_dim]) for site in own}
    return len(queries) > 1 or any(not reach.leads(b.out, a.out) for i, a in enumerate(own) for b in own[i + 1 :])


def _told_after(block: Block, value: fx.Node, facts: Facts, calls: dict[fx.Node, Call], reach: Reach) -> bool:
    """Whether something that joins between an attention and its MLP, and was not in what merged before, says of single
    tokens what the model did not compute."""
    way = reach.between(block.site.out, value)
    merged = block.stream if block.operands else block.merge
    joining = {n for node in way[1:] if node in calls for n in calls[node].nodes if not reach.leads(n, merged)}
    return any(
        (facts.told(n) or n in facts.constant) and token_dims(n, facts, block.tokens) for n in joining - set(way)
    )


def _unfit(site: AttentionSite, length: Any, kept: int) -> SkipReason | None:
    """Why nothing can merge on an axis of so many tokens, `kept` of them protected."""
    if isinstance(length, int) and length - kept < SHORTEST_AXIS:
        why = f"{length} tokens, {kept} of them protected: fewer than {SHORTEST_AXIS} to merge"
        return SkipReason("short axis", site.name, why)
    if free_unbacked_symbols(length):
        return SkipReason("unknown token count", site.name, f"only the values of an input tell its {length} tokens")
    return None


def _unplaced(block: Block, pairing: tuple[str, str, str]) -> SkipReason | None:
    """Why special tokens between the others would not stay alone."""
    if block.special.lost:
        why = "tokens that never merge stand between others, and their number is dynamic: compile for one size"
    elif block.special.inner and pairing[:2] != PAPERS[:2]:
        why = f"matcher={pairing[0]!r} with partition={pairing[1]!r} may pair special tokens that stand between others"
    else:
        return None
    return SkipReason("special tokens", block.name, why)


def _keeps_apart(
    site: AttentionSite, block: Block | None, facts: Facts, calls: dict[fx.Node, Call], reach: Reach, tokens: Dim
) -> bool:
    """Whether a mask of this attention may keep tokens of the axis apart that an MLP would merge."""
    if block is not None and block.parts is not None:
        return block.tokens == tokens
    if site.causal is not None:
        return True
    stream = _stream_beside(site, facts, reach)
    own = leaves(facts.dims(site.q)[site.query_dim]) == leaves(facts.dims(site.k)[site.key_dim])
    own |= stream is not None and reach.leads(stream, site.k)
    return own and any(
        facts.told(term) or (len(pair := token_dims(term, facts, tokens)) > 1 and facts.per_pair(term, *pair[-2:]))
        for term in score_terms(site, facts, calls, reach)
    )


def _told_before(value: fx.Node, facts: Facts, reach: Reach, tokens: Dim) -> bool:
    """Whether a mask of single tokens went into a value, in whatever way."""
    return any(
        (node.meta["val"].dtype is torch.bool or node.meta["val"].is_floating_point())
        and token_dims(node, facts, tokens)
        and not any(leaf in reach.features for dim in facts.dims(node) for leaf in leaves(dim))
        and facts.told(node)  # last: it may compute a constant
        for node in reach.nodes[: reach.index[value]]
        if isinstance(node.meta.get("val"), torch.Tensor) and node in facts.axes and reach.leads(node, value)
    )


def _block(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    sites: list[AttentionSite],
    reach: Reach,
    placement: str,
    pairing: tuple[str, str, str],
) -> Block | SkipReason:
    keys = leaves(facts.dims(site.k)[site.key_dim])
    queries = _without_heads(leaves(facts.dims(site.q)[site.query_dim]), keys, reach.features)
    crossed = keys != queries
    tokens = queries if crossed else keys
    joined = None if placement == "branch" else _joined(site, facts, calls, reach, keys, queries)
    # Without a softmax nothing shows whether chunk after chunk is read in causal order.
    if not tokens or (crossed and joined is None and (placement == "stream" or not site.softmax)):
        return SkipReason("cross attention", site.name, "queries and keys are different tokens")
    if reach.features & {*keys, *queries}:
        return SkipReason("attention over channels", site.name, "its keys are features, which a weight made")
    if joined is None and (site.q if crossed else site.k) in facts.constant:
        return SkipReason("tokens of no input", site.name, "its tokens depend on no input: they are weights")
    why = site.causal if not site.masked or crossed or placement == "stream" else None
    if why := why or (_only_causal(sites, facts, tokens) if crossed else None):
        return SkipReason("causal or windowed mask", site.name, why)
    if isinstance(joined, SkipReason):
        return joined
    if joined is not None:
        return _stream_of_its_own(site, facts, *joined)
    placed = _place(site, facts, calls, sites, reach, tokens, placement)
    return placed if isinstance(placed, SkipReason) else _placed(site, facts, calls, reach, tokens, placed, pairing)


def _placed(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    reach: Reach,
    tokens: Dim,
    placed: Placed,
    pairing: tuple[str, str, str],
) -> Block | SkipReason:
    """The block of tokens for which there is a place to merge, if no mask keeps them apart."""
    node, stream, branch, operands = placed
    crossed = leaves(facts.dims(site.k)[site.key_dim]) != tokens
    sample = _sample(site, facts, stream if operands else node, tokens, crossed, reach.features)
    kept = special(facts, tokens)
    if unfit := _unfit(site, size_of(tokens), kept.count):
        return unfit
    pairs = _pair_mask(site, facts, calls, tokens, sample, reach)
    if pairs is not None and not isinstance(pairs, str):
        pairs = _unkept(pairs[0], branch, pairing) or pairs
    if pairs is None:  # told apart in a way that names no axis of tokens
        pairs = site.causal
    if isinstance(pairs, str):
        return SkipReason("causal or windowed mask", site.name, pairs)
    beside = _stream_beside(site, facts, reach) if crossed else None
    if beside is not None and reach.leads(beside, site.k) and any(
        facts.told(term) for term in score_terms(site, facts, calls, reach)
    ):  # fmt: skip
        masks = key_masks(site, facts, calls, reach, tokens, sample)
        if isinstance(masks, str) or not masks:
            why = "its keys are its tokens in another order, beside others, or some of them, and a mask leaves keys out"
            return SkipReason("unclear mask", site.name, why)
    else:
        masks = () if crossed else _key_masks(site, facts, calls, reach, tokens, sample, node)
    if not site.softmax and _told_before(site.out, facts, reach, tokens):
        why = "a mask tells its tokens apart, and it has no softmax that the mask could leave them out of"
        return SkipReason("unclear mask", site.name, why)
    if isinstance(masks, str):
        return SkipReason("unclear mask", site.name, masks)
    value, at = (site.q, site.query_dim) if crossed else (site.k, site.key_dim)
    length = value.meta["val"].shape[at]
    parts, room = pairs or (None, ())
    return Block(site, tokens, sample, node, stream, kept, length, branch, crossed, operands, False, masks, parts, room)


def _without_heads(queries: Dim, keys: Dim, features: set[Any]) -> Dim:
    """The axis of the queries less the heads that are folded into it, where the keys have one head for all."""
    apart = set(queries) - set(keys)
    return keys if keys and apart <= features and tuple(x for x in queries if x in keys) == keys else queries


def _place(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    sites: list[AttentionSite],
    reach: Reach,
    tokens: Dim,
    placement: str,
) -> Placed | SkipReason:
    """Where to merge."""
    crossed = leaves(facts.dims(site.k)[site.key_dim]) != tokens
    if placement != "branch" and _pooled(site, facts, reach, tokens):
        why = "its queries are pooled from the tokens for this attention alone"
        return SkipReason("pooled tokens", site.name, why)
    merge = None if placement == "branch" or crossed else _merge_point(site, facts, reach, tokens)
    if merge is not None and not isinstance(merge, SkipReason):
        return *_past_parallel_branch(merge, facts, reach, sites, tokens), False, ()
    if merge is not None and placement == "stream":
        return merge
    found = _branch_point(site, facts, calls, reach, sites, tokens, crossed)
    if not isinstance(found, SkipReason):
        return *found, True, ()
    if not site.fused or (not crossed and leaves(facts.dims(site.q)[site.query_dim]) != tokens):
        return found
    if crossed:
        return site.out, site.q, True, ((0, site.query_dim),)
    return site.out, site.k, True, tuple((i, calls[site.out].vals[i].dim() - 2) for i in range(3))


def _joined(
    site: AttentionSite, facts: Facts, calls: dict[fx.Node, Call], reach: Reach, keys: Dim, queries: Dim
) -> tuple[fx.Node, fx.Node, Dim] | SkipReason | None:
    """Where the keys join the tokens of several streams (image and text), or those of the queries and others (learned
    keys): the longest stream's merge point.

    That is the add of a part of its output to a stream that was joined. Not under a mask: it would have to be cut.
    """
    pieces = {part for parts in facts.joined(keys) for part in parts} - {()}
    if keys != queries:
        pieces &= {queries}
    if not pieces or site.causal is not None or site.masked or score_terms(site, facts, calls, reach):
        return None
    if not isinstance(_merge_point(site, facts, reach, keys), SkipReason):
        return None
    found: list[tuple[fx.Node, fx.Node, Dim]] = []
    for node in reach.nodes[reach.index[site.out] + 1 :]:
        for piece in pieces if node.target in _ADDS and reach.leads(site.out, node) else ():
            stream = _residual(node, site, facts, reach, piece)
            if stream is not None and not any(piece == other for *_, other in found):
                found.append((node, stream, piece))
    longest = max(found, key=lambda place: _hint(_length(place[0], facts, place[2])), default=None)
    # The merged piece is put between whole ones of known length.
    others = [part for parts in facts.joined(keys) if longest and longest[2] in parts for part in parts]
    if longest and any(not isinstance(size_of(part), int) for part in others if part != longest[2]):
        why = "the longest of the streams that it joins stands beside others of unknown length"
        return SkipReason("joined streams", site.name, why)
    return longest


def _hint(length: Any) -> int:
    return size_hint(length) if isinstance(length, (int, torch.SymInt)) else 0


def _length(node: fx.Node, facts: Facts, tokens: Dim) -> Any:
    """How many tokens a value holds: an int or a SymInt."""
    (dim, _), *_ = locate(tokens, facts.dims(node))
    alone = leaves(facts.dims(node)[dim]) == tokens
    return node.meta["val"].shape[dim] if alone else size_of(tokens)


def _stream_of_its_own(
    site: AttentionSite, facts: Facts, node: fx.Node, stream: fx.Node, tokens: Dim
) -> Block | SkipReason:
    """The block of one of the streams that an attention joins."""
    kept, length = special(facts, tokens), size_of(tokens)
    if unfit := _unfit(site, length, kept.count):
        return unfit
    keys = {leaf for dim in facts.dims(site.k) for leaf in leaves(dim)}
    sample = tuple(leaf for dim in facts.dims(node) for leaf in leaves(dim) if leaf in keys)
    return Block(site, tokens, sample, node, stream, kept, _length(node, facts, tokens))


def _only_causal(sites: list[AttentionSite], facts: Facts, tokens: Dim) -> str | None:
    """Why the queries of cross attention must not merge: they are a decoder's, and see each other in causal order."""
    own = [site for site in sites if leaves(facts.dims(site.q)[site.query_dim]) == tokens]
    own = [site for site in own if leaves(facts.dims(site.k)[site.key_dim]) == tokens]
    if own and all(site.causal is not None for site in own):
        return f"its tokens are those of {own[0].name}: {own[0].causal}"
    return None


def _residual(node: fx.Node, site: AttentionSite, facts: Facts, reach: Reach, tokens: Dim) -> fx.Node | None:
    """The operand of an add that the attention was computed from, where the other one is the attention's output."""
    if node.target not in _ADDS or len(node.all_input_nodes) != 2:
        return None
    for branch, stream in (node.args[:2], node.args[1::-1]):
        if not isinstance(branch, fx.Node) or not isinstance(stream, fx.Node):
            return None
        if not reach.leads(site.out, branch) or reach.leads(site.out, stream):
            continue
        stream = _origin(stream, site.k, facts, reach)
        if reach.leads(stream, site.k) and _holds(facts, node, tokens) and _holds(facts, stream, tokens):
            return stream
    return None


def _origin(node: fx.Node, goal: fx.Node, facts: Facts, reach: Reach) -> fx.Node:
    """What a value is one by one the same as, or a multiple of, up to the first that `goal` is computed from."""
    while not reach.leads(node, goal) and node.op == "call_function":
        above = [n for n in sources(node, node.all_input_nodes) if n not in facts.constant]
        rule = find(Call(node))
        if len(above) != 1 or not (rule is POINTWISE or isinstance(rule, (PermuteRule, ViewRule))):
            break
        if _content(above[0], facts) != _content(node, facts):
            break
        node = above[0]
    return node


def _content(node: fx.Node, facts: Facts) -> Counter[Atom]:
    """What axes a value has, in whatever order."""
    return Counter(leaf for dims in facts.axes.get(node, ()) for dim in dims for leaf in leaves(dim))


def _holds(facts: Facts, node: fx.Node, tokens: Dim) -> bool:
    return len(locate(tokens, facts.dims(node))) == 1


def _merge_point(site: AttentionSite, facts: Facts, reach: Reach, tokens: Dim) -> tuple[fx.Node, fx.Node] | SkipReason:
    start = reach.index[site.out]
    nearest = "its output is never added to a value that it was computed from"
    for node in reach.nodes[start + 1 :]:
        if node.target not in _ADDS or not reach.leads(site.out, node):
            continue
        stream = _residual(node, site, facts, reach, tokens)
        if stream is not None:
            return node, stream
        if any(isinstance(a, fx.Node) and not reach.leads(site.out, a) and reach.leads(a, site.k) for a in node.args):
            nearest = "where its output is added its tokens do not stand in one dim of the residual stream"
            break
    return SkipReason("no residual add", site.name, nearest)


def _stream_beside(site: AttentionSite, facts: Facts, reach: Reach) -> fx.Node | None:
    """The stream that the output of a site is added to."""
    for node in reach.nodes[reach.index[site.out] + 1 :]:
        for a in node.args[:2] if node.target in _ADDS and reach.leads(site.out, node) else ():
            if isinstance(a, fx.Node) and not reach.leads(site.out, a):
                stream = _origin(a, site.q, facts, reach)
                if reach.leads(stream, site.q):
                    return stream
    return None


def _pooled(site: AttentionSite, facts: Facts, reach: Reach, tokens: Dim) -> bool:
    """Whether the queries are fewer than the tokens of the stream that they were made from: landmarks, agents."""
    stream = _stream_beside(site, facts, reach)
    if stream is None or _holds(facts, stream, tokens) or any(leaves(new) == tokens for new, *_ in facts.origins):
        return False
    own, others = (
        prod(count_of(leaf) for dim in facts.dims(node) for leaf in leaves(dim) if leaf not in reach.features)
        for node in (site.q, stream)
    )
    return own < others


def _branch_point(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    reach: Reach,
    sites: list[AttentionSite],
    tokens: Dim,
    crossed: bool,
) -> tuple[fx.Node, fx.Node] | SkipReason:
    """The highest value to merge around one attention, twice: what is merged, and the stream to compare tokens by.

    crossed: only the queries merge, so the keys must not be computed from it.
    """
    above = reach.dominators(site.q)
    shared = [n for n in above if not reach.leads(n, site.k)] if crossed else above
    if not crossed:
        keys = set(reach.dominators(site.k))
        shared = [n for n in above if n in keys]
    stream = _stream_beside(site, facts, reach)
    others = [other.out for other in sites if other is not site and reach.leads(other.out, site.q)]
    best = None
    for node in shared:
        if (stream is not None and reach.leads(node, stream)) or any(reach.leads(node, out) for out in others):
            break
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if not _holds(facts, node, tokens) or _strangers(site, facts, node, reach):
            break
        best = node
    # Without a projection on the way there is nothing to save before the attention, and keys are the better metric.
    projected = best is not None and any(
        isinstance(find(call), Contraction) and reach.leads(best, node) and reach.leads(node, site.out)
        for node, call in calls.items()
        if node is not site.out
    )
    if best is None or not projected:
        return SkipReason(
            "no branch point",
            site.name,
            "no value outside the residual stream gives its queries and keys and holds their tokens in one dim",
        )
    return best, best


def _strangers(site: AttentionSite, facts: Facts, node: fx.Node, reach: Reach) -> bool:
    """Whether a value has samples of which the attention sees one: they would all merge as that one."""
    seen = {leaf for operand in (site.q, site.k) for dim in facts.dims(operand) for leaf in leaves(dim)}
    return bool({leaf for dim in facts.dims(node) for leaf in leaves(dim)} - seen - reach.features)


def _pair_mask(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    tokens: Dim,
    sample: Dim,
    reach: Reach,
) -> tuple[fx.Node, Room] | str | None:
    """A mask of pairs among the terms of the scores (see `pairs.py`): one group could hold tokens that it keeps apart.

    Returns the mask and how many tokens of each part may merge where only tokens of one part do (see `masks.parted`),
    or why nothing may.
    """
    found: tuple[fx.Node, Room] | None = None
    if masked_by_place(site, facts, calls, reach):
        return TELLS_PAIRS
    keys = leaves(facts.dims(site.k)[site.key_dim])
    for term in score_terms(site, facts, calls, reach):
        if keys != tokens and facts.pairs is not None and facts.pairs.tell(term, tokens, keys):
            return TELLS_PAIRS
        pair = token_dims(term, facts, tokens)
        if len(pair) < 2 or not reach.leads(term, site.out):
            continue
        if not facts.per_pair(term, *pair[-2:]):
            continue
        mask = parted(term, facts, calls, tokens, sample)
        if mask is None or (found is not None and not same_mask(mask[0], found[0], facts)):
            return tells_pairs(term, facts)
        found = mask
    return found


def _unkept(mask: fx.Node, branch: bool, pairing: tuple[str, str, str]) -> str | None:
    """Why tokens do not stay in the parts that a mask cuts each window into, or None where they do."""
    if not branch:
        return 'its mask parts the stream, which merges for good (placement="branch" merges within the parts)'
    if pairing[:2] != PAPERS[:2]:  # how many have a partner in their part is counted for the paper's sides
        return f"matcher={pairing[0]!r} with partition={pairing[1]!r} may pair tokens that its mask parts"
    return None


def _key_masks(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    reach: Reach,
    tokens: Dim,
    sample: Dim,
    merge: fx.Node,
) -> tuple[KeyMask, ...] | str:
    """The masks of keys that give tokens no weight at a merge, or why they cannot."""
    masks = key_masks(site, facts, calls, reach, tokens, sample)
    late = any(reach.leads(merge, m.node) for m in masks if not isinstance(m, str))
    return "its mask of keys is computed from the tokens that would merge" if late else masks


def _past_parallel_branch(
    merge: tuple[fx.Node, fx.Node], facts: Facts, reach: Reach, sites: list[AttentionSite], tokens: Dim
) -> tuple[fx.Node, fx.Node]:
    """attention and MLP side by side: x + attention(x) + mlp(x) merges after both."""
    node, stream = merge
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _ADDS:
        return merge
    later = users[0]
    other = [a for a in later.args[:2] if a is not node]
    if len(other) != 1 or not isinstance(other[0], fx.Node) or other[0] in facts.constant:
        return merge
    if reach.leads(stream, other[0]) and not reach.leads(node, other[0]) and _holds(facts, later, tokens):
        return later, stream
    return merge


def _sample(site: AttentionSite, facts: Facts, node: fx.Node, tokens: Dim, crossed: bool, features: set[Any]) -> Dim:
    """The leaves of the stream, tokens and channels apart, that the keys (crossed: the queries) share: batch, frames,
    windows."""
    source = site.q if crossed else site.k
    # Heads are features: all of them share one matching (ToMe section 3).
    keys = {leaf for dim in facts.dims(source) for leaf in leaves(dim)} - features
    inner_dims = (source.meta["val"].dim() - 1,) if crossed else site.inner_dims
    inner = {leaf for d in inner_dims for leaf in leaves(facts.dims(source)[d])}
    found: list = []
    for dim in facts.dims(node):
        own = leaves(dim)
        if inner & set(own):
            continue
        found += [leaf for leaf in own if leaf in keys and leaf not in tokens]
    return tuple(found)


__all__ = ["Block", "find_blocks"]
