"""When a rank was at each of its actions: read from the device, which runs behind the program.

An action begins when the last message that it takes is there, or the one before it is over, and ends when its
own work is done, before what it sends is there.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from shardlib.schedules.clock import Span
from shardlib.schedules.schedule import Action


@dataclass
class Stopwatch:
    """Of rank `rank` along the stages, from when it is made."""
    rank: int
    device: torch.device
    _marks: list[tuple[Action, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._zero = self._mark()

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        (event := torch.cuda.Event(enable_timing=True)).record()
        return event

    def begin(self) -> None:
        """An action begins, or the message that it has waited for is there."""
        self._began = self._mark()

    def end(self, action: Action) -> None:
        self._marks.append((action, self._began, self._mark()))

    def spans(self) -> list[Span]:
        """In seconds. It waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [Span(self.rank, action, self._since(a), self._since(b)) for action, a, b in self._marks]

    def _since(self, mark: Any) -> float:
        return (self._zero.elapsed_time(mark) * 1e-3 if self.device.type == "cuda" else mark - self._zero)
