"""Products with packed weights on the GPU: a row of a matrix streams once, and its codes become values in registers.

A warp takes 16 outputs, and every so many units of their rows; decoded values are the operand of 16 rows of
`mma.sync`, and up to 8 rows of activations (a multiple of 8: up to 32) its columns, so that several rows cost what one
does until the bytes no longer hide it. Activations are float16, sums float32. Weights are asked for before the wait for
the kernel before, which makes the activations (`overlap.py`).

More rows than that are a prompt: matrices become float16 a window at a time, and torch multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridkv.kernels.cuda.activations import Act
from hybridkv.kernels.cuda.card import facts_of, is_rehearsed
from hybridkv.kernels.cuda.layers import activated
from hybridkv.kernels.cuda.overlap import overlapping
from hybridkv.kernels.cuda.packed_layout import UNIT, PackedWeight
from hybridkv.kernels.cuda.packed_rows import decode_rows
from hybridkv.kernels.cuda.packed_tiles import ask, gated_of, over_warps, places_of, rows_of, share_times
from hybridkv.kernels.cuda.ptx import keep_order

FEW_ROWS = 32
"""Rows of activations up to which matrices are not decoded to memory."""
WINDOW_BYTES = 1 << 27
"""Of a matrix decoded to float16 for a prompt."""
OUTPUTS = 16
"""Outputs of a tile."""
_FEW_TILES = 256
"""Tiles up to which a card has multiprocessors without any, or with one more than others."""
_MANY_TILES = 4096
"""Tiles beyond which a matrix, a head, is read at nearly the memory's rate as it is."""


