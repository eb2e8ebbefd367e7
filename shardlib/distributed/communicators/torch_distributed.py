"""The communicator over one torch.distributed process group: gloo for CPU tensors, NCCL for CUDA tensors.

gloo only moves data here; it never reduces. Its reductions refuse int16 and float8, drop NaN from a max,
round bf16 at every step, and are slower than moving the pieces and adding them up in rank order
(reduce_scatter into 4 pieces of 4 MB: 14 ms against 36 ms, 4 processes on 2 cores). So on gloo every sum is
deterministic. NCCL adds up what it can add exactly as torch does; a float max, and dtypes it does not know,
are moved and reduced as on gloo.

    all_reduce      small: gather all, reduce       large: exchange pieces, reduce, gather
    reduce_scatter  exchange pieces, reduce
    gather          an all_to_all in which only the root receives

torch sorts the ranks of a group, so a group over ("y", "x") shares its process group with ("x", "y"):
`places` says where in it each member stands, and pieces are permuted.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.flat import copy
from shardlib.distributed.reduction import reduce_pieces

GATHER_BYTES = {"gloo": 1 << 20, "nccl": 32 << 20}
"""Received bytes up to which an all_reduce that moves and reduces gathers everything: one collective instead
of two.

Measured with 2 and 4 processes on 2 CPU cores, and on 4 H200 with NCCL 2.28: a max of 8 MB a rank takes 151
µs against 219 µs, of 16 MB 235 µs against 166 µs."""

_MOVED = frozenset((torch.uint8, torch.int8, torch.int32, torch.int64,
                    torch.float16, torch.bfloat16, torch.float32, torch.float64))
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int32, torch.int64))
_REDUCED = {"gloo": {"sum": frozenset(), "max": frozenset()}, "nccl": {"sum": _MOVED, "max": _INTEGERS}}
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchDistributed:
    """Collectives of the members `ranks`, in that order, over `group`,
    whose ranks are the same in sorted order."""

    strided = False

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], rank: int) -> None:
        self.group, self.size, self.me = group, len(ranks), ranks.index(rank)
        self.places = tuple(sorted(ranks).index(r) for r in ranks)
        self.members = tuple(ranks.index(r) for r in sorted(ranks))
        self.in_order = self.places == tuple(range(self.size))
        self.backend = dist.get_backend(group)
        self.device = "cuda" if self.backend == "nccl" else "cpu"
        self.deterministic = self.posts = self.backend == "gloo"
        self.name = f"torch.distributed ({self.backend})"
        self._reduced = _REDUCED[self.backend]

    def supports(self, call: Call) -> str | None:
        return (None if call.device == self.device
                else f"{self.name} takes tensors on {self.device}, not on {call.device}")

    # -- reductions ------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if x.dtype in self._reduced[op]:
            dist.all_reduce(out := x.clone(), _OPS[op], self.group)
            return out
        n, flat = x.numel(), x.view(-1)
        if x.nbytes * self.size <= GATHER_BYTES[self.backend]:
            pieces = self.all_gather(flat, (n,) * self.size).view(self.size, *x.shape)
            return reduce_pieces(pieces.unbind(), op)
        counts = [n // self.size + (i < n % self.size) for i in range(self.size)]
        return self.all_gather(self.reduce_scatter(flat, counts, op), counts).view(x.shape)

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        mine = counts[self.me]
        if x.dtype in self._reduced[op]:
            return self._reduce_scatter(x, counts, op)
        pieces = self.all_to_all(x, counts, (mine,) * self.size)
        return reduce_pieces(pieces.view(self.size, mine).unbind(), op)

    def _reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        out = x.new_empty(counts[self.me])
        if self.in_order and _even(counts):
            _reduce_scatter_single(out, x, _OPS[op], self.group)
        else:
            pieces = x.split_with_sizes(counts)
            dist.reduce_scatter(out, [pieces[m] for m in self.members], _OPS[op], self.group)
        return out

    # -- moves -----------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if x.dtype not in _MOVED:
            return self.all_gather(x.view(torch.uint8), _in_bytes(counts, x.dtype)).view(x.dtype)
        out = x.new_empty(sum(counts))
        if self.in_order and _even(counts):
            _all_gather_single(out, x, self.group)
        elif self.backend == "gloo":
            self._all_gather_by_broadcasts(x, out.split_with_sizes(counts))
        else:
            pieces = out.split_with_sizes(counts)
            dist.all_gather([pieces[m] for m in self.members], x, self.group)
        return out

    def _all_gather_by_broadcasts(self, x: Tensor, pieces: Sequence[Tensor]) -> None:
        """gloo's own all_gather takes equal pieces only;
        broadcasts at once into place are as fast, and need no padding."""
        pieces[self.me].copy_(x)
        works = [dist.broadcast(pieces[m], group_src=place, group=self.group, async_op=True)
                 for place, m in enumerate(self.members) if pieces[m].numel()]
        for work in works:
            work.wait()

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        if x.dtype not in _MOVED:
            send, recv = _in_bytes(send, x.dtype), _in_bytes(recv, x.dtype)
            return self.all_to_all(x.view(torch.uint8), send, recv).view(x.dtype)
        if self.in_order:
            return self._exchange(x, send, recv)
        pieces, send, sizes = (x.split_with_sizes(send), [send[m] for m in self.members],
                               [recv[m] for m in self.members])
        got = self._exchange(torch.cat([pieces[m] for m in self.members]), send,
                             sizes).split_with_sizes(sizes)
        return torch.cat([got[place] for place in self.places])

    def _exchange(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        dist.all_to_all_single(out := x.new_empty(sum(recv)), x, recv, send, self.group)
        return out

    def gather(self, x: Tensor, root: int, counts: Sequence[int]) -> Tensor | None:
        nothing = (0,) * self.size
        send = tuple(x.numel() if m == root else 0 for m in range(self.size))
        out = self.all_to_all(x, send, counts if self.me == root else nothing)
        return out if self.me == root else None

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        out = copy(x) if self.me == root else torch.empty_like(x)
        dist.broadcast(_movable(out), group_src=self.places[root], group=self.group)
        return out

    def send(self, x: Tensor, to: int) -> None:
        _wait(self.post(x, to))

    def recv(self, count: int, dtype: torch.dtype, device: torch.device, source: int) -> Tensor:
        work, out = self.expect(count, dtype, device, source)
        _wait(work)
        return out

    def post(self, x: Tensor, to: int, number: int | None = None) -> dist.Work | None:
        """Hands x to member `to`, some time, and waits for nobody. With a number, on gloo alone, the message
        is found there by it; without, messages come in the order in which they were posted."""
        return self._pass(dist.isend, x, to, number)

    def expect(self, count: int, dtype: torch.dtype, device: torch.device, source: int,
               number: int | None = None) -> tuple[dist.Work | None, Tensor]:
        """What member `source` posts, once the work is over."""
        out = torch.empty(count, dtype=dtype, device=device)
        return self._pass(dist.irecv, out, source, number), out

    def _pass(self, way: Callable[..., Any], x: Tensor, member: int, number: int | None) -> dist.Work | None:
        """Without a number as a batch of one: NCCL serialises a lone send with all collectives of its group,
        and warns of it."""
        x, peer = _movable(x), self.places[member]
        if number is not None:
            return way(x, group=self.group, tag=number, **{
                "group_dst" if way is dist.isend else "group_src": peer})
        works = dist.batch_isend_irecv([dist.P2POp(way, x, group=self.group, group_peer=peer)])
        return works[0] if works else None

    def barrier(self) -> None:
        dist.barrier(self.group)

    def close(self) -> None:
        """Nothing: the process group is the runtime's, and others may share it."""


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def _movable(x: Tensor) -> Tensor:
    return x if x.dtype in _MOVED else x.view(-1).view(torch.uint8)


def _in_bytes(counts: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(c * dtype.itemsize for c in counts)


def _even(counts: Sequence[int]) -> bool:
    return counts.count(counts[0]) == len(counts)
