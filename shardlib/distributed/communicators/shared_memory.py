"""The communicator between processes of one host, for CPU tensors: everybody writes, then everybody reads.

A segment of shared memory holds two slots for each member, and for each member a word, its round. In round n
a member

    waits until all others have begun round n - 1       so they have done with n - 2, and slot n % 2 is free
    writes its piece into its slot n % 2
    sets its word to n                                  and only then can others see n: see `segment`
    waits until all others have set theirs to n
    reads their pieces, straight from the segment, into its result

so a round costs one meeting, and the next one needs no other to be over. Reductions read the pieces in rank
order, with `reduction.reduce_pieces` itself. What is larger than a slot goes in several rounds; a large
all_reduce is a reduce_scatter and an all_gather, so that each member adds up only its share.

    connect(mesh, device="cpu").group(("tp",)).all_reduce(x)    # where all of tp run on one host

Not made where members run on several hosts, where /dev/shm is too small, and where `segment` says that there
is no sharing.
Refused by `supports`: other collectives, other devices, more than MOST bytes. A peer that died, has left or
does not come is a `RankError` which names it. After one, or another error once others can see that this
member has begun, it refuses further calls: its rounds are no longer the others'.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call, Place
from shardlib.distributed.rank_error import RankError, wait_until
from shardlib.distributed.reduction import reduce_pieces
from shardlib.distributed.segment import Segment, join
from shardlib.errors import bytes_text

SLOT = 512 << 10
"""Bytes that a member writes in a round. Smaller slots fit a cache, larger ones need fewer meetings; where
ranks outnumber the cores, meetings are what costs: an all_reduce of 1 MB between 4 processes on 2 cores
took 5.1 ms with 256 kB, 2.0 ms with 1 MB."""
ONE_SHOT = 64 << 10
"""Bytes up to which every member of an all_reduce adds up everything."""
MOST = 64 << 20
"""Bytes of the largest call it takes."""
TAKES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
_LINE = 16
"""Words from one member's round to the next: two cache lines, as processors fetch them in pairs."""
_REMEMBERED = 256


def shared_memory(place: Place) -> SharedMemory | str:
    """The communicator of the group at `place`, or why it has none;
    the same on all members, who all call it."""
    hosts = len(set(place.hosts))
    if hosts > 1:
        return f"members run on {hosts} hosts"
    if place.device.type != "cpu":
        return f"the group's tensors are on {place.device.type}"
    segment = join(place, range(place.size), _head(place.size) + 2 * place.size * SLOT)
    return SharedMemory(place, segment) if isinstance(segment, Segment) else segment


