"""The KV-cache formats: one record each. A new format is one entry here.

A format that places its bits in a new way also needs one entry in `hybridkv.formats.packing.PLACEMENTS`.
Command-line choices, sizes, the planner, kernels' parameters and tests derive from this table.

Every quantized format defaults to the refit: `bench/scale_rule.py` measures a smaller error of decode and of
attention with it for all of them, on normal and heavy-tailed rows, rotated or not.

The hq formats are ours, for rotated rows: docs/decisions/own-formats.md. Their type ids are ours too, far above
those that ggml and ik_llama.cpp give out; `bench/codebooks.py` derives their codebooks and starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from hybridkv.errors import UsageError
from hybridkv.formats.block import KVFormat
from hybridkv.formats.packing import Plane

_D, _M = Plane("d_f16"), Plane("m_f16")
_BYTES, _NIBBLES, _BIT_4, _BITS_45 = Plane("bytes"), Plane("nibbles"), Plane("bits", 4), Plane("pairs", 4)
_PAIRS, _BIT_2 = Plane("pairs"), Plane("bits", 2)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_OWN = "docs/decisions/own-formats.md"


def _mirrored(*half: int) -> tuple[int, ...]:
    return (*(-value for value in reversed(half)), *half)


_ALL: Final = (
    KVFormat("f32", 0, 1, (Plane("x_f32"),), "cast", source="IEEE 754 binary32"),
    KVFormat("f16", 1, 1, (Plane("x_f16"),), "cast", source="IEEE 754 binary16"),
    KVFormat("bf16", 30, 1, (Plane("x_bf16"),), "cast", source="upper half of binary32"),
    KVFormat(
        "q8_0", 8, 32, (_D, _BYTES), "abs_max", "away",
        refit="pairs", default_scale="refit", source="ggml quantize_row_q8_0_ref",
    ),
    KVFormat(
        "q8_1", 9, 32, (_D, Plane("s_f16"), _BYTES), "abs_max", "away",
        refit="pairs", default_scale="refit", source="ggml quantize_row_q8_1_ref",
    ),
    KVFormat(
        "q8_KV", 151, None, (Plane("d_f32"), Plane("sum_i32"), _BYTES), "abs_max", "even",
        refit="pairs", default_scale="refit", source="ik_llama.cpp quantize_row_q8_KV_ref",
    ),
    KVFormat(
        "q6_0", 133, 32, (_D, _BITS_45, _NIBBLES), "signed_max", "up", zero=32,
        refit="pairs", default_scale="refit", reference_scale="refit",
        source="ik_llama.cpp quantize_row_q6_0_ref",
    ),
    KVFormat(
        "q5_0", 6, 32, (_D, _BIT_4, _NIBBLES), "signed_max", "up", zero=16,
        refit="pairs", default_scale="refit", source="ggml quantize_row_q5_0_ref",
    ),
    KVFormat(
        "q5_1", 7, 32, (_D, _M, _BIT_4, _NIBBLES), "min_max", "up",
        refit="line", default_scale="refit", source="ggml quantize_row_q5_1_ref",
    ),
    KVFormat(
        "q4_0", 2, 32, (_D, _NIBBLES), "signed_max", "up", zero=8,
        refit="pairs", default_scale="refit", source="ggml quantize_row_q4_0_ref",
    ),
    KVFormat(
        "q4_1", 3, 32, (_D, _M, _NIBBLES), "min_max", "up",
        refit="line", default_scale="refit", source="ggml quantize_row_q4_1_ref",
    ),
    KVFormat(
        "iq4_nl", 20, 32, (_D, _NIBBLES), "signed_max", "nearest", codebook=_IQ4_NL,
        refit="search", default_scale="refit", reference_scale="refit",
        source="ik_llama.cpp quantize_row_iq4_nl_ref",
    ),
    KVFormat(
        "hq4_nl", 1004, 32, (_D, _NIBBLES), "abs_max", "nearest", codebook=_mirrored(6, 18, 31, 45, 60, 77, 98, 127),
        refit="starts", starts=(121, 125, 130, 135, 140), rotated=True, default_scale="refit", source=_OWN,
    ),
    KVFormat(
        "hq3_nl", 1003, 32, (_D, _BIT_2, _PAIRS), "abs_max", "nearest", codebook=_mirrored(14, 42, 77, 127),
        refit="starts", starts=(121, 132, 143, 154, 165), rotated=True, default_scale="refit", source=_OWN,
    ),
    KVFormat(
        "hq2_nl", 1002, 32, (_D, _PAIRS), "abs_max", "nearest", codebook=_mirrored(37, 127),
        refit="starts", starts=(152, 176, 200, 224, 248), rotated=True, default_scale="refit", source=_OWN,
    ),
)  # fmt: skip

FORMATS: Final[Mapping[str, KVFormat]] = MappingProxyType({fmt.name: fmt for fmt in _ALL})


def get_format(name: str) -> KVFormat:
    """Look a format up by ggml's spelling.

    Raises
    ------
    UsageError
        There is no such format; the hint names the nearest.
    """
    if name in FORMATS:
        return FORMATS[name]
    spelling = {key.lower(): key for key in FORMATS}
    begun = [key for key in spelling if name and key.startswith(name.lower())]
    near = begun[:1] or difflib.get_close_matches(name.lower(), spelling, n=1, cutoff=0.4)
    raise UsageError(
        f"unknown KV cache type {name!r}; allowed: {', '.join(FORMATS)}",
        hint=f"did you mean {spelling[near[0]]!r}?" if near else None,
    )
