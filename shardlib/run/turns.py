"""Calls in turns through the stages of a pipeline, so that these are at different calls at once.

A call is a generator of what it asks of groups, as `Compiled.requests` makes one. It goes on until it waits
for what the last stage tells all others, a token; then the next one has its turn, round by round. So while
one group of rows is at a stage, others are elsewhere: the schedule `decode`. A call that has come to its end
leaves the round, on every rank alike.

What a stage hands to others are messages, for which nobody waits to post. Those of one call are posted and
taken in its own order. So who waits, waits for an earlier stage in this turn, or for the last one in the turn
before of the same call: no two wait for each other, as `prove_schedule` says of `decode`. From one stage to
another all messages are taken in the order in which they are posted.

>>> def call(token):
...     return (yield "line", "broadcast", token, 1)
>>> turns = Turns([call(3), call(5)], Line("line", 2, here=1))                  # on the last of two stages
>>> [(str(message), token) for _, message, token in turns.run()]
[('turn 0 of group 0, from stage 1 to 0', 3), ('turn 0 of group 1, from stage 1 to 0', 5)]
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardlib.distributed.channels import Channels, Lanes
from shardlib.distributed.mail import Mail, by_number
from shardlib.distributed.runtime import Runtime
from shardlib.run.rank_program import POST, TAKE
from shardlib.run.surroundings import without_autocast

Requests = Generator[tuple, Any, Any]


@dataclass(frozen=True)
class Line:
    """The stages of a pipeline: what requests call their group, how many they are, which one is here.

    number: of the pipelines side by side, which one.
    """
    group: Any
    stages: int
    here: int
    number: int = 0

    def crosses(self, request: tuple) -> bool:
        """Whether what is asked comes from, or goes to, another stage, and nobody else has a part in it."""
        return request[0] == self.group and request[1] in ("send", "broadcast")

    def tells(self, x: Any) -> tuple:
        """The request for x of the last stage, on all."""
        return self.group, "broadcast", x, self.stages - 1


class Sent(NamedTuple):
    """A message of a call. number: which of several in this turn from one stage to the other."""
    line: int
    call: int
    turn: int
    source: int
    target: int
    number: int

    def __str__(self) -> str:
        return f"turn {self.turn} of group {self.call}, from stage {self.source} to {self.target}"


class Turns:
    """Calls on the rank of one stage.  ahead: hears of each message that is taken in a later turn, and of a
    tensor like it.  doing: whose turn it is, in words."""

    def __init__(self, calls: Sequence[Requests], line: Line,
                 ahead: Callable[[Sent, Any], None] = lambda message, x: None) -> None:
        self.line, self.ahead, self.doing = line, ahead, ""
        self._calls = [_Call(i, call) for i, call in enumerate(calls)]

    def run(self) -> Requests:
        """What each call returns. It asks what they ask, but what a stage sends or tells is a message: (POST,
        message, x), (TAKE, message, room)."""
        while going := [call for call in self._calls if not call.ended]:
            for call in going:
                self.doing = f"turn {call.turns} of group {call.number}"
                yield from self._turn(call)
        return [call.made for call in self._calls]

    def _turn(self, call: _Call) -> Requests:
        try:
            answer = yield from call.comes()
            while True:
                request = call.asks.send(answer)
                if not self.line.crosses(request):
                    answer = yield request
                elif request[1] == "send":
                    answer = yield self._message(call, *request[2:])
                else:
                    yield from self._tell(call, *request[2:])
                    return
        except StopIteration as stop:
            call.ended, call.made = True, stop.value

    def _message(self, call: _Call, x: Any, source: int, target: int) -> tuple:
        sent = Sent(self.line.number, call.number, call.turns, source, target, call.sent[source, target])
        call.sent[source, target] += 1
        return POST if source == self.line.here else TAKE, sent, x

    def _tell(self, call: _Call, x: Any, root: int) -> Requests:
        """Who has it posts it to all others; these take it when the call has its turn again."""
        here, call.told = self.line.here, x
        for other in range(self.line.stages):
            if here == root != other:
                yield self._message(call, x, root, other)
        if here != root:
            call.asked = self._message(call, x, root, here)
            self.ahead(*call.asked[1:])
        call.turns += 1
        call.sent.clear()


def untold(asks: Requests, line: Line) -> Requests:
    """What a call returns, but that nothing is told: each stage goes on with what it has in place of that, at
    once."""
    answer = None
    try:
        while True:
            request = asks.send(answer)
            told = line.crosses(request) and request[1] == "broadcast"
            answer = request[2] if told else (yield request)
    except StopIteration as stop:
        return stop.value


class _Call:
    """How far a call has come. told: what its last turn ended with.  asked: the message that brings it, where
    another stage has it."""

    def __init__(self, number: int, asks: Requests) -> None:
        self.number, self.asks, self.turns = number, asks, 0
        self.sent: Counter[tuple[int, int]] = Counter()
        self.told: Any = None
        self.asked: tuple | None = None
        self.ended, self.made = False, None

    def comes(self) -> Requests:
        """What its next turn begins with."""
        (told, asked), self.told, self.asked = (self.told, self.asked), None, None
        return told if asked is None else (yield asked)


class Pipeline:
    """Calls on this rank of a pipeline whose stages stand along `axis`. All ranks make it."""

    def __init__(self, runtime: Runtime, axis: str) -> None:
        runtime.create_groups([(axis,)])
        group, here, stages = runtime.group((axis,)), runtime.coordinate, runtime.mesh.axes[axis]
        self.line = Line(group, stages, here[axis], runtime.mesh.rank({**here, axis: 0}))
        ends = {(s, t): (s, t) for s in range(stages) for t in range(stages)
                if t == s + 1 or s == stages - 1 != t}
        way = by_number(group)
        self._mail: Mail | Channels = Mail(group, way) if way else runtime.open_channels((axis,), ends, None)
        if isinstance(self._mail, Lanes):               # both ends make it when they first use it, and wait
            for s, t in ends:
                if self.line.here == s:
                    self._mail.post(torch.zeros(1, device=runtime.device), t, 0, "the first of a channel")
                elif self.line.here == t:
                    self._mail.take((1,), torch.float32, s, 0, "the first of a channel")

    def run(self, calls: Sequence[Requests]) -> list[Any]:
        """What each call returns; see the module. All ranks make the same calls, in the same order."""
        turns = Turns(calls, self.line, self._ahead)
        asking, answer = turns.run(), None
        with without_autocast():
            try:
                while True:
                    answer = self._answer(turns.doing, *asking.send(answer))
            except StopIteration as stop:
                self._mail.wait(turns.doing)
                return stop.value

    def _ahead(self, message: Sent, x: Tensor) -> None:
        """On a GPU who posts may hold up its host until there is room: so there is, from the start."""
        if isinstance(self._mail, Lanes):
            self._mail.ask(x.shape, x.dtype, message.source, message.call)

    def _answer(self, doing: str, group: Any, method: Any, x: Any, *more: Any) -> Any:
        if group == POST:
            return self._mail.post(x, method.target, method.call, method)
        if group == TAKE:
            return self._mail.take(x.shape, x.dtype, method.source, method.call, method)
        return getattr(group, method)(x, *more, at=doing)
