"""Rows of a neighbour that a piece needs, its halo: who has which, who wants which, and what goes over.

A rank has rows of a dim by one range, and wants those of another: what its windows reach, which may lie
beyond its neighbours where pieces are short. One all_to_all brings what it lacks; the transpose takes back,
and adds up what overlaps.

>>> halo = Halo(((0, 2), (2, 2), (4, 1)), ((0, 3), (1, 5), (3, 5)), 1)  # (start, stop) of what each wants
>>> halo.passed(1, 0), halo.passed(0, 1), halo.passed(2, 1)             # (start, size) of what goes i -> j
((2, 1), (1, 1), (4, 1))
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlib.language.exchanges import Requests
from shardlib.wires import Part

Range = tuple[int, int]


@dataclass(frozen=True)
class Halo:
    """pieces: (start, size) of what each member has; wanted: (start, stop) of what each wants of all rows;
    me: which of them this rank is."""
    pieces: Sequence[Range]
    wanted: Sequence[Range]
    me: int

    def passed(self, i: int, j: int) -> Range:
        """(start, size) of what member j wants of what member i has."""
        (start, size), (first, stop) = self.pieces[i], self.wanted[j]
        low = min(max(start, first), start + size)
        return low, max(0, min(start + size, stop) - low)

    def parts(self, row: int, back: bool = False) -> tuple[Part, ...]:
        """Of each member, in elements, a row having so many; `back`: of the transpose."""
        n = range(len(self.pieces))

        def part(m: int) -> Part:
            to, come = ([self.passed(m, i)[1] * row for i in n], [self.passed(i, m)[1] * row for i in n])
            to, come = (come, to) if back else (to, come)
            return Part(len(n), m, sum(to), sum(come), kept=to[m], passes=to)
        return tuple(map(part, n))

    def brought(self, group: object, x: Tensor, dim: int) -> Requests:
        """The rows that this rank wants, of which `x` is what it has."""
        n, first = range(len(self.pieces)), self.pieces[self.me][0]
        to, come = ([self.passed(self.me, i) for i in n], [self.passed(i, self.me) for i in n])
        return torch.cat((yield from _exchanged(group, x, dim, first, to, come)), dim)

    def added(self, group: object, x: Tensor, dim: int) -> Requests:
        """The transpose: this rank's rows, of what all have for them; `x` is for the rows that it wanted."""
        n, (first, size) = range(len(self.pieces)), self.pieces[self.me]
        to, come = ([self.passed(i, self.me) for i in n], [self.passed(self.me, i) for i in n])
        got = yield from _exchanged(group, x, dim, self.wanted[self.me][0], to, come)
        out = x.new_zeros([size if i == dim else rows for i, rows in enumerate(x.shape)])
        for (start, rows), piece in zip(come, got):
            out.narrow(dim, start - first if rows else 0, rows).add_(piece)
        return out


def _exchanged(group: object, x: Tensor, dim: int, first: int, to: Sequence[Range],
               come: Sequence[Range]) -> Requests:
    """What comes, by member; of `x`, whose rows begin at `first`, each member gets its own."""
    pieces = tuple(x.narrow(dim, start - first if rows else 0, rows) for start, rows in to)
    shapes = tuple(tuple(rows if i == dim else n for i, n in enumerate(x.shape)) for _, rows in come)
    return (yield group, "all_to_all", pieces, shapes)
