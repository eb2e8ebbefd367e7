"""The proof that ranks cannot part ways: their collectives are projected, and matched against each other.

A collective happens when all ranks of its group have come to it with the same op, dtype and shapes. `prove`
runs that rule to the end, on the projections alone; where it gets stuck, it says which rank waits for what.
The proof holds for any timing, since each rank's sequence is fixed by the program and not by data.

It goes by classes of ranks (`shardlib.reports.classes`), whose sequences are equal but for the ranks that
they name. A collective of a class over some axes has members of all classes that differ from it along these
alone, whichever of its ranks makes it: what happens in one group of such ranks happens in all. What can
happen stays possible until it does, whatever happens before, so any order decides. The body of a scan is
matched once, where all classes come to it together and leave it together: then they do so each time.
"""
from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import overload

from shardlib.errors import SpecError
from shardlib.language.cond import COND
from shardlib.language.exchanges import meets_over
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.reports.classes import Classes, classes_of
from shardlib.reports.project import (
    Call,
    Calls,
    Repeat,
    check_given,
    project_classes,
    ranks_of,
    sent,
    stage_classes,
)
from shardlib.reports.scheduled import ScheduledProof, prove_scheduled
from shardlib.schedules.schedule import Schedule


@dataclass(frozen=True)
class Proof:
    """What was proven: on `mesh`, all ranks end after `collectives` collectives.

    `digest` is equal on ranks with equal plans.
    """
    mesh: Mesh
    collectives: int
    digest: str

    def __str__(self) -> str:
        return (f"on mesh {self.mesh}: {self.mesh.world_size} ranks, {self.collectives} collectives, all "
                f"matched; plan {self.digest[:12]}")

    __repr__ = __str__


@overload
def prove(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = ...,
          schedule: None = ...) -> Proof: ...
@overload
def prove(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = ..., *,
          schedule: Schedule) -> ScheduledProof: ...
def prove(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None,
          schedule: Schedule | None = None) -> Proof | ScheduledProof:
    """Prove that all ranks issue the same collectives in the same order. SpecError where they do not.

    sizes: of every dim of the program; dtypes: of arguments by path, float32 where nothing is said.
    schedule: the one that the program was lowered for; then also that no rank waits for a message that never
    comes.

    >>> from shardlib import Layout, einsum, lower, sharded
    >>> mesh = Mesh(dp=2, tp=4)
    >>> f = sharded("B F, F D -> B D")(lambda x, w: einsum("B F, F D -> B D", x, w))
    >>> proof = prove(lower(f, Layout(B="dp", F="tp", D="dp"), mesh=mesh), mesh, dict(B=8, D=16, F=32))
    >>> proof                                                           # doctest: +ELLIPSIS
    on mesh dp=2,tp=4: 8 ranks, 6 collectives, all matched; plan ...
    """
    if schedule is not None:
        check_branches(program)
        return prove_scheduled(program, mesh, sizes, dtypes, schedule)
    sizes = check_given(program, mesh, sizes, dtypes or {})
    check_branches(program)
    classes = stage_classes(classes_of(mesh, sent(program), sizes), program)
    return match(classes, project_classes(program, classes, sizes, dtypes))


def check_branches(program: Program) -> None:
    """SpecError where a branch that communicates hangs on a predicate that ranks may see differently."""
    for step in program.steps:
        for body in step.bodies:
            check_branches(body)
        if step.op is COND and step.ins[0].owed and any(_communicates(b) for b in step.bodies):
            raise SpecError(f"cond on {step.inputs[0]}, which is {step.ins[0]}: ranks that see different "
                            "pieces of it part ways before the collectives of "
                            f"{' and '.join(b.name for b in step.bodies)}")


def _communicates(program: Program) -> bool:
    return any(s.op.wire or meets_over(s) or any(map(_communicates, s.bodies)) for s in program.steps)


def match(classes: Classes, calls: Sequence[Calls]) -> Proof:
    """Match the classes' calls. SpecError, naming ranks and steps, where their ranks cannot all end."""
    for c, made in enumerate(calls):
        for call in _each(made):
            mine = dict(zip(_members(classes, c, call), call.shapes)).get(c)
            if mine is not None and call.numel != prod(mine):
                raise SpecError(f"{_say(classes, c, call)}; its piece has shape {mine}")
    said = "\n".join([f"{classes.mesh} {dict(classes.starts)}", *map(_text, calls)])
    return Proof(classes.mesh, _Matching(classes, calls).run(), hashlib.sha256(said.encode()).hexdigest())


