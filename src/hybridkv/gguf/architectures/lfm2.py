"""`lfm2`: LFM2, gated short convolutions and attention layers.

How the file differs from Transformers' `Lfm2ForCausalLM`: the norm before the head is called the embedding's, as in
Transformers; the convolution lacks its unit dimension; the feed-forward width is the one in use, not the one that
Transformers derives it from; KV heads are counted per layer, zero in convolution layers.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.layers import head_keys, kv_heads_per_layer, spread_head_dim
from hybridkv.gguf.architectures.llama import SIZES
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule
from hybridkv.gguf.architectures.rope import KINDS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.metadata import Metadata

REALS = {"norm_eps": "attention.layer_norm_rms_epsilon"}
CONV_SIZES = {"conv_L_cache": "shortconv.l_cache"}

MODEL = (
    TensorRule("token_embd.weight", "model.embed_tokens.weight"),
    TensorRule("token_embd_norm.weight", "model.embedding_norm.weight"),
    TensorRule("output.weight", "lm_head.weight"),
)
NORMS = (
    TensorRule("attn_norm.weight", "operator_norm.weight"),
    TensorRule("ffn_norm.weight", "ffn_norm.weight"),
)
CONV = (
    TensorRule("shortconv.conv.weight", "conv.conv.weight"),
    TensorRule("shortconv.in_proj.weight", "conv.in_proj.weight"),
    TensorRule("shortconv.out_proj.weight", "conv.out_proj.weight"),
)
ATTENTION = (
    TensorRule("attn_q.weight", "self_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.out_proj.weight"),
    TensorRule("attn_q_norm.weight", "self_attn.q_layernorm.weight"),
    TensorRule("attn_k_norm.weight", "self_attn.k_layernorm.weight"),
)
FEED_FORWARD = (
    TensorRule("ffn_gate.weight", "feed_forward.w1.weight"),
    TensorRule("ffn_up.weight", "feed_forward.w3.weight"),
    TensorRule("ffn_down.weight", "feed_forward.w2.weight"),
)


def layer_fields(meta: Metadata) -> Fields:
    """Return heads, layer types and RoPE."""
    n_kv_heads, attends = kv_heads_per_layer(meta)
    return {
        "num_key_value_heads": n_kv_heads,
        "layer_types": ["full_attention" if each else "conv" for each in attends],
        "rope_parameters": rope_fields(meta, spread_head_dim(meta)),
        "conv_bias": False,
    }


def keys(config: Config) -> Keys:
    """Return the metadata that the sizes leave out."""
    size = config.hidden_size // config.num_attention_heads
    attends = [kind == "full_attention" for kind in config.layer_types]
    return {**head_keys(config, attends), **rope_keys(config, size)}


def problem(config: Config) -> str | None:
    """Return what cannot be written of a config."""
    if config.conv_bias or "full_attention" not in config.layer_types:
        return "its convolutions have biases, or no layer attends"
    return rope_problem(config, KINDS)


def _fields(meta: Metadata) -> Fields:
    return {**layer_fields(meta), "block_auto_adjust_ff_dim": False}


def _keys(config: Config) -> Keys:
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        # Source: transformers, modeling_lfm2.py (Lfm2MLP).
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width = int(config.block_ffn_dim_multiplier * width)
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return {**keys(config), "feed_forward_length": width}


def _layers(config: Config) -> list[tuple[str, ...]]:
    return [("norms", kind, "feed_forward") for kind in config.layer_types]


TENSORS = {"model": MODEL, "norms": NORMS, "conv": CONV, "full_attention": ATTENTION, "feed_forward": FEED_FORWARD}

ARCHITECTURE = Architecture(
    name="lfm2",
    config_class="Lfm2Config",
    model_class="Lfm2ForCausalLM",
    model_type="lfm2",
    sizes={**SIZES, **CONV_SIZES},
    reals=REALS,
    fields=_fields,
    keys=_keys,
    layers=_layers,
    tensors=MappingProxyType(TENSORS),
    suits=problem,
    derived=lambda _: {},
    source="gguf-py constants.py; llama.cpp conversion/lfm2.py",
)
