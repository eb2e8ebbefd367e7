"""The communicator over NVLink: all_reduce, reduce_scatter,
all_gather and all_to_all by kernels that write into each other's memory.

    from shardlib.ops.nvlink import nvlink          # imports Triton
    connect(mesh, communicators=(nvlink,))

Sums are added up in rank order in float32 and rounded once: every rank has the same bits, in one shot and in
two but for the payload of a NaN. Results do not depend on the launch, and calls may be captured in CUDA
graphs and mixed with eager ones. Each stream that calls gets a channel of its own, a workspace, in the order
of first use; CUDA graphs that were captured on one stream share its channel, and must not run at the same
time.

Made where all members have GPUs of one host that reach each other's memory. Refused by `supports`: other
collectives and reductions, other dtypes than float32, bfloat16 and float16 in sums, uneven pieces, pieces
that are no multiple of 16 bytes, tensors beyond the capacity. A call on a third stream is a `SpecError`.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call, Place
from shardlib.distributed.flat import Cut
from shardlib.distributed.streams import current_stream
from shardlib.errors import SpecError, bytes_text
from shardlib.ops.few_rows import starts_early
from shardlib.ops.nvlink_grids import (
    BLOCK_REGISTERS,
    MOST_BLOCKS,
    ONE_SHOT,
    WORD_A_WARP,
    grid_of,
    grid_of_rows,
    grid_of_tokens,
    launches_of,
)
from shardlib.ops.nvlink_report import Reader, missing
from shardlib.triton_kernels import exchange, expert_exchange
from shardlib.triton_kernels.all_reduce import one_shot, two_shot
from shardlib.triton_kernels.all_reduce_add_rms_norm import all_reduce_add_rms_norm
from shardlib.triton_kernels.lamport import EMPTY, SLOTS
from shardlib.triton_kernels.launching import Grid
from shardlib.triton_kernels.reduce_scatter import reduce_scatter
from shardlib.triton_kernels.split_argmax import split_argmax
from shardlib.triton_kernels.workspace import Workspace, symmetric_workspace

CAPACITY = 64 << 20
"""Bytes of the largest tensor a channel takes."""
CHANNELS = 2
CLOSE_S = 5.0
"""Seconds that `close` gives the device to finish."""
MOST_RANKS = 8
WORDS_OF_ROWS = 256
"""Such a part of a slot comes on top, for the words of rows that are exchanged."""
SMS = 132
"""Multiprocessors of a GPU that hold the blocks of two channels at once: see MOST_BLOCKS."""
REDUCIBLE = (torch.float32, torch.bfloat16, torch.float16)
TAKES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
QUAD = 16


def nvlink(place: Place) -> NVLink | str:
    """The communicator of the group at `place`, or why it has none;
    the same on all members, who all call it."""
    reason = place.agree(_reason(place))
    if reason is None:
        reason = place.agree(_unreached(place))
    if reason is not None:
        return reason
    try:
        members = [sorted(place.ranks).index(r) for r in place.ranks]
        channels = tuple(symmetric_workspace(place.device_group, members, place.me, place.device,
                                             slot_bytes(place.size)) for _ in range(CHANNELS))
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
    sms, free = torch.cuda.get_device_properties(here).multi_processor_count, torch.cuda.mem_get_info(here)[0]
    if sms < SMS:
        return (f"GPU {here} has {sms} multiprocessors; the kernels of {CHANNELS} channels want {SMS} to run "
                "side by side")
    needed = CHANNELS * SLOTS.value * slot_bytes(place.size)
    return (None if free >= needed
            else f"GPU {here} has {bytes_text(free)} free, {bytes_text(needed)} are needed")


def _unreached(place: Place) -> str | None:
    """Of the members' GPUs that this process sees, as torch numbers them here.

    Those it does not see show when memory is shared.
    """
    here, seen = place.device.index, {_uuid(d): d for d in range(torch.cuda.device_count())}
    theirs = place.share(_uuid(here))
    if len(set(theirs)) < place.size:
        return "members share a GPU"
    far = [seen[u] for u in theirs
           if u in seen and seen[u] != here and not torch.cuda.can_device_access_peer(here, seen[u])]
    return f"GPU {here} does not reach the memory of GPU {far[0]}" if far else None


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def slot_bytes(size: int) -> int:
    """Bytes of a slot for the largest tensor between so many ranks: in one shot between two, else in two;
    sent pieces take less."""
    share = -(-CAPACITY // (QUAD * size))
    most = max(CAPACITY if size == 2 else 2 * (size - 1) * share * QUAD, exchange.slot_bytes(share, size))
    return most + most // WORDS_OF_ROWS // QUAD * QUAD


class NVLink:
    """Collectives of the members of `place`. Made by `nvlink`."""

    name = "NVLink"
    deterministic = True
    strided = True
    fills = True

    def __init__(self, place: Place, channels: Sequence[Workspace]) -> None:
        self.group, self.me, self.size, self.device = place.name, place.me, place.size, place.device
        self._free = list(channels)
        self._channels: dict[int, Workspace] = {}                               # by stream
        self._sums, self._moves = launches_of(self.size)
        self._ranks, self._reader = place.ranks, Reader(place.device)
        self.workspace_bytes = sum(w.arena.nbytes for w in channels)
        place.control.barrier()                 # all have filled their workspaces

    def supports(self, call: Call) -> str | None:
        if call.name not in TAKES:
            return f"NVLink takes {', '.join(TAKES[:-1])} and {TAKES[-1]}, not {call.name}"
        if call.device != "cuda":
            return f"NVLink takes tensors on cuda, not on {call.device}"
        if call.op is not None and (call.op != "sum" or call.dtype not in REDUCIBLE):
            return (
                f"NVLink adds up float32, bfloat16 and float16; it has no {call.op} of {str(call.dtype)[6:]}")
        if not call.even:
            return "NVLink takes even pieces only"
        if call.nbytes % (QUAD if call.name == "all_reduce" else QUAD * self.size) or not call.nbytes:
            return f"NVLink takes pieces of a multiple of {QUAD} bytes"
        return (None if call.nbytes <= CAPACITY
                else f"NVLink takes at most {bytes_text(CAPACITY)}, not {bytes_text(call.nbytes)}")

    # -- collectives -----------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        quads = x.nbytes // QUAD
        if self.size == 2 or (self.size - 1) * x.nbytes <= ONE_SHOT:
            return one_shot(_aligned(x), self._workspace(), grid_of(quads, self._sums))
        share = -(-quads // self.size)                              # comes twice: as pieces and as sums
        return two_shot(_aligned(x), self._workspace(), grid_of(2 * share, self._sums).over(share))

    def refuses_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> str | None:
        """Why `all_reduce_add_rms_norm` does not take these; None where it does."""
        if x.dtype not in REDUCIBLE or not x.dtype == residual.dtype == weight.dtype:
            return ("NVLink norms float32, bfloat16 or float16, not "
                    f"{', '.join(str(t.dtype)[6:] for t in (x, residual, weight))}")
        if residual.shape != x.shape or weight.shape != x.shape[-1:] or not x.numel():
            shapes = ", ".join(str(tuple(t.shape)) for t in (x, residual, weight))
            return f"NVLink norms x and a residual alike by a weight for each column, not {shapes}"
        if weight.nbytes % QUAD or weight.nbytes > MOST_ROW:
            return (f"NVLink norms rows of a multiple of {QUAD} bytes, at most {bytes_text(MOST_ROW)}, not "
                    f"{weight.nbytes}")
        return (None if x.nbytes <= MOST_NORMED
                else f"NVLink norms at most {bytes_text(MOST_NORMED)}, not {bytes_text(x.nbytes)}")

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor,
                                eps: float) -> tuple[Tensor, Tensor]:
        """(residual + the sum of every member's x, its rms_norm by weight),
        the first with the bits of all_reduce and an addition.

        x, residual: (..., width), contiguous; weight: (width,). For rows that are few: all is sent in one
        shot. What `refuses_norm` names is a SpecError.
        """
        refusal = self.refuses_norm(x, residual, weight)
        if refusal is not None:
            raise SpecError(refusal)
        rows, old = (_aligned(t.contiguous()).view(-1, len(weight)) for t in (x, residual))
        grid, split, shots = grid_of_rows(len(rows), weight.nbytes // QUAD, self.size)
        grid = grid._replace(early=starts_early(x.device, len(rows)))
        total, normed = all_reduce_add_rms_norm(rows, old, _aligned(weight), eps, self._workspace(), grid,
                                                split, shots)
        return total.view(x.shape), normed.view(x.shape)

    def refuses_argmax(self, x: Tensor) -> str | None:
        """Why `split_argmax` does not take x; None where it does."""
        if x.dtype not in REDUCIBLE:
            return f"NVLink compares float32, bfloat16 and float16, not {str(x.dtype)[6:]}"
        if (not x.numel() or x.shape[-1] * self.size >= EMPTY.value
            or x.numel() > MOST_CHOSEN * x.shape[-1]):
            return f"NVLink chooses among some, of at most {MOST_CHOSEN} rows, not {tuple(x.shape)}"
        return None

    def split_argmax(self, x: Tensor) -> Tensor:
        """(...): of (..., columns), the first index of the largest among the columns of all members, one
        after another; a NaN is the largest. What `refuses_argmax` names is a SpecError."""
        if refusal := self.refuses_argmax(x):
            raise SpecError(refusal)
        rows = x.contiguous().view(-1, x.shape[-1])
        grid = Grid(MOST_BLOCKS, 8, BLOCK_REGISTERS // 256, starts_early(x.device, len(rows)))
        return split_argmax(rows, self._workspace(), grid).view(x.shape[:-1])

    def fused(self, name: str, operands: Sequence[Tensor], static: Mapping[str, float]) -> Callable | str:
        """What takes a fused step, as `FusingCommunicator` has it: `all_reduce_add_rms_norm` and
        `split_argmax`."""
        if name == "split_argmax":
            return self.refuses_argmax(*operands) or self.split_argmax
        if name != "all_reduce_add_rms_norm":
            return f"NVLink has no {name}"
        eps = static["eps"]
        return (self.refuses_norm(*operands)
                or (lambda x, residual, weight: self.all_reduce_add_rms_norm(x, residual, weight, eps)))

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        return self._reduce_scatter(x.view(1, self.size, -1)).view(-1)

    def reduce_scatter_cut(self, x: Tensor, cut: Cut, op: str) -> Tensor:
        if not _whole_rows(cut, x.dtype):
            return self.reduce_scatter(cut.split(x), cut.counts, op).view(cut.shapes[self.me])
        return self._reduce_scatter(x.view(prod(cut.whole[:cut.dim]), self.size, -1)).view(
            cut.shapes[self.me])

    def refuses_rows(self, tokens: int, width: int, dtype: torch.dtype) -> str | None:
        """Why rows of so many tokens of each rank are not exchanged; None where they are."""
        nbytes = width * dtype.itemsize
        if dtype not in REDUCIBLE or not tokens or not nbytes or nbytes % QUAD:
            return f"NVLink exchanges rows of a multiple of {QUAD} bytes, not {width} of {str(dtype)[6:]}"
        grid = grid_of_tokens(tokens, nbytes // QUAD, self.size)
        needed, room = expert_exchange.slot_bytes(tokens, nbytes, self.size, grid), slot_bytes(self.size)
        return (None if needed <= room
                else f"NVLink exchanges at most {bytes_text(room)} of rows, not {bytes_text(needed)}")

    def dispatch_rows(self, x: Tensor, chosen: Tensor, place: Tensor, experts: int, most: int,
                      side_by_side: int) -> Tensor:
        grid = grid_of_tokens(len(x), x.shape[1] * x.itemsize // QUAD, self.size)
        return expert_exchange.dispatch_rows(_aligned(x), chosen, place, experts, most, side_by_side,
                                             self._workspace(), grid)

    def combine_rows(self, rows: Tensor, place: Tensor, weights: Tensor, side_by_side: int) -> Tensor:
        grid = grid_of_tokens(len(weights) // self.size, rows.shape[1] * rows.itemsize // QUAD, self.size)
        return expert_exchange.combine_rows(_aligned(rows), place, weights, side_by_side, self._workspace(),
                                            grid)

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        return reduce_scatter(_aligned(x), self._workspace(),
                              grid_of(x.nbytes // self.size // QUAD, self._sums))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self._all_gather(x.view(1, -1)).view(-1)

    def all_gather_cut(self, x: Tensor, cut: Cut) -> Tensor:
        if not _whole_rows(cut, x.dtype):
            return cut.join(self.all_gather(x.view(-1), cut.counts))
        return self._all_gather(x.view(prod(cut.whole[:cut.dim]), -1)).view(cut.whole)

    def _all_gather(self, x: Tensor) -> Tensor:
        return exchange.all_gather(_aligned(x), *self._moved(x.nbytes // QUAD))

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        return exchange.all_to_all(_aligned(x).view(self.size, -1),
                                   *self._moved(x.nbytes // self.size // QUAD)).view(-1)

    def _moved(self, piece: int) -> tuple[Workspace, Grid, int]:
        """How to move pieces of so many quads: workspace, grid, quads of a line."""
        grid = grid_of(piece, self._moves)
        return self._workspace(), grid, 32 if piece <= WORD_A_WARP else grid.threads

    def report(self) -> str | None:
        """What the last kernel of each channel waits for, of which ranks, where it has not ended.

        Asks the GPU.
        """
        found = [line for workspace in list(self._channels.values())
                 for line in missing(workspace, self._reader, self._ranks)]
        return f"NVLink over {self.group}: {'; '.join(found)}" if found else None

    def _workspace(self) -> Workspace:
        """That of the stream in force."""
        stream = current_stream(self.device)
        if stream not in self._channels:
            if not self._free:
                raise SpecError(f"NVLink over {self.group}: {CHANNELS} streams have called it, and each has "
                                "memory of its own; capture CUDA graphs on the stream of "
                                "group.graph_capture(), and call on one other")
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
        """Lets the workspaces go, if the device is done with them;
        a kernel that waits for a rank that is gone keeps them."""
        if not self._channels or self._idle():
            self._channels.clear()
            self._free.clear()


MOST_CHOSEN = 1 << 16
"""Rows of an argmax: a quad for each of them, from each other rank, fits a slot."""
MOST_ROW, MOST_NORMED = 64 << 10, 8 << 20
"""Bytes of a row that is normed, and of all: W - 1 times as many fit a slot, with a word for each block of
a row."""


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % QUAD == 0 else x.clone()


def _whole_rows(cut: Cut, dtype: torch.dtype) -> bool:
    """Whether the rows of every piece are whole quads."""
    return prod(cut.shapes[0][cut.dim:]) * dtype.itemsize % QUAD == 0
