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

from hybridkv.kernels.cuda.activations import Act
from hybridkv.kernels.cuda.card import is_rehearsed
from hybridkv.kernels.cuda.layers import activated
from hybridkv.kernels.cuda.overlap import overlapping
from hybridkv.kernels.cuda.packed_layout import UNIT, PackedWeight
from hybridkv.kernels.cuda.packed_rows import decode_rows
from hybridkv.kernels.cuda.packed_tiles import gated_of, gated_tile, over_warps, places_of, rows_times

FEW_ROWS = 32
"""Rows of activations up to which matrices are not decoded to memory."""
WINDOW_BYTES = 1 << 27
"""Of a matrix decoded to float16 for a prompt."""
OUTPUTS = 16
"""Outputs of a program."""


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


@triton.jit(do_not_specialize=["n_cols", "width"])
def _gated(x, out, main, more, scales, last, x_row, out_row, n_cols, n_in, width, factor,
           TILES: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr,
           ACT: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    """Compute what gates give of rows: gates and what they gate are rows of one matrix."""
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
        total = gated_of(sums, t, WARPS, ACT) * factor
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


def multiply_gated(x: Tensor, weight: PackedWeight, act: Act = "silu", *, factor: float = 1.0) -> Tensor:
    """Compute `act(gate) * up * factor` of rows `[N, in]` times joined matrices `[gate | up, in]`: float16."""
    _check(x, weight)
    n, width = len(x), weight.n_out // 2
    if n > FEW_ROWS:
        return activated(multiply_packed(x, (weight,), dtype=torch.float16), act, factor=factor)
    out = torch.empty((n, width), dtype=torch.float16, device=x.device)
    _gated[(triton.cdiv(width, OUTPUTS // 2),)](
        x, out, *weight.planes, x.stride(0), width, n, weight.n_in, width, factor, T=weight.type, ACT=act,
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
    if is_rehearsed():
        return x.new_zeros((len(x), len(window)), dtype=dtype)
    if dtype == torch.float32 and x.device.type == "cuda":
        return torch.mm(x, window.T, out_dtype=torch.float32)
    if x.device.type == "cuda":
        return torch.mm(x, window.T)
    return torch.mm(x.float(), window.float().T)  # the interpreter's device has no sums of float16 in float32
