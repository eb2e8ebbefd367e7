"""reduce_scatter over NVLink: rank r gets its share of the sum of every rank's x,
in rank order in float32, rounded once.

x is cut along any dim: seen as (outer, W, inner), rank r owns x[:, r], and no copy puts the pieces together
first. One trip: each share is pushed to its owner. The protocol is `lamport`.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.lamport import add_up, clear, enter, leave, place, receive, spin, without_empty
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import KINDS, load_quads, piece_address, push_quads_once, store_quads
from shardlib.triton_kernels.workspace import Workspace


def reduce_scatter_reference(pieces: list[Tensor], rank: int) -> Tensor:
    """The share of `rank`, (outer, inner), of the sum of `pieces`, (outer, W, inner) each."""
    total = pieces[0][:, rank].float()
    for piece in pieces[1:]:
        total = total + piece[:, rank].float()
    return total.to(pieces[0].dtype)


@triton.jit
def _push_shares(x, first, share, inner, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr,
                 FLAT: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    lane = first + tl.arange(0, BLOCK)
    q = tl.minimum(lane, share - 1)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        a, b, c, d = load_quads(x + piece_address(to, q, share, inner, W, FLAT), INTERPRET)
        push_quads_once(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * share + q).to(tl.int64) * 16,
                        without_empty(a), without_empty(b), without_empty(c), without_empty(d), lane < share,
                        INTERPRET)


@triton.jit(do_not_specialize=["share", "inner"])
def reduce_scatter_kernel(x_ptr, out_ptr, addresses_ptr, state_ptr, share, inner, slot_bytes,
                          RANK: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
                          FLAT: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                          WORDS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """share: quads of a rank's share; inner: quads of it that lie side by side (FLAT: all of them).

    A slot holds W - 1 shares.
    """
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, step = call * slot_bytes, tl.num_programs(0) * BLOCK
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    first = tl.program_id(0) * BLOCK
    _push_shares(x, first, share, inner, addresses_ptr, slot, RANK, W, FLAT, BLOCK, INTERPRET)
    leave(call, state_ptr, (W - 1) * share, share, 1, 0, BLOCK)
    cleared = 0
    for start in range(first, share, step):
        if start + step < share:
            _push_shares(x, start + step, share, inner, addresses_ptr, slot, RANK, W, FLAT, BLOCK, INTERPRET)
        clear(here + previous * slot_bytes, cleared, tl.minimum(cleared + (W - 1) * step, left), BLOCK,
              INTERPRET)
        cleared += (W - 1) * step
        q = tl.minimum(start + tl.arange(0, BLOCK), share - 1)
        own = load_quads(x + piece_address(RANK, q, share, inner, W, FLAT), INTERPRET)
        words = receive(here + slot + q.to(tl.int64) * 16, share.to(tl.int64) * 16, W - 1, SPIN, CONSTRAINTS,
                        WORDS, INTERPRET)
        store_quads(out + q.to(tl.int64) * 16, add_up(words, own, 0, RANK, W, KIND, INTERPRET),
                    add_up(words, own, 1, RANK, W, KIND, INTERPRET),
                    add_up(words, own, 2, RANK, W, KIND, INTERPRET),
                    add_up(words, own, 3, RANK, W, KIND, INTERPRET), INTERPRET)
    clear(here + previous * slot_bytes, cleared, left, BLOCK, INTERPRET)


def reduce_scatter(x: Tensor, workspace: Workspace, grid: Grid) -> Tensor:
    """This rank's share, (outer, inner), of the sum of every rank's x, (outer, W, inner),
    contiguous; x fits a slot.

    A share's rows are whole quads: inner times the bytes of an element is a multiple of 16.
    """
    outer, size, inner = x.shape
    quads = inner * x.dtype.itemsize // 16
    assert (size == workspace.size and x.is_contiguous() and x.data_ptr() % 16 == 0
            and quads * 16 == inner * x.dtype.itemsize and x.numel())
    w, share, out = workspace, outer * quads, x.new_empty(outer, inner)
    w.check((size - 1) * share * 16)
    launch(reduce_scatter_kernel, (x.dtype, outer == 1, *w.key), grid.over(share),
           (x, out, w.addresses, w.state, share, quads, w.slot_bytes),
           lambda: dict(RANK=w.rank, W=size, KIND=KINDS[str(x.dtype)], FLAT=outer == 1, **spin(size - 1),
                        BLOCK=grid.threads, INTERPRET=w.interpret),
           w.interpret)
    return out
