"""The planner: the cheapest moves from one type of a value to another.

>>> from shardlib.mesh import Mesh
>>> from shardlib.spec import parse
>>> for move in plan(parse("T/y D +x"), parse("T/x D/y"), Mesh(x=4, y=4)): print(move)
reduce_scatter("T/y D +x -> T/y/x D")
permute("T/y/x D -> T/x/y D")
all_to_all("T/x/y D -> T/x D/y")

The search is over moves of one axis at the end of a dim's axes, each towards where the axis is wanted, plus the
re-ordering of a dim's axes. Neighbouring moves of a kind then merge into one over the product of their axes. A type
that owes what the value does not denote, or that is held elsewhere, is out of reach: SpecError.
"""
from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import prod
from typing import Iterator, Sequence

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.moves import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, OWE, PERMUTE, REDUCE_SCATTER, SHARD, changed_dims
from shardlib.program import Op
from shardlib.spec import Owed, Spec

LATENCY = 1e-6      # of one collective, in tensors: it only breaks ties towards fewer of them


@dataclass(frozen=True)
class Move:
    """One step of a plan. `received`: what a rank receives, as a fraction of the global tensor."""
    op: Op
    have: Spec
    want: Spec
    received: float

    def __str__(self) -> str:
        return f'{self.op.name}("{self.have} -> {self.want}")'


def plan(have: Spec, want: Spec, mesh: Mesh) -> tuple[Move, ...]:
    """The moves from `have` to `want`: pure, deterministic, cheapest in bytes received, ties broken by their print.

    SpecError where the two are not types of one value.
    """
    if have.labels != want.labels:
        raise SpecError(f'"{have}" and "{want}" have different dims')
    return _search(have, want, tuple(sorted((a, max(2, n)) for a, n in mesh.axes.items())))


@lru_cache(maxsize=4096)
def _search(have: Spec, want: Spec, sizes: tuple[tuple[str, int], ...]) -> tuple[Move, ...]:
    size = dict(sizes)
    axes = [a for a in sorted({*have.split_axes, *want.split_axes, *(o.axis for o in (*have.owed, *want.owed))})
            if _place(have, a) != _place(want, a)]
    queue: list[tuple[float, int, str, Spec, tuple[Move, ...]]] = [(0.0, 0, "", have, ())]
    seen: set[Spec] = set()
    while queue:
        cost, _, text, here, path = heapq.heappop(queue)
        if here == want:
            return _merge(path)
        if here in seen:
            continue
        seen.add(here)
        for move in _moves(here, want, axes, size):
            if move.want not in seen:
                step = move.received + LATENCY * (move.op not in (SHARD, OWE))
                heapq.heappush(queue, (cost + step, len(path) + 1, f"{text}{move};", move.want, (*path, move)))
    held = any(o.kind == "@" for o in (*have.owed, *want.owed))
    raise SpecError(f'there is no way from "{have}" to "{want}"; '
                    f'{"what one coordinate holds stays there" if held else "a maximum is owed only by what took it"}')


def _place(spec: Spec, axis: str) -> object:
    """Where an axis is: (dim, its place among the dim's axes and those before it), what is owed on it, or nowhere."""
    for i, d in enumerate(spec.dims):
        if axis in d.axes:
            return i, d.axes[:d.axes.index(axis) + 1]
    return next((str(o) for o in spec.owed if o.axis == axis), None)


def _moves(here: Spec, want: Spec, axes: list[str], size: dict[str, int]) -> Iterator[Move]:
    """The moves of one axis at the end of a dim's axes towards where it is wanted, and reductions over several."""
    local = 1 / prod(size[a] for a in here.split_axes)
    home = {a: i for i, d in enumerate(want.dims) for a in d.axes}
    owed, wanted = {o.axis: o for o in here.owed}, {o.axis: o for o in want.owed}
    due = [a for a in want.owed_axes if all(o.kind != "max" for o in here.owed)]        # never a sum beside a max

    def to(*changes: tuple[int, tuple[str, ...]], owing: Sequence[Owed] = here.owed) -> Spec:
        split = {i: d.axes for i, d in enumerate(here.dims)} | dict(changes)
        return Spec(tuple(d.split(split[i]) for i, d in enumerate(here.dims)), tuple(owing))
    payable = {a for a, o in owed.items() if o.kind != "@"}
    paid = [a for a in axes if a in payable and owed[a] != wanted.get(a) and a not in home]
    for n in range(1, len(paid) + 1):
        for some in combinations(paid, n):
            if len({owed[a].kind for a in some}) == 1:
                k = prod(size[a] for a in some)
                yield Move(ALL_REDUCE, here, to(owing=[o for o in here.owed if o.axis not in some]), 2 * (k - 1) / k * local)
    for a in axes:
        grown = (home[a], (*here.dims[home[a]].axes, a)) if a in home else None
        if a in payable and grown:
            yield Move(REDUCE_SCATTER, here, to(grown, owing=[o for o in here.owed if o.axis != a]), (size[a] - 1) / size[a] * local)
        elif a not in owed and a not in here.split_axes:
            if grown:
                yield Move(SHARD, here, to(grown), 0.0)
            if a in due:
                yield Move(OWE, here, to(owing=(*here.owed, wanted[a])), 0.0)
    for j, dim in enumerate(here.dims):
        if not dim.axes or dim.axes == want.dims[j].axes:
            continue
        a, rest = dim.axes[-1], (j, dim.axes[:-1])
        yield Move(ALL_GATHER, here, to(rest), (size[a] - 1) * local)
        if a in home and home[a] != j:
            yield Move(ALL_TO_ALL, here, to(rest, (home[a], (*here.dims[home[a]].axes, a))), (size[a] - 1) / size[a] * local)
        if a in due:
            yield Move(OWE, here, to(rest, owing=(*here.owed, wanted[a])), 0.0)
        staying = tuple(x for x in want.dims[j].axes if x in dim.axes)
        order = staying + tuple(x for x in dim.axes if x not in staying)
        if order != dim.axes:
            yield Move(PERMUTE, here, to((j, order)), local)


def _merge(path: tuple[Move, ...]) -> tuple[Move, ...]:
    """Adjacent gathers of one dim, and adjacent scatters into one, become one over the product of their axes."""
    out: list[Move] = []
    for move in path:
        last = out[-1] if out else None
        if last and last.op is move.op and move.op in (ALL_GATHER, REDUCE_SCATTER, SHARD, OWE) and _one(last, move):
            out[-1] = Move(move.op, last.have, move.want, last.received + move.received)
        else:
            out.append(move)
    return tuple(out)


def _one(a: Move, b: Move) -> bool:
    return a.op in (SHARD, OWE) or changed_dims(a.have, a.want) == changed_dims(b.have, b.want)
