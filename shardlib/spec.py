"""Spec strings: one grammar, one parser, one printer.

A spec names the dims of a tensor, says over which mesh axes each is split, and which sums are still owed.

>>> s = parse("B/dp T D +tp")
>>> s.names, s.axes("B"), s.owed_axes
(('B', 'T', 'D'), ('dp',), ('tp',))
>>> str(parse("M/x/y (K/tp G H) 1 D/1 +b +a"))
'M/x/y (K/tp G H) 1 D/1 +a +b'

    spec  := "()" | item { " " item }              "()" is the scalar
    item  := "..." (first only) | dim | owed       dims before owed
    dim   := NAME [split] | INT | "(" NAME [split] { " " NAME } ")"
           | "(" NAME [split] { " " NAME [split] } ")~" NAME        ragged: only rows chosen by data
    split := "/" AXIS { "/" AXIS } | "/1"          "/1": whole on purpose
    owed  := "+" AXIS | "max:" AXIS | "@" AXIS ":" (INT | "last")

Text and type are two things: `parse` gives text, which keeps aliases and `/1` and round-trips;
`Spec.resolve(mesh)` gives the type, with aliases expanded and no `/1`. A type is its own text. Refused with a
`SpecError`: anything else than the grammar, a name twice, an axis twice, an owed max beside an owed sum.
"""
from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, Protocol, TypeGuard

from shardlib.errors import SpecError

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_DIM = re.compile(rf"({NAME})((?:/{NAME})+|/1)?")
_OWED = re.compile(rf"\+({NAME})|max:({NAME})|@({NAME}):([0-9]+|last)")
_ITEM = re.compile(rf"\([^()]*\)(?:~{NAME})?|[^\s()~]+")
_ITEMS = re.compile(rf" *(?:{_ITEM.pattern})(?: +(?:{_ITEM.pattern}))* *")
MAX_TEXT = 2000         # characters of a spec
MAX_NAME = 64           # characters of the name of an axis, and of a dim in a layout


def nameable(text: object) -> TypeGuard[str]:
    """Whether `text` may name a value, an argument or a field of a program: ASCII, and no keyword."""
    return isinstance(text, str) and text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def heading(text: object) -> bool:
    """Whether `text` may name a function or a class of a program.

    Where two share a name, printing adds __2.
    """
    return nameable(text) and not re.search(r"__[0-9]+$", text)


class Factor(NamedTuple):
    """A name and the mesh axes that split it, outermost first. `whole` records a written `/1`."""
    name: str
    axes: tuple[str, ...] = ()
    whole: bool = False

    def __repr__(self) -> str:
        return "/".join((self.name, *self.axes)) + ("/1" if self.whole else "")


class Dim(NamedTuple):
    """One dim of a tensor: a name, a group of names, or a constant size (no factors).

    ragged: of a group (E B T)~J that has only some of its rows, chosen by data and in an order of their own:
    J, of which size there are rows at most for each (B T). Each of its factors may be split.
    """
    factors: tuple[Factor, ...]
    size: int | None = None
    ragged: str = ""

    @property
    def label(self) -> str:
        """What the dim is known by: its name, or all names of its group in parentheses;
        a constant has its digits."""
        if len(self.factors) == 1:
            return self.factors[0].name
        return self._grouped(f.name for f in self.factors) if self.factors else str(self.size)

    def _grouped(self, factors: Iterable[object]) -> str:
        return f"({' '.join(map(str, factors))}){'~' * bool(self.ragged)}{self.ragged}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.factors)

    @property
    def constant(self) -> int:
        """The size of a dim that has no name."""
        return 0 if self.size is None else self.size

    @property
    def axes(self) -> tuple[str, ...]:
        return self.factors[0].axes if self.factors else ()

    def split(self, axes: tuple[str, ...]) -> Dim:
        """The same dim split over `axes` and nothing else."""
        if not self.factors:
            return self
        return Dim((Factor(self.factors[0].name, tuple(axes)), *self.factors[1:]), self.size, self.ragged)

    def split_by(self, axes: Mapping[str, tuple[str, ...]]) -> Dim:
        """The same dim, each factor that may be split over `axes[name]` (nothing, where missing)."""
        if not self.factors:
            return self
        if self.ragged:
            return Dim(tuple([Factor(f.name, axes.get(f.name, ())) for f in self.factors]), None, self.ragged)
        first = self.factors[0].name
        return Dim((Factor(first, axes.get(first, ())), *self.factors[1:]))

    def __repr__(self) -> str:
        if not self.factors:
            return str(self.size)
        return self._grouped(self.factors) if len(self.factors) > 1 else str(self.factors[0])


