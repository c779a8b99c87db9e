"""What a rule is: how an op's dims correspond, what each correspondence does, and how to emit the op on merged values.

Most ops are described by a `Signature`, an einsum-like string of letters with a role per letter, from which
`signature.py` derives the rest. Ops that rearrange dims (views, cat, slices) have rules of their own.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from tome_fx.config import ToMeConfig
from tome_fx.report import NO_RULE

from ..algebra.axes import Dims, fresh_dims
from ..algebra.layout import Layout, Run, plain
from ..building.trace import Traced
from .facts import FILLED, Facts

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
    TOKENS = "tokens"  # that, at a merge itself, where directions may be averaged alone
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


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """The tensor results of a node's `meta["val"]`, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(v for v in value if isinstance(v, Tensor))
    return ()


def draws(target: Any) -> bool:
    """Whether an op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def sources(node: fx.Node, operands: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """Those of a node's operands whose values it reads."""
    return operands[: 0 if node.target in FILLED else None]


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

    def fetch_as(self, x: Traced, node: fx.Node, want: Layout, fill: Fill, frame: Dims) -> Traced:
        """As `fetch`, of what stands in the place of a node's value."""

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
        why = tuple((i, NO_RULE) for i, layout in enumerate(ins) if any(layout))
        return Decision(tuple(plain(v.dim()) for v in call.vals), tuple(plain(v.dim()) for v in call.results), why)

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        operands = [env.fetch(n, layout) for n, layout in zip(call.nodes, decision.ins, strict=True)]
        return env.run(call, operands)

    def flops(self, call: Call, states: Sequence[Sequence[list[int]]]) -> list[float]:
        """Floating-point operations (2 per multiply-add) in each state: the shapes of operands and result."""
        return [0.0] * len(states)


def op_key(target: Any) -> Any:
    """What tables of operators are keyed by: the name, as one that is defined anew may be another object in a graph."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    return target.name() if isinstance(target, torch._ops.OpOverload) else target


_RULES: dict[Any, Rule] = {}
UNKNOWN = Rule()


def register(rule: Rule, *targets: Any) -> None:
    """Give every overload of the packets (or the single overloads, or callables) this rule."""
    for target in targets:
        if isinstance(target, torch._ops.OpOverloadPacket):
            for overload in target.overloads():
                _RULES.setdefault(op_key(getattr(target, overload)), rule)
        else:
            _RULES[op_key(target)] = rule


def rule_for(target: Any) -> Rule | None:
    return _RULES.get(op_key(target))


class GetItem(Rule):
    """One result of an op with several: handled by the engine, which looks through it."""


register(GetItem(), operator.getitem)

__all__ = [
    "FILLED",
    "UNKNOWN",
    "Call",
    "Decision",
    "Fill",
    "GetItem",
    "Role",
    "Rule",
    "Signature",
    "op_key",
    "op_name",
    "register",
    "result_read",
    "rule_for",
    "sources",
    "tensors_of",
]
