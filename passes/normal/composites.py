"""composites: what torch itself makes of other ops is captured as those, wherever no rule reads it whole.

    subtract -> sub    movedim -> permute    x.to(x) -> x    chunk -> split    atleast_3d -> unsqueeze
    dropout in eval -> nothing    einsum of one operand -> permute, sum
    _foreach_add(xs, ys) -> [add(x, y), ...]

AOTAutograd would take the same ops apart in the same way, later.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import Any

import torch

from ..rules.base import rule_for

aten = torch.ops.aten
_LOOPS = ("lstm", "gru", "rnn")
"""Ops that would be as many ops as a sequence has steps; those of one step are `..._cell`."""
_EACH = "_foreach_"


@functools.cache
def composites() -> dict[Any, Callable[..., Any]]:
    """What stands for each such op, as `make_fx` takes it."""
    table: dict[Any, Callable[..., Any]] = {aten.einsum.default: _einsum}
    for dropout in (aten.dropout, aten.feature_dropout, aten.alpha_dropout):
        table[dropout.default] = _dropout
    table[aten.repeat.default] = _repeat
    table[aten.contiguous.default] = aten.contiguous.default.decompose
    each = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"aten::{_EACH}")]
    for name in [*torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"), *each]:
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if space != "aten" or (any(loop in packet for loop in _LOOPS) and not packet.endswith("_cell")):
            continue
        op = getattr(getattr(aten, packet), overload or "default")
        if packet.startswith(_EACH):
            table[op] = functools.partial(_each, packet.removeprefix(_EACH))
        elif rule_for(op) is None and any("Tensor" in str(result.type) for result in op._schema.returns):
            table[op] = op.decompose
    table[aten.tensordot.default] = _tensordot
    return table


def is_composite(target: Any) -> bool:
    """Whether an operator of another library says of itself what ops it is made of, and no rule reads it whole."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "aten" or rule_for(target) is not None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def _einsum(equation: str, operands: Any, **kwargs: Any) -> Any:
    """Of one operand, permutes and sums; of more than two, one product after the other."""
    if len(operands) == 1:
        return aten.einsum.default.decompose(equation, operands, **kwargs)
    terms, arrow, out = _lettered(equation.replace(" ", ""), operands).partition("->")
    first, second, *rest = terms.split(",")
    if not rest or not arrow:
        return NotImplemented
    later = {*out, *"".join(rest)}
    kept = "".join(c for c in dict.fromkeys(first + second) if c in later)
    product = torch.einsum(f"{first},{second}->{kept}", *operands[:2])
    return torch.einsum(",".join([kept, *rest]) + f"->{out}", product, *operands[2:])


def _lettered(equation: str, operands: Any) -> str:
    """The dots of an einsum as letters, aligned at the right."""
    free = [c for c in string.ascii_letters if c not in equation]
    terms, arrow, out = equation.partition("->")
    counts = [x.dim() - len(t.replace("...", "")) for t, x in zip(terms.split(","), operands, strict=True)]
    most = "".join(free[: max(counts)])
    parts = [t.replace("...", most[len(most) - n :]) for t, n in zip(terms.split(","), counts, strict=True)]
    return ",".join(parts) + arrow + out.replace("...", most)


def _dropout(x: Any, p: float, train: bool) -> Any:
    """In eval, and at p = 0, nothing."""
    return NotImplemented if train and p else x


def _repeat(x: torch.Tensor, repeats: Any) -> Any:
    """A dim of n, repeated k times, is [k, n]."""
    shape = [*[1] * (len(repeats) - x.dim()), *x.shape]
    if any(isinstance(k, int) and k == 0 for k in repeats):
        return NotImplemented
    counts = list(zip(repeats, shape, strict=True))
    once = [isinstance(k, int) and k == 1 for k in repeats]
    before = [n for (_, size), one in zip(counts, once, strict=True) for n in ((size,) if one else (1, size))]
    after = [n for (k, size), one in zip(counts, once, strict=True) for n in ((size,) if one else (k, size))]
    whole = x.reshape(before).expand(after).clone(memory_format=torch.contiguous_format)
    return whole.reshape([k * n for k, n in counts])


def _tensordot(x: torch.Tensor, y: torch.Tensor, dims_self: Any, dims_other: Any) -> Any:
    """The einsum that it is: made of matrix products it would be views that hide what stands side by side."""
    left = list(string.ascii_letters[: x.dim()])
    right = list(string.ascii_letters[x.dim() : x.dim() + y.dim()])
    for a, b in zip(dims_self, dims_other, strict=True):
        right[b] = left[a]
    once = (c for c in left + right if (c in left) != (c in right))
    return torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(once)}", x, y)


def _each(name: str, *args: Any, **kwargs: Any) -> Any:
    """An op over lists, list element by list element."""
    first = args[0]
    rows = [[a[i] if isinstance(a, (list, tuple)) else a for a in args] for i in range(len(first))]
    found = [getattr(torch.Tensor, name)(*row, **kwargs) for row in rows]
    return None if name.endswith("_") else found


__all__ = ["composites", "is_composite"]
