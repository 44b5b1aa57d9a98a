"""hybridkv in Transformers: the cache, the attention function, and layer facts from a config.

Importing this package registers `attn_implementation="hybridkv"` through Transformers' own registries.
"""

from hybridkv.hf.attention import IMPLEMENTATION, register
from hybridkv.hf.cache import ModelCache, quantized_cache
from hybridkv.hf.evidence import finite_rows, is_finite
from hybridkv.hf.facts import cache_argument, is_hybrid, kv_facts, layer_facts, takes_chunks
from hybridkv.hf.step import (
    EagerStep,
    FusedStep,
    GraphStep,
    Step,
    WeightKind,
    holder,
    pack_model,
    packed_parameter,
    packing_rejects,
    parse_weights,
    vocabulary_rows,
)

register()

__all__ = [
    "IMPLEMENTATION",
    "EagerStep",
    "FusedStep",
    "GraphStep",
    "ModelCache",
    "Step",
    "WeightKind",
    "cache_argument",
    "finite_rows",
    "holder",
    "is_finite",
    "is_hybrid",
    "kv_facts",
    "layer_facts",
    "pack_model",
    "packed_parameter",
    "packing_rejects",
    "parse_weights",
    "quantized_cache",
    "register",
    "takes_chunks",
    "vocabulary_rows",
]
