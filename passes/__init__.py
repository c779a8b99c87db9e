"""The compiler short of Inductor: `run_pipeline`.

The files of this folder are the passes, one each:

| pass             | reads -> gives                                                        |
|------------------|-----------------------------------------------------------------------|
| `capture`        | Dynamo or export graph -> pre-dispatch ATen, functional               |
| `normalize`      | at the end of `capture`: every spelling of a meaning -> one form      |
| `fuse_attention` | every spelling of softmax attention -> one op                         |
| `flatten_grids`  | an MLP on a grid [B, H, W, C] -> on [B, H * W, C]                     |
| `infer_axes`     | names the axes of every value: `Facts`                                |
| `find_attention` | -> sites: queries, keys, values, with a softmax or without            |
| `find_blocks`    | site -> token axis, merge point, protected ends, masks                |
| `plan`           | schedule -> merges, and how far each of them travels                  |
| `rewrite`        | emits match, merge, unmerge, sizes: the only pass that changes values |
| `drop_unread`    | ops whose rows nobody reads -> on the rows that are read              |
| `lower`          | tome ops -> the form that is fastest on the device                    |
| `portable`       | in its place where a graph leaves Python: tome ops -> plain ATen      |
| `verify`         | what must hold of the result                                          |

Its folders are what they are made of. Each imports only from those before it:

| folder      | holds                                                                                      |
|-------------|--------------------------------------------------------------------------------------------|
| `algebra/`  | axes (dims as products of atoms) and layouts (what is merged)                              |
| `building/` | new graphs and new nodes: traced values                                                    |
| `rules/`    | how merging moves through each op; `facts.py`: what is known of a graph                    |
| `analysis/` | answers about a graph: what masks say, where tokens come from, where streams meet, costs   |
| `merging/`  | merges in the new graph: values with layouts, steps at run time, the groups of each merge  |
| `normal/`   | the parts of `capture` and `normalize`                                                     |

and, after all passes, `inner/`: what runs between AOTAutograd and Inductor. Token counts become symbols there, so that
layers are the same, and what is the same is compiled once.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from tome_fx.config import ToMeConfig
from tome_fx.report import SiteReport, SkipReason, ToMeReport

from .algebra.axes import leaves, size_of
from .analysis.blocks import Block
from .analysis.sites import no_rule
from .analysis.special import Before, before, entering, special
from .analysis.values import size_hint
from .capture import Captured, CaptureError, capture
from .drop_unread import drop_unread
from .find_attention import find_attention
from .find_blocks import find_blocks
from .flatten_grids import flatten_grids
from .fuse_attention import fuse_attention
from .infer_axes import infer_axes
from .inner.lengths import lengths_to_share
from .lower import lower
from .merging.kept import KeptError
from .plan import Merge, Plan, make_plan
from .portable import PortableError, make_portable
from .rewrite import rewrite
from .rules import find
from .rules.facts import Facts
from .rules.reduce import Softmax
from .verify import VerifyError, verify

PIPELINE = (
    "capture", "fuse_attention", "flatten_grids", "infer_axes", "find_attention", "find_blocks", "plan", "rewrite",
    "drop_unread", "lower", "verify"
)  # fmt: skip


@dataclass
class Result:
    """gm: the rewritten graph, or None where the original is to be used. captured: the IR it came from. lengths: the
    lengths that merges leave, each once; none where layers would gain nothing by sharing kernels. facts, blocks, plan:
    what the passes found in the IR."""

    gm: fx.GraphModule | None
    report: ToMeReport
    captured: Captured | None = None
    lengths: list[int] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)
    blocks: list[Block] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)

    @property
    def strange(self) -> bool:
        """Whether tokens merge of which this graph does not show where they come from, nor graphs before it do."""
        lost = any(found.alone and not merge.block.special.count for merge, found in self._made_of_entered())
        return lost or None in self._entered()

    @property
    def anew(self) -> bool:
        """Whether tokens merge of which it is not known how many blocks of the schedule they went through."""
        again = any(found.blocks != 0 for _, found in self._made_of_entered())
        return again or any(found is None or found.blocks is None for found in self._entered())

    def _made_of_entered(self) -> Iterator[tuple[Merge, Before]]:
        """Merges of tokens that were made of some that entered in another order or number, and what is known of
        those."""
        inputs = [n for n in self.facts.graph.find_nodes(op="placeholder") if self.facts.axes.get(n)]
        for merge in self.plan.every:
            if not entering(self.facts, merge.block.tokens):
                above = [n for n in inputs if self.facts.leads(n, merge.block.merge)]
                known = (before(self.facts, dim) for n in above for dim in self.facts.dims(n))
                yield from ((merge, found) for found in known if found is not None)

    def _entered(self) -> list[Before | None]:
        """What is known of each of the tokens that merge and entered the graph."""
        merged = [merge.block.tokens for merge in self.plan.every]
        return [before(self.facts, tokens) for tokens in merged if entering(self.facts, tokens)]

    def after(self, first: bool) -> dict[int, Before]:
        """What a graph after this one may know of tokens that this one gives out. first: whether tokens that enter it
        are the model's own inputs."""
        found: dict[int, Before] = {}
        outputs = [n for n in self.facts.graph.output_node().all_input_nodes if self.facts.axes.get(n)]
        for axis in dict.fromkeys(leaves(dim) for node in outputs for dim in self.facts.dims(node)):
            length, known = size_of(axis), before(self.facts, axis)
            unknown = known is None and entering(self.facts, axis) and not first
            if not axis or not isinstance(length, int) or unknown:
                continue
            alone = frozenset((~special(self.facts, axis).free(length)).nonzero().flatten().tolist())
            blocks = known.blocks if known else 0
            done = [block.turn[0] + 1 for block in self.blocks if leaves(block.tokens) == axis]
            blocks = None if blocks is None or length in found else max([*done, blocks])
            found[length] = Before(alone | found.get(length, Before()).alone, blocks)
        return found


