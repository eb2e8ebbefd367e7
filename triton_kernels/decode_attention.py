"""Attention of the newest queries over a cache, of whose keys each row has so many:
softmax(q k / sqrt(H)) v without a mask.

Query t sees the first lengths[b] + t keys of row b, or all of them where those are fewer; what lies behind
them is not read. A query that sees none gives zeros. How keys are taken in, and cut into splits: see
`attending`.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.attending import leave, nothing, take_in_range
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.limits import MOST_QUERIES, MOST_SPLITS


def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, K, G, H) of q, alike, k and v, (B, S, K, H), and lengths, (B,)."""
    t, s = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
    seen = (s < lengths[:, None, None] + t[:, None])[:, None, None]
    k, v = (x.masked_fill(~seen.any((1, 2, 3))[..., None, None], 0) for x in (k, v))
    score = torch.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    weight = score.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("bkgts,bskh->btkgh", weight, v)


@triton.jit(do_not_specialize=["T", "S", "heads", "splits"])
def decode_attention_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, parts_ptr, counts_ptr, T, S, heads,
                            splits, stride_b, stride_s, stride_k, G: tl.constexpr, H: tl.constexpr,
                            HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
                            STAGES: tl.constexpr, MOST: tl.constexpr):
    """HEAD and ROWS: powers of two that have room for H, and for T G. SPLIT: whether there are several
    splits, MOST at most."""
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    b, kv = head // heads, head % heads
    row, h = tl.arange(0, ROWS), tl.arange(0, HEAD)
    at = (((b * T + row // G) * heads + kv) * G + row % G).to(tl.int64)[:, None] * H + h[None, :]
    there = (row < T * G)[:, None] & (h < H)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    keys = tl.maximum(tl.minimum(length + T - 1, S), 0)
    each = tl.cdiv(tl.cdiv(keys, splits), BLOCK) * BLOCK
    offset = b.to(tl.int64) * stride_b + kv.to(tl.int64) * stride_k
    first, stop = split * each, tl.minimum((split + 1) * each, keys)
    most, weights, values = nothing(HEAD, ROWS)
    most, weights, values = take_in_range(most, weights, values, q, k_ptr + offset, v_ptr + offset,
                                          length + row // G, first, stop, stride_s, H, HEAD, BLOCK, STAGES)
    leave(out_ptr + at, there, most, weights, values, parts_ptr, counts_ptr, T * G, head, split, splits, HEAD,
          ROWS, SPLIT, MOST)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, counts: Tensor | None, splits: int,
                     block: int = 64, warps: int = 4, stages: int = 2) -> Tensor:
    """(B, T, K, G, H): q, alike, contiguous, attends to k and v, (B, S, K, H) with strides alike and of H 1;
    lengths: (B,), integers; they may be below 0 or above S, as long as int32 has them, and T more.

    counts: where keys are split, int32 zeros, at least B K, that no kernel on another stream uses meanwhile.
    """
    (rows, new, heads, g, h), out = q.shape, torch.empty_like(q)
    assert (q.is_contiguous() and k.stride() == v.stride() and k.stride(-1) == 1 and k.shape == v.shape
            and q.dtype == k.dtype == v.dtype)
    assert (k.shape[0], *k.shape[2:]) == (rows, heads, h) and lengths.shape == (rows,)
    assert new * g <= MOST_QUERIES and splits <= MOST_SPLITS
    assert splits == 1 or counts is not None and counts.numel() >= rows * heads
    if q.numel() == 0 or k.shape[1] == 0:
        return out.zero_()
    padded, head = max(16, triton.next_power_of_2(new * g)), max(16, triton.next_power_of_2(h))
    parts = torch.empty(rows * heads * splits * padded * (head + 2) if splits > 1 else 4, dtype=torch.float32,
                        device=q.device)
    counts = parts.view(torch.int32) if counts is None else counts
    strides = k.stride()[:3]
    constants = dict(G=g, H=h, HEAD=head, ROWS=padded, BLOCK=block, SPLIT=splits > 1, STAGES=stages,
                     MOST=MOST_SPLITS)
    key = (q.dtype, lengths.dtype, q.device, *(s % 16 == 0 for s in strides), *(s == 1 for s in strides),
           max(strides) < 2**31, *constants.values(),
           *(x.data_ptr() % 16 for x in (q, k, v, lengths, counts)))
    launch(decode_attention_kernel, key, Grid(rows * heads * splits, warps),
           (q, k, v, lengths, out, parts, counts, new, k.shape[1], heads, splits, *strides),
           lambda: constants, q.device.type == "cpu")
    return out
