"""Tables of models that are read from directories alone: no GGUF file holds them, and the native backend goes by
GGUF's names.

Bamba's RoPE concerns a part of each head, which Transformers' class for `granitehybrid` does not compute; OLMo-Hybrid
and Zamba2 (`zamba2.py`) have no architecture; a Mistral with a sliding window cannot say so as `llama`; Phi-3's
projections are joined.
"""

from __future__ import annotations

from types import MappingProxyType

from hybridkv.gguf.architectures import granitehybrid, llama, mamba2, zamba2
from hybridkv.gguf.architectures.layers import config_head_dim
from hybridkv.gguf.architectures.record import LOG_DECAY, Config, Tables, TensorRule, embeddings

_GATED = (
    TensorRule("ffn_gate.weight", "feed_forward.gate_proj.weight"),
    TensorRule("ffn_up.weight", "feed_forward.up_proj.weight"),
    TensorRule("ffn_down.weight", "feed_forward.down_proj.weight"),
)
_BAMBA = Tables(
    config_class="BambaConfig",
    layers=lambda c: [("layer", kind) for kind in c.layer_types],
    tensors=MappingProxyType(
        {
            "model": embeddings(norm="final_layernorm"),
            "layer": (
                TensorRule("attn_norm.weight", "input_layernorm.weight"),
                TensorRule("ffn_norm.weight", "pre_ff_layernorm.weight"),
                *_GATED,
            ),
            "linear_attention": mamba2.mixer("mamba", "mamba_n_heads", "mamba_n_groups", granitehybrid.inner_size),
            "full_attention": llama.DENSE[1:9],
        }
    ),
)

_OLMO_NORMS = {
    "linear_attention": (
        TensorRule("attn_norm.weight", "input_layernorm.weight"),
        TensorRule("ffn_norm.weight", "post_attention_layernorm.weight"),
    ),
    "full_attention": (
        TensorRule("post_attention_norm.weight", "post_attention_layernorm.weight"),
        TensorRule("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
    ),
}
_OLMO_DELTA = (
    TensorRule("attn_q.weight", "linear_attn.q_proj.weight"),
    TensorRule("attn_k.weight", "linear_attn.k_proj.weight"),
    TensorRule("attn_v.weight", "linear_attn.v_proj.weight"),
    TensorRule("attn_gate.weight", "linear_attn.g_proj.weight"),
    TensorRule("ssm_alpha.weight", "linear_attn.a_proj.weight"),
    TensorRule("ssm_beta.weight", "linear_attn.b_proj.weight"),
    TensorRule("ssm_conv1d.weight", "linear_attn.conv1d.weight"),
    TensorRule("ssm_dt.bias", "linear_attn.dt_bias"),
    TensorRule("ssm_a", "linear_attn.A_log", values=LOG_DECAY),
    TensorRule("ssm_norm.weight", "linear_attn.o_norm.weight"),
    TensorRule("ssm_out.weight", "linear_attn.o_proj.weight"),
)
_OLMO_HYBRID = Tables(
    config_class="OlmoHybridConfig",
    layers=lambda c: [(kind, "feed_forward") for kind in c.layer_types],
    tensors=MappingProxyType(
        {
            "model": embeddings(),
            "linear_attention": (*_OLMO_NORMS["linear_attention"], *_OLMO_DELTA),
            "full_attention": (*_OLMO_NORMS["full_attention"], *llama.DENSE[1:11]),
            "feed_forward": llama.FEED_FORWARD,
        }
    ),
)


def _phi3_rows(c: Config) -> tuple[int, ...]:
    size = config_head_dim(c)
    return tuple(size * heads for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads))


_PHI3 = Tables(
    config_class="Phi3Config",
    tensors=MappingProxyType(
        {
            "model": embeddings(),
            "layer": (
                TensorRule("attn_norm.weight", "input_layernorm.weight"),
                TensorRule(
                    ("attn_q.weight", "attn_k.weight", "attn_v.weight"), "self_attn.qkv_proj.weight", parts=_phi3_rows
                ),
                TensorRule("attn_output.weight", "self_attn.o_proj.weight"),
                TensorRule("ffn_norm.weight", "post_attention_layernorm.weight"),
                TensorRule(("ffn_gate.weight", "ffn_up.weight"), "mlp.gate_up_proj.weight"),
                TensorRule("ffn_down.weight", "mlp.down_proj.weight"),
            ),
        }
    ),
)
_MISTRAL = Tables(
    config_class="MistralConfig",
    tensors=MappingProxyType({"model": embeddings(), "layer": llama.DENSE + llama.FEED_FORWARD}),
)

DIRECTORIES: tuple[Tables, ...] = (_BAMBA, _OLMO_HYBRID, zamba2.TABLES, _MISTRAL, _PHI3)
