"""A model and a matcher of its own, as a user's module has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import tome_fx
from tests.models import Spec, build


@tome_fx.register_matcher("first")
def first(metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Any) -> tuple[Tensor, ...]:
    """The first r sources go to the first destination."""
    alike = similarity(metric[:, sources[:r]], metric[:, destinations[:1]])[..., 0]
    return sources[:r].expand_as(alike), destinations[:1].expand_as(alike), alike


def model() -> nn.Module:
    """37 tokens, three blocks."""
    return build(Spec())[0]
