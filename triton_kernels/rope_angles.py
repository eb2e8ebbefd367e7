"""The table of a rotary embedding in one kernel: cosines, then sines, of positions times frequencies.

An angle is a float32 product; its cosine is exact to the last place or so, at any position: not the GPU's
approximation.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch


def rope_angles_reference(start: Tensor, offset: int, length: int, inv: Tensor) -> Tensor:
    """(b, t, h): of (start[b] + offset + t) * inv."""
    position = start[:, None] + torch.arange(offset, offset + length, device=start.device)
    angle = position[..., None].to(inv.dtype) * inv
    return torch.cat((angle.cos(), angle.sin()), -1)


@triton.jit(do_not_specialize=["offset", "length"])
def rope_angles_kernel(start_ptr, inv_ptr, out_ptr, offset, length, HALF: tl.constexpr, LANES: tl.constexpr,
                       INTERPRET: tl.constexpr, EARLY: tl.constexpr):
    """A block has a token. LANES: a power of two that has room for HALF, the frequencies."""
    await_before(EARLY)
    let_next_start(EARLY)
    token, i = tl.program_id(0), tl.arange(0, LANES)
    position = tl.load(start_ptr + token // length).to(tl.int64) + (offset + token % length)
    angle = position.to(tl.float32) * tl.load(inv_ptr + i, mask=i < HALF, other=0)
    cos, sin = (tl.cos(angle), tl.sin(angle)) if INTERPRET else (libdevice.cos(angle), libdevice.sin(angle))
    out_ptr += token.to(tl.int64) * (2 * HALF)
    tl.store(out_ptr + i, cos, mask=i < HALF)
    tl.store(out_ptr + HALF + i, sin, mask=i < HALF)


def rope_angles(start: Tensor, offset: int, length: int, inv: Tensor, early: bool = False) -> Tensor:
    """(b, length, h), float32. start: (b,), integers; inv: (h / 2,), float32; both contiguous."""
    half = len(inv)
    assert start.dim() == inv.dim() == 1 and inv.dtype == torch.float32
    assert start.is_contiguous() and inv.is_contiguous()
    out, interpret = inv.new_empty(len(start), length, 2 * half), start.device.type == "cpu"
    if out.numel():
        key = start.dtype, start.device, half, start.data_ptr() % 16, inv.data_ptr() % 16
        launch(rope_angles_kernel, key, Grid(len(start) * length, 2, early=early),
               (start, inv, out, offset, length),
               lambda: dict(HALF=half, LANES=triton.next_power_of_2(half), INTERPRET=interpret), interpret)
    return out
