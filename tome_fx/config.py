"""The one configuration object behind `tome_backend`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isnan
from numbers import Real
from operator import index
from typing import Any

from tome_fx import matching
from tome_fx.methods import DEFAULTS, KINDS, MERGINGS, METHODS, NUMBERS, PIECES, How
from tome_fx.methods.tokens import named

INNER = ("inductor", "aot_eager", "eager")
METRICS = ("key", "query", "value", "input", "token")
PLACEMENTS = ("auto", "stream", "branch")
PIECEWISE: dict[str, Any] = {
    "prop_attn": True, "metric": "key", "importance": "none", "candidates": "all", "similarity": "cosine",
    "partition": "alternating", "matcher": "bipartite", "merging": "mean", "placement": "auto", "blocks": "all",
    "prune": 0.0, "alpha": None, "counts": "none", "least": 0.0,
}  # fmt: skip
"""What a method may say, and ToMe's own values, which hold where neither it nor the caller says another."""
ALPHAS = {"rising": lambda at, n: at / max(n - 1, 1), "falling": lambda at, n: 1 - at / max(n - 1, 1),
          "constant": lambda at, n: 0.5}  # fmt: skip
"""ToSA's weight of the metric at block `at` of n (arXiv 2506.20066, table 4)."""


@dataclass(frozen=True)
class ToMeConfig:
    """How to merge. Equal configs share compiled code; any change recompiles.

    Numbers of NumPy or torch, and all with `__index__`, are taken as Python's; an array is a list.

    Raises TypeError or ValueError, with a sentence that says what is allowed, on impossible values.
    """

    r: int | float | tuple[int, ...] | tuple[int, float] | None = None
    """Tokens merged away per block: a count, a share below 1, `(r, inflection)`, or a list with one count per block.
    None: 16, or what `flops` asks for."""
    flops: float | None = None
    """Instead of `r`: the share of the model's FLOPs to aim at, by the constant r that comes nearest from below."""
    every: int = 1
    """Merge at every k-th block only, what the schedule gives to the k blocks up to it: fewer, larger merges."""
    reuse: int = 0
    """The groups that one branch finds serve the branches of the next k blocks too, where these merge the same tokens,
    and as many of them. On the stream each merge leaves other tokens, so there it does nothing."""
    multiple: int = 1
    """Keep token counts at multiples of this number (8, 16, 32: what a device's matrix units like). What a block cannot
    merge for it, the next one does. Protected tokens count; symbolic lengths are not rounded."""
    method: str = "tome"
    """A named bundle of the options below that are None: "tome", "saint", "tosa", "mstm", "pitome", "tofu", ... (see
    `tome_fx.METHODS` and docs/methods.md), or a name given to `register_method`. What is given beside it replaces its
    piece. The five pieces that choose pairs are functions by name; a tuple of names is one for each equal part of the
    merging blocks, in order."""
    prop_attn: bool | None = None
    """Proportional attention: add log(size) to the scores of each key (ToMe section 3, equation 1). ToMe: True."""
    metric: str | None = None
    """What tokens are compared by: "key", "query", "value" (mean over heads of the attention's), "input" (the residual
    stream before the attention) or "token" (what merges itself, after it). Where those do not hold the
    tokens in one dim (pooled, joined with others) it is the stream, in cross attention the queries (ToMe table 1). In a
    branch that begins before them, their mean over heads is made for it by the product that will make them (a norm of
    each head is done to the mean, rotations come after it); where no one product does, or the mean is no narrower, it
    is the value that merges. ToMe: "key"."""
    importance: str | None = None
    """How much a token matters, for pieces that go by it: "attention" (of the class token; without one, received),
    "received", "change" (by the block, on the stream), "norm", "energy" (PiToMe), "rare", "size". Attention is that of
    the tokens before they merge: there is none in a branch that begins before it. ToMe: "none"."""
    candidates: str | None = None
    """Who takes part in the matching: "all", or "least", the 2r least important. ToMe: "all"."""
    similarity: str | None = None
    """How two tokens are compared: "cosine", "dot" (product) or "joined" with importance and size (MCTF). ToMe:
    "cosine"."""
    alpha: float | str | None = None
    """The share of the metric's cosine beside that of the tokens' places on the grid (ToSA): a number in [0, 1], or
    "rising", "falling", "constant" with depth. ToMe: None, no places."""
    partition: str | tuple[str, ...] | None = None
    """The two sides of the matching: "alternating" positions, "sequential" halves, "random" halves, the same for one
    number of tokens, "importance" (the r least important go), or alternating with near pairs first: "band:8",
    "window:2", "frame"; or "grid:2", one destination in each cell, "grid_random:2" a random one. The new order:
    protected tokens at their ends, what is left of the first side, then the second, each in position order; sides that
    differ from sample to sample leave tokens in position order. ToMe: "alternating"."""
    matcher: str | tuple[str, ...] | None = None
    """Who picks the pairs: "bipartite" (soft matching, ToMe section 3), "votes" (SAINT), "both" directions (MCTF),
    "fuse" all into one (EViT), "greedy", "previous" frame (EVS), "random" (pairs of all tokens, the same for one number
    of tokens) or a name given to `tome_fx.register_matcher`. ToMe: "bipartite"."""
    merging: str | tuple[str, ...] | None = None
    """What becomes of a pair: "mean" (weighted by size), "plain" (mean of the rows that meet), "keep" (the
    destination's row), "prune" (the source is dropped and counts no more: no sizes, no proportional attention, pools
    over what is left; where a full-length result is asked for, dropped tokens have their destination's row), "mlerp"
    (the mean, as long as the longest of its group: ToFu, arXiv 2312.01026) or "weighted" by importance. ToMe: "mean".
    """
    prune: float | tuple[int, ...] | None = None
    """How many of the r tokens, the least important of them, are dropped while the others merge (DiffRate): a share, or
    a list with one count per merging block. ToMe: 0."""
    counts: str | None = None
    """How many of the r pairs of a block merge, sample by sample: "votes" (SAINT), "threshold" (ALGM), or a name given
    to `register_piece`; `tau` and `votes` are their numbers. The graph has one length for each block: rows that are
    left over stand for nothing, and stay but for those of `least`. So it costs what `least` of the r tokens save.
    "none": all r."""
    least: float | tuple[int, ...] | None = None
    """With `counts`: how many of the r tokens go whatever the data say, so that their rows are saved: a share, or a
    list with one count per merging block. Rows that stand for nothing go first. 0: exactly what the rule says
    merges."""
    blocks: str | tuple[int, ...] | tuple[float, ...] | None = None
    """Which blocks merge: "all", "first half", "last", a list of positions (negative ones from the end), or of shares
    of the depth (0.25: block 3 of 12). A schedule `r` is spread over these. ToMe: "all"."""
    numbers: Any = ()
    """Numbers of the pieces by name, as {"tau": 0.8}; `tome_backend` takes them as options of their own."""
    protect: str | int | tuple[int, int] | list[int] | frozenset[int] = "auto"
    """Tokens that never merge: "auto" finds class, distillation, camera and register tokens; a number of leading ones;
    `(count, period)`, the first `count` of every `period` tokens (of every frame); or a list of positions, negative
    ones from the end."""
    placement: str | None = None
    """"stream" merges on the residual stream for good, "branch" around each attention and MLP alone (the stream keeps
    its length); "auto" takes the stream where there is one and a branch elsewhere, and either only where it pays. ToMe:
    "auto"."""
    padding_first: bool = False
    """Merge the tokens that a mask of keys leaves out before all others, however alike they are. They never mix into
    the others in any case."""
    drop_unread: bool = True
    """Compute only the rows that are read: where a model reads its class token alone, queries, projection and MLP
    of the last block on that row, and no last merge. Reports name that merge as not read, and keep the plan's FLOPs."""
    inner: str = "inductor"
    """What compiles the rewritten graph: "inductor", "aot_eager" or "eager"."""
    strict: bool = False
    """Raise where the default is a warning: a site that does not pay though products follow it, nothing merged, a piece
    of a model that loses something, an internal error."""
    is_list: bool = False
    """Whether `r` was given as a list (kept as a tuple so that the config is hashable)."""
    given: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    """The options that the caller gave beside the method."""

    def __post_init__(self) -> None:
        self._make_plain()
        self._resolve()
        if self.flops is not None:
            if self.r is not None:
                raise ValueError(f"give r or flops, not both; got r={self.r!r} and flops={self.flops!r}")
            if not _real(self.flops) or not 0 < self.flops < 1:
                raise ValueError(f"flops must be a share of the model's FLOPs between 0 and 1, got {self.flops!r}")
        else:
            object.__setattr__(self, "r", 16 if self.r is None else self.r)
            self._check_r()
        for name, allowed in (
            ("metric", METRICS),
            ("placement", PLACEMENTS),
            ("inner", INNER),
            *((name, _names(name)) for name in KINDS),
            ("merging", MERGINGS),
        ):
            given = getattr(self, name)
            for one in given if isinstance(given, tuple) and given else (given,):
                _one_of(name, one, allowed)
        self._check_method()
        self._check_protect()
        for name, least in (("every", 1), ("multiple", 1), ("reuse", 0)):
            if not _whole(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name} must be an int of {least} or more, got {getattr(self, name)!r}")
        if self.reuse and self.placement == "stream":
            raise ValueError('reuse is of branches, and placement="stream" has none: leave one of them out')
        for name in ("prop_attn", "padding_first", "drop_unread", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _resolve(self) -> None:
        """Options that were not given, from the method, and where it says nothing, ToMe's."""
        _one_of("method", self.method, tuple(METHODS))
        said, numbers = dict(METHODS[self.method].options), dict(self.numbers)
        given = tuple(name for name in PIECEWISE if getattr(self, name) is not None)
        object.__setattr__(self, "given", given)
        for name, own in PIECEWISE.items():
            value = getattr(self, name) if name in given else said.get(name, own)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        unknown = [name for name in numbers if name not in DEFAULTS]
        if unknown:
            raise ValueError(f"unknown number {unknown[0]!r}{_close(unknown[0], DEFAULTS)}; there are "
                             f"{', '.join(DEFAULTS)}")  # fmt: skip
        if bad := [name for name, value in numbers.items() if not _real(value)]:
            raise TypeError(f"{bad[0]} must be a number, got {numbers[bad[0]]!r}")
        if bad := [name for name, value in numbers.items() if isnan(value) or (name == "levels" and value < 1)]:
            least = " of 1 or more" if bad[0] == "levels" else ""
            raise ValueError(f"{bad[0]} must be a number{least}, got {numbers[bad[0]]!r}")
        said = {name: value for name, value in said.items() if name in DEFAULTS}
        object.__setattr__(self, "numbers", tuple({**DEFAULTS, **said, **numbers}.items()))

    def _check_method(self) -> None:
        if not (self.alpha is None or self.alpha in ALPHAS or (_real(self.alpha) and 0 <= self.alpha <= 1)):  # type: ignore[operator]
            raise ValueError(f"alpha must be a number in [0, 1], or one of {', '.join(ALPHAS)}, got {self.alpha!r}")
        for name, share in (("prune", self.prune), ("least", self.least)):
            listed = isinstance(share, tuple) and all(_whole(x) and x >= 0 for x in share)
            if not listed and not (_real(share) and 0 <= share <= 1):  # type: ignore[operator]
                raise ValueError(f"{name} must be a share between 0 and 1, or a list of counts, got {share!r}")
        if self.counts == "none" and self.least:
            raise ValueError("least says how many tokens go of those that counts lets go: give counts too")
        if self.padded and self.multiple > 1:
            raise ValueError("multiple rounds r, and with counts the rows that go are those of least: choose these")
        blocks = self.blocks
        listed = isinstance(blocks, tuple) and (all(map(_whole, blocks)) or
                                                all(_real(x) and 0 <= x < 1 for x in blocks))  # fmt: skip
        if not (listed or blocks in ("all", "first half", "last")):
            raise ValueError('blocks must be "all", "first half", "last", a list of positions or of shares of the '
                             f"depth, got {blocks!r}")  # fmt: skip
        for how in self._parts():
            if how.scored and how.importance == "none":
                raise ValueError(f"{how.reader} goes by importance: say which, as importance=\"attention\"")
            if how.clash:
                raise ValueError(how.clash)
            if self.padding_first and how.matcher in ("random", "previous"):
                why = f'padding_first goes by similarity, and matcher="{how.matcher}" does not'
                raise ValueError(f"{why}: leave one of them out")

    def _make_plain(self) -> None:
        for f in fields(self):
            if f.init:
                object.__setattr__(self, f.name, _plain(getattr(self, f.name)))
        for name in ("partition", "matcher", "merging", "blocks", "prune", "least"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
            object.__setattr__(self, "is_list", True)

    def _check_protect(self) -> None:
        protect: Any = self.protect
        given = protect
        allowed = '"auto", a number of leading tokens, 0 or more, (count, period), or a list of positions'
        if isinstance(protect, list):
            protect = frozenset(protect) if all(map(_whole, protect)) else None
            object.__setattr__(self, "protect", protect)
        if isinstance(protect, tuple):
            fits = len(protect) == 2 and all(map(_whole, protect)) and 0 <= protect[0] <= protect[1] > 0
        else:
            fits = protect == "auto" or isinstance(protect, frozenset) or (_whole(protect) and protect >= 0)
        if not fits:
            raise ValueError(f"protect must be {allowed}, got {given!r}")

    def _check_r(self) -> None:
        allowed = "an int of 0 or more, a float below 1 (a share), (r, inflection), or a list with one int per block"
        r = self.r
        if isinstance(r, tuple) and self.is_list:
            if not all(_whole(x) for x in r):
                raise TypeError(f"r must be {allowed}; the list {list(r)!r} holds something else than ints")
            if any(x < 0 for x in r):
                raise ValueError(f"r must be {allowed}; the list {list(r)!r} holds a negative count")
        elif isinstance(r, tuple):
            if len(r) != 2 or not _whole(r[0]) or not _real(r[1]):
                raise TypeError(f"r must be {allowed}; a tuple is (r, inflection), got {r!r}")
            if r[0] < 0 or not -1 <= r[1] <= 1:
                raise ValueError(
                    f"r must be {allowed}; in (r, inflection) r is 0 or more and inflection in [-1, 1], got {r!r}"
                )
        elif _whole(r):
            if r < 0:  # type: ignore[operator]
                raise ValueError(f"r must be {allowed}, got {r!r}")
        elif isinstance(r, float):
            if not 0 <= r < 1:
                raise ValueError(f"r must be {allowed}; a float is a share of at least 0 and below 1, got {r!r}")
        else:
            raise TypeError(f"r must be {allowed}, got {r!r}")

    @property
    def schedule(self) -> Any:
        return list(self.r) if self.is_list else self.r  # type: ignore[arg-type]

    @property
    def sided(self) -> bool:
        """Whether at every merge a source at an alternating position joins the destination at another that is most like
        it, and nothing else decides."""
        alone = self.similarity != "joined" and not self.drops_some and not self.padded
        return alone and (self.candidates, self.partition, self.matcher) == ("all", "alternating", "bipartite")

    @property
    def described(self) -> str:
        """The method and all that is not ToMe's, as `explain` prints it; empty for ToMe itself."""
        own = {**{name: getattr(self, name) for name in PIECEWISE}, **dict(self.numbers)}
        other = [f"{name}={own[name]!r}" for name, usual in {**PIECEWISE, **DEFAULTS}.items() if own[name] != usual]
        source = METHODS[self.method].source
        return f"method {self.method} ({source}): {', '.join(other)}" if other else ""

    @property
    def choices(self) -> str:
        """The options that make it otherwise, as a message names them."""
        if self.padded:
            return f"counts={self.counts!r}"
        if self.method != "tome":
            return f"method={self.method!r}"
        return f"matcher={self.matcher!r} with partition={self.partition!r}"

    @property
    def needs(self) -> frozenset[str]:
        """What pieces read of the graph, at any merge."""
        return frozenset(need for how in self._parts() for need in how.needs)

    def _parts(self) -> list[How]:
        """The pieces of each part of the merging blocks that may have its own."""
        own = (self.partition, self.matcher, self.merging)
        parts = max((len(value) for value in own if isinstance(value, tuple)), default=1)
        return [self.how(i, parts, (0, 1)) for i in range(parts)]

    def by_depth(self, anew: bool) -> list[str]:
        """The options that go by how many blocks a model has, or, anew, by which of them one is."""
        placed = isinstance(self.blocks, tuple) and all(isinstance(at, int) and at >= 0 for at in self.blocks)
        found = ["blocks"] if self.blocks != "all" and (anew or not placed) else []
        found += [name for name in ("partition", "matcher", "merging") if isinstance(getattr(self, name), tuple)]
        found += [name for name in ("prune", "least") if isinstance(getattr(self, name), tuple) and anew]
        found += ["alpha"] if isinstance(self.alpha, str) and self.alpha != "constant" else []
        return found + ["margin"] * (self.importance == "energy")

    def chosen(self, blocks: int) -> list[int]:
        """Which of so many blocks merge, ascending."""
        if self.blocks == "all":
            return list(range(blocks))
        if self.blocks == "first half":
            return list(range((blocks + 1) // 2))
        if self.blocks == "last":
            return [blocks - 1] if blocks else []
        own: Any = [int(at * blocks) if isinstance(at, float) else at for at in self.blocks]  # type: ignore[union-attr]
        return sorted({at % blocks for at in own if -blocks <= at < blocks})

    def how(self, turn: int, turns: int, depth: tuple[int, int]) -> How:
        """The pieces of a merge: the `turn`-th of `turns` that merge, at block `depth[0]` of `depth[1]`."""

        def own(value: Any) -> Any:
            return value[turn * len(value) // max(turns, 1)] if isinstance(value, tuple) else value

        at, blocks = depth
        alpha: Any = ALPHAS[self.alpha](at, blocks) if isinstance(self.alpha, str) else self.alpha
        numbers = {**dict(self.numbers), "depth": at / max(blocks, 1)}
        numbers["margin"] *= 1 - numbers["depth"]
        shares = (self.prune, float(self.least) if isinstance(self.least, int) else self.least)
        of_r = [(x[turn] if turn < len(x) else 0) if isinstance(x, tuple) else x for x in shares]
        return How(self.importance, self.candidates, own(self.partition), self.similarity, own(self.matcher),  # type: ignore[arg-type]
                   self.counts, own(self.merging), of_r[0], of_r[1], alpha, tuple(numbers.items()))  # type: ignore[arg-type]

    @property
    def padded(self) -> bool:
        """Whether rows are left that stand for nothing, since pairs are as many as the data say."""
        return self.how(0, 1, (0, 1)).padded

    @property
    def sized(self) -> bool:
        """Whether rows have sizes, at any merge: what they stand for, or, where rows are left that stand for nothing, 1
        and 0."""
        return self._mergings != {"prune"} or self.padded

    @property
    def _mergings(self) -> set[Any]:
        return set(self.merging) if isinstance(self.merging, tuple) else {self.merging}

    @property
    def proportional(self) -> bool:
        """Whether log(size) joins the scores; -inf alone, of rows that stand for nothing, without `prop_attn`."""
        return (bool(self.prop_attn) and self.sized) or self.padded

    @property
    def drops_some(self) -> bool:
        """Whether some of the r tokens are dropped while others merge."""
        return any(self.prune) if isinstance(self.prune, tuple) else bool(self.prune)

    @property
    def drops(self) -> bool:
        """Whether some tokens are dropped while others merge, so that sizes do not add up to all tokens."""
        return self.sized and (self.drops_some or "prune" in self._mergings)

    @property
    def tied(self) -> bool:
        """Whether merging computes the model whose tokens are replaced by their group's mean, or by one of them."""
        return self._mergings <= {"mean", "plain", "keep"} and not self.drops_some

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _plain(value: Any) -> Any:
    """Numbers of NumPy, of torch, or with `__index__` as Python's, also in a list or a tuple; all else as it is."""
    if isinstance(value, (bool, int, float, str)) and type(value).__module__ == "builtins":
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    if hasattr(value, "tolist"):  # a scalar, or an array as a list
        return value.tolist()
    if isinstance(value, Real):
        return float(value) if not hasattr(value, "__index__") else index(value)
    return index(value) if hasattr(value, "__index__") else value


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(kind: str) -> tuple[str, ...]:
    """The names of a kind of pieces; those that end in ":k" take a number."""
    more = {"importance": ("none",), "counts": ("none",), "matcher": matching.matchers()}.get(kind, ())
    return tuple(dict.fromkeys([*more, *PIECES[kind]]))


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if isinstance(value, str) and f"{value.partition(':')[0]}:k" in allowed:
        named(name, value)  # raises where its number is none
    elif value not in allowed:
        choices = ", ".join(f'"{a}"' for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{_close(value, allowed)}")


def _close(value: Any, allowed: Any) -> str:
    near = difflib.get_close_matches(str(value), list(allowed), 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def config_from(values: Mapping[str, Any]) -> ToMeConfig:
    """A config from loose keys, as `options=` and the command line give them. Unknown keys raise ValueError."""
    known = [f.name for f in fields(ToMeConfig) if f.init and f.name != "is_list"]
    for key in values:
        if key not in known and key not in NUMBERS:
            raise ValueError(f"unknown tome option {key!r}{_close(key, [*known, *NUMBERS])}; the options are "
                             f"{', '.join(known)}, and the numbers {', '.join(DEFAULTS)}")  # fmt: skip
    rest = {key: value for key, value in values.items() if key in known}
    numbers = {key: value for key, value in values.items() if key not in known}
    if numbers:
        rest["numbers"] = {**dict(rest.get("numbers", ())), **numbers}
    return ToMeConfig(**rest)


VARIABLES = {"TOME_R": "r", "TOME_FLOPS": "flops"}


def from_environment() -> dict[str, Any]:
    """The schedule that TOME_R (as `r`: 8, 0.1, [8, 8, 4]) or TOME_FLOPS (a share) asks for; empty where none is set.

    Raises ValueError for a value that is no such number or list, and where both are set.
    """
    found = {}
    for variable, option in VARIABLES.items():
        if text := os.environ.get(variable, "").strip():
            try:
                found[option] = json.loads(text)
            except ValueError:
                found[option] = None
            if not isinstance(found[option], (int, float, list)) or isinstance(found[option], bool):
                raise ValueError(f"{variable}={text!r} is no number and no list of numbers")
    if len(found) > 1:
        raise ValueError("TOME_R and TOME_FLOPS are both set: leave one of them out")
    return found


def updated(config: ToMeConfig, values: Mapping[str, Any]) -> ToMeConfig:
    """The config with loose keys replaced; `r` and `flops` replace each other. Raises as `config_from`."""
    unsaid = {"is_list", "given", *(name for name in PIECEWISE if name not in config.given)}
    base = {f.name: getattr(config, f.name) for f in fields(ToMeConfig) if f.name not in unsaid}
    base["r"] = None if config.flops is not None else config.schedule
    if "r" in values:
        base["flops"] = None
    if "flops" in values:
        base["r"] = None
    return config_from({**base, **values})
