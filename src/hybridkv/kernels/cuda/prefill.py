"""Prompts over quantized rows: a window of rows is unpacked at a time, and torch's attention runs over it.

Unpacking reads and writes memory once; attention of many queries over a row costs hundreds of times that, so what is
unpacked may as well go to the fastest kernel there is. The scratch is bounded by `SCRATCH_BYTES`: a longer history is
attended window by window, and the windows' results are summed by their weights, which the kernels return too.
What is attended is what is stored, the newest rows included.

Takes plain cases: no mask, window, cap, sinks or centers, rows that the host knows, types that decode to float16.
Called by launch.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, is_flash_attention_available

from hybridkv.kernels.case import AttentionParams, KVView, Segment
from hybridkv.kernels.cuda.card import facts_of, is_rehearsed
from hybridkv.kernels.cuda.layout import BF16, F32, memory, row_format
from hybridkv.kernels.cuda.overlap import begin, overlapping
from hybridkv.kernels.cuda.tiles import decode_raw, find_slots, load_raw

SCRATCH_BYTES = 64 << 20
"""Unpacked rows of K and V that exist at a time."""
MIN_NEW_TOKENS = 64
"""With fewer, unpacking the history costs more than the faster kernel gains."""
ROWS = 16
"""Rows that a program unpacks."""
ELEMENTS = 4096
"""Numbers that a program rounds or sums."""


@triton.jit
def _unpack(main, pairs, bits, d, m, book, out, pair, n_kv_heads, start, n_rows, capacity, to_row, to_rows,
            S: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < n_rows
    sequence, head = pair // n_kv_heads, pair % n_kv_heads
    slots = find_slots(start + rows, head, n_kv_heads, sequence, capacity)
    r0, r1, r2, r3, r4, r5 = load_raw(main, pairs, bits, d, m, slots, ok, S)
    low, high = decode_raw(r0, r1, r2, r3, r4, r5, book, False, S, IN_ORDER=True)
    column = tl.arange(0, S.blocks_padded * 16)
    column = column // 16 * 32 + column % 16
    at = out + (pair.to(tl.int64) * to_rows + to_row + rows)[:, None] * S.head_dim + column[None, :]
    tl.store(at, low.to(tl.float16), mask=ok[:, None] & (column < S.head_dim)[None, :])
    tl.store(at + 16, high.to(tl.float16), mask=ok[:, None] & (column + 16 < S.head_dim)[None, :])


@triton.jit(do_not_specialize=["n_kv_heads", "start", "n_rows", "k_capacity", "v_capacity", "to_row", "to_rows"])
def unpack_rows(
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
    k_out,
    v_out,
    n_kv_heads,
    start,
    n_rows,
    k_capacity,
    v_capacity,
    to_row,
    to_rows,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Unpack rows `[start, start + n_rows)` to float16, into rows `[to_row, ...)` of `[B, Hkv, to_rows, D]` each.

    Grid: tiles of rows, B * Hkv, K and V.
    """
    pair = tl.program_id(1)
    begin(OVERLAPS)
    if tl.program_id(2) == 0:
        _unpack(
            k_main, k_pairs, k_bits, k_d, k_m, k_book, k_out, pair, n_kv_heads, start, n_rows, k_capacity, to_row,
            to_rows, K, BLOCK_N,
        )  # fmt: skip
    else:
        _unpack(
            v_main, v_pairs, v_bits, v_d, v_m, v_book, v_out, pair, n_kv_heads, start, n_rows, v_capacity, to_row,
            to_rows, V, BLOCK_N,
        )  # fmt: skip


