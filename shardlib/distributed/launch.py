"""What the launcher says of this process: torchrun's environment variables, or their absence.

>>> Launch.from_environment({})
Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, launched=False)
>>> Launch.from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).rank
1
"""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Mapping

import torch.distributed as dist

from shardlib.errors import SpecError
from shardlib.mesh import Mesh


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together; `local` counts those on its own host."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """The Launch that torchrun's variables write; one process alone where RANK is missing."""
        if "RANK" not in environment:
            return cls()
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        return cls(rank, world_size, _number(environment, "LOCAL_RANK", rank),
                   _number(environment, "LOCAL_WORLD_SIZE", world_size), launched=True)

    @classmethod
    def current(cls) -> Launch:
        """The Launch of this process; torch.distributed, where somebody has initialised it, overrules the environment."""
        launch = cls.from_environment(os.environ)
        if not dist.is_initialized():
            return launch
        if launch.world_size == dist.get_world_size():
            return replace(launch, rank=dist.get_rank(), launched=True)
        return cls(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(), launched=True)

    def check(self, mesh: Mesh) -> None:
        """SpecError, the same on every rank, unless there are as many processes as `mesh` has ranks."""
        if self.world_size == mesh.world_size:
            return
        started = (f"torchrun started {_count(self.world_size, 'process', 'processes')}" if self.launched
                   else "this process was started without torchrun")
        raise SpecError(f"mesh {str(mesh) or '()'} has {_count(mesh.world_size, 'rank', 'ranks')}, but {started}; "
                        f"start torchrun --nproc-per-node {mesh.world_size}, or change the mesh")


def join_job(timeout: timedelta) -> None:
    """Starts torch.distributed with the other processes of the launch, over gloo.

    All attempts of torchrun's elastic agent, and all runtimes of a process one after another, use one store. Each gets a prefix of
    its own there: otherwise a process reads the addresses that processes of a dead attempt have left.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = f"shardlib/attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    number = store.add(f"{attempt}/joined by {rank}", 1)
    dist.init_process_group("gloo", store=dist.PrefixStore(f"{attempt}/{number}", store), rank=rank, world_size=world_size, timeout=timeout)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise SpecError(f"RANK is set, but {name} is {text!r}; start with torchrun, or unset RANK")
    return int(text)


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
