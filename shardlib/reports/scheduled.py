"""The proof of a program under a schedule: each rank's collectives and messages, in the order of its list,
matched against those of all others.

A message waits for nobody when it is posted, so what a rank can wait for is a message that was not posted
yet, or the others of a collective. What can happen stays possible until it does, so any order decides.
"""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardlib.compiler.microbatches import Cut, cut
from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.reports.project import Call, calls_at, check_given, unrolled
from shardlib.schedules.folding import STAGES, Fold
from shardlib.schedules.schedule import Schedule
from shardlib.schedules.waits import Edge, ScheduleProof, prove_schedule


@dataclass(frozen=True)
class ScheduledProof:
    """What was proven: on `mesh`, all ranks end after these collectives and messages, whatever comes when.

    schedule: how many messages lie on each edge between two stages at once, at most.  `digest` is equal on
    ranks with equal plans.
    """
    mesh: Mesh
    collectives: int
    messages: int
    schedule: ScheduleProof
    digest: str

    def __str__(self) -> str:
        return (f"on mesh {self.mesh}: {self.mesh.world_size} ranks, {self.collectives} collectives and "
                f"{self.messages} messages, all matched; plan {self.digest[:12]}\n{self.schedule}")

    __repr__ = __str__


@dataclass(frozen=True)
class Letter:
    """A message that a rank posts, or takes: of which pipeline, in which action, between which stages."""
    line: int
    part: str
    ends: tuple[int, int]
    number: int
    posts: bool
    call: Call

    @property
    def key(self) -> tuple:
        return self.line, self.part, self.ends, self.number

    def __str__(self) -> str:
        source, target = self.ends
        return (f"{self.call.op} of {self.call.numel} {self.call.dtype} in {self.part}, stage {source} to "
                f"{target}")


Asked = Call | Letter


def prove_scheduled(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None,
                    schedule: Schedule) -> ScheduledProof:
    """Prove that all ranks of `mesh` end, when they run the program under it. SpecError where not."""
    fold = Fold(schedule, mesh)
    ends = prove_schedule(schedule)
    sizes = check_given(program, fold.whole, sizes, dtypes or {})
    parts = cut(program, fold.whole, dtypes or {}, schedule.kinds)
    asked = [list(asked_by(fold, parts, sizes, c)) for c in mesh.coordinates()]
    said = "\n".join("; ".join(map(str, mine)) for mine in asked)
    collectives, messages = match_ranks(asked)
    return ScheduledProof(mesh, collectives, messages, ends, hashlib.sha256(
        f"{fold}\n{program}\n{said}".encode()).hexdigest())


def asked_by(fold: Fold, parts: Cut, sizes: Mapping[str, int],
             coordinate: Mapping[str, int]) -> Iterator[Asked]:
    """What a rank asks for, in order."""
    mine, rank = fold.stages(coordinate.get(STAGES, 0)), fold.mesh.rank(coordinate)
    line = fold.line(coordinate)

    def of(program: Program, whole: Mesh, s: int, m: int, part: str) -> Iterator[Asked]:
        numbers: Counter[tuple[int, int]] = Counter()
        given = {path: parts.kinds[path] for path, _ in program.arg_leaves()}
        at = fold.place(coordinate, s, m)
        for call in unrolled(calls_at(program, whole, {a: at[a] for a in whole.axes}, sizes, given)):
            if call.pair is None:
                yield replace(call, group=_real(fold, call, rank))
                continue
            yield Letter(line, part, call.pair, numbers[call.pair], call.pair[0] == s, call)
            numbers[call.pair] += 1

    units = {s: dict(zip(fold.schedule.kinds, parts.at(fold.place(coordinate, s, 0)))) for s in mine}
    yield from _together({s: list(of(parts.before, fold.still, s, 0, "before")) for s in mine})
    for s, kind, m in fold.schedule.ranks[coordinate.get(STAGES, 0)]:
        yield from of(units[s][kind], fold.whole, s, m, f"{kind}{m}")
    yield from _together({s: list(of(parts.after, fold.still, s, 0, "after")) for s in mine})


