"""The facts of a format that a kernel must know at compile time, and a side's memory as the kernels' arguments.

Everything here is read off `KVFormat`. Owns no kernel and imports no Triton. Called by the launchers.

The kernels see a row as pairs of 16 lanes: a block of 32 is lanes 0..15 and lanes 16..31, and two dot products, one per
half, take the place of one. Nibble planes are stored in this way, so that nothing is interleaved; the others follow.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hybridkv.formats import KVFormat, get_format

NONE, BYTES, NIBBLES, F16, BF16, F32 = range(6)
"""What a row's main plane holds."""

_PLAIN = {"x_f16": F16, "x_bf16": BF16, "x_f32": F32}
_MAIN = {"bytes": BYTES, "nibbles": NIBBLES}
MAX_HEAD_DIM = 512


class RowFormat(NamedTuple):
    """K or V at compile time.

    Attributes
    ----------
    main
        `BYTES`, `NIBBLES`, a plain dtype, or `NONE` if all bits lie in the two planes below.
    pairs, bits
        Lowest bit of the code that the plane of pairs and that of single bits stores, or -1 without one.
    offset
        What is subtracted from a code, made unsigned, or from an entry of the codebook, made so, to give its value.
    has_min, has_book
        Whether a block stores its minimum, and whether values are looked up.
    row_scale
        Whether one float32 scale serves the row.
    head_dim, n_blocks, blocks_padded
        Values of a row, its blocks of 32, and the next power of two of these.
    low_mask, high_mask, magic
        Two codes of lanes 0..15, or 16..31, are `word & mask`; with the magic bits flipped, its halves are the float16
        numbers 1024 + code. Where a code is two's complement, a flip of its sign makes it unsigned, 128 higher.
    high_factor
        16 where the nibbles of lanes 16..31 are used where they lie in a byte, 16 times as large; else 1.
    low_values, high_values
        PTX that makes values of such words, the scale and the minimum.
    table
        Entries of a codebook as bytes, 128 higher, four to a word; of one with less than 16, the last two words count
        nothing.
    """

    main: int
    pairs: int
    bits: int
    offset: int
    has_min: bool
    has_book: bool
    row_scale: bool
    head_dim: int
    n_blocks: int
    blocks_padded: int
    low_mask: int
    high_mask: int
    magic: int
    high_factor: int
    low_values: str
    high_values: str
    table: tuple[int, int, int, int]


class Memory(NamedTuple):
    """A side's memory: its planes by what they hold, and the codebook. Those that are missing stand for another one."""

    main: Tensor
    pairs: Tensor
    bits: Tensor
    d: Tensor
    m: Tensor
    book: Tensor


