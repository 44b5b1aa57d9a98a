"""The GPU's layout of packed weights: one for each ggml type, converted on the card while it is uploaded.

A row is cut into units of 256 inputs, and a unit into the shares of four threads: where the tensor cores want codes is
where a thread finds them, in whole words. Codes keep their bits and scales their values, so nothing is rounded; a
block takes what it takes in the file, but q3_K and iq4_xs, whose scales become bytes (114 for 110 bytes, 138 for 136).

Owns the layouts and the conversion. The kernels that read them are in `packed_unit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from hybridkv.formats.weights import WEIGHTS
from hybridkv.kernels.cuda.grid_layout import GRIDS, Grid, convert_grid, grid_on
from hybridkv.kernels.weights import Weight

UNIT: Final = 256
"""Inputs of a unit."""

GAIN_BITS: Final = 19
"""In registers values are float16 and so much smaller (`codes.py`), where a type has integer scales."""

SMALL_GAIN_BITS: Final = 12
"""The same of q2_K, whose codes and scales are small."""

PLAIN_GAIN_BITS: Final = 9
"""The same of types whose runs have no integer scales."""

_LEAST_OF_DMIN: Final = 2.0**24
"""How many times d dmin may be."""

CHUNK_BYTES: Final = 1 << 23
"""Of the file's bytes that are converted at a time; the conversion needs some ten times as much."""

Order = Literal["quarters", "runs"]
"""Which inputs of a unit a thread has: 64 that follow each other, or 8 of every 32 (types with a scale per 32)."""

Scales = Literal["six", "bytes16", "bytes32", "nibbles", "half", "exponent", "grid"]
"""`six`: d, dmin, and 24 bits for each quarter: two scales, two minima. `bytes16`, `bytes32`: int8 plus 128 per so many
inputs and d. `nibbles`: scale and minimum per 16, d and dmin. `half`: float16 per 32. `exponent`: a power of two per
32. `grid`: as `grid_layout.py` says."""