@triton.jit
def round_rows(x, out, n, OVERLAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Round `n` values to the dtype of `out`, 16 bytes at a time, where torch takes one. Grid: runs of values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin(OVERLAPS)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def add_part(total, weight, part, part_weight, out, out_weight, width, n, BLOCK: tl.constexpr):
    """Add two attentions over different rows to `out`, and give the logarithm of its weight. Grid: runs of numbers.

    `total` and `part` are `[queries, width]`, `n` numbers in all.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    query = at // width
    a = tl.load(weight + query, mask=ok, other=0.0)
    b = tl.load(part_weight + query, mask=ok, other=0.0)
    top = tl.maximum(a, b)
    share_a, share_b = tl.exp(a - top), tl.exp(b - top)
    x = tl.load(total + at, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(part + at, mask=ok, other=0.0).to(tl.float32)
    value = (x * share_a + y * share_b) / (share_a + share_b)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=ok)
    tl.store(out_weight + query, top + tl.log(share_a + share_b), mask=ok & (at % width == 0))


def available(device: torch.device) -> bool:
    """Check whether torch has a kernel of its own for the device."""
    card = facts_of(device)
    return card is not None and card.capability >= (8, 0) and (is_rehearsed() or is_flash_attention_available())


def takes(q: Tensor, view: KVView, params: AttentionParams) -> bool:
    """Check whether this module attends a call."""
    plain = params.mask is None and params.softcap is None and params.sinks is None and view.window is None
    on_host = not view.device_rows and all(s.center is None for s in view.segments)
    dims = view.head_dim_k == view.head_dim_v and view.head_dim_k % 8 == 0 and view.head_dim_k <= 256
    sides = [row_format(f.name, view.head_dim_k) for s in view.segments for f in (s.format_k, s.format_v)]
    float16 = all(s.main not in (F32, BF16) for s in sides)
    return plain and on_host and dims and float16 and q.shape[2] >= MIN_NEW_TOKENS and view.length >= q.shape[2]


def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Attend q `[B, Hq, T, D]`; float16, of the same shape."""
    n_batch, _, n_new, head_dim = q.shape
    n_kv_heads = int(view.segments[0].k[0].shape[1])
    q = _as_float16(q)
    n_seen = view.length - n_new  # by every query; the rest is triangular
    most = max(ROWS, SCRATCH_BYTES // (4 * n_batch * n_kv_heads * head_dim) // ROWS * ROWS)
    bounds = [*range(0, n_seen, most), n_seen] if n_seen else []
    total: Tensor | None = None
    weight = q.new_empty(0)
    for first, end in [*zip(bounds, bounds[1:], strict=False), (n_seen, view.length)]:
        k, v = (q.new_empty(n_batch, n_kv_heads, end - first, head_dim) for _ in range(2))
        _unpack_window(view, first, end, k, v)
        part, part_weight = dense(q, k, v, params.scale, causal=first == n_seen)
        del k, v
        if total is None:
            total, weight = part, part_weight
        else:
            last = end == view.length
            total, weight = _sum(total, weight, part, part_weight, torch.float16 if last else torch.float32)
    assert total is not None
    return total


def _unpack_window(view: KVView, first: int, end: int, k: Tensor, v: Tensor) -> None:
    """Unpack the view's rows `[first, end)` to k and v, float16 `[B, Hkv, end - first, D]`."""
    n_batch, n_kv_heads, _, head_dim = k.shape
    for segment, row, to_row, n_rows in _runs(view, first, end):
        unpack_rows[(-(-n_rows // ROWS), n_batch * n_kv_heads, 2)](
            *memory(segment.format_k, segment.k),
            *memory(segment.format_v, segment.v),
            k,
            v,
            n_kv_heads,
            row,
            n_rows,
            segment.k[0].shape[2],
            segment.v[0].shape[2],
            to_row,
            end - first,
            K=row_format(segment.format_k.name, head_dim),
            V=row_format(segment.format_v.name, head_dim),
            BLOCK_N=ROWS,
            num_warps=4,
            enable_fp_fusion=True,
            **overlapping(k.device),
        )


def _as_float16(q: Tensor) -> Tensor:
    if q.dtype == torch.float16:
        return q
    q = q.contiguous()
    out = torch.empty(q.shape, dtype=torch.float16, device=q.device)
    round_rows[(-(-q.numel() // ELEMENTS),)](q, out, q.numel(), BLOCK=ELEMENTS, num_warps=8, **overlapping(q.device))
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend by torch in float16, `[B, Hq, T, D]`; give the logarithm of each query's weight, float32 `[B, Hq, T]`.

    cuDNN's kernel is the faster one where its tiles of 128 queries fill half of the multiprocessors. The operators are
    those behind scaled_dot_product_attention, which keeps the weights to itself.
    """
    if is_rehearsed():
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:3], dtype=torch.float32)
    card = facts_of(q.device)
    assert card is not None
    tiles = q.shape[0] * q.shape[1] * -(-q.shape[2] // 128)
    many = 2 * tiles >= card.n_multiprocessors - 4
    if many and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, causal, True)):
        out, weight = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )[:2]
    else:
        out, weight = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out, weight.reshape(q.shape[:3])


def _runs(view: KVView, first: int, end: int) -> Iterator[tuple[Segment, int, int, int]]:
    """Yield rows of segments that make up the view's rows `[first, end)`: from where, to where, and how many."""
    before = 0
    for segment in view.segments:
        a, b = max(first, before), min(end, before + segment.length)
        if a < b:
            yield segment, segment.start + a - before, a - first, b - a
        before += segment.length


def _sum(total: Tensor, weight: Tensor, part: Tensor, part_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Add two parts to one of this dtype, and give its weight."""
    out = torch.empty(total.shape, dtype=dtype, device=total.device)
    out_weight = torch.empty_like(weight)
    add_part[(-(-out.numel() // ELEMENTS),)](
        total.contiguous(),
        weight.contiguous(),
        part.contiguous(),
        part_weight.contiguous(),
        out,
        out_weight,
        out.shape[3],
        out.numel(),
        BLOCK=ELEMENTS,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out, out_weight
