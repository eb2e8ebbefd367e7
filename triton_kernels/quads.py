"""Quads: 16 bytes at an address, as four 32-bit words, one quad a thread. What the kernels between GPUs move.

Addresses are int64 tensors, so that a peer's memory is a number like any other. On a GPU each function is one
instruction of 16 bytes; in Triton's interpreter, which knows no assembler, the same by loads and stores of
words.

A word holds one float32, or two 16-bit floats. `unpack` and `pack` go to float32 and back, rounding to
nearest even.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_quads(address, INTERPRET: tl.constexpr):
    """The four words at each address."""
    if INTERPRET:
        p = address.to(tl.pointer_type(tl.int32))
        return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    else:
        return tl.inline_asm_elementwise("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l",
                                         [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                                         is_pure=False, pack=1)


@triton.jit
def load_quads_where(address, there, INTERPRET: tl.constexpr):
    """The same of those lanes alone that are `there`; zeros in the others."""
    if INTERPRET:
        p = address.to(tl.pointer_type(tl.int32))
        return (tl.load(p, mask=there, other=0), tl.load(p + 1, mask=there, other=0),
                tl.load(p + 2, mask=there, other=0), tl.load(p + 3, mask=there, other=0))
    else:
        return tl.inline_asm_elementwise("{ .reg .pred p;\nsetp.ne.s32 p, $5, 0;\nmov.b32 $0, 0;\n"
                                         "mov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
                                         "@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
                                         "=&r,=&r,=&r,=&r,l,r", [address, there.to(tl.int32)],
                                         dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False,
                                         pack=1)


@triton.jit
def store_quads(address, a, b, c, d, INTERPRET: tl.constexpr):
    """Writes four words to each address of this GPU."""
    if INTERPRET:
        _store_words(address, a, b, c, d)
    else:
        tl.inline_asm_elementwise("st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,l,r,r,r,r",
                                  [address, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_quads_once(address, a, b, c, d, there, INTERPRET: tl.constexpr):
    """The same, of those lanes alone that are `there`."""
    if INTERPRET:
        _store_words_once(address, a, b, c, d, there)
    else:
        tl.inline_asm_elementwise("{ .reg .pred p;\nsetp.ne.s32 p, $6, 0;\n"
                                  "@p st.global.v4.b32 [$1], {$2, $3, $4, $5};\nmov.b32 $0, 0; }",
                                  "=r,l,r,r,r,r,r", [address, a, b, c, d, there.to(tl.int32)], dtype=tl.int32,
                                  is_pure=False, pack=1)


@triton.jit
def push_quads_once(address, a, b, c, d, there, INTERPRET: tl.constexpr):
    """Writes four words to each address of any GPU, so that its threads may poll for them; of those lanes
    alone that are `there`: a second copy of a quad could come too late, and be taken for a later one."""
    if INTERPRET:
        _store_words_once(address, a, b, c, d, there)
    else:
        tl.inline_asm_elementwise("{ .reg .pred p;\nsetp.ne.s32 p, $6, 0;\n"
                                  "@p st.relaxed.sys.global.v4.b32 [$1], {$2, $3, $4, $5};\nmov.b32 $0, 0; }",
                                  "=r,l,r,r,r,r,r", [address, a, b, c, d, there.to(tl.int32)], dtype=tl.int32,
                                  is_pure=False, pack=1)


@triton.jit
def push_words_once(address, word, there, INTERPRET: tl.constexpr):
    """The same of one word."""
    if INTERPRET:
        tl.store(address.to(tl.pointer_type(tl.int32)), word, mask=there)
    else:
        tl.inline_asm_elementwise("{ .reg .pred p;\nsetp.ne.s32 p, $3, 0;\n"
                                  "@p st.relaxed.sys.global.b32 [$1], $2;\nmov.b32 $0, 0; }", "=r,l,r,r",
                                  [address, word, there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def piece_address(rank: tl.constexpr, q, piece, inner, W: tl.constexpr, FLAT: tl.constexpr):
    """Where quad q of a rank's piece lies in (outer, W, inner), in bytes.

    piece: quads of it; inner: those side by side (FLAT: all).
    """
    if FLAT:
        return (rank * piece + q).to(tl.int64) * 16
    else:
        return ((q // inner * W + rank) * inner + q % inner).to(tl.int64) * 16


@triton.jit
def _store_words(address, a, b, c, d):
    p = address.to(tl.pointer_type(tl.int32))
    tl.store(p, a)
    tl.store(p + 1, b)
    tl.store(p + 2, c)
    tl.store(p + 3, d)


@triton.jit
def _store_words_once(address, a, b, c, d, there):
    p = address.to(tl.pointer_type(tl.int32))
    tl.store(p, a, mask=there)
    tl.store(p + 1, b, mask=there)
    tl.store(p + 2, c, mask=there)
    tl.store(p + 3, d, mask=there)


@triton.jit
def unpack_low(word, KIND: tl.constexpr):
    """The first float in a word, as float32; KIND is "fp32", "bf16" or "fp16"."""
    if KIND == "fp32":
        return word.to(tl.float32, bitcast=True)
    elif KIND == "bf16":
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack_high(word, KIND: tl.constexpr):
    """The second 16-bit float in a word, as float32."""
    if KIND == "bf16":
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack(low, high, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    """One word of one or two float32, each rounded once."""
    if KIND == "fp32":
        return low.to(tl.int32, bitcast=True)
    elif INTERPRET:
        if KIND == "bf16":
            return _bf16_bits(low) | (_bf16_bits(high) << 16)
        else:
            return (low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | \
                   (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    elif KIND == "bf16":
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low],
                                         dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high, low],
                                         dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def add_words(x, y, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    """The sums of the floats in two words, each rounded once."""
    low = unpack_low(x, KIND) + unpack_low(y, KIND)
    if KIND == "fp32":
        return pack(low, low, KIND, INTERPRET)
    else:
        return pack(low, unpack_high(x, KIND) + unpack_high(y, KIND), KIND, INTERPRET)


@triton.jit
def square_words(x, KIND: tl.constexpr):
    """The sum of the squares of the floats in a word, as float32."""
    low = unpack_low(x, KIND)
    if KIND == "fp32":
        return low * low
    else:
        high = unpack_high(x, KIND)
        return low * low + high * high


@triton.jit
def scale_words(x, y, scale, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    """The products of the floats in two words and a float32, each rounded once."""
    low = unpack_low(x, KIND) * scale * unpack_low(y, KIND)
    if KIND == "fp32":
        return pack(low, low, KIND, INTERPRET)
    else:
        return pack(low, unpack_high(x, KIND) * scale * unpack_high(y, KIND), KIND, INTERPRET)


@triton.jit
def _bf16_bits(x):
    """bfloat16 of a float32, in the low 16 bits of an int32:
    the interpreter's own conversion cuts off instead of rounding."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x != x, 0x7FC0, (rounded >> 16) & 0xFFFF)


KINDS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""dtype -> the KIND of its words."""
