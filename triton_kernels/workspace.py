"""The memory behind the kernels between GPUs: an arena that all ranks of a group can write, and the count of calls.

Only the arena is shared; tensors that go in and come out are ordinary. One workspace serves one stream: kernels that use
it run one after another. It is allocated and filled before the first call, so that calls may be captured in CUDA graphs.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Sequence

import torch
from torch import Tensor

from shardlib.triton_kernels.lamport import EMPTY, STATE_WORDS

MAX_BLOCKS = 256
"""Blocks of a launch that have flags."""


@dataclass(frozen=True)
class Workspace:
    """What a kernel needs to reach the other ranks.

    addresses: int64 [size], of every rank's arena, as this rank sees it.  flags: the same of every rank's flags, where there are any.
    state: what the protocol counts; zeros at first, this rank's alone.  arena: this rank's; its slots have `slot_bytes` each.
    keep: what must live as long.
    """
    rank: int
    size: int
    addresses: Tensor
    arena: Tensor
    state: Tensor
    slot_bytes: int
    flags: Tensor | None = None
    keep: Any = field(default=None, repr=False)

    @cached_property
    def interpret(self) -> bool:
        """Whether kernels run in Triton's interpreter: the memory is the CPU's."""
        return self.arena.device.type == "cpu"

    def check(self, nbytes: int) -> None:
        """ValueError where a call that fills so many bytes of a slot does not fit: it would write into the next."""
        if nbytes > self.slot_bytes:
            raise ValueError(f"{nbytes} bytes do not fit a slot of {self.slot_bytes}")

    @property
    def flag_words(self) -> int:
        """Words of the arena before its slots."""
        return 0 if self.flags is None else MAX_BLOCKS * self.size * 2

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What compiled kernels depend on."""
        return self.rank, self.size, self.slot_bytes, self.arena.device


def symmetric(group: Any, members: Sequence[int], me: int, device: torch.device, nbytes: int) -> tuple[Tensor, Tensor, Any]:
    """Memory that every rank of the process group `group` can write: this rank's (int32), all addresses (int64 [size]) in the order of
    `members`, which are ranks of the group, and what keeps it alive. All ranks call it. NVLink multicast is neither needed nor used."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory
    memory = symmetric_memory.empty(nbytes // 4, dtype=torch.int32, device=device)
    handle = symmetric_memory.rendezvous(memory, group)
    addresses = [handle.buffer_ptrs[m] for m in members]
    return memory, torch.tensor(addresses, dtype=torch.int64, device=device), handle


def lamport_workspace(group: Any, members: Sequence[int], me: int, device: torch.device, slot_bytes: int) -> Workspace:
    """For all_reduce and reduce_scatter: three slots, empty."""
    memory, addresses, handle = symmetric(group, members, me, device, 3 * slot_bytes)
    memory.fill_(EMPTY.value)
    return Workspace(me, len(members), addresses, memory, torch.zeros(STATE_WORDS, dtype=torch.int32, device=device), slot_bytes, keep=handle)


def flagged_workspace(group: Any, members: Sequence[int], me: int, device: torch.device, slot_bytes: int) -> Workspace:
    """For all_gather and all_to_all: flags, then two slots."""
    flags_bytes = MAX_BLOCKS * len(members) * 8
    memory, addresses, handle = symmetric(group, members, me, device, flags_bytes + 2 * slot_bytes)
    memory.zero_()
    return Workspace(me, len(members), addresses + flags_bytes, memory, torch.zeros(2, dtype=torch.int64, device=device), slot_bytes,
                     flags=addresses, keep=handle)
