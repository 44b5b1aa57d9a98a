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

# Of $4, bytes of codes of 4 bits, v and w get the entries of a table ($5 to $8) for the nibbles of the lower and the
# upper two bytes: chosen by 3 bits of a nibble (prmt), from both halves of the table, and then by the fourth bit.
LOOK_UP_NIBBLES = """
    {
    .reg .b32 t, u, v, w, x, y;
    and.b32 t, $4, 0x77777777;
    shr.b32 u, $4, 1;
    and.b32 u, u, 0x44444444;
    or.b32 u, u, 0x32103210;
    prmt.b32 x, $5, $6, t;
    prmt.b32 y, $7, $8, t;
    prmt.b32 v, x, y, u;
    shr.b32 t, t, 16;
    shr.b32 u, u, 16;
    prmt.b32 x, $5, $6, t;
    prmt.b32 y, $7, $8, t;
    prmt.b32 w, x, y, u;
"""
_LOOK_UP_16 = tl.constexpr(
    LOOK_UP_NIBBLES
    + """
    mov.b32 t, 0;
    prmt.b32 x, v, w, 0x5410;
    prmt.b32 y, v, w, 0x7632;
    prmt.b32 $0, x, t, 0x4240;
    prmt.b32 $1, y, t, 0x4240;
    prmt.b32 $2, x, t, 0x4341;
    prmt.b32 $3, y, t, 0x4341;
    }
    """
)
_LOOK_UP_8 = tl.constexpr(
    "{\n.reg .b32 t, z;\nmov.b32 z, 0;\n"
    + "".join(
        f"shr.b32 t, ${4 + i}, 12;\nor.b32 t, t, ${4 + i};\nprmt.b32 t, $8, $9, t;\nprmt.b32 ${i}, t, z, 0x4140;\n"
        for i in range(4)
    )
    + "}"
)

_NONE, _BYTES, _NIBBLES = tl.constexpr(NONE), tl.constexpr(BYTES), tl.constexpr(NIBBLES)
_F16, _BF16, _F32 = tl.constexpr(F16), tl.constexpr(BF16), tl.constexpr(F32)


@triton.jit
def find_slots(rows, head, n_kv_heads, sequence, n_rows):
    """Find where rows of a sequence lie, counted from the planes' begin: int64 `[N]`."""
    return (sequence.to(tl.int64) * n_kv_heads + head) * n_rows + rows


@triton.jit
def load_raw(main, pairs, bits, d, m, slots, ok, S: tl.constexpr):
    """Load words and numbers of the rows at `slots` int64 `[N]`, zeros where not `ok`: what `decode_raw` takes.

    Codes are int32 words of four bytes, `[N, blocks, 4]` for 16 lanes: as bytes, each would take a register.
    """
    n: tl.constexpr = slots.shape[0]
    block = tl.arange(0, S.blocks_padded)
    at = slots[:, None] * S.n_blocks + block[None, :]
    block_here = ok[:, None]
    if S.n_blocks != S.blocks_padded:
        block_here = block_here & (block < S.n_blocks)[None, :]
    bit = tl.zeros([1, 1], dtype=tl.int32)
    scale = tl.zeros([1, 1], dtype=tl.float16)
    low_end = scale
    if S.main >= _F16:
        column = tl.arange(0, S.blocks_padded * 16)[None, :]
        column = column // 16 * 32 + column % 16
        low_here = ok[:, None]
        high_here = low_here
        if S.head_dim != S.blocks_padded * 32:
            low_here = low_here & (column < S.head_dim)
            high_here = high_here & (column + 16 < S.head_dim)
        source = main.to(tl.pointer_type(tl.float32))
        if S.main == _F16:
            source = main.to(tl.pointer_type(tl.float16))
        elif S.main == _BF16:
            source = main.to(tl.pointer_type(tl.bfloat16))
        at = slots[:, None] * S.head_dim + column
        low = tl.load(source + at, mask=low_here, other=0)
        high = tl.load(source + (at + 16), mask=high_here, other=0)
        pair = low
    else:
        if S.main == _BYTES:
            width: tl.constexpr = S.head_dim // 4 if S.row_scale else S.n_blocks * 8
            column = tl.arange(0, S.blocks_padded * 4)
            column = column // 4 * 8 + column % 4
            low = tl.reshape(_load_words(main, slots, ok, column, width), [n, S.blocks_padded, 4])
            high = tl.reshape(_load_words(main, slots, ok, column + 4, width), [n, S.blocks_padded, 4])
        elif S.main == _NIBBLES:
            words = _load_words(main, slots, ok, tl.arange(0, S.blocks_padded * 4), S.n_blocks * 4)
            low = tl.reshape(words, [n, S.blocks_padded, 4])
            high = low
        else:
            low = _load_pairs(pairs, slots, ok, S)
            high = low
        pair = low
        if S.pairs >= 0 and S.main != _NONE:
            pair = _load_pairs(pairs, slots, ok, S)
        if S.bits >= 0:
            bit = tl.load(bits.to(tl.pointer_type(tl.int32)) + at, mask=block_here, other=0)
        if S.row_scale:
            scale = tl.load(d.to(tl.pointer_type(tl.float32)) + slots[:, None], mask=ok[:, None], other=0.0)
        else:
            scale = tl.load(d.to(tl.pointer_type(tl.float16)) + at, mask=block_here, other=0.0)
    if S.has_min:
        low_end = tl.load(m.to(tl.pointer_type(tl.float16)) + at, mask=block_here, other=0.0)
    return low, high, pair, bit, scale, low_end


