"""Codes of packed weights as float16, two to a word, without an offset to take away.

Bits under a mask that are read as float16 are a code times 2**-24, or 2**-20 where its lowest bit is the half's fifth:
subnormal, exact, and as fast as any other number. One fused multiply-add then scales it and adds what a code of zero
stands for. It gives a value times 2**-GAIN_BITS (`packed_layout.py`): nothing overflows, and where codes times scales
are below 2048 nothing is rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.ptx import pack, unpack
from hybridkv.kernels.cuda.tiles import INTERPRETED

_LESS = tl.constexpr(-(2.0**-12))
"""Of a minimum in units of d, in a type of small codes."""
_LESS_OF_1024TH = tl.constexpr(-(2.0**-9))
"""The same where minima are counted in 1024ths."""


@triton.constexpr_function
def _value_text(mask, other_mask):
    """Write `(x & mask | y & other_mask) * f + s` in both halves: $0 of x, f, s, and y."""
    # Bytes 1 and 3 without a shift.
    first = "prmt.b32 x, $1, 0, 0x4341" if mask == 0xFF00FF00 else f"and.b32 x, $1, {mask}"
    second = f"mov.b32 a, {other_mask}; lop3.b32 x, $4, a, x, 0xea; " if other_mask else ""
    return f"{{ .reg .b32 x, a; {first}; {second}fma.rn.f16x2 $0, x, $2, $3; }}"


@triton.jit
def code_values(x, other, f, s, MASK: tl.constexpr, OTHER_MASK: tl.constexpr):
    """Put two codes together from the bits of x and of `other` under masks, times `f` plus `s`: a word.

    MASK 0xFF00FF00 takes its bytes as if they lay 8 bits lower.
    """
    if INTERPRETED:
        code = (x >> 8) & 0x00FF00FF if MASK == 0xFF00FF00 else x & MASK
        if OTHER_MASK:
            code = code | (other & OTHER_MASK)
        a, b = unpack(code)
        fa, fb = unpack(f)
        sa, sb = unpack(s)
        low = a.to(tl.float32) * fa.to(tl.float32) + sa.to(tl.float32)
        word = pack(low, b.to(tl.float32) * fb.to(tl.float32) + sb.to(tl.float32))
    elif OTHER_MASK:
        word = tl.inline_asm_elementwise(
            _value_text(MASK, OTHER_MASK), "=r,r,r,r,r", [x, f, s, other], tl.int32, is_pure=True, pack=1
        )
    else:
        word = tl.inline_asm_elementwise(_value_text(MASK, 0), "=r,r,r,r", [x, f, s], tl.int32, is_pure=True, pack=1)
    return word


@triton.constexpr_function
def _magic(upper):
    """Choose a half whose lowest bits count 32, or for codes of upper nibbles, which are 16 times as large, 2."""
    return 0x6800 if upper else 0x7800


@triton.constexpr_function
def _signed(half):
    """Repeat a half, as a signed number."""
    word = half * 0x10001
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.constexpr_function
def _factor_text(upper, zero, byte):
    """Write the way from a magic word with a number in it to its factor, or from byte `byte` of a word."""
    first = "mov.b32 x, $1" if byte is None else f"mov.b32 a, {_magic(upper) >> 8}; prmt.b32 x, $1, a, 0x4{byte}4{byte}"
    minus = (0x8000 | _magic(upper) | zero) * 0x10001
    return f"{{ .reg .b32 x, a; {first}; mov.b32 a, {minus}; add.rn.f16x2 $0, x, a; }}"


@triton.jit
def _without(word, HALF: tl.constexpr):
    """Subtract a float16 from both halves of a word; for the interpreter."""
    a, b = unpack(word)
    c, _ = unpack(tl.full(word.shape, _signed(HALF), tl.int32))
    return pack(a.to(tl.float32) - c.to(tl.float32), b.to(tl.float32) - c.to(tl.float32))


@triton.jit
def factor_of_bits(bits, SHIFT: tl.constexpr, MASK: tl.constexpr, UPPER: tl.constexpr):
    """Return the factor of an integer scale among some bits: scale * 2**(24 - GAIN_BITS), a 16th of it if UPPER."""
    word = ((bits >> SHIFT) & MASK) * 0x10001 + _signed(_magic(UPPER))
    if INTERPRETED:
        f = _without(word, _magic(UPPER))
    else:
        f = tl.inline_asm_elementwise(_factor_text(UPPER, 0, None), "=r,r", [word], tl.int32, is_pure=True, pack=1)
    return f


@triton.jit
def factor_of_byte(x, I: tl.constexpr, UPPER: tl.constexpr):
    """Return the same of byte I of a word, which holds a scale plus 128."""
    if INTERPRETED:
        word = ((x >> (8 * I)) & 0xFF) * 0x10001 + _signed(_magic(UPPER))
        f = _without(word, _magic(UPPER) | 0x80)
    else:
        f = tl.inline_asm_elementwise(_factor_text(UPPER, 0x80, I), "=r,r", [x], tl.int32, is_pure=True, pack=1)
    return f


@triton.jit
def times_half(word, HALF: tl.constexpr):
    """Multiply both halves by a float16 that is given by its bits."""
    if INTERPRETED:
        a, b = unpack(word)
        c, _ = unpack(tl.full(word.shape, _signed(HALF), tl.int32))
        c = c.to(tl.float32)
        out = pack(a.to(tl.float32) * c, b.to(tl.float32) * c)
    else:
        other = tl.full(word.shape, _signed(HALF), tl.int32)
        out = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [word, other], tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def half_of(x, UPPER: tl.constexpr):
    """Return one of a word's two float16, as float32."""
    low, high = unpack(x)
    return high.to(tl.float32) if UPPER else low.to(tl.float32)


@triton.jit
def ratio_of(d_and_min):
    """Compute dmin in units of d, float32, from a word of both. Zeros give zero."""
    d, m = half_of(d_and_min, False), half_of(d_and_min, True)
    if INTERPRETED:
        inverse = tl.where(d == 0.0, 0.0, 1.0 / d)
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1; min.f32 $0, $0, 0f4E800000;", "=&f,f", [d], tl.float32, is_pure=True, pack=1
        )
    return m * inverse


@triton.jit
def less_of_1024th(ratio):
    """Return a word for `minimum_of_bits`."""
    r = ratio * _LESS_OF_1024TH
    return pack(r, r)


@triton.jit
def minimum_of_bits(bits, word, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Take away an integer minimum among some bits, in units of d: a word. The ratio is rounded, and then the product.

    `word` is what `less_of_1024th` gives.
    """
    count = ((bits >> SHIFT) & MASK) * 0x10001 + 0x3C003C00  # 1 and some 1024ths
    minus = word ^ -2147450880  # 0x80008000
    if INTERPRETED:
        a, b = unpack(count)
        c, d = unpack(word)
        c, d = c.to(tl.float32), d.to(tl.float32)
        out = pack((a.to(tl.float32) - 1.0) * c, (b.to(tl.float32) - 1.0) * d)
    else:
        out = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [count, word, minus], tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def exact_minimum_of_bits(bits, ratio, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Take away a minimum as `minimum_of_bits` does, rounded once: for q2_K, whose values are mostly minima."""
    m = ((bits >> SHIFT) & MASK).to(tl.float32) * (ratio * _LESS)
    return pack(m, m)


@triton.jit
def quarter_of(a, b, c, place):
    """Return 24 bits of three words: those that begin at bit 0, 24, 48 or 72."""
    low = tl.where(place < 2, a, tl.where(place == 2, b, c))
    if INTERPRETED:
        bits = tl.where(place == 1, (a >> 24) & 0xFF | b << 8, low)
        bits = tl.where(place == 2, (b >> 16) & 0xFFFF | c << 16, bits)
        bits = tl.where(place == 3, (c >> 8) & 0xFFFFFF, bits)
    else:
        high = tl.where(place < 2, b, c)
        bits = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, place * 24], tl.int32, is_pure=True, pack=1
        )
    return bits
