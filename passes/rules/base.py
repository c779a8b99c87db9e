"""What a rule is: how an op's dims correspond, what each correspondence does, and how to emit the op on merged values.

Most ops are described by a `Signature`, an einsum-like string of letters with a role per letter; one generic
engine (`SignatureRule`) derives axis inference, planning and emission from it. Ops that rearrange dims (views, cat,
slices) have rules of their own in `views.py` and `joins.py`.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from tome_fx.config import ToMeConfig

from ..axes import Dim, Dims, fresh, fresh_dims, leaves, unify
from ..axes import expr as size_expr
from ..layout import DimLayout, Layout, Run, Step, meet, plain
from ..trace import Traced

Letter = Hashable
Path = tuple[str, int | None]


class Role(enum.Enum):
    """What an op does along a letter, as far as merging is concerned."""

    MAP = "map"  # each index on its own
    SUM = "sum"  # a sum: weighted by size
    SOFTMAX = "softmax"  # normalised: log(size) joins the scores, the result is extensive
    NORM2 = "norm2"  # sum of squares: weighted by size
    MAX = "max"  # a maximum: unchanged
    MIX = "mix"  # anything else: needs every token


class Fill(enum.Enum):
    """How a full-length operand is brought to the merged length of its counterpart."""

    MEAN = "mean"  # as tokens merge, by default the size-weighted mean: exact for sums of values
    SHARE = "share"  # the size-weighted mean, however tokens merge: for masks, gates and weights
    COUNT = "count"  # that mean over all tokens, those a mask leaves out too: for factors of what is summed by size
    ROW = "row"  # the representative's row: for tables that depend on no input (RoPE)
    BIAS = "bias"  # log-mean-exp: for terms of the attention scores
    NONE = "none"  # cannot be merged: unmerge the counterpart


@dataclass(frozen=True)
class Signature:
    """Letters of each operand's and result's dims, a role per letter (default MAP), and how the op treats sizes.

    ins, outs: one letter per dim; None is a dim of its own that no other dim corresponds to.
    linear: operands in which the op is homogeneous of degree one, so that an extensive operand may pass.
    additive: the op is a sum of its operands, so an extensive result needs all of them extensive.
    frame: letters against which all operands broadcast, aligned at the right (None: no broadcasting).
    fills: how operand i is merged to meet its counterparts (default MEAN).
    """

    ins: tuple[tuple[Letter | None, ...], ...]
    outs: tuple[tuple[Letter | None, ...], ...]
    roles: Mapping[Letter, Role] = field(default_factory=dict)
    linear: frozenset[int] = frozenset()
    additive: bool = False
    frame: tuple[Letter, ...] | None = None
    fills: Mapping[int, Fill] = field(default_factory=dict)

    def role(self, letter: Letter) -> Role:
        return self.roles.get(letter, Role.MAP)


@dataclass(frozen=True)
class Decision:
    """What planning settled for one node: the layout each operand must be brought to, the layouts of its results,
    and why operands had to be unmerged."""

    ins: tuple[Layout, ...]
    outs: tuple[Layout, ...]
    reasons: tuple[tuple[int, str], ...] = ()


class PairMasks(Protocol):
    """What `pairs.Pairs` answers."""

    def tell(self, node: fx.Node, query: Dim, key: Dim) -> bool:
        """Whether a term of the scores rules out keys of the axis `key` for some queries of the axis `query` alone."""

    def marks(self, node: fx.Node) -> bool:
        """Whether a value that depends on no input went into a term and rules keys out."""

    def masked(self, scores: fx.Node) -> bool:
        """Whether something that `told` knows of joined these scores."""

    def value(self, node: fx.Node) -> Tensor | None:
        """The value of a node, if it is known while compiling."""


@dataclass
class Facts:
    """What the analyses know of the graph.

    axes: dims of every tensor result of every node. constant: nodes that depend on no model input. scores: nodes on
    the way to a softmax. uniform: dims along which a value is the same everywhere. decided: values that a bool tensor
    went into. given: inputs of the model, and what was made of them without a product. origins: axes that are slices:
    (axis, of which, from, to). mixed: values with entries of several origins (`provenance.py`). joins: axes that were
    concatenated, and the axis it made. channels: axes that come from a weight. cuts: reads of a part of an axis,
    (value, axis, from, to), and writes to one, (None, ...). buffers: the model's buffers. pairs: what masks say of
    pairs. attends: axes of queries and of keys whose scores stand open. protect: the option of that name. special:
    what was found of the tokens of an axis that never merge. parted: masks of pairs within whose parts alone tokens
    merge. angles: sines and cosines of positions, and what is put together from them.
    """

    axes: dict[fx.Node, tuple[Dims, ...]] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)
    scores: set[fx.Node] = field(default_factory=set)
    uniform: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    decided: set[fx.Node] = field(default_factory=set)
    given: set[fx.Node] = field(default_factory=set)
    slices: dict[tuple, Any] = field(default_factory=dict)
    origins: list[tuple[Dim, Dim, Any, Any]] = field(default_factory=list)
    mixed: dict[fx.Node, Tensor] = field(default_factory=dict)
    joins: list[tuple[list[Dim], Dim]] = field(default_factory=list)
    channels: list[Dim] = field(default_factory=list)
    cuts: list[tuple[fx.Node | None, Dim, Any, Any]] = field(default_factory=list)
    buffers: set[fx.Node] = field(default_factory=set)
    pairs: PairMasks | None = None
    attends: set[tuple[Dim, Dim]] = field(default_factory=set)
    protect: Any = "auto"
    special: dict[Dim, Any] = field(default_factory=dict)
    parted: set[fx.Node] = field(default_factory=set)
    angles: set[fx.Node] = field(default_factory=set)
    unknown: dict[str, int] = field(default_factory=dict)

    def dims(self, node: fx.Node, result: int = 0) -> Dims:
        return self.axes[node][result]

    def joined(self, axis: Dim) -> list[list[Dim]]:
        """The axes, in order, that were concatenated to this one, for each place where they were."""
        return [[leaves(part) for part in parts] for parts, whole in self.joins if leaves(whole) == leaves(axis)]

    def varies(self, node: fx.Node, d: int) -> bool:
        """Whether a value may differ along a dim."""
        val = node.meta["val"]
        d %= val.dim()
        return size_expr(val.shape[d]) != 1 and d not in self.uniform.get(node, ())

    def told(self, node: fx.Node) -> bool:
        """Whether a value says of single tokens what the caller, a comparison or a constant mask said: no model
        computed or learned it."""
        if self.pairs is not None and (self.pairs.value(node) is not None or self.pairs.marks(node)):
            return self.pairs.marks(node)
        return node in self.given or node in self.decided or node.meta["val"].dtype is torch.bool

    def per_pair(self, node: fx.Node, query: int, key: int) -> bool:
        """Whether a term of the scores is a mask of pairs (see `pairs.py`), so that no merge can keep what it says."""
        if self.pairs is None or node in self.parted or node.meta["val"].dim() < 2:
            return False
        dims = self.dims(node)
        return self.pairs.tell(node, leaves(dims[query]), leaves(dims[key]))


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """The tensor results of a node's `meta["val"]`, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(v for v in value if isinstance(v, Tensor))
    return ()


