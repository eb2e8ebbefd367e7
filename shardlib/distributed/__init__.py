"""Running on ranks: processes, groups of them, and the collectives between them.

    runtime = connect(mesh)                     one process, or one of torchrun's
    runtime.create_groups([("dp",), ("tp",)])   on every rank
    runtime.group(("tp",)).all_reduce(x)        a GroupCoordinator

Imports go down: runtime -> group_coordinator -> communicators -> {flat, reduction}.
"""
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.runtime import Runtime, connect

__all__ = ["GroupCoordinator", "Runtime", "connect"]
