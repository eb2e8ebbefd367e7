"""The communicator of a group of one: every collective is a copy.

>>> x = torch.ones(2)
>>> y = Alone().all_reduce(x, "sum")
>>> torch.equal(x, y), x.data_ptr() == y.data_ptr()
(True, False)
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.flat import copy
from shardlib.errors import SpecError


class Alone:
    """Takes every call on every device; refuses to send to itself."""

    name = "alone"
    deterministic = True
    strided = False

    def supports(self, call: Call) -> str | None:
        return None

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return x.clone()

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return copy(x)

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        return x.clone()

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        return copy(x)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return copy(x)

    def gather(self, x: Tensor, root: int, counts: Sequence[int]) -> Tensor | None:
        return copy(x)

    def send(self, x: Tensor, to: int) -> None:
        raise SpecError("send: a group of one has nobody to send to")

    def recv(self, count: int, dtype: torch.dtype, device: torch.device, source: int) -> Tensor:
        raise SpecError("recv: a group of one has nobody to receive from")

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass
