"""The GGUF architectures that can be loaded: one file each, listed here.

To add one, write a module like `qwen35.py` that defines an `ARCHITECTURE` and add it to the tuple.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hybridkv.errors import ModelFileError
from hybridkv.gguf.architectures import (
    directories,
    falcon_h1,
    gemma3,
    granite,
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
    granite,
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

WRITABLE: tuple[Architecture, ...] = (*ARCHITECTURES.values(), granite.HYBRID_CLASS)
"""What configs can be written as: some architectures are those of several Transformers classes."""

DIRECTORIES = directories.DIRECTORIES
"""Tables of models that are read from directories alone."""

_REFUSED = {
    "qwen4exp": "hyper-connections, an indexer that selects keys, and embeddings of hashed n-grams",
}
"""Architectures that people have files of, and what of them is not computed here."""


def get_architecture(header: Header) -> Architecture:
    """Return the record of a file's architecture.

    Raises
    ------
    ModelFileError
        For an architecture that is not in the table.
    """
    name, known = header.architecture, ", ".join(ARCHITECTURES)
    if name in _REFUSED:
        raise ModelFileError(
            f"{header.path}: architecture {name!r} is not supported: it needs {_REFUSED[name]}; known: {known}",
            hint="current llama.cpp runs such files",
        )
    if name not in ARCHITECTURES:
        raise ModelFileError(
            f"{header.path}: unknown architecture {name!r}; known: {known}",
            hint="the model's Hugging Face directory runs if Transformers has a class for its config.json",
        )
    return ARCHITECTURES[name]
