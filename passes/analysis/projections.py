"""projections: the product that makes the keys of a branch, and which rows of its weights make which head.

A branch merges before keys exist. Their mean over heads, what ToMe compares tokens by (section 3), is linear in what
the product reads, so the mean of the heads' rows of its weights makes it without making the keys:

    y [B, N, D] -> linear(y, W, b) -> view [B, N, 3, h, d] -> ... -> k [B, h, N, d]

    mean over h of k  =  y @ (mean over h of the rows of W that make k)^T + the mean of those entries of b

Which rows these are is found by doing to the numbers of the product's channels what the graph does to the channels:
views, slices, splits. A norm of each head that stands between, one op or spelled out, is done to the mean instead; what
else stands there (rotations by place) comes after what is compared.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from ..algebra.axes import Atom, count_of, leaves
from ..rules import Call, find
from ..rules.base import Letter, Role, Signature, draws
from ..rules.contraction import Attention, Contraction, Convolution
from ..rules.facts import Facts
from ..rules.signature import SignatureRule
from ..rules.slices import SelectRule, SliceRule, SplitRule
from ..rules.views import ExpandRule, PermuteRule, ViewRule
from .masks import varies_with
from .sites import AttentionSite, Operand
from .values import size_hint

aten = torch.ops.aten
_PLACING = (ViewRule, PermuteRule, ExpandRule, SliceRule, SelectRule, SplitRule)
_SAME = {aten.clone.default, aten._to_copy.default, aten.contiguous.default}
_BY_A_NUMBER = {aten.mul.Tensor, aten.div.Tensor}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Queries, keys or values of an attention as a product of what merges and weights.

    call, sig: the product. source, weight, bias: which of its operands are which. first: the channel that makes the
    first feature of the first head. heads, width: how many there are, and how many channels lie from one to the next.
    norm: the ops of a norm of each head, which is done to their mean, behind what it norms. later: what is done to the
    operand after what is compared.
    """

    call: Call
    sig: Signature
    source: int
    weight: int
    bias: int | None
    first: int = 0
    heads: tuple[int, int] = (1, 0)
    width: tuple[int, int] = (1, 1)
    norm: tuple[fx.Node, ...] = ()
    later: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """What the product reads."""
        return self.call.nodes[self.source]

    @property
    def summed(self) -> list[Letter]:
        """The letters that the product sums over, as what it reads has them."""
        return [x for x in self.sig.ins[self.source] if x is not None and self.sig.role(x) is Role.SUM]

    @property
    def apart(self) -> list[Letter]:
        """The letters of the weight that make channels, as the result has them."""
        own = self.sig.ins[self.weight]
        return [x for x in self.sig.outs[0] if x is not None and x in own]

    @property
    def reads(self) -> int:
        """How many channels the product sums over."""
        return prod(self._sizes(self.summed))

    def _sizes(self, letters: Sequence[Letter]) -> list[int]:
        own, shape = self.sig.ins[self.weight], self.call.vals[self.weight].shape
        return [shape[own.index(x)] for x in letters]

    def numbers(self) -> Tensor:
        """int64, of the shape of the product: the number of each channel. It takes no memory along all else."""
        out, shape = self.sig.outs[0], [size_hint(size) for size in self.call.node.meta["val"].shape]
        own = [size if x in self.apart else 1 for size, x in zip(shape, out, strict=True)]
        return torch.arange(prod(own)).reshape(own).expand(shape)


def projection(site: AttentionSite, metric: str, crossed: bool, merge: fx.Node, facts: Facts) -> Projection | None:
    """How the operand that a metric names comes from what merges; None where it does not by one product with weights,
    by more than passing over it once more, or where its heads are no narrower."""
    named = site.compared(metric) if metric in ("key", "query", "value") else None
    operand = site.q if crossed and named is not None else named
    if operand is None or not facts.leads(merge, operand.node):
        return None
    way = facts.reach.passages(merge, operand.node)
    products = [i for i, n in enumerate(way) if n in facts.calls and type(find(facts.calls[n])) is Contraction]
    found = _product(facts.calls[way[products[0]]], merge, facts) if products else None
    if found is None or any(map(_dear, facts.reach.between(merge, found.node)[1:])):
        return None
    with _disable_current_modes():
        found = _followed(found, way[: products[0]][::-1], operand, facts)
    return found if found is not None and found.width[0] < found.reads else None


