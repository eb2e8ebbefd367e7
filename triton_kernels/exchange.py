"""all_gather and all_to_all over NVLink: data of any dtype, bit for bit, with flags.

Each rank pushes its pieces into the arenas of the others; call n uses slot n % 2 of an arena. Two ways:

- packets: 8 bytes of data and the number of the call twice, in 16 bytes that are written at once (what NCCL calls LL). One trip, no
  fence, twice the bytes: for small pieces.
- chunks: after each chunk a block raises a flag, and copies out what has arrived while the next chunk is on its way. Flags count
  up and are never reset; every block has its own, whatever the grid: flag [block, source].

Why this is safe: whoever pushes for call n has finished call n - 1, so it has everybody's flags of call n - 1, and a rank raises
those only after its whole call n - 2, with the reading of slot n % 2, is done. A packet of an older call carries an older number.

state_ptr: int64 [calls so far, blocks that have read it]. Packets carry the low 32 bits, counted from 1.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.lamport import place
from shardlib.triton_kernels.launching import launch
from shardlib.triton_kernels.quads import load_quads, piece_address, push_quads, store_quads
from shardlib.triton_kernels.workspace import MAX_BLOCKS, Workspace

CHUNKS = tl.constexpr(65536)
"""A call has fewer chunks in a block than this."""


def all_gather_reference(pieces: list[Tensor]) -> Tensor:
    """(outer, W, inner): every rank's piece, (outer, inner)."""
    return torch.stack(pieces, 1)


def all_to_all_reference(pieces: list[Tensor], rank: int) -> Tensor:
    """(W, n): what every rank, whose pieces are (W, n), has for `rank`."""
    return torch.stack([piece[rank] for piece in pieces])


