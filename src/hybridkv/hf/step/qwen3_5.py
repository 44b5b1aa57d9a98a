"""`qwen3_5_text`: gated delta net layers with a gated full attention every few layers, and a SwiGLU after each.

Written down from Transformers' `Qwen3_5ForCausalLM`, whose norms hold weights centred on zero except the delta net's
own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridkv.hf.step.record import Builder, Family
from hybridkv.kernels.step import delta_rejects

_L2_EPS = 1e-6  # of the delta rule's queries and keys, fixed in Transformers' code


def _rejects(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r}, not silu"
    if config.rope_parameters["rope_type"] != "default":
        return f"RoPE of type {config.rope_parameters['rope_type']!r}, not default"
    if config.attention_bias:
        return "attention projections with a bias"
    if _n_rotated(config) % 2:
        return f"a rotated part of {_n_rotated(config)} dims, which is odd"
    return delta_rejects(config.linear_key_head_dim, config.linear_value_head_dim)


def _n_rotated(config: Any) -> int:
    return int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _build(model: Any, b: Builder) -> None:
    config = model.config.get_text_config(decoder=True)
    x, normed = b.buffer("x", config.hidden_size), b.buffer("normed", config.hidden_size)
    for index, layer in enumerate(model.model.layers):
        _norm(b, x, normed, layer.input_layernorm)
        if config.layer_types[index] == "linear_attention":
            _delta_net(b, index, layer.linear_attn, normed, x)
        else:
            _attention(b, index, config, layer.self_attn, normed, x)
        _norm(b, x, normed, layer.post_attention_layernorm)
        b.swiglu(layer.mlp, normed, x, config.intermediate_size)


def _build_head(model: Any, b: Builder) -> None:
    config = model.config.get_text_config(decoder=True)
    x = b.buffer("x", config.hidden_size)
    _norm(b, x, x, model.model.norm)
    b.linear(x, (model.lm_head, b.buffer("logits", config.vocab_size)))


def _norm(b: Builder, x: Tensor, dst: Tensor, norm: Any) -> None:
    b.rms_norm(x, dst, 1 + norm.weight.float(), norm.eps)


def _delta_net(b: Builder, index: int, net: Any, normed: Tensor, x: Tensor) -> None:
    n_key, n_value, d, dv = net.num_k_heads, net.num_v_heads, net.head_k_dim, net.head_v_dim
    raw, mixed = b.buffer("delta_raw", net.conv_dim), b.buffer("delta_mixed", net.conv_dim)
    z, out = b.buffer("delta_z", net.value_dim), b.buffer("delta_out", net.value_dim)
    alpha, beta = b.buffer("delta_a", n_value), b.buffer("delta_b", n_value)
    conv_state, state = b.new_states(index, (net.conv_kernel_size, net.conv_dim), (n_value, d, dv))
    b.linear(normed, (net.in_proj_qkv, raw), (net.in_proj_z, z), (net.in_proj_a, alpha), (net.in_proj_b, beta))
    b.program.conv(raw, mixed, net.conv1d.weight.squeeze(1), net.conv1d.bias, conv_state)
    q, k, v = torch.split(mixed, [net.key_dim, net.key_dim, net.value_dim], dim=1)
    q, k, v = b.heads(q, n_key), b.heads(k, n_key), b.heads(v, n_value)
    b.l2_norm(q, _L2_EPS, d**-0.5)
    b.l2_norm(k, _L2_EPS)
    b.program.decay(alpha, beta, alpha, beta, -net.A_log.float().exp(), net.dt_bias.float())
    heads = b.heads(out, n_value)
    b.program.delta(q, k, v, alpha, beta, heads, state)
    b.rms_norm(heads, heads, net.norm.weight, net.norm.variance_epsilon)
    b.program.gate(out, z, out, "silu")
    b.linear(out, (net.out_proj, x), add=True)


def _attention(b: Builder, index: int, config: Any, attention: Any, normed: Tensor, x: Tensor) -> None:
    n_heads, n_kv, d = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    both = b.buffer("attention_q", 2 * n_heads * d)
    k, v, out = (b.buffer(f"attention_{n}", w * d) for n, w in (("k", n_kv), ("v", n_kv), ("out", n_heads)))
    b.linear(normed, (attention.q_proj, both), (attention.k_proj, k), (attention.v_proj, v))
    q, gate = torch.split(b.heads(both, n_heads), d, dim=2)
    k, v, heads = b.heads(k, n_kv), b.heads(v, n_kv), b.heads(out, n_heads)
    n_rotated = _n_rotated(config)
    for part, norm in ((q, attention.q_norm), (k, attention.k_norm)):
        _norm(b, part, part, norm)
        b.program.rope(part, n_rotated)
    b.attend(index, q, k, v, heads, attention.scaling)
    b.program.gate(heads, gate, heads, "sigmoid")
    b.linear(out, (attention.o_proj, x), add=True)


FAMILY = Family(model_type="qwen3_5_text", rejects=_rejects, build=_build, build_head=_build_head)
