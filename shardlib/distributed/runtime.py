"""The runtime: this process as one rank of a mesh, and the groups it is in.

>>> from shardlib.mesh import Mesh
>>> with connect(Mesh(dp=1, tp=1), device="cpu") as runtime:
...     runtime.rank, runtime.coordinate, runtime.group(("tp",)).world_size
(0, {'dp': 0, 'tp': 0}, 1)

Without a launcher the mesh has one rank, and nothing of torch.distributed is started. Under torchrun
`connect` joins the other processes. Groups are made before they are used, by every rank, with the same list:

    with connect(Mesh(dp=2, tp=2)) as runtime:                  # torchrun --nproc-per-node 4
        runtime.create_groups([("tp",), ("dp", "tp")])
        y = runtime.group(("tp",)).all_reduce(x)

Refused with a `SpecError`, on every rank alike and before any group is made: a mesh of another size than the
job, more processes on a host than it has GPUs, axes that the mesh lacks.
"""
from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import entry_points
from threading import get_ident
from typing import Any
from weakref import WeakSet

import msgspec
import torch
import torch.distributed as dist

from shardlib.distributed.agreement import different_plans
from shardlib.distributed.board import own_connection
from shardlib.distributed.channels import Channels, Lanes, Parcel
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Factory, Place
from shardlib.distributed.communicators.shared_memory import shared_memory
from shardlib.distributed.communicators.torch_distributed import TorchDistributed
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.job import Job
from shardlib.distributed.launch import Launch, join_job
from shardlib.distributed.message_queue import MessageQueue
from shardlib.distributed.process_groups import ProcessGroups
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.routing import UNMEASURED, Table, find_table
from shardlib.distributed.topology import hosts, identity
from shardlib.distributed.watch import Watch
from shardlib.distributed.watchdog import Watchdog
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

TIMEOUT_S = 60.0
"""Seconds after which a job that waits for one of its ranks has ended, and said for which: see `watchdog`."""


def connect(mesh: Mesh, device: str | torch.device | None = None, timeout_s: float | None = None, *,
            communicators: Sequence[Factory] = (), deterministic: bool = False, check: bool | None = None,
            table: Table = UNMEASURED) -> Runtime:
    """This process's place on `mesh`, on "cpu" or "cuda" (GPU number LOCAL_RANK);
    by default on cuda where it can be.

    >>> with connect(Mesh(tp=1), "cpu") as here:
    ...     here.rank, here.coordinate
    (0, {'tp': 0})

    communicators: makers of further communicators beside shared memory, on the CPU, and torch.distributed,
    which takes every call that no other takes.
    deterministic: reduce only with communicators that add up in rank order, rounding once.
    timeout_s: from 1 to 1e9, by default the environment's SHARDLIB_TIMEOUT_S, else TIMEOUT_S.
    check: debug mode, in which the members of a group compare each collective before it runs; by default if
    SHARDLIB_CHECK is 1.
    table: rank 0's routes the calls of all; by default the one that `find_table` finds there.
    """
    asked = (("SHARDLIB_TIMEOUT_S", os.environ.get("SHARDLIB_TIMEOUT_S", TIMEOUT_S)) if timeout_s is None
             else ("connect: timeout_s", timeout_s))
    timeout = timedelta(seconds=_seconds(*asked))
    launch = Launch.current()
    launch.check(mesh)
    chosen = _device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joins = launch.launched and not dist.is_initialized()
    if joins:
        join_job(timeout)
    built_in = (shared_memory,) if chosen.type == "cpu" else _installed()
    runtime = Runtime(mesh, launch, chosen, timeout, joins, (*communicators, *built_in), deterministic,
                      os.environ.get("SHARDLIB_CHECK") == "1" if check is None else check)
    runtime.table = table
    return runtime


