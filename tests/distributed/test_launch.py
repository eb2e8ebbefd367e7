"""How processes meet in a store in which others, now dead, have met before."""
from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Iterator, Sequence

import pytest
import torch.distributed as dist

from shardlib.distributed.launch import _meet
from shardlib.distributed.rank_error import wait_until


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def come(pool: ThreadPoolExecutor, store: dist.Store, ranks: Sequence[int], timeout_s: float = 20.0) -> list[Future[str]]:
    return [pool.submit(_meet, store, rank, 3, timeout_s) for rank in ranks]


def test_all_get_one_name_and_each_meeting_another(pool: ThreadPoolExecutor) -> None:
    store, names = dist.HashStore(), set()
    for ranks in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        (name,) = {future.result() for future in come(pool, store, ranks)}
        names.add(name)
    assert len(names) == 3
    assert _meet(dist.HashStore(), 0, 1, 0.0).startswith("meeting ")


def test_who_died_on_the_way_is_not_met(pool: ThreadPoolExecutor) -> None:
    """Rank 2 asked and died; rank 0 took its word for that of the living one, until that came. Agents have counted differently."""
    store = dist.HashStore()
    store.set("shardlib/asks/2", "a word of the dead")
    early = come(pool, store, (0, 1))
    assert wait_until(lambda: store.check(["shardlib/answer/a word of the dead"]), 20.0) and not early[0].done()
    assert len({future.result() for future in early + come(pool, store, (2,))}) == 1


def test_who_is_missing_is_named(pool: ThreadPoolExecutor) -> None:
    said = {}
    for ranks in ((0,), (0, 1), (1,)):
        first = come(pool, dist.HashStore(), ranks, 0.2)[0]
        said[ranks] = str(first.exception())
    assert said == {(0,): "connect: waited 0.2 s for ranks 1 2", (0, 1): "connect: waited 0.2 s for rank 2", (1,): "connect: waited 0.2 s for rank 0"}
