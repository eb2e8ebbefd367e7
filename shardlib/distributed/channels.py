"""Messages over channels: each goes from one member of a group to another, over a communicator of its own.

For communicators that know no numbers (NCCL's): what they carry says nothing of itself, and comes in the
order in which it was posted. So both ends know beforehand what goes over a channel, in which order. A member
that takes in another order receives what comes before, too, and keeps it:

    channels = Channels(group, {(0, 1): communicator}, {(0, 1): [Parcel(7, (4,), torch.float32), ...]})
    channels.post(x, to=1, number=7)                            # here
    y = channels.take(x.shape, x.dtype, source=0, number=7)     # there
    channels.wait()                                             # all was posted and taken: from the start

Nobody waits to post. A message waits for those before it in its channel, and who takes it has asked for all
of these; so it comes once it is posted, whatever else is under way. A communicator does what its ranks ask
for in the order in which they asked: with one for all channels of a rank 1F1B waits forever, with one for
each two ranks and direction ZBV.

On a GPU taking and posting return at once: the stream waits. `report` says which messages it waits for.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardlib.distributed.communicators.torch_distributed import TorchDistributed
from shardlib.distributed.flat import plain
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.errors import SpecError


class Parcel(NamedTuple):
    """A message, as both ends of its channel know it before."""
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Channels:
    """The messages of one member of `group`. ways: the communicator of each of its channels, in which the one
    that posts is member 0.  order: what goes over each, in order, in one round, which ends with `wait`."""

    name = "channels"

    def __init__(self, group: GroupCoordinator, ways: Mapping[Hashable, TorchDistributed],
                 order: Mapping[Hashable, Sequence[Parcel]]) -> None:
        self.group, self._ways, self._order = group, ways, order
        self._of = {parcel.number: name for name, parcels in order.items() for parcel in parcels}
        self._at = dict.fromkeys(order, 0)
        self._posted: deque[tuple[Any, Tensor, int]] = deque()
        self._come: dict[Hashable, tuple[Any, Tensor]] = {}
        self._taken: deque[tuple[Any, object]] = deque()

    def post(self, x: Tensor, to: int, number: int, at: object = None) -> None:
        """Hands x to member `to`, some time; x must not change before `wait`."""
        name, x = self._of[number], plain(x)
        parcel = self._next(name)
        if parcel != (number, tuple(x.shape), x.dtype):
            raise SpecError(f"channel {name}: message {number}, {x.dtype} of {tuple(x.shape)}, is posted; "
                            f"the next is {parcel.number}, {parcel.dtype} of {parcel.shape}")
        self._post(name, x, to, at)

    def _post(self, name: Hashable, x: Tensor, to: int, at: object) -> None:
        if x.numel():
            work = self.group.passed("send", to, x.dtype, x.numel(), self._ways[name].post, x, 1, at=at)
            _append(self._posted, (work, x, to))

    def take(self, shape: Sequence[int], dtype: torch.dtype, source: int, number: int,
             at: object = None) -> Tensor:
        """What member `source` posts under this number: a tensor of this shape and dtype."""
        name = self._of[number]
        while number not in self._come:
            parcel = self._next(name)
            self._come[parcel.number] = self._expect(name, parcel)
        return self._arrived(*self._come.pop(number), source, at).view(tuple(shape))

    def _arrived(self, work: Any, found: Tensor, source: int, at: object) -> Tensor:
        if work is not None:
            self.group.passed("recv", source, found.dtype, found.numel(), work.wait, at=at)
            if self.group.device.type == "cuda":
                _append(self._taken, (work, at))
        return found

    def _next(self, name: Hashable) -> Parcel:
        self._at[name] += 1
        return self._order[name][self._at[name] - 1]

    def _expect(self, name: Hashable, parcel: Parcel) -> tuple[Any, Tensor]:
        count, device = torch.Size(parcel.shape).numel(), self.group.device
        if not count:                                   # nothing is sent
            return None, torch.empty(0, dtype=parcel.dtype, device=device)
        return self._ways[name].expect(count, parcel.dtype, device, 0)

    def wait(self, at: object = None) -> None:
        """Until all that was posted is there; what comes next is the first of its channel again."""
        for work, x, to in self._posted:
            self.group.passed("send", to, x.dtype, x.numel(), work.wait, at=at)
        self._posted.clear()
        self._at = dict.fromkeys(self._at, 0)

    def report(self) -> str | None:
        """The first message that the GPU waits for."""
        waits = next((at for work, at in tuple(self._taken) if not work.is_completed()), None)
        return None if waits is None else f"the GPU waits for a message, at {waits}"


class Lanes(Channels):
    """Channels of which nobody knows before what comes: from each member to each other, (source, target), all
    is asked for in the order in which it is posted."""

    def __init__(self, group: GroupCoordinator, ways: Mapping[Hashable, TorchDistributed]) -> None:
        super().__init__(group, ways, {})

    def post(self, x: Tensor, to: int, number: int, at: object = None) -> None:
        self._post((self.group.rank_in_group, to), plain(x), to, at)

    def ask(self, shape: Sequence[int], dtype: torch.dtype, source: int, number: int) -> None:
        """Has room for what is taken later, so that it may come, whatever is asked for in between."""
        name = source, self.group.rank_in_group
        self._come[name, number] = self._expect(name, Parcel(number, tuple(shape), dtype))

    def take(self, shape: Sequence[int], dtype: torch.dtype, source: int, number: int,
             at: object = None) -> Tensor:
        asked = (source, self.group.rank_in_group), number
        if asked not in self._come:
            self.ask(shape, dtype, source, number)
        return self._arrived(*self._come.pop(asked), source, at).view(tuple(shape))


def _append(queue: deque, last: tuple) -> None:
    """What is over at the beginning is let go: to ask all of them took longer than to post."""
    while queue and queue[0][0].is_completed():
        queue.popleft()
    queue.append(last)
