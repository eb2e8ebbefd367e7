"""The stream on which this process captures CUDA graphs: one for each device, whichever groups a graph calls.

Communicators take a capture as they take eager calls, and need no word of it: their memory is their own from
the start, so that nothing is registered, or exchanged between members, when a capture ends. What depends on
the stream is what they, and cuBLAS, keep for each that calls: NVLink has channels for two streams, one that
calls eagerly and one that captures. With this one stream they suffice for any number of graphs, and a warm-up
on it leaves nothing to be made in the capture itself.

torch.cuda.graph has a stream of its own for this, which nobody can warm up: it exists from the first capture
on.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from weakref import WeakSet

import torch


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Made at the first call, and the same ever after."""
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """The stream is the current one within; it begins after, and ends before,
    what the one around it has and will have to do."""
    stream, around = capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(around)
    with torch.cuda.stream(stream):
        yield stream
    around.wait_stream(stream)


_CHAINED = ContextVar("_CHAINED", default=False)


@contextmanager
def chained() -> Iterator[None]:
    """Within, kernels may be launched before what comes before them on the stream has ended: those that wait
    for its end themselves, before they read or write anything. While they wait, they hold a place on the GPU;
    so what is captured here runs beside nothing else that waits for other ranks."""
    token = _CHAINED.set(True)
    try:
        yield
    finally:
        _CHAINED.reset(token)


def is_chained(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so."""
    return _CHAINED.get() and _waits(device)


@cache
def _waits(device: torch.device) -> bool:
    """Whether its kernels can wait for the end of the one before: Hopper's and later ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_POOLS: dict[torch.device, tuple[tuple[int, int], WeakSet]] = {}


def new_graph(device: torch.device) -> tuple[torch.cuda.CUDAGraph, tuple[int, int]]:
    """A graph, and the memory pool that it shares with all others that live:
    they are replayed one after another."""
    pool, graphs = _POOLS.get(device, (None, ()))
    if not graphs:  # torch lets a pool go with the last of its graphs, for good
        pool, graphs = _POOLS[device] = torch.cuda.graph_pool_handle(), WeakSet()
    graphs.add(made := torch.cuda.CUDAGraph())
    return made, pool
