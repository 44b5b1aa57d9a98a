"""What weights are said to take before they are read is what they take once they are loaded."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from hybridkv.engine.describe import bundled_model, describe
from hybridkv.engine.load import load
from hybridkv.errors import ModelError
from hybridkv.gguf.convert import find_architecture, write_gguf
from hybridkv.gguf.decode import is_decodable
from hybridkv.held import EXACT, StoredTensor, WeightKind, held_weights
from hybridkv.hf.step.weights import held_parts
from hybridkv.kernels.linear import WeightType, exact_type, packed_bytes
from tests.families import FAMILIES, build

KINDS: tuple[WeightKind, ...] = ("auto", "plain", "f32", "bf16", "int8", "int4")
TYPES = [type_ for type_ in sorted(GGML_QUANT_SIZES) if is_decodable(type_)]


@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
def test_the_smallest_type_that_holds_a_stored_type(type_: GGMLQuantizationType) -> None:
    """gguf-py decodes 64 rows of the type, random ones or random bytes; packing looks at their values."""
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 0.02, (64, 512)).astype(np.float32)
    try:
        raw = quantize(rows, type_)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[type_]
        raw = rng.integers(0, 256, (64, 512 // block * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = np.nan_to_num(dequantize(raw, type_))
    found = exact_type(torch.from_numpy(np.ascontiguousarray(values, np.float32)))
    promised = EXACT.get(type_.name.lower(), "f32")
    # A type that is not in the table is planned as f32, the most that it can take.
    assert found == promised or (type_.name.lower() not in EXACT and promised == "f32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_file(kind: WeightKind) -> None:
    description = describe(bundled_model())
    loaded = load(description, dtype=torch.float32, device="cpu", weights=kind)
    held = description.held(kind, "cpu", "f32")
    assert held.parts == held_parts(loaded.model)
    assert held.n_bytes == sum(held.parts.values()) <= held.peak_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_directories_of_every_family(family: str, tmp_path: Path) -> None:
    for dtype, kinds in ((torch.float32, ("auto", "plain", "int4")), (torch.bfloat16, ("auto", "int8"))):
        path = tmp_path / str(dtype)
        build(family).to(dtype).save_pretrained(path)
        description = describe(path)
        for kind in kinds:
            loaded = load(description, dtype=torch.float32, device="cpu", weights=kind)
            held = description.held(kind, "cpu", "f32")
            assert held.parts == held_parts(loaded.model), (dtype, kind)
            wide = 4 * sum(p.numel() for p in loaded.model.parameters())
            assert held.peak_bytes >= (wide if dtype == torch.float32 else held.n_bytes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type_", ["q8_0", "f16"])
def test_files_of_every_family(family: str, type_: str, tmp_path: Path) -> None:
    """Up to the padding of single rows, which files store as vectors.

    Value heads are as wide as a block of q8_0, as real ones are or wider: files have them in another order, and a
    block that is torn apart is no block.
    """
    class_name, options = FAMILIES[family]
    if "linear_value_head_dim" in options:
        options = options | {"linear_value_head_dim": 32}
    with mock.patch.dict(FAMILIES, {family: (class_name, options)}):
        build(family).save_pretrained(tmp_path)
    config = describe(tmp_path).config
    try:
        find_architecture(config)
    except ModelError as error:
        pytest.skip(str(error))
    write_gguf(tmp_path, tmp_path / "m.gguf", config, name="m", type_=type_, tokenizer={})
    description = describe(tmp_path / "m.gguf")
    loaded = load(description, dtype=torch.float32, device="cpu", weights="auto")
    held, found = description.held("auto", "cpu", "f32"), held_parts(loaded.model)
    assert held.parts.keys() == found.keys()
    for name, n_bytes in found.items():
        assert held.parts[name] == pytest.approx(n_bytes, rel=0.1, abs=20_000), name
    assert held.parts.get("f32 (experts)") == found.get("f32 (experts)")


def test_other_devices() -> None:
    tensors = [
        StoredTensor("q4_k", 1, 1000, 256, "matrix", "embedding"),
        StoredTensor("q4_k", 1, 512, 256, "matrix"),
        StoredTensor("q4_k", 4, 64, 256, "experts"),
        StoredTensor("f32", 1, 1, 256, "vector"),
        StoredTensor("q6_k", 1, 1000, 256, "matrix", "head"),
    ]
    n = sum(tensor.n_values for tensor in tensors)
    for plain, size in (("bf16", 2), ("f32", 4)):
        held = held_weights(tensors, "plain", device="cuda", plain=plain)
        assert held.parts == {plain: size * n}
    int4 = held_weights(tensors, "int4", device="cuda", plain="bf16")
    assert int4.parts == {
        "bf16 (experts)": 2 * 4 * 64 * 256,
        "bf16": 2 * (1000 * 256 + 256),
        "int4": 512 * 256 // 2 + 512 * 4 * 4,
        "int8": 1000 * 256 + 2 * 1000,
    }


def test_the_most_that_is_held_while_loading() -> None:
    """One matrix at a time is there twice, as float32 and packed; a directory is float32 first, as a whole."""
    tensors = [
        StoredTensor("q8_0", 1, 1024, 64, "matrix", "head"),
        StoredTensor("q8_0", 1, 4096, 64, "matrix", "embedding"),
        StoredTensor("q8_0", 1, 64, 64, "matrix"),
    ]
    rows: dict[str, tuple[WeightType, int]] = {
        "head": ("q8_0", 1024),
        "embedding": ("q8_0", 4096),
        "layer": ("q8_0", 64),
    }
    packed = {name: packed_bytes(type_, n, 64) for name, (type_, n) in rows.items()}
    held = held_weights(tensors, "auto")
    assert held.parts == {"q8_0": sum(packed.values())}
    assert held.peak_bytes == max(packed["embedding"] + 4 * 4096 * 64, sum(packed.values()) + 4 * 1024 * 64)
    directory = held_weights(tensors, "auto", loading="at once")
    assert directory.peak_bytes == 4 * 64 * (1024 + 4096 + 64) + packed["embedding"]
    assert held_weights(tensors, "plain", loading="at once").peak_bytes == 4 * 64 * (1024 + 4096 + 64)