@dataclass(frozen=True, slots=True)
class PackedType:
    """The GPU's layout of a unit of a type; a constant of the kernels.

    Parameters
    ----------
    bits, more
        Bits of a code in its main plane, and further ones above them in a plane of their own.
    minus
        What a code is above its value; codes of a codebook's type index `book`, whose bytes are 128 above their values.
    book
        The codebook as four words.
    grid
        Of a type whose codes index groups of values, with planes of its own.
    """

    name: str
    bits: int
    more: int
    minus: int
    order: Order
    scales: Scales
    has_min: bool = False
    book: tuple[int, int, int, int] | None = None
    grid: Grid | None = None

    @property
    def keeps_order(self) -> bool:
        """Whether loads of the next unit stay in front of this one's arithmetic.

        Measured on an H200: up to 12 % faster with q4_K and q6_K, the same with q8_0, and 30 % slower with q5_K.
        """
        return self.more != 1

    @property
    def gain(self) -> float:
        """What values in registers are multiplied by beside their scales (`codes.py`)."""
        if self.grid is not None:
            return 1.0
        if self.scales == "nibbles":
            return 2.0**SMALL_GAIN_BITS
        return 2.0 ** (PLAIN_GAIN_BITS if self.order == "runs" else GAIN_BITS)

    @property
    def plane_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of a unit in the planes of codes, further bits, scales, and scales of scales (or minima).

        Of grid types: indices and signs, scales and high bits, none (all weights share the grid), and d.
        """
        if self.grid is not None:
            return (self.grid.main_bytes, self.grid.side_bytes, 0, self.grid.last_bytes)
        scales = {"six": 16, "bytes16": 16, "bytes32": 8, "nibbles": 16, "half": 16, "exponent": 8}[self.scales]
        last = {"six": 0, "bytes16": 2, "bytes32": 2, "nibbles": 4, "half": 16 if self.has_min else 0, "exponent": 0}
        return (UNIT // 8 * self.bits, UNIT // 8 * self.more, scales, last[self.scales])


def _book(name: str) -> tuple[int, int, int, int]:
    values = WEIGHTS[name].codebook
    assert values is not None
    words = [int.from_bytes(bytes(value + 128 for value in values[i : i + 4]), "little") for i in range(0, 16, 4)]
    return words[0], words[1], words[2], words[3]


_ALL: Final = (
    PackedType("q8_0", 8, 0, 128, "runs", "half"),
    PackedType("q4_0", 4, 0, 8, "runs", "half"),
    PackedType("q4_1", 4, 0, 0, "runs", "half", has_min=True),
    PackedType("q5_0", 4, 1, 16, "runs", "half"),
    PackedType("q5_1", 4, 1, 0, "runs", "half", has_min=True),
    PackedType("iq4_nl", 4, 0, 128, "runs", "half", book=_book("iq4_nl")),
    PackedType("mxfp4", 4, 0, 128, "runs", "exponent", book=_book("mxfp4")),
    PackedType("q2_K", 2, 0, 0, "quarters", "nibbles", has_min=True),
    PackedType("q3_K", 2, 1, 4, "quarters", "bytes16"),
    PackedType("q4_K", 4, 0, 0, "quarters", "six", has_min=True),
    PackedType("q5_K", 4, 1, 0, "quarters", "six", has_min=True),
    PackedType("q6_K", 4, 2, 32, "quarters", "bytes16"),
    PackedType("iq4_xs", 4, 0, 128, "quarters", "bytes32", book=_book("iq4_xs")),
    *(PackedType(name, 8, grid.high, 0, "runs", "grid", grid=grid) for name, grid in GRIDS.items()),
)

PACKED: Final[Mapping[str, PackedType]] = MappingProxyType({one.name: one for one in _ALL})


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix or a stack of matrices on the GPU.

    Attributes
    ----------
    planes
        uint8 `[n_stack * n_out, units, bytes]`: codes, further bits, scales, scales of scales; the first again in place
        of one that the type does not have. The third of grid types is the grid, which belongs to no weight.
    """

    type: PackedType
    planes: tuple[Tensor, Tensor, Tensor, Tensor]
    n_stack: int
    n_out: int
    n_in: int

    @property
    def n_units(self) -> int:
        """Units of a row; the last may be filled up with zeros."""
        return -(-self.n_in // UNIT)

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        own = self.planes if self.type.grid is None else (*self.planes[:2], self.planes[3])
        return sum(plane.nbytes for plane in {plane.data_ptr(): plane for plane in own}.values())

    @property
    def device(self) -> torch.device:
        """Device of the memory."""
        return self.planes[0].device


def rejects(name: str) -> str | None:
    """Explain why weights of a type are not held packed on the GPU; None if they are."""
    return None if name in PACKED else f"{name} is not multiplied packed on cuda; it knows {', '.join(PACKED)}"


def upload(
    weights: Sequence[Weight], device: torch.device, *, send: Callable[[Tensor], Tensor] | None = None
) -> PackedWeight:
    """Convert matrices of one type and one width, joined row by row, a chunk at a time.

    Parameters
    ----------
    weights
        With as many matrices in their stacks; the outputs of the first come first in every matrix.
    send
        Copies a chunk to the device; torch's copy by default.
    """
    first = weights[0]
    type_, n_in, n_stack = PACKED[first.format.name], first.n_in, first.n_stack
    assert all((w.format, w.n_in, w.n_stack) == (first.format, n_in, n_stack) for w in weights)
    n_out = sum(w.n_out for w in weights)
    n_units = -(-n_in // UNIT)
    planes = [
        torch.empty((n_stack * n_out, n_units, n), dtype=torch.uint8, device=device) for n in type_.plane_bytes if n
    ]
    stacks = [plane.view(n_stack, n_out, *plane.shape[1:]) for plane in planes]
    row_bytes, at = first.format.row_bytes(n_in), 0
    for weight in weights:
        rows = max(1, CHUNK_BYTES // row_bytes)
        experts = max(1, rows // weight.n_out)
        for expert in range(0, n_stack, experts):
            for row in range(0, weight.n_out, rows):
                chunk = weight.data[expert : expert + experts, row : row + rows]
                part = chunk.to(device) if send is None else send(chunk)
                converted = _convert(part.reshape(-1, row_bytes), type_, n_in)
                for stack, plane in zip(stacks, converted, strict=True):
                    own = stack[expert : expert + experts, at + row : at + row + part.shape[1]]
                    own.copy_(plane.view(own.shape))
        at += weight.n_out
    whole = iter(planes)
    main = next(whole)
    filled = [next(whole) if n else main for n in type_.plane_bytes[1:]]
    if type_.grid is not None:
        filled[1] = grid_on(type_.name, device)
    return PackedWeight(type_, (main, filled[0], filled[1], filled[2]), n_stack, n_out, n_in)


def _convert(rows: Tensor, type_: PackedType, n_in: int) -> list[Tensor]:
    """Convert rows `[n, row_bytes]` as they lie in a file to planes."""
    fmt = WEIGHTS[type_.name]
    n_blocks = n_in // fmt.block
    blocks = rows.view(len(rows), n_blocks, fmt.block_bytes)
    per_unit = UNIT // fmt.block
    if missing := -n_blocks % per_unit:
        blocks = torch.cat([blocks, blocks.new_zeros(len(rows), missing, fmt.block_bytes)], 1)
    shape = (len(rows), blocks.shape[1] // per_unit)
    if type_.grid is not None:
        return [plane.reshape(*shape, -1) for plane in convert_grid(type_.name, blocks.reshape(-1, fmt.block_bytes))]
    codes, scales, last = _READ[type_.name](blocks.reshape(-1, fmt.block_bytes))
    places = codes.view(-1, UNIT)[:, _order(type_.order).to(codes.device)]
    if type_.bits == 4:
        main = _nibbles(places & 15)
    elif type_.bits == 2:
        main = _fields(places & 3, 2)
    else:
        main = places
    # Sixteen bytes of each thread at a time: what a warp loads at once is whole sectors of memory.
    main = main.contiguous().view(torch.uint8).view(-1, 4, 2 * type_.bits // 4, 16).transpose(1, 2).contiguous()
    planes = [main]
    if type_.more:
        planes.append(_fields(places >> type_.bits, type_.more))
    planes += [part for part in (scales, last) if part is not None]
    return [plane.view(torch.uint8).reshape(*shape, -1) for plane in planes]


def _order(order: Order) -> Tensor:
    """Order the inputs of a unit by thread, word, half of a word (lower and upper nibbles) and byte, flat.

    Bytes are in the order 0, 2, 1, 3: two that lie 16 bits apart, and become a word, are neighbours.
    """
    thread, word, half, byte = torch.meshgrid(*map(torch.arange, (4, 8, 2, 4)), indexing="ij")
    byte = byte // 2 + byte % 2 * 2
    if order == "quarters":
        return (64 * thread + 32 * half + 4 * word + byte).flatten()
    return (32 * word + 8 * thread + 4 * half + byte).flatten()


def _nibbles(codes: Tensor) -> Tensor:
    both = codes.view(-1, 4, 8, 2, 4)
    return both[:, :, :, 0] | both[:, :, :, 1] << 4


def _fields(values: Tensor, bits: int) -> Tensor:
    """Pack values of one or two bits to words: those of bytes 2 and 3 lie 16 bits above those of bytes 0 and 1."""
    words = 4 // bits
    # [units, threads, words of fields, words of codes in each, halves, upper pair of bytes, odd byte]
    parts = values.view(-1, 4, 8 // words, words, 2, 2, 2).to(torch.int32)
    word, half, upper, odd = torch.meshgrid(*map(torch.arange, (words, 2, 2, 2)), indexing="ij")
    at = 4 * half + odd + 2 * (word % 2) + 8 * (word // 2) if bits == 1 else 2 * (4 * word + 2 * half + odd)
    shifts = (at + 16 * upper).to(values.device)
    return (parts << shifts).sum((3, 4, 5, 6), dtype=torch.int32)


_Parts = tuple[Tensor, Tensor, Tensor | None]


def _low_high(qs: Tensor) -> Tensor:
    """Split 16 bytes into 32 codes: all lower nibbles, then the upper ones."""
    return torch.cat([qs & 15, qs >> 4], -1)


def _bits(words: Tensor) -> Tensor:
    """Split bytes `[n, 4]` into bits, one number each."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return (words[:, :, None] >> shifts & 1).flatten(1)


def _q8_0(b: Tensor) -> _Parts:
    return b[:, 2:] ^ 0x80, b[:, :2].contiguous(), None


def _q4_0(b: Tensor) -> _Parts:
    return _low_high(b[:, 2:]), b[:, :2].contiguous(), None


def _q4_1(b: Tensor) -> _Parts:
    return _low_high(b[:, 4:]), b[:, :2].contiguous(), b[:, 2:4].contiguous()


def _q5_0(b: Tensor) -> _Parts:
    return _low_high(b[:, 6:]) | _bits(b[:, 2:6]) << 4, b[:, :2].contiguous(), None


def _q5_1(b: Tensor) -> _Parts:
    return _low_high(b[:, 8:]) | _bits(b[:, 4:8]) << 4, b[:, :2].contiguous(), b[:, 2:4].contiguous()


def _mxfp4(b: Tensor) -> _Parts:
    return _low_high(b[:, 1:]), b[:, :1].contiguous(), None


def _pairs(qs: Tensor) -> Tensor:
    """Split 64 bytes into codes of 2 bits: four runs of 32 in the bits of 32 bytes."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=qs.device)[:, None]
    return (qs.reshape(-1, qs.shape[1] // 32, 1, 32) >> shifts & 3).flatten(1)


def _runs_of_bits(mask: Tensor) -> Tensor:
    """Read bit j of 32 bytes for each input of run j."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)[:, None]
    return (mask[:, None, :] >> shifts & 1).flatten(1)


def _q2_k(b: Tensor) -> _Parts:
    both, scaled = _in_units_of_d(b[:, 80:])
    scales = b[:, :16] & 0xF0 | (b[:, :16] & 15) * scaled.to(torch.uint8)
    return _pairs(b[:, 16:80]), scales, both


def _q3_k(b: Tensor) -> _Parts:
    codes = _pairs(b[:, 32:96]) | _runs_of_bits(b[:, :32]) << 2
    low, high = b[:, 96:104], b[:, 104:108]
    scales = torch.cat([low & 15, low >> 4], 1)
    scales = scales | torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1) << 4
    return codes, scales + 96, b[:, 108:].contiguous()


def _six(b: Tensor) -> Tensor:
    """Read d, dmin, and for each quarter of a block its two scales and its two minima, six bits each."""
    both, scaled = _in_units_of_d(b[:, :4])
    s = b[:, 4:16]
    scales = torch.cat([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], 1).to(torch.int32)
    minima = torch.cat([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], 1).to(torch.int32)
    scales = scales * scaled
    bits = scales[:, 0::2] | scales[:, 1::2] << 6 | minima[:, 0::2] << 12 | minima[:, 1::2] << 18
    three = torch.stack([bits >> shift & 255 for shift in (0, 8, 16)], 2).to(torch.uint8)
    return torch.cat([both, three.flatten(1)], 1)


def _in_units_of_d(both: Tensor) -> tuple[Tensor, Tensor]:
    """Scale d and dmin of blocks, `[n, 4]`, such that minima can be counted in d; 0 for blocks without scales.

    Where d is zero, or so small beside dmin that no float16 shows it, scales become zero, and d is dmin or one.
    """
    d, dmin = both.contiguous().view(torch.float16).unbind(1)
    tiny = d.float().abs() * _LEAST_OF_DMIN < dmin.float().abs()
    other = torch.where(dmin == 0, torch.ones_like(d), dmin)
    missing = tiny | (d == 0)
    held = torch.stack([torch.where(missing, other, d), dmin], 1).view(torch.uint8)
    return held, (~missing).to(torch.int32)[:, None]


def _four_runs(qs: Tensor) -> Tensor:
    """Split 128 bytes into codes of 4 bits: run after run of 32, two in the nibbles of 32 bytes."""
    return _low_high(qs.reshape(-1, 4, 32)).flatten(1)


def _q4_k(b: Tensor) -> _Parts:
    return _four_runs(b[:, 16:]), _six(b), None


def _q5_k(b: Tensor) -> _Parts:
    return _four_runs(b[:, 48:]) | _runs_of_bits(b[:, 16:48]) << 4, _six(b), None


def _q6_k(b: Tensor) -> _Parts:
    low = _low_high(b[:, :128].reshape(-1, 2, 64)).flatten(1)
    return low | _pairs(b[:, 128:192]) << 4, b[:, 192:208] ^ 0x80, b[:, 208:].contiguous()


def _iq4_xs(b: Tensor) -> _Parts:
    codes = _low_high(b[:, 8:].reshape(-1, 8, 16)).flatten(1)
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).flatten(1)
    high = torch.stack([b[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)
    return codes, (low | high << 4) + 96, b[:, :2].contiguous()


_READ: Final[Mapping[str, Callable[[Tensor], _Parts]]] = {
    "q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "iq4_nl": _q4_0, "mxfp4": _mxfp4,
    "q2_K": _q2_k, "q3_K": _q3_k, "q4_K": _q4_k, "q5_K": _q5_k, "q6_K": _q6_k, "iq4_xs": _iq4_xs,
}  # fmt: skip
"""From blocks `[n, block_bytes]` to codes, scales, and scales of scales or minima, as their planes have them."""
