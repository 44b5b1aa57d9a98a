"""Where weights come from: directories and models in memory, under the names and in the order of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hybridkv.engine.convert import convert
from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import UsageError
from hybridkv.hf import EagerStep
from hybridkv.kernels import cpu_native
from hybridkv.native import NativeModel, NativeStep, ParameterSource, map_gguf, source_of
from hybridkv.native.choice import rejects
from tests.families import build
from tests.native.test_step import DIRECTORIES, NATIVE, cache_for, error, tokens, transformers_logits

pytestmark = [
    pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built"),
    pytest.mark.usefixtures("_inference"),
]


@pytest.fixture
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("family", [family for family in NATIVE if family not in DIRECTORIES])
def test_a_model_has_the_tensors_of_its_file(family: str, tmp_path: Path) -> None:
    """Names, shapes and values of all, but for those that only a file has."""
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    file = map_gguf(convert(tmp_path / "model", tmp_path / "x.gguf", weights="f32", tokenizer="omitted").path).source
    source = source_of(model)
    assert isinstance(source, ParameterSource)
    shapes, stored = dict(source.shapes()), dict(file.shapes())
    assert shapes.keys() <= stored.keys()
    assert {name: stored[name] for name in shapes} == shapes
    for name in shapes:
        assert torch.equal(source.vector(name).flatten(), file.vector(name).flatten()), name


def test_a_single_row_that_was_taken_as_a_matrix_is_a_vector_too(tmp_path: Path) -> None:
    """Of a directory, which is read once: session files ask for the vectors of a model in use."""
    build("qwen3_5_moe_text").save_pretrained(tmp_path)
    loaded = load(describe(tmp_path), dtype=torch.float32, device="cpu", weights="auto")
    NativeStep(loaded.model)
    name = "blk.0.ffn_gate_inp_shexp.weight"
    gate = build("qwen3_5_moe_text").get_parameter("model.layers.0.mlp.shared_expert_gate.weight")
    assert torch.equal(loaded.model.source.vector(name), gate.flatten())


def test_a_directory_of_float64(tmp_path: Path) -> None:
    build("qwen3_5_text").double().save_pretrained(tmp_path)
    loaded = load(describe(tmp_path), dtype=torch.float32, device="cpu", weights="auto")
    assert isinstance(loaded.model, NativeModel)
    model = build("qwen3_5_text")
    got = NativeStep(loaded.model).forward(tokens(1, 7), cache_for(model), 0)
    assert error(got, transformers_logits("qwen3_5_text", "model", [tokens(1, 7)])[0]) < 2e-5


@pytest.mark.parametrize("kinds", [["linear_attention"] * 4, ["full_attention"] * 4])
def test_models_with_one_kind_of_layer(kinds: list[str], tmp_path: Path) -> None:
    """No file says of a model that it has no attention, but the tables name its tensors all the same."""
    model = build("qwen3_5_text", layer_types=kinds)
    model.save_pretrained(tmp_path)
    loaded = load(describe(tmp_path), dtype=torch.float32, device="cpu", weights="auto")
    assert isinstance(loaded.model, NativeModel)
    exact = model.double()(tokens(1, 7), use_cache=False).logits[:, -1]
    step = NativeStep(loaded.model)
    limit = 5e-5 if step.name.startswith("native-amx") else 2e-5  # tiles of bfloat16
    assert error(step.forward(tokens(1, 7), cache_for(model), 0), exact) < limit


@pytest.mark.parametrize("copies", ["once", "for every layer"])
def test_blocks_that_layers_share_are_held_once(copies: str, tmp_path: Path) -> None:
    """Also of a directory that has the block's tensors under every layer that uses it."""
    kinds = ["mamba", "hybrid", "hybrid", "mamba", "hybrid"]
    model = build("zamba2", layers_block_type=kinds, num_mem_blocks=2, use_shared_attention_adapter=True)
    model.save_pretrained(tmp_path)
    if copies == "for every layer":
        named = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(describe(tmp_path), dtype=torch.float32, device="cpu", weights="auto")
    assert isinstance(loaded.model, NativeModel)
    step = NativeStep(loaded.model)
    owners = {name.split(".")[1] for name, _ in loaded.model.source.shapes() if ".shared." in name}
    assert owners == {"1", "2"}
    assert sum(weight.nbytes for weight in loaded.model.source.matrices()) < 4 * sum(
        p.numel() for p in model.parameters()
    )
    exact = model.double()(tokens(1, 7), use_cache=False).logits[:, -1]
    assert error(step.forward(tokens(1, 7), cache_for(model), 0), exact) < 2e-5


def test_weights_that_another_program_quantized_are_left_to_it() -> None:
    config = build("qwen3").config
    assert rejects(config, "cpu") is None
    config.quantization_config = {"quant_method": "fp8"}
    assert rejects(config, "cpu") == "weights that another program quantized"
    assert resolve_step(config, "cpu") is EagerStep
    with pytest.raises(UsageError, match="weights that another program quantized"):
        resolve_step(config, "cpu", "native")
