"""A program's part of a product with packed weights: 16 rows of a matrix, whose units are dealt to warps.

Device functions for `packed.py` and `packed_experts.py`. A warp decodes a unit of its rows to the operand of
`mma.sync`, and has asked for the next ones meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from hybridkv.kernels.cuda.activations import activate
from hybridkv.kernels.cuda.packed_unit import decode_unit, load_unit
from hybridkv.kernels.cuda.ptx import keep_order, load_words, multiply

_HELD = tl.constexpr(2)
"""Units of its rows that a warp asks for ahead: before it waits, and while it multiplies."""
_UNROLLED = tl.constexpr(6)
"""Units of a warp that are written out; the rest is a loop."""


@triton.jit
def _columns(x, x_row, n_cols, n_in, unit, n_units, group, place, COLUMN: tl.constexpr, I: tl.constexpr,
             FULL: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Load eight of a lane's inputs, of one of 8 columns, as words: two operands of the tensor cores.

    Columns that there are not are others once more: nobody stores them. So is a unit that there is not, whose weights
    are zero.
    """
    col = tl.minimum(group + COLUMN, n_cols - 1).to(tl.int64)
    if T.order == "quarters":
        start = tl.minimum(unit, n_units - 1) * 256 + place * 64 + I * 8
    else:
        start = tl.minimum(unit, n_units - 1) * 256 + I * 32 + place * 8
    at = (x + col * x_row + start).to(tl.pointer_type(tl.int32))
    if FULL:
        return load_words(at, tl.zeros_like(place), tl.full(place.shape, 1, tl.int32), 4, 0)
    return load_words(at, start, n_in, 4, 0)


