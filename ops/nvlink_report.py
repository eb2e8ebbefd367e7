"""What a kernel between GPUs waits for, read off its arena by the copy engine while it waits.

Where data has not come, the arena still says so: its slot holds EMPTY. So the kernels need no clock and no counter of their own, and a
report costs nothing until it is asked for.
"""
from __future__ import annotations

import time
from itertools import product
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from shardlib.triton_kernels.lamport import EMPTY, SLOTS
from shardlib.triton_kernels.launching import Grid
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


class Expected(NamedTuple):
    """What a kernel waits for. parts: what its slot holds, each of every other rank, by name; quads: of a part, from one of them; lines:
    of all parts, where lines have words; grid: the launch."""
    parts: tuple[str, ...]
    quads: int
    lines: int
    grid: Grid

    def filled(self, others: int) -> int:
        """Quads of the slot that so many other ranks fill."""
        return len(self.parts) * others * self.quads + -(-self.lines // 4)


def missing(workspace: Workspace, expected: Expected, reader: Reader, ranks: Sequence[int]) -> list[str]:
    """What has not come of the last call on the workspace. ranks: the members', in order.

    Where the slot is filled with another number of quads than `expected`, the last call was one out of a CUDA graph: then only what
    is missing of the slot is known.
    """
    state = reader.read(workspace.state)
    if state is None:
        return ["the GPU does not answer"]
    slot = (int(state[0]) + SLOTS.value - 1) % SLOTS.value
    filled, start = int(state[2 + slot]), slot * workspace.slot_bytes // 4
    others = [r for r in ranks if r != ranks[workspace.rank]]
    if filled != expected.filled(len(others)):
        empty = _empty(workspace, reader, start, 4 * filled - 3)        # the last quad may hold one word of a line
        return [f"in a CUDA graph: {len(empty)} of {4 * filled} words have not come"] if len(empty) else []
    found, words = [], 4 * expected.quads
    for i, (part, rank) in enumerate(product(expected.parts, others)):
        empty = _empty(workspace, reader, start + i * words, words)
        if len(empty):
            quad = int(empty[0]) // 4
            block = quad // expected.grid.threads % expected.grid.blocks
            found.append(f"of rank {rank}, {len(empty)} of {min(words, MOST_WORDS)} {part} have not come: block {block} waits for quad {quad}, "
                         f"expects data and sees {EMPTY.value:#x}")
    after = start + len(expected.parts) * len(others) * words
    if not found and len(empty := _empty(workspace, reader, after, expected.lines)):
        found.append(f"{len(empty)} of {expected.lines} words of lines have not come: the first is {int(empty[0])}")
    return found


def _empty(workspace: Workspace, reader: Reader, start: int, count: int) -> Tensor:
    """Which of so many words of the arena are empty; none, if the GPU does not answer."""
    words = reader.read(workspace.arena[start:start + count])
    return torch.empty(0) if words is None else (words == EMPTY.value).nonzero()
