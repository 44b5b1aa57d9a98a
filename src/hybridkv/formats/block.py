"""The record of a stored KV block's format, and encode and decode derived from it.

Owns `KVFormat`. The arithmetic is in `hybridkv.formats.rules`, the bytes in `hybridkv.formats.packing`, the
formats themselves in `hybridkv.formats.table`. Called by everything that stores, reads, counts or names KV
types. Nothing here asks for a format by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import packing, rules
from hybridkv.formats.packing import Plane
from hybridkv.formats.rules import Refit, Rounding, Scale, ScaleRule

Planes = tuple[Tensor, ...]

# Encoding in chunks of this many values keeps the temporaries in the processor's cache, and few.
_CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class KVFormat:
    """The layout of a row (one token, one head) of `head_dim` values.

    Parameters
    ----------
    name, ggml_type
        ggml's spelling and type id; ik_llama.cpp's for its own types.
    block
        Values that share a scale; None for one block per row; 1 for plain values.
    planes
        In ggml's byte order within a block.
    rule
        What the scale is taken from.
    rounding
        How a scaled value becomes a code.
    zero
        Code of the value 0, in a format without codebook.
    codebook
        Value of each code in units of the scale, ascending; None if codes are evenly spaced.
    refit
        How the scale, and the minimum, are fitted to the codes; None where there is none.
    starts
        What a block's largest magnitude is scaled to, for each fit that the refit `starts` tries.
    rotated
        True if it is made for rotated rows: a policy that chooses it rotates that side.
    default_scale
        The `scale` that `encode` takes unless told.
    reference_scale
        The `scale` with which the bytes equal ggml's C reference.
    source
        Where layout and arithmetic come from.
    """

    name: str
    ggml_type: int
    block: int | None
    planes: tuple[Plane, ...]
    rule: ScaleRule
    rounding: Rounding = "even"
    zero: int = 0
    codebook: tuple[int, ...] | None = None
    refit: Refit | None = None
    starts: tuple[int, ...] = ()
    rotated: bool = False
    default_scale: Scale = "absmax"
    reference_scale: Scale = "absmax"
    source: str = ""

    @property
    def is_quantized(self) -> bool:
        """False for f32, f16 and bf16."""
        return self.rule != "cast"

    @property
    def has_min(self) -> bool:
        """True if a block stores its minimum."""
        return any(plane.role == "m" for plane in self.planes)

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Scale rules that `encode` takes."""
        return ("absmax",) if self.refit is None else ("absmax", "refit")

    @property
    def code_bits(self) -> int:
        """Bits of a code; 0 for plain values."""
        return sum(plane.width for plane in self.planes)

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code; the lowest is negative if codes are stored in two's complement."""
        if self.rule == "abs_max" and self.codebook is None:
            highest: int = 2 ** (self.code_bits - 1) - 1
            return -highest, highest
        return 0, 2**self.code_bits - 1

    @property
    def extreme_code(self) -> int:
        """The code of the extreme value, by which it is divided to give the scale."""
        if self.rule == "signed_max":
            return self.codebook[0] if self.codebook else -self.zero
        return self.codebook[-1] if self.codebook else self.code_range[1]

    def lanes(self, head_dim: int) -> int:
        """Return the values in a block of a row of `head_dim` values, padding counted."""
        return self.block or head_dim

    def n_blocks(self, head_dim: int) -> int:
        """Count the blocks in a row; the last may be padded."""
        return -(-head_dim // self.lanes(head_dim))

    def plane_bytes(self, head_dim: int) -> tuple[int, ...]:
        """Count the bytes of each plane in a row."""
        lanes, n_blocks = self.lanes(head_dim), self.n_blocks(head_dim)
        return tuple(n_blocks * plane.block_bytes(lanes) for plane in self.planes)

    def row_bytes(self, head_dim: int) -> int:
        """Count the bytes of a row, the same in planes and in ggml's blocks; a padded last block counts in full."""
        return sum(self.plane_bytes(head_dim))

    def bits_per_value(self, head_dim: int) -> float:
        """Count the bits of a row per value, scales and padding counted."""
        return 8 * self.row_bytes(head_dim) / head_dim

    def rejects(self, head_dim: int) -> str | None:
        """Explain why rows of `head_dim` values are not offered in this format; None if they are."""
        if self.is_quantized and self.block is not None and head_dim % 16:
            return f"{self.name} needs a head dim that is a multiple of 16, not {head_dim}"
        return None

    def encode(self, x: Tensor, scale: Scale | None = None) -> Planes:
        """Encode rows.

        Parameters
        ----------
        x
            Float tensor [..., D], any float dtype, any device.
        scale
            One of `scales`; None for `default_scale`.

        Returns
        -------
        tuple
            One uint8 tensor [..., plane_bytes[i]] per plane. A block with a NaN or an infinity, or with a
            scale too large for its plane, decodes to non-finite values. Padding lanes are zeros or, in a
            format whose fit weighs every lane alike, copies of those before them: they join no scale, minimum
            or sum.

        Raises
        ------
        UsageError
            This format has no such scale rule.
        """
        scale = scale or self.default_scale
        if scale not in self.scales:
            raise UsageError(
                f"{self.name} has no scale rule {scale!r}; allowed: {', '.join(self.scales)}",
                hint="plain values have no scale to fit",
            )
        x = x.detach()
        if not self.is_quantized:
            return (packing.pack_number(self.planes[0], x),)
        rows, head_dim = x.shape[:-1], x.shape[-1]
        lanes, n_blocks = self.lanes(head_dim), self.n_blocks(head_dim)
        blocks = self._pad(x, lanes * n_blocks - head_dim).reshape(rows.numel() * n_blocks, lanes)
        chunks = torch.split(blocks, max(1, _CHUNK_VALUES // lanes))
        parts = [self._encode_blocks(chunk.float(), scale) for chunk in chunks]
        planes = (torch.cat(part) for part in zip(*parts, strict=True))
        return tuple(plane.reshape(*rows, n_blocks * plane.shape[-1]) for plane in planes)

    def decode(self, planes: Sequence[Tensor], head_dim: int) -> Tensor:
        """Decode planes, as `encode` returns them, to float32 [..., D]; for f32 it may share their memory."""
        if not self.is_quantized:
            return packing.unpack_number(self.planes[0], planes[0]).float()
        lanes, n_blocks = self.lanes(head_dim), self.n_blocks(head_dim)
        codes: Tensor | None = None
        numbers: dict[packing.Role, Tensor] = {}
        for plane, data in zip(self.planes, planes, strict=True):
            if plane.role == "codes":
                share = packing.unpack_codes(plane, _split_blocks(data, n_blocks), lanes)
                codes = share if codes is None else codes | share
            else:
                numbers[plane.role] = packing.unpack_number(plane, data).float()[..., None]
        assert codes is not None
        x = self._values(codes).mul_(numbers["d"])
        if self.has_min:
            x += numbers["m"]
        return x.flatten(-2)[..., :head_dim]

    def to_ggml(self, planes: Sequence[Tensor], head_dim: int) -> Tensor:
        """Join planes to block bytes in ggml's order, uint8 [..., row_bytes]."""
        n_blocks = self.n_blocks(head_dim)
        return torch.cat([_split_blocks(data, n_blocks) for data in planes], dim=-1).flatten(-2)

    def from_ggml(self, rows: Tensor, head_dim: int) -> Planes:
        """Split ggml's block bytes, uint8 [..., row_bytes], into planes."""
        n_blocks = self.n_blocks(head_dim)
        sizes = [n // n_blocks for n in self.plane_bytes(head_dim)]
        parts = torch.split(_split_blocks(rows, n_blocks), sizes, dim=-1)
        return tuple(part.flatten(-2).contiguous() for part in parts)

    def _pad(self, x: Tensor, n_pad: int) -> Tensor:
        if n_pad == 0:
            return x
        again = x[..., -n_pad:] if self.refit in ("starts", "line") else x.new_zeros(*x.shape[:-1], n_pad)
        return torch.cat([x, again], dim=-1)

    def _encode_blocks(self, x: Tensor, scale: Scale) -> Planes:
        """Encode blocks, float32 [N, lanes], to one uint8 [N, bytes] per plane."""
        extreme, low = rules.extremes(x, self.rule)
        d = rules.divide(extreme, self.extreme_code)
        y = (x if low is None else x - low) * rules.inverse(d)
        book = self._book(x.device)
        codes = (
            rules.to_codes(y, self.rounding, self.zero, *self.code_range) if book is None else rules.to_nearest(y, book)
        )
        match self.refit if scale == "refit" else None:
            case "pairs":
                d = rules.refit_pairs(x, self._values(codes), d)
            case "line":
                assert low is not None
                d, low = rules.refit_line(x, self._values(codes), d, low)
            case "search":
                assert book is not None
                codes, d = rules.refit_search(x, codes, d, book)
            case "starts":
                assert book is not None
                codes, d = rules.refit_starts(x, d, book, self.starts)
            case None:
                pass
        return tuple(self._pack(plane, codes, d, low) for plane in self.planes)

    def _pack(self, plane: Plane, codes: Tensor, d: Tensor, low: Tensor | None) -> Tensor:
        match plane.role:
            case "codes":
                return packing.pack_codes(plane, codes)
            case "d":
                number = d
            case "m":
                assert low is not None
                number = low
            case "s":
                number = self._values(codes).sum(-1, keepdim=True) * d
            case "sum":
                number = self._values(codes).sum(-1, keepdim=True)
            case "x":
                raise AssertionError("plain values have no blocks")
        return packing.pack_number(plane, number)

    def _values(self, codes: Tensor) -> Tensor:
        """Look up the values of codes, uint8, in units of the scale, float32."""
        book = self._book(codes.device)
        if book is not None:
            return book.index_select(0, codes.flatten().int()).view(codes.shape)
        if self.code_range[0] < 0:
            return codes.view(torch.int8).float()
        return codes.float().sub_(self.zero)

    def _book(self, device: torch.device) -> Tensor | None:
        return torch.tensor(self.codebook, dtype=torch.float32, device=device) if self.codebook else None


def _split_blocks(data: Tensor, n_blocks: int) -> Tensor:
    """Split bytes of whole rows, uint8 [..., n_blocks * bytes], to [..., n_blocks, bytes]."""
    return data.reshape(*data.shape[:-1], n_blocks, data.shape[-1] // n_blocks)
