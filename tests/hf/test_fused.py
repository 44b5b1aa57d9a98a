"""The fused step against Transformers' own forward pass in float64; its kernels run in Triton's interpreter here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridkv.cache import KVTypes
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.hf.step import fused, fused_layers
from hybridkv.hf.step.graph import GraphStep
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, Policy
from tests.families import build, remembering
from tests.hf import recorded

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.hf.step import fused_qwen3_5
from hybridkv.hf.step.fused import FusedStep
from hybridkv.kernels.cuda import delta
from tests.on_device import DEVICE, ON_CUDA

TWO_LAYERS = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
}
EXPERTS = TWO_LAYERS | {
    "hidden_size": 32,
    "num_experts": 5,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
SMALL = {
    "qwen3_5_text": TWO_LAYERS,
    "qwen3_5_moe_text": EXPERTS,
    "qwen3_next": EXPERTS | {"norm_topk_prob": False, "linear_num_value_heads": 6},
}
"""Options of each family that is written down."""


@pytest.fixture(autouse=True)
def short_chunks(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_CUDA:
        monkeypatch.setattr(delta, "CHUNK", 16)
    with torch.inference_mode():
        yield


def cache_for(model: PreTrainedModel, types: KVTypes | None = None) -> ModelCache:
    specs = Policy(types or KVTypes("f32", "f32")).resolve(kv_facts(layer_facts(model.config)))
    kernels, encoders = recorded.KERNELS, recorded.ENCODERS
    return ModelCache(model.config, specs, device=DEVICE, n_ctx=60, guard=Guard(), kernels=kernels, encoders=encoders)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.cpu().double() - exact).norm() / exact.norm())


def transformers_logits(pieces: list[Tensor], family: str = "qwen3_5_text") -> list[Tensor]:
    model = build(family, **SMALL[family]).double()
    model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    cache, position, logits = DynamicCache(config=model.config), 0, []
    for piece in pieces:
        positions = torch.arange(position, position + piece.shape[1]).expand(piece.shape)
        answer = model(input_ids=piece, position_ids=positions, **remembering(cache), use_cache=True)
        logits.append(answer.logits)
        position += piece.shape[1]
    return logits


@pytest.mark.parametrize("family", SMALL)
def test_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in several runs, single tokens as a recording, more of a prompt, a single token."""
    monkeypatch.setattr(fused_layers, "PROMPT_ROWS", 12)
    pieces = [tokens(2, n, seed) for seed, n in enumerate((7, 1, 1, 2, 1))]
    model = build(family, attention="hybridkv", **SMALL[family]).to(DEVICE)
    recorder = recorded.Again()
    step = GraphStep(FusedStep(model), recorder=recorder, notify=pytest.fail)
    cache, position = cache_for(model), 0
    for piece, exact in zip(pieces, transformers_logits(pieces, family), strict=True):
        got = step.logits(piece, cache, position)
        assert got.dtype == torch.float32
        assert error(got, exact) < 2e-5
        position += piece.shape[1]
    assert recorder.recorded == 1


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_both_steps_continue_the_same_cache_and_the_model_stays_as_it_was(family: str) -> None:
    """Projections are joined in memory; Transformers' own code goes on reading the model's parameters."""
    model, untouched = (build(family, attention="hybridkv", **SMALL[family]).to(DEVICE) for _ in range(2))
    steps = [FusedStep(model), EagerStep(model)]
    for (name, own), (_, other) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    projections = getattr(model.model.layers[0].mlp, "shared_expert", model.model.layers[0].mlp)
    assert projections.gate_proj.weight.untyped_storage().data_ptr() == (
        projections.up_proj.weight.untyped_storage().data_ptr()
    )
    pieces = [tokens(1, n, seed) for seed, n in enumerate((3, 1, 2, 1, 1))]
    cache, position = cache_for(model), 0
    for i, (piece, exact) in enumerate(zip(pieces, transformers_logits(pieces, family), strict=True)):
        assert error(steps[i % 2].forward(piece, cache, position), exact[:, -1]) < 2e-5
        position += piece.shape[1]


def test_packed_experts_are_transformers_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not held as their numbers go to the module that they belong to."""
    monkeypatch.setattr(fused_qwen3_5, "is_plain", lambda _: False)
    monkeypatch.setattr(fused_qwen3_5, "run_experts", pytest.fail)
    family, pieces = "qwen3_5_moe_text", [tokens(2, 2), tokens(2, 1)]
    model = build(family, attention="hybridkv", **SMALL[family]).to(DEVICE)
    step, cache = FusedStep(model), cache_for(model)
    for position, piece, exact in zip((0, 2), pieces, transformers_logits(pieces, family), strict=True):
        assert error(step.logits(piece, cache, position), exact) < 2e-5


def test_configs_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("qwen3_5_text").config
    assert fused.rejects(config, "cuda") is None
    assert fused.rejects(config, "cpu") == "runs on cuda, not on cpu"
    assert "knows no lfm2 layers on cuda" in str(fused.rejects(build("lfm2").config, "cuda"))
    assert set(fused.FAMILY_NAMES) == set(fused.families()) == set(SMALL)
    config.hidden_act = "gelu"
    assert fused.rejects(config, "cuda") == "activation 'gelu', not silu"
    monkeypatch.setattr("hybridkv.kernels.cuda._installed", lambda: False)
    assert fused.rejects(config, "cuda") == "triton is not installed"
