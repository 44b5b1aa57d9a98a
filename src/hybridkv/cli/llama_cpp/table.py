"""All options, and the option of a name."""

from __future__ import annotations

from hybridkv.cli.llama_cpp.machine import MACHINE
from hybridkv.cli.llama_cpp.model import MODEL
from hybridkv.cli.llama_cpp.record import LlamaOption
from hybridkv.cli.llama_cpp.serving import SERVING
from hybridkv.cli.llama_cpp.text import TEXT

LLAMA_OPTIONS: tuple[LlamaOption, ...] = (*MODEL, *TEXT, *SERVING, *MACHINE)

_BY_NAME = {name: option for option in LLAMA_OPTIONS for name in option.names}


def llama_option(name: str) -> LlamaOption | None:
    """Return what an option is here, None if neither program has it."""
    return _BY_NAME.get(name)
