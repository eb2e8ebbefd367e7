"""Which slots of which ranks hold which experts: replicas of those that get most, so that no rank is late.

>>> load = [600, 560, 120, 120, 20, 10, 10, 10]
>>> placement = rebalance(load, ranks=8, slots=2)
>>> round(max(placement.loads(load))), placement.replicas(0)
(197, 4)
>>> round(max(greedy(load, ranks=8, slots=2).loads(load)))
232

Tokens of an expert are shared evenly by its replicas, so a rank's load is the sum over its slots of the load
of an expert over its number of replicas (`by_tokens`; of decoding, where what counts is how many experts a
rank reads, `by_experts_hit`). `rebalance` tries numbers of replicas, those of the greedy of DeepSeek's EPLB
among them, and mends what they lead to by swaps: nothing it gives is worse than greedy. Over several hosts an
expert's replicas are on one of them, and each host is a problem of its own.

`moves` are what takes one placement to another: the slots that change, and who has what comes there.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from math import ceil

import torch

from shardlib.errors import SpecError

Slots = list[list[int]]
Cost = Callable[[float, int], float]
LIMITS, KEPT = 8, 4         # how many limits are tried, and how many of what they lead to are mended


def by_tokens(load: float, replicas: int) -> float:
    """What each replica of an expert has to do, in tokens."""
    return load / replicas


def by_experts_hit(tokens: float, rows: int) -> Cost:
    """How likely a replica is hit in a step of `rows` tokens, where an expert had its load of so many
    `tokens`: a rank's sum is how many of its experts it reads.

    >>> cost = by_experts_hit(tokens=100, rows=1)
    >>> cost(50, 1), cost(50, 2)
    (0.5, 0.25)
    """
    def cost(load: float, replicas: int) -> float:
        return 1 - (1 - min(load / tokens, 1.0) / replicas) ** rows
    return cost


@dataclass(frozen=True)
class Move:
    """An expert's weights come from one rank's slot into another's; rank and slot may be the same rank's."""
    expert: int
    source: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """slots: for each rank the experts that it holds, one a slot; ranks may have more than others."""
    slots: tuple[tuple[int, ...], ...]

    def replicas(self, expert: int) -> int:
        return sum(rank.count(expert) for rank in self.slots)

    def loads(self, load: Sequence[float], cost: Cost = by_tokens) -> list[float]:
        """Of each rank, where each expert has so many tokens."""
        return _loads(self.slots, load, cost)

    def balance(self, load: Sequence[float], cost: Cost = by_tokens) -> float:
        """The mean of the ranks' loads over the largest: 1 where all end together."""
        loads = self.loads(load, cost)
        return sum(loads) / len(loads) / max(loads) if max(loads, default=0) else 1.0

    def table(self, width: int | None = None) -> list[list[int]]:
        """For each expert the numbers of its slots, counted through all ranks, and -1 up to `width`.

        >>> Placement(((0, 1), (2, 0))).table()
        [[0, 3], [1, -1], [2, -1]]
        """
        flat = [expert for rank in self.slots for expert in rank]
        found = [[s for s, expert in enumerate(flat) if expert == e] for e in range(max(flat) + 1)]
        most = max(map(len, found))
        if width is not None and most > width:
            raise SpecError(f"placement: an expert has {most} replicas, and the table room for {width}")
        return [each + [-1] * ((width or most) - len(each)) for each in found]


def evenly(experts: int, ranks: int) -> Placement:
    """Each expert once, in order, as a split dim lies."""
    each, more = divmod(experts, ranks)
    begins = [rank * each + min(rank, more) for rank in range(ranks + 1)]
    return Placement(tuple(tuple(range(a, b)) for a, b in zip(begins, begins[1:])))


def moves(before: Placement, after: Placement) -> tuple[Move, ...]:
    """What has to travel for `after` to be: one for each slot whose expert is another one, and none besides.

    It comes from the rank itself where that has the expert, else in turn from the ranks that have it. All are
    read before any is written: see `Model.place`.

    >>> for each in moves(Placement(((0, 1), (2, 3))), Placement(((0, 2), (2, 1)))): print(each)
    Move(expert=2, source=(1, 0), target=(0, 1))
    Move(expert=1, source=(0, 1), target=(1, 1))
    """
    holders: dict[int, list[tuple[int, int]]] = {}
    for rank, held in enumerate(before.slots):
        for slot, expert in enumerate(held):
            holders.setdefault(expert, []).append((rank, slot))
    made, turn = [], dict.fromkeys(holders, 0)
    for rank, held in enumerate(after.slots):
        for slot, expert in enumerate(held):
            old = before.slots[rank] if rank < len(before.slots) else ()
            if expert not in holders:
                raise SpecError(f"moves: nobody has expert {expert}")
            if slot < len(old) and old[slot] == expert:
                continue
            source = next((at for at in holders[expert] if at[0] == rank), None)
            if source is None:
                source = holders[expert][turn[expert] % len(holders[expert])]
                turn[expert] += 1
            made.append(Move(expert, source, (rank, slot)))
    return tuple(made)


