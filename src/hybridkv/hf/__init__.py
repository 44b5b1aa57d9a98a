"""hybridkv in Transformers: the cache, the attention function, and layer facts from a config.

Whoever asks for a name of the cache, the attention function or a step gets `attn_implementation="hybridkv"` registered
through Transformers' own registries. Facts of a config are there without Transformers' models, which take a second or
two to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridkv.hf.attention import IMPLEMENTATION, register
    from hybridkv.hf.cache import ModelCache, quantized_cache
    from hybridkv.hf.evidence import finite_rows, is_finite
    from hybridkv.hf.facts import cache_argument, is_hybrid, kv_facts, layer_facts, takes_chunks
    from hybridkv.hf.step import (
        EagerStep,
        FusedStep,
        GraphStep,
        Holder,
        Step,
        pack_model,
        packing_rejects,
        parse_weights,
        vocabulary_rows,
    )

__all__ = [
    "IMPLEMENTATION",
    "EagerStep",
    "FusedStep",
    "GraphStep",
    "Holder",
    "ModelCache",
    "Step",
    "cache_argument",
    "finite_rows",
    "is_finite",
    "is_hybrid",
    "kv_facts",
    "layer_facts",
    "pack_model",
    "packing_rejects",
    "parse_weights",
    "quantized_cache",
    "register",
    "takes_chunks",
    "vocabulary_rows",
]

_MODULES = {
    "attention": ("IMPLEMENTATION", "register"),
    "cache": ("ModelCache", "quantized_cache"),
    "evidence": ("finite_rows", "is_finite"),
    "facts": ("cache_argument", "is_hybrid", "kv_facts", "layer_facts", "takes_chunks"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _PLACES.get(name, "step")
    if place != "facts":
        import_module(f"{__name__}.attention").register()
    return getattr(import_module(f"{__name__}.{place}"), name)
