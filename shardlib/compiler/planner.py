"""The planner: the cheapest moves from one type of a value to another.

>>> from shardlib.mesh import Mesh
>>> from shardlib.spec import parse
>>> for move in plan(parse("T/y D +x"), parse("T/x D/y"), Mesh(x=4, y=4)): print(move)
reduce_scatter("T/y D +x -> T/y/x D")
permute("T/y/x D -> T/x/y D")
all_to_all("T/x/y D -> T/x D/y")

The search is over moves of one axis at the end of a dim's axes, each towards where the axis is wanted, plus
the re-ordering of a dim's axes. Neighbouring moves of a kind then merge into one over the product of their
axes. A type that owes what the value does not denote is out of reach: SpecError.
"""
from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardlib.errors import SpecError
from shardlib.language.changes import ROWS_STAY, Search, change, moved_rows
from shardlib.language.held import HELD
from shardlib.language.moves import MOVES, Move, cost
from shardlib.mesh import Mesh
from shardlib.spec import Spec

LATENCY = 1e-6      # of one collective, in tensors: it only breaks ties towards fewer of them


@dataclass(frozen=True)
class Planned:
    """One step of a plan. `received`: what a rank receives, as a fraction of the global tensor."""
    op: Move
    have: Spec
    want: Spec
    received: float

    def __str__(self) -> str:
        return f'{self.op.name}("{self.have} -> {self.want}")'


def plan(have: Spec, want: Spec, mesh: Mesh, moves: Sequence[Move] = (*MOVES, *HELD)) -> tuple[Planned, ...]:
    """The `moves` from `have` to `want`: pure, deterministic, cheapest in bytes received,
    ties broken by their print.

    SpecError where the two are not types of one value.
    """
    if have.labels != want.labels:
        raise SpecError(f'"{have}" and "{want}" have different dims')
    if moved_rows(have, want):
        raise SpecError(f'there is no way from "{have}" to "{want}"; {ROWS_STAY}')
    return _search(have, want, tuple(sorted((a, max(2, n)) for a, n in mesh.axes.items())), tuple(moves))


@lru_cache(maxsize=4096)
def _search(have: Spec, want: Spec, sizes: tuple[tuple[str, int], ...],
            moves: tuple[Move, ...]) -> tuple[Planned, ...]:
    size = dict(sizes)
    axes = [a
            for a in sorted({*have.split_axes, *want.split_axes, *(o.axis for o in (*have.owed, *want.owed))})
            if _place(have, a) != _place(want, a)]
    queue: list[tuple[float, int, str, Spec, tuple[Planned, ...]]] = [(0.0, 0, "", have, ())]
    seen: set[Spec] = set()
    while queue:
        cost, _, text, here, path = heapq.heappop(queue)
        if here == want:
            return _merge(path)
        if here in seen:
            continue
        seen.add(here)
        for move in _moves(here, want, axes, size, moves):
            if move.want not in seen:
                step = move.received + LATENCY * (move.op.wire is not None)
                heapq.heappush(queue,
                               (cost + step, len(path) + 1, f"{text}{move};", move.want, (*path, move)))
    raise SpecError(f'there is no way from "{have}" to "{want}"; a maximum is owed only by what took it')


def _place(spec: Spec, axis: str) -> object:
    """Where an axis is: (dim, its place among the dim's axes and those before it),
    what is owed on it, or nowhere."""
    for i, d in enumerate(spec.dims):
        if axis in d.axes:
            return i, d.axes[:d.axes.index(axis) + 1]
    return next((str(o) for o in spec.owed if o.axis == axis), None)


def _moves(here: Spec, want: Spec, axes: list[str], size: Mapping[str, int],
           moves: Sequence[Move]) -> Iterator[Planned]:
    """The moves of one axis at the end of a dim's axes towards where it is wanted,
    and reductions over several."""
    search = Search(here, want, axes)
    for move in moves:
        for there in move.neighbours(search):
            yield Planned(move, here, there, cost(move, here, there, size))


def _merge(path: tuple[Planned, ...]) -> tuple[Planned, ...]:
    """Adjacent gathers of one dim, and adjacent scatters into one,
    become one over the product of their axes."""
    out: list[Planned] = []
    for move in path:
        last = out[-1] if out else None
        if last and last.op is move.op and move.op.merges(*(change(m.have, m.want) for m in (last, move))):
            out[-1] = Planned(move.op, last.have, move.want, last.received + move.received)
        else:
            out.append(move)
    return tuple(out)
