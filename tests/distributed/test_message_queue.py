"""The message queue: order, sizes, back-pressure, ends of every kind, and readers on other hosts."""
from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from family import family
from pool import Pool

from shardlib.distributed import segment
from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.message_queue import MessageQueue
from shardlib.distributed.rank_error import RankError
from shardlib.errors import SpecError

pytestmark = [pytest.mark.usefixtures("nothing_is_left"),
              pytest.mark.skipif(segment.unsupported() is not None, reason=str(segment.unsupported()))]

HOSTS = {"one host": (0, 0, 0), "two hosts": (0, 0, 1), "three hosts": (0, 1, 2),
         "the writer alone": (0, 1, 1)}
NAME = "message queue over tp"


@dataclass(frozen=True)
class Step:
    number: int
    tokens: tuple[int, ...]


def said(call: Callable[[], object]) -> str:
    try:
        return repr(call())
    except (SpecError, RankError, EOFError) as error:
        return f"{type(error).__name__}: {error}"


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return [str(i) * draw.choice((0, 1, 10, 100, 3000)) for i in range(count)]


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("writer", [0, 2])
@pytest.mark.parametrize("capacity", [64, 1 << 20])
def test_all_messages_arrive_in_order_at_all_readers(hosts: str, writer: int, capacity: int) -> None:
    def body(place: Place) -> bool:
        with MessageQueue(place, writer, capacity) as queue:
            if place.me == writer:
                for text in texts(200):
                    queue.put(text)
                return True
            got, moods = [], random.Random(place.me)
            while len(got) < 200:
                if moods.random() < 0.05:
                    time.sleep(moods.random() * 5e-3)
                got.append(queue.get(str))
            return (got == texts(200) and said(queue.get) == said(queue.get) == f"EOFError: {NAME}: rank "
                    f"{writer} has closed it")
    assert family(3, body, HOSTS[hosts]) == [True] * 3


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_message_larger_than_the_ring(hosts: str) -> None:
    def body(place: Place) -> int:
        with MessageQueue(place, capacity=4096) as queue:
            sent = os.urandom(1) * 1_000_000 if place.me == 0 else None
            got = queue.broadcast(sent, bytes)
            return len(got) if place.share(got[:1]).count(got[:1]) == 3 else -1
    assert family(3, body, HOSTS[hosts]) == [1_000_000] * 3


@pytest.mark.parametrize("hosts", HOSTS)
def test_types_and_what_cannot_be_written(hosts: str) -> None:
    def body(place: Place) -> list[str]:
        with MessageQueue(place) as queue:
            if place.me == 0:
                return [said(lambda: queue.put(x)) for x in (Step(3, (1, 2)), Step(3, (1, 2)), {"f": int}, 7)]
            return [said(lambda: queue.get(t)) for t in (Step, str, Any, int)]
    bad = "SpecError: a message holds plain data only: Encoding objects of type type is unsupported"
    read = ["Step(number=3, tokens=(1, 2))", "SpecError: message: Expected `str`, got `object`", bad, "7"]
    assert family(3, body, HOSTS[hosts]) == [["None", "None", bad, "None"], read, read]


def test_broadcast_gives_all_members_the_same() -> None:
    def body(place: Place) -> list[Any]:
        with MessageQueue(place, writer=1) as queue:
            given = (Step(1, (2,)), (1, 2), {"f": int}) if place.me == 1 else (None,) * 3
            return [said(lambda: queue.broadcast(x, t)) for x, t in zip(given, (Step, Any, Any))]
    assert family(3, body) == [["Step(number=1, tokens=(2,))", "[1, 2]",
                                "SpecError: a message holds plain data only: Encoding objects of type type "
                                "is unsupported"]] * 3


def test_misuse() -> None:
    def body(place: Place) -> list[str]:
        queue = MessageQueue(place, writer=1)
        wrong = said(queue.get if place.me == 1 else lambda: queue.put(1))
        place.share(None)
        queue.close()
        queue.close()
        return [wrong, said(queue.get if place.me == 0 else lambda: queue.put(1)),
                said(lambda: MessageQueue(place, 2)), said(lambda: MessageQueue(place, 0, 63))]
    rest = [f"SpecError: {NAME}: it was closed",
            (f"SpecError: {NAME}: writer 2 of 2 members, capacity 1048576; the writer is a member, and the "
             "capacity at least 64 bytes"),
            (f"SpecError: {NAME}: writer 0 of 2 members, capacity 63; the writer is a member, and the "
             "capacity at least 64 bytes")]
    assert (family(2, body)
            == [[f"SpecError: {NAME}: rank 0 cannot write; rank 1 writes, the others read", *rest],
                [f"SpecError: {NAME}: rank 1 cannot read; rank 1 writes, the others read", *rest]])


def test_without_room_for_a_ring_it_goes_over_the_cpu_group() -> None:
    def body(place: Place) -> list[Any]:
        if place.me == 0:
            os.posix_fallocate = no_room
            segment.free = lambda: 1000
        with MessageQueue(place) as queue:
            return [queue.declined, queue.broadcast("x" * 5000 if place.me == 0 else None) == "x" * 5000]

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert family(3, body) == [["/dev/shm has 1.0 kB free, 1.0 MB are needed", True]] * 3


# -- ends ----------------------------------------------------------------------------------------------------

def test_what_was_put_before_the_end_can_still_be_read() -> None:
    def body(place: Place) -> list[str]:
        queue = MessageQueue(place)
        if place.me == 0:
            queue.put("last")
            queue.close()
        place.share(None)
        return [said(queue.get) for _ in range(3)] if place.me else []
    end = f"EOFError: {NAME}: rank 0 has closed it"
    assert family(2, body) == [[], ["'last'", end, end]]


