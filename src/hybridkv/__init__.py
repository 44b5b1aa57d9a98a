"""Run hybrid recurrent/attention language models with a quantized KV cache, fast and never silently wrong.

>>> import hybridkv                                                       # doctest: +SKIP
>>> print(hybridkv.load("model.gguf", type_k="q8_0", type_v="q8_0").generate("Hello"))  # doctest: +SKIP

>>> from hybridkv import quantized_cache                                  # doctest: +SKIP
>>> cache = quantized_cache(model, type_k="q4_0", type_v="q4_0", rotate_k=True)  # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)                                 # doctest: +SKIP

The names of `__all__` are the public ones; all others may change. They are imported when they are asked for: torch
takes a second to import, Transformers several.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hybridkv.errors import (
    AdmissionError,
    ContextError,
    GuardError,
    HybridKVError,
    ModelError,
    ModelFileError,
    NoKernelError,
    SessionError,
    UsageError,
)

if TYPE_CHECKING:
    from hybridkv.cache import KVTypes
    from hybridkv.engine import Engine, Event, Request, RequestHandle, SamplingParams, Scheduler
    from hybridkv.engine.api import Model, load, plan
    from hybridkv.hf import ModelCache, quantized_cache
    from hybridkv.planner import Plan
    from hybridkv.policy import Guard, Policy

__version__ = "0.1.0"

__all__ = [
    "AdmissionError",
    "ContextError",
    "Engine",
    "Event",
    "Guard",
    "GuardError",
    "HybridKVError",
    "KVTypes",
    "Model",
    "ModelCache",
    "ModelError",
    "ModelFileError",
    "NoKernelError",
    "Plan",
    "Policy",
    "Request",
    "RequestHandle",
    "SamplingParams",
    "Scheduler",
    "SessionError",
    "UsageError",
    "__version__",
    "load",
    "plan",
    "quantized_cache",
]

_MODULES = {
    "cache": ("KVTypes",),
    "engine": ("Engine", "Event", "Request", "SamplingParams", "Scheduler", "RequestHandle"),
    "engine.api": ("Model", "load", "plan"),
    "hf": ("ModelCache", "quantized_cache"),
    "planner": ("Plan",),
    "policy": ("Guard", "Policy"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
