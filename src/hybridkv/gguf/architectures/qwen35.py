"""`qwen35`: Qwen3.5 text models, gated delta net layers with a gated full attention every few layers.

Owns this architecture's metadata keys, tensor names and conventions; see `record.py` for what each
table means. Used through `ARCHITECTURES`.

How the file differs from Transformers' `Qwen3_5ForCausalLM`:

* RMSNorm weights hold the +1, except `ssm_norm`.
* `ssm_a` holds `-exp(A_log)`.
* Where value heads outnumber key heads they are tiled over the key heads, not grouped by them. This
  touches everything with a row, column or element per value head.
* `ssm_conv1d` lacks the unit dimension of a depthwise convolution: the same values in the same order.
* Multi-token prediction blocks, if any, follow the model's own and are counted as blocks.

`attn_q` holds `[q | gate]` per head in both.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.layers import checked_heads, head_dim, head_keys, kv_heads_per_layer, n_blocks
from hybridkv.gguf.architectures.record import (
    LOG_DECAY,
    ZERO_CENTRED,
    Architecture,
    Config,
    Fields,
    Keys,
    TensorRule,
    grouped,
)
from hybridkv.gguf.architectures.rope import KINDS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.decode import Order
from hybridkv.gguf.metadata import Metadata

SIZES = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}

_RECURRENT = "attention.recurrent_layers"

REALS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}


def fields(meta: Metadata) -> Fields:
    """Return what `SIZES` cannot say of `Qwen3_5TextConfig`."""
    meta.fixed("ssm.v_head_reordered", (True,), "true: value heads that are tiled over the key heads")
    return {**layer_fields(meta), "rope_parameters": rope(meta, meta.integer("attention.key_length"))}


def layer_fields(meta: Metadata, interval: int | None = None) -> Fields:
    """Return heads and layer types; every `interval`-th layer attends if the file does not say."""
    n_key, n_value = meta.integer("ssm.group_count"), meta.integer("ssm.time_step_rank")
    inner_size = meta.integer("ssm.inner_size")
    if n_value % n_key or inner_size % n_value:
        meta.fail(f"{n_value} value heads: a multiple of {n_key} key heads must divide {inner_size} values")
    meta.integer("attention.key_length")
    n_kv_heads, attends = _attending(meta, interval)
    return {
        "head_dim": head_dim(meta),
        "layer_types": [_layer_type(each) for each in attends],
        "num_key_value_heads": n_kv_heads,
        "linear_value_head_dim": inner_size // n_value,
    }


def _attending(meta: Metadata, interval: int | None) -> tuple[int, list[bool]]:
    """Return the number of KV heads, and which layers attend.

    A file says which by a KV head count per layer that is zero where there is no attention, as other hybrids do, by a
    flag per layer, or by an interval.
    """
    blocks, n_layers = n_blocks(meta)
    flags = meta.flags(_RECURRENT, blocks)[:n_layers] if meta.has(_RECURRENT) else None
    if meta.is_array("attention.head_count_kv"):
        n_kv_heads, attends = kv_heads_per_layer(meta)
        if flags is not None and flags != [not each for each in attends]:
            meta.expected(_RECURRENT, "the layers without KV heads")
        return n_kv_heads, attends
    n_kv_heads = checked_heads(meta, meta.integer("attention.head_count"), meta.integer("attention.head_count_kv"))
    if flags is not None:
        return n_kv_heads, [not each for each in flags]
    if meta.has("full_attention_interval"):
        interval = meta.integer("full_attention_interval", high=blocks + 1)
    if interval is None:
        meta.fail(
            f"nothing says which of the {n_layers} layers are attention layers: neither "
            f"{meta.key('full_attention_interval')!r} nor a KV head count per layer is there",
            hint="convert the model again with a current converter",
        )
    return n_kv_heads, [(layer + 1) % interval == 0 for layer in range(n_layers)]


def _layer_type(attends: bool) -> str:
    return "full_attention" if attends else "linear_attention"


def rope(meta: Metadata, size: int) -> Fields:
    """Return `rope_parameters`; the section of a file's fourth, unused axis is left out, as it is by some files."""
    meta.integer("rope.dimension_count", low=2, high=size)
    meta.real("rope.freq_base")
    return {
        "partial_rotary_factor": 1.0,
        **rope_fields(meta, size, partial=True),
        "mrope_section": _sections(meta),
        "mrope_interleaved": True,
    }


def _sections(meta: Metadata) -> list[int]:
    key = "rope.dimension_sections"
    sections = meta.integers(key, 3 if meta.length(key) == 3 else 4)
    if any(sections[3:]):
        meta.expected(key, "0 dimensions in a fourth section: that axis has no positions in a text")
    return sections[:3]


def keys(config: Config) -> Keys:
    """Return the metadata that `SIZES` leaves out."""
    # Transformers' own sections where a config names none.
    sections = config.rope_parameters.get("mrope_section", [11, 11, 10])
    return {
        **layer_keys(config),
        **rope_keys(config, config.head_dim),
        "rope.dimension_sections": [*sections, 0],
    }


