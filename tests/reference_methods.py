"""Token-reduction methods in plain eager PyTorch on a plain ViT: the oracle for what the rewritten graph does.

Slow and literal on purpose, as tests/reference.py: each sample is split on its own with Python loops, a new sequence is
a list of `Token`s that name positions of the old one. Nothing here imports tome_fx. Written from formulas alone.

    model = plain(seed=0, prefix=1)                                  # float64, eval
    features, source, sizes = reduced(model, images, "tome", 3)      # [B, N', D], [B, N], [B, N']
    groups(source)                                                   # per sample, which tokens went together
    spread(features, source)                                         # [B, N, D]: the row of each original token

What all methods share:

- A block is x = x + attn(norm1(x)); *reduce*; x = x + mlp(norm2(x)). The reduction sees that attention's own q and k.
- keys: the attention's keys, mean over the heads. cos: cosine similarity, taken in float64.
- The first `prefix` tokens are special (the class token first): they never take part, and stay in front. The others
  are free.
- size: original tokens behind a token. Proportional attention: log(size) is added to each key's scores. Methods
  without sizes keep every size at 1, so nothing is added, and return ones. Dropped tokens count for nothing more.
- class attention: the softmax row of token 0 over all keys (log sizes included), mean over heads. Without special
  tokens: attention received, the mean over heads and all query rows of the weights onto a key.
- alternating: of the free tokens, those at even positions of the whole sequence (specials counted) are sources A, those
  at odd ones destinations B. The new order is specials, surviving A's, surviving B's, each in position order.
- Methods whose split is not alternating keep what survives in position order.
- r is cut to what makes sense: half of the free tokens (rounded down) for alternating methods and pitome, all but one
  for methods that split by a score, all sources for grid, all frames but the first for evs.
- Ties (which only equal tokens make) go to the lower position.
- `source` of a dropped token is the row of the token it is assigned to, later merges included.
- The place of a token on the grid is that of its representative: of the destination it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- the model -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention with one Linear for q, k and v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """Images [B, 3, H, W] (or embedded tokens [B, h*w, D]) -> all tokens [B, prefix + h*w, D]. No positions."""

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 4, patch: int = 4, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        if prefix:
            self.special = nn.Parameter(torch.randn(prefix, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        for block in self.blocks:  # attention that is far from uniform
            nn.init.normal_(block.attn.qkv.weight, std=1.5 / math.sqrt(dim))

    def embed(self, x: Tensor) -> Tensor:
        """The tokens that enter the first block."""
        if x.dim() == 4:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if self.prefix:
            x = torch.cat([self.special.expand(x.shape[0], -1, -1), x], dim=1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def plain(seed: int = 0, dtype: torch.dtype = torch.float64, **shape: int) -> Plain:
    """A Plain with weights of its own seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain(**shape).to(dtype).eval()


# -- what a method sees, and what it answers -------------------------------------------------------------------------


@dataclass
class Token:
    """A token of the new sequence, in positions of the old one."""

    at: int  # what it continues: its place on the grid is this one's
    joined: list[int]  # whose values meet in it, `at` among them
    lost: list[int] = field(default_factory=list)  # dropped, and assigned to it


@dataclass
class View:
    """One sample in one block, after the attention's residual add."""

    x: Tensor  # [n, D], the stream
    keys: Tensor  # [n, d], mean over heads
    weights: Tensor  # [heads, n, n], the softmax
    size: Tensor  # [n]
    place: list[tuple[int, int]]  # row and column of each token (of a special one: never read)
    code: Tensor  # [n, P], tosa's code of the place
    prefix: int
    layer: int = 0
    layers: int = 1
    source: list[int] = field(default_factory=list)  # original token -> row

    @property
    def free(self) -> list[int]:
        return list(range(self.prefix, len(self.x)))

    @property
    def half(self) -> int:
        return len(self.free) // 2

    @property
    def received(self) -> Tensor:
        """Attention received, [n]: mean over heads and over all query rows."""
        return self.weights.mean(dim=(0, 1))

    @property
    def importance(self) -> Tensor:
        """Class attention, [n]; without special tokens attention received."""
        return self.weights[:, 0].mean(dim=0) if self.prefix else self.received


