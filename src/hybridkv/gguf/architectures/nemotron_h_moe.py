"""`nemotron_h_moe`: Nemotron-H whose feed-forward layers have experts (no gate, squared ReLU) and a shared one.

Some models project to a narrower, latent width around the experts. Everything else as in `nemotron_h`.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures import nemotron_h
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule
from hybridkv.gguf.metadata import Metadata

_SIZES = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_GROUPS = {"n_group": "expert_group_count", "topk_group": "expert_group_used_count"}
_LATENT = "moe_latent_size"

_EXPERTS = (
    TensorRule("attn_norm.weight", "norm.weight"),
    TensorRule("ffn_gate_inp.weight", "mixer.gate.weight"),
    TensorRule("exp_probs_b.bias", "mixer.gate.e_score_correction_bias"),
    TensorRule("ffn_up_exps.weight", "mixer.experts.up_proj"),
    TensorRule("ffn_down_exps.weight", "mixer.experts.down_proj"),
    TensorRule("ffn_up_shexp.weight", "mixer.shared_experts.up_proj.weight"),
    TensorRule("ffn_down_shexp.weight", "mixer.shared_experts.down_proj.weight"),
    TensorRule("ffn_latent_down.weight", "mixer.fc1_latent_proj.weight"),
    TensorRule("ffn_latent_up.weight", "mixer.fc2_latent_proj.weight"),
    # ollama's names of the two.
    TensorRule("ffn_latent_in.weight", "mixer.fc1_latent_proj.weight"),
    TensorRule("ffn_latent_out.weight", "mixer.fc2_latent_proj.weight"),
)


def _fields(meta: Metadata) -> Fields:
    fields = nemotron_h.layer_fields(meta, "moe")
    scale = meta.real("expert_weights_scale") if meta.has("expert_weights_scale") else 1.0
    return {
        **fields,
        **{field: meta.integer(key) for field, key in _GROUPS.items() if meta.has(key)},
        "routed_scaling_factor": scale,
        "norm_topk_prob": meta.flag("expert_weights_norm", default=True),
        "moe_latent_size": meta.integer(_LATENT) if meta.has(_LATENT) else None,
    }


def _keys(config: Config) -> Keys:
    return {
        **nemotron_h.keys(config, config.moe_intermediate_size),
        **{key: getattr(config, field) for field, key in _GROUPS.items()},
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        **({_LATENT: config.moe_latent_size} if config.moe_latent_size is not None else {}),
    }


def _problem(config: Config) -> str | None:
    if {"mlp", "moe"} <= {*config.layers_block_type}:
        return "it has both dense layers and layers with experts"
    return nemotron_h.problem(config) if "moe" in config.layers_block_type else "none of its layers has experts"


ARCHITECTURE = Architecture(
    name="nemotron_h_moe",
    config_class="NemotronHConfig",
    model_class="NemotronHForCausalLM",
    sizes={**nemotron_h.SIZES, **_SIZES},
    reals={},
    fields=_fields,
    keys=_keys,
    layers=nemotron_h.layers,
    tensors=MappingProxyType({**nemotron_h.TENSORS, "moe": _EXPERTS}),
    suits=_problem,
    source="gguf-py constants.py; llama.cpp conversion/nemotron.py",
)
