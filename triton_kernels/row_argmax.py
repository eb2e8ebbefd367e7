"""argmax of few rows of many columns: several blocks share a row, and the last of them to end puts together
what they found.

A float and its index are one integer, as in `split_argmax`: the largest is the first of the largest floats,
and NaN is larger than all.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.split_argmax import best_of
from shardlib.triton_kernels.splits import last_to_leave

WARPS = 8
MOST_PARTS = 64


def row_argmax_reference(x: Tensor) -> Tensor:
    """(rows,): the first index of the largest; NaN is larger than all."""
    return x.argmax(-1)


@triton.jit(do_not_specialize=["parts"])
def row_argmax_kernel(x_ptr, out_ptr, found_ptr, counts_ptr, columns, parts, each, LANES: tl.constexpr,
                      SPLIT: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr):
    """A block has `each` columns of a row, of which there are `parts`, MOST at most. SPLIT: whether there are
    several."""
    await_before(EARLY)
    let_next_start(EARLY)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    key, index = best_of(x_ptr + row * columns + part * each, tl.minimum(each, columns - part * each), LANES)
    index += part * each
    if SPLIT:
        found = found_ptr + row * parts
        tl.store(found + part, (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64))
        if last_to_leave(counts_ptr + row, parts):
            i = tl.arange(0, MOST)
            pair = tl.max(tl.load(found + tl.minimum(i, parts - 1)), 0)
            tl.store(out_ptr + row, 0x7FFFFFFF - (pair & 0x7FFFFFFF))
    else:
        tl.store(out_ptr + row, index.to(tl.int64))


def row_argmax(x: Tensor, counts: Tensor | None, parts: int, early: bool = False) -> Tensor:
    """(rows,), int64: the first index of the largest of each row, or the first NaN.

    x: (rows, columns), contiguous, float32, bfloat16 or float16. parts: blocks of a row, about. counts: where
    a row has several, int32 zeros, one for each, that no kernel on another stream uses meanwhile.
    """
    rows, columns = x.shape
    assert x.is_contiguous() and 0 < columns < 2**31
    out = torch.empty(rows, dtype=torch.int64, device=x.device)
    lanes = min(256 * WARPS, max(32 * WARPS, triton.next_power_of_2(columns)))
    each = -(-triton.cdiv(columns, min(parts, MOST_PARTS)) // lanes) * lanes
    parts = triton.cdiv(columns, each)
    assert parts == 1 or counts is not None and counts.numel() >= rows
    found = torch.empty(rows * parts, dtype=torch.int64, device=x.device)
    if rows:
        launch(row_argmax_kernel, (x.dtype, x.device, lanes, parts > 1, columns % 16 == 0, columns == 1,
                                   x.data_ptr() % 16),
               Grid(rows * parts, WARPS, early=early),
               (x, out, found, out if counts is None else counts, columns, parts, each),
               lambda: dict(LANES=lanes, SPLIT=parts > 1, MOST=MOST_PARTS), x.device.type == "cpu")
    return out
