"""New rows on their way into the planes: rotated, minus a center, encoded, written. Triton kernel.

The arithmetic is `hybridkv.formats.rules`, operation by operation, compiled without fused multiply-adds but where C has
them. Halves of a block, lanes 0..15 and 16..31, are tensors of their own. Sums that the rules take lane by lane are
taken as a tree here: a scale fitted by `pairs` or `search` may differ in the last place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.layout import BF16, BYTES, F16, F32, NIBBLES
from hybridkv.kernels.cuda.overlap import begin
from hybridkv.kernels.cuda.tiles import find_slots

_BYTES, _NIBBLES = tl.constexpr(BYTES), tl.constexpr(NIBBLES)
_F16, _BF16, _F32 = tl.constexpr(F16), tl.constexpr(BF16), tl.constexpr(F32)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _rotate(x, N: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Transform each `BLOCK` lanes of x `[N, WIDTH]` by Walsh-Hadamard, orthonormal."""
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(x, [N, WIDTH // (2 << stage), 2, 1 << stage]), [0, 1, 3, 2])
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [N, WIDTH])
    return tl.div_rn(x, tl.sqrt_rn(tl.full([N, WIDTH], BLOCK, tl.float32)))


@triton.jit
def _bfloat16(x):
    """Round x to the bits of bfloat16, ties to even: Triton's interpreter cuts them off."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def _halves(x, N: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """Split the lanes into a lower and an upper half: two of `[N, BLOCKS, LANES / 2]`."""
    return tl.split(tl.permute(tl.reshape(x, [N, BLOCKS, 2, LANES // 2]), [0, 1, 3, 2]))


@triton.jit
def _fold(x, N: tl.constexpr, BLOCKS: tl.constexpr):
    """Fold as `rules.fold` does, from 16 lanes that already are sums of two: float32 `[N, BLOCKS]`."""
    a, b = _halves(x, N, BLOCKS, 16)
    a, b = _halves(a + b, N, BLOCKS, 8)
    a, b = _halves(a + b, N, BLOCKS, 4)
    a, b = _halves(a + b, N, BLOCKS, 2)
    return tl.reshape(a + b, [N, BLOCKS])


@triton.jit
def _sum(low, high, WHOLE_ROW: tl.constexpr):
    total = tl.sum(low + high, axis=2)
    if WHOLE_ROW:
        total = tl.sum(total, axis=1)[:, None]
    return total


@triton.jit
def _largest(low, high, WHOLE_ROW: tl.constexpr):
    top = tl.max(tl.maximum(low, high), axis=2)
    if WHOLE_ROW:
        top = tl.max(top, axis=1)[:, None]
    return top


@triton.jit
def _finite(x):
    return tl.abs(x) < _INF


@triton.jit
def _inverse(d):
    """Compute `rules.inverse`."""
    inverse = tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d)
    return tl.where(_finite(inverse), inverse, 0.0)


@triton.jit
def _extremes(low, high, E: tl.constexpr):
    """Compute `rules.extremes`: the extreme value and the minimum of each block, `[N, BLOCKS]`."""
    nan = _largest((low != low).to(tl.int32), (high != high).to(tl.int32), E.whole_row) > 0
    least = -_largest(-low, -high, E.whole_row)
    if E.rule == "min_max":
        extreme = _largest(low, high, E.whole_row) - least
    elif E.rule == "signed_max":
        lane = tl.arange(0, 16)[None, None, :]
        size = _largest(tl.abs(low), tl.abs(high), E.whole_row)[:, :, None]
        first_low = tl.where(tl.abs(low) == size, lane, 32)
        first_high = tl.where(tl.abs(high) == size, lane + 16, 32)
        first = -_largest(-first_low, -first_high, E.whole_row)[:, :, None]
        extreme = _sum(tl.where(lane == first, low, 0.0), tl.where(lane + 16 == first, high, 0.0), E.whole_row)
    else:
        extreme = _largest(tl.abs(low), tl.abs(high), E.whole_row)
    return tl.where(nan, float("nan"), extreme), tl.where(nan, float("nan"), least)


@triton.jit
def _round(y, E: tl.constexpr):
    """Compute `rules.to_codes`, as whole float32 numbers, not yet two's complement."""
    if E.rounding == "away":
        y = tl.where(y < 0.0, tl.ceil(y - 0.49999997), tl.floor(y + 0.49999997)) + E.zero
    elif E.rounding == "even":
        y = (y + 12582912.0) - 12582912.0 + E.zero  # 1.5 * 2**23: no bits are left behind the point
    else:
        y = y + (E.zero + 0.5)
        y = tl.where(y < 0.0, tl.ceil(y), tl.floor(y))
    y = tl.where(y == y, y, 0.0)
    return tl.minimum(tl.maximum(y, E.lowest), E.highest)


@triton.jit
def _nearest(y, book, N_ENTRIES: tl.constexpr):
    """Compute `rules.to_nearest`: index of the nearest of ascending entries, float32, and its value."""
    previous = tl.load(book)
    index = tl.zeros_like(y)
    value = index + previous
    for j in tl.static_range(1, N_ENTRIES):
        entry = tl.load(book + j)
        above = y >= (entry + previous) * 0.5
        index = tl.where(above, j * 1.0, index)
        value = tl.where(above, entry, value)
        previous = entry
    return index, value


@triton.jit
def _fit_pairs(low, high, q_low, q_high, d, E: tl.constexpr):
    """Compute `rules.refit_pairs`: the scale."""
    inverse = _inverse(d)[:, :, None]
    w_low, w_high = low * inverse, high * inverse
    w_low, w_high = w_low * w_low, w_high * w_high
    terms_qx = tl.fma(w_low * low, q_low, (w_high * high) * q_high)
    terms_q2 = tl.fma(w_low * q_low, q_low, (w_high * q_high) * q_high)
    zero = tl.zeros_like(terms_qx)
    fitted = tl.div_rn(_sum(terms_qx, zero, E.whole_row), _sum(terms_q2, zero, E.whole_row))
    return tl.where(_finite(fitted), fitted, d)


@triton.jit
def _fit_line(low, high, q_low, q_high, d, least, N: tl.constexpr, E: tl.constexpr):
    """Compute `rules.refit_line`: scale and minimum."""
    above_low, above_high = low - least[:, :, None], high - least[:, :, None]
    sum_q = _sum(q_low, q_high, False)
    sum_q2 = _sum(q_low * q_low, q_high * q_high, False)
    sum_x = _fold(above_low + above_high, N, E.blocks_padded)
    sum_qx = _fold(q_low * above_low + q_high * above_high, N, E.blocks_padded)
    slope = tl.div_rn(32.0 * sum_qx - sum_q * sum_x, 32.0 * sum_q2 - sum_q * sum_q)
    shift = (sum_x - slope * sum_q) / 32.0
    fits = _finite(slope) & _finite(shift)
    return tl.where(fits, slope, d), tl.where(fits, least + shift, least)


@triton.jit
def _fit_starts(low, high, d, book, N: tl.constexpr, E: tl.constexpr):
    """Compute `rules.refit_starts`: codes and scale."""
    half: tl.constexpr = E.n_entries // 2
    size_low, size_high = tl.abs(low), tl.abs(high)
    largest = _largest(size_low, size_high, False)
    level_low, level_high = tl.zeros_like(low), tl.zeros_like(high)
    best = tl.full(d.shape, -1.0, tl.float32)
    # One row's program would wait for the instructions of a loop that is unrolled; where many rows run they are there.
    for i in tl.range(0, len(E.starts), loop_unroll_factor=1 if N == 1 else len(E.starts)):
        start = tl.load(book + E.n_entries + i)
        scale = tl.div_rn(tl.zeros_like(d) + start, largest)
        scale = tl.where(_finite(scale), scale, 0.0)[:, :, None]
        try_low, q_low = _nearest(size_low * scale, book + half, half)
        try_high, q_high = _nearest(size_high * scale, book + half, half)
        explained = _fold(size_low * q_low + size_high * q_high, N, E.blocks_padded)
        fitted = tl.div_rn(explained, _sum(q_low * q_low, q_high * q_high, False))
        explained = fitted * explained
        better = explained > best
        best = tl.where(better, explained, best)
        d = tl.where(better, fitted, d)
        level_low = tl.where(better[:, :, None], try_low, level_low)
        level_high = tl.where(better[:, :, None], try_high, level_high)
    code_low = tl.where(low < 0.0, half - 1.0 - level_low, half + level_low)
    code_high = tl.where(high < 0.0, half - 1.0 - level_high, half + level_high)
    return code_low, code_high, d


@triton.jit
def _entry(book, code, ok):
    return tl.load(book + code.to(tl.int32), mask=ok, other=0.0)


@triton.jit
def _move(code, slope, at, ok, book, E: tl.constexpr):
    """Find the step that takes a lane's code to its neighbour along the slope; infinite where there is none."""
    up = slope > 0.0
    to = tl.where(up, code + 1.0, code - 1.0)
    exists = ok & (to >= 0.0) & (to < E.n_entries)
    gap = tl.abs(_entry(book, to, exists) - at)
    return tl.where(exists, tl.div_rn(gap, tl.abs(slope)), _INF)


@triton.jit
def _fit_search(low, high, c_low, c_high, d, book, E: tl.constexpr):
    """Compute `rules.refit_search`: codes and scale."""
    lane = tl.arange(0, 16)[None, None, :]
    w_low, w_high = low * low, high * high
    q_low, q_high = _entry(book, c_low, True), _entry(book, c_high, True)
    sum_qx = _sum((w_low * q_low) * low, (w_high * q_high) * high, False)
    sum_q2 = _sum((w_low * q_low) * q_low, (w_high * q_high) * q_high, False)
    fitted = tl.div_rn(sum_qx, sum_q2)
    d = tl.where(_finite(fitted), fitted, d)
    best = d * sum_qx
    live = best == best
    turn = 0
    n_live = tl.max(tl.max(live.to(tl.int32), axis=1), axis=0)
    while (n_live > 0) & (turn < 1024):
        scale, ok = d[:, :, None], live[:, :, None]
        slope_low = (scale * w_low) * tl.fma(-scale, q_low, low)
        slope_high = (scale * w_high) * tl.fma(-scale, q_high, high)
        step_low = _move(c_low, slope_low, q_low, ok, book, E)
        step_high = _move(c_high, slope_high, q_high, ok, book, E)
        step = -_largest(-step_low, -step_high, False)
        first_low = tl.where(step_low == step[:, :, None], lane, 32)
        first_high = tl.where(step_high == step[:, :, None], lane + 16, 32)
        first = -_largest(-first_low, -first_high, False)[:, :, None]
        here_low, here_high = lane == first, lane + 16 == first
        x = _sum(tl.where(here_low, low, 0.0), tl.where(here_high, high, 0.0), False)
        old = _sum(tl.where(here_low, c_low, 0.0), tl.where(here_high, c_high, 0.0), False)
        slope = _sum(tl.where(here_low, slope_low, 0.0), tl.where(here_high, slope_high, 0.0), False)
        new = tl.minimum(tl.maximum(tl.where(slope > 0.0, old + 1.0, old - 1.0), 0.0), E.n_entries - 1.0)
        q_old, q_new = _entry(book, old, True), _entry(book, new, True)
        w = x * x
        new_qx = tl.fma(w * x, q_new - q_old, sum_qx)
        new_q2 = tl.fma(w, q_new * q_new - q_old * q_old, sum_q2)
        live = live & (step < _INF) & (new_q2 > 0.0) & (new_qx * new_qx > best * new_q2)
        here_low, here_high = here_low & live[:, :, None], here_high & live[:, :, None]
        c_low = tl.where(here_low, new[:, :, None], c_low)
        c_high = tl.where(here_high, new[:, :, None], c_high)
        q_low = tl.where(here_low, q_new[:, :, None], q_low)
        q_high = tl.where(here_high, q_new[:, :, None], q_high)
        sum_qx, sum_q2 = tl.where(live, new_qx, sum_qx), tl.where(live, new_q2, sum_q2)
        d = tl.where(live, tl.div_rn(sum_qx, sum_q2), d)
        best = tl.where(live, d * sum_qx, best)
        turn += 1
        n_live = tl.max(tl.max(live.to(tl.int32), axis=1), axis=0)
    return c_low, c_high, d


@triton.jit
def _encode(low, high, book, N: tl.constexpr, E: tl.constexpr):
    """Encode both halves: codes as whole float32 numbers; scale, minimum and sum of the values, `[N, BLOCKS]`."""
    extreme, least = _extremes(low, high, E)
    d = tl.div_rn(extreme, tl.full(extreme.shape, E.extreme_code, tl.float32))
    inverse = _inverse(d)[:, :, None]
    y_low, y_high = low, high
    if E.rule == "min_max":
        y_low, y_high = low - least[:, :, None], high - least[:, :, None]
    y_low, y_high = y_low * inverse, y_high * inverse
    if E.n_entries > 0:
        code_low, q_low = _nearest(y_low, book, E.n_entries)
        code_high, q_high = _nearest(y_high, book, E.n_entries)
    else:
        code_low, code_high = _round(y_low, E), _round(y_high, E)
        q_low, q_high = code_low - E.zero, code_high - E.zero
    if E.refit == "pairs":
        d = _fit_pairs(low, high, q_low, q_high, d, E)
    elif E.refit == "line":
        d, least = _fit_line(low, high, q_low, q_high, d, least, N, E)
    elif E.refit == "starts":
        code_low, code_high, d = _fit_starts(low, high, d, book, N, E)
    elif E.refit == "search":
        code_low, code_high, d = _fit_search(low, high, code_low, code_high, d, book, E)
    return code_low, code_high, d, least, _sum(q_low, q_high, E.whole_row)


@triton.jit
def _write(
    main, pairs, bits, d_to, m_to, extra, slots, ok, c_low, c_high, d, least, total, N: tl.constexpr, E: tl.constexpr
):
    """Write codes and numbers into the planes."""
    blocks: tl.constexpr = E.blocks_padded
    block = tl.arange(0, blocks)[None, :]
    here = ok[:, None] & (block < E.n_blocks)
    block3, here3 = block[:, :, None], here[:, :, None]
    row3 = slots[:, None, None]
    lane = tl.arange(0, 16)[None, None, :]
    low, high = c_low.to(tl.int32), c_high.to(tl.int32)
    if E.main == _BYTES:
        width: tl.constexpr = E.head_dim if E.whole_row else E.n_blocks * 32
        column = block3 * 32 + lane
        tl.store(main + row3 * width + column, (low & 0xFF).to(tl.uint8), mask=here3 & (column < width))
        tl.store(main + row3 * width + column + 16, (high & 0xFF).to(tl.uint8), mask=here3 & (column + 16 < width))
    elif E.main == _NIBBLES:
        byte = ((low & 0xF) | ((high & 0xF) << 4)).to(tl.uint8)
        tl.store(main + row3 * (E.n_blocks * 16) + block3 * 16 + lane, byte, mask=here3)
    if E.pairs >= 0:
        fields = ((low >> E.pairs) & 3) | (((high >> E.pairs) & 3) << 2)
        a, b = _halves(fields, N, blocks, 16)
        at = row3 * (E.n_blocks * 8) + block3 * 8 + tl.arange(0, 8)[None, None, :]
        tl.store(pairs + at, (a | (b << 4)).to(tl.uint8), mask=here3)
    at = slots[:, None] * E.n_blocks + block
    if E.bits >= 0:
        fields = (((low >> E.bits) & 1) << lane) | (((high >> E.bits) & 1) << (lane + 16))
        tl.store(bits.to(tl.pointer_type(tl.int32)) + at, tl.sum(fields, axis=2), mask=here)
    if E.whole_row:
        first = ok[:, None]
        tl.store(d_to.to(tl.pointer_type(tl.float32)) + slots[:, None], d, mask=first)
        tl.store(extra.to(tl.pointer_type(tl.int32)) + slots[:, None], total.to(tl.int32), mask=first)
    else:
        tl.store(d_to.to(tl.pointer_type(tl.float16)) + at, d.to(tl.float16), mask=here)
        if E.has_min:
            tl.store(m_to.to(tl.pointer_type(tl.float16)) + at, least.to(tl.float16), mask=here)
        if E.has_sum:
            tl.store(extra.to(tl.pointer_type(tl.float16)) + at, (total * d).to(tl.float16), mask=here)


_NUMBERS = ["row", "n_new", "n_kv_heads", "n_rows", "n_blocks", "stride_b", "stride_h", "stride_t"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["rows"])
def store_rows(
    x,
    main,
    pairs,
    bits,
    d_to,
    m_to,
    extra,
    book,
    center,
    rows,
    row,
    n_new,
    n_kv_heads,
    n_rows,
    stride_b,
    stride_h,
    stride_t,
    E: tl.constexpr,
    N: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Rotate, subtract, encode and write N new rows of one sequence and KV head. Grid: tiles of T, B * Hkv."""
    sequence = tl.program_id(1) // n_kv_heads
    head = tl.program_id(1) % n_kv_heads
    token = tl.program_id(0) * N + tl.arange(0, N)
    ok = token < n_new
    width: tl.constexpr = E.blocks_padded * 32
    column = tl.arange(0, width)
    at = x + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    here = ok[:, None] & (column < E.head_dim)[None, :]
    begin(OVERLAPS)
    values = tl.load(at + token.to(tl.int64)[:, None] * stride_t + column[None, :], mask=here, other=0.0)
    values = values.to(tl.float32)
    if ROTATED:
        values = _rotate(values, N, width, E.rotation, E.rotation_stages)
    if HAS_CENTER:
        center_at = center + (sequence * n_kv_heads + head).to(tl.int64) * E.head_dim
        values = values - tl.load(center_at + column, mask=column < E.head_dim, other=0.0)[None, :]
    first = row
    if HAS_ROWS:
        first += tl.load(rows + sequence)
    slots = find_slots(first + token, head, n_kv_heads, sequence, n_rows)
    if E.main >= _F16:
        at = slots[:, None] * E.head_dim + column[None, :]
        if E.main == _F16:
            tl.store(main.to(tl.pointer_type(tl.float16)) + at, values.to(tl.float16), mask=here)
        elif E.main == _BF16:
            tl.store(main.to(tl.pointer_type(tl.uint16)) + at, _bfloat16(values), mask=here)
        else:
            tl.store(main.to(tl.pointer_type(tl.float32)) + at, values, mask=here)
    else:
        low, high = _halves(values, N, E.blocks_padded, 32)
        if E.pad_copies:  # the padding lanes of the last block repeat those before them
            last = (tl.arange(0, E.blocks_padded) == E.n_blocks - 1)[None, :, None]
            high = tl.where(last, low, high)
        c_low, c_high, d, least, total = _encode(low, high, book, N, E)
        _write(main, pairs, bits, d_to, m_to, extra, slots, ok, c_low, c_high, d, least, total, N, E)
