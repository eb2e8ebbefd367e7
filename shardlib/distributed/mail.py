"""Messages between the members of a group, by number: nobody waits to post one, and each is taken when it is
wanted, whatever has come before it. So no order in which two members post and take can make them wait for
each other, as it can where a send ends when it is received.

    mail = Mail(runtime.group(("pp",)))
    mail.post(x, to=1, number=7)                            # here
    y = mail.take(x.shape, x.dtype, source=0, number=7)     # there
    mail.wait()                                             # once x may be let go

A number is used again once its message was taken. gloo finds messages by number; NCCL's go over `channels`.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.distributed.communicators.torch_distributed import TorchDistributed
from shardlib.distributed.flat import plain
from shardlib.distributed.group_coordinator import GroupCoordinator


def by_number(group: GroupCoordinator) -> TorchDistributed | None:
    """The communicator that finds messages on the group's device by their numbers, if one does."""
    return next((c for c in group.communicators if isinstance(c, TorchDistributed) and c.posts
                 and c.device == group.device.type), None)


class Mail:
    """The messages of one member of `group`, over a communicator that finds them by their numbers."""

    def __init__(self, group: GroupCoordinator, way: TorchDistributed) -> None:
        self.group, self._way = group, way
        self._posted: list[tuple[Any, Tensor, int]] = []

    def post(self, x: Tensor, to: int, number: int, at: object = None) -> None:
        """Hands x to member `to`, some time; x must not change before `wait`."""
        x = plain(x)
        work = self.group.passed("send", to, x.dtype, x.numel(), self._way.post, x, to, number, at=at)
        self._posted = [left for left in self._posted if not left[0].is_completed()] + [(work, x, to)]

    def take(self, shape: Sequence[int], dtype: torch.dtype, source: int, number: int,
             at: object = None) -> Tensor:
        """What member `source` posts under this number: a tensor of this shape and dtype."""
        count, device = torch.Size(shape).numel(), self.group.device
        found = self.group.passed("recv", source, dtype, count, self._take, count, dtype, device, source,
                                  number, at=at)
        return found.view(tuple(shape))

    def _take(self, *asked: Any) -> Tensor:
        work, found = self._way.expect(*asked)
        work.wait()
        return found

    def wait(self, at: object = None) -> None:
        """Until all that was posted is there."""
        for work, x, to in self._posted:
            self.group.passed("send", to, x.dtype, x.numel(), work.wait, at=at)
        self._posted = []
