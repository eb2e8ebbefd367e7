"""Which slots of which ranks hold which experts: replicas of those that get most, so that no rank is late.

>>> load = [600, 560, 120, 120, 20, 10, 10, 10]
>>> placement = rebalance(load, ranks=8, slots=2)
>>> round(max(placement.loads(load))), placement.replicas(0)
(197, 4)
>>> round(max(greedy(load, ranks=8, slots=2).loads(load)))
232

Tokens of an expert are shared evenly by its replicas, so a rank's load is the sum over its slots of the load
of an expert over its number of replicas. `rebalance` tries numbers of replicas, those of the greedy of
DeepSeek's EPLB among them, and mends what they lead to by swaps: nothing it gives is worse than greedy.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from shardlib.errors import SpecError

Slots = list[list[int]]
LIMITS, KEPT = 8, 4         # how many limits are tried, and how many of what they lead to are mended


@dataclass(frozen=True)
class Placement:
    """slots: for each rank the experts that it holds, one a slot."""
    slots: tuple[tuple[int, ...], ...]

    def replicas(self, expert: int) -> int:
        return sum(rank.count(expert) for rank in self.slots)

    def loads(self, load: Sequence[float]) -> list[float]:
        """Of each rank, where each expert has so many tokens."""
        return _loads(self.slots, load)

    def balance(self, load: Sequence[float]) -> float:
        """The mean of the ranks' loads over the largest: 1 where all end together."""
        loads = self.loads(load)
        return sum(loads) / len(loads) / max(loads) if max(loads, default=0) else 1.0


def rebalance(load: Sequence[float], ranks: int, slots: int, before: Placement | None = None,
              worth: float = 0.0) -> Placement:
    """A placement on `ranks` ranks of so many `slots` each whose busiest rank has little to do.

    load: tokens of each expert, at least 0.  before: the placement that there is; it is kept unless the
    busiest rank gets rid of more than `worth` of its load, and what is new keeps as much of it in its place
    as it may.
    Refused: fewer slots than experts.
    """
    _check(load, ranks, slots)
    tried = sorted((_packed(counts, load, ranks, slots) for counts in _counts(load, ranks, slots)),
                   key=lambda held: _badness(held, load))[:KEPT]
    start = _thawed(greedy(load, ranks, slots).slots)
    best = Placement(_frozen(min((_swapped(held, load) for held in (start, *tried)),
                                 key=lambda held: _badness(held, load))))
    if before is None or [*map(len, before.slots)] != [slots] * ranks:
        return best
    if max(best.loads(load)) >= (1 - worth) * max(before.loads(load)):
        return before
    return _near(best, before)


def greedy(load: Sequence[float], ranks: int, slots: int) -> Placement:
    """What DeepSeek's EPLB does: spare slots, one after the other, go to the expert whose replicas have most
    to do; then, from the largest on, each replica goes to the rank that has least to do and has room."""
    _check(load, ranks, slots)
    counts = _spread([1] * len(load), load, range(len(load)), ranks * slots - len(load))
    return Placement(_frozen(_packed(counts, load, ranks, slots)))


def _check(load: Sequence[float], ranks: int, slots: int) -> None:
    if not load or ranks * slots < len(load):
        raise SpecError(f"rebalance: {ranks} ranks of {slots} slots do not hold {len(load)} experts")
    if wrong := [x for x in load if not 0 <= x < float("inf")]:
        raise SpecError(f"rebalance: a load is {wrong[0]}; it is a number of tokens")


def _packed(counts: Sequence[int], load: Sequence[float], ranks: int, slots: int) -> Slots:
    made: Slots = [[] for _ in range(ranks)]
    has = [0.0] * ranks
    each = sorted((e for e, n in enumerate(counts) for _ in range(n)), key=lambda e: -load[e] / counts[e])
    for expert in each:
        rank = min((r for r in range(ranks) if len(made[r]) < slots), key=lambda r: has[r])
        made[rank].append(expert)
        has[rank] += load[expert] / counts[expert]
    return made


def _counts(load: Sequence[float], ranks: int, slots: int) -> Iterator[list[int]]:
    """Numbers of replicas to try: the largest experts have as few as let none of theirs exceed a limit, the
    others share what is left; for few and for many of the largest, and for limits up to what greedy reaches.

    Small experts in several slots are small neighbours to large ones that fill a rank nearly alone.
    """
    least, most = sum(load) / ranks, max(greedy(load, ranks, slots).loads(load))
    order = sorted(range(len(load)), key=lambda e: -load[e])
    for many in dict.fromkeys(min(round(1.5 ** i), len(load)) for i in range(len(load).bit_length() * 2 + 1)):
        for limit in (least + (most - least) * i / LIMITS for i in range(1, LIMITS + 1)):
            counts = [1] * len(load)
            for e in order[:many]:
                counts[e] = max(1, ceil(load[e] / limit)) if limit else 1
            spare = ranks * slots - sum(counts)
            if spare >= 0 and (spare == 0 or many < len(load)):
                yield _spread(counts, load, order[many:], spare)


def _spread(counts: list[int], load: Sequence[float], among: Sequence[int], spare: int) -> list[int]:
    """Spare slots, one after the other, go to the expert among these whose replicas have most to do."""
    for _ in range(spare):
        counts[max(among, key=lambda e: load[e] / counts[e])] += 1
    return counts


def _swapped(held: Slots, load: Sequence[float]) -> Slots:
    """Swaps two replicas of the busiest rank and another while the busier one of both gets less to do."""
    each = [x / max(1, sum(rank.count(e) for rank in held)) for e, x in enumerate(load)]
    has = [sum(each[e] for e in rank) for rank in held]
    while True:
        high = max(range(len(held)), key=lambda r: has[r])
        swaps = ((max(has[high] - each[a] + each[b], has[r] - each[b] + each[a]), r, i, j)
                 for r in range(len(held)) if r != high
                 for i, a in enumerate(held[high]) for j, b in enumerate(held[r]))
        after, r, i, j = min(swaps, default=(has[high], 0, 0, 0))
        if after >= has[high] * (1 - 1e-12):
            return held
        more = each[held[r][j]] - each[held[high][i]]
        has[high], has[r] = has[high] + more, has[r] - more
        held[high][i], held[r][j] = held[r][j], held[high][i]


def _near(made: Placement, before: Placement) -> Placement:
    """The same on ranks that have as much of it as they may already, each in its slot."""
    left, out = [*made.slots], []
    for old in before.slots:
        new = max(left, key=lambda rank: sum(min(rank.count(e), old.count(e)) for e in {*old}))
        left.remove(new)
        stay, rest = [*new], [None] * len(old)
        for slot, expert in enumerate(old):
            if expert in stay:
                rest[slot] = stay.pop(stay.index(expert))
        out.append(tuple(stay.pop(0) if expert is None else expert for expert in rest))
    return Placement(tuple(out))


def _loads(held: Sequence[Sequence[int]], load: Sequence[float]) -> list[float]:
    counts = [sum(rank.count(e) for rank in held) for e in range(len(load))]
    return [sum(load[e] / counts[e] for e in rank) for rank in held]


def _badness(held: Slots, load: Sequence[float]) -> list[float]:
    """From the busiest rank on: of two placements that one is better that is smaller where they part."""
    return sorted((round(x, 9) for x in _loads(held, load)), reverse=True)


def _frozen(held: Slots) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, held))


def _thawed(held: Sequence[Sequence[int]]) -> Slots:
    return [*map(list, held)]
