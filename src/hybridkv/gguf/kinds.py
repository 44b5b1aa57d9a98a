"""GGUF files that hold no language model: recognized from the header, and refused by name.

Owns the words for projectors, adapters, control vectors, importance matrices and draft heads. Does not own the
architectures that can be loaded (`architectures/`). Called by `split.py`, so that every command says the same.
Source: gguf-py constants.py (`GGUFType`, `Keys.Adapter`); llama.cpp convert_lora_to_gguf.py, tools/mtmd/clip.cpp,
tools/imatrix and tools/cvector-generator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from hybridkv.errors import ModelFileError
from hybridkv.gguf.reader import Header

_KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "mmproj": (
            "a multimodal projector (mmproj), which turns images or sound into a language model's input",
            "give the language model's own file; hybridkv runs text",
        ),
        "adapter": (
            "an adapter (LoRA), which changes another model's weights",
            "merge it into its base model first (llama.cpp: llama-export-lora), and give the merged file",
        ),
        "imatrix": (
            "an importance matrix, measured on a model for quantizing it",
            "give the file of the model itself",
        ),
        "controlvector": (
            "a control vector, which is added to another model's activations",
            "give the file of the model itself; hybridkv applies no control vectors",
        ),
    }
)
"""By `general.type`: what the file is, and what to do instead."""

_BY_ARCHITECTURE: Mapping[str, str] = MappingProxyType({"clip": "mmproj", "controlvector": "controlvector"})

_BLOCK = re.compile(r"blk\.(?P<number>\d+)\.(?P<rest>.+)")


def check_kind(header: Header) -> None:
    """Refuse a file that is no language model.

    Raises
    ------
    ModelFileError
        With what the file is.
    """
    kind = _BY_ARCHITECTURE.get(header.architecture, header.metadata.get("general.type", "model"))
    kind = "adapter" if "adapter.type" in header.metadata else kind
    if kind != "model":
        what, hint = _KINDS.get(str(kind), (f"of general.type {str(kind)[:60]!r}", "give the file of a language model"))
        raise ModelFileError(f"{header.path} is {what}; allowed: a language model", hint=hint)
    if _is_draft_head(header):
        raise ModelFileError(
            f"{header.path} is a draft head: it holds blocks of multi-token prediction, and no block of the model "
            "whose tokens they predict",
            hint="give the file of the model itself",
        )


def _is_draft_head(header: Header) -> bool:
    """Check whether every block is one of multi-token prediction, known by `nextn` tensors or named `mtp`."""
    blocks = [found for info in header.tensors if (found := _BLOCK.fullmatch(info.name))]
    heads = {found["number"] for found in blocks if found["rest"].startswith("nextn.")}
    named = any(info.name.startswith("mtp.") for info in header.tensors)
    return (bool(heads) or named) and heads == {found["number"] for found in blocks}
