"""The GPU's layout of weight types whose codes index groups of values: their planes, and the grid that all share.

A lane has 8 inputs of every run of 32, which are one index of the grid (8 values) or two (4 values). Indices keep their
bits. Seven bits of signs, which stand for eight, become eight: iq2_xxs, iq2_xs and iq3_xxs take 4 bytes more for 256
inputs than in the file.

Owns the planes. `packed_layout.py` lists the types, `packed_grid.py` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from hybridkv.formats.weights import WEIGHTS
from hybridkv.kernels.grids import grid_bytes

RUNS: Final = 8
"""Runs of 32 inputs in a block."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of a type's codes; a constant of the kernels.

    Parameters
    ----------
    values
        That an index stands for: 8 or 4.
    high
        Bits of an index above its byte.
    group
        Inputs that share an integer scale: 32 or 16.
    unit
        What the products of values and integer scales count, in d.
    signed
        Whether signs are apart; the values of iq1 are signed, and an eighth more or less.
    """

    values: int
    high: int
    group: int
    unit: float
    signed: bool = True

    @property
    def main_bytes(self) -> int:
        """Bytes of a block's indices, but their high bits, and of its signs."""
        return 256 // self.values + (32 if self.signed else 0)

    @property
    def side_bytes(self) -> int:
        """Bytes of a block's integer scales and of the high bits of its indices."""
        if not self.signed:
            return 16 if self.group == 32 else 24
        return 32 // self.values * self.high + (4 if self.group == 32 else 8)

    @property
    def last_bytes(self) -> int:
        """Bytes of d; iq1_m has it among its scales."""
        return 2 if self.signed or self.group == 32 else 0


GRIDS: Final[Mapping[str, Grid]] = {
    "iq2_xxs": Grid(8, 0, 32, 0.125),
    "iq2_xs": Grid(8, 1, 16, 0.125),
    "iq2_s": Grid(8, 2, 16, 0.125),
    "iq3_xxs": Grid(4, 0, 32, 0.25),
    "iq3_s": Grid(4, 1, 32, 1.0),
    "iq1_s": Grid(8, 3, 32, 0.125, signed=False),
    "iq1_m": Grid(8, 3, 16, 0.125, signed=False),
}


@cache
def grid_on(name: str, device: torch.device) -> Tensor:
    """Put the grid of a type on a device, once: uint8 `[entries, values]`.

    Values 0 and 1, 2 and 3 of four lie 16 bits apart, as those of a word of the kernels do.
    """
    table = torch.from_numpy(grid_bytes(WEIGHTS[name]))
    return table.view(len(table), -1, 4)[:, :, [0, 2, 1, 3]].flatten(1).contiguous().to(device)


def convert_grid(name: str, blocks: Tensor) -> list[Tensor]:
    """Return the planes of blocks `[n, block_bytes]`: indices with signs, scales with high bits, d if it is apart."""
    grid = GRIDS[name]
    index, signs, scales, d = _READ[name](blocks)
    n, each = len(blocks), 8 // grid.values
    # By lanes: [blocks, lanes, runs, indices of a run].
    index = index.view(n, RUNS, 4, each).transpose(1, 2)
    main = (index & 255).to(torch.uint8).reshape(n, 4, -1)
    if grid.signed:
        assert signs is not None and d is not None
        own = _parted(signs).view(n, RUNS, 4).transpose(1, 2)
        # Sixteen bytes of each lane together, so that a warp loads whole sectors.
        main = torch.cat([main, own], 2) if each == 1 else torch.cat([main.flatten(1), own.flatten(1)], 1)
        side = [_fields(index.reshape(n, 4, -1) >> 8, grid.high)] if grid.high else []
        return [main.reshape(n, -1), torch.cat([*side, _nibbles(scales)], 1), d]
    if d is not None:
        return [main.reshape(n, -1), scales, d]
    assert signs is not None  # of an eighth
    own = _fields(index.reshape(n, 4, -1) >> 8 | signs.view(n, RUNS, 4).transpose(1, 2) << 3, 4)
    return [main.reshape(n, -1), torch.cat([scales, own], 1)]


def _fields(values: Tensor, bits: int) -> Tensor:
    """Pack the `bits` low bits of a lane's numbers `[n, 4, m]`, bytes in a row of all lanes."""
    shifts = bits * torch.arange(values.shape[2], device=values.device)
    words = (values.to(torch.int64) << shifts).sum(2)
    n_bytes = bits * values.shape[2] // 8
    return torch.stack([words >> 8 * i & 255 for i in range(n_bytes)], 2).to(torch.uint8).flatten(1)


