"""The process groups of one runtime: a pair for each set of ranks, made by its members alone.

A pair is a group for tensors on the device (NCCL, or gloo on CPU) and one for control traffic (gloo), so that
a message never waits behind, or slips between, collectives. torch sorts the ranks of a group; so do we, and
groups that differ only in the order of their members share a pair.

`torch.distributed.new_group` is a call of all ranks of the job: it names a group by how many this process has
made, and the members find each other in the store under that name. Our names say what all members know and
no other group shares: the number of the runtime (each rank counts its own, in the store, so that nobody reads
the addresses of one that it has closed), which of the pair it is, and the members. So ranks that are not in a
group have no part in it, nor wait for those that are.

One case remains a call of all. Where somebody has bound the default group to a GPU (`init_process_group` with
`device_id`), torch makes NCCL's groups by ncclCommSplit, in which every rank of the default group takes part.
Groups for control stay their members' own there: for a group of gloo, `new_group` takes part in a split
where a rank is no member, and in none where it is one, and they would wait for each other forever.
"""
from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclass(frozen=True)
class Pair:
    """Two process groups over the same ranks."""
    device: dist.ProcessGroup
    cpu: dist.ProcessGroup


class ProcessGroups:
    """Pairs by sorted ranks, of the runtime `number` of each of them. Members make a pair together."""

    def __init__(self, device: torch.device, timeout: timedelta, number: int) -> None:
        self.device, self.timeout, self.number = device, timeout, number
        self._pairs: dict[tuple[int, ...], Pair | None] = {}
        self._channels: dict[tuple[Hashable, tuple[int, ...]], dist.ProcessGroup] = {}

    @property
    def split(self) -> bool:
        """Whether all ranks make all groups of NCCL, in one order: see above."""
        return (self.device.type == "cuda" and dist.is_initialized()
                and distributed_c10d._get_default_group().bound_device_id is not None)

    def create(self, rank_sets: Iterable[Iterable[int]]) -> None:
        """Pairs for `rank_sets`; sets of one rank, and those that exist, cost nothing."""
        wanted = {tuple(sorted(ranks)) for ranks in rank_sets}
        for ranks in sorted(r for r in wanted if len(r) > 1 and r not in self._pairs):
            device = self._split_off(ranks) if self.split else self._new("device", ranks, self.device)
            self._pairs[ranks] = Pair(device, self._new("cpu", ranks, torch.device("cpu"))
                                      ) if dist.get_rank() in ranks else None

    def channel(self, name: Hashable, ranks: tuple[int, int]) -> dist.ProcessGroup:
        """The group of two of the channel `name` from the first of `ranks` to the second, for the device
        alone. Ranks make all channels they are in, and where groups are split off all there are, in one
        order."""
        key = name, ranks
        if key not in self._channels:
            pair = min(ranks), max(ranks)
            self._channels[key] = self._split_off(pair) if self.split else self._new(
                f"channel {name} {ranks[0]}", pair, self.device)
        return self._channels[key]

    def _new(self, half: str, ranks: tuple[int, ...], device: torch.device) -> dist.ProcessGroup:
        how = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        return _among(ranks, f"shardlib/{self.number}/{half} {_digest(ranks)}", self.timeout, *how)

    def _split_off(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        return dist.new_group(list(ranks), self.timeout, "nccl", device_id=self.device)

    def pair(self, ranks: Iterable[int]) -> Pair | None:
        """The pair over `ranks`, in whatever order; None where this rank made none, or is none of them."""
        return self._pairs.get(tuple(sorted(ranks)))

    def close(self) -> None:
        """Destroys every group this rank is in, in an order that all ranks have in common."""
        for group in self._channels.values():
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        self._channels.clear()
        for ranks, pair in sorted(self._pairs.items(), key=itemgetter(0)):
            if pair is not None:
                dist.destroy_process_group(pair.device)
                dist.destroy_process_group(pair.cpu)
        self._pairs.clear()


def _among(ranks: tuple[int, ...], name: str, timeout: timedelta, backend: str,
           device: torch.device | None) -> dist.ProcessGroup:
    """The group `name` of `ranks`, who all call this: `new_group`, but for where the name comes from."""
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks), ranks.index(dist.get_rank()), list(ranks), dist.Backend(backend),
        distributed_c10d._get_default_store(), name, timeout=timeout, device_id=device)
    distributed_c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group


def _digest(ranks: tuple[int, ...]) -> str:
    """As long for a thousand members as for two: it stands before each key of the group."""
    return hashlib.sha256(" ".join(map(str, ranks)).encode()).hexdigest()[:32]
