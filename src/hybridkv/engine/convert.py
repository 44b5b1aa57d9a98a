"""Convert a Hugging Face directory to a GGUF file: config, weights and tokenizer, each read by who knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridkv.errors import ModelFileError, UsageError
from hybridkv.gguf.convert import TYPES, find_architecture, write_gguf
from hybridkv.gguf.tokenizer_keys import tokenizer_keys
from hybridkv.hf.load import load_config, load_tokenizer

DTYPES = tuple(TYPES)


@dataclass(frozen=True, slots=True)
class Converted:
    """The file that was written: `architecture` is its own, `notices` say what of the directory is not in it."""

    path: Path
    architecture: str
    notices: tuple[str, ...]


def convert(
    directory: Path, output: Path, *, weights: str = "f16", tokenizer: str = "written", existing: str = "kept"
) -> Converted:
    """Write `output`, whole or not at all.

    Parameters
    ----------
    directory
        A Transformers model directory with safetensors.
    weights
        Type of the matrices: `f32`, `f16` or `q8_0`.
    tokenizer
        `written`, where the directory has one, or `omitted`.
    existing
        Whether a file of that name is `kept`, which is an error, or `replaced`.

    Raises
    ------
    UsageError
        For an output that exists or cannot be, or a type that is not allowed.
    ModelError, ModelFileError
        For whatever is wrong with the directory.
    """
    if weights not in TYPES:
        raise UsageError(f"unknown type {weights!r}; allowed: {', '.join(TYPES)}")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output} is no place for a file", hint="name a file in a directory that exists")
    if output.exists() and existing == "kept":
        raise UsageError(f"{output} exists", hint="--force replaces it")
    if not directory.is_dir():
        raise ModelFileError(f"no model directory at {directory}", hint="convert reads Hugging Face directories")
    config = load_config(directory).get_text_config(decoder=True)
    find_architecture(config)
    loaded = load_tokenizer(directory) if tokenizer == "written" else None
    keys: dict[str, Any] = _ids(config) if loaded is None else _ids(config) | _tokenizer(loaded, config.vocab_size)
    name = directory.resolve().name
    architecture, unused = write_gguf(directory, output, config, name=name, type_=weights, tokenizer=keys)
    notices = [] if loaded is not None else ["the file has no tokenizer: run it with --ids"]
    if unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        notices.append(f"{len(unused)} tensors were left out, for which the model class has no place: {shown}")
    return Converted(output, architecture.name, tuple(notices))


def _ids(config: Any) -> dict[str, Any]:
    """Read the special ids that a config names; of several end tokens the second is the end of a turn."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = {"bos": config.bos_token_id, "eos": ends[0], "eot": ends[1] if len(ends) > 1 else None}
    return {
        f"tokenizer.ggml.{role}_token_id": index
        for role, index in {**ids, "padding": config.pad_token_id}.items()
        if index is not None and 0 <= index < config.vocab_size
    }


def _tokenizer(tokenizer: Any, n_tokens: int) -> dict[str, Any]:
    """Build all keys of a tokenizer; its own special ids go before the config's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    keys: dict[str, Any] = dict(tokenizer_keys(description, n_tokens))
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {theirs: getattr(tokenizer, f"{ours}_token_id") for ours, theirs in roles.items()}
    keys |= {f"tokenizer.ggml.{role}_token_id": index for role, index in named.items() if index is not None}
    around = tokenizer("a")["input_ids"]
    keys["tokenizer.ggml.add_bos_token"] = bool(around) and around[0] == named["bos"]
    keys["tokenizer.ggml.add_eos_token"] = bool(around) and around[-1] == named["eos"]
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys
