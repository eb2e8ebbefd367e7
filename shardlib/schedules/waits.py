"""The proof that a schedule ends, whatever arrives when; and how many slots that takes.

What a stage sends to another rank lies in a slot there until it is used. Each directed edge between two
stages has its own slots; which one a microbatch gets is known beforehand, as is who used it last. So all that
an action can ever wait for is known: the one before it in its rank's list, the data that it takes, and, for a
send, that its slot is free. Where this graph has no cycle the schedule ends in every order of arrival, and
where it has one, in none.

>>> from shardlib.schedules.generators import one_f_one_b
>>> prove_schedule(one_f_one_b(2, 6))
2 ranks, 2 stages, 6 microbatches end in every order of arrival; slots: 0 to 1: 1, 1 to 0: 1
>>> prove_schedule(Schedule.parse("0F0 0F1" + chr(10) + "1F1 1F0"), {(0, 1): 1})  # doctest: +ELLIPSIS
Traceback (most recent call last):
shardlib.errors.SpecError: schedule: with so few slots its ranks wait for each other: 0F1 for 1F0 for 1F1 ...
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from shardlib.errors import SpecError
from shardlib.schedules.schedule import Action, Schedule

Edge = tuple[int, int]                  # the stage that sends, and the one that gets
Node = Action | tuple[str, Action, int]     # an action, or what it sends to a stage
MAX_SLOTS = 4096


@dataclass(frozen=True)
class ScheduleProof:
    """`slots`: of each edge between stages of two ranks, how many messages lie there at once at most."""
    schedule: Schedule
    slots: Mapping[Edge, int]

    def __str__(self) -> str:
        found = self.schedule
        slots = ", ".join(f"{a} to {b}: {n}" for (a, b), n in sorted(self.slots.items()))
        return (f"{len(found.ranks)} ranks, {found.stages} stages, {found.microbatches} microbatches end in "
                f"every order of arrival; slots: {slots or 'none'}")

    __repr__ = __str__


def prove_schedule(schedule: Schedule, slots: Mapping[Edge, int] | None = None) -> ScheduleProof:
    """Prove that the schedule ends, with these slots, or with as few as it can; SpecError where not."""
    if cycle := _cycle(schedule, None):
        raise SpecError(f"schedule: its ranks wait for each other: {_say(cycle)}")
    if slots is not None:
        if cycle := _cycle(schedule, slots):
            raise SpecError(f"schedule: with so few slots its ranks wait for each other: {_say(cycle)}")
        return ScheduleProof(schedule, dict(slots))
    return ScheduleProof(schedule, _fewest(schedule))


def _fewest(schedule: Schedule) -> dict[Edge, int]:
    """No slot of these can be spared: they grow where a cycle goes through one, and shrink where they can."""
    slots = {edge: 1 for edge in messages(schedule)}
    while cycle := _cycle(schedule, slots):
        edges = [(node[1].stage, node[2]) for node in cycle if isinstance(node[0], str)]
        grows = min(edges, key=lambda edge: (slots[edge], edge))
        slots[grows] += 1
    for edge in slots:
        while slots[edge] > 1 and not _cycle(schedule, {**slots, edge: slots[edge] - 1}):
            slots[edge] -= 1
    return slots


def messages(schedule: Schedule) -> dict[Edge, list[tuple[Action, Action]]]:
    """Of each edge, in the order in which they are sent: who sends a message, and who uses it."""
    uses = {(source, action.stage): action for action in schedule.actions
            for source in schedule.before(action)}
    found: dict[Edge, list[tuple[Action, Action]]] = defaultdict(list)
    for action in schedule.actions:
        for to in schedule.sends(action):
            found[action.stage, to].append((action, uses[action, to]))
    return dict(found)


def places(schedule: Schedule,
           slots: Mapping[Edge, int]) -> dict[tuple[Action, int], tuple[int, Action | None]]:
    """Of each message, by who sends it and to which stage: its slot, and who must have used that before. Of
    the slots of its edge it gets the one whose message is used first."""
    turn = {action: i for actions in schedule.ranks for i, action in enumerate(actions)}
    found: dict[tuple[Action, int], tuple[int, Action | None]] = {}
    for edge, sent in messages(schedule).items():
        used: list[Action | None] = [None] * slots[edge]
        for sender, user in sent:
            i = min(range(len(used)), key=lambda i: -1 if (last := used[i]) is None else turn[last])
            found[sender, edge[1]], used[i] = (i, used[i]), user
    return found


def graph(schedule: Schedule, slots: Mapping[Edge, int] | None) -> dict[Node, list[Node]]:
    """What each action and each send waits for; without `slots` a send waits for none."""
    waits: dict[Node, list[Node]] = {}
    free = places(schedule, slots) if slots is not None else {}
    for actions in schedule.ranks:
        last: Node | None = None
        for action in actions:
            data: list[Node] = [("send", source, action.stage) if action.stage in schedule.sends(source)
                                else source for source in schedule.before(action)]
            waits[action] = [*([last] if last else []), *data]
            last = action
            for to in schedule.sends(action):
                _, before = free.get((action, to), (0, None))
                waits["send", action, to] = [last, *([before] if before else [])]
                last = ("send", action, to)
    return waits


def _cycle(schedule: Schedule, slots: Mapping[Edge, int] | None) -> list[Node]:
    """One of those that wait for each other, each for the next; none where there is none."""
    try:
        TopologicalSorter(graph(schedule, slots)).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def _say(cycle: list[Node]) -> str:
    names = [str(node[1] if isinstance(node[0], str) else node) for node in cycle]
    return " for ".join(name for i, name in enumerate(names) if not i or name != names[i - 1])
