"""all_reduce over NVLink: every rank gets the sum of every rank's x,
added up in rank order in float32, rounded once.

Two ways, with the same bits but for the payload of a NaN. One shot: everybody sends everything to everybody,
one trip, (W - 1) N bytes out of each GPU. Two shots: each rank adds up its share and sends the sum to all,
two trips, 2 (W - 1) / W N bytes. Small tensors want one trip.
The protocol is `lamport`.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.lamport import add_up, clear, enter, leave, place, receive, spin, without_empty
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import KINDS, load_quads, push_quads_once, store_quads
from shardlib.triton_kernels.workspace import Workspace


def all_reduce_reference(pieces: list[Tensor]) -> Tensor:
    """The sum of `pieces` (one a rank), in rank order, in float32, rounded once."""
    total = pieces[0].float()
    for piece in pieces[1:]:
        total = total + piece.float()
    return total.to(pieces[0].dtype)


@triton.jit
def _push_all(x, first, quads, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
              INTERPRET: tl.constexpr):
    """Sends quads first ... of x to all others."""
    lane = first + tl.arange(0, BLOCK)
    q = tl.minimum(lane, quads - 1).to(tl.int64)
    a, b, c, d = load_quads(x + q * 16, INTERPRET)
    a, b, c, d = without_empty(a), without_empty(b), without_empty(c), without_empty(d)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        push_quads_once(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * quads + q) * 16, a, b, c, d,
                        lane < quads, INTERPRET)


@triton.jit(do_not_specialize=["quads"])
def one_shot_kernel(x_ptr, out_ptr, addresses_ptr, state_ptr, quads, slot_bytes, RANK: tl.constexpr,
                    W: tl.constexpr, KIND: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                    WORDS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """A slot holds W - 1 times the whole. While one chunk is on its way, the chunk before it is added up."""
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, step = call * slot_bytes, tl.num_programs(0) * BLOCK
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    first = tl.program_id(0) * BLOCK
    _push_all(x, first, quads, addresses_ptr, slot, RANK, W, BLOCK, INTERPRET)
    leave(call, state_ptr, (W - 1) * quads, quads, 1, 0, BLOCK)
    cleared = 0
    for start in range(first, quads, step):
        if start + step < quads:
            _push_all(x, start + step, quads, addresses_ptr, slot, RANK, W, BLOCK, INTERPRET)
        clear(here + previous * slot_bytes, cleared, tl.minimum(cleared + (W - 1) * step, left), BLOCK,
              INTERPRET)
        cleared += (W - 1) * step
        q = tl.minimum(start + tl.arange(0, BLOCK), quads - 1).to(tl.int64)
        own = load_quads(x + q * 16, INTERPRET)
        words = receive(here + slot + q * 16, quads.to(tl.int64) * 16, W - 1, SPIN, CONSTRAINTS, WORDS,
                        INTERPRET)
        store_quads(out + q * 16, add_up(words, own, 0, RANK, W, KIND, INTERPRET),
                    add_up(words, own, 1, RANK, W, KIND, INTERPRET),
                    add_up(words, own, 2, RANK, W, KIND, INTERPRET),
                    add_up(words, own, 3, RANK, W, KIND, INTERPRET), INTERPRET)
    clear(here + previous * slot_bytes, cleared, left, BLOCK, INTERPRET)


@triton.jit
def _push_shares(x, first, quads, share, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr,
                 BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Sends quads first ... of every share of x to its owner."""
    lane = first + tl.arange(0, BLOCK)
    q = tl.minimum(lane, share - 1).to(tl.int64)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        a, b, c, d = load_quads(x + tl.minimum(to * share + q, quads - 1) * 16, INTERPRET)
        push_quads_once(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * share + q) * 16,
                        without_empty(a), without_empty(b), without_empty(c), without_empty(d), lane < share,
                        INTERPRET)


@triton.jit
def _push_sums(x, out, first, quads, share, addresses_ptr, here, slot, sums, RANK: tl.constexpr,
               W: tl.constexpr, KIND: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
               WORDS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds up quads first ... of this rank's share, and sends the sums to all."""
    lane = first + tl.arange(0, BLOCK)
    q = tl.minimum(lane, share - 1).to(tl.int64)
    at = tl.minimum(RANK * share + q, quads - 1) * 16
    own = load_quads(x + at, INTERPRET)
    words = receive(here + slot + q * 16, share.to(tl.int64) * 16, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
    a, b = add_up(words, own, 0, RANK, W, KIND, INTERPRET), add_up(words, own, 1, RANK, W, KIND, INTERPRET)
    c, d = add_up(words, own, 2, RANK, W, KIND, INTERPRET), add_up(words, own, 3, RANK, W, KIND, INTERPRET)
    a, b, c, d = without_empty(a), without_empty(b), without_empty(c), without_empty(d)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        push_quads_once(tl.load(addresses_ptr + to) + slot + sums + (place(RANK, to) * share + q) * 16, a, b,
                        c, d, lane < share, INTERPRET)
    store_quads(out + at, a, b, c, d, INTERPRET)


@triton.jit(do_not_specialize=["quads", "share"])
def two_shot_kernel(x_ptr, out_ptr, addresses_ptr, state_ptr, quads, share, slot_bytes, RANK: tl.constexpr,
                    W: tl.constexpr, KIND: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                    WORDS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Rank r owns quads r share ... (r + 1) share - 1. A slot holds W - 1 shares of pieces, then W - 1 shares
    of sums. Three chunks are under way: of one the pieces, of the one before it the sums, and the one before
    that is stored."""
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, step = call * slot_bytes, tl.num_programs(0) * BLOCK
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    sums = share.to(tl.int64) * ((W - 1) * 16)
    first = tl.program_id(0) * BLOCK
    _push_shares(x, first, quads, share, addresses_ptr, slot, RANK, W, BLOCK, INTERPRET)
    leave(call, state_ptr, 2 * (W - 1) * share, share, 2, 0, BLOCK)
    cleared = 0
    for start in range(first, share + step, step):
        if start + step < share:
            _push_shares(x, start + step, quads, share, addresses_ptr, slot, RANK, W, BLOCK, INTERPRET)
        clear(here + previous * slot_bytes, cleared, tl.minimum(cleared + 2 * (W - 1) * step, left), BLOCK,
              INTERPRET)
        cleared += 2 * (W - 1) * step
        if start < share:
            _push_sums(x, out, start, quads, share, addresses_ptr, here, slot, sums, RANK, W, KIND, SPIN,
                       CONSTRAINTS, WORDS, BLOCK, INTERPRET)
        if start > first:
            q = tl.minimum(start - step + tl.arange(0, BLOCK), share - 1).to(tl.int64)
            words = receive(here + slot + sums + q * 16, share.to(tl.int64) * 16, W - 1, SPIN, CONSTRAINTS,
                            WORDS, INTERPRET)
            for i in tl.static_range(W - 1):
                at = tl.minimum((i + (i >= RANK)) * share + q, quads - 1) * 16
                store_quads(out + at, words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3],
                            INTERPRET)
    clear(here + previous * slot_bytes, cleared, left, BLOCK, INTERPRET)


def one_shot(x: Tensor, workspace: Workspace, grid: Grid) -> Tensor:
    """The sum of every rank's x (float32, bfloat16 or float16; contiguous;
    W - 1 times its bytes fit a slot), as a new tensor."""
    w, quads, out = workspace, _quads(x), torch.empty_like(x)
    w.check((w.size - 1) * x.nbytes)
    launch(one_shot_kernel, (x.dtype, *w.key), grid.over(quads),
           (x, out, w.addresses, w.state, quads, w.slot_bytes), lambda: _constants(x, w, grid), w.interpret)
    return out


def two_shot(x: Tensor, workspace: Workspace, grid: Grid) -> Tensor:
    """The same sum, in two trips: for tensors that are large; 2 (W - 1) / W of its bytes fit a slot."""
    w, quads, out = workspace, _quads(x), torch.empty_like(x)
    share = -(-quads // w.size)
    w.check(2 * (w.size - 1) * share * 16)
    launch(two_shot_kernel, (x.dtype, *w.key), grid.over(share),
           (x, out, w.addresses, w.state, quads, share, w.slot_bytes), lambda: _constants(x, w, grid),
           w.interpret)
    return out


def _constants(x: Tensor, workspace: Workspace, grid: Grid) -> dict[str, object]:
    return dict(RANK=workspace.rank, W=workspace.size, KIND=KINDS[str(x.dtype)], **spin(workspace.size - 1),
                BLOCK=grid.threads, INTERPRET=workspace.interpret)


def _quads(x: Tensor) -> int:
    assert (x.is_contiguous() and x.nbytes % 16 == 0 and x.data_ptr() % 16 == 0
            and x.nbytes), "quads of 16 bytes, aligned"
    return x.nbytes // 16
