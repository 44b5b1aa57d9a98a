"""LFM2: gated short convolutions and attention layers, in some models with experts behind the first layers."""

from __future__ import annotations

from typing import Any

from hybridkv.model.families.parts import (
    Family,
    attention,
    bias_rejects,
    block,
    experts_rejects,
    first,
    gated,
    graph,
    rope_rejects,
)
from hybridkv.model.graph import ModelGraph
from hybridkv.model.layers import Attention, Choice, Experts, FeedForward, Gated, Mixer, Norm, ShortConv


def _dense_rejects(c: Any) -> str | None:
    return first(rope_rejects(c), bias_rejects(c, "conv_bias"))


def _sparse_rejects(c: Any) -> str | None:
    return _dense_rejects(c) or experts_rejects(c.num_experts_per_tok, c.num_experts)


def _width(c: Any) -> int:
    """Compute the dense models' feed-forward width. Source: transformers, modeling_lfm2.py (Lfm2MLP)."""
    width: int = c.intermediate_size
    if not c.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if c.block_ffn_dim_multiplier is None:
        return width
    width, multiple = int(c.block_ffn_dim_multiplier * width), int(c.block_multiple_of)
    return -(-width // multiple) * multiple


def _experts(c: Any) -> Experts:
    choice = Choice(
        c.num_experts_per_tok,
        gating="sigmoid",
        normalised=c.norm_topk_prob,
        bias="exp_probs_b.bias" if c.use_expert_bias else None,
        eps=1e-6,
        scale=float(c.routed_scaling_factor),
    )
    return Experts(c.num_experts, c.moe_intermediate_size, choice)


def _model(c: Any, ffns: list[FeedForward]) -> ModelGraph:
    def norm(weight: str) -> Norm:
        return Norm(weight, c.norm_eps)

    norms = norm("attn_norm.weight"), norm("ffn_norm.weight")
    mixers: dict[str, Mixer] = {
        "full_attention": attention(c, norms=(norm("attn_q_norm.weight"), norm("attn_k_norm.weight"))),
        "conv": ShortConv(c.hidden_size, c.conv_L_cache),
    }
    blocks = (block(mixers[kind], ffn, norms) for kind, ffn in zip(c.layer_types, ffns, strict=True))
    return graph(c, blocks, last=norm("token_embd_norm.weight"))


def _dense(c: Any) -> ModelGraph:
    return _model(c, [gated(c, _width(c))] * c.num_hidden_layers)


def _sparse(c: Any) -> ModelGraph:
    dense, sparse, n_dense = gated(c), _experts(c), c.num_dense_layers
    return _model(c, [dense if layer < n_dense else sparse for layer in range(c.num_hidden_layers)])


_KINDS = ("conv", "full_attention")

FAMILIES = {
    "lfm2": Family(_dense_rejects, _dense, (ShortConv, Attention, Gated), _KINDS),
    "lfm2_moe": Family(_sparse_rejects, _sparse, (ShortConv, Attention, Gated, Experts), _KINDS),
}
