"""The runtime: this process as one rank of a mesh, and the groups it is in.

>>> from shardlib.mesh import Mesh
>>> with connect(Mesh(dp=1, tp=1), device="cpu") as runtime:
...     runtime.rank, runtime.coordinate, runtime.group(("tp",)).world_size
(0, {'dp': 0, 'tp': 0}, 1)

Without a launcher the mesh has one rank, and nothing of torch.distributed is started. Under torchrun `connect` joins the
other processes. Groups are made before they are used, by every rank, with the same list:

    with connect(Mesh(dp=2, tp=2)) as runtime:                  # torchrun --nproc-per-node 4
        runtime.create_groups([("tp",), ("dp", "tp")])
        y = runtime.group(("tp",)).all_reduce(x)

Refused with a `SpecError`, on every rank alike and before any group is made: a mesh of another size than the job, more
processes on a host than it has GPUs, axes that the mesh lacks.
"""
from __future__ import annotations

from datetime import timedelta
from typing import Iterable, Sequence

import torch
import torch.distributed as dist

from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Factory, Place
from shardlib.distributed.communicators.shared_memory import shared_memory
from shardlib.distributed.communicators.torch_distributed import TorchDistributed
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.launch import Launch
from shardlib.distributed.message_queue import MessageQueue
from shardlib.distributed.process_groups import ProcessGroups
from shardlib.distributed.routing import UNMEASURED, Table, find_table
from shardlib.distributed.topology import hosts, identity
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

TIMEOUT_S = 60.0
"""Seconds that a collective waits for a peer before it raises."""


def connect(mesh: Mesh, device: str | torch.device | None = None, timeout_s: float = TIMEOUT_S, *,
            communicators: Sequence[Factory] = (), deterministic: bool = False) -> Runtime:
    """This process's place on `mesh`, on "cpu" or "cuda" (GPU number LOCAL_RANK); by default on cuda where it can be.

    communicators: makers of further communicators beside shared memory, on the CPU, and torch.distributed, which takes every call
    that no other takes.
    deterministic: reduce only with communicators that add up in rank order, rounding once.
    """
    launch = Launch.current()
    launch.check(mesh)
    chosen = _device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout = timedelta(seconds=timeout_s)
    joins = launch.launched and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo", init_method="env://", timeout=timeout)
    built_in = (shared_memory,) if chosen.type == "cpu" else ()
    return Runtime(mesh, launch, chosen, timeout, joins, (*communicators, *built_in), deterministic)


_SHARED: dict[Mesh, Runtime] = {}


def shared_runtime(mesh: Mesh) -> Runtime:
    """The runtime on `mesh` of everything in this process that was given none of its own; made at the first call."""
    if mesh not in _SHARED or _SHARED[mesh].closed:
        _SHARED[mesh] = connect(mesh)
    return _SHARED[mesh]


