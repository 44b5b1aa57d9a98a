"""hybridkv in Transformers: the cache, the attention function, and layer facts from a config.

Importing this package registers `attn_implementation="hybridkv"` through Transformers' own registries.
"""

from hybridkv.hf.attention import IMPLEMENTATION, register
from hybridkv.hf.cache import ModelCache, quantized_cache
from hybridkv.hf.facts import is_hybrid, kv_facts, layer_facts, takes_chunks

register()

__all__ = [
    "IMPLEMENTATION",
    "ModelCache",
    "is_hybrid",
    "kv_facts",
    "layer_facts",
    "quantized_cache",
    "register",
    "takes_chunks",
]
