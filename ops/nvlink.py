"""The communicator over NVLink: all_reduce, reduce_scatter, all_gather and all_to_all by kernels that write into each other's memory.

    from shardlib.ops.nvlink import nvlink          # imports Triton
    connect(mesh, communicators=(nvlink,))

Sums are added up in rank order in float32 and rounded once: every rank has the same bits, in one shot and in two but for the payload of a NaN. Results do not
depend on the launch, and calls may be captured in CUDA graphs and mixed with eager ones. Each stream that calls gets a channel of
its own, a workspace, in the order of first use; CUDA graphs that were captured on one stream share its channel, and must not run at
the same time.

Made where all members have GPUs of one host that reach each other's memory. Refused by `supports`: other collectives and
reductions, other dtypes than float32, bfloat16 and float16 in sums, uneven pieces, pieces that are no multiple of 16 bytes,
tensors beyond the capacity. A call on a third stream is a `SpecError`.
"""
from __future__ import annotations

import time
from math import prod
from typing import Sequence

import torch
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call, Place
from shardlib.distributed.flat import Cut
from shardlib.errors import SpecError, bytes_text
from shardlib.ops.nvlink_report import Reader, chunks_missing, packets_missing, sums_missing
from shardlib.triton_kernels.all_reduce import one_shot, two_shot
from shardlib.triton_kernels.exchange import all_gather, all_to_all
from shardlib.triton_kernels.launching import current_stream
from shardlib.triton_kernels.reduce_scatter import reduce_scatter
from shardlib.triton_kernels.workspace import MAX_BLOCKS, Workspace, flagged_workspace, lamport_workspace

CAPACITY = 64 << 20
"""Bytes of the largest tensor a channel takes."""
CHANNELS = 2
CLOSE_S = 5.0
"""Seconds that `close` gives the device to finish."""
PACKETS = 512 << 10
"""Bytes of a tensor, all pieces together, up to which all_gather and all_to_all send packets."""
TWO_SHOT = 256 << 10
"""Bytes above which groups of more than two add up by shares: by the floors of one and of two trips, not swept yet."""
MOST_RANKS = 8
SMS = 132
"""Multiprocessors of a GPU that hold the blocks of two channels at once: see MOST_BLOCKS."""
REDUCIBLE = (torch.float32, torch.bfloat16, torch.float16)
TAKES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
QUAD = 16


def nvlink(place: Place) -> NVLink | str:
    """The communicator of the group at `place`, or why it has none; the same on all members, who all call it."""
    reason = place.agree(_reason(place))
    if reason is not None:
        return reason
    try:
        channels, reason = tuple(Channel.of(place) for _ in range(CHANNELS)), None
    except (RuntimeError, ImportError) as error:
        reason = f"symmetric memory: {str(error).partition(chr(10))[0]}"
    reason = place.agree(reason)
    return NVLink(place, channels) if reason is None else reason


def _reason(place: Place) -> str | None:
    if place.device.type != "cuda":
        return f"the group's tensors are on {place.device.type}"
    if len(set(place.hosts)) > 1:
        return f"members run on {len(set(place.hosts))} hosts"
    if place.size > MOST_RANKS:
        return f"{place.size} members; at most {MOST_RANKS}"
    here = place.device.index
    if not all(torch.cuda.can_device_access_peer(here, d) for d in range(torch.cuda.device_count()) if d != here):
        return f"GPU {here} does not reach the memory of all others"
    sms, free = torch.cuda.get_device_properties(here).multi_processor_count, torch.cuda.mem_get_info(here)[0]
    if sms < SMS:
        return f"GPU {here} has {sms} multiprocessors; the kernels of {CHANNELS} channels want {SMS} to run side by side"
    needed = CHANNELS * workspace_bytes(place.size)
    return None if free >= needed else f"GPU {here} has {bytes_text(free)} free, {bytes_text(needed)} are needed"


class Channel:
    """The workspaces of one stream."""

    def __init__(self, reduce: Workspace, packets: Workspace, chunks: Workspace) -> None:
        self.reduce, self.packets, self.chunks = reduce, packets, chunks

    @classmethod
    def of(cls, place: Place) -> Channel:
        members = [sorted(place.ranks).index(r) for r in place.ranks]
        where = (place.device_group, members, place.me, place.device)
        reduce, packets, chunks = slots(place.size)
        return cls(lamport_workspace(*where, reduce), flagged_workspace(*where, packets), flagged_workspace(*where, chunks))

    @property
    def nbytes(self) -> int:
        return sum(w.arena.nbytes for w in (self.reduce, self.packets, self.chunks))


