"""Experts whose stacks are packed: the chosen experts' products in two kernels, and prompts sorted by expert.

As in `experts.py` a matrix is read once for each token that chose it, and the expert that all tokens share is one more
of the chosen. A warp of the second product takes units of any expert: what all experts give is one sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridkv.kernels.cuda.activations import activate
from hybridkv.kernels.cuda.layers import activated
from hybridkv.kernels.cuda.overlap import begin, overlapping
from hybridkv.kernels.cuda.packed import OUTPUTS, WINDOW_BYTES, multiply_gated, multiply_packed, warps_of
from hybridkv.kernels.cuda.packed_layout import UNIT, PackedWeight
from hybridkv.kernels.cuda.packed_rows import decode_rows
from hybridkv.kernels.cuda.packed_tiles import (
    add_unit,
    gated_of,
    gated_tile,
    over_warps,
    places_of,
    rows_times,
    zeros_of,
)
from hybridkv.kernels.cuda.packed_unit import load_unit
from hybridkv.kernels.cuda.streamed import StreamedStack

DOWN_WARPS = 8
"""Warps among which the units of all chosen experts are dealt."""
PROMPT_TILE = 64
"""Rows of one expert that a program of a prompt takes."""


@triton.jit(do_not_specialize=["width", "shared_width", "most"])
def _up(x, index, out, main, more, scales, last, main_s, more_s, scales_s, last_s, x_row, hidden, width, shared_width,
        most, factor, TOP: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr,
        SHARED: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    SLOTS: tl.constexpr = TOP if SHARED is None else TOP + 1
    row, slot = (tl.program_id(1) // SLOTS).to(tl.int64), tl.program_id(1) % SLOTS
    tile = tl.program_id(0)
    thread = tl.arange(0, WARPS * 32)
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    begin(OVERLAPS)
    own = width
    if SHARED is None:
        skip = tl.load(index + row * TOP + slot).to(tl.int64) * (2 * width)
        sums = gated_tile(
            x + row * x_row, x_row, 1, hidden, main, more, scales, last, tile, width, skip, warp, group, place, 1,
            WARPS, UNITS, False, FULL, T,
        )  # fmt: skip
    elif slot < TOP:
        skip = tl.load(index + row * TOP + slot).to(tl.int64) * (2 * width)
        sums = gated_tile(
            x + row * x_row, x_row, 1, hidden, main, more, scales, last, tile, width, skip, warp, group, place, 1,
            WARPS, UNITS, False, FULL, T,
        )  # fmt: skip
    else:
        own = shared_width
        sums = gated_tile(
            x + row * x_row, x_row, 1, hidden, main_s, more_s, scales_s, last_s, tile, shared_width, 0, warp, group,
            place, 1, WARPS, UNITS, False, FULL, SHARED,
        )  # fmt: skip
    lane = tl.arange(0, 32)[:, None]
    rows, columns = tile * 8 + lane // 4, lane % 4 * 2 + tl.arange(0, 2)[None, :]
    total = gated_of(sums, 0, WARPS, "silu") * factor
    at = out + (row * SLOTS + slot) * most + rows + columns
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < own) & (columns == 0))


@triton.jit(do_not_specialize=["width", "most"])
def _up_plain(x, index, out, main, more, scales, last, x_row, hidden, width, most, factor, TOP: tl.constexpr,
              WARPS: tl.constexpr, UNITS: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr,
              OVERLAPS: tl.constexpr):  # fmt: skip
    """Compute the squares of ReLU of 16 outputs of an expert that has no gate."""
    row, slot = (tl.program_id(1) // TOP).to(tl.int64), tl.program_id(1) % TOP
    first = tl.program_id(0) * 16
    thread = tl.arange(0, WARPS * 32)
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    begin(OVERLAPS)
    skip = tl.load(index + row * TOP + slot).to(tl.int64) * width
    upper = tl.minimum(first + group, width - 1).to(tl.int64) + skip
    lower = tl.minimum(first + group + 8, width - 1).to(tl.int64) + skip
    sums = rows_times(
        x + row * x_row, x_row, 1, hidden, main, more, scales, last, upper, lower, warp, group, place, 1, WARPS, UNITS,
        False, FULL, T,
    )  # fmt: skip
    rows, columns = places_of(first)
    total = activate(over_warps(sums, 0, WARPS), "relu2") * factor
    at = out + (row * TOP + slot) * most + rows + columns
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < width) & (columns == 0))


@triton.jit(do_not_specialize=["width", "shared_width", "most"])
def _down(x, index, weights, out, main, more, scales, last, main_s, more_s, scales_s, last_s, hidden, width,
          shared_width, most, factor, TOP: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr,
          SHARED_UNITS: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr, SHARED: tl.constexpr,
          OVERLAPS: tl.constexpr):  # fmt: skip
    SLOTS: tl.constexpr = TOP if SHARED is None else TOP + 1
    if OVERLAPS:
        gdc_launch_dependents()
    row, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * 16
    thread = tl.arange(0, WARPS * 32)
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    upper = tl.minimum(first + group, hidden - 1).to(tl.int64)
    lower = tl.minimum(first + group + 8, hidden - 1).to(tl.int64)
    values = x + row * SLOTS * most
    if SHARED is not None:
        # The shared expert's, which every token takes, are asked for before the choice is known.
        a = load_unit(main_s, more_s, scales_s, last_s, upper, warp, SHARED_UNITS, place, SHARED)
        b = load_unit(main_s, more_s, scales_s, last_s, lower, warp, SHARED_UNITS, place, SHARED)
    if OVERLAPS:
        gdc_wait()
    pieces: tl.constexpr = (TOP * UNITS + WARPS - 1) // WARPS
    sums = zeros_of(1, WARPS)
    for start in range(0, pieces, 2):
        raw = ()
        for i in tl.static_range(2):
            at = (start + i) * WARPS + warp
            slot = tl.minimum(at // UNITS, TOP - 1)
            unit = tl.where(at < TOP * UNITS, at % UNITS, UNITS)
            expert = tl.load(index + row * TOP + slot).to(tl.int64) * hidden
            raw = raw + (load_unit(main, more, scales, last, expert + upper, unit, UNITS, place, T),)
            raw = raw + (load_unit(main, more, scales, last, expert + lower, unit, UNITS, place, T),)
        for i in tl.static_range(2):
            at = (start + i) * WARPS + warp
            slot = tl.minimum(at // UNITS, TOP - 1)
            unit = tl.where(at < TOP * UNITS, at % UNITS, UNITS)
            weight = tl.load(weights + row * (TOP + 1) + slot) * factor * T.gain
            sums = add_unit(
                sums, raw[2 * i], raw[2 * i + 1], values + slot.to(tl.int64) * most, most, 1, width, unit, UNITS,
                group, place, weight, WARPS, 1, FULL, T,
            )  # fmt: skip
    if SHARED is not None:
        weight = tl.load(weights + row * (TOP + 1) + TOP) * factor * SHARED.gain
        sums = add_unit(
            sums, a, b, values + TOP * most, most, 1, shared_width, warp, SHARED_UNITS, group, place, weight, WARPS, 1,
            FULL, SHARED,
        )  # fmt: skip
        for start in range(WARPS, SHARED_UNITS, WARPS):
            unit = start + warp
            a = load_unit(main_s, more_s, scales_s, last_s, upper, unit, SHARED_UNITS, place, SHARED)
            b = load_unit(main_s, more_s, scales_s, last_s, lower, unit, SHARED_UNITS, place, SHARED)
            sums = add_unit(
                sums, a, b, values + TOP * most, most, 1, shared_width, unit, SHARED_UNITS, group, place, weight, WARPS,
                1, FULL, SHARED,
            )  # fmt: skip
    rows, columns = places_of(first)
    total = over_warps(sums, 0, WARPS)
    at = out + row * hidden + rows + columns
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < hidden) & (columns == 0))


def run_packed_experts(
    x: Tensor,
    chosen: tuple[Tensor, Tensor],
    each: tuple[PackedWeight, PackedWeight],
    shared: tuple[PackedWeight, PackedWeight] | None,
    *,
    factor: float,
    gated: bool = True,
) -> Tensor:
    """Sum the weighted answers of SwiGLU experts, for a few tokens.

    Parameters
    ----------
    x
        float16 `[N, hidden]`.
    chosen
        What `experts.route` gives.
    each
        The experts' matrices: gate and up `[experts, 2 * width, hidden]`, and down `[experts, hidden, width]`.
    shared
        Those of the shared expert, with a width of its own; none beside experts without gates.
    factor
        Of what lies between the products, which is float16; the result is without it.
    gated
        Whether experts have gates; else they are `down(relu(up(x))^2)`, of stacks `[experts, width, hidden]`.

    Returns
    -------
    Tensor
        float32 `[N, hidden]`, contiguous.
    """
    assert gated or shared is None
    index, weights = chosen
    (n_rows, hidden), top_k = x.shape, index.shape[1]
    width, shared_width = each[1].n_in, 0 if shared is None else shared[1].n_in
    most = -(-max(width, shared_width) // 8) * 8
    slots = top_k + (shared is not None)
    between = torch.empty((n_rows, slots, most), dtype=torch.float16, device=x.device)
    warps = warps_of(each[0].n_units)
    own_up, own_down = each if shared is None else shared
    if gated:
        _up[(triton.cdiv(max(width, shared_width), OUTPUTS // 2), n_rows * slots)](
            x, index, between, *each[0].planes, *own_up.planes, x.stride(0), hidden, width, shared_width, most, factor,
            TOP=top_k, WARPS=warps, UNITS=each[0].n_units, FULL=hidden % UNIT == 0, T=each[0].type,
            SHARED=None if shared is None else own_up.type, num_warps=warps, **overlapping(x.device),
        )  # fmt: skip
    else:
        _up_plain[(triton.cdiv(width, OUTPUTS), n_rows * slots)](
            x, index, between, *each[0].planes, x.stride(0), hidden, width, most, factor, TOP=top_k, WARPS=warps,
            UNITS=each[0].n_units, FULL=hidden % UNIT == 0, T=each[0].type, num_warps=warps, **overlapping(x.device),
        )  # fmt: skip
    out = torch.empty((n_rows, hidden), dtype=torch.float32, device=x.device)
    _down[(triton.cdiv(hidden, OUTPUTS), n_rows)](
        between, index, weights, out, *each[1].planes, *own_down.planes, hidden, width, shared_width, most,
        1 / factor, TOP=top_k, WARPS=DOWN_WARPS, UNITS=each[1].n_units, SHARED_UNITS=own_down.n_units,
        FULL=width % UNIT == 0 and shared_width % UNIT == 0, T=each[1].type,
        SHARED=None if shared is None else own_down.type, num_warps=DOWN_WARPS, **overlapping(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _grouped(x, source, window, ends, tiles, out, n_in, n_out, top, first, GATHERS: tl.constexpr, ROWS: tl.constexpr,
             COLS: tl.constexpr, IN: tl.constexpr):  # fmt: skip
    """Multiply rows sorted by expert by their experts' matrices in a window: a program takes rows of one expert."""
    tile = tl.program_id(1)
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    begin_ = tl.load(tiles + 2 * tile + 1)
    end = tl.load(ends + expert)
    rows = begin_ + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = rows < end
    at = rows
    if GATHERS:
        at = tl.load(source + rows, mask=here, other=0) // top
    matrix = window + (expert - first).to(tl.int64) * n_out * n_in
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, n_in, IN):
        inner = start + tl.arange(0, IN)
        a = tl.load(
            x + at.to(tl.int64)[:, None] * n_in + inner[None, :],
            mask=here[:, None] & (inner < n_in)[None, :],
            other=0.0,
        )
        b = tl.load(
            matrix + cols.to(tl.int64)[None, :] * n_in + inner[:, None],
            mask=(cols < n_out)[None, :] & (inner < n_in)[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total)
    place = out + rows.to(tl.int64)[:, None] * n_out + cols[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=here[:, None] & (cols < n_out)[None, :])


@dataclass(frozen=True, slots=True)
class PlainStack:
    """A stack of matrices that is not packed: any float dtype, `[experts, out, in]`, contiguous."""

    values: Tensor

    @property
    def n_stack(self) -> int:
        """Matrices."""
        return self.values.shape[0]

    @property
    def n_out(self) -> int:
        """Rows of a matrix."""
        return self.values.shape[1]

    @property
    def n_in(self) -> int:
        """Values in a row."""
        return self.values.shape[2]


Stack = PackedWeight | StreamedStack | PlainStack


def prompt_experts(
    x: Tensor,
    chosen: tuple[Tensor, Tensor],
    each: tuple[Stack, Stack],
    shared: tuple[PackedWeight, PackedWeight] | None,
    *,
    factor: float,
    gated: bool = True,
) -> Tensor:
    """Compute `run_packed_experts` for rows that choose every expert several times: matrices are decoded once."""
    index, weights = chosen
    (n_rows, hidden), top_k = x.shape, index.shape[1]
    n_experts = each[0].n_stack
    order = torch.argsort(index.flatten(), stable=True)
    chosen_flat = index.flatten().long()
    counts = torch.zeros(n_experts, dtype=torch.long, device=x.device).scatter_add_(
        0, chosen_flat, torch.ones_like(chosen_flat)
    )
    ends = counts.cumsum(0)
    table = _tiles(counts, ends, n_rows * top_k, n_experts)
    both = torch.empty((n_rows * top_k, each[0].n_out), dtype=torch.float16, device=x.device)
    _by_expert(x, order, each[0], ends, table, both, top_k)
    between = activated(both, "silu" if gated else "relu2", factor=factor)
    answers = torch.empty((n_rows * top_k, hidden), dtype=torch.float16, device=x.device)
    _by_expert(between, None, each[1], ends, table, answers, 1)
    own = weights[:, :-1].flatten()[order] / factor
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)
    mine = torch.empty((n_rows, hidden), dtype=torch.float32, device=x.device)
    _gather_sum[(n_rows, triton.cdiv(hidden, 1024))](
        answers, places, own, mine, hidden, top_k, BLOCK=1024, **overlapping(x.device)
    )
    if shared is None:
        return mine
    answer = multiply_packed(multiply_gated(x, shared[0], factor=factor), (shared[1],), factor=1 / factor)
    return torch.addcmul(mine, answer, weights[:, -1:])