@triton.jit
def add_unit(sums, upper, lower, x, x_row, n_cols, n_in, unit, n_units, group, place, factor, WARPS: tl.constexpr,
             TILES: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Add to `sums`, four float32 per tile of 8 columns, the products of a unit of 16 rows, times a factor.

    They lack their type's gain.
    """
    a, scale_a = decode_unit(upper, place, T)
    b, scale_b = decode_unit(lower, place, T)
    out = ()
    for t in tl.static_range(TILES):
        zero = tl.zeros([WARPS * 32], tl.float32)
        c0, c1, c2, c3 = sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3]
        if T.order == "quarters":
            # Two sums, since a product waits for the one before.
            low = (zero, zero, zero, zero)
            high = (zero, zero, zero, zero)
            for i in tl.static_range(4):
                p, q, r, s = _columns(x, x_row, n_cols, n_in, unit, n_units, group, place, 8 * t, i, FULL, T)
                low = multiply(
                    a[8 * i], b[8 * i], a[8 * i + 1], b[8 * i + 1], p, q, low[0], low[1], low[2], low[3], WARPS
                )
                low = multiply(
                    a[8 * i + 4], b[8 * i + 4], a[8 * i + 5], b[8 * i + 5], r, s, low[0], low[1], low[2], low[3], WARPS
                )
                p, q, r, s = _columns(x, x_row, n_cols, n_in, unit, n_units, group, place, 8 * t, i + 4, FULL, T)
                high = multiply(
                    a[8 * i + 2],
                    b[8 * i + 2],
                    a[8 * i + 3],
                    b[8 * i + 3],
                    p,
                    q,
                    high[0],
                    high[1],
                    high[2],
                    high[3],
                    WARPS,
                )
                high = multiply(
                    a[8 * i + 6],
                    b[8 * i + 6],
                    a[8 * i + 7],
                    b[8 * i + 7],
                    r,
                    s,
                    high[0],
                    high[1],
                    high[2],
                    high[3],
                    WARPS,
                )
            f, g = scale_a[0] * factor, scale_b[0] * factor
            c0 += (low[0] + high[0]) * f
            c1 += (low[1] + high[1]) * f
            c2 += (low[2] + high[2]) * g
            c3 += (low[3] + high[3]) * g
        else:
            for i in tl.static_range(8):
                p, q, r, s = _columns(x, x_row, n_cols, n_in, unit, n_units, group, place, 8 * t, i, FULL, T)
                run = multiply(a[4 * i], b[4 * i], a[4 * i + 1], b[4 * i + 1], p, q, zero, zero, zero, zero, WARPS)
                run = multiply(
                    a[4 * i + 2], b[4 * i + 2], a[4 * i + 3], b[4 * i + 3], r, s, run[0], run[1], run[2], run[3], WARPS
                )
                f, g = scale_a[i] * factor, scale_b[i] * factor
                c0 += run[0] * f
                c1 += run[1] * f
                c2 += run[2] * g
                c3 += run[3] * g
        out = out + (c0, c1, c2, c3)
    return out


@triton.jit
def zeros_of(TILES: tl.constexpr, WARPS: tl.constexpr):
    """Return sums that nothing was added to."""
    out = ()
    for _ in tl.static_range(4 * TILES):
        out = out + (tl.zeros([WARPS * 32], tl.float32),)
    return out


@triton.jit
def over_warps(sums, TILE: tl.constexpr, WARPS: tl.constexpr):
    """Sum over all warps: float32 `[32 lanes, 2 columns, 2 rows]`."""
    first = tl.join(sums[4 * TILE], sums[4 * TILE + 1])
    second = tl.join(sums[4 * TILE + 2], sums[4 * TILE + 3])
    return tl.sum(tl.reshape(tl.join(first, second), [WARPS, 32, 2, 2]), axis=0)


@triton.jit
def places_of(first_row):
    """Return the rows and columns of what `over_warps` gives: int32 `[32, 1, 2]` and `[32, 2, 1]`."""
    lane = tl.arange(0, 32)[:, None, None]
    rows = first_row + lane // 4 + 8 * tl.arange(0, 2)[None, None, :]
    columns = lane % 4 * 2 + tl.arange(0, 2)[None, :, None]
    return rows, columns


@triton.jit
def rows_times(x, x_row, n_cols, n_in, main, more, scales, last, upper, lower, warp, group, place, TILES: tl.constexpr,
               WARPS: tl.constexpr, UNITS: tl.constexpr, WAITS: tl.constexpr, FULL: tl.constexpr,
               T: tl.constexpr):  # fmt: skip
    """Sum 16 rows, those of `upper` and `lower`, over every warp's own units: some of them are always under way."""
    pieces: tl.constexpr = (UNITS + WARPS - 1) // WARPS
    held: tl.constexpr = min(pieces, _HELD)
    unrolled: tl.constexpr = min(pieces, _UNROLLED)
    raw = ()
    for i in tl.static_range(held):
        unit = warp + i * WARPS
        raw = raw + (load_unit(main, more, scales, last, upper, unit, UNITS, place, T),)
        raw = raw + (load_unit(main, more, scales, last, lower, unit, UNITS, place, T),)
    if WAITS:
        gdc_wait()
    if T.keeps_order:
        keep_order(place)
    sums = zeros_of(TILES, WARPS)
    for i in tl.static_range(unrolled):
        if i + held < unrolled:
            unit = warp + (i + held) * WARPS
            raw = raw + (load_unit(main, more, scales, last, upper, unit, UNITS, place, T),)
            raw = raw + (load_unit(main, more, scales, last, lower, unit, UNITS, place, T),)
            if T.keeps_order:
                keep_order(place)
        sums = add_unit(
            sums, raw[2 * i], raw[2 * i + 1], x, x_row, n_cols, n_in, warp + i * WARPS, UNITS, group, place, 1.0,
            WARPS, TILES, FULL, T,
        )  # fmt: skip
    for start in range(unrolled * WARPS, UNITS, WARPS):
        unit = warp + start
        a = load_unit(main, more, scales, last, upper, unit, UNITS, place, T)
        b = load_unit(main, more, scales, last, lower, unit, UNITS, place, T)
        sums = add_unit(sums, a, b, x, x_row, n_cols, n_in, unit, UNITS, group, place, 1.0, WARPS, TILES, FULL, T)
    whole = ()
    for i in tl.static_range(4 * TILES):
        whole = whole + (sums[i] * T.gain,)
    return whole


@triton.jit
def gated_tile(x, x_row, n_cols, n_in, main, more, scales, last, tile, width, skip, warp, group, place,
               TILES: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr, WAITS: tl.constexpr, FULL: tl.constexpr,
               T: tl.constexpr):  # fmt: skip
    """Sum 8 gates and the 8 rows that they gate, which lie `width` rows behind; `skip` rows come before."""
    row = tl.minimum(tile * 8 + group, width - 1).to(tl.int64) + skip
    return rows_times(
        x, x_row, n_cols, n_in, main, more, scales, last, row, row + width, warp, group, place, TILES, WARPS, UNITS,
        WAITS, FULL, T,
    )  # fmt: skip


@triton.jit
def rows_of(tile, n_rows, group, GATED: tl.constexpr):
    """Return a lane's two rows of a tile: of 16 outputs, or of 8 gates and what they gate, `n_rows` behind."""
    if GATED:
        upper = tl.minimum(tile * 8 + group, n_rows - 1).to(tl.int64)
        lower = upper + n_rows
    else:
        upper = tl.minimum(tile * 16 + group, n_rows - 1).to(tl.int64)
        lower = tl.minimum(tile * 16 + group + 8, n_rows - 1).to(tl.int64)
    return upper, lower


@triton.jit
def _both(main, more, scales, last, upper, lower, begin, own, count, place, UNITS: tl.constexpr, T: tl.constexpr):
    """Ask for unit `own` of a share that begins at `begin`; zeros if it has no more than `own`."""
    unit = tl.where(own < count, begin + own, UNITS)
    a = load_unit(main, more, scales, last, upper, unit, UNITS, place, T)
    b = load_unit(main, more, scales, last, lower, unit, UNITS, place, T)
    return a, b


@triton.jit
def ask(main, more, scales, last, upper, lower, begin, count, warp, place, WARPS: tl.constexpr, HELD: tl.constexpr,
        UNITS: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Ask for the first units of a warp."""
    raw = ()
    for i in tl.static_range(HELD):
        raw = raw + _both(main, more, scales, last, upper, lower, begin, warp + i * WARPS, count, place, UNITS, T)
    if T.keeps_order:
        keep_order(place)
    return raw


@triton.jit
def share_times(raw, x, x_row, n_cols, n_in, main, more, scales, last, upper, lower, next_upper, next_lower, next_count,
                begin, count, warp, group, place, TILES: tl.constexpr, WARPS: tl.constexpr, HELD: tl.constexpr,
                PIECES: tl.constexpr, UNITS: tl.constexpr, LOOPS: tl.constexpr, FULL: tl.constexpr,
                T: tl.constexpr):  # fmt: skip
    """Sum 16 rows over `count` units from `begin` on, of which every warp has its own, PIECES at most.

    `raw` is what `ask` gave. With LOOPS the first units of the rows that come next are asked for meanwhile, and
    returned behind the sums.
    """
    sums = zeros_of(TILES, WARPS)
    for i in tl.static_range(PIECES):
        if i + HELD < PIECES:
            own = warp + (i + HELD) * WARPS
            raw = raw + _both(main, more, scales, last, upper, lower, begin, own, count, place, UNITS, T)
        elif LOOPS:
            own = warp + (i + HELD - PIECES) * WARPS
            raw = raw + _both(main, more, scales, last, next_upper, next_lower, begin, own, next_count, place, UNITS, T)
        if T.keeps_order and (LOOPS or i + HELD < PIECES):
            keep_order(place)
        sums = add_unit(
            sums, raw[2 * i], raw[2 * i + 1], x, x_row, n_cols, n_in, begin + warp + i * WARPS, UNITS, group, place,
            1.0, WARPS, TILES, FULL, T,
        )  # fmt: skip
    whole = ()
    for i in tl.static_range(4 * TILES):
        whole = whole + (sums[i] * T.gain,)
    rest = ()
    if LOOPS:
        for i in tl.static_range(2 * HELD):
            rest = rest + (raw[2 * PIECES + i],)
    return whole, rest


@triton.jit
def gated_of(sums, TILE: tl.constexpr, WARPS: tl.constexpr, ACT: tl.constexpr):
    """Compute `act(gate) * up` of all warps: float32 `[32 lanes, 2 columns]`."""
    gate, up = tl.split(over_warps(sums, TILE, WARPS))
    return activate(gate, ACT) * up