def slots(size: int) -> tuple[int, int, int]:
    """Bytes of a slot for sums, packets and chunks of the largest tensors between so many ranks: whole quads, as are the pieces."""
    piece, packet = (-(-most // (QUAD * size)) * QUAD for most in (CAPACITY, PACKETS))
    return max(CAPACITY, 2 * (size - 1) * piece), 2 * (size - 1) * packet, (size - 1) * piece


def workspace_bytes(size: int) -> int:
    """Bytes of one channel of a group of so many ranks, on each of its GPUs."""
    reduce, packets, chunks = slots(size)
    return 3 * reduce + 2 * packets + 2 * chunks + 2 * 8 * MAX_BLOCKS * size


class NVLink:
    """Collectives of the members of `place`. Made by `nvlink`."""

    name = "NVLink"
    deterministic = True
    strided = True

    def __init__(self, place: Place, channels: Sequence[Channel]) -> None:
        self.group, self.me, self.size, self.device = place.name, place.me, place.size, place.device
        self._free, self._channels = list(channels), {}
        self._most = MOST_BLOCKS if self.size <= 4 else WIDE_BLOCKS
        self._ranks, self._reader, self._last = place.ranks, Reader(place.device), None
        self.workspace_bytes = sum(c.nbytes for c in channels)
        place.control.barrier()                 # all have filled their workspaces

    def supports(self, call: Call) -> str | None:
        if call.name not in TAKES:
            return f"NVLink takes {', '.join(TAKES[:-1])} and {TAKES[-1]}, not {call.name}"
        if call.device != "cuda":
            return f"NVLink takes tensors on cuda, not on {call.device}"
        if call.op is not None and (call.op != "sum" or call.dtype not in REDUCIBLE):
            return f"NVLink adds up float32, bfloat16 and float16; it has no {call.op} of {str(call.dtype)[6:]}"
        if not call.even:
            return "NVLink takes even pieces only"
        if call.nbytes % (QUAD if call.name == "all_reduce" else QUAD * self.size) or not call.nbytes:
            return f"NVLink takes pieces of a multiple of {QUAD} bytes"
        return None if call.nbytes <= CAPACITY else f"NVLink takes at most {bytes_text(CAPACITY)}, not {bytes_text(call.nbytes)}"

    # -- collectives -----------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        x, channel = _aligned(x), self._channel()
        self._last = ("sums", channel, 0)
        if self.size == 2 or x.nbytes <= TWO_SHOT:
            return one_shot(x, channel.reduce, *launch(x.nbytes, self._most))
        self._last = ("two shots", channel, 0)
        return two_shot(x, channel.reduce, *launch(x.nbytes // self.size, WIDE_BLOCKS))

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        return self._reduce_scatter(x.view(1, self.size, -1)).view(-1)

    def reduce_scatter_cut(self, x: Tensor, cut: Cut, op: str) -> Tensor:
        if not _whole_rows(cut, x.dtype):
            return self.reduce_scatter(cut.split(x), cut.counts, op).view(cut.shapes[self.me])
        return self._reduce_scatter(x.view(prod(cut.whole[:cut.dim]), self.size, -1)).view(cut.shapes[self.me])

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        channel = self._channel()
        self._last = ("sums", channel, 0)
        return reduce_scatter(_aligned(x), channel.reduce, *launch(x.nbytes // self.size, self._most))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self._all_gather(x.view(1, -1)).view(-1)

    def all_gather_cut(self, x: Tensor, cut: Cut) -> Tensor:
        if not _whole_rows(cut, x.dtype):
            return cut.join(self.all_gather(x.view(-1), cut.counts))
        return self._all_gather(x.view(prod(cut.whole[:cut.dim]), -1)).view(cut.whole)

    def _all_gather(self, x: Tensor) -> Tensor:
        words, workspace = self._exchanged(x, x.nbytes)
        return all_gather(words, *workspace).view(x.dtype)

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        words, workspace = self._exchanged(x.view(self.size, -1), x.nbytes // self.size)
        return all_to_all(words, *workspace).view(x.dtype).view(-1)

    def _exchanged(self, x: Tensor, piece: int) -> tuple[Tensor, tuple]:
        """x as words, and how to send pieces of so many bytes: workspace, blocks, warps, unroll, packets."""
        words = _aligned(x).view(torch.int32) if x.dtype.itemsize <= 4 else _aligned(x).view(torch.uint8).view(torch.int32)
        channel = self._channel()
        if piece * self.size <= PACKETS:
            self._last = ("packets", channel, piece)
            return words, (channel.packets, *launch_packets(piece), 1, True)
        self._last = ("chunks", channel, piece)
        return words, (channel.chunks, *launch_chunks(piece), False)

    def report(self) -> str | None:
        """What the last kernel waits for, of which ranks: where it has not ended, and was not followed by others. Asks the GPU."""
        if self._last is None:
            return None
        how, channel, piece = self._last
        if how in ("sums", "two shots"):
            shots, most = (1, self._most) if how == "sums" else (2, WIDE_BLOCKS)
            missing = sums_missing(channel.reduce, self._reader, self._ranks, lambda quads, q: _block(q, *launch(quads * QUAD, most)), shots)
        elif how == "packets":
            missing = packets_missing(channel.packets, self._reader, self._ranks, piece // QUAD, lambda quads, q: _block(q, *launch_packets(quads * QUAD)))
        else:
            blocks, warps, unroll = launch_chunks(piece)
            missing = chunks_missing(channel.chunks, self._reader, self._ranks, min(blocks, -(-piece // (QUAD * 32 * warps * unroll))))
        return f"NVLink over {self.group}: {'; '.join(missing)}" if missing else None

    def _channel(self) -> Channel:
        stream = current_stream(self.device)
        if stream not in self._channels:
            if not self._free:
                raise SpecError(f"NVLink over {self.group}: {CHANNELS} streams have called it, and each has memory of its own; "
                                f"capture CUDA graphs on the stream of group.graph_capture(), and call on one other")
            self._channels[stream] = self._free.pop(0)
        return self._channels[stream]

    def _idle(self) -> bool:
        """Whether the streams that have called come to their end, within CLOSE_S."""
        until = time.monotonic() + CLOSE_S
        streams = [torch.cuda.ExternalStream(handle, device=self.device) for handle in self._channels]
        while not all(stream.query() for stream in streams):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def _refused(self, what: str) -> SpecError:
        return SpecError(f"NVLink takes {', '.join(TAKES[:-1])} and {TAKES[-1]}, not {what}")

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        raise self._refused("broadcast")

    def gather(self, x: Tensor, root: int, counts: Sequence[int]) -> Tensor | None:
        raise self._refused("gather")

    def send(self, x: Tensor, to: int) -> None:
        raise self._refused("send")

    def recv(self, count: int, dtype: torch.dtype, device: torch.device, source: int) -> Tensor:
        raise self._refused("recv")

    def barrier(self) -> None:
        raise self._refused("barrier")

    def close(self) -> None:
        """Lets the workspaces go, if the device is done with them; a kernel that waits for a rank that is gone keeps them."""
        if not self._channels or self._idle():
            self._channels.clear()
            self._free.clear()
            self._last = None


MOST_BLOCKS = 256
"""Blocks of a launch, of at most 512 threads with 32 registers each: an SM of the H200 holds four, so that the kernels of two
channels, and NCCL's beside them, are never in each other's way. A kernel that waits for a peer while it keeps another from running
would wait for ever."""
WIDE_BLOCKS = 128
"""The same of kernels that need up to 64 registers: of more than four ranks, and of two shots."""

# (blocks, warps) and (blocks, warps, unroll) for pieces of so many bytes, as the sweeps of 2026-11-22 on 2 H200 have them.


def launch(nbytes: int, most: int = MOST_BLOCKS) -> tuple[int, int]:
    """For kernels that add up."""
    blocks = -(-nbytes // (QUAD * 256))
    return (max(1, blocks), 8) if blocks <= most else (most, 16)


def launch_packets(nbytes: int) -> tuple[int, int]:
    return min(MOST_BLOCKS, max(1, -(-nbytes // (QUAD * 128)))), 4


def launch_chunks(nbytes: int) -> tuple[int, int, int]:
    rows = -(-nbytes // (QUAD * 256))
    if rows > 4 * 128:
        return MOST_BLOCKS, 16, 4
    unroll = 1 if rows <= 128 else 2 if rows <= 256 else 4
    return -(-rows // unroll), 8, unroll


def _block(quad: int, blocks: int, warps: int) -> int:
    return quad // (32 * warps) % blocks


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % QUAD == 0 else x.clone()


def _whole_rows(cut: Cut, dtype: torch.dtype) -> bool:
    """Whether the rows of every piece are whole quads."""
    return prod(cut.shapes[0][cut.dim:]) * dtype.itemsize % QUAD == 0
