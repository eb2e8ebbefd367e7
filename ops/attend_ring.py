"""Attention, and its derivative, whose queries and keys are split over the same ranks: by `Ring`'s rounds.

What a round needs comes while the one before it is computed, and what came of it goes home under the next
one. What a rank sees of its own keys is computed in two parts, by heads: one while the first pieces come, the
other while the last results go home. No keys are gathered, no scores are held; sums are of float32 at least,
where they belong, and what travels has the dtype of the operands.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod

import torch
from torch import Tensor

from shardlib.language.exchanges import Early, Exchange, Requests, Site, arrived
from shardlib.ops.attend_lse import Scores, attend_lse, empty, merge, sunk, wide
from shardlib.ops.attend_vjp import attend_vjp
from shardlib.ops.ring import Message, Ring, Work
from shardlib.ops.seen import Seen
from shardlib.wires import ALL_TO_ALL, Part

Shape = tuple[int, ...]


def attend_ring(group: object, ring: Ring, me: int, q: Tensor, k: Tensor, v: Tensor, seen: Seen,
                scores: Scores, *, sinks: Tensor | None = None) -> Requests:
    """The result, and the lse. me: which of the members this rank is."""
    side = _Forward(ring, q, k, v, seen, scores)
    yield from _in_rounds(group, me, side)
    out = side.out.to(q.dtype)
    return (out, side.lse) if sinks is None else sunk(out, side.lse, sinks)


def attend_ring_vjp(group: object, ring: Ring, me: int, q: Tensor, k: Tensor, v: Tensor, seen: Seen,
                    scores: Scores, out: Tensor, lse: Tensor, g: Tensor) -> Requests:
    """The cotangents of q, k and v."""
    side = _Backward(ring, q, k, v, seen, scores, out.to(q.dtype), lse, g.to(q.dtype))
    yield from _in_rounds(group, me, side)
    return tuple(of.to(x.dtype) for of, x in zip(side.sums, (q, k, v)))


# -- what is computed ----------------------------------------------------------------------------------------

@dataclass
class _Forward:
    ring: Ring
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Seen
    scores: Scores
    out: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    back = False

    def __post_init__(self) -> None:
        out, self.lse = empty(self.q, self.v)
        self.out = out.to(self.lse.dtype)

    def sent(self, w: Work) -> tuple[Tensor, ...]:
        """What this rank has of a work elsewhere."""
        return _of(w.seen, self.k, self.v) if w.takes_keys else _of(w.rows, self.q)

    def own(self, heads: slice) -> None:
        q, k, v, out, lse = (x[:, :, heads] for x in (self.q, self.k, self.v, self.out, self.lse))
        merge(out, lse, *attend_lse(q, k, v, self.seen, self.scores))

    def computed(self, w: Work, *came: Tensor) -> tuple[Tensor, ...]:
        """With what has come; what goes home."""
        q, k, v = (*_of(w.rows, self.q), *came) if w.takes_keys else (*came, *_of(w.seen, self.k, self.v))
        out, lse = attend_lse(q, k, v, self.ring.shown(w, self.seen), self.scores)
        if not w.takes_keys:
            return _packed(lse, out.dtype), out
        self._add(w, out, lse)
        return ()

    def taken(self, w: Work, *came: Tensor) -> None:
        bits, out = came
        self._add(w, out, _unpacked(bits, self.lse))

    def _add(self, w: Work, out: Tensor, lse: Tensor) -> None:
        total, its = _of(w.rows, self.out, self.lse)
        merge(total, its, out, lse)


@dataclass
class _Backward:
    ring: Ring
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Seen
    scores: Scores
    out: Tensor
    lse: Tensor
    g: Tensor
    sums: tuple[Tensor, ...] = field(init=False)
    back = True

    def __post_init__(self) -> None:
        self.sums = tuple(torch.zeros_like(x, dtype=wide(x.dtype)) for x in (self.q, self.k, self.v))

    def sent(self, w: Work) -> tuple[Tensor, ...]:
        if w.takes_keys:
            return _of(w.seen, self.k, self.v)
        lse, *others = _of(w.rows, self.lse, self.q, self.out, self.g)
        return _packed(lse, self.q.dtype), *others

    def own(self, heads: slice) -> None:
        q, k, v, out, lse, g = (x[:, :, heads] for x in (self.q, self.k, self.v, self.out, self.lse, self.g))
        made = attend_vjp(q, k, v, self.seen, self.scores, None, out, lse, g)
        for total, of in zip(self.sums, made):
            total[:, :, heads] += of

    def computed(self, w: Work, *came: Tensor) -> tuple[Tensor, ...]:
        if w.takes_keys:
            k, v = came
            lse, q, out, g = _of(w.rows, self.lse, self.q, self.out, self.g)
        else:
            (bits, q, out, g), (k, v) = came, _of(w.seen, self.k, self.v)
            lse = _unpacked(bits, self.lse)
        dq, dk, dv = attend_vjp(q, k, v, self.ring.shown(w, self.seen), self.scores, None, out, lse, g)
        own, others = ((dq,), (dk, dv)) if w.takes_keys else ((dk, dv), (dq,))
        self._add(w.takes_keys, w, *own)
        return others

    def taken(self, w: Work, *came: Tensor) -> None:
        self._add(not w.takes_keys, w, *came)

    def _add(self, to_queries: bool, w: Work, *made: Tensor) -> None:
        sums = _of(w.rows, self.sums[0]) if to_queries else _of(w.seen, *self.sums[1:])
        for total, of in zip(sums, made):
            total += of


def _of(at: tuple[int, int], *xs: Tensor) -> tuple[Tensor, ...]:
    """These rows of each."""
    return tuple(x.narrow(1, *at) for x in xs)


def _packed(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Its bits as elements of the dtype in which all travels."""
    return lse.contiguous().view(dtype)


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    return bits.clone().view(like.dtype)                # a clone begins where one of its elements may


