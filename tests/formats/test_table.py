"""The table: sizes, type ids, lookup, and a format that it does not hold."""

from __future__ import annotations

import dataclasses

import gguf
import pytest
import torch

from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS, KVFormat, Plane, get_format

# Bytes per block of 32, for head dims of whole blocks.
BLOCK_BYTES = {
    "f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q8_1": 36, "q6_0": 26, "q5_0": 22, "q5_1": 24,
    "q4_0": 18, "q4_1": 20, "iq4_nl": 18, "hq4_nl": 18, "hq3_nl": 14, "hq2_nl": 10,
}  # fmt: skip
IK_TYPE_IDS = {"q6_0": 133, "q8_KV": 151}
OUR_TYPE_IDS = {"hq4_nl": 1004, "hq3_nl": 1003, "hq2_nl": 1002}


def test_order_and_names() -> None:
    order = "f32 f16 bf16 q8_0 q8_1 q8_KV q6_0 q5_0 q5_1 q4_0 q4_1 iq4_nl hq4_nl hq3_nl hq2_nl"
    assert list(FORMATS) == order.split()
    assert all(fmt.name == name for name, fmt in FORMATS.items())


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_type_ids(fmt: KVFormat) -> None:
    if fmt.name in IK_TYPE_IDS | OUR_TYPE_IDS:
        assert fmt.ggml_type == (IK_TYPE_IDS | OUR_TYPE_IDS)[fmt.name]
    else:
        assert fmt.ggml_type == gguf.GGMLQuantizationType[fmt.name.upper()]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 192, 256, 512])
def test_row_bytes_of_whole_blocks(fmt: KVFormat, head_dim: int) -> None:
    expected = head_dim + 8 if fmt.name == "q8_KV" else BLOCK_BYTES[fmt.name] * head_dim // 32
    assert fmt.row_bytes(head_dim) == expected == sum(fmt.plane_bytes(head_dim))
    assert fmt.bits_per_value(head_dim) == 8 * expected / head_dim


@pytest.mark.parametrize(
    ("name", "head_dim", "expected"),
    [("q4_0", 80, 3 * 18), ("q8_0", 112, 4 * 34), ("q5_1", 48, 2 * 24), ("q6_0", 16, 26), ("q8_1", 16, 36),
     ("q8_KV", 80, 88), ("q8_KV", 7, 15), ("f16", 80, 160), ("bf16", 7, 14)],
)  # fmt: skip
def test_row_bytes_with_a_padded_last_block(name: str, head_dim: int, expected: int) -> None:
    assert FORMATS[name].row_bytes(head_dim) == expected
    assert sum(FORMATS[name].plane_bytes(head_dim)) == expected


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_traits(fmt: KVFormat) -> None:
    assert fmt.is_quantized == (fmt.name not in {"f32", "f16", "bf16"})
    assert fmt.has_min == (fmt.name in {"q4_1", "q5_1"})
    assert fmt.scales == (("absmax", "refit") if fmt.is_quantized else ("absmax",))
    assert fmt.rotated == (fmt.name in OUR_TYPE_IDS)
    assert fmt.default_scale in fmt.scales
    assert fmt.reference_scale == ("refit" if fmt.name in {"q6_0", "iq4_nl"} else "absmax")
    assert fmt.source


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_rejects_head_dims_that_are_no_multiple_of_16(fmt: KVFormat) -> None:
    assert all(fmt.rejects(head_dim) is None for head_dim in (16, 64, 80, 96, 112, 128, 160, 192, 256, 512))
    reason = fmt.rejects(72)
    if fmt.name in {"f32", "f16", "bf16", "q8_KV"}:
        assert reason is None
    else:
        assert reason is not None
        assert fmt.name in reason
        assert "72" in reason


def test_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        FORMATS["q4_0"] = FORMATS["q8_0"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["q4_0"].zero = 7  # type: ignore[misc]


def test_get_format() -> None:
    assert all(get_format(name) is fmt for name, fmt in FORMATS.items())


@pytest.mark.parametrize(
    ("name", "near"),
    [("q3_9", None), ("Q4_0", "q4_0"), ("q8_kv", "q8_KV"), ("iq4nl", "iq4_nl"), ("fp16", "f16"), ("q4", "q4_0")],
)
def test_unknown_format_names_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        get_format(name)
    assert caught.value.message == f"unknown KV cache type {name!r}; allowed: {', '.join(FORMATS)}"
    assert caught.value.hint is not None
    if near is not None:  # None: several are as near
        assert caught.value.hint == f"did you mean {near!r}?"


def test_unknown_format_that_resembles_none_has_no_hint() -> None:
    with pytest.raises(UsageError) as caught:
        get_format("zstd")
    assert caught.value.hint is None


@pytest.mark.parametrize("codebook", [None, (-9, -6, -4, -2, 0, 2, 4, 7)])
def test_a_three_bit_format_is_one_record(codebook: tuple[int, ...] | None) -> None:
    planes = (Plane("d_f16"), Plane("bits", shift=2), Plane("pairs"))
    if codebook is None:
        fmt = KVFormat("q3_0", 900, 32, planes, "signed_max", "up", zero=4, refit="pairs")
    else:
        fmt = KVFormat("iq3_nl", 901, 32, planes, "signed_max", "nearest", codebook=codebook, refit="search")
    x = torch.randn(50, 80, generator=torch.Generator().manual_seed(0))
    assert fmt.row_bytes(64) == 2 * (2 + 12)
    norm = {}
    for scale in fmt.scales:
        planes_out = fmt.encode(x, scale)
        y = fmt.decode(planes_out, 80)
        norm[scale] = float((y - x).norm() / x.norm())
        again = fmt.decode(fmt.from_ggml(fmt.to_ggml(planes_out, 80), 80), 80)
        assert torch.equal(again, y)
        assert all(len(row.unique()) <= 8 for row in (y[:, :32]))
    assert norm["refit"] < norm["absmax"] < 0.25
