"""verify, and that inputs of a rewritten graph keep their places."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tome_fx
from tests.palette import compiled, distance
from tests.test_explain import D, N, tokens
from tome_fx.passes.verify import VerifyError, verify


class First(nn.Module):
    """Attention on the normed input itself, no residual; inputs in the order of `names`, two of them of one shape."""

    def __init__(self, names: tuple[str, ...], mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names, self.mask = names, mask
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        held = dict(zip(self.names, inputs, strict=True))
        h = self.norm(held["x"])
        gate = held["gate"].sigmoid()[..., None]
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(held["keep"]))
        return self.out(y.transpose(1, 2).flatten(2)) * gate + held["shift"].mean() * 0.1


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda keep: (1 - keep[:, None, None]) * -1e4,
    "compared": lambda keep: (keep > 0.5)[:, None, None],
    "filled": lambda keep: torch.zeros_like(keep).masked_fill(keep < 0.5, -torch.inf)[:, None, None],
    "log": lambda keep: keep[:, None, None].log(),
}


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_inputs_keep_their_places(mask: str) -> None:
    """In any order of the inputs each goes to the op that it is meant for, compiled and in the rewritten module."""
    keep = (torch.arange(N) < torch.tensor([[N], [N // 2]])).float()
    held = {"x": tokens(), "gate": torch.randn(2, N), "keep": keep, "shift": torch.randn(2, N)}
    for i, names in enumerate(permutations(held)):
        if i % 3:
            continue
        torch._dynamo.reset()
        model, args = First(names, MASKS[mask]), tuple(held[name] for name in names)
        with torch.no_grad():
            want = model(*args)
            gm = tome_fx.rewrite(model, args, r=6, placement="branch")
            assert gm.meta["tome_report"].merged_sites == 1
            assert distance(gm(*args), want) < 2e-5, names
            if i % 2:
                assert distance(compiled(model, 6, placement="branch")(*args), want) < 2e-5, names


def graph(*names: str) -> fx.GraphModule:
    made = fx.Graph()
    nodes = [made.placeholder(name) for name in names]
    for node in nodes:
        node.meta["val"] = torch.empty(2)
    made.output((nodes[0],))
    return fx.GraphModule(nn.Module(), made)


@pytest.mark.parametrize("after", [("a", "c", "b"), ("b", "a", "c"), ("a", "b"), ("a", "b", "c", "d"), ("a", "b", "x")])
def test_other_inputs_are_refused(after: tuple[str, ...]) -> None:
    verify(graph("a", "b", "c"), graph("a", "b", "c"))
    with pytest.raises(VerifyError, match="the graph had the inputs a, b, c and has"):
        verify(graph("a", "b", "c"), graph(*after))
