"""A stand-in for CUDA that writes down what it is told."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Cuda:
    """Streams with names, graphs that replay nothing, events that pass when they are told to;
    and a log of what happens on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.events: list[SimpleNamespace] = []
        self.made = self.pools = 0
        self.now = self.stream("main")
        for name, function in (("Stream", self.new_stream), ("stream", self.on),
                               ("current_stream", lambda device=None: self.now),
                               ("graph", self.graph), ("CUDAGraph", self.new_graph),
                               ("graph_pool_handle", self.new_pool)):
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr("shardlib.distributed.graph_capture._POOLS", {})

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name,
                               wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
                               wait_event=lambda event: self.log.append(f"{name} waits for {event.name}"),
                               record_event=self.event)

    def new_stream(self, device: torch.device) -> SimpleNamespace:
        self.made += 1
        return self.stream(f"side {self.made} of {device}")

    def event(self) -> SimpleNamespace:
        self.events.append(made := SimpleNamespace(done=False, name=f"event {len(self.events) + 1}"))
        made.query = lambda: made.done
        return made

    def new_graph(self) -> Any:
        class Made:
            replay = staticmethod(lambda: self.log.append(f"replay on {self.now.name}"))
            reset = staticmethod(lambda: self.log.append("reset"))
        return Made()

    def new_pool(self) -> tuple[int, int]:
        self.pools += 1
        return self.pools, 0

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: object, pool: tuple[int, int] | None = None, stream: Any = None,
              mode: str = "global") -> Iterator[None]:
        self.log.append(f"capture on {stream.name}" + (f" in pool {pool[0]}, {mode}" if pool else ""))
        yield
        self.log.append("captured")
