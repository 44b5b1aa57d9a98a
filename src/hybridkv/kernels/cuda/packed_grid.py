"""Units of grid types in registers: indices loaded as words, and the entries of the grid as values.

An entry is 8 or 4 bytes of the table that all weights of a type share (1 to 16 KiB), found by a lane's own index.
Magnitudes times an integer scale are float16 without rounding (up to 1922); d multiplies the float32 sum. Device
functions for `packed_unit.py`; layouts are in `grid_layout.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.ptx import load_half, load_words, two_values, unpack

_ONE = tl.constexpr(0x3C003C00)
_SIGNS = tl.constexpr(0x80008000 - (1 << 32))


@triton.jit
def load_grid_unit(main, side, table, last, row, unit, n_units, place, T: tl.constexpr):
    """Load the words of a lane's share of a unit, and the table: zeros beyond the last unit.

    Indices (2 or 4 words), signs (2), then scales (4, 2 or 1), high bits (1) and d (1) as far as there are.
    """
    grid: tl.constexpr = T.grid
    at = row * n_units + unit
    words = tl.pointer_type(tl.int32)
    halves = tl.pointer_type(tl.int16)
    own = main.to(words) + at * (T.plane_bytes[0] // 4)
    aside = side.to(words) + at * (T.plane_bytes[1] // 4)
    raw = ()
    if not grid.signed:
        raw = raw + load_words(own + place * 2, unit, n_units, 2, 0)
        if grid.group == 32:
            raw = raw + load_words(aside, unit, n_units, 4, 0)
            raw = raw + (load_half(last.to(halves) + at, unit, n_units, 0),)
        else:
            raw = raw + load_words(aside, unit, n_units, 2, 0)
            raw = raw + load_words(aside + 2 + place, unit, n_units, 1, 0)
    else:
        # Of 8 values an entry: two words of indices and two of signs.
        raw = raw + load_words(own + place * 4, unit, n_units, 4, 0)
        if grid.values == 4:
            raw = raw + load_words(own + 16 + place * 2, unit, n_units, 2, 0)
        # Of high bits a lane has a byte, or a half.
        skip: tl.constexpr = 8 * grid.high // grid.values
        for i in tl.static_range(32 // grid.group):
            raw = raw + load_words(aside + (skip + i), unit, n_units, 1, 0)
        if skip == 1:
            raw = raw + load_words(aside, unit, n_units, 1, 0)
        elif skip == 2:
            raw = raw + (load_half(side.to(halves) + at * (T.plane_bytes[1] // 2) + place, unit, n_units, 0),)
        raw = raw + (load_half(last.to(halves) + at, unit, n_units, 0),)
    return raw + (table,)


@triton.jit
def _half(x):
    """Return the lower half as float32."""
    low, _ = unpack(x)
    return low.to(tl.float32)


@triton.jit
def _integer_words(scale):
    """Compute twice a scale and one, as two float16."""
    odd = scale * 2 + 1
    both = odd | (odd << 16)
    one = tl.full(scale.shape, _ONE, tl.int32)
    return two_values(both, both, one, both, 0x03FF03FF, 0, 0x64006400, 1024, False)


@triton.jit
def _four(entry, factor, summand, T: tl.constexpr):
    """Decode four bytes of an entry to two words."""
    grid: tl.constexpr = T.grid
    minus: tl.constexpr = 1024 if grid.signed else 1024 + 16
    a = two_values(entry, entry, factor, summand, 0x00FF00FF, 0, 0x64006400, minus, not grid.signed)
    y = entry >> 8
    b = two_values(y, y, factor, summand, 0x00FF00FF, 0, 0x64006400, minus, not grid.signed)
    return a, b


@triton.jit
def _signed(word, signs, I: tl.constexpr):
    """Apply the signs of a word's two values: bit I of the lower half, bit I of the upper."""
    return word ^ ((signs << (15 - I)) & _SIGNS)


