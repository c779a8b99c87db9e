"""The axis algebra: what every dim of an unnamed graph is made of.

A dim is a row-major product of *atoms*; size 1 is the empty product. Atoms are never told apart by size, only by
where they come from: two dims hold the same atom when some op forces them to be indexed alike. `unify` states such
a fact; where the two sides are cut differently it refines both to a common cut, or says that there is none.

    [B, N, D] -> [[b], [n], [d]]
    .reshape(B * N, D)          -> [[b, n], [d]]
    .reshape(B, N, 3, H, D // H) -> [[b], [n], [three], [h], [e]]   (the atom d is now known to be three * h * e)

The idea is that of factor-based sharding rules: see docs/design.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from typing import Any

import sympy
import torch

Size = int | torch.SymInt
# An int, or a sympy expression where the size is symbolic (sympy ships no types).
Expr = Any
Dim = tuple["Atom", ...]
Dims = tuple[Dim, ...]

_serial = count()


def expr(size: Size) -> Expr:
    """The size as an int or a sympy expression: comparing it adds no guard. A number of the caller's is a symbol of any
    sign to torch; where it is known to be a length its symbol says so."""
    if isinstance(size, int):
        return size
    if size.node.is_constant():
        return int(size)
    node: Any = size.node
    held, known = node.expr, node.shape_env.var_to_range
    lengths = [s for s in held.free_symbols if s.is_nonnegative is None and s in known and known[s].lower >= 0]
    if lengths:
        held = held.xreplace({s: sympy.Symbol(s.name, integer=True, nonnegative=True) for s in lengths})
    return held if held.is_Symbol else sympy.expand(held)


def sized(size: Expr, held: Any) -> Size:
    """The way back: an int or an expression as a size. held: what has the graph's shape_env, the node of another size
    or a fake mode; an int needs none."""
    if isinstance(size, int) or size.is_Integer:
        return int(size)
    env = held.shape_env
    if strange := {s for s in size.free_symbols if s not in env.var_to_range}:
        own = {s.name: s for s in env.var_to_range}
        size = size.xreplace({s: own[s.name] for s in strange})
    found: torch.SymInt = env.create_symintnode(size, hint=None)
    return found


def same(a: Expr, b: Expr) -> bool:
    return bool(a == b) or (not (isinstance(a, int) and isinstance(b, int)) and sympy.expand(a - b) == 0)


def at_most(a: Expr, b: Expr) -> bool:
    """Whether a <= b for every value of the symbols: False where that is not known."""
    return bool(a <= b) if isinstance(a, int) and isinstance(b, int) else sympy.expand(b - a).is_nonnegative is True


def from_front(index: Size, size: Expr) -> Expr:
    """An index or a bound as Python counts it, from the front: -1 is the last, -n the n-th last for a symbol n too.
    Torch has guarded the sign of one that it has seen."""
    at, seen = expr(index), index.node.hint if isinstance(index, torch.SymInt) else 0
    return at + size if at_most(at, -1) or (isinstance(seen, int) and seen < 0) else at


def quotient(a: Expr, b: Expr) -> Expr | None:
    """a / b where it is a whole number for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / b)
    _, denominator = sympy.fraction(sympy.together(ratio))  # of (2n + 2)/27 cancel makes a sum, without a denominator
    if denominator != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


@dataclass(eq=False)
class Atom:
    """One indivisible factor of a dim, until it is united with another or split."""

    size: Expr
    same_as: Atom | None = None
    parts: tuple[Atom, ...] = ()
    serial: int = field(default_factory=lambda: next(_serial))

    def __repr__(self) -> str:
        return f"a{self.serial}:{self.size}"

    def root(self) -> Atom:
        """The atom that this one has been united with, the way there shortened for the next time."""
        root = self
        while root.same_as is not None:
            root = root.same_as
        atom = self
        while atom.same_as is not None:
            atom.same_as, atom = root, atom.same_as
        return root

    def leaves(self) -> Dim:
        root = self.root() if self.same_as is not None else self
        return leaves(root.parts) if root.parts else (root,)


def leaves(dim: Iterable[Atom]) -> Dim:
    """The finest known cut of a dim."""
    found: list[Atom] = []
    for atom in dim:
        if atom.same_as is None and not atom.parts:
            found.append(atom)
        else:
            found += atom.leaves()
    return tuple(found)


def size_of(dim: Iterable[Atom]) -> Expr:
    return prod((atom.size for atom in dim), start=1)


def count_of(atom: Atom) -> int:
    """The size of an atom, 1 where it is symbolic."""
    return atom.size if isinstance(atom.size, int) else 1


def fresh(size: Expr) -> Dim:
    return () if isinstance(size, int) and size == 1 else (Atom(size),)


def fresh_dims(shape: Sequence[Size]) -> Dims:
    return tuple(fresh(expr(s)) for s in shape)


def _cut(atom: Atom, first: Expr, rest: Expr) -> None:
    atom.parts = (Atom(first), Atom(rest))


def unify(a: Iterable[Atom], b: Iterable[Atom]) -> bool:
    """State that two dims are indexed alike. False where their cuts have no common refinement: a boundary."""
    left, right = list(leaves(a)), list(leaves(b))
    if not same(size_of(left), size_of(right)):
        return False
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x is y:
            continue
        if same(x.size, y.size):
            y.same_as = x
        elif (rest := quotient(x.size, y.size)) is not None:
            _cut(x, y.size, rest)
            left.insert(0, x)
            right.insert(0, y)
        elif (rest := quotient(y.size, x.size)) is not None:
            _cut(y, x.size, rest)
            left.insert(0, x)
            right.insert(0, y)
        else:
            return False
        # Uniting or cutting may have refined atoms that stand further on.
        left, right = list(leaves(left)), list(leaves(right))
    return not left and not right


def regroup(dims: Dims, shape: Sequence[Expr]) -> Dims | None:
    """The dims of a row-major view to `shape`, cutting atoms where needed; None where a cut is not a whole number."""
    rest = [leaf for dim in dims for leaf in leaves(dim)]
    out: list[Dim] = []
    for size in shape:
        taken: list[Atom] = []
        while not same(size, size_of(taken)):
            if not rest:
                return None
            need = quotient(size, size_of(taken))
            if need is None:
                return None
            head = rest[0]
            if same(need, head.size) or quotient(need, head.size) is not None:
                taken.append(rest.pop(0))
            elif (more := quotient(head.size, need)) is not None:
                _cut(head, need, more)
                rest[0:1] = list(head.parts)
                # The cut atom may occur again further on, or already be taken.
                rest = list(leaves(rest))
                taken = list(leaves(taken))
            else:
                return None
        out.append(tuple(taken))
    return tuple(out) if not rest else None


def locate(part: Dim, dims: Dims) -> list[tuple[int, int]]:
    """Every (dim, offset in its leaves) where the run of leaves `part` stands."""
    want = leaves(part)
    found = []
    for d, dim in enumerate(dims):
        have = leaves(dim)
        found += [(d, i) for i in range(len(have) - len(want) + 1) if have[i : i + len(want)] == want]
    return found if want else []
