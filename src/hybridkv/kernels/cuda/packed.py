"""Products with packed weights on the GPU: a row of a matrix streams once, and its codes become values in registers.

A warp takes 16 outputs, and every so many units of their rows; decoded values are the operand of 16 rows of
`mma.sync`, and up to 8 rows of activations (a multiple of 8: up to 32) its columns, so that several rows cost what one
does until the bytes no longer hide it. Activations are float16, sums float32. Weights are asked for before the wait for
the kernel before, which makes the activations (`overlap.py`).

More rows than that are a prompt: matrices become float16 a window at a time, and torch multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridkv.kernels.cuda.layers import swiglu
from hybridkv.kernels.cuda.overlap import overlapping
from hybridkv.kernels.cuda.packed_layout import UNIT, PackedWeight
from hybridkv.kernels.cuda.packed_rows import decode_rows
from hybridkv.kernels.cuda.packed_unit import decode_unit, load_unit
from hybridkv.kernels.cuda.ptx import load_words, multiply

FEW_ROWS = 32
"""Rows of activations up to which matrices are not decoded to memory."""
WINDOW_BYTES = 1 << 27
"""Of a matrix decoded to float16 for a prompt."""
OUTPUTS = 16
"""Outputs of a program."""
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
    sums = zeros_of(TILES, WARPS)
    for i in tl.static_range(unrolled):
        if i + held < unrolled:
            unit = warp + (i + held) * WARPS
            raw = raw + (load_unit(main, more, scales, last, upper, unit, UNITS, place, T),)
            raw = raw + (load_unit(main, more, scales, last, lower, unit, UNITS, place, T),)
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
def _store(sums, out, out_row, n_cols, first, n_rows, factor, TILES: tl.constexpr, WARPS: tl.constexpr):
    rows, columns = places_of(first)
    for t in tl.static_range(TILES):
        total = over_warps(sums, t, WARPS) * factor
        column = columns + 8 * t
        here = (rows < n_rows) & (column < n_cols)
        tl.store(out + column.to(tl.int64) * out_row + rows, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _tile(x, out, main, more, scales, last, x_row, out_row, n_cols, n_in, tile, n_rows, factor, warp, group, place,
          TILES: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr, FULL: tl.constexpr, OVERLAPS: tl.constexpr,
          T: tl.constexpr):  # fmt: skip
    """Compute 16 outputs of a matrix."""
    upper = tl.minimum(tile * 16 + group, n_rows - 1).to(tl.int64)
    lower = tl.minimum(tile * 16 + group + 8, n_rows - 1).to(tl.int64)
    sums = rows_times(
        x, x_row, n_cols, n_in, main, more, scales, last, upper, lower, warp, group, place, TILES, WARPS, UNITS,
        OVERLAPS, FULL, T,
    )  # fmt: skip
    _store(sums, out, out_row, n_cols, tile * 16, n_rows, factor, TILES, WARPS)


@triton.jit
def _plain_tile(x, out, plain, x_row, out_row, n_cols, n_in, tile, n_rows, factor, IN: tl.constexpr,
                OVERLAPS: tl.constexpr):  # fmt: skip
    """Compute four outputs of a matrix that is not packed."""
    outs = tile * 4 + tl.arange(0, 4)
    cols = tl.arange(0, IN)
    if OVERLAPS:
        gdc_wait()
    for col in range(n_cols):
        total = tl.zeros((4, IN), tl.float32)
        for start in range(0, n_in, IN):
            inside = start + cols < n_in
            value = tl.load(x + col * x_row + start + cols, mask=inside, other=0.0).to(tl.float32)
            at = plain + outs[:, None].to(tl.int64) * n_in + (start + cols)[None, :]
            weight = tl.load(at, mask=(outs < n_rows)[:, None] & inside[None, :], other=0.0)
            total += weight.to(tl.float32) * value[None, :]
        result = tl.sum(total, 1) * factor
        tl.store(out + col * out_row + outs, result.to(out.dtype.element_ty), mask=outs < n_rows)


@triton.jit(do_not_specialize=["n_cols", "n_first", "n_second", "n_plain", "tiles_first", "tiles_packed"])
def _products(
    x,
    out,
    main0,
    more0,
    scales0,
    last0,
    main1,
    more1,
    scales1,
    last1,
    plain,
    x_row,
    out_row,
    n_cols,
    n_in,
    n_first,
    n_second,
    n_plain,
    tiles_first,
    tiles_packed,
    factor,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    UNITS: tl.constexpr,
    FULL: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PLAIN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Multiply rows by one or two packed matrices of types of their own and a plain one; outputs lie side by side."""
    if OVERLAPS:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    thread = tl.arange(0, WARPS * 32)
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    if SECOND is None and not PLAIN:
        _tile(
            x, out, main0, more0, scales0, last0, x_row, out_row, n_cols, n_in, tile, n_first, factor, warp, group,
            place, TILES, WARPS, UNITS, FULL, OVERLAPS, FIRST,
        )  # fmt: skip
    elif tile < tiles_first:
        _tile(
            x, out, main0, more0, scales0, last0, x_row, out_row, n_cols, n_in, tile, n_first, factor, warp, group,
            place, TILES, WARPS, UNITS, FULL, OVERLAPS, FIRST,
        )  # fmt: skip
    else:
        if PLAIN:
            if tile >= tiles_packed:
                _plain_tile(
                    x, out + (n_first + n_second), plain, x_row, out_row, n_cols, n_in, tile - tiles_packed, n_plain,
                    factor, 512, OVERLAPS,
                )  # fmt: skip
        if SECOND is not None:
            if tile < tiles_packed:
                _tile(
                    x, out + n_first, main1, more1, scales1, last1, x_row, out_row, n_cols, n_in, tile - tiles_first,
                    n_second, factor, warp, group, place, TILES, WARPS, UNITS, FULL, OVERLAPS, SECOND,
                )  # fmt: skip