@dataclass(frozen=True)
class Target:
    """What a graph is rewritten for. portable: to run where tome_fx is not installed, and how log sizes join the scores
    there (`make_portable`); empty: for this process. kept: its outputs stay merged (`merging/kept.py`)."""

    portable: str = ""
    kept: bool = False


@contextmanager
def no_collector() -> Iterator[None]:
    """Little of what passes make is garbage before they end, and a collection walks all that the process holds; where
    several things are timed it would fall on one of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Read:
    """A graph and what the analyses found in it up to its attention sites, the same for every schedule."""

    captured: Captured
    facts: Facts
    seconds: dict[str, float]


@no_collector()
def read_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], config: ToMeConfig, known: Mapping[int, Before] | None = None
) -> Read:
    """The passes that no schedule can change: capture once, then `run_config` for each config. config, known: as
    `run_pipeline` takes them. Raises CaptureError."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "capture"):
        captured = capture(gm, inputs)
    with _timed(seconds, "fuse_attention"):
        fuse_attention(captured.gm, captured.fake_mode)
    with _timed(seconds, "flatten_grids"):
        flatten_grids(captured.gm)
    with _timed(seconds, "infer_axes"):
        facts = infer_axes(captured.gm.graph, captured.model_input, captured.values)
    facts.config, facts.before = config, known or {}
    with _timed(seconds, "find_attention"):
        facts.sites = find_attention(facts)
    return Read(captured, facts, seconds)


def run_pipeline(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: ToMeConfig,
    known: Mapping[int, Before] | None = None,
    target: Target | None = None,
) -> Result:
    """All passes over one graph. known: of a piece of a model, what the pieces before it tell of tokens (`after`).
    target: what the graph is rewritten for, this process and whole outputs if none is given.

    Raises ValueError where the schedule does not fit, VerifyError on a bug of ours.

    A graph that cannot be captured, or in which nothing merges, gives `gm=None` and a report with the reasons.
    """
    try:
        read = read_graph(gm, inputs, config, known)
    except CaptureError as error:
        report = _new_report(config)
        report.skipped.append(SkipReason("graph left as it is", "", str(error).partition("\n\nWhile executing")[0]))
        return Result(None, report)
    return run_config(read, config, target)


def _new_report(config: ToMeConfig) -> ToMeReport:
    return ToMeReport(graphs=1, r=config.schedule if config.flops is None else None, method=config.described)


