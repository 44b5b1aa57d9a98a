"""The native engine on the CPU: a model's graph as operations on weights as they lie.

Owns lowering (`cpu.py`), the step (`step.py`), and models held without Transformers' classes (`model.py`).
"""

from hybridkv.native.model import Memory, NativeModel, directory_rejects, directory_source, map_gguf, native_model
from hybridkv.native.sources import EncodedSource, ParameterSource, bytes_by_type, source_of
from hybridkv.native.step import NativeStep, rejects

__all__ = [
    "EncodedSource",
    "Memory",
    "NativeModel",
    "NativeStep",
    "ParameterSource",
    "bytes_by_type",
    "directory_rejects",
    "directory_source",
    "map_gguf",
    "native_model",
    "rejects",
    "source_of",
]
