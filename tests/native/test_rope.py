"""Frequencies of every kind of RoPE against Transformers' own functions, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridkv.model.rope import SCALINGS, rope_angles, rope_frequencies

_BEFORE = {"original_max_position_embeddings": 1024}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.5] * 16, "long_factor": [1.5] * 16}

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": _LLAMA3 | _BEFORE,
    "llama3, a short context": _LLAMA3 | {"original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **_BEFORE},
    "yarn, its own magnitude": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, **_BEFORE},
    "yarn, other ramp": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, **_BEFORE},
    "yarn, not rounded": {"rope_type": "yarn", "factor": 4.0, "truncate": False, **_BEFORE},
    "yarn, DeepSeek's": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, **_BEFORE},
    "yarn, a factor below 1": {"rope_type": "yarn", "factor": 0.5, **_BEFORE},
    "longrope": _LONGROPE | _BEFORE | {"factor": 4.0},
    "longrope, its own magnitude": _LONGROPE | _BEFORE | {"factor": 1.0, "attention_factor": 1.3},
    "longrope, no factor": _LONGROPE | _BEFORE,
}


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("case", ROPES)
def test_scaled(case: str, theta: float) -> None:
    rope = {"rope_theta": theta, **ROPES[case]}
    config = LlamaConfig(
        hidden_size=96, num_attention_heads=3, head_dim=32, max_position_embeddings=8192, rope_parameters=rope
    )
    wanted, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    got, factor = rope_frequencies(config)
    assert torch.equal(got, wanted)
    assert factor == magnitude


def test_a_kind_of_layer() -> None:
    config = Gemma3TextConfig(
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["linear"](config, torch.device("cpu"), layer_type="full_attention")
    cos, sin = rope_angles(config, 100, "full_attention")
    turns = torch.arange(100.0).unsqueeze(1) * wanted
    assert torch.equal(cos, turns.cos())
    assert torch.equal(sin, turns.sin())


def test_every_kind_has_a_case() -> None:
    assert {rope["rope_type"] for rope in ROPES.values()} | {"default"} == SCALINGS.keys()