@triton.jit
def silu_times(gate, up):
    """Compute `silu(gate) * up`."""
    return gate * tl.sigmoid(gate) * up


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
def gated_of(sums, TILE: tl.constexpr, WARPS: tl.constexpr):
    """Compute `silu(gate) * up` of all warps: float32 `[32 lanes, 2 columns]`."""
    gate, up = tl.split(over_warps(sums, TILE, WARPS))
    return silu_times(gate, up)


@triton.jit(do_not_specialize=["n_cols", "width"])
def _gated(x, out, main, more, scales, last, x_row, out_row, n_cols, n_in, width, factor,
           TILES: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr,
           OVERLAPS: tl.constexpr):  # fmt: skip
    """Compute a SwiGLU of rows: gates and what they gate are rows of one matrix."""
    if OVERLAPS:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    thread = tl.arange(0, WARPS * 32)
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    sums = gated_tile(
        x, x_row, n_cols, n_in, main, more, scales, last, tile, width, 0, warp, group, place, TILES, WARPS, UNITS,
        OVERLAPS, FULL, T,
    )  # fmt: skip
    lane = tl.arange(0, 32)[:, None]
    rows = tile * 8 + lane // 4
    for t in tl.static_range(TILES):
        column = lane % 4 * 2 + tl.arange(0, 2)[None, :] + 8 * t
        total = gated_of(sums, t, WARPS) * factor
        here = (rows < width) & (column < n_cols)
        tl.store(out + column.to(tl.int64) * out_row + rows, total.to(out.dtype.element_ty), mask=here)


