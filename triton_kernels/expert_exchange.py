"""Rows of tokens to the ranks that have experts of them, and their weighted sums home, over NVLink: each rank
writes into its peers' arenas, one copy of a token for each rank however many of its experts are there, one
sum of a token from each.

The protocol is `lamport`, of rows that may not come: beside each part of a row that a rank might send goes a
word, COMES or NOT, to every rank. So every rank hears from every other in each call, as the safety of three
slots wants it, and nobody has to know beforehand what comes. A slot holds the words of the other ranks, then
room for all their rows. Words are cleared by the call after this one; a quad of a row by the lane that has
taken it, the only one that reads it.

A block takes one part of a row after another, the same on every rank, and sends the next before it waits: so
what a block waits for has been sent by a block that waits for earlier parts alone.

What is sent and equals EMPTY, a pair of NaNs, comes as another NaN; every other value keeps its bits. Sums
are made in float32 by choice, rounded, and added up in rank order in float32, rounded once: as by
`expert_rows.combined` and a reduce_scatter.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.lamport import (
    EMPTY,
    add_up,
    await_words,
    clear,
    enter,
    leave,
    place,
    without_empty,
)
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.quads import (
    KINDS,
    load_quads,
    load_quads_where,
    pack,
    push_quads_once,
    push_words_once,
    store_quads_once,
    unpack_high,
    unpack_low,
)
from shardlib.triton_kernels.workspace import Workspace

COMES, NOT = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def token_of(t, rank, inner, W: tl.constexpr):
    """The number among all ranks' tokens, (outer, W, inner), of a rank's token t."""
    return ((t // inner) * W + rank) * inner + t % inner


@triton.jit
def word_of(item, items, BLOCK: tl.constexpr):
    """The words that say whether a part of a row comes, a lane each: one; of the last part all that fill up
    the last quad. And how many they are."""
    more = tl.where(item == items - 1, (4 - items % 4) % 4, 0)
    return item + tl.minimum(tl.arange(0, BLOCK), more), more + 1


@triton.jit
def push_part(words, comes, there, q, row, item, items, quads, target, slot, of_words, PLACE: tl.constexpr,
              W: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """To the rank whose arena is at `target`: a part of a row, where it `comes`; and the word of that."""
    a, b, c, d = words
    data = target + slot + (W - 1) * of_words.to(tl.int64) * 16
    push_quads_once(data + (row.to(tl.int64) * quads + q) * 16, without_empty(a), without_empty(b),
                    without_empty(c), without_empty(d), there & comes, INTERPRET)
    at, count = word_of(item, items, BLOCK)
    push_words_once(target + slot + PLACE * of_words.to(tl.int64) * 16 + at.to(tl.int64) * 4,
                    tl.zeros((BLOCK,), tl.int32) + tl.where(comes, COMES, NOT), tl.arange(0, BLOCK) < count,
                    INTERPRET)


@triton.jit
def await_where(p, wanted):
    """In the interpreter: the words at p where they are wanted, once they are full; 0 elsewhere."""
    word = tl.load(p, mask=wanted, other=0, volatile=True)
    while tl.max((word == EMPTY).to(tl.int32)) > 0:
        word = tl.where(word == EMPTY, tl.load(p, mask=wanted, other=0, volatile=True), word)
    return word


@triton.jit
def receive_parts(address, stride, word, word_stride, wanted, N: tl.constexpr, SPIN: tl.constexpr,
                  CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    """Waits until the words at word + i * word_stride, i < N, are full, and, where they say that it comes and
    it is wanted, the quad at address + i * stride: 4 N words, 0 where nothing comes; then the N."""
    if INTERPRET:
        flags, words = (), ()
        for i in tl.static_range(N):
            flags = flags + (await_words((word + i * word_stride).to(tl.pointer_type(tl.int32))),)
        for i in tl.static_range(N):
            p = (address + i * stride).to(tl.pointer_type(tl.int32))
            for j in tl.static_range(4):
                words = words + (await_where(p + j, (wanted != 0) & (flags[i] == COMES)),)
        return words + flags
    else:
        zero = tl.zeros_like(address)
        return tl.inline_asm_elementwise(SPIN, CONSTRAINTS,
                                         [address, zero + stride, word, zero + word_stride, wanted],
                                         dtype=WORDS, is_pure=False, pack=1)


def spin_parts(count: int) -> dict[str, object]:
    """The constants SPIN, CONSTRAINTS and WORDS of `receive_parts` for `count` sources. What does not come
    has been looked at, and is EMPTY, or is not wanted: 0 then."""
    words, at = [f"${i}" for i in range(5 * count)], 5 * count
    text = ["{ .reg .pred p, q, r; .reg .b64 a, l;", f"setp.ne.s32 p, ${at + 4}, 0;",
            *(f"mov.b32 {w}, 0;" for w in words[:4 * count]), f"POLL: mov.b64 a, ${at};",
            f"mov.b64 l, ${at + 2};"]
    for i in range(count):
        text += [f"ld.relaxed.sys.global.b32 {words[4 * count + i]}, [l];",
                 f"@p ld.relaxed.sys.global.v4.b32 {{{', '.join(words[4 * i:4 * i + 4])}}}, [a];",
                 f"add.s64 a, a, ${at + 1};", f"add.s64 l, l, ${at + 3};"]
    text.append(f"setp.eq.b32 q, {words[4 * count]}, {EMPTY.value};")
    for i in range(count):
        flag, quad = words[4 * count + i], words[4 * i:4 * i + 4]
        text += [f"setp.eq.or.b32 q, {flag}, {EMPTY.value}, q;", f"setp.eq.b32 r, {quad[0]}, {EMPTY.value};",
                 *(f"setp.eq.or.b32 r, {w}, {EMPTY.value}, r;" for w in quad[1:]),
                 f"setp.ne.and.b32 r, {flag}, {NOT.value}, r;", "or.pred q, q, r;"]
    text.append("@q bra POLL;")
    for i in range(count):
        text += [f"setp.eq.s32 r, {words[4 * count + i]}, {NOT.value};",
                 *(f"@r mov.b32 {w}, 0;" for w in words[4 * i:4 * i + 4])]
    return {"SPIN": "\n".join([*text, "}"]), "CONSTRAINTS": ",".join(["=&r"] * at + ["l"] * 4 + ["r"]),
            "WORDS": (tl.int32,) * at}


@triton.jit
def receive_items(here, slot, item, items, row, q, there, quads, rows, of_words, W: tl.constexpr,
                  SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
                  INTERPRET: tl.constexpr):
    """A part of row `row` of every other rank: 4 words of each, 0 where it does not come; what has come is
    emptied."""
    at, count = word_of(item, items, BLOCK)
    first = here + slot + (W - 1) * of_words.to(tl.int64) * 16 + (row.to(tl.int64) * quads + q) * 16
    stride = rows.to(tl.int64) * quads * 16
    words = receive_parts(first, stride, here + slot + at.to(tl.int64) * 4, of_words.to(tl.int64) * 16,
                          there.to(tl.int32), W - 1, SPIN, CONSTRAINTS, WORDS, INTERPRET)
    empty = tl.full((BLOCK,), EMPTY, tl.int32)
    for i in tl.static_range(W - 1):
        store_quads_once(first + i * stride, empty, empty, empty, empty,
                         there & (words[4 * (W - 1) + i] == COMES), INTERPRET)
    return words


# -- there ---------------------------------------------------------------------------------------------------

def dispatch_rows_reference(xs: list[Tensor], chosen: Tensor, place: Tensor, first: int, experts: int,
                            most: int, inner: int) -> Tensor:
    """The rows of one rank's experts, most at most, each at its place; zeros where none is. xs: of each rank
    (tokens, width); chosen, place: (all tokens, choices)."""
    all_x = torch.stack([x.view(-1, inner, x.shape[1]) for x in xs], 1).reshape(-1, xs[0].shape[1])
    out = all_x.new_zeros(most, all_x.shape[1])
    token = torch.arange(len(chosen), device=chosen.device).unsqueeze(1).expand(chosen.shape)
    own = (chosen >= first) & (chosen < first + experts)
    out[place.view(chosen.shape)[own].long()] = all_x[token[own]]
    return out


@triton.jit
def _push_row(x, chosen_ptr, item, items, parts, inner, quads, tokens, experts, addresses_ptr, slot, of_words,
              RANK: tl.constexpr, W: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,
              INTERPRET: tl.constexpr):
    t = item // parts
    lane = item % parts * BLOCK + tl.arange(0, BLOCK)
    there, q = lane < quads, tl.minimum(lane, quads - 1)
    words = load_quads(x + (t.to(tl.int64) * quads + q) * 16, INTERPRET)
    chosen = chosen_ptr + token_of(t, RANK, inner, W).to(tl.int64) * J
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        comes = False
        for j in tl.static_range(J):
            e = tl.load(chosen + j)
            comes = comes | ((e >= to * experts) & (e < (to + 1) * experts))
        push_part(words, comes, there, q, place(RANK, to) * tokens + t, item, items, quads,
                  tl.load(addresses_ptr + to), slot, of_words, place(RANK, to), W, BLOCK, INTERPRET)


@triton.jit
def _keep(words, out, place_ptr, q, there, quads, most, J: tl.constexpr, INTERPRET: tl.constexpr):
    """A part of a token's row at each of its places."""
    a, b, c, d = words
    for j in tl.static_range(J):
        row = tl.load(place_ptr + j)
        to = out + (tl.maximum(row, 0).to(tl.int64) * quads + q) * 16
        store_quads_once(to, a, b, c, d, there & (row >= 0) & (row < most), INTERPRET)


