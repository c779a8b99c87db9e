"""verify: what must hold of every rewritten graph. Always on: it is cheap.

The graph is well-formed; placeholders are the same in the same order; outputs have the shape, dtype and device that
they had.
That no merged value reaches an op without a rule holds by construction (`plan` unmerges before such an op).
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .algebra.axes import expr, same


class VerifyError(Exception):
    """The rewritten graph breaks an invariant: a bug in the passes. The original graph is used instead."""


def verify(before: fx.GraphModule, after: fx.GraphModule, kept: bool = False) -> None:
    """Raise VerifyError unless `after` can stand in for `before`. kept: its outputs stay merged, so that their shapes
    are others."""
    after.graph.lint()
    given, has = ([str(n.target) for n in gm.graph.find_nodes(op="placeholder")] for gm in (before, after))
    if given != has:
        raise VerifyError(f"the graph had the inputs {', '.join(given)} and has {', '.join(has)}")
    if kept:
        return
    old, new = _outputs(before), _outputs(after)
    if len(old) != len(new):
        raise VerifyError(f"the graph had {len(old)} outputs and has {len(new)}")
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            raise VerifyError(f"output {i} was {type(a).__name__} and is {type(b).__name__}")
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            _same_kind(i, a, b)


def _same_kind(i: int, a: Tensor, b: Tensor) -> None:
    # Symbols may hide that two sizes are equal; then the comparison is made with a guard.
    if a.dim() != b.dim() or not all(same(expr(x), expr(y)) or x == y for x, y in zip(a.shape, b.shape, strict=True)):
        raise VerifyError(f"output {i} had shape {tuple(a.shape)} and has {tuple(b.shape)}")
    if a.dtype != b.dtype or a.device != b.device:
        raise VerifyError(f"output {i} was {a.dtype} on {a.device} and is {b.dtype} on {b.device}")


def _outputs(gm: fx.GraphModule) -> list:
    (output,) = gm.graph.find_nodes(op="output")
    return [a.meta.get("val") if isinstance(a, fx.Node) else a for a in tree_leaves(output.args[0])]
