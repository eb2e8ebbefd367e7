"""Timing on one GPU: µs a call of calls one after another in a CUDA graph, the median over replays."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 7


def graph_us(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Of each of these calls, which have weights or caches of their own, so that none finds its own in L2."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def read_bytes_per_us(nbytes: int = 2 << 30) -> float:
    """What this GPU reads by a sum of so much."""
    x = torch.ones(nbytes // 4, device="cuda")
    return nbytes / graph_us([x.sum] * 4)
