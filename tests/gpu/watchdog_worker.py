"""One rank of test_watchdog: rank 1 never comes to a collective that rank 0 has queued on its GPU;
rank 0 waits for the result.

    torchrun --nproc-per-node 2 tests/gpu/watchdog_worker.py default
    # or side: on a stream that the default stream does not wait for
"""
from __future__ import annotations

import sys
import time

import torch

from shardlib import Mesh
from shardlib.distributed import connect

with connect(Mesh(tp=2), "cuda", timeout_s=10.0) as runtime:
    runtime.create_groups([("tp",)])
    group = runtime.group(("tp",))
    group.all_reduce(torch.ones(4, device=runtime.device)).sum().item()
    graph, x = torch.cuda.CUDAGraph(), torch.ones(4, device=runtime.device)
    with torch.cuda.graph(graph):           # the watchdog leaves a capture alone
        y = x + 1
        time.sleep(6.0)
    graph.replay()
    if runtime.rank == 1:
        time.sleep(3600)
    stream = torch.cuda.Stream() if sys.argv[1] == "side" else torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        total = group.all_reduce(x, at="step 1 of f, model.py:2: N +tp -> N").sum()
        print(f"rank {runtime.rank} has queued it", flush=True)
        print(total.item())
