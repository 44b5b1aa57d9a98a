"""Rotary position embedding: metadata into Transformers' `rope_parameters`, and back.

What llama.cpp makes of the keys: positions are divided by `rope.scaling.factor`, or else by the older
`rope.scale_linear`; a factor without a type is linear; zero is no factor; `rope.scaling.attn_factor` multiplies
the magnitude, whatever the type. YaRN counts from `context_length` where the file names no original length.

Two keys that llama.cpp passes over are honoured, since its converter writes them of a model's config:
`rope.scaling.yarn_attn_factor` (the whole magnitude, `attention_factor` in a config) and YaRN's two betas.

Frequency factors (`rope_freqs.weight`), which GGUF uses for Llama 3's scaling, divide the frequencies. In a
Transformers config the same values are both factor lists of `longrope`, whose frequencies are divided too; and
so is a linear scaling with a magnitude, for which `linear` has no field.

Source: gguf-py constants.py (`Keys.Rope`); llama.cpp, src/llama-model.cpp (`load_hparams`), src/llama-context.cpp and
ggml's `ggml_rope_ext`, whose YaRN magnitude `1 + 0.1 ln(factor)` is Transformers' default; transformers,
modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybridkv.gguf.architectures.record import Config, Fields, Keys
from hybridkv.gguf.decode import Floats
from hybridkv.gguf.metadata import Metadata

FACTORS = "rope_freqs.weight"

KINDS = ("default", "linear", "yarn")
"""Kinds of RoPE that every architecture with one can be written with, in Transformers' words."""

_MAX_POSITIONS = 2**31 - 1
_MAGNITUDE = "rope.scaling.attn_factor"
_YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}


