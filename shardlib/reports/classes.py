"""Classes of ranks: those that hold and send pieces of the same sizes, so that one of them speaks for all.

Along a mesh axis a piece changes its size at few places: n rows over k coordinates at n mod k, and where
several axes split a dim, the pieces of each are cut again. Every axis is cut there into intervals; a class
is an interval of each.

>>> from shardlib.spec import parse
>>> found = classes_of(Mesh(dp=1024, tp=8), [parse("B/dp T D/tp")], dict(B=1540, T=5, D=16))
>>> found.starts, [found.count(c) for c in range(len(found))]
({'dp': (0, 516), 'tp': (0,)}, [4128, 4064])
>>> PerRank(found, (7, 5)).most, len(PerRank(found, (7, 5)).by_rank)
(7, 8192)
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from math import prod
from typing import Any

from shardlib.mesh import Mesh
from shardlib.spec import Spec

LISTED = 1024       # ranks of the largest mesh of which plain data lists every rank


@dataclass(frozen=True)
class Classes:
    """The classes of a mesh's ranks, by their first ones. `starts`: of each axis, where intervals begin."""
    mesh: Mesh
    starts: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return prod(map(len, self.starts.values()))

    @cached_property
    def intervals(self) -> dict[str, list[range]]:
        """Of each axis, the coordinates of each interval."""
        return {axis: [range(*pair) for pair in pairwise((*starts, self.mesh.axes[axis]))]
                for axis, starts in self.starts.items()}

    @cached_property
    def boxes(self) -> list[dict[str, range]]:
        """Of each class, its interval of each axis."""
        return [dict(zip(self.starts, box)) for box in product(*self.intervals.values())]

    @cached_property
    def firsts(self) -> list[dict[str, int]]:
        """The coordinate of the first rank of each class."""
        return [{axis: interval[0] for axis, interval in box.items()} for box in self.boxes]

    def count(self, c: int) -> int:
        """How many ranks class `c` has."""
        return prod(map(len, self.boxes[c].values()))

    def groups(self, c: int, axes: Sequence[str]) -> int:
        """In how many groups over `axes` its ranks are."""
        return prod(len(interval) for axis, interval in self.boxes[c].items() if axis not in axes)

    def peers(self, c: int, axes: Sequence[str]) -> list[int]:
        """The classes of the members of a group over `axes` with a rank of class `c`, in its order."""
        digits, steps = self._digits[c], self._steps
        base = sum(digit * steps[a] for a, digit in digits.items() if a not in axes)
        return [base + sum(i * steps[a] for a, i in zip(axes, at))
                for at in product(*(range(len(self.starts[a])) for a in axes))]

    @cached_property
    def _steps(self) -> dict[str, int]:
        sizes = list(map(len, self.starts.values()))
        return {axis: prod(sizes[i + 1:]) for i, axis in enumerate(self.starts)}

    @cached_property
    def _digits(self) -> list[dict[str, int]]:
        return [dict(zip(self.starts, at)) for at in product(*(range(len(s)) for s in self.starts.values()))]

    def by_rank(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """What each rank's class has, in order of rank."""
        at = [0]
        for axis, intervals in self.intervals.items():
            here = [i * self._steps[axis] for i, interval in enumerate(intervals) for _ in interval]
            at = [c + i for c in at for i in here]
        return tuple(values[c] for c in at)

    def cut(self, more: Mapping[str, Iterable[int]]) -> Classes:
        """The same with further cuts."""
        def starts(axis: str) -> tuple[int, ...]:
            return tuple(sorted({*self.starts[axis], *more.get(axis, ())} & {*range(self.mesh.axes[axis])}))
        return Classes(self.mesh, {axis: starts(axis) for axis in self.starts})


def classes_of(mesh: Mesh, specs: Iterable[Spec], sizes: Mapping[str, int]) -> Classes:
    """The classes of ranks that hold pieces of one size each of `specs`;
    a coordinate that holds stands alone."""
    cuts: dict[str, set[int]] = {axis: {0} for axis in mesh.axes}
    dims = {(sizes[d.factors[0].name], d.axes): None for spec in specs for d in spec.dims if d.axes}
    for n, axes in dims:
        reached = {n}
        for axis in axes:
            k = mesh.axes[axis]
            if axis in mesh.cuts:
                cuts[axis], reached = {*range(k)}, {*mesh.cuts[axis]}
                continue
            cuts[axis] |= {size % k for size in reached}
            reached = {size // k + more for size in reached for more in ((0, 1) if size % k else (0,))}
    for owed in {o: None for spec in specs for o in spec.owed if o.kind == "@"}:
        at = owed.coordinate(mesh.axes[owed.axis])
        cuts[owed.axis] |= {at, at + 1} if at is not None else set()
    return Classes(mesh, dict.fromkeys(mesh.axes, (0,))).cut(cuts)


@dataclass(frozen=True)
class PerRank:
    """A number for every rank, kept once a class."""
    classes: Classes
    values: tuple[int, ...]

    @property
    def by_rank(self) -> tuple[int, ...]:
        return self.classes.by_rank(self.values)

    @property
    def most(self) -> int:
        return max(self.values)

    @property
    def total(self) -> int:
        return sum(n * self.classes.count(c) for c, n in enumerate(self.values))

    def plain(self) -> list:
        """As plain data: by rank; of more than 1,024 ranks, each number with how many have it, and which."""
        if self.classes.mesh.world_size <= LISTED:
            return list(self.by_rank)
        of: dict[int, list[int]] = {}
        for c, n in enumerate(self.values):
            of.setdefault(n, []).append(c)
        return [{"bytes": n, "ranks": sum(map(self.classes.count, cs)), "where": list(map(self._where, cs))}
                for n, cs in sorted(of.items(), reverse=True)]

    def _where(self, c: int) -> str:
        box = self.classes.boxes[c].items()
        return ",".join(f"{axis}={at[0]}" + (f"-{at[-1]}" if len(at) > 1 else "") for axis, at in box)
