"""The memory of one model: layer facts, specs, and the packed KV rows."""

from hybridkv.cache.kv import KVLayer
from hybridkv.cache.layer_kernels import LayerKernels, resolve
from hybridkv.cache.spec import AttentionFacts, KVSpec, KVTypes, LayerFacts, StateFacts

__all__ = [
    "AttentionFacts",
    "KVLayer",
    "KVSpec",
    "KVTypes",
    "LayerFacts",
    "LayerKernels",
    "StateFacts",
    "resolve",
]