def rope_fields(meta: Metadata, head_dim: int, *, partial: bool = False) -> Fields:
    """Return `rope_parameters` of a model that has one kind of them.

    Parameters
    ----------
    partial
        Whether the model's class rotates a part of each head if it is told to; most pass over it.

    Raises
    ------
    ModelFileError
        For a scaling that Transformers' classes do not compute, or a part of the head that they cannot rotate.
    """
    theta = meta.real("rope.freq_base") if meta.has("rope.freq_base") else 10000.0
    rope: Fields = {"rope_type": "default", "rope_theta": theta, **partial_rotary(meta, head_dim)}
    if "partial_rotary_factor" in rope and not partial:
        meta.expected("rope.dimension_count", f"{head_dim}, all dimensions of a head, in this architecture")
    n_rotated = int(head_dim * rope.get("partial_rotary_factor", 1))
    kind, factor = _scaling(meta)
    if kind == "yarn":
        if meta.has_tensor(FACTORS):
            meta.expected("rope.scaling.type", f"'none' or 'linear' beside the frequency factors in {FACTORS!r}")
        return rope | _yarn(meta, factor)
    factors = [factor] * (n_rotated // 2)
    if meta.has_tensor(FACTORS):
        factors = [factor * each for each in meta.numbers_in(FACTORS, n_rotated // 2)]
    elif magnitude(meta) == 1:
        return rope if factor == 1 else rope | {"rope_type": "linear", "factor": factor}
    return rope | _divided(meta, factors)


def unscaled_fields(meta: Metadata, theta: float, head_dim: int) -> Fields:
    """Return `rope_parameters` of layers that no scaling concerns but the magnitude's."""
    rope: Fields = {"rope_type": "default", "rope_theta": theta}
    return rope if magnitude(meta) == 1 else rope | _divided(meta, [1.0] * (head_dim // 2))


def magnitude(meta: Metadata) -> float:
    """Return what a file multiplies rotated queries and keys by, on top of what YaRN does."""
    return meta.real(_MAGNITUDE) if meta.has(_MAGNITUDE) else 1.0


def _scaling(meta: Metadata) -> tuple[str, float]:
    """Return the type, in GGUF's words, and what positions are divided by."""
    kind = meta.text("rope.scaling.type") if meta.has("rope.scaling.type") else "linear"
    if kind not in ("none", "linear", "yarn"):
        meta.expected("rope.scaling.type", "'none', 'linear' or 'yarn': other scaling is not supported here")
    factors = [meta.real_or(key, 1.0) for key in ("rope.scaling.factor", "rope.scale_linear") if meta.has(key)]
    return kind, 1.0 if kind == "none" or not factors else factors[0]


def _yarn(meta: Metadata, factor: float) -> Fields:
    meta.fixed("rope.scaling.yarn_ext_factor", (1.0, -1.0), "1.0: YaRN in part is not supported here")
    meta.fixed("rope.scaling.yarn_log_multiplier", (0.0,), "0.0: DeepSeek's magnitude is not supported here")
    original = "rope.scaling.original_context_length"
    rope: Fields = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.integer(
            original if meta.has(original) else "context_length", high=_MAX_POSITIONS
        ),
        **{field: meta.real(key) for field, key in _YARN.items() if meta.has(key)},
    }
    own = "rope.scaling.yarn_attn_factor"
    if meta.has(own) or magnitude(meta) != 1:
        whole = meta.real(own) if meta.has(own) else _yarn_magnitude(factor)
        rope["attention_factor"] = whole * magnitude(meta)
    return rope


def _yarn_magnitude(factor: float) -> float:
    return 1.0 if factor <= 1 else 1 + 0.1 * math.log(factor)


def partial_rotary(meta: Metadata, head_dim: int) -> Fields:
    """Return the part of each head that is rotated, nothing if it is all of it."""
    if not meta.has("rope.dimension_count"):
        return {}
    n_rotated = meta.integer("rope.dimension_count", low=2, high=head_dim)
    factor = n_rotated / head_dim
    # Transformers multiplies back and rounds down, which loses a dimension at some odd head sizes.
    if n_rotated % 2 or int(head_dim * factor) != n_rotated:
        meta.expected("rope.dimension_count", f"an even part of {head_dim} dimensions")
    return {} if n_rotated == head_dim else {"partial_rotary_factor": factor}


def _divided(meta: Metadata, factors: list[float]) -> Fields:
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": magnitude(meta),
        "original_max_position_embeddings": meta.integer("context_length", high=_MAX_POSITIONS),
    }


def rope_keys(config: Config, head_dim: int, rope: Mapping[str, Any] | None = None) -> Keys:
    """Return the keys of a config's `rope_parameters`; frequency factors are a tensor (`rope_factors`)."""
    rope = config.rope_parameters if rope is None else rope
    keys: Keys = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys |= {key: float(rope[field]) for field, key in _YARN.items() if rope.get(field)}
        if rope.get("attention_factor"):
            # Not as `yarn_attn_factor`, which llama.cpp does not read.
            keys[_MAGNITUDE] = rope["attention_factor"] / _yarn_magnitude(rope["factor"])
    return keys


def rope_problem(config: Config, kinds: tuple[str, ...] = (*KINDS, "llama3"), *, partial: bool = False) -> str | None:
    """Return what of a config's RoPE this format has no place for, or None; `partial` as in `rope_fields`."""
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1) != 1 and not partial:
        return "its RoPE concerns a part of each head, which its class does not compute"
    if rope["rope_type"] not in kinds:
        return f"its RoPE is of type {rope['rope_type']!r}; allowed: {', '.join(kinds)}"
    if {"mscale", "mscale_all_dim"} & {name for name, value in rope.items() if value}:
        return "its RoPE has a magnitude of its own, which cannot be written"
    if not rope.get("truncate", True):
        return "the range of its YaRN is not rounded (truncate)"
    return None


def rope_factors(config: Config) -> Floats | None:
    """Return the frequency factors of a config whose scaling is Llama 3's, else None."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    from hybridkv.model.rope import rope_frequencies

    scaled, _ = rope_frequencies(config)
    plain = 1 / rope["rope_theta"] ** (np.arange(len(scaled), dtype=np.float64) / len(scaled))
    factors: Floats = (plain / scaled.double().numpy()).astype(np.float32)
    return factors


SETTINGS: tuple[tuple[str, Callable[[Config], Floats | None]], ...] = ((FACTORS, rope_factors),)
"""For `Architecture.settings`."""
