"""Attention of local tensors: whoever takes the call.

q: (b, t, k, g, h), k: (b, s, k, h), v: (b, s, k, v). A score is scale q k, bent by softcap, with a bias
added; what a query sees is a `Seen`. A sink is the score of a key without a value.

| called with | run by |
|---|---|
| nothing but places | torch's fused kernels; keys before the queries, and those among them, apart |
| a window as well, on a GPU | torch's flash kernel, over the keys that some query sees |
| places and a bias, on a GPU | torch's efficient kernel |
| a start, few queries, on a GPU | a kernel by lengths (`few_rows.attend_lengths`) |
| a start or a mask, no derivative | F.scaled_dot_product_attention, some queries at a time |
| all else | blocks of queries, whose scores are made anew in backward |
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.ops import flash
from shardlib.ops.attend_lse import Scores, attend_lse, parts_of, rows_at_once
from shardlib.ops.attend_vjp import attend_vjp, sinks_vjp
from shardlib.ops.few_rows import attend_lengths, attends_lengths, counts_of, differentiated
from shardlib.ops.seen import Seen


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None = None,
           sinks: Tensor | None = None) -> Tensor:
    """(b, t, k, g, v): the mean of v over what a query sees, weighted by exp of the scores.

    bias: (b, k, g, t, s), each 1 or all.  sinks: (k, g), each 1 or all.
    """
    if scores.softcap is None and bias is None and sinks is None and 0 not in (*q.shape, *k.shape):
        if not seen.known and seen.lengths is None and seen.window is None:
            return _attend_seen(q, k, v, seen, scores)
        if (causal := _at_once(seen)) is not None:
            return _attend_all(q, k, v, causal, scores.scale)
    if differentiated(q, k, v, *(x for x in (bias, sinks) if x is not None)):
        return _Attend.apply(q, k, v, seen, scores, bias, sinks)
    return attend_lse(q, k, v, seen, scores, bias, sinks)[0]


def _at_once(seen: Seen) -> bool | None:
    """Whether it is causal, where one call of a fused kernel is all; else None."""
    match parts_of(seen):
        case [(0, high, causal, None)] if high == seen.s:
            return causal
    return None


def _attend_all(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(*flash.heads_of(q, k, v), is_causal=causal, scale=scale,
                                         enable_gqa=flash.shares(q))
    return out.transpose(1, 2).unflatten(2, q.shape[2:4])


def _attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores) -> Tensor:
    if (seen.start is not None and seen.mask is None and seen.causal and scores.scale == q.shape[-1] ** -0.5
        and attends_lengths(q, k, v)):
        return attend_lengths(q, k, v, seen.reach, counts_of(q.device))
    b, t, heads, g, _ = q.shape
    n = rows_at_once(b * heads * g, t, k.shape[1])
    if n >= t:
        return attend_biased(q, k, v, seen.bias(g, q.dtype), scores.scale)
    parts = [(at, min(n, t - at)) for at in range(0, t, n)]
    return torch.cat([attend_biased(q[:, at:at + count], k, v, seen.part(at, count).bias(g, q.dtype),
                                    scores.scale) for at, count in parts], 1)


def attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(q k scale + bias) v; the queries of one kv head run as more rows of it."""
    b, t, heads, g, h = q.shape
    rows = q.view(b, heads, g, h) if t == 1 else q.permute(0, 2, 3, 1, 4).reshape(b, heads, g * t, h)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias,
                                         scale=scale)
    # some kernels of CUDA give the queries of a head one after another
    out = out.contiguous() if t == 1 else out
    return out.view(b, heads, g, t, -1).permute(0, 3, 1, 2, 4)


class _Attend(torch.autograd.Function):
    """For torch.autograd, which on one rank may ask: as `attention_vjp` has it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None,
                sinks: Tensor | None) -> Tensor:
        out, lse = attend_lse(q, k, v, seen, scores, bias, sinks)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
        ctx.seen, ctx.scores = seen, scores
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv, *more = attend_vjp(q, k, v, ctx.seen, ctx.scores, bias, out, lse, g)
        of_bias = more[0].to(bias.dtype) if more else None
        if sinks is None:
            return dq, dk, dv, None, None, of_bias, None
        of_sinks = sinks_vjp(sinks.to(lse.dtype), out.to(lse.dtype), lse, g.to(lse.dtype))
        return dq, dk, dv, None, None, of_bias, of_sinks.to(sinks.dtype)