# -- what travels --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Shapes:
    """What messages are made of. words: elements of what travels that one lse takes."""
    b: int
    heads: int
    g: int
    h: int
    v: int
    words: int
    back: bool

    def of(self, m: Message) -> list[Shape]:
        rows, keys = ((self.b, n, self.heads) for _, n in (m.work.rows, m.work.seen))
        if m.work.takes_keys:
            return [(*keys, self.h), (*keys, self.v)]
        lse, q, out = (*rows, self.g * self.words), (*rows, self.g, self.h), (*rows, self.g, self.v)
        if m.home:
            return [q] if self.back else [lse, out]
        return [lse, q, out, out] if self.back else [q]

    def elements(self, m: Message) -> int:
        return sum(map(prod, self.of(m)))


def _in_rounds(group: object, me: int, side: _Forward | _Backward) -> Requests:
    """Tells `side` what to compute, when, and brings what it needs."""
    ring, (b, _, heads, g, h) = side.ring, side.q.shape
    shapes = _Shapes(b, heads, g, h, side.v.shape[-1], _words(side.q.dtype), side.back)
    exchanges, half, members = ring.exchanges(side.back), -(-heads // 2), range(len(ring.keys))
    made: dict[Work, tuple[Tensor, ...]] = {}
    come: dict[Work, list[Tensor]] = {}

    def send(i: int) -> Requests:
        """What has come is taken later."""
        if not exchanges[i]:
            return None
        goes = [[x.reshape(-1) for m in exchanges[i] if m.ends == (me, to)
                 for x in (made.pop(m.work) if m.home else side.sent(m.work))] for to in members]
        flat = torch.cat([side.q.new_empty(0), *chain.from_iterable(goes)])
        comes = tuple((sum(shapes.elements(m) for m in exchanges[i] if m.ends == (source, me)),)
                      for source in members)
        return (yield Early((group, "all_to_all", flat.split([sum(map(len, xs)) for xs in goes]), comes)))

    def take(i: int, answer: object) -> None:
        for source, flat in enumerate(arrived(answer)) if exchanges[i] else ():
            here = [m for m in exchanges[i] if m.ends == (source, me)]
            pieces = iter(flat.split([prod(shape) for m in here for shape in shapes.of(m)]))
            for m in here:
                xs = [next(pieces).view(shape) for shape in shapes.of(m)]
                if m.home:
                    side.taken(m.work, *xs)
                else:
                    come[m.work] = xs

    under_way = yield from send(0)
    side.own(slice(half))
    for i, works in enumerate(ring.rounds):
        following = yield from send(i + 1)
        take(i, under_way)
        under_way = following
        for w in works:
            if w.at == me:
                made[w] = side.computed(w, *come.pop(w))
    last = yield from send(len(ring.rounds) + 1)
    side.own(slice(half, None))
    take(len(ring.rounds), under_way)
    take(len(ring.rounds) + 1, last)


def _words(dtype: torch.dtype) -> int:
    return wide(dtype).itemsize // dtype.itemsize


def of_ring(at: Site, kind: str, ring: Ring, back: bool = False) -> list[Exchange]:
    """What `attend_ring` exchanges; `back`: its derivative. kind: the dtype in which operands are read."""
    (b, _, heads, g, h), v = at.shape(at.step.ins[0]), at.shape(at.step.ins[2])[-1]
    shapes, n = _Shapes(b, heads, g, h, v, _words(getattr(torch, kind)), back), len(ring.keys)

    def parts(messages: Sequence[Message]) -> tuple[Part, ...]:
        sent = [[sum(shapes.elements(m) for m in messages if m.ends == (i, j)) for j in range(n)]
                for i in range(n)]
        return tuple(Part(n, i, sum(sent[i]), sum(of[i] for of in sent), passes=tuple(sent[i]))
                     for i in range(n))
    return [Exchange(ALL_TO_ALL, at.step.ins[1], kind, parts(messages), _why(i, messages))
            for i, messages in enumerate(ring.exchanges(back)) if messages]


def _why(i: int, messages: Sequence[Message]) -> str:
    going, home = ({m.work.takes_keys for m in messages if m.home is of} for of in (False, True))
    what = {(True,): "keys", (False,): "queries", (False, True): "keys, or queries"}
    said = [f"{what[tuple(sorted(going))]} of round {i + 1}"] if going else []
    return "ring: " + ", ".join([*said, *([f"what came of round {i - 1}, home"] if home else [])])