def _product(call: Call, merge: fx.Node, facts: Facts) -> Projection | None:
    """A product of what is computed from `merge` and of weights, if it is one."""
    sources = [i for i, n in enumerate(call.nodes) if facts.leads(merge, n)]
    others = [i for i, n in enumerate(call.nodes) if n in facts.constant]
    if len(sources) != 1 or len(sources) + len(others) != len(call.nodes):
        return None
    rule = find(call)
    assert isinstance(rule, Contraction)
    sig = rule.signature(call, facts)
    summed = {x for x in sig.ins[sources[0]] if sig.role(x) is Role.SUM}
    weights, biases = ([i for i in others if bool(summed & {*sig.ins[i]}) is own] for own in (True, False))
    if len(weights) != 1 or len(biases) > 1:
        return None
    found = Projection(call=call, sig=sig, source=sources[0], weight=weights[0], bias=biases[0] if biases else None)
    shared = {*found.apart} & {*sig.ins[found.source]} or {*sig.ins[found.weight]} != {*found.summed, *found.apart}
    return None if shared or any(list(sig.ins[i]) != found.apart for i in biases) else found


def _followed(found: Projection, way: list[fx.Node], operand: Operand, facts: Facts) -> Projection | None:
    """With the channels that make each head: those that views leave when they are done to the numbers of all. way:
    what all that leads from the product to the operand passes."""
    last, state, at = found.call.node, found.numbers(), 0
    whole = last, state
    while at < len(way):
        moved = _moved(way[at], last, state, facts)
        if moved is None:
            norm = () if found.norm else _norm(last, way[at:], _features(last, found, operand, facts), facts)
            if not norm:
                found = replace(found, later=way[at])
                break
            found, at = replace(found, norm=norm), way.index(norm[-1])
        last, state, at = way[at], state if moved is None else moved, at + 1
        whole = (last, state) if isinstance(state, Tensor) else whole  # several results are no heads
    last, state = whole
    own = _features(last, found, operand, facts)
    return _by_head(found, state, last, own, facts) if state.numel() > 0 else None  # no samples have none


def _features(node: fx.Node, found: Projection, operand: Operand, facts: Facts) -> frozenset[Atom]:
    """The leaves of the features of a head in a value that an operand is made of: those of the operand, or, where what
    comes between takes them apart and joins them anew (rotations), those that the operand has nowhere else."""
    dims = [{*leaves(dim)} for dim in facts.dims(operand.node)]
    own = frozenset[Atom]().union(*(dims[d] for d in operand.features))
    others = facts.leaves_of(found.node).union(*(n for d, n in enumerate(dims) if d not in operand.features))
    held = facts.leaves_of(node)
    apart = own if own <= held else frozenset(held - others)
    return apart if prod(map(count_of, apart)) == prod(map(count_of, own)) else own


def _moved(node: fx.Node, last: fx.Node, state: Any, facts: Facts) -> Any:
    """What a node does to channels, done to their numbers; None where it does more than place them."""
    if last not in node.all_input_nodes:
        return None
    if node.target is operator.getitem:
        return state[node.args[1]]
    call = facts.calls.get(node)
    if call is not None and isinstance(find(call), _PLACING):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: state if n is last else size_hint(n.meta["val"]))
        target: Any = aten.reshape.default if node.target is aten.view.default else node.target
        return target(*args, **kwargs)
    # A number makes vectors longer and turns none.
    numeric = call is not None and node.target in _BY_A_NUMBER and call.nodes == [last]
    return state if numeric or node.target in _SAME else None


def _norm(last: fx.Node, way: list[fx.Node], own: frozenset[Atom], facts: Facts) -> tuple[fx.Node, ...]:
    """A value, and the longest that is done to each of its heads alike, if some of it sees all features of one."""
    found: tuple[fx.Node, ...] = ()
    if not own or {*leaves(facts.dims(last)[-1])} != own:
        return found
    for node in way:
        inner = facts.reach.between(last, node)
        if not all(n in facts.calls or n.target is operator.getitem for n in inner[1:]):
            break
        calls = [facts.calls[n] for n in inner[1:] if n in facts.calls]
        if not all(_each_head(call, {*inner}, own, facts) for call in calls):
            break
        whole = [*map(leaves, facts.dims(node))] == [*map(leaves, facts.dims(last))]
        if whole and any(_sees_features(call, facts) for call in calls):
            found = (*inner,)
    return found


