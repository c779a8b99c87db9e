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
from torch.utils._pytree import tree_leaves

from tome_fx import ops
from tome_fx.config import ToMeConfig, config_from
from tome_fx.explain import MatchRecorder, Source, flat_inputs
from tome_fx.methods import PIECES, How
from tome_fx.methods.how import from_key, would_go
from tome_fx.schedule import ScheduleError

OF: Mapping[str, Callable[[Tensor], Any]] = {"mean": torch.mean, "least": torch.amin, "most": torch.amax}


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "saint",
    rule: str | None = None,
    of: str = "mean",
    **config: Any,
) -> list[int]:
    """The list of r that a method's rule for counts gives on data: `tome_backend(r=calibrate(model, batches))`.

    batches: inputs of the model, a tensor or a tuple of arguments each. The model is traced once for each shape that
        batches have, and rewritten once for each block.
    rule: a name that `counts` takes: "votes" (SAINT, arXiv 2503.11549: sources with `votes` partners of at least
        `tau`), "threshold" (ALGM: sources whose best partner is at least `tau` like them), or one of your own; None:
        that of the method, "votes" for SAINT's matcher.
    of: which number of all samples: their "mean", rounded down, the "least" or the "most".
    config: the keywords of `tome_backend`, but r and flops; tau=, votes= are the numbers of the rules.

    Returns a number for each block that merges (`blocks`), along a chain of blocks: a module that is called twice is
    two chains of one list, and counts twice. Tokens that a mask of keys leaves out do not count. At most half of the
    tokens that may merge go at one block.

    Raises ValueError for an unknown rule, no batch, a model without attention, or one with several towers, which need a
    list each, and what `rewrite` raises.
    """
    settings = config_from({"r": 1, "inner": "eager", "drop_unread": False, "method": method, **config})
    named = settings.counts if settings.counts != "none" else None
    rule = rule or named or ("votes" if settings.matcher == "votes" else "threshold")
    for name, value, allowed in (("rule", rule, PIECES["counts"]), ("of", of, OF)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    held = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in batches]
    if not held:
        raise ValueError("calibrate needs at least one batch")
    # All of r go, so that nothing but what pieces read is another graph.
    options = {**config, "method": method, "drop_unread": False, "counts": rule, "least": 1.0}
    shaped = {_shapes(args): args for args in held}
    sources = {key: Source(model, args) for key, args in shaped.items()}
    found: list[int] = []
    while True:
        try:
            graphs = {key: source.rewritten({**options, "r": [*found, 1]}) for key, source in sources.items()}
        except ScheduleError:  # of several chains of blocks the longest is at its end
            if found:
                return found
            raise
        reports = [result.report for _, result in graphs.values()]
        if not any(report.sites for report in reports):
            raise ValueError(f"calibrate: {reports[0].summary()}")
        counts = [_counts(graphs[_shapes(args)][0], args, settings, (rule, len(found))) for args in held]
        found.append(int(OF[of](torch.cat(counts).double())))
        if len(found) == max(len(settings.chosen(len(report.sites))) for report in reports):
            return found


def _shapes(args: Sequence[Any]) -> tuple[Any, ...]:
    """What a graph is made for."""
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(args))


def _counts(gm: fx.GraphModule, args: Sequence[Any], settings: ToMeConfig, asked: tuple[str, int]) -> Tensor:
    """int64 [samples]: what a rule says of the tokens of the merge at one place of the list; 0 where it is not there,
    as its block cannot merge. asked: the rule, the place."""
    rule, place = asked
    recorder = MatchRecorder(gm)
    with torch.no_grad():
        recorder.run(*flat_inputs(gm, args, None), enable_io_processing=False)
    here = [(node, given) for node, given, _ in recorder.found if node.meta["tome_turn"] == place]
    names = list(dict.fromkeys(node.meta["tome_merge"] for node, _ in here))
    if len(names) > 1:
        why = f"{' and '.join(names)} are both block {place} of their chains, as the model has several towers"
        raise ValueError(f"calibrate: {why}: calibrate each as a model of its own, and compile it with its own list")
    if not here:
        return torch.zeros(1, dtype=torch.int64)
    return torch.cat([_of_match(given, settings, rule) for _, given in here])


def _of_match(given: Mapping[str, Any], settings: ToMeConfig, rule: str) -> Tensor:
    own = How(similarity=str(settings.similarity), counts=rule, numbers=settings.numbers)
    how = from_key(given["how"]) if "how" in given else own
    known = [given.get(name) for name in ("size", "attention", "place", "seen", "still", "change")]
    flags, ends = (given.get("heads", False), given.get("first", False)), (given["prefix"], given["suffix"])
    return would_go(how, ops.tokens_of(given["metric"], known, ends, flags, dict(how.numbers)))


__all__ = ["calibrate"]
