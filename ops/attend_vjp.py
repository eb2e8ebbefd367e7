"""The derivative of attention of local tensors, from what forward kept: the result and the lse.

No scores are held: torch's fused kernels make them anew, or blocks of queries do.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from shardlib.ops import flash
from shardlib.ops.attend_lse import MOST_SCORES, Scores, blocks, part, parts_of, wide
from shardlib.ops.seen import Seen


def attend_vjp(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None, out: Tensor,
               lse: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of q, k, v and, where there is one, bias.

    k and v may be some of the keys: `out` and `lse` are of all that a query sees.
    """
    if 0 in (*q.shape[:4], k.shape[1]):
        return tuple(torch.zeros_like(x) for x in (q, k, v, *([] if bias is None else [bias])))
    return (_fused(q, k, v, seen, scores, bias, out, lse, g)
            or _in_blocks(q, k, v, seen, scores, bias, out, lse, g))


def sinks_vjp(sinks: Tensor, out: Tensor, lse: Tensor, g: Tensor) -> Tensor:
    """What a sink takes away from all keys' values; sinks: (k, g), each 1 or all."""
    given = (g * out).sum(-1) * (sinks - lse).exp()
    return -given.sum_to_size((1, 1, *sinks.shape))[0, 0]


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None, out: Tensor,
           lse: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:
    if scores.softcap is not None or (parts := parts_of(seen)) is None:
        return None
    if bias is not None and math.prod(q.shape[:4]) * k.shape[1] > max(MOST_SCORES, 2 * bias.numel()):
        return None                                     # what the kernel gives of a bias is of all pairs
    made = []
    for low, high, causal, near in parts:
        added = None if bias is None else part(bias, 0, seen.t, low, high)
        got = flash.attend_vjp(q, k[:, low:high], v[:, low:high], out, lse, g, causal, scores.scale, near,
                               added)
        if got is None:
            return None
        made.append(got)
    dq, *more = (list(of) for of in zip(*made))
    first = parts[0].low
    of_k, of_v = (_along(1, pieces, first, x) for pieces, x in zip(more, (k, v)))
    dq = dq[0] if len(dq) == 1 else dq[0] + dq[1]
    if bias is None:
        return dq, of_k, of_v
    return dq, of_k, of_v, (_along(4, more[2], first, bias) if bias.shape[4] > 1 else sum(more[2]))


def _along(dim: int, pieces: list[Tensor], first: int, like: Tensor) -> Tensor:
    """What comes for the keys of `like` from `first` on, in order; nothing for the others."""
    behind = like.shape[dim] - first - sum(x.shape[dim] for x in pieces)
    if len(pieces) == 1 and not first and not behind:
        return pieces[0]
    zeros = (torch.zeros_like(like.narrow(dim, 0, n)) for n in (first, behind))
    return torch.cat([next(zeros), *pieces, next(zeros)], dim)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None, out: Tensor,
               lse: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    kind, of_q = wide(q.dtype), []
    of_k, of_v = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (k, v))
    of_bias = None if bias is None else torch.zeros(bias.shape, dtype=kind, device=bias.device)
    for of in blocks(q, k, seen, scores, bias):
        rows, keys = slice(of.at, of.at + of.n), slice(of.low, of.high)
        weight = (of.score - lse[:, rows].permute(0, 2, 3, 1)[..., None].to(kind)).exp()
        weight = weight.masked_fill(of.score == float("-inf"), 0)       # the lse may be -inf, too
        of_v[:, keys] += torch.einsum("bkgts,btkgv->bskv", weight.to(g.dtype), g[:, rows])
        given = torch.einsum("btkgv,bskv->bkgts", g[:, rows], v[:, keys]).to(kind)
        mean = (g[:, rows].to(kind) * out[:, rows]).sum(-1).permute(0, 2, 3, 1)[..., None]
        of_score = weight * (given - mean)
        if of_bias is not None:
            here = part(of_bias, of.at, of.n, of.low, of.high)
            here += of_score.sum_to_size(here.shape)
        if scores.softcap is not None:
            of_score = of_score * (1 - (of.capped / scores.softcap).square())
        of_score = (of_score * scores.scale).to(q.dtype)
        of_q.append(torch.einsum("bkgts,bskh->btkgh", of_score, k[:, keys]))
        of_k[:, keys] += torch.einsum("bkgts,btkgh->bskh", of_score, q[:, rows])
    made = (torch.cat(of_q, 1), of_k.to(k.dtype), of_v.to(v.dtype))
    return made if of_bias is None else (*made, of_bias.to(q.dtype))
