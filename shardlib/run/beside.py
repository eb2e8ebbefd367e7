"""Calls beside each other: while what one asks of other ranks is under way, another one computes.

    first, second = beside(runtime, step.requests(a, w), step.requests(b, w))

They take turns: a call runs up to its next collective, which leaves for a stream of its own, and the next
call runs. In its next turn it goes on, behind what has come of its collective. All they compute is on the
current stream in the order of the turns, and all that travels on the other one in the same order. So a later
call may read what an earlier one has written before its own collective of the same number; and ranks that
make the same calls issue the same collectives in the same order. In a CUDA graph the streams are branches.

What travels goes by a communicator that leaves most multiprocessors to others; a group that has none runs its
collectives in turn, as on the CPU. A call gives what it gives alone, but for how another communicator rounds.

>>> import torch
>>> from shardlib import Mesh, compile, connect, sharded
>>> @sharded("B -> B")
... def twice(x):
...     return 2 * x
>>> with connect(Mesh(), device="cpu") as runtime:
...     step = compile(twice, runtime=runtime)
...     beside(runtime, step.requests(torch.ones(1)), step.requests(torch.ones(2)))
[tensor([2.]), tensor([2., 2.])]
"""
from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from math import prod
from typing import Any

import torch

from shardlib.compiler.sizes import complete_sizes
from shardlib.distributed.aside import UnderWay, aside
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.runtime import Runtime
from shardlib.distributed.streams import side_stream
from shardlib.language.moves import axes_of
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.run.surroundings import without_autocast

Requests = Generator[tuple, Any, Any]


def beside(runtime: Runtime, *calls: Requests) -> list[Any]:
    """What each of the calls returns; see the module. All ranks make the same calls in the same order."""
    sent: dict[int, UnderWay] = {}
    made: dict[int, Any] = {}
    turns, lane = deque(range(len(calls))), _Lane(runtime)
    with without_autocast():
        while turns:
            i = turns.popleft()
            try:
                request = calls[i].send(sent.pop(i).arrived() if i in sent else None)
            except StopIteration as end:
                made[i] = end.value
                continue
            sent[i] = lane.send(request, f"call {i + 1} of {len(calls)} beside each other")
            turns.append(i)
    return [made[i] for i in range(len(calls))]


class _Lane:
    """Where collectives travel: on the side stream, without the communicators that fill the GPU."""

    def __init__(self, runtime: Runtime) -> None:
        self.device = runtime.device
        self.stream = side_stream(self.device) if self.device.type == "cuda" else None
        self.groups: dict[str, GroupCoordinator | None] = {}

    def send(self, request: tuple, at: str) -> UnderWay:
        group, method, operand, *more = request
        if group.name not in self.groups:
            self.groups[group.name] = aside(group) if self.stream else None
        other = self.groups[group.name]
        if other is None or self.stream is None:
            return UnderWay(operand, getattr(group, method)(operand, *more, at=at), None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            given = getattr(other, method)(operand, *more, at=at)
            return UnderWay(operand, given, self.stream.record_event())


def largest_sum(program: Program, mesh: Mesh, sizes: Mapping[str, int], here: Mapping[str, int]) -> int:
    """Elements of the largest sum over ranks that the rank `here` takes part in. `sizes`: those that no other
    follows from."""
    every = complete_sizes(program, sizes)
    return max((prod(mesh.local_shape(step.ins[0], every, here)) for p in (program, *program.bodies())
                for step in p.steps if step.op.wire and step.op.wire.reduces
                and mesh.size(axes_of(step, mesh)) > 1), default=0)
