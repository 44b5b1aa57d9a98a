"""`nemotron_h_moe`: Nemotron-H whose feed-forward layers have experts (no gate, squared ReLU) and a shared one.

Some models project to a narrower, latent width around the experts. Everything else as in `nemotron_h`.
"""

from __future__ import annotations

from types import MappingProxyType

from gguf import ExpertGatingFuncType

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
    sigmoid = int(ExpertGatingFuncType.SIGMOID)
    meta.fixed("expert_gating_func", (0, sigmoid), f"{sigmoid} (sigmoid)")
    return {
        **fields,
        **_groups(meta),
        "routed_scaling_factor": meta.real_or("expert_weights_scale", 1.0),
        # llama.cpp's default: it counts for files, Transformers' own is the opposite.
        "norm_topk_prob": meta.flag("expert_weights_norm", default=False),
        "moe_latent_size": meta.integer(_LATENT) if meta.has(_LATENT) else None,
    }


def _groups(meta: Metadata) -> Fields:
    """Return the groups that experts are chosen from, one if the file has none, and check all counts of experts."""
    n_experts = meta.integer("expert_count")
    n_used = meta.integer("expert_used_count", high=n_experts)
    group_count, used_count = _GROUPS.values()
    n_groups = meta.integer(group_count, low=0, high=n_experts) if meta.has(group_count) else 0
    if n_groups <= 1:
        meta.fixed(used_count, (0, 1), "1: there is one group")
        return dict.fromkeys(_GROUPS, 1)
    if n_experts % n_groups or n_experts // n_groups < 2:
        meta.expected(group_count, f"a divisor of {n_experts} experts that leaves two or more in a group")
    n_used_groups = meta.integer(used_count, high=n_groups)
    if n_used > n_used_groups * (n_experts // n_groups):
        meta.fail(f"{n_used} experts are used, and {n_used_groups} of {n_groups} groups have fewer")
    return {"n_group": n_groups, "topk_group": n_used_groups}


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
    model_type="nemotron_h",
    sizes={**nemotron_h.SIZES, **_SIZES},
    reals={},
    fields=_fields,
    keys=_keys,
    layers=nemotron_h.layers,
    tensors=MappingProxyType({**nemotron_h.TENSORS, "moe": _EXPERTS}),
    suits=_problem,
    derived=nemotron_h.derived,
    source="gguf-py constants.py; llama.cpp conversion/nemotron.py",
)
