"""The wires: how the ranks of a group communicate, whatever the move that asks for it.

| wire | each member brings | and gets |
|---|---|---|
| all_reduce | a tensor | the sum (or maximum) of all |
| reduce_scatter | a tensor | its own piece of the sum |
| all_gather | a piece | all pieces |
| all_to_all | a piece for each member | a piece from each member |
| broadcast | the root a tensor | the root's |
| send | of two members the first a tensor | the second gets it |

A wire knows members and elements, and neither specs nor meshes. What goes over it is a request, `(method,
operand, *more)`: generated code makes it a call of the group's coordinator, the simulator performs it, the
proof compares what members say.

>>> [y.tolist() for y in ALL_GATHER.perform([torch.ones(1), torch.zeros(2)], [(0, (1, 2))] * 2)]
[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardlib.errors import SpecError


@dataclass(frozen=True)
class Part:
    """One member of a collective of `k`, in elements: what it brings, and what it gets.

    member: its number.  root: that of the root, over a rooted wire.
    passes: over a wire for many, what it has for each member that is looked at.  kept: for itself.
    """
    k: int
    member: int
    brings: int
    gets: int
    root: int | None = None
    kept: int = 0
    passes: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class Wire:
    """One way to communicate. Compared by identity.

    name:       the coordinator's method.
    does:       what a member brings, and what it gets.
    perform(xs, more): what each member gets, of the members' operands and what else they say.
    share(k):   what one of k members receives, as a fraction of what it brings, were all pieces even.
    received(part): elements that a member receives.
    whole(part), pieces(part): elements of the whole tensor, and of the pieces whose evenness counts.
    turn(n, k): of members that bring n elements, how many receive otherwise than the rest: the first ones.
    reduces:    it pays what is owed.
    rooted:     one member has a part of its own.
    many:       the operand is a tuple, a piece for each member; the whole is known only where these are even.
    own:        how many of the things that a request says are the member's own; the rest all say alike.
    """
    name: str
    does: tuple[str, str]
    perform: Callable[[Sequence[Any], Sequence[tuple]], list]
    share: Callable[[int], float]
    received: Callable[[Part], int]
    whole: Callable[[Part], int] = lambda part: part.brings
    pieces: Callable[[Part], Sequence[int]] = lambda part: (part.brings,)
    turn: Callable[[int, int], int] = lambda n, k: 0
    reduces: bool = False
    rooted: bool = False
    many: bool = False
    own: int = 0

    def __repr__(self) -> str:
        return f"Wire({self.name})"

    def even(self, parts: Iterable[Part]) -> bool:
        """Whether all members' pieces have one size."""
        return len({n for part in parts for n in self.pieces(part)}) == 1


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
    """Piece i of member j is what i gets from j, of the shape it expects; even ones are all as large."""
    got = [tuple(x[i].clone() for x in xs) for i in range(len(xs))]
    for member, (pieces, (expected, *_)) in enumerate(zip(got, more)):
        if (come := tuple(tuple(p.shape) for p in pieces)) != expected:
            raise SpecError(f"all_to_all: member {member} expects pieces of shapes {expected}; {come} come")
    if more[0][1:] == (True,) and len({p.numel() for pieces in got for p in pieces}) > 1:
        raise SpecError(f"all_to_all: pieces of {[[p.numel() for p in x] for x in xs]} elements are not even")
    return got


def _broadcast(xs: Sequence[Tensor], more: Sequence[tuple]) -> list[Tensor]:
    if len({x.shape for x in xs}) > 1:
        raise SpecError(f"broadcast: the ranks bring shapes {[tuple(x.shape) for x in xs]}")
    return [xs[more[0][0]].clone() for _ in xs]


def _send(xs: Sequence[Tensor], more: Sequence[tuple]) -> list[Tensor | None]:
    """Of a pair; the second brings what it has room for."""
    source, target = xs
    if source.shape != target.shape:
        raise SpecError(f"send: a tensor of shape {tuple(source.shape)} comes where {tuple(target.shape)} is "
                        "expected")
    return [None, source.clone()]


def _both_halves(part: Part) -> int:
    """A reduce_scatter and an all_gather of even pieces; the first n mod k members have one more."""
    n, k = part.brings, part.k
    piece = n // k + (part.member < n % k)
    return (k - 1) * piece + n - piece


# -- the wires -----------------------------------------------------------------------------------------------

ALL_REDUCE = Wire("all_reduce", ("a tensor", "the sum (or maximum) of all"), _all_reduce,
                  share=lambda k: 2 * (k - 1) / k, received=_both_halves, turn=lambda n, k: n % k,
                  reduces=True)
REDUCE_SCATTER = Wire("reduce_scatter", ("a tensor", "its own piece of the sum"), _reduce_scatter,
                      share=lambda k: (k - 1) / k, received=lambda part: (part.k - 1) * part.gets,
                      pieces=lambda part: (part.gets,), reduces=True)
ALL_GATHER = Wire("all_gather", ("a piece", "all pieces"), _all_gather,
                  share=lambda k: k - 1.0, received=lambda part: part.gets - part.brings,
                  whole=lambda part: part.gets)
ALL_TO_ALL = Wire("all_to_all", ("a piece for each member", "a piece from each member"), _all_to_all,
                  share=lambda k: (k - 1) / k, received=lambda part: part.gets - part.kept,
                  pieces=lambda part: part.passes, many=True, own=1)
BROADCAST = Wire("broadcast", ("the root a tensor", "the root's"), _broadcast, share=lambda k: 1.0,
                 received=lambda part: 0 if part.member == part.root else part.gets, rooted=True)
SEND = Wire("send", ("of two members the first a tensor", "the second gets it"), _send,    # its root gets it
            share=lambda k: 1.0, received=lambda part: part.gets if part.member == part.root else 0,
            rooted=True)
WIRES = {wire.name: wire for wire in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, BROADCAST, SEND)}