def test_a_writer_waits_for_a_slow_reader_and_not_for_ever() -> None:
    def body(place: Place) -> Any:
        queue = MessageQueue(place, capacity=64)
        if place.me == 0:
            queue._ring.timeout_s = 0.2
            text = said(lambda: [queue.put("x" * 20) for _ in range(9)])
            texts = [text, said(lambda: queue.put(1))]
        else:
            texts = [queue.get(), queue.get()] if place.me == 2 else []
        place.share(None)
        return texts
    text = f"{NAME}: rank 1 has read nothing for 0.2 s, and the queue is full"
    assert family(3, body) == [[f"RankError: {text}", f"RankError: {NAME}: not possible any more; {text}"],
                               [], ["x" * 20] * 2]


def test_a_message_that_is_late_may_be_asked_for_again() -> None:
    def body(place: Place) -> list[str]:
        queue = MessageQueue(place)
        late = said(lambda: queue.get(str, timeout_s=0.1)) if place.me else ""
        place.share(None)
        return [late, said(lambda: queue.broadcast("now"))]
    assert family(2, body) == [["", "'now'"],
                               [f"RankError: {NAME}: rank 0 has written nothing for 0.1 s", "'now'"]]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_that_dies_is_named() -> None:
    def body(place: Place) -> list[str]:
        queue = MessageQueue(place)
        if place.me == 0:
            queue.put(1)
            die()
        return [said(queue.get) for _ in range(2)]
    assert family(3, body) == ["killed", *[["1", f"RankError: {NAME}: rank 0 has died"]] * 2]


def test_a_writer_that_dies_within_a_message_is_named() -> None:
    def body(place: Place) -> list[str]:
        queue = MessageQueue(place, capacity=64)
        if place.me == 0:
            ring = queue._ring
            ring._data[0:9], ring._words[0] = bytes([0, 100, 0, 0, 0, 0, 0, 0, 0]), 9
            die()
        return [said(queue.get) for _ in range(2)]
    text = f"{NAME}: rank 0 has died"
    assert family(2, body) == ["killed",
                               [f"RankError: {text}", f"RankError: {NAME}: not possible any more; {text}"]]


def test_a_writer_that_closes_while_a_reader_looks_for_it_has_closed() -> None:
    def body(place: Place) -> str:
        queue = MessageQueue(place)

        def gone(*_: object) -> bool:
            queue._ring._words[1] = 1                           # as if the writer did it now, and left
            return True
        if place.me == 1:
            queue._ring._segment.gone = gone
        text = said(queue.get) if place.me == 1 else ""
        place.share(None)
        return text
    assert family(2, body) == ["", f"EOFError: {NAME}: rank 0 has closed it"]


@pytest.mark.parametrize("capacity", [64, 1 << 20])
def test_a_reader_that_dies_is_named(capacity: int) -> None:
    def body(place: Place) -> str:
        queue = MessageQueue(place, capacity=capacity)
        if place.me == 1:
            queue.get()
            die()
        if place.me == 2:
            return said(lambda: [queue.get() for _ in range(10**6)])[:20]
        return said(lambda: [queue.put(i) for i in range(10**6)])
    answers = family(3, body)
    assert answers[:2] == [f"RankError: {NAME}: rank 1 has died or left", "killed"]


@pytest.mark.parametrize("dead", [0, 2])
def test_a_death_on_another_host_is_named(dead: int) -> None:
    def body(place: Place) -> str:
        queue = MessageQueue(place)
        if place.me == dead:
            die()
        if place.me == 0:
            return said(lambda: [queue.put(i) for i in range(10**6)])
        return said(lambda: [queue.get() for _ in range(10**6)])
    answers = family(3, body, hosts=(0, 0, 1), timeout_s=2.0)
    assert answers[dead] == "killed"
    if dead == 2:
        assert answers[0] == f"RankError: {NAME}: rank 2 has died, left, or not answered within 2 s"
    else:
        assert answers[1:] == [f"RankError: {NAME}: rank 0 has died",
                               f"RankError: {NAME}: rank 0 has died, left, or not answered within 2 s"]


def test_a_queue_that_was_closed_is_none(pool: Pool) -> None:
    """Messages go on without it, and another may be made, until the group is destroyed."""
    assert pool.connect("tp=2", [("tp",)], 2).run("queue_again", ["tp"]) == [[
        "first", "without", False, "again", "open_queue over tp: the group was destroyed",
        "control message over tp: the group was destroyed"]] * 2


def test_messages_of_a_group_go_through_its_queue(pool: Pool) -> None:
    world = pool.connect("dp=2,tp=2", [("tp",), ("dp", "tp")], 4)
    for axes in (["tp"], ["dp", "tp"]):
        assert world.run("queued_messages", axes) == [[True, ["a", 1], "y", "x" * 3_000_000,
            "a message holds plain data only: Encoding objects of type type is unsupported", True]] * 4


def test_a_forked_child_that_closes_the_queue_does_not_end_it() -> None:
    """As one does that ends: a worker of a data loader, say."""
    def body(place: Place) -> str:
        queue = MessageQueue(place)
        if place.me == 0:
            if (child := os.fork()) == 0:
                queue.close()
                os._exit(0)
            os.waitpid(child, 0)
            place.share(None)
            queue.put("still open")
            place.share(None)
            queue.close()
            return said(lambda: queue.put(1))
        place.share(None)
        got = said(queue.get)
        place.share(None)
        return f"{got}; {said(queue.get)}"
    assert family(2, body) == [f"SpecError: {NAME}: it was closed",
                               f"'still open'; EOFError: {NAME}: rank 0 has closed it"]
