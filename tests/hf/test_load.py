"""Directories of bfloat16 weights, of the eager backend: packed one by one, the model that float32 gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.hf import IMPLEMENTATION, pack_model
from hybridkv.hf.load import load_weights, widens
from hybridkv.hf.step.weights import PackedTensor
from tests.families import FAMILIES, build


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unpacked() if isinstance(tensor, PackedTensor) else tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_float32_gives(family: str, tmp_path: Path) -> None:
    """Parameters, buffers that are computed and not loaded, and logits, to the bit."""
    build(family).to(torch.bfloat16).save_pretrained(tmp_path)
    description = describe(tmp_path)
    assert widens(tmp_path, description.config)
    found = load(description, dtype=torch.float32, device="cpu", weights="auto", backend="eager").model
    expected = load_weights(tmp_path, dtype=torch.float32, device="cpu", attn_implementation=IMPLEMENTATION)
    pack_model(expected, "auto")
    for kind in ("parameters", "buffers"):
        pairs = [dict(getattr(model, f"named_{kind}")(remove_duplicate=False)) for model in (found, expected)]
        assert pairs[0].keys() == pairs[1].keys()
        for name, tensor in pairs[1].items():
            mine = pairs[0][name]
            assert (mine.dtype, type(mine)) == (tensor.dtype, type(tensor)), name
            assert torch.equal(values(mine), values(tensor)), name
    assert len(list(found.parameters())) == len(list(expected.parameters()))  # tied ones are one
    assert found.dtype == expected.dtype == torch.float32
    assert found.config.dtype == expected.config.dtype
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (found.training, type(found)) == (False, type(expected))
    ids = torch.tensor([[3, 5, 8, 13, 21]])
    logits = [model(input_ids=ids, use_cache=False).logits for model in (found, expected)]
    assert torch.equal(*logits)


def test_other_types_are_loaded_as_before(tmp_path: Path) -> None:
    """float32, or both: something would be rounded."""
    build("qwen3_5_text").to(torch.bfloat16).save_pretrained(tmp_path)
    config = describe(tmp_path).config
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("in_proj_qkv.weight"))
    weights[name] = weights[name].float() + 2**-12
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not widens(tmp_path, config)
    model = load(describe(tmp_path), dtype=torch.float32, device="cpu", weights="auto", backend="eager").model
    found = next(
        parameter for key, parameter in model.named_parameters() if key.endswith(name.rpartition("layers.")[2])
    )
    assert torch.equal(values(found), weights[name])


def test_the_files_alone_say_so(tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    config = describe(tmp_path).config
    assert widens(tmp_path, config)
    assert not widens(tmp_path, config, remote_code="trusted")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert not widens(tmp_path, config)
    config.quantization_config = {}
    assert not widens(tmp_path, config)