def _launch(n_cols: int, weight: PackedWeight) -> dict[str, Any]:
    """Choose the warps and columns of a program."""
    warps = warps_of(weight.n_units)
    tiles = triton.next_power_of_2(-(-n_cols // 8))
    full = weight.n_in % UNIT == 0
    return {"TILES": tiles, "WARPS": warps, "UNITS": weight.n_units, "FULL": full, "num_warps": warps}


def warps_of(n_units: int) -> int:
    """Choose the warps among which the units of a row are dealt."""
    return 2 if n_units <= 8 else 4 if n_units <= 12 else 8


def _check(x: Tensor, weight: PackedWeight) -> None:
    assert x.dtype == torch.float16 and x.dim() == 2 and x.shape[1] == weight.n_in, (x.dtype, x.shape, weight.n_in)
    assert weight.n_stack == 1 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def multiply_packed(
    x: Tensor,
    weights: Sequence[PackedWeight],
    *,
    plain: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> Tensor:
    """Multiply rows by one or two packed matrices and perhaps a plain one, which read the same, side by side.

    Parameters
    ----------
    x
        float16 `[N, in]`, rows of 16 bytes.
    weights
        Single matrices `[out, in]`.
    plain
        Any float dtype, `[out, in]`, contiguous, in place of a last matrix.
    dtype
        Of the result.
    factor
        Of the result, in float32.

    Returns
    -------
    Tensor
        `[N, sum of outs]`, contiguous.
    """
    first, second = weights[0], weights[-1]
    for weight in weights:
        _check(x, weight)
    n_plain = 0 if plain is None else len(plain)
    n, n_out = len(x), sum(weight.n_out for weight in weights) + n_plain
    out = torch.empty((n, n_out), dtype=dtype, device=x.device)
    if n > FEW_ROWS:
        at = 0
        for weight in weights:
            _many_rows(x, weight, out[:, at : at + weight.n_out], factor)
            at += weight.n_out
        if plain is not None:
            out[:, at:] = F.linear(x.to(plain.dtype), plain) * factor
        return out
    assert len(weights) <= 2
    n_second = second.n_out if len(weights) > 1 else 0
    tiles = triton.cdiv(first.n_out, OUTPUTS)
    packed = tiles + triton.cdiv(n_second, OUTPUTS)
    _products[(packed + triton.cdiv(n_plain, 4),)](
        x, out, *first.planes, *second.planes, x if plain is None else plain, x.stride(0), n_out, n, first.n_in,
        first.n_out, n_second, n_plain, tiles, packed, factor, FIRST=first.type,
        SECOND=second.type if n_second else None, PLAIN=plain is not None, **_launch(n, first),
        **overlapping(x.device),
    )  # fmt: skip
    return out


def multiply_gated(x: Tensor, weight: PackedWeight, *, factor: float = 1.0) -> Tensor:
    """Compute `silu(gate) * up * factor` of rows `[N, in]` times joined matrices `[gate | up, in]`: float16."""
    _check(x, weight)
    n, width = len(x), weight.n_out // 2
    if n > FEW_ROWS:
        return swiglu(multiply_packed(x, (weight,), dtype=torch.float16), factor=factor)
    out = torch.empty((n, width), dtype=torch.float16, device=x.device)
    _gated[(triton.cdiv(width, OUTPUTS // 2),)](
        x, out, *weight.planes, x.stride(0), width, n, weight.n_in, width, factor, T=weight.type,
        **_launch(n, weight), **overlapping(x.device),
    )  # fmt: skip
    return out


def _many_rows(x: Tensor, weight: PackedWeight, out: Tensor, factor: float) -> None:
    """Multiply window by window, in float32 sums."""
    rows = max(OUTPUTS, WINDOW_BYTES // (2 * weight.n_in) // OUTPUTS * OUTPUTS)
    scaled = x if factor == 1.0 else x * factor
    for begin_ in range(0, weight.n_out, rows):
        window = decode_rows(weight, begin_, min(rows, weight.n_out - begin_))
        out[:, begin_ : begin_ + len(window)] = _product(scaled, window, out.dtype)


def _product(x: Tensor, window: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and x.device.type == "cuda":
        return torch.mm(x, window.T, out_dtype=torch.float32)
    if x.device.type == "cuda":
        return torch.mm(x, window.T)
    return torch.mm(x.float(), window.float().T)  # the interpreter's device has no sums of float16 in float32
