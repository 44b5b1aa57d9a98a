"""Options that several rooms take, described once: how the KV cache is stored, and how tokens are drawn.

Imports nothing heavy: `--help` reads these tables before torch is loaded.
"""

from hybridkv.options.kv import COMMON, DEFAULT_TYPE, EXACT, KV_OPTIONS, OWN, TYPES, KVOption, kv_option
from hybridkv.options.samplers import SAMPLERS, SamplerOption

__all__ = [
    "COMMON",
    "DEFAULT_TYPE",
    "EXACT",
    "KV_OPTIONS",
    "OWN",
    "SAMPLERS",
    "TYPES",
    "KVOption",
    "SamplerOption",
    "kv_option",
]
