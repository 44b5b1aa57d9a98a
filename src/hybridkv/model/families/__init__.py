"""Families of models: from a Transformers config to the graph of its layers, one function a family.

A config is read by attribute alone. What a family cannot be written as is refused with the reason, before any weight
is touched.
"""

from __future__ import annotations

from hybridkv.model.checks import graph_rejects
from hybridkv.model.families import dense, lfm2, mamba, qwen, zamba
from hybridkv.model.families.parts import Family, kinds_reject
from hybridkv.model.graph import ModelGraph
from hybridkv.model.protocols import Config

FAMILIES: dict[str, Family] = {**qwen.FAMILIES, **lfm2.FAMILIES, **mamba.FAMILIES, **zamba.FAMILIES, **dense.FAMILIES}
"""By Transformers' `model_type`; hybrids first."""


def graph_of(config: Config) -> ModelGraph:
    """Build the graph of a Transformers config's text model; `rejects` must have said None."""
    text = config.get_text_config(decoder=True)
    return FAMILIES[text.model_type].graph(text)


def rejects(config: Config) -> str | None:
    """Explain why no graph can be written of a config; None if one can."""
    text = config.get_text_config(decoder=True)
    family = FAMILIES.get(text.model_type)
    if family is None:
        return f"knows no {text.model_type} layers; it knows {', '.join(FAMILIES)}"
    reason = kinds_reject(text, family.kinds) or family.rejects(text)
    return graph_rejects(family.graph(text)) if reason is None else reason


__all__ = ["FAMILIES", "Family", "graph_of", "rejects"]
