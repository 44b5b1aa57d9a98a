"""The changes that a command line makes to a model: its RoPE, and metadata of its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hybridkv.errors import UsageError
from hybridkv.model.protocols import Config

Scaling = Literal["none", "linear", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeChanges:
    """RoPE in llama.cpp's words; None leaves what the model says.

    Attributes
    ----------
    scaling
        How positions beyond the original length are reached; a factor without it is linear.
    factor
        What positions are divided by.
    freq_base
        theta.
    orig_ctx
        YaRN's original context; None for the trained length.
    ext_factor
        YaRN's mix; 1 is all of it.
    attn_factor
        Multiplies the magnitude of rotated queries and keys.
    beta_fast, beta_slow
        YaRN's bounds.
    """

    scaling: Scaling | None = None
    factor: float | None = None
    freq_base: float | None = None
    orig_ctx: int | None = None
    ext_factor: float | None = None
    attn_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None

    def __bool__(self) -> bool:
        """Check whether anything is changed."""
        return any(getattr(self, one.name) is not None for one in fields(self))


@dataclass(frozen=True, slots=True)
class ModelChanges:
    """All changes.

    Attributes
    ----------
    rope
        Of the RoPE.
    keys
        Metadata of a GGUF file, by its whole key.
    """

    rope: RopeChanges = field(default_factory=RopeChanges)
    keys: Mapping[str, int | float | bool | str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Check whether anything is changed."""
        return bool(self.rope) or bool(self.keys)


NO_CHANGES = ModelChanges()


def change_rope(config: Config, rope: RopeChanges) -> None:
    """Change a config's RoPE in place, as the options ask for it.

    Layers of a sliding window keep theirs where a model has two kinds, as in llama.cpp.

    Raises
    ------
    UsageError
        For a model without RoPE, and for what its class does not compute.
    """
    if not rope:
        return
    text = config.get_text_config(decoder=True)
    held = getattr(text, "rope_parameters", None)
    if not held:
        raise UsageError("this model has no RoPE to scale", hint="leave the --rope and --yarn options out")
    if rope.ext_factor is not None and rope.ext_factor not in (1.0, -1.0):
        raise UsageError(f"--yarn-ext-factor {rope.ext_factor:g}; allowed: 1, all of YaRN", hint="leave it out")
    if "rope_type" in held:
        text.rope_parameters = _changed(held, rope, text.max_position_embeddings)
        return
    kinds = [kind for kind in held if "sliding" not in kind]
    changed = {kind: _changed(held[kind], rope, text.max_position_embeddings) for kind in kinds}
    text.rope_parameters = {**held, **changed}


def _changed(held: Mapping[str, Any], rope: RopeChanges, trained: int) -> dict[str, Any]:
    """Apply the changes to the `rope_parameters` of one kind."""
    kind, scaling = held["rope_type"], rope.scaling
    if scaling is None and rope.factor is not None and kind == "default":
        scaling = "linear"
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    new = {key: value for key, value in held.items() if scaling is None or key in kept}
    if scaling is not None:
        kind = "default" if scaling == "none" else scaling
    new["rope_type"] = kind
    if rope.freq_base is not None:
        new["rope_theta"] = rope.freq_base
    if kind not in ("linear", "yarn"):
        if rope.factor is not None and kind != "default":
            raise UsageError(
                f"--rope-scale {rope.factor:g} of a model whose RoPE is {kind!r}; allowed: with --rope-scaling"
            )
        return new
    new["factor"] = rope.factor if rope.factor is not None else held.get("factor", 1.0)
    if kind == "yarn":
        original = held.get("original_max_position_embeddings", trained)
        new["original_max_position_embeddings"] = original if rope.orig_ctx is None else rope.orig_ctx
        for field in ("beta_fast", "beta_slow"):
            if getattr(rope, field) is not None:
                new[field] = getattr(rope, field)
        if rope.attn_factor is not None:
            whole = new.get("attention_factor") or (1.0 if new["factor"] <= 1 else 1 + 0.1 * math.log(new["factor"]))
            new["attention_factor"] = whole * rope.attn_factor
    elif rope.attn_factor not in (None, 1.0):
        raise UsageError("--yarn-attn-factor without YaRN; allowed: with --rope-scaling yarn")
    return new