@triton.jit
def _load_words(plane, slots, ok, columns, WIDTH: tl.constexpr):
    """Load int32 words of rows, `[N, columns]`: in three dimensions, Triton 3.6 gives neighbours to distant threads."""
    here = ok[:, None] & (columns < WIDTH)[None, :]
    at = slots[:, None] * WIDTH + columns[None, :]
    return tl.load(plane.to(tl.pointer_type(tl.int32)) + at, mask=here, other=0)


@triton.jit
def _load_pairs(pairs, slots, ok, S: tl.constexpr):
    """Load a block's two words of pairs, twice: int32 `[N, blocks, 4]`. Lanes 8..15 have the bytes of lanes 0..7."""
    words = _load_words(pairs, slots, ok, tl.arange(0, S.blocks_padded * 2), S.n_blocks * 2)
    n: tl.constexpr = words.shape[0]
    twice = tl.broadcast_to(tl.reshape(words, [n, S.blocks_padded, 1, 2]), [n, S.blocks_padded, 2, 2])
    return tl.reshape(twice, [n, S.blocks_padded, 4])


@triton.jit
def lanes(half: tl.constexpr, S: tl.constexpr):
    """Return the row's value that each column of a decoded tile stands for, int32 `[blocks * 16]`.

    Codes are taken out of words two at a time, bytes 0 and 2, then 1 and 3: so they come in that order.
    """
    column = tl.arange(0, S.blocks_padded * 16)
    lane = column % 16
    if S.main < _F16:
        lane = lane // 4 * 4 + lane % 2 * 2 + lane // 2 % 2
    return column // 16 * 32 + half * 16 + lane


@triton.jit
def decode_raw(low, high, pair, bit, scale, low_end, book, FOR_WGMMA: tl.constexpr, S: tl.constexpr,
               IN_ORDER: tl.constexpr = False):  # fmt: skip
    """Decode a tile: two tensors `[N, blocks * 16]`, float16 for codes, else in their own dtype.

    They come as `lanes` has it, or IN_ORDER.
    """
    if S.main >= _F16:
        low_values = low
        high_values = high
    else:
        a, b, c, d = _codes(low, high, pair, bit, S)
        if S.has_book:
            a, b, c, d = entries(a, b, c, d, low, book, S)
        low_values = _values(a, b, 0, scale, low_end, IN_ORDER, S)
        high_values = _values(c, d, 1, scale, low_end, IN_ORDER, S)
    if FOR_WGMMA:
        low_values, high_values = _as_they_are(low_values), _as_they_are(high_values)
    return low_values, high_values


@triton.jit
def _as_they_are(x):
    """Copy x as a border: for a wgmma, Triton 3.6 would move the reshape behind the shared-memory store, and fail."""
    if INTERPRETED:
        y = x
    elif x.dtype == tl.float32:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)
    else:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    return y


