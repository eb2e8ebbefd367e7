"""What this process is in: one entry for each thread, written before each collective and taken out after it.

Nothing is locked.

>>> watch = Watch()
>>> tp = watch.seat("tp", (0, 1))
>>> watch.begin(tp, "all_reduce", "sum", torch.float32, 4, at="step 2 of block, model.py:12: D +tp -> D")
>>> print(Moment.of(watch.now))
collective 1 of group tp (ranks 0 1): all_reduce sum of 4 float32, at step 2 of block, model.py:12: D +tp -> D
>>> watch.end()
>>> watch.now is None, Moment.of(watch.last).number
(True, 1)

A `Moment` is the same for other processes: plain data. Collectives are counted per group, so that on the
members of a group one number is one collective. A send and a recv are not counted: only two members know of
them.

The replay of a CUDA graph is an entry of its own, and the device's: it begins before the launch, and ends
when the device has come past it.

>>> replays, done = watch.replays("next_token, 8 rows", (0, 1)), []
>>> watch.launch(replays, lambda: bool(done))
>>> print(Moment.of(watch.now))
replay 1 of next_token, 8 rows (ranks 0 1)
>>> done.append("the event has passed")
>>> watch.now is None
True
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic
from typing import Any, NamedTuple

import msgspec
import torch

from shardlib.distributed.rank_error import listed

REPLAY = "replay"


class Seat:
    """One group as this process sits in it.

    count: the collectives that it has begun.  streams: handles of those it has called on.
    """
    __slots__ = ("name", "ranks", "count", "communicators", "streams", "_text")
    kind = "group "

    def __init__(self, name: str, ranks: Sequence[int]) -> None:
        self.name, self.ranks, self.count = name, tuple(ranks), 0
        self.communicators: Sequence[Any] = ()
        self.streams: set[int] = set()
        self._text = f"{self.kind}{name} (ranks {listed(self.ranks)})"

    def __str__(self) -> str:
        return self._text


class Replays(Seat):
    """The replays of one captured step, which `name` says."""
    __slots__ = ()
    kind = ""


class Doing(NamedTuple):
    """A collective that runs, or has run.

    peer: the rank at the other end of a send or recv; since: of time.monotonic.
    """
    seat: Seat
    number: int
    name: str
    op: str | None
    dtype: torch.dtype | None
    numel: int
    at: object
    peer: int | None
    since: float


class Moment(msgspec.Struct, frozen=True):
    """A `Doing` in words. step: where the program has it, and the specs before and after."""
    group: str
    ranks: tuple[int, ...]
    number: int
    call: str
    step: str = ""
    peer: int | None = None

    @classmethod
    def of(cls, doing: tuple | None) -> Moment | None:
        if doing is None:
            return None
        d = Doing(*doing)
        many = f"{d.numel} " if d.numel >= 0 else ""
        of = f" of {many}{str(d.dtype).removeprefix('torch.')}" if d.dtype else ""
        call = d.name + (f" {d.op}" if d.op else "") + of
        return cls(str(d.seat), d.seat.ranks, d.number, call, "" if d.at is None else encodable(str(d.at)),
                   d.peer)

    def __str__(self) -> str:
        what = f"replay {self.number} of {self.group}" if self.call == REPLAY else \
            f"collective {self.number} of {self.group}: {self.call}" if self.peer is None else \
            f"{self.call} {'to' if self.call.startswith('send') else 'from'} rank {self.peer} in {self.group}"
        return what + (f", at {self.step}" if self.step else "")


def encodable(text: str) -> str:
    """`text` as UTF-8 can have it: file names may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


class Watch:
    """The collectives that this process is in, by thread (`calls`), the replays that its device is in
    (`launched`), the one before them (`last`) and the last that failed; `note`: how it left."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple] = {}
        # replays, oldest first, and whether the device has come past each
        self.launched: list[tuple[tuple, Callable[[], bool]]] = []
        self.last: tuple | None = None
        self.failed: tuple | None = None
        self.note = ""
        self.seats: list[Seat] = []

    def seat(self, name: str, ranks: Sequence[int]) -> Seat:
        """The place of this process in a group, to begin collectives with."""
        self.seats.append(made := Seat(name, ranks))
        return made

    def replays(self, title: str, ranks: Sequence[int]) -> Replays:
        """The place of this process in the replays of a captured step."""
        self.seats.append(made := Replays(title, ranks))
        return made

    def launch(self, seat: Replays, passed: Callable[[], bool]) -> None:
        """The device is about to be given a replay, which is over once `passed()`."""
        seat.count += 1
        while self.launched and self.launched[0][1]():
            (self.last, _), self.launched = self.launched[0], self.launched[1:]
        self.launched = [*self.launched,
                         ((seat, seat.count, REPLAY, None, None, -1, None, None, monotonic()), passed)]

    def begin(self, seat: Seat, name: str, op: str | None = None, dtype: torch.dtype | None = None,
              numel: int = -1, at: object = None, peer: int | None = None) -> None:
        """This process calls a collective of `seat`; the fields of `Doing`."""
        if peer is None:
            seat.count += 1
        self.calls[get_ident()] = (seat, seat.count, name, op, dtype, numel, at, peer, monotonic())

    def end(self) -> None:
        """It is over."""
        self.last = self.calls.pop(get_ident())

    @property
    def mine(self) -> tuple | None:
        """The collective that this thread is in."""
        return self.calls.get(get_ident())

    @property
    def now(self) -> tuple | None:
        """The collective that this process is in, or the replay; the longest, where it is in several."""
        running = [doing for doing, over in self.launched if not over()]
        return min((*tuple(self.calls.values()), *running), key=lambda call: call[-1], default=None)
