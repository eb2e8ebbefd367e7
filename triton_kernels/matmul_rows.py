"""x @ w for few rows, which takes as long as reading w does. w, (K, N), lies in memory by columns: what a
block needs of it is a few long lines.

One row is multiplied and added up as it is read. Several rows of 16 bits go through the tensor cores, padded
to the 8, 16 or 32 that these take: that costs nothing, as long as w is what is waited for. Products are added
up in float32 and rounded once. Rows of float32 are multiplied one by one: they want more than the tensor
cores have.

`gated_matmul_rows` is for a w that holds a gate and a value, one beside the other: silu(gate) * value,
without a rounding between.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.limits import MOST_ROWS, Tile
from shardlib.triton_kernels.splits import last_to_leave

SMS = 132
"""Of an H100 or H200."""


def matmul_rows_reference(x: Tensor, w: Tensor) -> Tensor:
    """(rows, N) of x, (rows, K), and w, (K, N)."""
    return x @ w


def gated_matmul_rows_reference(x: Tensor, w: Tensor) -> Tensor:
    """(rows, N) of w, (K, 2 N)."""
    gate, value = (x @ w).chunk(2, -1)
    return F.silu(gate) * value


@triton.jit
def _columns(tile, N, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of w that belong to a tile: GATED, each gate and then its value."""
    j = tl.arange(0, COLUMNS)
    if GATED:
        return tl.minimum(tile * (COLUMNS // 2) + j // 2, N - 1) + (j % 2) * N
    else:
        return tl.minimum(tile * COLUMNS + j, N - 1)


@triton.jit
def _outputs(tile, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of the result that come of it."""
    count: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    return tile * count + tl.arange(0, count)


@triton.jit
def _gated(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * value of (ROWS, COLUMNS)."""
    gate, value = tl.split(tl.reshape(y, (ROWS, COLUMNS // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * value


@triton.jit(do_not_specialize=["rows", "N"])
def one_row_kernel(x_ptr, w_ptr, out_ptr, rows, K, N, GATED: tl.constexpr, WHOLE: tl.constexpr,
                   COLUMNS: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    """A block has one row of x and one tile of w. WHOLE: LINES divides K."""
    tile, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    await_before(EARLY)
    column, line = _columns(tile, N, GATED, COLUMNS), tl.arange(0, LINES)
    x = x_ptr + row * K + line
    w = w_ptr + column.to(tl.int64)[:, None] * K + line[None, :]
    products = tl.zeros((COLUMNS, LINES), tl.float32)
    for start in tl.range(0, K, LINES, loop_unroll_factor=STAGES):
        if WHOLE:
            xs, ws = tl.load(x + start), tl.load(w + start, eviction_policy="evict_first")
        else:
            there = start + line < K
            xs, ws = tl.load(x + start, mask=there, other=0), tl.load(w + start, mask=there[None, :], other=0)
        products += ws.to(tl.float32) * xs.to(tl.float32)[None, :]
    let_next_start(EARLY)
    y, n = tl.sum(products, 1)[None, :], _outputs(tile, GATED, COLUMNS)
    if GATED:
        y = _gated(y, 1, COLUMNS)
    tl.store(out_ptr + row * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=(n < N)[None, :])


@triton.jit(do_not_specialize=["N", "tiles"])
def stream_kernel(x_ptr, w_ptr, out_ptr, K, N, tiles, GATED: tl.constexpr, WHOLE: tl.constexpr,
                  COLUMNS: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    """A block has x, one row, and goes through tiles of w, of all its lines: while one is multiplied,
    STAGES - 1 more are on their way. LINES: a power of two that has room for K."""
    await_before(EARLY)
    line = tl.arange(0, LINES)
    x = tl.load(x_ptr + line, mask=line < K, other=0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        column = _columns(tile, N, GATED, COLUMNS)
        w = w_ptr + column.to(tl.int64)[:, None] * K + line[None, :]
        if WHOLE:
            ws = tl.load(w)
        else:
            ws = tl.load(w, mask=(line < K)[None, :], other=0)
        y, n = tl.sum(ws.to(tl.float32) * x[None, :], 1)[None, :], _outputs(tile, GATED, COLUMNS)
        if GATED:
            y = _gated(y, 1, COLUMNS)
        tl.store(out_ptr + n[None, :], y.to(out_ptr.dtype.element_ty), mask=(n < N)[None, :])
    let_next_start(EARLY)


@triton.jit
def _store(out_ptr, y, tile, rows, N, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y: (COLUMNS, ROWS), of columns of w and rows of x."""
    y, row, n = tl.trans(y), tl.arange(0, ROWS), _outputs(tile, GATED, COLUMNS)
    if GATED:
        y = _gated(y, ROWS, COLUMNS)
    tl.store(out_ptr + row[:, None] * N + n[None, :], y.to(out_ptr.dtype.element_ty),
             mask=(row < rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["rows", "N", "splits"])
def rows_kernel(x_ptr, w_ptr, out_ptr, parts_ptr, counts_ptr, rows, K, N, splits, GATED: tl.constexpr,
                WHOLE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                LINES: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    """ROWS: a power of two that has room for the rows. The lines of w come first in the product: they are its
    long side. SPLIT: whether there are several splits, of the lines; parts: the products of each."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    await_before(EARLY)
    column, line, row = _columns(tile, N, GATED, COLUMNS), tl.arange(0, LINES), tl.arange(0, ROWS)
    w = w_ptr + column.to(tl.int64)[:, None] * K + line[None, :]
    x = x_ptr + tl.minimum(row, rows - 1)[None, :] * K + line[:, None]
    y = tl.zeros((COLUMNS, ROWS), tl.float32)
    each = tl.cdiv(tl.cdiv(K, splits), LINES) * LINES if SPLIT else K
    first = split * each
    for start in tl.range(first, tl.minimum(first + each, K), LINES, num_stages=STAGES):
        if WHOLE:
            xs, ws = tl.load(x + start), tl.load(w + start)
        else:
            there = start + line < K
            xs, ws = (tl.load(x + start, mask=there[:, None], other=0),
                      tl.load(w + start, mask=there[None, :], other=0))
        y = tl.dot(ws, xs, y)
    let_next_start(EARLY)
    if SPLIT:
        at = tl.arange(0, COLUMNS)[:, None] * ROWS + row[None, :]
        parts = parts_ptr + tile.to(tl.int64) * splits * (COLUMNS * ROWS)
        tl.store(parts + split * (COLUMNS * ROWS) + at, y)
        if last_to_leave(counts_ptr + tile, splits):
            y = tl.load(parts + at)
            for s in tl.range(1, splits):
                y += tl.load(parts + s * (COLUMNS * ROWS) + at)
            _store(out_ptr, y, tile, rows, N, GATED, ROWS, COLUMNS)
    else:
        _store(out_ptr, y, tile, rows, N, GATED, ROWS, COLUMNS)


def matmul_rows(x: Tensor, w: Tensor, tile: Tile, counts: Tensor | None = None,
                early: bool = False) -> Tensor:
    """x @ w; x: (rows, K), contiguous, up to MOST_ROWS rows; w: (K, N), w.mT contiguous;
    of one dtype (float32, bfloat16 or float16).

    counts: where a tile is split, int32 zeros, one for each tile, that no kernel on another stream uses
    meanwhile. early: launched before what comes before has ended; see `early`.
    """
    return _matmul(x, w, w.shape[1], False, tile, counts, early)


def gated_matmul_rows(x: Tensor, w: Tensor, tile: Tile, counts: Tensor | None = None,
                      early: bool = False) -> Tensor:
    """silu(x @ w[:, :N]) * (x @ w[:, N:]); w: (K, 2 N)."""
    assert w.shape[1] % 2 == 0, "a gate and a value for each column"
    return _matmul(x, w, w.shape[1] // 2, True, tile, counts, early)


def _matmul(x: Tensor, w: Tensor, columns: int, gated: bool, tile: Tile, counts: Tensor | None,
            early: bool) -> Tensor:
    (rows, lines), out, count = (x.shape, x.new_empty(x.shape[0], columns),
                                 triton.cdiv(w.shape[1], tile.columns))
    assert (0 < rows <= MOST_ROWS and len(w) == lines and x.dtype == w.dtype and x.is_contiguous()
            and w.mT.is_contiguous() and out.numel())
    whole, splits = lines % tile.lines == 0, tile.splits
    constants = dict(GATED=gated, WHOLE=whole, COLUMNS=tile.columns, LINES=tile.lines, STAGES=tile.stages)
    aligned = (x.data_ptr() % 16, w.data_ptr() % 16, lines % 16, lines == 1)
    if tile.blocks and rows == 1 and tile.lines >= lines:
        launch(stream_kernel, (x.dtype, x.device, *constants.values(), *aligned),
               Grid(min(count, SMS * tile.blocks), tile.warps, early=early),
               (x, w, out, lines, columns, count), lambda: constants, x.device.type == "cpu")
        return out
    if tile.columns < 16 or x.dtype == torch.float32:
        launch(one_row_kernel, (x.dtype, x.device, *constants.values(), *aligned),
               Grid(count * rows, tile.warps, early=early), (x, w, out, rows, lines, columns),
               lambda: constants, x.device.type == "cpu")
        return out
    constants |= dict(SPLIT=splits > 1, ROWS=max(8, triton.next_power_of_2(rows)))
    parts = x.new_empty(count * splits * tile.columns * constants["ROWS"] if splits > 1 else 4,
                        dtype=torch.float32)
    assert splits == 1 or counts is not None and counts.numel() >= count
    launch(rows_kernel, (x.dtype, x.device, *constants.values(), *aligned),
           Grid(count * splits, tile.warps, early=early),
           (x, w, out, parts, parts if counts is None else counts, rows, lines, columns, splits),
           lambda: constants, x.device.type == "cpu")
    return out
