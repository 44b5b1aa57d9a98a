"""Qwen3.5 and Qwen3-Next as fused kernels: gated delta nets with a gated full attention every few layers.

After each comes a SwiGLU or a choice of experts. Written down from Transformers' `Qwen3_5ForCausalLM`,
`Qwen3_5MoeForCausalLM` and `Qwen3NextForCausalLM`, whose norms hold weights centred on zero except the delta net's own.
A layer's last product is added to the residual by the next layer's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridkv.hf.step.fused_layers import FusedFamily, Head, Layers, StepContext
from hybridkv.hf.step.joined import Joined, is_plain, project
from hybridkv.kernels.cuda.conv import conv_prompt, conv_step
from hybridkv.kernels.cuda.delta import DeltaShape, delta_prompt, delta_step, gated_norm
from hybridkv.kernels.cuda.experts import route, run_experts
from hybridkv.kernels.cuda.layers import add_norm, gate_heads, norm_rope, regroup_heads


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
        # Qwen3-Next's two projections go through the key heads, and each brings all that is its own.
        self._by_head = hasattr(net, "in_proj_qkvz")
        if self._by_head:
            self._joined = Joined(net.in_proj_qkvz, net.in_proj_ba)
        else:
            self._joined = Joined(net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a)

    def _project(self, normed: Tensor) -> tuple[Tensor, ...]:
        """Project to the convolution's inputs `[N, channels]`, z `[N, Hv * Dv]`, beta and alpha `[N, Hv]`."""
        if not self._by_head:
            return self._joined.split(normed)
        shape, joined = self._shape, self._joined(normed)
        per_key = shape.n_value // shape.n_key
        first = (shape.head_k, shape.head_k, per_key * shape.head_v, per_key * shape.head_v)
        parts = regroup_heads(joined, shape.n_key, (first, (per_key, per_key)))
        return torch.split(parts, [shape.channels, shape.n_value * shape.head_v, shape.n_value, shape.n_value], 1)

    def __call__(self, normed: Tensor, context: StepContext) -> Tensor:
        net, shape = self._net, self._shape
        raw, z, beta, alpha = self._project(normed)
        recurrent = (shape.n_value, shape.head_k, shape.head_v)
        conv, state = context.states(self._index, (shape.channels, net.conv_kernel_size), recurrent, raw)
        kernel, eps = (conv, net.conv1d.weight, net.conv1d.bias), net.norm.variance_epsilon
        gates = (alpha, beta, net.A_log, net.dt_bias)
        if context.n_tokens == 1:
            out = delta_step(conv_step(raw, *kernel), z, *gates, net.norm.weight, state, shape, eps=eps)
        else:
            out = delta_prompt(conv_prompt(raw, *kernel), *gates, state, shape)
            out = gated_norm(out, z, net.norm.weight, eps=eps)
        return project(out, net.out_proj.weight)


class _Attention:
    """A gated full attention, from normed rows to what is added to the residual."""

    def __init__(self, index: int, attention: Any, frequencies: Tensor) -> None:
        self._index, self._attention, self._frequencies = index, attention, frequencies
        self._joined = Joined(attention.q_proj, attention.k_proj, attention.v_proj)

    def __call__(self, normed: Tensor, context: StepContext) -> Tensor:
        attention = self._attention
        both, k, v = (torch.unflatten(x, 1, (-1, attention.head_dim)) for x in self._joined.split(normed))
        q, gate = both[:, 0::2], both[:, 1::2]  # per head: q, then its gate
        # Prompts are attended in float16: queries that come so need no pass of their own, and are nearer to the truth.
        narrow = torch.float16 if context.n_tokens > 1 and q.dtype == torch.bfloat16 else None
        q, k = (
            norm_rope(x, norm.weight, norm.eps, context.positions, self._frequencies, offset=1.0, dtype=dtype)
            for x, norm, dtype in ((q, attention.q_norm, narrow), (k, attention.k_norm, None))
        )
        out = context.attend(self._index, q, k, v, attention.scaling)
        return project(gate_heads(out, gate), attention.o_proj.weight)


class _Dense:
    """A SwiGLU, from normed rows to what is added to the residual."""

    def __init__(self, mlp: Any) -> None:
        self._mlp, self._joined = mlp, Joined(mlp.gate_proj, mlp.up_proj)

    def __call__(self, normed: Tensor, _: StepContext) -> Tensor:
        return project(self._joined.swiglu(normed), self._mlp.down_proj.weight)


class _Experts:
    """Experts and the one that all tokens share, from normed rows to what is added to the residual.

    Rows that choose more often than there are experts are a prompt's: most experts are then read for several rows at
    once, which is Transformers' code's business.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        gate, shared, each = block.gate, block.shared_expert, block.experts
        weights = (gate.weight, *(p for part in (block.shared_expert_gate, shared, each) for p in part.parameters()))
        self._plain = all(map(is_plain, weights))
        if self._plain:
            self._scores, self._up = Joined(gate, block.shared_expert_gate), Joined(shared.gate_proj, shared.up_proj)

    def __call__(self, normed: Tensor, context: StepContext) -> Tensor:
        block = self._block
        top_k, n_experts = block.gate.top_k, block.gate.num_experts
        if not self._plain or (context.n_tokens > 1 and len(normed) * top_k > n_experts):
            added: Tensor = block(normed.unsqueeze(0)).squeeze(0)
            return added
        chosen = route(self._scores(normed), top_k, normalize=getattr(block.gate, "norm_topk_prob", True))
        each = (block.experts.gate_up_proj, block.experts.down_proj)
        return run_experts(normed, chosen, each, (self._up.weight, block.shared_expert.down_proj.weight))


def _build(model: Any) -> tuple[Layers, Head]:
    config, body = model.config.get_text_config(decoder=True), model.model
    frequencies = body.rotary_emb.inv_freq
    blocks: list[tuple[Any, Callable[[Tensor, StepContext], Tensor], Callable[[Tensor, StepContext], Tensor]]] = []
    for index, layer in enumerate(body.layers):
        recurrent = config.layer_types[index] == "linear_attention"
        mixer = _DeltaNet(index, layer.linear_attn) if recurrent else _Attention(index, layer.self_attn, frequencies)
        blocks.append((layer, mixer, _Experts(layer.mlp) if hasattr(layer.mlp, "experts") else _Dense(layer.mlp)))

    def layers(x: Tensor, context: StepContext) -> Tensor:
        added: Tensor | None = None
        for layer, mixer, mlp in blocks:
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            added = mixer(add_norm(x, added, first.weight, first.eps, offset=1.0), context)
            added = mlp(add_norm(x, added, second.weight, second.eps, offset=1.0), context)
        return x if added is None else x.add_(added)

    def head(hidden: Tensor) -> Tensor:
        return project(add_norm(hidden, None, body.norm.weight, body.norm.eps, offset=1.0), model.lm_head.weight)

    return layers, head


FAMILIES = tuple(
    FusedFamily(model_type=name, rejects=_rejects, build=_build)
    for name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
)