@triton.jit(do_not_specialize=["tokens", "inner", "quads", "parts", "experts", "most"])
def dispatch_rows_kernel(x_ptr, chosen_ptr, place_ptr, out_ptr, addresses_ptr, state_ptr, tokens, inner,
                         quads, parts, experts, most, slot_bytes, RANK: tl.constexpr, W: tl.constexpr,
                         J: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr,
                         BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """tokens: of a rank, (outer, inner) of (outer, W, inner); quads: of a row, in `parts`; experts: of a
    rank."""
    call, previous, left = enter(state_ptr)
    here, slot = tl.load(addresses_ptr + RANK), call * slot_bytes
    items, step, first = tokens * parts, tl.num_programs(0), tl.program_id(0)
    of_words = tl.cdiv(items, 4)
    x, out = x_ptr.to(tl.int64), out_ptr.to(tl.int64)
    _push_row(x, chosen_ptr, first, items, parts, inner, quads, tokens, experts, addresses_ptr, slot,
              of_words, RANK, W, J, BLOCK, INTERPRET)
    leave(call, state_ptr, (W - 1) * of_words, of_words, 0, 0, 1)
    clear(here + previous * slot_bytes, 0, left, BLOCK, INTERPRET)
    for item in range(first, items, step):
        if item + step < items:
            _push_row(x, chosen_ptr, item + step, items, parts, inner, quads, tokens, experts, addresses_ptr,
                      slot, of_words, RANK, W, J, BLOCK, INTERPRET)
        t = item // parts
        lane = item % parts * BLOCK + tl.arange(0, BLOCK)
        there, q = lane < quads, tl.minimum(lane, quads - 1)
        own = load_quads(x + (t.to(tl.int64) * quads + q) * 16, INTERPRET)
        _keep(own, out, place_ptr + token_of(t, RANK, inner, W).to(tl.int64) * J, q, there, quads, most, J,
              INTERPRET)
        words = receive_items(here, slot, item, items, t, q, there, quads, tokens, of_words, W, SPIN,
                              CONSTRAINTS, WORDS, BLOCK, INTERPRET)
        for i in tl.static_range(W - 1):
            at = place_ptr + token_of(t, i + (i >= RANK), inner, W).to(tl.int64) * J
            came = there & (words[4 * (W - 1) + i] == COMES)
            _keep((words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]), out, at, q, came,
                  quads, most, J, INTERPRET)