Score = Callable[[int, int], Any]


def cosines(rows: Tensor) -> list[list[float]]:
    """Cosine similarity of every two rows."""
    unit = F.normalize(rows.detach().double(), dim=-1)
    return (unit @ unit.T).tolist()


def alternating(view: View) -> tuple[list[int], list[int]]:
    """(A, B): the free tokens at even and at odd positions of the whole sequence."""
    return [i for i in view.free if i % 2 == 0], [i for i in view.free if i % 2 == 1]


def best_pairs(sources: Sequence[int], destinations: Sequence[int], score: Score, r: int) -> dict[int, int]:
    """source -> destination: the r best of the pairs of each source with its best destination."""
    if r <= 0:
        return {}
    best = {i: max(destinations, key=partial(score, i)) for i in sources}
    ranked = sorted(sources, key=lambda i: score(i, best[i]), reverse=True)
    return {i: best[i] for i in ranked[:r]}


def nearest(sources: Iterable[int], destinations: Sequence[int], similar: list[list[float]]) -> dict[int, int]:
    """source -> its most similar destination."""
    return {i: max(destinations, key=similar[i].__getitem__) for i in sources}


def lowest(scores: Tensor, among: list[int], r: int) -> list[int]:
    """The r positions of lowest score, lowest first."""
    return sorted(among, key=scores.tolist().__getitem__)[:r]


def tokens(order: Iterable[int], joined: dict[int, int], lost: dict[int, int]) -> list[Token]:
    """One token for each position of `order`; `joined` and `lost` say where to the other positions go."""
    return [
        Token(i, sorted([i, *(j for j in joined if joined[j] == i)]), sorted(j for j in lost if lost[j] == i))
        for i in order
    ]


def in_place(view: View, joined: dict[int, int], lost: dict[int, int]) -> list[Token]:
    """What is neither joined nor lost, in position order."""
    return tokens([i for i in range(len(view.x)) if i not in joined and i not in lost], joined, lost)


def sides(view: View, joined: dict[int, int], lost: dict[int, int]) -> list[Token]:
    """What is neither joined nor lost, in the order of an alternating reduction."""
    a, b = alternating(view)
    return tokens([i for i in [*range(view.prefix), *a, *b] if i not in joined and i not in lost], joined, lost)


def alternate(view: View, r: int, score: Score) -> list[Token]:
    """Alternating sides, the r best pairs merge."""
    a, b = alternating(view)
    return sides(view, best_pairs(a, b, score, min(r, view.half)), {})


# -- the methods -----------------------------------------------------------------------------------------------------


def tome(view: View, r: int) -> list[Token]:
    """Alternating: each A with its most similar B (cos of keys), the r best pairs merge by size-weighted mean.
    Proportional attention. Every block."""
    similar = cosines(view.keys)
    return alternate(view, r, lambda i, j: similar[i][j])


def saint(view: View, r: int, tau: float = 0.75, gamma: float = 10) -> list[Token]:
    """S = cos(A, B) of keys, M = S >= tau, n_i = row sum of M; score_i = n_i * exp(gamma * (mean of S_ij over M - tau))
    if n_i > 0, else the row mean of S. The r A-tokens of highest score are dropped, each assigned to its most similar
    B. No sizes, no proportional attention. Blocks with index < L/2.

    reduced(..., r=None): r is `saint_count` of the batch in each of the blocks."""
    similar = cosines(view.keys)
    a, b = alternating(view)

    def score(i: int) -> float:
        row = [similar[i][j] for j in b]
        over = [s for s in row if s >= tau]
        if not over:
            return sum(row) / len(row)
        return len(over) * math.exp(gamma * (sum(over) / len(over) - tau))

    dropped = sorted(a, key=score, reverse=True)[: min(r, view.half)] if b else []
    return sides(view, {}, nearest(dropped, b, similar))


