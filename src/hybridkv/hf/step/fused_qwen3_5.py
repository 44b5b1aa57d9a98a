"""`qwen3_5_text` as fused kernels: gated delta nets with a gated full attention every few layers, a SwiGLU after each.

Written down from Transformers' `Qwen3_5ForCausalLM`, whose norms hold weights centred on zero except the delta net's
own. A layer's last product is added to the residual by the next layer's norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridkv.hf.step.fused import FusedFamily, Head, Joined, Layers, Run
from hybridkv.kernels.cuda.delta import DeltaShape, conv_prompt, conv_step, delta_prompt, delta_step, gated_norm
from hybridkv.kernels.cuda.layers import add_norm, gate_heads, norm_rope, swiglu


def _rejects(config: Any) -> str | None:
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r}, not silu"
    if config.rope_parameters["rope_type"] != "default":
        return f"RoPE of type {config.rope_parameters['rope_type']!r}, not default"
    if config.attention_bias:
        return "attention projections with a bias"
    rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return f"a rotated part of {rotated} dims, which is odd" if rotated % 2 else None


class _DeltaNet:
    """A gated delta net, from normed rows to what is added to the residual."""

    def __init__(self, index: int, net: Any) -> None:
        self._index, self._net = index, net
        self._shape = DeltaShape(net.num_k_heads, net.num_v_heads, net.head_k_dim, net.head_v_dim)
        self._joined = Joined(net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a)

    def __call__(self, normed: Tensor, run: Run) -> Tensor:
        net, shape = self._net, self._shape
        raw, z, beta, alpha = self._joined.split(normed)
        recurrent = (shape.n_value, shape.head_k, shape.head_v)
        conv, state = run.states(self._index, (shape.channels, net.conv_kernel_size), recurrent, raw)
        kernel, eps = (conv, net.conv1d.weight, net.conv1d.bias), net.norm.variance_epsilon
        gates = (alpha, beta, net.A_log, net.dt_bias)
        if run.n_tokens == 1:
            out = delta_step(conv_step(raw, *kernel), z, *gates, net.norm.weight, state, shape, eps=eps)
        else:
            out = delta_prompt(conv_prompt(raw, *kernel), *gates, state, shape)
            out = gated_norm(out, z, net.norm.weight, eps=eps)
        return F.linear(out, net.out_proj.weight)


class _Attention:
    """A gated full attention, from normed rows to what is added to the residual."""

    def __init__(self, index: int, attention: Any, frequencies: Tensor) -> None:
        self._index, self._attention, self._frequencies = index, attention, frequencies
        self._joined = Joined(attention.q_proj, attention.k_proj, attention.v_proj)

    def __call__(self, normed: Tensor, run: Run) -> Tensor:
        attention = self._attention
        both, k, v = (torch.unflatten(x, 1, (-1, attention.head_dim)) for x in self._joined.split(normed))
        q, gate = both[:, 0::2], both[:, 1::2]  # per head: q, then its gate
        q, k = (
            norm_rope(x, norm.weight, norm.eps, run.positions, self._frequencies, offset=1.0)
            for x, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
        out = run.attend(self._index, q, k, v, attention.scaling)
        return F.linear(gate_heads(out, gate), attention.o_proj.weight)


def _build(model: Any) -> tuple[Layers, Head]:
    config, body = model.config.get_text_config(decoder=True), model.model
    frequencies = body.rotary_emb.inv_freq
    blocks = []
    for index, layer in enumerate(body.layers):
        recurrent = config.layer_types[index] == "linear_attention"
        mixer = _DeltaNet(index, layer.linear_attn) if recurrent else _Attention(index, layer.self_attn, frequencies)
        blocks.append((layer, mixer, Joined(layer.mlp.gate_proj, layer.mlp.up_proj)))

    def layers(x: Tensor, run: Run) -> Tensor:
        added: Tensor | None = None
        for layer, mixer, gate_up in blocks:
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            added = mixer(add_norm(x, added, first.weight, first.eps, offset=1.0), run)
            normed = add_norm(x, added, second.weight, second.eps, offset=1.0)
            added = F.linear(swiglu(gate_up(normed)), layer.mlp.down_proj.weight)
        return x if added is None else x.add_(added)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = model.lm_head(add_norm(hidden, None, body.norm.weight, body.norm.eps, offset=1.0))
        return logits

    return layers, head


FAMILIES = (FusedFamily(model_type="qwen3_5_text", rejects=_rejects, build=_build),)
