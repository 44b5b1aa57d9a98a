"""The keys by which a GGUF file says that its model makes embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hybridkv.gguf.reader import Header

Pooling = Literal["mean", "cls", "last"]

_TYPES: dict[object, Pooling] = {1: "mean", 2: "cls", 3: "last"}
"""Source: llama.cpp, include/llama.h (`llama_pooling_type`); 0 is none, and 4 ranks pairs of texts."""


def take_pooling(header: Header, asked: Pooling | Literal["none"] | None = None) -> tuple[Pooling | None, Header]:
    """Return a file's pooling, and the header of the model below it; None where there is nothing to pool.

    Parameters
    ----------
    asked
        In place of what the file says.
    """
    key = f"{header.architecture}.pooling_type"
    of_file = _TYPES.get(header.metadata.get(key))
    pooling = of_file if asked is None else None if asked == "none" else asked
    if pooling is None and asked is None:
        return None, header
    return pooling, replace(header, metadata={**header.metadata, key: 0})
