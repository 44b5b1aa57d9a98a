"""Attention over one segment of stored rows, and the sum of its parts. Triton kernels.

One kernel serves decode and prefill. A program takes a tile of query rows, which are the tokens of a KV head's group of
query heads, and a share of the segment's rows: with one new token the query rows are few and the shares many. Rows are
decoded in registers and multiplied on the tensor cores: float16 operands, float32 sums, softmax in float32 and base 2.

Queries are scaled to a largest magnitude of 1 per row before they are rounded to float16. Weights are 2**15 times as
large as usual, so that small ones keep their precision in float16; the factor cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.layout import BF16, F16, F32
from hybridkv.kernels.cuda.overlap import begin
from hybridkv.kernels.cuda.tiles import INTERPRETED, decode_raw, find_slots, lanes, load_raw

_F16, _BF16, _F32 = tl.constexpr(F16), tl.constexpr(BF16), tl.constexpr(F32)
WEIGHT_BITS = tl.constexpr(15.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, acc, KIND: tl.constexpr):
    """Compute `acc + a @ b`, b as decoded: in float16, or where b's range is larger, at a's full precision."""
    if KIND == _F32:
        total = tl.dot(a, b, acc, input_precision="tf32x3")
    elif KIND == _BF16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        if INTERPRETED:  # it has no product of bfloat16
            b = b.to(tl.float32)
            total = tl.dot(low.to(tl.float32), b, tl.dot(high.to(tl.float32), b, acc))
        else:
            total = tl.dot(low, b, tl.dot(high, b, acc))
    else:
        total = tl.dot(a.to(tl.float16), b, acc)
    return total


@triton.jit
def _not_finite(low, high, scale, low_end, S: tl.constexpr):
    """Find the rows of V that decode to something that is not finite: bool `[N]`."""
    if S.main >= _F16:
        size = tl.maximum(tl.abs(low.to(tl.float32)), tl.abs(high.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    else:
        size = tl.abs(scale.to(tl.float32))
        if S.has_min:
            size = tl.maximum(size, tl.abs(low_end.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(((size < float("inf")) == 0).to(tl.int32), axis=1) > 0


@triton.jit
def _query_half(q, rows, stride_t, stride_h, row_ok, half: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr):
    """Load lanes 0..15 or 16..31 of the query rows' blocks: float32 `[M, blocks * 16]`, zeros behind the head dim."""
    column = lanes(half, K)
    at = (rows // GROUP).to(tl.int64) * stride_t + (rows % GROUP) * stride_h
    here = row_ok[:, None] & (column < K.head_dim)[None, :]
    return tl.load(q + at[:, None] + column[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _center_half(center, half: tl.constexpr, K: tl.constexpr):
    column = lanes(half, K)
    return tl.load(center + column, mask=column < K.head_dim, other=0.0)[None, :]


@triton.jit
def _store_half(out, at, x, row_ok, half: tl.constexpr, V: tl.constexpr):
    column = lanes(half, V)
    here = row_ok[:, None] & (column < V.head_dim)[None, :]
    tl.store(out + at[:, None] + column[None, :], x, mask=here)


_NUMBERS = [
    "n_new",
    "n_batch",
    "n_kv_heads",
    "start",
    "length",
    "before",
    "mask_column",
    "total",
    "rows_k",
    "rows_v",
    "window",
    "n_blocks",
    "n_parts",
    "first_part",
    "stride_qb",
    "stride_qh",
    "stride_qt",
    "stride_mb",
    "stride_mh",
    "stride_mt",
]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["starts", "lengths"])
def attend_segment(
    q,
    out,
    tops,
    sums,
    sinks,
    mask,
    center,
    k_main,
    k_pairs,
    k_bits,
    k_d,
    k_m,
    k_book,
    v_main,
    v_pairs,
    v_bits,
    v_d,
    v_m,
    v_book,
    starts,
    lengths,
    n_new,
    n_batch,
    n_kv_heads,
    start,
    length,
    before,
    mask_column,
    total,
    rows_k,
    rows_v,
    scale,
    softcap,
    window,
    n_parts,
    first_part,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_mb,
    stride_mh,
    stride_mt,
    K: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    N_LENGTHS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PARTIAL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Attend a tile of query rows over a share of one segment's rows.

    Grid: tiles of query rows, shares, B * Hkv. With PARTIAL, `out` is float32 `[B * Hkv, parts, T * group, Dv]`, not
    yet divided, `tops` and `sums` `[B * Hkv, parts, T * group]`; else `out` is the result `[B, Hq, T, Dv]`.
    `lengths` is int32 `[N_LENGTHS, B]`, one row per segment; without it `length`, `before` and `total` count.
    """
    tile = tl.program_id(0)
    share = tl.program_id(1)
    n_shares = tl.num_programs(1)
    sequence = tl.program_id(2) // n_kv_heads
    head = tl.program_id(2) % n_kv_heads

    rows_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = rows_m < n_new * GROUP
    token = rows_m // GROUP
    q_at = q + sequence.to(tl.int64) * stride_qb + (head * GROUP).to(tl.int64) * stride_qh
    q_low = _query_half(q_at, rows_m, stride_qt, stride_qh, m_ok, 0, GROUP, K)
    q_high = _query_half(q_at, rows_m, stride_qt, stride_qh, m_ok, 1, GROUP, K)
    if HAS_CENTER:
        center_at = center + (sequence * n_kv_heads + head).to(tl.int64) * K.head_dim
        offset = tl.sum(q_low * _center_half(center_at, 0, K), axis=1)
        offset += tl.sum(q_high * _center_half(center_at, 1, K), axis=1)
        offset *= scale
    largest = tl.maximum(tl.max(tl.abs(q_low), axis=1), tl.max(tl.abs(q_high), axis=1))
    largest = tl.where(largest > 0.0, largest, 1.0)
    q_low = q_low / largest[:, None]
    q_high = q_high / largest[:, None]
    if K.main != _F32 and K.main != _BF16:
        q_low = q_low.to(tl.float16)
        q_high = q_high.to(tl.float16)
    factor = largest * scale
    if not HAS_SOFTCAP:  # scores count in powers of 2 from the start
        factor *= LOG2_E
        if HAS_CENTER:
            offset *= LOG2_E

    if N_LENGTHS > 0:
        total = 0
        before = 0
        for s in tl.static_range(N_LENGTHS):
            n = tl.load(lengths + s * n_batch + sequence)
            total += n
            if s < SEGMENT:
                before += n
            if s == SEGMENT:
                length = n
    first_row = start
    if HAS_STARTS:
        first_row += tl.load(starts + sequence)
    position = total - n_new + token - before  # of each query, counted like this segment's rows
    from_row = 0
    to_row = length
    if not HAS_MASK:
        last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, n_new - 1)
        to_row = tl.minimum(length, total - n_new + last_token - before + 1)
        if HAS_WINDOW:
            from_row = tl.maximum(0, total - n_new + (tile * BLOCK_M) // GROUP - before - window + 1)
    share_rows = tl.cdiv(tl.cdiv(tl.maximum(to_row - from_row, 0), BLOCK_N), n_shares) * BLOCK_N
    from_row += share * share_rows
    to_row = tl.minimum(to_row, from_row + share_rows)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums_m = tl.zeros([BLOCK_M], tl.float32)
    acc_low = tl.zeros([BLOCK_M, V.blocks_padded * 16], tl.float32)
    acc_high = tl.zeros([BLOCK_M, V.blocks_padded * 16], tl.float32)
    columns = tl.arange(0, BLOCK_N)

    if PREFETCH:
        rows = from_row + columns
        ok = rows < to_row
        slots = find_slots(first_row + rows, head, n_kv_heads, sequence, rows_k)
        k0, k1, k2, k3, k4, k5 = load_raw(k_main, k_pairs, k_bits, k_d, k_m, slots, ok, K)
        slots = find_slots(first_row + rows, head, n_kv_heads, sequence, rows_v)
        v0, v1, v2, v3, v4, v5 = load_raw(v_main, v_pairs, v_bits, v_d, v_m, slots, ok, V)
    for n in range(from_row, to_row, BLOCK_N):
        if not PREFETCH:
            rows = n + columns
            ok = rows < to_row
            slots = find_slots(first_row + rows, head, n_kv_heads, sequence, rows_k)
            k0, k1, k2, k3, k4, k5 = load_raw(k_main, k_pairs, k_bits, k_d, k_m, slots, ok, K)
            slots = find_slots(first_row + rows, head, n_kv_heads, sequence, rows_v)
            v0, v1, v2, v3, v4, v5 = load_raw(v_main, v_pairs, v_bits, v_d, v_m, slots, ok, V)
        c0, c1, c2, c3, c4, c5 = k0, k1, k2, k3, k4, k5
        w0, w1, w2, w3, w4, w5 = v0, v1, v2, v3, v4, v5
        if PREFETCH:
            rows = n + BLOCK_N + columns
            ok = rows < to_row
            slots = find_slots(first_row + rows, head, n_kv_heads, sequence, rows_k)
            k0, k1, k2, k3, k4, k5 = load_raw(k_main, k_pairs, k_bits, k_d, k_m, slots, ok, K)
            slots = find_slots(first_row + rows, head, n_kv_heads, sequence, rows_v)
            v0, v1, v2, v3, v4, v5 = load_raw(v_main, v_pairs, v_bits, v_d, v_m, slots, ok, V)

        k_low, k_high = decode_raw(c0, c1, c2, c3, c4, c5, k_book, BLOCK_M >= 64, K)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = _product(q_low, tl.trans(k_low), scores, K.main)
        scores = _product(q_high, tl.trans(k_high), scores, K.main)
        scores = scores * factor[:, None]
        if HAS_CENTER:
            scores += offset[:, None]
        if HAS_SOFTCAP:
            tanh = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0)
            scores = tanh * (softcap * LOG2_E)

        key = n + columns
        visible = (key < to_row)[None, :] & m_ok[:, None]
        if HAS_MASK:
            mask_at = mask + sequence.to(tl.int64) * stride_mb + (head * GROUP).to(tl.int64) * stride_mh
            at = token.to(tl.int64) * stride_mt + (rows_m % GROUP) * stride_mh
            seen = tl.load(mask_at + at[:, None] + (key + mask_column)[None, :], mask=visible, other=0)
            visible = visible & (seen != 0)
        elif not ONE_TOKEN:
            visible = visible & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                visible = visible & (key[None, :] > position[:, None] - window)
        if HAS_MASK or not ONE_TOKEN:
            # A row that is not finite may be seen by some queries and not by others of this tile: its values count as
            # zero, and its scores as NaN where it is seen.
            bad = _not_finite(w0, w1, w4, w5, V)
            scores += tl.where(bad, float("nan"), 0.0)[None, :]
            if V.main >= _F16:
                w0 = tl.where(bad[:, None], 0.0, w0)
                w1 = tl.where(bad[:, None], 0.0, w1)
            else:
                w4 = tl.where(bad[:, None], 0.0, w4)
                w5 = tl.where(bad[:, None], 0.0, w5)
        scores = tl.where(visible, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - (base - WEIGHT_BITS)[:, None])
        shrink = tl.exp2(top - base)
        sums_m = sums_m * shrink + tl.sum(weights, axis=1)
        v_low, v_high = decode_raw(w0, w1, w2, w3, w4, w5, v_book, BLOCK_M >= 64, V)
        acc_low = _product(weights, v_low, acc_low * shrink[:, None], V.main)
        acc_high = _product(weights, v_high, acc_high * shrink[:, None], V.main)
        top = new_top

    if PARTIAL:
        part = tl.program_id(2).to(tl.int64) * n_parts + first_part + share
        at = part * (n_new * GROUP) + rows_m
        tl.store(tops + at, top, mask=m_ok)
        tl.store(sums + at, sums_m, mask=m_ok)
        _store_half(out, at * V.head_dim, acc_low, m_ok, 0, V)
        _store_half(out, at * V.head_dim, acc_high, m_ok, 1, V)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head * GROUP + rows_m % GROUP, mask=m_ok, other=float("-inf")) * LOG2_E
            new_top = tl.maximum(top, sink)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - base)
            sums_m = sums_m * shrink + tl.exp2(sink - base + WEIGHT_BITS)
            acc_low = acc_low * shrink[:, None]
            acc_high = acc_high * shrink[:, None]
        divisor = tl.where(sums_m == 0.0, 1.0, sums_m)[:, None]
        q_head = (sequence * n_kv_heads + head).to(tl.int64) * GROUP + rows_m % GROUP
        at = (q_head * n_new + token) * V.head_dim
        _store_half(out, at, acc_low / divisor, m_ok, 0, V)
        _store_half(out, at, acc_high / divisor, m_ok, 1, V)


@triton.jit(do_not_specialize=["n_parts", "n_new"])
def combine_parts(
    parts,
    tops,
    sums,
    sinks,
    out,
    n_parts,
    n_new,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Combine the parts of some values of one query row. Grid: T * group, B * Hkv, runs of COLUMNS values."""
    row = tl.program_id(0)
    pair = tl.program_id(1)
    n_rows = n_new * GROUP
    index = tl.arange(0, PARTS_PADDED)
    here = index < n_parts
    at = pair.to(tl.int64) * n_parts * n_rows + row + index * n_rows
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    begin(OVERLAPS)
    each = tl.load(tops + at, mask=here, other=float("-inf"))
    weights = tl.load(sums + at, mask=here, other=0.0)
    values = tl.load(
        parts + at[:, None] * HEAD_DIM + column[None, :], mask=here[:, None] & (column < HEAD_DIM)[None, :], other=0.0
    )
    top = tl.max(each, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + (pair % N_KV_HEADS) * GROUP + row % GROUP) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(each - base)
    total = tl.sum(share * weights, axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - base + WEIGHT_BITS)
    value = tl.sum(values * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    head = pair.to(tl.int64) * GROUP + row % GROUP
    tl.store(out + (head * n_new + row // GROUP) * HEAD_DIM + column, value, mask=column < HEAD_DIM)
