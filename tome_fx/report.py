"""What a compilation did: the public report, its parts, and the registry of reports."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table


class ToMeWarning(UserWarning):
    """tome_backend could not do what was asked; the message says why. The model still computes what it did."""


class ToMeError(RuntimeError):
    """With `strict=True`: what would otherwise be a ToMeWarning."""


NO_RULE = "no rule (tome_fx.register_rule gives it one)"


SCRIPTED = "TorchScript"
"""Why torch.compile hands over no graph of a module that was scripted or traced."""


def without_rule(places: Mapping[str, str]) -> str:
    """Operators without a rule, each with a place in the model where it stands, in words."""
    named = [f"{op} at {where}" if where else op for op, where in places.items()]
    return f"{', '.join(named)}, which {'has' if len(named) == 1 else 'have'} {NO_RULE}"


@dataclass(frozen=True)
class SkipReason:
    """Why something was not merged: a short kind, the place in the model or graph, and a sentence."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind} ({self.detail})" if self.where else f"{self.kind} ({self.detail})"


_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


def together(reasons: Iterable[SkipReason]) -> str:
    """Reasons in words; those of many places that are alike but for numbers are one, with the first's numbers."""
    alike: dict[tuple[str, str], list[SkipReason]] = {}
    for reason in dict.fromkeys(reasons):
        alike.setdefault((reason.kind, _NUMBER.sub("#", reason.detail)), []).append(reason)
    return "; ".join(map(_as_one, alike.values()))


def _as_one(alike: list[SkipReason]) -> str:
    first, places = alike[0], [reason.where for reason in alike if reason.where]
    where = ", ".join(places) if len(places) < 4 else f"{places[0]}, {places[1]} and {len(places) - 2} more"
    same = len({reason.detail for reason in alike}) == 1
    return str(replace(first, where=where, detail=first.detail if same else f"the first: {first.detail}"))


@dataclass(frozen=True)
class Unmerge:
    """A value that had to be brought back to full length: the op that forced it, its node, the place, and why."""

    op: str
    node: str
    where: str
    detail: str


@dataclass(frozen=True)
class SiteReport:
    """One attention site. tokens: (before, after) its merge, equal where nothing merged. flops: of the part of the
    graph between this merge and the next, per forward pass, as traced and as rewritten. placement: "stream" (merged for
    good), "branch" (merged around this attention alone) or "mlp" (merged in its MLP alone). mlp: (before, after) of the
    MLP after it, where it merges on its own because the stream keeps its length. asked: the tokens that the schedule
    asked it to merge away, where it could not merge so many (half of the free ones at most); else None. compared: what
    its tokens are compared by where that is not quite the option `metric`, in words, or of several attentions that
    merge as one; with `reuse`, whose groups it has."""

    name: str
    tokens: tuple[int, int]
    protected: int
    merged: bool
    flops: tuple[float, float] = (0.0, 0.0)
    skipped: str = ""
    placement: str = "stream"
    mlp: tuple[int, int] | None = None
    asked: int | None = None
    compared: str = ""


