"""Checks of a graph's sizes that no model can have, before a weight is touched: nothing here knows a backend."""

from __future__ import annotations

from dataclasses import fields

from hybridkv.model.graph import ModelGraph
from hybridkv.model.layers import Adapter, Attention, DeltaNet, Experts, Mamba2, Part, Shared

_MAY_BE_0 = ("latent", "use", "owner")


def graph_rejects(graph: ModelGraph) -> str | None:
    """Explain which layer has sizes that do not fit each other, the first one; None if all fit."""
    for index, block in enumerate(graph.blocks):
        for part in (part for branch in block.branches for part in branch.parts):
            if (reason := _rejects(part)) is not None:
                return f"layer {index}: {reason}"
    return None


def _rejects(part: Part | Adapter) -> str | None:
    for field in fields(part):
        value = getattr(part, field.name)
        if type(value) is int and value < (0 if field.name in _MAY_BE_0 else 1):
            return f"{type(part).__name__} with {field.name} {value}"
        if isinstance(value, Attention | Mamba2 | Adapter) and (reason := _rejects(value)) is not None:
            return reason
    if isinstance(part, Shared):
        return _rejects(part.ffn)
    return _groups_reject(part)


def _groups_reject(part: Part | Adapter) -> str | None:
    """Explain which counts do not divide each other; None if all do."""
    if isinstance(part, Attention) and part.n_heads % part.n_kv_heads:
        return f"{part.n_heads} query heads do not divide into {part.n_kv_heads} KV heads"
    if isinstance(part, DeltaNet) and part.n_values % part.n_keys:
        return f"{part.n_values} value heads do not divide into {part.n_keys} key heads"
    if isinstance(part, Mamba2) and part.n_heads % part.n_groups:
        return f"{part.n_heads} Mamba heads do not divide into {part.n_groups} groups"
    return _experts_reject(part) if isinstance(part, Experts) else None


def _experts_reject(e: Experts) -> str | None:
    c = e.choice
    if min(c.n_groups, c.n_used_groups) < 1 or e.n_experts % c.n_groups or c.n_used_groups > c.n_groups:
        return f"{e.n_experts} experts in {c.n_groups} groups, of which {c.n_used_groups} are used"
    if c.n_used > c.n_used_groups * (e.n_experts // c.n_groups):
        return f"{c.n_used} experts a token, of {c.n_used_groups} groups of {e.n_experts // c.n_groups}"
    return None
