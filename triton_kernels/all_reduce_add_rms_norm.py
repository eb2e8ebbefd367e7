"""all_reduce, residual add and rms_norm over NVLink in one kernel: what ends each half of a transformer's layer, for few rows.

The sum is that of `all_reduce`, rounded once; the residual is added to what was rounded, and the norm is that of what was rounded again:
residuals have the bits of the three kernels one after another. One trip; the protocol is `lamport`.

A block sees whole rows, so nothing but the data is awaited. Several blocks may share a row: all of them receive it whole, but each
sends and stores its part alone. One SM sends no more than some 27 GB/s, and receives much faster.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.all_reduce import all_reduce_reference
from shardlib.triton_kernels.lamport import add_up, clear, enter, leave, place, receive, spin, without_empty
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import KINDS, add_words, load_quads, push_quads_once, scale_words, square_words, store_quads_once
from shardlib.triton_kernels.workspace import Workspace


def all_reduce_add_rms_norm_reference(pieces: list[Tensor], residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + the sum of `pieces` (one a rank), and its norm."""
    total = residual + all_reduce_reference(pieces)
    return total, F.rms_norm(total, weight.shape, weight, eps)


@triton.jit
def _push_part(x, row, part, rows, quads, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr,
               INTERPRET: tl.constexpr):
    """Sends a part of a row of x to all others."""
    lane = tl.arange(0, LANES)
    q = row * quads.to(tl.int64) + tl.minimum(lane, quads - 1)
    a, b, c, d = load_quads(x + q * 16, INTERPRET)
    a, b, c, d = without_empty(a), without_empty(b), without_empty(c), without_empty(d)
    mine = (lane < quads) & (lane // (LANES // SPLIT) == part)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        push_quads_once(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * rows.to(tl.int64) * quads + q) * 16, a, b, c, d, mine, INTERPRET)


@triton.jit(do_not_specialize=["rows", "quads", "eps"])
def all_reduce_add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, normed_ptr, addresses_ptr, state_ptr, rows, quads, eps, slot_bytes,
                                   RANK: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, SPIN: tl.constexpr,
                                   CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, INTERPRET: tl.constexpr):
    """quads: of a row. SPLIT blocks share a row; while one is on its way, the one before it is added up. A slot holds W - 1 times the whole."""
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, at_once = call * slot_bytes, tl.num_programs(0) // SPLIT
    x, residual, weight = x_ptr.to(tl.int64), residual_ptr.to(tl.int64), weight_ptr.to(tl.int64)
    first, part = tl.program_id(0) % at_once, tl.program_id(0) // at_once
    lane = tl.arange(0, LANES)
    there, column = lane < quads, tl.minimum(lane, quads - 1).to(tl.int64)
    mine = there & (lane // (LANES // SPLIT) == part)
    width = quads.to(tl.float32) * (4 if KIND == "fp32" else 8)
    _push_part(x, first, part, rows, quads, addresses_ptr, slot, RANK, W, SPLIT, LANES, INTERPRET)
    leave(call, state_ptr, (W - 1) * rows * quads, rows * quads, 1, 0, quads)
    w = load_quads(weight + column * 16, INTERPRET)
    clear(here + previous * slot_bytes, 0, left, LANES, INTERPRET)
    for row in range(first, rows, at_once):
        if row + at_once < rows:
            _push_part(x, row + at_once, part, rows, quads, addresses_ptr, slot, RANK, W, SPLIT, LANES, INTERPRET)
        q = row * quads.to(tl.int64) + column
        own, old = load_quads(x + q * 16, INTERPRET), load_quads(residual + q * 16, INTERPRET)
        words = receive(here + slot + q * 16, rows.to(tl.int64) * quads * 16, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        a = add_words(old[0], add_up(words, own, 0, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        b = add_words(old[1], add_up(words, own, 1, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        c = add_words(old[2], add_up(words, own, 2, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        d = add_words(old[3], add_up(words, own, 3, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        store_quads_once(out_ptr.to(tl.int64) + q * 16, a, b, c, d, mine, INTERPRET)
        squares = square_words(a, KIND) + square_words(b, KIND) + square_words(c, KIND) + square_words(d, KIND)
        scale = tl.rsqrt(tl.sum(tl.where(there, squares, 0.0), 0) / width + eps)
        store_quads_once(normed_ptr.to(tl.int64) + q * 16, scale_words(a, w[0], scale, KIND, INTERPRET), scale_words(b, w[1], scale, KIND, INTERPRET),
                         scale_words(c, w[2], scale, KIND, INTERPRET), scale_words(d, w[3], scale, KIND, INTERPRET), mine, INTERPRET)


def all_reduce_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, workspace: Workspace, grid: Grid,
                            split: int) -> tuple[Tensor, Tensor]:
    """(residual + the sum of every rank's x, its rms_norm by weight), as new tensors.

    x, residual: (rows, width), weight: (width,), contiguous, of one dtype (float32, bfloat16 or float16). Rows are whole quads, and W - 1 times
    the bytes of x fit a slot. split: blocks that share a row, a power of two that divides the blocks of the grid.
    """
    rows, width = x.shape
    quads = width * x.dtype.itemsize // 16
    assert residual.shape == x.shape and weight.shape == (width,) and x.dtype == residual.dtype == weight.dtype and grid.blocks % split == 0
    assert quads * 16 == width * x.dtype.itemsize and x.numel() and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, residual, weight))
    w, out, normed, lanes = workspace, torch.empty_like(x), torch.empty_like(x), max(triton.next_power_of_2(quads), grid.threads)
    w.check((w.size - 1) * x.nbytes)
    launch(all_reduce_add_rms_norm_kernel, (x.dtype, lanes, split, *w.key), grid._replace(blocks=min(grid.blocks, rows * split)),
           (x, residual, weight, out, normed, w.addresses, w.state, rows, quads, eps, w.slot_bytes),
           lambda: dict(RANK=w.rank, W=w.size, KIND=KINDS[str(x.dtype)], SPLIT=split, **spin(w.size - 1), LANES=lanes, INTERPRET=w.interpret),
           w.interpret)
    return out, normed
