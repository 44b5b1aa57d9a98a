"""Instructions on registers: tensors with one number per thread, and what Triton's interpreter runs in their place.

A tensor of as many numbers as a program has threads lies one number to a thread, in their order, so that instructions
of a warp can be given by hand: `mma.sync`, shuffles, transposes. Lane l of a warp has group `l // 4` and place `l % 4`,
in the terms of the PTX manual's fragments of 16 x 8 x 16. A word holds two float16, the lower half first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridkv.kernels.cuda.tiles import INTERPRETED


def _target_arch() -> int:
    """Return the compute capability that a kernel is compiled for: 75, 90."""
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


# Asked while a kernel is compiled, and no part of what its cache key hashes.
_target_arch.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.constexpr_function
def _is_turing():
    """Check whether the target is older than Ampere: products of 8 inputs, and no conversion of two numbers at once."""
    return _target_arch() < 80


_MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};"
)
_MMA_OF_8 = tl.constexpr(
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5}, {$8}, {$10, $11, $12, $13}; "
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$6, $7}, {$9}, {$0, $1, $2, $3};"
)


@triton.constexpr_function
def _multiply_text():
    return _MMA_OF_8.value if _is_turing() else _MMA.value


@triton.constexpr_function
def _multiply_registers():
    """Name the operands: of two instructions the first writes what the second still reads, so outputs are their own."""
    out = "=&f" if _is_turing() else "=f"
    return ",".join([out] * 4 + ["r"] * 6 + ["f"] * 4)


_PACK_ONE_BY_ONE = tl.constexpr("{ .reg .b16 a, b; cvt.rn.f16.f32 a, $1; cvt.rn.f16.f32 b, $2; mov.b32 $0, {a, b}; }")
_TURN = tl.constexpr("{ .reg .b32 t; cvt.rn.f16x2.f32 t, $2, $1; movmatrix.sync.aligned.m8n8.trans.b16 $0, t; }")


@triton.constexpr_function
def _load_text(n_words, offset, once):
    """Write the load of words at `offset` bytes behind an address, or zeros unless one number is below another."""
    names = [f"${i}" for i in range(n_words)]
    vector = f".v{n_words}" if n_words > 1 else ""
    where = ".L1::no_allocate" if once else ""
    zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
    target = f"{{{', '.join(names)}}}" if n_words > 1 else names[0]
    return (
        f"{{ .reg .pred p; setp.lt.s32 p, ${n_words + 1}, ${n_words + 2}; {zeros} "
        f"@p ld.global{where}{vector}.b32 {target}, [${n_words}+{offset}]; }}"
    )


@triton.constexpr_function
def _load_half_text(offset):
    return (
        "{ .reg .pred p; setp.lt.s32 p, $2, $3; mov.b32 $0, 0; "
        f"@p ld.global.u16 $0, [$1+{offset}]; }}"
    )  # fmt: skip


@triton.constexpr_function
def _reduce_text(operation, distances):
    """Write a reduction over the lanes whose numbers differ in some bits."""
    steps = "".join(f"shfl.sync.bfly.b32 t, $0, {n}, 31, -1; {operation} $0, $0, t; " for n in distances)
    return f"{{ .reg .b32 t; mov.b32 $0, $1; {steps}}}"


@triton.constexpr_function
def _values_text(mask, other_mask, magic, minus, has_min):
    """Write `((x & mask) ^ magic | y & other_mask) - minus) * d + m` for both halves: $0 of x, d, and any y and m."""
    y, m = 3, 4 if other_mask else 3
    exponent = minus.bit_length() - 1
    negative = 0x8000 | (exponent + 15) << 10 | (minus << (10 - exponent)) & 0x3FF  # as float16
    steps = [
        ".reg .b32 x, a",
        f"mov.b32 a, {mask}",
        f"lop3.b32 x, $1, a, {magic}, 0x6a",
        *([f"mov.b32 a, {other_mask}", f"lop3.b32 x, ${y}, a, x, 0xea"] if other_mask else []),
        f"mov.b32 a, {negative * 0x10001}",
        "add.rn.f16x2 x, x, a",
        f"fma.rn.f16x2 $0, x, $2, ${m}" if has_min else "mul.rn.f16x2 $0, x, $2",
    ]
    return f"{{ {'; '.join(steps)}; }}"


@triton.jit
def load_words(at, row, end, N: tl.constexpr, OFFSET: tl.constexpr, ONCE: tl.constexpr = False):
    """Load N words (1, 2, or some fours) at OFFSET words behind the pointers `at`; zeros unless `row < end`.

    ONCE: nobody will want their neighbourhood in the first cache.
    """
    words = ()
    if INTERPRETED:
        for i in tl.static_range(N):
            words = words + (tl.load(at + (OFFSET + i), mask=row < end, other=0),)
    else:
        address = at.to(tl.int64)
        for i in tl.static_range((N + 3) // 4):
            if N == 1:
                x = tl.inline_asm_elementwise(
                    _load_text(1, OFFSET * 4, False), "=&r,l,r,r", [address, row, end], tl.int32, is_pure=False, pack=1
                )
                words = words + (x,)
            elif N == 2:
                x, y = tl.inline_asm_elementwise(
                    _load_text(2, OFFSET * 4, ONCE),
                    "=&r,=&r,l,r,r",
                    [address, row, end],
                    (tl.int32, tl.int32),
                    is_pure=False,
                    pack=1,
                )
                words = words + (x, y)
            else:
                x, y, z, w = tl.inline_asm_elementwise(
                    _load_text(4, OFFSET * 4 + i * 16, ONCE),
                    "=&r,=&r,=&r,=&r,l,r,r",
                    [address, row, end],
                    (tl.int32, tl.int32, tl.int32, tl.int32),
                    is_pure=False,
                    pack=1,
                )
                words = words + (x, y, z, w)
    return words


@triton.jit
def load_half(at, row, end, OFFSET: tl.constexpr):
    """Load 16 bits at OFFSET halves behind the pointers, as int32; zero unless `row < end`."""
    if INTERPRETED:
        x = tl.load(at + OFFSET, mask=row < end, other=0).to(tl.int32) & 0xFFFF
    else:
        x = tl.inline_asm_elementwise(
            _load_half_text(OFFSET * 2), "=&r,l,r,r", [at.to(tl.int64), row, end], tl.int32, is_pure=False, pack=1
        )
    return x


@triton.jit
def store_four(at, a, b, c, d, here):
    """Store four float32 at pointers to where 16 bytes may be written at once."""
    if INTERPRETED:
        tl.store(at, a, mask=here)
        tl.store(at + 1, b, mask=here)
        tl.store(at + 2, c, mask=here)
        tl.store(at + 3, d, mask=here)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
            "=r,l,f,f,f,f,r",
            [at.to(tl.int64), a, b, c, d, here.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def keep_order(thread):
    """Keep the order of loads: the assembler would put them off until registers are free."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [thread], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def unpack(x):
    """Split a word into its halves, float16; for the interpreter."""
    return x.to(tl.int16).to(tl.float16, bitcast=True), (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def pack(low, high):
    """Round two float32 into one word."""
    if INTERPRETED:
        a = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        x = a | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    elif _is_turing():
        x = tl.inline_asm_elementwise(_PACK_ONE_BY_ONE, "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)
    else:
        x = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )
    return x


@triton.jit
def choose(x, y, SELECTOR: tl.constexpr, TEXT: tl.constexpr):
    """Choose four of the eight bytes of x and y: halves 0 of both (0x5410), or halves 1 (0x7632)."""
    if INTERPRETED:
        z = (x & 0xFFFF) | (y << 16) if SELECTOR == 0x5410 else ((x >> 16) & 0xFFFF) | (y & -65536)
    else:
        z = tl.inline_asm_elementwise(TEXT, "=r,r,r", [x, y], tl.int32, is_pure=True, pack=1)
    return z


@triton.jit
def low_halves(x, y):
    """Join the lower half of x, and of y above it."""
    return choose(x, y, 0x5410, "prmt.b32 $0, $1, $2, 0x5410;")


@triton.jit
def high_halves(x, y):
    """Join the upper half of x, and of y above it."""
    return choose(x, y, 0x7632, "prmt.b32 $0, $1, $2, 0x7632;")


@triton.jit
def two_values(x, other, d, m, MASK: tl.constexpr, OTHER_MASK: tl.constexpr, MAGIC: tl.constexpr, MINUS: tl.constexpr,
               HAS_MIN: tl.constexpr):  # fmt: skip
    """Decode two codes, put together from the bits of x and of `other` under masks: a word of values.

    MAGIC makes a float16 of a code: 0x6400 is 1024, whose last bit counts 1, and 0x5400 is 64, whose fifth bit does.
    """
    if INTERPRETED:
        code = (x & MASK) ^ MAGIC
        if OTHER_MASK:
            code = code | (other & OTHER_MASK)
        a, b = unpack(code)
        da, db = unpack(d)
        a, b = (a - MINUS) * da, (b - MINUS) * db
        if HAS_MIN:
            ma, mb = unpack(m)
            a, b = a + ma, b + mb
        word = pack(a.to(tl.float32), b.to(tl.float32))
    else:
        text: tl.constexpr = _values_text(MASK, OTHER_MASK, MAGIC, MINUS, HAS_MIN)
        if OTHER_MASK and HAS_MIN:
            word = tl.inline_asm_elementwise(text, "=r,r,r,r,r", [x, d, other, m], tl.int32, is_pure=True, pack=1)
        elif OTHER_MASK:
            word = tl.inline_asm_elementwise(text, "=r,r,r,r", [x, d, other], tl.int32, is_pure=True, pack=1)
        elif HAS_MIN:
            word = tl.inline_asm_elementwise(text, "=r,r,r,r", [x, d, m], tl.int32, is_pure=True, pack=1)
        else:
            word = tl.inline_asm_elementwise(text, "=r,r,r", [x, d], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def _rows_by_columns(a, b, WARPS: tl.constexpr):
    """Sum the products of words over places: float32 `[WARPS, 8 groups of a, 8 groups of b]`."""
    a0, a1 = unpack(a)
    b0, b1 = unpack(b)
    a0 = tl.reshape(a0.to(tl.float32), [WARPS, 8, 1, 4])
    a1 = tl.reshape(a1.to(tl.float32), [WARPS, 8, 1, 4])
    b0 = tl.reshape(b0.to(tl.float32), [WARPS, 1, 8, 4])
    b1 = tl.reshape(b1.to(tl.float32), [WARPS, 1, 8, 4])
    return tl.sum(a0 * b0 + a1 * b1, axis=3)


@triton.jit
def multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, WARPS: tl.constexpr):
    """Compute `c + a @ b` of one fragment: a float16 [16, 16], b float16 [16, 8], c float32 [16, 8]."""
    if INTERPRETED:
        upper = _rows_by_columns(a0, b0, WARPS) + _rows_by_columns(a2, b1, WARPS)
        lower = _rows_by_columns(a1, b0, WARPS) + _rows_by_columns(a3, b1, WARPS)
        d0, d1 = tl.split(tl.reshape(upper, [WARPS * 32, 2]))
        d2, d3 = tl.split(tl.reshape(lower, [WARPS * 32, 2]))
        d0, d1, d2, d3 = c0 + d0, c1 + d1, c2 + d2, c3 + d3
    else:
        d0, d1, d2, d3 = tl.inline_asm_elementwise(
            _multiply_text(),
            _multiply_registers(),
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return d0, d1, d2, d3


@triton.jit
def turn(low, high, WARPS: tl.constexpr):
    """Transpose an 8 x 8 matrix of float32 to float16: two neighbouring columns in, a word out."""
    if INTERPRETED:
        matrix = tl.reshape(tl.join(low, high), [WARPS, 8, 8])
        matrix = tl.trans(matrix, 0, 2, 1)
        a, b = tl.split(tl.reshape(matrix, [WARPS * 32, 2]))
        word = pack(a, b)
    else:
        word = tl.inline_asm_elementwise(_TURN, "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def max_of_groups(x, WARPS: tl.constexpr):
    """Find the largest among the lanes of the same place."""
    if INTERPRETED:
        y = tl.max(tl.reshape(x, [WARPS, 8, 4]), axis=1)[:, None, :]
        y = tl.reshape(tl.broadcast_to(y, [WARPS, 8, 4]), [WARPS * 32])
    else:
        y = tl.inline_asm_elementwise(
            _reduce_text("max.f32", (4, 8, 16)), "=&f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def sum_of_groups(x, WARPS: tl.constexpr):
    """Sum over the lanes of the same place."""
    if INTERPRETED:
        y = tl.sum(tl.reshape(x, [WARPS, 8, 4]), axis=1)[:, None, :]
        y = tl.reshape(tl.broadcast_to(y, [WARPS, 8, 4]), [WARPS * 32])
    else:
        y = tl.inline_asm_elementwise(
            _reduce_text("add.f32", (4, 8, 16)), "=&f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def max_of_places(x, WARPS: tl.constexpr):
    """Find the largest among the lanes of the same group."""
    if INTERPRETED:
        y = tl.max(tl.reshape(x, [WARPS * 8, 4]), axis=1)[:, None]
        y = tl.reshape(tl.broadcast_to(y, [WARPS * 8, 4]), [WARPS * 32])
    else:
        y = tl.inline_asm_elementwise(_reduce_text("max.f32", (1, 2)), "=&f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def sum_of_places(x, WARPS: tl.constexpr):
    """Sum over the lanes of the same group."""
    if INTERPRETED:
        y = tl.sum(tl.reshape(x, [WARPS * 8, 4]), axis=1)[:, None]
        y = tl.reshape(tl.broadcast_to(y, [WARPS * 8, 4]), [WARPS * 32])
    else:
        y = tl.inline_asm_elementwise(_reduce_text("add.f32", (1, 2)), "=&f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def of_columns(x, WARPS: tl.constexpr):
    """Select, of a number per group, those of groups 2p and 2p + 1, p a lane's place: its columns of an accumulator."""
    if INTERPRETED:
        each = tl.reshape(tl.max(tl.reshape(x, [WARPS, 8, 4]), axis=2), [WARPS, 4, 2])
        a, b = tl.split(each)
        a = tl.reshape(tl.broadcast_to(a[:, None, :], [WARPS, 8, 4]), [WARPS * 32])
        b = tl.reshape(tl.broadcast_to(b[:, None, :], [WARPS, 8, 4]), [WARPS * 32])
    else:
        a, b = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %laneid; shl.b32 t, t, 3; shfl.sync.idx.b32 $0, $2, t, 31, -1; add.u32 t, t, 4; "
            "shfl.sync.idx.b32 $1, $2, t, 31, -1; }",
            "=&f,=&f,f",
            [x],
            (tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return a, b
