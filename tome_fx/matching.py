"""Which tokens merge: partitions, similarities and matchers, each a small function with a name.

A partition parts the tokens in two, a similarity compares two sets of them, a matcher picks r pairs. The options
`partition`, `similarity` and `matcher` of `tome_backend` name one each, and `register_matcher` adds a matcher. The
names travel in the graph as arguments of `tome::match_by`; the functions are looked up in each call.

Matchers see only the tokens that may merge: protected ones are cut off before, and the index form of `tome_fx.ops` is
made of their pairs after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Similarity = Callable[[Tensor, Tensor], Tensor]
"""`[..., n, d]` and `[..., m, d]`, float32 -> `[..., n, m]`, the more alike the larger."""
Partition = Callable[[int, int, torch.device], tuple[Tensor, Tensor]]
"""Number of tokens, position of the first of them in the whole sequence, device -> int64 positions of sources and of
destinations, both ascending, neither fewer than half of the tokens rounded down."""
Matcher = Callable[[Tensor, int, Tensor, Tensor, Similarity], tuple[Tensor, Tensor, Tensor]]
"""See `register_matcher`."""

SMALLEST_NORM = 1e-12
"""Shorter vectors have no direction."""


# -- similarity --------------------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle, what the paper takes (ToMe, arXiv 2210.09461, section 3 and table 1); 1 between zeros."""
    norms = [x.norm(dim=-1, keepdim=True) for x in (a, b)]
    alike = dot(*(x / norm.clamp_min(SMALLEST_NORM) for x, norm in zip((a, b), norms, strict=True)))
    return torch.where((norms[0] == 0) & (norms[1] == 0).transpose(-1, -2), 1.0, alike)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product: long vectors are like everything (table 1)."""
    return a @ b.transpose(-1, -2)


SIMILARITIES: dict[str, Similarity] = {"cosine": cosine, "dot": dot}


# -- partition ---------------------------------------------------------------------------------------------------------


def alternating(n: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources at even positions of the whole sequence, destinations at odd ones: what the paper takes (table 1)."""
    places = torch.arange(n, device=device)
    return places[first % 2 :: 2], places[1 - first % 2 :: 2]


