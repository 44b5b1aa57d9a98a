"""From a Transformers config to layer facts: which layers own a KV cache, which a state, and of what shape.

The config's `layer_types` say what kind of cache each layer needs; the shapes follow from its sizes. Read before
any weight exists, so the planner and the kernel table need the config alone; the cache checks them against the real
tensors at the first token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybridkv.cache import AttentionFacts, LayerFacts, StateFacts
from hybridkv.errors import ModelError
from hybridkv.model.protocols import Config
from hybridkv.model.ranks import facts_of_rank, ranks_of

_KV = ("full_attention", "sliding_attention", "hybrid", "hybrid_sliding")
_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
_WINDOWED = ("sliding_attention", "hybrid_sliding")
_NEITHER = ("dummy", "moe", "mlp")
_SINKS = ("gpt_oss",)
_MAX_LAYERS = 10_000  # Transformers copies the config per layer: a damaged number would take hours


def _gated_delta(c: Any) -> StateFacts:
    keys, values = (
        c.linear_num_key_heads * c.linear_key_head_dim,
        c.linear_num_value_heads * c.linear_value_head_dim,
    )
    return StateFacts(
        conv=((2 * keys + values, c.linear_conv_kernel_dim),),
        recurrent=((c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim),),
    )


def _mamba1(c: Any) -> StateFacts:
    inner = c.mamba_expand * c.hidden_size
    return StateFacts(conv=((inner, c.mamba_d_conv),), recurrent=((inner, c.mamba_d_state),))


def _mamba2(heads: str, head_dim: str, groups: str, state: str, kernel: str) -> Callable[[Any], StateFacts]:
    """Derive Mamba-2's state shapes from the names that a config gives its five sizes."""

    def shapes(c: Any) -> StateFacts:
        n_heads, d_head, d_state = getattr(c, heads), getattr(c, head_dim), getattr(c, state)
        channels = n_heads * d_head + 2 * getattr(c, groups) * d_state
        return StateFacts(conv=((channels, getattr(c, kernel)),), recurrent=((n_heads, d_head, d_state),))

    return shapes


def _short_conv(c: Any) -> StateFacts:
    return StateFacts(conv=((c.hidden_size, c.conv_L_cache),))


_bamba = _mamba2("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")

