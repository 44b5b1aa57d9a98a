"""Hybrids of gated delta nets and attention: Qwen's and OLMo's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybridkv.model.families.parts import (
    RECURS_OR_ATTENDS,
    Family,
    act_rejects,
    attention,
    bias_rejects,
    block,
    by_kind,
    experts,
    experts_rejects,
    first,
    gated,
    graph,
    norm,
    rope_rejects,
    shared_expert,
    window_rejects,
)
from hybridkv.model.graph import Block, Branch, ModelGraph, Prediction
from hybridkv.model.layers import Attention, DeltaNet, Experts, FeedForward, Gated, Mixer, Norm


def dense_rejects(c: Any, *, partial: bool = False) -> str | None:
    """Explain what dense models and experts refuse alike; `partial` as in `rope_rejects`."""
    return first(
        act_rejects(c),
        rope_rejects(c, partial=partial),
        bias_rejects(c, "attention_bias", "mlp_bias"),
        window_rejects(c),
    )


def sparse_rejects(c: Any, *, partial: bool = False) -> str | None:
    """Explain what models with experts in every layer refuse."""
    reason = dense_rejects(c, partial=partial) or experts_rejects(c.num_experts_per_tok, c.num_experts)
    if reason is None and (getattr(c, "decoder_sparse_step", 1) != 1 or getattr(c, "mlp_only_layers", None)):
        return "layers without experts among those that have them"
    return reason


def _dense_rejects(c: Any) -> str | None:
    return dense_rejects(c, partial=True)


def _sparse_rejects(c: Any) -> str | None:
    return sparse_rejects(c, partial=True)


def sparse(c: Any, *, shared: bool) -> Experts:
    """Describe Qwen's experts; the shared one is weighed by a gate of its own."""
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
    before = norm(c, "attn_norm.weight"), norm(c, "post_attention_norm.weight")
    model = by_kind(c, mixers, before, ffn)
    if not getattr(c, "mtp_num_hidden_layers", 0):
        return model
    # Where there are several, each predicts one token further; the first one, fed with its own result, does that too.
    head = Prediction(
        layer=c.num_hidden_layers,
        block=block(mixers["full_attention"], ffn, before),
        embed_norm=norm(c, "nextn.enorm.weight"),
        hidden_norm=norm(c, "nextn.hnorm.weight"),
        norm=norm(c, "nextn.shared_head_norm.weight"),
        tokens=tuple(getattr(c, "mtp_tokens", ())),
    )
    return replace(model, prediction=head)


def _olmo_rejects(c: Any) -> str | None:
    return first(
        act_rejects(c),
        rope_rejects(c) if _olmo_turns(c) else None,
        bias_rejects(c, "attention_bias"),
        window_rejects(c),
    )


def _olmo_turns(c: Any) -> bool:
    """Check whether attention has positions."""
    return bool(c.rope_parameters and c.rope_parameters.get("rope_theta") is not None)


def _olmo_hybrid(c: Any) -> ModelGraph:
    """Build OLMo-Hybrid's graph: norms before a delta net layer's parts, and behind an attention layer's."""
    delta = _delta_net(
        c,
        values="grouped",
        update_scale=2.0 if c.linear_allow_neg_eigval else 1.0,
        qkv=("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    )
    # Its output's norm has an epsilon of its own. Source: transformers, modeling_olmo_hybrid.py.
    delta = replace(delta, norm=Norm("ssm_norm.weight", 1e-5))
    norms = norm(c, "attn_q_norm.weight"), norm(c, "attn_k_norm.weight")
    mixer = attention(c, pairs="halves" if _olmo_turns(c) else None, norms=norms, norms_together=True)
    ffn = gated(c)
    attends = Block(
        (
            Branch(None, (mixer,), norm(c, "post_attention_norm.weight")),
            Branch(None, (ffn,), norm(c, "post_ffw_norm.weight")),
        )
    )
    recurs = block(delta, ffn, (norm(c, "attn_norm.weight"), norm(c, "ffn_norm.weight")))
    return graph(c, (attends if kind == "full_attention" else recurs for kind in c.layer_types))


FAMILIES = {
    "qwen3_5_text": Family(
        _dense_rejects, lambda c: _qwen3_5(c, gated(c)), (DeltaNet, Attention, Gated), RECURS_OR_ATTENDS
    ),
    "qwen3_5_moe_text": Family(
        _sparse_rejects,
        lambda c: _qwen3_5(c, sparse(c, shared=True)),
        (DeltaNet, Attention, Experts),
        RECURS_OR_ATTENDS,
    ),
    "qwen3_next": Family(
        _sparse_rejects,
        lambda c: _qwen3_5(c, sparse(c, shared=True), values="grouped", joined_rates=True),
        (DeltaNet, Attention, Experts),
        RECURS_OR_ATTENDS,
    ),
    "olmo_hybrid": Family(_olmo_rejects, _olmo_hybrid, (DeltaNet, Attention, Gated), RECURS_OR_ATTENDS),
}

PREDICTING = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Families whose files may have a head of multi-token prediction that is run."""