def _head(size: int) -> int:
    """Bytes before the slots: the words, up to a whole page."""
    return -(-size * _LINE * 8 // 4096) * 4096


class SharedMemory:
    """Collectives over `segment` of the members of `place`. Made by `shared_memory`."""

    name = "shared memory"
    deterministic = True
    strided = False

    def __init__(self, place: Place, segment: Segment) -> None:
        self.group, self.ranks, self.timeout_s = place.name, place.ranks, place.timeout_s
        self.me, self.size = place.me, place.size
        self._segment, self._round, self._lost = segment, 0, ""
        self._words = segment.words(0, self.size * _LINE)
        self._others = tuple(m for m in range(self.size) if m != self.me)
        memory = torch.frombuffer(segment.memory, dtype=torch.uint8)
        self._slots = memory[_head(self.size):].view(2, self.size, SLOT)
        self._rows: dict[tuple[int, torch.dtype, tuple[int, ...]], list[Tensor]] = {}

    def supports(self, call: Call) -> str | None:
        if call.name not in TAKES:
            return f"shared memory takes {', '.join(TAKES[:-1])} and {TAKES[-1]}, not {call.name}"
        if call.device != "cpu":
            return f"shared memory takes tensors on cpu, not on {call.device}"
        return (None if call.nbytes <= MOST
                else f"shared memory takes at most {bytes_text(MOST)}, not {bytes_text(call.nbytes)}")

    # -- collectives -----------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return self._whole("all_reduce", self._all_reduce, x, op)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        sizes = tuple(c * x.dtype.itemsize for c in counts)
        return self._whole("all_gather", self._all_gather, x.view(torch.uint8), sizes).view(x.dtype)

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        return self._whole("reduce_scatter", self._reduce_scatter, x, counts, op)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        given = x.view(-1).view(torch.uint8)
        return self._whole("broadcast", self._broadcast, given, root).view(x.dtype).view(x.shape)

    def _whole(self, what: str, body: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What `body` returns.

        Where it fails before it has set this member's word, others have seen nothing, and the round is still
        to come.
        """
        if self._lost:
            raise RankError(f"{what} over {self.group}: not possible any more; {self._lost}")
        before = self._round
        try:
            return body(what, *arguments)
        except BaseException as error:
            if (self._words is not None and self._words[self.me * _LINE] == before
                and not isinstance(error, RankError)):
                self._round = before
                raise
            self._lost = (str(error) if isinstance(error, RankError)
                          else f"{what} over {self.group} ended with {type(error).__name__}")
            raise

    def _all_reduce(self, what: str, x: Tensor, op: str) -> Tensor:
        flat, n = x.view(-1), x.numel()
        if x.nbytes <= ONE_SHOT:
            return reduce_pieces(self._exchange(what, (flat,), (n,) * self.size), op).view(x.shape)
        counts = tuple(n // self.size + (i < n % self.size) for i in range(self.size))
        mine, sizes = (self._reduce_scatter(what, flat, counts, op),
                       tuple(c * x.dtype.itemsize for c in counts))
        return self._all_gather(what, mine.view(torch.uint8), sizes).view(x.dtype).view(x.shape)

    def _all_gather(self, what: str, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if max(sizes) <= SLOT:
            return torch.cat(self._exchange(what, (x,), sizes))
        out = x.new_empty(sum(sizes))
        pieces = out.split_with_sizes(sizes)
        for start in range(0, max(sizes), SLOT):
            parts = [piece[start:start + SLOT] for piece in pieces]
            rows = self._exchange(what, (x[start:start + SLOT],), tuple(map(len, parts)))
            for part, row in zip(parts, rows):
                part.copy_(row)
        return out

    def _reduce_scatter(self, what: str, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        if x.nbytes <= SLOT:
            begin = sum(counts[:self.me])
            rows = self._exchange(what, (x,), (x.numel(),) * self.size)
            return reduce_pieces([row[begin:begin + counts[self.me]] for row in rows], op)
        width = SLOT // self.size // x.dtype.itemsize
        pieces, out = x.split_with_sizes(counts), x.new_empty(counts[self.me])
        for start in range(0, max(counts), width):
            parts = [piece[start:start + width] for piece in pieces]
            begin, mine = sum(map(len, parts[:self.me])), out[start:start + width]
            rows = self._exchange(what, parts, (sum(map(len, parts)),) * self.size)
            mine.copy_(reduce_pieces([row[begin:begin + len(mine)] for row in rows], op))
        return out

    def _broadcast(self, what: str, x: Tensor, root: int) -> Tensor:
        """Nobody waits for any but the root, and the root only for who is two rounds behind."""
        out = torch.empty_like(x)
        for start in range(0, len(x), SLOT):
            part = out[start:start + SLOT]
            row = self._begin(torch.uint8, (len(part),) * self.size)[root]
            if self.me == root:
                self._meet(what, self._round - 1, self._others)
                row.copy_(x[start:start + SLOT])
            self._words[self.me * _LINE] = self._round
            if self.me != root:
                self._meet(what, self._round, (root,))
            part.copy_(row)
        return out

    # -- rounds ----------------------------------------------------------------------------------------------

    def _exchange(self, what: str, parts: Sequence[Tensor], counts: tuple[int, ...]) -> list[Tensor]:
        """A round: counts[i] elements of every member i, as they lie in the segment;
        this member's are `parts`, joined."""
        rows = self._begin(parts[0].dtype, counts)
        self._meet(what, self._round - 1, self._others)
        if len(parts) == 1:
            rows[self.me].copy_(parts[0])
        else:
            torch.cat(parts, out=rows[self.me])
        self._words[self.me * _LINE] = self._round
        self._meet(what, self._round, self._others)
        return rows

    def _begin(self, dtype: torch.dtype, counts: tuple[int, ...]) -> list[Tensor]:
        """The next round's slots, of counts[i] elements for member i."""
        self._round += 1
        key = (self._round % 2, dtype, counts)
        if key not in self._rows:
            if len(self._rows) >= _REMEMBERED:
                self._rows.clear()
            # whatever the mode of this call, others will want the rows, too
            with torch.inference_mode(False):
                slots = self._slots[self._round % 2]
                self._rows[key] = [slot[:n * dtype.itemsize].view(dtype) for slot, n in zip(slots, counts)]
        return self._rows[key]

    def _meet(self, what: str, round: int, members: Sequence[int]) -> None:
        """Waits until `members` have set their words to `round`."""
        for member in members:
            if self._words[member * _LINE] < round:
                self._wait(what, round, members)

    def _wait(self, what: str, round: int, members: Sequence[int]) -> None:
        def late() -> list[int]:
            return [m for m in members if self._words[m * _LINE] < round]

        def look() -> None:
            gone = [m for m in members if self._segment.gone(m)]
            self._lose(what, [m for m in late() if m in gone], "have died or left")
        if not wait_until(lambda: not late(), self.timeout_s, look):
            self._lose(what, late(), f"have not come within {self.timeout_s:g} s")

    def _lose(self, what: str, members: Sequence[int], fault: str) -> None:
        if members:
            raise RankError.missing(f"{what} over {self.group}", [self.ranks[m] for m in members], fault)

    def close(self) -> None:
        self._lost = self._lost or "the group was destroyed"
        self._rows.clear()
        self._words = self._slots = None
        self._segment.close()