@triton.jit
def _signed_run(raw, table, factor, place, W: tl.constexpr, T: tl.constexpr):
    """Decode a lane's eight values of run W: four words."""
    grid: tl.constexpr = T.grid
    n: tl.constexpr = 16 // grid.values  # words of indices
    high: tl.constexpr = n + 2 + 32 // grid.group
    byte = (raw[n + W // 4] >> (W % 4 * 8)) & 0xFF
    signs = byte | (byte << 12)
    if grid.values == 8:
        index = (raw[W // 4] >> (W % 4 * 8)) & 0xFF
        if grid.high == 1:
            index = index | (((raw[high] >> (place * 8 + W)) & 1) << 8)
        elif grid.high == 2:
            index = index | (((raw[high] >> (2 * W)) & 3) << 8)
        entry = tl.load(table.to(tl.pointer_type(tl.int64)) + index)
        first, second = entry.to(tl.int32), (entry >> 32).to(tl.int32)
    else:
        pair = raw[W // 2] >> (W % 2 * 16)
        index, other = pair & 0xFF, (pair >> 8) & 0xFF
        if grid.high == 1:
            index = index | (((raw[high] >> (2 * W)) & 1) << 8)
            other = other | (((raw[high] >> (2 * W + 1)) & 1) << 8)
        words = table.to(tl.pointer_type(tl.int32))
        first, second = tl.load(words + index), tl.load(words + other)
    a, b = _four(first, factor, factor, T)
    c, d = _four(second, factor, factor, T)
    return _signed(a, signs, 0), _signed(b, signs, 1), _signed(c, signs, 2), _signed(d, signs, 3)


@triton.jit
def _scale_of(raw, place, W: tl.constexpr, T: tl.constexpr):
    """Read the integer scale of a lane's values of run W."""
    grid: tl.constexpr = T.grid
    n: tl.constexpr = 16 // grid.values + 2
    if not grid.signed:
        if grid.group == 32:
            scale = (raw[2 + W // 2] >> (W % 2 * 16 + 12)) & 7
        else:
            scale = (raw[2 + W // 4] >> (6 * (W % 4) + place // 2 * 3)) & 7
    elif grid.group == 32:
        scale = (raw[n] >> (4 * W)) & 15
    else:
        scale = (raw[n + W // 4] >> (W % 4 * 8 + place // 2 * 4)) & 15
    return scale


@triton.jit
def _shifted_run(raw, table, factor, place, W: tl.constexpr, T: tl.constexpr):
    """Decode a lane's eight values of run W, an eighth more or less: four words."""
    grid: tl.constexpr = T.grid
    index = (raw[W // 4] >> (W % 4 * 8)) & 0xFF
    if grid.group == 32:
        half = raw[2 + W // 2] >> (W % 2 * 16)
        high, less = (half >> (place * 3)) & 7, (half >> 15) & 1
    else:
        nibble = raw[4] >> (4 * W)
        high, less = nibble & 7, (nibble >> 3) & 1
    entry = tl.load(table.to(tl.pointer_type(tl.int64)) + (index | (high << 8)))
    summand = factor ^ ((less << 15) | (less << 31))
    a, b = _four(entry.to(tl.int32), factor, summand, T)
    c, d = _four((entry >> 32).to(tl.int32), factor, summand, T)
    return a, b, c, d


@triton.jit
def decode_grid_unit(raw, place, T: tl.constexpr):
    """Decode what `load_grid_unit` gave: 32 words, and the float32 scale of their products for each run."""
    grid: tl.constexpr = T.grid
    table = raw[len(raw) - 1]
    if grid.signed or grid.group == 32:
        d = _half(raw[len(raw) - 2])
    else:
        d = _half(((raw[2] >> 24) & 0xFF) | ((raw[3] >> 24) & 0xFF) << 8)
    unit = d * grid.unit
    words, units = (), ()
    for w in tl.static_range(8):
        factor = _integer_words(_scale_of(raw, place, w, T))
        if grid.signed:
            words = words + _signed_run(raw, table, factor, place, w, T)
        else:
            words = words + _shifted_run(raw, table, factor, place, w, T)
        units = units + (unit,)
    return words, units
