"""Units of packed weights in registers: loaded as whole words, and decoded to what the tensor cores take.

A lane has the place `lane % 4` in its group of four and a share of a unit's inputs (`packed_layout.py`): eight words of
codes, of which each becomes four words of two neighbouring inputs, float16: two of its lower nibbles (bytes 0 and 2,
then 1 and 3), two of its upper ones. A value is a decoded code times a float32 scale: one for the unit (order of
quarters), or one for each run of 32 inputs. Codes times integer scales are exact up to 2048 and rounded to 12 bits
above; minima are rounded to 12 bits.

Loading and decoding are apart, so that a unit can be under way while another is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.packed_grid import decode_grid_unit, load_grid_unit
from hybridkv.kernels.cuda.ptx import load_half, load_words, pack, two_values, unpack
from hybridkv.kernels.cuda.tiles import INTERPRETED, LOOK_UP_NIBBLES

ONE = tl.constexpr(0x3C003C00)
"""1.0 as float16, twice."""

# Entries spread so that a word has two bytes, 16 bits apart.
_LOOK_UP = tl.constexpr(
    LOOK_UP_NIBBLES
    + """
    prmt.b32 $0, v, w, 0x4400;
    prmt.b32 $1, v, w, 0x6622;
    prmt.b32 $2, v, w, 0x5511;
    prmt.b32 $3, v, w, 0x7733;
    }
    """
)


@triton.constexpr_function
def _entry(T, i):
    return T.book[i // 4] >> (i % 4 * 8) & 255


@triton.jit
def _entries(codes, T: tl.constexpr):
    """Look up the table's bytes for the lowest nibbles of both halves; for the interpreter."""
    low, high = codes & 15, (codes >> 16) & 15
    out = codes * 0
    for i in tl.static_range(16):
        out = out | tl.where(low == i, _entry(T, i), 0) | tl.where(high == i, _entry(T, i) << 16, 0)
    return out


@triton.constexpr_function
def _word_of_book(T, i):
    """Return the word as a signed number."""
    return T.book[i] - (1 << 32) if T.book[i] >= 1 << 31 else T.book[i]