def saint_count(keys: Tensor, prefix: int, tau: float = 0.75, least: int = 5) -> int:
    """SAINT's r of a batch: the number of A-rows with n_i >= K (`least`), averaged over the batch, rounded down.
    keys: [B, n, d], mean over heads."""
    n, found = keys.shape[1], 0
    for sample in keys:
        similar = cosines(sample)
        for i in range(prefix, n):
            if i % 2 == 0:
                found += sum(similar[i][j] >= tau for j in range(prefix, n) if j % 2 == 1) >= least
    return found // len(keys)


def tosa(view: View, r: int, alpha: str | float = "rising") -> list[Token]:
    """tome with S = alpha_l * cos(kA, kB) + (1 - alpha_l) * cos(pA, pB). alpha_l = l / (L - 1) ("rising"), 1 - l / (L -
    1) ("falling"), or a number. With one block alone l / (L - 1) is 0. p: see `place_code`; it is merged by
    size-weighted mean like the tokens.

    reduced(..., depth=[B, h*w] in [0, 1], levels=16): with depth in p."""
    rise = view.layer / max(view.layers - 1, 1)
    share = {"rising": rise, "falling": 1 - rise}[alpha] if isinstance(alpha, str) else alpha
    meaning, space = cosines(view.keys), cosines(view.code)
    return alternate(view, r, lambda i, j: share * meaning[i][j] + (1 - share) * space[i][j])


def place_code(row: int, column: int, depth: float | None = None, levels: int = 16) -> list[float]:
    """For each coordinate c, with w_i = 10000^(-i/16), i = 0..15: all sin(c * w_i), then all cos(c * w_i). First the
    row, then the column (in patches), then the depth as a level: floor(depth * levels), at most levels - 1."""
    level = [] if depth is None else [min(math.floor(depth * levels), levels - 1)]
    frequencies = [10000 ** (-i / 16) for i in range(16)]
    return [f(c * w) for c in [row, column, *level] for f in (math.sin, math.cos) for w in frequencies]


def mstm(view: View, r: int) -> list[Token]:
    """Crucial: the (free - r) free tokens of highest class attention. Each other one joins its most similar (cos of
    keys) crucial one, size-weighted mean. Proportional attention. Every block."""
    others = lowest(view.importance, view.free, min(r, len(view.free) - 1))
    crucial = [i for i in view.free if i not in others]
    return in_place(view, nearest(others, crucial, cosines(view.keys)), {})


def evit(view: View, r: int) -> list[Token]:
    """The r + 1 free tokens of lowest class attention become one, their mean weighted by that attention; it stands
    where the one of highest attention among them stood. No sizes, no proportional attention. Blocks L//4, L//2,
    3L//4."""
    fused = lowest(view.importance, view.free, min(r, len(view.free) - 1) + 1)
    return in_place(view, {i: fused[-1] for i in fused[:-1]}, {})


def diffrate(view: View, r: int, prune: float = 1 / 3) -> list[Token]:
    """Of the r free tokens of lowest class attention the int(r * prune) lowest are dropped, the others each merge into
    the most similar (cos of keys) of the (free - r) remaining ones, size-weighted mean; the dropped ones are assigned
    to their most similar remaining one. Proportional attention. Every block."""
    r = min(r, len(view.free) - 1)
    low = lowest(view.importance, view.free, r)
    kept, similar = [i for i in view.free if i not in low], cosines(view.keys)
    dropped, merged = low[: int(r * prune)], low[int(r * prune) :]
    return in_place(view, nearest(merged, kept, similar), nearest(dropped, kept, similar))