# -- and home ------------------------------------------------------------------------------------------------

def combine_rows_reference(parts: list[Tensor], rank: int, inner: int) -> Tensor:
    """This rank's tokens, (tokens, width), of the sum of every rank's sums, (all tokens, width), 0 where a
    rank has no expert of a token."""
    total = sum((part.float() for part in parts[1:]), parts[0].float())
    return total.view(-1, len(parts), inner, total.shape[1])[:, rank].reshape(-1, total.shape[1]).to(
        parts[0].dtype)


@triton.jit
def _sum_of(rows, place_ptr, weights_ptr, q, there, quads, J: tl.constexpr, KIND: tl.constexpr,
            BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """(whether any of a token's choices is here, the four words of a part of their weighted sum)."""
    zero = tl.zeros((BLOCK,), tl.float32)
    low0, low1, low2, low3, high0, high1, high2, high3 = zero, zero, zero, zero, zero, zero, zero, zero
    comes = False
    for j in tl.static_range(J):
        row, weight = tl.load(place_ptr + j), tl.load(weights_ptr + j)
        comes = comes | (row >= 0)
        a, b, c, d = load_quads_where(rows + (tl.maximum(row, 0).to(tl.int64) * quads + q) * 16,
                                      there & (row >= 0), INTERPRET)
        low0 += unpack_low(a, KIND) * weight
        low1 += unpack_low(b, KIND) * weight
        low2 += unpack_low(c, KIND) * weight
        low3 += unpack_low(d, KIND) * weight
        if KIND != "fp32":
            high0 += unpack_high(a, KIND) * weight
            high1 += unpack_high(b, KIND) * weight
            high2 += unpack_high(c, KIND) * weight
            high3 += unpack_high(d, KIND) * weight
    return comes, (pack(low0, high0, KIND, INTERPRET), pack(low1, high1, KIND, INTERPRET),
                   pack(low2, high2, KIND, INTERPRET), pack(low3, high3, KIND, INTERPRET))


@triton.jit
def _push_sum(rows, place_ptr, weights_ptr, item, items, parts, inner, quads, tokens, addresses_ptr, slot,
              of_words, RANK: tl.constexpr, W: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr,
              BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    t = item // parts
    lane = item % parts * BLOCK + tl.arange(0, BLOCK)
    there, q = lane < quads, tl.minimum(lane, quads - 1)
    for i in tl.static_range(1, W):
        to = (RANK + i) % W
        at = token_of(t, to, inner, W).to(tl.int64) * J
        comes, words = _sum_of(rows, place_ptr + at, weights_ptr + at, q, there, quads, J, KIND, BLOCK,
                               INTERPRET)
        push_part(words, comes, there, q, place(RANK, to) * tokens + t, item, items, quads,
                  tl.load(addresses_ptr + to), slot, of_words, place(RANK, to), W, BLOCK, INTERPRET)


@triton.jit(do_not_specialize=["tokens", "inner", "quads", "parts"])
def combine_rows_kernel(rows_ptr, place_ptr, weights_ptr, out_ptr, addresses_ptr, state_ptr, tokens, inner,
                        quads, parts, slot_bytes, RANK: tl.constexpr, W: tl.constexpr, J: tl.constexpr,
                        KIND: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                        WORDS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Sizes as in `dispatch_rows_kernel`; weights: float32."""
    call, previous, left = enter(state_ptr)
    here, slot = tl.load(addresses_ptr + RANK), call * slot_bytes
    items, step, first = tokens * parts, tl.num_programs(0), tl.program_id(0)
    of_words = tl.cdiv(items, 4)
    rows, out = rows_ptr.to(tl.int64), out_ptr.to(tl.int64)
    _push_sum(rows, place_ptr, weights_ptr, first, items, parts, inner, quads, tokens, addresses_ptr, slot,
              of_words, RANK, W, J, KIND, BLOCK, INTERPRET)
    leave(call, state_ptr, (W - 1) * of_words, of_words, 0, 0, 1)
    clear(here + previous * slot_bytes, 0, left, BLOCK, INTERPRET)
    for item in range(first, items, step):
        if item + step < items:
            _push_sum(rows, place_ptr, weights_ptr, item + step, items, parts, inner, quads, tokens,
                      addresses_ptr, slot, of_words, RANK, W, J, KIND, BLOCK, INTERPRET)
        t = item // parts
        lane = item % parts * BLOCK + tl.arange(0, BLOCK)
        there, q = lane < quads, tl.minimum(lane, quads - 1)
        at = token_of(t, RANK, inner, W).to(tl.int64) * J
        comes, own = _sum_of(rows, place_ptr + at, weights_ptr + at, q, there, quads, J, KIND, BLOCK,
                             INTERPRET)
        words = receive_items(here, slot, item, items, t, q, there, quads, tokens, of_words, W, SPIN,
                              CONSTRAINTS, WORDS, BLOCK, INTERPRET)
        store_quads_once(out + (t.to(tl.int64) * quads + q) * 16,
                         add_up(words, own, 0, RANK, W, KIND, INTERPRET),
                         add_up(words, own, 1, RANK, W, KIND, INTERPRET),
                         add_up(words, own, 2, RANK, W, KIND, INTERPRET),
                         add_up(words, own, 3, RANK, W, KIND, INTERPRET), there, INTERPRET)


# -- launchers -----------------------------------------------------------------------------------------------

def parts_of(quads: int, grid: Grid) -> int:
    """Of a row of so many quads, one a thread."""
    return -(-quads // grid.threads)


def slot_bytes(tokens: int, width_bytes: int, world: int, grid: Grid) -> int:
    """Bytes of a slot that rows of so many tokens of each other rank take, with their words: whole quads."""
    words = -(-tokens * parts_of(width_bytes // 16, grid) // 4) * 16
    return (world - 1) * (words + tokens * width_bytes)


def dispatch_rows(x: Tensor, chosen: Tensor, place: Tensor, experts: int, most: int, inner: int,
                  workspace: Workspace, grid: Grid) -> Tensor:
    """(most, width): the rows of this rank's `experts`, each at its place; what is behind them means nothing.

    x: (tokens, width), contiguous, as many on every rank, (outer, inner) of the tokens (outer, W, inner) of
    all; chosen: int64 (all tokens, choices), alike on all ranks; place: of `expert_places`.
    """
    (tokens, width), w = x.shape, workspace
    quads, out = width * x.itemsize // 16, x.new_empty(most, width)
    assert x.is_contiguous() and x.data_ptr() % 16 == 0 and quads * 16 == width * x.itemsize and x.numel()
    assert chosen.is_contiguous() and len(chosen) == w.size * tokens and place.numel() == chosen.numel()
    w.check(slot_bytes(tokens, width * x.itemsize, w.size, grid))
    choices = chosen.shape[1]
    launch(dispatch_rows_kernel, (x.dtype, choices, *w.key), grid._replace(
        blocks=min(grid.blocks, tokens * parts_of(quads, grid))),
           (x, chosen, place, out, w.addresses, w.state, tokens, inner, quads, parts_of(quads, grid), experts,
            most, w.slot_bytes),
           lambda: dict(RANK=w.rank, W=w.size, J=choices, **spin_parts(w.size - 1), BLOCK=grid.threads,
                        INTERPRET=w.interpret), w.interpret)
    return out


def combine_rows(rows: Tensor, place: Tensor, weights: Tensor, inner: int, workspace: Workspace,
                 grid: Grid) -> Tensor:
    """(tokens, width): of this rank's tokens the sums of their rows, times their weights, on all ranks.

    rows: as from `dispatch_rows`, contiguous; weights: float32 (all tokens, choices), alike on all ranks.
    """
    (count, choices), w, width = weights.shape, workspace, rows.shape[1]
    tokens, quads = count // w.size, width * rows.itemsize // 16
    out = rows.new_empty(tokens, width)
    assert rows.is_contiguous() and weights.is_contiguous() and weights.dtype == torch.float32 and tokens
    assert rows.data_ptr() % 16 == 0 and quads and quads * 16 == width * rows.itemsize
    assert place.numel() == weights.numel() and tokens * w.size == count
    w.check(slot_bytes(tokens, width * rows.itemsize, w.size, grid))
    launch(combine_rows_kernel, (rows.dtype, choices, *w.key), grid._replace(
        blocks=min(grid.blocks, tokens * parts_of(quads, grid))),
           (rows, place, weights, out, w.addresses, w.state, tokens, inner, quads, parts_of(quads, grid),
            w.slot_bytes),
           lambda: dict(RANK=w.rank, W=w.size, J=choices, KIND=KINDS[str(rows.dtype)], enable_fp_fusion=False,
                        **spin_parts(w.size - 1), BLOCK=grid.threads, INTERPRET=w.interpret), w.interpret)
    return out
