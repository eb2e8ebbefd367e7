"""How processes meet in a store in which others, now dead, have met before;
and the variables by which they are started."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from shardlib.distributed import meeting
from shardlib.distributed.launch import Launch, _store
from shardlib.distributed.meeting import CALLED, meet
from shardlib.distributed.rank_error import RankError, wait_until
from shardlib.errors import SpecError


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def come(pool: ThreadPoolExecutor, store: dist.Store, ranks: Sequence[int],
         timeout_s: float = 20.0) -> list[Future[str]]:
    return [pool.submit(meet, store, rank, 3, timeout_s) for rank in ranks]


def test_all_get_one_name_and_each_meeting_another(pool: ThreadPoolExecutor) -> None:
    store, names = dist.HashStore(), set()
    for ranks in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        (name,) = {future.result() for future in come(pool, store, ranks)}
        names.add(name)
    assert len(names) == 3
    assert meet(dist.HashStore(), 0, 1, 0.0).startswith("meeting ")


@pytest.mark.parametrize("waited_s, nap_s",
                         [(0.0, 0.005), (0.04, 0.005), (0.8, 0.1), (8.0, 1.0), (99.0, 1.0)])
def test_a_rank_asks_the_less_often_the_longer_it_waits(waited_s: float, nap_s: float,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(meeting, "monotonic", lambda: 64.0 + waited_s)
    monkeypatch.setattr(meeting, "sleep", naps.append)
    meeting._nap(64.0)
    assert naps == [pytest.approx(nap_s)]


def test_a_meeting_that_a_dead_rank_0_has_called_is_left_for_the_next(pool: ThreadPoolExecutor) -> None:
    store = dist.HashStore()
    store.set(CALLED, "meeting of the dead")
    early = come(pool, store, (1, 2))
    assert wait_until(lambda: store.add("shardlib/meeting of the dead/came", 0) == 2, 20.0)
    assert not early[0].done() and not early[1].done()
    (name,) = {future.result() for future in early + come(pool, store, (0,))}
    assert name != "meeting of the dead"


def test_who_died_on_the_way_is_followed_by_its_successor(pool: ThreadPoolExecutor) -> None:
    """Rank 2 came and died; it is counted once, and rank 1 still waited for."""
    store = dist.HashStore()
    first = come(pool, store, (0,))
    assert wait_until(lambda: store.check([CALLED]), 20.0)
    name = store.get(CALLED).decode()
    store.add(f"shardlib/{name}/has 2", 1)
    store.add(f"shardlib/{name}/came", 1)
    again = come(pool, store, (2,))
    assert wait_until(lambda: store.add(f"shardlib/{name}/has 2", 0) == 2, 20.0) and not first[0].done()
    assert {future.result() for future in first + again + come(pool, store, (1,))} == {name}


def test_who_is_missing_is_named(pool: ThreadPoolExecutor) -> None:
    said = {}
    for ranks in ((0,), (0, 1), (1,)):
        first = come(pool, dist.HashStore(), ranks, 0.2)[0]
        said[ranks] = str(first.exception())
    assert said == {(0,): "connect: waited 0.2 s for ranks 1 2", (0, 1): "connect: waited 0.2 s for rank 2",
                    (1,): "connect: waited 0.2 s for rank 0"}


FIRST = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize("changed, says", [
    ({"RANK": "x"}, "RANK is set, but RANK is 'x'; start with torchrun, or unset RANK"),
    ({"RANK": ""}, "RANK is set, but RANK is ''; start with torchrun, or unset RANK"),
    ({"RANK": "-1"}, "RANK is set, but RANK is '-1'; start with torchrun, or unset RANK"),
    ({"RANK": "\u0663"}, "RANK is set, but RANK is '\u0663'; start with torchrun, or unset RANK"),
    ({"RANK": "2"}, "RANK is '2'; it is from 0 to 1"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is '1'; it is 0"),
    ({"WORLD_SIZE": ""}, "RANK is set, but WORLD_SIZE is ''; start with torchrun, or unset RANK"),
    ({"WORLD_SIZE": "2.0"}, "RANK is set, but WORLD_SIZE is '2.0'; start with torchrun, or unset RANK"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it is 1 or more"),
    ({"LOCAL_RANK": "one"}, "RANK is set, but LOCAL_RANK is 'one'; start with torchrun, or unset RANK"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'; it is from 0 to 1"),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is '1'; it is 0"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'; it is from 1 to 2"),
    ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'; it is from 1 to 2")])
def test_a_launcher_that_says_what_cannot_be(changed: Mapping[str, str], says: str) -> None:
    with pytest.raises(SpecError) as error:
        Launch.from_environment({**FIRST, **changed})
    assert str(error.value) == says


@pytest.mark.parametrize("address, says", [
    ({}, "RANK is set, but MASTER_ADDR is ''; start with torchrun, or unset RANK"),
    ({"MASTER_ADDR": "", "MASTER_PORT": "29500"},
     "RANK is set, but MASTER_ADDR is ''; start with torchrun, or unset RANK"),
    ({"MASTER_ADDR": "localhost"}, "RANK is set, but MASTER_PORT is ''; start with torchrun, or unset RANK"),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
     "RANK is set, but MASTER_PORT is 'http'; start with torchrun, or unset RANK"),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}, "MASTER_PORT is '0'; it is from 1 to 65535"),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'; it is from 1 to 65535")])
def test_an_address_that_cannot_be(address: Mapping[str, str], says: str) -> None:
    with pytest.raises(SpecError) as error:
        _store({**FIRST, **address}, timedelta(seconds=1))
    assert str(error.value) == says


@pytest.mark.parametrize("host, kind, says", [
    ("no.such.host.invalid", SpecError, "MASTER_ADDR is 'no.such.host.invalid', which is no host: "),
    ("localhost", RankError, "connect: the ranks have not met at MASTER_ADDR=localhost, MASTER_PORT=9: ")])
def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch, host: str, kind: type[Exception],
                                    says: str) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)

    def fail(*_: object, **__: object) -> None:
        raise dist.DistNetworkError("The client socket has timed out\nand more")
    monkeypatch.setattr(dist, "rendezvous", fail)
    with pytest.raises(kind) as error:
        _store(os.environ, timedelta(seconds=1))
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    assert kind is SpecError or str(error.value) == f"{says}The client socket has timed out"
