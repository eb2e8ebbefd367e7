"""What a communicator is: it says which calls it takes, and takes them.

A communicator sees contiguous tensors only, and, where pieces differ from member to member, flat ones:
`counts`, `send` and `recv` are numbers of elements per member, in the order of the group. Dims, strides and
the meaning of dtypes are the coordinator's matter. A result is always new memory: it aliases neither an
argument nor another result.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from shardlib.distributed.flat import Cut


class Call(NamedTuple):
    """All that a choice between communicators may depend on; equal on every member of the group.

    nbytes: of the whole tensor: what all_gather and gather give, what the others take; -1 for an all_to_all
    whose pieces are not known to be even.  even: all members' pieces have one size.
    capturing: a CUDA graph is being captured.
    """
    name: str
    op: str | None
    dtype: torch.dtype
    device: str
    nbytes: int
    even: bool = True
    capturing: bool = False


@dataclass(frozen=True)
class Place:
    """What a communicator is made from: one group, seen from one of its members.

    ranks: of the mesh, in the order of the group.  hosts: of each member, the number of the host that it runs
    on; processes have one host where they share its memory.  timeout_s: how long a member waits for the
    others.
    """
    name: str
    ranks: tuple[int, ...]
    rank: int
    hosts: tuple[int, ...]
    device: torch.device
    device_group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup
    timeout_s: float
    control: Communicator

    @property
    def me(self) -> int:
        """This member's number in the group."""
        return self.ranks.index(self.rank)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def share(self, mine: Any) -> list[Any]:
        """Every member's message of plain data, on every member. All members call it."""
        text = torch.frombuffer(bytearray(msgspec.msgpack.encode(mine)), dtype=torch.uint8)
        lengths = self.control.all_gather(torch.tensor([text.numel()], device="cpu"),
                                          (1,) * self.size).tolist()
        whole = self.control.all_gather(text, lengths)
        return [msgspec.msgpack.decode(piece.numpy().tobytes()) for piece in whole.split_with_sizes(lengths)]

    def agree(self, reason: str | None) -> str | None:
        """The first member's reason that is not None, on every member; None if there is none.

        All members call it.
        """
        return next((r for r in self.share(reason) if r is not None), None)


Factory = Callable[[Place], "Communicator | str"]
"""Makes a communicator for a group, or says on every member why it cannot. All members call it in turn."""


class Communicator(Protocol):
    """A way to run collectives over one group.

    `op` is "sum" or "max"; members are counted in the group's order.
    """

    name: str
    deterministic: bool
    """Whether it reduces in rank order, in a wide dtype, rounding once: as `reduction.reduce_pieces`."""

    strided: bool
    """Whether it also has `StridedCommunicator`'s methods."""

    def supports(self, call: Call) -> str | None:
        """None where it takes the call, else why not, in words. The same on every member."""

    def all_reduce(self, x: Tensor, op: str) -> Tensor: ...

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor: ...

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor: ...

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor: ...

    def broadcast(self, x: Tensor, root: int) -> Tensor: ...

    def gather(self, x: Tensor, root: int, counts: Sequence[int]) -> Tensor | None: ...

    def send(self, x: Tensor, to: int) -> None: ...

    def recv(self, count: int, dtype: torch.dtype, device: torch.device, source: int) -> Tensor: ...

    def barrier(self) -> None: ...

    def close(self) -> None:
        """Gives back what it holds. Waits for nobody."""


@runtime_checkable
class FusingCommunicator(Protocol):
    """One that takes some collectives together with the steps around them (`shardlib.compiler.fusion`)."""

    def fused(self, name: str, operands: Sequence[Tensor], static: Mapping[str, float]) -> Callable | str:
        """What takes the fused step `name` of operands like these, which are on meta; or why nothing does.

        The same on every member. It is called with the operands, and gives the results: new memory, whose
        sums have the bits of this communicator's own collective.
        """


@runtime_checkable
class ExchangingCommunicator(Protocol):
    """One that takes rows of tokens to the members that have experts of them, and their sums home, without
    anybody on the host knowing which go where (`shardlib.ops.expert_exchange`).

    chosen, weights: of all members' tokens, (tokens, choices), alike on all; side_by_side: how many tokens of
    a member lie side by side there, before those of the next. place: of each choice the row that it has here,
    -1 where its expert is another member's; members have as many experts, in their order.
    """

    me: int

    def refuses_rows(self, tokens: int, width: int, dtype: torch.dtype) -> str | None:
        """Why it does not take so many tokens of each member; None where it does. Alike on all members."""

    def dispatch_rows(self, x: Tensor, chosen: Tensor, place: Tensor, experts: int, most: int,
                      side_by_side: int) -> Tensor:
        """(most, width): the rows that this member's `experts` get, each at its place; the others mean
        nothing. x: this member's tokens, (tokens, width)."""

    def combine_rows(self, rows: Tensor, place: Tensor, weights: Tensor, side_by_side: int) -> Tensor:
        """(tokens, width): of this member's tokens the sum over all members, in their order, of each one's
        rows times their weights."""


class StridedCommunicator(Communicator, Protocol):
    """One that puts pieces together along any dim itself, so that nothing is copied before or after."""

    def all_gather_cut(self, x: Tensor, cut: Cut) -> Tensor: ...

    def reduce_scatter_cut(self, x: Tensor, cut: Cut, op: str) -> Tensor: ...
