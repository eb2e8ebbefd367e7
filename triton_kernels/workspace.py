"""The memory behind the kernels between GPUs: an arena that all ranks of a group can write,
and the count of calls.

Only the arena is shared; tensors that go in and come out are ordinary. One workspace serves one stream:
kernels that use it run one after another. It is allocated and filled before the first call, so that calls may
be captured in CUDA graphs.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shardlib.triton_kernels.lamport import EMPTY, SLOTS, STATE_WORDS


@dataclass(frozen=True)
class Workspace:
    """What a kernel needs to reach the other ranks.

    addresses: int64 [size], of every rank's arena, as this rank sees it.  arena: this rank's; its slots have
    `slot_bytes` each.
    state: what the protocol counts; zeros at first, this rank's alone.
    keep: what must live as long.
    """
    rank: int
    size: int
    addresses: Tensor
    arena: Tensor
    state: Tensor
    slot_bytes: int
    keep: Any = field(default=None, repr=False)

    @cached_property
    def interpret(self) -> bool:
        """Whether kernels run in Triton's interpreter: the memory is the CPU's."""
        return self.arena.device.type == "cpu"

    def check(self, nbytes: int) -> None:
        """ValueError where a call that fills so many bytes of a slot does not fit:
        it would write into the next."""
        if nbytes > self.slot_bytes:
            raise ValueError(f"{nbytes} bytes do not fit a slot of {self.slot_bytes}")

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What compiled kernels depend on."""
        return self.rank, self.size, self.slot_bytes, self.arena.device


def symmetric_workspace(group: Any, members: Sequence[int], me: int, device: torch.device,
                        slot_bytes: int) -> Workspace:
    """A workspace in memory that every rank of the process group `group` can write, its slots empty.

    members: the ranks of the group, in the order of the workspace; `me` is one of that order. All ranks call
    it. NVLink multicast is neither needed nor used.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory
    arena = symmetric_memory.empty(SLOTS.value * slot_bytes // 4, dtype=torch.int32, device=device)
    handle = symmetric_memory.rendezvous(arena, group)
    arena.fill_(EMPTY.value)
    addresses = torch.tensor([handle.buffer_ptrs[m] for m in members], dtype=torch.int64, device=device)
    return Workspace(me, len(members), addresses, arena,
                     torch.zeros(STATE_WORDS, dtype=torch.int32, device=device), slot_bytes, keep=handle)
