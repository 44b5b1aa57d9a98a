"""Rows of codes, word by word, in the registers from which a tensor core multiplies them. Triton device functions.

A row is shared among the lanes of a warp: four of them for keys, eight for values, each with whole words that follow
each other. Codes become float16 in the register in which they were loaded, two at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.layout import BYTES, NIBBLES, NONE
from hybridkv.kernels.cuda.ptx import (
    high_halves,
    load_half,
    load_words,
    low_halves,
    multiply,
    two_values,
)
from hybridkv.kernels.cuda.tiles import entries

_BYTES, _NIBBLES, _NONE = tl.constexpr(BYTES), tl.constexpr(NIBBLES), tl.constexpr(NONE)


@triton.constexpr_function
def n_words_of(side, parts):
    """Count the words of a row's main plane that one of `parts` lanes takes; nibbles, if there is none."""
    return side.head_dim // parts // (4 if side.main == BYTES else 8)


@triton.constexpr_function
def _n_blocks(side, parts):
    return max(1, side.head_dim // parts // 32)


@triton.constexpr_function
def _n_pairs(side, parts):
    """Count the words of its pairs: two of a block, which serve a half of it each, or one if it takes a quarter."""
    n_values = side.head_dim // parts
    return 1 if n_values == 8 else 2 * max(1, n_values // 32)


@triton.constexpr_function
def rows_of_keys(subtiles):
    """List a lane's rows, counted from its first: where fragments of 16 x 16 have them."""
    return tuple(8 * i for i in range(2 * subtiles))


@triton.constexpr_function
def rows_of_values(subtiles):
    """List a lane's rows of values: pairs that follow each other."""
    return tuple(8 * (i // 2) + i % 2 for i in range(4 * subtiles))


@triton.jit
def load_rows(main, pairs, bits, d, m, slot, rows, end, part, DELTAS: tl.constexpr, PARTS: tl.constexpr,
              S: tl.constexpr):  # fmt: skip
    """Load words of the rows `rows + DELTAS`, of one of PARTS of each; per plane a tuple, row after row.

    `slot` is where `rows` lie; the others follow them as they are counted.
    """
    x, p, b, s, low = (), (), (), (), ()
    for i in tl.static_range(len(DELTAS)):
        x1, p1, b1, s1, low1 = _load_row(
            main, pairs, bits, d, m, slot, rows + DELTAS[i], end, part, DELTAS[i], PARTS, S
        )  # fmt: skip
        x, p, b, s, low = x + x1, p + p1, b + b1, s + s1, low + low1
    return x, p, b, s, low


@triton.jit
def _load_row(main, pairs, bits, d, m, slot, row, end, part, DELTA: tl.constexpr, PARTS: tl.constexpr,
              S: tl.constexpr):  # fmt: skip
    n_words: tl.constexpr = n_words_of(S, PARTS)
    n_blocks: tl.constexpr = _n_blocks(S, PARTS)
    n_pairs: tl.constexpr = _n_pairs(S, PARTS)
    first = part * n_words  # in words of nibbles, four to a block; of bytes, eight
    block = first // 8 if S.main == _BYTES else first // 4
    x, p, b, low = (), (), (), ()
    # Up to four words of a lane and its neighbours' are whole sectors of memory, and need no place in the first cache.
    if S.main == _BYTES:
        at = main.to(tl.pointer_type(tl.int32)) + (slot * (S.head_dim // 4) + first)
        x = load_words(at, row, end, n_words, DELTA * (S.head_dim // 4), n_words <= 4)
    elif S.main == _NIBBLES:
        at = main.to(tl.pointer_type(tl.int32)) + (slot * (S.head_dim // 8) + first)
        x = load_words(at, row, end, n_words, DELTA * (S.head_dim // 8), n_words <= 4)
    if S.pairs >= 0:
        inside = first % 2 if n_pairs == 1 else 0
        at = pairs.to(tl.pointer_type(tl.int32)) + (slot * (S.head_dim // 16) + block * 2 + inside)
        p = load_words(at, row, end, n_pairs, DELTA * (S.head_dim // 16))
    if S.bits >= 0:
        at = bits.to(tl.pointer_type(tl.int32)) + (slot * S.n_blocks + block)
        b = load_words(at, row, end, n_blocks, DELTA * S.n_blocks)
    s = _load_numbers(d, slot * S.n_blocks + block, row, end, n_blocks, DELTA * S.n_blocks)
    if S.has_min:
        low = _load_numbers(m, slot * S.n_blocks + block, row, end, n_blocks, DELTA * S.n_blocks)
    return x, p, b, s, low


@triton.jit
def _load_numbers(plane, at, row, end, N: tl.constexpr, OFFSET: tl.constexpr):
    """Load N float16 (1 or 2), each in the lower half of a word, or both in one."""
    if N == 1:
        x = (load_half(plane.to(tl.pointer_type(tl.int16)) + at, row, end, OFFSET),)
    else:
        x = load_words(plane.to(tl.pointer_type(tl.int32)) + at // 2, row, end, 1, OFFSET // 2)
    return x


@triton.jit
def _values_of(x, pair, bit, d, m, book, S: tl.constexpr):
    """Decode the codes in a word to values, two to a word, in a tuple.

    Of bytes: those of bytes 0 and 2, and of 1 and 3. Of nibbles: the same of the lower nibbles, then of the upper.
    `pair` and `bit` have their fields where the word's are: of byte i at bits 8i, and at bits i and 16 + i.
    """
    if S.main == _BYTES:
        even = two_values(x, x, d, m, S.low_mask, 0, S.magic, 1024 + S.offset, S.has_min)
        odd = two_values(x >> 8, x, d, m, S.low_mask, 0, S.magic, 1024 + S.offset, S.has_min)
        values = (even, odd)
    else:
        low_minus: tl.constexpr = 1024 + S.offset
        high_minus: tl.constexpr = 1024 + S.offset if S.has_book else 64 + S.offset
        if S.has_book:
            a, b, c, e = _codes(x, pair, bit, S)
            a, b, c, e = entries(a, b, c, e, x, book, S)
            w0 = two_values(a, a, d, m, 0x00FF00FF, 0, 0x64006400, low_minus, S.has_min)
            w1 = two_values(b, a, d, m, 0x00FF00FF, 0, 0x64006400, low_minus, S.has_min)
            w2 = two_values(c, a, d, m, 0x00FF00FF, 0, 0x64006400, high_minus, S.has_min)
            w3 = two_values(e, a, d, m, 0x00FF00FF, 0, 0x64006400, high_minus, S.has_min)
        else:
            # The upper nibbles stay where they are. More bits of a code go above them, and above the lower ones.
            a, b, c, e = x, x, x, x
            low_more: tl.constexpr = 0x00300030 if S.pairs >= 0 else (0x00100010 if S.bits >= 0 else 0)
            high_more: tl.constexpr = low_more * 16
            if S.pairs >= 0:
                a, b, c, e = pair << 4, pair >> 4, pair << 6, pair >> 2
            elif S.bits >= 0:
                a = (bit << 4) & 0x10 | (bit << 18) & 0x00100000
                b = (bit << 3) & 0x10 | (bit << 17) & 0x00100000
                c = (bit >> 8) & 0x100 | (bit << 6) & 0x01000000
                e = (bit >> 9) & 0x100 | (bit << 5) & 0x01000000
            y = x >> 8
            w0 = two_values(x, a, d, m, 0x000F000F, low_more, 0x64006400, low_minus, S.has_min)
            w1 = two_values(y, b, d, m, 0x000F000F, low_more, 0x64006400, low_minus, S.has_min)
            w2 = two_values(x, c, d, m, 0x00F000F0, high_more, 0x54005400, high_minus, S.has_min)
            w3 = two_values(y, e, d, m, 0x00F000F0, high_more, 0x54005400, high_minus, S.has_min)
        values = (w0, w1, w2, w3)
    return values


@triton.jit
def _codes(x, pair, bit, S: tl.constexpr):
    """Look up the codes of formats with a codebook, two to a word, in the order of `_values_of`."""
    if S.main == _NIBBLES:
        a, b, c, e = x & 0x000F000F, (x >> 8) & 0x000F000F, (x >> 4) & 0x000F000F, (x >> 12) & 0x000F000F
    else:
        a = (pair & 0x00030003) << S.pairs
        b = ((pair >> 8) & 0x00030003) << S.pairs
        c = ((pair >> 2) & 0x00030003) << S.pairs
        e = ((pair >> 10) & 0x00030003) << S.pairs
    if S.bits >= 0:
        a = a | (((bit & 1) | ((bit & 4) << 14)) << S.bits)
        b = b | ((((bit >> 1) & 1) | ((bit & 8) << 13)) << S.bits)
        f = bit >> 16
        c = c | (((f & 1) | ((f & 4) << 14)) << S.bits)
        e = e | ((((f >> 1) & 1) | ((f & 8) << 13)) << S.bits)
    return a, b, c, e


@triton.jit
def _fields(p, b, i, w, part, N_WORDS: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr):
    """Select, of row i, the pairs and the bits that belong to its word w, shifted to where `_values_of` takes them."""
    pair, bit = 0, 0
    if S.pairs >= 0:
        n: tl.constexpr = _n_pairs(S, PARTS)
        if N_WORDS >= 4:
            pair = p[i * n + w // 4 * 2 + w % 2] >> (w % 4 // 2 * 4)
        else:
            pair = p[i * n + w] >> (part * N_WORDS % 4 // 2 * 4)
    if S.bits >= 0:
        m: tl.constexpr = _n_blocks(S, PARTS)
        if N_WORDS >= 4:
            bit = b[i * m + w // 4] >> (w % 4 * 4)
        else:
            bit = b[i * m] >> ((part * N_WORDS + w) % 4 * 4)
    return pair, bit


@triton.jit
def _both(x, UPPER: tl.constexpr):
    """Repeat one half of a word."""
    if UPPER:
        y = high_halves(x, x)
    else:
        y = low_halves(x, x)
    return y


@triton.jit
def scores_of(zero, k, sub: tl.constexpr, q, part, book, WARPS: tl.constexpr, S: tl.constexpr):
    """Compute scores of 16 rows, four float32: products of rows `2 * sub` and `2 * sub + 1` of k with the queries."""
    x, p, b, s, low = k
    n: tl.constexpr = n_words_of(S, 4)
    n_blocks: tl.constexpr = _n_blocks(S, 4)
    of_bytes: tl.constexpr = S.main == _BYTES
    per_word: tl.constexpr = 1 if of_bytes else 2
    chains = (zero, zero, zero, zero, zero, zero, zero, zero)  # two sums, since a product waits for the one before
    i: tl.constexpr = 2 * sub
    for w in tl.static_range(n):
        d0, d1 = _both(s[i], n_blocks * w // n), _both(s[i + 1], n_blocks * w // n)
        m0, m1 = d0, d1
        if S.has_min:
            m0, m1 = _both(low[i], n_blocks * w // n), _both(low[i + 1], n_blocks * w // n)
        pair, bit = _fields(p, b, i, w, part, n, 4, S)
        upper = _values_of(x[i * n + w] if S.main != _NONE else pair, pair, bit, d0, m0, book, S)
        pair, bit = _fields(p, b, i + 1, w, part, n, 4, S)
        lower = _values_of(x[(i + 1) * n + w] if S.main != _NONE else pair, pair, bit, d1, m1, book, S)
        for h in tl.static_range(per_word):
            chains = (chains[4], chains[5], chains[6], chains[7]) + multiply(
                upper[2 * h], lower[2 * h], upper[2 * h + 1], lower[2 * h + 1],
                q[2 * (w * per_word + h)], q[2 * (w * per_word + h) + 1],
                chains[0], chains[1], chains[2], chains[3], WARPS,
            )  # fmt: skip
    return chains[0] + chains[4], chains[1] + chains[5], chains[2] + chains[6], chains[3] + chains[7]


@triton.jit
def add_values(acc, v, sub: tl.constexpr, p0, p1, part, book, WARPS: tl.constexpr, S: tl.constexpr):
    """Add to `acc`, four float32 for two dims, dims after dims, the products of four of v's rows with the weights."""
    x, p, b, s, low = v
    n: tl.constexpr = n_words_of(S, 8)
    of_bytes: tl.constexpr = S.main == _BYTES
    per_half: tl.constexpr = 1 if of_bytes else 2
    i: tl.constexpr = 4 * sub
    d0, d1 = low_halves(s[i], s[i + 1]), low_halves(s[i + 2], s[i + 3])
    m0, m1 = d0, d1
    if S.has_min:
        m0, m1 = low_halves(low[i], low[i + 1]), low_halves(low[i + 2], low[i + 3])
    out = ()
    for w in tl.static_range(n):
        pair_a, bit_a = _fields(p, b, i, w, part, n, 8, S)
        pair_b, bit_b = _fields(p, b, i + 1, w, part, n, 8, S)
        pair_c, bit_c = _fields(p, b, i + 2, w, part, n, 8, S)
        pair_d, bit_d = _fields(p, b, i + 3, w, part, n, 8, S)
        for half in tl.static_range(2):
            first, second, pair0, pair1, bit0, bit1 = 0, 0, 0, 0, 0, 0
            if S.main != _NONE:
                first = _two_rows(x[i * n + w], x[(i + 1) * n + w], half)
                second = _two_rows(x[(i + 2) * n + w], x[(i + 3) * n + w], half)
            if S.pairs >= 0:
                pair0, pair1 = _two_rows(pair_a, pair_b, half), _two_rows(pair_c, pair_d, half)
            if S.bits >= 0:
                bit0, bit1 = _two_rows_of_bits(bit_a, bit_b, half), _two_rows_of_bits(bit_c, bit_d, half)
            near = _values_of(first if S.main != _NONE else pair0, pair0, bit0, d0, m0, book, S)
            far = _values_of(second if S.main != _NONE else pair1, pair1, bit1, d1, m1, book, S)
            for h in tl.static_range(per_half):
                out = out + _into(
                    acc, near[2 * h], near[2 * h + 1], far[2 * h], far[2 * h + 1], p0, p1,
                    4 * ((w * 2 + half) * per_half + h), WARPS,
                )  # fmt: skip
    return out


@triton.jit
def _into(acc, a0, a1, a2, a3, p0, p1, i: tl.constexpr, WARPS: tl.constexpr):
    return multiply(a0, a1, a2, a3, p0, p1, acc[i], acc[i + 1], acc[i + 2], acc[i + 3], WARPS)


@triton.jit
def _two_rows(x, y, half: tl.constexpr):
    """Join bytes 0 and 1, or 2 and 3, of two words: the first word's in the lower half."""
    if half == 0:
        z = low_halves(x, y)
    else:
        z = high_halves(x, y)
    return z


@triton.jit
def _two_rows_of_bits(x, y, half: tl.constexpr):
    return ((x >> (2 * half)) & 0x00030003) | (((y >> (2 * half)) & 0x00030003) << 2)
