"""What differs between two types of one value, and where a planner stands on its way from one to the other.

>>> from shardlib.spec import parse
>>> made = change(parse("T/x D +y"), parse("T/x/y D"))
>>> made.gained, made.paid, made.dims
(('y',), ('y',), [0])
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardlib.spec import Owed, Spec

Axes = tuple[str, ...]
ROWS_STAY = "rows that data chose lie where dispatch put them"


@dataclass(frozen=True)
class Change:
    """From `have` to `want`.

    lost, new:     what is owed no more, and anew.
    grown, shrunk: by dim, the axes that it gets or loses at its end.
    crossed:       dims whose axes change otherwise.
    """
    have: Spec
    want: Spec
    lost: tuple[Owed, ...]
    new: tuple[Owed, ...]
    grown: Mapping[int, Axes]
    shrunk: Mapping[int, Axes]
    crossed: tuple[int, ...]

    @property
    def gained(self) -> Axes:
        return tuple(a for axes in self.grown.values() for a in axes)

    @property
    def gone(self) -> Axes:
        return tuple(a for axes in self.shrunk.values() for a in axes)

    @property
    def paid(self) -> Axes:
        return tuple(o.axis for o in self.lost)

    @property
    def dims(self) -> list[int]:
        """Those whose axes differ."""
        return changed_dims(self.have, self.want)


@lru_cache(maxsize=8192)
def change(have: Spec, want: Spec) -> Change:
    """What a move from `have` to `want` changes."""
    grown, shrunk, crossed = {}, {}, []
    for i in changed_dims(have, want):
        a, b = have.dims[i].axes, want.dims[i].axes
        if b[:len(a)] == a:
            grown[i] = b[len(a):]
        elif a[:len(b)] == b:
            shrunk[i] = a[len(b):]
        else:
            crossed.append(i)
    lost, new = (o for o in have.owed if o not in want.owed), (o for o in want.owed if o not in have.owed)
    return Change(have, want, tuple(lost), tuple(new), grown, shrunk, tuple(crossed))


def changed_dims(have: Spec, want: Spec) -> list[int]:
    """The dims whose axes differ."""
    return [i for i, (a, b) in enumerate(zip(have.dims, want.dims)) if a.axes != b.axes]


def moved_rows(have: Spec, want: Spec) -> bool:
    """Whether a ragged dim is split otherwise: no move does that."""
    return any(a.ragged and a != b for a, b in zip(have.dims, want.dims))


class Search:
    """A planner at type `here`, on its way to `want`; `axes`: those not yet where they are wanted."""

    def __init__(self, here: Spec, want: Spec, axes: Sequence[str]) -> None:
        self.here, self.want, self.axes = here, want, axes
        self.owed, self.wanted = {o.axis: o for o in here.owed}, {o.axis: o for o in want.owed}
        never = any(o.kind == "max" for o in here.owed)                                 # a sum beside a max
        self.due = [] if never else [o.axis for o in want.owed if o.kind == "+"]
        self.payable = {a for a, o in self.owed.items() if o.kind != "@"}
        self.held = [a for a in axes if a in self.owed and self.owed[a].kind == "@"]
        self.holds = [o.axis for o in want.owed if o.kind == "@"]
        self.free = [a for a in axes if a not in self.owed and a not in here.split_axes]
        self._home = {a: i for i, d in enumerate(want.dims) for a in d.axes}

    def to(self, *changes: tuple[int, Axes], owing: Iterable[Owed] | None = None) -> Spec:
        """`here` with the axes of some dims changed, and what it owes."""
        split = {i: d.axes for i, d in enumerate(self.here.dims)} | dict(changes)
        dims = tuple(d.split(split[i]) for i, d in enumerate(self.here.dims))
        return Spec(dims, self.here.owed if owing is None else tuple(owing))

    def without(self, *axes: str) -> list[Owed]:
        """What is owed, but for that over `axes`."""
        return [o for o in self.here.owed if o.axis not in axes]

    def grown(self, axis: str) -> tuple[int, Axes] | None:
        """The dim that wants `axis`, with it at its end; None where no dim does."""
        i = self._home.get(axis)
        return None if i is None else (i, (*self.here.dims[i].axes, axis))

    def ends(self) -> Iterator[tuple[int, str, tuple[int, Axes]]]:
        """Of each dim that is not split as wanted: its number, its last axis, and the dim without that."""
        for i, dim in enumerate(self.here.dims):
            if dim.axes and dim.axes != self.want.dims[i].axes:
                yield i, dim.axes[-1], (i, dim.axes[:-1])
