"""`qwen35`: Qwen3.5 text models, gated delta net layers with a gated full attention every few layers.

Owns this architecture's metadata keys, tensor names and conventions; see `record.py` for what each
table means. Used through `ARCHITECTURES`.

How the file differs from Transformers' `Qwen3_5ForCausalLM`:

* RMSNorm weights hold the +1, except `ssm_norm`.
* `ssm_a` holds `-exp(A_log)`.
* Where value heads outnumber key heads they are tiled over the key heads, not grouped by them. This
  touches everything with a row, column or element per value head.
* `ssm_conv1d` lacks the unit dimension of a depthwise convolution: the same numbers in the same order.
* Multi-token prediction blocks, if any, follow the model's own and are counted as blocks.

`attn_q` holds `[q | gate]` per head in both.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures.record import (
    Architecture,
    Fields,
    TensorRule,
    grouped,
    log_decay,
    zero_centred,
)
from hybridkv.gguf.decode import Order
from hybridkv.gguf.metadata import Metadata

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}


def fields(meta: Metadata) -> Fields:
    """Return the arguments of `Qwen3_5TextConfig`."""
    sizes = {field: meta.integer(key) for field, key in SIZES.items()}
    n_key, n_value = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
    inner_size = meta.integer("ssm.inner_size")
    if n_value % n_key or inner_size % n_value:
        meta.fail(f"{n_value} value heads: a multiple of {n_key} key heads must divide {inner_size} values")
    if meta.has("attention.value_length"):
        meta.integer("attention.value_length", low=sizes["head_dim"], high=sizes["head_dim"])
    layer_types, n_kv_heads = _layers(meta)
    if sizes["num_attention_heads"] % n_kv_heads:
        meta.fail(f"{sizes['num_attention_heads']} query heads are no multiple of {n_kv_heads} KV heads")
    return {
        **sizes,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_key_value_heads": n_kv_heads,
        "linear_value_head_dim": inner_size // n_value,
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.integer("context_length", high=2**31 - 1),
        "rope_parameters": _rope(meta, sizes["head_dim"]),
    }


def _layers(meta: Metadata) -> tuple[list[str], int]:
    """Return each layer's type and the number of KV heads.

    A file says which layers attend either by an interval or, like other hybrids, by a KV head count
    per layer that is zero where there is no attention.
    """
    n_blocks, n_layers = _n_blocks(meta)
    if meta.is_array("attention.head_count_kv"):
        per_layer = meta.integers("attention.head_count_kv", n_blocks)[:n_layers]
        counts = set(per_layer) - {0}
        if len(counts) != 1 or max(counts) > meta.largest_dim:
            meta.expected("attention.head_count_kv", "one number of KV heads in all attention layers")
        return [_layer_type(count > 0) for count in per_layer], counts.pop()
    n_kv_heads = meta.integer("attention.head_count_kv")
    if not meta.has("full_attention_interval"):
        meta.fail(
            f"nothing says which of the {n_layers} layers are attention layers: neither "
            f"{meta.key('full_attention_interval')!r} nor a KV head count per layer is there",
            hint="convert the model again with a current converter",
        )
    interval = meta.integer("full_attention_interval", high=n_blocks + 1)
    return [_layer_type((layer + 1) % interval == 0) for layer in range(n_layers)], n_kv_heads


def _layer_type(attends: bool) -> str:
    return "full_attention" if attends else "linear_attention"


def _n_blocks(meta: Metadata) -> tuple[int, int]:
    """Return the number of blocks in the file and of layers in the model."""
    n_blocks = meta.integer("block_count", high=len(meta.header.tensors))
    if not meta.has("nextn_predict_layers"):
        return n_blocks, n_blocks
    return n_blocks, n_blocks - meta.integer("nextn_predict_layers", low=0, high=n_blocks - 1)


def _rope(meta: Metadata, head_dim: int) -> Fields:
    if meta.has("rope.scaling.type") and meta.text("rope.scaling.type") != "none":
        meta.expected("rope.scaling.type", "'none': scaled RoPE is not supported for this architecture")
    n_rotated = meta.integer("rope.dimension_count", low=2, high=head_dim)
    factor = n_rotated / head_dim
    # Transformers multiplies back and rounds down, which loses a dimension at some odd head sizes.
    if n_rotated % 2 or int(head_dim * factor) != n_rotated:
        meta.expected("rope.dimension_count", f"an even part of {head_dim} dimensions")
    return {
        "rope_type": "default",
        "rope_theta": meta.real("rope.freq_base"),
        "partial_rotary_factor": factor,
        "mrope_section": meta.integers("rope.dimension_sections", 4)[:3],
        "mrope_interleaved": True,
    }


def _skipped_blocks(meta: Metadata) -> range:
    n_blocks, n_layers = _n_blocks(meta)
    return range(n_layers, n_blocks)


def _per_head(config: Fields) -> Order:
    return grouped(config["linear_num_key_heads"], config["linear_num_value_heads"], 1)


def _per_value(config: Fields) -> Order:
    return grouped(config["linear_num_key_heads"], config["linear_num_value_heads"], config["linear_value_head_dim"])


def _behind_qk(config: Fields) -> Order:
    n_key, n_value = config["linear_num_key_heads"], config["linear_num_value_heads"]
    qk_rows = 2 * n_key * config["linear_key_head_dim"]
    return grouped(n_key, n_value, config["linear_value_head_dim"], start=qk_rows)


MODEL_TENSORS = (
    TensorRule("token_embd.weight", "model.embed_tokens.weight"),
    TensorRule("output_norm.weight", "model.norm.weight", values=zero_centred),
    TensorRule("output.weight", "lm_head.weight"),
)

EVERY_LAYER = (
    TensorRule("attn_norm.weight", "input_layernorm.weight", values=zero_centred),
    TensorRule("post_attention_norm.weight", "post_attention_layernorm.weight", values=zero_centred),
    TensorRule("ffn_gate.weight", "mlp.gate_proj.weight"),
    TensorRule("ffn_up.weight", "mlp.up_proj.weight"),
    TensorRule("ffn_down.weight", "mlp.down_proj.weight"),
)

FULL_ATTENTION = (
    TensorRule("attn_q.weight", "self_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "self_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "self_attn.v_proj.weight"),
    TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
    TensorRule("attn_q_norm.weight", "self_attn.q_norm.weight", values=zero_centred),
    TensorRule("attn_k_norm.weight", "self_attn.k_norm.weight", values=zero_centred),
)

LINEAR_ATTENTION = (
    TensorRule("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", rows=_behind_qk),
    TensorRule("attn_gate.weight", "linear_attn.in_proj_z.weight", rows=_per_value),
    TensorRule("ssm_alpha.weight", "linear_attn.in_proj_a.weight", rows=_per_head),
    TensorRule("ssm_beta.weight", "linear_attn.in_proj_b.weight", rows=_per_head),
    TensorRule("ssm_a", "linear_attn.A_log", values=log_decay, cols=_per_head),
    TensorRule("ssm_dt.bias", "linear_attn.dt_bias", cols=_per_head),
    TensorRule("ssm_conv1d.weight", "linear_attn.conv1d.weight", rows=_behind_qk),
    TensorRule("ssm_norm.weight", "linear_attn.norm.weight"),
    TensorRule("ssm_out.weight", "linear_attn.out_proj.weight", cols=_per_value),
)

ARCHITECTURE = Architecture(
    name="qwen35",
    config_class="Qwen3_5TextConfig",
    model_class="Qwen3_5ForCausalLM",
    fields=fields,
    model_tensors=MODEL_TENSORS,
    layer_tensors=MappingProxyType(
        {
            "linear_attention": EVERY_LAYER + LINEAR_ATTENTION,
            "full_attention": EVERY_LAYER + FULL_ATTENTION,
        }
    ),
    skipped_blocks=_skipped_blocks,
    source="gguf-py constants.py; ik_llama.cpp src/llama-hparams.cpp, src/llama-load-tensors.cpp",
)
