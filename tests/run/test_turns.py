"""Calls in turns, and what is captured of them between messages. (With tokens:
tests/models/test_row_groups.py; on GPUs: tests/gpu/test_pipeline.py.)"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardlib.run import stretches
from shardlib.run.stretches import Stretches
from shardlib.run.turns import Line, Turns


class Tape:
    """As a GPU records: what is done while a graph is made does not happen, and does at each replay."""

    def __init__(self) -> None:
        self.graphs: list[list[Callable[[], Any]]] = []
        self.recording = False

    def do(self, work: Callable[[], Any]) -> None:
        if self.recording:
            self.graphs[-1].append(work)
        else:
            work()

    def graph(self, title: str, call: Callable[[], None], runtime: Any, stretch: bool) -> Any:
        self.graphs.append([])
        self.recording = stretch
        call()
        self.recording, mine = False, self.graphs[-1]
        return SimpleNamespace(replay=lambda: [work() for work in mine])


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    @contextmanager
    def within(device: Any) -> Iterator[None]:
        yield
    made = Tape()
    monkeypatch.setattr(stretches, "Graph", made.graph)
    monkeypatch.setattr(stretches, "on_capture_stream", within)
    return made


def asked(call: Any, answers: list[torch.Tensor]) -> list[tuple]:
    """What a call asks, and how much each operand is then."""
    found, answer, given = [], None, iter(answers)
    try:
        while True:
            _, method, x, *_ = call.send(answer)
            found.append((method, None if x.is_meta else x.item()))
            answer = next(given)
    except StopIteration:
        return found


@pytest.mark.parametrize("here", (0, 1))
def test_each_stretch_is_replayed_behind_its_answer(tape: Tape, here: int) -> None:
    """The first call runs as it is, the second records, and the third replays: all three ask the same, of
    what came of the answers; what ranks of one stage ask of each other is in the graphs."""
    state, out, plans = torch.zeros(1), torch.zeros(1), []
    group = SimpleNamespace(add=lambda x, at: tape.do(lambda: x.add_(100)))
    device = torch.device("cpu")
    runtime = SimpleNamespace(device=SimpleNamespace(type="cuda"), compare_plans=lambda *p: plans.append(p))

    def call() -> Any:
        if here:
            carry = yield "line", "send", torch.empty(1, device="meta"), 0, 1
            tape.do(lambda: out.copy_(state + carry))
        else:
            tape.do(lambda: out.copy_(state))
            yield "line", "send", out, 0, 1
        yield group, "add", out
        token = yield "line", "broadcast", out if here else torch.zeros(1), 1
        tape.do(lambda: state.add_(token if not here else 1))
    made = Stretches("a step", call, runtime, Line("line", 2, here))
    made._room = lambda request, room=made._room: (
        torch.zeros(1, device=device) if request[2].is_meta else room(request))
    found = [asked(made.run(), [torch.full((1,), 10.0 * i), torch.full((1,), 1.0 + i)]) for i in range(3)]
    assert found == ([[("send", 0.0), ("broadcast", 0.0)], [("send", 1.0), ("broadcast", 0.0)],
                      [("send", 3.0), ("broadcast", 2.0)]] if not here else
                     [[("send", None), ("broadcast", 100.0)], [("send", None), ("broadcast", 111.0)],
                      [("send", None), ("broadcast", 122.0)]])
    assert state.item() == (6 if not here else 3)
    assert len(tape.graphs) == 3 and plans == [("the graphs of a step", "a step")]


def test_a_call_that_asks_nobody_has_one_turn() -> None:
    def call(value: int) -> Any:
        got = yield "another", "all_reduce", value
        return got
    turns = Turns([call(1), call(2)], Line("line", 2, 0)).run()
    assert next(turns) == ("another", "all_reduce", 1)
    assert turns.send(10) == ("another", "all_reduce", 2)
    with pytest.raises(StopIteration) as end:
        turns.send(20)
    assert end.value.value == [10, 20]
