"""Random transformers over random spellings: a `Mixture` says which, `draw` draws one, `Judge` judges it by all laws.

Beside `tests.models`, which varies one ViT: masks of pairs, padding (also whole samples), special tokens put in,
frames, zero-padded windows, shared keys, relative keys, inputs in any order, two calls in one graph.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from tests import sequences as seq
from tests import spellings
from tests.laws import LAW, PLACEMENTS, UNMOVED, Traced, apart_from, mixed_groups, shared_tokens
from tests.models import redraw
from tests.palette import distance, is_rounding, palette_tokens
from tests.test_special_laws import Block, D, Related, Windows, keys_of
from tome_fx.report import ToMeReport

RESIDUAL = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "torch.add": torch.add,
    "add alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "+=": lambda x, y: x.clone().add_(y),
    "sum of a stack": lambda x, y: torch.stack([x, y]).sum(0),
}
READOUT = ("tokens", "mean", "first")
ORDER = ("x", "keep", "condition", "unused")
SDPA = ("sdpa", "multi-query, expand", "grouped, repeat_interleave", "grouped, expand", "grouped, enable_gqa")
GRID, WIDE = (7, 8), 6  # a grid that no window of 6 x 6 divides


@dataclasses.dataclass(frozen=True)
class Mixture:
    """One small transformer; what is () or "" is not there.

    pairs: (kind, way, apply) of a mask of pairs. padding: spelling of a mask of keys. lengths: valid tokens of each
    sample. insert: (spelling, place, count) of special tokens. frames: (join, read, count, frames). windows: how a
    first block pads its grid."""

    n: int = 48
    batch: int = 2
    depth: int = 2
    core: str = "sdpa"
    residual: str = "x + y"
    post: bool = False
    pairs: tuple[str, ...] = ()
    padding: str = ""
    lengths: tuple[int, ...] = ()
    insert: tuple[Any, ...] = ()
    frames: tuple[Any, ...] = ()
    windows: str = ""
    relative: str = ""
    order: tuple[str, ...] = ("x",)
    calls: str = "one"
    readout: str = "tokens"
    r: Any = 4
    placement: str = "auto"
    seed: int = 0

    def __str__(self) -> str:
        default = dataclasses.asdict(Mixture())
        return repr({k: v for k, v in dataclasses.asdict(self).items() if v != default[k]})

    @property
    def length(self) -> int:
        """Of the sequence that the blocks see."""
        if self.frames:
            return self.n + self.frames[2] * self.frames[3]
        return self.n + (self.insert[2] + 1 if self.insert else 0)

    @property
    def special(self) -> list[int]:
        """Where tokens that no patch made stand, and are read or put in as such."""
        if self.frames:
            return [i * (self.length // self.frames[3]) for i in range(self.frames[3])]
        if not self.insert:
            return []
        first = self.n if self.insert[1] == "behind" else 0
        return list(range(first, first + self.insert[2] + 1))


def draw(rng: random.Random) -> Mixture:
    """Any legal one. What cannot stand beside what was drawn before is left out."""

    def maybe(share: float) -> bool:
        return rng.random() < share

    n = rng.choice((32, 40, 48))
    made: dict[str, Any] = {
        "n": n, "batch": rng.choice((2, 3)), "depth": rng.choice((2, 2, 3)), "seed": rng.randrange(1000),
        "residual": rng.choice(list(RESIDUAL)), "post": maybe(0.2), "placement": rng.choice(PLACEMENTS),
        "r": rng.choice((2, 4, 6, 0.1, (4, -1))), "core": rng.choice(list(seq.CORES)),
        "calls": rng.choice(("one", "one", "one", "sum", "pair")), "readout": rng.choice(READOUT),
    }  # fmt: skip
    about = rng.choice(("pairs", "padding", "insert", "frames", "windows", "relative", "plain"))
    if about == "pairs":
        kind = rng.choice(list(spellings.KINDS))
        way = rng.choice(spellings.ways(kind))
        apply = rng.choice([a for a in spellings.applies(kind) if a not in spellings.FLEX or maybe(0.05)])
        made |= {"pairs": (kind, way, apply), "batch": spellings.BATCH, "core": "sdpa"}
        made |= {"post": False, "residual": "x + y"}
    elif about == "relative":
        made |= {"relative": rng.choice(list(seq.RELATIVE)), "core": rng.choice(("sdpa", "scores"))}
    elif about == "windows":
        made |= {"windows": rng.choice(list(seq.PAD_GRID)), "n": math.prod(GRID)}
    elif about == "frames":
        frames = rng.choice((2, 4))
        made["frames"] = rng.choice(list(seq.FRAMES)), rng.choice(list(seq.READ_FRAMES)), rng.choice((1, 3)), frames
        made["readout"] = "frames"
    elif about == "insert":
        made["insert"] = rng.choice(list(seq.INSERT)), rng.choice(("front", "middle", "behind")), rng.choice((0, 1, 4))
    if about == "padding" or (about in ("plain", "insert") and maybe(0.3)):
        made["padding"] = rng.choice(list(seq.PADDING))
        finite = made["padding"] not in seq.EXACT_WHEN_EMPTY  # a softmax over nothing is NaN, in SDPA zero
        empty = (0,) if finite or made["core"] in SDPA else ()
        made["lengths"] = tuple(rng.choice((made["n"], 30, 20, *empty)) for _ in range(made["batch"]))
    order = ["x", *(["keep"] if made.get("padding") else []), *(c for c in ("condition", "unused") if maybe(0.3))]
    rng.shuffle(order)
    return Mixture(**made, order=tuple(order))


class Layer(Block):
    """A block with its residual add spelled in one way, pre- or post-norm."""

    def __init__(self, mix: Mixture) -> None:
        groups, core = seq.CORES[mix.core]
        attend: Any = core
        if mix.relative:
            attend = Related(mix.relative, mix.length, False, mix.core == "scores")
        super().__init__(attend, groups)
        self.add, self.post, self.relative = RESIDUAL[mix.residual], mix.post, bool(mix.relative)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        more = () if self.relative else (mask,)
        if self.post:
            x = self.norm1(self.add(x, self.attention(x, *more)))
            return self.norm2(self.add(x, self.mlp(x)))
        x = self.add(x, self.attention(self.norm1(x), *more))
        return self.add(x, self.mlp(self.norm2(x)))


class Model(nn.Module):
    """forward(*inputs), in the order of the mixture."""

    def __init__(self, mix: Mixture) -> None:
        super().__init__()
        self.mix = mix
        self.window = Windows(mix.windows, WIDE) if mix.windows else None
        if mix.pairs:
            self.blocks = nn.ModuleList(spellings.Block(mix.pairs[2], D) for _ in range(mix.depth))
        else:
            self.blocks = nn.ModuleList(Layer(mix) for _ in range(mix.depth))
        self.scale, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.cls, self.registers = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 1, D))
        redraw(self, mix.seed)
        self.mask = spellings.mask_of(*mix.pairs[:2], mix.length) if mix.pairs else None

    def join(self, x: Tensor) -> Tensor:
        mix = self.mix
        if mix.frames:
            join, _, count, frames = mix.frames
            return seq.FRAMES[join](x.unflatten(1, (frames, -1)), self.registers[None].repeat(1, 1, count, 1))
        if not mix.insert:
            return x
        form, place, count = mix.insert
        cls, registers = self.cls.expand(len(x), -1, -1), self.registers.repeat(len(x), count, 1)
        if place == "middle":
            return seq.INSERT[form](torch.cat([cls, x], 1), registers, 1)
        return seq.INSERT[form](x, torch.cat([cls, registers], 1), 0 if place == "front" else x.shape[1])

    def mask_of(self, keep: Tensor | None) -> Tensor | None:
        if self.mask is not None:
            return self.mask()
        if keep is None:
            return None
        if self.mix.insert:
            own = torch.ones(len(keep), self.mix.insert[2] + 1, dtype=torch.bool)
            keep = torch.cat([keep, own] if self.mix.insert[1] == "behind" else [own, keep], 1)
        return seq.padding(self.mix.padding, keep, self.head.weight.dtype)

    def encode(self, x: Tensor, keep: Tensor | None, condition: Tensor | None) -> Tensor:
        if self.window is not None:
            x = self.window(x.unflatten(1, GRID)).flatten(1, 2)
        x, mask = self.join(x), self.mask_of(keep)
        if condition is not None:
            x = x * (1 + self.scale(condition)[:, None].tanh())
        for block in self.blocks:
            x = block(x, mask)
        if self.mix.frames:
            return self.head(seq.READ_FRAMES[self.mix.frames[1]](x, self.mix.frames[3]))
        return self.read(x, keep)

    def read(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self.mix.readout == "first":
            return self.head(x[:, self.mix.special[0] if self.mix.special else 0])
        if self.mix.readout == "mean" and keep is not None and not self.mix.insert:
            return self.head((x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1))
        return self.head(x.mean(1) if self.mix.readout == "mean" and keep is None else x)

    def forward(self, *inputs: Tensor) -> Any:
        given = dict(zip(self.mix.order, inputs, strict=True))
        x, rest = given["x"], (given.get("keep"), given.get("condition"))
        if self.mix.calls == "one":
            return self.encode(x, *rest)
        first, second = self.encode(x, *rest), self.encode(-x, *rest)
        return first + second if self.mix.calls == "sum" else (first, second)


class Judge:
    """Problems of one mixture. `merged`, `void`: sites that merged, and whether unequal palette tokens had to."""

    def __init__(self, mix: Mixture) -> None:
        self.mix, self.problems, self.void = mix, [], False
        torch.manual_seed(mix.seed)
        self.model = Model(mix).eval()
        self.configs = {"merged": {"r": mix.r, "placement": mix.placement}}
        if mix.seed % 5 == 0:
            self.configs["zero"] = {"r": 0}
        self.made = Traced(self.model, self.configs)
        # Another seed than the weights', which would be multiples of the palette.
        self.palette = self.inputs(palette_tokens(mix.batch, mix.n, D, k=3, seed=mix.seed + 4321))
        self.random = self.inputs(torch.randn(mix.batch, mix.n, D))

    @property
    def report(self) -> ToMeReport:
        return self.made.reports["merged"]

    @property
    def merged(self) -> int:
        return self.report.merged_sites

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.mix.seed + 1)
        given = {"x": x, "condition": torch.randn(len(x), D, generator=generator),
                 "unused": torch.randn(len(x), 1, generator=generator)}  # fmt: skip
        if self.mix.padding:
            given["keep"] = keys_of(self.mix.n, *self.mix.lengths)
        return tuple(given[name] for name in self.mix.order)

    def call(self, name: str, args: tuple[Tensor, ...]) -> list[Tensor]:
        out = self.made(name, *(a.clone() for a in args))
        return list(out) if isinstance(out, tuple) else [out]

    def eager(self, args: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            out = self.model(*(a.clone() for a in args))
        return list(out) if isinstance(out, tuple) else [out]

    def seen(self, out: Tensor) -> Tensor:
        """Of an output, what no padding stands at: [values]."""
        if not self.mix.padding or out.dim() < 3:
            return out.flatten()
        keep = keys_of(self.mix.n, *self.mix.lengths)
        keep = keep | ~keep.any(1, keepdim=True)  # an empty sample counts whole
        if self.mix.insert:
            own = torch.ones(len(keep), self.mix.insert[2] + 1, dtype=torch.bool)
            keep = torch.cat([keep, own] if self.mix.insert[1] == "behind" else [own, keep], 1)
        return out[keep].flatten()

    def fail(self, what: str) -> None:
        self.problems.append(what)

    def judge(self) -> Judge:
        got = self.call("merged", self.random)
        wrong = [s for s in self.report.skipped if s.kind == "internal error"]
        if wrong:
            self.fail(f"internal error: {wrong[0].detail}"[:300])
            return self
        if not self.merged and not self.report.skipped:
            self.fail("silent: nothing merged and no reason")
        self.special(self.made.groups(self.mix.length))
        self.identity()
        for a, b in zip(got, self.eager(self.random), strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype) or bool(b.isfinite().all() and not a.isfinite().all()):
                self.fail(f"{a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}, or not finite")
                return self
        self.samples(got)
        if self.mix.pairs:
            self.futures(got)
        self.equal_tokens()
        return self

    def identity(self) -> None:
        """r=0 gives the graph back; traced for some, as it costs half as much again."""
        if "zero" in self.configs:
            pairs = zip(self.call("zero", self.random), self.call("", self.random), strict=True)
            if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
                self.fail("r=0 is not the identity")

    def special(self, groups: list[Tensor]) -> None:
        if shared := shared_tokens(groups, self.mix.special):
            self.fail(f"{shared} special tokens share a group")

    def samples(self, got: list[Tensor]) -> None:
        """The first sample stays where the others change."""
        x = self.random[self.mix.order.index("x")]
        other = self.inputs(torch.cat([x[:1], torch.randn(len(x) - 1, *x.shape[1:])]))
        worst = max(distance(a[:1], b[:1]) for a, b in zip(self.call("merged", other), got, strict=True))
        if worst > UNMOVED:
            self.fail(f"batch: a sample moved by {worst:.0e} with the others")

    def futures(self, got: list[Tensor]) -> None:
        """Tokens that a mask of pairs keeps apart."""
        kind = spellings.KINDS[self.mix.pairs[0]]
        groups = self.made.groups(self.mix.n)
        if kind.part and (mixed := mixed_groups(groups, kind.part(torch.arange(self.mix.n), self.mix.n))):
            self.fail(f"mask: {mixed} groups hold tokens of two parts")
        if got[0].dim() < 3 or self.mix.depth > 2:
            return
        changed, kept = kind.places(self.mix.n)
        other = self.inputs(apart_from(self.random[self.mix.order.index("x")], changed))
        worst = max(distance(a[:, kept], b[:, kept]) for a, b in zip(self.call("merged", other), got, strict=True))
        if worst > UNMOVED:
            self.fail(f"mask: outputs moved by {worst:.0e} with tokens that they cannot see")

    def equal_tokens(self) -> None:
        """The lossless law."""
        if self.mix.relative or (self.mix.pairs and self.mix.pairs[1] in spellings.POSITIONAL):
            return
        want = self.eager(self.palette)
        got = self.call("merged", self.palette)
        lowest = self.made.lowest
        error = max(distance(self.seen(a), self.seen(b)) for a, b in zip(got, want, strict=True))
        if error <= LAW:
            return
        if lowest < 1 - 1e-4 and not self.mix.windows:  # zeros have no direction, and must merge all the same
            self.void = True
            return
        config: dict[str, Any] = {**self.configs["merged"], "seen": self.seen}
        if not is_rounding(error, want, self.model, self.palette, None, **config):
            self.fail(f"law: equal tokens (cosine {lowest:.6f}) moved the output by {error:.0e}")
