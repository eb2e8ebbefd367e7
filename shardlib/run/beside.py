"""Calls beside each other: while what one asks of other ranks is under way, another one computes.

    first, second = beside(step.requests(a, w), step.requests(b, w))

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
...     beside(step.requests(torch.ones(1)), step.requests(torch.ones(2)))
[tensor([2.]), tensor([2., 2.])]
"""
from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from math import prod
from typing import Any

from shardlib.compiler.sizes import complete_sizes
from shardlib.distributed.aside import UnderWay
from shardlib.language.exchanges import communicates_over
from shardlib.language.moves import axes_of
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.run.surroundings import without_autocast

Requests = Generator[tuple, Any, Any]


def beside(*calls: Requests) -> list[Any]:
    """What each of the calls returns; see the module. All ranks make the same calls in the same order."""
    sent: dict[int, UnderWay] = {}
    made: dict[int, Any] = {}
    turns = deque(range(len(calls)))
    with without_autocast():
        while turns:
            i = turns.popleft()
            try:
                group, *request = calls[i].send(sent.pop(i).arrived() if i in sent else None)
            except StopIteration as end:
                made[i] = end.value
                continue
            sent[i] = group.begin(*request, at=f"call {i + 1} of {len(calls)} beside each other")
            turns.append(i)
    return [made[i] for i in range(len(calls))]


def largest_sum(program: Program, mesh: Mesh, sizes: Mapping[str, int], here: Mapping[str, int]) -> int:
    """Elements of the largest sum over ranks that the rank `here` takes part in. `sizes`: those that no other
    follows from."""
    every = complete_sizes(program, sizes)
    return max((prod(mesh.local_shape(step.ins[0], every, here)) for p in (program, *program.bodies())
                for step in p.steps if step.op.wire and step.op.wire.reduces
                and mesh.size(axes_of(step, mesh)) > 1), default=0)


def axes_of_sums(program: Program, mesh: Mesh) -> tuple[str, ...]:
    """Those over which the ranks add up, where all sums are over the same; else none."""
    over = {axes for p in (program, *program.bodies()) for step in p.steps
            if step.op.wire and step.op.wire.reduces and mesh.size(axes := axes_of(step, mesh)) > 1}
    return next(iter(over)) if len(over) == 1 else ()


def asked(program: Program, mesh: Mesh) -> list[tuple[str, ...]]:
    """The steps that communicate, by op and axes, in order, those of bodies once; with their text, which says
    how often, those that are no move. Calls of two programs that have these alike come to the same layer in
    the same turn."""
    made: list[tuple[str, ...]] = []
    for step in program.steps:
        for body in step.bodies:
            made += asked(body, mesh)
        if mesh.size(axes := communicates_over(step, mesh)) > 1:
            made.append((step.op.name, *axes, "" if step.op.wire else step.text))
    return made
