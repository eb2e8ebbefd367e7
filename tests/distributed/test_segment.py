"""Shared segments: what they are in the file system, who is gone,
and that nothing is left whatever fails while they are made."""
from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family import family, ours

from shardlib.distributed import segment
from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.communicators.shared_memory import SharedMemory, shared_memory
from shardlib.distributed.segment import SHARED, Segment, join

pytestmark = [pytest.mark.usefixtures("nothing_is_left"),
              pytest.mark.skipif(segment.unsupported() is not None, reason=str(segment.unsupported()))]


def test_a_file_of_its_own_allocated_in_full() -> None:
    path = SHARED / f"{segment.PREFIX}test"
    made = Segment.create(path, 1 << 20, 0)
    try:
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode) == 0o600 and found.st_size == 1 << 20
                and found.st_blocks * 512 >= 1 << 20)
        with pytest.raises(FileExistsError):
            Segment.create(path, 1 << 20, 0)
    finally:
        path.unlink()
    made.words(8, 2)[1] = 2**64 - 1
    assert made.memory[16:24] == b"\xff" * 8
    made.close()
    made.close()


def test_members_share_bytes_and_see_who_has_left() -> None:
    def body(place: Place) -> Any:
        made = join(place, range(place.size), 4096)
        assert ours() == []
        made.words(0, 3)[place.me] = place.me + 1
        place.share(None)
        seen, before = list(made.words(0, 3)), [made.gone(m) for m in range(3)]
        place.share(None)
        if place.me == 1:
            made.close()
        place.share(None)
        after = [made.gone(m) for m in range(3)] if place.me != 1 else None
        place.share(None)
        return [seen, before, after]
    all_here = [[1, 2, 3], [False] * 3]
    assert family(3, body) == [[*all_here, [False, True, False]], [*all_here, None],
                               [*all_here, [False, True, False]]]


def test_only_members_get_it() -> None:
    def body(place: Place) -> Any:
        made = join(place, (2, 0), 4096)
        place.share(None)
        seen = [made is None, made is not None and made.gone(2 - place.me)]
        place.share(None)                               # none leaves before all have looked
        return seen
    assert family(3, body) == [[False, False], [True, False], [False, False]]


def faulty(at: int, fault: Callable[[], None]) -> Callable[[Place], Any]:
    """Makes the communicator where `fault` spoils member `at`;
    the reason why there is none, and what is left."""
    def body(place: Place) -> Any:
        if place.me == at:
            fault()
        made = shared_memory(place)
        return [made if isinstance(made, str) else "made", ours()]
    return body


def replaced(where: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(where, name, value)


def raising(error: BaseException) -> Callable[..., None]:
    def act(*_: object) -> None:
        raise error
    return act


def no_room() -> None:
    os.posix_fallocate = raising(OSError(errno.ENOSPC, "No space left on device"))
    segment.free = lambda: 64_000


FAULTS = {
    "no room": (0, no_room, "/dev/shm has 64.0 kB free, 3.1 MB are needed"),
    "no file": (0, replaced(Segment, "create", raising(PermissionError(errno.EACCES, "Permission denied"))),
                "/dev/shm: [Errno 13] Permission denied"),
    "not attached": (2, replaced(Segment, "attach", raising(ValueError("no luck"))), "ValueError: no luck"),
    "no map": (1, replaced(segment.mmap, "mmap", raising(OSError(errno.ENOMEM, "Cannot allocate memory"))),
               "/dev/shm: [Errno 12] Cannot allocate memory"),
    "other processor": (1, replaced(segment.platform, "machine", lambda: "aarch64"),
                        "stores are not ordered on aarch64; they are on x86_64"),
    "no /dev/shm": (2, replaced(segment, "SHARED", SHARED / "none"), "there is no /dev/shm"),
    "no locks": (1, replaced(Segment, "gone", lambda self, member: True), "/dev/shm does not keep locks"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_one_member_is_a_reason_on_all(name: str) -> None:
    at, fault, text = FAULTS[name]
    assert family(3, faulty(at, fault)) == [[text, []]] * 3


def test_several_hosts_are_a_reason_at_once() -> None:
    assert family(2, faulty(0, lambda: None), hosts=(0, 1)) == [["members run on 2 hosts", []]] * 2


def test_tensors_on_a_gpu_are_a_reason_at_once() -> None:
    def body(place: Place) -> Any:
        return shared_memory(replace(place, device=torch.device("cuda")))
    assert family(2, body) == ["the group's tensors are on cuda"] * 2


def test_what_is_closed_or_forgotten_gives_back_file_and_memory() -> None:
    def body(place: Place) -> bool:
        def held() -> tuple[int, int]:
            return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(segment.PREFIX)
        before = held()
        for turn in range(4):
            made = shared_memory(place)
            made.all_reduce(torch.ones(3), "sum")
            if turn % 2:
                made.close()
        del made
        return held() == before
    assert family(2, body) == [True, True]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "at, step", [(0, "create"), (1, "attach"), (0, "__init__"), (1, "__init__"), (0, "gone"), (1, "gone")])
def test_a_member_killed_meanwhile_leaves_nothing(at: int, step: str) -> None:
    answers = family(3, faulty(at, replaced(Segment, step, die)))
    assert answers.pop(at) == "killed" and all(a.startswith("RuntimeError: ") for a in answers), answers


def test_the_creator_killed_with_the_file_there_leaves_nothing() -> None:
    answers = family(3, faulty(0, replaced(os, "posix_fallocate", die)))
    assert answers.pop(0) == "killed" and all(a.startswith("RuntimeError: ") for a in answers), answers


def test_the_communicator_is_made_where_nothing_fails() -> None:
    assert family(2, lambda place: isinstance(shared_memory(place), SharedMemory)) == [True] * 2
