"""A group as collectives use it that travel beside other work: without communicators that fill the GPU.

>>> from types import SimpleNamespace
>>> from shardlib.distributed.communicators.alone import Alone
>>> from shardlib.distributed.router import Router
>>> class Fills(Alone):
...     name, fills = "of many blocks", True
>>> def of(*communicators, deterministic=False):
...     router = Router("tp", 2, communicators, deterministic=deterministic)
...     made = aside(SimpleNamespace(name="tp", world_size=2, communicators=communicators, router=router))
...     return made and [c.name for c in made.router.communicators]
>>> of(Fills(), Alone()), of(Fills())
(['alone'], None)
"""
from __future__ import annotations

from copy import copy

from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.router import Router


def aside(group: GroupCoordinator) -> GroupCoordinator | None:
    """The same group, its calls routed among the other communicators; None where there is none, or none that
    adds up as the group is to. One whose kernels hold many multiprocessors while they wait for other ranks
    says `fills`: beside a matmul it takes more of that one's time than it saves."""
    router = group.router
    left = [c for c in group.communicators if not getattr(c, "fills", False)
            and (c.deterministic or not router.deterministic)]
    if not left:
        return None
    made = copy(group)
    made.router = Router(router.name, router.size, left, router.table, router.deterministic, router.declined)
    return made
