"""Tiles of stored rows in registers: raw bytes as they lie in memory, and their values. Triton device functions.

A tile is N rows of a side, as two tensors `[N, blocks * 16]`: lanes 0..15 of each block, and lanes 16..31. Loading and
decoding are apart, so that the bytes of the next tile are under way while one is computed.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from hybridkv.kernels.cuda.layout import BF16, BYTES, F16, F32, NIBBLES, NONE

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs the kernels; fixed when they are imported, as Triton does it."""

_NONE, _BYTES, _NIBBLES = tl.constexpr(NONE), tl.constexpr(BYTES), tl.constexpr(NIBBLES)
_F16, _BF16, _F32 = tl.constexpr(F16), tl.constexpr(BF16), tl.constexpr(F32)


@triton.jit
def find_slots(rows, ok, table, head, n_kv_heads, sequence, n_rows, PAGED: tl.constexpr, ROWS_LOG2: tl.constexpr):
    """Where rows of a sequence lie, counted in rows from the planes' begin: int64 `[N]`.

    `table` is the sequence's own; `n_rows` is the capacity, or the rows of a block.
    """
    if PAGED:
        block = tl.load(table + (rows >> ROWS_LOG2), mask=ok, other=0).to(tl.int64)
        return (block * n_kv_heads + head) * n_rows + (rows & ((1 << ROWS_LOG2) - 1))
    return (sequence.to(tl.int64) * n_kv_heads + head) * n_rows + rows


@triton.jit
def load_raw(main, pairs, bits, d, m, slots, ok, S: tl.constexpr):
    """Bytes and numbers of the rows at `slots` int64 `[N]`, zeros where not `ok`: what `decode_raw` takes."""
    block = tl.arange(0, S.blocks_padded)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    row = slots[:, None, None]
    here = ok[:, None, None]
    block_row = slots[:, None]
    block_here = ok[:, None]
    if S.n_blocks != S.blocks_padded:
        here = here & (block < S.n_blocks)
        block_here = block_here & (tl.arange(0, S.blocks_padded)[None, :] < S.n_blocks)
    column = block * 32 + lane
    if S.main == _NIBBLES:
        low = tl.load(main + row * (S.n_blocks * 16) + (block * 16 + lane), mask=here, other=0)
        high = low
    elif S.main == _NONE:
        low = tl.load(pairs + row * (S.n_blocks * 8) + (block * 8 + lane % 8), mask=here, other=0)
        high = low
    else:
        width: tl.constexpr = S.n_blocks * 32 if S.main == _BYTES and not S.row_scale else S.head_dim
        source = main
        if S.main == _F16:
            source = main.to(tl.pointer_type(tl.float16))
        elif S.main == _BF16:
            source = main.to(tl.pointer_type(tl.bfloat16))
        elif S.main == _F32:
            source = main.to(tl.pointer_type(tl.float32))
        low_here = here
        high_here = here
        if width % 32 != 0:
            low_here = here & (column < width)
            high_here = here & (column + 16 < width)
        low = tl.load(source + row * width + column, mask=low_here, other=0)
        high = tl.load(source + row * width + (column + 16), mask=high_here, other=0)
    pair = low
    if S.pairs >= 0 and S.main != _NONE:
        pair = tl.load(pairs + row * (S.n_blocks * 8) + (block * 8 + lane % 8), mask=here, other=0)
    at = block_row * S.n_blocks + tl.arange(0, S.blocks_padded)[None, :]
    bit = tl.zeros([1, 1], dtype=tl.int32)
    if S.bits >= 0:
        bit = tl.load(bits.to(tl.pointer_type(tl.int32)) + at, mask=block_here, other=0)
    scale = tl.zeros([1, 1], dtype=tl.float16)
    low_end = scale
    if S.row_scale:
        scale = tl.load(d.to(tl.pointer_type(tl.float32)) + block_row, mask=ok[:, None], other=0.0)
    elif S.main < _F16:
        scale = tl.load(d.to(tl.pointer_type(tl.float16)) + at, mask=block_here, other=0.0)
    if S.has_min:
        low_end = tl.load(m.to(tl.pointer_type(tl.float16)) + at, mask=block_here, other=0.0)
    return low, high, pair, bit, scale, low_end


@triton.jit
def decode_raw(low, high, pair, bit, scale, low_end, book, S: tl.constexpr):
    """Values of a tile: two tensors `[N, blocks * 16]`, float16 for codes, else in their own dtype."""
    if S.main < _F16:
        low_code, high_code = _codes(low, high, pair, bit, S)
        low_value = _value(low_code, scale, low_end, book, S)
        high_value = _value(high_code, scale, low_end, book, S)
    else:
        low_value = low
        high_value = high
    n: tl.constexpr = low.shape[0]
    width: tl.constexpr = S.blocks_padded * 16
    return tl.reshape(low_value, [n, width]), tl.reshape(high_value, [n, width])


@triton.jit
def _codes(low, high, pair, bit, S: tl.constexpr):
    """Codes of both halves, uint8, made unsigned."""
    lane = tl.arange(0, 16)[None, None, :]
    if S.main == _BYTES:
        low_code = low ^ S.flip
        high_code = high ^ S.flip
    elif S.main == _NIBBLES:
        low_code = low & 0xF
        high_code = low >> 4
    else:
        low_code = tl.zeros_like(low)
        high_code = low_code
    if S.pairs >= 0:
        place = (lane // 8 * 4).to(tl.uint8)
        fields = pair >> place
        low_code = low_code | ((fields & 3) << S.pairs)
        high_code = high_code | (((fields >> 2) & 3) << S.pairs)
    if S.bits >= 0:
        word = bit[:, :, None]
        low_code = low_code | (((word >> lane) & 1) << S.bits).to(tl.uint8)
        high_code = high_code | (((word >> (lane + 16)) & 1) << S.bits).to(tl.uint8)
    return low_code, high_code


@triton.jit
def _value(code, scale, low_end, book, S: tl.constexpr):
    """`value of the code * scale + minimum`, float16 `[N, blocks, 16]`."""
    if S.has_book:
        x = tl.load(book + code.to(tl.int32))
    else:
        # 0x6400 is the float16 1024, whose last bit counts 1: no conversion of integers.
        x = (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + S.offset)
    if S.row_scale:
        return (x.to(tl.float32) * scale[:, :, None]).to(tl.float16)
    x = x * scale[:, :, None]
    if S.has_min:
        x = x + low_end[:, :, None]
    return x
