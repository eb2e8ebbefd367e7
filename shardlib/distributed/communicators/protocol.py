"""What a communicator is: it says which calls it takes, and takes them.

A communicator sees contiguous tensors only, and, where pieces differ from member to member, flat ones: `counts`, `send`
and `recv` are numbers of elements per member, in the order of the group. Dims, strides and the meaning of dtypes are
the coordinator's matter. A result is always new memory: it aliases neither an argument nor another result.
"""
from __future__ import annotations

from typing import NamedTuple, Protocol, Sequence

import torch
from torch import Tensor


class Call(NamedTuple):
    """All that a choice between communicators may depend on; equal on every member of the group."""
    name: str
    op: str | None
    dtype: torch.dtype
    device: str
    nbytes: int


class Communicator(Protocol):
    """A way to run collectives over one group. `op` is "sum" or "max"; members are counted in the group's order."""

    name: str
    deterministic: bool
    """Whether it reduces in rank order, in a wide dtype, rounding once: bit for bit `reduction.reduce_pieces`."""

    def supports(self, call: Call) -> str | None:
        """None where it takes the call, else why not, in words."""

    def all_reduce(self, x: Tensor, op: str) -> Tensor: ...

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor: ...

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor: ...

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor: ...

    def broadcast(self, x: Tensor, root: int) -> Tensor: ...

    def gather(self, x: Tensor, root: int, counts: Sequence[int]) -> Tensor | None: ...

    def send(self, x: Tensor, to: int) -> None: ...

    def recv(self, count: int, dtype: torch.dtype, device: torch.device, source: int) -> Tensor: ...

    def barrier(self) -> None: ...
