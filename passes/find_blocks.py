"""find_blocks: for every attention site the token axis, the residual stream, the merge point and the protected ends.

The merge point is the first `add` of the attention's output to a value the attention was computed from, both with
the token axis: after attention's residual, before the MLP (ToMe section 3). Where a parallel branch is added next
to it, the later add is taken.

    x1 = add(x, proj(attention(q(x), k(x), v(x))))     <- merge here, by the keys
    x2 = add(x1, mlp(norm(x1)))

It only annotates.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from tome_fx.report import SkipReason

from .axes import Dim, leaves, locate, size_of
from .find_attention import AttentionSite
from .rules import Call, Facts

aten = torch.ops.aten
_ADDS = {aten.add.Tensor}
# Shorter axes (a few frames) are not merged: pairing 8 tokens by halves is not what the similarity measure is for.
SHORTEST_AXIS = 9


@dataclass(frozen=True)
class Block:
    """One place to merge.

    tokens: the leaves of the token axis. sample: the leaves along which each entry is merged on its own.
    merge: the node whose value is merged. stream: the residual operand of that add. prefix, suffix: protected tokens.
    """

    site: AttentionSite
    tokens: Dim
    sample: Dim
    merge: fx.Node
    stream: fx.Node
    prefix: int
    suffix: int


def find_blocks(
    gm: fx.GraphModule, facts: Facts, calls: dict[fx.Node, Call], sites: list[AttentionSite], protect: str | int
) -> tuple[list[Block], list[SkipReason]]:
    """The mergeable self-attention blocks in graph order, and why the other sites are none."""
    reach = _Reach(gm.graph)
    blocks: list[Block] = []
    skipped: list[SkipReason] = []
    for site in sites:
        found = _block(site, facts, calls, sites, reach, protect)
        if isinstance(found, Block) and any(b.merge is found.merge for b in blocks):
            found = SkipReason("shared merge point", site.name, "another attention of the same block merges here")
        if isinstance(found, Block):
            blocks.append(found)
        else:
            skipped.append(found)
    return blocks, skipped


class _Reach:
    """Ancestors of every node as bit sets over graph order, and post-dominators on demand."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for source in node.all_input_nodes:
                bits |= self.above[self.index[source]]
            self.above.append(bits)
        self._after: dict[fx.Node, fx.Node] | None = None

    def leads(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether b is computed from a (or is a)."""
        return bool(self.above[self.index[b]] >> self.index[a] & 1)

    def after(self, node: fx.Node) -> fx.Node | None:
        """The immediate post-dominator: the first later node that every path to the output passes."""
        if self._after is None:
            graph = nx.DiGraph((user, n) for n in self.nodes for user in n.users)
            self._after = dict(nx.immediate_dominators(graph, self.nodes[-1])) if self.nodes[-1] in graph else {}
        return self._after.get(node)


def _block(
    site: AttentionSite,
    facts: Facts,
    calls: dict[fx.Node, Call],
    sites: list[AttentionSite],
    reach: _Reach,
    protect: str | int,
) -> Block | SkipReason:
    tokens = leaves(facts.dims(site.k)[site.key_dim])
    queries = leaves(facts.dims(site.q)[site.query_dim])
    if not tokens or tokens != queries:
        return SkipReason("cross attention", site.name, "queries and keys are different tokens")
    if site.causal is not None:
        return SkipReason("causal or windowed mask", site.name, site.causal)
    merge = _merge_point(site, facts, reach, tokens)
    if isinstance(merge, SkipReason):
        return merge
    node, stream = _past_parallel_branch(merge, facts, reach, sites, tokens)
    sample = _sample(site, facts, node, tokens)
    prefix, suffix = protected(facts, tokens) if protect == "auto" else (int(protect), 0)
    length = size_of(tokens)
    if isinstance(length, int) and length - prefix - suffix < SHORTEST_AXIS:
        return SkipReason(
            "short axis",
            site.name,
            f"{length} tokens, {prefix + suffix} of them protected: fewer than {SHORTEST_AXIS} to merge",
        )
    return Block(site, tokens, sample, node, stream, prefix, suffix)


def _residual(node: fx.Node, site: AttentionSite, facts: Facts, reach: _Reach, tokens: Dim) -> fx.Node | None:
    """The operand of an add that the attention was computed from, where the other one is the attention's output."""
    if node.target not in _ADDS or len(node.all_input_nodes) != 2:
        return None
    for branch, stream in (node.args[:2], node.args[1::-1]):
        if not isinstance(branch, fx.Node) or not isinstance(stream, fx.Node):
            return None
        if not reach.leads(site.out, branch) or reach.leads(site.out, stream):
            continue
        if reach.leads(stream, site.k) and _holds(facts, node, tokens) and _holds(facts, stream, tokens):
            return stream
    return None


def _holds(facts: Facts, node: fx.Node, tokens: Dim) -> bool:
    return len(locate(tokens, facts.dims(node))) == 1


def _merge_point(site: AttentionSite, facts: Facts, reach: _Reach, tokens: Dim) -> tuple[fx.Node, fx.Node] | SkipReason:
    start = reach.index[site.out]
    nearest = "its output is never added to a value that it was computed from"
    for node in reach.nodes[start + 1 :]:
        if node.target not in _ADDS or not reach.leads(site.out, node):
            continue
        stream = _residual(node, site, facts, reach, tokens)
        if stream is not None:
            return node, stream
        if any(isinstance(a, fx.Node) and not reach.leads(site.out, a) and reach.leads(a, site.k) for a in node.args):
            nearest = f"at {node.name} its tokens do not stand in one dim of the residual stream"
            break
    return SkipReason("no residual add", site.name, nearest)


def _past_parallel_branch(
    merge: tuple[fx.Node, fx.Node], facts: Facts, reach: _Reach, sites: list[AttentionSite], tokens: Dim
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


def _sample(site: AttentionSite, facts: Facts, node: fx.Node, tokens: Dim) -> Dim:
    """The leaves of the stream, tokens and channels apart, that the keys share: batch, frames, windows."""
    keys = {leaf for dim in facts.dims(site.k) for leaf in leaves(dim)}
    inner = {leaf for d in site.inner_dims for leaf in leaves(facts.dims(site.k)[d])}
    found: list = []
    for dim in facts.dims(node):
        own = leaves(dim)
        if inner & set(own):
            continue
        found += [leaf for leaf in own if leaf in keys and leaf not in tokens]
    return tuple(found)


def protected(facts: Facts, tokens: Dim) -> tuple[int, int]:
    """Protected tokens at the front and at the back: pieces that come from parameters alone, and positions read alone.

    A read of more than a quarter of the axis is no special token: it unmerges instead.
    """
    length = size_of(tokens)
    most = length // 4 if isinstance(length, int) else 64
    front = back = 0
    for axis, sizes in facts.segments:
        if leaves(axis) != tokens:
            continue
        front = max(front, _constant_run(sizes))
        back = max(back, _constant_run(sizes[::-1]))
    for axis, lead, tail in facts.cuts:
        if leaves(axis) == tokens:
            front = max(front, lead if lead <= max(most, 1) else 0)
            back = max(back, tail if tail <= max(most, 1) else 0)
    return front, back


def _constant_run(sizes: list) -> int:
    total = 0
    for size, constant in sizes:
        if not constant or not isinstance(size, int):
            break
        total += size
    return total


__all__ = ["Block", "find_blocks", "protected"]
