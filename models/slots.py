"""Which row of a batch lies where, as rows end: plain numbers, the same on every rank.

A bucket has places for 1, 2, 4, 8, ... rows on each rank, so that few sizes are ever captured. Each of the
`ranks` over which the cache is split by rows has an equal run of slots, and a row never leaves its rank.

>>> slots = Slots.of(5, ranks=2)
>>> slots.rows
(0, 1, 2, None, 3, 4, None, None)
>>> smaller = slots.without({0, 2, 4})
>>> smaller.slots.rows, smaller.source, smaller.moves
((1, 3), (1, 4), (((0, 1),), ()))
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


def round_up(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Slots:
    """rows: the number of the row in each slot, None in one that has none."""
    rows: tuple[int | None, ...]
    ranks: int = 1

    @classmethod
    def of(cls, rows: int, ranks: int = 1) -> Slots:
        """The bucket of a batch of so many rows, each rank with as many as the others or one less."""
        each, more = divmod(rows, ranks)
        size, made, row = round_up(each + (more > 0)), [], 0
        for rank in range(ranks):
            count = each + (rank < more)
            made += [*range(row, row + count), *[None] * (size - count)]
            row += count
        return cls(tuple(made), ranks)

    @property
    def size(self) -> int:
        return len(self.rows)

    def without(self, ended: Collection[int]) -> Smaller | None:
        """The smallest bucket that holds the rows that have not ended; None where it is this one."""
        each = self.size // self.ranks
        blocks = [[i for i in range(each) if self.rows[rank * each + i] not in (None, *ended)]
                  for rank in range(self.ranks)]
        size = round_up(max(map(len, blocks)))
        if size >= each:
            return None
        source, moves = [], []
        for rank, live in enumerate(blocks):
            free = [i for i in range(size) if i not in live]
            moved = tuple(zip(free, [i for i in live if i >= size]))
            held = {i: i for i in range(size)} | dict(moved)
            source += [rank * each + held[i] for i in range(size)]
            moves.append(moved)
        rows = tuple(None if (row := self.rows[s]) is None or row in ended else row for s in source)
        return Smaller(Slots(rows, self.ranks), tuple(source), tuple(moves))


class Smaller(NamedTuple):
    """A smaller bucket.

    source: for each slot, which it was.  moves: for each rank, (to, from) of rows, counted there.
    """
    slots: Slots
    source: tuple[int, ...]
    moves: tuple[Sequence[tuple[int, int]], ...]
