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

from hybridkv.kernels.cuda.codes import (
    code_values,
    exact_minimum_of_bits,
    factor_of_bits,
    factor_of_byte,
    half_of,
    less_of_1024th,
    minimum_of_bits,
    quarter_of,
    ratio_of,
    times_half,
)
from hybridkv.kernels.cuda.packed_grid import decode_grid_unit, load_grid_unit
from hybridkv.kernels.cuda.ptx import load_half, load_words, pack
from hybridkv.kernels.cuda.tiles import INTERPRETED, LOOK_UP_NIBBLES

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
def _scaled_pair(d, m):
    """Return the common unit of a scale and a minimum, and each in that unit: float32."""
    counts = tl.abs(d) * 512.0 >= tl.abs(m)
    unit = tl.where(counts, d, m)
    inverse = tl.where(unit == 0.0, 0.0, 1.0 / unit)
    return unit, tl.where(counts, tl.where(d == 0.0, 0.0, 1.0), d * inverse), m * inverse


@triton.constexpr_function
def _minus_of(T, upper):
    """Return minus a code's zero, as it lies in a half: subnormal bits."""
    return 0x8000 | T.minus << (4 if upper else 0)


@triton.constexpr_function
def _is_upper(group, groups, T):
    """Check whether the codes of a scale are upper nibbles."""
    return T.bits == 4 and T.book is None and group >= groups // 2


@triton.constexpr_function
def _plain_factor(upper):
    """Return the factor of a type whose codes have no scale within a run: two halves."""
    return (0x6800 if upper else 0x7800) * 0x10001


@triton.constexpr_function
def _plain_summand(T):
    """Return minus the power of two that a code's zero is, times its gain; as a signed word."""
    return ((0x8000 | (T.minus.bit_length() + 5) << 10) * 0x10001) - (1 << 32) if T.minus else 0


@triton.jit
def _scales_of(raw, place, T: tl.constexpr):
    """Decode a lane's scales: words of factors and of summands, by group; and float32 scales of their products."""
    first: tl.constexpr = 2 * T.bits + 2 * T.more
    factors = ()
    summands = ()
    units = ()
    if T.scales == "six":
        bits = quarter_of(raw[first + 1], raw[first + 2], raw[first + 3], place)
        less = less_of_1024th(ratio_of(raw[first]))
        factors = (factor_of_bits(bits, 0, 63, False), factor_of_bits(bits, 6, 63, True))
        summands = (minimum_of_bits(bits, less, 12, 63), minimum_of_bits(bits, less, 18, 63))
        units = (half_of(raw[first], False),)
    elif T.scales == "nibbles":
        ratio = ratio_of(raw[first + 1])
        for i in tl.static_range(4):
            # Small codes times small scales: 128 times larger, so that minima between integers are not cut.
            factors = factors + (times_half(factor_of_bits(raw[first], 8 * i, 15, False), 0x5800),)
            summands = summands + (exact_minimum_of_bits(raw[first], ratio, 8 * i + 4, 15),)
        units = (half_of(raw[first + 1], False),)
    elif T.scales == "bytes16" or T.scales == "bytes32":
        groups: tl.constexpr = 4 if T.scales == "bytes16" else 2
        for i in tl.static_range(groups):
            factor = factor_of_byte(raw[first], i, _is_upper(i, groups, T))
            factors = factors + (factor,)
            summands = summands + (times_half(factor, _minus_of(T, _is_upper(i, groups, T))),)
        units = (half_of(raw[first + 1], False),)
    elif T.has_min:
        of_lower = ()
        of_upper = ()
        for i in tl.static_range(8):
            d, m = half_of(raw[first + i // 2], i % 2 == 1), half_of(raw[first + 4 + i // 2], i % 2 == 1)
            unit, factor, minimum = _scaled_pair(d, m)
            of_lower = of_lower + (pack(factor * 32768.0, factor * 32768.0),)
            of_upper = of_upper + (pack(factor * 2048.0, factor * 2048.0),)
            minimum = minimum * 0.001953125
            summands = summands + (pack(minimum, minimum),)
            units = units + (unit,)
        factors = of_lower + of_upper
        summands = summands + summands
    else:
        for nibble in tl.static_range(2):
            factors = factors + (tl.full(place.shape, _plain_factor(nibble == 1), tl.int32),)
            summands = summands + (tl.full(place.shape, _plain_summand(T), tl.int32),)
        for i in tl.static_range(8):
            if T.scales == "exponent":
                e = (raw[first + i // 4] >> (i % 4 * 8)) & 0xFF
                bits = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23)
                units = units + (bits.to(tl.float32, bitcast=True),)
            else:
                units = units + (half_of(raw[first + i // 2], i % 2 == 1),)
    return factors, summands, units


@triton.constexpr_function
def _group_of(word, half, T):
    """Find which of a lane's scales the values of a half of a word have."""
    if T.scales == "bytes16" or T.scales == "nibbles":
        return 2 * half + word // 4
    if T.scales == "six" or T.scales == "bytes32":
        return half
    if T.has_min:
        return word + 8 * half
    return half if T.bits == 4 and T.book is None else 0


@triton.constexpr_function
def _field_text(word, index, bits):
    """Locate the further bits of a word's values: the word, and the lowest bit.

    Those of values I and I + 2 are 4 bits apart, as the nibbles are: one shift moves both.
    """
    if bits == 1:
        return word // 4, index // 2 * 4 + index % 2 + word % 2 * 2 + word % 4 // 2 * 8
    return word // 2, 2 * (word % 2 * 4 + index)


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
    if T.bits == 8:
        x = raw[2 * W + I // 2]
        out = code_values(x, x, factor, summand, 0x00FF00FF if I % 2 == 0 else 0xFF00FF00, 0)
    elif T.bits == 2:
        place: tl.constexpr = _field_text(W, I, 2)
        x = _moved(raw[place[0]], place[1], 0)
        if T.more == 1:
            bit: tl.constexpr = _field_text(W, I, 1)
            other = _moved(raw[4 + bit[0]], bit[1], 2)
            out = code_values(x, other, factor, summand, 0x00030003, 0x00040004)
        else:
            out = code_values(x, x, factor, summand, 0x00030003, 0)
    else:
        # Upper nibbles stay where they are: what they are 16 times too large by is in their factor.
        x = raw[W] if I % 2 == 0 else raw[W] >> 8
        mask: tl.constexpr = 0x000F000F if I < 2 else 0x00F000F0
        if T.more > 0:
            field: tl.constexpr = _field_text(W, I, T.more)
            more_mask: tl.constexpr = (0x00010001 if T.more == 1 else 0x00030003) << (4 if I < 2 else 8)
            other = _moved(raw[8 + field[0]], field[1], 4 if I < 2 else 8)
            out = code_values(x, other, factor, summand, mask, more_mask)
        else:
            out = code_values(x, x, factor, summand, mask, 0)
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
    words = ()
    for w in tl.static_range(8):
        if T.book is not None:
            entries = _look_up(raw[w], T)
            for i in tl.static_range(4):
                x, f, s = entries[i], factors[_group_of(w, i // 2, T)], summands[_group_of(w, i // 2, T)]
                words = words + (code_values(x, x, f, s, 0x00FF00FF, 0),)
        else:
            for i in tl.static_range(4):
                f, s = factors[_group_of(w, i // 2, T)], summands[_group_of(w, i // 2, T)]
                words = words + (_two(raw, f, s, w, i, T),)
    return words, units