@triton.jit
def _store(sums, out, out_row, n_cols, first, n_rows, factor, TILES: tl.constexpr, WARPS: tl.constexpr):
    rows, columns = places_of(first)
    for t in tl.static_range(TILES):
        total = over_warps(sums, t, WARPS) * factor
        column = columns + 8 * t
        here = (rows < n_rows) & (column < n_cols)
        tl.store(out + column.to(tl.int64) * out_row + rows, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _store_gated(sums, out, out_row, n_cols, tile, width, factor, TILES: tl.constexpr, WARPS: tl.constexpr,
                 ACT: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, 32)[:, None]
    rows = tile * 8 + lane // 4
    for t in tl.static_range(TILES):
        column = lane % 4 * 2 + tl.arange(0, 2)[None, :] + 8 * t
        total = gated_of(sums, t, WARPS, ACT) * factor
        here = (rows < width) & (column < n_cols)
        tl.store(out + column.to(tl.int64) * out_row + rows, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _tiles(x, out, main, more, scales, last, x_row, out_row, n_cols, n_in, tile, step, n_rows, factor, begin, count,
           TILES: tl.constexpr, WARPS: tl.constexpr, HELD: tl.constexpr, PIECES: tl.constexpr, UNITS: tl.constexpr,
           LOOPS: tl.constexpr, FULL: tl.constexpr, ACT: tl.constexpr, OVERLAPS: tl.constexpr,
           T: tl.constexpr):  # fmt: skip
    """Compute 16 outputs of a matrix, or with LOOPS those of every so many tiles; with ACT of gates and their rows."""
    GATED: tl.constexpr = ACT is not None
    thread = tl.arange(0, WARPS * 32)
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    upper, lower = rows_of(tile, n_rows, group, GATED)
    raw = ask(main, more, scales, last, upper, lower, begin, count, warp, place, WARPS, HELD, UNITS, T)
    if OVERLAPS:
        gdc_wait()
    if T.keeps_order:
        keep_order(place)
    if LOOPS:
        n_tiles = tl.cdiv(n_rows, 8 if GATED else 16)
        for own in range(tile, n_tiles, step):
            next_upper, next_lower = rows_of(own + step, n_rows, group, GATED)
            next_count = tl.where(own + step < n_tiles, count, 0)
            sums, raw = share_times(
                raw, x, x_row, n_cols, n_in, main, more, scales, last, upper, lower, next_upper, next_lower, next_count,
                begin, count, warp, group, place, TILES, WARPS, HELD, PIECES, UNITS, True, FULL, T,
            )  # fmt: skip
            upper, lower = next_upper, next_lower
            if GATED:
                _store_gated(sums, out, out_row, n_cols, own, n_rows, factor, TILES, WARPS, ACT)
            else:
                _store(sums, out, out_row, n_cols, own * 16, n_rows, factor, TILES, WARPS)
    else:
        sums, raw = share_times(
            raw, x, x_row, n_cols, n_in, main, more, scales, last, upper, lower, upper, lower, 0, begin, count, warp,
            group, place, TILES, WARPS, HELD, PIECES, UNITS, False, FULL, T,
        )  # fmt: skip
        if GATED:
            _store_gated(sums, out, out_row, n_cols, tile, n_rows, factor, TILES, WARPS, ACT)
        else:
            _store(sums, out, out_row, n_cols, tile * 16, n_rows, factor, TILES, WARPS)


@triton.jit
def _plain_row(x, out, plain, x_row, out_row, n_cols, n_in, row, factor, UNITS: tl.constexpr, IN: tl.constexpr,
               OVERLAPS: tl.constexpr):  # fmt: skip
    """Compute an output of a matrix that is not packed, whose row is asked for before the wait."""
    HELD: tl.constexpr = min((UNITS * 256 + IN - 1) // IN, 8)
    cols = tl.arange(0, IN)
    at = plain + row.to(tl.int64) * n_in + cols
    held = ()
    for i in tl.static_range(HELD):
        held = held + (tl.load(at + i * IN, mask=i * IN + cols < n_in, other=0.0).to(tl.float32),)
    if OVERLAPS:
        gdc_wait()
    for col in range(n_cols):
        total = tl.zeros((IN,), tl.float32)
        for i in tl.static_range(HELD):
            inside = i * IN + cols < n_in
            total += held[i] * tl.load(x + col * x_row + i * IN + cols, mask=inside, other=0.0).to(tl.float32)
        for start in range(HELD * IN, n_in, IN):
            inside = start + cols < n_in
            value = tl.load(x + col * x_row + start + cols, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(at + start, mask=inside, other=0.0).to(tl.float32) * value
        tl.store(out + col * out_row + row, (tl.sum(total, 0) * factor).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["n_cols", "n_first", "n_second", "n_plain", "programs_first", "programs_packed"])
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
    programs_first,
    programs_packed,
    factor,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    HELD: tl.constexpr,
    SHARE: tl.constexpr,
    UNITS: tl.constexpr,
    LOOPS: tl.constexpr,
    FULL: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PLAIN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Multiply rows by one or two packed matrices of types of their own and a plain one; outputs lie side by side.

    Rows of the plain one come first: few programs that take their time would else begin last. The second dim of the
    grid are shares of the inputs, each with sums of its own.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    PIECES: tl.constexpr = (SHARE + WARPS - 1) // WARPS
    program, share = tl.program_id(0), tl.program_id(1)
    if PLAIN:
        program -= n_plain
    begin = share * SHARE
    count = tl.minimum(UNITS - begin, SHARE)
    out += share.to(tl.int64) * n_cols * out_row
    if PLAIN:
        if program < 0:
            _plain_row(
                x, out + (n_first + n_second), plain, x_row, out_row, n_cols, n_in, program + n_plain, factor, UNITS,
                512, OVERLAPS,
            )  # fmt: skip
    if SECOND is None and not PLAIN:
        _tiles(
            x, out, main0, more0, scales0, last0, x_row, out_row, n_cols, n_in, program, programs_first, n_first,
            factor, begin, count, TILES, WARPS, HELD, PIECES, UNITS, LOOPS, FULL, None, OVERLAPS, FIRST,
        )  # fmt: skip
    elif (program >= 0) & (program < programs_first):
        _tiles(
            x, out, main0, more0, scales0, last0, x_row, out_row, n_cols, n_in, program, programs_first, n_first,
            factor, begin, count, TILES, WARPS, HELD, PIECES, UNITS, LOOPS, FULL, None, OVERLAPS, FIRST,
        )  # fmt: skip
    else:
        if SECOND is not None:
            if program >= programs_first:
                _tiles(
                    x, out + n_first, main1, more1, scales1, last1, x_row, out_row, n_cols, n_in,
                    program - programs_first, programs_packed - programs_first, n_second, factor, begin, count, TILES,
                    WARPS, HELD, PIECES, UNITS, LOOPS, FULL, None, OVERLAPS, SECOND,
                )  # fmt: skip


@triton.jit(do_not_specialize=["n_cols", "width"])
def _gated(x, out, main, more, scales, last, x_row, out_row, n_cols, n_in, width, factor,
           TILES: tl.constexpr, WARPS: tl.constexpr, HELD: tl.constexpr, UNITS: tl.constexpr, LOOPS: tl.constexpr,
           FULL: tl.constexpr, T: tl.constexpr, ACT: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    """Compute what gates give of rows: gates and what they gate are rows of one matrix."""
    if OVERLAPS:
        gdc_launch_dependents()
    _tiles(
        x, out, main, more, scales, last, x_row, out_row, n_cols, n_in, tl.program_id(0), tl.num_programs(0), width,
        factor, 0, UNITS, TILES, WARPS, HELD, (UNITS + WARPS - 1) // WARPS, UNITS, LOOPS, FULL, ACT, OVERLAPS, T,
    )  # fmt: skip


class Tiling(NamedTuple):
    """The deal of a product to programs.

    Attributes
    ----------
    warps
        Of a program, among which the units of its rows are dealt.
    held
        Units of its rows that a warp asks for ahead: before it waits, and while it multiplies.
    programs
        Most of them a multiprocessor; where there are more tiles, a program walks over several. None: one a tile.
    shares
        Into which rows are cut, where their sums may be added later.
    registers
        Most of a thread; None for the compiler's choice.
    """

    warps: int
    held: int = 2
    programs: int | None = None
    shares: int = 1
    registers: int | None = None


def tiling_of(weight: PackedWeight, n_tiles: int) -> Tiling:
    """Choose for one row of activations: the fastest of some ten on an H200, at the widths of 4B and 35B-A3B models.

    Few outputs of long rows are cut into shares; of many outputs of q4_K, programs walk over tiles. Those of q8_0 gain
    by walking in a chain of products, and lose in a step.
    """
    units, plain = weight.n_units, weight.type.more == 0
    if n_tiles <= _FEW_TILES and units > 12:
        if units <= 24:
            return Tiling(4, shares=2)
        if weight.type.bits == 8:
            return Tiling(4, shares=3)
        return Tiling(4, held=3, shares=3, registers=128) if plain else Tiling(4, shares=2)
    if 8 < units <= 12 and n_tiles <= _MANY_TILES and weight.type.bits != 8:
        if plain and n_tiles > 2 * _FEW_TILES:
            return Tiling(4, held=1, programs=3)
        return Tiling(4, registers=128)
    return Tiling(warps_of(units))


def _launch(n_cols: int, weight: PackedWeight, tiling: Tiling) -> dict[str, Any]:
    """Choose the columns of a program."""
    options: dict[str, Any] = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    return {
        "TILES": triton.next_power_of_2(-(-n_cols // 8)), "WARPS": tiling.warps, "UNITS": weight.n_units,
        "FULL": weight.n_in % UNIT == 0, "num_warps": tiling.warps, **options,
    }  # fmt: skip


def _programs(tiling: Tiling, device: torch.device, *tiles: int) -> list[int]:
    """Choose how many programs walk over the tiles of each matrix; a device that is no card has one a tile."""
    card = facts_of(device)
    if tiling.programs is None or card is None:
        return list(tiles)
    most = max(len(tiles), card.n_multiprocessors * tiling.programs // tiling.shares)
    return [min(n, max(1, n * most // sum(tiles))) for n in tiles]


def warps_of(n_units: int) -> int:
    """Choose the warps among which the units of a row are dealt."""
    return 2 if n_units <= 8 else 4 if n_units <= 12 else 8


def _held(tiling: Tiling, n_units: int, shares: int) -> int:
    """Limit what is held to the units that a warp has."""
    return min(tiling.held, -(-n_units // shares // tiling.warps))


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
    shared: bool = False,
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
    shared
        Whether the result may be given as sums over shares of the inputs, which are still to be added.

    Returns
    -------
    Tensor
        `[N, sum of outs]`, contiguous; or `[shares, N, out]`.
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
    tiles = [triton.cdiv(rows, OUTPUTS) for rows in (first.n_out, n_second) if rows]
    tiling = tiling_of(first, sum(tiles)) if n <= 8 else Tiling(warps_of(first.n_units))
    shares = tiling.shares if shared and n == 1 and len(weights) == 1 and plain is None else 1
    if shares > 1:
        out = torch.empty((shares, n, n_out), dtype=dtype, device=x.device)
    programs = _programs(tiling, x.device, *tiles)
    packed = sum(programs)
    _products[(packed + n_plain, shares)](
        x, out, *first.planes, *second.planes, x if plain is None else plain, x.stride(0), n_out, n, first.n_in,
        first.n_out, n_second, n_plain, programs[0], packed, factor, HELD=_held(tiling, first.n_units, shares),
        SHARE=-(-first.n_units // shares), LOOPS=packed < sum(tiles), FIRST=first.type,
        SECOND=second.type if n_second else None, PLAIN=plain is not None, **_launch(n, first, tiling),
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
    tiles = triton.cdiv(width, OUTPUTS // 2)
    tiling = tiling_of(weight, tiles) if n <= 8 else Tiling(warps_of(weight.n_units))
    (programs,) = _programs(tiling, x.device, tiles)
    _gated[(programs,)](
        x, out, *weight.planes, x.stride(0), width, n, weight.n_in, width, factor, T=weight.type, ACT=act,
        HELD=_held(tiling, weight.n_units, 1), LOOPS=programs < tiles, **_launch(n, weight, tiling),
        **overlapping(x.device),
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
