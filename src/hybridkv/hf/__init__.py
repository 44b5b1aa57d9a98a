"""hybridkv in Transformers: the cache, the attention function, and steps over Transformers' own models.

Importing a name of the cache, the attention function or a step gets `attn_implementation="hybridkv"` registered
through Transformers' own registries. Nothing here is imported where a model runs without Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridkv.hf.attention import IMPLEMENTATION, register
    from hybridkv.hf.cache import ModelCache, cache_argument, quantized_cache
    from hybridkv.hf.step import EagerStep, FusedStep, GraphStep, Holder, pack_model, packing_rejects

__all__ = [
    "IMPLEMENTATION",
    "EagerStep",
    "FusedStep",
    "GraphStep",
    "Holder",
    "ModelCache",
    "cache_argument",
    "pack_model",
    "packing_rejects",
    "quantized_cache",
    "register",
]

_MODULES = {
    "attention": ("IMPLEMENTATION", "register"),
    "cache": ("ModelCache", "cache_argument", "quantized_cache"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.attention").register()
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'step')}"), name)