SHAPED = frozenset(getattr(torch.ops.aten, name).default for name in ("expand_as", "view_as", "reshape_as", "type_as"))
"""Ops that read only shape and dtype of their second operand."""


FILLED = frozenset(
    getattr(torch.ops.aten, f"{new}{name}{like}").default
    for name in ("full", "ones", "zeros")
    for new, like in (("", ""), ("new_", ""), ("", "_like"))
) | {torch.ops.aten.zero.default}
"""Ops that fill in one number; of an operand they have only the shape, or dtype and device."""


def sources(node: fx.Node, operands: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """Those of a node's operands whose values it reads."""
    return operands[: 1 if node.target in SHAPED else 0 if node.target in FILLED else None]


def result_read(getitem: fx.Node) -> int | None:
    """Which of the tensor results of its source a `getitem` node reads; None where it reads something else."""
    source, index = cast(Any, getitem.args)
    held = source.meta["val"]
    return sum(isinstance(v, Tensor) for v in held[:index]) if isinstance(held[index], Tensor) else None


class Call:
    """A node's call with arguments bound by schema: `args[name]`, and its tensor operands in schema order."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.target: Any = node.target
        self.args: dict[str, Any] = {}
        self.given: set[str] = set()
        if isinstance(node.target, torch._ops.OpOverload):
            self._bind(node.target._schema)
        else:
            self.args = {str(i): a for i, a in enumerate(node.args)}
        self.operands: list[tuple[Path, fx.Node]] = [
            (path, n) for path, n in self._leaves() if isinstance(n.meta.get("val"), Tensor)
        ]
        self.nodes: list[fx.Node] = [n for _, n in self.operands]
        self.rule: Rule | None = None

    def _bind(self, schema: torch.FunctionSchema) -> None:
        for i, arg in enumerate(schema.arguments):
            if i < len(self.node.args) and not arg.kwarg_only:
                self.args[arg.name] = self.node.args[i]
                self.given.add(arg.name)
            elif arg.name in self.node.kwargs:
                self.args[arg.name] = self.node.kwargs[arg.name]
                self.given.add(arg.name)
            else:
                self.args[arg.name] = arg.default_value

    def _leaves(self) -> Iterable[tuple[Path, fx.Node]]:
        for name, value in self.args.items():
            if isinstance(value, fx.Node):
                yield (name, None), value
            elif isinstance(value, (list, tuple)):
                for i, item in enumerate(value):
                    if isinstance(item, fx.Node):
                        yield (name, i), item

    @cached_property
    def vals(self) -> list[Tensor]:
        return [node.meta["val"] for node in self.nodes]

    @cached_property
    def results(self) -> tuple[Tensor, ...]:
        return tensors_of(self.node.meta.get("val"))

    @property
    def out(self) -> Tensor:
        return self.results[0]

    def index(self, name: str) -> int | None:
        """The position among the operands of the tensor argument `name`; None where it was not given."""
        return next((i for i, (path, _) in enumerate(self.operands) if path == (name, None)), None)

    def axis(self, value: int, rank: int | None = None) -> int:
        rank = self.vals[0].dim() if rank is None else rank
        return value % rank if rank else 0

    @property
    def op(self) -> str:
        return op_name(self.node)


def op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return getattr(target, "__name__", str(target))


class Emitter(Protocol):
    """What a rule may ask of the rewriter while it emits its op; `rewrite.Emitter` is the one there is."""

    facts: Facts
    config: ToMeConfig

    def run(self, call: Call, operands: Sequence[Traced], **overrides: Any) -> Any:
        """The op of a call with new tensor operands."""

    def tensor(self, node: fx.Node) -> Traced: ...

    def layout(self, node: fx.Node) -> Layout: ...

    def fetch(self, node: fx.Node, want: Layout, fill: Fill = ..., frame: Dims | None = None) -> Traced: ...

    def convert(
        self, x: Traced, dims: Dims, have: Layout, want: Layout, fill: Fill = ..., frame: Dims | None = None
    ) -> Traced: ...

    def weight(self, node: fx.Node, layout: Layout, d: int, run: Run) -> Traced: ...

    def log_weight(self, node: fx.Node, layout: Layout, d: int, run: Run) -> Traced: ...

    def full_size(self, node: fx.Node, d: int) -> Any: ...

    def summed(self, node: fx.Node, layout: Layout) -> bool:
        """Whether nothing reads the merged tokens of a value but sums over them."""

    def shape(self, node: fx.Node, layout: Layout) -> list[Any]: ...


class Rule:
    """How merging moves through one op. The defaults treat an op nobody knows: every operand whole, results anew."""

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        return tuple(fresh_dims(v.shape) for v in call.results)

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        why = tuple((i, "no rule") for i, layout in enumerate(ins) if any(layout))
        return Decision(tuple(plain(v.dim()) for v in call.vals), tuple(plain(v.dim()) for v in call.results), why)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        operands = [env.fetch(n, layout) for n, layout in zip(call.nodes, decision.ins, strict=True)]
        return env.run(call, operands)

    def flops(self, call: Call, sizes: Callable[[int, int], int]) -> float:
        """Floating-point operations (2 per multiply-add); `sizes(operand, dim)`: size now; operand -1: the result."""
        return 0.0


class SignatureRule(Rule):
    """Everything that follows from a signature."""

    def __init__(self, signature: Callable[[Call, Facts], Signature], *, contraction: bool = False) -> None:
        self.signature = signature
        self.contraction = contraction

    # -- axes ------------------------------------------------------------------------------------------------------

    def axes(self, call: Call, facts: Facts) -> tuple[Dims, ...]:
        sig = self.signature(call, facts)
        known: dict[Letter, tuple] = {}
        for node, letters, val in zip(call.nodes, sig.ins, call.vals, strict=True):
            for letter, dim, size in zip(letters, facts.dims(node), val.shape, strict=True):
                if letter is None or size_expr(size) == 1:
                    continue
                if letter not in known:
                    known[letter] = dim
                elif sig.role(letter) is not Role.MIX:
                    unify(known[letter], dim)
        out: list[Dims] = []
        for letters, val in zip(sig.outs, call.results, strict=True):
            dims: list[Dim] = []
            for letter, size in zip(letters, val.shape, strict=True):
                if size_expr(size) == 1:
                    dims.append(())
                elif letter in known and sig.role(letter) is not Role.MIX:
                    dims.append(known[letter])
                else:
                    dims.append(fresh(size_expr(size)))
                    if letter is not None and sig.role(letter) is not Role.MIX:
                        known[letter] = dims[-1]
            out.append(tuple(dims))
        return tuple(out)

    # -- planning --------------------------------------------------------------------------------------------------

    def plan(self, call: Call, ins: Sequence[Layout], facts: Facts) -> Decision:
        sig = self.signature(call, facts)
        where = _occurrences(sig, call)
        reasons: list[tuple[int, str]] = []
        target: dict[Letter, DimLayout] = {}
        for letter, places in where.items():
            runs, why = _settle(sig, call, ins, facts, letter, places)
            target[letter] = runs
            if why:
                reasons += [(i, why) for i, d in places if ins[i][d]]
        for letter, runs in list(target.items()):
            good = tuple(run for run in runs if not _sample_clash(sig, call, facts, letter, run))
            if len(good) < len(runs):
                target[letter] = good
                reasons += [(i, "mixes the samples it was merged within") for i, d in where[letter] if ins[i][d]]
        return _settle_extensive(sig, call, ins, where, target, reasons)

    # -- emission --------------------------------------------------------------------------------------------------

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        return env.run(call, self.operands(call, env, decision))

    def operands(self, call: Call, env: Emitter, decision: Decision) -> list[Traced]:
        sig = self.signature(call, env.facts)
        return [self.operand(call, env, decision, sig, i) for i in range(len(call.nodes))]

    def operand(self, call: Call, env: Emitter, decision: Decision, sig: Signature, i: int) -> Traced:
        frame = frame_dims(sig, call, env.facts) if sig.frame is not None else None
        return env.fetch(call.nodes[i], decision.ins[i], fill_of(sig, call, env.facts, i), frame)

    def flops(self, call: Call, sizes: Callable[[int, int], int]) -> float:
        if not self.contraction:
            return 0.0
        seen: dict[Letter, int] = {}
        sig = self.signature(call, Facts())
        for i, letters in enumerate(sig.ins):
            for d, letter in enumerate(letters):
                if letter is not None:
                    seen[letter] = max(seen.get(letter, 1), sizes(i, d))
        total = 2.0
        for size in seen.values():
            total *= size
        return total


def fill_of(sig: Signature, call: Call, facts: Facts, i: int) -> Fill:
    if i in sig.fills:
        return sig.fills[i]
    return Fill.MEAN if call.vals[i].dtype.is_floating_point else Fill.NONE


def _occurrences(sig: Signature, call: Call) -> dict[Letter, list[tuple[int, int]]]:
    """Where each letter stands among the operands, size-1 (broadcast) dims left out."""
    where: dict[Letter, list[tuple[int, int]]] = {}
    for i, (letters, val) in enumerate(zip(sig.ins, call.vals, strict=True)):
        for d, letter in enumerate(letters):
            if letter is None:
                letter = ("own", i, d)
            if size_expr(val.shape[d]) != 1:
                where.setdefault(letter, []).append((i, d))
    return where


def _settle(
    sig: Signature, call: Call, ins: Sequence[Layout], facts: Facts, letter: Letter, places: list[tuple[int, int]]
) -> tuple[DimLayout, str | None]:
    """The runs that all operands are brought to along a letter, or none and why."""
    everything = [run for i, d in places for run in ins[i][d]]
    if not everything:
        return (), None
    role = sig.role(letter)
    if role is Role.MIX or (isinstance(letter, tuple) and letter and letter[0] == "own"):
        return (), "needs every token"
    if len({leaves(facts.dims(call.nodes[i])[d]) for i, d in places}) > 1:
        return (), "its operands cut the axis differently"
    settled: list[Run] = []
    for key in dict.fromkeys(run.key for run in everything):
        here = [next((run for run in ins[i][d] if run.key == key), None) for i, d in places]
        step = meet([run.step if run else None for run in here])
        if step is None:
            return (), "its operands were merged apart from each other"
        step = _own_branches(sig, call, facts, step, [(i, run) for (i, _), run in zip(places, here, strict=True)])
        if step is None:
            return (), "meets the stream, which keeps its length"
        candidate = Run(*key, step)
        for (i, _), run in zip(places, here, strict=True):
            if run is None or run.step is not step:
                if fill_of(sig, call, facts, i) is Fill.NONE:
                    return (), "an operand that cannot be averaged has full length"
                if not _has_sample(sig, call, facts, i, candidate):
                    return (), "it contracts the tokens with a full-length operand that all samples share"
        settled.append(candidate)
    if any(a.overlaps(b) for a in settled for b in settled if a is not b):
        return (), "its operands group the axis differently"
    return tuple(settled), None


def _own_branches(
    sig: Signature, call: Call, facts: Facts, step: Step, here: Sequence[tuple[int, Run | None]]
) -> Step | None:
    """The state without merges of a branch that some operand did not go through: tables and score terms follow them,
    values do not."""
    for i, run in here:
        if call.nodes[i] in facts.constant or fill_of(sig, call, facts, i) is Fill.BIAS:
            continue
        chain = run.step.chain() if run else ()
        foreign = next((s for s in step.chain() if s.branch and s not in chain), None)
        if foreign is not None:
            if foreign.prev is None:
                return None
            step = foreign.prev
    return step


def _has_sample(sig: Signature, call: Call, facts: Facts, i: int, run: Run) -> bool:
    """Whether operand i has, or can be broadcast to, the sample axes of a run.

    A batch of one has no axis that could be looked for. So that a sample does not depend on its batch, a product takes
    nothing that is the same for all inputs for one of its samples, nor what lacks a dim of size 1 that others have.
    """
    own = {leaf for dim in facts.dims(call.nodes[i]) for leaf in leaves(dim)}
    missing = {leaf for leaf in leaves(run.step.sample) if leaf not in own}
    if sig.frame is None and Role.SUM in sig.roles.values():
        return not missing and call.nodes[i] not in facts.constant and _single(sig, call) <= set(sig.ins[i])
    if not missing or sig.frame is None:
        return not missing
    around = {leaf for dim in frame_dims(sig, call, facts) for leaf in leaves(dim)}
    return missing <= around


def _single(sig: Signature, call: Call) -> set[Letter]:
    """The letters of dims of size 1 that an op keeps apart."""
    return {
        letter
        for letters, val in zip(sig.ins, call.vals, strict=True)
        for letter, size in zip(letters, val.shape, strict=True)
        if letter is not None and size_expr(size) == 1 and sig.role(letter) is Role.MAP
    }


def frame_dims(sig: Signature, call: Call, facts: Facts) -> Dims:
    """The dims of the shape against which the operands broadcast."""
    assert sig.frame is not None
    found: dict[Letter, tuple] = {}
    for node, letters in zip(call.nodes, sig.ins, strict=True):
        for letter, dim in zip(letters, facts.dims(node), strict=True):
            if dim and letter not in found:
                found[letter] = dim
    return tuple(found.get(letter, ()) for letter in sig.frame)


def _sample_clash(sig: Signature, call: Call, facts: Facts, letter: Letter, run: Run) -> bool:
    """Whether the op mixes the samples of a run: a merged value may meet only ops that keep each in its place."""
    sample = set(leaves(run.step.sample))
    home: dict[Any, Letter | None] = {}
    for i, letters in enumerate(sig.ins):
        if letter not in letters:
            continue
        for other, dim in zip(letters, facts.dims(call.nodes[i]), strict=True):
            held = sample & set(leaves(dim))
            if held and (other is None or sig.role(other) is not Role.MAP):
                return True
            # x[b] against x[c]: the tokens of one sample were grouped otherwise than those of another.
            if any(home.setdefault(leaf, other) != other for leaf in held):
                return True
    for result, letters in enumerate(sig.outs):
        if letter not in letters:
            continue
        kept = [leaf for dim in facts.axes[call.node][result] for leaf in leaves(dim) if leaf in sample]
        if len(kept) != len(sample):
            return True
    return False


def _settle_extensive(
    sig: Signature,
    call: Call,
    ins: Sequence[Layout],
    where: dict[Letter, list[tuple[int, int]]],
    target: dict[Letter, DimLayout],
    reasons: list[tuple[int, str]],
) -> Decision:
    need: list[list[DimLayout]] = [[() for _ in letters] for letters in sig.ins]
    result: dict[Letter, DimLayout] = {}
    for letter, places in where.items():
        out_runs = []
        for run in target[letter]:
            passing = [
                i
                for i, d in places
                if i in sig.linear and any(r.key == run.key and r.step is run.step and r.extensive for r in ins[i][d])
            ]
            if sig.role(letter) in (Role.MAX, Role.NORM2, Role.SOFTMAX):
                passing = []
            elif sig.additive and len(passing) < len(sig.linear):
                passing = []
            elif not sig.additive:
                passing = passing[:1]
            for i, d in places:
                need[i][d] = (*need[i][d], Run(*run.key, run.step, i in passing))
            out_runs.append(Run(*run.key, run.step, sig.role(letter) is Role.SOFTMAX or bool(passing)))
        result[letter] = tuple(out_runs)
    outs = tuple(
        tuple(
            result.get(letter, ()) if size_expr(size) != 1 else ()
            for letter, size in zip(letters, val.shape, strict=True)
        )
        for letters, val in zip(sig.outs, call.results, strict=True)
    )
    return Decision(tuple(tuple(layout) for layout in need), outs, tuple(reasons))


_RULES: dict[Any, Rule] = {}
UNKNOWN = Rule()


def register(rule: Rule, *targets: Any) -> None:
    """Give every overload of the packets (or the single overloads, or callables) this rule."""
    for target in targets:
        if isinstance(target, torch._ops.OpOverloadPacket):
            for overload in target.overloads():
                _RULES.setdefault(getattr(target, overload), rule)
        else:
            _RULES[target] = rule


def rule_for(target: Any) -> Rule | None:
    return _RULES.get(target)


def registered() -> Mapping[Any, Rule]:
    return dict(_RULES)


class GetItem(Rule):
    """One result of an op with several: handled by the engine, which looks through it."""


register(GetItem(), operator.getitem)

__all__ = [
    "FILLED",
    "SHAPED",
    "UNKNOWN",
    "Call",
    "Decision",
    "Facts",
    "Fill",
    "GetItem",
    "Role",
    "Rule",
    "Signature",
    "SignatureRule",
    "op_name",
    "register",
    "registered",
    "result_read",
    "rule_for",
    "sources",
    "tensors_of",
]
