"""Attention over two sets of keys, merged: of the result over each, and the log of the sum of exp of its
scores, those over both, in one kernel.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.launching import Grid, launch


def merge_two_reference(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """0 and -inf where there is no key."""
    lse = torch.logaddexp(lse_a, lse_b)
    shares = [(of - lse).exp().masked_fill(of == float("-inf"), 0)[..., None] for of in (lse_a, lse_b)]
    return (a * shares[0] + b * shares[1]).to(a.dtype), lse


@triton.jit(do_not_specialize=["T", "heads"])
def merge_two_kernel(a_ptr, b_ptr, lse_a_ptr, lse_b_ptr, out_ptr, lse_ptr, T, heads, a_stride_b, a_stride_t,
                     a_stride_h, b_stride_b, b_stride_t, b_stride_h, la_stride_b, la_stride_t, la_stride_h,
                     lb_stride_b, lb_stride_t, lb_stride_h, H: tl.constexpr, HEADS: tl.constexpr,
                     LANES: tl.constexpr):
    """A block has a token. HEADS, LANES: powers of two that have room for its heads, and for one."""
    row, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    token = row * T + t
    head = tl.arange(0, HEADS)
    here = head < heads
    x = tl.load(lse_a_ptr + row * la_stride_b + t * la_stride_t + head * la_stride_h, mask=here, other=0)
    y = tl.load(lse_b_ptr + row * lb_stride_b + t * lb_stride_t + head * lb_stride_h, mask=here, other=0)
    most = tl.maximum(x, y)
    none = most == -float("inf")
    of_a = tl.where(none, 0.0, tl.exp(x - tl.where(none, 0.0, most)))
    of_b = tl.where(none, 0.0, tl.exp(y - tl.where(none, 0.0, most)))
    total = tl.where(none, 1.0, of_a + of_b)
    tl.store(lse_ptr + token * heads + head, tl.where(none, most, most + tl.log(total)), mask=here)
    lane, column = tl.arange(0, LANES)[None, :], head[:, None]
    there = (lane < H) & (column < heads)
    a = tl.load(a_ptr + row * a_stride_b + t * a_stride_t + column * a_stride_h + lane, mask=there, other=0)
    b = tl.load(b_ptr + row * b_stride_b + t * b_stride_t + column * b_stride_h + lane, mask=there, other=0)
    made = a.to(tl.float32) * (of_a / total)[:, None] + b.to(tl.float32) * (of_b / total)[:, None]
    tl.store(out_ptr + (token * heads + column) * H + lane, made.to(a.dtype), mask=there)


def takes_two(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> bool:
    """Whether `merge_two` takes these as they lie: the heads of a token at one distance, each dense."""
    return (a.shape == b.shape and a.dtype == b.dtype and lse_a.dtype == lse_b.dtype == torch.float32
            and a.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and a.stride(4) == b.stride(4) == 1
            and all(1 in x.shape[2:4] or x.stride(2) == x.shape[3] * x.stride(3)
                    for x in (a, b, lse_a, lse_b)))


def merge_two(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(result, lse): a, b: (b, t, k, g, h); lse_a, lse_b: (b, t, k, g), float32. See `takes_two`."""
    assert takes_two(a, lse_a, b, lse_b) and a.shape[:4] == lse_a.shape == lse_b.shape
    (rows, t, heads, g, h), out = a.shape, torch.empty(a.shape, dtype=a.dtype, device=a.device)
    lse = torch.empty(a.shape[:4], dtype=torch.float32, device=a.device)
    strides = tuple(s for x in (a, b, lse_a, lse_b) for s in (*x.stride()[:2], x.stride(2 if g == 1 else 3)))
    constants = dict(H=h, HEADS=triton.next_power_of_2(heads * g), LANES=triton.next_power_of_2(h))
    if out.numel():
        key = (a.dtype, a.device, *((s % 16 == 0, s == 1, s < 2**31) for s in strides), *constants.values(),
               *(x.data_ptr() % 16 for x in (a, b, lse_a, lse_b)))
        warps = min(8, triton.next_power_of_2(max(1, heads * g * h // 512)))
        launch(merge_two_kernel, key, Grid(rows * t, warps),
               (a, b, lse_a, lse_b, out, lse, t, heads * g, *strides), lambda: constants,
               a.device.type == "cpu")
    return out, lse
