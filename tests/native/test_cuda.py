"""Packed weights on the card, whole models: against the CPU's native step on the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.hf.step.graph import GraphStep
from hybridkv.kernels import cpu_native
from hybridkv.model import kv_facts, layer_facts
from hybridkv.native import NativeStep
from hybridkv.native.choice import rejects_packed, rejects_types
from hybridkv.native.model import native_model
from hybridkv.native.parameters import ParameterSource
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache
from tests.families import build
from tests.hf import recorded

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda import delta
from hybridkv.native.cuda_step import PackedStep
from tests.on_device import DEVICE, ON_CUDA

LIMIT = 1e-2
"""float16 activations, which the interpreter cuts where the card rounds."""

TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
HEADS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
"""As few as share a K and V: the interpreter takes seconds for every 16 rows of a matrix."""


@pytest.fixture(autouse=True)
def short_chunks(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_CUDA:
        monkeypatch.setattr(delta, "CHUNK", 16)
    with torch.inference_mode():
        yield


@pytest.mark.slow
@pytest.mark.skipif(cpu_native.available() is not None, reason="the extension is not built")
@pytest.mark.parametrize("family", [pytest.param("qwen3_5_text", marks=pytest.mark.long), "qwen3_5_moe_text"])
def test_logits(family: str) -> None:
    """A prompt, and single tokens as a recording; q8_0 matrices."""
    model = build(family, **TWO_LAYERS, **HEADS)
    config = model.config

    def source() -> ParameterSource:
        return ParameterSource(model, model.get_parameter_or_buffer)

    steps = [
        NativeStep(native_model(config, source(), "int8")),
        GraphStep(
            PackedStep(native_model(config, source(), "int8", device=DEVICE)),
            recorder=recorded.Again(),
            notify=pytest.fail,
        ),
    ]
    specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(config)))
    own = {"kernels": recorded.KERNELS, "encoders": recorded.ENCODERS}
    caches = [
        ModelCache(config, specs, device="cpu", n_ctx=60, guard=Guard()),
        ModelCache(config, specs, device=DEVICE, n_ctx=60, guard=Guard(), **own),
    ]
    position = 0
    for seed, length in enumerate((4, 1, 1)):
        piece: Tensor = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))
        exact, got = (step.forward(piece, cache, position).cpu() for step, cache in zip(steps, caches, strict=True))
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        assert float((got - exact).norm() / exact.norm()) < LIMIT, length
        position += length


def test_what_is_run() -> None:
    assert rejects_packed(build("qwen3_5_text").config, "cuda") is None
    assert rejects_packed(build("qwen3_5_moe_text").config, "cuda") is None
    assert rejects_packed(build("qwen3_5_text").config, "cpu") == "runs on cuda, not on cpu"
    assert "knows no gemma2 layers" in str(rejects_packed(build("gemma2").config, "cuda"))


def test_types_of_a_file() -> None:
    """One type that no kernel reads, or experts whose gate and up have types of their own, and all is decoded."""
    config = build("qwen3_5_moe_text", **TWO_LAYERS).config
    names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
    types = {f"blk.{i}.{name}.weight": "q4_K" for i in range(2) for name in names} | {"token_embd.weight": "f16"}
    assert rejects_types(config, types) is None
    assert rejects_types(config, types | {"output.weight": "iq2_xs"}) is None
    assert "tq2_0 is not multiplied packed" in str(rejects_types(config, types | {"output.weight": "tq2_0"}))
    found = rejects_types(config, types | {"blk.1.ffn_up_exps.weight": "q5_K"})
    assert found == "experts whose gates and what they gate are of types q4_K, q5_K, layer 1"
