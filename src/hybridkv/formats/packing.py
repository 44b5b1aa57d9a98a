"""The places of values and codes in bytes: the planes of a stored block.

Owns the plane kinds and their packing in both directions, for any number of lanes in a block. Knows no
format, no scale and no rounding. Called by `hybridkv.formats.block`; native and Triton kernels follow the
same tables.

A block's planes are of two sorts. A *number plane* holds one number of the block (a scale, a minimum, a sum)
or the plain values. A *code plane* holds some bits of every lane's code; a code may be spread over several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Final, Literal

import torch
from torch import Tensor

NumberKind = Literal["x_f32", "x_f16", "x_bf16", "d_f32", "d_f16", "m_f16", "s_f16", "sum_i32"]
CodeKind = Literal["bytes", "nibbles", "pairs", "bits"]
PlaneKind = NumberKind | CodeKind

Role = Literal["x", "d", "m", "s", "sum", "codes"]
"""`x` the value itself, `d` scale, `m` minimum, `s` scale times sum of codes, `sum` sum of codes."""


@dataclass(frozen=True, slots=True)
class Number:
    """One little-endian number: what it means and its dtype."""

    role: Role
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Placement:
    """The places of a lane's `width` bits among a block's bytes.

    The lanes of a block are indexed row-major by `axes`, each `(size, bit step)`. Size 0 marks the axis that
    counts bytes; it takes whatever size is left. Along the other axes a lane moves up by `bit step` within
    its byte.
    """

    width: int
    axes: tuple[tuple[int, int], ...]

    def sizes(self, n_lanes: int) -> tuple[int, ...]:
        """Return the axis sizes for a block of `n_lanes` lanes."""
        known = prod(size for size, _ in self.axes if size)
        assert n_lanes % known == 0
        return tuple(size or n_lanes // known for size, _ in self.axes)

    @cache  # noqa: B019  # a handful of placements and devices, for good
    def bit_offsets(self, device: torch.device) -> Tensor:
        """Return the first bit of a lane within its byte: uint8, one dim per axis, size 1 along the byte axis."""
        offsets = torch.zeros(1, dtype=torch.uint8, device=device)
        for size, step in self.axes:
            along = torch.arange(size or 1, dtype=torch.uint8, device=device) * step
            offsets = offsets[..., None] + along
        return offsets[0]


NUMBERS: Final[Mapping[PlaneKind, Number]] = {
    "x_f32": Number("x", torch.float32),
    "x_f16": Number("x", torch.float16),
    "x_bf16": Number("x", torch.bfloat16),
    "d_f32": Number("d", torch.float32),
    "d_f16": Number("d", torch.float16),
    "m_f16": Number("m", torch.float16),
    "s_f16": Number("s", torch.float16),
    "sum_i32": Number("sum", torch.int32),
}

PLACEMENTS: Final[Mapping[PlaneKind, Placement]] = {
    "bytes": Placement(8, ((0, 0),)),
    # Low nibbles hold the first half of the lanes, high nibbles the second.
    "nibbles": Placement(4, ((2, 4), (0, 0))),
    # Lane j of 32: byte j % 8, bit 4 * (j % 16 // 8) + 2 * (j // 16).
    "pairs": Placement(2, ((2, 2), (2, 4), (0, 0))),
    # Lane j: bit j of one little-endian word.
    "bits": Placement(1, ((0, 0), (8, 1))),
}


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a block.

    Parameters
    ----------
    kind
        Key of `NUMBERS` or `PLACEMENTS`.
    shift
        Of a code plane: the lowest bit of the code that it stores.
    """

    kind: PlaneKind
    shift: int = 0

    @property
    def role(self) -> Role:
        """The content of the plane."""
        return NUMBERS[self.kind].role if self.kind in NUMBERS else "codes"

    @property
    def width(self) -> int:
        """Bits of each code in this plane; 0 for a number plane."""
        return PLACEMENTS[self.kind].width if self.kind in PLACEMENTS else 0

    def block_bytes(self, n_lanes: int) -> int:
        """Count the bytes of this plane in a block of `n_lanes` lanes."""
        return n_lanes * self.width // 8 if self.width else NUMBERS[self.kind].dtype.itemsize


def pack_number(plane: Plane, values: Tensor) -> Tensor:
    """Pack values [..., n] into bytes, uint8 [..., n * itemsize], in memory of their own."""
    # The copy also has canonical strides, without which an empty or one-wide tensor has no view as bytes.
    dtype = NUMBERS[plane.kind].dtype
    return values.to(dtype, copy=True, memory_format=torch.contiguous_format).view(torch.uint8)


def unpack_number(plane: Plane, data: Tensor) -> Tensor:
    """Unpack bytes, uint8 [..., n * itemsize], to values [..., n] of the plane's dtype."""
    dtype = NUMBERS[plane.kind].dtype
    # A view in a wider dtype needs its alignment, which a slice of a larger buffer may lack.
    distances = (data.storage_offset(), *data.stride()[:-1])
    aligned = data.stride(-1) == 1 and all(distance % dtype.itemsize == 0 for distance in distances)
    return (data if aligned else data.clone(memory_format=torch.contiguous_format)).view(dtype)


def pack_codes(plane: Plane, codes: Tensor) -> Tensor:
    """Pack codes, uint8 [..., lanes], into one plane's bytes, uint8 [..., bytes]."""
    place = PLACEMENTS[plane.kind]
    sizes = place.sizes(codes.shape[-1])
    fields = (codes >> plane.shift) & ((1 << place.width) - 1)
    fields = fields.reshape(*codes.shape[:-1], *sizes) << place.bit_offsets(codes.device)
    for dim, (size, _) in enumerate(place.axes, start=-len(sizes)):
        if size:  # the fields of a byte do not overlap, so their sum is their union
            fields = fields.sum(dim, keepdim=True, dtype=torch.uint8)
    return fields.flatten(-len(sizes))


def unpack_codes(plane: Plane, data: Tensor, n_lanes: int) -> Tensor:
    """Unpack one plane's bytes, uint8 [..., bytes], to its share of the codes, uint8 [..., lanes].

    Codes that are whole bytes may share their memory.
    """
    place = PLACEMENTS[plane.kind]
    if place.width == 8:
        return data
    if len(place.axes) == 2 and not place.axes[1][0]:  # numbers instead of a tensor of them: several times faster
        size, step = place.axes[0]
        fields = torch.stack([data >> (i * step) for i in range(size)], -2)
    else:
        byte_axis = [1 if size else data.shape[-1] for size, _ in place.axes]
        fields = data.reshape(*data.shape[:-1], *byte_axis) >> place.bit_offsets(data.device)
    fields = fields & ((1 << place.width) - 1)
    return (fields << plane.shift if plane.shift else fields).reshape(*data.shape[:-1], n_lanes)
