"""Hybrids of Mamba and attention: Granite 4, Nemotron-H, Falcon-H1 and Jamba."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybridkv.model.families.dense import granite
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
    limit_rejects,
    mamba2,
    norm,
    rope_rejects,
    scaling_rejects,
    shared_expert,
    window_rejects,
)
from hybridkv.model.graph import Block, Branch, ModelGraph, Prediction
from hybridkv.model.layers import (
    Attention,
    Choice,
    Experts,
    FeedForward,
    Gated,
    Mamba1,
    Mamba2,
    Mixer,
    Norm,
    Part,
    Plain,
)


def _granite_rejects(c: Any) -> str | None:
    rotated = c.position_embedding_type == "rope"
    return first(
        act_rejects(c),
        rope_rejects(c) if rotated else None,
        bias_rejects(c, "attention_bias", "mamba_proj_bias"),
        limit_rejects(c),
        experts_rejects(c.num_experts_per_tok, c.num_local_experts) if c.num_local_experts else None,
        scaling_rejects(c),
    )


def _granite(c: Any) -> ModelGraph:
    """Build Granite 4's graph: four multipliers; a feed-forward that all tokens take, in some models beside experts."""
    pairs: Any = "neighbours" if c.position_embedding_type == "rope" else None
    mixers: dict[str, Mixer] = {
        "full_attention": attention(c, pairs=pairs, scale=c.attention_multiplier),
        "linear_attention": mamba2(c, norm(c, "ssm_norm.weight")),
    }
    ffn: FeedForward = gated(c, c.shared_intermediate_size)
    if c.num_local_experts:
        shared = shared_expert(c.shared_intermediate_size)
        ffn = experts(c, n_experts=c.num_local_experts, width=c.intermediate_size, shared=shared)
    return granite(c, ((mixers[kind], ffn) for kind in c.layer_types))


def _nemotron_rejects(c: Any) -> str | None:
    n_experts = c.n_routed_experts if "moe" in c.layers_block_type else None
    return first(
        act_rejects(c, "mlp_hidden_act", "relu2"),
        act_rejects(c, "mamba_hidden_act"),
        bias_rejects(c, "attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias"),
        "layers with a sliding window" if c.sliding_window else None,
        None if n_experts is None else experts_rejects(c.num_experts_per_tok, n_experts),
        "both dense layers and layers with experts" if {"mlp", "moe"} <= {*c.layers_block_type} else None,
        "experts and no attention" if n_experts is not None and "full_attention" not in c.layers_block_type else None,
        "groups of a single expert" if n_experts is not None and n_experts == c.n_group > 1 else None,
    )


def _nemotron_experts(c: Any) -> Experts:
    choice = Choice(
        c.num_experts_per_tok,
        gating="sigmoid",
        normalised=c.norm_topk_prob,
        bias="exp_probs_b.bias",
        n_groups=c.n_group,
        n_used_groups=c.topk_group,
        eps=1e-20,
        scale=float(c.routed_scaling_factor),
    )
    shared = Plain(c.moe_shared_expert_intermediate_size, "ffn_up_shexp.weight", "ffn_down_shexp.weight")
    return Experts(
        c.n_routed_experts,
        c.moe_intermediate_size,
        choice,
        gated=False,
        latent=c.moe_latent_size or 0,
        shared=shared,
    )


def _nemotron(c: Any) -> ModelGraph:
    """Build Nemotron-H's graph: one part per layer, time steps without bounds, as in llama.cpp and the original."""
    eps = c.layer_norm_epsilon
    mamba = Mamba2(
        n_heads=c.mamba_num_heads,
        n_groups=c.n_groups,
        head_dim=c.mamba_head_dim,
        state_dim=c.ssm_state_size,
        kernel=c.conv_kernel,
        norm=Norm("ssm_norm.weight", eps),
    )
    parts: dict[str, Part] = {
        "linear_attention": mamba,
        "full_attention": attention(c, pairs=None),
        "mlp": Plain(c.intermediate_size),
    }
    if "moe" in c.layers_block_type:
        parts["moe"] = _nemotron_experts(c)
    before = Norm("attn_norm.weight", eps)
    blocks = (Block((Branch(before, (parts[kind],)),)) for kind in c.layers_block_type)
    model = graph(c, blocks, last=Norm("output_norm.weight", eps))
    if not getattr(c, "mtp_num_hidden_layers", 0) or "moe" not in parts:
        return model
    # Both of its layers are one block of a file. The last norm is an RMSNorm, as in vLLM; llama.cpp is said to take
    # the mean off there. Which of both is right changes how often guesses hold, and never the text.
    behind = Norm("post_attention_norm.weight", eps)
    head = Prediction(
        layer=c.num_hidden_layers,
        block=Block((Branch(before, (parts["full_attention"],)), Branch(behind, (parts["moe"],)))),
        embed_norm=Norm("nextn.enorm.weight", eps),
        hidden_norm=Norm("nextn.hnorm.weight", eps),
        norm=Norm("nextn.shared_head_norm.weight", eps),
        tokens=tuple(getattr(c, "mtp_tokens", ())),
    )
    return replace(model, prediction=head)