def channels(fold: Fold, parts: Cut, sizes: Mapping[str, int],
             coordinate: Mapping[str, int]) -> dict[Edge, list[Letter]]:
    """A rank's letters from and to others, by the stages that they are between, as they are posted."""
    found: dict[Edge, list[Letter]] = {}
    rank_of = fold.schedule.rank_of
    for asked in asked_by(fold, parts, sizes, coordinate):
        if isinstance(asked, Letter) and rank_of[asked.ends[0]] != rank_of[asked.ends[1]]:
            found.setdefault(asked.ends, []).append(asked)

    def posted(letter: Letter) -> tuple[int, int]:
        source, actions = letter.ends[0], fold.schedule.ranks[rank_of[letter.ends[0]]]
        turn = {f"{a.kind}{a.microbatch}": i for i, a in enumerate(actions) if a.stage == source}
        return {"before": -1, "after": len(actions)}.get(letter.part, turn.get(letter.part, 0)), letter.number
    return {edge: sorted(letters, key=posted) for edge, letters in found.items()}


def _real(fold: Fold, call: Call, rank: int) -> Any:
    """The ranks of a call. What stages make together says so, for a rank that has several."""
    ranks = fold.mesh.group(call.axes, rank)
    return ("stages", *ranks) if STAGES in call.axes else ranks


def _together(asked: Mapping[int, list[Asked]]) -> Iterator[Asked]:
    """What a rank asks for whose stages are at one program: first what one stage asks for by itself."""
    left = {s: calls[::-1] for s, calls in asked.items()}
    while any(left.values()):
        s = next((s for s, calls in left.items() if calls and not _of_stages(calls[-1])), None)
        if s is not None:
            yield left[s].pop()
            continue
        first = [call for calls in left.values() if calls and isinstance(call := calls.pop(), Call)][0]
        yield replace(first, group=first.group[1:])


def _of_stages(asked: Asked) -> bool:
    return isinstance(asked, Call) and asked.group[:1] == ("stages",)


def match_ranks(asked: Sequence[Sequence[Asked]]) -> tuple[int, int]:
    """How many collectives and messages there are. SpecError where ranks cannot end, or a message stays."""
    at, posted, collectives, messages = [0] * len(asked), {}, 0, 0

    def now(rank: int) -> Asked | None:
        return asked[rank][at[rank]] if at[rank] < len(asked[rank]) else None
    moved = True
    while moved:
        moved = False
        for rank in range(len(asked)):
            while (mine := now(rank)) is not None:
                if isinstance(mine, Letter):
                    if not mine.posts and mine.key not in posted:
                        break
                    if mine.posts:
                        posted[mine.key] = mine
                    elif (sent := posted.pop(mine.key).call).shapes != mine.call.shapes:
                        raise SpecError(f"rank {rank} takes {mine}, of {mine.call.shapes[0]}; it is posted "
                                        f"as {sent.shapes[0]}")
                    messages += mine.posts
                    at[rank] += 1
                else:
                    group = [r for r in mine.group if isinstance(r, int)]
                    others = [o for r in group if isinstance(o := now(r), Call) and o.group == mine.group]
                    if len(others) < len(group):
                        break
                    if wrong := next((o for o in others if not mine.same(o)), None):
                        raise SpecError(f"ranks meet in different collectives: rank {rank} is in {mine}; "
                                        f"another in {wrong}")
                    collectives += 1
                    for r in group:
                        at[r] += 1
                moved = True
    if any(now(r) is not None for r in range(len(asked))):
        raise SpecError("the ranks part ways: " + "; ".join(
            f"rank {r} waits for {mine}" if (mine := now(r)) is not None else f"rank {r} has ended"
            for r in range(len(asked))))
    if posted:
        raise SpecError(f"nobody takes {next(iter(posted.values()))}")
    return collectives, messages
