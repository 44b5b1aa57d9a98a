"""Attention of one new token over one segment of quantized rows. A Triton kernel.

The general kernel leaves it to the compiler where values lie, and pays for it: what it decodes goes through shared
memory to the tensor cores, and query rows are padded to 16. Here a thread loads the very words whose values it must
hold when the tensor core multiplies, so that a value costs 2.5 to 4 instructions in all. The head dim and the rows may
be counted in any order, as long as both operands agree; so a thread takes whole words:

- Scores are keys `[16 rows, D]` times queries `[D, 8]`. Of its two rows a lane takes the words of a quarter.
- The result is values `[D, 16 rows]` times weights `[16 rows, 8]`. Of its four rows a lane takes an eighth, and joins
  halves of words of two rows: a register holds two rows of one dim.
- Scores become weights in the registers in which they were summed, and are turned by one instruction (`turn`).

Warps work on rows of their own, and meet once at the end. Numbers are those of the general kernel (attention.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridkv.kernels.cuda.generic import LOG2_E, WEIGHT_BITS
from hybridkv.kernels.cuda.layout import BYTES
from hybridkv.kernels.cuda.ptx import (
    keep_order,
    load_words,
    max_of_groups,
    max_of_places,
    of_columns,
    pack,
    store_four,
    sum_of_groups,
    sum_of_places,
    turn,
    unpack,
)
from hybridkv.kernels.cuda.register_codes import (
    add_values,
    load_rows,
    n_words_of,
    rows_of_keys,
    rows_of_values,
    scores_of,
)
from hybridkv.kernels.cuda.shared import get_four, put_four, shared_memory
from hybridkv.kernels.cuda.tiles import INTERPRETED, find_slots

_BYTES = tl.constexpr(BYTES)


@triton.jit
def _queries(q, stride_h, scale, center, group, place, GROUP: tl.constexpr, HAS_CENTER: tl.constexpr,
             WARPS: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Load the queries as `scores_of` takes them; per column of the scores a factor and the center's score."""
    n: tl.constexpr = n_words_of(K, 4)
    of_bytes: tl.constexpr = K.main == _BYTES
    per_word: tl.constexpr = 1 if of_bytes else 2
    values = ()
    largest = tl.zeros([WARPS * 32], tl.float32)
    offset = tl.zeros([WARPS * 32], tl.float32)
    for w in tl.static_range(n // 2):  # two words of a row are eight dims that follow each other, or twice that
        for h in tl.static_range(per_word):
            word = place * n + 2 * w
            dim = 4 * word if of_bytes else word // 4 * 32 + word % 4 * 4 + 16 * h
            eight = _load_eight(q + group * stride_h + dim, group, GROUP)
            values = values + eight
            for j in tl.static_range(8):
                largest = tl.maximum(largest, tl.abs(eight[j]), propagate_nan=tl.PropagateNan.ALL)
                if HAS_CENTER:
                    offset += eight[j] * tl.load(center + dim + j)
    largest = max_of_places(largest, WARPS)
    largest = tl.where(largest > 0.0, largest, 1.0)
    inverse = 1.0 / largest
    words = ()
    for w in tl.static_range(n):
        for h in tl.static_range(per_word):
            # Bytes 0 and 2 of the word, then 1 and 3.
            words = words + _four(values, inverse, (w // 2 * per_word + h) * 8 + w % 2 * 4)
    factor0, factor1 = of_columns(largest * scale, WARPS)
    offset0, offset1 = of_columns(sum_of_places(offset, WARPS) * scale, WARPS)
    return words, factor0, factor1, offset0, offset1


@triton.jit
def _four(x, factor, i: tl.constexpr):
    return pack(x[i] * factor, x[i + 2] * factor), pack(x[i + 1] * factor, x[i + 3] * factor)


@triton.jit
def _load_eight(at, row, end):
    """Load eight values at pointers to where 16 bytes may be read at once, float32; zeros unless `row < end`."""
    kind: tl.constexpr = at.dtype.element_ty
    words = at.to(tl.pointer_type(tl.int32))
    if kind == tl.float32:
        x = load_words(words, row, end, 8, 0)
        out = ()
        for i in tl.static_range(8):
            out = out + (x[i].to(tl.float32, bitcast=True),)
    else:
        x = load_words(words, row, end, 4, 0)
        out = ()
        for i in tl.static_range(4):
            if kind == tl.bfloat16:
                out = out + ((x[i] << 16).to(tl.float32, bitcast=True), (x[i] & -65536).to(tl.float32, bitcast=True))
            else:
                a, b = unpack(x[i])
                out = out + (a.to(tl.float32), b.to(tl.float32))
    return out


@triton.jit
def _of_warps(acc, top0, top1, sum0, sum1, warp, lane, WARPS: tl.constexpr, V: tl.constexpr):
    """Sum over the warps, which differ in what their numbers are relative to.

    Every warp returns its share of the accumulators: of four dims after each other, the numbers of a lane's two
    columns, eight after eight; their tops, and the sums of weights.
    """
    tiles: tl.constexpr = V.head_dim // 16
    mine: tl.constexpr = _runs_of_warp(V, WARPS)
    out = ()
    if INTERPRETED:
        most0, most1 = _over_warps(top0, WARPS, True), _over_warps(top1, WARPS, True)
        shrink0 = tl.exp2(top0 - tl.where(most0 == float("-inf"), 0.0, most0))
        shrink1 = tl.exp2(top1 - tl.where(most1 == float("-inf"), 0.0, most1))
        total0, total1 = _over_warps(sum0 * shrink0, WARPS, False), _over_warps(sum1 * shrink1, WARPS, False)
        for j in tl.static_range(mine):
            for i in tl.static_range(8):
                x = tl.zeros([WARPS * 32], tl.float32)
                for w in tl.static_range(WARPS):
                    k = _tile(w * mine + j, i // 4, V) * 4 + i % 4
                    if k < 4 * tiles:
                        y = _over_warps(acc[k] * (shrink0 if i % 2 == 0 else shrink1), WARPS, False)
                        x = tl.where(warp == w, y, x)
                out = out + (x,)
    else:
        # [warps, tiles, lanes] of four numbers, then [warps, lanes] of tops and sums.
        at = shared_memory(lane * 16, WARPS * (tiles + 1) * 512)
        for i in tl.static_range(tiles):
            put_four(at + warp * (tiles * 512), acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3], i * 512)
        put_four(at + warp * 512, top0, top1, sum0, sum1, WARPS * tiles * 512)
        tl.debug_barrier()
        most0, most1 = top0, top1
        numbers = ()
        for w in tl.static_range(WARPS):
            four = get_four(at, (WARPS * tiles + w) * 512)
            numbers = numbers + (four,)
            most0, most1 = tl.maximum(most0, four[0]), tl.maximum(most1, four[1])
        base0, base1 = tl.where(most0 == float("-inf"), 0.0, most0), tl.where(most1 == float("-inf"), 0.0, most1)
        total0, total1 = tl.zeros_like(top0), tl.zeros_like(top0)
        for _ in tl.static_range(8 * mine):
            out = out + (total0,)
        for w in tl.static_range(WARPS):
            shrink0, shrink1 = tl.exp2(numbers[w][0] - base0), tl.exp2(numbers[w][1] - base1)
            total0 += numbers[w][2] * shrink0
            total1 += numbers[w][3] * shrink1
            added = ()
            for j in tl.static_range(mine):
                for half in tl.static_range(2):
                    from_tile = tl.minimum(_tile(warp * mine + j, half, V), tiles - 1)
                    four = get_four(at + from_tile * 512, w * tiles * 512)
                    for i in tl.static_range(4):
                        added = added + (out[8 * j + 4 * half + i] + four[i] * (shrink0 if i % 2 == 0 else shrink1),)
            out = added
    return out, most0, most1, total0, total1


@triton.constexpr_function
def _runs_of_warp(side, warps):
    """Count how many of a lane's runs of four dims a warp stores."""
    return max(1, side.head_dim // 32 // warps)


@triton.jit
def _tile(run, half: tl.constexpr, S: tl.constexpr):
    """Select the accumulators of the first or the second two dims of a run of four: of a word, or of its nibbles."""
    return run * 2 + half if S.main == _BYTES else run // 2 * 4 + run % 2 + 2 * half


@triton.jit
def _over_warps(x, WARPS: tl.constexpr, LARGEST: tl.constexpr):
    y = tl.reshape(x, [WARPS, 32])
    y = tl.max(y, axis=0) if LARGEST else tl.sum(y, axis=0)
    return tl.reshape(tl.broadcast_to(y[None, :], [WARPS, 32]), [WARPS * 32])


_NUMBERS = ["n_batch", "n_kv_heads", "start", "length", "before", "total", "rows_k", "rows_v", "window", "n_blocks",
            "n_parts", "first_part", "share_rows", "stride_qb", "stride_qh"]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["starts", "lengths"])
def attend_one_token(
    q,
    out,
    tops,
    sums,
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
    n_batch,
    n_kv_heads,
    start,
    length,
    before,
    total,
    rows_k,
    rows_v,
    scale,
    softcap,
    window,
    n_parts,
    first_part,
    share_rows,
    stride_qb,
    stride_qh,
    K: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    SUBTILES: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    N_LENGTHS: tl.constexpr,
    SEGMENT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attend one part of the rows, for a KV head's group of at most 8 query heads, as `attend_segment` leaves it.

    Grid: shares, Hkv, B. A warp takes 16 * SUBTILES rows at a time.
    """
    # Numbers on the device must be there first; otherwise all that is made of arguments is made before the wait.
    reads_numbers: tl.constexpr = HAS_STARTS or N_LENGTHS > 0
    if OVERLAPS and reads_numbers:
        gdc_wait()
    share = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    thread = tl.arange(0, WARPS * 32)
    group = thread % 32 // 4
    place = thread % 4

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
    from_row = 0
    to_row = length
    if HAS_WINDOW:
        from_row = tl.maximum(0, total - before - window)
    step: tl.constexpr = WARPS * SUBTILES * 16
    tile: tl.constexpr = SUBTILES * 16  # shares are whole tiles of a warp: the last step may leave some warps idle
    if N_LENGTHS > 0 or HAS_WINDOW:
        share_rows = tl.cdiv(tl.cdiv(tl.maximum(to_row - from_row, 0), tile), tl.num_programs(0)) * tile
    from_row += share * share_rows
    to_row = tl.minimum(to_row, from_row + share_rows)

    warp_row = thread // 32 * (SUBTILES * 16)
    k_row = from_row + warp_row + group
    v_row = from_row + warp_row + place * 2
    k_deltas: tl.constexpr = rows_of_keys(SUBTILES)
    v_deltas: tl.constexpr = rows_of_values(SUBTILES)
    n_acc: tl.constexpr = V.head_dim // 4
    zero = tl.zeros([WARPS * 32], tl.float32)
    top0 = zero - float("inf")
    top1 = top0
    sum0, sum1 = zero, zero
    acc = ()
    for _ in tl.static_range(n_acc):
        acc = acc + (zero,)

    if OVERLAPS and not reads_numbers:
        gdc_wait()
    k_slot = find_slots(first_row + k_row, head, n_kv_heads, sequence, rows_k)
    k = load_rows(k_main, k_pairs, k_bits, k_d, k_m, k_slot, k_row, to_row, place, k_deltas, 4, K)
    v_slot = find_slots(first_row + v_row, head, n_kv_heads, sequence, rows_v)
    v = load_rows(v_main, v_pairs, v_bits, v_d, v_m, v_slot, v_row, to_row, group, v_deltas, 8, V)
    keep_order(thread)
    q_at = q + sequence.to(tl.int64) * stride_qb + (head * GROUP).to(tl.int64) * stride_qh
    center_at = center
    if HAS_CENTER:
        center_at = center + (sequence * n_kv_heads + head).to(tl.int64) * K.head_dim
    words, factor0, factor1, offset0, offset1 = _queries(
        q_at, stride_qh, scale, center_at, group, place, GROUP, HAS_CENTER, WARPS, K
    )
    if not HAS_SOFTCAP:
        factor0, factor1, offset0, offset1 = factor0 * LOG2_E, factor1 * LOG2_E, offset0 * LOG2_E, offset1 * LOG2_E

    for _ in range(from_row, to_row, step):
        scores = ()
        for sub in tl.static_range(SUBTILES):
            c0, c1, c2, c3 = scores_of(zero, k, sub, words, place, k_book, WARPS, K)
            near = k_row + 16 * sub < to_row
            far = k_row + (16 * sub + 8) < to_row
            c0, c1 = (
                _finish(c0, factor0, offset0, softcap, near, HAS_SOFTCAP, HAS_CENTER),
                _finish(c1, factor1, offset1, softcap, near, HAS_SOFTCAP, HAS_CENTER),
            )
            c2, c3 = (
                _finish(c2, factor0, offset0, softcap, far, HAS_SOFTCAP, HAS_CENTER),
                _finish(c3, factor1, offset1, softcap, far, HAS_SOFTCAP, HAS_CENTER),
            )
            scores = scores + (c0, c1, c2, c3)
        k_row += step
        k_slot = find_slots(first_row + k_row, head, n_kv_heads, sequence, rows_k)
        k = load_rows(k_main, k_pairs, k_bits, k_d, k_m, k_slot, k_row, to_row, place, k_deltas, 4, K)
        keep_order(thread)

        most0, most1 = tl.maximum(scores[0], scores[2]), tl.maximum(scores[1], scores[3])
        for sub in tl.static_range(1, SUBTILES):
            most0 = tl.maximum(most0, tl.maximum(scores[4 * sub], scores[4 * sub + 2]))
            most1 = tl.maximum(most1, tl.maximum(scores[4 * sub + 1], scores[4 * sub + 3]))
        new0 = tl.maximum(top0, max_of_groups(most0, WARPS))
        new1 = tl.maximum(top1, max_of_groups(most1, WARPS))
        base0, base1 = tl.where(new0 == float("-inf"), 0.0, new0), tl.where(new1 == float("-inf"), 0.0, new1)
        shrink0, shrink1 = tl.exp2(top0 - base0), tl.exp2(top1 - base1)
        top0, top1 = new0, new1
        sum0, sum1 = sum0 * shrink0, sum1 * shrink1
        base0, base1 = base0 - WEIGHT_BITS, base1 - WEIGHT_BITS
        shrunk = ()
        for i in tl.static_range(n_acc):
            shrunk = shrunk + (acc[i] * (shrink0 if i % 2 == 0 else shrink1),)
        acc = shrunk
        for sub in tl.static_range(SUBTILES):
            w0, w1 = tl.exp2(scores[4 * sub] - base0), tl.exp2(scores[4 * sub + 1] - base1)
            w2, w3 = tl.exp2(scores[4 * sub + 2] - base0), tl.exp2(scores[4 * sub + 3] - base1)
            sum0, sum1 = sum0 + (w0 + w2), sum1 + (w1 + w3)
            acc = add_values(acc, v, sub, turn(w0, w1, WARPS), turn(w2, w3, WARPS), group, v_book, WARPS, V)
        v_row += step
        v_slot = find_slots(first_row + v_row, head, n_kv_heads, sequence, rows_v)
        v = load_rows(v_main, v_pairs, v_bits, v_d, v_m, v_slot, v_row, to_row, group, v_deltas, 8, V)

    if OVERLAPS:
        gdc_launch_dependents()
    sum0, sum1 = sum_of_groups(sum0, WARPS), sum_of_groups(sum1, WARPS)
    warp, lane = thread // 32, thread % 32
    values, top0, top1, sum0, sum1 = _of_warps(acc, top0, top1, sum0, sum1, warp, lane, WARPS, V)
    part = (sequence * n_kv_heads + head).to(tl.int64) * n_parts + first_part + share
    column = place * 2
    to = part * GROUP + column
    tl.store(tops + to, top0, mask=(thread < 4) & (column < GROUP))
    tl.store(tops + to + 1, top1, mask=(thread < 4) & (column + 1 < GROUP))
    tl.store(sums + to, sum0, mask=(thread < 4) & (column < GROUP))
    tl.store(sums + to + 1, sum1, mask=(thread < 4) & (column + 1 < GROUP))
    mine: tl.constexpr = _runs_of_warp(V, WARPS)
    n_words: tl.constexpr = n_words_of(V, 8)
    for j in tl.static_range(mine):
        run = warp * mine + j
        word = group * n_words + (run if V.main == _BYTES else run // 2)
        dim = 4 * word if V.main == _BYTES else word // 4 * 32 + word % 4 * 4 + run % 2 * 16
        here = (run < V.head_dim // 32) & (column < GROUP)
        out_at = out + to * V.head_dim + dim
        store_four(out_at, values[8 * j], values[8 * j + 2], values[8 * j + 4], values[8 * j + 6], here)
        here = here & (column + 1 < GROUP)
        out_at += V.head_dim
        store_four(out_at, values[8 * j + 1], values[8 * j + 3], values[8 * j + 5], values[8 * j + 7], here)


@triton.jit
def _finish(score, factor, offset, softcap, here, HAS_SOFTCAP: tl.constexpr, HAS_CENTER: tl.constexpr):
    """Finish a score: in powers of 2, or -inf where no row is."""
    score = score * factor
    if HAS_CENTER:
        score += offset
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2_E / softcap)) + 1.0)
        score = tanh * (softcap * LOG2_E)
    return tl.where(here, score, float("-inf"))