@dataclass
class ToMeReport:
    """What was rewritten, what was not, and why.

    graphs: how many graphs the model was traced into. attention_sites, merged_sites: counts. tokens: (before, after)
    of each merge at an attention, in order. unmerges: places where full length was restored. skipped: sites and graphs
    left as they were. flops_before, flops_after: estimated floating-point operations of one forward pass, all rows
    counted. unread_ops: ops that compute fewer rows since nobody reads the others (the last block of a model that is
    read at its class token; a merge that only they would go through is not made). seconds: time spent in each pass.
    model: the class or function that was called, where torch.compile was. compile_id: Dynamo's, of each graph. method:
    what the options stand for that are not ToMe's.
    """

    graphs: int = 0
    sites: list[SiteReport] = field(default_factory=list)
    unmerges: list[Unmerge] = field(default_factory=list)
    skipped: list[SkipReason] = field(default_factory=list)
    flops_before: float = 0.0
    flops_after: float = 0.0
    unread_ops: int = 0
    unknown_ops: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    r: Any = None
    compile_id: str = ""
    model: str = ""
    method: str = ""

    @property
    def attention_sites(self) -> int:
        return len(self.sites)

    @property
    def merged_sites(self) -> int:
        return sum(site.merged for site in self.sites)

    @property
    def merged_by_placement(self) -> dict[str, int]:
        """`merged_sites` told apart: merged for good on the "stream", around one attention ("branch"), in an "mlp"."""
        names = ("stream", "branch", "mlp")
        return {name: sum(site.merged and site.placement == name for site in self.sites) for name in names}

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return [site.tokens for site in self.sites if site.merged and site.placement != "mlp"]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, ready for JSON."""
        return {
            "graphs": self.graphs,
            "attention_sites": self.attention_sites,
            "merged_sites": self.merged_sites,
            "merged_by_placement": self.merged_by_placement,
            "tokens": [list(pair) for pair in self.tokens],
            "sites": [asdict(site) for site in self.sites],
            "unmerges": [asdict(u) for u in self.unmerges],
            "skipped": [asdict(s) for s in self.skipped],
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "unread_ops": self.unread_ops,
            "unknown_ops": self.unknown_ops,
            "seconds": self.seconds,
            "r": self.r,
            "compile_id": self.compile_id,
            "model": self.model,
            "method": self.method,
        }

    def __add__(self, other: ToMeReport) -> ToMeReport:
        """Two graphs of one model as one report."""
        seconds = {k: self.seconds.get(k, 0.0) + other.seconds.get(k, 0.0) for k in {**self.seconds, **other.seconds}}
        unknown = {
            k: self.unknown_ops.get(k, 0) + other.unknown_ops.get(k, 0)
            for k in {**self.unknown_ops, **other.unknown_ops}
        }
        return ToMeReport(
            self.graphs + other.graphs,
            self.sites + other.sites,
            self.unmerges + other.unmerges,
            self.skipped + other.skipped,
            self.flops_before + other.flops_before,
            self.flops_after + other.flops_after,
            self.unread_ops + other.unread_ops,
            unknown,
            seconds,
            self.r if self.r is not None else other.r,
            ", ".join(dict.fromkeys(filter(None, [self.compile_id, other.compile_id]))),
            self.model or other.model,
            self.method or other.method,
        )

    def summary(self) -> str:
        """One line: sites, tokens, FLOPs."""
        graphs = f"{self.graphs} graph" + "s" * (self.graphs != 1)
        if not self.merged_sites:
            why = together(self.skipped) or "no attention was found"
            if not self.graphs:
                said = f"Dynamo says {why}" if self.skipped else "TORCH_LOGS=graph_breaks says where"
                scripted = any(s.kind == SCRIPTED for s in self.skipped)
                why = f"torch.compile gave the backend no graph of it: {why}" if scripted else (
                    "torch.compile gave the backend no graph of it: it broke off before the attention, and the model "
                    f"ran as it is ({said}; nn.TransformerEncoder with a mask does so unless is_causal=True or False "
                    "is given)"
                )
            return f"nothing merged in {graphs} with {self.attention_sites} attention sites: {why}"
        chains: list[tuple[int, int, str]] = []
        for site in self.sites:
            if site.merged and site.placement == "stream":
                (start, end), name = site.tokens, site.name
                before = [c for c in chains if c[1] == start and (c[2] != name or not name)]
                if before:  # parts of one stream take turns
                    chains.remove(before[-1])
                chains.append((before[-1][0] if before else start, end, name))
        tokens = "".join(f"{start} -> {end} tokens, " for start, end in dict.fromkeys(c[:2] for c in chains))
        branches, mlps = (self.merged_by_placement[name] for name in ("branch", "mlp"))
        alone = f", {branches} of them around the attention alone" if branches else ""
        alone += f", {mlps} in the MLP alone" if mlps else ""
        share = self.flops_after / self.flops_before if self.flops_before else 1.0
        capped = sum(site.asked is not None for site in self.sites)
        alone += f", r capped in {capped}" if capped else ""
        unread = f", {self.unread_ops} ops on the rows that are read alone" if self.unread_ops else ""
        back = {u.op: u.where for u in reversed(self.unmerges) if u.detail == NO_RULE}
        unread += f"; tokens are given back before {without_rule(back)}" if back else ""
        return (
            f"{self.merged_sites} of {self.attention_sites} attention sites merged in {graphs}{alone}: "
            f"{tokens}{_flops(self.flops_before)} -> {_flops(self.flops_after)} ({share:.0%}){unread}"
        )

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=110, color_system=None)
        if self.method:
            console.print(self.method, markup=False)
        if self.sites:
            console.print(self._site_table())
        if self.unmerges:
            console.print(self._unmerge_table())
            if {u.op for u in self.unmerges} == {"output"}:
                console.print(
                    "All tokens are given back at outputs alone. If the model goes on from there, torch.compile broke "
                    "it into graphs: TORCH_LOGS=graph_breaks says where."
                )
        for reason in dict.fromkeys(self.skipped):
            if not any(site.skipped and site.name == reason.where for site in self.sites):
                console.print(f"skipped: {reason}", markup=False)
        console.print(self.summary(), markup=False)
        return buffer.getvalue().rstrip()

    def _site_table(self) -> Table:
        table = Table(title="attention sites", title_justify="left")
        for name, justify in (
            ("site", "left"),
            ("tokens", "right"),
            ("protected", "right"),
            ("FLOPs", "right"),
            ("", "left"),
        ):
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for site in self.sites:
            merged = site.tokens[0] != site.tokens[1]
            tokens = f"{site.tokens[0]} -> {site.tokens[1]}" if merged else str(site.tokens[0] or "")
            flops = f"{_flops(site.flops[0])} -> {_flops(site.flops[1])}" if site.flops[0] else ""
            note = "around this attention alone" if site.merged and site.placement == "branch" else site.skipped
            if site.compared:
                note = ", ".join(filter(None, [note, f"compared by {site.compared}"]))
            if site.asked is not None:
                capped = f"r capped: {site.tokens[0] - site.tokens[1]} instead of {site.asked}"
                note = "; ".join(filter(None, [note, capped]))
            if site.mlp is not None:
                note = "; ".join(filter(None, [note, f"MLP: {site.mlp[0]} -> {site.mlp[1]}"]))
            table.add_row(site.name, tokens, str(site.protected) if merged else "", flops, note)
        return table

    def _unmerge_table(self) -> Table:
        table = Table(title="unmerged before", title_justify="left")
        for name in ("op", "place", "why"):
            table.add_column(name, overflow="fold")
        rows = dict.fromkeys((u.op, u.where or u.node, u.detail) for u in self.unmerges)
        for row in rows:
            table.add_row(*row)
        return table


def _flops(count: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}FLOP"
    return f"{count:.0f} FLOP"


KEPT = 1000
_REPORTS: deque[tuple[Any, ToMeReport]] = deque(maxlen=KEPT)


def record(report: ToMeReport, group: Any = None) -> None:
    """Keep a report. group: what it shares with those of other graphs of its model; they are kept as one."""
    for i in range(len(_REPORTS) - 1, -1, -1) if group is not None else ():
        held, earlier = _REPORTS[i]
        if held == group:
            if report.compile_id not in earlier.compile_id.split(", "):  # else the same model, compiled anew
                _REPORTS[i] = held, earlier + report
                return
            break
    _REPORTS.append((group, report))


def reports() -> list[ToMeReport]:
    """What tome_backend compiled in this process, oldest first, the last thousand: one report for each model and each
    of its compilations (another size is one more), however many graphs torch.compile cut it into."""
    return [report for _, report in _REPORTS]


def clear_reports() -> None:
    """Forget all reports."""
    _REPORTS.clear()
