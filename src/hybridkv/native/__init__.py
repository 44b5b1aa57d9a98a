"""The native backend on the CPU: a model's graph as operations on weights as they lie.

Owns the choice (`choice.py`), lowering (`cpu.py`), the step (`step.py`), and models held without Transformers' classes
(`model.py`). What needs Transformers' models is imported when it is asked for: they take a second or two.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridkv.native.choice import BackendKind, rejects, runs_natively
    from hybridkv.native.model import Memory, NativeModel, directory_source, map_gguf, native_model
    from hybridkv.native.parameters import ParameterSource
    from hybridkv.native.sources import EncodedSource, bytes_by_type, source_of, types_held
    from hybridkv.native.step import NativeStep

__all__ = [
    "BackendKind",
    "EncodedSource",
    "Memory",
    "NativeModel",
    "NativeStep",
    "ParameterSource",
    "bytes_by_type",
    "directory_source",
    "map_gguf",
    "native_model",
    "rejects",
    "runs_natively",
    "source_of",
    "types_held",
]

_MODULES = {
    "choice": ("BackendKind", "rejects", "runs_natively"),
    "model": ("Memory", "NativeModel", "directory_source", "map_gguf", "native_model"),
    "parameters": ("ParameterSource",),
    "sources": ("EncodedSource", "bytes_by_type", "source_of", "types_held"),
    "step": ("NativeStep",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
