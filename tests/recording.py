"""A backend that keeps what went through it: the graph Dynamo gave, the rewritten one, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tome_fx import ToMeConfig, ToMeReport
from tome_fx.backend import transform


@dataclass
class RecordingBackend:
    config: ToMeConfig
    before: list[fx.GraphModule] = field(default_factory=list)
    after: list[fx.GraphModule | None] = field(default_factory=list)
    reports: list[ToMeReport] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten, report = transform(gm, inputs, self.config)
        self.before.append(gm)
        self.after.append(rewritten)
        self.reports.append(report)
        return (gm if rewritten is None else rewritten).forward

    def ops(self, graph: int = 0) -> Counter[str]:
        """How often each op stands in a rewritten graph, by name."""
        gm = self.after[graph]
        assert gm is not None, self.reports[graph]
        return Counter(
            n.target._schema.name.replace("::", ".")
            for n in gm.graph.nodes
            if isinstance(n.target, torch._ops.OpOverload)
        )


def record(model: torch.nn.Module, args: Sequence[Any], **config: Any) -> tuple[Any, RecordingBackend]:
    """(output, recording) of one call without gradients."""
    torch._dynamo.reset()
    backend = RecordingBackend(ToMeConfig(**config))
    with torch.no_grad():
        return torch.compile(model, backend=backend)(*args), backend