def pitome(view: View, r: int, margin: float = 0.9) -> list[Token]:
    """Energy E_i = mean over all free tokens j, i among them, of f(cos(k_i, k_j)); f(x) = x where x >= m, else
    exp(x - m) - 1; m = margin * (1 - l / L). Of the 2r tokens of highest energy, in that order, the 1st, 3rd, 5th...
    are A, the 2nd, 4th... are B; each A joins its most similar (cos of keys) B, size-weighted mean. Proportional
    attention. Every block."""
    floor, similar = margin * (1 - view.layer / view.layers), cosines(view.keys)

    def energy(i: int) -> float:
        row = [similar[i][j] for j in view.free]
        return sum(s if s >= floor else math.exp(s - floor) - 1 for s in row) / len(row)

    high = sorted(view.free, key=energy, reverse=True)[: 2 * min(r, view.half)]
    return in_place(view, nearest(high[0::2], high[1::2], similar), {})


def tofu(view: View, r: int) -> list[Token]:
    """tome's pairs. Blocks with index < L/2 drop the A (the B's row and size stay), later ones merge by MLERP (see
    `mlerp`). Proportional attention. Every block."""
    if view.layer >= view.layers / 2:
        return tome(view, r)
    a, b = alternating(view)
    similar = cosines(view.keys)
    return sides(view, {}, best_pairs(a, b, lambda i, j: similar[i][j], min(r, view.half)))


def mctf(view: View, r: int, info: float = 1 / 20, size: float = 1 / 40) -> list[Token]:
    """edge(i, j) = s * (info_i * info_j)^(1/20) * (size_i * size_j)^(1/40), with s = (cos(x_i, x_j) + 1) / 2 of the
    stream, info_i = min(a) / a_i of attention received (also where there is a class token), size_i = min(size) /
    size_i, minima over the free tokens. Alternating, both ways: first the ceil(r / 2) best A -> B edges (each A's best
    B), then floor(r / 2) from B's that are no destination yet to A's that stayed (each such B's best such A), by the
    same edges. Size-weighted mean. Proportional attention. Every block."""
    similar, a, sizes = cosines(view.x), view.received.tolist(), view.size.tolist()
    rare = {i: min(a[j] for j in view.free) / a[i] for i in view.free}
    small = {i: min(sizes[j] for j in view.free) / sizes[i] for i in view.free}

    def edge(i: int, j: int) -> float:
        return (similar[i][j] + 1) / 2 * (rare[i] * rare[j]) ** info * (small[i] * small[j]) ** size

    even, odd = alternating(view)
    r = min(r, view.half)
    there = best_pairs(even, odd, edge, math.ceil(r / 2))
    back = best_pairs(
        [j for j in odd if j not in there.values()], [i for i in even if i not in there], edge, math.floor(r / 2)
    )
    return sides(view, there | back, {})


def cell(view: View, i: int) -> tuple[int, int]:
    """The 2x2 window of the grid that a token's representative stands in."""
    row, column = view.place[i]
    return row // 2, column // 2


def grid(view: View, r: int) -> list[Token]:
    """Destinations: the first token, in position order, of each 2x2 cell of the grid (before any merge: the top-left
    one); sources: all other free tokens. The r best (cos of keys; each source with its best destination, of any cell)
    merge, plain mean of the rows that meet. No sizes, no proportional attention. Every block."""
    first = {cell(view, i): i for i in reversed(view.free)}
    destinations = sorted(first.values())
    sources = [i for i in view.free if i not in destinations]
    similar = cosines(view.keys)
    return in_place(view, best_pairs(sources, destinations, lambda i, j: similar[i][j], min(r, len(sources))), {})


def window(view: View, r: int) -> list[Token]:
    """tome with pairs inside one 2x2 window of the grid before all other pairs, for an A's choice of its B as for the
    choice of the r pairs."""
    similar = cosines(view.keys)
    return alternate(view, r, lambda i, j: (cell(view, i) == cell(view, j), similar[i][j]))


def band(view: View, r: int, k: int = 1) -> list[Token]:
    """tome with pairs of |i - j| <= k, in current positions, before all other pairs, for an A's choice of its B as for
    the choice of the r pairs."""
    similar = cosines(view.keys)
    return alternate(view, r, lambda i, j: (abs(i - j) <= k, similar[i][j]))


