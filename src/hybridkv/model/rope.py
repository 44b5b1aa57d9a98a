"""Rotary angles from a config: the tables of cosines and sines that Transformers' classes compute step by step.

Owns the frequencies of every kind of RoPE that does not depend on the length of the sequence. Needs no Transformers;
tests compare each kind with its functions, bit for bit.

Source: transformers, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridkv.model.protocols import Config

Scaling = Callable[[Any, Mapping[str, Any], int], tuple[Tensor, float]]
"""From a config, its RoPE and the dims that turn to frequencies `[n_rotated / 2]` and a magnitude."""


def rope_angles(config: Config, n_positions: int, kind: str | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions 0 to `n_positions - 1`, float32 `[n_positions, n_rotated / 2]` each.

    For kinds of RoPE whose frequencies do not depend on the length of the sequence. A scaling's magnitude is in both.

    Parameters
    ----------
    kind
        Of the layers, where kinds of layers have a RoPE of their own.
    """
    inverse, magnitude = rope_frequencies(config, kind)
    angles = torch.arange(n_positions, dtype=torch.float).unsqueeze(1) * inverse.float()
    return (angles.cos() * magnitude).contiguous(), (angles.sin() * magnitude).contiguous()


def rope_frequencies(config: Config, kind: str | None = None) -> tuple[Tensor, float]:
    """Return the frequencies, float32 `[n_rotated / 2]`, and what cosines and sines are multiplied by."""
    text = config.get_text_config(decoder=True)
    rope: Mapping[str, Any] = text.rope_parameters if kind is None else text.rope_parameters[kind]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return SCALINGS[rope["rope_type"]](text, rope, int(head_dim * rope.get("partial_rotary_factor", 1.0)))


def _steps(n_rotated: int) -> Tensor:
    return torch.arange(0, n_rotated, 2, dtype=torch.float) / n_rotated


def _default(text: Any, rope: Mapping[str, Any], n_rotated: int) -> tuple[Tensor, float]:
    del text
    return 1.0 / (rope["rope_theta"] ** _steps(n_rotated)), 1.0


def _linear(text: Any, rope: Mapping[str, Any], n_rotated: int) -> tuple[Tensor, float]:
    return _default(text, rope, n_rotated)[0] / rope["factor"], 1.0


def _llama3(text: Any, rope: Mapping[str, Any], n_rotated: int) -> tuple[Tensor, float]:
    """Stretch long waves, keep short ones, and mix those between."""
    plain, factor = _default(text, rope, n_rotated)[0], rope["factor"]
    low, high, n_before = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    length = 2 * math.pi / plain
    scaled = torch.where(length > n_before / low, plain / factor, plain)
    share = (n_before / length - low) / (high - low)
    mixed = (1 - share) * scaled / factor + share * scaled
    between = ~(length < n_before / high) & ~(length > n_before / low)
    return torch.where(between, mixed, scaled), 1.0


def _yarn(text: Any, rope: Mapping[str, Any], n_rotated: int) -> tuple[Tensor, float]:
    """Stretch long waves, keep short ones, with a ramp over the dims between."""
    n_before, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
    factor = rope["factor"]
    if factor is None:
        factor = text.max_position_embeddings / n_before

    def dim_of(n_turns: float) -> float:
        """Find the dim that turns `n_turns` times within the original context."""
        return float((n_rotated * math.log(n_before / (n_turns * 2 * math.pi))) / (2 * math.log(theta)))

    first, last = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n_rotated - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(n_rotated // 2, dtype=torch.float) - first) / (last - first)).clamp(0, 1)
    waves = theta ** _steps(n_rotated)
    kept = 1 - ramp
    return (1.0 / (factor * waves)) * (1 - kept) + (1.0 / waves) * kept, _yarn_magnitude(rope, factor)


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    if (own := rope.get("attention_factor")) is not None:
        return float(own)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    first, second = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(first) / scale(second) if first and second else scale(1)


def _longrope(text: Any, rope: Mapping[str, Any], n_rotated: int) -> tuple[Tensor, float]:
    """Divide each frequency by a factor of its own; those of short and long sequences must be the same here."""
    n_before, factor = rope["original_max_position_embeddings"], rope.get("factor")
    if factor is None:
        factor = text.max_position_embeddings / n_before
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(n_before))
    factors = torch.tensor(rope["short_factor"], dtype=torch.float)
    return 1.0 / (factors * rope["rope_theta"] ** _steps(n_rotated)), float(magnitude)


SCALINGS: Mapping[str, Scaling] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By Transformers' `rope_type`."""
