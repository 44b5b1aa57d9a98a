"""Run hybrid recurrent/attention language models with a quantized KV cache, fast and never silently wrong.

>>> import hybridkv                                                       # doctest: +SKIP
>>> print(hybridkv.load("model.gguf", type_k="q8_0", type_v="q8_0").generate("Hello"))  # doctest: +SKIP

>>> from hybridkv import quantized_cache                                  # doctest: +SKIP
>>> cache = quantized_cache(model, type_k="q4_0", type_v="q4_0", rotate_k=True)  # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)                                 # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridkv.errors import (
    ContextError,
    GuardError,
    HybridKVError,
    ModelError,
    ModelFileError,
    NoKernelError,
    UsageError,
)

if TYPE_CHECKING:
    from hybridkv.engine.api import TextModel, load
    from hybridkv.hf import ModelCache, quantized_cache

__version__ = "0.1.0"

__all__ = [
    "ContextError",
    "GuardError",
    "HybridKVError",
    "ModelCache",
    "ModelError",
    "ModelFileError",
    "NoKernelError",
    "TextModel",
    "UsageError",
    "__version__",
    "load",
    "quantized_cache",
]


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import: only those who ask for the cache pay for it.
    if name in ("ModelCache", "quantized_cache"):
        from hybridkv import hf

        return getattr(hf, name)
    if name in ("TextModel", "load"):
        from hybridkv.engine import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
