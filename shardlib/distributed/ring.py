"""A stream of bytes from one process to others of its host, through a ring in shared memory.

    ring = Ring(segment, place, members=(0, 1, 2), capacity=1 << 20)      # members[0] writes, the others read
    ring.write(b"...")                                                  # longer than the ring: piece by piece
    ring.read(3, timeout_s=60)

The writer's word counts the bytes that it has written since the beginning, each reader's those that it has
read; byte n lies at n % capacity. The writer waits for the slowest reader before it writes over anything.
Each word has one process that writes it, and a word is set after the bytes that it counts (see `segment` on
the order of stores), so nothing is ever locked.
"""
from __future__ import annotations

import os
from collections.abc import Sequence

from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.rank_error import RankError, wait_until
from shardlib.distributed.segment import Segment

_LINE = 16
_CLOSED = 1


def ring_bytes(readers: int, capacity: int) -> int:
    """Bytes of the segment of a ring."""
    return (readers + 1) * _LINE * 8 + capacity


class Ring:
    """The end of the ring that this member of `place` holds."""

    def __init__(self, segment: Segment, place: Place, members: Sequence[int], capacity: int) -> None:
        self.name, self.ranks, self.timeout_s, self.capacity = (place.name, place.ranks, place.timeout_s,
                                                                capacity)
        self.writer, *self.readers = members
        self._segment, self._count, self._process = segment, 0, os.getpid()
        self._words = segment.words(0, len(members) * _LINE)
        self._mine = members.index(place.me) * _LINE
        start = ring_bytes(len(self.readers), 0)
        self._data = memoryview(segment.memory)[start:start + capacity]

    # -- the writer ------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """RankError where a reader has died or left, or makes no room for timeout_s."""
        self._look_for_readers()
        left = memoryview(data)
        while left:
            want = min(len(left), self.capacity // 4)
            if not wait_until(lambda: self._room() >= want, self.timeout_s, self._look_for_readers):
                full = [r for i, r in enumerate(self.readers) if self.capacity - self._unread(i) < want]
                raise self._missing(full,
                                    f"have read nothing for {self.timeout_s:g} s, and the queue is full")
            n = min(len(left), self._room())
            for start, end in self._spans(n):
                self._data[start:end], left = left[:end - start], left[end - start:]
            self._advance(n)

    def _room(self) -> int:
        return self.capacity - max(self._unread(i) for i in range(len(self.readers)))

    def _unread(self, i: int) -> int:
        return self._count - self._words[(i + 1) * _LINE]

    def _look_for_readers(self) -> None:
        if gone := [r for r in self.readers if self._segment.gone(r)]:
            raise self._missing(gone, "have died or left")

    # -- a reader --------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to read; False where the writer has closed the ring and all was read."""
        if not wait_until(lambda: self._written() or self._words[_CLOSED], timeout_s, self._look_for_writer):
            raise self._missing([self.writer], f"have written nothing for {timeout_s:g} s")
        return self._written() > 0                      # looked at after "closed", which is written last

    def read(self, n: int, timeout_s: float) -> bytearray:
        """The next n bytes. RankError where the writer has died or left, or nothing comes for timeout_s."""
        got = bytearray(n)
        filled = 0
        while filled < n:
            if not self.wait(timeout_s):
                raise self._missing([self.writer], "have closed the queue within a message")
            part = min(n - filled, self._written())
            for start, end in self._spans(part):
                got[filled:filled + end - start] = self._data[start:end]
                filled += end - start
            self._advance(part)
        return got

    def _written(self) -> int:
        return self._words[0] - self._count

    def _look_for_writer(self) -> None:
        if self._segment.gone(self.writer) and not (self._written() or self._words[_CLOSED]):
            raise self._missing([self.writer], "have died")

    # -- both ------------------------------------------------------------------------------------------------

    def _spans(self, n: int) -> list[tuple[int, int]]:
        """Where the next n bytes lie: one piece, or two round the end."""
        start = self._count % self.capacity
        first = min(n, self.capacity - start)
        return [(start, start + first)] if first == n else [(start, self.capacity), (0, n - first)]

    def _advance(self, n: int) -> None:
        self._count += n
        self._words[self._mine] = self._count

    def _missing(self, members: Sequence[int], fault: str) -> RankError:
        return RankError.missing(f"message queue over {self.name}", [self.ranks[m] for m in members], fault)

    def close(self) -> None:
        """A writer ends the stream; a reader leaves. Waits for nobody."""
        if self._mine == 0 and self._process == os.getpid():        # a forked child ends nothing
            self._words[_CLOSED] = 1
        self._words = self._data = None
        self._segment.close()
