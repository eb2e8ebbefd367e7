"""The error of a rank that waited for others in vain; and how it waits: politely, and not for ever.

>>> print(RankError.missing("all_reduce over tp", [1, 3], "have not come within 60 s"))
all_reduce over tp: ranks 1 and 3 have not come within 60 s
>>> wait_until(lambda: True, timeout_s=1.0)
True
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

YIELD_S = 5e-5
"""How long a wait only offers its core to others before it sleeps. Ranks that outnumber the cores pass them
round this way: on an idle machine 4 processes on 2 cores meet in 30 to 50 µs, as with a futex. Beside other
programs a yield costs a turn of theirs, and who slept goes first: yielding for 1 ms instead of 50 µs made an
all_reduce of 4 kB between 4 busy processes 4 times slower."""

NAMED = 64
"""Ranks that a text lists, at most."""


class RankError(RuntimeError):
    """Another rank has died, has left, or did not come in time.

    The text names it, and what was waited for.
    """

    @classmethod
    def missing(cls, what: str, ranks: Sequence[int], fault: str) -> RankError:
        """`fault` follows a plural for several ranks: "have left"; a leading "have" becomes "has" for one."""
        names = [str(r) for r in ranks]
        if len(names) == 1:
            fault = "has" + fault[4:] if fault.startswith("have") else fault
            return cls(f"{what}: rank {names[0]} {fault}")
        return cls(f"{what}: ranks {', '.join(names[:-1])} and {names[-1]} {fault}")


def listed(ranks: Sequence[int]) -> str:
    """Ranks in a text, which stays short where they are thousands.

    >>> listed((0, 2)), listed(range(1024))[-15:]
    ('0 2', '63 and 960 more')
    """
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return " ".join(map(str, ranks[:NAMED])) + more


def wait_until(ready: Callable[[], bool], timeout_s: float, look: Callable[[], None] = lambda: None) -> bool:
    """Whether `ready` came true within timeout_s.

    A wait that gets long calls `look` now and then, which may raise.

    It yields the core for a while, then sleeps a sixteenth of the time it has waited, at most 1 ms.
    """
    if ready():
        return True
    begin = time.monotonic()
    while not ready():
        waited = time.monotonic() - begin
        if waited < YIELD_S:
            os.sched_yield()
        elif waited > timeout_s:
            return ready()
        else:
            look()
            time.sleep(min(waited / 16, 1e-3))
    return True
