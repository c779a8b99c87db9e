"""sites: what an attention is to the passes, and what it is called in the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tome_fx.report import without_rule

from ..algebra.axes import Dim, leaves
from ..rules import Call
from ..rules.facts import Facts

TELLS_PAIRS = "its mask decides for each query which keys it sees"
UNKNOWN_VALUE = (
    "or may: it has a row for each of them, and only a call tells its value, which is no buffer of the model's "
    "(a mask of keys has one row for all)"
)


@dataclass(frozen=True)
class Operand:
    """One operand of a product: its node, the dim of its tokens, those of its features."""

    node: fx.Node
    tokens: int
    features: tuple[int, ...]

    def axis(self, facts: Facts) -> Dim:
        """The leaves of its tokens."""
        return leaves(facts.dims(self.node)[self.tokens])


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """Queries, keys and, if they are known, values of an attention, and its result.

    causal: why the site must not merge, or None. fused: `out` is an SDPA. masked: it has a mask. softmax: its weights
    are a softmax (see `sums.py`).
    """

    name: str
    q: Operand
    k: Operand
    v: Operand | None
    out: fx.Node
    causal: str | None = None
    fused: bool = False
    masked: bool = False
    softmax: bool = True

    def compared(self, metric: str) -> Operand | None:
        """The operand that "key", "query" or "value" names, if it is known."""
        return {"key": self.k, "query": self.q, "value": self.v}[metric]


def place(node: fx.Node) -> str:
    """Where in the model a node comes from: the innermost module path of `nn_module_stack`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    for path in reversed(paths):
        clean = _clean(path)
        if clean:
            return clean
    return ""


def no_rule(calls: Sequence[Call]) -> str:
    """Ops without a rule in the user's words, each once, and what to do about it."""
    return without_rule({call.op: place(call.node) for call in reversed(calls)})


def _clean(path: str) -> str:
    """`L['self']._modules['blocks']._modules['0'].attn`, `getattr(G['model'].blocks, '0').attn` -> `blocks.0.attn`."""
    path = re.sub(r"getattr\((.*?), '(\w+)'\)", r"\1.\2", path)
    path = re.sub(r"^[GL]\['\w+'\](\[\d+\])?|^G\.\w+", "", path)  # the variable that the model is in
    for junk in (".__dict__", "._modules", "['", "']", "self."):
        path = path.replace(junk, "." if junk in ("['",) else "")
    parts = [p for p in path.split(".") if p and p not in ("_orig_mod", "_modules")]
    return ".".join(parts)


def tells_pairs(mask: fx.Node, facts: Facts) -> str:
    """Why a mask of pairs leaves a site alone."""
    known = facts.value(mask) is not None
    return TELLS_PAIRS if known or mask not in facts.given else f"{TELLS_PAIRS}, {UNKNOWN_VALUE}"


__all__ = ["TELLS_PAIRS", "AttentionSite", "Operand", "no_rule", "place", "tells_pairs"]