@triton.jit
def raise_flags(flags_ptr, value, RANK: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Tells every rank that this block's stores up to here are done. P: W, or the power of 2 above it."""
    r = tl.arange(0, P)
    there = tl.load(flags_ptr + r, mask=r < W, other=0)
    flag = (there + (tl.program_id(0) * W + RANK) * 8).to(tl.pointer_type(tl.int64))
    tl.debug_barrier()                              # all threads of the block have made their stores
    tl.atomic_xchg(flag, value, mask=r < W, sem="release", scope="sys")


@triton.jit
def await_flags(flags_ptr, value, RANK: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Waits until this block's flags of all ranks have reached `value`."""
    r = tl.arange(0, P)
    flag = (tl.load(flags_ptr + RANK) + (tl.program_id(0) * W + r) * 8).to(tl.pointer_type(tl.int64))
    while tl.min(tl.load(flag, mask=r < W, other=value, volatile=True)) < value:
        pass
    tl.atomic_add(flag, 0, mask=r < W, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def count_call(call, state_ptr):
    """Counts the call, once all blocks have read its number."""
    tl.debug_barrier()                              # all threads of the block have read it
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, call + 1)


@triton.jit
def _push_chunk(x, start, piece, stride, addresses_ptr, slot, RANK: tl.constexpr, W: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
                INTERPRET: tl.constexpr):
    for u in tl.static_range(UNROLL):
        q = tl.minimum(start + u * BLOCK + tl.arange(0, BLOCK), piece - 1).to(tl.int64)
        for i in tl.static_range(1, W):
            to = (RANK + i) % W
            a, b, c, d = load_quads(x + (to * stride + q) * 16, INTERPRET)
            push_quads(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * piece + q) * 16, a, b, c, d, INTERPRET)


@triton.jit(do_not_specialize=["piece", "stride", "inner"])
def chunks_kernel(x_ptr, out_ptr, addresses_ptr, flags_ptr, state_ptr, piece, stride, inner, slot_bytes, RANK: tl.constexpr, W: tl.constexpr,
                  P: tl.constexpr, FLAT: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """piece: quads from one rank to one; the piece for rank r starts at quad r * stride of x. Received pieces are (outer, inner), put
    together along the middle of (outer, W, inner); FLAT: outer is 1."""
    call = tl.load(state_ptr)
    here, slot = tl.load(addresses_ptr + RANK), (call % 2) * slot_bytes
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    first, step = tl.program_id(0) * (BLOCK * UNROLL), tl.num_programs(0) * (BLOCK * UNROLL)
    k = call * CHUNKS + 1
    _push_chunk(x, first, piece, stride, addresses_ptr, slot, RANK, W, UNROLL, BLOCK, INTERPRET)
    raise_flags(flags_ptr, k, RANK, W, P)
    count_call(call, state_ptr)
    for start in range(first, piece, step):
        if start + step < piece:
            _push_chunk(x, start + step, piece, stride, addresses_ptr, slot, RANK, W, UNROLL, BLOCK, INTERPRET)
            raise_flags(flags_ptr, k + 1, RANK, W, P)
        for u in tl.static_range(UNROLL):
            q = tl.minimum(start + u * BLOCK + tl.arange(0, BLOCK), piece - 1)
            a, b, c, d = load_quads(x + (RANK * stride + q).to(tl.int64) * 16, INTERPRET)
            store_quads(out + piece_address(RANK, q, piece, inner, W, FLAT), a, b, c, d, INTERPRET)
        await_flags(flags_ptr, k, RANK, W, P)
        for u in tl.static_range(UNROLL):
            q = tl.minimum(start + u * BLOCK + tl.arange(0, BLOCK), piece - 1)
            for i in tl.static_range(1, W):
                source = (RANK + W - i) % W
                a, b, c, d = load_quads(here + slot + (place(source, RANK) * piece + q).to(tl.int64) * 16, INTERPRET)
                store_quads(out + piece_address(source, q, piece, inner, W, FLAT), a, b, c, d, INTERPRET)
        k += 1


@triton.jit
def receive_packets(address, stride, flag, N: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr,
                    INTERPRET: tl.constexpr):
    """Waits until both packets at each address + i * stride, i < N, carry `flag`: their 8 N words, flags included."""
    if INTERPRET:
        words = ()
        for i in tl.static_range(N):
            p = (address + i * stride).to(tl.pointer_type(tl.int64))
            for j in tl.static_range(4):
                both = tl.load(p + j, volatile=True)                    # data and flag: 8 bytes are written at once
                while tl.max(((both >> 32).to(tl.int32) != flag).to(tl.int32)) > 0:
                    both = tl.load(p + j, volatile=True)
                words = words + (both.to(tl.int32), flag)
        return words
    else:
        return tl.inline_asm_elementwise(SPIN, CONSTRAINTS, [address, tl.zeros_like(address) + stride, (tl.zeros_like(address) + flag).to(tl.int32)],
                                         dtype=WORDS, is_pure=False, pack=1)


@triton.jit
def push_packets(address, a, b, c, d, flag, INTERPRET: tl.constexpr):
    """A quad as two packets: 32 bytes at each address."""
    if INTERPRET:
        p, high = address.to(tl.pointer_type(tl.int64)), flag.to(tl.int64) << 32
        tl.store(p, high | (a.to(tl.int64) & 0xFFFFFFFF))
        tl.store(p + 1, high | (b.to(tl.int64) & 0xFFFFFFFF))
        tl.store(p + 2, high | (c.to(tl.int64) & 0xFFFFFFFF))
        tl.store(p + 3, high | (d.to(tl.int64) & 0xFFFFFFFF))
    else:
        flags = tl.zeros_like(a) + flag
        push_quads(address, a, flags, b, flags, INTERPRET)
        push_quads(address + 16, c, flags, d, flags, INTERPRET)


@triton.jit(do_not_specialize=["piece", "stride", "inner"])
def packets_kernel(x_ptr, out_ptr, addresses_ptr, state_ptr, piece, stride, inner, slot_bytes, RANK: tl.constexpr, W: tl.constexpr,
                   FLAT: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
                   INTERPRET: tl.constexpr):
    """As `chunks_kernel`, with packets."""
    call = tl.load(state_ptr)
    here, slot = tl.load(addresses_ptr + RANK), (call % 2) * slot_bytes
    flag = (call + 1).to(tl.int32)
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    first, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for start in range(first, piece, step):
        q = tl.minimum(start + tl.arange(0, BLOCK), piece - 1).to(tl.int64)
        for i in tl.static_range(1, W):
            to = (RANK + i) % W
            a, b, c, d = load_quads(x + (to * stride + q) * 16, INTERPRET)
            push_packets(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * piece + q) * 32, a, b, c, d, flag, INTERPRET)
    count_call(call, state_ptr)
    for start in range(first, piece, step):
        q = tl.minimum(start + tl.arange(0, BLOCK), piece - 1)
        a, b, c, d = load_quads(x + (RANK * stride + q).to(tl.int64) * 16, INTERPRET)
        store_quads(out + piece_address(RANK, q, piece, inner, W, FLAT), a, b, c, d, INTERPRET)
        words = receive_packets(here + slot + q.to(tl.int64) * 32, piece.to(tl.int64) * 32, flag, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        for i in tl.static_range(W - 1):
            store_quads(out + piece_address(i + (i >= RANK), q, piece, inner, W, FLAT), words[8 * i], words[8 * i + 2], words[8 * i + 4], words[8 * i + 6],
                        INTERPRET)


def spin_packets(count: int) -> dict[str, object]:
    """The constants SPIN, CONSTRAINTS and WORDS of `receive_packets` for `count` sources."""
    words = [f"${i}" for i in range(8 * count)]
    loads = [f"ld.relaxed.sys.global.v4.b32 {{{', '.join(words[8 * r + 4 * h:8 * r + 4 * h + 4])}}}, [a{f' + {16 * h}' if h else ''}];"
             for r in range(count) for h in range(2)]
    flag = f"${8 * count + 2}"
    tests = [f"setp.ne.b32 q, {words[1]}, {flag};"] + [f"setp.ne.or.b32 q, {w}, {flag}, q;" for w in words[3::2]]
    step = f"\nadd.s64 a, a, ${8 * count + 1};\n"
    both = ["\n".join(loads[2 * r:2 * r + 2]) for r in range(count)]
    text = f"{{ .reg .pred q; .reg .b64 a;\nPOLL: mov.b64 a, ${8 * count};\n{step.join(both)}\n" + "\n".join(tests) + "\n@q bra POLL; }"
    return {"SPIN": text, "CONSTRAINTS": ",".join(["=&r"] * (8 * count) + ["l", "l", "r"]), "WORDS": (tl.int32,) * (8 * count)}


def all_gather(x: Tensor, workspace: Workspace, blocks: int, num_warps: int = 8, unroll: int = 1, packets: bool = False) -> Tensor:
    """(outer, W, inner): every rank's x, (outer, inner), contiguous, of any dtype. W - 1 times its bytes fit a slot, twice that as
    packets. Rows are whole quads."""
    outer, inner = x.shape
    out = x.new_empty(outer, workspace.size, inner)
    return _exchange(x, out, outer * inner, 0, inner, workspace, blocks, num_warps, unroll, packets)


def all_to_all(x: Tensor, workspace: Workspace, blocks: int, num_warps: int = 8, unroll: int = 1, packets: bool = False) -> Tensor:
    """(W, n): row r is what rank r has for this rank; x, (W, n), holds a row for each rank. Its bytes fit a slot, twice that as packets."""
    size, n = x.shape
    assert size == workspace.size
    return _exchange(x, torch.empty_like(x), n, n, n, workspace, blocks, num_warps, unroll, packets)


def _exchange(x: Tensor, out: Tensor, piece: int, stride: int, inner: int, workspace: Workspace, blocks: int, num_warps: int, unroll: int,
              packets: bool) -> Tensor:
    """piece, stride and inner in elements. Packets and chunks each want a workspace of their own."""
    quads, strides, inners = (n * x.dtype.itemsize // 16 for n in (piece, stride, inner))
    assert x.is_contiguous() and x.data_ptr() % 16 == 0 and inners * 16 == inner * x.dtype.itemsize and x.numel(), "quads of 16 bytes, aligned"
    w, flat = workspace, inner == piece
    w.check((w.size - 1) * quads * (32 if packets else 16))

    def constants() -> dict[str, object]:
        return dict(RANK=w.rank, W=w.size, FLAT=flat, BLOCK=32 * num_warps, INTERPRET=w.interpret)
    key, sizes = (x.dtype, flat, unroll, *w.key), (quads, strides, inners, w.slot_bytes)
    if packets:
        launch(packets_kernel, key, min(blocks, -(-quads // (32 * num_warps))), num_warps, (x, out, w.addresses, w.state, *sizes),
               lambda: constants() | spin_packets(w.size - 1), w.interpret)
    else:
        launch(chunks_kernel, key, min(blocks, MAX_BLOCKS, -(-quads // (32 * num_warps * unroll))), num_warps,
               (x, out, w.addresses, w.flags, w.state, *sizes),
               lambda: constants() | dict(P=triton.next_power_of_2(w.size), UNROLL=unroll), w.interpret)
    return out