def saint_vlm(view: View, r: int) -> list[Token]:
    """r tokens are dropped one after the other: always the free one with the largest sum of similarities (cos of keys)
    to all remaining free ones. In the end each is assigned to its most similar remaining one. No sizes. Last block."""
    similar, left = cosines(view.keys), view.free
    for _ in range(min(r, len(left) - 1)):
        left.remove(max(left, key=lambda i: sum(similar[i][j] for j in left)))
    return in_place(view, {}, nearest([i for i in view.free if i not in left], left, similar))


def evs(view: View, r: int, frames: int) -> list[Token]:
    """The free tokens are a (frames, h, w) grid: frames stacked along the height of the image. The r tokens that are
    most similar (cos of the stream) to the token at the same place of the previous frame are dropped; the first frame
    never drops. Each is assigned to where that token is, or was itself assigned. No sizes. Last block, the only one."""
    assert len(view.free) % frames == 0 and view.source == list(range(len(view.x)))
    per, similar = len(view.free) // frames, cosines(view.x)
    dropped = sorted(view.free[per:], key=lambda i: similar[i][i - per], reverse=True)[:r]
    lost = {}
    for i in sorted(dropped):
        lost[i] = lost.get(i - per, i - per)
    return in_place(view, {}, lost)


# -- how rows that meet become one -----------------------------------------------------------------------------------


def weighted(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows * weight[:, None]).sum(dim=0) / weight.sum()


def by_size(view: View, at: list[int]) -> Tensor:
    """Size-weighted mean."""
    return weighted(view.x[at], view.size[at])


def by_attention(view: View, at: list[int]) -> Tensor:
    """Mean weighted by class attention; no gradient goes through the weights."""
    return weighted(view.x[at], view.importance[at].detach())


def plain_mean(view: View, at: list[int]) -> Tensor:
    """Mean, each row once."""
    return view.x[at].mean(dim=0)


def mlerp(view: View, at: list[int]) -> Tensor:
    """The direction of the size-weighted mean, with the largest norm of the rows."""
    return F.normalize(by_size(view, at), dim=0) * view.x[at].norm(dim=-1).max()


@dataclass
class Method:
    split: Callable[..., list[Token]]
    mix: Callable[[View, list[int]], Tensor] = by_size
    sizes: bool = True  # without: all stay 1
    blocks: Callable[[int], Iterable[int]] = range  # of how many blocks, which reduce where r is one number


METHODS = {
    "tome": Method(tome),
    "saint": Method(saint, sizes=False, blocks=lambda n: [i for i in range(n) if i < n / 2]),
    "tosa": Method(tosa),
    "mstm": Method(mstm),
    "evit": Method(evit, by_attention, sizes=False, blocks=lambda n: [n // 4, n // 2, 3 * n // 4]),
    "diffrate": Method(diffrate),
    "pitome": Method(pitome),
    "tofu": Method(tofu, mlerp),
    "mctf": Method(mctf),
    "grid": Method(grid, plain_mean, sizes=False),
    "window": Method(window),
    "band": Method(band),
    "saint_vlm": Method(saint_vlm, sizes=False, blocks=lambda n: [n - 1]),
    "evs": Method(evs, sizes=False, blocks=lambda n: [n - 1]),
}


# -- the reduced model -----------------------------------------------------------------------------------------------


def attention(attn: Attention, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, keys averaged over the heads, softmax weights), with log(size) added to every key's scores."""
    b, n, c = x.shape
    q, k, v = attn.qkv(x).reshape(b, n, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + size.log()[:, None, None, :]).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c)), k.mean(dim=1), weights


