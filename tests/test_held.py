"""What weights are said to take before they are read is what they take once they are loaded."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from hybridkv.engine.describe import Description, bundled_model, describe
from hybridkv.engine.load import Loaded, load
from hybridkv.errors import ModelError
from hybridkv.formats.weights import WEIGHTS
from hybridkv.gguf.convert import find_architecture, write_gguf
from hybridkv.held import SavedTensor, WeightKind, held_weights
from hybridkv.hf.step.weights import held_parts
from hybridkv.native import NativeModel, NativeStep, bytes_by_type
from hybridkv.native.choice import multiplies
from tests.families import FAMILIES, build
from tests.native.test_step import NATIVE
from tests.thin import every_other

KINDS: tuple[WeightKind, ...] = ("auto", "plain", "f32", "bf16", "int8", "int4")


def found(loaded: Loaded) -> dict[str, int]:
    """Bytes as they are held once the model can run."""
    if not isinstance(loaded.model, NativeModel):
        return held_parts(loaded.model)
    NativeStep(loaded.model)
    return bytes_by_type(loaded.model.source)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_file(kind: WeightKind) -> None:
    description = describe(bundled_model())
    loaded = load(description, dtype=torch.float32, device="cpu", weights=kind)
    held = description.held(kind, "cpu", "f32")
    assert held.parts == found(loaded)
    assert held.n_bytes == sum(held.parts.values()) <= held.peak_bytes


DIRECTORY_KINDS: dict[torch.dtype, tuple[WeightKind, ...]] = {
    torch.float32: ("auto", "plain", "int4"),
    torch.bfloat16: ("auto", "int8"),
}


@pytest.mark.parametrize(("family", "dtype"), every_other(FAMILIES, DIRECTORY_KINDS))
def test_directories_of_every_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(family).to(dtype).save_pretrained(tmp_path)
    description = describe(tmp_path)
    for kind in DIRECTORY_KINDS[dtype]:
        loaded = load(description, dtype=torch.float32, device="cpu", weights=kind)
        held = description.held(kind, "cpu", "f32")
        if isinstance(loaded.model, NativeModel):
            # A directory says which parameters there are, not which of them are matrices in the file's order.
            total = sum(found(loaded).values())
            assert total <= 1.03 * held.n_bytes, kind
            assert held.n_bytes <= 1.03 * total or multiplies(description.config), kind
            assert held.peak_bytes >= held.n_bytes
            continue
        assert held.parts == found(loaded), kind
        wide = 4 * sum(p.numel() for p in loaded.model.parameters())
        assert held.peak_bytes >= (wide if dtype == torch.float32 else held.n_bytes)


def file_of(directory: Path, type_: str) -> Description:
    """What is known of a directory's model, written as a file into it; skips what no file holds."""
    config = describe(directory).config
    try:
        find_architecture(config)
    except ModelError as error:
        pytest.skip(str(error))
    write_gguf(directory, directory / "m.gguf", config, name="m", type_=type_, tokenizer={})
    return describe(directory / "m.gguf")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type_", ["q8_0", "f16"])
def test_files_of_every_family(family: str, type_: str, tmp_path: Path) -> None:
    """Exactly under the native backend; under the eager one up to the padding of single rows, which are vectors there.

    Value heads are as wide as a block of q8_0, as real ones are or wider: files have them in another order, and a
    block that is torn apart is no block.
    """
    class_name, options = FAMILIES[family]
    if "linear_value_head_dim" in options:
        options = options | {"linear_value_head_dim": 32}
    with mock.patch.dict(FAMILIES, {family: (class_name, options)}):
        build(family).save_pretrained(tmp_path)
    description = file_of(tmp_path, type_)
    loaded = load(description, dtype=torch.float32, device="cpu", weights="auto")
    held, parts = description.held("auto", "cpu", "f32"), found(loaded)
    assert isinstance(loaded.model, NativeModel) == (family in NATIVE)
    assert held.parts.keys() == parts.keys()
    assert held.parts.get("f32 (experts)") == parts.get("f32 (experts)")
    for name, n_bytes in parts.items():
        if family in NATIVE:
            assert held.parts[name] == n_bytes, name
        else:
            assert held.parts[name] == pytest.approx(n_bytes, rel=0.1, abs=20_000), name