@no_collector()
def run_config(read: Read, config: ToMeConfig, target: Target | None = None) -> Result:
    """The passes after `read_graph`, for one config of many: what was read is not changed, but that its facts have this
    config from now on. Raises as `run_pipeline`."""
    target = target or Target()
    captured, facts, report = read.captured, read.facts, _new_report(config)
    seconds = report.seconds
    seconds.update(read.seconds)
    facts.use(config)
    report.unknown_ops = dict(Counter(call.op for call in facts.unknown))
    with _timed(seconds, "find_blocks"):
        blocks, skipped = find_blocks(facts)
    with _timed(seconds, "plan"):
        plan = make_plan(facts, blocks)
    report.r = plan.r
    report.skipped = skipped + plan.skipped
    report.unmerges = [u for u in plan.unmerges if u.op != "output" or not target.kept]
    report.flops_before, report.flops_after = plan.bill.before, plan.bill.after
    report.sites = _site_reports(plan, skipped)
    if not plan.merges:
        if not facts.sites:
            other = any(isinstance(find(call), Softmax) for call in facts.calls.values())
            why = "no softmax of it stands between a product of queries and keys and one with values"
            why = why if other else "no queries and keys make the weights of a sum over tokens"
            if facts.unknown:
                why += "; register_attention makes a site of an attention, if one is among: " + no_rule(facts.unknown)
            report.skipped.append(SkipReason("no attention", "", why))
        return Result(None, report, captured, facts=facts, blocks=blocks, plan=plan)
    with _timed(seconds, "rewrite"):
        rewritten = rewrite(captured, facts, plan, target.kept)
    if config.drop_unread:
        with _timed(seconds, "drop_unread"):
            report.unread_ops = drop_unread(rewritten)
        for merge in _unread_merges(rewritten, plan):
            reason = SkipReason("not read", merge.block.name, "of its tokens the model reads none that merge")
            plan.skipped.append(reason)
            report.skipped.append(reason)
        report.sites = _site_reports(plan, skipped)
    with _timed(seconds, "lower"):
        if target.portable:
            make_portable(rewritten, captured.fake_mode, target.portable)
        else:
            lower(rewritten)
    with _timed(seconds, "verify"):
        verify(captured.gm, rewritten, kept=target.kept)
    return Result(rewritten, report, captured, lengths_to_share(captured.gm, plan), facts, blocks, plan)


def _pair(merge: Merge) -> tuple[int, int]:
    return size_hint(merge.length), size_hint(merge.length - merge.r)


def _site_reports(plan: Plan, skipped: list[SkipReason]) -> list[SiteReport]:
    """One row per attention site, merged or not; one for all heads that are attentions of their own."""
    by_site = {m.block.site: m for m in plan.every if not m.block.mlp}
    mlps = {m.block.site: m for m in plan.every if m.block.mlp}
    why = {s.where: f"{s.kind}: {s.detail}" for s in (*skipped, *plan.skipped)}
    rows = []
    for site in plan.bill.sites:
        merge, mlp = by_site.get(site), mlps.get(site)
        flops = [plan.bill.at[m.step.site] for m in (merge, mlp) if m is not None]
        total = (sum(f[0] for f in flops), sum(f[1] for f in flops))
        row = partial(SiteReport, name=site.name, merged=bool(flops), flops=total, mlp=_pair(mlp) if mlp else None)
        if merge is None:
            tokens = size_hint(site.q.node.meta["val"].shape[site.q.tokens])
            placement = "mlp" if mlp is not None else "stream"
            found = row(tokens=(tokens, tokens), protected=0, skipped=why.get(site.name, ""), placement=placement)
        else:
            placement, asked = "branch" if merge.step.branch else "stream", plan.asked.get(merge.step.site)
            kept = merge.block.special.count
            led = next((m.block.name for m in plan.every if m.step is merge.groups), None)
            by = f"what {led} was" if led else merge.block.compared(str(plan.bill.facts.config.metric))
            found = row(tokens=_pair(merge), protected=kept, placement=placement, asked=asked, compared=by)
        rows.append(found)
    return rows


def _unread_merges(rewritten: fx.GraphModule, plan: Plan) -> list[Merge]:
    """Take from the plan the merges whose matching is not in the graph any more."""
    left = {node.meta.get("tome_step") for node in rewritten.graph.nodes}
    gone = [merge for merge in plan.every if (merge.groups or merge.step).site not in left]
    for merge in gone:
        plan.merges[merge.block.merge].remove(merge)
    plan.merges = {node: held for node, held in plan.merges.items() if held}
    plan.unread += gone
    return gone


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


__all__ = [
    "PIPELINE", "CaptureError", "KeptError", "PortableError", "Read", "Result", "Target", "VerifyError", "no_collector",
    "read_graph", "run_config", "run_pipeline",
]  # fmt: skip