class _Matching:
    """Each class's calls, and how many it has made. `done`: the collectives that were, of all groups."""

    def __init__(self, classes: Classes, calls: Sequence[Calls]) -> None:
        self.classes, self.calls, self.at, self.done = classes, list(map(list, calls)), [0] * len(classes), 0

    def run(self) -> int:
        """Until all have ended. SpecError where they cannot."""
        work = deque(range(len(self.classes)))
        while work or (work := deque(self._come_to_a_scan())):
            c = work.popleft()
            call = self._call(c)
            if call is None:
                continue
            group = _members(self.classes, c, call)
            if all((other := self._call(m)) is not None
                   and (other.group, other.pair) == (call.group, call.pair) for m in group):
                self._meet(c, call, group)
                work.extend(group)
        return self.done

    def _next(self, c: int) -> Call | Repeat | None:
        return self.calls[c][self.at[c]] if self.at[c] < len(self.calls[c]) else None

    def _call(self, c: int) -> Call | None:
        """The collective that a class has come to; None where it has come to a scan, or ended."""
        call = self._next(c)
        return call if isinstance(call, Call) else None

    def _meet(self, c: int, call: Call, group: Sequence[int]) -> None:
        """All of the group have come to a collective over the same axes; it is the same one, and happens."""
        for m in group:
            other = self._call(m)
            if other is not None and not call.same(other):
                both = " and ".join(str(_rank(self.classes, n)) for n in (c, m))
                raise SpecError(f"ranks {both} meet in different collectives: "
                                f"{_say(self.classes, c, call)}; {_say(self.classes, m, other)}")
        self.done += self.classes.groups(c, call.axes)
        for m in group:
            self.at[m] += 1

    def _come_to_a_scan(self) -> Iterable[int]:
        """Nothing happens outside of scans any more: those before one go in. Who then has something to do."""
        heads = [self._next(c) for c in range(len(self.classes))]
        inside = {c: head for c, head in enumerate(heads) if isinstance(head, Repeat)}
        if len(inside) == len(heads) and self._together([*inside.values()]):
            self.at = [i + 1 for i in self.at]
            return inside
        if not inside and any(heads):
            raise SpecError("the ranks part ways: " + "; ".join(
                _say(self.classes, c, head) if isinstance(head, Call)
                else f"rank {_rank(self.classes, c)} has ended"
                for c, head in enumerate(heads)))
        for c, scan in inside.items():
            self.calls[c][self.at[c]:self.at[c] + 1] = scan.unrolled()
        return inside

    def _together(self, scans: Sequence[Repeat]) -> bool:
        """Whether all that come to these scans leave them together, each time around."""
        if len({scan.times for scan in scans}) > 1:
            return False
        try:
            once = _Matching(self.classes, [scan.calls for scan in scans]).run() if scans[0].times else 0
        except SpecError:
            return False                # said by the calls themselves, one after another
        self.done += once * scans[0].times
        return True


def _each(calls: Iterable[Call | Repeat]) -> Iterable[Call]:
    """The calls, those of scans once."""
    for call in calls:
        yield from _each(call.calls) if isinstance(call, Repeat) else (call,)


def _text(calls: Calls) -> str:
    """All that a proof compares."""
    return "; ".join(f"{call.times} x ({_text(call.calls)})" if isinstance(call, Repeat)
                     else f"{call.op}{call.group}{call.dtype}{call.shapes}{call.root}{call.pair or ''}"
                     for call in calls)


def _members(classes: Classes, c: int, call: Call) -> list[int]:
    """The classes of the ranks that make a call with those of class `c`."""
    peers = classes.peers(c, call.axes)
    return peers if call.pair is None else [peers[i] for i in call.pair]


def _rank(classes: Classes, c: int) -> int:
    """The first rank of a class."""
    return classes.mesh.rank(classes.firsts[c])


def _say(classes: Classes, c: int, call: Call) -> str:
    rank = _rank(classes, c)
    ranks = replace(call, group=ranks_of(call, classes.mesh, rank))
    return f"rank {rank} is in {ranks}{f' at {call.step}' if call.step else ''}"
