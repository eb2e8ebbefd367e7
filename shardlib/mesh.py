"""The mesh: ordered named axes of ranks, and where each piece of a split dim begins.

>>> mesh = Mesh(dp=2, tp=3)
>>> mesh.world_size, mesh.coordinate(4), mesh.group(("tp",), 4)
(6, {'dp': 1, 'tp': 1}, (3, 4, 5))
>>> [mesh.extent(7, ("tp",), c) for c in mesh.coordinates()][:3]
[(0, 3), (3, 2), (5, 2)]

The last axis runs fastest. An alias names axes in order: `Mesh(dp=2, tp=3, ep=("dp", "tp"))`. Splits may be
uneven: of n rows over k coordinates the first n mod k hold one more; several axes nest, outermost first. Or
one says how many each holds: `Mesh(pp=(5, 3))` has two stages, of 8 layers.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from math import prod

from shardlib.errors import SpecError
from shardlib.spec import MAX_NAME, MAX_TEXT, NAME, Dim, Factor, Spec, check_text

_AMBIENT: ContextVar[Mesh | None] = ContextVar("mesh", default=None)
MAX_RANKS = 1 << 20
MAX_AXES = 64
COUNT = "[0-9]{1,9}"


class Mesh:
    """Ordered named axes with sizes; the last one runs fastest.

    An axis given a tuple of names instead of a size is an alias for their product; given numbers, it has a
    coordinate for each, and what is split over it is cut into so many rows. Within `with mesh:` it is
    the mesh of everything that is not told another. Refused: sizes below 1, aliases of aliases.

    >>> from shardlib import Layout, lower, sharded
    >>> with Mesh(dp=2, tp=4, ep=("dp", "tp")) as mesh:
    ...     lower(sharded("E D -> E D")(lambda x: -x), Layout(E="ep"))
    @sharded("E/dp/tp D -> E/dp/tp D", layout=EXPLICIT)
    def f(x):
        v1 = x * -1
        return v1
    >>> mesh.extent(60, ("dp", "tp"), mesh.coordinate(5))     # of 60 rows: the first on rank 5, how many
    (38, 8)
    """

    def __init__(self, axes: Mapping[str, int | Sequence[str] | Sequence[int]] | None = None,
                 **named: int | Sequence[str] | Sequence[int]) -> None:
        if not isinstance(axes, Mapping | None):
            raise SpecError(f"mesh: {axes!r} is no mapping of axes to sizes; write Mesh(dp=2, tp=4)")
        given = {**(axes or {}), **named}
        if len(given) > MAX_AXES:
            raise SpecError(f"mesh: {len(given)} axes; the most allowed is {MAX_AXES}")
        self.axes: dict[str, int] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.cuts: dict[str, tuple[int, ...]] = {}
        for name, value in given.items():
            if not isinstance(name, str) or not re.fullmatch(NAME, name):
                raise SpecError(f"mesh: {name!r} is no axis name; use letters, digits and _")
            check_text("name", name, MAX_NAME)
            if isinstance(value, (tuple, list)) and value and all(type(n) is int and n >= 0 for n in value):
                self.axes[name], self.cuts[name] = len(value), tuple(value)
            elif isinstance(value, (tuple, list)):
                self.aliases[name] = tuple(value)
            elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
                self.axes[name] = int(value)
            else:
                raise SpecError(f"mesh: axis {name} has size {value!r}; a size is an integer of at least 1")
        for name, value in self.aliases.items():
            if not value or len(set(value)) != len(value) or any(a not in self.axes for a in value):
                raise SpecError(f"mesh: alias {name} names {', '.join(map(str, value)) or 'nothing'}; it may "
                                f"name each of the axes {', '.join(self.axes) or '(none)'} once")
        if self.world_size > MAX_RANKS:
            raise SpecError(f"mesh: {self.world_size} ranks; the most allowed is {MAX_RANKS}")
        self._tokens: list[Token] = []

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Mesh from "dp=2,tp=4" (an alias is written ep=dp/tp, a cut pp=5+3); "" is the mesh of one rank."""
        check_text("mesh", text, 8 * MAX_TEXT)
        axes: dict[str, int | tuple[str, ...] | tuple[int, ...]] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            match = re.fullmatch(rf"({NAME})=(?:({COUNT}(?:\+{COUNT})*)|({NAME}(?:/{NAME})*))", part)
            if not match:
                raise SpecError(f"mesh {text!r}: {part!r} is not NAME=SIZE")
            name, size, alias = match.groups()
            if name in axes:
                raise SpecError(f"mesh {text!r}: axis {name} is given twice")
            counts = tuple(map(int, size.split("+"))) if size else ()
            axes[name] = tuple(alias.split("/")) if alias else counts[0] if len(counts) == 1 else counts
        return cls(axes)

    @property
    def world_size(self) -> int:
        return prod(self.axes.values())

    def __str__(self) -> str:
        return ",".join([*(f"{a}={'+'.join(map(str, self.cuts.get(a, (n,))))}" for a, n in self.axes.items()),
                         *(f"{a}={'/'.join(v)}" for a, v in self.aliases.items())])

    def __repr__(self) -> str:
        return f"Mesh.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __enter__(self) -> Mesh:
        self._tokens.append(_AMBIENT.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _AMBIENT.reset(self._tokens.pop())

    @property
    def given(self) -> dict[str, int | Sequence[str] | Sequence[int]]:
        """What makes such a mesh again."""
        return {**self.axes, **self.cuts, **self.aliases}

    # -- ranks and coordinates -------------------------------------------------------------------------------

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` stands: axis -> index."""
        out = {}
        for axis, size in reversed(self.axes.items()):
            rank, out[axis] = divmod(rank, size)
        return {a: out[a] for a in self.axes}

    def coordinates(self) -> list[dict[str, int]]:
        """Every rank's coordinate, in order of rank."""
        return [dict(zip(self.axes, c)) for c in itertools.product(*map(range, self.axes.values()))]

    def rank(self, coordinate: Mapping[str, int]) -> int:
        r = 0
        for axis, size in self.axes.items():
            r = r * size + coordinate[axis]
        return r

    def size(self, axes: Sequence[str]) -> int:
        """Ranks in a group over the product of `axes`."""
        return prod(self.axes[a] for a in axes)

    def group(self, axes: Sequence[str], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`; the last of `axes` runs fastest:
        ("x", "y") is not ("y", "x")."""
        here = self.coordinate(rank)
        return tuple(self.rank({**here, **dict(zip(axes, c))})
                     for c in itertools.product(*(range(self.axes[a]) for a in axes)))

    def number(self, axes: Sequence[str], coordinate: Mapping[str, int]) -> int:
        """Which member of its group over `axes` a coordinate is."""
        n = 0
        for axis in axes:
            n = n * self.axes[axis] + coordinate[axis]
        return n

    def extent(self, n: int, axes: Sequence[str], coordinate: Mapping[str, int]) -> tuple[int, int]:
        """(start, size) of the piece of n rows that `coordinate` holds when they are split over `axes`."""
        start = 0
        for axis in axes:
            (each, more), i = divmod(n, self.axes[axis]), coordinate[axis]
            if cut := self.cuts.get(axis):
                if n != sum(cut):
                    raise SpecError(f"mesh {self}: {n} rows are split over {axis}, which cuts {sum(cut)}")
                start, n = start + sum(cut[:i]), cut[i]
            else:
                start, n = start + each * i + min(i, more), each + (i < more)
        return start, n

    # -- specs -----------------------------------------------------------------------------------------------

    def expand(self, axes: Sequence[str], where: str) -> tuple[str, ...]:
        """`axes` with aliases expanded. SpecError, saying `where`, for one the mesh lacks."""
        out: list[str] = []
        for axis in axes:
            if axis in self.axes:
                out.append(axis)
            elif axis in self.aliases:
                out += self.aliases[axis]
            else:
                raise SpecError(f"{where}: unknown axis {axis}; the mesh has "
                                f"{', '.join([*self.axes, *self.aliases]) or 'none'}")
        return tuple(out)

    def resolve(self, spec: Spec, keep_whole: bool = False) -> Spec:
        """The type of `spec` on this mesh; with `keep_whole` it still says which
        dims are whole on purpose."""
        if self._is_type(spec, keep_whole):
            return spec
        where = f'spec "{spec}"'
        dims = tuple(Dim(tuple(Factor(f.name, self.expand(f.axes, where), keep_whole and f.whole)
                               for f in d.factors), d.size, d.ragged)
                     for d in spec.dims)
        owed = tuple(o._replace(axis=a, at=o.coordinate(self.axes[a]))
                     for o in spec.owed for a in self.expand((o.axis,), where))
        for o in owed:
            at = o.coordinate(self.axes[o.axis])
            if at is not None and not 0 <= at < self.axes[o.axis]:
                raise SpecError(
                    f"{where}: axis {o.axis} has coordinates 0 to {self.axes[o.axis] - 1}, not {o.at}")
        return Spec(dims, owed, spec.ellipsis)

    def _is_type(self, spec: Spec, keep_whole: bool) -> bool:
        """Whether `spec` says axes of this mesh alone, nothing held, and `/1` only where it is kept."""
        return spec.plain or (all(a in self.axes for a in spec.split_axes)
                              and (keep_whole or not spec.pins_whole)
                              and all(o.axis in self.axes and o.at is None for o in spec.owed))

    def rows(self, dim: Dim, sizes: Mapping[str, int], coordinate: Mapping[str, int]) -> tuple[int, int]:
        """(start, size) of what `coordinate` holds along `dim`, in rows of it."""
        if not dim.factors:
            return 0, dim.constant
        if dim.ragged:      # the rows that there is room for, in no place of the whole
            most = self.most_rows(dim, sizes, coordinate)
            return 0, min(most, sizes.get(dim.label, most))
        first = dim.factors[0]
        start, size = self.extent(sizes[first.name], first.axes, coordinate)
        if len(dim.factors) == 1:
            return start, size
        inner = prod([sizes[f.name] for f in dim.factors[1:]])
        return start * inner, size * inner

    def most_rows(self, dim: Dim, sizes: Mapping[str, int], coordinate: Mapping[str, int]) -> int:
        """Of a ragged dim: how many rows `coordinate` may get, whatever is chosen."""
        first, *others = (self.extent(sizes[f.name], f.axes, coordinate)[1] for f in dim.factors)
        return min(first, sizes[dim.ragged]) * prod(others)

    def local_shape(self, spec: Spec, sizes: Mapping[str, int],
                    coordinate: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of what `coordinate` holds of a tensor of type `spec` whose dims have global `sizes`."""
        return tuple([self.rows(d, sizes, coordinate)[1] for d in spec.dims])


def check_sizes(sizes: Mapping[str, int]) -> None:
    """SpecError unless all sizes of dims are integers of at least 0."""
    if not isinstance(sizes, Mapping):
        raise SpecError(
            f"sizes is a {type(sizes).__name__}; sizes map dims to integers, as in dict(B=8, D=512)")
    if ((wrong := next((n for n, size in sizes.items() if type(size) is not int or size < 0), None))
        is not None):
        raise SpecError(f"sizes: {wrong} is {sizes[wrong]!r}; a size is an integer of at least 0")


def current_mesh(mesh: Mesh | None = None) -> Mesh:
    """`mesh`, else the one of the enclosing `with mesh:`, else the mesh of one rank."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise SpecError(f'the mesh is a {type(mesh).__name__}; it is a Mesh, as in Mesh(dp=2, tp=4) or '
                        'Mesh.parse("dp=2,tp=4")')
    return mesh or _AMBIENT.get() or Mesh()
