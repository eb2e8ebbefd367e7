"""The protocol of the fastest kernels between GPUs: the data is its own flag (as in Lamport's bakery,
nobody needs a lock).

Every rank has an arena of three slots, filled with a word that no data holds. A rank pushes its data straight
into the arenas of the others and polls its own until none of that word is left: one trip over NVLink, no
barrier, no fence.

    call n uses slot n % 3           and clears what call n - 1 has left in slot (n - 1) % 3

A slot holds what the other ranks send, one after another (`place`); what a rank has itself stays where it is.

Why this is safe: whoever pushes for call n has finished call n - 1, so it has everybody's data of call n - 1,
and a rank pushes that only after its whole call n - 2, with the clearing of slot (n - 3) % 3 = n % 3, is done
(a kernel ends with all its stores performed). Two slots are not enough: then call n would clear what call
n + 1 already receives.
Every quad is pushed once: a second copy could come when the first has been read and cleared.

EMPTY is 0x7FFF7FFF, a NaN in float32 and a pair of NaNs in float16 and bfloat16. What is added up and equals
it is sent as the NaN 0x7FFF7FFE: a NaN stays a NaN, and every other value, -0.0 too, keeps its bits. What is
moved keeps all: see `exchange`.

The calls are counted on the device, so that kernels captured in a CUDA graph and eager ones may take turns.
All ranks make the same calls with the same sizes; kernels that share an arena run one after another on one
stream.

state_ptr: int32 [slot of this call, blocks that have read it, quads left in slot 0, in slot 1, in slot 2],
and of the call that has begun last, for reports alone: [quads of a part from one rank, parts, quads of a line
or 0, blocks, quads that a block receives at once]. 0 parts: rows that may not come (`expert_exchange`), of
which the quads are words, one for each part of a row.
"""
from __future__ import annotations

import triton
import triton.language as tl

from shardlib.triton_kernels.quads import pack, store_quads, unpack_high, unpack_low

EMPTY = tl.constexpr(0x7FFF7FFF)
STATE_WORDS = 10
SLOTS = tl.constexpr(3)


@triton.jit
def without_empty(word):
    """The word, unless it is EMPTY."""
    return tl.where(word == EMPTY, 0x7FFF7FFE, word)


@triton.jit
def enter(state_ptr):
    """(slot of this call, the one before it, how many quads of that are to be cleared)."""
    slot = tl.load(state_ptr)
    previous = (slot + SLOTS - 1) % SLOTS
    return slot, previous, tl.load(state_ptr + 2 + previous)


@triton.jit
def leave(slot, state_ptr, filled, quads, PARTS: tl.constexpr, LINE: tl.constexpr, chunk):
    """Counts the call, once all blocks have entered; `filled` quads of its slot get filled: of PARTS parts,
    `quads` from each rank, and what the lines of LINE quads need. chunk: quads that a block receives at once.
    Best called when the first data is on its way."""
    tl.debug_barrier()                              # all threads of the block have entered
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr + 2 + slot, filled)
        tl.store(state_ptr, (slot + 1) % SLOTS)
        tl.store(state_ptr + 5, quads)
        tl.store(state_ptr + 6, PARTS)
        tl.store(state_ptr + 7, LINE)
        tl.store(state_ptr + 8, tl.num_programs(0))
        tl.store(state_ptr + 9, chunk)


@triton.jit
def clear(slot_address, start, stop, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Empties quads start ... stop - 1 of a slot; all blocks share the work."""
    empty = tl.full((BLOCK,), EMPTY, tl.int32)
    for at in range(start + tl.program_id(0) * BLOCK, stop, tl.num_programs(0) * BLOCK):
        q = tl.minimum(at + tl.arange(0, BLOCK), stop - 1).to(tl.int64)
        store_quads(slot_address + q * 16, empty, empty, empty, empty, INTERPRET)


@triton.jit
def await_words(p):
    """In the interpreter: the words at p, once all are full.

    A lane that has its word keeps it, as a thread would.
    """
    word = tl.load(p, volatile=True)
    while tl.max((word == EMPTY).to(tl.int32)) > 0:
        word = tl.where(word == EMPTY, tl.load(p, volatile=True), word)
    return word


@triton.jit
def receive(address, stride, N: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
            WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    """Waits until the quads at address + i * stride, i < N, are full: their 4 N words."""
    if INTERPRET:
        words = ()
        for i in tl.static_range(N):
            p = (address + i * stride).to(tl.pointer_type(tl.int32))
            for j in tl.static_range(4):
                words = words + (await_words(p + j),)
        return words
    else:
        return tl.inline_asm_elementwise(SPIN, CONSTRAINTS, [address, tl.zeros_like(address) + stride],
                                         dtype=WORDS, is_pure=False, pack=1)


@triton.jit
def place(source: tl.constexpr, target: tl.constexpr):
    """Where in a slot of `target` the data of `source` lies:
    by rank, without a place for the target itself."""
    return source - (source > target)


@triton.jit
def add_up(words, own, J: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
           INTERPRET: tl.constexpr):
    """Word J of the sum over the ranks, first to last, in float32, rounded once.

    words: of the other ranks; own: of this one.
    """
    low = unpack_low(own[J] if RANK == 0 else words[J], KIND)
    for r in tl.static_range(1, W):
        low += unpack_low(own[J] if r == RANK else words[4 * (r - (r > RANK)) + J], KIND)
    if KIND == "fp32":
        return pack(low, low, KIND, INTERPRET)
    else:
        high = unpack_high(own[J] if RANK == 0 else words[J], KIND)
        for r in tl.static_range(1, W):
            high += unpack_high(own[J] if r == RANK else words[4 * (r - (r > RANK)) + J], KIND)
        return pack(low, high, KIND, INTERPRET)


def spin(count: int) -> dict[str, object]:
    """The constants SPIN, CONSTRAINTS and WORDS of `receive` for `count` quads:
    a loop of loads without a barrier in it."""
    words = [f"${i}" for i in range(4 * count)]
    loads = [f"ld.relaxed.sys.global.v4.b32 {{{', '.join(words[4 * r:4 * r + 4])}}}, [a];"
             for r in range(count)]
    tests = ([f"setp.eq.b32 q, {words[0]}, {EMPTY.value};"]
             + [f"setp.eq.or.b32 q, {w}, {EMPTY.value}, q;" for w in words[1:]])
    step = f"\nadd.s64 a, a, ${4 * count + 1};\n"
    text = (f"{{ .reg .pred q; .reg .b64 a;\nPOLL: mov.b64 a, ${4 * count};\n"
            f"{step.join(loads)}\n" + "\n".join(tests) + "\n@q bra POLL; }")
    return {"SPIN": text, "CONSTRAINTS": ",".join(["=&r"] * (4 * count) + ["l", "l"]),
            "WORDS": (tl.int32,) * (4 * count)}