def layer_keys(config: Config) -> Keys:
    """Return the keys of heads and layer types."""
    attends = [kind == "full_attention" for kind in config.layer_types]
    interval = attends.index(True) + 1
    regular = all(each == ((layer + 1) % interval == 0) for layer, each in enumerate(attends))
    return {
        **head_keys(config, None if regular else attends),
        **({"full_attention_interval": interval} if regular else {_RECURRENT: [not each for each in attends]}),
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def problem(config: Config) -> str | None:
    """Return what cannot be written of a config."""
    if "full_attention" not in config.layer_types or config.attention_bias:
        return "it has no attention layers, or attention biases"
    return rope_problem(config, KINDS, partial=True)


def layers(config: Config) -> list[tuple[str, ...]]:
    """Return each layer's tables."""
    return [(kind, "feed_forward") for kind in config.layer_types]


def _per_head(config: Config) -> Order:
    return grouped(config.linear_num_key_heads, config.linear_num_value_heads, 1)


def _per_value(config: Config) -> Order:
    return grouped(config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim)


def _behind_qk(config: Config) -> Order:
    n_key, n_value = config.linear_num_key_heads, config.linear_num_value_heads
    qk_rows = 2 * n_key * config.linear_key_head_dim
    return grouped(n_key, n_value, config.linear_value_head_dim, start=qk_rows)


MODEL = (
    TensorRule("token_embd.weight", "model.embed_tokens.weight"),
    TensorRule("output_norm.weight", "model.norm.weight", values=ZERO_CENTRED),
    TensorRule("output.weight", "lm_head.weight"),
)

NORMS = (
    TensorRule("attn_norm.weight", "input_layernorm.weight", values=ZERO_CENTRED),
    TensorRule("post_attention_norm.weight", "post_attention_layernorm.weight", values=ZERO_CENTRED),
)

FEED_FORWARD = (
    TensorRule("ffn_gate.weight", "mlp.gate_proj.weight"),
    TensorRule("ffn_up.weight", "mlp.up_proj.weight"),
    TensorRule("ffn_down.weight", "mlp.down_proj.weight"),
)

FULL_ATTENTION = (
    TensorRule("attn_q.weight", "self_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
    TensorRule("attn_q_norm.weight", "self_attn.q_norm.weight", values=ZERO_CENTRED),
    TensorRule("attn_k_norm.weight", "self_attn.k_norm.weight", values=ZERO_CENTRED),
)

LINEAR_ATTENTION = (
    TensorRule("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", rows=_behind_qk),
    TensorRule("attn_gate.weight", "linear_attn.in_proj_z.weight", rows=_per_value),
    TensorRule("ssm_alpha.weight", "linear_attn.in_proj_a.weight", rows=_per_head),
    TensorRule("ssm_beta.weight", "linear_attn.in_proj_b.weight", rows=_per_head),
    TensorRule("ssm_a", "linear_attn.A_log", values=LOG_DECAY, cols=_per_head),
    TensorRule("ssm_dt.bias", "linear_attn.dt_bias", cols=_per_head),
    TensorRule("ssm_dt", "linear_attn.dt_bias", cols=_per_head),  # ollama's name
    TensorRule("ssm_conv1d.weight", "linear_attn.conv1d.weight", rows=_behind_qk),
    TensorRule("ssm_norm.weight", "linear_attn.norm.weight"),
    TensorRule("ssm_out.weight", "linear_attn.out_proj.weight", cols=_per_value),
)


PREDICTION = (
    TensorRule("nextn.eh_proj.weight", "fc.weight"),
    TensorRule("nextn.enorm.weight", "pre_fc_norm_embedding.weight", values=ZERO_CENTRED),
    TensorRule("nextn.hnorm.weight", "pre_fc_norm_hidden.weight", values=ZERO_CENTRED),
    TensorRule("nextn.shared_head_norm.weight", "model.norm.weight", values=ZERO_CENTRED),
)
"""A head is an attention layer of the model, and these; `fc` reads the embedding before the hidden state."""


def derived(fields: Fields) -> Fields:
    """Return the activation, and that no projection has a bias."""
    del fields
    return {"hidden_act": "silu", "attention_bias": False}


ARCHITECTURE = Architecture(
    name="qwen35",
    config_class="Qwen3_5TextConfig",
    model_class="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    sizes={"intermediate_size": "feed_forward_length", **SIZES},
    reals=REALS,
    fields=fields,
    keys=keys,
    layers=layers,
    tensors=MappingProxyType(
        {
            "model": MODEL,
            "linear_attention": NORMS + LINEAR_ATTENTION,
            "full_attention": NORMS + FULL_ATTENTION,
            "feed_forward": FEED_FORWARD,
        }
    ),
    suits=problem,
    prediction=PREDICTION,
    derived=derived,
    source="gguf-py constants.py; ik_llama.cpp src/llama-hparams.cpp, src/llama-load-tensors.cpp",
)
