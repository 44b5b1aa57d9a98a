"""Families of models: from a Transformers config to the graph of its layers, one function a family.

A config is read by attribute alone. What a family cannot be written as is refused with the reason, before any weight
is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hybridkv.model.layers import (
    Attention,
    Block,
    DeltaNet,
    Experts,
    FeedForward,
    Gated,
    Mixer,
    ModelGraph,
    Norm,
    Rope,
)

ROPES = ("default", "linear", "llama3", "yarn")
"""Whose angles do not depend on the length of the sequence."""


@dataclass(frozen=True, slots=True)
class Family:
    """Models that one function writes.

    Attributes
    ----------
    rejects
        Why a model of this text config cannot be written, or None.
    graph
        Writes it.
    """

    rejects: Callable[[Any], str | None]
    graph: Callable[[Any], ModelGraph]


def graph_of(config: Any) -> ModelGraph:
    """The graph of a Transformers config's text model; `rejects` must have said None."""
    text = config.get_text_config(decoder=True)
    return FAMILIES[text.model_type].graph(text)


def rejects(config: Any) -> str | None:
    """Why no graph can be written of a config; None if one can."""
    text = config.get_text_config(decoder=True)
    family = FAMILIES.get(text.model_type)
    if family is None:
        return f"knows no {text.model_type} layers; it knows {', '.join(FAMILIES)}"
    return family.rejects(text)


def _graph(c: Any, blocks: Iterable[Block]) -> ModelGraph:
    return ModelGraph(
        hidden=c.hidden_size,
        n_vocab=c.vocab_size,
        blocks=tuple(blocks),
        norm=_norm(c, "output_norm.weight"),
    )


def _norm(c: Any, weight: str) -> Norm:
    return Norm(weight, c.rms_norm_eps)


def _head_dim(c: Any) -> int:
    return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)


def _n_rotated(c: Any) -> int:
    return int(_head_dim(c) * c.rope_parameters.get("partial_rotary_factor", 1.0))


def _unwritable(c: Any) -> str | None:
    """What all families refuse alike."""
    if c.hidden_act != "silu":
        return f"activation {c.hidden_act!r}, not silu"
    if c.rope_parameters["rope_type"] not in ROPES:
        return f"RoPE of type {c.rope_parameters['rope_type']!r}; it knows {', '.join(ROPES)}"
    if c.attention_bias or getattr(c, "mlp_bias", False):
        return "projections with a bias"
    if getattr(c, "use_sliding_window", False):
        return "layers with a sliding window"
    if _n_rotated(c) % 2:
        return f"a rotated part of {_n_rotated(c)} dims, which is odd"
    return None


def _experts_unwritable(c: Any) -> str | None:
    if not 1 <= c.num_experts_per_tok <= c.num_experts:
        return f"{c.num_experts_per_tok} experts a token of {c.num_experts}"
    if getattr(c, "decoder_sparse_step", 1) != 1 or getattr(c, "mlp_only_layers", None):
        return "layers without experts among those that have them"
    return None


def _attention(c: Any, *, pairs: Any = "halves", normed: bool = False, gated: bool = False) -> Attention:
    head_dim = _head_dim(c)
    return Attention(
        n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=Rope(_n_rotated(c), pairs),
        q_norm=_norm(c, "attn_q_norm.weight") if normed else None,
        k_norm=_norm(c, "attn_k_norm.weight") if normed else None,
        gated=gated,
    )


def _delta_net(c: Any, **how: Any) -> DeltaNet:
    return DeltaNet(
        n_keys=c.linear_num_key_heads,
        n_values=c.linear_num_value_heads,
        key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim,
        kernel=c.linear_conv_kernel_dim,
        norm=_norm(c, "ssm_norm.weight"),
        **how,
    )


def _experts(c: Any, *, shared: bool) -> Experts:
    width = c.shared_expert_intermediate_size if shared else 0
    return Experts(
        n_experts=c.num_experts,
        n_used=c.num_experts_per_tok,
        width=c.moe_intermediate_size,
        normalised=getattr(c, "norm_topk_prob", True),
        shared=Gated(width, "ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight") if width else None,
    )


def _qwen3_5(c: Any, ffn: FeedForward, **delta: Any) -> ModelGraph:
    """Gated delta net layers, with a gated full attention every few layers."""
    mixers: dict[str, Mixer] = {
        "full_attention": _attention(c, normed=True, gated=True),
        "linear_attention": _delta_net(c, **delta),
    }
    norms = _norm(c, "attn_norm.weight"), _norm(c, "post_attention_norm.weight")
    return _graph(c, (Block(norms[0], mixers[kind], norms[1], ffn) for kind in c.layer_types))


def _dense(c: Any, mixer: Attention, ffn: FeedForward) -> ModelGraph:
    """Attention in every layer."""
    block = Block(_norm(c, "attn_norm.weight"), mixer, _norm(c, "ffn_norm.weight"), ffn)
    return _graph(c, [block] * c.num_hidden_layers)


def _sparse_rejects(c: Any) -> str | None:
    return _unwritable(c) or _experts_unwritable(c)


FAMILIES: dict[str, Family] = {
    "qwen3_5_text": Family(_unwritable, lambda c: _qwen3_5(c, Gated(c.intermediate_size))),
    "qwen3_5_moe_text": Family(_sparse_rejects, lambda c: _qwen3_5(c, _experts(c, shared=True))),
    "qwen3_next": Family(
        _sparse_rejects, lambda c: _qwen3_5(c, _experts(c, shared=True), values="grouped", joined_rates=True)
    ),
    "llama": Family(_unwritable, lambda c: _dense(c, _attention(c, pairs="neighbours"), Gated(c.intermediate_size))),
    "qwen3": Family(_unwritable, lambda c: _dense(c, _attention(c, normed=True), Gated(c.intermediate_size))),
    "qwen3_moe": Family(_sparse_rejects, lambda c: _dense(c, _attention(c, normed=True), _experts(c, shared=False))),
}
"""By Transformers' `model_type`."""
