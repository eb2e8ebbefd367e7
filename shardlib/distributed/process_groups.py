"""The process groups of one runtime: a pair for each set of ranks, made by every rank in one order.

A pair is a group for tensors on the device (NCCL, or gloo on CPU) and one for control traffic (gloo), so that
a message never waits behind, or slips between, collectives. torch sorts the ranks of a group; so do we, and
groups that differ only in the order of their members share a pair.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Pair:
    """Two process groups over the same ranks."""
    device: dist.ProcessGroup
    cpu: dist.ProcessGroup


class ProcessGroups:
    """Pairs by sorted ranks. `create` is collective over all ranks of the job; the rest is local."""

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        self.device, self.timeout = device, timeout
        self._pairs: dict[tuple[int, ...], Pair] = {}

    def create(self, rank_sets: Iterable[Iterable[int]]) -> None:
        """Pairs for all of `rank_sets`, those of other ranks too;
        sets of one rank, and those that exist, cost nothing."""
        wanted = {tuple(sorted(ranks)) for ranks in rank_sets}
        for ranks in sorted(r for r in wanted if len(r) > 1 and r not in self._pairs):
            self._pairs[ranks] = Pair(self._new(ranks, self.device), self._new(ranks, torch.device("cpu")))

    def _new(self, ranks: tuple[int, ...], device: torch.device) -> dist.ProcessGroup:
        if device.type == "cuda":
            return dist.new_group(list(ranks), self.timeout, "nccl", device_id=device)
        return dist.new_group(list(ranks), self.timeout, "gloo")

    def pair(self, ranks: Iterable[int]) -> Pair | None:
        """The pair over `ranks`, in whatever order; None where it was not created."""
        return self._pairs.get(tuple(sorted(ranks)))

    def close(self) -> None:
        """Destroys every group this rank is in."""
        for ranks, pair in self._pairs.items():
            if dist.get_rank() in ranks:
                dist.destroy_process_group(pair.device)
                dist.destroy_process_group(pair.cpu)
        self._pairs.clear()
