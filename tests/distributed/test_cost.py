"""What a rank asks of the store, by counting: it grows with the members of its groups, and not with the job.

The other ranks are not there. `Counted` does their part in the store: once a rank has come to a key, what
they would have written.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardlib.distributed.board import Board
from shardlib.distributed.job import Job
from shardlib.distributed.launch import ON_DEMAND
from shardlib.distributed.meeting import CALLED, meet
from shardlib.distributed.scene import State
from shardlib.distributed.watch import Moment, Watch
from shardlib.distributed.watchdog import LOOKED, Watchdog

WORLDS = pytest.mark.parametrize("world", [4, 64, 1024])


class Counted(dist.Store):
    """A store that counts its calls, and the keys of those that take several.

    then: by the end of a key, what the others do when a rank calls `set` or `add` with it; told the key.
    """

    def __init__(self, **then: Callable[[dist.Store, str], Any]) -> None:
        super().__init__()
        self.inner, self.then, self.calls, self.keys = dist.HashStore(), then, Counter(), 0

    def _others(self, key: str) -> None:
        for end in [end for end in self.then if key.endswith(end)]:
            self.then.pop(end)(self.inner, key)

    def set(self, key: str, value: Any) -> None:
        self.calls["set"] += 1
        self.inner.set(key, value)
        self._others(key)

    def add(self, key: str, amount: int) -> int:
        self.calls["add"] += 1
        self._others(key)
        return self.inner.add(key, amount)

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        return self.inner.get(key)

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        self.keys += len(keys)
        return self.inner.check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.calls["multi_get"] += 1
        self.keys += len(keys)
        return self.inner.multi_get(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=20)) -> None:
        self.calls["wait"] += 1
        self.inner.wait(keys, timeout)


# -- start-up ------------------------------------------------------------------------------------------------

@WORLDS
def test_rank_0_meets_all_others_in_four_calls(world: int) -> None:
    store = Counted(meeting=lambda others, _: others.add(
        f"shardlib/{others.get(CALLED).decode()}/came", world - 1))
    assert meet(store, 0, world, 20.0).startswith("meeting ") and store.calls == {"set": 3, "add": 1}


@WORLDS
def test_another_rank_meets_them_in_eight(world: int) -> None:
    store = Counted(came=lambda others, _: others.set("shardlib/meeting 7/late", ""))
    store.inner.set(CALLED, "meeting 7")
    assert meet(store, world - 1, world, 20.0) == "meeting 7"
    assert store.calls == {"check": 3, "get": 2, "add": 2} and store.keys == 3


@pytest.mark.parametrize("size", [4, 64, 1024])
def test_a_group_that_is_connected_on_demand_is_one_key(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of all ranks, which nobody else is there to make."""
    monkeypatch.setenv(ON_DEMAND, "1")
    store = Counted()
    dist.ProcessGroupGloo(store, 0, size, timedelta(seconds=20))
    assert store.calls == {"set": 1}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_group_costs_a_member_two_calls_for_each_other_one(size: int) -> None:
    """gloo's own: each member reads each address."""
    inner, stores = dist.HashStore(), [Counted() for _ in range(size)]
    for store in stores:
        store.inner = inner
    with ThreadPoolExecutor(size) as pool:
        groups = list(pool.map(lambda me: dist.ProcessGroupGloo(stores[me], me, size, timedelta(seconds=20)),
                               range(size)))
    assert len(groups) == size and all(s.calls.total() <= 2 * size + 1 for s in stores)


# -- what all ranks settle -----------------------------------------------------------------------------------

@WORLDS
def test_a_message_from_rank_0_is_two_calls(world: int) -> None:
    store = Counted()
    first, last = Job(store, 0, world), Job(store, world - 1, world)
    store.calls.clear()
    assert [job.from_first(lambda: b"a table") for job in (first, last)] == [b"a table"] * 2
    assert store.calls == {"set": 1, "get": 2}


@WORLDS
def test_alike_plans_cost_three_calls_and_the_last_rank_five(world: int) -> None:
    """The others come before the last rank comes, or end the comparison after this one has come."""
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"         # of ""
    last = Counted(**{digest: lambda others, key: others.add(key, world - 1),
                      "came": lambda others, key: others.add(key, world - 1)})
    early = Counted(came=lambda others, key: others.set(key.replace("came", "verdict"), "alike"))
    for store, calls in ((last, {"add": 3, "set": 1, "get": 1}), (early, {"add": 2, "get": 1})):
        job = Job(store, 1, world)
        store.calls.clear()
        assert job.differ("", lambda plans: "not asked") is None and store.calls == calls


