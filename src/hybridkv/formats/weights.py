"""The weight types of ggml: one record each, with the layout's facts. A new type is one entry here.

gguf-py's dequantize defines every type's values to the bit; `hybridkv.kernels.weights` reads rows of them in place.
Knows neither torch nor kernels.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hybridkv.errors import UsageError


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The layout of a weight row.

    Parameters
    ----------
    name, ggml_type
        ggml's spelling and type id.
    block, block_bytes
        Values in a block, and the bytes that they take with their scales.
    group
        Values that share a scale; 1 for plain values.
    code_bits
        Bits of a code; those of a value for plain values; whole bits of a value for codes of several.
    has_min
        True if a group's values lie above a minimum.
    codebook
        Value of each code in units of the scale; None if codes are evenly spaced, or index whole groups of values.
    grid
        Class of gguf-py's quants that has the values which codes of 4 or 8 values index; None without such codes.
    source
        Where the layout comes from.
    """

    name: str
    ggml_type: int
    block: int
    block_bytes: int
    group: int
    code_bits: int
    has_min: bool = False
    codebook: tuple[int, ...] | None = None
    grid: str | None = None
    source: str = "ggml-common.h"

    @property
    def is_quantized(self) -> bool:
        """False for f32, f16 and bf16."""
        return self.block > 1

    @property
    def bits_per_value(self) -> float:
        """Bits per value, scales counted."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, n_in: int) -> int:
        """Count the bytes of a row of `n_in` values, which are whole blocks."""
        assert n_in % self.block == 0, (self.name, n_in)
        return n_in // self.block * self.block_bytes

    def rejects(self, n_in: int) -> str | None:
        """Explain why no row has `n_in` values in this type; None if there are such rows."""
        if n_in < 1 or n_in % self.block:
            return f"{self.name} needs a multiple of {self.block} inputs, not {n_in}"
        return None


_IQ4_NL: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_ALL: Final = (
    WeightFormat("f32", 0, 1, 4, 1, 32, source="IEEE 754 binary32"),
    WeightFormat("f16", 1, 1, 2, 1, 16, source="IEEE 754 binary16"),
    WeightFormat("bf16", 30, 1, 2, 1, 16, source="upper half of binary32"),
    WeightFormat("q8_0", 8, 32, 34, 32, 8),
    WeightFormat("q4_0", 2, 32, 18, 32, 4),
    WeightFormat("q4_1", 3, 32, 20, 32, 4, has_min=True),
    WeightFormat("q5_0", 6, 32, 22, 32, 5),
    WeightFormat("q5_1", 7, 32, 24, 32, 5, has_min=True),
    WeightFormat("iq4_nl", 20, 32, 18, 32, 4, codebook=_IQ4_NL),
    WeightFormat("mxfp4", 39, 32, 17, 32, 4, codebook=_MXFP4, source="ggml-common.h; OCP Microscaling Formats 1.0"),
    WeightFormat("q2_K", 10, 256, 84, 16, 2, has_min=True),
    WeightFormat("q3_K", 11, 256, 110, 16, 3),
    WeightFormat("q4_K", 12, 256, 144, 32, 4, has_min=True),
    WeightFormat("q5_K", 13, 256, 176, 32, 5, has_min=True),
    WeightFormat("q6_K", 14, 256, 210, 16, 6),
    WeightFormat("iq4_xs", 23, 256, 136, 32, 4, codebook=_IQ4_NL),
    WeightFormat("iq2_xxs", 16, 256, 66, 32, 2, grid="IQ2_XXS"),
    WeightFormat("iq2_xs", 17, 256, 74, 16, 2, grid="IQ2_XS"),
    WeightFormat("iq2_s", 22, 256, 82, 16, 2, grid="IQ2_S"),
    WeightFormat("iq3_xxs", 18, 256, 98, 32, 3, grid="IQ3_XXS"),
    WeightFormat("iq3_s", 21, 256, 110, 32, 3, grid="IQ3_S"),
    WeightFormat("iq1_s", 19, 256, 50, 32, 1, grid="IQ1_S"),
    WeightFormat("iq1_m", 29, 256, 56, 16, 1, grid="IQ1_S"),
)

WEIGHTS: Final[Mapping[str, WeightFormat]] = MappingProxyType({fmt.name: fmt for fmt in _ALL})

_BY_TYPE: Final = MappingProxyType({fmt.ggml_type: fmt for fmt in _ALL})


def get_weight_format(name: str | int) -> WeightFormat:
    """Look a weight type up by ggml's spelling, in any case, or by ggml's type id.

    Raises
    ------
    UsageError
        There is no such type; the hint names the nearest.
    """
    if isinstance(name, int):
        if name in _BY_TYPE:
            return _BY_TYPE[name]
        raise UsageError(f"unknown weight type {name}; allowed: {', '.join(WEIGHTS)}")
    spelling = {key.lower(): key for key in WEIGHTS}
    if name.lower() in spelling:
        return WEIGHTS[spelling[name.lower()]]
    near = difflib.get_close_matches(name.lower(), spelling, n=1, cutoff=0.4)
    raise UsageError(
        f"unknown weight type {name!r}; allowed: {', '.join(WEIGHTS)}",
        hint=f"did you mean {spelling[near[0]]!r}?" if near else None,
    )
