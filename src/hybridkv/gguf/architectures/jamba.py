"""`jamba`: Jamba, Mamba-1 and attention layers, experts in every few of them; no RoPE.

How the file differs from Transformers' `JambaForCausalLM`: `ssm_a` holds `-exp(A_log)`; the convolution lacks its unit
dimension; layers that attend are those with KV heads, layers with experts those with a router, where Transformers
has a period and an offset of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures.experts import check_routing, experts, routed
from hybridkv.gguf.architectures.layers import head_keys, kv_heads_per_layer, n_blocks, spread_head_dim
from hybridkv.gguf.architectures.llama import REALS, SIZES
from hybridkv.gguf.architectures.record import LOG_DECAY, Architecture, Config, Fields, Keys, TensorRule, embeddings
from hybridkv.gguf.metadata import Metadata

_SIZES = {
    **SIZES,
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_dt_rank": "ssm.time_step_rank",
}

_NORMS = (
    TensorRule("attn_norm.weight", "input_layernorm.weight"),
    TensorRule("ffn_norm.weight", "pre_ff_layernorm.weight"),
)
_ATTENTION = (
    TensorRule("attn_q.weight", "self_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
)
_MAMBA = (
    TensorRule("ssm_in.weight", "mamba.in_proj.weight"),
    TensorRule("ssm_conv1d.weight", "mamba.conv1d.weight"),
    TensorRule("ssm_conv1d.bias", "mamba.conv1d.bias"),
    TensorRule("ssm_x.weight", "mamba.x_proj.weight"),
    TensorRule("ssm_dt.weight", "mamba.dt_proj.weight"),
    TensorRule("ssm_dt.bias", "mamba.dt_proj.bias"),
    TensorRule("ssm_dt_norm.weight", "mamba.dt_layernorm.weight"),
    TensorRule("ssm_b_norm.weight", "mamba.b_layernorm.weight"),
    TensorRule("ssm_c_norm.weight", "mamba.c_layernorm.weight"),
    TensorRule("ssm_a", "mamba.A_log", values=LOG_DECAY),
    TensorRule("ssm_d", "mamba.D"),
    TensorRule("ssm_out.weight", "mamba.out_proj.weight"),
)
_DENSE = (
    TensorRule("ffn_gate.weight", "feed_forward.gate_proj.weight"),
    TensorRule("ffn_up.weight", "feed_forward.up_proj.weight"),
    TensorRule("ffn_down.weight", "feed_forward.down_proj.weight"),
)


def _fields(meta: Metadata) -> Fields:
    meta.disregard("rope.")
    spread_head_dim(meta)
    hidden, inner = meta.integer("embedding_length"), meta.integer("ssm.inner_size")
    if inner % hidden:
        meta.fail(f"{inner} values of a mixer are no multiple of the {hidden} of the model")
    n_kv_heads, attends = kv_heads_per_layer(meta)
    with_experts = [routed(meta, layer) for layer in range(n_blocks(meta)[1])]
    attn_period, attn_offset = _every(meta, attends, "attention")
    fields: Fields = {
        "num_key_value_heads": n_kv_heads,
        "mamba_expand": inner // hidden,
        "mamba_conv_bias": any(info.name.endswith("ssm_conv1d.bias") for info in meta.header.tensors),
        "mamba_proj_bias": False,
        "attn_layer_period": attn_period,
        "attn_layer_offset": attn_offset,
        "num_experts": 1,
    }
    if not any(with_experts):
        meta.disregard("expert_")
    else:
        check_routing(meta, ExpertGatingFuncType.SOFTMAX, normalised=False)
        n_experts = meta.integer("expert_count", low=2)
        period, offset = _every(meta, with_experts, "experts")
        fields |= {
            "num_experts": n_experts,
            "num_experts_per_tok": meta.integer("expert_used_count", high=n_experts),
            "expert_layer_period": period,
            "expert_layer_offset": offset,
        }
    return fields


def _every(meta: Metadata, which: Sequence[bool], what: str) -> tuple[int, int]:
    """Return the period and the offset of the layers that have something."""
    offset = which.index(True)
    later = [layer for layer in range(offset + 1, len(which)) if which[layer]]
    period = later[0] - offset if later else len(which)
    if offset >= period or any(each != (layer % period == offset) for layer, each in enumerate(which)):
        layers = [layer for layer, each in enumerate(which) if each]
        meta.fail(f"layers {layers} have {what}; Transformers' class needs a period and an offset below it")
    return period, offset


def _keys(config: Config) -> Keys:
    n_used = config.num_experts_per_tok
    return {
        **head_keys(config, [kind == "full_attention" for kind in config.layer_types]),
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        **({"expert_count": config.num_experts, "expert_used_count": n_used} if config.num_experts > 1 else {}),
    }


def _problem(config: Config) -> str | None:
    if "full_attention" not in config.layer_types:
        return "no layer attends"
    return "its mixers' projections have biases" if config.mamba_proj_bias else None


def _layers(config: Config) -> list[tuple[str, ...]]:
    return [
        ("norms", kind, "experts" if n_experts > 1 else "dense")
        for kind, n_experts in zip(config.layer_types, config.layers_num_experts, strict=True)
    ]


def _derived(fields: Fields) -> Fields:
    """Turn periods into lists of layers. Source: transformers, configuration_jamba.py."""
    layers = range(fields["num_hidden_layers"])

    def has(what: str, layer: int) -> bool:
        period = fields.get(f"{what}_layer_period")
        return period is not None and layer % period == fields[f"{what}_layer_offset"]

    return {
        "hidden_act": "silu",
        "num_experts_per_tok": 2,  # the class's own, where no layer has experts
        "layer_types": ["full_attention" if has("attn", layer) else "linear_attention" for layer in layers],
        "layers_num_experts": [fields["num_experts"] if has("expert", layer) else 1 for layer in layers],
    }


ARCHITECTURE = Architecture(
    name="jamba",
    config_class="JambaConfig",
    model_class="JambaForCausalLM",
    model_type="jamba",
    sizes=_SIZES,
    reals=REALS,
    fields=_fields,
    keys=_keys,
    layers=_layers,
    tensors=MappingProxyType(
        {
            "model": embeddings(norm="final_layernorm"),
            "norms": _NORMS,
            "full_attention": _ATTENTION,
            "linear_attention": _MAMBA,
            "dense": _DENSE,
            "experts": experts("feed_forward", router="router"),
        }
    ),
    suits=_problem,
    derived=_derived,
    source="gguf-py constants.py; llama.cpp conversion/jamba.py",
)
