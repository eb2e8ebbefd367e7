"""What all ranks of a job settle together: through its store, in as many calls a rank however many there are.

>>> store = dist.HashStore()
>>> jobs = [Job(store, rank, 3) for rank in range(3)]
>>> [job.from_first(lambda: b"a table") for job in jobs]
[b'a table', b'a table', b'a table']

A process group over all ranks would do the same by a message to each of them.

Every rank counts the runtimes that it has opened, in the store, so that `number` is the same on all of them;
nothing is ever deleted there, and each exchange has keys of its own.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch.distributed as dist


class Job:
    """`world_size` ranks, seen from `rank`, which call the same methods in the same order."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.number = store.add(f"shardlib/runtimes of {rank}", 1)
        self._store, self._exchanges = store, 0

    def _next(self) -> str:
        self._exchanges += 1
        return f"shardlib/job {self.number}/{self._exchanges}"

    def from_first(self, say: Callable[[], bytes]) -> bytes:
        """What rank 0 says, on every rank."""
        key = self._next()
        if self.rank == 0:
            self._store.set(key, say())
        return self._store.get(key)

    def differ(self, text: str, word: Callable[[Sequence[str]], str]) -> str | None:
        """None where all ranks come with one text; else what `word` makes of all texts, by rank.

        Digests are counted, and no more is told where they are alike. Else the rank that came last reads all
        texts, and what it has found is the same on all ranks.
        """
        key, digest = self._next(), hashlib.sha256(text.encode()).hexdigest()
        first = self._store.add(f"{key}/{digest}", 1) == 1
        last = self._store.add(f"{key}/came", 1) == self.world_size
        if last:
            alike = self._store.add(f"{key}/{digest}", 0) == self.world_size
            self._store.set(f"{key}/verdict", "alike" if alike else "different")
        if self._store.get(f"{key}/verdict") == b"alike":
            return None
        self._store.set(f"{key}/of {self.rank}", digest)
        if first:
            self._store.set(f"{key}/text {digest}", text)
        if last:
            self._store.set(f"{key}/words", word(self._texts(key)))
        return self._store.get(f"{key}/words").decode()

    def _texts(self, key: str) -> list[str]:
        digests = self._store.multi_get([f"{key}/of {rank}" for rank in range(self.world_size)])
        texts = {digest: self._store.get(f"{key}/text {digest.decode()}").decode() for digest in {*digests}}
        return [texts[digest] for digest in digests]
