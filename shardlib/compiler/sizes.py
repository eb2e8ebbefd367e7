"""The size of every dim: a name has one in a whole program, its bodies included.

What binds it: `sizes=`, an argument that holds all of a dim, `rename`, by which a dim is as large as it was
under its other name, and ops such as `concat`, by which one is as long as others together. A group has the
product of its factors, so a size may follow from the others. All binders are compared.

>>> from shardlib.spec import parse
>>> known = Sizes("f")
>>> known.bind("Y", 3, "x")
>>> known.equate(parse("(Y X)").dims[0], parse("12").dims[0], "y")
>>> known.equate(parse("N").dims[0], parse("X").dims[0], 'rename "B X -> B N" at f.py:2')
>>> known.settle(), known.of
(None, {'Y': 3, 'X': 4, 'N': 4})
>>> known.bind("N", 5, "z")
Traceback (most recent call last):
shardlib.errors.SpecError: f: N is 4 by rename "B X -> B N" at f.py:2, and 5 by z
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from shardlib.errors import SpecError
from shardlib.language.rearrange import RENAME, by_factor
from shardlib.mesh import Mesh, check_sizes
from shardlib.program import Program, Step
from shardlib.spec import Dim


class Sizes:
    """What is known of a program's sizes, `of`, by whom, `by`, and the dims that are known to be equal.

    `title` begins errors.
    """

    def __init__(self, title: str, known: Mapping[str, int] | None = None) -> None:
        check_sizes(known or {})
        self.title, self.of, self.by = title, dict(known or {}), dict.fromkeys(known or {}, "sizes")
        self.equal: list[tuple[Dim, Dim, str]] = []
        self.sums: list[tuple[Dim, tuple[Dim, ...], int | Callable, str]] = []      # as `Op.lengths` has them

    def bind(self, name: str, n: int, who: str) -> None:
        """`name` has n rows, as `who` says. SpecError where another says otherwise."""
        if self.of.setdefault(name, n) != n:
            raise self.error(f"{name} is {self.of[name]} by {self.by[name]}, and {n} by {who}")
        self.by.setdefault(name, who)

    def equate(self, dim: Dim, other: Dim, who: str) -> None:
        """The two dims are of one size, as `who` says; `settle` looks at it."""
        self.equal.append((dim, other, who))

    def say(self, step: Step) -> None:
        """What a step binds, for `settle`."""
        if step.op is RENAME:
            self.rename(step)
        elif step.op.lengths and (said := step.op.lengths(step)):
            self.sums.append((*said, f"{step.op.name}{f' at {step.where}' if step.where else ''}"))

    def rename(self, step: Step) -> None:
        """What a rename binds, for `settle`: factor by factor where both sides
        have as many, else products."""
        who = (f'rename "{step.ins[0].whole()} -> {step.outs[0].whole()}"'
               + (f" at {step.where}" if step.where else ""))
        for old, new in zip(step.ins[0].dims, step.outs[0].dims):
            pairs = zip(old.factors, new.factors) if by_factor(old, new) else ()
            for a, b in [(Dim((a,)), Dim((b,))) for a, b in pairs] or [(old, new)]:
                self.equate(a, b, who)

    def settle(self) -> None:
        """Whatever follows from what is equal. SpecError for a contradiction."""
        left = -1
        while left != (left := len(self.equal) + len(self.sums)):
            self.equal = [known for known in self.equal if not self._follow(*known)]
            self.sums = [known for known in self.sums if not self._add_up(*known)]

    def _add_up(self, dim: Dim, dims: tuple[Dim, ...], more: int | Callable, who: str) -> bool:
        """As `_follow`, of a dim that is as long as others together."""
        if not isinstance(more, int):
            if dim.label in self.of or any(map(self._unknown, dims)):
                return dim.label in self.of
            self.bind(dim.label, more(*map(self.size, dims)), who)
            return True
        unknown = [n for d in (dim, *dims) for n in self._unknown(d)]
        total = more + sum(self.size(d) for d in dims if not self._unknown(d))
        if len(unknown) > 1 or any(len(d.factors) != 1 for d in (dim, *dims)):
            return False
        if unknown == [*dim.names]:
            self.bind(dim.label, total, who)
        elif self.size(dim) < total or not unknown and self.size(dim) != total:
            raise self.error(f"{dim.label} is {self.size(dim)} by {self.by[dim.label]}, and "
                             f"{'at least ' if unknown else ''}{total} by {who}")
        elif unknown:
            self.bind(unknown[0], self.size(dim) - total, who)
        return True

    def _follow(self, dim: Dim, other: Dim, who: str) -> bool:
        """Whether one equality has said all that it can say; it binds its last unknown.

        SpecError where it does not hold.
        """
        unknown = self._unknown(dim) + self._unknown(other)
        if not unknown:
            if self.size(dim) != self.size(other):
                raise self.error(self._differ(dim, other, who))
            return True
        whole, open_ = (other, dim) if self._unknown(dim) else (dim, other)
        rest = prod(self.of[n] for n in open_.names if n not in unknown)
        if len(unknown) > 1 or not rest and not self.size(whole):
            return False
        if not rest or self.size(whole) % rest:
            raise self.error(
                f"{self._is(whole, who)}{self._since(open_)}; no {unknown[0]} makes {open_.label} of it")
        self.bind(unknown[0], self.size(whole) // rest, who)
        return True

    def _unknown(self, dim: Dim) -> list[str]:
        return [n for n in dim.names if n not in self.of]

    def size(self, dim: Dim) -> int:
        """The rows of a dim whose factors are all known."""
        return prod(self.of[n] for n in dim.names) if dim.factors else dim.size

    def _differ(self, dim: Dim, other: Dim, who: str) -> str:
        one, two = (other, dim) if len(other.factors) == 1 else (dim, other)
        if len(one.factors) == 1:
            return (f"{one.label} is {self.size(one)} by {self.by[one.label]}, and {self.size(two)} by "
                    f"{who}{self._since(two)}")
        return (f"{one.label} is {self.size(one)}{self._since(one)}, and {self.size(two)} by "
                f"{who}{self._since(two)}")

    def _is(self, dim: Dim, who: str) -> str:
        return (f"{dim.label} is {self.size(dim)} by {self.by[dim.label]}" if len(dim.factors) == 1
                else f"there are {self.size(dim)} rows by {who}")

    def _since(self, dim: Dim) -> str:
        known = [n for n in dim.names if n in self.of]
        return (", since " + " and ".join(f"{n} is {self.of[n]} by {self.by[n]}" for n in known) if known
                else "")

    def error(self, text: str) -> SpecError:
        return SpecError(f"{self.title}: {text}")


def complete_sizes(program: Program, known: Mapping[str, int]) -> dict[str, int]:
    """`known`, and the sizes that follow from it by what the program's steps say.

    SpecError where they contradict it.
    """
    sizes = Sizes(program.name, known)
    for step in _saying(program):
        sizes.say(step)
    sizes.settle()
    return sizes.of


def bind_sizes(program: Program, shapes: Mapping[str, Sequence[int]], known: Mapping[str, int], mesh: Mesh,
               coordinate: Mapping[str, int] | None) -> dict[str, int]:
    """The global size of every dim, from the arguments' shapes and `known`.

    SpecError for a conflict, naming both binders.

    With a `coordinate`, shapes are those of its shards: a split dim then takes its size from `known`, from
    another argument or by a rename.
    """
    check_sizes(known)
    try:
        return bound(program, shapes, known, mesh, coordinate).of
    except SpecError as error:
        raise error.at(program.where) from None


def bound(program: Program, shapes: Mapping[str, Sequence[int]], known: Mapping[str, int], mesh: Mesh,
          coordinate: Mapping[str, int] | None) -> Sizes:
    """`bind_sizes`, and who binds each."""
    sizes = Sizes(program.name, known)
    if path := next((n for n, s in (*program.arg_leaves(), *program.result_leaves())
                     if any(d.ragged for d in s.dims)), None):
        raise sizes.error(f"{path} has rows that data chose; they stay within a program")
    pieces: list[tuple[str, Dim, int]] = []
    for path, spec in program.arg_leaves():
        shape = tuple(shapes[path])
        if len(shape) != len(spec.dims):
            raise sizes.error(f"{path} has {len(shape)} dims, its spec {spec} has {len(spec.dims)}")
        for dim, n in zip(spec.dims, shape):
            if not dim.factors and n != dim.size:
                raise sizes.error(f"{path} has {n} rows where its spec {spec} says {dim}")
            if coordinate is not None and mesh.size(dim.axes) > 1:
                pieces.append((path, dim, n))
            elif len(dim.factors) == 1:
                sizes.bind(dim.label, n, path)
            elif dim.factors:
                sizes.equate(dim, Dim((), size=n), path)
    for step in _saying(program):
        sizes.say(step)
    sizes.settle()
    for dim, _, path in sizes.equal:
        if path in shapes:
            missing = next(n for n in dim.names if n not in sizes.of)
            raise sizes.error(
                f"{path} holds {dim.label} as one dim; say the size of {missing}: sizes=dict({missing}=...)")
    for path, dim, n in pieces:
        if missing := next((n for n in dim.names if n not in sizes.of), None):
            raise sizes.error(
                f"{path} holds only a piece of {missing}; say its global size: sizes=dict({missing}=...)")
        if (here := mesh.rows(dim, sizes.of, coordinate)[1]) != n:
            raise sizes.error(
                f"{path} has {n} rows of {dim}; with {', '.join(f'{n}={sizes.of[n]}' for n in dim.names)} "
                f"this rank holds {here}")
    return sizes


def _saying(program: Program) -> list[Step]:
    """The steps of a program and its bodies that say sizes."""
    return [step for p in (program, *program.bodies()) for step in p.steps
            if step.op is RENAME or step.op.lengths]
