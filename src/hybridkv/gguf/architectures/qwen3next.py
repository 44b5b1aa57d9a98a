"""`qwen3next`: Qwen3-Next, gated delta net layers, gated attention every few layers, experts in all.

How the file differs from Transformers' `Qwen3NextForCausalLM`:

* RMSNorm weights hold the +1, except `ssm_norm`; `ssm_a` holds `-exp(A_log)`.
* Transformers interleaves the projections of q, k, v and z by key head; the file has `attn_qkv` (all q, all k,
  all v) and `attn_gate` (all z). Older files have them as Transformers does, in `ssm_in`.
* `ssm_ba` is interleaved by key head in both. Value heads stay grouped by key head, unlike in `qwen35`.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures import experts, qwen35
from hybridkv.gguf.architectures.record import LOG_DECAY, Architecture, Config, Fields, Keys, TensorRule
from hybridkv.gguf.architectures.rope import KINDS, rope_fields, rope_keys, rope_problem
from hybridkv.gguf.decode import Order
from hybridkv.gguf.metadata import Metadata

_INTERVAL = 4  # of attention layers, in files that do not say


def _widths(config: Config) -> tuple[int, int]:
    """Count the rows of all keys (or queries), and of all values (or gates)."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return keys, config.linear_num_value_heads * config.linear_value_head_dim


def _qkvz_parts(config: Config) -> tuple[int, int]:
    keys, values = _widths(config)
    return 2 * keys + values, values


def _qkvz_rows(config: Config) -> Order:
    keys, values = _widths(config)
    n_key = config.linear_num_key_heads
    starts = np.cumsum([0, keys, keys, values])
    blocks = [
        start + np.arange(rows).reshape(n_key, -1)
        for start, rows in zip(starts, (keys, keys, values, values), strict=True)
    ]
    return np.concatenate(blocks, axis=1).reshape(-1)


LINEAR_ATTENTION = (
    TensorRule(
        ("attn_qkv.weight", "attn_gate.weight"),
        "linear_attn.in_proj_qkvz.weight",
        rows=_qkvz_rows,
        parts=_qkvz_parts,
    ),
    TensorRule("ssm_in.weight", "linear_attn.in_proj_qkvz.weight"),
    TensorRule("ssm_ba.weight", "linear_attn.in_proj_ba.weight"),
    TensorRule("ssm_a", "linear_attn.A_log", values=LOG_DECAY),
    TensorRule("ssm_dt.bias", "linear_attn.dt_bias"),
    TensorRule("ssm_dt", "linear_attn.dt_bias"),  # ollama's name
    TensorRule("ssm_conv1d.weight", "linear_attn.conv1d.weight"),
    TensorRule("ssm_norm.weight", "linear_attn.norm.weight"),
    TensorRule("ssm_out.weight", "linear_attn.out_proj.weight"),
)


def _fields(meta: Metadata) -> Fields:
    size = meta.integer("attention.key_length")
    experts.check_routing(meta, ExpertGatingFuncType.SOFTMAX)
    meta.fixed("ssm.v_head_reordered", (False,), "false: value heads that are grouped by key head")
    return {
        **qwen35.layer_fields(meta, _INTERVAL),
        # Said in any case: the class has another default.
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope_fields(meta, size, partial=True)},
        "norm_topk_prob": True,
    }


def _keys(config: Config) -> Keys:
    return {**qwen35.layer_keys(config), **rope_keys(config, config.head_dim)}


def _problem(config: Config) -> str | None:
    if "full_attention" not in config.layer_types or config.attention_bias:
        return "it has no attention layers, or attention biases"
    return experts.sparse_everywhere(config) or rope_problem(config, KINDS, partial=True)


ARCHITECTURE = Architecture(
    name="qwen3next",
    config_class="Qwen3NextConfig",
    model_class="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    sizes={**qwen35.SIZES, **experts.SHARED_SIZES},
    reals=qwen35.REALS,
    fields=_fields,
    keys=_keys,
    layers=qwen35.layers,
    tensors=MappingProxyType(
        {
            "model": qwen35.MODEL,
            "linear_attention": qwen35.NORMS + LINEAR_ATTENTION,
            "full_attention": qwen35.NORMS + qwen35.FULL_ATTENTION,
            "feed_forward": experts.experts("mlp") + experts.SHARED_EXPERT,
        }
    ),
    suits=_problem,
    prediction=qwen35.PREDICTION,
    derived=qwen35.derived,
    source="gguf-py constants.py; llama.cpp conversion/qwen.py; ik_llama.cpp src/llama-load-tensors.cpp",
)
