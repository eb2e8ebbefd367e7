"""rms_norm of each row, and of each row with a residual added:
one block a row, which is read and written once.

The residual is added as a kernel of its own would: what is normed is the sum as it was rounded.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.limits import MOST_WIDTH


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, F.rms_norm(total, weight.shape, weight, eps)


@triton.jit(do_not_specialize=["eps"])
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, total_ptr, normed_ptr, width, eps, ADDS: tl.constexpr,
                    LANES: tl.constexpr, EARLY: tl.constexpr):
    """LANES: a power of two that has room for a row."""
    await_before(EARLY)
    let_next_start(EARLY)
    lane, row = tl.arange(0, LANES), tl.program_id(0).to(tl.int64) * width
    there = lane < width
    x, w = tl.load(x_ptr + row + lane, mask=there, other=0), tl.load(weight_ptr + lane, mask=there, other=0)
    if ADDS:
        residual = tl.load(residual_ptr + row + lane, mask=there, other=0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row + lane, x, mask=there)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(normed_ptr + row + lane, (wide * scale * w.to(tl.float32)).to(x.dtype), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float, early: bool = False) -> Tensor:
    """x, (..., width), normed by weight, (width,); contiguous, of one dtype (float32, bfloat16 or float16),
    up to MOST_WIDTH wide."""
    return _norm(x, None, weight, eps, early)[1]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float,
                 early: bool = False) -> tuple[Tensor, Tensor]:
    """(residual + x, that normed)."""
    assert residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous()
    return _norm(x, residual, weight, eps, early)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
          early: bool) -> tuple[Tensor, Tensor]:
    width, normed = len(weight), torch.empty_like(x)
    assert (x.shape[-1:] == weight.shape and x.dtype == weight.dtype and x.is_contiguous()
            and weight.is_contiguous() and 0 < width <= MOST_WIDTH)
    lanes, adds = triton.next_power_of_2(width), residual is not None
    old, total = (residual, torch.empty_like(x)) if adds else (x, normed)
    if x.numel():
        warps = min(32, max(1, lanes * x.dtype.itemsize // 512))            # 16 bytes a thread
        key = (x.dtype, x.device, adds, lanes, width % 16, *(t.data_ptr() % 16 for t in (x, old, weight)))
        launch(rms_norm_kernel, key, Grid(x.numel() // width, warps, early=early),
               (x, old, weight, total, normed, width, float(eps)), lambda: dict(ADDS=adds, LANES=lanes),
               x.device.type == "cpu")
    return total, normed
