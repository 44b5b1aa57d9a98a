"""`granite`: dense Granite models (3.x and the 4.0 ones without a recurrent layer), Llama with four multipliers.

How the file differs from Transformers' `GraniteForCausalLM`: query and key rows are interleaved as in `llama`; scores
are divided by the root of the head dim where the file has no `attention.scale`, and the other multipliers are one.

Granite 4.0's dense models are published in the hybrids' class, `GraniteMoeHybridForCausalLM` with attention in every
layer, whose gate and up projections are one matrix: `HYBRID_CLASS` is for writing those.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from hybridkv.gguf.architectures import llama
from hybridkv.gguf.architectures.layers import config_head_dim, head_fields, head_keys
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule, embeddings
from hybridkv.gguf.architectures.rope import SETTINGS, partial_rotary, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.metadata import Metadata

MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
FINETUNED = "rope.scaling.finetuned"
"""Whether there is RoPE at all: Granite's meaning of this key."""

_SHARED = (
    TensorRule(("ffn_gate.weight", "ffn_up.weight"), "shared_mlp.input_linear.weight"),
    TensorRule("ffn_down.weight", "shared_mlp.output_linear.weight"),
)


def _fields(meta: Metadata) -> Fields:
    heads = head_fields(meta)
    if not meta.flag(FINETUNED, default=True):
        meta.expected(FINETUNED, "true: a dense Granite model without RoPE is not supported")
    # The hybrids' converter also writes sizes of recurrent layers, which are none here, and the width of their shared
    # feed-forward, the only one here.
    meta.disregard("ssm.")
    meta.disregard("expert_shared_feed_forward_length")
    if heads["head_dim"] % 2 or partial_rotary(meta, heads["head_dim"]):
        meta.expected("rope.dimension_count", "all dimensions of a head, an even number")
    return {
        **heads,
        **{field: meta.real_or(key, 1.0) for field, key in MULTIPLIERS.items()},
        "attention_multiplier": meta.real_or("attention.scale", heads["head_dim"] ** -0.5),
        "rope_parameters": rope_fields(meta, heads["head_dim"]),
        "attention_bias": meta.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": meta.has_tensor("blk.0.ffn_up.bias"),
    }


def _keys(config: Config) -> Keys:
    return {
        **head_keys(config),
        **rope_keys(config, config_head_dim(config)),
        **{key: float(getattr(config, field)) for field, key in MULTIPLIERS.items()},
        FINETUNED: True,
    }


def _hybrid_problem(config: Config) -> str | None:
    if {*config.layer_types} != {"full_attention"} or config.num_local_experts:
        return "some of its layers are recurrent, or have experts"
    if config.position_embedding_type != "rope":
        return "it has no RoPE"
    return rope_problem(config)


ARCHITECTURE = Architecture(
    name="granite",
    config_class="GraniteConfig",
    model_class="GraniteForCausalLM",
    model_type="granite",
    sizes=llama.SIZES,
    reals=llama.REALS,
    fields=_fields,
    keys=_keys,
    tensors=MappingProxyType({"model": embeddings(), "layer": llama.LAYER}),
    suits=rope_problem,
    settings=SETTINGS,
    source="gguf-py constants.py; llama.cpp conversion/granite.py and src/models/granite.cpp",
)
HYBRID_CLASS = replace(
    ARCHITECTURE,
    config_class="GraniteMoeHybridConfig",
    model_class="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    sizes={**llama.SIZES, "shared_intermediate_size": "feed_forward_length"},
    tensors=MappingProxyType({"model": embeddings(), "layer": llama.ATTENTION + _SHARED}),
    suits=_hybrid_problem,
)
