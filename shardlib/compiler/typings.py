"""Every type that a value may have on given axes, and types of several values that agree.

>>> from shardlib.spec import parse
>>> [str(kind) for kind in types(parse("B D"), ("x",))]
['B D', 'B/x D', 'B D/x', 'B D +x']
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from shardlib.spec import Owed, Spec


@lru_cache(maxsize=4096)
def _types(spec: Spec, axes: tuple[str, ...], kinds: tuple[str, ...]) -> tuple[Spec, ...]:
    places: list[Any] = [None, *(d.names[0] for d in spec.dense.dims if d.factors), *kinds]
    found: dict[Spec, None] = {}
    for where in itertools.product(places, repeat=len(axes)):
        for order in itertools.permutations(zip(axes, where)):
            split: dict[str, tuple[str, ...]] = {}
            owed = []
            for axis, at in order:
                if at in kinds:
                    owed.append(_owed(at, axis))
                elif at is not None:
                    split[at] = (*split.get(at, ()), axis)
            if len({o.kind for o in owed} & {"+", "max"}) < 2:
                found[spec.split_by(split).owing(*owed)] = None
    return tuple(found)


def types(spec: Spec, axes: Sequence[str], kinds: Sequence[str] = ("+",)) -> list[Spec]:
    """Every type of a value with the dims of `spec`: each axis splits a dim, in any order, is owed in a way
    of `kinds` ("+", "max", "@0"), or neither."""
    return list(_types(spec.whole(), tuple(axes), tuple(kinds)))


def _owed(kind: str, axis: str) -> Owed:
    return Owed("@", axis, int(kind[1:])) if kind[0] == "@" else Owed(kind, axis)


def alike(each: Sequence[Sequence[Spec]], axes: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[Spec, ...]]:
    """A type of each operand, so that names have `axes`, and the same in all of them."""
    if not each:
        yield ()
        return
    for spec in each[0]:
        mine = {f.name: f.axes for d in spec.dims for f in d.factors}
        if all(axes.get(n, split) == split for n, split in mine.items()):
            for others in alike(each[1:], {**axes, **mine}):
                yield spec, *others
