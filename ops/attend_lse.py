"""Attention of local tensors with the log-sum-exp of their scores, of which a derivative is made, and results
over pieces of the keys are merged.

The lse, (b, t, k, g), is the log of the sum of exp of what a query sees, of its sink too; -inf where there is
nothing. The result is zero there.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardlib.ops import flash
from shardlib.ops.few_rows import differentiated
from shardlib.ops.seen import Seen

MOST_SCORES = 1 << 24
"""Scores that are held at once: 64 MiB of float32."""


@dataclass(frozen=True)
class Scores:
    """How scores are made of products: `scale` times them, then softcap * tanh(score / softcap)."""
    scale: float
    softcap: float | None = None


def attend_lse(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None = None,
               sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The result, and the lse."""
    b, t, heads, g, h = q.shape
    if 0 in (b, t, heads, g, k.shape[1]):
        out, lse = empty(q, v)
    else:
        out, lse = _fused(q, k, v, seen, scores, bias) or _in_blocks(q, k, v, seen, scores, bias)
    return (out, lse) if sinks is None else sunk(out, lse, sinks)


def empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of no keys."""
    return (q.new_zeros((*q.shape[:4], v.shape[-1])),
            q.new_full(q.shape[:4], float("-inf"), dtype=wide(q.dtype)))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def sunk(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a sink for each head."""
    whole = torch.logaddexp(lse, sinks.to(lse.dtype))
    share = (lse - whole).exp().masked_fill(lse == float("-inf"), 0)
    return (out * share[..., None]).to(out.dtype), whole


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of several results and lse, each of other keys, that of all."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2 and _by_kernel(*parts[0], *parts[1]):
        from shardlib.triton_kernels.merge_two import merge_two
        return merge_two(*parts[0], *parts[1])
    lse = torch.stack([of for _, of in parts]).logsumexp(0)
    total = torch.zeros((), dtype=lse.dtype, device=lse.device)
    for out, of in parts:
        total = total + out * (of - lse).exp().masked_fill(of == float("-inf"), 0)[..., None]
    return total.to(parts[0][0].dtype), lse


def _by_kernel(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> bool:
    """Whether a kernel merges these: on a GPU, without a derivative."""
    if a.device.type != "cuda" or differentiated(a, lse_a, b, lse_b):
        return False
    from shardlib.triton_kernels.merge_two import takes_two
    return takes_two(a, lse_a, b, lse_b)


def merge(out: Tensor, lse: Tensor, more: Tensor, its: Tensor) -> None:
    """Adds to a result what is seen of other keys, in place."""
    share = torch.sigmoid(its - lse).masked_fill(its == float("-inf"), 0)
    out.lerp_(more.to(out.dtype), share[..., None])
    lse.copy_(torch.logaddexp(lse, its))


class Part(NamedTuple):
    """Keys for which a fused kernel has a call. Causal ones begin with the first query's key and are as many
    as the queries. near: how far a query sees behind and ahead of a place, the last query's being the last
    key's."""
    low: int
    high: int
    causal: bool
    near: tuple[int, int] | None = None


def parts_of(seen: Seen) -> list[Part] | None:
    """The calls; None where there are none for what is seen."""
    ahead, t, s = seen.ahead, seen.t, seen.s
    if not seen.known:
        return None
    if seen.window is not None and seen.window < max(ahead + t, s - ahead):
        high = min(s, ahead + t)
        past = ahead + t - high                         # how far the last query is behind the last key
        near = seen.window - 1 - past, past + (0 if seen.causal else seen.window - 1)
        fits = ahead >= 0 <= near[0] and (seen.causal or ahead + t >= s)
        return [Part(max(0, ahead - seen.window + 1), high, seen.causal, near)] if fits else None
    if not seen.causal or ahead >= s - 1:
        return [Part(0, s, False)]
    if ahead < 0 or ahead + t > s:
        return None
    return [*([Part(0, ahead, False)] if ahead else []), Part(ahead, ahead + t, True)]


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores,
           bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if scores.softcap is not None or (parts := parts_of(seen)) is None:
        return None
    made = []
    for low, high, causal, near in parts:
        added = None if bias is None else part(bias, 0, seen.t, low, high)
        got = flash.attend(q, k[:, low:high], v[:, low:high], causal, scores.scale, near, added)
        if got is None:
            return None
        made.append(got)
    return merged(made)


# -- by blocks of queries ------------------------------------------------------------------------------------

def rows_at_once(heads: int, t: int, s: int) -> int:
    """So many queries that their scores are within MOST_SCORES."""
    return min(t, max(1, MOST_SCORES // max(1, heads * s)))


@dataclass(frozen=True)
class Block:
    """Queries at:at + n, and keys low:high, those that they may see. capped: the scores as softcap leaves
    them; score: with the bias, -inf where nothing is seen, (b, k, g, n, keys)."""
    at: int
    n: int
    low: int
    high: int
    capped: Tensor
    score: Tensor


def blocks(q: Tensor, k: Tensor, seen: Seen, scores: Scores, bias: Tensor | None) -> Iterator[Block]:
    b, t, heads, g, _ = q.shape
    n = rows_at_once(b * heads * g, t, k.shape[1])
    for at in range(0, t, n):
        count = min(n, t - at)
        low, high = seen.keys(at, count)
        # the product's dtype is at least float32: see docs/decisions.md
        score = torch.einsum("btkgh,bskh->bkgts", q[:, at:at + count].to(wide(q.dtype)),
                             k[:, low:high].to(wide(q.dtype))) * scores.scale
        if scores.softcap is not None:
            score = scores.softcap * torch.tanh(score / scores.softcap)
        capped = score
        if bias is not None:
            score = score + part(bias, at, count, low, high)
        if (mask := seen.block(at, count, low, high, q.device)) is not None:
            score = score.masked_fill(~mask, float("-inf"))
        yield Block(at, count, low, high, capped, score)


def part(x: Tensor, at: int, n: int, low: int, high: int) -> Tensor:
    """Queries at:at + n and keys low:high of (b, k, g, t, s), each 1 or all."""
    x = x[..., at:at + n, :] if x.shape[3] > 1 else x
    return x[..., low:high] if x.shape[4] > 1 else x


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores,
               bias: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for of in blocks(q, k, seen, scores, bias):
        lse = of.score.logsumexp(-1)
        weight = (of.score - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
        outs.append(torch.einsum("bkgts,bskv->btkgv", weight.to(v.dtype), v[:, of.low:of.high]))
        sums.append(lse.permute(0, 3, 1, 2))
    return torch.cat(outs, 1), torch.cat(sums, 1)
