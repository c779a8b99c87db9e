"""The engine behind signatures: axes, planning and emission of every op that a `Signature` describes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from math import prod
from typing import Any

from ..algebra.axes import Atom, Dim, Dims, fresh, leaves, unify
from ..algebra.axes import expr as size_expr
from ..algebra.layout import DimLayout, Layout, Run, Step, meet
from ..building.trace import Traced
from .base import Call, Decision, Emitter, Fill, Letter, Role, Rule, Signature
from .facts import NO_FACTS, Facts

Places = list[tuple[int, int]]
"""(operand, dim) of each occurrence of a letter."""


class SignatureRule(Rule):
    """Everything that follows from a signature."""

    def __init__(self, signature: Callable[[Call, Facts], Signature], *, contraction: bool = False) -> None:
        self.signature = signature
        self.contraction = contraction

    def summed(self, call: Call, facts: Facts, roles: Collection[Role] = (Role.SUM,)) -> set[Atom]:
        """The leaves that an op sums over."""
        sig, found = self.signature(call, facts), set[Atom]()
        for node, letters in zip(call.nodes, sig.ins, strict=True):
            for dim, letter in zip(facts.dims(node), letters, strict=True):
                if letter is not None and sig.role(letter) in roles:
                    found |= set(leaves(dim))
        return found

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
        return _Settling(self.signature(call, facts), call, ins, facts).decision()

    # -- emission --------------------------------------------------------------------------------------------------

    def emit(self, call: Call, env: Emitter, decision: Decision) -> Any:
        return env.run(call, self.operands(call, env, decision))

    def operands(self, call: Call, env: Emitter, decision: Decision) -> list[Traced]:
        sig = self.signature(call, env.facts)
        return [self.operand(call, env, decision, sig, i) for i in range(len(call.nodes))]

    def operand(self, call: Call, env: Emitter, decision: Decision, sig: Signature, i: int) -> Traced:
        frame = frame_dims(sig, call, env.facts) if sig.frame is not None else None
        return env.fetch(call.nodes[i], decision.ins[i], fill_of(sig, call, env.facts, i), frame)

    def flops(self, call: Call, states: Sequence[Sequence[list[int]]]) -> list[float]:
        if not self.contraction:
            return super().flops(call, states)
        ins = self.signature(call, NO_FACTS).ins
        places = [(x, i, d) for i, letters in enumerate(ins) for d, x in enumerate(letters) if x is not None]
        found = []
        for shapes in states:
            seen: dict[Letter, int] = {}
            for letter, i, d in places:
                seen[letter] = max(seen.get(letter, 1), shapes[i][d])
            found.append(2.0 * prod(seen.values()))
        return found


def fill_of(sig: Signature, call: Call, facts: Facts, i: int) -> Fill:
    if i in sig.fills:
        return sig.fills[i]
    return Fill.MEAN if call.vals[i].dtype.is_floating_point else Fill.NONE


def frame_dims(sig: Signature, call: Call, facts: Facts) -> Dims:
    """The dims of the shape against which the operands broadcast."""
    assert sig.frame is not None
    found: dict[Letter, tuple] = {}
    for node, letters in zip(call.nodes, sig.ins, strict=True):
        for letter, dim in zip(letters, facts.dims(node), strict=True):
            if dim and letter not in found:
                found[letter] = dim
    return tuple(found.get(letter, ()) for letter in sig.frame)


class _Settling:
    """Settles the layouts of one call, whose operands come in the layouts `ins`."""

    def __init__(self, sig: Signature, call: Call, ins: Sequence[Layout], facts: Facts) -> None:
        self.sig, self.call, self.ins, self.facts = sig, call, ins, facts

    def decision(self) -> Decision:
        reasons: list[tuple[int, str]] = []
        target: dict[Letter, DimLayout] = {}
        for letter, places in self.where.items():
            runs, why = self._settle(letter, places)
            target[letter] = runs
            if why:
                reasons += [(i, why) for i, d in places if self.ins[i][d]]
        for letter, runs in list(target.items()):
            good = tuple(run for run in runs if not self._mixes_samples(letter, run))
            if len(good) < len(runs):
                target[letter] = good
                why = "mixes the samples it was merged within"
                reasons += [(i, why) for i, d in self.where[letter] if self.ins[i][d]]
        return self._with_sums(target, reasons)

    @cached_property
    def where(self) -> dict[Letter, Places]:
        """Where each letter stands among the operands, size-1 (broadcast) dims left out."""
        where: dict[Letter, Places] = {}
        for i, (letters, val) in enumerate(zip(self.sig.ins, self.call.vals, strict=True)):
            for d, letter in enumerate(letters):
                if size_expr(val.shape[d]) != 1:
                    where.setdefault(("own", i, d) if letter is None else letter, []).append((i, d))
        return where

    def _dim(self, i: int, d: int) -> Dim:
        return self.facts.dims(self.call.nodes[i])[d]

    def _fill(self, i: int) -> Fill:
        return fill_of(self.sig, self.call, self.facts, i)

    def _settle(self, letter: Letter, places: Places) -> tuple[DimLayout, str | None]:
        """The runs that all operands are brought to along a letter, or none and why."""
        everything = [run for i, d in places for run in self.ins[i][d]]
        if not everything:
            return (), None
        padded = self.sig.role(letter) is Role.MAX and self.facts.config.padded
        if padded or self.sig.role(letter) is Role.MIX or (isinstance(letter, tuple) and letter and letter[0] == "own"):
            return (), "needs every token"
        if len({leaves(self._dim(i, d)) for i, d in places}) > 1:
            return (), "its operands cut the axis differently"
        settled: list[Run] = []
        for key in dict.fromkeys(run.key for run in everything):
            here = [(i, next((run for run in self.ins[i][d] if run.key == key), None)) for i, d in places]
            step = meet([run.step if run else None for _, run in here])
            if step is None:
                return (), "its operands were merged apart from each other"
            step = self._own_branches(step, here)
            if step is None:
                return (), "meets the stream, which keeps its length"
            candidate = Run(*key, step)
            for i, run in here:
                if run is None or run.step is not step:
                    if self._fill(i) is Fill.NONE:
                        return (), "an operand that cannot be averaged has full length"
                    if not self._has_sample(i, candidate):
                        does = "contracts" if self.sig.role(letter) is Role.SUM else "multiplies"
                        return (), f"it {does} the tokens with a full-length operand that all samples share"
            settled.append(candidate)
        if any(a.overlaps(b) for a in settled for b in settled if a is not b):
            return (), "its operands group the axis differently"
        return tuple(settled), None

    def _own_branches(self, step: Step, here: Sequence[tuple[int, Run | None]]) -> Step | None:
        """The state without merges of a branch that some operand did not go through: tables and score terms follow
        them, values do not."""
        for i, run in here:
            if self.call.nodes[i] in self.facts.constant or self._fill(i) is Fill.BIAS:
                continue
            chain = run.step.chain() if run else ()
            foreign = next((s for s in step.chain() if s.branch and s not in chain), None)
            if foreign is not None:
                if foreign.prev is None:
                    return None
                step = foreign.prev
        return step

    def _has_sample(self, i: int, run: Run) -> bool:
        """Whether operand i has, or can be broadcast to, the sample axes of a run.

        A batch of one has no axis that could be looked for. So that a sample does not depend on its batch, a product
        takes nothing that is the same for all inputs for one of its samples, nor what lacks a dim of size 1 that others
        have.
        """
        sig, node = self.sig, self.call.nodes[i]
        missing = set(leaves(run.step.sample)) - self.facts.leaves_of(node)
        if sig.frame is None and Role.SUM in sig.roles.values():
            return not missing and node not in self.facts.constant and self._single() <= set(sig.ins[i])
        if not missing or sig.frame is None:
            return not missing
        return missing <= {leaf for dim in frame_dims(sig, self.call, self.facts) for leaf in leaves(dim)}

    def _single(self) -> set[Letter]:
        """The letters of dims of size 1 that an op keeps apart."""
        return {
            letter
            for letters, val in zip(self.sig.ins, self.call.vals, strict=True)
            for letter, size in zip(letters, val.shape, strict=True)
            if letter is not None and size_expr(size) == 1 and self.sig.role(letter) is Role.MAP
        }

    def _mixes_samples(self, letter: Letter, run: Run) -> bool:
        """Whether the op mixes the samples of a run: a merged value may meet only ops that keep each in its place, or
        that sum over samples as well as over tokens, by the size of each."""
        sig, sample = self.sig, set(leaves(run.step.sample))
        home: dict[Any, Letter | None] = {}
        role = sig.role(letter)
        apart = {Role.MAP} if role is Role.MAP else {Role.MAP, role}
        for i, letters in enumerate(sig.ins):
            if letter not in letters:
                continue
            for other, dim in zip(letters, self.facts.dims(self.call.nodes[i]), strict=True):
                held = sample & set(leaves(dim))
                if held and (other is None or sig.role(other) not in apart):
                    return True
                # x[b] against x[c]: the tokens of one sample were grouped otherwise than those of another.
                if any(home.setdefault(leaf, other) != other for leaf in held):
                    return True
        for result, letters in enumerate(sig.outs):
            if letter not in letters:
                continue
            kept = [leaf for dim in self.facts.dims(self.call.node, result) for leaf in leaves(dim) if leaf in sample]
            if len(kept) != len(sample):
                return True
        return False

    def _with_sums(self, target: dict[Letter, DimLayout], reasons: list[tuple[int, str]]) -> Decision:
        """The decision: which operands may stay extensive, and which results are."""
        sig = self.sig
        need: list[list[DimLayout]] = [[() for _ in letters] for letters in sig.ins]
        result: dict[Letter, DimLayout] = {}
        for letter, places in self.where.items():
            out_runs = []
            for run in target[letter]:
                passing = self._passing(letter, places, run)
                for i, d in places:
                    need[i][d] = (*need[i][d], Run(*run.key, run.step, i in passing))
                out_runs.append(Run(*run.key, run.step, sig.role(letter) is Role.SOFTMAX or bool(passing)))
            result[letter] = tuple(out_runs)
        outs = tuple(
            tuple(
                result.get(letter, ()) if size_expr(size) != 1 else ()
                for letter, size in zip(letters, val.shape, strict=True)
            )
            for letters, val in zip(sig.outs, self.call.results, strict=True)
        )
        return Decision(tuple(tuple(layout) for layout in need), outs, tuple(reasons))

    def _passing(self, letter: Letter, places: Places, run: Run) -> list[int]:
        """The operands that may stay sums over the groups of a run."""
        sig = self.sig
        held = [
            i
            for i, d in places
            if i in sig.linear and any(r.key == run.key and r.step is run.step and r.extensive for r in self.ins[i][d])
        ]
        if sig.role(letter) in (Role.MAX, Role.NORM2, Role.SOFTMAX):
            return []
        if sig.additive:
            return held if len(held) >= len(sig.linear) else []
        return held[:1]


__all__ = ["SignatureRule", "fill_of", "frame_dims"]
