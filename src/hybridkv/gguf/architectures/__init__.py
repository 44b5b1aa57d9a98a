"""The GGUF architectures that can be loaded: one file each, listed here.

To add one, write a module like `qwen35.py` that defines an `ARCHITECTURE` and add it to the tuple.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hybridkv.errors import ModelFileError
from hybridkv.gguf.architectures import (
    falcon_h1,
    gemma3,
    granitehybrid,
    jamba,
    lfm2,
    lfm2moe,
    llama,
    nemotron_h,
    nemotron_h_moe,
    qwen2,
    qwen3,
    qwen3moe,
    qwen3next,
    qwen35,
    qwen35moe,
)
from hybridkv.gguf.architectures.record import Architecture
from hybridkv.gguf.reader import Header

_MODULES = (
    qwen35,
    qwen35moe,
    qwen3next,
    lfm2,
    lfm2moe,
    granitehybrid,
    nemotron_h,
    nemotron_h_moe,
    jamba,
    falcon_h1,
    llama,
    qwen2,
    qwen3,
    qwen3moe,
    gemma3,
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {module.ARCHITECTURE.name: module.ARCHITECTURE for module in _MODULES}
)


def get_architecture(header: Header) -> Architecture:
    """Return the record of a file's architecture.

    Raises
    ------
    ModelFileError
        For an architecture that is not in the table.
    """
    if header.architecture not in ARCHITECTURES:
        raise ModelFileError(
            f"{header.path}: unknown architecture {header.architecture!r}; known: {', '.join(ARCHITECTURES)}",
            hint="load the model from its Hugging Face directory instead",
        )
    return ARCHITECTURES[header.architecture]
