"""`llama`: dense Llama models, and those of other makers that are built alike (Mistral, SmolLM2).

Owns this architecture's metadata keys, tensor names and conventions; see `record.py` for what each
table means. Used through `ARCHITECTURES`.

How the file differs from Transformers' `LlamaForCausalLM`: its RoPE rotates neighbouring values, so the rows of
each query and key head are interleaved, biases included. `DENSE` below is what other dense models share.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.layers import config_head_dim, head_fields, head_keys
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule, embeddings, rotary_halves
from hybridkv.gguf.architectures.rope import SETTINGS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.decode import Order
from hybridkv.gguf.metadata import Metadata

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
REALS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}

DENSE = (
    TensorRule("attn_norm.weight", "input_layernorm.weight"),
    TensorRule("attn_q.weight", "self_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
    TensorRule("attn_q.bias", "self_attn.q_proj.bias"),
    TensorRule("attn_k.bias", "self_attn.k_proj.bias"),
    TensorRule("attn_v.bias", "self_attn.v_proj.bias"),
    TensorRule("attn_output.bias", "self_attn.o_proj.bias"),
    TensorRule("attn_q_norm.weight", "self_attn.q_norm.weight"),
    TensorRule("attn_k_norm.weight", "self_attn.k_norm.weight"),
    TensorRule("ffn_norm.weight", "post_attention_layernorm.weight"),
)
FEED_FORWARD = (
    TensorRule("ffn_gate.weight", "mlp.gate_proj.weight"),
    TensorRule("ffn_up.weight", "mlp.up_proj.weight"),
    TensorRule("ffn_down.weight", "mlp.down_proj.weight"),
    TensorRule("ffn_gate.bias", "mlp.gate_proj.bias"),
    TensorRule("ffn_up.bias", "mlp.up_proj.bias"),
    TensorRule("ffn_down.bias", "mlp.down_proj.bias"),
)


def _query_rows(config: Config) -> Order:
    return rotary_halves(config.num_attention_heads, config_head_dim(config))


def _key_rows(config: Config) -> Order:
    return rotary_halves(config.num_key_value_heads, config_head_dim(config))


ATTENTION = (
    TensorRule("attn_norm.weight", "input_layernorm.weight"),
    TensorRule("attn_q.weight", "self_attn.q_proj.weight", rows=_query_rows),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight", rows=_key_rows),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
    TensorRule("attn_q.bias", "self_attn.q_proj.bias", cols=_query_rows),
    TensorRule("attn_k.bias", "self_attn.k_proj.bias", cols=_key_rows),
    TensorRule("attn_v.bias", "self_attn.v_proj.bias"),
    TensorRule("attn_output.bias", "self_attn.o_proj.bias"),
    TensorRule("ffn_norm.weight", "post_attention_layernorm.weight"),
)
"""A layer's attention, rows as `llama` interleaves them, and both of its norms."""

LAYER = (*ATTENTION, *FEED_FORWARD)


def _fields(meta: Metadata) -> Fields:
    heads = head_fields(meta)
    if heads["head_dim"] % 2:
        meta.fail(f"a head of {heads['head_dim']} dimensions has no halves to rotate")
    return {
        **heads,
        "rope_parameters": rope_fields(meta, heads["head_dim"]),
        "attention_bias": meta.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": meta.has_tensor("blk.0.ffn_up.bias"),
    }


def _keys(config: Config) -> Keys:
    return {**head_keys(config), **rope_keys(config, config.head_dim)}


ARCHITECTURE = Architecture(
    name="llama",
    config_class="LlamaConfig",
    model_class="LlamaForCausalLM",
    model_type="llama",
    sizes=SIZES,
    reals=REALS,
    fields=_fields,
    keys=_keys,
    tensors=MappingProxyType({"model": embeddings(), "layer": LAYER}),
    suits=rope_problem,
    settings=SETTINGS,
    source="gguf-py constants.py; llama.cpp conversion/llama.py",
)
