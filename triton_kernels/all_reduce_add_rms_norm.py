"""all_reduce, residual add and rms_norm over NVLink in one kernel:
what ends each half of a transformer's layer, for few rows.

The sum is that of `all_reduce`, rounded once; the residual is added to what was rounded, and the norm is that
of what was rounded again: residuals have the bits of the three kernels one after another.

Of the fewest rows several blocks share one (SPLIT), since an SM sends and reads too little to be fast alone.
Each has a part; what they must know of each other is the sum of the squares of its part. That is data as any
other: a word in the slot of this call, behind what the other ranks send, pushed by one block and polled by
all of the row. So blocks of a row must run at once: a grid never has more of them than the GPU holds.

In one shot everybody sends everything to everybody. In two, each rank adds up its share of every row and
sends the sums to all; then all of them add the residual and norm the whole. The protocol is `lamport`.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.all_reduce import all_reduce_reference
from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.lamport import add_up, clear, enter, leave, place, receive, spin, without_empty
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import (
    KINDS,
    add_words,
    load_quads,
    push_quads_once,
    push_words_once,
    scale_words,
    square_words,
    store_quads_once,
)
from shardlib.triton_kernels.workspace import Workspace


def all_reduce_add_rms_norm_reference(pieces: list[Tensor], residual: Tensor, weight: Tensor,
                                      eps: float) -> tuple[Tensor, Tensor]:
    """residual + the sum of `pieces` (one a rank), and its norm."""
    total = residual + all_reduce_reference(pieces)
    return total, F.rms_norm(total, weight.shape, weight, eps)


@triton.jit
def _push_part(x, at, there, pieces, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr,
               INTERPRET: tl.constexpr):
    """Sends the quads of x at `at` that are `there` to all others. pieces: bytes of what one rank sends."""
    a, b, c, d = load_quads(x + at, INTERPRET)
    a, b, c, d = without_empty(a), without_empty(b), without_empty(c), without_empty(d)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        push_quads_once(tl.load(addresses_ptr + to) + slot + place(RANK, to) * pieces + at, a, b, c, d, there,
                        INTERPRET)


@triton.jit
def _sum_of_row(squares, address, part, SPLIT: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                WORDS: tl.constexpr, LANES: tl.constexpr, INTERPRET: tl.constexpr):
    """The sum over all blocks of a row, first to last, of what each lane of theirs has. address: where the
    words of the row lie: whole quads, of which a block fills one word, or as many as there are for each."""
    sum_of_part = tl.sum(squares, 0)
    if SPLIT == 1:
        return sum_of_part
    else:
        lane, each = tl.arange(0, LANES), max(1, 4 // SPLIT)
        words = tl.where(lane == 0, tl.zeros((LANES,), tl.float32) + sum_of_part,
                         0.0).to(tl.int32, bitcast=True)
        push_words_once(address + (part * each + tl.minimum(lane, each - 1)).to(tl.int64) * 4,
                        without_empty(words), lane < each, INTERPRET)
        first = address + tl.zeros_like(lane).to(tl.int64)
        words = receive(first, tl.full((), 16, tl.int64), max(1, SPLIT // 4), SPIN, CONSTRAINTS, WORDS,
                        INTERPRET)
        total = words[0].to(tl.float32, bitcast=True)
        for i in tl.static_range(1, max(4, SPLIT)):
            total += words[i].to(tl.float32, bitcast=True)
        return total


@triton.jit(do_not_specialize=["rows", "quads", "share", "eps"])
def all_reduce_add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, normed_ptr, addresses_ptr,
                                   state_ptr, rows, quads, share, eps, slot_bytes, RANK: tl.constexpr,
                                   W: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr,
                                   SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr,
                                   ROW_SPIN: tl.constexpr, ROW_CONSTRAINTS: tl.constexpr,
                                   ROW_WORDS: tl.constexpr, LANES: tl.constexpr, INTERPRET: tl.constexpr,
                                   EARLY: tl.constexpr):
    """quads: of a row; share: of its parts. While one row is on its way, the one before it is added up. A
    slot holds W - 1 times the whole, then a word for each part of each row."""
    await_before(EARLY)
    let_next_start(EARLY)
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, at_once = call * slot_bytes, tl.num_programs(0) // SPLIT
    x, residual, weight = x_ptr.to(tl.int64), residual_ptr.to(tl.int64), weight_ptr.to(tl.int64)
    first, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    lane = tl.arange(0, LANES)
    there = (lane < share) & (part * share + lane < quads)
    column = tl.minimum(part * share + tl.minimum(lane, share - 1), quads - 1).to(tl.int64) * 16
    row_bytes = quads.to(tl.int64) * 16
    pieces = rows * row_bytes
    _push_part(x, first * row_bytes + column, there, pieces, addresses_ptr, slot, RANK, W, INTERPRET)
    leave(call, state_ptr, (W - 1) * rows * quads + rows * ((SPLIT + 2) // 4), rows * quads, 1, 0, share)
    w = load_quads(weight + column, INTERPRET)
    clear(here + previous * slot_bytes, 0, left, LANES, INTERPRET)
    for row in range(first, rows, at_once):
        if row + at_once < rows:
            _push_part(x, (row + at_once) * row_bytes + column, there, pieces, addresses_ptr, slot, RANK, W,
                       INTERPRET)
        at = row * row_bytes + column
        own, old = load_quads(x + at, INTERPRET), load_quads(residual + at, INTERPRET)
        words = receive(here + slot + at, pieces, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        a = add_words(old[0], add_up(words, own, 0, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        b = add_words(old[1], add_up(words, own, 1, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        c = add_words(old[2], add_up(words, own, 2, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        d = add_words(old[3], add_up(words, own, 3, RANK, W, KIND, INTERPRET), KIND, INTERPRET)
        squares = (square_words(a, KIND) + square_words(b, KIND) + square_words(c, KIND)
                   + square_words(d, KIND))
        total = _sum_of_row(tl.where(there, squares, 0.0),
                            here + slot + (W - 1) * pieces + row * (max(4, SPLIT) * 4), part, SPLIT, ROW_SPIN,
                            ROW_CONSTRAINTS, ROW_WORDS, LANES, INTERPRET)
        store_quads_once(out_ptr.to(tl.int64) + at, a, b, c, d, there, INTERPRET)
        scale = tl.rsqrt(total / (quads * (4 if KIND == "fp32" else 8)) + eps)
        store_quads_once(normed_ptr.to(tl.int64) + at, scale_words(a, w[0], scale, KIND, INTERPRET),
                         scale_words(b, w[1], scale, KIND, INTERPRET),
                         scale_words(c, w[2], scale, KIND, INTERPRET),
                         scale_words(d, w[3], scale, KIND, INTERPRET), there, INTERPRET)


@triton.jit
def _push_shares(x, at, there, owned, pieces, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr,
                 INTERPRET: tl.constexpr):
    """Sends a part of every share of a row to its owner.

    x: the part of the first share; at: where it goes; owned: bytes of a share.
    """
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        a, b, c, d = load_quads(x + to * owned, INTERPRET)
        push_quads_once(tl.load(addresses_ptr + to) + slot + place(RANK, to) * pieces + at, without_empty(a),
                        without_empty(b), without_empty(c), without_empty(d), there, INTERPRET)


@triton.jit
def _push_sums(x, sums, at, there, pieces, addresses_ptr, here, slot, RANK: tl.constexpr, W: tl.constexpr,
               KIND: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr,
               INTERPRET: tl.constexpr):
    """Adds up a part of this rank's share of a row, from x and what comes at `at`, and sends the sums to all;
    they stay at `sums`, too."""
    own = load_quads(x, INTERPRET)
    words = receive(here + slot + at, pieces, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
    a, b = add_up(words, own, 0, RANK, W, KIND, INTERPRET), add_up(words, own, 1, RANK, W, KIND, INTERPRET)
    c, d = add_up(words, own, 2, RANK, W, KIND, INTERPRET), add_up(words, own, 3, RANK, W, KIND, INTERPRET)
    a, b, c, d = without_empty(a), without_empty(b), without_empty(c), without_empty(d)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        push_quads_once(tl.load(addresses_ptr + to) + slot + (W - 1 + place(RANK, to)) * pieces + at, a, b, c,
                        d, there, INTERPRET)
    store_quads_once(sums, a, b, c, d, there, INTERPRET)


@triton.jit
def _quads_of_all(address, owned, W: tl.constexpr, INTERPRET: tl.constexpr):
    """The words at the same place of every share."""
    words = ()
    for r in tl.static_range(W):
        words = words + load_quads(address + r * owned, INTERPRET)
    return words


@triton.jit(do_not_specialize=["rows", "owned", "share", "eps"])
def two_shot_add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, normed_ptr, addresses_ptr,
                                 state_ptr, rows, owned, share, eps, slot_bytes,
                                 RANK: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr,
                                 SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr,
                                 ROW_SPIN: tl.constexpr, ROW_CONSTRAINTS: tl.constexpr,
                                 ROW_WORDS: tl.constexpr, LANES: tl.constexpr, INTERPRET: tl.constexpr,
                                 EARLY: tl.constexpr):
    """Rank r adds up quads r owned ... (r + 1) owned - 1 of every row; share: of the parts of that. A block
    has the same part of all of them. A slot holds W - 1 times the pieces of a rank's share, then W - 1 times
    its sums, then a word for each part of each row."""
    await_before(EARLY)
    let_next_start(EARLY)
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, at_once = call * slot_bytes, tl.num_programs(0) // SPLIT
    x, residual, weight = x_ptr.to(tl.int64), residual_ptr.to(tl.int64), weight_ptr.to(tl.int64)
    out, normed = out_ptr.to(tl.int64), normed_ptr.to(tl.int64)
    first, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    lane = tl.arange(0, LANES)
    there = (lane < share) & (part * share + lane < owned)
    q = tl.minimum(part * share + tl.minimum(lane, share - 1), owned - 1).to(tl.int64) * 16
    of_share = owned.to(tl.int64) * 16
    of_row, pieces = W * of_share, rows * of_share
    _push_shares(x + first * of_row + q, first * of_share + q, there, of_share, pieces, addresses_ptr, slot,
                 RANK, W, INTERPRET)
    leave(call, state_ptr, 2 * (W - 1) * rows * owned + rows * ((SPLIT + 2) // 4), rows * owned, 2, 0, share)
    clear(here + previous * slot_bytes, 0, left, LANES, INTERPRET)
    for start in range(first, rows + at_once, at_once):
        if start + at_once < rows:
            _push_shares(x + (start + at_once) * of_row + q, (start + at_once) * of_share + q, there,
                         of_share, pieces, addresses_ptr, slot, RANK, W, INTERPRET)
        if start < rows:
            mine = start * of_row + RANK * of_share + q
            _push_sums(x + mine, out + mine, start * of_share + q, there, pieces, addresses_ptr, here, slot,
                       RANK, W, KIND, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        if start > first:
            row = start - at_once
            at = row * of_row + q
            old, w = (_quads_of_all(residual + at, of_share, W, INTERPRET),
                      _quads_of_all(weight + q, of_share, W, INTERPRET))
            own = load_quads(out + at + RANK * of_share, INTERPRET)
            sums = receive(here + slot + (W - 1) * pieces + row * of_share + q, pieces, W - 1, SPIN,
                           CONSTRAINTS, WORDS, INTERPRET)
            words, squares = (), tl.zeros((LANES,), tl.float32)
            for i in tl.static_range(4 * W):
                added = own[i % 4] if i // 4 == RANK else sums[i - 4 * (i // 4 > RANK)]
                words = words + (add_words(old[i], added, KIND, INTERPRET),)
                squares += square_words(words[i], KIND)
            total = _sum_of_row(tl.where(there, squares, 0.0), here + slot + 2 * (W - 1) * pieces
                                + row * (max(4, SPLIT) * 4), part, SPLIT, ROW_SPIN,
                                ROW_CONSTRAINTS, ROW_WORDS, LANES, INTERPRET)
            scale = tl.rsqrt(total / (W * owned * (4 if KIND == "fp32" else 8)) + eps)
            for r in tl.static_range(W):
                a, b, c, d = words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3]
                store_quads_once(out + at + r * of_share, a, b, c, d, there, INTERPRET)
                store_quads_once(normed + at + r * of_share, scale_words(a, w[4 * r], scale, KIND, INTERPRET),
                                 scale_words(b, w[4 * r + 1], scale, KIND, INTERPRET),
                                 scale_words(c, w[4 * r + 2], scale, KIND, INTERPRET),
                                 scale_words(d, w[4 * r + 3], scale, KIND, INTERPRET), there, INTERPRET)


def filled_bytes(rows: int, row_bytes: int, world: int, split: int, shots: int = 1) -> int:
    """Bytes of a slot that such a call fills."""
    return (shots * (world - 1) * rows * row_bytes // (1 if shots == 1 else world)
            + rows * ((split + 2) // 4) * 16)


def all_reduce_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, workspace: Workspace,
                            grid: Grid, split: int, shots: int = 1) -> tuple[Tensor, Tensor]:
    """(residual + the sum of every rank's x, its rms_norm by weight), as new tensors.

    x, residual: (rows, width), weight: (width,), contiguous, of one dtype (float32, bfloat16 or float16).
    Rows are whole quads, W of them or a multiple in two shots, and `filled_bytes` fit a slot. split: blocks
    that share a row, a power of two up to 32; all blocks of the grid, a multiple of it, run at once.
    """
    (rows, width), w, out, normed = x.shape, workspace, torch.empty_like(x), torch.empty_like(x)
    quads = width * x.dtype.itemsize // 16
    owned = quads if shots == 1 else quads // w.size  # of a row, that one block of `split` has a part of
    assert (residual.shape == x.shape and weight.shape == (width,)
            and x.dtype == residual.dtype == weight.dtype)
    assert split in (1, 2, 4, 8, 16, 32) and grid.blocks % split == 0
    assert (quads * 16 == width * x.dtype.itemsize and x.numel()
            and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, residual, weight)))
    assert shots == 1 or owned * w.size == quads
    share = triton.cdiv(owned, split)
    lanes = max(triton.next_power_of_2(share), grid.threads)
    w.check(filled_bytes(rows, 16 * quads, w.size, split, shots))
    launch(all_reduce_add_rms_norm_kernel if shots == 1 else two_shot_add_rms_norm_kernel,
           (x.dtype, lanes, split, *w.key), grid._replace(blocks=min(grid.blocks, rows * split)),
           (x, residual, weight, out, normed, w.addresses, w.state, rows, owned, share, float(eps),
            w.slot_bytes),
           lambda: dict(RANK=w.rank, W=w.size, KIND=KINDS[str(x.dtype)], SPLIT=split, **spin(w.size - 1),
                        **row_spin(split), LANES=lanes, INTERPRET=w.interpret), w.interpret)
    return out, normed


def row_spin(split: int) -> dict[str, object]:
    """The constants ROW_SPIN, ROW_CONSTRAINTS and ROW_WORDS for so many blocks of a row."""
    return {f"ROW_{name}": value for name, value in spin(max(1, split // 4)).items()}
