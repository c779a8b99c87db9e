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
from tome_fx.passes.rules import base
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


class Stack(nn.Module):
    """Three blocks, then `head`."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, 2, D, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), head
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x.mT,
    "channels first": lambda x: x.mT.contiguous(),
    "channels first, then a map": lambda x: x.mT.contiguous() * 2,
    "tokens first": lambda x: x.transpose(0, 1).contiguous(),
    "heads first": lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2).clone(memory_format=torch.contiguous_format),
    "channels last in memory alone": lambda x: x.mT.contiguous().mT,
    "convolved": lambda x: F.conv1d(x.mT, torch.ones(4, D, 1)),
    "two of them": lambda x: torch.stack([x, x.flip(1)], 1).mT,
}


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_outputs_lie_in_memory_as_they_did(head: str) -> None:
    """So that a caller's `view` of an output goes on working."""
    model, x = Stack(HEADS[head]), tokens()
    with torch.no_grad():
        want, gm = model(x), tome_fx.rewrite(model, (x,), r=6)
        assert gm.meta["tome_report"].merged_sites == 3
        for got in (gm(x), compiled(model, 6)(x)):
            assert (got.shape, got.stride()) == (want.shape, want.stride())


@torch.library.custom_op("tome_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Of a kernel that reads memory as it lies."""
    assert x.is_contiguous(), x.stride()
    return x * 2


doubled.register_fake(torch.empty_like)


@pytest.mark.parametrize("rule", [False, True], ids=["no rule", "a rule"])
@pytest.mark.parametrize("head", ["channels first", "tokens first", "heads first"])
def test_an_operator_of_anothers_gets_what_it_was_given(head: str, rule: bool) -> None:
    letters = "abcd"[: HEADS[head](tokens()).dim()]
    if rule:
        tome_fx.register_rule(doubled, f"{letters}->{letters}")
    try:
        model, x = Stack(lambda x: doubled(HEADS[head](x)).mean(-1)), tokens()
        with torch.no_grad():
            assert compiled(model, 6)(x).shape == model(x).shape
            assert tome_fx.reports()[-1].merged_sites == 3
    finally:
        base._RULES.pop(base.op_key(torch.ops.tome_test.doubled.default), None)
