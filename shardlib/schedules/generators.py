"""The known schedules.

>>> print(one_f_one_b(2, 3))
0F0 0F1 0B0 0F2 0B1 0B2
1F0 1B0 1F1 1B1 1F2 1B2

| schedule | idle, of P stages and M microbatches | activations kept at once |
|---|---|---|
| `gpipe` | (P - 1) / (M + P - 1) | M |
| `one_f_one_b` | the same | at most P |
| `interleaved` | (P - 1) / (v M + P - 1), v stages a rank | more |
| `zero_bubble` | less: what nobody waits for fills the end | at most P |
| `zbv` | less yet: two stages a rank, the last one where the first is | at most 2 P halves |
| `decode` | none but at the ends, with as many groups of rows as ranks | none |

Those with backward in two are made by a clock that ticks once an action: each rank takes what it has the
data for, backward first, then forward while it may keep more, then what nobody waits for. Sources: GPipe
(Huang and others, 2019), 1F1B (PipeDream-Flush) and interleaved 1F1B (Narayanan and others, 2021), zero
bubble (Qi and others, 2024).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardlib.errors import SpecError
from shardlib.schedules.schedule import Action, Schedule, schedule


def _check(**counts: int) -> None:
    for name, n in counts.items():
        if type(n) is not int or not 1 <= n <= 4096:
            raise SpecError(f"schedule: {name} is {n!r}; it is a whole number from 1 to 4096")


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forward, then all backward."""
    _check(ranks=ranks, microbatches=microbatches)
    return schedule([[Action(p, kind, m) for kind in "FB" for m in range(microbatches)]
                     for p in range(ranks)])


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """As soon as one can go back it does: a rank keeps no more than the stages after it need."""
    _check(ranks=ranks, microbatches=microbatches)
    return schedule([_merged([Action(p, "F", m) for m in range(microbatches)],
                             [Action(p, "B", m) for m in range(microbatches)], ranks - 1 - p)
                     for p in range(ranks)])


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over `chunks` stages a rank, stage s on rank s mod ranks: microbatches go in rounds of `ranks`."""
    _check(ranks=ranks, microbatches=microbatches, chunks=chunks)
    if microbatches % ranks:
        raise SpecError(f"interleaved: {microbatches} microbatches are no rounds of {ranks}, one a rank")

    def order(p: int, kind: str) -> list[Action]:
        chunk = range(chunks) if kind == "F" else range(chunks)[::-1]
        return [Action(c * ranks + p, kind, first + i) for first in range(0, microbatches, ranks)
                for c in chunk for i in range(ranks)]
    return schedule([_merged(order(p, "F"), order(p, "B"), (ranks - 1 - p) * 2 + (chunks - 1) * ranks)
                     for p in range(ranks)])


def _merged(forward: Sequence[Action], backward: Sequence[Action], warmup: int) -> list[Action]:
    """So many forward, then one and one, then what is left."""
    n = min(warmup, len(forward))
    pairs = [a for f, b in zip(forward[n:], backward) for a in (f, b)]
    return [*forward[:n], *pairs, *backward[len(forward) - n:]]


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """1F1B with backward in two (ZB-H1): nobody waits for a W, so these fill what would be idle."""
    _check(ranks=ranks, microbatches=microbatches)
    return _by_clock({p: p for p in range(ranks)}, ranks, microbatches, ranks)


def zbv(ranks: int, microbatches: int) -> Schedule:
    """The same with two stages a rank, down and up again as a V: the loss is on the rank of the embedding."""
    _check(ranks=ranks, microbatches=microbatches)
    return _by_clock({s: min(s, 2 * ranks - 1 - s) for s in range(2 * ranks)}, ranks, microbatches, 2 * ranks)


def decode(ranks: int, groups: int, steps: int | Sequence[int]) -> Schedule:
    """`steps` tokens of `groups` groups of rows: while one is at one stage, others are elsewhere. They go in
    turns, and one that has ended has none: `steps` may be a number for each.

    >>> made = decode(2, 2, [3, 1])
    >>> print(made, made.after, sep=chr(10))
    0F0 0F1 0F2 0F3
    1F0 1F1 1F2 1F3
    (-1, -1, 0, 2)
    """
    each = [steps] * groups if isinstance(steps, int) and type(groups) is int else [*steps]
    _check(ranks=ranks, groups=groups, **{f"steps of group {g}": n for g, n in enumerate(each)})
    turns = [(step, g) for step in range(max(each)) for g, n in enumerate(each) if step < n]
    number = {turn: n for n, turn in enumerate(turns)}
    return schedule([[Action(p, "F", n) for n in range(len(turns))] for p in range(ranks)],
                    [number.get((step - 1, g), -1) for step, g in turns])


def _by_clock(rank_of: Mapping[int, int], ranks: int, microbatches: int, most: int) -> Schedule:
    """`most`: how many forward actions of a rank may wait for their W."""
    plan = Schedule(tuple(tuple(Action(s, kind, m) for s, at in rank_of.items() if at == p for kind in "FIW"
                                for m in range(microbatches)) for p in range(ranks)))
    done: set[Action] = set()
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    left = [sorted(actions, key=lambda a: ("IFW".index(a.kind), a.microbatch, -a.stage))
            for actions in plan.ranks]
    while any(left):
        now: list[Action] = []
        for p, actions in enumerate(left):
            kept = sum(a.kind == "F" for a in lists[p]) - sum(a.kind == "W" for a in lists[p])
            ready = (a for a in actions
                     if done.issuperset(plan.before(a)) and (a.kind != "F" or kept < most))
            if action := next(ready, None):
                now.append(action)
                lists[p].append(action)
                actions.remove(action)
        done.update(now)
    return schedule(lists)
