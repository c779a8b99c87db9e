"""infer_axes: what a value is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.palette import compiled

N, D, H = 32, 16, 2
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03])


def angles() -> Tensor:
    """[N, 8]: a rotary table, each frequency for two features."""
    return torch.outer(torch.arange(float(N)), FREQUENCIES).repeat(1, 2)


LIKE_ANOTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # of a table [N, 8] and queries [B, H, N, 8]: the second operand gives its dtype or its shape alone
    "type_as": lambda table, q: table.type_as(q),
    "to": lambda table, q: table.to(q),
    "expand_as": lambda table, q: table.expand_as(q),
    "view_as": lambda table, q: table.reshape(2 * N, 4).view_as(q[0, 0]),
    "reshape_as": lambda table, q: table.flatten().reshape_as(q[0, 0]),
    "reshape_as, the same everywhere": lambda table, q: table.flatten().reshape_as(q.new_ones(N, 1).expand(N, 8)),
}


class Rotary(nn.Module):
    """Two blocks whose queries and keys turn with their positions. `like`: what is done to the table on its way."""

    def __init__(self, like: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.like = like
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(D, k * D) for _ in range(2)) for k in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            cos, sin = (self.like(table, q) for table in (angles().cos(), angles().sin()))
            q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("name", LIKE_ANOTHER)
def test_a_table_depends_on_nothing_that_gives_its_dtype_or_shape_alone(name: str) -> None:
    """A group then turns as its representative does: the mean of two rotations is none."""
    torch.manual_seed(0)
    plain, model = Rotary(lambda table, _: table).eval(), Rotary(LIKE_ANOTHER[name]).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, N, D)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, 8)(x), compiled(plain, 8)(x))