def rejects_rows(fmt: KVFormat, head_dim: int) -> str | None:
    """Explain why the kernels cannot read or write such rows; None if they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim} is above {MAX_HEAD_DIM}"
    if fmt.block not in (None, 1, 32):
        return f"{fmt.name} has blocks of {fmt.block}; blocks of 32, whole rows and plain values are read"
    if fmt.is_quantized and head_dim % 4:
        return f"{fmt.name} is read in words of 4 codes; head dim {head_dim} is no multiple of 4"
    return fmt.rejects(head_dim)


@lru_cache(maxsize=256)
def row_format(type_name: str, head_dim: int) -> RowFormat:
    """Describe a format's rows of `head_dim` values to the compiler."""
    fmt = get_format(type_name)
    kinds = {plane.kind: plane for plane in fmt.planes}
    main = next((code for kind, code in (_PLAIN | _MAIN).items() if kind in kinds), NONE)
    signed = fmt.is_quantized and fmt.code_range[0] < 0
    n_blocks = -(-head_dim // 32)
    offset = 128 if signed or fmt.codebook else fmt.zero
    low_mask = high_mask = 0x00FF00FF
    if main == NIBBLES and not {"pairs", "bits"} & kinds.keys() and not fmt.codebook:
        low_mask, high_mask = 0x000F000F, 0x00F000F0
    magic = 0x64006400 ^ (0x00800080 if signed else 0)
    high_factor = 16 if high_mask == 0x00F000F0 else 1
    return RowFormat(
        main=main,
        pairs=kinds["pairs"].shift if "pairs" in kinds else -1,
        bits=kinds["bits"].shift if "bits" in kinds else -1,
        offset=offset,
        has_min=fmt.has_min,
        has_book=fmt.codebook is not None,
        row_scale=fmt.is_quantized and fmt.block is None,
        head_dim=head_dim,
        n_blocks=n_blocks,
        blocks_padded=1 << (n_blocks - 1).bit_length(),
        low_mask=low_mask,
        high_mask=high_mask,
        magic=magic,
        high_factor=high_factor,
        low_values=_two_values(low_mask, magic, offset, 1, has_min=fmt.has_min),
        high_values=_two_values(high_mask, magic, offset, high_factor, has_min=fmt.has_min),
        table=_table(fmt.codebook or ()),
    )


def _two_values(mask: int, magic: int, offset: int, factor: int, *, has_min: bool) -> str:
    """Write `((x & mask) ^ magic) / factor - (1024 / factor + offset)) * d + m`: $0 and $1 of $2, $3 and $4."""
    steps = [
        ".reg .b32 x, d, m, a, b",
        f"mov.b32 a, {mask}",
        f"lop3.b32 x, $2, a, {magic}, 0x6a",
        f"mov.b32 a, {_twice(-1024 / factor - offset)}",
        f"mov.b32 b, {_twice(1 / factor)}",
        "add.rn.f16x2 x, x, a" if factor == 1 else "fma.rn.f16x2 x, x, b, a",
        "mov.b32 d, {$3, $3}",
        *(["mov.b32 m, {$4, $4}", "fma.rn.f16x2 x, x, d, m"] if has_min else ["mul.rn.f16x2 x, x, d"]),
        "mov.b32 {$0, $1}, x",
    ]
    return f"{{ {'; '.join(steps)}; }}"


def _twice(value: float) -> str:
    """Write a float16 in both halves of a word."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    return f"0x{bits:04x}{bits:04x}"


def _table(codebook: Sequence[int]) -> tuple[int, int, int, int]:
    entries = [value + 128 for value in codebook] + [0] * (16 - len(codebook))
    a, b, c, d = (int.from_bytes(entries[i : i + 4], "little") for i in range(0, 16, 4))
    return a, b, c, d


def memory(fmt: KVFormat, planes: Sequence[Tensor]) -> Memory:
    """Order and type the planes of a side as kernels take them."""
    by_kind = {plane.kind: data for plane, data in zip(fmt.planes, planes, strict=True)}
    plain = next((by_kind[kind] for kind in _PLAIN if kind in by_kind), None)
    main = plain if plain is not None else by_kind.get("bytes", by_kind.get("nibbles"))
    pairs, bits = by_kind.get("pairs"), by_kind.get("bits")
    some = next(data for data in (main, pairs, bits) if data is not None)
    d = by_kind.get("d_f16", by_kind.get("d_f32", some))
    return Memory(
        main=some if main is None else main,
        pairs=some if pairs is None else pairs,
        bits=some if bits is None else bits,
        d=d,
        m=by_kind.get("m_f16", d),
        book=some if fmt.codebook is None else codebook(fmt.name, some.device),
    )


def capacity(fmt: KVFormat, planes: Sequence[Tensor], head_dim: int, heads: tuple[int, int]) -> int:
    """Assert that the kernels may read the planes; rows per sequence and head.

    Parameters
    ----------
    heads
        B and Hkv.
    """
    rows = int(planes[0].shape[2])
    for plane, size in zip(planes, fmt.plane_bytes(head_dim), strict=True):
        assert plane.dtype == torch.uint8 and plane.is_contiguous(), (fmt.name, plane.dtype, plane.stride())
        assert plane.shape[2:] == (rows, size), (fmt.name, plane.shape, rows, size)
        assert tuple(plane.shape[:2]) == heads, (fmt.name, plane.shape, heads)
    return rows


@lru_cache(maxsize=64)
def codebook(type_name: str, device: torch.device) -> Tensor:
    """Return the values of a format's codes in units of the scale, float16: they are small integers."""
    return torch.tensor(get_format(type_name).codebook, dtype=torch.float16, device=device)
