"""Models with attention in every layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from hybridkv.model.families.parts import (
    Family,
    act_rejects,
    attention,
    bias_rejects,
    block,
    first,
    gated,
    graph,
    norm,
    rope_rejects,
    scaling_rejects,
    window_rejects,
)
from hybridkv.model.families.qwen import dense_rejects, sparse, sparse_rejects
from hybridkv.model.graph import Block, Branch, ModelGraph
from hybridkv.model.layers import Attention, Experts, FeedForward, Gated, Mixer


def _layers(c: Any, mixer: Attention, ffn: FeedForward) -> ModelGraph:
    each = block(mixer, ffn, (norm(c, "attn_norm.weight"), norm(c, "ffn_norm.weight")))
    return graph(c, [each] * c.num_hidden_layers)


def _llama_rejects(c: Any) -> str | None:
    return first(act_rejects(c), rope_rejects(c), window_rejects(c))


def _plain_rejects(c: Any) -> str | None:
    """Explain what Mistral and Phi-3 refuse; a window is the cache's."""
    return first(act_rejects(c), rope_rejects(c, partial=c.model_type == "phi3"))


def _llama_parts(c: Any, scale: float | None = None) -> tuple[Attention, Gated]:
    biased: Literal["all", "none"] = "all" if c.attention_bias else "none"
    return attention(c, pairs="neighbours", scale=scale, biased=biased), gated(c, biased=c.mlp_bias)


def granite(c: Any, layers: Iterable[tuple[Mixer, FeedForward]]) -> ModelGraph:
    """Build Granite's graph, dense or hybrid: factors on the embedding, on what each part adds, and on the logits."""
    norms, scale = (norm(c, "attn_norm.weight"), norm(c, "ffn_norm.weight")), float(c.residual_multiplier)
    blocks = (block(mixer, ffn, norms, scale=scale) for mixer, ffn in layers)
    return graph(c, blocks, embed_scale=float(c.embedding_multiplier), logit_scale=1 / c.logits_scaling)


def _granite_rejects(c: Any) -> str | None:
    return _llama_rejects(c) or scaling_rejects(c)


def _granite(c: Any) -> ModelGraph:
    return granite(c, [_llama_parts(c, c.attention_multiplier)] * c.num_hidden_layers)


def _qwen2(c: Any) -> ModelGraph:
    return _layers(c, attention(c, biased="qkv"), gated(c))


def _qwen3(c: Any, ffn: FeedForward) -> ModelGraph:
    return _layers(c, attention(c, norms=(norm(c, "attn_q_norm.weight"), norm(c, "attn_k_norm.weight"))), ffn)


def _gemma3_rejects(c: Any) -> str | None:
    if c.attn_logit_softcapping is not None or c.final_logit_softcapping is not None:
        return "scores or logits that are softcapped"
    if c.use_bidirectional_attention:
        return "attention to later tokens"
    return first(
        act_rejects(c, "hidden_activation", "gelu_pytorch_tanh"),
        bias_rejects(c, "attention_bias"),
        *(rope_rejects(c, rope) for rope in c.rope_parameters.values()),
    )


def _gemma3(c: Any) -> ModelGraph:
    """Build Gemma 3's graph: norms on both sides, a RoPE for each kind of layer; the window is the cache's."""
    ffn = Branch(norm(c, "ffn_norm.weight"), (gated(c, act="gelu"),), norm(c, "post_ffw_norm.weight"))
    norms = norm(c, "attn_q_norm.weight"), norm(c, "attn_k_norm.weight")
    mixers = {
        kind: attention(c, norms=norms, scale=c.query_pre_attn_scalar**-0.5, kind=kind) for kind in c.rope_parameters
    }
    before, after = norm(c, "attn_norm.weight"), norm(c, "post_attention_norm.weight")
    blocks = (Block((Branch(before, (mixers[kind],), after), ffn)) for kind in c.layer_types)
    return graph(c, blocks, embed_scale=c.hidden_size**0.5)


_DENSE = (Attention, Gated)

FAMILIES = {
    "llama": Family(_llama_rejects, lambda c: _layers(c, *_llama_parts(c)), _DENSE),
    "granite": Family(_granite_rejects, _granite, _DENSE),
    "mistral": Family(_plain_rejects, lambda c: _layers(c, attention(c), gated(c)), _DENSE),
    "phi3": Family(_plain_rejects, lambda c: _layers(c, attention(c), gated(c)), _DENSE),
    "qwen2": Family(dense_rejects, _qwen2, _DENSE),
    "qwen3": Family(dense_rejects, lambda c: _qwen3(c, gated(c)), _DENSE),
    "qwen3_moe": Family(sparse_rejects, lambda c: _qwen3(c, sparse(c, shared=False)), (Attention, Experts)),
    "gemma3_text": Family(_gemma3_rejects, _gemma3, _DENSE, ("sliding_attention", "full_attention")),
}
