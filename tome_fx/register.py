"""Operators that are not ours: `register_rule` gives one a signature, `register_attention` makes one a merge site.

An operator without a rule gets its tokens back before it, so that a fused norm in every block undoes what merging
saves, and an attention kernel is no site at all. Both functions are called once, before the model is compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tome_fx.passes.normal.fused import expand
from tome_fx.passes.rules.base import Call, Letter, Role, Signature, register
from tome_fx.passes.rules.contraction import Contraction, parse_einsum
from tome_fx.passes.rules.facts import Facts
from tome_fx.passes.rules.signature import SignatureRule


class RuleError(ValueError):
    """A rule that was registered does not fit the tensors its operator is called with; the message says how."""


def register_rule(op: Any, signature: str, *, sum: str = "", max: str = "", mix: str = "") -> None:
    """Say how the dims of an operator's tensors correspond, so that it runs on merged tokens.

    op: an operator of torch.ops (an overload or all of a packet's), or what `torch.library.custom_op` gives.
    signature: as in `torch.einsum`, a term for each tensor argument in the order of the schema (those that a call
        leaves out are skipped) and, after `->`, for each result: "...nd,d,d->...nd". Along a letter each index is on
        its own, unless it is named below; a letter that no result has must be.
    sum: letters over which a product of its operands is summed. Merged tokens count by their size, so the operator must
        be linear in each operand that has the letter.
    max: letters over which the largest is taken.
    mix: letters along which an entry depends on others in any other way (the features of a norm). Tokens on such a dim
        are unmerged before the operator.

    Raises ValueError for a signature that does not fit the operator. Whether it fits the tensors is seen when a model
    is compiled: RuleError where a term has more or fewer letters than the tensor has dims, or one letter two sizes
    (other than 1). The rule holds for every later compilation, by the name of the operator.
    """
    targets = _overloads(op)
    terms, arrow, outs = (part.strip() for part in signature.replace(" ", "").partition("->"))
    names = {
        letter: role for letters, role in ((sum, Role.SUM), (max, Role.MAX), (mix, Role.MIX)) for letter in letters
    }
    if not arrow:
        raise ValueError(f"register_rule: the signature {signature!r} has no '->' before its results")
    for target in targets:
        own, results = _tensors(target._schema.arguments), target._schema.returns
        if len(terms.split(",")) != len(own) or len(outs.split(",")) != len(results):
            raise ValueError(
                f"register_rule: {target} takes {len(own)} tensors ({', '.join(own)}) and gives {len(results)}, the "
                f"signature {signature!r} has {len(terms.split(','))} and {len(outs.split(','))}"
            )
    strange = sorted(c for c in names if c not in terms)
    if strange:
        raise ValueError(f"register_rule: sum=, max= or mix= name {strange}, which {signature!r} does not have")
    each = [*terms.split(","), *outs.split(",")]
    twice = sorted({c for term in each for c in term if c.isalpha() and term.count(c) > 1})
    if twice:
        raise ValueError(f"register_rule: {twice} stand twice in one term of {signature!r}: give each dim a letter")
    lost = {c for c in terms if c.isalpha() and c not in outs and c not in names}
    if lost:
        raise ValueError(
            f"register_rule: {sorted(lost)} of {signature!r} are in no result: say with sum=, max= or mix= what the "
            "operator does along them"
        )

    def of(call: Call, facts: Facts) -> Signature:
        given = _given(call, terms.split(","))
        results = outs.split(",")
        ranks = [val.dim() for val in (*call.vals, *call.results)]
        full, _ = parse_einsum(",".join([*given, *results]) + "->", ranks)
        if why := _misfit(full, [val.shape for val in (*call.vals, *call.results)], mix):
            raise RuleError(f"register_rule: {call.target} does not fit its signature {signature!r}: {why}")
        ins = tuple(tuple[Letter, ...](t) for t in full[: len(given)])
        roles: dict[Letter, Role] = {letter: role for letter, role in names.items() if any(letter in t for t in full)}
        linear = frozenset(i for i, t in enumerate(ins) if set(t) & set(sum))
        return Signature(ins, tuple(tuple[Letter, ...](t) for t in full[len(given) :]), roles, linear)

    register(Contraction(of) if sum else SignatureRule(of), *targets)


def _misfit(terms: list[Any], shapes: list[torch.Size], mix: str) -> str:
    """How tensors of these shapes are not what the terms say; empty where they are. Letters that are mixed may change
    in size."""
    sizes: dict[Any, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if len(term) != len(shape):
            return f"{term!r} stands for a tensor of {len(shape)} dims, {list(shape)}"
        for letter, size in zip(term, shape, strict=True):
            fixed = isinstance(size, int) and size != 1 and letter not in mix
            if fixed and sizes.setdefault(letter, size) != size:
                return f"along {letter!r} its tensors have sizes {sizes[letter]} and {size}"
    return ""


def register_attention(
    op: Any,
    q: str = "q",
    k: str = "k",
    v: str = "v",
    *,
    layout: str = "bhnd",
    mask: str | None = None,
    causal: str | None = None,
    scale: str | None = None,
    dropout: str | None = None,
    equal: Callable[..., Any] | None = None,
) -> None:
    """Make an attention operator a merge site: it is taken for `scaled_dot_product_attention`, its equal in ATen.

    op: an operator of torch.ops, or what `torch.library.custom_op` gives.
    q, k, v, mask, causal, scale, dropout: the names of its arguments; queries, keys and values, the mask as SDPA takes
        it (bool: True is seen; or floats that are added; [.., N, M]), whether it is causal, the factor of the scores,
        and the probability of dropout. None: it has no such argument.
    layout: where batch, heads, tokens and features stand in queries, keys, values and result, as "bnhd"; heads of keys
        and values may be fewer (grouped queries).
    equal: in place of all these, a function of the same arguments, written with PyTorch's operators, that gives the
        same result.

    Where nothing merges in a graph, the operator itself runs. Raises ValueError for names that it does not have.
    """
    targets = _overloads(op)
    if sorted(layout) != sorted("bhnd"):
        raise ValueError(f"register_attention: layout must name b, h, n and d once each, as 'bnhd', not {layout!r}")
    for target in targets:
        known = [a.name for a in target._schema.arguments]
        unknown = [n for n in (q, k, v, mask, causal, scale, dropout) if n is not None and n not in known]
        if unknown and equal is None:
            raise ValueError(f"register_attention: {target} has no argument {unknown[0]!r}, but {', '.join(known)}")
        made = equal or _sdpa(target, (q, k, v), layout, mask, causal, scale, dropout)
        if target is targets[0]:
            expand(target.overloadpacket, made)
        expand(target, made)


def _sdpa(
    target: Any,
    names: Sequence[str],
    layout: str,
    mask: str | None,
    causal: str | None,
    scale: str | None,
    dropout: str | None,
) -> Callable[..., Tensor]:
    order = [layout.index(letter) for letter in "bhnd"]
    back = ["bhnd".index(letter) for letter in layout]
    schema = target._schema.arguments
    parameters = inspect.Signature(
        [
            inspect.Parameter(
                a.name,
                inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
            )
            for a in schema
        ]
    )

    def expansion(*args: Any, **kwargs: Any) -> Tensor:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        held = bound.arguments
        queries, keys, values = (held[name].permute(order) for name in names)
        heads = layout.index("h")
        out = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=held[mask] if mask else None,
            dropout_p=held[dropout] or 0.0 if dropout else 0.0,
            is_causal=bool(held[causal]) if causal else False,
            scale=held[scale] if scale else None,
            enable_gqa=held[names[0]].shape[heads] != held[names[1]].shape[heads],
        )
        return out.permute(back)

    return expansion


def _overloads(op: Any) -> list[Any]:
    """The overloads of an operator."""
    op = getattr(op, "_opoverload", op)  # of torch.library.custom_op
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [getattr(op, name) for name in op.overloads()]
    if isinstance(op, torch._ops.OpOverload):
        return [op]
    raise TypeError(f"an operator of torch.ops or of torch.library.custom_op is expected, not {op!r}")


def _tensors(arguments: Iterable[Any]) -> list[str]:
    return [a.name for a in arguments if "Tensor" in str(a.type)]


def _given(call: Call, terms: Sequence[str]) -> list[str]:
    """The terms of the tensors that a call has."""
    held = {name for (name, _), _ in call.operands}
    names = _tensors(call.target._schema.arguments)
    return [term for name, term in zip(names, terms, strict=True) if name in held]


__all__ = ["register_attention", "register_rule"]
