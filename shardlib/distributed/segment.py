"""Memory that processes of one host share: a file in /dev/shm which has lost its name.

>>> path = SHARED / f"{PREFIX}{secrets.token_hex(16)}"
>>> one, other = Segment.create(path, 4096, member=0), Segment.attach(path, 4096, member=1)
>>> path.unlink()
>>> one.words(0, 2)[1] = 7
>>> other.words(0, 2)[1]
7

    segment = join(place, members=(0, 1, 2, 3), nbytes=1 << 20)     # on all members; or why there is none

One member creates the file (exclusively, mode 0600, under a name that nobody guesses) and allocates all of
it, so that a full /dev/shm is an error here and not a signal at some later store; the others attach it by its
name; then all of them take the name away. From then on the memory lives as long as a process that maps it,
and whatever dies leaves nothing behind. Until then every member that gets away takes the name away, whichever
of them failed.

Each member locks its own byte of the file. The system drops the lock when the process ends, however it ends,
so `gone` knows who has died or left at the cost of a system call, and between containers that do not see each
other's process numbers.

Stores are ordered by the processor: on x86-64 no store overtakes an earlier store, no load an earlier load,
no store an earlier load. An aligned 64-bit word written through `words` is one store. So what was written
before a word is there for whoever has read that word. Other processors promise less and need barriers that
Python does not have: refused, with a reason, as is a system without /dev/shm or without such locks.
"""
from __future__ import annotations

import fcntl
import mmap
import os
import platform
import secrets
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.topology import SHARED
from shardlib.errors import bytes_text

PREFIX = "shardlib-"
_FLOCK = struct.Struct("@hhqqi0q")
"""C's struct flock on 64-bit Linux: type, whence, start, length, pid."""


class Segment:
    """`nbytes` bytes of shared memory, mapped here.

    Made by `join`; given back by `close`, or when nothing refers to it.
    """

    def __init__(self, file: int, nbytes: int, member: int) -> None:
        self.member, self._file = member, file
        try:
            self.memory: Any = mmap.mmap(file, nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, member)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, nbytes: int, member: int) -> Segment:
        """A new file at `path`. OSError where it exists, or where there is no room for all of it."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, nbytes)
        except BaseException:
            os.close(file)
            raise
        return cls(file, nbytes, member)

    @classmethod
    def attach(cls, path: Path, nbytes: int, member: int) -> Segment:
        """The file that another member has created."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), nbytes, member)

    def words(self, start: int, count: int) -> memoryview:
        """`count` words of 64 bits from byte `start`, which 8 divides:
        words[i] = n is one store, words[i] one load."""
        return memoryview(self.memory)[start:start + 8 * count].cast("Q")

    def gone(self, member: int) -> bool:
        """Whether `member` has died, or has closed the segment."""
        asked = fcntl.fcntl(self._file, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, member, 1, 0))
        return member != self.member and _FLOCK.unpack(asked)[0] == fcntl.F_UNLCK

    def close(self) -> None:
        """Leaves: `gone` of this member is true from now on.

        Tensors over the memory stay good as long as they are referred to.
        """
        if self._file >= 0:
            os.close(self._file)
        self._file, self.memory = -1, None

    __del__ = close


def unsupported() -> str | None:
    """Why this process cannot share memory, if so."""
    if not sys.platform.startswith("linux") or not SHARED.is_dir():
        return "there is no /dev/shm"
    machine = platform.machine()
    return (None if machine in ("x86_64", "AMD64")
            else f"stores are not ordered on {machine}; they are on x86_64")


def free() -> int:
    """Bytes that /dev/shm can still hold."""
    room = os.statvfs(SHARED)
    return room.f_bavail * room.f_frsize


def join(place: Place, members: Sequence[int], nbytes: int) -> Segment | str | None:
    """The segment of `members`, the first of which creates it; None on other members;
    on all of them the reason why there is none.

    All members of the place call it. Whatever fails on one of them, all get the same reason, and nothing is
    left.
    """
    first, inside = place.me == members[0], place.me in members
    name = place.share(f"{PREFIX}{secrets.token_hex(16)}" if first else "")[members[0]]
    path, made = SHARED / name, []

    def step(act: Callable[[], object], here: bool) -> str | None:
        """What `act` says is wrong, or raises, on any member."""
        return place.agree(_try(act, nbytes) if here else None)
    try:
        wrong = (step(unsupported, inside)
                 or step(lambda: made.append(Segment.create(path, nbytes, place.me)), first)
                 or step(lambda: made.append(Segment.attach(path, nbytes, place.me)), inside and not first)
                 or step(lambda: _alone(made[0], members), inside))
    except BaseException:
        _close(made)
        raise
    finally:
        if inside:
            with suppress(OSError):
                path.unlink()
    if wrong:
        _close(made)
        return wrong
    return made[0] if made else None


def _try(act: Callable[[], object], nbytes: int) -> str | None:
    try:
        return act()
    except Exception as error:                              # whatever it is, the others must hear of it
        if isinstance(error, OSError) and free() < nbytes:
            return f"/dev/shm has {bytes_text(free())} free, {bytes_text(nbytes)} are needed"
        return f"/dev/shm: {error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _alone(segment: Segment, members: Sequence[int]) -> str | None:
    """Whether members that are certainly there seem to be gone."""
    return "/dev/shm does not keep locks" if any(segment.gone(m) for m in members) else None


def _close(made: Sequence[Segment]) -> None:
    for segment in made:
        segment.close()
