"""What the launcher says of this process: torchrun's environment variables, those of srun or mpirun in its
words (`launchers`), or their absence.

>>> Launch.from_environment({})
Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, launched=False)
>>> Launch.from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).rank
1
"""
from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch.distributed as dist

from shardlib.distributed.launchers import TORCHRUN, in_torchruns_words, launcher
from shardlib.distributed.meeting import meet
from shardlib.distributed.rank_error import RankError
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

ON_DEMAND = "TORCH_GLOO_LAZY_INIT"
"""torch's variable by which gloo connects two ranks when they first have something to tell each other."""


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together; `local` counts those on its own host."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    by: tuple[str, str] = field(default=TORCHRUN, compare=False, repr=False)    # as `launcher` has it

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """The Launch that the launcher's variables write; one process alone where none says a rank."""
        environment = {**environment, **in_torchruns_words(environment)}
        if "RANK" not in environment:
            return cls()
        world_size = _number(environment, "WORLD_SIZE", 1)
        rank = _number(environment, "RANK", 0, world_size - 1)
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
        return cls(rank, world_size, _number(environment, "LOCAL_RANK", 0, local_world_size - 1,
                                             default=rank), local_world_size, True, launcher(environment))

    @classmethod
    def current(cls) -> Launch:
        """The Launch of this process; torch.distributed, where somebody has initialised it,
        overrules the environment."""
        launch = cls.from_environment(os.environ)
        if not dist.is_initialized():
            return launch
        if launch.world_size == dist.get_world_size():
            return replace(launch, rank=dist.get_rank(), launched=True)
        return cls(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(),
                   launched=True)

    def check(self, mesh: Mesh) -> None:
        """SpecError, the same on every rank, unless there are as many processes as `mesh` has ranks."""
        if self.world_size == mesh.world_size:
            return
        name, number = self.by
        started = (f"{name} started {_count(self.world_size, 'process', 'processes')}" if self.launched
                   else "this process was started without torchrun")
        raise SpecError(
            f"mesh {str(mesh) or '()'} has {_count(mesh.world_size, 'rank', 'ranks')}, but {started}; "
            f"start {name} {number} {mesh.world_size}, or change the mesh")


def join_job(timeout: timedelta) -> None:
    """Starts torch.distributed with the other processes of the launch, over gloo. RuntimeError where some do
    not come within `timeout`, SpecError where MASTER_ADDR or MASTER_PORT cannot be.

    The group of all ranks is connected on demand: nothing here uses it, and else each rank would read every
    other one's address and hold a socket to it.
    """
    os.environ.update(in_torchruns_words(os.environ))       # torch reads its own words there
    store, rank, world_size = _store(os.environ, timeout)
    name = meet(store, rank, world_size, timeout.total_seconds())
    undecided = ON_DEMAND not in os.environ
    os.environ.setdefault(ON_DEMAND, "1")
    try:
        dist.init_process_group("gloo", store=dist.PrefixStore(f"shardlib/{name}", store), rank=rank,
                                world_size=world_size, timeout=timeout)
    finally:
        if undecided:
            del os.environ[ON_DEMAND]


def _store(environment: Mapping[str, str], timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store that rank 0 keeps at MASTER_ADDR and MASTER_PORT, the rank, and the number of ranks."""
    host = environment.get("MASTER_ADDR", "")
    if not host:
        raise SpecError(_half("MASTER_ADDR", host))
    port = _number(environment, "MASTER_PORT", 1, 65535)
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError, OSError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        if unknown := _unknown(host):
            raise SpecError(f"MASTER_ADDR is {host!r}, which is no host: {unknown}") from error
        raise RankError(f"connect: the ranks have not met at MASTER_ADDR={host}, MASTER_PORT={port}: "
                        f"{said}") from error


def _unknown(host: str) -> str | None:
    """Why a name is no host's.

    It is asked only after a while in vain: where hosts come up together a name may be late.
    """
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None,
            default: int | None = None) -> int:
    """What a variable says, a number from `least` to `most`;
    `default`, which is not looked at, where it is not set."""
    text = environment.get(name, "")
    if name not in environment and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise SpecError(_half(name, text))
    if int(text) < least or most is not None and int(text) > most:
        allowed = f"from {least} to {most}" if most is not None and most != least else least
        allowed = f"{least} or more" if most is None else allowed
        raise SpecError(f"{name} is {text!r}; it is {allowed}")
    return int(text)


def _half(name: str, text: str) -> str:
    return f"RANK is set, but {name} is {text!r}; start with torchrun, or unset RANK"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
