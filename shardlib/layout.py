"""Layouts: one ordered line that says on which mesh axes each dim lives, and how specs are completed by it.

>>> layout = Layout(B="dp", K="tp", F="tp", T="tp")
>>> layout.complete(("B", "T", "D"), {}), layout.complete(("B", "T", "F"), {})
({'B': ('dp',), 'T': ('tp',), 'D': ()}, {'B': ('dp',), 'T': (), 'F': ('tp',)})

Order is meaning: the entries are visited in order and each dim takes the longest prefix of its axes that is
still free. Usually B, E, K, G, F, V, T, S, D. A wrong order is slow, never wrong.
"""
from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.spec import MAX_NAME, MAX_TEXT, NAME, Spec, check_text


class Layout:
    """An ordered mapping dim -> mesh axes; each dim takes the longest prefix of its axes that is still free.

    `Layout()` is declarative with nothing split; `EXPLICIT` completes nothing.

    >>> from shardlib.spec import parse
    >>> layout = Layout(F="tp", T="tp")                                 # T is split where F is not
    >>> [layout.complete_alone(parse(spec)) for spec in ("B T D", "B T F", "D F")]
    [B T/tp D, B T F/tp, D F/tp]
    >>> Layout(T="tp", F="tp").complete_alone(parse("B T F"))           # the other order: T wins
    B T/tp F
    >>> Layout.parse("K=tk,G=tg/dp") == Layout(K="tk", G=("tg", "dp"))
    True
    """

    def __init__(self, entries: Mapping[str, str | Sequence[str]] | None = None,
                 **named: str | Sequence[str]) -> None:
        if not isinstance(entries, Mapping | None):
            raise SpecError(f'layout: {entries!r} is no mapping of dims to axes; write Layout(B="dp"), or '
                            'Layout.parse("B=dp")')
        self.entries: dict[str, tuple[str, ...]] = {}
        for dim, axes in {**(entries or {}), **named}.items():
            if not isinstance(axes, (str, tuple, list)):
                raise SpecError(f"layout: {dim} is given {axes!r}; an axis, or a tuple of axes")
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            for name in (dim, *axes):
                if not isinstance(name, str) or not re.fullmatch(NAME, name):
                    raise SpecError(f"layout: {name!r} is no name; use letters, digits and _")
                check_text("name", name, MAX_NAME)
            if len(set(axes)) != len(axes):
                raise SpecError(f"layout: {dim} is split over {'/'.join(axes)}; an axis splits a dim once")
            if axes:
                self.entries[dim] = axes

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Layout from "B=dp,K=tp,F=tk/tg"."""
        check_text("layout", text, 8 * MAX_TEXT)
        entries: dict[str, tuple[str, ...]] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            match = re.fullmatch(rf"({NAME})=({NAME}(?:/{NAME})*)", part)
            if not match:
                raise SpecError(f"layout {text!r}: {part!r} is not DIM=AXIS or DIM=AXIS/AXIS")
            if match[1] in entries:
                raise SpecError(f"layout {text!r}: dim {match[1]} is given twice")
            entries[match[1]] = tuple(match[2].split("/"))
        return cls(entries)

    def __str__(self) -> str:
        return ",".join(f"{d}={'/'.join(a)}" for d, a in self.entries.items())

    def __repr__(self) -> str:
        return f"Layout.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash((type(self).__name__, str(self)))

    def on(self, mesh: Mesh) -> Layout:
        """The same layout with aliases expanded. SpecError for an axis the mesh lacks."""
        if all(a in mesh.axes for axes in self.entries.values() for a in axes):
            return self
        return type(self)({d: mesh.expand(a, f"layout, dim {d}") for d, a in self.entries.items()})

    def complete(self, names: Iterable[str], pinned: Mapping[str, tuple[str, ...]],
                 taken: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
        """The axes of each of `names`: those in `pinned` keep theirs; `taken` axes are given to none."""
        out, used = dict(pinned), {*taken, *(a for axes in pinned.values() for a in axes)}
        names = tuple(names)
        for dim, axes in self.entries.items():
            if dim in names and dim not in out:
                out[dim] = prefix = _free_prefix(axes, used)
                used.update(prefix)
        return {n: out.get(n, ()) for n in names}

    def alike(self, dim: str, pairs: Iterable[tuple[str, str]]) -> bool:
        """Whether it splits `dim` as it does one that `pairs` name beside it."""
        return any(dim in p and self.entries.get(p[0]) == self.entries.get(p[1], ()) for p in pairs)

    def shared(self, axes: Mapping[str, tuple[str, ...]], pairs: Iterable[tuple[str, str]],
               fixed: Collection[str]) -> dict[str, tuple[str, ...]]:
        """`axes` of dims; one of a pair that it splits alike has those of the other, unless it is `fixed`."""
        made = dict(axes)
        for a, b in (p for pair in pairs for p in (pair, pair[::-1])):
            if a in made and a not in fixed and made.get(b) and self.alike(a, [(a, b)]):
                made[a] = made[b]
        return made

    def without(self, axes: Collection[str]) -> Layout:
        """The same, giving these axes to no dim: in a stage of a pipeline one rank is along them."""
        kept = {d: tuple(takewhile(lambda a: a not in axes, of)) for d, of in self.entries.items()}
        return type(self)({d: of for d, of in kept.items() if of})

    def complete_alone(self, spec: Spec) -> Spec:
        """The type of a value that stands alone: its own dims completed, what it owes kept."""
        axes = self.complete(spec.names, pins(spec), (o.axis for o in spec.owed))
        return spec.split_by(axes)

    def type_of(self, spec: Spec, mesh: Mesh) -> Spec:
        """The type on `mesh` of a value that stands alone, `spec` being its text."""
        return self.complete_alone(mesh.resolve(spec, True)).resolve(mesh)


class _Explicit(Layout):
    """Nothing is completed and nothing converted: specs mean just what they say.

    >>> from shardlib import EXPLICIT, Mesh, lower, sharded
    >>> lower(sharded("D/tp -> D")(lambda x: x), Layout(), mesh=Mesh(tp=2))
    @sharded("D/tp -> D", layout=EXPLICIT)
    def f(x):
        x2 = all_gather("D/tp -> D", x)
        return x2
    >>> lower(sharded("D/tp -> D", layout=EXPLICIT)(lambda x: x), mesh=Mesh(tp=2))     # doctest: +ELLIPSIS
    Traceback (most recent call last):
    shardlib.errors.SpecError: f: the result has D split over tp; the signature says "D" ...
    """

    def on(self, mesh: Mesh) -> Layout:
        return self

    def __repr__(self) -> str:
        return "EXPLICIT"


EXPLICIT = _Explicit()


def pins(spec: Spec) -> dict[str, tuple[str, ...]]:
    """The dims that say where they live: split ones, and those whole on purpose;
    a group's later factors are whole."""
    return {f.name: f.axes for d in spec.dims for i, f in enumerate(d.factors)
            if f.axes or f.whole or i and not d.ragged}


def _free_prefix(axes: tuple[str, ...], used: set[str]) -> tuple[str, ...]:
    for i, axis in enumerate(axes):
        if axis in used:
            return axes[:i]
    return axes
