"""A step of decoding between the projections, in one launch: rope of the newest q and k, k and v into the
cache, attention over it.

Token t of row b goes to slot start[b] + t, and its queries see the slots up to this one. The cache is written
in place. k and v of this call are never read from there: the last split takes them in as they come, beside
its share of the older keys, and writes them; so no block waits for another. How keys are taken in, and cut
into splits: see `attending`.

rope has the bits of `ops/rope.py`: x cos is rounded to float32, then comes one fused multiply and add, which
is rounded to the dtype of x. (Where torch's addcmul rounds its product, as old ones do on GPUs, the last bit
may differ.)
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.attending import (
    leave,
    nothing,
    one,
    take_in,
    take_in_range,
)
from shardlib.triton_kernels.decode_attention import decode_attention_reference
from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.limits import MOST_QUERIES, MOST_SPLITS


def cached_attention_reference(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                               start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the cache afterwards."""
    cos, sin = angles.chunk(2, -1)
    cos, sin, half = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        c, s = (a.view(*a.shape[:2], *(1,) * (x.dim() - 3), a.shape[2]) for a in (cos, sin))
        return torch.addcmul(x * c, x.roll(half, -1), s).to(x.dtype)
    slots = (start[:, None] + torch.arange(k.shape[1], device=k.device)).clamp(0, keys.shape[1] - 1)
    slots = slots[..., None, None].expand(k.shape)
    keys, values = keys.scatter(1, slots, turned(k)), values.scatter(1, slots, v)
    return decode_attention_reference(turned(q), keys, values, start + 1), keys, values


