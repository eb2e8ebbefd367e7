"""Attention over keys of which each rank has a piece, and all have the queries, as in decoding.

A generator of requests (`shardlib.language.exchanges`). Each rank attends to its own keys; (result, lse) of
all are gathered, and merged in the order of the group (flash-decoding over ranks). Where queries are split
like the keys it is `attend_ring`.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlib.language.exchanges import Exchange, Requests, Site, alike
from shardlib.ops.attend_lse import Scores, attend_lse, merged, sunk, wide
from shardlib.ops.seen import Seen
from shardlib.wires import ALL_GATHER

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


def of_pieces(at: Site, kind: str) -> list[Exchange]:
    """Of `attend_pieces`; kind: the dtype in which operands are read."""
    b, t, heads, g, _ = at.shape(at.step.ins[0])
    elements = b * t * heads * g * (at.shape(at.step.ins[2])[-1] + 1)
    return [Exchange(ALL_GATHER, at.step.ins[1], _wide(kind), alike(len(at.members), elements),
                     "the results over pieces of the keys, and their lse")]


def _wide(kind: str) -> str:
    return str(wide(getattr(torch, kind))).removeprefix("torch.")