@triton.jit
def _gather_sum(answers, places, weights, out, hidden, top, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < hidden
    begin(OVERLAPS)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(top):
        place = tl.load(places + row * top + slot)
        weight = tl.load(weights + place)
        total += weight * tl.load(answers + place * hidden + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + cols, total, mask=inside)


def _tiles(counts: Tensor, ends: Tensor, n_rows: int, n_experts: int) -> Tensor:
    """List expert and first row of every tile of rows, int32 `[tiles, 2]`; -1 for those that are not needed."""
    n_tiles = min(n_experts, n_rows) + n_rows // PROMPT_TILE
    each = (counts + PROMPT_TILE - 1) // PROMPT_TILE
    before = each.cumsum(0)
    tile = torch.arange(n_tiles, device=counts.device)
    expert = torch.searchsorted(before, tile, right=True)
    known = expert.clamp(max=n_experts - 1)
    first = ends[known] - counts[known] + (tile - (before[known] - each[known])) * PROMPT_TILE
    return torch.stack([torch.where(expert < n_experts, expert, -1), first], 1).to(torch.int32)


def _by_expert(
    x: Tensor, order: Tensor | None, stack: Stack, ends: Tensor, table: Tensor, out: Tensor, top: int
) -> None:
    """Multiply every row by its expert's matrix, as many experts at a time as a window holds."""
    per_window = max(1, WINDOW_BYTES // (2 * stack.n_out * stack.n_in))
    if isinstance(stack, PlainStack):
        per_window, x = stack.n_stack, x.to(stack.values.dtype)
    for first in range(0, stack.n_stack, per_window):
        n = min(per_window, stack.n_stack - first)
        if isinstance(stack, PlainStack):
            window = stack.values
        else:
            held, start = (stack, first) if isinstance(stack, PackedWeight) else (stack.window(first, n), 0)
            window = decode_rows(held, start * stack.n_out, n * stack.n_out)
        own = torch.where((table[:, :1] >= first) & (table[:, :1] < first + n), table, -1)
        _grouped[(triton.cdiv(stack.n_out, 128), len(table))](
            x, x if order is None else order, window, ends, own, out, stack.n_in, stack.n_out, top, first,
            GATHERS=order is not None, ROWS=PROMPT_TILE, COLS=128, IN=64, num_warps=4, num_stages=3,
        )  # fmt: skip
