"""groups: finding the groups of a merge: what tokens are compared by, what keeps them apart, and their sizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tome_fx.methods.how import PAID

from ..algebra.axes import Dim, Dims, Size, leaves, locate, size_of
from ..algebra.axes import expr as size_expr
from ..algebra.layout import Run, Step, plain
from ..analysis.blocks import Block
from ..analysis.grid import grid_of
from ..analysis.masks import KeyMask, token_dims
from ..analysis.projections import Projection
from ..analysis.sites import Operand
from ..building.trace import Traced, cat
from .laid import Laid, dim_size, spot, token_spots
from .steps import SMALLEST, StepTensors, grown

if TYPE_CHECKING:
    from tome_fx.methods import How

    from ..plan import Merge
    from ..rewrite import Emitter

aten = torch.ops.aten
tome = torch.ops.tome
LEAST_ALPHA = 1e-3
"""Places alone are equally far in many pairs, which rounding would choose between: then the metric does."""


class Groups:
    """Matches the tokens of one merge after the other. env: the emitter whose graph it adds to."""

    def __init__(self, env: Emitter) -> None:
        self.env, self.facts, self.config = env, env.facts, env.config
        self.call, self.steps = env.builder.call, env.steps
        self._weights: dict[Any, Traced] = {}

    def find(self, merge: Merge, value: Laid | None) -> None:
        """Find the groups of a merge, and their sizes. value: what merges, before it does, if that is one value."""
        step, call, block, config, how = merge.step, self.call, merge.block, self.config, merge.how
        if merge.groups is not None:
            self.steps.held[step] = self.steps.of(merge.groups)
            return
        own = self._own(merge)
        metric, heads = self._metric(merge, value)
        metric, compared_by = metric.detach(), (config.similarity,) if config.similarity == "dot" else ()
        weight = self._weight(block, step.prev)
        classic = block.parts is not None or how.papers or how.classic
        if how.alpha is not None:
            code = self._code(block, own.prev)
            alpha = max(float(how.alpha), LEAST_ALPHA)
            metric, heads = call(tome.place_metric.default, metric, code, alpha, heads), False
        if weight is not None and classic:  # pieces read what is seen
            kind = call(tome.key_kinds.default, weight)
            metric, heads = call(tome.apart.default, metric, kind, heads, config.padding_first, *compared_by), False
        still = self._special(block, own.prev) if block.special.inner else None
        if still is not None and (classic or not how.counted):  # they are unlike all others, whatever they hold
            kind = call(tome.place_kinds.default, still)
            metric, heads = call(tome.apart.default, metric, kind, heads, True, *compared_by), False
        paid = self._paid(merge) if how.needs & PAID else None
        ends = (own.prefix, own.suffix, heads)
        if block.parts is not None:
            parts = self._parts(block, block.parts)
            found = call(tome.match_parts.default, metric, parts, merge.r, *ends, merge.even, *compared_by)
        elif how.papers:
            found = call(tome.match.default, metric, merge.r, *ends)
        elif how.classic:
            found = call(tome.match_by.default, metric, merge.r, *ends, how.matcher, how.partition, how.similarity)
        else:
            found = self._by_pieces(merge, value, (metric, heads), (own, weight, paid))
        assign, keep, moved, similarity = found
        prev = own.prev.site if own.prev is not None else None
        told = {"tome_merge": block.name, "tome_step": step.site, "tome_prev": prev, "tome_turn": self._turn(block)}
        similarity.node.args[0].meta.update(told)
        held = grown(StepTensors(assign, keep, moved, None), (-own.offset[0], -own.offset[1]))
        make = self._padded if how.padded else self._counted
        self.steps.held[step] = make(merge, held, weight, paid)

    def _turn(self, block: Block) -> int | None:
        """The place of a block in a list of r; None of an MLP."""
        (at, n), config = block.turn, self.config
        return config.chosen(n).index(at) if not block.mlp and at in config.chosen(n) else None

    def _by_pieces(
        self, merge: Merge, value: Laid | None, metric: tuple[Traced, bool],
        known: tuple[Step, Traced | None, Traced | None],
    ) -> Any:  # fmt: skip
        """What `tome::match_pieces` finds, or `match_some`. metric: with heads? known: the step as its attention sees
        it, what tokens weigh, their attention."""
        block, how, call, (own, weight, paid) = merge.block, merge.how, self.call, known
        counts = self.steps.of(own.prev).size if own.prev else None
        place = self._place(block, own.prev) if "place" in how.needs else None
        seen = None if weight is None else call(aten.gt.Scalar, weight, 0.5)
        if how.padded and counts is None:
            counts = call(aten.new_ones.default, metric[0], metric[0].shape[: -2 if metric[1] else -1],
                          dtype=torch.float32)  # fmt: skip
        still = self._special(block, own.prev) if block.special.inner and how.counted else None
        change = self._change(merge, value) if "change" in how.needs else None
        op, of_r = (tome.match_some, merge.r) if how.padded else (tome.match_pieces, merge.pruned)
        ends = (own.prefix, own.suffix, metric[1], self.config.padding_first)
        return call(op.default, metric[0], counts, paid, place, seen, merge.pairs, of_r, *ends, how.key, still, change)

    def _counted(self, merge: Merge, held: StepTensors, weight: Traced | None, paid: Traced | None) -> StepTensors:
        """The groups of a merge with their sizes, and what its tokens weigh in means. paid: their attention."""
        call, config, how = self.call, self.config, merge.how
        prev = merge.step.prev
        before = self.steps.of(prev).size if prev else None
        form = (held.assign, held.keep, held.moved)
        drops = how.merging == "prune"
        if not config.sized:
            keep, moved = call(tome.seen_first.default, weight, *form) if weight is not None else form[1:]
            return StepTensors(held.assign, keep, moved, None, weight, None, merging=how.merging)
        if drops or how.pruned:
            if before is None:
                before = call(aten.new_ones.default, held.assign, held.assign.shape, dtype=torch.float32)
            gone = held.moved if drops else held.moved.narrow(-1, merge.r - merge.pruned, merge.pruned)
            none_of = functools.partial(call, aten.scatter.value)
            weight = none_of(before if weight is None else weight, gone.dim() - 1, gone, 0.0)
            before = none_of(before, gone.dim() - 1, gone, 0.0)
        size = call(tome.merge_size.default, before, *form)
        weight = self._weighed(how, weight, paid)
        seen = call(tome.merge_size.default, weight, *form) if weight is not None else None
        keep, moved = self._leading(how, weight, held)
        own = before if drops or how.pruned else None
        return StepTensors(held.assign, keep, moved, size, weight, seen, own, how.merging)

    def _padded(self, merge: Merge, held: StepTensors, weight: Traced | None, paid: Traced | None) -> StepTensors:
        """As `_counted`, where rows are left that stand for nothing: they have size 0, before and after."""
        call, how, prev = self.call, merge.how, merge.step.prev
        before = self.steps.of(prev).size if prev else None
        if before is None:
            before = call(aten.new_ones.default, held.assign, held.assign.shape, dtype=torch.float32)
        live = call(aten.gt.Scalar, before, 0.0)
        if how.merging == "prune":  # of each group the one that stands for it is left
            dim = held.assign.dim() - 1
            place = call(aten.arange.default, held.assign.shape[-1], device=held.assign.device)
            before = before * call(aten.eq.Tensor, held.keep.gather(dim, held.assign), place)
        weight = self._weighed(how, weight, paid)
        weight = weight if weight is None else weight * live
        keep, moved = self._leading(how, weight, held)
        found = StepTensors(held.assign, keep, moved, None, weight, None, before, how.merging, padded=True)
        after = None if weight is None else self.steps.summed(found, weight)
        return replace(found, size=self.steps.summed(found, before), after=after)

    def _weighed(self, how: How, weight: Traced | None, paid: Traced | None) -> Traced | None:
        """What tokens weigh in means, by their attention where the merging says so."""
        if how.merging != "weighted":
            return weight
        assert paid is not None
        own_share = self.call(aten.clamp_min.default, paid, SMALLEST)
        return own_share if weight is None else own_share * weight

    def _leading(self, how: How, weight: Traced | None, held: StepTensors) -> tuple[Traced, Traced]:
        """keep and moved, where one row stands for a group with one that a mask leaves in before the others."""
        if weight is None or how.merging != "keep":
            return held.keep, held.moved
        found: tuple[Traced, Traced] = self.call(tome.seen_first.default, weight, held.assign, held.keep, held.moved)
        return found

    def _change(self, merge: Merge, value: Laid | None) -> Traced:
        """float32 [*sample, N]: how much the block changed each token, relative to what the stream was before."""
        block, call = merge.block, self.call
        assert value is not None
        now, before = (self._rows(merge, node, None, value)[0].detach() for node in (block.merge, block.stream))
        rows = (x.to(torch.float32) for x in (now - before, before))
        long, short = (call(aten.linalg_vector_norm.default, x, 2, [-1]) for x in rows)
        return long / call(aten.clamp_min.default, short, SMALLEST)

    @staticmethod
    def _own(merge: Merge) -> Step:
        """The step as it is to the tokens that its attention sees."""
        part = merge.step.within(*merge.block.around)
        assert part is not None and part.step is not None
        return part.step

    # -- what pieces of a method read ------------------------------------------------------------------------------

    def _paid(self, merge: Merge) -> Traced:
        """float32 [*sample, N]: what the attention of a block gives to each token, the mean of all that merge here."""
        each = [self._paid_by(own, merge).detach() for own in merge.block.heads]
        return each[0] if len(each) == 1 else functools.reduce(operator.add, each) / len(each)

    def _paid_by(self, block: Block, merge: Merge) -> Traced:
        """As `_paid`, of one attention: what its special token, or all of them on average, pay, from the operands that
        it has in the new graph, with sizes and masks in them."""
        builder = self.env.builder
        call, decision = self.facts.calls[block.site.out], self.env.plan.decisions[block.site.out]
        new = self.env.env[block.site.out].node
        assert new.target is aten.scaled_dot_product_attention.default
        held = {a.name: given for a, given in zip(new.target._schema.arguments, new.args, strict=False)} | new.kwargs
        nodes = (held.get(name) for name in ("query", "key", "attn_mask"))
        q, k, mask = (node and Traced(builder, node, node.meta["val"]) for node in nodes)
        special = block.special
        own = 0 if special.prefix else q.shape[-2] - special.suffix if special.suffix else -1
        at = -1 if "received" in merge.how.needs else own
        x = self.call(tome.attention_paid.default, q, k, mask, held.get("scale"), at)
        queries, keys = map(self.facts.dims, call.nodes[:2])
        dims, layout = (*queries[:-2], keys[-2]), (*decision.ins[0][:-2], decision.ins[1][-2])
        x, factors = Laid(x, dims, layout).factored()
        spots = [spot(factors, leaf) for leaf in leaves(merge.step.sample)]
        token = [i for i, (d, _) in enumerate(factors) if d == len(dims) - 1]
        heads = [i for i in range(len(factors)) if i not in (*spots, *token)]
        x = x.permute([*heads, *spots, *token])
        x = self.call(aten.mean.dim, x, [*range(len(heads))]) if heads else x
        return x.flatten(len(spots)) if len(token) > 1 else x

    def _place(self, block: Block, step: Step | None) -> Traced:
        """float32 [*sample, N, axes]: where on the grid the token that stands for a group is, in the state `step`."""

        def at_first() -> Traced:
            grid, size = grid_of(self.facts, self._tokens(block, block.site.k)), self.env.builder.size
            sizes, device = [*map(size, grid.sizes)], block.merge.meta["val"].device
            ends = size(grid.before), size(grid.behind)
            found = self.call(tome.grid_places.default, sizes, *ends, grid.frames, device=device)
            return found.expand([*self._sample_sizes(block), *found.shape])

        return self._of_leads(("place", block.tokens, leaves(block.sample)), step, at_first)

    def _of_leads(self, key: tuple[Any, ...], step: Step | None, at_first: Callable[[], Traced]) -> Traced:
        """What each token has at first, of the tokens that stand for the groups in the state `step`."""
        own = (*key, step)
        if own not in self._weights:
            if step is None:
                self._weights[own] = at_first()
            else:
                before = self._of_leads(key, step.prev, at_first)
                self._weights[own] = self.call(tome.unmerge.default, before, self.steps.of(step).keep)
        return self._weights[own]

    def _code(self, block: Block, step: Step | None) -> Traced:
        """float32 [*sample, N, c]: the codes of the places of each group, averaged like its tokens."""
        key = ("code", block.tokens, leaves(block.sample), step)
        if key not in self._weights:
            if step is None:
                code = self.call(tome.place_code.default, self._place(block, None))
                self._weights[key] = cat([code, self._side(block)], -1) if self.facts.side is not None else code
            else:
                self._weights[key] = self.steps.merged(self._code(block, step.prev), [step])
        return self._weights[key]

    def _side(self, block: Block) -> Traced:
        """float32 [*sample, N, c]: the code of what the caller says of each token; of others nothing."""
        assert self.facts.side is not None
        x = self._whole(self.facts.side)
        x = self.call(tome.side_code.default, x.flatten(1) if x.dim() > 2 else x, dict(self.config.numbers)["levels"])
        grid = grid_of(self.facts, block.tokens)
        sizes = [*map(self.env.builder.size, grid.sizes)]
        frames, own = sizes[: grid.frames], prod(sizes[grid.frames :])
        ends = [0, 0, *map(self.env.builder.size, (grid.before, grid.behind))]
        x = x.reshape([x.shape[0], *frames, own, x.shape[-1]])
        x = self.call(aten.constant_pad_nd.default, x, ends, 0.0).flatten(1, len(frames) + 1)
        return x.reshape([*self._sample_sizes(block), *x.shape[1:]])

    # -- what keeps tokens apart -----------------------------------------------------------------------------------

    def _weight(self, block: Block, step: Step | None) -> Traced | None:
        """float32 [*sample, N]: original tokens that the block's masks of keys leave in, in the state `step`."""
        if not block.masks:
            return None
        key = (block.masks, leaves(block.sample), step)
        if key not in self._weights:
            if step is None:
                weight, *others = [self.call(tome.key_weight.default, self._seen(block, m)) for m in block.masks]
                for other in others:
                    weight = self.call(aten.minimum.default, weight, other)
            else:
                at, before = self.steps.of(step), self._weight(block, step.prev)
                if at.own is not None:  # what was dropped is seen no more
                    before = before * self.call(aten.gt.Scalar, at.own, 0.0)
                if self.config.sized:
                    weight = self.steps.summed(at, before)
                else:
                    weight = self.call(tome.unmerge.default, before, at.keep)
            self._weights[key] = weight
        return self._weights[key]

    def _parts(self, block: Block, mask: fx.Node) -> Traced:
        """int64 [*sample, N]: the part of each token that a mask of pairs cuts; a special one is a part of its own."""
        labels = self.call(tome.part_labels.default, self._by_sample(block, mask))
        if not block.special.inner:
            return labels
        alone = self.call(aten.arange.default, block.length, device=labels.device) + block.length
        return self.call(aten.where.self, self._special(block, None), alone, labels)

    def _special(self, block: Block, step: Step | None) -> Traced:
        """bool [*sample, N]: the tokens between the ends that never merge, in the state `step`."""

        def at_first() -> Traced:
            device = block.merge.meta["val"].device
            marked = self.call(tome.places.default, list(block.special.inner), block.length, device=device)
            return marked.expand([*self._sample_sizes(block), block.length])

        return self._of_leads((block.special, size_expr(block.length), leaves(block.sample)), step, at_first)

    def _sample_sizes(self, block: Block) -> list[Any]:
        return [dim_size(self.env.builder, (leaf,), ()) for leaf in leaves(block.sample)]

    def _seen(self, block: Block, mask: KeyMask) -> Traced:
        """A mask of keys as [*sample, N]: bool, or float with 0 for the most visible token."""
        x = self._by_sample(block, mask.node)
        if x.dtype is torch.bool:
            return x if mask.scale > 0 else x.logical_not()
        x = x if mask.scale == 1 else self.call(aten.mul.Tensor, x, mask.scale)
        return x - self.call(aten.amax.default, x, [-1], True)

    def _by_sample(self, block: Block, node: fx.Node) -> Traced:
        """A mask as [*sample, N] or, a mask of pairs, [*sample, N, N]."""
        dims, tokens = self.facts.dims(node), leaves(block.tokens)
        x, factors = Laid(self._whole(node), dims, plain(len(dims))).factored()
        spots = token_dims(node, self.facts, block.tokens)
        sample = [next((i for i, (_, f) in enumerate(factors) if f is leaf), None) for leaf in leaves(block.sample)]
        token = [i for d in spots for i, (e, f) in enumerate(factors) if e == d and f in tokens]
        order = [i for i in sample if i is not None] + token
        rest = [i for i in range(len(factors)) if i not in order]
        x = x.permute([*rest, *order])
        for _ in rest:  # the same everywhere along it
            x = x.select(0, 0)
        lead = len(order) - len(token)
        for _ in spots:
            lead += 1
            x = x.flatten(lead - 1, lead + len(tokens) - 2) if len(tokens) > 1 else x
        for i, at in enumerate(sample):
            x = x.unsqueeze(i) if at is None else x
        return x.expand([*self._sample_sizes(block), *x.shape[len(sample) :]]) if None in sample else x

    # -- what they are compared by ---------------------------------------------------------------------------------

    def _metric(self, merge: Merge, value: Laid | None) -> tuple[Traced, bool]:
        """What tokens are compared by, and whether it has an axis of heads.

        The keys, queries or values of the block's attention (its queries, where those alone merge), [*sample, N, h, d],
        or the residual stream, [*sample, N, d]. In a branch, where these are not there yet, the mean over heads as the
        product that makes them would have it, or the merged value itself, [*sample, N, d].
        """
        block = merge.block
        operand, made = self._compared(block), block.projected
        source = operand.node if operand is not None else block.merge if self._merged_ones(block) else block.stream
        source = made.node if made is not None else source
        if not block.beside or (operand is None and made is None):
            return self._rows(merge, source, operand, value)
        return cat([self._heads(merge, own, value) for own in block.heads], -2), True

    def _heads(self, merge: Merge, block: Block, value: Laid | None) -> Traced:
        """As `_metric`, of one attention of several that merge here, [*sample, N, h, d]."""
        x, heads = self._metric(replace(merge, block=replace(block, beside=())), value)
        made = block.projected
        x = x if heads else x.unsqueeze(-2)
        return x if made is None else x.expand([*x.shape[:-2], made.heads[0], x.shape[-1]])  # the mean of so many

    def _rows(
        self, merge: Merge, source: fx.Node, operand: Operand | None, value: Laid | None
    ) -> tuple[Traced, bool]:
        """The tokens of a merge as `source` has them, an operand of the attention or what stands on the stream."""
        block, made = merge.block, merge.block.projected
        made = made if made is not None and made.node is source else None
        dims = self.facts.dims(source)
        prev = merge.step.prev if operand is None else self._own(merge).prev
        place = self._standing(dims, operand.tokens if operand is not None else None, self._tokens(block, operand))
        assert place is not None
        dim, key, ends = place
        run = (Run(*key, prev.shift(*ends)),) if prev else ()
        want = tuple(run if d == dim else () for d in range(len(dims)))
        if source is block.merge:
            assert value is not None
            whole = self.steps.convert(value, want)
        elif made is not None:
            assert value is not None
            again = self._again(block.merge, source, value)
            whole = self.steps.convert(Laid(again, dims, plain(len(dims))), want)
        else:
            whole = self.env.fetch(source, want)
        if {size_expr(size) for size in ends} != {0}:
            whole = whole.narrow(dim, ends[0], merge.length)
        elif operand is None and not block.alone:
            whole = whole.narrow(dim, merge.step.prefix - block.special.prefix, merge.length)
        x, factors = Laid(whole, dims, want).factored()
        spots = [spot(factors, leaf) for leaf in leaves(merge.step.sample)]
        token = token_spots(factors, dim, key)
        if operand is not None:
            inner = [i for i, (d, _) in enumerate(factors) if d in operand.features and i not in spots]
        else:
            inner = [i for i in range(len(factors)) if i not in spots and i not in token]
        heads = [i for i in range(len(factors)) if i not in (*spots, *token, *inner)]
        x = x.permute([*spots, *token, *heads, *inner])
        lead, width = len(spots), len(token)
        x = x.flatten(lead, lead + width - 1) if width > 1 else x
        x = x.flatten(lead + 1, lead + len(heads)) if len(heads) > 1 else x
        at = lead + 1 + bool(heads)
        x = x.flatten(at) if len(inner) > 1 else x if inner else x.unsqueeze(-1)
        return (self._projected(x, made), False) if made is not None else (x, bool(heads))

    def _again(self, start: fx.Node, end: fx.Node, value: Laid) -> Traced:
        """A value of the old graph at full length, computed once more from what merges, `start`."""
        whole = self.steps.convert(value, plain(len(value.dims)))
        return self.env.builder.again(self.facts.reach.between(start, end), whole, self._whole, same=True)

    def _projected(self, x: Traced, made: Projection) -> Traced:
        """The mean over heads of an operand of the attention, [*sample, N, d], from what its product reads, [*sample,
        N, c]."""
        whole, letters = self._whole, made.sig.ins[made.weight]
        weight = whole(made.call.nodes[made.weight])
        order = [letters.index(letter) for letter in (*made.apart, *made.summed)]
        weight = weight.permute(order) if order != sorted(order) else weight
        weight = weight.flatten(0, len(made.apart) - 1) if len(made.apart) > 1 else weight
        weight = weight.flatten(1) if len(made.summed) > 1 else weight
        weight = self._mean_of_heads(weight, made)
        bias = None if made.bias is None else self._mean_of_heads(whole(made.call.nodes[made.bias]).flatten(0), made)
        x = self.call(aten.linear.default, x, weight, bias)
        if not made.norm:
            return x
        shape = list(x.shape)
        ones = [1] * (made.norm[0].meta["val"].dim() - 2)
        x = x.reshape([prod(shape[:-1]), *ones, shape[-1]])
        return self.env.builder.again(made.norm, x, self._whole).reshape(shape)

    def _mean_of_heads(self, rows: Traced, made: Projection) -> Traced:
        """[channels, ...] -> [d, ...]"""
        (heads, apart), (width, step) = made.heads, made.width
        if step == 1 and (apart == width or heads == 1):
            rows = rows.narrow(0, made.first, heads * width)
        else:
            each = (self.call(aten.arange.start_step, 0, n * by, by, device=rows.device) for n, by in
                    ((heads, apart), (width, step)))  # fmt: skip
            first, second = each
            index = (first.unsqueeze(1) + second + made.first).flatten(0)
            rows = self.call(aten.index_select.default, rows, 0, index)
        rows = rows.reshape([heads, width, *rows.shape[1:]])
        return self.call(aten.mean.dim, rows, [0])

    def _whole(self, node: fx.Node) -> Any:
        """A value at full length. It may stand further on in the old graph."""
        self.env.visit(node)
        return self.env.whole(node)

    def _compared(self, block: Block) -> Operand | None:
        """The operand of the attention that the metric is made of; None where it is the stream itself."""
        site, metric = block.site, str(self.config.metric)
        if block.operands and not block.mlp:  # operands of an SDPA
            own = site.compared(metric) if metric in ("query", "value") else site.k
            return site.q if block.crossed else own
        if block.branch or metric in ("input", "token"):
            return None
        found = site.compared(metric)
        return found if found is not None and self._holds(found, block) else None

    def _merged_ones(self, block: Block) -> bool:
        """Whether what merges is compared itself."""
        return self.config.metric == "token" and not block.operands and not block.mlp

    def _holds(self, operand: Operand, block: Block) -> bool:
        """Whether an operand of the attention has the tokens in its dim, and every sample axis."""
        standing = self._standing(self.facts.dims(operand.node), operand.tokens, self._tokens(block, operand))
        return standing is not None and set(leaves(block.sample)) <= self.facts.leaves_of(operand.node)

    def _tokens(self, block: Block, operand: Operand | None) -> Dim:
        """The tokens of a block as what they are compared by has them: of a part of the stream an attention has no
        others."""
        return block.tokens if block.alone or operand is None else block.site.k.axis(self.facts)

    def _standing(
        self, dims: Dims, at: int | None, tokens: Dim
    ) -> tuple[int, tuple[int, int], tuple[Size, Size]] | None:
        """Where the tokens stand, in dim `at` if it is given: the dim, the run of its leaves that holds them, and how
        many others that run holds before and behind them; None where they do not."""
        tokens = leaves(tokens)
        for d in range(len(dims)) if at is None else (at,):
            for _, start in locate(tokens, dims[d : d + 1]):
                return d, (start, len(tokens)), (0, 0)
        if at is None or len(leaves(dims[at])) != 1:
            return None
        for parts in self.facts.joined(dims[at]):
            if parts.count(tokens) == 1:
                i = parts.index(tokens)
                ends = (sum(size_of(part) for part in others) for others in (parts[:i], parts[i + 1 :]))
                front, behind = map(self.env.builder.size, ends)
                return at, (0, 1), (front, behind)
        return None


__all__ = ["Groups"]