@triton.jit
def _codes(low, high, pair, bit, S: tl.constexpr):
    """Return the codes, two to a word, under the masks of `RowFormat`: int32 `[N, blocks, 4]`.

    Of lanes 0..15 those of bytes 0 and 2, and of bytes 1 and 3; then the same of lanes 16..31.
    """
    word = tl.arange(0, 4)[None, None, :]
    if S.main == _BYTES:
        a, b, c, d = low, low >> 8, high, high >> 8
    elif S.high_factor == 16:  # those of lanes 16..31 stay where they are, and so 16 times as large
        a, b, c, d = low, low >> 8, low, low >> 8
    elif S.main == _NIBBLES:
        a, b = low & 0x000F000F, (low >> 8) & 0x000F000F
        c, d = (low >> 4) & 0x000F000F, (low >> 12) & 0x000F000F
    else:
        a = tl.zeros_like(low)
        b, c, d = a, a, a
    if S.pairs >= 0:
        fields = pair >> (word // 2 * 4)
        a = a | ((fields & 0x00030003) << S.pairs)
        b = b | (((fields >> 8) & 0x00030003) << S.pairs)
        c = c | (((fields >> 2) & 0x00030003) << S.pairs)
        d = d | (((fields >> 10) & 0x00030003) << S.pairs)
    if S.bits >= 0:
        fields = bit[:, :, None] >> (word * 4)
        a = a | (((fields & 1) | ((fields & 4) << 14)) << S.bits)
        b = b | ((((fields >> 1) & 1) | ((fields & 8) << 13)) << S.bits)
        fields = fields >> 16
        c = c | (((fields & 1) | ((fields & 4) << 14)) << S.bits)
        d = d | ((((fields >> 1) & 1) | ((fields & 8) << 13)) << S.bits)
    return a, b, c, d


@triton.jit
def _values(even, odd, half: tl.constexpr, scale, low_end, IN_ORDER: tl.constexpr, S: tl.constexpr):
    """Compute `(code / factor - offset) * scale + minimum` of 16 lanes a block: float16 `[N, blocks * 16]`."""
    n: tl.constexpr = even.shape[0]
    a, b = _two_values(even, half, scale, low_end, S)
    c, d = _two_values(odd, half, scale, low_end, S)
    values = tl.join(tl.join(a, b), tl.join(c, d)) if IN_ORDER else tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(values, [n, S.blocks_padded * 16])


@triton.jit
def _two_values(words, half: tl.constexpr, scale, low_end, S: tl.constexpr):
    """Decode the codes in the lower and in the upper halves of words.

    0x6400 is the float16 1024, whose last bit counts 1: no conversion of integers. The compiler takes the halves of a
    word apart before it computes; the instructions keep two in a register.
    """
    d = scale[:, :, None]
    m = low_end[:, :, None]
    if INTERPRETED or S.row_scale:
        mask: tl.constexpr = S.low_mask if half == 0 else S.high_mask
        factor: tl.constexpr = 1 if half == 0 else S.high_factor
        words = (words & mask) ^ S.magic
        a = _one_value(words, factor, d, m, S)
        b = _one_value(words >> 16, factor, d, m, S)
    else:
        text: tl.constexpr = S.low_values if half == 0 else S.high_values
        if S.has_min:
            a, b = tl.inline_asm_elementwise(
                text, "=h,=h,r,h,h", [words, d, m], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
            )
        else:
            a, b = tl.inline_asm_elementwise(
                text, "=h,=h,r,h", [words, d], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
            )
    return a, b


@triton.jit
def _one_value(words, factor: tl.constexpr, d, m, S: tl.constexpr):
    x = words.to(tl.int16).to(tl.float16, bitcast=True) * (1.0 / factor) - (1024.0 / factor + S.offset)
    x = (x.to(tl.float32) * d).to(tl.float16) if S.row_scale else x * d
    if S.has_min:
        x = x + m
    return x


@triton.jit
def entries(a, b, c, d, words, book, S: tl.constexpr):
    """Look codes up in the codebook, laid out like these; as bytes, 128 higher."""
    if INTERPRETED:
        a, b = _entries_from_memory(a, book), _entries_from_memory(b, book)
        c, d = _entries_from_memory(c, book), _entries_from_memory(d, book)
    elif S.main == _NIBBLES and S.bits < 0 and S.pairs < 0:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOOK_UP_16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, S.table[0], S.table[1], S.table[2], S.table[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOOK_UP_8,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
            [a, b, c, d, S.table[0], S.table[1]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d


@triton.jit
def _entries_from_memory(codes, book):
    """Look the codes up in memory, as the instructions give them where there are any."""
    even = tl.load(book + (codes & 0xFF)).to(tl.int32) + 128
    odd = tl.load(book + ((codes >> 16) & 0xFF)).to(tl.int32) + 128
    return even | (odd << 16)
