"""The parts of a graph that several families share, from a Transformers config, and why a config has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hybridkv.model.graph import Block, Branch, ModelGraph
from hybridkv.model.layers import Attention, Choice, Experts, FeedForward, Gated, Mamba2, Mixer, Norm, Part, Rope
from hybridkv.model.rope import SCALINGS

ROPES = tuple(SCALINGS)
"""Whose angles do not depend on the length of the sequence; of longrope, if it has the same factors for all lengths."""


@dataclass(frozen=True, slots=True)
class Family:
    """Models that one function writes.

    Attributes
    ----------
    rejects
        Why a model of this text config cannot be written, or None.
    graph
        Writes it.
    parts
        Kinds of parts that its layers may have, for tables and help.
    kinds
        What `layer_types` of a config may say; None where they decide nothing.
    """

    rejects: Callable[[Any], str | None]
    graph: Callable[[Any], ModelGraph]
    parts: tuple[type[Part], ...]
    kinds: tuple[str, ...] | None = None


def norm(c: Any, weight: str) -> Norm:
    """Describe an RMSNorm with the epsilon that most configs have."""
    return Norm(weight, c.rms_norm_eps)


def graph(
    c: Any,
    blocks: Iterable[Block],
    *,
    last: Norm | None = None,
    embed_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> ModelGraph:
    """Assemble a whole model; `last` is the norm before the head."""
    return ModelGraph(
        hidden=c.hidden_size,
        n_vocab=c.vocab_size,
        blocks=tuple(blocks),
        norm=last or norm(c, "output_norm.weight"),
        embed_scale=embed_scale,
        logit_scale=logit_scale,
    )


def block(mixer: Part | tuple[Part, ...], ffn: FeedForward, norms: tuple[Norm, Norm], *, scale: float = 1.0) -> Block:
    """Assemble the usual layer: a mixer or several side by side, then a feed-forward, each behind a norm of its own."""
    mixers = mixer if isinstance(mixer, tuple) else (mixer,)
    return Block((Branch(norms[0], mixers, scale=scale), Branch(norms[1], (ffn,), scale=scale)))


def head_dim(c: Any) -> int:
    """Return the values of an attention head."""
    return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)


def attention(
    c: Any,
    *,
    pairs: Literal["halves", "neighbours"] | None = "halves",
    norms: tuple[Norm, Norm] | None = None,
    scale: float | None = None,
    kind: str | None = None,
    **how: Any,
) -> Attention:
    """Describe the attention of a config's heads.

    Parameters
    ----------
    pairs
        Of RoPE; None for attention without positions.
    norms
        Of queries and keys.
    kind
        Which of several RoPEs.
    """
    return Attention(
        n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        head_dim=head_dim(c),
        scale=head_dim(c) ** -0.5 if scale is None else scale,
        rope=None if pairs is None else Rope(n_rotated(c), pairs, kind),
        q_norm=norms[0] if norms else None,
        k_norm=norms[1] if norms else None,
        **how,
    )


def n_rotated(c: Any) -> int:
    """Count the values of a head that RoPE turns."""
    return int(head_dim(c) * c.rope_parameters.get("partial_rotary_factor", 1.0))


def mamba2(c: Any, mixer_norm: Norm | None) -> Mamba2:
    """Describe Mamba-2 under the names that most configs give its sizes."""
    return Mamba2(
        n_heads=c.mamba_n_heads,
        n_groups=c.mamba_n_groups,
        head_dim=c.mamba_d_head,
        state_dim=c.mamba_d_state,
        kernel=c.mamba_d_conv,
        norm=mixer_norm,
    )


def gated(c: Any, width: int | None = None, **how: Any) -> Gated:
    """Describe a gated feed-forward, of the config's width if none is given."""
    return Gated(c.intermediate_size if width is None else width, **how)


def shared_expert(width: int) -> Gated | None:
    """Describe a gated expert that every token takes; None for a width of 0."""
    return Gated(width, "ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight") if width else None


def experts(c: Any, *, n_experts: int, width: int, normalised: bool = True, **how: Any) -> Experts:
    """Describe gated experts that are chosen by softmax."""
    return Experts(n_experts, width, Choice(c.num_experts_per_tok, normalised=normalised), **how)


def by_kind(c: Any, mixers: dict[str, Mixer], norms: tuple[Norm, Norm], ffn: FeedForward) -> ModelGraph:
    """Build a model whose layers differ in their mixers alone, which `layer_types` name."""
    return graph(c, (block(mixers[kind], ffn, norms) for kind in c.layer_types))


RECURS_OR_ATTENDS = ("linear_attention", "full_attention")
"""Kinds of layers that most hybrids have."""


def kinds_reject(c: Any, kinds: tuple[str, ...] | None) -> str | None:
    """Explain why layers of a config are of no kind that its family has, or None."""
    unknown = [] if kinds is None else [(i, kind) for i, kind in enumerate(c.layer_types) if kind not in kinds]
    return f"layer {unknown[0][0]} of kind {unknown[0][1]!r}; it knows {', '.join(kinds or ())}" if unknown else None


def first(*reasons: str | None) -> str | None:
    """Return the first reason that there is."""
    return next((reason for reason in reasons if reason is not None), None)


def rope_rejects(c: Any, rope: Any = None, *, partial: bool = False) -> str | None:
    """Explain why RoPE of this config cannot be computed ahead, or None.

    Parameters
    ----------
    partial
        Whether the model's class turns a part of each head if it is told to; the others pass over it.
    """
    rope = c.rope_parameters if rope is None else rope
    if rope.get("partial_rotary_factor", 1.0) != 1 and not partial:
        return "RoPE of a part of each head, which its class does not compute"
    if rope["rope_type"] not in ROPES:
        return f"RoPE of type {rope['rope_type']!r}; it knows {', '.join(ROPES)}"
    if rope["rope_type"] == "longrope" and list(rope["short_factor"]) != list(rope["long_factor"]):
        return "RoPE of type 'longrope' whose factors change with the length of the sequence"
    return f"a rotated part of {n_rotated(c)} dims, which is odd" if _has_odd_part(c, rope) else None


def _has_odd_part(c: Any, rope: Any) -> bool:
    return int(head_dim(c) * rope.get("partial_rotary_factor", 1.0)) % 2 == 1


def act_rejects(c: Any, field: str = "hidden_act", wanted: str = "silu") -> str | None:
    """Explain why a config's activation cannot be computed, or None."""
    act = getattr(c, field)
    return None if act == wanted else f"activation {act!r}, not {wanted}"


def bias_rejects(c: Any, *fields: str) -> str | None:
    """Explain why projections that the config gives biases cannot be computed, or None."""
    biased = [field for field in fields if getattr(c, field, False)]
    return f"projections with a bias ({', '.join(biased)})" if biased else None


def window_rejects(c: Any) -> str | None:
    """Explain why a sliding window that the config switches on cannot be computed, or None."""
    return "layers with a sliding window" if getattr(c, "use_sliding_window", False) else None


def experts_rejects(n_used: int, n_experts: int) -> str | None:
    """Explain why so many experts a token cannot be chosen, or None."""
    return None if 1 <= n_used <= n_experts else f"{n_used} experts a token of {n_experts}"


def scaling_rejects(c: Any) -> str | None:
    """Explain why Granite's logits cannot be divided by what the config says, or None."""
    return None if c.logits_scaling else "logits divided by 0"


def limit_rejects(c: Any) -> str | None:
    """Explain why Mamba-2's time steps cannot be kept within bounds, or None."""
    low, high = c.time_step_limit
    return f"time steps limited to {low} to {high}" if low > 0 or high < math.inf else None