@pytest.mark.parametrize(("family", "kind"), every_other(NATIVE, KINDS, step=3))
def test_files_of_native_families_held_otherwise(family: str, kind: WeightKind, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    description = file_of(tmp_path, "q8_0")
    loaded = load(description, dtype=torch.float32, device="cpu", weights=kind)
    assert isinstance(loaded.model, NativeModel) == (kind != "plain")
    if kind != "plain":
        assert description.held(kind, "cpu", "f32").parts == found(loaded)


@pytest.mark.parametrize("type_", [*WEIGHTS, "tq1_0"])
def test_types_stay_what_they_are_where_products_read_them(type_: str) -> None:
    """Experts and matrices under the native backend, and under the eager one what lies as in the model."""
    n_in = 256
    size = WEIGHTS[type_].row_bytes(n_in) if type_ in WEIGHTS else 4 * n_in
    name = type_ if type_ in WEIGHTS else "f32"
    layer = SavedTensor(type_.lower(), 1, 10, n_in, "matrix", lies=True)
    experts = SavedTensor(type_.lower(), 3, 10, n_in, "experts")
    assert held_weights([layer, experts], "auto", runner="native").parts == {name: 40 * size}
    assert held_weights([layer], "auto").parts == {name: 10 * size}
    assert held_weights([experts], "auto").parts == {"f32 (experts)": 30 * 4 * n_in}


def test_other_devices() -> None:
    tensors = [
        SavedTensor("q4_k", 1, 1000, 256, "matrix", "embedding"),
        SavedTensor("q4_k", 1, 512, 256, "matrix"),
        SavedTensor("q4_k", 4, 64, 256, "experts"),
        SavedTensor("f32", 1, 1, 256, "vector"),
        SavedTensor("q6_k", 1, 1000, 256, "matrix", "head"),
    ]
    n = sum(tensor.n_values for tensor in tensors)
    for plain, size in (("bf16", 2), ("f32", 4)):
        held = held_weights(tensors, "plain", device="cuda", plain=plain)
        assert held.parts == {plain: size * n}
    assert held_weights(tensors, "int4", device="cuda", plain="bf16").parts == {"bf16": 2 * n}  # by no packed step


def test_the_most_that_is_held_while_loading() -> None:
    """What lies in a file is there once; what is encoded also as float32; a directory is float32 first, as a whole."""
    tensors = [
        SavedTensor("q8_0", 1, 1024, 64, "matrix", "head"),
        SavedTensor("q8_0", 1, 4096, 64, "matrix", "embedding"),
        SavedTensor("q8_0", 1, 64, 64, "matrix", lies=True),
    ]
    rows = 1024 + 4096 + 64
    for weights in (held_weights(tensors, "auto", runner="native"), held_weights(tensors, "int8", runner="native")):
        assert weights.parts == {"q8_0": 68 * rows}
    assert held_weights(tensors, "auto", runner="native").peak_bytes == 68 * rows
    assert held_weights(tensors, "auto").parts == {"f32": 4 * 64 * (1024 + 4096), "q8_0": 68 * 64}
    encoded = held_weights(tensors, "int8")
    assert encoded.peak_bytes == max(68 * 4096 + 4 * 4096 * 64, 68 * rows + 4 * 1024 * 64)
    directory = held_weights(tensors, "int8", loading="at once")
    assert directory.peak_bytes == 4 * 64 * rows + 68 * 4096
    assert held_weights(tensors, "plain", loading="at once").peak_bytes == 4 * 64 * rows
