"""How the processes of a launch meet in a store where others, now dead, have met before.

All attempts of torchrun's agents, and all runtimes of a process one after another, use one store; without
names of their own they would read the addresses that dead processes have left. No count will do for a name:
each agent counts for itself, and not every restart. So rank 0 calls a meeting under a word that is new, and
waits until every other rank has come to it:

    rank 0                                              rank 2
    meeting = "meeting 7f..."                           reads it; it is not the one it has come to
    reads `came`, now and then                          has 2 += 1; where that is 1, came += 1
    came is the number of the others:
    meeting = "", late = ""                             reads `late`: all are there

Only a rank 0 that lives ends a meeting, and one that is over is no longer called. So who comes to the
meeting of a dead one stays in it until the living one calls another. A rank that has died on its way is
counted once, and its successor comes to the same meeting; where it died between its two counts, rank 0 waits
its whole time, and then finds that all have come.

How often a rank asks the store depends on how long it waits, and not on how many there are. Rank 0 looks for
each other rank only to say who is missing.
"""
from __future__ import annotations

from time import monotonic, sleep
from uuid import uuid4

import torch.distributed as dist

from shardlib.distributed.rank_error import listed

POLL_S, SELDOM_S = 5e-3, 1.0
"""How often a process that waits asks the store, at first and at last."""
GRACE = 1.25
"""How much longer than rank 0 another rank waits for what it says."""
CALLED = "shardlib/meeting"


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that the processes which are here now have in common, and none that was here before them.

    RuntimeError where some do not come in time.
    """
    name, late = _call(store, world_size, timeout_s) if rank == 0 else _come(store, rank, timeout_s)
    if late:
        raise RuntimeError(
            f"connect: waited {timeout_s:g} s for rank{'s' * (len(late) > 1)} {listed(late)}")
    return name


def _call(store: dist.Store, world_size: int, timeout_s: float) -> tuple[str, list[int]]:
    """Rank 0's part: the name of the meeting, and the ranks that have not come to it."""
    name, since, others = f"meeting {uuid4().hex}", monotonic(), range(1, world_size)
    store.set(CALLED, name)
    while ((missing := store.add(f"shardlib/{name}/came", 0) < len(others))
           and monotonic() < since + timeout_s):
        _nap(since)
    late = [r for r in others if not store.check([f"shardlib/{name}/has {r}"])] if missing else []
    store.set(CALLED, "")
    store.set(f"shardlib/{name}/late", " ".join(map(str, late)))
    return name, late


def _come(store: dist.Store, rank: int, timeout_s: float) -> tuple[str, list[int]]:
    """Another rank's part: the same as rank 0 says it; rank 0 is late where it says nothing."""
    name, since = "", monotonic()
    while monotonic() < since + timeout_s * (GRACE if name else 1):
        if (late := _read(store, f"shardlib/{name}/late")) is not None:
            return name, [int(r) for r in late.split()]
        if (called := _read(store, CALLED)) and called != name:
            name, since = called, monotonic()
            if store.add(f"shardlib/{name}/has {rank}", 1) == 1:
                store.add(f"shardlib/{name}/came", 1)
        _nap(since)
    return name, [0]


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _nap(since: float) -> None:
    """An eighth of the time that has passed."""
    sleep(min(max((monotonic() - since) / 8, POLL_S), SELDOM_S))