def sequential(n: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first half are sources, the second destinations (table 1)."""
    places = torch.arange(n, device=device)
    return places[: (n + 1) // 2], places[(n + 1) // 2 :]


def random_halves(n: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random half are sources (table 1): for one n always the same."""
    order = permutation(n, device)
    return order[: (n + 1) // 2].sort().values, order[(n + 1) // 2 :].sort().values


@functools.lru_cache(maxsize=256)
def permutation(n: int, device: torch.device) -> Tensor:
    """int64 `[n]`: a random order of n things, for one n the same in each call, process and device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(device)


PARTITIONS: dict[str, Partition] = {"alternating": alternating, "sequential": sequential, "random": random_halves}


# -- in blocks ---------------------------------------------------------------------------------------------------------

AT_ONCE = 2**24
"""Similarities that are held at a time: those of 8,192 tokens are fewer, and one product is as fast as any."""


def best_of(a: Tensor, b: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """float32 and int64 `[batch, n]`: how like each of `[batch, n, d]` its best of `[batch, m, d]` is, and the rank of
    that one. Memory is linear in n and m."""
    pairs = a.shape[0] * a.shape[1] * b.shape[1]
    if not isinstance(pairs, int) or pairs <= AT_ONCE:  # a number that is free while tracing is compared with nothing
        best, partner = similarity(a, b).max(-1)
        return best, partner
    step = max(AT_ONCE // (a.shape[0] * b.shape[1]), 1)
    found = [similarity(some, b).max(-1) for some in a.split(step, 1)]
    return torch.cat([best for best, _ in found], 1), torch.cat([partner for _, partner in found], 1)


# -- matchers ----------------------------------------------------------------------------------------------------------


def bipartite(
    metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Similarity
) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching (section 3): the r sources whose best destination is most like them."""
    best, partner = best_of(metric[:, sources], metric[:, destinations], similarity)
    best, chosen = best.topk(r)
    return sources[chosen], destinations[partner.gather(1, chosen)], best


def random_pairs(
    metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Similarity
) -> tuple[Tensor, Tensor, Tensor]:
    """r random pairs of all tokens, for one number of tokens always the same, in all samples: the baseline."""
    order = permutation(metric.shape[1], metric.device)
    source, destination = order[:r], order[r : 2 * r]
    alike = similarity(metric[:, source].unsqueeze(2), metric[:, destination].unsqueeze(2)).flatten(1)
    return source.expand_as(alike), destination.expand_as(alike), alike


_MATCHERS: dict[str, Matcher] = {"bipartite": bipartite, "random": random_pairs}
BUILT_IN = tuple(_MATCHERS)


def matchers() -> tuple[str, ...]:
    """The names that `matcher` may have now."""
    return tuple(_MATCHERS)


def register_matcher(name: str, fn: Matcher | None = None, *, replace: bool = False) -> Any:
    """Make a matcher known: `tome_backend(matcher=name)`. With a name alone, a decorator. Returns the function.

    fn gets, positionally,

    - metric: float32 `[batch, N, d]`, what the N tokens that may merge are compared by (the option `metric`);
    - r: pairs to return, at most N // 2;
    - sources, destinations: int64 `[S]` and `[D]`, the two sides of the option `partition`, ascending positions in N;
    - similarity: the function of the option `similarity`, `[..., n, d]` and `[..., m, d]` to `[..., n, m]`;

    and returns

    - source: int64 `[batch, r]`, the tokens merged away, all different; they may be of either side;
    - destination: int64 `[batch, r]`, the token that each of them joins, none of them a source;
    - similarity: floating `[batch, r]`, how alike each pair is, for the trace.

    What it returns is checked in each call, and ValueError says what is wrong. It runs outside autograd and autocast,
    and the compiler does not look into it. Where a mask leaves tokens out, the metric is such that these are least like
    the others: a matcher that does not go by it may put both into one group, which the mask outlives.

    Raises: TypeError for a name that is no string or a function that cannot be called, ValueError for a name that is
    taken (`replace=True`: built-in names alone; code that is compiled already calls the new function).
    """
    if not isinstance(name, str):
        raise TypeError(f'a matcher needs a name, as in @register_matcher("nearest"), got {name!r}')
    if not name:
        raise ValueError("a matcher needs a name that is not empty")
    if name in BUILT_IN:
        raise ValueError(f'the matcher "{name}" is built in: choose another name')
    if name in _MATCHERS and not replace:
        raise ValueError(f'there is a matcher "{name}" already: choose another name, or pass replace=True')
    if fn is None:
        return functools.partial(register_matcher, name, replace=replace)
    if not callable(fn):
        raise TypeError(f"a matcher must be a function, got {fn!r}")
    _MATCHERS[name] = fn
    return fn


def pairs(
    metric: Tensor, r: int, first: int, matcher: str, partition: str, similarity: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r pairs of the tokens of a metric `[batch, N, d]`; first: the position of the first of them in the sequence.

    Returns source, destination (int64 `[batch, r]`) and similarity (float32 `[batch, r]`), most similar first; and
    int64 `[N]`, the positions side by side: sources of the partition, then destinations.

    Raises ValueError where there is no matcher of that name (in a process that did not register it), or where it
    returns what it must not.
    """
    if matcher not in _MATCHERS:
        raise ValueError(f'no matcher "{matcher}" is registered here; there are {", ".join(_MATCHERS)}')
    sources, destinations = PARTITIONS[partition](metric.shape[1], first, metric.device)
    source, destination, alike = checked(matcher, metric, r, sources, destinations, SIMILARITIES[similarity])
    alike, order = alike.to(torch.float32).sort(stable=True, dim=-1, descending=True)
    return source.gather(1, order), destination.gather(1, order), alike, torch.cat([sources, destinations])


def checked(
    matcher: str, metric: Tensor, r: int, sources: Tensor, destinations: Tensor, similarity: Similarity
) -> tuple[Tensor, Tensor, Tensor]:
    """What a matcher finds. Raises ValueError unless one that was registered returns r pairs that can be merged."""
    found = _MATCHERS[matcher](metric, r, sources, destinations, similarity)
    if matcher not in BUILT_IN:
        check_pairs(f'matcher "{matcher}"', found, metric.shape[0], metric.shape[1], r)
    return found


def check_pairs(what: str, found: Any, batch: int, n: int, r: int) -> None:
    """Raise ValueError unless a matcher returned r pairs that can be merged."""

    def refuse(why: str) -> None:
        raise ValueError(f"the {what} must return (source, destination, similarity): {why}")

    if not isinstance(found, (tuple, list)) or len(found) != 3 or not all(isinstance(x, Tensor) for x in found):
        refuse(f"three tensors, got {type(found).__name__}")
    for name, x in zip(("source", "destination", "similarity"), found, strict=True):
        if tuple(x.shape) != (batch, r):
            refuse(f"{name} has shape {list(x.shape)}, not [batch, r] = {[batch, r]}")
        if not x.is_floating_point() if name == "similarity" else x.dtype is not torch.int64:
            refuse(f"{name} is {x.dtype}, not {'floating' if name == 'similarity' else 'torch.int64'}")
    source, destination, _ = found
    if r == 0:
        return
    both = torch.cat([source, destination], 1)
    inside = (both >= 0) & (both < n)
    times = torch.zeros(batch, n, dtype=torch.int64, device=both.device).scatter_add(
        1, source.clamp(0, n - 1), torch.ones_like(source)
    )
    again = times.gather(1, destination.clamp(0, n - 1))
    # One read of the device for all three.
    fine = torch.stack([inside.all(), times.max() <= 1, again.max() == 0]).tolist()
    if not fine[0]:
        refuse(f"positions must be in [0, {n}), got {int(both.min())} to {int(both.max())}")
    if not fine[1]:
        refuse("a source stands in two pairs; each token merges away once")
    if not fine[2]:
        refuse("a destination is a source too; a token that others join must stay")