def reduce(view: View, method: Method, r: int, params: dict[str, Any]) -> View:
    """One sample after one reduction. Its keys and weights stay those of the old sequence."""
    if r == 0:
        return view
    new = method.split(view, r, **params)
    went = [i for token in new for i in [*token.joined, *token.lost]]
    assert sorted(went) == list(range(len(view.x))), "each old token goes to one new token"
    row_of = {i: row for row, token in enumerate(new) for i in [*token.joined, *token.lost]}
    return replace(
        view,
        x=torch.stack([method.mix(view, t.joined) if len(t.joined) > 1 else view.x[t.at] for t in new]),
        size=torch.stack([view.size[t.joined].sum() if method.sizes else view.size[t.at] for t in new]),
        code=torch.stack([weighted(view.code[t.joined], view.size[t.joined]) for t in new]),
        place=[view.place[t.at] for t in new],
        source=[row_of[i] for i in view.source],
    )


def per_block(r: int | Sequence[int] | None, method: Method, layers: int) -> list[int | None]:
    """r of each block: one number for the method's own blocks, a list as it is."""
    if isinstance(r, Sequence):
        assert len(r) == layers
        return list(r)
    where = list(method.blocks(layers))
    return [r if layer in where else 0 for layer in range(layers)]


def begin(model: Plain, images: Tensor, depth: Tensor | None, levels: int) -> list[View]:
    """Each sample as it enters the first block."""
    x, p, layers = model.embed(images), model.prefix, len(model.blocks)
    b, n = x.shape[:2]
    width = images.shape[3] // model.patch_embed.stride[1] if images.dim() == 4 else n - p
    place = [(0, 0)] * p + [divmod(i, width) for i in range(n - p)]
    views = []
    for i in range(b):
        depths = [None] * n if depth is None else [0.0] * p + depth[i].tolist()
        code = x.new_tensor([place_code(*at, d, levels) for at, d in zip(place, depths, strict=True)])
        nothing = x.new_empty(0)
        views.append(View(x[i], nothing, nothing, x.new_ones(n), place, code, p, 0, layers, list(range(n))))
    return views


def reduced(
    model: Plain,
    images: Tensor,
    method: str,
    r: int | Sequence[int] | None,
    *,
    depth: Tensor | None = None,
    levels: int = 16,
    least: int = 5,
    **params: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(features [B, N', D], source [B, N], sizes [B, N']) of the model with r tokens fewer after each merging block.

    r: one number for all blocks in which the method reduces by itself, or a list with one per block (taken as it is);
    None: SAINT's own count, with K = `least`. images: [B, 3, H, W]; or tokens [B, N, D], a grid of one row. depth,
    levels: see `tosa`. params: of the method's function above."""
    how = METHODS[method]
    assert r is not None or method == "saint"
    views = begin(model, images, depth, levels)
    for layer, (block, count) in enumerate(zip(model.blocks, per_block(r, how, len(model.blocks)), strict=True)):
        x, size = torch.stack([v.x for v in views]), torch.stack([v.size for v in views])
        out, keys, weights = attention(block.attn, block.norm1(x), size)
        x = x + out
        if count is None:
            count = saint_count(keys, model.prefix, params.get("tau", 0.75), least)
        views = [replace(v, x=x[i], keys=keys[i], weights=weights[i], layer=layer) for i, v in enumerate(views)]
        views = [reduce(v, how, count, params) for v in views]
        views = [replace(v, x=v.x + block.mlp(block.norm2(v.x))) for v in views]
    features = model.norm(torch.stack([v.x for v in views]))
    return features, torch.tensor([v.source for v in views], device=x.device), torch.stack([v.size for v in views])


# -- comparing -------------------------------------------------------------------------------------------------------


def groups(source: Tensor) -> list[set[frozenset[int]]]:
    """For each sample, which original tokens share a row: equal for two `source`s that differ in the rows' order."""
    return [{frozenset(i for i, to in enumerate(rows) if to == row) for row in set(rows)} for rows in source.tolist()]


def spread(features: Tensor, source: Tensor) -> Tensor:
    """[B, N, D]: for each original token the row that stands for it, whatever the rows' order."""
    return torch.stack([rows[to] for rows, to in zip(features, source, strict=True)])
