"""all_gather and all_to_all over NVLink: data of any dtype, bit for bit. One trip; the protocol is `lamport`.

Data may hold EMPTY here, and has to arrive as it is. A quad that has EMPTY in it is sent with other words in
their place, and its line, LINE quads side by side, says so: every line has a word of its own, PLAIN or
HIDDEN. With a HIDDEN line each quad has a word more, whose bits say which of its four were EMPTY; so have the
quads in its place for the other ranks. Nearly all lines are PLAIN: then this costs one word a line.

A slot holds what the other ranks send, one after another: their quads, then the words of their lines, then
room for those of their quads. The lane that takes one of these last is the only one that reads it, and
empties it.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.lamport import (
    EMPTY,
    await_words,
    clear,
    enter,
    leave,
    place,
    receive,
    without_empty,
)
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import (
    load_quads,
    piece_address,
    push_quads_once,
    push_words_once,
    store_quads,
    store_quads_once,
)
from shardlib.triton_kernels.workspace import Workspace

PLAIN, HIDDEN = tl.constexpr(1), tl.constexpr(2)


def all_gather_reference(pieces: list[Tensor]) -> Tensor:
    """(outer, W, inner): every rank's piece, (outer, inner)."""
    return torch.stack(pieces, 1)


def all_to_all_reference(pieces: list[Tensor], rank: int) -> Tensor:
    """(W, n): what every rank, whose pieces are (W, n), has for `rank`."""
    return torch.stack([piece[rank] for piece in pieces])


@triton.jit
def _empty_words(a, b, c, d):
    """Which of four words are EMPTY, as bits."""
    return ((a == EMPTY).to(tl.int32) | ((b == EMPTY).to(tl.int32) << 1) | ((c == EMPTY).to(tl.int32) << 2)
            | ((d == EMPTY).to(tl.int32) << 3))


@triton.jit
def _unhidden(word, empty, J: tl.constexpr):
    """Word J of a quad as it was, of whose words `empty` were EMPTY."""
    return tl.where(((empty >> J) & 1) == 1, EMPTY, word)


