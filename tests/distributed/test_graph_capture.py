"""Where CUDA graphs are captured: the example of `graph_capture` runs, on a stand-in for CUDA that writes down what it is told."""
from __future__ import annotations

import inspect
import textwrap
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Iterator

import pytest
import torch

from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.graph_capture import capture_stream
from shardlib.errors import SpecError
from shardlib.mesh import Mesh


class Cuda:
    """Streams with names, and a log of what happens on which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.made = 0
        self.now = self.stream("main")
        for name, function in (("Stream", self.new), ("stream", self.on), ("current_stream", lambda device: self.now), ("graph", self.graph)):
            monkeypatch.setattr(torch.cuda, name, function)
        capture_stream.cache_clear()

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    def new(self, device: torch.device) -> SimpleNamespace:
        self.made += 1
        return self.stream(f"side {self.made} of {device}")

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: object, stream: SimpleNamespace) -> Iterator[None]:
        self.log.append(f"capture on {stream.name}")
        yield
        self.log.append("captured")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    yield Cuda(monkeypatch)
    capture_stream.cache_clear()


def group(name: str) -> GroupCoordinator:
    return GroupCoordinator(name, (0,), 0, 0, torch.device("cuda", 0), (Alone(),), Alone())


def test_the_example_warms_up_and_captures_on_one_stream(cuda: Cuda) -> None:
    text = inspect.getdoc(GroupCoordinator.graph_capture)
    begin = text.index("    with tp.graph_capture()")
    example = textwrap.dedent(text[begin:text.index("\n\n", begin)])
    graph = SimpleNamespace(replay=lambda: cuda.log.append(f"replay on {cuda.now.name}"))
    exec(example, {"tp": group("tp"), "step": lambda x: cuda.log.append(f"step on {cuda.now.name}"), "x": 1, "graph": graph, "torch": torch})
    side = "side 1 of cuda:0"
    assert cuda.log == [f"{side} waits for main", f"step on {side}", f"capture on {side}", f"step on {side}", "captured",
                        f"main waits for {side}", "replay on main"]


def test_all_groups_capture_on_one_stream(cuda: Cuda) -> None:
    with group("tp").graph_capture() as first, group("ep").graph_capture() as second:
        assert first is second
    assert cuda.now.name == "main" and cuda.made == 1
    assert cuda.log[-1] == "main waits for side 1 of cuda:0"


def test_a_failed_capture_leaves_the_stream(cuda: Cuda) -> None:
    with pytest.raises(KeyError), group("tp").graph_capture():
        raise KeyError
    with group("tp").graph_capture() as stream:
        assert stream.name == "side 1 of cuda:0"


def test_there_are_no_graphs_on_the_cpu() -> None:
    with connect(Mesh(tp=1), device="cpu") as runtime, pytest.raises(SpecError) as refused:
        runtime.group(("tp",)).graph_capture()
    assert str(refused.value) == "graph_capture over tp: CUDA graphs are of calls on cuda; this group is on cpu"
