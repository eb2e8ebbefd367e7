"""Entries of rows by their index, in one kernel that also notes which were asked for: the least and the
greatest, which whoever wants to know reads later.

A note is joined with what was noted before. It is seldom written: only where an index is a new extreme.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch

WARPS = 4


def note_reference(index: Tensor, seen: Tensor) -> Tensor:
    """(least, greatest) of `index` and of what was `seen`."""
    return torch.stack(torch.aminmax(torch.cat((index.reshape(-1), seen))))


def lookup_reference(x: Tensor, index: Tensor, first: int) -> Tensor:
    """(rows, width): x[r, index[r] - first] of every row r; zeros where there is no such entry."""
    here = index - first
    near = here.clamp(0, x.shape[1] - 1)
    found = x.expand(len(index), *x.shape[1:])[torch.arange(len(index), device=x.device), near]
    return torch.where((near == here)[:, None], found, 0)


@triton.jit
def note_one(seen_ptr, index, there):
    """Of a block of indices, where `there`."""
    least, greatest = tl.load(seen_ptr), tl.load(seen_ptr + 1)
    low, high = tl.min(tl.where(there, index, least), 0), tl.max(tl.where(there, index, greatest), 0)
    if low < least:
        tl.atomic_min(seen_ptr, low, sem="relaxed")
    if high > greatest:
        tl.atomic_max(seen_ptr + 1, high, sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def note_kernel(index_ptr, seen_ptr, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    await_before(EARLY)
    let_next_start(EARLY)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    note_one(seen_ptr, tl.load(index_ptr + i, mask=i < count, other=0).to(tl.int64), i < count)


@triton.jit(do_not_specialize=["first", "size", "apart", "parts"])
def lookup_kernel(x_ptr, index_ptr, out_ptr, seen_ptr, first, size, width, apart, parts, LANES: tl.constexpr,
                  EARLY: tl.constexpr):
    """A block has one of the `parts` of a row. apart: entries from one row's to the next one's."""
    await_before(EARLY)
    let_next_start(EARLY)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    one = tl.arange(0, 1)
    index = tl.load(index_ptr + row + one).to(tl.int64)
    if part == 0:
        note_one(seen_ptr, index, one == 0)
    here, column = tl.sum(index, 0) - first, part * LANES + tl.arange(0, LANES)
    x = tl.load(x_ptr + (row * apart + here) * width + column,
                mask=(column < width) & (here >= 0) & (here < size), other=0)
    tl.store(out_ptr + row * width + column, x, mask=column < width)


def note(index: Tensor, seen: Tensor, early: bool = False) -> None:
    """Joins `seen`, (2,) of int64, with the least and the greatest of `index`: integers, contiguous."""
    assert seen.shape == (2,) and seen.dtype == torch.int64 and index.is_contiguous()
    if index.numel():
        launch(note_kernel, (index.dtype, index.device, index.data_ptr() % 16, seen.data_ptr() % 16),
               Grid(triton.cdiv(index.numel(), 32 * WARPS), WARPS, early=early),
               (index, seen, index.numel()), lambda: dict(BLOCK=32 * WARPS), index.device.type == "cpu")


def lookup(x: Tensor, index: Tensor, first: int, seen: Tensor, early: bool = False) -> Tensor:
    """(rows, width): x[r, index[r] - first] of every row r; zeros where there is no such entry.

    x: (rows, size, width), or (1, size, width), the same to all rows; index: (rows,), integers; seen: as in
    `note`. All contiguous.
    """
    (wholes, size, width), rows = x.shape, len(index)
    assert (wholes in (1, rows) and index.dim() == 1 and x.is_contiguous() and index.is_contiguous()
            and seen.shape == (2,) and seen.dtype == torch.int64)
    out = x.new_empty(rows, width)
    lanes = 32 * WARPS * 16 // x.itemsize
    parts = triton.cdiv(width, lanes)
    if out.numel():
        key = (x.dtype, index.dtype, x.device, width % 16 == 0, width == 1,
               *(t.data_ptr() % 16 for t in (x, index, seen)))
        launch(lookup_kernel, key, Grid(rows * parts, WARPS, early=early),
               (x, index, out, seen, first, size, width, size if wholes > 1 else 0, parts),
               lambda: dict(LANES=lanes), x.device.type == "cpu")
    return out