def rebalance(load: Sequence[float], ranks: int, slots: int, before: Placement | None = None,
              worth: float = 0.0, *, cost: Cost = by_tokens, hosts: int = 1) -> Placement:
    """A placement on `ranks` ranks of so many `slots` each whose busiest rank has little to do.

    load: tokens of each expert, at least 0.  before: the placement that there is; it is kept unless the
    busiest rank gets rid of more than `worth` of its load, and what is new keeps as much of it in its place
    as it may.  cost: what each replica has to do, of the load and the number of replicas.  hosts: so many
    have as many ranks each, one after the other; an expert's replicas are on one host.
    Refused: fewer slots than experts; ranks that are not as many on each host.
    """
    _check(load, ranks, slots, hosts)
    best = _by_hosts(load, ranks, slots, cost, hosts) if hosts > 1 else _best(load, ranks, slots, cost)
    if before is None or [*map(len, before.slots)] != [slots] * ranks:
        return best
    if max(best.loads(load, cost)) >= (1 - worth) * max(before.loads(load, cost)):
        return before
    return _near(best, before, hosts)


def greedy(load: Sequence[float], ranks: int, slots: int, cost: Cost = by_tokens) -> Placement:
    """What DeepSeek's EPLB does: spare slots, one after the other, go to the expert whose replicas have most
    to do; then, from the largest on, each replica goes to the rank that has least to do and has room."""
    _check(load, ranks, slots)
    counts = _spread([1] * len(load), load, range(len(load)), ranks * slots - len(load), cost)
    return Placement(_frozen(_packed(counts, load, ranks, slots, cost)))


def _check(load: Sequence[float], ranks: int, slots: int, hosts: int = 1) -> None:
    if not load or ranks * slots < len(load):
        raise SpecError(f"rebalance: {ranks} ranks of {slots} slots do not hold {len(load)} experts")
    if wrong := [x for x in load if not 0 <= x < float("inf")]:
        raise SpecError(f"rebalance: a load is {wrong[0]}; it is a number of tokens")
    if hosts < 1 or ranks % hosts or len(load) < hosts:
        raise SpecError(f"rebalance: {ranks} ranks with {len(load)} experts are no {hosts} hosts of as many")


def _best(load: Sequence[float], ranks: int, slots: int, cost: Cost) -> Placement:
    start = _thawed(greedy(load, ranks, slots, cost).slots)
    most = max(_loads(start, load, cost))
    tried = sorted((_packed(counts, load, ranks, slots, cost)
                    for counts in _counts(load, ranks, slots, cost, most)),
                   key=lambda held: _badness(held, load, cost))[:KEPT]
    return Placement(_frozen(min((_swapped(held, load, cost) for held in (start, *tried)),
                                 key=lambda held: _badness(held, load, cost))))


