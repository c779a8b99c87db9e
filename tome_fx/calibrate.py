"""calibrate: counts that a method takes from the data, as a list of r for a model and its data.

SAINT merges at each block as many tokens as have enough close partners, ALGM and LTMP as many as are more alike than a
threshold. A compiled graph has one length for each block. So the counts are taken once, block after block, each with
the blocks before it merging what was found for them, and become a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tome_fx import ops
from tome_fx.config import ToMeConfig, config_from
from tome_fx.explain import MatchRecorder, flat_inputs, rewritten_module
from tome_fx.methods.matcher import votes
from tome_fx.methods.partition import alternating
from tome_fx.methods.tokens import PIECES, Order, Tokens
from tome_fx.schedule import ScheduleError

RULES = ("votes", "threshold")


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "saint",
    rule: str | None = None,
    **config: Any,
) -> list[int]:
    """The list of r that a method's rule for counts gives on data: `tome_backend(r=calibrate(model, batches))`.

    batches: inputs of the model, a tensor or a tuple of arguments each, all of the same shapes.
    rule: "votes" (SAINT, arXiv 2503.11549: sources with `votes` partners of at least `tau`), or "threshold" (ALGM:
        sources whose best partner is at least `tau` like them); None: that of the method, "votes" for SAINT's matcher.
    config: the keywords of `tome_backend`, but r and flops; tau=, votes= are the numbers of the rules.

    Returns for each block that merges (`blocks`) the mean over all samples, rounded down. At most half of the tokens
    that may merge go at one block. The model is rewritten once for each block.

    Raises ValueError for an unknown rule, no batch, or a model without attention, and what `rewrite` raises.
    """
    settings = config_from({"r": 1, "inner": "eager", "drop_unread": False, "method": method, **config})
    rule = rule or ("votes" if settings.matcher == "votes" else "threshold")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    held = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in batches]
    if not held:
        raise ValueError("calibrate needs at least one batch")
    options = {**config, "method": method, "drop_unread": False}
    found: list[int] = []
    while True:
        try:
            gm, report = rewritten_module(model, held[0], None, {**options, "r": [*found, 1]})
        except ScheduleError:  # of several chains of blocks the longest is at its end
            if found:
                return found
            raise
        if not report.sites:
            raise ValueError(f"calibrate: {report.summary()}")
        counts = [_counts(gm, args, settings, rule, sum(map(bool, found))) for args in held]
        found.append(int(torch.cat(counts).double().mean()))
        if len(found) == len(settings.chosen(len(report.sites))):
            return found


def _counts(gm: fx.GraphModule, args: Sequence[Any], settings: ToMeConfig, rule: str, before: int) -> Tensor:
    """int64 [samples]: what the rule says of the tokens of the merge after `before` others in a graph; 0 where it is
    not there, as its block cannot merge."""
    recorder = MatchRecorder(gm)
    with torch.no_grad():
        recorder.run(*flat_inputs(gm, args, None), enable_io_processing=False)
    if len(recorder.found) <= before:
        return torch.zeros(1, dtype=torch.int64)
    _, given, _ = recorder.found[-1]
    metric, heads, prefix = given["metric"], given.get("heads", False), given["prefix"]
    known, flags = (None, None, None, given.get("seen")), (heads, given.get("first", False))
    tokens = ops.tokens_of(metric, known, (prefix, given["suffix"]), flags, dict(settings.numbers))
    return _RULES[rule](tokens, settings)


def _alike(tokens: Tokens, settings: ToMeConfig) -> Tensor:
    sides = alternating(tokens, Order(tokens.positions[None], tokens.first % 2), 0)
    similarity = settings.similarity if settings.similarity in ("cosine", "dot") else "cosine"
    return PIECES["similarity"][str(similarity)].run(tokens, sides.sources, sides.destinations)


def _votes(tokens: Tokens, settings: ToMeConfig) -> Tensor:
    _, count = votes(_alike(tokens, settings), tokens.numbers["tau"])
    return (count >= tokens.numbers["votes"]).sum(-1)


def _threshold(tokens: Tokens, settings: ToMeConfig) -> Tensor:
    return (_alike(tokens, settings).amax(-1) >= tokens.numbers["tau"]).sum(-1)


_RULES: Mapping[str, Callable[[Tokens, ToMeConfig], Tensor]] = {"votes": _votes, "threshold": _threshold}


__all__ = ["calibrate"]
