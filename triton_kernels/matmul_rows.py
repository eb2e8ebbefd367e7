"""x @ w for few rows, which takes as long as reading w does. w, (K, N), lies in memory by columns: what a block needs of it is a few long lines.

One row is multiplied and added up as it is read. Several rows go through the tensor cores, padded to the 8, 16 or 32 that these take:
that costs nothing, as long as w is what is waited for. Products are added up in float32 and rounded once.

`gated_matmul_rows` is for a w that holds a gate and a value, one beside the other: silu(gate) * value, without a rounding between.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.launching import Grid, launch

MOST_ROWS = 32


def matmul_rows_reference(x: Tensor, w: Tensor) -> Tensor:
    """(rows, N) of x, (rows, K), and w, (K, N)."""
    return x @ w


def gated_matmul_rows_reference(x: Tensor, w: Tensor) -> Tensor:
    """(rows, N) of w, (K, 2 N)."""
    gate, value = (x @ w).chunk(2, -1)
    return F.silu(gate) * value


class Tile(NamedTuple):
    """What a block does: columns of w at a time, lines of them at once; warps of it; steps whose loads are under way (unrolled, where the
    tensor cores have no part)."""
    columns: int
    lines: int
    warps: int
    stages: int


@triton.jit
def _columns(N, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of w that a block multiplies: GATED, each gate and then its value."""
    j = tl.arange(0, COLUMNS)
    if GATED:
        return tl.minimum(tl.program_id(0) * (COLUMNS // 2) + j // 2, N - 1) + (j % 2) * N
    else:
        return tl.minimum(tl.program_id(0) * COLUMNS + j, N - 1)


@triton.jit
def _outputs(N, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of the result that it stores."""
    count: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    return tl.program_id(0) * count + tl.arange(0, count)


@triton.jit
def _gated(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * value of (ROWS, COLUMNS)."""
    gate, value = tl.split(tl.reshape(y, (ROWS, COLUMNS // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * value


@triton.jit(do_not_specialize=["N"])
def one_row_kernel(x_ptr, w_ptr, out_ptr, K, N, GATED: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
                   STAGES: tl.constexpr):
    """WHOLE: LINES divides K."""
    column, line = _columns(N, GATED, COLUMNS), tl.arange(0, LINES)
    w = w_ptr + column.to(tl.int64)[:, None] * K + line[None, :]
    products = tl.zeros((COLUMNS, LINES), tl.float32)
    for start in tl.range(0, K, LINES, loop_unroll_factor=STAGES):
        if WHOLE:
            xs, ws = tl.load(x_ptr + start + line), tl.load(w + start, eviction_policy="evict_first")
        else:
            there = start + line < K
            xs, ws = tl.load(x_ptr + start + line, mask=there, other=0), tl.load(w + start, mask=there[None, :], other=0)
        products += ws.to(tl.float32) * xs.to(tl.float32)[None, :]
    y, n = tl.sum(products, 1)[None, :], _outputs(N, GATED, COLUMNS)
    if GATED:
        y = _gated(y, 1, COLUMNS)
    tl.store(out_ptr + n[None, :], y.to(out_ptr.dtype.element_ty), mask=(n < N)[None, :])


@triton.jit(do_not_specialize=["rows", "N"])
def rows_kernel(x_ptr, w_ptr, out_ptr, rows, K, N, GATED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                LINES: tl.constexpr, STAGES: tl.constexpr):
    """ROWS: a power of two that has room for the rows. The lines of w come first in the product: they are its long side."""
    column, line, row = _columns(N, GATED, COLUMNS), tl.arange(0, LINES), tl.arange(0, ROWS)
    w = w_ptr + column.to(tl.int64)[:, None] * K + line[None, :]
    x = x_ptr + tl.minimum(row, rows - 1)[None, :] * K + line[:, None]
    y = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in tl.range(0, K, LINES, num_stages=STAGES):
        if WHOLE:
            xs, ws = tl.load(x + start), tl.load(w + start)
        else:
            there = start + line < K
            xs, ws = tl.load(x + start, mask=there[:, None], other=0), tl.load(w + start, mask=there[None, :], other=0)
        y = tl.dot(ws, xs, y, input_precision="ieee")
    y, n = tl.trans(y), _outputs(N, GATED, COLUMNS)
    if GATED:
        y = _gated(y, ROWS, COLUMNS)
    tl.store(out_ptr + row[:, None] * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (n < N)[None, :])


def matmul_rows(x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    """x @ w; x: (rows, K), contiguous, up to MOST_ROWS rows; w: (K, N), w.mT contiguous; of one dtype (float32, bfloat16 or float16)."""
    return _matmul(x, w, w.shape[1], False, tile)


def gated_matmul_rows(x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    """silu(x @ w[:, :N]) * (x @ w[:, N:]); w: (K, 2 N)."""
    assert w.shape[1] % 2 == 0, "a gate and a value for each column"
    return _matmul(x, w, w.shape[1] // 2, True, tile)


def _matmul(x: Tensor, w: Tensor, columns: int, gated: bool, tile: Tile) -> Tensor:
    (rows, lines), out = x.shape, x.new_empty(x.shape[0], columns)
    assert 0 < rows <= MOST_ROWS and len(w) == lines and x.dtype == w.dtype and x.is_contiguous() and w.mT.is_contiguous() and out.numel()
    whole, padded = lines % tile.lines == 0, max(8, triton.next_power_of_2(rows))
    constants = dict(GATED=gated, WHOLE=whole, **({} if rows == 1 else {"ROWS": padded}), COLUMNS=tile.columns, LINES=tile.lines, STAGES=tile.stages)
    key = (x.dtype, x.device, lines % 16, lines == 1, *constants.values(), *(t.data_ptr() % 16 for t in (x, w)))
    grid = Grid(triton.cdiv(columns * (1 + gated), tile.columns), tile.warps)
    kernel, arguments = (one_row_kernel, (x, w, out, lines, columns)) if rows == 1 else (rows_kernel, (x, w, out, rows, lines, columns))
    launch(kernel, key, grid, arguments, lambda: constants, x.device.type == "cpu")
    return out