@triton.jit
def _any_of_line(flags, LINE: tl.constexpr, BLOCK: tl.constexpr):
    """For each lane, whether the flag of any lane of its line is set."""
    if LINE == BLOCK:  # else Triton gives one thread a whole line, and loads it again
        return tl.zeros_like(flags) + tl.max(flags, 0)
    of_line = tl.max(tl.reshape(flags, (BLOCK // LINE, LINE)), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(of_line, (BLOCK // LINE, LINE)), (BLOCK,))


@triton.jit
def _push_pieces(x, first, piece, stride, addresses_ptr, slot, lines, hidden, RANK: tl.constexpr,
                 W: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Sends quads first ... of every piece to its rank.

    lines, hidden: where in a slot the words of lines and of quads begin.
    """
    lane = first + tl.arange(0, BLOCK)
    there = lane < piece
    q = tl.minimum(lane, piece - 1).to(tl.int64)
    empty = tl.zeros((BLOCK,), tl.int32)                # four bits for each target
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        a, b, c, d = load_quads(x + (to * stride + q) * 16, INTERPRET)
        push_quads_once(tl.load(addresses_ptr + to) + slot + (place(RANK, to) * piece + q) * 16,
                        without_empty(a), without_empty(b), without_empty(c), without_empty(d), there,
                        INTERPRET)
        empty |= _empty_words(a, b, c, d) << (4 * (i - 1))
    hides = _any_of_line((empty != 0).to(tl.int32), LINE, BLOCK) == 1
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        target = tl.load(addresses_ptr + to) + slot
        push_words_once(target + lines + (place(RANK, to) * tl.cdiv(piece, LINE) + q // LINE) * 4,
                        tl.where(hides, HIDDEN, PLAIN), there & (lane % LINE == 0), INTERPRET)
        push_words_once(target + hidden + (place(RANK, to) * piece + q) * 4, (empty >> (4 * (i - 1))) & 15,
                        there & hides, INTERPRET)


@triton.jit
def receive_lines(address, stride, line, line_stride, N: tl.constexpr, SPIN: tl.constexpr,
                  CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    """Waits until the quads at address + i * stride and the words at line + i * line_stride, i < N, are full:
    their 4 N words, then the N."""
    if INTERPRET:
        words = receive(address, stride, N, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        for i in tl.static_range(N):
            words = words + (await_words((line + i * line_stride).to(tl.pointer_type(tl.int32))),)
        return words
    else:
        zero = tl.zeros_like(address)
        return tl.inline_asm_elementwise(SPIN, CONSTRAINTS,
                                         [address, zero + stride, line, zero + line_stride], dtype=WORDS,
                                         is_pure=False, pack=1)


@triton.jit
def take_words(address, there, INTERPRET: tl.constexpr):
    """Waits until the word at each address is full, and empties it, in the lanes that are `there`;
    0 in the others."""
    if INTERPRET:
        p = address.to(tl.pointer_type(tl.int32))
        word = tl.load(p, mask=there, other=0, volatile=True)
        while tl.max((word == EMPTY).to(tl.int32)) > 0:
            word = tl.where(word == EMPTY, tl.load(p, mask=there, other=0, volatile=True), word)
        tl.store(p, EMPTY, mask=there)
        return word
    else:
        return tl.inline_asm_elementwise("""{ .reg .pred p, q; .reg .b32 m;
mov.b32 m, 0;
setp.eq.s32 p, $2, 0;
@p bra DONE;
POLL: ld.relaxed.sys.global.b32 m, [$1];
setp.eq.b32 q, m, 0x7FFF7FFF;
@q bra POLL;
st.global.b32 [$1], 0x7FFF7FFF;
DONE: mov.b32 $0, m; }""", "=&r,l,r", [address, there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["piece", "stride", "inner"])
def exchange_kernel(x_ptr, out_ptr, addresses_ptr, state_ptr, piece, stride, inner, slot_bytes,
                    RANK: tl.constexpr, W: tl.constexpr, FLAT: tl.constexpr, LINE: tl.constexpr,
                    SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
                    INTERPRET: tl.constexpr):
    """piece: quads from one rank to one; the piece for rank r starts at quad r * stride of x. Received pieces
    are (outer, inner), put together along the middle of (outer, W, inner); FLAT: outer is 1. While one chunk
    is on its way, the chunk before it is stored."""
    call, previous, left = enter(state_ptr)
    here = tl.load(addresses_ptr + RANK)
    slot, step = call * slot_bytes, tl.num_programs(0) * BLOCK
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    of_piece = tl.cdiv(piece, LINE)
    filled = (W - 1) * piece + tl.cdiv((W - 1) * of_piece, 4)
    lines, hidden = piece.to(tl.int64) * ((W - 1) * 16), filled.to(tl.int64) * 16
    first = tl.program_id(0) * BLOCK
    _push_pieces(x, first, piece, stride, addresses_ptr, slot, lines, hidden, RANK, W, LINE, BLOCK, INTERPRET)
    leave(call, state_ptr, filled, piece, 1, LINE, BLOCK)
    cleared = 0
    for start in range(first, piece, step):
        if start + step < piece:
            _push_pieces(x, start + step, piece, stride, addresses_ptr, slot, lines, hidden, RANK, W, LINE,
                         BLOCK, INTERPRET)
        clear(here + previous * slot_bytes, cleared, tl.minimum(cleared + W * step, left), BLOCK, INTERPRET)
        cleared += W * step
        lane = start + tl.arange(0, BLOCK)
        there, q = lane < piece, tl.minimum(lane, piece - 1)
        a, b, c, d = load_quads(x + (RANK * stride + q).to(tl.int64) * 16, INTERPRET)
        store_quads(out + piece_address(RANK, q, piece, inner, W, FLAT), a, b, c, d, INTERPRET)
        words = receive_lines(here + slot + q.to(tl.int64) * 16, piece.to(tl.int64) * 16,
                              here + slot + lines + (q // LINE).to(tl.int64) * 4,
                              of_piece.to(tl.int64) * 4, W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
        for i in tl.static_range(W - 1):
            empty = take_words(here + slot + hidden + (i * piece + q).to(tl.int64) * 4,
                               there & (words[4 * (W - 1) + i] == HIDDEN), INTERPRET)
            store_quads_once(out + piece_address(i + (i >= RANK), q, piece, inner, W, FLAT),
                             _unhidden(words[4 * i], empty, 0), _unhidden(words[4 * i + 1], empty, 1),
                             _unhidden(words[4 * i + 2], empty, 2), _unhidden(words[4 * i + 3], empty, 3),
                             there, INTERPRET)
    clear(here + previous * slot_bytes, cleared, left, BLOCK, INTERPRET)


def spin_lines(count: int) -> dict[str, object]:
    """The constants SPIN, CONSTRAINTS and WORDS of `receive_lines` for `count` sources."""
    words = [f"${i}" for i in range(5 * count)]
    loads = [f"ld.relaxed.sys.global.v4.b32 {{{', '.join(words[4 * r:4 * r + 4])}}}, [a];\n"
             f"ld.relaxed.sys.global.b32 {words[4 * count + r]}, [l];"
             for r in range(count)]
    tests = ([f"setp.eq.b32 q, {words[0]}, {EMPTY.value};"]
             + [f"setp.eq.or.b32 q, {w}, {EMPTY.value}, q;" for w in words[1:]])
    step = f"\nadd.s64 a, a, ${5 * count + 1};\nadd.s64 l, l, ${5 * count + 3};\n"
    text = (f"{{ .reg .pred q; .reg .b64 a, l;\nPOLL: mov.b64 a, ${5 * count};\n"
            f"mov.b64 l, ${5 * count + 2};\n{step.join(loads)}\n"
            + "\n".join(tests) + "\n@q bra POLL; }")
    return {"SPIN": text, "CONSTRAINTS": ",".join(["=&r"] * (5 * count) + ["l"] * 4),
            "WORDS": (tl.int32,) * (5 * count)}


def lines_of(piece: int, world: int, line: int) -> int:
    """Lines in the pieces, of `piece` quads each, that the others send."""
    return (world - 1) * -(-piece // line)


def slot_bytes(piece: int, world: int, line: int = 32) -> int:
    """Bytes of a slot that such pieces take, with a word for each line and for each quad: whole quads."""
    others = world - 1
    return (others * piece + -(-lines_of(piece, world, line) // 4) + -(-others * piece // 4)) * 16


def all_gather(x: Tensor, workspace: Workspace, grid: Grid, line: int = 32) -> Tensor:
    """(outer, W, inner): every rank's x, (outer, inner), contiguous, of any dtype.

    Rows are whole quads; `slot_bytes` fit a slot.
    """
    outer, inner = x.shape
    out = x.new_empty(outer, workspace.size, inner)
    return _exchange(x, out, outer * inner, 0, inner, workspace, grid, line)


def all_to_all(x: Tensor, workspace: Workspace, grid: Grid, line: int = 32) -> Tensor:
    """(W, n): row r is what rank r has for this rank; x, (W, n), holds a row for each rank.

    Rows are whole quads.
    """
    size, n = x.shape
    assert size == workspace.size
    return _exchange(x, torch.empty_like(x), n, n, n, workspace, grid, line)


def _exchange(x: Tensor, out: Tensor, piece: int, stride: int, inner: int, workspace: Workspace, grid: Grid,
              line: int) -> Tensor:
    """piece, stride and inner in elements; line divides the threads of a block."""
    quads, strides, inners = (n * x.dtype.itemsize // 16 for n in (piece, stride, inner))
    assert (x.is_contiguous() and x.data_ptr() % 16 == 0 and inners * 16 == inner * x.dtype.itemsize
            and x.numel()), "quads of 16 bytes, aligned"
    assert grid.threads % line == 0 and workspace.size <= 9, "lines within a block; four bits for each target"
    w, flat = workspace, inner == piece
    w.check(slot_bytes(quads, w.size, line))
    launch(exchange_kernel, (flat, line, *w.key), grid.over(quads),
           (_words(x), _words(out), w.addresses, w.state, quads, strides, inners, w.slot_bytes),
           lambda: dict(RANK=w.rank, W=w.size, FLAT=flat, LINE=line, **spin_lines(w.size - 1),
                        BLOCK=grid.threads, INTERPRET=w.interpret),
           w.interpret)
    return out


_COMMON = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
                     torch.int16, torch.int8, torch.uint8, torch.bool))


def _words(x: Tensor) -> Tensor:
    """As a dtype that Triton has, whichever: the kernel asks for the address alone."""
    return x if x.dtype in _COMMON else x.view(torch.uint8)
