"""A queue of messages from one member of a group to all others: what rank 0 decides, the others get.

    with MessageQueue(place, writer=0) as queue:                # all members make it together
        queue.put(Step(3, tokens))                              # member 0
        step = queue.get(Step)                              # every other: msgspec checks that it is a Step

Messages are plain data (see `messages`): numbers, strings, bytes, lists, dicts, dataclasses, and structs of
msgspec; never code. To readers on the writer's host they go through a `Ring` of `capacity` bytes; a message
may be larger. A `put` waits only when the ring is full, for the slowest reader. To readers on other hosts, or
where /dev/shm is too small (`declined` says so), they go over the CPU group, and a `put` waits until each of
these readers takes the message.

After `close` of the writer, `get` gives what is left, then raises EOFError. A `with` that ends with an error
tells readers on other hosts nothing, and so waits for nobody. Refused with a `SpecError`: a put by a reader,
a get by the writer, what msgspec cannot write (raised by `get` as well, so that no reader waits for it), a
message that is no `as_type`. A member that has died or left, or does not answer for timeout_s, is a
`RankError` that names it; the queue is of no use then.
"""
from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from shardlib.distributed import messages
from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.ring import Ring, ring_bytes
from shardlib.distributed.segment import Segment, join
from shardlib.errors import SpecError


class MessageQueue:
    """The queue from member `writer` to the others of `place`.

    All members make it, in turn with their other collectives.
    """

    def __init__(self, place: Place, writer: int = 0, capacity: int = 1 << 20) -> None:
        if not 0 <= writer < place.size or capacity < 64:
            raise SpecError(f"message queue over {place.name}: writer {writer} of {place.size} members, "
                            f"capacity {capacity}; the writer is a member, and the capacity at least 64 "
                            f"bytes")
        near = (writer,
                *(m for m in range(place.size) if m != writer and place.hosts[m] == place.hosts[writer]))
        made = join(place, near, ring_bytes(len(near) - 1, capacity)) if len(near) > 1 else None
        self.declined = made if isinstance(made, str) else None
        self.place, self.writer, self._lost, self._ended, self._closed = place, writer, "", False, False
        self._ring = Ring(made, place, near, capacity) if isinstance(made, Segment) else None
        served = (writer,) if self.declined else near
        self._far = tuple(m for m in range(place.size) if m not in served)

    def put(self, message: Any) -> None:
        """Sends a message to every reader."""
        self._put(messages.frame(message))

    def get(self, as_type: Any = Any, timeout_s: float | None = None) -> Any:
        """The next message, as `as_type`; it waits timeout_s, by default the group's,
        which is also the limit between hosts.

        EOFError where the writer has closed the queue. A message that did not come in time may be asked for
        again.
        """
        return messages.read(self._get(timeout_s), as_type)

    def broadcast(self, message: Any, as_type: Any = Any) -> Any:
        """The writer's message, on every member: its `put`, and the others' `get`, in one call."""
        if self.place.me != self.writer:
            return self.get(as_type)
        frame = messages.frame(message)
        self._put(frame)
        return messages.read(frame, as_type)

    # -- the writer ------------------------------------------------------------------------------------------

    def _put(self, frame: bytes) -> None:
        self._check("write", self.place.me == self.writer)
        try:
            if self._ring:
                self._ring.write(frame)
            for member in self._far:
                self._send(frame, member)
        except BaseException as error:
            self._lose(error)
            raise
        if not messages.is_good(frame):
            messages.read(frame)

    def _send(self, frame: bytes, member: int) -> None:
        try:
            for part in filter(len, messages.cut(frame)):
                self.place.control.send(torch.frombuffer(part, dtype=torch.uint8), member)
        except RuntimeError as error:
            raise self._unanswered(member) from error

    # -- a reader --------------------------------------------------------------------------------------------

    def _get(self, timeout_s: float | None) -> bytes | bytearray:
        self._check("read", self.place.me != self.writer)
        timeout_s = self.place.timeout_s if timeout_s is None else timeout_s
        if self._ended or self._ring and not self._ring.wait(timeout_s):
            raise self._end()
        try:
            frame = self._read(timeout_s) if self._ring else self._receive()
        except BaseException as error:
            self._lose(error)
            raise
        if messages.is_end(frame):
            raise self._end()
        return frame

    def _read(self, timeout_s: float) -> bytearray:
        head = self._ring.read(messages.HEAD, timeout_s)
        return head + self._ring.read(messages.payload_size(head), timeout_s)

    def _receive(self) -> bytes:
        try:
            block = self._bytes(messages.BLOCK)
            return block + (self._bytes(size) if (size := messages.rest_size(block)) else b"")
        except RuntimeError as error:
            raise self._unanswered(self.writer) from error

    def _bytes(self, n: int) -> bytes:
        return self.place.control.recv(n, torch.uint8, torch.device("cpu"), self.writer).numpy().tobytes()

    def _end(self) -> EOFError:
        self._ended = True
        return EOFError(
            f"message queue over {self.place.name}: rank {self.place.ranks[self.writer]} has closed it")

    # -- both ------------------------------------------------------------------------------------------------

    def _check(self, act: str, may: bool) -> None:
        name, ranks = f"message queue over {self.place.name}", self.place.ranks
        if not may:
            raise SpecError(f"{name}: rank {self.place.rank} cannot {act}; rank {ranks[self.writer]} writes, "
                            "the others read")
        if self._closed:
            raise SpecError(f"{name}: it was closed")
        if self._lost:
            raise RankError(f"{name}: not possible any more; {self._lost}")

    def _lose(self, error: BaseException) -> None:
        self._lost = (str(error) if isinstance(error, RankError)
                      else f"a message ended with {type(error).__name__}")

    def _unanswered(self, member: int) -> RankError:
        return RankError.missing(f"message queue over {self.place.name}", [self.place.ranks[member]],
                                 f"have died, left, or not answered within {self.place.timeout_s:g} s")

    def close(self) -> None:
        """Ends the queue.

        On one host it waits for nobody; between hosts the reader discards what it did not get, up to the end.
        """
        ring, live = self._ring, not self._lost and not self._ended and not self._closed
        writes = self.place.me == self.writer
        self.leave()
        with suppress(RankError):
            for member in self._far if live and writes else ():
                self._send(messages.END, member)
            while live and not writes and not ring and not messages.is_end(self._receive()):
                pass

    @property
    def closed(self) -> bool:
        return self._closed

    def leave(self) -> None:
        """Gives back the memory and tells nobody on other hosts. Waits for nobody."""
        self._closed = True
        if self._ring:
            self._ring.close()
            self._ring = None

    def __enter__(self) -> MessageQueue:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.leave() if kind else self.close()
