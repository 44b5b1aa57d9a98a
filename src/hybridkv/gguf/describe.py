"""The description of a GGUF file, from its header alone: name, config, and what of it is left out.

Owns the config as the file says it (`FileConfig`), the fields that all files share, and the checks of tensors' names
that need no model. Does not own the file format (`reader.py`) or an architecture's tables (`architectures/`). Called by
`load.py`, `mapped.py` and `saved.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from hybridkv.gguf.architectures import get_architecture
from hybridkv.gguf.architectures.layers import n_blocks
from hybridkv.gguf.architectures.record import Architecture, Fields
from hybridkv.gguf.bpe import assumption
from hybridkv.gguf.keys import check_unread, unknown_keys
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import Header
from hybridkv.gguf.split import metadata_of
from hybridkv.model import graph_of, rejects
from hybridkv.model.tensors import prediction_tensors

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"

# Tensors beside the text model's in files that hold a whole multimodal model, as ollama writes them.
_ENCODERS = ("v.", "a.", "mm.")
_PREDICTION = "mtp."

_DRAFT_TOKENS = "nextn_draft_tokens"
"""This project's own key: tokens that are frequent, so that a head need not score all of the vocabulary."""


class FileConfig(SimpleNamespace):
    """A model's config as its file says it, under the names of Transformers' class, without that class.

    It has what the file says, and what the class derives from it as far as a graph or the cache asks; other attributes
    of the class it does not have.
    """

    model_type: str

    def get_text_config(self, decoder: bool = True) -> Self:
        """Return itself: a file holds a text model."""
        del decoder
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return all of it by name."""
        return dict(vars(self))


def describe_gguf(path: str | Path | Header) -> tuple[str, FileConfig]:
    """Return a model's name and config, from the header alone.

    Parameters
    ----------
    path
        The .gguf file, of a split model any of its parts; or its header.

    Raises
    ------
    ModelFileError
        For a damaged file, an unknown architecture, or metadata that is missing or out of range.
    """
    meta = metadata_of(path)
    return name_of(meta), file_config(meta, get_architecture(meta.header))


def file_config(meta: Metadata, architecture: Architecture) -> FileConfig:
    """Return the config, once no key is left that asks for what is not computed."""
    fields = fields_of(meta, architecture)
    meta.disregard(_DRAFT_TOKENS)
    check_unread(meta)
    config = FileConfig(**architecture.derived(fields) | fields, model_type=architecture.model_type)
    if has_head(meta, config):
        config.mtp_num_hidden_layers, config.mtp_tokens = 1, _draft_tokens(meta, config.vocab_size)
    return config


def _draft_tokens(meta: Metadata, n_vocab: int) -> list[int]:
    """Return the tokens that a head is to guess among; none for all."""
    if not meta.has(_DRAFT_TOKENS):
        return []
    tokens = meta.integers(_DRAFT_TOKENS, meta.length(_DRAFT_TOKENS))
    if len(set(tokens)) != len(tokens) or max(tokens, default=0) >= n_vocab:
        meta.expected(_DRAFT_TOKENS, f"different token ids below {n_vocab}")
    return tokens


def has_head(meta: Metadata, config: FileConfig) -> bool:
    """Check whether the first block of multi-token prediction is there, whole, and of a kind that is run."""
    _, layers = n_blocks(meta)
    if not meta.has_tensor(f"blk.{layers}.nextn.eh_proj.weight"):
        return False
    try:
        if rejects(config) is not None:
            return False
        graph = graph_of(FileConfig(**vars(config) | {"mtp_num_hidden_layers": 1}))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False  # the metadata describes no model, which whoever loads it says
    if graph.prediction is None:
        return False
    tensors = prediction_tensors(graph, graph.prediction, meta.has_tensor)
    return all(each.optional or each.name_in(meta.has_tensor) is not None for each in tensors)


def says_none(meta: Metadata) -> bool:
    """Check whether a file says that it has no tokenizer, in the two words that llama.cpp knows for it."""
    key = "tokenizer.ggml.model"
    return meta.has(key) and meta.text(key) in ("none", "no_vocab")


def name_of(meta: Metadata) -> str:
    """Return the name that a file gives its model, or else the file's."""
    return meta.text("general.name") if meta.has("general.name") else meta.header.path.stem


def fields_of(meta: Metadata, architecture: Architecture) -> Fields:
    """Return the config class's arguments: the architecture's own, and those that all files share."""
    embedding = meta.tensor(EMBEDDING)
    vocab_size = embedding.shape[0]
    if meta.has("tokenizer.ggml.tokens") and len(meta.texts("tokenizer.ggml.tokens")) > vocab_size:
        meta.fail(f"there are more tokens than the {vocab_size} rows of {EMBEDDING!r}")
    return {
        "num_hidden_layers": n_blocks(meta)[1],
        "max_position_embeddings": meta.integer("context_length", high=2**31 - 1),
        **{field: meta.integer(key) for field, key in architecture.sizes.items()},
        **{field: meta.real(key) for field, key in architecture.reals.items()},
        "vocab_size": vocab_size,
        "tie_word_embeddings": not meta.has_tensor(OUTPUT),
        "bos_token_id": meta.token_id("bos", vocab_size),
        "eos_token_id": meta.token_id("eos", vocab_size),
        "pad_token_id": meta.token_id("padding", vocab_size),
        **architecture.fields(meta),
    }


def skipped(meta: Metadata, n_heads: int = 0) -> dict[str, set[str]]:
    """Return the tensors for which the model classes have no place, by what they are of.

    Parameters
    ----------
    n_heads
        Blocks of multi-token prediction that are read.
    """
    blocks, layers = n_blocks(meta)
    layers += n_heads
    prefixes = {
        "multi-token prediction blocks": (_PREDICTION, *(f"blk.{block}." for block in range(layers, blocks))),
        "image and audio encoders": _ENCODERS,
    }
    names = [info.name for info in meta.header.tensors]
    return {what: {name for name in names if name.startswith(starts)} for what, starts in prefixes.items()}


def notices(meta: Metadata, *, with_tokenizer: bool, n_heads: int = 0) -> tuple[str, ...]:
    """Return what is worth knowing of a file: tensors that were left out, its tokenizer, and keys that nobody knows."""
    unread = skipped(meta, n_heads).items()
    left_out = [f"{len(names)} tensors of {what} were skipped" for what, names in unread if names]
    assumed = assumption(meta) if with_tokenizer else None
    return (*left_out, *([assumed] if assumed else []), *unknown_keys(meta))


def check_tensors(
    meta: Metadata, architecture: Architecture, needed: set[str], optional: Collection[str] = (), n_heads: int = 0
) -> None:
    """Check that a file has the tensors that a model needs, and no more.

    Raises
    ------
    ModelFileError
        Naming some of those that are missing or unknown.
    """
    left_out = {name for names in skipped(meta, n_heads).values() for name in names}
    present = {info.name for info in meta.header.tensors} - left_out - {name for name, _ in architecture.settings}
    for problem, names in (("missing", needed - present), ("unknown", present - needed - set(optional))):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            meta.fail(
                f"{len(names)} {problem} tensor(s) for architecture {architecture.name!r}: {shown}",
                hint="the file is incomplete, or its converter writes another variant of this architecture",
            )
