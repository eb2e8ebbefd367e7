"""argmax of rows whose columns are split over the ranks, in one kernel: each finds the best of its own, and
16 bytes a row tell all others which that is.

A float becomes an integer that grows with it, NaN the largest of all and -0.0 as 0.0; with the index below
it, the larger the earlier, the largest of these pairs is the first of the largest floats. Blocks have rows,
alike on all ranks. The protocol is `lamport`: neither half of a pair is ever the word EMPTY.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.lamport import EMPTY, clear, enter, leave, place, receive, spin
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import push_quads_once
from shardlib.triton_kernels.workspace import Workspace

LEAST = tl.constexpr(-2**31)


def split_argmax_reference(pieces: list[Tensor]) -> Tensor:
    """Of `pieces`, one a rank, (rows, columns): the first index of the largest of each row; NaN is larger
    than all."""
    return torch.cat(pieces, -1).argmax(-1)


@triton.jit
def _key(x):
    """Of float32: int32 in the same order."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def best_of(x_ptr, columns, LANES: tl.constexpr):
    """(key, index) of the first of the largest of a row; as each lane finds it, then as all do."""
    lane, best, found = tl.arange(0, LANES), tl.full((LANES,), LEAST, tl.int32), tl.zeros((LANES,), tl.int32)
    for start in tl.range(0, columns, LANES, loop_unroll_factor=8):
        there = start + lane < columns
        key = tl.where(there, _key(tl.load(x_ptr + start + lane, mask=there, other=0).to(tl.float32)), LEAST)
        found = tl.where(key > best, start + lane, found)
        best = tl.maximum(best, key)
    pair = tl.max((best.to(tl.int64) << 32) | (0x7FFFFFFF - found).to(tl.int64), 0)
    return (pair >> 32).to(tl.int32), 0x7FFFFFFF - (pair & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def split_argmax_kernel(x_ptr, out_ptr, addresses_ptr, state_ptr, rows, columns, slot_bytes,
                        RANK: tl.constexpr, W: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                        WORDS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
                        INTERPRET: tl.constexpr, EARLY: tl.constexpr):
    """columns: of this rank's piece. A slot holds W - 1 times a quad for each row."""
    await_before(EARLY)
    let_next_start(EARLY)
    call, previous, left = enter(state_ptr)
    here, slot, pieces = tl.load(addresses_ptr + RANK), call * slot_bytes, rows.to(tl.int64) * 16
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.int32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        key, index = best_of(x_ptr + row * columns.to(tl.int64), columns, LANES)
        at = zeros.to(tl.int64) + row * 16
        for i in tl.static_range(1, W):
            to = (RANK + i) % W
            push_quads_once(tl.load(addresses_ptr + to) + slot + place(RANK, to) * pieces + at, zeros + key,
                            zeros + index, zeros, zeros, lane == 0, INTERPRET)
        if row < tl.num_programs(0):                # the block's first
            leave(call, state_ptr, (W - 1) * rows, rows, 1, 0, 1)
            clear(here + previous * slot_bytes, 0, left, BLOCK, INTERPRET)
        words = receive(here + slot + at, pieces, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        best, found = zeros + LEAST, zeros
        for r in tl.static_range(W):
            theirs, there = zeros + key, zeros + index
            if r != RANK:
                theirs, there = words[4 * (r - (r > RANK))], words[4 * (r - (r > RANK)) + 1]
            found = tl.where(theirs > best, there + r * columns, found)
            best = tl.maximum(best, theirs)
        tl.store(out_ptr + row + zeros, found.to(tl.int64), mask=lane == 0)


def split_argmax(x: Tensor, workspace: Workspace, grid: Grid) -> Tensor:
    """(rows,), int64: the index among the columns of all ranks, one after another, of the largest of each
    row; the first where several are, and the first NaN where there is one.

    x: (rows, columns), contiguous, of one shape on all ranks, float32, bfloat16 or float16. All blocks of the
    grid run at once; a quad for each row of all other ranks fits a slot.
    """
    (rows, columns), w = x.shape, workspace
    assert x.is_contiguous() and x.numel() and columns * w.size < EMPTY.value
    w.check(filled_bytes(rows, w.size))
    out = torch.empty(rows, dtype=torch.int64, device=x.device)
    lanes = min(8 * grid.threads, triton.next_power_of_2(max(columns, grid.threads)))
    launch(split_argmax_kernel, (x.dtype, lanes, columns % 16 == 0, x.data_ptr() % 16, *w.key),
           grid._replace(blocks=min(grid.blocks, rows)),
           (x, out, w.addresses, w.state, rows, columns, w.slot_bytes),
           lambda: dict(RANK=w.rank, W=w.size, **spin(w.size - 1), LANES=lanes, BLOCK=grid.threads,
                        INTERPRET=w.interpret), w.interpret)
    return out


def filled_bytes(rows: int, world: int) -> int:
    """Bytes of a slot that such a call fills."""
    return (world - 1) * rows * 16
