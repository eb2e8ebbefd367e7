"""One rank of test_surroundings: collectives in a thread, whose current GPU is number 0,
and in contexts that change what tensors are.

    torchrun --nproc-per-node 2 tests/gpu/surroundings_worker.py
"""
from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Thread

import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from conformance import check, fixed_cases, only, quad_cases
from scenarios import CONTEXTS, Within

from shardlib import Mesh
from shardlib.distributed import connect
from shardlib.distributed.communicators.nccl import nccl
from shardlib.errors import SpecError
from shardlib.ops.nvlink import nvlink

mesh = Mesh(tp=int(os.environ["WORLD_SIZE"]))
found: list[str] = []
ran: dict[str, int] = {}


def calls() -> None:
    """Every fifth case in each context, by each communicator that takes it."""
    torch.zeros(1, device="cuda:0")  # with a context there, the thread's current GPU stays number 0
    assert torch.cuda.current_device() == 0
    for communicator in whole.communicators[:-1]:       # the last is the control group's
        group = only(communicator.name, whole)
        x = torch.zeros(4096, device=group.device)
        with torch.cuda.device(group.device):
            torch.cuda._sleep(100_000_000)
            x += 1
        found.extend([] if (group.all_reduce(x) == group.world_size).all()
                     else [f"{communicator.name} does not wait for what its GPU has to do"])
        for case in (quad_cases(("tp",), mesh.world_size) + fixed_cases(("tp",), mesh.world_size))[::5]:
            for context, make in CONTEXTS.items():
                try:
                    found.extend(f"{communicator.name}, {context}: {case}: {text}"
                                 for text in check(case, Within(group, make)))
                    ran[communicator.name] = ran.get(communicator.name, 0) + 1
                except SpecError:                       # it does not take the call
                    pass
    found.append("end")


with connect(mesh, communicators=(nvlink, nccl)) as runtime:
    with CONTEXTS["meta"](), CONTEXTS["inference"]():
        runtime.create_groups([("tp",)])
    whole = runtime.group(("tp",))
    assert "nvlink" not in whole.router.declined, whole.router.declined
    thread = Thread(target=calls)
    thread.start()
    thread.join()
    print(*found[:10], sep="\n", file=sys.stderr)
    assert (found == ["end"] and len(ran) == len(whole.communicators) - 1
            and min(ran.values()) > 100), (ran, len(found))
