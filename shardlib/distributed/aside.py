"""A group as collectives use it that travel beside other work: without communicators that fill the GPU; and
collectives that are under way.

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

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, TypeVar

import torch

from shardlib.distributed.communicators.protocol import Communicator
from shardlib.distributed.router import Router
from shardlib.distributed.streams import side_stream


class Routed(Protocol):
    """What there is to know of a group here."""
    name: str
    communicators: Sequence[Communicator]
    router: Router


G = TypeVar("G", bound=Routed)


def aside(group: G) -> G | None:
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


class UnderWay:
    """A collective that is under way: what it reads, which is kept until it has arrived; what it gives, and
    when."""

    def __init__(self, read: Any, given: Any, event: torch.cuda.Event | None) -> None:
        self.read, self.given, self.event = read, given, event

    def arrived(self) -> Any:
        """What it gives, for all that comes now on the current stream."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return self.given


class Begins:
    """Of a GroupCoordinator: collectives that travel while others compute."""
    name: str
    device: torch.device
    communicators: Sequence[Communicator]
    router: Router
    _beside: tuple[Router, Any] | None = None

    def begin(self, method: str, *args: Any, at: object = None) -> UnderWay:
        """A collective on a stream of its own, behind what the current one has by now; all members begin and
        call the same in the same order. On the CPU, and where all communicators fill the GPU, it is done
        when this returns."""
        if self._beside is None or self._beside[0] is not self.router:
            self._beside = self.router, aside(self) if self.device.type == "cuda" else None
        other = self._beside[1]
        if other is None:
            return UnderWay(args, getattr(self, method)(*args, at=at), None)
        stream = side_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            return UnderWay(args, getattr(other, method)(*args, at=at), stream.record_event())
