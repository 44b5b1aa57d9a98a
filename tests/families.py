"""Small random models of the families that people run, built with Transformers' own classes.

Sizes are odd on purpose where a family allows it: groups of 1, 2, 3 and 4 query heads, head dims of 16, 32, 48
and 64, and a dense, a sliding-window and a sink model as controls.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hybridkv.hf import cache_argument

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GATED_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextForCausalLM", {**_GATED_DELTA, **_EXPERTS}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {**_GATED_DELTA, "head_dim": 64, "linear_num_value_heads": 6}),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", {**_GATED_DELTA, **_EXPERTS}),
    "jamba": (
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaForCausalLM", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **_MAMBA2}),
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            "num_hidden_layers": 5,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "use_mem_rope": True,
            "adapter_rank": 12,
            "time_step_min": 1e-30,  # which the class keeps to in prompts, and not in single tokens
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {"num_hidden_layers": 3, "head_dim": 48, "mamba_d_ssm": 128, **_MAMBA2},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            **_MAMBA2,
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mamba", "attention"],
            "time_step_min": 1e-30,  # which the class keeps to in prompts, and not in single tokens
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
        },
    ),
}
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_hidden_layers": 2, "num_key_value_heads": 1, "attention_bias": True}),
    "llama_unbiased": ("LlamaForCausalLM", {"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 48}),
    "granite": (
        "GraniteForCausalLM",
        {"num_hidden_layers": 2, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "embedding_multiplier": 6.0},
    ),
    "mistral": ("MistralForCausalLM", {"num_hidden_layers": 2, "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", {"num_hidden_layers": 2, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "qwen2": ("Qwen2ForCausalLM", {"num_hidden_layers": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_hidden_layers": 2, "head_dim": 32, "norm_topk_prob": True, **_EXPERTS}),
    "qwen3": ("Qwen3ForCausalLM", {"num_hidden_layers": 2, "head_dim": 48, "num_attention_heads": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"num_hidden_layers": 2, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "num_hidden_layers": 2,
            "head_dim": 32,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
FAMILIES = {**HYBRIDS, **CONTROLS}


def remembering(cache: object) -> dict[str, object]:
    """The cache as an argument of a model's forward pass or of `generate`, by the name of this Transformers version."""
    return {cache_argument(transformers.LlamaForCausalLM): cache}


def build(
    family: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager", **changes: Any
) -> PreTrainedModel:
    """A random model of `family`, with `changes` to its config; the same weights at every call."""
    class_name, options = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**{**BASE, **options, **changes})
    config._attn_implementation = attention
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Default initialisation gives attention that hardly matters: make the weights large enough that an
            # error in the cache shows in the logits.
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.12)
    return model.to(dtype).eval()
