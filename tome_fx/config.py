"""The one configuration object behind `tome_backend`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from operator import index
from typing import Any

from tome_fx import matching

INNER = ("inductor", "aot_eager", "eager")
METRICS = ("key", "query", "value", "input")
MERGINGS = ("mean", "plain", "keep", "prune")
PLACEMENTS = ("auto", "stream", "branch")


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
    multiple: int = 1
    """Keep token counts at multiples of this number (8, 16, 32: what a device's matrix units like). What a block cannot
    merge for it, the next one does. Protected tokens count; symbolic lengths are not rounded."""
    prop_attn: bool = True
    """Proportional attention: add log(size) to the scores of each key (ToMe section 3, equation 1)."""
    metric: str = "key"
    """What tokens are compared by: "key", "query", "value" (mean over heads of the attention's) or "input" (the
    residual stream). Where those do not hold the tokens in one dim (pooled, joined with others) it is the stream, in a
    branch that begins before them the value that merges, in cross attention the queries (ToMe table 1)."""
    similarity: str = "cosine"
    """How two tokens are compared: "cosine" or "dot" (product)."""
    partition: str = "alternating"
    """The two sides of the matching: "alternating" positions, "sequential" halves, or "random" halves, the same for one
    number of tokens. The new order: protected tokens at their ends, what is left of the first side, then the second,
    each in position order."""
    matcher: str = "bipartite"
    """Who picks the pairs: "bipartite" (soft matching, ToMe section 3), "random" (pairs of all tokens, the same for one
    number of tokens) or a name given to `tome_fx.register_matcher`."""
    merging: str = "mean"
    """What becomes of a pair: "mean" (weighted by size), "plain" (mean of the rows that meet), "keep" (the
    destination's row) or "prune" (the source is dropped and counts no more: no sizes, no proportional attention, pools
    over what is left; where a full-length result is asked for, dropped tokens have their destination's row)."""
    protect: str | int | tuple[int, int] | list[int] | frozenset[int] = "auto"
    """Tokens that never merge: "auto" finds class, distillation, camera and register tokens; a number of leading ones;
    `(count, period)`, the first `count` of every `period` tokens (of every frame); or a list of positions, negative
    ones from the end."""
    placement: str = "auto"
    """"stream" merges on the residual stream for good, "branch" around each attention and MLP alone (the stream keeps
    its length); "auto" takes the stream where there is one and a branch elsewhere, and either only where it pays."""
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

    def __post_init__(self) -> None:
        self._make_plain()
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
            ("similarity", tuple(matching.SIMILARITIES)),
            ("partition", tuple(matching.PARTITIONS)),
            ("matcher", matching.matchers()),
            ("merging", MERGINGS),
            ("placement", PLACEMENTS),
            ("inner", INNER),
        ):
            _one_of(name, getattr(self, name), allowed)
        self._check_protect()
        for name in ("every", "multiple"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an int of 1 or more, got {getattr(self, name)!r}")
        for name in ("prop_attn", "padding_first", "drop_unread", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.padding_first and self.matcher == "random":
            raise ValueError('padding_first goes by similarity, and matcher="random" does not: leave one of them out')

    def _make_plain(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _plain(getattr(self, f.name)))
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
    def pairing(self) -> tuple[str, str, str]:
        """The names behind a match: matcher, partition, similarity."""
        return self.matcher, self.partition, self.similarity

    @property
    def counts(self) -> bool:
        """Whether a merged token counts for all that it stands for."""
        return self.merging != "prune"

    @property
    def proportional(self) -> bool:
        """Whether log(size) joins the scores."""
        return self.prop_attn and self.counts

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


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(f'"{a}"' for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{_close(value, allowed)}")


def _close(value: Any, allowed: Any) -> str:
    near = difflib.get_close_matches(str(value), list(allowed), 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def config_from(values: Mapping[str, Any]) -> ToMeConfig:
    """A config from loose keys, as `options=` and the command line give them. Unknown keys raise ValueError."""
    known = [f.name for f in fields(ToMeConfig) if f.name != "is_list"]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown tome option {key!r}{_close(key, known)}; the options are {', '.join(known)}")
    return ToMeConfig(**values)


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
    base = {f.name: getattr(config, f.name) for f in fields(ToMeConfig) if f.name != "is_list"}
    base["r"] = None if config.flops is not None else config.schedule
    if "r" in values:
        base["flops"] = None
    if "flops" in values:
        base["r"] = None
    return config_from({**base, **values})
