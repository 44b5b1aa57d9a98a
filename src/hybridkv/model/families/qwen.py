"""Qwen's hybrids: gated delta nets with a gated full attention every few layers."""

from __future__ import annotations

from typing import Any

from hybridkv.model.families.parts import (
    Family,
    act_rejects,
    attention,
    bias_rejects,
    by_kind,
    experts,
    experts_rejects,
    first,
    gated,
    norm,
    rope_rejects,
    shared_expert,
    window_rejects,
)
from hybridkv.model.layers import DeltaNet, Experts, FeedForward, Mixer, ModelGraph


def dense_rejects(c: Any) -> str | None:
    """What dense models and experts refuse alike."""
    return first(act_rejects(c), rope_rejects(c), bias_rejects(c, "attention_bias", "mlp_bias"), window_rejects(c))


def sparse_rejects(c: Any) -> str | None:
    """What models with experts in every layer refuse."""
    reason = dense_rejects(c) or experts_rejects(c.num_experts_per_tok, c.num_experts)
    if reason is None and (getattr(c, "decoder_sparse_step", 1) != 1 or getattr(c, "mlp_only_layers", None)):
        return "layers without experts among those that have them"
    return reason


def sparse(c: Any, *, shared: bool) -> Experts:
    """Qwen's experts; the shared one is weighed by a gate of its own."""
    return experts(
        c,
        n_experts=c.num_experts,
        width=c.moe_intermediate_size,
        normalised=getattr(c, "norm_topk_prob", True),
        shared=shared_expert(c.shared_expert_intermediate_size if shared else 0),
        weighed=True,
    )


def _delta_net(c: Any, **how: Any) -> DeltaNet:
    return DeltaNet(
        n_keys=c.linear_num_key_heads,
        n_values=c.linear_num_value_heads,
        key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim,
        kernel=c.linear_conv_kernel_dim,
        norm=norm(c, "ssm_norm.weight"),
        **how,
    )


def _qwen3_5(c: Any, ffn: FeedForward, **delta: Any) -> ModelGraph:
    norms = norm(c, "attn_q_norm.weight"), norm(c, "attn_k_norm.weight")
    mixers: dict[str, Mixer] = {
        "full_attention": attention(c, norms=norms, gated=True),
        "linear_attention": _delta_net(c, **delta),
    }
    return by_kind(c, mixers, (norm(c, "attn_norm.weight"), norm(c, "post_attention_norm.weight")), ffn)


FAMILIES = {
    "qwen3_5_text": Family(dense_rejects, lambda c: _qwen3_5(c, gated(c))),
    "qwen3_5_moe_text": Family(sparse_rejects, lambda c: _qwen3_5(c, sparse(c, shared=True))),
    "qwen3_next": Family(
        sparse_rejects, lambda c: _qwen3_5(c, sparse(c, shared=True), values="grouped", joined_rates=True)
    ),
}