def _by_hosts(load: Sequence[float], ranks: int, slots: int, cost: Cost, hosts: int) -> Placement:
    """Experts are dealt to hosts first, each as one replica, as many to each as there are or one more."""
    room = ceil(len(load) / hosts)
    dealt = _swapped(_packed([1] * len(load), load, hosts, room, by_tokens), load, by_tokens)
    held: list[tuple[int, ...]] = []
    for own in dealt:
        inside = _best([load[e] for e in own], ranks // hosts, slots, cost)
        held += [tuple(own[i] for i in rank) for rank in inside.slots]
    return Placement(tuple(held))


def _packed(counts: Sequence[int], load: Sequence[float], ranks: int, slots: int, cost: Cost) -> Slots:
    """From the largest replica on, each goes to the rank that has least to do, of those that have room."""
    each = [cost(x, n) for x, n in zip(load, counts)]
    made: Slots = [[] for _ in range(ranks)]
    free = [(0.0, rank) for rank in range(ranks)]
    for expert in sorted((e for e, n in enumerate(counts) for _ in range(n)), key=lambda e: -each[e]):
        has, rank = heappop(free)
        made[rank].append(expert)
        if len(made[rank]) < slots:
            heappush(free, (has + each[expert], rank))
    return made


def _counts(load: Sequence[float], ranks: int, slots: int, cost: Cost, most: float) -> Iterator[list[int]]:
    """Numbers of replicas to try: the largest experts have as few as let none of theirs exceed a limit, the
    others share what is left; for few and for many of the largest, and for limits up to what greedy reaches.

    Small experts in several slots are small neighbours to large ones that fill a rank nearly alone.
    """
    least = sum(cost(x, 1) for x in load) / ranks
    order = sorted(range(len(load)), key=lambda e: -load[e])
    for many in dict.fromkeys(min(round(1.5 ** i), len(load)) for i in range(len(load).bit_length() * 2 + 1)):
        for limit in (least + (most - least) * i / LIMITS for i in range(1, LIMITS + 1)):
            counts = [1] * len(load)
            for e in order[:many]:
                counts[e] = max(1, ceil(cost(load[e], 1) / limit)) if limit else 1
            spare = ranks * slots - sum(counts)
            if spare >= 0 and (spare == 0 or many < len(load)):
                yield _spread(counts, load, order[many:], spare, cost)


def _spread(counts: list[int], load: Sequence[float], among: Sequence[int], spare: int,
            cost: Cost) -> list[int]:
    """Spare slots, one after the other, go to the expert among these whose replicas have most to do."""
    busy = [(-cost(load[e], counts[e]), place, e) for place, e in enumerate(among)]
    heapify(busy)
    for _ in range(spare):
        _, place, e = busy[0]
        counts[e] += 1
        heapreplace(busy, (-cost(load[e], counts[e]), place, e))
    return counts


def _swapped(held: Slots, load: Sequence[float], cost: Cost) -> Slots:
    """Swaps two replicas of the busiest rank and another while the busier one of both gets less to do."""
    each, width = _each(held, load, cost), max(map(len, held))
    there = torch.tensor([[True] * len(rank) + [False] * (width - len(rank)) for rank in held])
    costs = torch.tensor([[each[e] for e in rank] + [0.0] * (width - len(rank)) for rank in held],
                         dtype=torch.float64)
    while True:
        has = costs.sum(1)
        high = int(has.argmax())
        a, most = costs[high][None, :, None], has[high]         # rank, slot of the busiest, slot of the rank
        b = costs[:, None, :]
        after = torch.maximum(most - a + b, has[:, None, None] - b + a)
        after.masked_fill_(~(there[high][None, :, None] & there[:, None, :]), torch.inf)
        after[high] = torch.inf
        best = int(after.argmin())
        if not after.numel() or float(after.view(-1)[best]) >= float(most) * (1 - 1e-12):
            return held
        rank, i, j = best // width ** 2, best // width % width, best % width
        held[high][i], held[rank][j] = held[rank][j], held[high][i]
        costs[high, i], costs[rank, j] = costs[rank, j].item(), costs[high, i].item()


def _near(made: Placement, before: Placement, hosts: int) -> Placement:
    """The same on ranks of their host that have as much of it as they may already, each in its slot."""
    out, each = [], len(made.slots) // hosts
    for first in range(0, len(made.slots), each):
        left = [*made.slots[first:first + each]]
        for old in before.slots[first:first + each]:
            new = max(left, key=lambda rank: sum(min(rank.count(e), old.count(e)) for e in {*old}))
            left.remove(new)
            stay, rest = [*new], [None] * len(old)
            for slot, expert in enumerate(old):
                if expert in stay:
                    rest[slot] = stay.pop(stay.index(expert))
            out.append(tuple(stay.pop(0) if expert is None else expert for expert in rest))
    return Placement(tuple(out))


def _each(held: Sequence[Sequence[int]], load: Sequence[float], cost: Cost) -> list[float]:
    counts = [0] * len(load)
    for rank in held:
        for e in rank:
            counts[e] += 1
    return [cost(x, max(n, 1)) for x, n in zip(load, counts)]


def _loads(held: Sequence[Sequence[int]], load: Sequence[float], cost: Cost) -> list[float]:
    each = _each(held, load, cost)
    return [sum(each[e] for e in rank) for rank in held]


def _badness(held: Slots, load: Sequence[float], cost: Cost) -> list[float]:
    """From the busiest rank on: of two placements that one is better that is smaller where they part."""
    return sorted((round(x, 9) for x in _loads(held, load, cost)), reverse=True)


def _frozen(held: Slots) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, held))


def _thawed(held: Sequence[Sequence[int]]) -> Slots:
    return [*map(list, held)]
