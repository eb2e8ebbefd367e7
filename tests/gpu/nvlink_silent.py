"""One rank of test_nvlink's report: rank 1 never comes to an all_reduce, an all_gather,
or an all_reduce out of a CUDA graph.

    torchrun --nproc-per-node 2 tests/gpu/nvlink_silent.py all_reduce 4096
"""
from __future__ import annotations

import sys
import time

import torch

from shardlib import Mesh
from shardlib.distributed import connect
from shardlib.distributed.routing import UNMEASURED
from shardlib.ops.nvlink import nvlink

what, count = sys.argv[1], int(sys.argv[2])
with connect(Mesh(tp=2), "cuda", timeout_s=10.0, communicators=(nvlink,)) as runtime:
    runtime.create_groups([("tp",)])
    group, x = runtime.group(("tp",)), torch.ones(count, device=runtime.device)
    group.router.use(UNMEASURED)

    def call() -> torch.Tensor:
        return group.all_reduce(x) if what == "all_reduce" else group.all_gather(x, 0, (count, count))
    call().sum().item()
    if what == "graph":
        with group.graph_capture() as stream:
            for size in (64, count):
                group.all_reduce(x[:size])
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=stream):
                for size in (64, count):
                    group.all_reduce(x[:size])
    if runtime.rank == 1:
        time.sleep(3600)
    graph.replay() if what == "graph" else call()
    torch.cuda.synchronize()