class Runtime:
    """One rank of `mesh` on `device`. Made by `connect`; a context manager that closes itself."""

    def __init__(self, mesh: Mesh, launch: Launch, device: torch.device, timeout: timedelta, owns_torch: bool,
                 factories: Sequence[Factory] = (), deterministic: bool = False) -> None:
        self.mesh, self.device, self.rank, self.local_rank = mesh, device, launch.rank, launch.local_rank
        self.coordinate = mesh.coordinate(self.rank)
        self.hosts, self.table = (0,), UNMEASURED
        self._owns_torch, self._closed = owns_torch, False
        self._timeout, self._factories, self._deterministic = timeout, tuple(factories), deterministic
        self._job: Place | None = None
        self._process_groups = ProcessGroups(device, timeout)
        self._coordinators: dict[tuple[str, ...], GroupCoordinator] = {}
        self._places: dict[tuple[str, ...], Place] = {}

    def create_groups(self, products: Iterable[Sequence[str]]) -> None:
        """Makes the group over each product of axes, for all ranks of the mesh. Every rank passes the same products."""
        wanted = [self._expand(axes) for axes in products]
        self._meet()
        self._process_groups.create(self.mesh.group(axes, rank) for axes in wanted for rank in range(self.mesh.world_size))
        for axes in wanted:
            self.group(axes)

    def _meet(self) -> None:
        """Once, on all ranks: who is on which host, and the routing table, which is rank 0's."""
        if self._job is not None or self.mesh.world_size == 1:
            return
        everyone = tuple(range(self.mesh.world_size))
        group = dist.new_group(list(everyone), self._timeout, "gloo")
        control = TorchDistributed(group, everyone, self.rank)
        self._job = Place("job", everyone, self.rank, (0,) * len(everyone), torch.device("cpu"), group, group,
                          self._timeout.total_seconds(), control)
        table, wrong = self._find_table() if self.rank == 0 else (b"", None)
        met = self._job.share([identity(), table, wrong])
        if met[0][2] is not None:
            raise SpecError(met[0][2])
        self.hosts, self.table = hosts([host for host, _, _ in met]), Table.decode(met[0][1], "of rank 0")

    def _find_table(self) -> tuple[bytes, str | None]:
        try:
            return find_table(self.device).encode(), None
        except SpecError as error:
            return b"", str(error)

    def group(self, axes: Sequence[str]) -> GroupCoordinator:
        """The group of ranks that differ from this one only along `axes`, the last running fastest."""
        axes = tuple(axes)
        return self._coordinators.get(axes) or self._coordinator(axes)

    def open_queue(self, axes: Sequence[str]) -> MessageQueue | None:
        """The queue from the first member of a group to the others, which then carries its messages from there; None in a group of one.

        All members call it. Worth while where messages are many: one alone is sooner sent than a queue is made.
        """
        group = self.group(axes)
        if group.world_size > 1 and group.queue is None:
            group.queue = MessageQueue(self._places[self._expand(axes)])
        return group.queue

    def _coordinator(self, axes: tuple[str, ...]) -> GroupCoordinator:
        expanded = self._expand(axes)
        if expanded not in self._coordinators:
            self._coordinators[expanded] = self._new_coordinator(expanded)
        self._coordinators[axes] = self._coordinators[expanded]
        return self._coordinators[axes]

    def _new_coordinator(self, axes: tuple[str, ...]) -> GroupCoordinator:
        name, ranks = "/".join(axes) or "()", self.mesh.group(axes, self.rank)
        place = (name, ranks, self.rank, self.local_rank, self.device)
        if len(ranks) == 1:
            return GroupCoordinator(*place, (Alone(),), Alone())
        pair = self._process_groups.pair(ranks)
        if pair is None:
            raise SpecError(f"group {name} does not exist yet; call create_groups([{axes!r}]) on every rank first")
        data, control = (TorchDistributed(group, ranks, self.rank) for group in (pair.device, pair.cpu))
        where = Place(name, ranks, self.rank, tuple(self.hosts[r] for r in ranks), self.device, pair.device, pair.cpu,
                      self._timeout.total_seconds(), control)
        self._places[axes] = where
        made = {factory.__name__: factory(where) for factory in self._factories}
        more = [c for c in made.values() if not isinstance(c, str)]
        return GroupCoordinator(*place, (*more, data, control), control, pair.device, pair.cpu, table=self.table,
                                deterministic=self._deterministic, declined={n: c for n, c in made.items() if isinstance(c, str)})

    def _expand(self, axes: Sequence[str]) -> tuple[str, ...]:
        if self._closed:
            raise SpecError("the runtime is closed; connect again")
        expanded = self.mesh.expand(axes, "group")
        if len(set(expanded)) != len(expanded):
            raise SpecError(f"group {'/'.join(expanded)}: an axis is named twice")
        return expanded

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Destroys the groups, and torch.distributed where `connect` started it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for coordinator in self._coordinators.values():
            coordinator.destroy()
        self._process_groups.close()
        if self._owns_torch:
            dist.destroy_process_group()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device(device: str | torch.device | None, launch: Launch) -> torch.device:
    gpus, needed = torch.cuda.device_count(), launch.local_world_size
    if device is None:
        device = "cuda" if gpus >= needed else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f'device {device}: a runtime runs on "cpu" or "cuda"')
    if device.type == "cpu" or device.index is not None:
        return device
    if gpus < needed:
        raise SpecError(f'device cuda takes one GPU per process; GPUs on this host: {gpus}, processes: {needed}; '
                        f'start fewer with torchrun --nproc-per-node, or pass device="cpu"')
    return torch.device("cuda", launch.local_rank)
