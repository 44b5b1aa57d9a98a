"""`gemma3`: Gemma 3 text models, sliding-window layers with a full attention every few layers.

How the file differs from Transformers' `Gemma3ForCausalLM`:

* RMSNorm weights hold the +1, all of them.
* Sliding layers and full ones have their own RoPE base; scaling concerns the full ones alone.
* The pattern of layers, the base of the sliding ones and the score scale are keys of newer files; older ones leave
  them to the reader: every sixth layer is full, the base is 10000, the scale is the head dim's except in
  the 27B model, which is known by its 62 layers.
* The embedding's scale is the square root of the width in both, and no key.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.layers import head_fields, head_keys, n_blocks
from hybridkv.gguf.architectures.llama import FEED_FORWARD, REALS, SIZES
from hybridkv.gguf.architectures.record import ZERO_CENTRED, Architecture, Config, Fields, Keys, TensorRule
from hybridkv.gguf.architectures.rope import rope_fields, rope_keys, unscaled_fields
from hybridkv.gguf.metadata import Metadata

_LAYERS_OF_27B = 62

LAYER = (
    TensorRule("attn_norm.weight", "input_layernorm.weight", values=ZERO_CENTRED),
    TensorRule("attn_q.weight", "self_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
    TensorRule("attn_q_norm.weight", "self_attn.q_norm.weight", values=ZERO_CENTRED),
    TensorRule("attn_k_norm.weight", "self_attn.k_norm.weight", values=ZERO_CENTRED),
    TensorRule("post_attention_norm.weight", "post_attention_layernorm.weight", values=ZERO_CENTRED),
    TensorRule("ffn_norm.weight", "pre_feedforward_layernorm.weight", values=ZERO_CENTRED),
    TensorRule("post_ffw_norm.weight", "post_feedforward_layernorm.weight", values=ZERO_CENTRED),
    *FEED_FORWARD[:3],
)
MODEL = (
    TensorRule("token_embd.weight", "model.embed_tokens.weight"),
    TensorRule("output_norm.weight", "model.norm.weight", values=ZERO_CENTRED),
    TensorRule("output.weight", "lm_head.weight"),
)


def _fields(meta: Metadata) -> Fields:
    heads = head_fields(meta)
    _, layers = n_blocks(meta)
    scaled = heads["head_dim"] if layers != _LAYERS_OF_27B else meta.integer("embedding_length") // _heads(meta)
    local = meta.real("rope.freq_base_swa") if meta.has("rope.freq_base_swa") else 10000.0
    # Older files leave out the base as well.
    theta = {} if meta.has("rope.freq_base") else {"rope_theta": 1_000_000.0}
    return {
        **heads,
        "sliding_window": meta.integer("attention.sliding_window", high=2**31 - 1),
        "layer_types": _layer_types(meta, layers),
        "query_pre_attn_scalar": _score_scale(meta) if meta.has("attention.scale") else scaled,
        "final_logit_softcapping": _softcap(meta),
        "rope_parameters": {
            "full_attention": rope_fields(meta, heads["head_dim"]) | theta,
            "sliding_attention": unscaled_fields(meta, local, heads["head_dim"]),
        },
    }


def _heads(meta: Metadata) -> int:
    return meta.integer("attention.head_count")


def _score_scale(meta: Metadata) -> int:
    """Return the number whose root scores are divided by, which is whole in a config."""
    number = meta.real("attention.scale") ** -2
    if not 0.5 < number < 2**31 or abs(number - round(number)) > 1e-4 * number:
        meta.expected("attention.scale", "one over the root of a whole number")
    return round(number)


def _softcap(meta: Metadata) -> float | None:
    return meta.real_or("final_logit_softcapping", 0.0) or None


def _layer_types(meta: Metadata, layers: int) -> list[str]:
    key = "attention.sliding_window_pattern"
    if meta.is_array(key):
        slides = [bool(flag) for flag in meta.flags(key, n_blocks(meta)[0])[:layers]]
    else:
        period = meta.integer(key, high=2**16) if meta.has(key) else 6
        slides = [bool((layer + 1) % period) for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _keys(config: Config) -> Keys:
    rope = config.rope_parameters
    keys: Keys = {
        **head_keys(config),
        **rope_keys(config, config.head_dim, rope["full_attention"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "attention.scale": config.query_pre_attn_scalar**-0.5,
    }
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _problem(config: Config) -> str | None:
    rope = config.rope_parameters
    if rope["full_attention"]["rope_type"] not in ("default", "linear"):
        return f"its RoPE is of type {rope['full_attention']['rope_type']!r}; allowed: default, linear"
    if rope["sliding_attention"]["rope_type"] != "default":
        return "the RoPE of its sliding layers is scaled"
    if config.attention_bias or config.attn_logit_softcapping or config.use_bidirectional_attention:
        return "it has attention biases, capped scores or bidirectional attention"
    return None


def _derived(fields: Fields) -> Fields:
    del fields
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


ARCHITECTURE = Architecture(
    name="gemma3",
    config_class="Gemma3TextConfig",
    model_class="Gemma3ForCausalLM",
    model_type="gemma3_text",
    sizes=SIZES,
    reals=REALS,
    fields=_fields,
    keys=_keys,
    tensors=MappingProxyType({"model": MODEL, "layer": LAYER}),
    suits=_problem,
    derived=_derived,
    source="gguf-py constants.py; llama.cpp conversion/gemma.py and src/models/gemma3.cpp",
)
