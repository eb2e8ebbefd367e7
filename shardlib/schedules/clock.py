"""A schedule on a clock: ranks that go down their lists, slots that are full or free.

Nothing here knows of the proof: a rank does its next action when it has the data, hands the result over when
the slot is free, and only then goes on. What is known beforehand is which slot a message gets.

>>> from shardlib.schedules.generators import gpipe, one_f_one_b
>>> made = run(one_f_one_b(2, 4), dict.fromkeys([(0, 1), (1, 0)], 1), {"F": 1.0, "B": 2.0}.__getitem__)
>>> made.length, round(made.idle, 3), made.kept, run(gpipe(2, 4)).kept
(15.0, 0.2, (2, 1), (4, 4))
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shardlib.errors import SpecError
from shardlib.schedules.schedule import Action, Schedule
from shardlib.schedules.waits import Edge, messages, places


@dataclass(frozen=True)
class Span:
    """From when to when a rank was at an action, in the unit of its durations."""
    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a schedule does when. `kept`: of each rank the most forward actions whose backward was to come."""
    schedule: Schedule
    spans: tuple[Span, ...]
    kept: tuple[int, ...]

    @property
    def length(self) -> float:
        return max(span.end for span in self.spans)

    @property
    def idle(self) -> float:
        """The part of all ranks' time in which they do nothing: the bubble."""
        busy = sum(span.end - span.start for span in self.spans)
        return 1 - busy / (self.length * len(self.schedule.ranks)) if self.length else 0.0


def run(schedule: Schedule, slots: Mapping[Edge, int] | None = None,
        duration: Callable[[str], float] = lambda kind: 1.0, delay: Callable[[Action], float] = lambda a: 0.0,
        choose: Callable[[Sequence[int]], int] = lambda able: able[0]) -> Timeline:
    """Run it. SpecError where the ranks wait for each other.

    slots: of each edge; without them there are as many as messages.  duration: of a kind of action.
    delay: what the action takes more, then.  choose: which of the ranks that can go on goes on.
    """
    sent = messages(schedule)
    slots = slots if slots is not None else {edge: len(found) for edge, found in sent.items()}
    slot_of, mine = places(schedule, slots), [schedule.on(rank) for rank in range(len(schedule.ranks))]
    free = {(edge, i): 0.0 for edge, n in slots.items() for i in range(n)}      # since when, where it is
    ends: dict[tuple[Action, int], float] = {}                      # when a result is there, at which stage
    at, clock = [0] * len(schedule.ranks), [0.0] * len(schedule.ranks)
    full: list[list[int]] = [[] for _ in schedule.ranks]        # to which stages its result is still to go
    spans: list[Span] = []

    def able(rank: int) -> bool:
        actions = schedule.ranks[rank]
        if at[rank] == len(actions):
            return False
        action = actions[at[rank]]
        if full[rank]:
            return ((action.stage, full[rank][0]), slot_of[action, full[rank][0]][0]) in free
        return all((source, action.stage) in ends for source in schedule.before(action))

    def go_on(rank: int) -> None:
        action = schedule.ranks[rank][at[rank]]
        if full[rank]:
            to = full[rank].pop(0)
            since = free.pop(((action.stage, to), slot_of[action, to][0]))
            clock[rank] = ends[action, to] = max(clock[rank], since)
            at[rank] += not full[rank]
            return
        start = max([clock[rank], *(ends[source, action.stage] for source in schedule.before(action))])
        clock[rank] = start + duration(action.kind) + delay(action)
        spans.append(Span(rank, action, start, clock[rank]))
        for source in schedule.before(action):
            if action.stage in schedule.sends(source):
                free[(source.stage, action.stage), slot_of[source, action.stage][0]] = clock[rank]
        full[rank] = schedule.sends(action)
        ends.update({(action, s): clock[rank] for s in mine[rank]})
        at[rank] += not full[rank]
    while ready := [rank for rank in range(len(at)) if able(rank)]:
        go_on(choose(ready))
    if stuck := [rank for rank, actions in enumerate(schedule.ranks) if at[rank] < len(actions)]:
        raise SpecError("schedule: its ranks wait for each other: " + ", ".join(
            f"rank {rank} is at {schedule.ranks[rank][at[rank]]}" for rank in stuck))
    return Timeline(schedule, tuple(spans), tuple(map(_most_kept, schedule.ranks)))


def measured(schedule: Schedule, spans: Sequence[Span]) -> Timeline:
    """What was measured of a schedule, as what is predicted of one."""
    return Timeline(schedule, tuple(sorted(spans, key=lambda span: (span.rank, span.start))),
                    tuple(map(_most_kept, schedule.ranks)))


def _most_kept(actions: Sequence[Action]) -> int:
    kept = most = 0
    for action in actions:
        kept += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind]
        most = max(most, kept)
    return most
