"""The pieces of a causal ring, dealt so that all ranks have as much to do.

Of 2 k pieces of the rows, rank r gets the r-th and the (2 k - 1 - r)-th, in place of two that follow each
other. Then it sees of its own keys what a causal mask of these rows shows, of an earlier rank's keys the
first half, and with its own second half all of a later rank's: each hop is a call without a mask, of half the
pairs. Rows go there, and results home, by one all_to_all each.

>>> Halves(((0, 5), (5, 4)), 0).mine                                    # (start, size) of each half
((0, 3), (7, 2))
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardlib.language.exchanges import Requests
from shardlib.wires import Part

Range = tuple[int, int]


def _common(a: Range, b: Range) -> Range:
    start = max(a[0], b[0])
    return start, max(0, min(sum(a), sum(b)) - start)


@dataclass(frozen=True)
class Halves:
    """pieces: (start, size) of what each member has of the rows; me: which of them this rank is."""
    pieces: Sequence[Range]
    me: int

    @property
    def mine(self) -> tuple[Range, Range]:
        return self.of(self.me)

    def of(self, i: int) -> tuple[Range, Range]:
        """The halves of member i."""
        each, more = divmod(sum(n for _, n in self.pieces), 2 * len(self.pieces))

        def half(c: int) -> Range:
            return each * c + min(c, more), each + (c < more)
        return half(i), half(2 * len(self.pieces) - 1 - i)

    def passed(self, i: int, j: int) -> list[Range]:
        """What member i has of the halves of member j."""
        return [_common(self.pieces[i], half) for half in self.of(j)]

    @cached_property
    def _members(self) -> range:
        return range(len(self.pieces))

    def dealt(self, group: object, x: Tensor) -> Requests:
        """This rank's halves, one behind the other, of rows (b, t, ..) as they are."""
        first, _ = self.pieces[self.me]
        cut = [[x.narrow(1, max(0, start - first), n) if n else x[:, :0]
                for start, n in self.passed(self.me, j)] for j in self._members]
        come = [self.passed(i, self.me) for i in self._members]
        got = yield from _exchanged(group, [torch.cat(halves, 1) for halves in cut], come)
        return torch.cat([piece[h] for h in (0, 1) for piece in got], 1)

    def home(self, group: object, x: Tensor) -> Requests:
        """The rows as they are, of this rank's halves."""
        starts, size = [start for start, _ in self.mine], self.mine[0][1]
        cut = []
        for j in self._members:
            (a, n), (b, m) = self.passed(j, self.me)
            cut.append(torch.cat([x[:, a - starts[0]:a - starts[0] + n] if n else x[:, :0],
                                  x[:, size + b - starts[1]:size + b - starts[1] + m] if m else x[:, :0]], 1))
        come = [self.passed(self.me, i) for i in self._members]
        got = yield from _exchanged(group, cut, come)
        ranges = sorted((at, i, h) for i in self._members for h, at in enumerate(come[i]) if at[1])
        return torch.cat([got[i][h] for _, i, h in ranges], 1) if ranges else x[:, :0]

    def parts(self, row: int, home: bool = False) -> tuple[Part, ...]:
        """Of each member, in elements, a row having so many."""
        def part(m: int) -> Part:
            sent = [sum(n for _, n in (self.passed(i, m) if home else self.passed(m, i))) * row
                    for i in self._members]
            got = sum(n for i in self._members
                      for _, n in (self.passed(m, i) if home else self.passed(i, m))) * row
            return Part(len(self.pieces), m, sum(sent), got, kept=sent[m], passes=sent)
        return tuple(map(part, self._members))


def _exchanged(group: object, cut: list[Tensor], come: list[list[Range]]) -> Requests:
    """By member, by half, what comes."""
    shapes = tuple((len(cut[0]), sum(n for _, n in halves), *cut[0].shape[2:]) for halves in come)
    got = yield group, "all_to_all", tuple(cut), shapes
    return [piece.split([n for _, n in halves], 1) for piece, halves in zip(got, come)]