def _nibbles(scales: Tensor) -> Tensor:
    return scales[:, 0::2] | scales[:, 1::2] << 4


def _parted(signs: Tensor) -> Tensor:
    """Sort bytes of signs: those of even values into the lower nibble, of odd ones into the upper."""
    out = torch.zeros_like(signs)
    for i in range(8):
        out |= (signs >> i & 1) << (i // 2 + i % 2 * 4)
    return out


def _even(seven: Tensor) -> Tensor:
    """Extend seven bits of signs to eight, whose number is even."""
    odd = seven ^ seven >> 4
    odd = odd ^ odd >> 2
    odd = (odd ^ odd >> 1) & 1
    return (seven | odd << 7).to(torch.uint8)


def _words(b: Tensor, bits: int) -> Tensor:
    """Read little-endian numbers of 16 or 32 bits, int64."""
    parts = b.reshape(len(b), -1, bits // 8).to(torch.int64)
    return (parts << 8 * torch.arange(bits // 8, device=b.device)).sum(2)


def _two(nibbles: Tensor) -> Tensor:
    """Split bytes into both nibbles, the lower first."""
    return torch.stack([nibbles & 15, nibbles >> 4], 2).flatten(1)


def _four_signs(words: Tensor) -> Tensor:
    """Read the signs of 32 values from 28 bits of words `[n, 8]`."""
    return _even(torch.stack([words >> 7 * i & 127 for i in range(4)], 2)).flatten(1)


def _high_bits(b: Tensor, bits: int) -> Tensor:
    """Split bytes into fields, int64, those of the lowest bits first."""
    shifts = torch.arange(0, 8, bits, device=b.device)
    return (b.to(torch.int64)[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)


_Parts = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _iq2_xxs(b: Tensor) -> _Parts:
    pairs = b[:, 2:].reshape(len(b), RUNS, 8)
    words = _words(pairs[:, :, 4:].reshape(len(b), -1), 32)
    return pairs[:, :, :4].flatten(1).long(), _four_signs(words), (words >> 28).to(torch.uint8), b[:, :2].contiguous()


def _iq2_xs(b: Tensor) -> _Parts:
    words = _words(b[:, 2:66], 16)
    return words & 511, _even(words >> 9), _two(b[:, 66:]), b[:, :2].contiguous()


def _iq2_s(b: Tensor) -> _Parts:
    index = b[:, 2:34].long() | _high_bits(b[:, 66:74], 2) << 8
    return index, b[:, 34:66], _two(b[:, 74:]), b[:, :2].contiguous()


def _iq3_xxs(b: Tensor) -> _Parts:
    words = _words(b[:, 66:], 32)
    return b[:, 2:66].long(), _four_signs(words), (words >> 28).to(torch.uint8), b[:, :2].contiguous()


def _iq3_s(b: Tensor) -> _Parts:
    index = b[:, 2:66].long() | _high_bits(b[:, 66:74], 1) << 8
    return index, b[:, 74:106], _two(b[:, 106:]), b[:, :2].contiguous()


def _iq1_s(b: Tensor) -> _Parts:
    """Split IQ1_S blocks: scales, eighths and high bits stay together, as the file has them."""
    return b[:, 2:34].long(), None, b[:, 34:], b[:, :2].contiguous()


def _iq1_m(b: Tensor) -> _Parts:
    """Split IQ1_M blocks: each half's eight scales of three bits lie below a byte of d."""
    nibbles = _two(b[:, 32:48])
    words = _words(b[:, 48:], 16)
    d = sum((words[:, i] >> 12) << 4 * i for i in range(4))
    assert isinstance(d, Tensor)
    scales = torch.stack([words >> 3 * i & 7 for i in range(4)], 2).view(len(b), 2, 8)
    halves = (scales << 3 * torch.arange(8, device=b.device)).sum(2) | torch.stack([d & 255, d >> 8], 1) << 24
    bytes_ = torch.stack([halves >> 8 * i & 255 for i in range(4)], 2).to(torch.uint8).flatten(1)
    return b[:, :32].long() | (nibbles & 7).long() << 8, (nibbles >> 3).long(), bytes_, None


_READ: Final[Mapping[str, Callable[[Tensor], _Parts]]] = {
    "iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s, "iq3_xxs": _iq3_xxs, "iq3_s": _iq3_s, "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
}  # fmt: skip
"""From blocks to whole indices, signs, integer scales and d."""
