"""The share of a model that one rank holds where Transformers has spread it over several: the facts of its layers.

Transformers' own plans say which projections are sharded. Where a plan shards attention heads, each rank's KV cache
holds its own heads and nothing else, and attention over them needs no other rank; states are whole on every rank, as
are the KV heads of a family whose plan gathers them. All of it follows from the config, so that kernels and bytes are
known before a weight is read. Processes and weights are `hybridkv.hf.ranks`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hybridkv.cache import LayerFacts
from hybridkv.errors import ModelError
from hybridkv.model.protocols import Config

_KEYS = ("k_proj", "qkv_proj", "query_key_value")
"""Projections that make keys, alone or with others."""


def ranks_of(config: Config) -> int:
    """Count the ranks over which a model of this config was loaded; 1 if it was not sharded."""
    spread = getattr(config, "distributed_config", None)
    if isinstance(spread, Mapping):  # a config that was saved and read back
        return int(spread.get("tp_size") or 1)
    return int(getattr(spread, "tp_size", None) or 1)


def shards_heads(config: Config) -> bool:
    """Check whether Transformers' plan for this model gives each rank some of the KV heads."""
    plan = getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}
    return any(name.rpartition(".")[2] in _KEYS and style == "colwise" for name, style in plan.items())


def facts_of_rank(config: Config, facts: tuple[LayerFacts, ...], n: int) -> tuple[LayerFacts, ...]:
    """Derive what each of `n` ranks holds of layers that are as `facts` say on one.

    Raises
    ------
    ModelError
        If a layer's KV heads do not divide.
    """
    if n == 1 or not shards_heads(config):
        return facts
    return tuple(layer if layer.attention is None else _cut(layer, n) for layer in facts)


def _cut(layer: LayerFacts, n: int) -> LayerFacts:
    whole = layer.attention
    assert whole is not None
    if whole.n_kv_heads % n:
        fitting = [m for m in range(2, whole.n_kv_heads + 1) if whole.n_kv_heads % m == 0]
        raise ModelError(
            f"layer {whole.layer}: {whole.n_kv_heads} KV heads do not divide among {n} ranks",
            hint=f"use {' or '.join(map(str, fitting))} ranks" if fitting else "run it in one process",
        )
    return replace(layer, attention=replace(whole, n_heads=whole.n_heads // n, n_kv_heads=whole.n_kv_heads // n))