@triton.jit
def _look_up(x, T: tl.constexpr):
    """Look up the bytes that the eight nibbles of x index, two to a word, in the order of a word's values."""
    if INTERPRETED:
        a, b = _entries(x, T), _entries(x >> 8, T)
        c, d = _entries(x >> 4, T), _entries(x >> 12, T)
    else:
        zero = x * 0
        a, b, c, d = tl.inline_asm_elementwise(
            _LOOK_UP,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [
                x,
                zero + _word_of_book(T, 0),
                zero + _word_of_book(T, 1),
                zero + _word_of_book(T, 2),
                zero + _word_of_book(T, 3),
            ],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d


@triton.jit
def load_unit(main, more, scales, last, row, unit, n_units, place, T: tl.constexpr):
    """Load the words of a lane's share of a unit of its row: zeros beyond the last unit."""
    if T.grid is not None:
        raw = load_grid_unit(main, more, scales, last, row, unit, n_units, place, T)
    else:
        raw = _load_coded(main, more, scales, last, row, unit, n_units, place, T)
    return raw


@triton.jit
def _load_coded(main, more, scales, last, row, unit, n_units, place, T: tl.constexpr):
    at = row * n_units + unit
    words = tl.pointer_type(tl.int32)
    halves = tl.pointer_type(tl.int16)
    raw = ()
    for i in tl.static_range(T.bits // 2):
        raw = raw + load_words(main.to(words) + at * (8 * T.bits) + place * 4, unit, n_units, 4, 16 * i)
    if T.more == 2:
        raw = raw + load_words(more.to(words) + at * 16 + place * 4, unit, n_units, 4, 0)
    elif T.more == 1:
        raw = raw + load_words(more.to(words) + at * 8 + place * 2, unit, n_units, 2, 0)
    if T.scales == "six" or T.scales == "half":
        raw = raw + load_words(scales.to(words) + at * 4, unit, n_units, 4, 0)
    elif T.scales == "exponent":
        raw = raw + load_words(scales.to(words) + at * 2, unit, n_units, 2, 0)
    elif T.scales == "bytes32":
        raw = raw + (load_half(scales.to(halves) + at * 4 + place, unit, n_units, 0),)
    else:
        raw = raw + load_words(scales.to(words) + at * 4 + place, unit, n_units, 1, 0)
    if T.scales == "half" and T.has_min:
        raw = raw + load_words(last.to(words) + at * 4, unit, n_units, 4, 0)
    elif T.scales == "nibbles":
        raw = raw + load_words(last.to(words) + at, unit, n_units, 1, 0)
    elif T.scales == "bytes16" or T.scales == "bytes32":
        raw = raw + (load_half(last.to(halves) + at, unit, n_units, 0),)
    return raw


@triton.jit
def _half_of(x, UPPER: tl.constexpr):
    """Return one of a word's two float16, as float32."""
    low, high = unpack(x)
    return high.to(tl.float32) if UPPER else low.to(tl.float32)


@triton.jit
def _byte(x, I: tl.constexpr):
    """Return byte I of a word in both halves."""
    y = (x >> (8 * I)) & 0xFF
    return y | (y << 16)


@triton.jit
def _integer(x, MINUS: tl.constexpr):
    """Convert a number below 1024 in both halves, less a constant, to float16."""
    return two_values(x, x, tl.full(x.shape, ONE, tl.int32), x, 0x03FF03FF, 0, 0x64006400, 1024 + MINUS, False)


@triton.jit
def _scaled_pair(d, m):
    """Return the common unit of a scale and a minimum, and each in that unit: float32."""
    counts = tl.abs(d) * 512.0 >= tl.abs(m)
    unit = tl.where(counts, d, m)
    inverse = tl.where(unit == 0.0, 0.0, 1.0 / unit)
    return unit, tl.where(counts, tl.where(d == 0.0, 0.0, 1.0), d * inverse), m * inverse


@triton.jit
def _scales_of(raw, place, T: tl.constexpr):
    """Decode a lane's scales: words of factors and of summands, by group; and float32 scales of their products."""
    first: tl.constexpr = 2 * T.bits + 2 * T.more
    factors = ()
    summands = ()
    units = ()
    if T.scales == "six":
        # A quarter's 24 bits begin at bit 0, 24, 48 or 72.
        a, b, c = raw[first + 1], raw[first + 2], raw[first + 3]
        bits = tl.where(place == 0, a, tl.where(place == 3, (c >> 8) & 0xFFFFFF, 0))
        bits = tl.where(place == 1, (a >> 24) & 0xFF | b << 8, bits)
        bits = tl.where(place == 2, (b >> 16) & 0xFFFF | c << 16, bits)
        unit, factor, minimum = _scaled_pair(_half_of(raw[first], False), _half_of(raw[first], True))
        for i in tl.static_range(2):
            scale = ((bits >> (6 * i)) & 63).to(tl.float32) * factor
            low = ((bits >> (12 + 6 * i)) & 63).to(tl.float32) * -minimum
            factors = factors + (pack(scale, scale),)
            summands = summands + (pack(low, low),)
        units = (unit,)
    elif T.scales == "nibbles":
        d, m = _half_of(raw[first + 1], False), _half_of(raw[first + 1], True)
        unit, factor, minimum = _scaled_pair(d, m)
        for i in tl.static_range(4):
            scale = ((raw[first] >> (8 * i)) & 15).to(tl.float32) * factor
            low = ((raw[first] >> (8 * i + 4)) & 15).to(tl.float32) * -minimum
            factors = factors + (pack(scale, scale),)
            summands = summands + (pack(low, low),)
        units = (unit,)
    elif T.scales == "bytes16" or T.scales == "bytes32":
        groups: tl.constexpr = 4 if T.scales == "bytes16" else 2
        for i in tl.static_range(groups):
            factors = factors + (_integer(_byte(raw[first] ^ -2139062144, i), 128),)  # 0x80 in every byte
        units = (_half_of(raw[first + 1], False),)
    elif T.scales == "exponent":
        for i in tl.static_range(8):
            e = (raw[first + i // 4] >> (i % 4 * 8)) & 0xFF
            bits = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23)
            units = units + (bits.to(tl.float32, bitcast=True),)
    else:
        for i in tl.static_range(8):
            d = _half_of(raw[first + i // 2], i % 2 == 1)
            if T.has_min:
                m = _half_of(raw[first + 4 + i // 2], i % 2 == 1)
                unit, factor, minimum = _scaled_pair(d, m)
                factors = factors + (pack(factor, factor),)
                summands = summands + (pack(minimum, minimum),)
                units = units + (unit,)
            else:
                units = units + (d,)
    return factors, summands, units


@triton.constexpr_function
def _group_of(word, half, T):
    """Find which of a lane's scales the values of a half of a word have."""
    if T.scales == "bytes16" or T.scales == "nibbles":
        return 2 * half + word // 4
    if T.scales == "six" or T.scales == "bytes32":
        return half
    return word


@triton.constexpr_function
def _field_text(word, index, bits):
    """Locate the further bits of a word's values: the word, and the lowest bit."""
    words = 4 // bits
    return word // words, bits * (word % words * 4 + index)


@triton.jit
def _moved(x, FROM: tl.constexpr, TO: tl.constexpr):
    y = x
    if FROM > TO:
        y = x >> (FROM - TO)
    elif FROM < TO:
        y = x << (TO - FROM)
    return y


@triton.jit
def _two(raw, factor, summand, W: tl.constexpr, I: tl.constexpr, T: tl.constexpr):
    """Decode values I of a word of codes: a word of two."""
    scaled: tl.constexpr = T.has_min
    if T.bits == 8:
        x = raw[2 * W + I // 2]
        y = x if I % 2 == 0 else x >> 8
        out = two_values(y, y, factor, summand, 0x00FF00FF, 0, 0x64006400, 1024 + T.minus, scaled)
    elif T.bits == 2:
        place: tl.constexpr = _field_text(W, I, 2)
        x = _moved(raw[place[0]], place[1], 0)
        if T.more == 1:
            bit: tl.constexpr = _field_text(W, I, 1)
            other = _moved(raw[4 + bit[0]], bit[1], 2)
            out = two_values(
                x, other, factor, summand, 0x00030003, 0x00040004, 0x64006400, 1024 + T.minus, scaled
            )  # fmt: skip
        else:
            out = two_values(x, x, factor, summand, 0x00030003, 0, 0x64006400, 1024 + T.minus, scaled)
    else:
        x = raw[W] if I % 2 == 0 else raw[W] >> 8
        # Upper nibbles stay where they are: 0x5400 is 64, whose fifth bit counts 1.
        mask: tl.constexpr = 0x000F000F if I < 2 else 0x00F000F0
        magic: tl.constexpr = 0x64006400 if I < 2 else 0x54005400
        minus: tl.constexpr = (1024 if I < 2 else 64) + T.minus
        if T.more > 0:
            field: tl.constexpr = _field_text(W, I, T.more)
            more_mask: tl.constexpr = (0x00010001 if T.more == 1 else 0x00030003) << (4 if I < 2 else 8)
            other = _moved(raw[8 + field[0]], field[1], 4 if I < 2 else 8)
            out = two_values(x, other, factor, summand, mask, more_mask, magic, minus, scaled)
        else:
            out = two_values(x, x, factor, summand, mask, 0, magic, minus, scaled)
    return out


@triton.jit
def decode_unit(raw, place, T: tl.constexpr):
    """Decode what `load_unit` gave: 32 words, and float32 scales of their products, one or one for each word."""
    if T.grid is not None:
        words, units = decode_grid_unit(raw, place, T)
    else:
        words, units = _decode_coded(raw, place, T)
    return words, units


@triton.jit
def _decode_coded(raw, place, T: tl.constexpr):
    factors, summands, units = _scales_of(raw, place, T)
    one = tl.full(place.shape, ONE, tl.int32)
    words = ()
    for w in tl.static_range(8):
        if T.book is not None:
            entries = _look_up(raw[w], T)
            for i in tl.static_range(4):
                factor = one
                if T.scales == "bytes32":
                    factor = factors[i // 2]
                words = words + (
                    two_values(entries[i], one, factor, one, 0x00FF00FF, 0, 0x64006400, 1024 + T.minus, False),
                )
        else:
            for i in tl.static_range(4):
                factor = one
                summand = one
                if len(factors) > 0:
                    factor = factors[_group_of(w, i // 2, T)]
                if T.has_min:
                    summand = summands[_group_of(w, i // 2, T)]
                words = words + (_two(raw, factor, summand, w, i, T),)
    return words, units
