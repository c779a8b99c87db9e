"""find_attention: the attention sites of a graph.

A site is an SDPA, a softmax over the product of two activations that could not be fused (its probabilities are read, it
has columns beside the products: attention sinks), or a sum over tokens without a softmax (`analysis/sums.py`).
It only annotates.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from .algebra.axes import Dim, leaves
from .analysis.reach import nearest
from .analysis.sites import AttentionSite, Operand, place, tells_pairs
from .analysis.sums import find_sums, place_in
from .fuse_attention import sdpa
from .rules import Call, find
from .rules.base import Role
from .rules.contraction import Contraction
from .rules.facts import Facts
from .rules.reduce import SOFTMAX


def find_attention(facts: Facts) -> list[AttentionSite]:
    """Every attention site in graph order."""
    sites: list[AttentionSite] = []
    for call in facts.calls.values():
        site = _fused_site(call, facts) if call.target is sdpa else None
        site = _open_site(call, facts) if call.target in SOFTMAX else site
        sites += [site] if site is not None else []
    sites += find_sums(facts, {site.out for site in sites})
    sites.sort(key=lambda site: site.out)
    return [site if site.name else replace(site, name=f"attention {i}") for i, site in enumerate(sites)]


def _fused_site(call: Call, facts: Facts) -> AttentionSite:
    operands = call.nodes[:3]
    ranks = [node.meta["val"].dim() for node in operands]
    q, k, v = (Operand(node, rank - 2, (rank - 1,)) for node, rank in zip(operands, ranks, strict=True))
    masked = len(call.nodes) == 4
    causal = "the attention is causal" if call.args.get("is_causal") else None
    if causal is None and masked and facts.per_pair(call.nodes[3], -2, -1):
        causal = tells_pairs(call.nodes[3], facts)
    name = place(call.node)
    return AttentionSite(name=name, q=q, k=k, v=v, out=call.node, causal=causal, fused=True, masked=masked)


def _open_site(softmax: Call, facts: Facts) -> AttentionSite | None:
    """A softmax that was not fused: its keys are the operand of the nearest product with the softmax axis."""
    whole = leaves(facts.dims(softmax.node)[softmax.axis(softmax.args["dim"])])
    for axis in _key_axes(whole, facts):
        product = _product_above(softmax.nodes[0], axis, facts)
        out = _product_below(softmax.node, axis, facts)
        if product is not None and out is not None:
            break
    else:
        return None
    spot = place_in(product.node, softmax.nodes[0], softmax.axis(softmax.args["dim"]), facts)
    found = _queries_and_keys(product, axis, spot, facts)
    if found is None:
        return None
    q, k = found
    if facts.features.issuperset(q.axis(facts)) and not facts.features & set(axis):
        return None  # keys over their sum (linear attention), and what it found is of the block before
    facts.attends.add((q.axis(facts), axis))
    v = _values(softmax.node, out, axis, facts)
    return AttentionSite(name=place(softmax.node), q=q, k=k, v=v, out=out.node)


def _key_axes(axis: Dim, facts: Facts) -> Iterator[Dim]:
    """What may be the keys of a softmax over `axis`: all of it, or a piece (attention sinks join columns that are no
    product, and are cut off again)."""
    yield from (found for found in (axis, *(part for parts in facts.joined(axis) for part in parts)) if found)


def _queries_and_keys(product: Call, axis: Dim, spot: int | None, facts: Facts) -> tuple[Operand, Operand] | None:
    """The operands of a product of which `axis` is the keys', dim `spot` of the result if that is known."""
    rule = find(product)
    assert isinstance(rule, Contraction)
    sig = rule.signature(product, facts)
    operands = list(range(len(product.nodes)))[-2:]
    holders = [(i, d) for i in operands for d, dim in enumerate(facts.dims(product.nodes[i])) if leaves(dim) == axis]
    outs = [sig.outs[0].index(sig.ins[i][d]) if sig.ins[i][d] in sig.outs[0] else -1 for i, d in holders]
    if not holders or max(outs) < 0:
        return None
    keys, key_dim = holders[outs.index(spot if spot in outs else max(outs))]
    other = next(i for i in operands if i != keys)
    # The queries' tokens are what the product keeps of the other operand alone.
    shared = {*sig.ins[keys], None}
    spots = [d for d, x in enumerate(sig.ins[other]) if x not in shared and x in sig.outs[0]]

    def operand(i: int, tokens: int) -> Operand:
        features = [d for d, x in enumerate(sig.ins[i]) if x is not None and sig.role(x) is Role.SUM]
        return Operand(product.nodes[i], tokens, tuple(features))

    return operand(other, spots[0] if spots else 0), operand(keys, key_dim)


def _values(softmax: fx.Node, out: Call, axis: Dim, facts: Facts) -> Operand | None:
    """The values of a softmax that was not fused: the operand of its product that is not made of it. Its features are
    what the other operand has not."""
    made, todo = {softmax}, [softmax]
    while todo:
        for user in todo.pop().users:
            if user not in made and user <= out.node:
                made.add(user)
                todo.append(user)
    rule = find(out)
    assert isinstance(rule, Contraction)
    sig, last = rule.signature(out, facts), range(len(out.nodes))[-2:]
    own = [i for i in last if out.nodes[i] not in made]
    if len(last) < 2 or len(own) != 1:
        return None
    (i,), (j,) = own, [j for j in last if j != own[0]]
    dims = facts.dims(out.nodes[i])
    spots = [d for d, x in enumerate(sig.ins[i]) if sig.role(x) is Role.SUM and leaves(dims[d]) == axis]
    inner = tuple(d for d, x in enumerate(sig.ins[i]) if x not in sig.ins[j])
    return Operand(out.nodes[i], spots[0], inner) if spots else None


def _product_above(node: fx.Node, axis: Dim, facts: Facts) -> Call | None:
    def onward(call: Call) -> list[fx.Node]:
        # The axis may be spread over several dims on the way (keys as rows and columns of a grid).
        return [n for n in call.nodes if set(axis) <= facts.leaves_of(n)]

    for call in nearest([node], onward, facts):
        factors = call.nodes[-2:]  # an einsum of one operand is no product
        if isinstance(find(call), Contraction) and len(factors) > 1 and not facts.constant & set(factors):
            return call
    return None


def _product_below(node: fx.Node, axis: Dim, facts: Facts) -> Call | None:
    """The product that sums over keys, or over what joins them with others."""
    axes = {axis, *(leaves(whole) for parts, whole in facts.joins if axis in map(leaves, parts))}

    def readers(node: fx.Node) -> list[fx.Node]:
        # Through the pieces of a split.
        return [n for user in node.users for n in (user.users if user.target is operator.getitem else [user])]

    for call in nearest(readers(node), lambda call: readers(call.node), facts):
        rule = find(call)
        if not isinstance(rule, Contraction):
            continue
        sig = rule.signature(call, facts)
        for source, letters in zip(call.nodes, sig.ins, strict=True):
            for dim, letter in zip(facts.dims(source), letters, strict=True):
                if letter is not None and sig.role(letter) is Role.SUM and leaves(dim) in axes:
                    return call
    return None


__all__ = ["find_attention"]
