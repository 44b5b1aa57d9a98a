"""Load a model that `describe.py` has described: GGUF files and Hugging Face directories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hybridkv.engine.describe import Description, bundled_model, bundled_text, describe
from hybridkv.gguf.load import load_gguf
from hybridkv.gguf.tokenizer import TURN_ENDS
from hybridkv.hf import IMPLEMENTATION, WeightKind, pack_model, packed_parameter, vocabulary_rows
from hybridkv.hf.control_words import ControlWords
from hybridkv.hf.load import load_tokenizer, load_weights
from hybridkv.hf.step import save_unpacked
from hybridkv.hf.torchao_weights import quantize_weights


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run; `tokenizer` is None if it has none."""

    description: Description
    model: Any
    tokenizer: Any | None
    notices: tuple[str, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.model.config.get_text_config(decoder=True).eos_token_id
        return () if end is None else (end,) if isinstance(end, int) else tuple(end)


def load(description: Description, *, dtype: torch.dtype, device: str, weights: WeightKind = "plain") -> Loaded:
    """The model and its tokenizer.

    Parameters
    ----------
    weights
        How matrices are held. On the CPU they are packed one by one as they are read, so that no more than one is ever
        held twice; on other devices, int8 and int4 are torchao's, made once the model is loaded.

    Raises
    ------
    UsageError
        If that needs torchao and it is not installed.
    ModelFileError, ModelError
        For whatever is wrong with the files.
    """
    replace = None
    pack = weights != "plain" and torch.device(device).type == "cpu"
    if pack:
        replace = partial(packed_parameter, kind=weights, n_vocab=vocabulary_rows(description.config), dtype=dtype)
    if description.path.is_dir():
        code = description.remote_code
        model = load_weights(
            description.path,
            dtype=dtype,
            device=device,
            attn_implementation=IMPLEMENTATION,
            remote_code=code,
            n_ranks=description.n_ranks,
            replace=replace,
        )
        if pack:
            pack_model(model, weights)
        loaded = Loaded(description, model, load_tokenizer(description.path, remote_code=code))
        _add_turn_ends(loaded)
    else:
        gguf = load_gguf(
            description.path, dtype=dtype, device=device, attn_implementation=IMPLEMENTATION, replace=replace
        )
        loaded = Loaded(description, gguf.model, gguf.tokenizer, gguf.notices)
    if not pack and (weights == "int8" or weights == "int4"):
        quantize_weights(loaded.model, weights)
    if pack:
        save_unpacked(loaded.model)
    return loaded


def _add_turn_ends(loaded: Loaded) -> None:
    """Have every turn end of the vocabulary end a generation, as in GGUF files: configs often name the end of text."""
    tokenizer = loaded.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        return
    words, n_vocab = ControlWords(tokenizer).ids, vocabulary_rows(loaded.model.config)
    found = [*loaded.end_ids, tokenizer.eos_token_id, *(words.get(word) for word in TURN_ENDS)]
    ends = [index for index in dict.fromkeys(found) if index is not None and index < n_vocab]
    if ends:
        loaded.model.generation_config.eos_token_id = ends


__all__ = ["Description", "Loaded", "bundled_model", "bundled_text", "describe", "load"]
