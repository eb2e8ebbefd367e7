"""What ranks say of themselves, and what one of them makes of it when it reports."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from shardlib.distributed.watch import Moment

LINES = 8
"""Ranks that a report names, at most."""


class State(msgspec.Struct, frozen=True):
    """What a rank says of itself. beat: grows as long as it lives; counts:
    collectives it has begun, by group.

    now: the collective that it is in, or that failed it.  left: it says no more; note: why, unless `now` did
    it.
    """
    beat: int = 0
    counts: dict[str, int] = {}
    now: Moment | None = None
    last: Moment | None = None
    left: bool = False
    note: str = ""

    def __str__(self) -> str:
        if self.now and not self.note:
            return f"is in {self.now}"
        last = (f"; its last was {self.last}" if self.last else ", and has called none" if not self.note
                else "")
        return (self.note or "is in no collective") + last


@dataclass(frozen=True)
class Scene:
    """What one rank knows when it reports: its own collective, every rank's state,
    and who says nothing any more."""
    rank: int
    mine: Moment | None
    states: Mapping[int, State]
    silent: Mapping[int, str]

    def absent(self) -> list[int]:
        """The ranks of this rank's collective that are not in it, and all that are silent or have left."""
        waited = () if self.mine is None else self.mine.ranks if self.mine.peer is None else (self.mine.peer,)
        gone = [r for r, s in self.states.items() if r in self.silent or s.note]
        return sorted({r for r in waited if r != self.rank and not self._is_there(self.states[r])} | {*gone}
                      - {self.rank})

    def _is_there(self, state: State) -> bool:
        mine = self.mine
        if mine.peer is not None:
            return state.now is not None and state.now.peer == self.rank
        same = (state.now is None or (state.now.group, state.now.number) != (mine.group, mine.number)
                or state.now.call == mine.call)
        return state.counts.get(mine.group, 0) >= mine.number and same

    def lines(self) -> list[str]:
        """One line a rank: those that this rank waits for, or if it waits for none, those that wait."""
        ranks = self.absent()
        if self.mine is None:
            ranks = sorted(
                {*ranks, *(r for r, s in self.states.items() if s.now is not None and r != self.rank)})
        said = ([f"  rank {r} {self._say(r)}" for r in ranks[:LINES]]
                + ([f"  and {len(ranks) - LINES} more ranks"] if len(ranks) > LINES else []))
        return said or ["  all its ranks are there" if self.mine else "  no rank is in a collective"]

    def _say(self, rank: int) -> str:
        if rank not in self.silent:
            return str(self.states[rank])
        return (f"is silent: {self.silent[rank]}; when last heard of it "
                f"{str(self.states[rank]).replace('is in', 'was in', 1)}")
