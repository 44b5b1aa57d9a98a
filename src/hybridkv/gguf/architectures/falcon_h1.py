"""`falcon-h1`: Falcon-H1, attention and a Mamba-2 mixer side by side in every layer.

How the file differs from Transformers' `FalconH1ForCausalLM`: the muP multipliers are multiplied into the weights and
are no keys, so a model that was read has multipliers of one. Query and key rows keep their order.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from hybridkv.gguf.architectures import mamba2
from hybridkv.gguf.architectures.layers import head_fields, head_keys
from hybridkv.gguf.architectures.llama import REALS, SIZES
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule
from hybridkv.gguf.architectures.rope import KINDS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.decode import Floats
from hybridkv.gguf.metadata import Metadata


def _inner(config: Config) -> int:
    inner: int = config.mamba_n_heads * config.mamba_d_head
    return inner


def _in_proj(config: Config) -> Floats:
    """Return one factor per row: gate, x, B, C and time step have their own multipliers."""
    grouped = config.mamba_n_groups * config.mamba_d_state
    rows = (_inner(config), _inner(config), grouped, grouped, config.mamba_n_heads)
    return np.repeat(np.float32(config.ssm_multipliers), rows) * np.float32(config.ssm_in_multiplier)


_MIXER = tuple(
    replace(
        rule, scale={"ssm_in.weight": _in_proj, "ssm_out.weight": lambda c: c.ssm_out_multiplier}.get(rule.names[0])
    )
    for rule in mamba2.mixer("mamba", "mamba_n_heads", "mamba_n_groups", _inner)
)
_LAYER = (
    TensorRule("attn_norm.weight", "input_layernorm.weight"),
    TensorRule("attn_q.weight", "self_attn.q_proj.weight", scale=lambda c: c.attention_in_multiplier),
    TensorRule(
        "attn_k.weight", "self_attn.k_proj.weight", scale=lambda c: c.attention_in_multiplier * c.key_multiplier
    ),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight", scale=lambda c: c.attention_in_multiplier),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight", scale=lambda c: c.attention_out_multiplier),
    *_MIXER,
    # llama.cpp asks for the name without suffix, and its converter writes it so.
    TensorRule("ffn_norm", "pre_ff_layernorm.weight"),
    TensorRule("ffn_norm.weight", "pre_ff_layernorm.weight"),
    TensorRule("ffn_gate.weight", "feed_forward.gate_proj.weight", scale=lambda c: c.mlp_multipliers[0]),
    TensorRule("ffn_up.weight", "feed_forward.up_proj.weight"),
    TensorRule("ffn_down.weight", "feed_forward.down_proj.weight", scale=lambda c: c.mlp_multipliers[1]),
)
_MODEL = (
    TensorRule("token_embd.weight", "model.embed_tokens.weight", scale=lambda c: c.embedding_multiplier),
    TensorRule("output_norm.weight", "model.final_layernorm.weight"),
    TensorRule("output.weight", "lm_head.weight", scale=lambda c: c.lm_head_multiplier),
)


def _fields(meta: Metadata) -> Fields:
    heads = head_fields(meta)
    return {
        **heads,
        **mamba2.bamba_fields(meta),
        "mamba_d_ssm": mamba2.mixer_fields(meta)["inner"],
        "mamba_rms_norm": meta.has_tensor("blk.0.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "rope_parameters": rope_fields(meta, heads["head_dim"]),
    }


def _keys(config: Config) -> Keys:
    return {**head_keys(config), **rope_keys(config, config.head_dim), **mamba2.inner_keys(_inner(config))}


def _problem(config: Config) -> str | None:
    if config.attention_bias or config.mlp_bias or config.projectors_bias or config.mamba_proj_bias:
        return "its projections have biases"
    if mamba2.limited(config):
        return "its mixers' time steps are limited"
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "its mixers normalise before the gate"
    if config.tie_word_embeddings and config.embedding_multiplier != config.lm_head_multiplier:
        return "embeddings and head are one matrix with two multipliers"
    return rope_problem(config, KINDS)


def _derived(fields: Fields) -> Fields:
    return {
        "hidden_act": "silu",
        "layer_types": ["hybrid"] * fields["num_hidden_layers"],
        "time_step_limit": (0.0, math.inf),
    }


ARCHITECTURE = Architecture(
    name="falcon-h1",
    config_class="FalconH1Config",
    model_class="FalconH1ForCausalLM",
    model_type="falcon_h1",
    sizes={**SIZES, **mamba2.SIZES},
    reals=REALS,
    fields=_fields,
    keys=_keys,
    tensors=MappingProxyType({"model": _MODEL, "layer": _LAYER}),
    suits=_problem,
    derived=_derived,
    source="gguf-py constants.py; llama.cpp conversion/falcon_h1.py",
)