def _each_head(call: Call, inner: set[fx.Node], own: frozenset[Atom], facts: Facts) -> bool:
    """Whether an op does the same to the features of each head, its last dim, and mixes nothing else."""
    rule, rank = find(call), max((val.dim() for val in call.vals), default=0)
    if call.target is aten.unsqueeze.default:
        return call.axis(call.args["dim"], rank + 1) == rank
    if not isinstance(rule, SignatureRule) or draws(call.target) or "size" in call.args:
        return False
    others = [n for n in call.nodes if n not in inner]  # a row stands along the features, but in a product
    if any(isinstance(rule, Contraction) or (len(facts.dims(n)) > 1 and varies_with(n, facts) - own) for n in others):
        return False
    sig = rule.signature(call, facts)
    held = [(x, dim) for letters, n in zip(sig.ins, call.nodes, strict=True) if n in inner
            for x, dim in zip(letters, facts.dims(n), strict=True)]  # fmt: skip
    return all(x is not None and (sig.role(x) is Role.MAP or {*leaves(dim)} <= own) for x, dim in held)


def _sees_features(call: Call, facts: Facts) -> bool:
    rule = find(call)
    sig = rule.signature(call, facts) if isinstance(rule, SignatureRule) else None
    return sig is not None and any(role is not Role.MAP for role in sig.roles.values())


def _by_head(
    found: Projection, state: Tensor, last: fx.Node, own: frozenset[Atom], facts: Facts
) -> Projection | None:
    """With the channels of each head in a value that has these numbers; None where they do not lie evenly. own: the
    leaves of its features."""
    dims = facts.dims(last)
    for d, dim in enumerate(dims):
        if state.stride(d) == 0 or not leaves(dim):
            state = state.narrow(d, 0, 1)
        elif prod(map(count_of, leaves(dim))) != state.shape[d]:
            return None
    atoms = [leaf for dim in dims for leaf in leaves(dim)]
    sizes = [count_of(x) if n > 1 else 1 for n, dim in zip(state.shape, dims, strict=True) for x in leaves(dim)]
    passed = facts.leaves_of(found.node) - own
    feature = [i for i, leaf in enumerate(atoms) if leaf in own]
    head = [i for i, leaf in enumerate(atoms) if leaf not in own and leaf not in passed and sizes[i] > 1]
    if not own <= {*atoms}:
        return None
    state = state.reshape(sizes)
    for i, leaf in enumerate(atoms):  # samples and tokens may stand in one dim with heads: channels are theirs alike
        state = state.narrow(i, 0, 1) if leaf in passed else state
    rest = [i for i in range(len(atoms)) if i not in (*head, *feature)]
    state = state.permute([*rest, *head, *feature])
    state = state.reshape(prod(sizes[i] for i in head), prod(sizes[i] for i in feature))
    rows, each = state.unique(dim=0, return_counts=True)
    state = rows if len(each.unique()) == 1 else state  # heads that several groups of queries share are repeated
    if not found.norm:  # in whatever order features stand
        state = state[:, state[0].argsort()]
    heads, width = state.shape
    first, far, next_ = (int(x) for x in (state[0, 0], state[min(1, heads - 1), 0], state[0, min(1, width - 1)]))
    even = first + torch.arange(heads)[:, None] * (far - first) + torch.arange(width) * (next_ - first)
    if not bool((state == even).all()):
        return None
    return replace(found, first=first, heads=(heads, far - first), width=(width, next_ - first))


def _dear(node: fx.Node) -> bool:
    """Whether to compute a value twice would cost more than to pass over it, or draw other random numbers."""
    computed = node.op == "call_function" and node.target is not operator.getitem
    return draws(node.target) or (computed and isinstance(find(Call(node)), (Contraction, Convolution, Attention)))


__all__ = ["Projection", "projection"]
