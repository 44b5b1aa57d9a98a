"""Rotary position embedding: metadata into Transformers' `rope_parameters`, and back.

Frequency factors (`rope_freqs.weight`), which GGUF uses for Llama 3's scaling, divide the frequencies. In a
Transformers config the same numbers are both factor lists of `longrope`, whose frequencies are divided likewise.

Source: gguf-py constants.py (`Keys.Rope`); transformers, modeling_rope_utils.py; ggml's `ggml_rope_ext`, whose
YaRN magnitude `1 + 0.1 ln(factor)` is Transformers' default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybridkv.gguf.architectures.record import Config, Fields, Keys
from hybridkv.gguf.decode import Floats
from hybridkv.gguf.metadata import Metadata

FACTORS = "rope_freqs.weight"

_YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}


def rope_fields(meta: Metadata, head_dim: int) -> Fields:
    """Return `rope_parameters` of a model that has one kind of them.

    Raises
    ------
    ModelFileError
        For a scaling that Transformers' classes do not compute, or a part of the head that they cannot rotate.
    """
    theta = meta.real("rope.freq_base") if meta.has("rope.freq_base") else 10000.0
    rope: Fields = {"rope_type": "default", "rope_theta": theta, **partial_rotary(meta, head_dim)}
    kind = meta.text("rope.scaling.type") if meta.has("rope.scaling.type") else "none"
    if meta.has_tensor(FACTORS):
        n_rotated = int(head_dim * rope.get("partial_rotary_factor", 1))
        return rope | _divided(meta, n_rotated // 2)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        meta.expected("rope.scaling.type", "'none', 'linear' or 'yarn': other scaling is not supported here")
    rope |= {"rope_type": kind, "factor": meta.real("rope.scaling.factor")}
    if kind == "yarn":
        high = 2**31 - 1
        rope["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length", high=high)
        rope |= {field: meta.real(key) for field, key in _YARN.items() if meta.has(key)}
    return rope


def no_scaling(meta: Metadata) -> None:
    """Refuse scaled RoPE for an architecture whose class does not compute it."""
    if meta.has("rope.scaling.type") and meta.text("rope.scaling.type") != "none":
        meta.expected("rope.scaling.type", "'none': scaled RoPE is not supported for this architecture")


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


def _divided(meta: Metadata, n_factors: int) -> Fields:
    factors = meta.numbers_in(FACTORS, n_factors)
    positions = meta.integer("context_length", high=2**31 - 1)
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
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
        keys |= {key: float(rope[field]) for field, key in _YARN.items() if field in rope}
    return keys


def rope_problem(config: Config, kinds: tuple[str, ...] = ("default", "linear", "yarn", "llama3")) -> str | None:
    """Return what of a config's RoPE this format has no place for, or None."""
    rope = config.rope_parameters
    if rope["rope_type"] not in kinds:
        return f"its RoPE is of type {rope['rope_type']!r}; allowed: {', '.join(kinds)}"
    if {"attention_factor", "mscale", "mscale_all_dim"} & {name for name, value in rope.items() if value}:
        return "its RoPE has a magnitude of its own, which cannot be written"
    return None


def rope_factors(config: Config) -> Floats | None:
    """Return the frequency factors of a config whose scaling is Llama 3's, else None."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / rope["rope_theta"] ** (np.arange(len(scaled), dtype=np.float64) / len(scaled))
    factors: Floats = (plain / scaled.double().numpy()).astype(np.float32)
    return factors


SETTINGS: tuple[tuple[str, Callable[[Config], Floats | None]], ...] = ((FACTORS, rope_factors),)
"""For `Architecture.settings`."""