STATE_SHAPES: dict[str, Callable[[Any], StateFacts]] = {
    "qwen3_next": _gated_delta,
    "qwen3_5_text": _gated_delta,
    "qwen3_5_moe_text": _gated_delta,
    "olmo_hybrid": _gated_delta,
    "jamba": _mamba1,
    "bamba": _bamba,
    "falcon_h1": _bamba,
    "granitemoehybrid": _bamba,
    "mamba": lambda c: StateFacts(
        conv=((c.intermediate_size, c.conv_kernel),), recurrent=((c.intermediate_size, c.state_size),)
    ),
    "mamba2": _mamba2("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
    "zamba2": _mamba2("n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state", "mamba_d_conv"),
    "nemotron_h": _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "lfm2": _short_conv,
    "lfm2_moe": _short_conv,
}
"""State shapes by Transformers' `model_type`; a family that is not here runs, but its states are not planned."""


_STARTS_OVER = frozenset({"jamba", "zamba", "mamba", "falcon_mamba"})


def takes_chunks(config: Config) -> bool:
    """Check whether a prompt may be processed in several chunks.

    Transformers' Mamba-1 families hand no state to their scan, so a chunk of several tokens after the first
    would start from a zero state, without an error: wrong answers (measured on 5.23: logits change by 20 %).
    They take the whole prompt at once and then single tokens.
    """
    return config.get_text_config(decoder=True).model_type not in _STARTS_OVER


def layer_facts(config: Config, *, n_ranks: int | None = None) -> tuple[LayerFacts, ...]:
    """Describe what each layer of a model remembers.

    Parameters
    ----------
    config
        A Transformers config; of a multimodal one the text decoder's part is read.
    n_ranks
        Ranks that the model is sharded over; the facts are one rank's. By default the config's number, once loaded.

    Raises
    ------
    ModelError
        If the layer types are missing, contradictory, or of a kind that cannot be cached here, or if the KV heads do
        not divide among the ranks.
    """
    text = config.get_text_config(decoder=True)
    kinds = _layer_kinds(text)
    shapes = STATE_SHAPES.get(text.model_type, lambda _: StateFacts(known=False))
    facts = []
    for index, (kind, layer_config) in enumerate(zip(kinds, _layer_configs(text), strict=True)):
        window = layer_config.sliding_window if kind in _WINDOWED else None
        attention = _attention(index, layer_config, text, window) if kind in _KV else None
        facts.append(LayerFacts(attention=attention, state=shapes(layer_config) if kind in _STATE else None))
    return facts_of_rank(config, tuple(facts), ranks_of(config) if n_ranks is None else n_ranks)


def is_hybrid(facts: tuple[LayerFacts, ...]) -> bool:
    """Check whether a model has both KV caches and recurrent or convolution states."""
    return any(f.attention for f in facts) and any(f.state for f in facts)


def kv_facts(facts: tuple[LayerFacts, ...]) -> tuple[AttentionFacts, ...]:
    """Return the facts of the KV layers, in order."""
    return tuple(f.attention for f in facts if f.attention is not None)


def _layer_kinds(text: Any) -> list[str]:
    """Read each layer's kind, in Transformers' words, checked."""
    n_layers = text.num_hidden_layers
    if not 1 <= n_layers <= _MAX_LAYERS:
        raise ModelError(f"the config has {n_layers} layers; allowed: 1 to {_MAX_LAYERS}")
    kinds = getattr(text, "layer_types", None)
    if kinds is None and text.model_type in STATE_SHAPES:
        raise ModelError(
            f"the config of {text.model_type!r} has no layer types, so attention and recurrent layers cannot "
            "be told apart",
            hint="add layer_types to config.json",
        )
    if kinds is None:
        kinds = [_kind_of(layer_config) for layer_config in _layer_configs(text)]
    if len(kinds) != n_layers:
        raise ModelError(
            f"the config of {text.model_type!r} has {n_layers} layers and {len(kinds)} layer types",
            hint="layer_types must name every layer",
        )
    shared = getattr(text, "kv_sharing_modes", None) or [None] * n_layers
    kinds = ["dummy" if mode == "reuse" else kind for kind, mode in zip(kinds, shared, strict=True)]
    allowed = {*_KV, *_STATE, *_NEITHER}
    for index, kind in enumerate(kinds):
        if kind not in allowed:
            raise ModelError(
                f"layer {index} of {text.model_type!r} is of type {kind!r}; allowed: {', '.join(sorted(allowed))}",
                hint="run this model with Transformers' own DynamicCache",
            )
    return kinds


def _kind_of(layer_config: Any) -> str:
    """Infer the kind of a layer whose config names none."""
    if getattr(layer_config, "sliding_window", None) is not None:
        return "sliding_attention"
    chunked = getattr(layer_config, "attention_chunk_size", None) is not None
    return "chunked_attention" if chunked else "full_attention"


def _layer_configs(text: Any) -> list[Any]:
    """List a config per layer; in older Transformers (5.17) all layers share one."""
    views = getattr(text, "per_layer_config", None)
    n_layers = text.num_hidden_layers
    return [text] * n_layers if views is None or isinstance(views, dict) else list(views)


def _attention(index: int, layer_config: Any, text: Any, window: int | None) -> AttentionFacts:
    n_heads = layer_config.num_attention_heads
    n_kv_heads = _first_said(layer_config, "num_key_value_heads", otherwise=n_heads)
    spread = layer_config.hidden_size // n_heads if n_heads else 0
    head_dim = _first_said(layer_config, "attention_head_dim", "head_dim", otherwise=spread)
    if min(n_heads, n_kv_heads, head_dim) < 1:
        raise ModelError(
            f"layer {index}: {n_heads} query heads, {n_kv_heads} KV heads, head dim {head_dim}; allowed: 1 or more"
        )
    if n_heads % n_kv_heads:
        raise ModelError(f"layer {index}: {n_heads} query heads do not divide into {n_kv_heads} KV heads")
    return AttentionFacts(
        layer=index,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim_k=head_dim,
        head_dim_v=head_dim,
        window=window,
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        sinks=text.model_type in _SINKS,
    )


def _first_said(config: Config, *names: str, otherwise: int) -> int:
    """Return the first of these sizes that a config gives; 0 counts as given, None does not."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return otherwise


def vocab_size_of(config: Config) -> int:
    """Count the lines of a model's embedding and output head: the vocabulary, padding included."""
    rows: int = config.get_text_config(decoder=True).vocab_size
    return rows
