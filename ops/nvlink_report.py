"""What a kernel between GPUs waits for, read off its arena by the copy engine while it waits.

Where data has not come, the arena still says so: its slot holds EMPTY. What the slot should hold, the kernel
has written when it began. So it needs no clock, a report costs nothing until it is asked for, and calls that
wait behind it do not blur it.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from shardlib.triton_kernels.lamport import EMPTY, SLOTS, STATE_WORDS
from shardlib.triton_kernels.workspace import Workspace

MOST_WORDS = 1 << 18
"""Words of a slot that a report looks at, for each rank."""
MUTE = "the GPU does not answer"


class Reader:
    """Copies memory of a GPU on a stream of its own: the other streams may be waiting."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffer = torch.empty(MOST_WORDS, dtype=torch.int32, device="cpu",
                                  pin_memory=device.type == "cuda")

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


def missing(workspace: Workspace, reader: Reader, ranks: Sequence[int]) -> list[str]:
    """What has not come of the call that has begun last on the workspace, whoever made it. ranks:
    the members', in order.

    Of words that say what a quad hides nothing is known: they are emptied when they are read.
    """
    state = reader.read(workspace.state)
    if state is None:
        return [MUTE]
    slot, (quads, parts, line, blocks, threads) = ((int(state[0]) + SLOTS.value - 1) % SLOTS.value,
                                                   state[5:STATE_WORDS].tolist())
    others = [r for r in ranks if r != ranks[workspace.rank]]
    names = {0: ("words of rows",), 1: ("words",), 2: ("words of the pieces", "words of the sums")}[parts]
    looks = [(name, rank, 4 * quads, 4 if parts else 1) for name, rank in product(names, others)]
    if line:
        looks += [("words of lines", rank, -(-quads // line), 1) for rank in others]
    found: list[str] = []
    start = slot * workspace.slot_bytes // 4
    for name, rank, count, width in looks if quads else ():
        words = reader.read(workspace.arena[start:start + count])
        if words is None:
            return [*found, MUTE]
        empty = (words == EMPTY.value).nonzero()
        if len(empty):
            first = int(empty[0]) // width
            block = (first if width == 4 or not parts else first * line) // threads % blocks
            unit = "quad" if width == 4 else "line" if parts else "part"
            found.append(not_come(rank, len(empty), len(words), name, block, f"{unit} {first}"))
        start += count
    return found


def not_come(rank: int, empty: int, of: int, name: str, block: int, first: str) -> str:
    """How a report says that so many of the words called `name` have not come of a rank,
    and which block waits for the first."""
    return (f"of rank {rank}, {empty} of {of} {name} have not come: block {block} waits for {first}, expects "
            f"data and sees {EMPTY.value:#x}")
