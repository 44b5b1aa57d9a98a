"""The GGUF architectures that can be loaded: one file each, listed here.

To add one, write a module like `qwen35.py` that defines an `ARCHITECTURE` and add it to the tuple.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hybridkv.errors import ModelFileError
from hybridkv.gguf.architectures.gemma3 import ARCHITECTURE as GEMMA3
from hybridkv.gguf.architectures.llama import ARCHITECTURE as LLAMA
from hybridkv.gguf.architectures.qwen35 import ARCHITECTURE as QWEN35
from hybridkv.gguf.architectures.record import Architecture
from hybridkv.gguf.reader import Header

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {record.name: record for record in (QWEN35, LLAMA, GEMMA3)}
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
