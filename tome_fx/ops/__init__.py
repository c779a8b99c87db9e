"""The `tome` operators: match, merge and unmerge along a token axis.

All three share one index form. For a token axis of N tokens that a merge shortens to N' = N - r:

- `assign` int64 `[*sample, N]`, values in [0, N'): the new position of every old token,
- `keep` int64 `[*sample, N']`: the old position of each new token's representative,
- `moved` int64 `[*sample, r]`: the old positions of the tokens that were merged away, most similar first.

`keep` and `moved` follow from `assign`, but carrying them lets a merge touch r rows instead of N.
`*sample` are the leading axes along which each entry is merged on its own (batch, frame, window).

Which form is fastest depends on the device, and the pass `lower` chooses. `match`, `merge`, `merge_bias`, `merge_size`,
`log_size` and `unmerge` are opaque to the compiler: on a CPU each length of the token axis would give Inductor another
five kernels per layer to compile, and a training step gathers rows faster by itself than in the loops of norms and of
their gradients. `*_aten` are the same functions spelled out, for where fusing pays. Where calls are opaque, each costs
its dispatch and a pass over memory: `lower` puts `match_size` and `merge_add` in the place of several.

`match_by` is `match` with the choices that are not the paper's: their functions are in `tome_fx.matching`. How an
operator is registered: `library`.
"""

from tome_fx.ops.index import check_shapes
from tome_fx.ops.kinds import LEFT_OUT, apart, key_kinds, key_weight, part_labels, place_kinds, places, seen_first
from tome_fx.ops.library import spelled_out
from tome_fx.ops.matchings import (
    best_partner_aten,
    directions,
    match,
    match_aten,
    match_by,
    match_parts,
    match_size,
    pair_nulls,
    shared_out,
)
from tome_fx.ops.merging import (
    log_size,
    merge,
    merge_add,
    merge_aten,
    merge_backward,
    merge_backward_aten,
    merge_bias,
    merge_bias_aten,
    merge_setup,
    merge_size,
    merge_size_aten,
)
from tome_fx.ops.pieces import (
    attention_paid,
    grid_places,
    match_pieces,
    match_some,
    picked,
    place_code,
    place_metric,
    side_code,
    some_picked,
    tokens_of,
    with_side,
)
from tome_fx.ops.products import product
from tome_fx.ops.unmerging import unmerge, unmerge_aten, unmerge_backward, unmerge_backward_aten

__all__ = [
    "LEFT_OUT",
    "apart",
    "attention_paid",
    "best_partner_aten",
    "check_shapes",
    "directions",
    "grid_places",
    "key_kinds",
    "key_weight",
    "log_size",
    "match",
    "match_aten",
    "match_by",
    "match_parts",
    "match_pieces",
    "match_size",
    "match_some",
    "merge",
    "merge_add",
    "merge_aten",
    "merge_backward",
    "merge_backward_aten",
    "merge_bias",
    "merge_bias_aten",
    "merge_setup",
    "merge_size",
    "merge_size_aten",
    "pair_nulls",
    "part_labels",
    "picked",
    "place_code",
    "place_kinds",
    "place_metric",
    "places",
    "product",
    "seen_first",
    "shared_out",
    "side_code",
    "some_picked",
    "spelled_out",
    "tokens_of",
    "unmerge",
    "unmerge_aten",
    "unmerge_backward",
    "unmerge_backward_aten",
    "with_side",
]
