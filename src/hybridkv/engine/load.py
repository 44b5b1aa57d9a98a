"""Load a model that `describe.py` has described: GGUF files and Hugging Face directories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hybridkv.engine.describe import Description, bundled_model, bundled_text, change_config, describe
from hybridkv.errors import UsageError
from hybridkv.gguf.tensors import GgufSource
from hybridkv.gguf.tokenizer import TURN_ENDS
from hybridkv.held import WeightKind
from hybridkv.memory import available_memory
from hybridkv.model import vocab_size_of
from hybridkv.native import Memory, directory_source, map_gguf, native_model
from hybridkv.native.choice import BackendKind, runs_natively
from hybridkv.text.control_words import ControlWords

if TYPE_CHECKING:
    from hybridkv.hf import Holder


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


def load(
    description: Description,
    *,
    dtype: torch.dtype,
    device: str,
    weights: WeightKind = "plain",
    backend: BackendKind = "auto",
    memory: Memory = "mapped",
    hosted: frozenset[str] = frozenset(),
) -> Loaded:
    """Load the model and its tokenizer.

    Parameters
    ----------
    weights
        How matrices are held. On the CPU those of a GGUF file are used where they lie in the mapped file, and those of
        a directory are packed one by one as they are read; on CUDA, packed ones go to the card as they are read.
    backend
        What will run it: the native step takes a model without Transformers' classes.
    memory
        Whether the weights of a GGUF file stay in the mapped file, or are read into this process's memory.
    hosted
        Names of the tensors that stay in main memory while a card runs the rest; see `hybridkv.engine.placed`.

    Raises
    ------
    ModelFileError, ModelError
        For whatever is wrong with the files.
    """
    on_cpu = weights != "plain" and torch.device(device).type == "cpu"
    if on_cpu and description.n_ranks == 1 and runs_natively(description.config, device, backend):
        return _load_native(description, weights, memory)
    if torch.device(device).type == "cuda" and description.rejects_packed("cuda", weights, backend) is None:
        return _load_native(description, weights, memory, device, hosted)
    from hybridkv.hf import Holder
    from hybridkv.hf.step import save_unpacked

    hold = Holder(weights, vocab_size_of(description.config), dtype) if on_cpu else None
    loaded = _load_eager(description, dtype, device, weights, hold)
    if hold is not None:
        save_unpacked(loaded.model)
    return loaded


def _load_eager(
    description: Description, dtype: torch.dtype, device: str, weights: WeightKind, hold: Holder | None
) -> Loaded:
    """Load the Transformers model, its matrices held as `hold` says."""
    from hybridkv.hf import IMPLEMENTATION, pack_model
    from hybridkv.hf.load import load_tokenizer, load_weights

    if description.header is not None:
        from hybridkv.gguf.load import load_gguf

        gguf = load_gguf(description.header, dtype=dtype, device=device, attn_implementation=IMPLEMENTATION, hold=hold)
        return Loaded(description, gguf.model, gguf.tokenizer, gguf.notices)
    code = description.remote_code
    model = load_weights(
        description.path,
        dtype=dtype,
        device=device,
        attn_implementation=IMPLEMENTATION,
        remote_code=code,
        n_ranks=description.n_ranks,
        change=lambda config: change_config(config, description.changes),
        replace=None if hold is None else hold.of_values,
    )
    if hold is not None:
        pack_model(model, weights)
    loaded = Loaded(description, model, load_tokenizer(description.path, remote_code=code))
    _add_turn_ends(loaded)
    return loaded


def _load_native(
    description: Description,
    weights: WeightKind,
    memory: Memory,
    device: str = "cpu",
    hosted: frozenset[str] = frozenset(),
) -> Loaded:
    path, config = description.path, description.config
    if path.is_dir():
        from hybridkv.hf.load import load_tokenizer

        tokenizer = load_tokenizer(path, remote_code=description.remote_code)
        source = directory_source(path, config)
        loaded = Loaded(description, native_model(config, source, weights, device=device), tokenizer)
        _add_turn_ends(loaded)
        return loaded
    assert description.header is not None
    mapped = map_gguf(description.header, memory)
    free = available_memory()
    if memory == "mapped" and (free is None or mapped.source.n_bytes < free.n_bytes):
        mapped.source.populate_after_use()
    model = native_model(mapped.config, mapped.source, weights, mapped.end_ids, device, hosted)
    return Loaded(description, model, mapped.tokenizer, mapped.notices)


def lock_weights(loaded: Loaded) -> None:
    """Keep the weights of a GGUF file from being paged out.

    Raises
    ------
    UsageError
        If the system refuses, or if they are not held as the file has them.
    """
    source = getattr(loaded.model, "source", None)
    if not isinstance(source, GgufSource):
        raise UsageError(
            "--mlock locks the weights of a GGUF file that the native backend uses as they are",
            hint="leave --mlock out",
        )
    source.lock()


def _add_turn_ends(loaded: Loaded) -> None:
    """Have every turn end of the vocabulary end a generation, as in GGUF files: configs often name the end of text."""
    tokenizer = loaded.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        return
    words, n_vocab = ControlWords(tokenizer).ids, vocab_size_of(loaded.model.config)
    found = [*loaded.end_ids, tokenizer.eos_token_id, *(words.get(word) for word in TURN_ENDS)]
    ends = [index for index in dict.fromkeys(found) if index is not None and index < n_vocab]
    if ends:
        loaded.model.generation_config.eos_token_id = ends


__all__ = ["Description", "Loaded", "bundled_model", "bundled_text", "describe", "load", "lock_weights"]