def _seconds(name: str, given: str | float) -> float:
    """What is `given` under `name`, as seconds that a job may wait; SpecError for anything else."""
    try:
        seconds = float(given)
    except (TypeError, ValueError, OverflowError):
        raise SpecError(f"{name} is {given!r}; it is a number of seconds") from None
    if not 1 <= seconds <= 1e9:
        raise SpecError(f"{name} is {given!r}; it is a number of seconds from 1 to 1e9")
    return seconds


def _installed() -> tuple[Factory, ...]:
    """The makers of communicators for GPUs that installed packages offer, by name."""
    return tuple(e.load() for e in sorted(entry_points(group="shardlib.communicators"), key=lambda e: e.name))


_SHARED: dict[Mesh, Runtime] = {}
_OPEN: set[Runtime] = set()
"""Those over torch.distributed that this process has not closed. The last one ends it,
where `connect` has started it."""


def shared_runtime(mesh: Mesh) -> Runtime:
    """The runtime on `mesh` of everything in this process that was given none of its own;
    made at the first call."""
    if mesh not in _SHARED or _SHARED[mesh].closed:
        _SHARED[mesh] = connect(mesh)
    return _SHARED[mesh]


class Runtime:
    """One rank of `mesh` on `device`. Made by `connect`; a context manager that closes itself."""

    owns_torch = False
    """Whether `connect` has started torch.distributed."""

    def __init__(self, mesh: Mesh, launch: Launch, device: torch.device, timeout: timedelta, owns_torch: bool,
                 factories: Sequence[Factory] = (), deterministic: bool = False, check: bool = False) -> None:
        self.mesh, self.device, self.rank, self.local_rank = mesh, device, launch.rank, launch.local_rank
        self.coordinate = mesh.coordinate(self.rank)
        self.table = UNMEASURED
        self._closed = self._met = False
        Runtime.owns_torch |= owns_torch
        self._timeout, self._factories, self._deterministic, self._check = (timeout, tuple(factories),
                                                                            deterministic, check)
        world = mesh.world_size
        self._job = (Job(dist.distributed_c10d._get_default_store(), self.rank, world) if world > 1 else None)
        self._process_groups = ProcessGroups(device, timeout, self._job.number if self._job else 0)
        self._coordinators: dict[tuple[str, ...], GroupCoordinator] = {}
        self._places: dict[tuple[str, ...], Place] = {}
        self._graphs: WeakSet[Any] = WeakSet()
        self._watchdog = self._start_watchdog() if world > 1 else None
        self._seat = self._watchdog.watch.seat("job", range(world)) if self._watchdog else None
        if dist.is_initialized():
            _OPEN.add(self)

    def _start_watchdog(self) -> Watchdog:
        """Over a connection of its own to the store of torch.distributed;
        each runtime of a process has keys of its own there."""
        atexit.register(self._stop_watchdog)
        store = dist.PrefixStore(f"shardlib/watchdog {self._job.number}",
                                 own_connection(dist.distributed_c10d._get_default_store(),
                                                self._timeout.total_seconds() / 4))
        return Watchdog(Watch(), store, self.rank, self.mesh.world_size, self._timeout.total_seconds(),
                        self.device)

    def _stop_watchdog(self, error: BaseException | None = None) -> None:
        """What other ranks learn of how this one has left;
        at the end of the process, whether an exception ended it."""
        error = error or (None if self._closed else getattr(sys, "last_value", None))
        atexit.unregister(self._stop_watchdog)
        if self._watchdog:
            self._watchdog.stop(_parting(error) if error else "has closed its runtime" if self._closed
                                else "has ended")

    def end_others(self, error: BaseException) -> None:
        """The other ranks end at once with the first line of `error`,
        which this one is about to raise and they cannot know of."""
        if self._watchdog is not None:
            self._watchdog.end_others(_parting(error))

    def _together(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """`call(*args)`, which all ranks of the job make, under the watchdog as `what`."""
        if self._watchdog is None:
            return call(*args)
        watch = self._watchdog.watch
        outer = watch.mine
        watch.begin(self._seat, what)
        try:
            return call(*args)
        except RuntimeError as error:
            raise self._watchdog.failed(error) from error
        finally:
            watch.end()
            if outer is not None:
                watch.calls[get_ident()] = outer

    def create_groups(self, products: Iterable[Sequence[str]]) -> None:
        """Makes the group over each product of axes, with the other members of this rank's.

        Every rank passes the same products; it waits for those that are in groups with it.
        """
        wanted = [self._expand(axes) for axes in products]
        self._meet()
        self._together("make groups", self._create_groups, wanted)

    def _create_groups(self, wanted: Sequence[tuple[str, ...]]) -> None:
        ranks = range(self.mesh.world_size) if self._process_groups.split else (self.rank,)
        self._process_groups.create(self.mesh.group(axes, rank) for axes in wanted for rank in ranks)
        for axes in wanted:
            self.group(axes)

    def replays(self, title: str, graph: Any) -> Callable[[Callable[[], bool]], None]:
        """What tells the watchdog of each replay of the captured step `title`, before its launch,
        and when it is over.

        `graph.close()` is called before the groups are destroyed: NCCL waits for graphs that hold its calls.
        """
        self._graphs.add(graph)
        if self._watchdog is None:
            return lambda passed: None
        watch, seat = self._watchdog.watch, self._watchdog.watch.replays(title, range(self.mesh.world_size))
        seat.communicators = [c for group in dict.fromkeys(self._coordinators.values())
                              for c in group.communicators]
        return lambda passed: watch.launch(seat, passed)

    def compare_plans(self, title: str, plan: str) -> None:
        """SpecError, the same on all ranks, unless all of them come here with the text `plan`.

        Every rank calls it.
        """
        if self._job is None:
            return
        self._meet()
        wrong = self._together(f"compare plans of {title}", self._job.differ, plan,
                               lambda plans: different_plans(title, plans))
        if wrong:
            raise SpecError(wrong)

    def _meet(self) -> None:
        """Once, on all ranks: the routing table, which is rank 0's."""
        if not self._met and self._job is not None:
            self._together("meet", self._take_table, self._job)
            self._met = True

    def _take_table(self, job: Job) -> None:
        said = job.from_first(lambda: msgspec.msgpack.encode(self._find_table()))
        table, wrong = msgspec.msgpack.decode(said, type=tuple[bytes, str | None])
        if wrong is not None:
            raise SpecError(wrong)
        self.table = Table.decode(table, "of rank 0")

    def _find_table(self) -> tuple[bytes, str | None]:
        """The routing table, or why there is none: whatever it is, the others wait to be told."""
        try:
            return (find_table(self.device) if self.table == UNMEASURED else self.table).encode(), None
        except Exception as error:
            text = (str(error) if isinstance(error, SpecError)
                    else f"the routing table was not found: {type(error).__name__}: {error}")
            return b"", text.encode(errors="backslashreplace").decode()

    def group(self, axes: Sequence[str]) -> GroupCoordinator:
        """The group of ranks that differ from this one only along `axes`, the last running fastest."""
        axes = tuple(axes)
        return self._coordinators.get(axes) or self._coordinator(axes)

    def open_queue(self, axes: Sequence[str]) -> MessageQueue | None:
        """The queue from the first member of a group to the others,
        which then carries its messages from there; None in a group of one.

        All members call it. Worth while where messages are many: one alone is sooner sent than a queue is
        made.
        """
        group = self.group(axes)
        group.check_open("open_queue")
        if group.world_size > 1 and (group.queue is None or group.queue.closed):
            group.queue = MessageQueue(self._places[self._expand(axes)])
        return group.queue

    def open_channels(self, axes: Sequence[str], ends: Mapping[Hashable, tuple[int, int]],
                      order: Mapping[Hashable, Sequence[Parcel]] | None) -> Channels:
        """Channels between members of a group, each from one to another; see `channels`. All members of all
        groups over `axes` call it, with the same ends; `order` is of those of this one, None for `Lanes`."""
        group, every = self.group(axes), self._process_groups.split
        group.check_open("open_channels")
        where = [group.ranks] if not every else list(dict.fromkeys(
            self.mesh.group(axes, rank) for rank in range(self.mesh.world_size)))
        ways = {}
        for ranks in where:
            for name, (a, b) in ends.items():
                both = ranks[a], ranks[b]
                if self.rank in both or every:
                    made = self._together(f"make channel {name}", self._process_groups.channel, name, both)
                    if self.rank in both:
                        ways[name] = TorchDistributed(made, both, self.rank)
        channels = Lanes(group, ways) if order is None else Channels(group, ways, order)
        if group._seat is not None:
            group._seat.communicators = (*group._seat.communicators, channels)
        return channels

    def _coordinator(self, axes: tuple[str, ...]) -> GroupCoordinator:
        expanded = self._expand(axes)
        if expanded not in self._coordinators:
            self._coordinators[expanded] = self._new_coordinator(expanded)
        self._coordinators[axes] = self._coordinators[expanded]
        return self._coordinators[axes]

    @torch.inference_mode(False)                        # what communicators allocate is for calls in any mode
    def _new_coordinator(self, axes: tuple[str, ...]) -> GroupCoordinator:
        name, ranks = "/".join(axes) or "()", self.mesh.group(axes, self.rank)
        place = (name, ranks, self.rank, self.local_rank, self.device)
        if len(ranks) == 1:
            return GroupCoordinator(*place, (Alone(),), Alone())
        pair = self._process_groups.pair(ranks)
        if pair is None:
            raise SpecError(
                f"group {name} does not exist yet; call create_groups([{axes!r}]) on every rank first")
        data, control = (TorchDistributed(group, ranks, self.rank) for group in (pair.device, pair.cpu))
        where = Place(name, ranks, self.rank, (), self.device, pair.device, pair.cpu,
                      self._timeout.total_seconds(), control)
        where = self._places[axes] = replace(where, hosts=hosts(where.share(identity())))
        made = [(getattr(factory, "__name__", repr(factory)), factory(where))
                for factory in dict.fromkeys(self._factories)]
        more = [c for _, c in made if not isinstance(c, str)]
        return GroupCoordinator(*place, (*more, data, control), control, pair.device, pair.cpu,
                                table=self.table, deterministic=self._deterministic,
                                declined={n: c for n, c in made if isinstance(c, str)},
                                watchdog=self._watchdog, check=where if self._check else None)

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
        """Destroys the groups, and torch.distributed where `connect` started it.

        A second call does nothing.
        """
        if self._closed:
            return
        self._closed = True
        self._stop_watchdog()
        for graph in tuple(self._graphs):
            graph.close()
        for coordinator in self._coordinators.values():
            coordinator.destroy()
        self._process_groups.close()
        _OPEN.discard(self)
        if Runtime.owns_torch and not _OPEN:
            Runtime.owns_torch = False
            dist.destroy_process_group()

    def _forked(self) -> None:
        """In a child of this process: what it closes, or says, would be the parent's."""
        atexit.unregister(self._stop_watchdog)
        self._closed = True
        for coordinator in self._coordinators.values():
            coordinator.disown()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._stop_watchdog(error)
        self.close()


def _parting(error: BaseException) -> str:
    """How a process left that ends with `error`; a `RankError` has been told."""
    if isinstance(error, RankError):
        return ""
    if isinstance(error, SystemExit) and not error.code:
        return "has ended"
    try:
        return f"has raised {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    except Exception:                                       # no text, or one that cannot be had
        return f"has raised {type(error).__name__}"


os.register_at_fork(after_in_child=lambda: [runtime._forked() for runtime in tuple(_OPEN)])


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
        raise SpecError(
            f'device cuda takes one GPU per process; GPUs on this host: {gpus}, processes: {needed}; '
            f'start fewer with torchrun --nproc-per-node, or pass device="cpu"')
    return torch.device("cuda", launch.local_rank)