def _falcon_rejects(c: Any) -> str | None:
    return first(
        act_rejects(c),
        rope_rejects(c),
        bias_rejects(c, "attention_bias", "mlp_bias", "projectors_bias", "mamba_proj_bias"),
        limit_rejects(c),
        "a norm before the gate" if c.mamba_rms_norm and c.mamba_norm_before_gate else None,
        "embeddings and head as one matrix with two multipliers"
        if c.tie_word_embeddings and c.embedding_multiplier != c.lm_head_multiplier
        else None,
    )


def _falcon(c: Any) -> ModelGraph:
    """Build Falcon-H1's graph: attention beside Mamba-2 in every layer. The file's weights hold the muP multipliers."""
    mixers = mamba2(c, norm(c, "ssm_norm.weight") if c.mamba_rms_norm else None), attention(c)
    each = block(mixers, gated(c), (norm(c, "attn_norm.weight"), norm(c, "ffn_norm.weight")))
    return graph(c, [each] * c.num_hidden_layers)


def _jamba_rejects(c: Any) -> str | None:
    sparse = max(c.layers_num_experts) > 1
    return first(
        act_rejects(c),
        bias_rejects(c, "mamba_proj_bias"),
        window_rejects(c),
        experts_rejects(c.num_experts_per_tok, c.num_experts) if sparse else None,
    )


def _jamba(c: Any) -> ModelGraph:
    """Build Jamba's graph: Mamba-1, attention without positions, experts in every few layers."""
    mamba = Mamba1(
        inner=c.mamba_expand * c.hidden_size,
        state_dim=c.mamba_d_state,
        rank=c.mamba_dt_rank,
        kernel=c.mamba_d_conv,
        dt_norm=norm(c, "ssm_dt_norm.weight"),
        b_norm=norm(c, "ssm_b_norm.weight"),
        c_norm=norm(c, "ssm_c_norm.weight"),
    )
    mixers: dict[str, Mixer] = {"full_attention": attention(c, pairs=None), "linear_attention": mamba}
    dense = gated(c)
    sparse = experts(c, n_experts=c.num_experts, width=c.intermediate_size, normalised=False)
    norms = norm(c, "attn_norm.weight"), norm(c, "ffn_norm.weight")
    return graph(
        c,
        (
            block(mixers[kind], sparse if n_experts > 1 else dense, norms)
            for kind, n_experts in zip(c.layer_types, c.layers_num_experts, strict=True)
        ),
    )


def _bamba_rejects(c: Any) -> str | None:
    return first(
        act_rejects(c),
        rope_rejects(c, partial=True),
        bias_rejects(c, "attention_bias", "mlp_bias", "mamba_proj_bias"),
        limit_rejects(c),
    )


def _bamba(c: Any) -> ModelGraph:
    """Build Bamba's graph: Mamba-2 and attention layers, whose RoPE turns a part of each head."""
    mixers: dict[str, Mixer] = {
        "full_attention": attention(c),
        "linear_attention": mamba2(c, norm(c, "ssm_norm.weight")),
    }
    return by_kind(c, mixers, (norm(c, "attn_norm.weight"), norm(c, "ffn_norm.weight")), gated(c))


FAMILIES = {
    "granitemoehybrid": Family(_granite_rejects, _granite, (Mamba2, Attention, Gated, Experts), RECURS_OR_ATTENDS),
    "nemotron_h": Family(
        _nemotron_rejects, _nemotron, (Mamba2, Attention, Plain, Experts), (*RECURS_OR_ATTENDS, "mlp", "moe")
    ),
    "falcon_h1": Family(_falcon_rejects, _falcon, (Mamba2, Attention, Gated)),
    "bamba": Family(_bamba_rejects, _bamba, (Mamba2, Attention, Gated)),
    "jamba": Family(_jamba_rejects, _jamba, (Mamba1, Attention, Gated, Experts)),
}

PREDICTING = ("nemotron_h",)
"""Families whose files may have a head of multi-token prediction that is run."""