@WORLDS
def test_where_plans_differ_one_rank_reads_all(world: int) -> None:
    """And in one call; the others read what it has found."""
    def others_come(others: dist.Store, key: str) -> None:
        base = key.removesuffix("came")
        others.add(key, world - 1)
        for rank in range(world - 1):
            others.set(f"{base}of {rank}", "of theirs")
        others.set(f"{base}text of theirs", "theirs")

    def others_end(others: dist.Store, key: str) -> None:
        others.set(key.replace("came", "verdict"), "different")
        others.set(key.replace("came", "words"), "not alike")
    last, early = Counted(came=others_come), Counted(came=others_end)
    jobs = [Job(store, world - 1, world) for store in (last, early)]
    last.calls.clear()
    early.calls.clear()
    assert (jobs[0].differ("mine", lambda plans: f"{len(plans)}: {' '.join(plans[-2:])}")
            == f"{world}: theirs mine")
    assert last.calls == {"add": 3, "set": 4, "get": 4, "multi_get": 1} and last.keys == world
    assert jobs[1].differ("mine", lambda plans: "not asked") == "not alike"
    assert early.calls == {"add": 2, "set": 2, "get": 2}


# -- the watchdog --------------------------------------------------------------------------------------------

class Dog(Watchdog):
    """Rank 0 of a job in which all others live, without its threads: what these do is called by hand."""

    def __init__(self, world: int, size: int) -> None:
        self.told = Counted()
        super().__init__(Watch(), self.told, 0, world, 1.0, torch.device("cpu"))
        self.stop("")
        self._left, self.beats = False, iter(range(1, 9))
        for name, ranks in (("job", range(world)), ("dp", range(size)), ("tp", range(2))):
            self.watch.seat(name, ranks)
        self.watch.begin(self.watch.seats[1], "barrier")
        self.told.then["0"] = self._others_beat
        self._others_beat(self.told.inner)
        self.told.calls.clear()
        self.told.keys = 0

    def _others_beat(self, others: dist.Store, _: str = "") -> None:
        board, beat = Board(others), next(self.beats)
        for rank in range(1, self.world_size):
            board.write(rank, State(beat=beat))


@WORLDS
def test_the_watchdog_makes_two_calls_a_tick(world: int) -> None:
    """Its own state, which does not list the members of its groups, and whether the job is over."""
    dog = Dog(world, world)
    dog._look(b"")
    assert dog.told.calls == {"set": 1, "check": 1}
    assert len(dog.told.inner.get("0")) < 2000


@pytest.mark.parametrize("world, size, keys", [(4, 2, 4), (64, 8, 64), (1024, 8, LOOKED), (1024, 64, LOOKED),
                                               (65536, 8, LOOKED), (1024, 1024, 1024)])
def test_a_report_reads_the_ranks_that_are_waited_for(world: int, size: int, keys: int) -> None:
    """In four calls: their states before and after some ticks, in which this rank goes on writing its own."""
    dog = Dog(world, size)
    lines = dog._scene(Moment.of(dog.watch.now)).lines()
    assert lines[0] == "  rank 1 is in no collective, and has called none" and len(lines) == min(size - 1, 9)
    assert dog.told.calls.pop("set") <= 10
    assert dog.told.calls == {"check": 2, "multi_get": 2} and dog.told.keys == 4 * keys


def test_of_many_that_wait_one_looks_for_all() -> None:
    dog, other = Dog(1024, 1024), Dog(1024, 1024)
    other.rank, other.board = 7, Board(dog.told)
    mine = Moment.of(dog.watch.now)
    lines = dog._absent(mine)
    dog.told.calls.clear()
    assert len(lines) == 9 and other._absent(mine) == lines
    assert dog.told.calls == {"add": 1, "set": 1, "check": 1, "get": 1}


def test_one_that_was_to_look_for_all_and_has_died_is_not_waited_for() -> None:
    dog = Dog(1024, 1024)
    mine = Moment.of(dog.watch.now)
    dog.told.inner.add(f"absent from {mine}: looks", 1)
    before = Board(dog.told.inner).read((0,))[0].beat
    assert dog._absent(mine) == ["  the rank that looks for all has not answered"]
    assert dog.told.calls.total() <= 1 + 2 * 14 and Board(dog.told.inner).read((0,))[0].beat > before + 1


def test_a_rank_that_waits_for_nobody_looks_at_its_groups() -> None:
    dog = Dog(1024, 8)
    dog.watch.end()
    assert dog._near(None)[:8] == [0, 1, 2, 3, 4, 5, 6, 7] and len(dog._near(None)) == LOOKED
    dog.watch.begin(dog.watch.seats[0], "send", peer=900)
    assert dog._near(Moment.of(dog.watch.now))[:3] == [900, 0, 1]


def test_the_end_of_a_job_is_a_dozen_calls() -> None:
    dog = Dog(1024, 8)
    dog._let_all_say()
    assert dog.told.calls.total() <= 1 + 14
