"""Who computes what of attention whose queries and keys are split over the same ranks.

What a rank's queries see of its own keys it computes itself. Of two ranks there are two blocks more, the
queries of either beside the keys of the other. In round d rank r meets the rank d before it, p:

| what is seen | round | at r |
|---|---|---|
| both blocks | every | keys come from p, for the queries of r |
| one, as by a causal mask | d < n/2 | if its queries see, the same; else queries come from p, to its keys |
| one | d = n/2 | if its queries see, the same for their later half; else the other half of p's come |

So of what is causal all have as much to do, in half as many rounds, and nothing is dealt anew (Li et al.
2023, DistFlashAttn). Rows that see something travel, and keys that are seen: of a window, a few.

>>> for at in Ring(((0, 4), (4, 4), (8, 4)), ((0, 4), (4, 4), (8, 4))).rounds[0]:
...     print(f"rank {at.at}: queries of {at.queries}, keys of {at.keys}")
rank 0: queries of 2, keys of 0
rank 1: queries of 1, keys of 0
rank 2: queries of 2, keys of 1
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from shardlib.ops.seen import Seen

Range = tuple[int, int]


class Work(NamedTuple):
    """Member `at` computes what rows of one member's queries see of another one's keys: (start, how many) of
    either's piece. One of the two is its own."""
    at: int
    queries: int
    keys: int
    rows: Range
    seen: Range

    @property
    def takes_keys(self) -> bool:
        """Whether keys come to the queries, or queries to the keys."""
        return self.at == self.queries

    @property
    def other(self) -> int:
        return self.keys if self.takes_keys else self.queries


class Message(NamedTuple):
    """What goes to where work is done; or what came of it, home."""
    work: Work
    home: bool

    @property
    def ends(self) -> tuple[int, int]:
        """Who sends it, and to whom."""
        return (self.work.at, self.work.other) if self.home else (self.work.other, self.work.at)


@dataclass(frozen=True)
class Ring:
    """queries, keys: (start, size) of what each member has.  placed: queries stand where a start says, which
    nobody knows here.  ahead: so many places further on."""
    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    causal: bool = True
    window: int | None = None
    placed: bool = False
    ahead: int = 0

    @cached_property
    def rounds(self) -> tuple[tuple[Work, ...], ...]:
        """Those in which there is something to do; of each, what, at most one thing for a member."""
        n = len(self.keys)
        every = [[w for r in range(n) if (w := self._at(r, d))] for d in range(1, n)]
        return tuple(tuple(of) for of in every if of)

    def _at(self, r: int, d: int) -> Work | None:
        n = len(self.keys)
        p = (r - d) % n
        mine, others = self._block(r, p, (0, self.queries[r][1])), self._block(p, r, (0, self.queries[p][1]))
        if mine and others:
            return Work(r, r, p, *mine)
        one = mine or others
        if one is None or 2 * d > n:
            return None
        i, j = (r, p) if mine else (p, r)
        if 2 * d == n:
            (start, size), half = one[0], one[0][1] // 2
            one = self._block(i, j, (start + half, size - half) if mine else (start, half))
        return one and Work(r, i, j, *one)

    def _block(self, i: int, j: int, rows: Range) -> tuple[Range, Range] | None:
        """Of these rows of member i's queries those that see keys of member j's, and the keys that they see,
        as far as sizes say."""
        (offset, _), (first, s), (start, n) = self.queries[i], self.keys[j], rows
        if not n or not s:
            return None
        if self.placed or not self.causal and self.window is None:
            return rows, (0, s)
        ahead, end, low = self.ahead + offset - first, start + n, 0
        further = 0 if self.causal else (self.window or 1) - 1      # how far a query sees behind itself
        start = max(start, -ahead - further)
        if self.window is not None:
            end = min(end, s - ahead + self.window - 1)
            low = max(0, ahead + start - self.window + 1)
        if start >= end:
            return None
        return (start, end - start), (low, min(s, ahead + end + further) - low)

    def shown(self, work: Work, seen: Seen) -> Seen:
        """What its rows see of its keys, of what a rank's own queries see."""
        return replace(seen, offset=self.ahead + self.queries[work.queries][0] + work.rows[0], t=work.rows[1],
                       first=self.keys[work.keys][0] + work.seen[0], s=work.seen[1])

    def exchanges(self, back: bool) -> list[list[Message]]:
        """What travels at once, in order: what round i needs, with what came of round i - 2. In forward,
        what comes of keys that have travelled is where it belongs; in the derivative it goes home."""
        n, rounds = len(self.rounds), self.rounds
        return [[*(Message(w, True) for w in (rounds[i - 2] if 2 <= i else ()) if back or not w.takes_keys),
                 *(Message(w, False) for w in (rounds[i] if i < n else ()))] for i in range(n + 2)]


ring = lru_cache(maxsize=256)(Ring)
"""A Ring, whose rounds are found once."""
