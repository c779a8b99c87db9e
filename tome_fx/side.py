"""side: what the caller knows of each token beside the model's inputs, for methods that go by it (ToSA's depth)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tome_fx import ops  # noqa: F401 - defines the operators


class WithSide(torch.nn.Module):
    """A model that takes one number per token beside its inputs: `WithSide(model)(images, side=depth)`.

    The number of each token is compared beside its place on the grid, and merged like it: method="tosa", or any other
    with `alpha` (ToSA, arXiv 2506.20066, where it is the depth of the patch). The model does not see it.

        fast = torch.compile(tome_fx.WithSide(model), backend=tome_backend(r=16, method="tosa"))
        fast(images, side=depth)           # depth: [batch, 196], or [batch, 14, 14]

    side: floating, `[batch, n]` or `[batch, *grid]`, between 0 and 1, of the n tokens that the patch embedding makes of
    a sample, special ones left out; counted in whole `levels` (16: 0 to 1/16 is the first; what lies outside counts as
    0 or 1). Where tokens are not these n, nothing merges and the report says why. Raises TypeError where the call has
    no tensor, or side is not floating.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, side: Tensor, **kwargs: Any) -> Any:
        if not side.is_floating_point():
            raise TypeError(f"WithSide: side must be floating, numbers between 0 and 1, got {side.dtype}")
        leaves, spec = tree_flatten((args, kwargs))
        first = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor)), None)
        if first is None:
            raise TypeError("WithSide: the call has no tensor that the side information could belong to")
        leaves[first] = torch.ops.tome.with_side(leaves[first], side)
        args, kwargs = tree_unflatten(leaves, spec)
        return self.model(*args, **kwargs)


__all__ = ["WithSide"]
