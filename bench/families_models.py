"""Models of hybrid families with random weights in the geometry of released ones, for `families.py`.

Sizes are those of the config.json of the model named, as far as its authors' documents say them, but for what `cut`
says. Weights that are no matrices (decays, time steps, norms) begin as the class makes them; matrices get a spread of
one over the root of their inputs, so that every layer matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True, slots=True)
class Geometry:
    """One model.

    Attributes
    ----------
    of
        The released model.
    cut
        What is smaller than there; empty for the whole geometry.
    in_gguf
        Whether a GGUF architecture holds it, and so llama.cpp runs it.
    """

    of: str
    model_class: str
    config: dict[str, Any]
    cut: str = ""
    in_gguf: bool = True


def _kinds(n_layers: int, attends: tuple[int, ...], recurs: str = "linear_attention") -> list[str]:
    return ["full_attention" if layer in attends else recurs for layer in range(n_layers)]


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BAMBA = {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 1}

GEOMETRIES: dict[str, Geometry] = {
    "granitemoehybrid": Geometry(
        "granite-4.0-h-350m",
        "GraniteMoeHybridForCausalLM",
        {
            **_BAMBA,
            "vocab_size": 100352,
            "hidden_size": 768,
            "num_hidden_layers": 32,
            "layer_types": _kinds(32, (10, 13, 17, 27)),
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 2048,
            "mamba_n_heads": 48,
            "mamba_d_head": 32,
            "mamba_d_state": 128,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.246,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "nemotron_h": Geometry(
        "NVIDIA-Nemotron-Nano-9B-v2",
        "NemotronHForCausalLM",
        {
            "vocab_size": 32768,
            "hidden_size": 4480,
            "layers_block_type": ["mamba", "mlp", "attention", "mamba"],
            "num_hidden_layers": 4,
            "intermediate_size": 15680,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 80,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
        "4 of 56 layers, a quarter of the vocabulary",
    ),
    "lfm2": Geometry(
        "LFM2-350M",
        "Lfm2ForCausalLM",
        {
            "vocab_size": 65536,
            "hidden_size": 1024,
            "num_hidden_layers": 16,
            "layer_types": _kinds(16, (2, 5, 8, 10, 12, 14), "conv"),
            "intermediate_size": 6656,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "conv_L_cache": 3,
            "rope_parameters": {**_ROPE, "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1": Geometry(
        "Falcon-H1-0.5B",
        "FalconH1ForCausalLM",
        {
            **_BAMBA,
            "vocab_size": 32784,
            "hidden_size": 1024,
            "num_hidden_layers": 36,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_rms_norm": False,
            "rope_parameters": {**_ROPE, "rope_theta": 1e11},
            "tie_word_embeddings": False,
        },
    ),
    "jamba": Geometry(
        "AI21-Jamba-Mini",
        "JambaForCausalLM",
        {
            "vocab_size": 65536,
            "hidden_size": 1024,
            "num_hidden_layers": 4,
            "intermediate_size": 3584,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 64,
            "tie_word_embeddings": False,
        },
        "4 of 32 layers, a quarter of the width",
    ),
    "qwen3_next": Geometry(
        "Qwen3-Next-80B-A3B",
        "Qwen3NextForCausalLM",
        {
            "vocab_size": 32768,
            "hidden_size": 2048,
            "num_hidden_layers": 4,
            "layer_types": _kinds(4, (3,)),
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": 32,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "rope_parameters": {**_ROPE, "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        },
        "4 of 48 layers, 32 of 512 experts, a fifth of the vocabulary",
    ),
    "bamba": Geometry(
        "Bamba-9B-v2",
        "BambaForCausalLM",
        {
            **_BAMBA,
            "vocab_size": 32768,
            "hidden_size": 2048,
            "num_hidden_layers": 8,
            "attn_layer_indices": [4],
            "intermediate_size": 7168,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "mamba_n_heads": 64,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
        },
        "8 of 32 layers, half of the width, a quarter of the vocabulary",
        in_gguf=False,
    ),
    "zamba2": Geometry(
        "Zamba2-1.2B",
        "Zamba2ForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "num_hidden_layers": 12,
            "layers_block_type": ["hybrid" if layer in (5, 11) else "mamba" for layer in range(12)],
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
            "n_mamba_heads": 64,
            "mamba_d_state": 128,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "adapter_rank": 128,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "time_step_min": 1e-30,
        },
        "12 of 38 layers",
        in_gguf=False,
    ),
    "olmo_hybrid": Geometry(
        "Olmo-Hybrid-7B",
        "OlmoHybridForCausalLM",
        {
            "vocab_size": 32768,
            "hidden_size": 1920,
            "num_hidden_layers": 8,
            "layer_types": _kinds(8, (3, 7)),
            "intermediate_size": 5504,
            "num_attention_heads": 15,
            "num_key_value_heads": 15,
            "linear_num_key_heads": 15,
            "linear_num_value_heads": 15,
            "linear_key_head_dim": 96,
            "linear_value_head_dim": 192,
        },
        "8 of 32 layers, half of the width, a third of the vocabulary",
        in_gguf=False,
    ),
}


def write_directory(family: str, directory: Path) -> int:
    """Write a family's model as bfloat16 safetensors; the number of its parameters."""
    geometry = GEOMETRIES[family]
    model_class = getattr(transformers, geometry.model_class)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 65536}
    config = model_class.config_class(**{**ids, **geometry.config})
    torch.manual_seed(7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.dim() >= 2:
                n_in = parameter.shape[-1]
                for part in parameter.view(-1, n_in).split(1 << 14):
                    part.copy_(torch.randn(part.shape, generator=generator) * n_in**-0.5)
    model.save_pretrained(directory, max_shard_size="1GB")
    return sum(p.numel() for p in model.parameters())
