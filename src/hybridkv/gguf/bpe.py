"""Byte-level BPE: `tokenizer.ggml.model` = `gpt2`.

Owns: vocabulary and merges of the file, and the splitting before them. Does not own the patterns of the
splits (`pretokenizers.py`). Called by `tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.pretokenizers import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from hybridkv.gguf.vocabulary import Vocabulary, add_whole_tokens, begin_and_end

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers

_PRE = "tokenizer.ggml.pre"


def byte_level_bpe(meta: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer.

    Raises
    ------
    ModelFileError
        For an unknown pre-tokenizer, and for merges that do not fit the tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pre = _pre_tokenizer(meta)
    merges = _merges(meta, vocabulary.ids)
    whole = pre.whole_pieces == "vocabulary"
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary.ids), merges=merges, ignore_merges=whole))
    if pre.normalizer == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    add_whole_tokens(tokenizer, vocabulary)
    offsets = processors.ByteLevel(trim_offsets=False)
    ends = begin_and_end(meta, vocabulary, bos=pre.bos == "added")
    tokenizer.post_processor = offsets if ends is None else processors.Sequence([offsets, ends])
    return tokenizer


def assumption(meta: Metadata) -> str | None:
    """Return what is assumed about a file that does not say how its text is split, None for one that does."""
    if meta.text("tokenizer.ggml.model") != "gpt2" or _name(meta) != DEFAULT:
        return None
    reason = f"{_PRE!r} is {DEFAULT!r}" if meta.has(_PRE) else f"{_PRE!r} is missing"
    return (
        f"the file does not say how its tokenizer splits text ({reason}): llama.cpp's default is assumed, "
        "which may not be what the model was trained with"
    )


def _name(meta: Metadata) -> str:
    # An empty name is a missing one to llama.cpp.
    return (meta.text(_PRE) if meta.has(_PRE) else "") or DEFAULT


def _pre_tokenizer(meta: Metadata) -> PreTokenizer:
    name = _name(meta)
    if name not in PRE_TOKENIZERS:
        meta.fail(
            f"unknown pre-tokenizer {name!r} in {_PRE!r}; known: {', '.join(PRE_TOKENIZERS)}",
            hint="load the model from its Hugging Face directory instead",
        )
    return PRE_TOKENIZERS[name]


def _splitter(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def _merges(meta: Metadata, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges as pairs; `tokenizers` raises a bare Exception for parts it does not know."""
    merges = meta.texts("tokenizer.ggml.merges")
    pairs = [(left, right) for left, _, right in map(_apart, merges)]
    parts = {left for left, _ in pairs} | {right for _, right in pairs} | {left + right for left, right in pairs}
    if not parts <= ids.keys():
        bad = next(pair for pair in pairs if not {*pair, pair[0] + pair[1]} <= ids.keys())
        meta.fail(f"'tokenizer.ggml.merges': {merges[pairs.index(bad)][:60]!r} does not join two tokens into a third")
    return pairs


def _apart(merge: str) -> tuple[str, str, str]:
    return merge.partition(" ")
