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
    GraphMode,
    GraphStep,
    NativeStep,
    Step,
    StepKind,
    WeightKind,
    pack_model,
    packed_bytes,
    packed_parameter,
    packing_rejects,
    parse_graphs,
    parse_step,
    parse_weights,
    resolve_step,
    vocabulary_rows,
)

register()

__all__ = [
    "IMPLEMENTATION",
    "EagerStep",
    "FusedStep",
    "GraphMode",
    "GraphStep",
    "ModelCache",
    "NativeStep",
    "Step",
    "StepKind",
    "WeightKind",
    "cache_argument",
    "finite_rows",
    "is_finite",
    "is_hybrid",
    "kv_facts",
    "layer_facts",
    "pack_model",
    "packed_bytes",
    "packed_parameter",
    "packing_rejects",
    "parse_graphs",
    "parse_step",
    "parse_weights",
    "quantized_cache",
    "register",
    "resolve_step",
    "takes_chunks",
    "vocabulary_rows",
]
