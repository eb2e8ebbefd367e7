"""silu(gate) * up in one kernel, of matrices whose rows may lie apart: the halves of what one matmul made.

silu is rounded before it is multiplied, as by a kernel of its own.
"""
from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.launching import Grid, launch

WARPS = 4


def gate_up_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@triton.jit(do_not_specialize=["parts"])
def gate_up_kernel(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, parts,
                   LANES: tl.constexpr):
    """A block has one of the `parts` of a row."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * LANES + tl.arange(0, LANES)
    there = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=there, other=0)
    up = tl.load(up_ptr + row * up_stride + column, mask=there, other=0)
    wide = gate.to(tl.float32)
    made = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + column, made.to(gate.dtype), mask=there)


def gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Of (rows, width), whose columns lie side by side, of one dtype (float32, bfloat16 or float16)."""
    (rows, width), out = gate.shape, gate.new_empty(gate.shape)
    assert gate.shape == up.shape and gate.dtype == up.dtype and gate.stride(1) == up.stride(1) == 1
    lanes = 32 * WARPS * 16 // gate.itemsize
    parts = triton.cdiv(width, lanes)
    strides = gate.stride(0), up.stride(0)
    if out.numel():
        key = (gate.dtype, gate.device, *((n % 16 == 0, n == 1, n < 2**31) for n in (width, *strides)),
               gate.data_ptr() % 16, up.data_ptr() % 16)
        launch(gate_up_kernel, key, Grid(rows * parts, WARPS),
               (gate, up, out, width, *strides, parts), lambda: dict(LANES=lanes), gate.device.type == "cpu")
    return out
