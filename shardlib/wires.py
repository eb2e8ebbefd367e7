"""The wires: how the ranks of a group communicate, whatever the move that asks for it.

| wire | each member brings | and gets |
|---|---|---|
| all_reduce | a tensor | the sum (or maximum) of all |
| reduce_scatter | a tensor | its own piece of the sum |
| all_gather | a piece | all pieces |
| all_to_all | a piece for each member | a piece from each member |

A wire knows members and elements, and neither specs nor meshes. What goes over it is a request, `(method, operand,
*more)`: generated code makes it a call of the group's coordinator, the simulator performs it, the proof compares
what members say.

>>> [y.tolist() for y in ALL_GATHER.perform([torch.ones(1), torch.zeros(2)], [(0, (1, 2))] * 2)]
[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from shardlib.errors import SpecError


@dataclass(frozen=True)
class Counts:
    """Elements of one collective: what each member brings and gets, in the group's order, and what j has for i."""
    brings: Sequence[int]
    gets: Sequence[int]
    passed: Callable[[int, int], int]
    root: int | None = None

    @property
    def members(self) -> range:
        return range(len(self.brings))


@dataclass(frozen=True, eq=False)
class Wire:
    """One way to communicate. Compared by identity.

    name:       the coordinator's method.
    does:       what a member brings, and what it gets.
    perform(xs, more): what each member gets, of the members' operands and what else they say.
    share(k):   what one of k members receives, as a fraction of what it brings, were all pieces even.
    received(counts, i): elements that member i receives.
    whole(counts), pieces(counts): elements of the whole tensor, and of the pieces whose evenness counts.
    reduces:    it pays what is owed.
    rooted:     one member has a part of its own.
    many:       the operand is a tuple, a piece for each member; these know the whole only where pieces are even.
    own:        how many of the things that a request says are the member's own matter; the rest all say alike.
    """
    name: str
    does: tuple[str, str]
    perform: Callable[[Sequence[Any], Sequence[tuple]], list]
    share: Callable[[int], float]
    received: Callable[[Counts, int], int]
    whole: Callable[[Counts], int] = lambda counts: counts.brings[0]
    pieces: Callable[[Counts], Sequence[int]] = lambda counts: counts.brings
    reduces: bool = False
    rooted: bool = False
    many: bool = False
    own: int = 0

    def __repr__(self) -> str:
        return f"Wire({self.name})"

    def even(self, counts: Counts) -> bool:
        """Whether all members' pieces have one size."""
        return len(set(self.pieces(counts))) == 1


# -- what each does ------------------------------------------------------------------------------------------

def _all_reduce(xs: Sequence[Tensor], more: Sequence[tuple]) -> list[Tensor]:
    total = _total("all_reduce", xs, *more[0])
    return [total.clone() for _ in xs]


def _reduce_scatter(xs: Sequence[Tensor], more: Sequence[tuple]) -> list[Tensor]:
    dim, sizes, kind = more[0]
    return [piece.clone() for piece in _total("reduce_scatter", xs, kind).split(list(sizes), dim)]


def _total(name: str, xs: Sequence[Tensor], kind: str) -> Tensor:
    """In the order of the group."""
    if len({x.shape for x in xs}) > 1:
        raise SpecError(f"{name}: the ranks bring shapes {[tuple(x.shape) for x in xs]}")
    if kind == "max":
        return torch.stack(list(xs)).amax(0)
    out = xs[0].clone()
    for x in xs[1:]:
        out = out + x
    return out


def _all_gather(xs: Sequence[Tensor], more: Sequence[tuple]) -> list[Tensor]:
    dim, sizes = more[0]
    if [x.shape[dim] for x in xs] != list(sizes):
        held = [x.shape[dim] for x in xs]
        raise SpecError(f"all_gather: the ranks hold {held} rows, the program says {list(sizes)}")
    return [torch.cat(list(xs), dim) for _ in xs]


def _all_to_all(xs: Sequence[Sequence[Tensor]], more: Sequence[tuple]) -> list[tuple[Tensor, ...]]:
    """Piece i of member j is what i gets from j: of the shape it expects, and where they are even, as large as all."""
    got = [tuple(x[i].clone() for x in xs) for i in range(len(xs))]
    for member, (pieces, (expected, *_)) in enumerate(zip(got, more)):
        if (come := tuple(tuple(p.shape) for p in pieces)) != expected:
            raise SpecError(f"all_to_all: member {member} expects pieces of shapes {expected}; {come} come")
    if more[0][1:] == (True,) and len({p.numel() for pieces in got for p in pieces}) > 1:
        raise SpecError(f"all_to_all: pieces of {[[p.numel() for p in x] for x in xs]} elements are not even")
    return got


def _both_halves(counts: Counts, i: int) -> int:
    """A reduce_scatter and an all_gather of pieces as even as can be: the first n mod k members have one more."""
    n, k = counts.brings[i], len(counts.brings)
    piece = n // k + (i < n % k)
    return (k - 1) * piece + n - piece


# -- the wires -----------------------------------------------------------------------------------------------

ALL_REDUCE = Wire("all_reduce", ("a tensor", "the sum (or maximum) of all"), _all_reduce,
                  share=lambda k: 2 * (k - 1) / k, received=_both_halves, reduces=True)
REDUCE_SCATTER = Wire("reduce_scatter", ("a tensor", "its own piece of the sum"), _reduce_scatter,
                      share=lambda k: (k - 1) / k, reduces=True, pieces=lambda counts: counts.gets,
                      received=lambda counts, i: (len(counts.gets) - 1) * counts.gets[i])
ALL_GATHER = Wire("all_gather", ("a piece", "all pieces"), _all_gather,
                  share=lambda k: k - 1.0, received=lambda counts, i: counts.gets[i] - counts.brings[i],
                  whole=lambda counts: counts.gets[0])
ALL_TO_ALL = Wire("all_to_all", ("a piece for each member", "a piece from each member"), _all_to_all,
                  share=lambda k: (k - 1) / k, many=True, own=1,
                  pieces=lambda counts: [counts.passed(j, i) for j in counts.members for i in counts.members],
                  received=lambda counts, i: counts.gets[i] - counts.passed(i, i))
WIRES = {wire.name: wire for wire in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL)}
