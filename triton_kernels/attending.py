"""What kernels of attention share: a product's rows take in keys, block by block, and splits of a row's keys
are merged.

What has been taken in is, of each row, the largest score, the sum of the weights and the weighted values: all
in float32, weights relative to the largest score. The rows are the queries of one kv head, of all T new
tokens: they share what is read.

A row's keys are cut into `splits`, a block each. A block leaves what it has taken in; the last one to leave
merges all: see `splits`.
"""
from __future__ import annotations

import triton
import triton.language as tl

from shardlib.triton_kernels.splits import last_to_leave

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _shift(most):
    """What scores are taken from: the largest, or 0 where there is none."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def nothing(HEAD: tl.constexpr, ROWS: tl.constexpr):
    """(largest score, sum of weights, weighted values) before any key."""
    return (tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32),
            tl.zeros((ROWS, HEAD), tl.float32))


@triton.jit
def one(q, k, v, seen, H: tl.constexpr):
    """After a key each, k and v of (ROWS, HEAD), or before any where it is not `seen`. No tensor cores."""
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * (LOG2_E / H ** 0.5)
    score = tl.where(seen, score, float("-inf"))
    weight = tl.exp2(score - _shift(score))
    return score, weight, weight[:, None] * v.to(tl.float32)


@triton.jit
def take_in(most, weights, values, q, k, v, seen, H: tl.constexpr):
    """The same after more keys: k, (HEAD, keys), and v, (keys, HEAD), as far as they are `seen`."""
    score = tl.where(seen, tl.dot(q, k, input_precision="ieee") * (LOG2_E / H ** 0.5), float("-inf"))
    larger = tl.maximum(most, tl.max(score, 1))
    kept, weight = tl.exp2(most - _shift(larger)), tl.exp2(score - _shift(larger)[:, None])
    weights = weights * kept + tl.sum(weight, 1)
    # added up by blocks: errors grow with their number, not with that of the keys
    if v.dtype == tl.float32:
        values = values * kept[:, None] + tl.dot(weight, v, input_precision="ieee")
    else:
        values = tl.dot(weight.to(v.dtype), v, values * kept[:, None])
    return larger, weights, values


@triton.jit
def take_in_range(most, weights, values, q, k_ptr, v_ptr, seen, first, stop, stride_s, H: tl.constexpr,
                  HEAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The same after keys first ... stop - 1, of which each row sees the first `seen`."""
    h = tl.arange(0, HEAD)
    for start in tl.range(first, stop, BLOCK, num_stages=STAGES):
        s = start + tl.arange(0, BLOCK)
        there = s < stop
        k = tl.load(k_ptr + s.to(tl.int64)[None, :] * stride_s + h[:, None],
                    mask=there[None, :] & (h < H)[:, None], other=0)
        v = tl.load(v_ptr + s.to(tl.int64)[:, None] * stride_s + h[None, :],
                    mask=there[:, None] & (h < H)[None, :], other=0)
        most, weights, values = take_in(most, weights, values, q, k, v,
                                        there[None, :] & (s[None, :] < seen[:, None]), H)
    return most, weights, values


@triton.jit
def _merge(parts_ptr, splits, there, HEAD: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr):
    """The (sums of weights, weighted values) of all splits, first to last, of the rows that are `there`."""
    row, h, i = tl.arange(0, ROWS), tl.arange(0, HEAD), tl.arange(0, MOST)
    part = parts_ptr + i[:, None] * (ROWS * (HEAD + 2)) + row[None, :]
    used = (i < splits)[:, None]
    scores = tl.load(part, mask=used, other=float("-inf"))
    shift = _shift(tl.max(scores, 0))
    weights = tl.sum(tl.load(part + ROWS, mask=used, other=0) * tl.exp2(scores - shift[None, :]), 0)
    values = tl.zeros((ROWS, HEAD), tl.float32)
    for s in tl.range(0, splits, loop_unroll_factor=4):
        at = parts_ptr + s * (ROWS * (HEAD + 2))
        kept = tl.exp2(tl.load(at + row) - shift)
        values += tl.load(at + 2 * ROWS + row[:, None] * HEAD + h[None, :], mask=there[:, None],
                          other=0) * kept[:, None]
    return weights, values


@triton.jit
def _store(out_ptr, weights, values, there):
    tl.store(out_ptr, (values / tl.where(weights == 0, 1.0, weights)[:, None]).to(out_ptr.dtype.element_ty),
             mask=there)


@triton.jit
def leave(out_ptr, there, most, weights, values, parts_ptr, counts_ptr, rows, head, split, splits,
          HEAD: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr):
    """What this split of a head has taken in, to the other splits; where it is the last to leave, or the only
    one, the result to out_ptr, (ROWS, HEAD), where `there`.

    rows: of the product. parts: of each split, float32: largest scores, sums of weights, values; MOST: of
    splits.
    """
    if SPLIT:
        row, h = tl.arange(0, ROWS), tl.arange(0, HEAD)
        parts = parts_ptr + head.to(tl.int64) * splits * (ROWS * (HEAD + 2))
        part = parts + split * (ROWS * (HEAD + 2))
        tl.store(part + row, most)
        tl.store(part + ROWS + row, weights)
        tl.store(part + 2 * ROWS + row[:, None] * HEAD + h[None, :], values, mask=(row < rows)[:, None])
        if last_to_leave(counts_ptr + head, splits):
            weights, values = _merge(parts, splits, row < rows, HEAD, ROWS, MOST)
            _store(out_ptr, weights, values, there)
    else:
        _store(out_ptr, weights, values, there)
