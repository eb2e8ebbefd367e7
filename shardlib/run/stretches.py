"""Calls in turns, captured: what such a call does between two messages is a CUDA graph.

The first time it runs as it is, the second it is recorded; from then on its graphs are replayed, each behind
the answer to what was asked before it. What a message brings is copied to where the graph reads it; what one
takes away lies where the graph has put it, until the call's next turn, which begins with what came of it.

What is asked of ranks of the same stage is in the graphs. On the CPU nothing is recorded.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shardlib.distributed.graph_capture import chained, on_capture_stream
from shardlib.distributed.runtime import Runtime
from shardlib.run.captured import Graph
from shardlib.run.turns import Line, Requests


class Stretch(NamedTuple):
    """A graph, what is asked behind it, and where the answer belongs."""
    graph: Graph
    request: tuple | None
    room: Tensor | None


class Stretches:
    """`call`, a generator that returns nothing and works on buffers that stay where they are; all stages of
    `line` have it, under one title."""

    def __init__(self, title: str, call: Callable[[], Requests], runtime: Runtime, line: Line) -> None:
        self.title, self.call, self.runtime, self.line = title, call, runtime, line
        self.made: list[Stretch] | None = None

    def run(self) -> Requests:
        if self.runtime.device.type != "cuda":
            yield from self.call()
        elif self.made is None:
            self.made = []
            yield from self._first()
        else:
            if not self.made:
                self._record()
            for graph, request, room in self.made:
                graph.replay()
                if request is not None:
                    answer = yield request
                    if room is not None and room is not answer:
                        room.copy_(answer)

    def _first(self) -> Requests:
        """On the stream on which it is recorded then."""
        code, request, answer = self.call(), (), None
        while request is not None:
            with on_capture_stream(self.runtime.device), chained():
                request = self._on(code, answer)
            if request is not None:
                answer = yield request

    def _record(self) -> None:
        self.runtime.compare_plans(f"the graphs of {self.title}", self.title)
        code, request, answer = self.call(), (), None
        while request is not None:
            asked: list[tuple | None] = []
            title = f"{self.title}, part {len(self.made)}"
            graph = Graph(title, lambda: asked.append(self._on(code, answer)), self.runtime, stretch=True)
            request = asked[0]
            answer = None if request is None else self._room(request)
            self.made.append(Stretch(graph, request, answer))

    def _on(self, code: Requests, answer: Tensor | None) -> tuple | None:
        """What it asks of other stages next; None where it ends."""
        try:
            request = code.send(answer)
            while not self.line.crosses(request):
                group, method, x, *more = request
                request = code.send(getattr(group, method)(x, *more, at=self.title))
            return request
        except StopIteration:
            return None

    def _room(self, request: tuple) -> Tensor | None:
        """What the answer is, for the graph behind it: what is told lies in the room for it, on all ranks."""
        _, method, x, *_ = request
        if method == "broadcast":
            return x
        return torch.empty(x.shape, dtype=x.dtype, device=self.runtime.device) if x.is_meta else None