@triton.jit
def _turns(angles_ptr, h, H: tl.constexpr):
    """(cosines, sines, the first half negative) of rows of angles, where h is an index of theirs."""
    low = h < H // 2
    cos = tl.load(angles_ptr + tl.where(low, h, h - H // 2), mask=h < H, other=0)
    sin = tl.load(angles_ptr + tl.where(low, h + H // 2, h), mask=h < H, other=0)
    return cos, tl.where(low, -sin, sin)


@triton.jit
def _turned(x_ptr, cos, sin, there, h, H: tl.constexpr):
    """x, (rows, HEAD) where `there`, each pair (i, i + H / 2) turned."""
    x = tl.load(x_ptr + h, mask=there, other=0)
    paired = tl.load(x_ptr + tl.where(h < H // 2, h + H // 2, h - H // 2), mask=there, other=0)
    return tl.fma(paired.to(tl.float32), sin, x.to(tl.float32) * cos).to(x.dtype)


@triton.jit
def nearest(slot, S):
    """The nearest one that there is."""
    return tl.minimum(tl.maximum(slot, 0), S - 1)


@triton.jit(do_not_specialize=["T", "S", "heads", "splits"])
def cached_attention_kernel(q_ptr, k_ptr, v_ptr, angles_ptr, keys_ptr, values_ptr, start_ptr, out_ptr,
                            parts_ptr, counts_ptr, T, S, heads, splits, q_stride_b, q_stride_t, k_stride_b,
                            k_stride_t, v_stride_b, v_stride_t, stride_b, stride_s, stride_k,
                            G: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
                            NEW: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
                            STAGES: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr):
    """HEAD, ROWS and NEW: powers of two that have room for H, T G and T. SPLIT: whether there are several
    splits, MOST at most."""
    await_before(EARLY)
    let_next_start(EARLY)
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    b, kv = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row, new, h = tl.arange(0, ROWS), tl.arange(0, NEW), tl.arange(0, HEAD)[None, :]
    t, there, last = row // G, (row < T * G)[:, None] & (h < H), split == splits - 1
    angles_ptr += b * T * H
    cos, sin = _turns(angles_ptr + tl.minimum(t, T - 1)[:, None] * H, h, H)
    q = _turned(q_ptr + b * q_stride_b + t.to(tl.int64)[:, None] * q_stride_t
                + (kv * G + row % G)[:, None] * H, cos, sin, there, h, H)
    at = tl.minimum(new, T - 1).to(tl.int64)[:, None]
    if not ONE:
        cos, sin = _turns(angles_ptr + at * H, h, H)
    k = _turned(k_ptr + b * k_stride_b + at * k_stride_t + kv * H, cos, sin, (h < H) & last, h, H)
    v = tl.load(v_ptr + b * v_stride_b + at * v_stride_t + kv * H + h, mask=(h < H) & last, other=0)
    start = tl.minimum(tl.maximum(tl.load(start_ptr + b).to(tl.int64), -T), S)
    keys_ptr += b * stride_b + kv * stride_k
    values_ptr += b * stride_b + kv * stride_k
    slot, behind = nearest(start + new, S), nearest(start + new + 1, S)
    # where start is wrong, several may be for one slot: then the last of them
    written = (h < H) & last & ((new == T - 1) | (new < T) & (slot < behind))[:, None]
    tl.store(keys_ptr + slot[:, None] * stride_s + h, k, mask=written)
    tl.store(values_ptr + slot[:, None] * stride_s + h, v, mask=written)
    old = nearest(start, S).to(tl.int32)
    each = tl.cdiv(tl.cdiv(old, splits), BLOCK) * BLOCK
    if ONE:
        most, weights, values = one(q, k, v, last, H)
    else:
        most, weights, values = nothing(HEAD, ROWS)
    most, weights, values = take_in_range(most, weights, values, q, keys_ptr, values_ptr, row * 0 + old,
                                          split * each, tl.minimum((split + 1) * each, old), stride_s, H,
                                          HEAD, BLOCK, STAGES)
    if not ONE and last:
        most, weights, values = take_in(most, weights, values, q, tl.trans(k), v,
                                        (new < T)[None, :] & (new[None, :] <= t[:, None]), H)
    result = out_ptr + (((b * T + t) * heads + kv) * G + row % G)[:, None] * H + h
    leave(result, there, most, weights, values, parts_ptr, counts_ptr, T * G, head, split, splits, HEAD, ROWS,
          SPLIT, MOST)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                     start: Tensor, counts: Tensor | None, splits: int, block: int = 64, warps: int = 4,
                     stages: int = 2, early: bool = False) -> Tensor:
    """(B, T, K, G, H): attention of q, alike, over the cache with k and v, (B, T, K, H), in it.

    A token's part of q, of k and of v lies together; the strides of B and T are free. angles: (B, T, H),
    float32, contiguous: cosines, then sines, as of `rope_table`. keys, values: (B, S, K, H) with strides
    alike and of H 1, written in place. start: (B,), integers from 0 to S - T; elsewhere, a slot that is not
    there is the nearest one, and the result is some numbers. counts: int32 zeros, at least B K, that no
    kernel on another stream uses meanwhile; None where nothing is split.
    """
    (rows, new, heads, g, h), slots = q.shape, keys.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert k.shape == v.shape == (rows, new, heads, h) and all(map(dense, (q, k, v)))
    assert angles.shape == (rows, new, h) and angles.dtype == torch.float32 and angles.is_contiguous()
    assert (keys.shape == values.shape == (rows, slots, heads, h) and keys.stride() == values.stride()
            and keys.stride(-1) == 1 and start.shape == (rows,) and start.is_contiguous())
    assert q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype and h % 2 == 0
    assert new * g <= MOST_QUERIES and splits <= MOST_SPLITS
    if q.numel() == 0 or slots == 0:
        return out.zero_()
    padded, head = max(16, triton.next_power_of_2(new * g)), max(16, triton.next_power_of_2(h))
    parts, counted = out, start                         # neither is looked at where nothing is split
    if splits > 1:
        assert counts is not None and counts.numel() >= rows * heads
        parts, counted = torch.empty(rows * heads * splits * padded * (head + 2), dtype=torch.float32,
                                     device=q.device), counts
    constants = dict(G=g, H=h, HEAD=head, ROWS=padded, ONE=new == 1,
                     NEW=padded if new == 1 else max(16, triton.next_power_of_2(new)), BLOCK=block,
                     SPLIT=splits > 1, STAGES=stages, MOST=MOST_SPLITS)
    # where there is one row or token, a stride says nothing
    strides = (*(s if n > 1 else 0 for x in (q, k, v) for n, s in zip(x.shape[:2], x.stride())),
               *keys.stride()[:3])
    key = (q.dtype, start.dtype, q.device, *((s % 16 == 0, s == 1, s < 2**31) for s in strides),
           *constants.values(),
           *(x.data_ptr() % 16 for x in (q, k, v, angles, keys, values, start, counted)))
    launch(cached_attention_kernel, key, Grid(rows * heads * splits, warps, early=early),
           (q, k, v, angles, keys, values, start, out, parts, counted, new, slots, heads, splits, *strides),
           lambda: constants, q.device.type == "cpu")
    return out


def dense(x: Tensor) -> bool:
    """Whether what a token has lies together."""
    each = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride())):
        if size > 1 and stride != each:
            return False
        each *= size
    return True
