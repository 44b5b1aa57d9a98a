"""`granitehybrid`: Granite 4 H, Mamba-2 and attention layers, a shared feed-forward and, in some models, experts.

How the file differs from Transformers' `GraniteMoeHybridForCausalLM`:

* Gate and up projections are two tensors, of the experts and of the shared feed-forward; without experts, the latter
  has a dense model's names.
* Query and key rows are interleaved as in `llama`, though most models have no RoPE: `rope.scaling.finetuned` says
  whether they have.
* The four multipliers are keys; scores that have none are divided by the root of the head dim. KV heads are counted
  per layer, zero in Mamba layers.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures import mamba2
from hybridkv.gguf.architectures.experts import check_routing, experts
from hybridkv.gguf.architectures.granite import FINETUNED, MULTIPLIERS
from hybridkv.gguf.architectures.layers import head_keys, kv_heads_per_layer, spread_head_dim
from hybridkv.gguf.architectures.llama import REALS
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule, embeddings, rotary_halves
from hybridkv.gguf.architectures.rope import KINDS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.decode import Order
from hybridkv.gguf.metadata import Metadata

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    **mamba2.SIZES,
}


def _head_dim(config: Config) -> int:
    size: int = config.hidden_size // config.num_attention_heads
    return size


def _query_rows(config: Config) -> Order:
    return rotary_halves(config.num_attention_heads, _head_dim(config))


def _key_rows(config: Config) -> Order:
    return rotary_halves(config.num_key_value_heads, _head_dim(config))


def inner_size(config: Config) -> int:
    """Count the values of a mixer."""
    inner: int = config.mamba_n_heads * config.mamba_d_head
    return inner


_NORMS = (
    TensorRule("attn_norm.weight", "input_layernorm.weight"),
    TensorRule("ffn_norm.weight", "post_attention_layernorm.weight"),
)
_ATTENTION = (
    TensorRule("attn_q.weight", "self_attn.q_proj.weight", rows=_query_rows),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight", rows=_key_rows),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
)
_EXPERTS = (
    *experts("block_sparse_moe", router="router"),
    TensorRule(("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), "shared_mlp.input_linear.weight"),
    TensorRule("ffn_down_shexp.weight", "shared_mlp.output_linear.weight"),
)
_DENSE = (
    TensorRule(("ffn_gate.weight", "ffn_up.weight"), "shared_mlp.input_linear.weight"),
    TensorRule("ffn_down.weight", "shared_mlp.output_linear.weight"),
)


def _fields(meta: Metadata) -> Fields:
    sizes = mamba2.mixer_fields(meta)
    hidden, size = meta.integer("embedding_length"), spread_head_dim(meta)
    if sizes["inner"] % hidden:
        meta.fail(f"{sizes['inner']} values of a mixer are no multiple of the {hidden} of the model")
    n_kv_heads, attends = kv_heads_per_layer(meta)
    rotated = meta.flag(FINETUNED, default=True)
    if not rotated:
        meta.disregard("rope.")
    n_experts = meta.integer("expert_count", low=0) if meta.has("expert_count") else 0
    routed: Fields = {"num_local_experts": 0, "shared_intermediate_size": meta.integer("feed_forward_length")}
    if not n_experts:
        # Of the shared feed-forward, which is the only one; converters write its width twice.
        meta.disregard("expert_shared_feed_forward_length")
    else:
        check_routing(meta, ExpertGatingFuncType.SOFTMAX)
        routed = {
            "num_local_experts": n_experts,
            "num_experts_per_tok": meta.integer("expert_used_count", high=n_experts),
            "shared_intermediate_size": meta.integer("expert_shared_feed_forward_length"),
        }
    return {
        **mamba2.bamba_fields(meta),
        **routed,
        **{field: meta.real_or(key, 1.0) for field, key in MULTIPLIERS.items()},
        "attention_multiplier": meta.real_or("attention.scale", size**-0.5),
        "mamba_expand": sizes["inner"] // hidden,
        "num_key_value_heads": n_kv_heads,
        "layer_types": ["full_attention" if each else "linear_attention" for each in attends],
        "position_embedding_type": "rope" if rotated else None,
        "rope_parameters": rope_fields(meta, size) if rotated else {"rope_type": "default", "rope_theta": 10000.0},
    }


def _keys(config: Config) -> Keys:
    attends = [kind == "full_attention" for kind in config.layer_types]
    keys: Keys = {
        **head_keys(config, attends),
        **rope_keys(config, _head_dim(config)),
        **mamba2.inner_keys(inner_size(config)),
        **{key: float(getattr(config, field)) for field, key in MULTIPLIERS.items()},
        FINETUNED: config.position_embedding_type == "rope",
        "feed_forward_length": config.shared_intermediate_size,
    }
    if config.num_local_experts:
        keys |= {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "feed_forward_length": config.intermediate_size,
            "expert_shared_feed_forward_length": config.shared_intermediate_size,
        }
    return keys


def _problem(config: Config) -> str | None:
    if config.attention_bias or config.mamba_proj_bias:
        return "its projections have biases"
    if mamba2.limited(config):
        return "its mixers' time steps are limited"
    if len({*config.layer_types}) == 1:
        return "its layers are all of one kind"
    return rope_problem(config, KINDS)


def _layers(config: Config) -> list[tuple[str, ...]]:
    routed = "experts" if config.num_local_experts else "dense"
    return [("norms", kind, routed) for kind in config.layer_types]


def _derived(fields: Fields) -> Fields:
    del fields
    return {"hidden_act": "silu", "time_step_limit": (0.0, math.inf)}


ARCHITECTURE = Architecture(
    name="granitehybrid",
    config_class="GraniteMoeHybridConfig",
    model_class="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    sizes=_SIZES,
    reals=REALS,
    fields=_fields,
    keys=_keys,
    layers=_layers,
    tensors=MappingProxyType(
        {
            "model": embeddings(),
            "norms": _NORMS,
            "linear_attention": mamba2.mixer("mamba", "mamba_n_heads", "mamba_n_groups", inner_size),
            "full_attention": _ATTENTION,
            "experts": _EXPERTS,
            "dense": _DENSE,
        }
    ),
    suits=_problem,
    derived=_derived,
    source="gguf-py constants.py; llama.cpp conversion/granite.py",
)
