"""Bit placements against ggml's layouts written out lane by lane."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hybridkv.formats.packing import (
    PLACEMENTS,
    CodeKind,
    Plane,
    pack_codes,
    pack_number,
    unpack_codes,
    unpack_number,
)

# Lane -> (byte, lowest bit) within the plane of one block of 32, as in the C structs' pack loops.
LAYOUT: dict[str, Callable[[int], tuple[int, int]]] = {
    "bytes": lambda j: (j, 0),
    "nibbles": lambda j: (j % 16, 4 * (j // 16)),
    "pairs": lambda j: (j % 8, 4 * (j % 16 // 8) + 2 * (j // 16)),
    "bits": lambda j: (j // 8, j % 8),
}


def test_every_placement_has_an_oracle() -> None:
    assert LAYOUT.keys() == PLACEMENTS.keys()


@pytest.mark.parametrize("kind", LAYOUT)
@pytest.mark.parametrize("shift", [0, 2, 4])
def test_pack_codes(kind: CodeKind, shift: int) -> None:
    plane = Plane(kind, 0 if kind == "bytes" else shift)
    codes = torch.randint(0, 256, (7, 3, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    mask = 2**plane.width - 1
    expected = torch.zeros(7, 3, plane.block_bytes(32), dtype=torch.int32)
    for lane in range(32):
        byte, bit = LAYOUT[kind](lane)
        expected[..., byte] += ((codes[..., lane].int() >> plane.shift) & mask) << bit
    packed = pack_codes(plane, codes)
    assert torch.equal(packed, expected.byte())
    assert torch.equal(unpack_codes(plane, packed, 32), codes & (mask << plane.shift))


@pytest.mark.parametrize("kind", LAYOUT)
def test_every_bit_of_a_plane_belongs_to_one_lane(kind: CodeKind) -> None:
    plane = Plane(kind)
    one_hot = torch.eye(32, dtype=torch.uint8) * (2**plane.width - 1)
    packed = pack_codes(plane, one_hot)
    assert torch.equal(packed.sum(0, dtype=torch.int64), torch.full((plane.block_bytes(32),), 255))


def test_numbers_are_read_from_unaligned_and_strided_memory() -> None:
    plane = Plane("d_f32")
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    buffer = torch.full((6, 27), 0xFF, dtype=torch.uint8)
    buffer[:, 3:23] = pack_number(plane, values)
    assert torch.equal(unpack_number(plane, buffer[:, 3:23]), values)
    assert torch.equal(unpack_number(plane, buffer[::2, 3:23]), values[::2])
    aligned = torch.full((6, 28), 0xFF, dtype=torch.uint8)
    aligned[:, 4:24] = pack_number(plane, values)
    assert torch.equal(unpack_number(plane, aligned[:, 4:24]), values)
    assert unpack_number(plane, aligned[:, 4:24]).untyped_storage().data_ptr() == aligned.data_ptr()
    spread = torch.stack([aligned, aligned], dim=-1)[..., 0]
    assert torch.equal(unpack_number(plane, spread[:, 4:24]), values)
