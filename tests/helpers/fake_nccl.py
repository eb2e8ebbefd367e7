"""The functions of NCCL that `communicators.nccl` calls, over gloo and memory of the host,
so that the kit runs without a GPU.

They take addresses, as NCCL's do: a wrong offset, count, dtype or root is seen. So is a call out of its
group.
"""
from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardlib.distributed.communicators.nccl import CODES, OPS, Nccl
from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.reduction import reduce_pieces

COMM, STREAM = 5, 7
DTYPES, REDUCTIONS = {code: dtype for dtype, code in CODES.items()}, {code: op for op, code in OPS.items()}


def memory(address: int, nbytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


class FakeNccl:
    """What `nccl.bindings.nccl` is, for one member."""

    class NCCLError(Exception):
        pass

    def __init__(self, place: Place) -> None:
        self.place, self.depth, self.log = place, 0, []
        self.sends: list[tuple[Tensor, int]] = []
        self.recvs: list[tuple[Tensor, int]] = []

    # -- groups, sends and recvs -----------------------------------------------------------------------------

    def group_start(self) -> None:
        self.depth += 1

    def group_end(self) -> None:
        self.depth -= 1
        self._exchange()

    def send(self, start: int, count: int, dtype: int, to: int, comm: Any, stream: int) -> None:
        self._seen("send", comm, stream)
        self.sends.append((memory(start, count * DTYPES[dtype].itemsize), to))
        self._exchange()

    def recv(self, start: int, count: int, dtype: int, source: int, comm: Any, stream: int) -> None:
        self._seen("recv", comm, stream)
        self.recvs.append((memory(start, count * DTYPES[dtype].itemsize), source))
        self._exchange()

    def _exchange(self) -> None:
        if self.depth:
            return
        me = self.place.me
        own = [x for x, to in self.sends if to == me]
        for x, source in self.recvs:
            if source == me:
                x.copy_(own.pop(0))
        assert not own, "sent to itself, and not received"
        ops = [dist.P2POp(way, x, peer)
               for way, pieces in ((dist.isend, self.sends), (dist.irecv, self.recvs)) for x, peer in pieces
               if peer != me]
        self.sends, self.recvs = [], []
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    # -- collectives -----------------------------------------------------------------------------------------

    def all_reduce(self, start: int, into: int, count: int, dtype: int, op: int, comm: Any,
                   stream: int) -> None:
        self._seen("all_reduce", comm, stream)
        self._give(into, self._reduced(start, count, dtype, op))

    def reduce(self, start: int, into: int, count: int, dtype: int, op: int, root: int, comm: Any,
               stream: int) -> None:
        self._seen("reduce", comm, stream)
        total = self._reduced(start, count, dtype, op)
        if self.place.me == root:
            self._give(into, total)

    def reduce_scatter(self, start: int, into: int, count: int, dtype: int, op: int, comm: Any,
                       stream: int) -> None:
        self._seen("reduce_scatter", comm, stream)
        self._give(into,
                   self._reduced(start, count * self.place.size, dtype, op)[self.place.me * count:][:count])

    def all_gather(self, start: int, into: int, count: int, dtype: int, comm: Any, stream: int) -> None:
        self._seen("all_gather", comm, stream)
        self._give(into, torch.cat(self._all(memory(start, count * DTYPES[dtype].itemsize))))

    def broadcast(self, start: int, into: int, count: int, dtype: int, root: int, comm: Any,
                  stream: int) -> None:
        self._seen("broadcast", comm, stream)
        self._give(into, self._all(memory(start, count * DTYPES[dtype].itemsize))[root])

    def _reduced(self, start: int, count: int, dtype: int, op: int) -> Tensor:
        size = DTYPES[dtype].itemsize
        return reduce_pieces([x.clone().view(DTYPES[dtype]) for x in self._all(memory(start, count * size))],
                             REDUCTIONS[op])

    def _all(self, x: Tensor) -> list[Tensor]:
        return list(self.place.control.all_gather(x, (len(x),) * self.place.size).split(len(x)))

    def _give(self, into: int, x: Tensor) -> None:
        x = x.contiguous().view(torch.uint8)
        memory(into, len(x)).copy_(x)

    def _seen(self, name: str, comm: Any, stream: int) -> None:
        assert (comm, stream) == (COMM, STREAM)
        self.log.append((name, self.depth))


class OnHost(Nccl):
    """Nccl over a FakeNccl, of tensors on the CPU."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, FakeNccl(place), COMM)

    def _stream(self) -> int:
        return STREAM


def raising(error: BaseException) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error
    return call
