"""A header with some of its metadata replaced, as options ask for it.

Options about RoPE are keys of the file in other words, so that every architecture reads them as it reads its own.
Source: llama.cpp, common/common.cpp and src/llama-context.cpp: `--rope-scale N` divides positions by N,
`--rope-freq-scale X` by 1/X; `--yarn-attn-factor` multiplies what the file says; a factor without a type is linear.
"""

from __future__ import annotations

from dataclasses import replace

from hybridkv.gguf.reader import Header, Value
from hybridkv.model.changes import ModelChanges, RopeChanges

_MAGNITUDE = "rope.scaling.attn_factor"


def changed(header: Header, changes: ModelChanges) -> Header:
    """Return the header that the options ask for."""
    if not changes:
        return header
    metadata = {**header.metadata, **changes.keys}
    prefix = f"{header.architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    keys = _rope_keys(changes.rope, own)
    if changes.rope.factor is not None:
        metadata.pop(f"{prefix}rope.scale_linear", None)
    return replace(header, metadata={**metadata, **{prefix + key: value for key, value in keys.items()}})


def _rope_keys(rope: RopeChanges, own: dict[str, Value]) -> dict[str, Value]:
    """Translate options to the keys that they stand for, without the architecture's name."""
    scaling = rope.scaling
    if scaling is None and rope.factor is not None and own.get("rope.scaling.type", "none") == "none":
        scaling = "linear"
    given: dict[str, Value | None] = {
        "rope.scaling.type": scaling,
        "rope.scaling.factor": rope.factor,
        "rope.freq_base": rope.freq_base,
        "rope.scaling.original_context_length": rope.orig_ctx,
        "rope.scaling.yarn_ext_factor": rope.ext_factor,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
    if rope.attn_factor is not None:
        before = own.get(_MAGNITUDE, 1.0)
        given[_MAGNITUDE] = rope.attn_factor * (before if isinstance(before, float) else 1.0)
    return {key: value for key, value in given.items() if value is not None}
