"""Weights quantized by torchao. Its int8 runs on the CPU, so that is where the wrapper is tested."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from hybridkv.engine.load import bundled_model, describe, load
from hybridkv.errors import UsageError
from hybridkv.hf.torchao_weights import TorchaoKind, check_torchao, quantize_weights
from tests.families import FAMILIES, build


@pytest.fixture
def torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at its import, about itself
        pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_without_torchao(kind: TorchaoKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for call in (check_torchao, lambda: quantize_weights(build("llama"), kind)):
        with pytest.raises(UsageError, match="need torchao") as caught:
            call()
        assert caught.value.hint == 'pip install "hybridkv[torchao]"'


def test_load_asks_for_it_off_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one that is not the CPU."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    description = describe(bundled_model())
    load(description, dtype=torch.float32, device="cpu", weights="int4")
    with pytest.raises(UsageError, match="need torchao"):
        load(description, dtype=torch.bfloat16, device="meta", weights="int4")


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_rounds_linear_layers(family: str) -> None:
    model, ids = build(family), torch.arange(3, 12).unsqueeze(0)
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        embedding = model.get_input_embeddings().weight
        quantize_weights(model, "int8")
        got = model(input_ids=ids, use_cache=False).logits
    held = {name for name, p in model.named_parameters() if type(p).__name__ == "Int8Tensor"}
    assert held
    assert model.get_input_embeddings().weight is embedding
    assert not any("embed" in name or "dt_proj" in name for name in held)
    change = float((got - plain).square().mean().sqrt() / plain.square().mean().sqrt())
    assert 1e-3 < change < 0.5  # a random router may choose other experts


@pytest.mark.usefixtures("torchao")
def test_a_tied_head_is_left_alone() -> None:
    model = build("qwen3_5_text")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    quantize_weights(model, "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
