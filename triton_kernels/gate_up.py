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
def gate_up_kernel(gate_ptr, up_ptr, out_ptr, live_ptr, width, gate_stride, up_stride, parts,
                   LIVE: tl.constexpr, LANES: tl.constexpr):
    """A block has one of the `parts` of a row. LIVE: rows from the number at live_ptr on mean nothing."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    if LIVE:
        if row >= tl.load(live_ptr):
            return
    column = tl.program_id(0) % parts * LANES + tl.arange(0, LANES)
    there = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=there, other=0)
    up = tl.load(up_ptr + row * up_stride + column, mask=there, other=0)
    wide = gate.to(tl.float32)
    made = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + column, made.to(gate.dtype), mask=there)


def gate_up(gate: Tensor, up: Tensor, live: Tensor | None = None) -> Tensor:
    """Of (rows, width), whose columns lie side by side, of one dtype (float32, bfloat16 or float16).

    live: int32, how many of the rows mean something, where not all do; the others are left as they are."""
    (rows, width), out = gate.shape, gate.new_empty(gate.shape)
    assert gate.shape == up.shape and gate.dtype == up.dtype and gate.stride(1) == up.stride(1) == 1
    lanes = 32 * WARPS * 16 // gate.itemsize
    parts = triton.cdiv(width, lanes)
    strides = gate.stride(0), up.stride(0)
    if out.numel():
        key = (gate.dtype, gate.device, *((n % 16 == 0, n == 1, n < 2**31) for n in (width, *strides)),
               gate.data_ptr() % 16, up.data_ptr() % 16, live is None)
        launch(gate_up_kernel, key, Grid(rows * parts, WARPS),
               (gate, up, out, gate if live is None else live, width, *strides, parts),
               lambda: dict(LIVE=live is not None, LANES=lanes), gate.device.type == "cpu")
    return out
