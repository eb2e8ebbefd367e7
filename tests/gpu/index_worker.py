"""One rank of test_index_check: rank 1 alone has a label that does not exist; its process lives on.

    torchrun --nproc-per-node 2 tests/gpu/index_worker.py
"""
from __future__ import annotations

import time

import torch

from shardlib import Mesh, SpecError, compile, sharded
from shardlib.distributed import connect
from shardlib.ops import cross_entropy


@sharded("M/tp N, M/tp -> M/1")
def losses(x, labels):
    return cross_entropy("M/tp N, M/tp -> M/tp", x, labels)


with connect(Mesh(tp=2), "cuda") as runtime:
    program, x = compile(losses, runtime=runtime, sizes={"M": 4}), torch.zeros(2, 5, device=runtime.device)
    labels = torch.tensor([0, 1], device=runtime.device)
    assert torch.allclose(program(x, labels), torch.full((4,), 5.0, device=runtime.device).log())
    labels[1] = 7 if runtime.rank == 1 else 2
    found = program(x, labels)
    assert found.tolist()[3] == 0, found  # the row counts for nothing on any rank, and all have come this far
    try:
        program(x, labels).tolist()
    except SpecError as error:
        print(f"rank {runtime.rank} has raised {error}", flush=True)
        time.sleep(3600)
