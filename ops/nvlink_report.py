"""What a kernel between GPUs waits for, read off its arena by the copy engine while it waits.

Where data has not come, the arena still says so: a slot holds EMPTY, a packet or a flag an older number. So the kernels need no clock
and no counter of their own, and a report costs nothing until it is asked for.
"""
from __future__ import annotations

import time
from typing import Callable, Sequence

import torch
from torch import Tensor

from shardlib.triton_kernels.exchange import CHUNKS
from shardlib.triton_kernels.lamport import EMPTY, SLOTS
from shardlib.triton_kernels.workspace import Workspace

MOST_WORDS = 1 << 18
"""Words of a slot that a report looks at, for each rank."""


class Reader:
    """Copies memory of a GPU on a stream of its own: the other streams may be waiting."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffer = torch.empty(MOST_WORDS, dtype=torch.int32, pin_memory=device.type == "cuda")

    def read(self, words: Tensor, timeout_s: float = 1.0) -> Tensor | None:
        """The words (int32), of which it takes the first `MOST_WORDS`; None if the GPU does not answer."""
        here = self.buffer[:min(words.numel(), MOST_WORDS)]
        if self.stream is None:
            return here.copy_(words[:here.numel()])
        with torch.cuda.stream(self.stream):
            here.copy_(words[:here.numel()], non_blocking=True)
        until = time.monotonic() + timeout_s
        while not self.stream.query():
            if time.monotonic() > until:
                return None
            time.sleep(0.001)
        return here


def sums_missing(workspace: Workspace, reader: Reader, ranks: Sequence[int], block_of: Callable[[int, int], int], shots: int = 1) -> list[str]:
    """What all_reduce or reduce_scatter waits for. ranks: the members', in order; block_of(quads, quad): the block that takes a quad.

    In two shots, a slot holds what each of the others sends of this rank's share, and then the sums that each sends of its own.
    """
    state = reader.read(workspace.state)
    if state is None:
        return ["the GPU does not answer"]
    slot = (int(state[0]) + SLOTS.value - 1) % SLOTS.value
    quads = int(state[2 + slot]) // (shots * (workspace.size - 1))
    others = [r for r in ranks if r != ranks[workspace.rank]]
    found = []
    for shot in range(shots):
        for i, rank in enumerate(others):
            start = (slot * workspace.slot_bytes + (shot * len(others) + i) * quads * 16) // 4
            words = reader.read(workspace.arena[start:start + 4 * quads])
            empty = (words == EMPTY.value).nonzero() if words is not None else ()
            if len(empty):
                quad, what = int(empty[0]) // 4, "words" if shots == 1 else ("words of the pieces", "words of the sums")[shot]
                found.append(f"of rank {rank}, {len(empty)} of {words.numel()} {what} have not come: block {block_of(quads, quad)} waits for "
                             f"quad {quad}, expects data and sees {EMPTY.value:#x}")
    return found


def packets_missing(workspace: Workspace, reader: Reader, ranks: Sequence[int], piece: int, block_of: Callable[[int, int], int]) -> list[str]:
    """What an all_gather or all_to_all by packets waits for, of pieces of `piece` quads."""
    call = _call(workspace, reader)
    if call is None:
        return ["the GPU does not answer"]
    found = []
    base = workspace.flag_words + (call % 2) * workspace.slot_bytes // 4
    for i, rank in enumerate(r for r in ranks if r != ranks[workspace.rank]):
        words = reader.read(workspace.arena[base + i * piece * 8:base + (i + 1) * piece * 8])
        late = (words[1::2] != call + 1).nonzero() if words is not None else ()
        if len(late):
            packet = int(late[0])
            found.append(f"of rank {rank}, {len(late)} of {words.numel() // 2} packets have not come: block {block_of(piece, packet // 4)} waits for "
                         f"quad {packet // 4}, expects call {call + 1} and sees {int(words[1::2][packet])}")
    return found


def chunks_missing(workspace: Workspace, reader: Reader, ranks: Sequence[int], blocks: int) -> list[str]:
    """What an all_gather or all_to_all by chunks waits for; the flags of its blocks say how many of their chunks have come."""
    call = _call(workspace, reader)
    if call is None:
        return ["the GPU does not answer"]
    flags = reader.read(workspace.arena[:workspace.flag_words])
    flags = flags.view(torch.int64).view(-1, workspace.size)[:blocks]
    found = []
    for source, rank in enumerate(ranks):
        late = (flags[:, source] <= call * CHUNKS.value).nonzero()
        if len(late) and source != workspace.rank:
            block = int(late[0])
            found.append(f"of rank {rank}, {len(late)} of {blocks} blocks have sent nothing: block {block} expects a flag above {call * CHUNKS.value} "
                         f"and sees {int(flags[block, source])}")
    return found


def _call(workspace: Workspace, reader: Reader) -> int | None:
    """The number of the call that runs: it has been counted as soon as all blocks have begun."""
    state = reader.read(workspace.state.view(torch.int32))
    return None if state is None else int(state[:2].clone().view(torch.int64)) - 1
