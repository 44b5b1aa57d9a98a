"""Encode and decode equal the reference implementations bit for bit.

Two oracles. gguf-py's NumPy code follows ggml's C as written. The compiled ggml of the ik-llama-cpp-python
wheel is that C with `a*b + c` contracted to a fused multiply-add. Where the two differ in principle:

* q4_0, q5_0: `x*id + 8.5` is contracted in the wheel. We equal gguf-py; on values of few significant bits,
  which meet ties, 1 code in 10**4 differs from the wheel.
* q6_0, iq4_nl: the sums of the least-squares fit are contracted. gguf-py has no encoder; we equal the wheel.

ik_llama.cpp fills its KV cache with SIMD variants, which round otherwise than its references;
`test_variants_stay_close` says by how much.
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from hybridkv.formats import FORMATS, KVFormat, Scale, packing
from tests.formats.rows import HEAD_DIM, ROWS, rows
from tests.oracles import ik_ggml

Bytes = npt.NDArray[np.uint8]

GGUF_ENCODES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
GGUF_DECODES = (*GGUF_ENCODES, "iq4_nl")
WHEEL_ENCODES = ("q8_0", "q8_1", "q8_KV", "q6_0", "q5_1", "q4_1", "iq4_nl")


def encode(fmt: KVFormat, x: npt.NDArray[np.float32]) -> Bytes:
    planes = fmt.encode(torch.from_numpy(x), fmt.reference_scale)
    return fmt.to_ggml(planes, x.shape[1]).numpy()


def decode(fmt: KVFormat, packed: Bytes, head_dim: int = HEAD_DIM) -> npt.NDArray[np.float32]:
    return fmt.decode(fmt.from_ggml(torch.from_numpy(packed), head_dim), head_dim).numpy()


def assert_same_bits(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def random_bytes(fmt: KVFormat) -> Bytes:
    """Every code, with finite scales: random bytes, then the number planes from encoded rows."""
    planes = list(fmt.encode(torch.from_numpy(rows("mixed_magnitudes"))))
    for i, plane in enumerate(fmt.planes):
        if plane.role == "codes":
            seeded = torch.Generator().manual_seed(1)
            planes[i] = torch.randint(0, 256, planes[i].shape, generator=seeded, dtype=torch.uint8)
    return fmt.to_ggml(planes, HEAD_DIM).numpy()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", GGUF_ENCODES)
def test_encode_equals_gguf_py(name: str, kind: str) -> None:
    x = rows(kind)
    theirs = gguf.quantize(x, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(encode(FORMATS[name], x), theirs.view(np.uint8))


@pytest.mark.parametrize("name", GGUF_DECODES)
def test_decode_equals_gguf_py(name: str) -> None:
    packed = random_bytes(FORMATS[name])
    theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    assert_same_bits(decode(FORMATS[name], packed), theirs)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", WHEEL_ENCODES)
def test_encode_equals_compiled_c(name: str, kind: str) -> None:
    fmt, x = FORMATS[name], rows(kind)
    theirs = ik_ggml.encode(name, x, fmt.row_bytes(HEAD_DIM))
    ours = encode(fmt, x)
    if name == "iq4_nl":
        # The C function leaves the codes of a block of zeros as they were in the block before.
        blank = np.abs(x.reshape(-1, 32)).max(axis=1) < 1e-15
        ours, theirs = ours.reshape(-1, 18), theirs.reshape(-1, 18)
        assert not decode(fmt, ours[blank], 32).any()
        ours, theirs = ours[~blank], theirs[~blank]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ik_ggml.DEQUANTIZE)
def test_decode_equals_compiled_c(name: str) -> None:
    packed = random_bytes(FORMATS[name])
    assert_same_bits(decode(FORMATS[name], packed), ik_ggml.decode(name, packed, HEAD_DIM))


@pytest.mark.parametrize("head_dim", [16, 48, 80, 112])
@pytest.mark.parametrize("name", WHEEL_ENCODES)
def test_padded_rows_equal_compiled_c_on_rows_padded_by_hand(name: str, head_dim: int) -> None:
    fmt, x = FORMATS[name], rows("offset" if FORMATS[name].has_min else "normal")[:, :head_dim].copy()
    n_pad = -head_dim % 32  # zeros would join a minimum
    padded = np.concatenate([x, x[:, -n_pad:] if fmt.has_min else np.zeros((len(x), n_pad), np.float32)], axis=1)
    theirs = ik_ggml.encode(name, padded, fmt.row_bytes(padded.shape[1]))
    np.testing.assert_array_equal(encode(fmt, x), theirs[:, : fmt.row_bytes(head_dim)])


@pytest.mark.parametrize("head_dim", [1, 7, 33])
def test_q8_kv_of_any_head_dim_equals_compiled_c_on_zero_padded_rows(head_dim: int) -> None:
    fmt, x = FORMATS["q8_KV"], rows("normal")[:, :head_dim].copy()
    padded = np.pad(x, ((0, 0), (0, -head_dim % 32)))
    theirs = ik_ggml.encode("q8_KV", padded, fmt.row_bytes(padded.shape[1]))
    np.testing.assert_array_equal(encode(fmt, x), theirs[:, : head_dim + 8])


# C function -> scale rule nearest to it, largest fraction of codes that may differ. Measured on 40000 x 128
# values: normal, and normal cut to bfloat16, which meets ties.
VARIANTS = [
    ("q8_0", "quantize_row_q8_0", "absmax", "normal", 1e-5),  # 2.0e-6: 127/max as inverse, halves to even
    ("q8_0", "quantize_row_q8_0", "absmax", "bf16", 3e-3),  # 1.3e-3
    ("q8_1", "quantize_row_q8_1", "absmax", "bf16", 3e-3),  # 1.3e-3
    ("q4_0", "quantize_row_q4_0_ref", "absmax", "bf16", 5e-4),  # 7.0e-5: x*id + 8.5 rounded once
    ("q5_0", "quantize_row_q5_0_ref", "absmax", "bf16", 5e-4),  # 9.7e-5: x*id + 16.5 rounded once
    ("q4_0", "quantize_row_q4_0", "refit", "normal", 1e-5),  # 2.0e-7: halves to even
    ("q4_0", "quantize_row_q4_0", "refit", "bf16", 1e-2),  # 4.6e-3: and, of two extremes, the negative one
]


@pytest.mark.parametrize(("name", "symbol", "scale", "kind", "limit"), VARIANTS)
def test_variants_stay_close(name: str, symbol: str, scale: Scale, kind: str, limit: float) -> None:
    fmt, x = FORMATS[name], rows(kind)
    theirs = ik_ggml.encode(name, x, fmt.row_bytes(HEAD_DIM), symbol=symbol)
    n_blocks, lanes = fmt.n_blocks(HEAD_DIM), fmt.lanes(HEAD_DIM)
    n_codes = n_different = 0
    pairs = zip(
        fmt.planes,
        fmt.encode(torch.from_numpy(x), scale),
        fmt.from_ggml(torch.from_numpy(theirs), HEAD_DIM),
        strict=True,
    )
    for plane, ours, others in pairs:
        if plane.role == "codes":
            blocks = (data.reshape(len(x) * n_blocks, -1) for data in (ours, others))
            a, b = (packing.unpack_codes(plane, data, lanes) for data in blocks)
            n_codes, n_different = a.numel(), n_different + int((a != b).sum())
    assert n_codes == x.size
    assert n_different <= limit * n_codes
