"""The cache that a model runs on: Transformers' kind for Transformers' models, the plain one for all else."""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.cache import KVSpec
from hybridkv.model.protocols import LanguageModel
from hybridkv.native import NativeModel
from hybridkv.policy import Guard
from hybridkv.runtime import ModelCache, Notify
from hybridkv.runtime.cache import LOG


def new_cache(
    model: LanguageModel,
    specs: Sequence[KVSpec],
    *,
    n_ctx: int | None,
    guard: Guard | None,
    notify: Notify = LOG.warning,
) -> ModelCache:
    """Build an empty cache for a loaded model."""
    kind: type[ModelCache] = ModelCache
    if not isinstance(model, NativeModel):
        from hybridkv import hf

        kind = hf.ModelCache
    return kind(model.config, specs, device=model.device.type, n_ctx=n_ctx, guard=guard, notify=notify)
