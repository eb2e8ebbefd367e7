"""Attention over keys of which each rank has a piece: what it asks of the others, and does in between.

Each is a generator of requests (`shardlib.language.exchanges`). No keys are gathered, no scores are held.

- **pieces**: all ranks have the queries, as in decoding. Each attends to its own keys; (result, lse) of all
  are gathered, and merged in the order of the group (flash-decoding over ranks).
- **ring**: queries and keys are split over the same axes. Keys and values go round, each hop to the next rank
  (Liu et al. 2023); in the derivative what they are owed goes with them, one hop more, home. What is causal
  alone is dealt so that all have as much to do (`Halves`; zigzag, Zhu 2024).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlib.language.exchanges import Exchange, Requests, Site, alike, passing_on
from shardlib.ops.attend_lse import Scores, attend_lse, empty, merged, sunk, wide
from shardlib.ops.attend_vjp import attend_vjp
from shardlib.ops.halves import Halves
from shardlib.ops.seen import Seen
from shardlib.wires import ALL_GATHER, ALL_TO_ALL

Pieces = Sequence[tuple[int, int]]


def attend_pieces(group: object, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores,
                  bias: Tensor | None = None, sinks: Tensor | None = None) -> Requests:
    """The result, and the lse. pieces: (start, size) of what each member has of the keys."""
    out, lse = attend_lse(q, k, v, seen, scores, bias)
    mine = torch.cat([out.to(lse.dtype), lse[..., None]], -1)
    got = yield group, "all_gather", mine, 0, (len(mine),) * len(pieces)
    whole, lse = merged([(x[..., :-1], x[..., -1]) for x in got.unflatten(0, (len(pieces), -1)).unbind(0)]
                        if mine.numel() else [(out, lse)])
    whole = whole.to(out.dtype)
    return (whole, lse) if sinks is None else sunk(whole, lse, sinks)


@dataclass(frozen=True)
class Hop:
    """What a rank does with the keys that have come to it: rows of its queries see keys of them."""
    rows: slice
    keys: slice
    seen: Seen


def hops(pieces: Pieces, me: int, seen: Seen, balanced: bool) -> list[Hop | None]:
    """By number; None where nothing is seen."""
    n, every = len(pieces), slice(None)
    if not balanced:
        held = (pieces[(me - i) % n] for i in range(n))
        shown = [replace(seen, first=first, s=size) for first, size in held]
        return [Hop(every, every, s) if not i or _sees(s) else None for i, s in enumerate(shown)]
    halves = Halves(pieces, me)
    made: list[Hop | None] = []
    (_, mine), (_, rest) = halves.mine
    for i in range(n):
        (_, first), (_, second) = halves.of((me - i) % n)
        if not i:
            made.append(Hop(every, every, Seen(0, mine + rest, 0, first + second)))
        elif i <= me:                                   # of a rank before
            made.append(Hop(every, slice(first), Seen(0, mine + rest, 0, first, causal=False)))
        else:
            made.append(Hop(slice(mine, None), every, Seen(0, rest, 0, first + second, causal=False)))
    return made


def attend_ring(group: object, pieces: Pieces, me: int, balanced: bool, q: Tensor, k: Tensor, v: Tensor,
                seen: Seen, scores: Scores, *, sinks: Tensor | None = None) -> Requests:
    """The result, and the lse. me: which of the members this rank is; balanced: see `Halves`, of what is
    causal alone, with as many keys as queries."""
    halves = Halves(pieces, me)
    if balanced:
        q, k, v = _opened((yield from halves.dealt(group, _packed(q, k, v))), q, k, v)
    held, (out, lse) = torch.cat([k, v], -1), empty(q, v)
    out = out.to(lse.dtype)
    for i, hop in enumerate(hops(pieces, me, seen, balanced)):
        if i:
            held = yield from _passed_on(group, pieces, me, balanced, held, i)
        if hop is not None:
            key, value = _apart(held[:, hop.keys], k)
            made, its = attend_lse(q[:, hop.rows], key, value, hop.seen, scores)
            out[:, hop.rows], lse[:, hop.rows] = merged([(out[:, hop.rows], lse[:, hop.rows]),
                                                         (made.to(lse.dtype), its)])
    if balanced:
        both = yield from halves.home(group, torch.cat([out, lse[..., None]], -1))
        out, lse = both[..., :-1], both[..., -1].contiguous()
    out = out.to(q.dtype)
    return (out, lse) if sinks is None else sunk(out, lse, sinks)


def attend_ring_vjp(group: object, pieces: Pieces, me: int, balanced: bool, q: Tensor, k: Tensor, v: Tensor,
                    seen: Seen, scores: Scores, out: Tensor, lse: Tensor, g: Tensor) -> Requests:
    """The cotangents of q, k and v, which are added up in float32 at least."""
    halves = Halves(pieces, me)
    if balanced:
        of = q, k, v, out.to(q.dtype), g.to(q.dtype)
        q, k, v, out, g = _opened((yield from halves.dealt(group, _packed(*of))), *of)
        lse = yield from halves.dealt(group, lse)
    held, of_q = torch.cat([k, v], -1), torch.zeros_like(q, dtype=wide(q.dtype))
    owed = torch.zeros_like(held, dtype=wide(k.dtype))
    for i, hop in enumerate(hops(pieces, me, seen, balanced)):
        if i:
            held = yield from _passed_on(group, pieces, me, balanced, held, i)
            owed = yield from _passed_on(group, pieces, me, balanced, owed, i)
        if hop is not None:
            key, value = _apart(held[:, hop.keys], k)
            mine, *others = attend_vjp(q[:, hop.rows], key, value, hop.seen, scores, None, out[:, hop.rows],
                                       lse[:, hop.rows], g[:, hop.rows])
            of_q[:, hop.rows] += mine
            owed[:, hop.keys] += torch.cat(others, -1)
    owed = yield from _passed_on(group, pieces, me, balanced, owed, len(pieces))
    made = (of_q.to(q.dtype), *(x.to(k.dtype) for x in _apart(owed, k)))
    return _opened((yield from halves.home(group, _packed(*made))), *made) if balanced else made


def _packed(*xs: Tensor) -> Tensor:
    """Of (b, t, k, ..) one, (b, t, k, all behind)."""
    return torch.cat([x.flatten(3) for x in xs], -1)


def _opened(packed: Tensor, *like: Tensor) -> list[Tensor]:
    pieces = packed.split([x.shape[3:].numel() for x in like], -1)
    return [piece.unflatten(3, x.shape[3:]) for piece, x in zip(pieces, like)]


def _sees(seen: Seen) -> bool:
    """Whether there is anything to be seen, as far as sizes say."""
    low, high = seen.keys(0, seen.t)
    return low < high


def _apart(held: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return held[..., :k.shape[-1]], held[..., k.shape[-1]:]


def _passed_on(group: object, pieces: Pieces, me: int, balanced: bool, x: Tensor, hop: int) -> Requests:
    """What the rank before has held; x, (b, s, ..), goes to the next."""
    n = len(pieces)
    size = _sizes(pieces, balanced)[(me - hop) % n]
    nothing = x[:, :0]
    shapes = tuple((len(x), size if i == (me - 1) % n else 0, *x.shape[2:]) for i in range(n))
    got = yield group, "all_to_all", tuple(x if i == (me + 1) % n else nothing for i in range(n)), shapes
    return got[(me - 1) % n]


def _sizes(pieces: Pieces, balanced: bool) -> list[int]:
    """How many keys each member sends round."""
    halves = Halves(pieces, 0)
    return [sum(n for _, n in halves.of(i)) if balanced else size for i, (_, size) in enumerate(pieces)]


# -- what they exchange --------------------------------------------------------------------------------------

def of_pieces(at: Site, kind: str) -> list[Exchange]:
    """Of `attend_pieces`; kind: the dtype in which operands are read."""
    b, t, heads, g, _ = at.shape(at.step.ins[0])
    elements = b * t * heads * g * (at.shape(at.step.ins[2])[-1] + 1)
    return [Exchange(ALL_GATHER, at.step.ins[1], _wide(kind), alike(len(at.members), elements),
                     "the results over pieces of the keys, and their lse")]


def of_ring(at: Site, kind: str, balanced: bool, back: bool = False) -> list[Exchange]:
    """Of `attend_ring`; `back`: of its derivative."""
    (b, _, heads, g, h), v = at.shape(at.step.ins[0]), at.shape(at.step.ins[2])[-1]
    spec, n, pieces = at.step.ins[1], len(at.members), at.pieces(at.step.ins[1].dims[1])
    sizes, halves = [b * heads * (h + v) * size for size in _sizes(pieces, balanced)], Halves(pieces, 0)

    def hop(i: int, dtype: str, what: str) -> Exchange:
        why = f"hop {i} of the ring: {what}"
        return Exchange(ALL_TO_ALL, spec, dtype, passing_on(n, sizes, i), why)

    def dealt(row: int, dtype: str, home: bool = False) -> list[Exchange]:
        why = "results of halves, home" if home else "halves from both ends: all have as much to do"
        parts = halves.parts(b * heads * row, home)
        return [Exchange(ALL_TO_ALL, spec, dtype, parts, why)] if balanced else []
    made = dealt(g * h + h + v + (2 * g * v if back else 0), kind)
    made += dealt(g, _wide(kind)) if back else []
    for i in range(1, n + back):
        made += [hop(i, kind, "keys and values")] if i < n else []
        made += [hop(i, _wide(kind), "their gradients")] if back else []
    return made + (dealt(g * h + h + v, kind, True) if back else dealt(g * (v + 1), _wide(kind), True))


def _wide(kind: str) -> str:
    return str(wide(getattr(torch, kind))).removeprefix("torch.")
