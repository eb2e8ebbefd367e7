"""What stands between the projections and attention where prompts begin, in one kernel: rope of q and of k, k
and v into the cache.

Token t of row b goes to slot start[b] + t. The cache is written in place. rope has the bits of `ops/rope.py`:
see `cached_attention`.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.cached_attention import nearest
from shardlib.triton_kernels.launching import Grid, launch


def rope_into_cache_reference(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                              start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q and k, turned; the cache afterwards)."""
    cos, sin = angles.chunk(2, -1)
    cos, sin, half = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        c, s = (a.view(*a.shape[:2], *(1,) * (x.dim() - 3), a.shape[2]) for a in (cos, sin))
        return torch.addcmul(x * c, x.roll(half, -1), s).to(x.dtype)
    k = turned(k)
    slots = (start[:, None] + torch.arange(k.shape[1], device=k.device)).clamp(0, keys.shape[1] - 1)
    slots = slots[..., None, None].expand(k.shape)
    return turned(q), k, keys.scatter(1, slots, k), values.scatter(1, slots, v)


@triton.jit
def _turned(x_ptr, out_ptr, copy_ptr, cos, sin, there, copied, heads, copy_stride, H: tl.constexpr,
            HEADS: tl.constexpr, LANES: tl.constexpr, COPIES: tl.constexpr):
    """All heads of a token, each pair (i, i + H / 2) turned; COPIES: to another place too, where `copied`."""
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, LANES)[None, :]
    at, there = head * H + i, there & (head < heads)
    x, y = (tl.load(x_ptr + at, mask=there, other=0), tl.load(x_ptr + at + H // 2, mask=there, other=0))
    wide, other = x.to(tl.float32), y.to(tl.float32)
    first = tl.fma(other, -sin, wide * cos).to(x.dtype)
    second = tl.fma(wide, sin, other * cos).to(x.dtype)
    tl.store(out_ptr + at, first, mask=there)
    tl.store(out_ptr + at + H // 2, second, mask=there)
    if COPIES:
        place = copy_ptr + head * copy_stride + i
        tl.store(place, first, mask=there & copied)
        tl.store(place + H // 2, second, mask=there & copied)


@triton.jit(do_not_specialize=["T", "S", "heads"])
def rope_into_cache_kernel(q_ptr, k_ptr, v_ptr, angles_ptr, keys_ptr, values_ptr, start_ptr, q_out_ptr,
                           k_out_ptr, T, S, heads, q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b,
                           v_stride_t, stride_b, stride_s, stride_k, G: tl.constexpr, H: tl.constexpr,
                           QUERIES: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr):
    """A block has a token. QUERIES, HEADS, LANES: powers of two that have room for its heads of queries and
    of keys, and for half a head."""
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, LANES)[None, :]
    there, token = i < H // 2, b * T + t
    cos = tl.load(angles_ptr + token * H + i, mask=there, other=0)
    sin = tl.load(angles_ptr + token * H + H // 2 + i, mask=there, other=0)
    start = tl.minimum(tl.maximum(tl.load(start_ptr + b).to(tl.int64), -T), S)
    slot, behind = nearest(start + t, S), nearest(start + t + 1, S)
    # where start is wrong, several may be for one slot: then the last of them
    written, cached = (t == T - 1) | (slot < behind), b * stride_b + slot * stride_s
    _turned(q_ptr + b * q_stride_b + t * q_stride_t, q_out_ptr + token * heads * G * H, q_out_ptr, cos, sin,
            there, written, heads * G, 0, H, QUERIES, LANES, False)
    _turned(k_ptr + b * k_stride_b + t * k_stride_t, k_out_ptr + token * heads * H, keys_ptr + cached, cos,
            sin, there, written, heads, stride_k, H, HEADS, LANES, True)
    there = there & (head < heads)
    for part in tl.static_range(2):
        v = tl.load(v_ptr + b * v_stride_b + t * v_stride_t + head * H + part * (H // 2) + i, mask=there,
                    other=0)
        tl.store(values_ptr + cached + head * stride_k + part * (H // 2) + i, v, mask=there & written)


def rope_into_cache(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                    start: Tensor) -> tuple[Tensor, Tensor]:
    """(q, (B, T, K, G, H), and k, (B, T, K, H), turned); k and v into the cache.

    As `cached_attention` takes them, of any T: a token's part of q, of k and of v lies together; angles:
    (B, T, H), float32; keys, values: (B, S, K, H) with strides alike and of H 1.
    """
    (rows, new, heads, g, h), slots = q.shape, keys.shape[1]
    assert k.shape == v.shape == (rows, new, heads, h) and h % 2 == 0
    assert angles.shape == (rows, new, h) and angles.dtype == torch.float32 and angles.is_contiguous()
    assert (keys.shape == values.shape == (rows, slots, heads, h) and keys.stride() == values.stride()
            and keys.stride(-1) == 1 and start.shape == (rows,) and start.is_contiguous())
    assert q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    strides = (*(s for x in (q, k, v) for s in x.stride()[:2]), *keys.stride()[:3])
    constants = dict(G=g, H=h, QUERIES=triton.next_power_of_2(heads * g), HEADS=triton.next_power_of_2(heads),
                     LANES=triton.next_power_of_2(h // 2))
    if q.numel() and slots:
        warps = min(8, triton.next_power_of_2(max(1, heads * g * h // 1024)))
        key = (q.dtype, start.dtype, q.device, *((s % 16 == 0, s == 1, s < 2**31) for s in strides),
               *constants.values(), *(x.data_ptr() % 16 for x in (q, k, v, angles, keys, values, start)))
        launch(rope_into_cache_kernel, key, Grid(rows * new, warps),
               (q, k, v, angles, keys, values, start, *turned, new, slots, heads, *strides),
               lambda: constants, q.device.type == "cpu")
    return turned