class Owed(NamedTuple):
    """What is still owed on an axis: a sum ("+"), a max ("max"),
    or the value is held at one coordinate ("@")."""
    kind: str
    axis: str
    at: int | Literal["last"] | None = None

    def coordinate(self, size: int) -> int | None:
        """Where on an axis of `size` the value is held; None of what is not held."""
        return size - 1 if self.at == "last" else self.at

    def __repr__(self) -> str:
        return {"+": f"+{self.axis}", "max": f"max:{self.axis}", "@": f"@{self.axis}:{self.at}"}[self.kind]


class Resolves(Protocol):
    """What knows the axes: a mesh."""

    def resolve(self, spec: Spec) -> Spec: ...


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Spec:
    """The parsed form of a spec. Build it with `parse`; print it with `str`.

    Equal parts make one object, as long as it is remembered: it is checked once, and keeps what it is asked.
    """
    dims: tuple[Dim, ...] = ()
    owed: tuple[Owed, ...] = ()
    ellipsis: bool = False

    def __new__(cls, dims: tuple[Dim, ...] = (), owed: tuple[Owed, ...] = (), ellipsis: bool = False) -> Spec:
        return _made(dims, tuple(sorted(owed, key=lambda o: o.axis)) if len(owed) > 1 else owed, ellipsis)

    def __reduce__(self) -> tuple[Any, ...]:
        return Spec, (self.dims, self.owed, self.ellipsis)

    @cached_property
    def text(self) -> str:
        return " ".join(self.items()) or "()"

    def items(self) -> list[str]:
        return ["..."] * self.ellipsis + [str(d) for d in self.dims] + [str(o) for o in self.owed]

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return self is other or isinstance(other, Spec) and self.text == other.text

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every name, groups opened, in order."""
        return tuple(f.name for d in self.dims for f in d.factors)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """One label a dim."""
        return tuple(d.label for d in self.dims)

    @cached_property
    def split_axes(self) -> tuple[str, ...]:
        """The axes that split a dim, in order of appearance."""
        return tuple(a for d in self.dims for f in d.factors for a in f.axes)

    @property
    def owed_axes(self) -> tuple[str, ...]:
        """The axes over which a sum is owed."""
        return tuple(o.axis for o in self.owed if o.kind == "+")

    def dim(self, label: str) -> Dim:
        return self.dims[self.labels.index(label)]

    def axes(self, label: str) -> tuple[str, ...]:
        """The axes that split the dim known as `label`."""
        return self.dim(label).axes

    def with_dims(self, dims: Iterable[Dim]) -> Spec:
        """The same, but for its dims."""
        return Spec(tuple(dims), self.owed, self.ellipsis)

    def split(self, axes: Mapping[str, tuple[str, ...]]) -> Spec:
        """The same dims, each label split over `axes[label]` (nothing, where missing), owing the same;
        ragged ones stay."""
        return self.with_dims([d if d.ragged else d.split(axes.get(d.label, ())) for d in self.dims])

    def split_by(self, axes: Mapping[str, tuple[str, ...]]) -> Spec:
        """The same dims, each name that may be split over `axes[name]` (nothing, where missing), owing the
        same."""
        return _split(self, tuple([axes.get(name, ()) for name in self.names]))

    def owing(self, *owed: Owed | str) -> Spec:
        """The same dims, owing exactly `owed`; a plain axis name stands for a sum."""
        if owed == self.owed:
            return self
        said = tuple([o if isinstance(o, Owed) else Owed("+", o) for o in owed])
        return Spec(self.dims, said, self.ellipsis)

    def keeping(self, pinned: Mapping[str, tuple[str, ...]]) -> Spec:
        """The same dims, those whose first name is in `pinned` split so, or whole on purpose."""
        def kept(f: Factor) -> Factor:
            return Factor(f.name, pinned[f.name], not pinned[f.name]) if f.name in pinned else f
        return self.with_dims([d._replace(factors=(kept(d.factors[0]), *d.factors[1:])) if d.factors else d
                               for d in self.dims]) if pinned else self

    def whole(self) -> Spec:
        """The same dims with nothing split and nothing owed."""
        return self._whole

    @cached_property
    def _whole(self) -> Spec:
        return Spec(tuple([d.split_by({}) for d in self.dims]))

    @cached_property
    def plain(self) -> bool:
        """Whether it says dims alone: none that is split, or whole on purpose, and nothing owed."""
        return not (self.owed or self.split_axes or self.pins_whole)

    @cached_property
    def pins_whole(self) -> bool:
        """Whether it says of a dim that it is whole on purpose."""
        return any(f.whole for d in self.dims for f in d.factors)

    @cached_property
    def ragged(self) -> bool:
        """Whether a dim is ragged."""
        return any(d.ragged for d in self.dims)

    @cached_property
    def dense(self) -> Spec:
        """The same with each factor of a ragged dim as a dim: of all pairs, not of those that are there."""
        return self.with_dims([new for d in self.dims for new in (
            [Dim((f,)) for f in d.factors] if d.ragged else [d])])

    def resolve(self, mesh: Resolves) -> Spec:
        """The type on `mesh`: aliases expanded, no `/1`. SpecError for an axis the mesh lacks."""
        return mesh.resolve(self)


@lru_cache(maxsize=16384)
def _made(dims: tuple[Dim, ...], owed: tuple[Owed, ...], ellipsis: bool) -> Spec:
    """The Spec of these parts, what is owed in order of axes."""
    made = object.__new__(Spec)
    vars(made).update(dims=dims, owed=owed, ellipsis=ellipsis)
    _check(made)
    return made


@lru_cache(maxsize=16384)
def _split(spec: Spec, axes: tuple[tuple[str, ...], ...]) -> Spec:
    """The same dims, each name in order split over `axes`, as far as it may be."""
    of = dict(zip(spec.names, axes))
    return spec.with_dims([d.split_by(of) for d in spec.dims])


def _check(spec: Spec) -> None:
    names, axes = spec.names, [*spec.split_axes, *(o.axis for o in spec.owed)]
    if len(set(names)) < len(names):
        raise SpecError(f'spec "{spec.text}": dim {_twice(names)} appears twice; give the second one its own '
                        "letter")
    if len(set(axes)) < len(axes):
        raise SpecError(f'spec "{spec.text}": axis {_twice(axes)} is used twice; an axis splits one dim, or '
                        "is owed, once")
    if {"max", "+"} <= {o.kind for o in spec.owed}:
        raise SpecError(
            f'spec "{spec.text}": an owed max beside an owed sum has no meaning; reduce one of them first')


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def check_text(what: str, text: object, longest: int = MAX_TEXT) -> None:
    """SpecError unless `text` is a string of at most `longest` characters."""
    if not isinstance(text, str):
        raise SpecError(f"a {what} is a string, not {type(text).__name__}")
    if len(text) > longest:
        raise SpecError(f"{what} of {len(text)} characters; the longest allowed has {longest}")


def parse(text: str) -> Spec:
    """The Spec that `text` writes. SpecError when it is not in the grammar."""
    check_text("spec", text)
    return _parse(text)


@lru_cache(maxsize=16384)
def _parse(text: str) -> Spec:
    if not text.strip(" "):
        raise SpecError('an empty string is no spec; the scalar is written "()"')
    if text.strip(" ") == "()":
        return Spec()
    if not _ITEMS.fullmatch(text):
        raise SpecError(f"spec {text!r}: items are separated by blanks, and each parenthesis has its partner")
    items = _ITEM.findall(text)
    if items[0] == "()" and all(map(_OWED.fullmatch, items[1:])):
        raise SpecError(f'spec {text!r}: () is the scalar and stands alone; a scalar that owes is written '
                        f'"{" ".join(items[1:])}"')
    ellipsis = items[0] == "..."
    dims: list[Dim] = []
    owed: list[Owed] = []
    for item in items[ellipsis:]:
        if match := _OWED.fullmatch(item):
            plus, biggest, held, at = match.groups()
            owed.append(Owed("+", plus) if plus else Owed("max", biggest) if biggest
                        else Owed("@", held, "last" if at == "last" else int(at)))
        elif owed:
            raise SpecError(f"spec {text!r}: {item} stands after {owed[-1]}; dims come before what is owed")
        else:
            dims.append(_dim(item, text))
    return Spec(tuple(dims), tuple(owed), ellipsis)


def _dim(item: str, text: str) -> Dim:
    if item.isascii() and item.isdigit() and len(item) < 19:
        return Dim((), size=int(item))
    if item.startswith("("):
        group, _, most = item.partition(")~")
        factors = tuple(_dim(name, text) for name in group.strip("()").split(" ") if name)
        if not factors or any(len(d.factors) != 1 for d in factors) or most and len(factors) < 2:
            raise SpecError(f"spec {text!r}: {item} is no group; a group holds names, as in (K/tp G H)")
        if not most and any(d.factors[0].axes or d.factors[0].whole for d in factors[1:]):
            raise SpecError(f"spec {text!r}: in the group {item} only the first factor may be split")
        return (Dim(tuple(d.factors[0] for d in factors), ragged=most) if len(factors) > 1 else factors[0])
    match = _DIM.fullmatch(item)
    if not match:
        raise SpecError(f"spec {text!r}: {item!r} is neither a dim (D, D/tp, D/1, 4, (K G H), (E B T)~J) "
                        f"nor owed (+tp, max:tp, @pp:0)")
    name, split = match.groups()
    axes = () if split in (None, "/1") else tuple(split[1:].split("/"))
    return Dim((Factor(name, axes, split == "/1"),))


def parse_signature(text: str) -> tuple[tuple[Spec | None, ...], tuple[Spec | None, ...]]:
    """Arguments and results of "B T D, * -> B T D"; `None` stands for `*`,
    a pytree that carries its own specs."""
    check_text("signature", text, 8 * MAX_TEXT)
    return _parse_signature(text)


@lru_cache(maxsize=4096)
def _parse_signature(text: str) -> tuple[tuple[Spec | None, ...], tuple[Spec | None, ...]]:
    if text.count("->") != 1:
        raise SpecError(f'"{text}": a signature has exactly one "->" between its operands and its result')
    left, right = text.split("->")

    def side(part: str) -> tuple[Spec | None, ...]:
        return (tuple(None if s.strip(" ") == "*" else parse(s.strip(" ")) for s in part.split(","))
                if part.strip(" ") else ())
    return side(left), side(right)


def parse_specs(text: str, otherwise: str) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Operands and results of an op, whose text has no `*`.

    SpecError that says `otherwise` where it has one.
    """
    def plain(side: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
        specs = tuple(s for s in side if s is not None)
        if len(specs) != len(side):
            raise SpecError(otherwise)
        return specs
    ins, outs = parse_signature(text)
    return plain(ins), plain(outs)
