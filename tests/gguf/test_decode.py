from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from hybridkv.gguf import decode

DECODABLE = [type_ for type_ in GGML_QUANT_SIZES if decode.is_decodable(type_)]


def random_rows(type_: GGMLQuantizationType, n_rows: int, n_blocks: int) -> np.ndarray:
    """Return random bytes: whatever they mean, NaN included, both sides must see the same."""
    rng = np.random.default_rng(int(type_))
    return rng.integers(0, 256, (n_rows, n_blocks * GGML_QUANT_SIZES[type_][1]), np.uint8)


def oracle(raw: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(raw, type_)


def test_what_can_be_decoded() -> None:
    names = decode.decodable_types()
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"} <= set(names)
    assert not {"Q8_1", "Q8_K", "I8", "I64", "F64"} & set(names)


@pytest.mark.parametrize("type_", DECODABLE, ids=lambda type_: type_.name)
@pytest.mark.parametrize(("n_rows", "chunk_rows"), [(1, 1), (7, 1), (7, 3), (7, 100)])
def test_chunks_give_the_whole(
    type_: GGMLQuantizationType, n_rows: int, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_rows(type_, n_rows, 2)
    expected = oracle(raw, type_)
    monkeypatch.setattr(decode, "CHUNK_VALUES", chunk_rows * expected.shape[1])
    target = torch.full(expected.shape, 777.0)
    decode.decode_into(target, raw, type_)
    assert np.array_equal(target.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("type_", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_orders_and_conversion(type_: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(type_, 5, 64 if type_ == GGMLQuantizationType.F32 else 2)
    whole = oracle(raw, type_)
    rng = np.random.default_rng(0)
    rows, cols = rng.permutation(5), rng.permutation(64)
    monkeypatch.setattr(decode, "CHUNK_VALUES", 2 * 64)
    target = torch.full((5, 64), 777.0)
    decode.decode_into(target, raw, type_, rows=rows, cols=cols, values=lambda x: -x)
    for row, place in enumerate(rows):
        assert np.array_equal(target[place].numpy(), -whole[row, cols], equal_nan=True)


def test_conversion_happens_before_rounding() -> None:
    """1 + 2**-12 is 1 in bfloat16; minus one in float32 it is not zero."""
    raw = np.full((1, 32), 1 + 2**-12, np.float32).view(np.uint8)
    target = torch.full((1, 32), 777.0, dtype=torch.bfloat16)
    decode.decode_into(target, raw, GGMLQuantizationType.F32, values=lambda x: x - 1)
    assert torch.equal(target, torch.full((1, 32), 2.0**-12, dtype=torch.bfloat16))


def test_bytes_that_are_neither_aligned_nor_writable() -> None:
    buffer = np.zeros(33 * 4, np.uint8)
    expected = np.arange(32, dtype=np.float32).reshape(1, 32)
    buffer[1:129] = expected.view(np.uint8)
    buffer.flags.writeable = False
    target = torch.full((1, 32), 777.0)
    decode.decode_into(target, buffer[1:129].reshape(1, 128), GGMLQuantizationType.F32)
    assert np.array_equal(target.numpy(), expected)
